"""The emoji world: scenes and words of 64 px with an OCR reward; for a GPU.

    python -m solrl_jax.main --config=emoji                          branch, trained on CLIPScore, the judge and OCR
    python -m solrl_jax.main --config=emoji:sol_rl                   the paper's: the kept restart from noise
    python -m solrl_jax.main --config=emoji:branch_clipscore         CLIPScore alone; needs no OCR

The default, `mixed`, needs requirements-ocr.txt. Its prompts name their rewards: objects CLIPScore and the judge, words
CLIPScore and OCR; each is normalised on its own (gdpo). ocr_strict is held out, and with CLIPScore alone the judge.

On a CPU, slowly: about 5 minutes an iteration of the default, without evaluations, on two cores that had other work
too, and 10 for the first, which compiles.

A 15.3M-parameter FLUX with its own VAE, text encoders and CLIP, all made by experiments/emoji/pretrain.py. The formulas
are the paper's; sizes, rate and updates per rollout are this world's own. Beside each stands the value of Sol-RL on
FLUX.1-dev.
"""

import dataclasses
from pathlib import Path

from solrl_jax.config import Config, ConfigError, Evaluate, Learn, Lora, Model, Stage
from solrl_jax.recipes import choose, recipes

WORLD = Path(__file__).resolve().parent.parent / "experiments" / "emoji"
JUDGE = "experiments.emoji.judge"
REWARDS = ("mixed", "clipscore")
RECIPES = recipes(REWARDS)

RATE, KL, UPDATES, ITERATIONS = 2.5e-4, 0.1, 4, 200  # 3e-4, 1e-4, 1, 300; rate and KL by experiments.tune


def base(reward: str) -> Config:
    """sol_rl on `reward`, one of REWARDS.

    With CLIPScore alone words are scored by it like all other prompts; the rewards of theirs that read are left unused.
    """
    mixed = reward == "mixed"
    return Config(
        name="emoji",
        model=Model(
            path=str(WORLD / "pipeline"),
            size=64,  # 512
            text_tokens=24,  # 128
            vae_dtype="bfloat16",  # as FLUX's: by the plan, decoding in float32 takes half of an exploration
            remat=False,  # True
            guidance="cfg",  # auto: its guidance input was trained at 1 alone, and with empty captions
            min_dim=0,  # 1000, with which nothing here would be quantised
            min_quantised_flops=0.9,
        ),
        prompt_files=str(WORLD / "prompts"),
        reward=f"clipscore,{JUDGE},ocr" if mixed else reward,
        reward_rule="gdpo" if mixed else "sum",
        reward_unused=() if mixed else ("ocr", "ocr_strict"),
        reward_paths=(f"clipscore={WORLD / 'clip'}",),
        prompts=16,  # 48
        candidates=24,  # 96
        kept=8,  # 24
        explore=Stage(steps=6, solver="dpm2", precision="nvfp4_emulated", chunk=24),
        regenerate=Stage(steps=10, solver="dpm2", precision="bf16", chunk=8),
        lora=Lora(rank=32, alpha=64.0),
        learn=Learn(
            timestep_fraction=0.4,
            updates=UPDATES,
            micro_batch=32,  # 12
            learning_rate=RATE,
            kl_weight=KL,  # 1e-4
            advantage_spread="prompt" if mixed else "all",  # all; what gdpo takes in families that explore
        ),
        evaluate=Evaluate(
            every=20,
            prompts=128,
            images=2,
            steps=10,  # 28
            rewards=f"{JUDGE},ocr_strict" if mixed else JUDGE,
            grid=24,
            chunk=32,
        ),
        iterations=ITERATIONS,
        save_every=20,
    )


def config(recipe: str) -> Config:
    """`recipe` is FAMILY, FAMILY_REWARD, or nothing for branch_mixed. ConfigError outside the repository.

    Of a step's probability GRPO takes the mean over a picture's elements, whose noise falls with their root: 2048 here,
    65536 at 512 px. So its clip range is five times the published one.
    """
    if not WORLD.is_dir():
        raise ConfigError(
            f"--config=emoji: there is no {WORLD}; its networks and its judge are in the repository, not in the "
            "package: clone it, and give the command in its folder"
        )
    cfg = choose(base, REWARDS, recipe)
    if not cfg.of_steps:
        return cfg
    return dataclasses.replace(cfg, learn=dataclasses.replace(cfg.learn, clip_range=5 * cfg.learn.clip_range))
