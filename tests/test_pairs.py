"""Rewards' float32 products on GPUs: products of pairs of bfloat16 numbers, summed in float32."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from solrl_jax import device
from solrl_jax.models import layers
from solrl_jax.models.layers import F32
from solrl_jax.rewards import blip, clip_tower, clipscore
from solrl_jax.rewards.clip_tower import ClipTower, Products
from solrl_jax.selection import fidelity
from solrl_jax.structs import Params
from tests import card

GPU = device.platform() == "gpu"


def off(y: Array, exact: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(y, np.float64) - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("spread", [1.0, 1e-6, 1e6])
def test_error_of_a_product(spread):
    """16 bits of each operand: 500 times as near as bf16; the sums are float32's."""
    x = spread * jax.random.normal(jax.random.key(0), (4, 100, 512))
    w = jax.random.normal(jax.random.key(1), (512, 384)) * jnp.exp(jax.random.normal(jax.random.key(2), (512, 384)))
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    pairs = functools.partial(
        layers.Linear(384, use_bias=False, dtype=F32, pairs=True).apply, {"params": {"kernel": w}}
    )
    assert off(jax.jit(pairs)(x), exact) < 8e-6
    assert off(jax.jit(pairs)(x[..., :100], x[..., 100:]), exact) < 8e-6  # in two parts
    half = jnp.dot(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), preferred_element_type=F32)
    assert off(half, exact) > 2e-3


def test_halves():
    x = jax.random.normal(jax.random.key(0), (1000,))
    high, low = jax.jit(layers.halves)(x)
    assert high.dtype == low.dtype == jnp.bfloat16 and bool(jnp.all(high == x.astype(jnp.bfloat16)))
    rest = np.abs(np.asarray(x, np.float64) - np.asarray(high, np.float64) - np.asarray(low, np.float64))
    assert np.max(rest / np.abs(x)) < 2**-16 and float(jnp.mean(low != 0)) > 0.95


def test_which_products_are_in_pairs(monkeypatch):
    """Not a CPU's, not those in bfloat16, and none with reward_dtype=float32_exact."""
    for platform, by_default in (("cpu", False), ("gpu", True), ("tpu", True)):
        monkeypatch.setattr(device, "platform", lambda platform=platform: platform)
        found = {name: layers.in_pairs(*Products.of(name)) for name in ("float32", "float32_exact", "bfloat16")}
        assert found == {"float32": by_default, "float32_exact": False, "bfloat16": False}
        assert layers.in_pairs(F32, True) and not layers.in_pairs(jnp.bfloat16, True)
    assert Products.of("float32") == Products.of(F32) == Products.of(jnp.dtype("float32"))


# ---- compiled for a card


OPERATION = re.compile(r"^\s*(?:ROOT )?%(\S+) = \(?(\w+)\[([\d,]*)\]\S*(?: s8\S+)? ([\w-]+)\((.*)", re.MULTILINE)


def sources(text: str) -> list[list[str]]:
    """Of every bf16 concatenation of three in a compiled program, the operations whose results are cast to bf16."""
    found = {name: (kind, re.findall(r"%([\w.-]+)", rest.split("), ")[0])) for name, *_, kind, rest in parsed(text)}

    def source(name: str) -> str:
        kind, operands = found[name]
        return source(operands[0]) if kind in ("convert", "bitcast", "transpose") else kind

    return [
        [source(each) for each in found[name][1]]
        for name, dtype, _, kind, _ in parsed(text)
        if kind == "concatenate" and dtype == "bf16" and len(found[name][1]) == 3
    ]


def parsed(text: str) -> list[tuple[str, str, str, str, str]]:
    """(name, dtype, shape, operation, the rest of the line) of a compiled program's operations."""
    return OPERATION.findall(text)


@functools.cache
def program(dtype: str) -> str:
    """The compiled text of ViT-L/14's picture side, for 24 pictures on an H100."""
    cfg = dataclasses.replace(clipscore.PUBLIC.vision, num_hidden_layers=2)
    tower = ClipTower(dataclasses.replace(clipscore.PUBLIC, vision=cfg), *Products.of(dtype))
    pixels = jax.ShapeDtypeStruct((24, 224, 224, 3), F32)
    score = functools.partial(tower.apply, method="image_features")
    params = {"params": clip_tower.shapes(tower)}
    return card.compiled(score, params, pixels, on=card.mesh()).as_text() or ""


def dots(text: str) -> list[str]:
    """Operands' dtype of every product of a compiled program."""
    kinds = {name: dtype for name, dtype, *_ in parsed(text)}
    found = [re.findall(r"%([\w.-]+)", rest)[0] for *_, rest in parsed(text) if "__cublas" in rest]
    return [kinds[name] for name in found]


@pytest.mark.slow
def test_products_of_a_tower_on_an_h100():
    """A block's six are bf16; attention's two are float32, and so is the last projection."""
    assert sorted(dots(program("float32"))) == ["bf16"] * 6 + ["f32"] * 3
    assert sorted(dots(program("float32_exact"))) == ["f32"] * 9
    depths = [
        shape for _, dtype, shape, kind, _ in parsed(program("float32")) if kind == "concatenate" and dtype == "bf16"
    ]
    pixels = ["24,257,3072", "24,257,3072", "24,3072,257", "24,257,12288"]  # of attention's result before it is turned
    assert sorted(depths) == sorted([*pixels, *["3072,1024"] * 4, "3072,4096", "12288,1024"])


def test_the_low_halves_are_in_the_program():
    """XLA removed x - bf16(x).astype(float32), and the error was bf16's."""
    found = sources(program("float32"))
    assert len(found) == 10
    assert all(sorted(parts) == ["reduce-precision", "reduce-precision", "subtract"] for parts in found)


# ---- scores


def weights(tree: Params) -> Params:
    """Random ones: norms' scales 1, kernels that keep a signal's size, the rest small."""
    rng = np.random.default_rng(0)

    def one(path, x) -> np.ndarray:
        if path[-1].key == "scale":
            return np.ones(x.shape, np.float32)
        spread = x.shape[-2] ** -0.5 if path[-1].key == "kernel" else 0.02
        return spread * rng.standard_normal(x.shape, np.float32)

    return jax.tree_util.tree_map_with_path(one, tree)


def pictures(count: int, side: int) -> Array:
    """Smooth ones, of different colours; normalised as CLIP's."""
    coarse = jax.random.normal(jax.random.key(0), (count, 6, 6, 3))
    return jax.image.resize(coarse, (count, side, side, 3), "cubic")


def towers(name: str, pairs: bool | None) -> ClipTower | blip.Blip:
    """A reward's network with few layers: of real width on a GPU; smaller, and in pairs by order, elsewhere."""
    small: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2}
    small |= {"num_hidden_layers": 2}
    sizes, words = {"num_hidden_layers": 3} if GPU else small, {"vocab_size": 100}
    side = {} if GPU else {"image_size": 64 if name == "imagereward" else 56}
    if name == "imagereward":
        cfg = blip.BlipConfig()
        text = dataclasses.replace(cfg.text, **sizes, **words)
        return blip.Blip(blip.BlipConfig(dataclasses.replace(cfg.vision, **sizes, **side), text), F32, pairs)
    cfg = {"clipscore": clipscore.PUBLIC, "pickscore": clip_tower.VIT_H_14}[name]
    text = dataclasses.replace(cfg.text, **small, **words)
    vision = dataclasses.replace(cfg.vision, **sizes, **side)
    return ClipTower(dataclasses.replace(cfg, text=text, vision=vision), F32, pairs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clipscore", "pickscore", "imagereward"])
def test_scores_on_the_device_that_is_here(name):
    """On a card (JAX_PLATFORMS=cuda) as towers run there. Ranks need far less than a thousandth of the spread."""
    exact, fast = towers(name, False), towers(name, None if GPU else True)
    images = pictures(24, exact.cfg.vision.image_size)
    ids = jnp.arange(8)[None]
    shapes = clip_tower.shapes(exact) if isinstance(exact, ClipTower) else blip.shapes(exact)
    params = jax.tree.map(jnp.asarray, weights(shapes))

    def score(tower: ClipTower | blip.Blip) -> np.ndarray:
        def run(params: Params) -> Array:
            if isinstance(tower, ClipTower):
                return clip_tower.cosines(tower, params, images, ids)
            return jnp.asarray(tower.apply({"params": params}, images, ids, ids >= 0))

        return np.asarray(jax.jit(run)(params), np.float64)

    full, found = score(exact), score(fast)
    error = (found - full).std() / full.std()
    assert 1e-6 < error < 1e-3
    ranks = fidelity(jnp.asarray(found)[None], jnp.asarray(full)[None], 8)
    assert float(ranks["spearman"][0]) >= 0.9999
