"""CLIP's towers and CLIPScore against transformers on small random weights, through files and back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracle import error, randomise
from safetensors.numpy import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from experiments.tokenizers_local import write_clip_tokenizer
from solrl_jax import weights
from solrl_jax.models.text import ClipTextConfig
from solrl_jax.rewards import clip_tokens, clip_tower, clipscore, preprocess

PROMPTS = ["a red circle left of a blue square", "two green triangles", "a white area, and more words than fit here"]
LENGTH = 10


def write_clip(folder, act="quick_gelu", eos=None, **config):
    """A random CLIPModel with its tokenizer; eos None is the tokenizer's own id."""
    vocab_size = write_clip_tokenizer(folder, PROMPTS, length=LENGTH)
    shared = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_act": act, "projection_dim": 7}
    text = {"vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 40, "max_position_embeddings": LENGTH}
    text |= shared | {"eos_token_id": vocab_size - 1 if eos is None else eos}
    vision = {"hidden_size": 24, "intermediate_size": 48, "image_size": 32, "patch_size": 8} | shared
    model = randomise(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)))
    model.save_pretrained(folder, **config)
    return model


def pixels_of(images, mean=preprocess.OPENAI_MEAN, std=preprocess.OPENAI_STD, size=32):
    """torch's own resize of the short edge, the middle, and standardising; NHWC [0, 1] -> NCHW."""
    x = torch.tensor(images).permute(0, 3, 1, 2)
    height, width = x.shape[2:]
    short = min(height, width)
    shape = [size if n == short else int(size * n / short) for n in (height, width)]
    x = torch.nn.functional.interpolate(x, shape, mode="bilinear", antialias=True)
    top, left = (round((n - size) / 2) for n in shape)
    x = x[:, :, top : top + size, left : left + size]
    return (x - torch.tensor(mean).reshape(3, 1, 1)) / torch.tensor(std).reshape(3, 1, 1)


def oracle(model, folder, images, **how):
    """Cosines and scores [images, prompts]."""
    tokens = CLIPTokenizer.from_pretrained(folder)(
        PROMPTS, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"
    )
    with torch.no_grad():
        out = model(pixel_values=pixels_of(images, **how), **tokens)
        return out.image_embeds @ out.text_embeds.T, out.logits_per_image / 100


def random_images(*shape):
    return np.random.default_rng(0).uniform(size=(*shape, 3)).astype(np.float32)


score = jax.jit(lambda reward, *args: reward.score(*args), static_argnums=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One CLIP for the tests that change nothing in it, so that its score is compiled once."""
    path = tmp_path_factory.mktemp("clip")
    write_clip(path)
    return path


@pytest.mark.parametrize(
    ("act", "eos", "shape"), [("quick_gelu", 2, (48, 48)), ("gelu", None, (32, 32)), ("gelu", 2, (40, 64))]
)
def test_scores(tmp_path, act, eos, shape):
    model = write_clip(tmp_path, act, eos)
    reward, params = clipscore.make(tmp_path, "float32_exact")
    images = random_images(6, *shape)
    ours = score(reward, params, images, reward.tokenize(PROMPTS))
    cosines, scores = oracle(model, tmp_path, images)
    pairs = (torch.arange(6), torch.arange(6) // 2)  # two images of each of three prompts
    assert (reward.name, ours.shape, ours.dtype) == ("clipscore", (6,), jnp.float32)
    assert error(ours, scores[pairs]) < 1e-5
    scale = float(np.exp(params["logit_scale"]))
    np.testing.assert_allclose(np.asarray(ours) * 100 / scale, cosines[pairs], atol=1e-6)


def test_features_from_shards_and_old_files(tmp_path):
    model = write_clip(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    tower, params = clip_tower.load_clip(tmp_path)
    variables = {"params": params}
    images, ids = random_images(2, 32, 32), np.random.default_rng(0).integers(0, 500, (3, LENGTH))
    ids[:, -1] = tower.cfg.text.eos_token_id
    with torch.no_grad():
        out = model(pixel_values=torch.tensor(images).permute(0, 3, 1, 2), input_ids=torch.tensor(ids))
    image, text = jax.jit(tower.apply)(variables, images, jnp.asarray(ids))
    np.testing.assert_allclose(image, out.image_embeds, atol=1e-6)
    np.testing.assert_allclose(text, out.text_embeds, atol=1e-6)
    assert (image.shape, text.shape) == ((2, 20), (3, 20))

    weights.save(params, clip_tower.HF_KEYS, tmp_path / "saved" / "model.safetensors")
    (tmp_path / "saved" / "config.json").write_text((tmp_path / "config.json").read_text())
    again = CLIPModel.from_pretrained(tmp_path / "saved").state_dict()
    for key, value in model.state_dict().items():
        np.testing.assert_array_equal(again[key], value)
    file = tmp_path / "saved" / "model.safetensors"
    buffers = {f"{side}_model.embeddings.position_ids": np.arange(5)[None] for side in ("text", "vision")}
    save_file(load_file(file) | buffers, file)  # as transformers < 4.31 did
    _, old = clip_tower.load_clip(tmp_path / "saved")
    jax.tree.map(np.testing.assert_array_equal, old, params)


def test_public_size():
    """Parameter count of openai/clip-vit-large-patch14, from shapes alone."""
    text = ClipTextConfig(hidden_size=768, num_attention_heads=12, intermediate_size=3072, projection_dim=768)
    vision = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    cfg = clip_tower.ClipConfig(text, clip_tower.ClipVisionConfig(**vision, patch_size=14), 768)
    args = jnp.zeros((1, 224, 224, 3)), jnp.zeros((1, 77), jnp.int32)
    shapes = jax.eval_shape(clip_tower.ClipTower(cfg).init, jax.random.key(0), *args)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 427_616_513


def test_one_reward_for_one_folder(folder):
    """A static argument of jit: equal and hashable however often it is made, and traced once."""
    (first, params), (second, _) = clipscore.make(folder), clipscore.make(str(folder))
    assert first == second
    assert hash(first) == hash(second)
    traces = []

    def counted(reward, *args):
        traces.append(reward)
        return reward.score(*args)

    f = jax.jit(counted, static_argnums=0)
    images, tokens = random_images(2, 32, 32), first.tokenize(PROMPTS[:2])
    assert np.array_equal(f(first, params, images, tokens), f(second, params, images, tokens))
    assert len(traces) == 1
    half, params = clipscore.make(folder, jnp.bfloat16)
    assert half != first
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    np.testing.assert_allclose(f(half, params, images, tokens), f(first, params, images, tokens), atol=0.01)


def test_groups_are_pairs(folder):
    reward, params = clipscore.make(folder, "float32_exact")
    images, tokens = random_images(6, 32, 32), reward.tokenize(PROMPTS)
    grouped = score(reward, params, images, tokens)
    each = score(reward, params, images, {"ids": np.repeat(tokens["ids"], 2, axis=0)})
    np.testing.assert_allclose(grouped, each, rtol=1e-5)
    order = np.array([4, 5, 0, 1, 2, 3])  # permuted prompts, permuted scores
    moved = score(reward, params, images[order], {"ids": tokens["ids"][[2, 0, 1]]})
    np.testing.assert_allclose(moved, grouped[order], rtol=1e-5)
    with pytest.raises(ValueError, match="5 images of 3 prompts"):
        score(reward, params, images[:5], tokens)


def test_every_product_is_full_precision(folder):
    """TF32 would halve the digits on a GPU. The text is encoded once a prompt, not once an image."""
    reward, params = clipscore.make(folder, "float32_exact")
    args = params, random_images(6, 48, 48), reward.tokenize(PROMPTS)
    lowered = jax.jit(reward.score).lower(*args).as_text()
    products = [line for line in lowered.splitlines() if "dot_general" in line or "convolution" in line]
    assert len(products) > 10
    assert all("HIGHEST" in line for line in products)
    assert "tensor<3x10x32xf32>" in lowered
    assert "tensor<6x10x32xf32>" not in lowered


def test_tokens(folder):
    reward, _ = clipscore.make(folder)
    ids = reward.tokenize(PROMPTS)["ids"]
    end = CLIPTokenizer.from_pretrained(folder).eos_token_id
    assert (ids.shape, ids.dtype) == ((3, LENGTH), np.int32)
    assert list(ids[1, 4:]) == [end] * 6  # padded with the end
    assert ids[2, -1] == end  # cut, and still ended


def test_preprocessor_config_is_read(tmp_path):
    model = write_clip(tmp_path)
    how = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    preprocessor = {"image_mean": how["mean"], "image_std": how["std"], "size": 32, "crop_size": 32}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    reward, params = clipscore.make(tmp_path, "float32_exact")
    images = random_images(3, 32, 32)
    ours = score(reward, params, images, reward.tokenize(PROMPTS))
    assert error(ours, oracle(model, tmp_path, images, **how)[1].diag()) < 1e-5


def test_processor_config_of_transformers_5_is_read(tmp_path):
    """As its CLIPProcessor saves it, without preprocessor_config.json; beside one it goes first, if it has the part."""
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4], **size).save_pretrained(tmp_path)
    old, new = (tmp_path / f"{name}_config.json" for name in ("preprocessor", "processor"))
    values = json.loads(old.read_text())
    old.unlink()
    new.write_text(json.dumps({"image_processor": values, "processor_class": "CLIPProcessor"}))
    assert preprocess.read_mean_std(tmp_path, 32) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    with pytest.raises(weights.WeightsError, match=rf"^{new}: size is .*: the model's config says image_size 64"):
        preprocess.read_mean_std(tmp_path, 64)
    old.write_text(json.dumps(values | {"image_mean": [0.1, 0.2, 0.3]}))
    assert preprocess.read_mean_std(tmp_path, 32)[0] == (0.5, 0.4, 0.3)
    assert tuple(CLIPImageProcessor.from_pretrained(tmp_path).image_mean) == (0.5, 0.4, 0.3)
    new.write_text(json.dumps({"processor_class": "CLIPProcessor"}))
    assert preprocess.read_mean_std(tmp_path, 32)[0] == (0.1, 0.2, 0.3)
    new.write_text(json.dumps({"image_processor": 3}))
    with pytest.raises(weights.WeightsError, match=rf"^{new}: image_processor is 3, not an object"):
        preprocess.read_mean_std(tmp_path, 32)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"projection_dim": 64, "text_config": {"hidden_size": 256}, "vision_config": {"patch_size": 16}},
        {"text_config": {"num_hidden_layers": 3}, "text_config_dict": {"num_attention_heads": 4}},
        {"vision_config": {"hidden_size": 24, "num_attention_heads": 4}, "vision_config_dict": None},
    ],
)
def test_missing_config_keys(tmp_path, values):
    """As transformers fills them, for every field of ours."""
    (tmp_path / "config.json").write_text(json.dumps(values))
    ours, theirs = clip_tower.ClipConfig.read(tmp_path), CLIPConfig(**json.loads(json.dumps(values)))
    assert ours.projection_dim == ours.text.projection_dim == theirs.projection_dim
    for mine, other in ((ours.text, theirs.text_config), (ours.vision, theirs.vision_config)):
        names = [name for name in vars(mine) if name != "projection_dim"]
        assert {name: getattr(mine, name) for name in names} == {name: getattr(other, name) for name in names}


def test_errors(tmp_path):
    write_clip(tmp_path)
    with pytest.raises(weights.WeightsError, match="clipscore needs the folder"):
        clipscore.make(None)
    (tmp_path / "vocab.json").rename(tmp_path / "elsewhere.json")
    with pytest.raises(weights.WeightsError, match=r"vocab\.json"):
        clipscore.make(tmp_path)
    (tmp_path / "elsewhere.json").rename(tmp_path / "vocab.json")
    folder = str(tmp_path.resolve())
    count = len(CLIPTokenizer.from_pretrained(folder))
    for changes in ({"vocab_size": 100, "eos_token_id": 2}, {"vocab_size": count, "eos_token_id": 7}):
        with pytest.raises(weights.WeightsError, match=" and ".join(f"{k} {v}" for k, v in changes.items())):
            clip_tokens.check_hf(ClipTextConfig(**changes), folder)

    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    stored["vision_model.post_layernorm.weigth"] = stored.pop("vision_model.post_layernorm.weight")
    stored["visual_projection.weight"] = np.zeros((20, 25), np.float32)
    save_file(stored, file)
    with pytest.raises(weights.WeightsError) as e:
        clipscore.make(tmp_path)
    assert "missing vision_model.post_layernorm.weight" in str(e.value)
    assert "unused vision_model.post_layernorm.weigth" in str(e.value)
    assert "visual_projection.weight has shape (25, 20), not (24, 20)" in str(e.value)
