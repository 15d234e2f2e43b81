"""FLUX.1-dev at 512 px: Sol-RL with the settings of its FLUX runs; the samples continue from the preview.

    python -m solrl_jax.main --config=flux --prompts=DIR                      branch, trained on CLIPScore
    python -m solrl_jax.main --config=flux:sol_rl --prompts=DIR               the paper's: the kept restart from noise
    python -m solrl_jax.main --config=flux:naive_scaling_pickscore --prompts=DIR
    python -m solrl_jax.main --config=flux --prompts=DIR --config.model.path=FLUX.1-dev

DIR holds train.txt and test.txt, a prompt a line, or train_metadata.jsonl and test_metadata.jsonl. The weights, 34 GB,
come from huggingface.co once their licence is accepted (https://huggingface.co/black-forest-labs/FLUX.1-dev, then
`hf auth login`), or from --config.model.path, a folder in diffusers' layout. The reward's weights are fetched too, or
read from --config.reward_paths: CLIPScore's 1.7 GB, PickScore's 3.9 GB, HPSv2's 2.0 GB, ImageReward's 1.8 GB.

Memory: 58.5 GB at most on an H100, with random weights (experiments/flux_h100: sol_rl; `learn` takes the most, and is
the same in a branch). A smaller card keeps less for the backward pass: with nothing it is 45 GB, and learning takes 6 %
longer. T5, 9.5 GB, leaves the card while it trains. `--config=flux --mode=plan` estimates every stage, on other GPUs
with --card and --devices.
Time: 21.5 s a prompt and iteration on one H100 (explore 8.1 in FP8, regenerate 2.7, learn 10.7:
experiments/efficiency), so 17 minutes an iteration of 48 prompts; sol_rl takes 26.8 s (9.6, 6.4, 10.7). Devices share
the prompts. The paper gives 169 s on eight B200 with native FP4, 79 of them rollout. Reward to expect: not known here,
the public weights have not been run yet.
"""

from solrl_jax.config import Config, Evaluate, Learn, Lora, Model, Stage
from solrl_jax.recipes import ON_THE_HUB, choose, recipes

REWARDS = ("clipscore", "pickscore", "hpsv2", "imagereward")
RECIPES = recipes(REWARDS)


def base(reward: str) -> Config:
    """sol_rl on `reward`."""
    return Config(
        name="flux",
        model=Model(
            path="black-forest-labs/FLUX.1-dev",
            size=512,
            text_tokens=128,
            vae_dtype="bfloat16",  # as the original, which decodes under autocast
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
        regenerate=Stage(steps=10, solver="dpm2", precision="bf16", chunk=24),
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
        encode_ahead=20,  # T5 comes to the card for 960 prompts at a time
    )


def config(recipe: str) -> Config:
    """`recipe` is FAMILY, FAMILY_REWARD, or nothing for branch_clipscore; the original's "flux1_" may be before it."""
    return choose(base, REWARDS, recipe.removeprefix("flux1_"))
