"""PickScore against transformers' CLIPModel on small random weights with ViT-H/14's shape of head, through files."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracle import error, randomise
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from experiments.tokenizers_local import write_clip_tokenizer
from solrl_jax import weights
from solrl_jax.rewards import clip_tokens, clip_tower, pickscore, preprocess
from solrl_jax.weights import hub

PROMPTS = ["a red circle left of a blue square", "two green triangles, “quoted”"]
SIZE = 32


def write(folder):
    """A random CLIPModel, erf GELU and heads of 80 in the vision, with its tokenizer."""
    vocab_size = write_clip_tokenizer(folder, PROMPTS)
    shared = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "gelu"}
    text = {"vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 128, "eos_token_id": 2} | shared
    vision = {"hidden_size": 160, "intermediate_size": 640, "image_size": SIZE, "patch_size": 8} | shared
    model = randomise(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)))
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pick")
    return folder, write(folder)


def pixels_of(images, size=SIZE):
    """Pillow's bytes, the middle, standardised; NHWC [0, 1] -> NCHW."""
    out = []
    for image in (np.clip(np.round(images * 255), 0, 255)).astype(np.uint8):
        height, width = image.shape[:2]
        short = min(height, width)
        height, width = (size if n == short else int(size * n / short) for n in (height, width))
        resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC), np.float32)
        top, left = (height - size) // 2, (width - size) // 2
        middle = resized[top : top + size, left : left + size] / 255
        out.append((middle - np.float32(preprocess.OPENAI_MEAN)) / np.float32(preprocess.OPENAI_STD))
    return torch.tensor(np.stack(out)).permute(0, 3, 1, 2)


def oracle(folder, model, images):
    """Cosines and scores [images, prompts]."""
    tokens = CLIPTokenizer.from_pretrained(folder)(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(pixel_values=pixels_of(images), **tokens)
        return out.image_embeds @ out.text_embeds.T, out.logits_per_image / 26


def pictures(*shape):
    return np.random.default_rng(0).uniform(-0.01, 1.01, size=(4, *shape, 3)).astype(np.float32)


score = jax.jit(lambda reward, *args: reward.score(*args), static_argnums=0)


@pytest.mark.parametrize("shape", [(64, 64), (32, 32), (40, 65)])
def test_scores(clip, shape):
    folder, model = clip
    reward, params = pickscore.make(folder, "float32_exact")
    images = pictures(*shape)
    ours = score(reward, params, images, reward.tokenize(PROMPTS))
    cosines, scores = oracle(folder, model, images)
    pairs = (torch.arange(4), torch.arange(4) // 2)
    assert (reward.name, ours.shape, ours.dtype) == ("pickscore", (4,), jnp.float32)
    assert error(ours, scores[pairs]) < 1e-5
    scale = float(np.exp(params["logit_scale"]))
    np.testing.assert_allclose(np.asarray(ours) * 26 / scale, cosines[pairs], atol=1e-6)


def test_every_product_is_full_precision(clip):
    """Also the resize's. The text is encoded once a prompt, not once an image."""
    reward, params = pickscore.make(clip[0], "float32_exact")
    lowered = jax.jit(reward.score).lower(params, pictures(64, 64), reward.tokenize(PROMPTS)).as_text()
    products = [line for line in lowered.splitlines() if "dot_general" in line or "convolution" in line]
    assert len(products) > 10 and all("HIGHEST" in line for line in products)
    assert "tensor<2x77x32xf32>" in lowered and "tensor<4x77x32xf32>" not in lowered


def test_public_size():
    """Parameters and tensors of PickScore_v1, from shapes alone."""
    reward, params, tokens = pickscore.shapes("yuvalkirstain/PickScore_v1")
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 986_109_441
    assert len({key for leaf in weights.needed(params, clip_tower.HF_KEYS) for key in leaf.keys}) == 910
    parts = [params["vision"], params["text"], params["vision"]["projection"], params["text"]["projection"]]
    count = [sum(leaf.size for leaf in jax.tree.leaves(part)) for part in parts]
    assert count == [630_766_080 + 1_310_720, 352_984_064 + 1_048_576, 1_310_720, 1_048_576]
    images = jax.ShapeDtypeStruct((3, 512, 512, 3), jnp.float32)
    assert jax.eval_shape(reward.score, params, images, tokens).shape == (3,)


def test_without_a_tokenizer_the_hubs_is_taken(tmp_path, clip, monkeypatch):
    folder, _ = clip
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(weights.WeightsError, match=r"holds no tokenizer: put vocab.json and merges.txt of any CLIP"):
        pickscore.make(tmp_path)
    reward, _ = pickscore.make(folder)
    monkeypatch.setattr(hub, "model", lambda path, *_: folder if path == clip_tokens.HUB_ID else tmp_path)
    assert pickscore.make(tmp_path)[0] == reward
    with pytest.raises(weights.WeightsError, match="pickscore needs the folder of a CLIP model, or yuvalkirstain/Pick"):
        pickscore.make(None)


@pytest.mark.long
def test_full_size(tmp_path, one_thread):
    """Both towers of ViT-H/14 in float32, cosines to 1e-6, through float16 files as HPSv2's."""
    cfg = clip_tower.VIT_H_14
    sides = {
        side: {f.name: getattr(part, f.name) for f in dataclasses.fields(part) if f.name != "projection_dim"}
        for side, part in (("text_config", cfg.text), ("vision_config", cfg.vision))
    }
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(**sides, projection_dim=cfg.projection_dim))
    randomise(model.half().to_empty(device="cpu")).save_pretrained(tmp_path)
    del model  # 2 GB, and two of 4 GB after it: never both
    model = CLIPModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    images = np.random.default_rng(0).normal(size=(2, 224, 224, 3)).astype(np.float32)
    ids = np.pad(np.random.default_rng(0).integers(0, 49406, (2, 20)), ((0, 0), (0, 57)), constant_values=49407)
    with torch.no_grad():
        out = model(pixel_values=torch.tensor(images).permute(0, 3, 1, 2), input_ids=torch.tensor(ids))
    theirs = (out.image_embeds * out.text_embeds).sum(-1).numpy()
    del model
    tower = clip_tower.ClipTower(clip_tower.ClipConfig.read(tmp_path))
    spec, files = clip_tower.shapes(tower), weights.Files(tmp_path)

    def place(path, leaf):
        return jax.device_put(leaf.whole())

    params = weights.load(files, spec, clip_tower.HF_KEYS, dtype=jnp.float32, place=place)
    ours = jax.jit(clip_tower.cosines, static_argnums=0)(tower, params, images, ids)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
