"""The small world: all of Sol-RL on a bare 2-core machine, in minutes.

    python -m solrl_jax.main --config=tiny                           branch, trained on CLIPScore
    python -m solrl_jax.main --config=tiny:sol_rl                    the paper's: the kept restart from noise
    python -m solrl_jax.main --config=tiny:naive_scaling             another family; --config=tiny:help lists them
    python -m solrl_jax.main --config=tiny --config.explore.precision=bf16

A 3.7M-parameter FLUX at 32 px with its own VAE, text encoders and CLIP, all made by experiments/tiny/pretrain.py. The
formulas are the paper's; sizes, rate and updates per rollout are this world's own, chosen so that eight CPU minutes
hold enough updates to learn. Beside each stands the value of Sol-RL on FLUX.1-dev.
"""

import dataclasses
from pathlib import Path

from solrl_jax.config import Config, Evaluate, Learn, Lora, Model, Stage
from solrl_jax.recipes import choose, recipes

WORLD = Path(__file__).resolve().parent.parent / "experiments" / "tiny"
REWARDS = ("clipscore", "shapes")
RECIPES = recipes(REWARDS)


def base(reward: str) -> Config:
    """sol_rl on `reward`."""
    return Config(
        name="tiny",
        model=Model(
            path=str(WORLD / "pipeline"),
            size=32,  # 512
            text_tokens=24,  # 128
            remat=False,  # True
            guidance="cfg",  # auto: its guidance input was trained at 1 alone, and with empty captions
            min_dim=0,  # 1000, with which nothing here would be quantised
            min_quantised_flops=0.9,
        ),
        prompt_files=str(WORLD / "prompts"),
        reward=reward,
        reward_paths=(f"clipscore={WORLD / 'clip'}",),
        prompts=16,  # 48
        candidates=24,  # 96
        kept=8,  # 24
        explore=Stage(steps=6, solver="dpm2", precision="nvfp4_emulated", chunk=24),
        regenerate=Stage(steps=10, solver="dpm2", precision="bf16", chunk=8),
        lora=Lora(rank=32, alpha=64.0),
        learn=Learn(
            timestep_fraction=0.4,
            updates=4,  # 1
            micro_batch=32,  # 12
            learning_rate=1e-3,  # 3e-4
        ),
        evaluate=Evaluate(every=20, prompts=128, images=2, steps=10, rewards="shapes", grid=8, chunk=32),  # steps 28
        iterations=36,
        save_every=20,
    )


def config(recipe: str) -> Config:
    """`recipe` is FAMILY, FAMILY_REWARD, or nothing for branch_clipscore.

    Of a step's probability GRPO takes the mean over a picture's elements, whose noise falls with their root: 512 here,
    65536 at 512 px. So its clip range is ten times the published one.
    """
    cfg = choose(base, REWARDS, recipe)
    if not cfg.of_steps:
        return cfg
    return dataclasses.replace(cfg, learn=dataclasses.replace(cfg.learn, clip_range=10 * cfg.learn.clip_range))
