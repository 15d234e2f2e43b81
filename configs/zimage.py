"""Z-Image at 512 px, and Z-Image-Turbo: Sol-RL with FLUX's settings; the samples continue from the preview.

    python -m solrl_jax.main --config=zimage --prompts=DIR                      branch, trained on PickScore
    python -m solrl_jax.main --config=zimage:sol_rl --prompts=DIR               the paper's: the kept restart from noise
    python -m solrl_jax.main --config=zimage:naive_scaling_clipscore --prompts=DIR
    python -m solrl_jax.main --config=zimage:turbo_sol_rl_pickscore --prompts=DIR

DIR holds train.txt and test.txt, a prompt a line, or train_metadata.jsonl and test_metadata.jsonl. The weights come
from huggingface.co without a licence to accept, or from --config.model.path, a folder in diffusers' layout.

Neither model is in the paper: values are FLUX's. Z-Image is guided at 5, in rollouts and in the loss, which is its
card's guidance_scale of 4 (docs/zimage.md): two rows of the network for each sample; --config.regenerate.guidance=1
trains without. Turbo is drawn in 8 steps without guidance, and loses its ability to draw in few steps as it is trained.
FP8 and NVFP4 quantise every Linear of the blocks but the modulation, 97.8 % of the weights. Measured on an H200, with
random weights: 37.4 s a prompt and iteration (experiments/efficiency), sol_rl 46.1 s and 59 GB, a forward in FP8 .60 of
BF16's time (experiments/zimage_h100). `--config=zimage --mode=plan` estimates 61 GB, and 27 minutes for 48 prompts
on an H100 (branch).
"""

import dataclasses

from solrl_jax.config import Config, Evaluate, Learn, Lora, Model, Stage
from solrl_jax.recipes import ON_THE_HUB, choose, recipes

REWARDS = ("pickscore", "clipscore", "hpsv2", "imagereward")
RECIPES = (*recipes(REWARDS), *(f"turbo_{recipe}" for recipe in recipes(REWARDS)))


def base(reward: str) -> Config:
    """sol_rl on `reward`."""
    return Config(
        name="zimage",
        model=Model(
            name="zimage",
            path="Tongyi-MAI/Z-Image",
            size=512,
            text_tokens=128,  # a multiple of 32; not diffusers' 512, up to which only the longest prompts go
            vae_dtype="bfloat16",
            remat=True,
            remat_keeps=("auto",),
            min_dim=1000,
            min_quantised_flops=0.9,  # the rule covers all of the blocks'; less is another network
        ),
        reward=reward,
        reward_paths=ON_THE_HUB,
        prompts=48,
        candidates=96,
        kept=24,
        explore=Stage(steps=6, solver="dpm2", precision="auto", chunk=24),
        regenerate=Stage(steps=10, solver="dpm2", precision="bf16", chunk=24, guidance=5.0),
        lora=Lora(rank=32, alpha=64.0),
        learn=Learn(
            timestep_fraction=0.4,
            updates=1,
            micro_batch=8,  # 2 samples' 4 times, each of two rows; FLUX's 12 would take 81 GB, by --mode=plan
            learning_rate=3e-4,
            kl_weight=1e-4,
            reference_every=4,
            clip_norm=1.0,
            ema_max=0.9,
        ),
        evaluate=Evaluate(every=20, prompts=128, steps=28, solver="dpm2", grid=8, chunk=16, own=True),
        iterations=300,
        seed=42,
        save_every=5,
        encode_ahead=20,  # Qwen3 comes to the card for 960 prompts at a time
    )


def turbo(reward: str) -> Config:
    """The same of Z-Image-Turbo, in its 8 steps."""
    cfg = base(reward)
    assert cfg.explore is not None
    return dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, path="Tongyi-MAI/Z-Image-Turbo"),
        explore=dataclasses.replace(cfg.explore, steps=4),
        regenerate=dataclasses.replace(cfg.regenerate, steps=8, guidance=0.0),
        learn=dataclasses.replace(cfg.learn, timestep_fraction=0.5),
        evaluate=dataclasses.replace(cfg.evaluate, steps=8),
    )


def config(recipe: str) -> Config:
    """`recipe` is FAMILY, FAMILY_REWARD, or nothing for branch_pickscore; "turbo_" may be before it, for
    Z-Image-Turbo ("turbo" alone: branch_pickscore of it)."""
    if recipe == "turbo" or recipe.startswith("turbo_"):
        return choose(turbo, REWARDS, recipe.removeprefix("turbo").removeprefix("_"))
    return choose(base, REWARDS, recipe)
