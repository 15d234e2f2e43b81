"""ImageReward against the image-reward package: stored scores of a small model, and itself where it is installed."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from golden import imagereward as small
from safetensors.numpy import load_file, save_file

from solrl_jax import weights
from solrl_jax.rewards import blip, imagereward
from solrl_jax.weights import WeightsError

GOLDEN = json.loads(small.FILE.read_text())
PROMPTS = list(small.PROMPTS)


def write(folder, seed=0):
    small.write_config(folder)
    save_file(small.draw(GOLDEN["shapes"], seed), folder / "ImageReward.safetensors")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """For the tests that change nothing in it, so that its score is compiled once a shape."""
    return write(tmp_path_factory.mktemp("imagereward"))


@pytest.fixture
def mine(folder, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(folder, tmp_path / "mine")


score = jax.jit(lambda reward, *args: reward.score(*args), static_argnums=0)


def scores(folder, shape):
    reward, params = imagereward.make(folder, "float32_exact")
    return score(reward, params, small.images(*shape), reward.tokenize(PROMPTS))


# --- against the package --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", small.SHAPES)
def test_scores(folder, name):
    """From pictures and prompts to scores: resize, tokenizer, network, centring."""
    ours, theirs = scores(folder, small.SHAPES[name]), np.array(GOLDEN["scores"][name])
    assert (ours.shape, ours.dtype) == ((6,), jnp.float32)
    np.testing.assert_allclose(ours, theirs, atol=5e-6)
    assert np.std(theirs) > 0.1


@pytest.mark.parametrize("i", range(len(small.NASTY)), ids=lambda i: ascii(small.NASTY[i][:12]))
def test_tokens(folder, i):
    """The ids of transformers' first BERT tokenizer, the one in Python."""
    reward, _ = imagereward.make(folder)
    found = reward.tokenize([small.NASTY[i]])
    assert {name: (x.shape, x.dtype) for name, x in found.items()} == {
        "ids": ((1, 35), np.int32),
        "mask": ((1, 35), np.bool_),
    }
    assert found["ids"][0].tolist() == GOLDEN["tokens"]["ids"][i]
    assert found["mask"][0].astype(int).tolist() == GOLDEN["tokens"]["mask"][i]


def test_the_nasty_prompts_are_nasty():
    """Among them are an empty one, one that fills all 35, typed specials, unknown words, and a [PAD] that counts."""
    ids, mask = np.array(GOLDEN["tokens"]["ids"]), np.array(GOLDEN["tokens"]["mask"])
    words = small.vocabulary()
    start, end, unknown = (words.index(word) for word in ("[CLS]", "[SEP]", "[UNK]"))
    assert (ids[:, 0] == start).all() and mask[0].sum() == 2 and (mask.sum(1) == 35).sum() >= 3
    assert (ids[mask.sum(1) == 35, -1] == end).all() and ((ids == unknown).sum(1) > 0).sum() >= 3
    assert ids.max() == len(words) + 1 and ((ids == 0) & (mask == 1)).sum() == 1


@pytest.fixture
def installed(tmp_path):
    """The package's model in its small size."""
    pytest.importorskip("fairscale")
    small.write_config(tmp_path)
    try:
        return small.make(tmp_path, seed=1)
    except ImportError as e:
        pytest.skip(str(e))


def test_live(installed, tmp_path):
    """Other weights than the stored scores': run where image-reward is installed, as tests/golden says."""
    assert installed["shapes"] == GOLDEN["shapes"] and installed["tokens"] == GOLDEN["tokens"]
    write(tmp_path, seed=1)
    for name, shape in small.SHAPES.items():
        np.testing.assert_allclose(scores(tmp_path, shape), installed["scores"][name], atol=5e-6)


# --- pairs ----------------------------------------------------------------------------------------------------------


def test_pairs(folder):
    reward, params = imagereward.make(folder, "float32_exact")
    images, tokens = small.images(48, 48), reward.tokenize(PROMPTS)
    grouped = score(reward, params, images, tokens)
    each = score(reward, params, images, jax.tree.map(lambda x: np.repeat(x, 2, axis=0), tokens))
    np.testing.assert_allclose(grouped, each, atol=5e-6)
    order = np.array([4, 5, 0, 1, 2, 3])  # permuted prompts, permuted scores
    moved = score(reward, params, images[order], jax.tree.map(lambda x: x[[2, 0, 1]], tokens))
    np.testing.assert_allclose(moved, grouped[order], atol=5e-6)
    with pytest.raises(ValueError, match="5 images of 3 prompts"):
        score(reward, params, images[:5], tokens)


def test_neighbours_do_not_matter(folder):
    """A picture's score is its own: alone, in chunks, beside white and black ones."""
    reward, params = imagereward.make(folder, "float32_exact")
    images, tokens = small.images(48, 48), reward.tokenize(PROMPTS)
    together = np.asarray(score(reward, params, images, tokens))
    one = [jax.tree.map(lambda x, i=i: x[i : i + 1], tokens) for i in range(3)]
    alone = [float(score(reward, params, images[i : i + 1], one[i // 2])[0]) for i in range(6)]
    chunks = np.concatenate([score(reward, params, images[2 * i : 2 * i + 2], one[i]) for i in range(3)])
    np.testing.assert_allclose(alone, together, atol=5e-6)
    np.testing.assert_allclose(chunks, together, atol=5e-6)
    others = images.copy()
    others[1::2] = np.arange(3)[:, None, None, None] / 2
    np.testing.assert_allclose(score(reward, params, others, tokens)[::2], together[::2], atol=5e-6)
    assert np.abs(score(reward, params, others, tokens) - together)[1::2].min() > 0.01


def test_padding_is_not_seen(folder):
    """What stands behind the prompt's end has no effect; what stands before it has."""
    reward, params = imagereward.make(folder, "float32_exact")
    images, tokens = small.images(48, 48), reward.tokenize(PROMPTS)
    plain = np.asarray(score(reward, params, images, tokens))
    count = tokens["mask"].sum(1)
    assert list(count > 34) == [False, False, True]
    rubbish = np.where(tokens["mask"], tokens["ids"], 7)
    np.testing.assert_allclose(score(reward, params, images, tokens | {"ids": rubbish}), plain, atol=5e-6)
    rubbish[:, 2] = 7
    assert np.abs(score(reward, params, images, tokens | {"ids": rubbish}) - plain).min() > 1e-3


def test_every_product_is_full_precision(folder):
    """TF32 would halve the digits on a GPU. Words are embedded once a prompt, and no pair is scored but the six."""
    reward, params = imagereward.make(folder, "float32_exact")
    args = params, small.images(48, 48), reward.tokenize(PROMPTS)
    lowered = jax.jit(reward.score).lower(*args).as_text()
    products = [line for line in lowered.splitlines() if "dot_general" in line or "convolution" in line]
    assert len(products) > 20
    assert all("HIGHEST" in line for line in products)
    assert "tensor<3x35x32xf32>" in lowered and "tensor<6x35x32xf32>" in lowered
    assert "tensor<18x" not in lowered


# --- files ----------------------------------------------------------------------------------------------------------


def test_one_reward_for_one_folder(folder):
    """A static argument of jit, equal and hashable however often it is made; bf16 is another and close."""
    (first, params), (second, _) = imagereward.make(folder), imagereward.make(str(folder))
    assert first == second and hash(first) == hash(second)
    half, same = imagereward.make(folder, jnp.bfloat16)
    assert half != first
    assert {leaf.dtype for leaf in jax.tree.leaves(same)} == {np.dtype(np.float32)}
    images, tokens = small.images(48, 48), first.tokenize(PROMPTS)
    exact, rough = score(first, params, images, tokens), score(half, params, images, tokens)
    assert 1e-6 < np.abs(exact - rough).max() < 0.1


def test_the_published_pickle(mine):
    """ImageReward.pt is a bare state dict of torch.save; as safetensors the weights are the same."""
    file = mine / "ImageReward.safetensors"
    _, before = imagereward.make(mine)
    torch.save({key: torch.tensor(x) for key, x in load_file(file).items()}, mine / "ImageReward.pt")
    file.unlink()
    for path in (mine, mine / "ImageReward.pt"):
        jax.tree.map(np.testing.assert_array_equal, imagereward.make(path)[1], before)


def test_there_and_back(folder, tmp_path):
    """Every tensor of the file but the five that score nothing."""
    cfg, stored = blip.BlipConfig.read(folder), load_file(folder / "ImageReward.safetensors")
    params = blip.load(folder / "ImageReward.safetensors", blip.Blip(cfg))
    weights.save(params, blip.KEYS, tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert stored.keys() - again.keys() == {
        "blip.text_encoder.embeddings.position_ids",
        *(f"blip.{side}_proj.{kind}" for side in ("vision", "text") for kind in ("weight", "bias")),
    }
    assert again.keys() <= stored.keys()
    assert all(np.array_equal(again[key], stored[key]) for key in again)


def test_strict_keys(mine):
    file = mine / "ImageReward.safetensors"
    stored = load_file(file)
    layer = "blip.text_encoder.encoder.layer.1."
    changes = {layer + "crossattention.self.kye.bias": stored.pop(layer + "crossattention.self.key.bias")}
    changes |= {"mlp.layers.7.weight": np.zeros((1, 8), np.float32), "blip.itm_head.bias": np.zeros(2, np.float32)}
    save_file(stored | changes, file)
    with pytest.raises(WeightsError) as e:
        imagereward.make(mine)
    assert [line.strip() for line in str(e.value).splitlines()[1:]] == [
        f"missing {layer}crossattention.self.key.bias",
        "unused blip.itm_head.bias",
        f"unused {layer}crossattention.self.kye.bias",
        "mlp.layers.7.weight has shape (8, 1), not (16, 1)",
    ]
    save_file({"visual_projection.weight": np.ones((2, 2), np.float32)}, file)
    with pytest.raises(WeightsError, match=r"safetensors holds another model, without BLIP: give ImageReward\.pt"):
        imagereward.make(mine)


def test_vocabulary_as_tokenizer_json(mine):
    words = (mine / "vocab.txt").read_text(encoding="utf-8").splitlines()
    reward, _ = imagereward.make(mine)
    found = reward.tokenize(small.NASTY)
    (mine / "vocab.txt").unlink()
    saved = {"model": {"type": "WordPiece", "vocab": {word: i for i, word in enumerate(words)}}}
    (mine / "tokenizer.json").write_text(json.dumps(saved))
    again, _ = imagereward.make(mine)
    assert again != reward
    jax.tree.map(np.testing.assert_array_equal, again.tokenize(small.NASTY), found)


@pytest.mark.parametrize(
    "model", [None, [1], {}, {"vocab": [["a", 1.0], ["b", 2.0]]}, {"vocab": {"[PAD]": 0.5, "[UNK]": 1}}, {"vocab": 5}]
)
def test_a_tokenizer_json_of_another_kind(mine, model):
    """T5's, for example, has a list of words with scores."""
    (mine / "vocab.txt").unlink()
    (mine / "tokenizer.json").write_text(json.dumps({"model": model}))
    with pytest.raises(WeightsError, match=r"tokenizer.json has no model.vocab of word: id pairs: ImageReward takes"):
        imagereward.make(mine)


def test_from_the_hub(folder, tmp_path, monkeypatch):
    """The repository of the weights has no vocabulary: it is BERT's. Files of the hub's cache are links to blobs."""
    blobs, snapshots = tmp_path / "blobs", {"zai-org/ImageReward": tmp_path / "a", imagereward.BERT: tmp_path / "b"}
    for path in (blobs, *snapshots.values()):
        path.mkdir()
    state = {key: torch.tensor(x) for key, x in load_file(folder / "ImageReward.safetensors").items()}
    torch.save(state, blobs / "0")
    shutil.copy(folder / "med_config.json", blobs / "1")
    shutil.copy(folder / "vocab.txt", blobs / "2")
    for link, blob in (("a/ImageReward.pt", "0"), ("a/med_config.json", "1"), ("b/vocab.txt", "2")):
        (tmp_path / link).symlink_to(blobs / blob)
    monkeypatch.setattr("solrl_jax.weights.hub._fetch", lambda name, *_: snapshots[name])
    reward, params = imagereward.make("zai-org/ImageReward")
    ours, before = imagereward.make(folder)
    jax.tree.map(np.testing.assert_array_equal, params, before)
    jax.tree.map(np.testing.assert_array_equal, reward.tokenize(PROMPTS), ours.tokenize(PROMPTS))


def test_what_is_missing_or_wrong(folder, tmp_path):
    words = (folder / "vocab.txt").read_text(encoding="utf-8")
    count = len(words.splitlines())

    def said(file, text):
        """With that file changed; None takes it away."""
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(folder, path)
        (path / file).unlink()
        if text is not None:
            (path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(WeightsError) as e:
            imagereward.make(path)
        return str(e.value)

    assert f"{count + 3} words with [DEC] and [ENC], not {count + 2}" in said("vocab.txt", words + "Cased\n")
    message = "vocab.txt has no [SEP]: ImageReward takes the vocabulary of google-bert/bert-base-uncased"
    assert message in said("vocab.txt", words.replace("[SEP]", "</s>"))
    assert "vocab.txt is not text in UTF-8 (" in said("vocab.txt", b"\xff\xfe[PAD]")
    message = "holds no vocab.txt or tokenizer.json: put that of google-bert/bert-base-uncased there (google-bert/"
    assert message in said("vocab.txt", None)
    message = "holds none of ImageReward.safetensors, model.safetensors, ImageReward.pt: get"
    assert message in said("ImageReward.safetensors", None)
    assert "is not a complete safetensors file" in said("ImageReward.safetensors", "version https://git-lfs")
    assert "hidden_act 'swish_2' is not known here" in said("med_config.json", '{"hidden_act": "swish_2"}')
    assert "med_config.json: vision_config is [1], not an object" in said("med_config.json", '{"vision_config": [1]}')
    assert "med_config.json is not JSON" in said("med_config.json", "{")
    assert f"not {30524}" in said("med_config.json", None)  # the public sizes
    for path, message in (
        (None, "imagereward needs ImageReward.pt, its folder"),
        ("zai-org/ImageReward", "zai-org/ImageReward is not a folder here and not complete in the hub's cache"),
    ):
        with pytest.raises(WeightsError, match=message):
            imagereward.make(path)


# --- the public size ------------------------------------------------------------------------------------------------


def test_public_size(folder):
    """Parameters and names of ImageReward.pt, from shapes alone, whatever its folder lacks."""
    reward, params, tokens = imagereward.shapes("zai-org/ImageReward", "bfloat16")
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 446_206_689
    names = {key for leaf in weights.needed(params, blip.KEYS) for key in leaf.keys}
    assert len(names) == 624 - 4  # less the projections that score nothing
    pixels = jax.ShapeDtypeStruct((6, 512, 512, 3), jnp.float32)
    tokens = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape[1:]), x.dtype), tokens)
    assert jax.eval_shape(reward.score, params, pixels, tokens).shape == (6,)
    loaded = jax.tree.map(jnp.shape, imagereward.make(folder)[1])
    assert loaded == jax.tree.map(lambda x: x.shape, imagereward.shapes(folder)[1])


@pytest.mark.slow
def test_full_size(tmp_path):
    """446 million random weights through a file; against the package where it is installed."""
    words = [*small.vocabulary(), *(f"[unused{i}]" for i in range(30522))][:30522]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    (tmp_path / "med_config.json").write_text(json.dumps({"vocab_size": 30524, "add_cross_attention": True}))
    _, spec, _ = imagereward.shapes(tmp_path)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        kind = path[-1].key
        noise = rng.standard_normal(leaf.shape, np.float32)
        inputs = np.prod(leaf.shape[:-1] if leaf.ndim == 4 else leaf.shape[-2:-1])  # of the patches', or of a Linear
        return noise * inputs**-0.5 if kind == "kernel" else 0.1 * noise + (kind == "scale")

    tree = jax.tree_util.tree_map_with_path(draw, spec)
    weights.save(tree, blip.KEYS, tmp_path / "ImageReward.safetensors", dtype=np.float32)
    del tree
    reward, params = imagereward.make(tmp_path, "float32_exact")
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 446_206_689
    images = small.images(512, 512)[::2]
    ours = np.asarray(score(reward, params, images, reward.tokenize(PROMPTS)))
    assert np.isfinite(ours).all() and np.std(ours) > 1e-3
    try:
        model = small.build(tmp_path, whole=True)
    except ImportError:
        return
    stored = {key: torch.tensor(x) for key, x in load_file(tmp_path / "ImageReward.safetensors").items()}
    model.load_state_dict(stored, strict=False)
    theirs = small.score(model, images)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
