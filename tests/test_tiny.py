"""The committed small world: its size, that its parts are what they should be, and that its CLIP can teach."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tiny import check, world
from solrl_jax import config, learn
from solrl_jax.models import flux
from solrl_jax.quant import coverage
from solrl_jax.rewards import clipscore
from solrl_jax.selection import spearman

WORLD = Path(check.__file__).parent


def test_checkpoints_are_small_and_bf16():
    from safetensors import safe_open

    files = [file for part in ("pipeline", "clip") for file in sorted((WORLD / part).rglob("*.safetensors"))]
    assert len(files) == 5 and sum(f.stat().st_size for f in files) < 16e6
    for file in files:
        with safe_open(file, "numpy") as f:
            assert {f.get_slice(k).get_dtype() for k in f.keys()} == {"BF16"}, file  # noqa: SIM118


def test_recipes():
    """Every family and reward; sol_rl explores with 6 steps in NVFP4 and regenerates with 10 in bf16."""
    from configs import tiny

    made = {name: config.load(f"tiny:{name}") for name in tiny.RECIPES}
    assert made["sol_rl_clipscore"] == config.load("tiny:sol_rl") and made["branch_clipscore"] == config.load("tiny")
    sol_rl = config.load("tiny:sol_rl")
    assert sol_rl.explore is not None and (sol_rl.explore.steps, sol_rl.explore.precision) == (6, "nvfp4_emulated")
    assert (sol_rl.regenerate.steps, sol_rl.regenerate.precision) == (10, "bf16")
    assert (
        made["naive_quant_shapes"].regenerate.precision == "nvfp4_emulated"
        and made["naive_quant_shapes"].reward == "shapes"
    )
    with pytest.raises(config.ConfigError, match="did you mean sol_rl"):
        config.load("tiny:solrl")


@pytest.mark.parametrize("devices", [1, 2, 4, 8, 16])
def test_every_device_count_that_divides_works(devices):
    cfg = config.load("tiny")
    held = cfg.prompts * cfg.kept // cfg.learn.updates // devices
    assert held % learn.samples_at_a_time(cfg, held) == 0


def test_the_rule_covers_the_blocks():
    found = coverage.check(flux.make(config.load("tiny").model), "nvfp4_emulated", 0.9)
    assert coverage.share(found, "flops", blocks=True) == 1.0 and coverage.share(found, "weights") > 0.9


@pytest.mark.slow
def test_the_judge_reads_drawings_and_reconstructions():
    figures = check.judge_figures(check.model_config(WORLD / "pipeline"), 2000)
    assert figures["judge exact on drawn pictures"]["value"] >= 0.99
    assert figures["judge exact on reconstructed pictures"]["value"] >= 0.97


def test_results_say_how_they_were_made():
    found = json.loads((WORLD / "results/check.json").read_text())
    assert set(found) >= {"command", "device", "versions", "commit", "date", "figures"}
    assert all(set(f) == {"value", "unit", "n", "spread"} for f in found["figures"].values())


@pytest.mark.slow
def test_the_clip_can_teach():
    """On 100 test prompts x 24: ranks agree with the judge's; choosing by CLIP raises exact accuracy by 10 points; in
    bfloat16 it ranks as in float32."""
    cfg = check.model_config(WORLD / "pipeline")
    model = flux.make(cfg)
    base, vae_params, text = jax.tree.map(jnp.asarray, flux.load(cfg))
    reward, params = clipscore.make(str(WORLD / "clip"))
    rng = np.random.default_rng(5)
    captions = world.captions(world.sample_scenes(rng, 100, "test"), rng)
    cond = jax.jit(model.encode)(text, model.tokenize(captions))
    images = check.draw_samples(cfg, base, vae_params, cond, 24, config.Stage(steps=10, chunk=24))
    share, right = check.exact(images, captions)
    tokens = reward.tokenize(captions)
    pictures = images.reshape(-1, 32, 32, 3)
    scores = np.asarray(jax.jit(reward.score)(params, pictures, tokens)).reshape(100, 24)
    varied = share.std(axis=1) > 0
    assert float(spearman(jnp.asarray(scores[varied]), jnp.asarray(share[varied])).mean()) > 0.5
    best = np.take_along_axis(right, scores.argmax(1)[:, None], 1)
    assert best.mean() > right.mean() + 0.1 and 0.4 < right.mean() < 0.65
    half, _ = clipscore.make(str(WORLD / "clip"), "bfloat16")
    rough = jax.jit(half.score)(params, pictures, tokens).reshape(100, 24)
    agreement = spearman(rough, jnp.asarray(scores))
    assert float(agreement.mean()) >= 0.999
