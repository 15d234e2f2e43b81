"""Stable Diffusion 3.5 at 1024 px, Large and Medium: Sol-RL as for Large; the samples continue from the preview.

    python -m solrl_jax.main --config=sd35 --prompts=DIR                      Large, branch, trained on ImageReward
    python -m solrl_jax.main --config=sd35:sol_rl --prompts=DIR               the paper's: the kept restart from noise
    python -m solrl_jax.main --config=sd35:naive_scaling_pickscore --prompts=DIR
    python -m solrl_jax.main --config=sd35:medium_sol_rl_pickscore --prompts=DIR

DIR holds train.txt and test.txt, a prompt a line, or train_metadata.jsonl and test_metadata.jsonl. The weights come
from huggingface.co once their licence is accepted (https://huggingface.co/stabilityai/stable-diffusion-3.5-large, or
-medium, then `hf auth login`), or from --config.model.path, a folder in diffusers' layout. A folder whose
model_index.json leaves text_encoder_3 out ([null, null]) runs without T5, which then reads as zeros.

NVFP4 quantises what the original quantises, of Large the image's MLPs: 22 % of the weights, 64 % of the Linears'
FLOPs; FP8 all of a block but its modulation. Medium is not in the paper: its values are Large's.
On an H200, random weights, FP8, keeping attention and mlp: 65 s a prompt and iteration, 37 of them to learn; sol_rl
78 s, naive_scaling 95 s (experiments/efficiency). sol_rl on an H100, with the reference on every micro-batch: 87 s, 52
GB (experiments/sd35_h100). The paper gives 427 s an iteration of 48 prompts on eight B200 with native FP4, 187 of them
rollout.
"""

import dataclasses

from solrl_jax.config import Config, Evaluate, Learn, Lora, Model, Stage
from solrl_jax.recipes import ON_THE_HUB, choose, recipes

REWARDS = ("imagereward", "pickscore", "clipscore", "hpsv2")
RECIPES = (*recipes(REWARDS), *(f"medium_{recipe}" for recipe in recipes(REWARDS)))


def large(reward: str) -> Config:
    """sol_rl on `reward`."""
    return Config(
        name="sd35",
        model=Model(
            name="sd35",
            path="stabilityai/stable-diffusion-3.5-large",
            size=1024,
            text_tokens=128,  # not diffusers' 256
            vae_dtype="bfloat16",  # as the original, which decodes under autocast
            remat=True,
            remat_keeps=("auto",),
            min_dim=2432,
            min_quantised_flops=0.6,  # NVFP4's rule covers .635 of the blocks'; less is another network
        ),
        reward=reward,
        reward_paths=ON_THE_HUB,
        prompts=48,
        candidates=96,
        kept=24,
        explore=Stage(steps=6, solver="dpm2", precision="auto", chunk=24),
        regenerate=Stage(steps=10, solver="dpm2", precision="bf16", chunk=24),
        lora=Lora(rank=32, alpha=64.0),
        learn=Learn(
            timestep_fraction=0.6,
            updates=1,
            micro_batch=6,  # a sample's 6 times; the original takes 4 samples at one time: the same mean
            learning_rate=3e-4,
            kl_weight=1e-4,
            reference_every=4,
            clip_norm=0.002,
            ema_max=0.9,
        ),
        evaluate=Evaluate(every=20, prompts=128, steps=40, solver="dpm2", grid=8, chunk=16, own=True),
        iterations=300,
        seed=42,
        save_every=5,  # iterations are long
        encode_ahead=20,  # T5 comes to the card for 960 prompts at a time
    )


def medium(reward: str) -> Config:
    """The same of SD3.5 Medium."""
    model = {"path": "stabilityai/stable-diffusion-3.5-medium", "min_quantised_flops": 0.5}  # the rule covers .542
    cfg = large(reward)
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **model))


def config(recipe: str) -> Config:
    """`recipe` is FAMILY, FAMILY_REWARD, or nothing for branch_imagereward; the original's "sd3_" may be before it, or
    "medium_" for SD3.5 Medium ("medium" alone: branch_imagereward of it)."""
    if recipe == "medium" or recipe.startswith("medium_"):
        return choose(medium, REWARDS, recipe.removeprefix("medium").removeprefix("_"))
    return choose(large, REWARDS, recipe.removeprefix("sd3_"))
