"""HPSv2 against scores that open_clip gave for the same random weights, through its files, and what is no HPS v2.1."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from solrl_jax import weights
from solrl_jax.rewards import clip_tower, hpsv2
from solrl_jax.structs import WeightsError
from solrl_jax.weights import hub
from tests.golden import clip

GOLDEN = json.loads(clip.TOWERS.read_text())
PROMPTS = [clip.CAPTIONS[0], clip.CAPTIONS[3]]
FILE = hpsv2.PUBLIC_FILE


def write(folder, name="gelu", kind="safetensors", stem="HPS_v2.1_compressed", prefix=""):
    """A small HPS with its config and tokenizer, as torch saves it or as safetensors."""
    for file in clip.TOKENIZER.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": GOLDEN[name]["config"]}))
    state = {prefix + key: value for key, value in clip.weights(GOLDEN[name]["shapes"]).items()}
    if kind == "pt":
        state = {key: torch.tensor(value) for key, value in state.items()}
        torch.save({"epoch": 1, "state_dict": state}, folder / f"{stem}.pt")
    else:
        save_file(state, folder / f"{stem}.safetensors")
    return folder / f"{stem}.{kind}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One that no test changes."""
    path = tmp_path_factory.mktemp("hps")
    write(path)
    return path


score = jax.jit(lambda reward, *args: reward.score(*args), static_argnums=0)


@pytest.mark.parametrize(("name", "kind", "prefix"), [("gelu", "pt", ""), ("quick_gelu", "safetensors", "module.")])
def test_golden_scores(tmp_path, name, kind, prefix):
    """Pictures that are resized, that are not, and that are padded; captions with curly quotes."""
    reward, params = hpsv2.make(write(tmp_path, name, kind, prefix=prefix), "float32_exact")
    assert reward.name == "hpsv2"
    for shape in clip.SHAPES:
        ours = score(reward, params, clip.pictures(shape), reward.tokenize(PROMPTS))
        assert (ours.shape, ours.dtype) == ((4,), jnp.float32)
        np.testing.assert_allclose(ours, GOLDEN[name]["scores"]["x".join(map(str, shape))], atol=1e-6)


def test_goldens_are_still_what_open_clip_gives():
    pytest.importorskip("open_clip")
    for name, config in clip.CONFIGS.items():
        found = clip.tower(config)
        assert (found["config"], found["shapes"]) == (GOLDEN[name]["config"], GOLDEN[name]["shapes"])
        for shape, scores in found["scores"].items():
            np.testing.assert_allclose(scores, GOLDEN[name]["scores"][shape], atol=1e-6)


def test_saved_again_it_is_the_same_file(folder, tmp_path):
    """q, k and v are put together again, in place."""
    _, params = hpsv2.make(folder)
    weights.save(params, clip_tower.OPEN_CLIP_KEYS, tmp_path / "again.safetensors")
    stored, again = (load_file(f) for f in (folder / "HPS_v2.1_compressed.safetensors", tmp_path / "again.safetensors"))
    assert stored.keys() == again.keys() == GOLDEN["gelu"]["shapes"].keys()
    assert all(np.array_equal(stored[key], again[key]) for key in stored)


def test_public_size():
    """Parameters and tensors of HPS_v2.1_compressed.pt, from shapes alone."""
    reward, params, tokens = hpsv2.shapes(None)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 986_109_441
    keys = {key for leaf in weights.needed(params, clip_tower.OPEN_CLIP_KEYS) for key in leaf.keys}
    assert len(keys) == 686 and {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    images = jax.ShapeDtypeStruct((3, 512, 512, 3), jnp.float32)
    assert jax.eval_shape(reward.score, params, images, tokens).shape == (3,)
    vision = clip_tower.VIT_H_14.vision
    assert vision.hidden_size // vision.num_attention_heads == 80


def test_open_clips_config_of_the_public_model(tmp_path):
    """As open_clip 3.3.0's model_configs/ViT-H-14.json."""
    config = {
        "embed_dim": 1024,
        "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
    }
    file = tmp_path / "open_clip_config.json"
    file.write_text(json.dumps({"model_cfg": config}))
    assert clip_tower.ClipConfig.read_open_clip(tmp_path) == clip_tower.VIT_H_14
    config["text_cfg"]["pool_type"] = "last"
    file.write_text(json.dumps({"model_cfg": config}))
    with pytest.raises(WeightsError, match=r"open_clip_config.json describes a model .* argument 'pool_type'"):
        clip_tower.ClipConfig.read_open_clip(tmp_path)


def test_bfloat16_towers_are_another_reward(folder):
    (full, params), (half, same), (again, _) = (hpsv2.make(folder, d) for d in ("float32", "bfloat16", jnp.bfloat16))
    assert half == again != full and jax.tree.all(jax.tree.map(np.array_equal, params, same))
    args = params, clip.pictures((48, 48)), full.tokenize(PROMPTS)
    difference = np.abs(np.asarray(score(half, *args)) - np.asarray(score(full, *args)))
    assert 1e-5 < difference.max() < 0.02


# --- what is no HPS v2.1 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["HPS_v2_compressed", "HPS_v2", "hps_v2.0_compressed"])
def test_v2_0_is_not_taken_for_v2_1(tmp_path, name):
    """It has the same keys and shapes: nothing but its name says so."""
    file = write(tmp_path, stem=name)
    with pytest.raises(WeightsError, match=rf"{file} is HPS v2.0, whose scores are not those of v2.1: give {FILE}$"):
        hpsv2.make(file)
    if name.startswith("HPS"):
        with pytest.raises(WeightsError, match=r"is HPS v2\.0"):
            hpsv2.make(tmp_path)


def test_of_both_versions_in_a_folder_v2_1_is_taken(tmp_path):
    write(tmp_path, stem="HPS_v2_compressed")
    assert hpsv2.find(write(tmp_path, kind="pt")) == hpsv2.find(tmp_path) == tmp_path / FILE
    assert hpsv2.find(write(tmp_path)) == hpsv2.find(tmp_path) == tmp_path / "HPS_v2.1_compressed.safetensors"
    (tmp_path / FILE).rename(tmp_path / "mine.pt")
    assert hpsv2.find(tmp_path / "mine.pt") == tmp_path / "mine.pt"  # another name is trusted


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_a_truncated_download(tmp_path, kind):
    file = write(tmp_path, kind=kind)
    file.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(WeightsError) as e:
        hpsv2.make(tmp_path)
    assert file.name in str(e.value) and "download it again" in str(e.value) and "\n" not in str(e.value)


def test_another_architecture_is_said_in_one_line(tmp_path):
    write(tmp_path)
    (tmp_path / "open_clip_config.json").unlink()
    wanted = "vision 1280 wide, 32 layers, patches of 14; text 1024 wide, 24 layers"
    found = "vision 160 wide, 3 layers, patches of 8; text 64 wide, 2 layers"
    with pytest.raises(WeightsError, match=rf"safetensors is another CLIP: {found}, not {wanted}$"):
        hpsv2.make(tmp_path)


def test_transformers_naming_is_said_in_one_line(tmp_path):
    file = tmp_path / "HPS_v2.1.safetensors"
    state = {"logit_scale": np.ones(()), "vision_model.embeddings.class_embedding": np.ones(4)}
    save_file(state, file)
    with pytest.raises(WeightsError, match=r"holds transformers' naming, not open_clip's: give another file$"):
        hpsv2.make(file)
    save_file({"weight": np.ones(4)}, file)
    with pytest.raises(WeightsError, match=r"holds no CLIP in open_clip's naming: give another file$"):
        hpsv2.make(file)


@pytest.mark.parametrize(
    ("key", "axes"), [("visual.conv1.weight", 4), ("token_embedding.weight", 2)], ids=["picture", "text"]
)
def test_a_flattened_tensor_is_named(tmp_path, key, axes):
    file = write(tmp_path)
    save_file(load_file(file) | {key: np.zeros(6, np.float32)}, file)
    with pytest.raises(
        WeightsError, match=rf"^{file}: {key} has shape \(6,\), not {axes} axes: give the file as it was"
    ):
        hpsv2.make(file)


@pytest.mark.parametrize(("part", "name"), [("vision_cfg", "patch_size"), ("text_cfg", "heads")])
def test_a_size_of_zero_in_open_clips_config(tmp_path, part, name):
    write(tmp_path)
    file = tmp_path / "open_clip_config.json"
    found = json.loads(file.read_text())
    found["model_cfg"][part][name] = 0
    file.write_text(json.dumps(found))
    with pytest.raises(
        WeightsError, match=rf"^{file} describes a model that is not known here: integer (division|mod)"
    ):
        clip_tower.ClipConfig.read_open_clip(tmp_path)


def test_single_tensors_that_do_not_fit_are_listed(tmp_path):
    file = write(tmp_path)
    state = load_file(file)
    state["visual.proj"], state["left.over"] = state["visual.proj"][:, :5], state.pop("ln_final.bias")
    state["visual.transformer.resblocks.1.attn.in_proj_bias"] = np.zeros(481, np.float32)
    save_file(state, file)
    with pytest.raises(WeightsError) as e:
        hpsv2.make(file)
    assert str(e.value).split("\n  ")[1:] == [
        "missing ln_final.bias",
        "unused left.over",
        "visual.transformer.resblocks.1.attn.in_proj_bias has shape (481,), not (160,)",
        "visual.proj has shape (160, 5), not (160, 24)",
    ]


def test_where_nothing_is(tmp_path, monkeypatch):
    with pytest.raises(WeightsError, match=rf"hpsv2 needs {FILE}, its folder, or xswu/HPSv2"):
        hpsv2.make(None)
    with pytest.raises(WeightsError, match=rf"holds no {FILE} .*: get it from xswu/HPSv2"):
        hpsv2.make(tmp_path)
    with pytest.raises(WeightsError, match="nowhere is not a directory"):
        hpsv2.make("nowhere")
    asked = []
    monkeypatch.setattr(hub, "_fetch", lambda *args: asked.append(args) or tmp_path)
    write(tmp_path, kind="pt")
    assert hpsv2.find("xswu/HPSv2") == tmp_path / FILE and asked == [("xswu/HPSv2", (FILE,), (), "")]


def test_an_embedding_smaller_than_the_vocabulary(tmp_path):
    file = write(tmp_path)
    state, config = load_file(file), json.loads((tmp_path / "open_clip_config.json").read_text())
    state["token_embedding.weight"] = state["token_embedding.weight"][:49000]
    config["model_cfg"]["text_cfg"]["vocab_size"] = 49000
    save_file(state, file)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"the tokenizer has 49408 tokens .* vocab_size 49000"):
        hpsv2.make(file)
