"""FLUX.2-klein at 512 px, base 4B unless the recipe says another: Sol-RL with FLUX.1's settings, guided at 4.

    python -m solrl_jax.main --config=flux2 --prompts=DIR                     branch, trained on CLIPScore
    python -m solrl_jax.main --config=flux2:sol_rl --prompts=DIR              the paper's: the kept restart from noise
    python -m solrl_jax.main --config=flux2:24gb --prompts=DIR                on one card of 24 GB
    python -m solrl_jax.main --config=flux2:base_9b_sol_rl_pickscore --prompts=DIR
    python -m solrl_jax.main --config=flux2:4b --prompts=DIR                  the model that is distilled to 4 steps

DIR holds train.txt and test.txt, a prompt a line, or train_metadata.jsonl and test_metadata.jsonl. The weights come
from huggingface.co, or from --config.model.path, a folder in diffusers' layout. The 4B models are free (Apache-2.0),
16 GB with the text encoder. Those of 9B need their licence, which is not for commercial use, to be accepted.

A sample is two rows of the network, in the rollouts and in the loss; without guidance (--config.regenerate.guidance=1)
an iteration takes half as long. By `--mode=plan`: 32 GB on an H100, 26 minutes an iteration of 48 prompts with sol_rl.
`24gb` has 3 and 4 pictures and 2 points at a time and takes 22.7 of the 23.2 GB that JAX has of an RTX 4090, to
explore, and 15.3 to learn: 21.0 minutes an iteration (branch) on an H100, 2.1 hours on an RTX 4090. Measured on an H200
limited to 23.7 GB, with random weights (experiments/flux2_h100): 29.7 s a prompt, 13 % more than the plan's, 21.3 GB in
use at most; a forward in FP8 takes .58 of BF16's time. No card of 24 GB has run it.
FP8 and NVFP4 quantise all Linears of the blocks, 95.0 % of the weights.
"""

import dataclasses

from solrl_jax.config import Config, Evaluate, Learn, Lora, Model, Stage
from solrl_jax.recipes import ON_THE_HUB, choose, recipes

REWARDS = ("clipscore", "pickscore", "hpsv2", "imagereward")


def base(reward: str) -> Config:
    """sol_rl on `reward`, of base 4B."""
    return Config(
        name="flux2",
        model=Model(
            name="flux2",
            path="black-forest-labs/FLUX.2-klein-base-4B",
            size=512,
            text_tokens=512,  # all of which the network attends to
            vae_dtype="bfloat16",
            remat=True,
            remat_keeps=("attention",),  # with mlp too it is no faster, with qkv and mlp by 7 %, on 100 GB or more
            min_dim=1000,
            min_quantised_flops=0.9,  # the rule covers all of the blocks'; less is another network
        ),
        reward=reward,
        reward_paths=ON_THE_HUB,
        prompts=48,
        candidates=96,
        kept=24,
        explore=Stage(steps=6, solver="dpm2", precision="auto", chunk=24),
        regenerate=Stage(steps=10, solver="dpm2", precision="bf16", chunk=24, guidance=4.0),
        lora=Lora(rank=32, alpha=64.0),
        learn=Learn(
            timestep_fraction=0.4,
            updates=1,
            micro_batch=12,
            learning_rate=3e-4,
            kl_weight=1e-4,
            reference_every=4,
            clip_norm=1.0,
            ema_max=0.9,
        ),
        evaluate=Evaluate(every=20, prompts=128, steps=28, solver="dpm2", grid=8, chunk=16, own=True),
        iterations=300,
        seed=42,
        save_every=5,  # iterations are long
        encode_ahead=10,  # Qwen3 comes to the card for 480 prompts at a time, 3.8 GB of states
    )


def small_card(reward: str) -> Config:
    """The same on one card of 24 GB: fewer samples at a time, on which a loss and a rollout do not depend."""
    cfg = base(reward)
    assert cfg.explore is not None
    return dataclasses.replace(
        cfg,
        explore=dataclasses.replace(cfg.explore, chunk=3),
        regenerate=dataclasses.replace(cfg.regenerate, chunk=4),
        # With 4 points and attention kept the free memory had holes, each too small for the gradient's program.
        model=dataclasses.replace(cfg.model, remat_keeps=()),
        learn=dataclasses.replace(cfg.learn, micro_batch=2),
        evaluate=dataclasses.replace(cfg.evaluate, chunk=8),
    )


def base_9b(reward: str) -> Config:
    """The same of base 9B."""
    return _of(base(reward), "black-forest-labs/FLUX.2-klein-base-9B")


def distilled_4b(reward: str) -> Config:
    """The model that is distilled to 4 steps without guidance."""
    cfg = _of(base(reward), "black-forest-labs/FLUX.2-klein-4B")
    assert cfg.explore is not None
    return dataclasses.replace(
        cfg,
        explore=dataclasses.replace(cfg.explore, steps=4),
        regenerate=dataclasses.replace(cfg.regenerate, steps=4, guidance=0.0),
        learn=dataclasses.replace(cfg.learn, timestep_fraction=1.0),
        evaluate=dataclasses.replace(cfg.evaluate, steps=4),
    )


def distilled_9b(reward: str) -> Config:
    return _of(distilled_4b(reward), "black-forest-labs/FLUX.2-klein-9B")


def _of(cfg: Config, path: str) -> Config:
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, path=path))


VARIANTS = {"24gb": small_card, "base_9b": base_9b, "4b": distilled_4b, "9b": distilled_9b}
RECIPES = (*recipes(REWARDS), *(f"{name}_{recipe}" for name in VARIANTS for recipe in recipes(REWARDS)))


def config(recipe: str) -> Config:
    """`recipe` is FAMILY, FAMILY_REWARD, or nothing for branch_clipscore; a name of VARIANTS may be before it."""
    for name, made in VARIANTS.items():
        if recipe == name or recipe.startswith(f"{name}_"):
            return choose(made, REWARDS, recipe.removeprefix(name).removeprefix("_"))
    return choose(base, REWARDS, recipe)
