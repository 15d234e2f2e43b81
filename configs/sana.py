"""SANA-1.6B at 1024 px: Sol-RL with the settings of its SANA runs; the samples continue from the preview.

    python -m solrl_jax.main --config=sana --prompts=DIR                      branch, trained on PickScore
    python -m solrl_jax.main --config=sana:sol_rl --prompts=DIR               the paper's: the kept restart from noise
    python -m solrl_jax.main --config=sana:naive_scaling_clipscore --prompts=DIR
    python -m solrl_jax.main --config=sana --prompts=DIR \\
        --config.model.weights=yitongl/SANA_LinearFFN/SANA_LinearFFN.pth

DIR holds train.txt and test.txt, a prompt a line, or train_metadata.jsonl and test_metadata.jsonl. The weights come
from huggingface.co, or from --config.model.path, a folder in diffusers' layout. The original trains the native
checkpoint of the last command, 1x1 convolutions as Linears: the same network, whose weights then take the place of the
folder's. Either way a LoRA's file is in diffusers' names.

The schedule is the original's for training, sigmas in equal steps from 1 to 0, not SANA's own
(--config.model.shift=0, the 3 of its file). NVFP4 quantises what the original quantises, MLPs and the text's keys and
values: 59 % of the weights, 57 % of the Linears' FLOPs; FP8 every Linear of the blocks.
On an H100, random weights, FP8: 10.6 s a prompt and iteration, sol_rl 12.0 s (experiments/efficiency); 29 GB
(experiments/sana_h100).
"""

from solrl_jax.config import Config, Evaluate, Learn, Lora, Model, Stage
from solrl_jax.recipes import ON_THE_HUB, choose, recipes

REWARDS = ("pickscore", "clipscore", "hpsv2", "imagereward")
RECIPES = recipes(REWARDS)


def base(reward: str) -> Config:
    """sol_rl on `reward`."""
    return Config(
        name="sana",
        model=Model(
            name="sana",
            path="Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
            shift=1.0,
            size=1024,
            text_tokens=300,
            vae_dtype="bfloat16",
            remat=True,
            remat_keeps=("auto",),
            min_dim=2240,
            min_quantised_flops=0.55,  # the rule covers .574 of the blocks'; less is another network
        ),
        reward=reward,
        reward_paths=ON_THE_HUB,
        prompts=48,
        candidates=96,
        kept=24,
        explore=Stage(steps=6, solver="euler", precision="auto", chunk=24),
        regenerate=Stage(steps=10, solver="euler", precision="bf16", chunk=24),
        lora=Lora(rank=32, alpha=64.0),
        learn=Learn(
            timestep_fraction=0.6,
            updates=1,
            micro_batch=24,  # 4 samples' 6 times; the original takes 16 samples at one time: the same mean
            learning_rate=3e-4,
            kl_weight=1e-4,
            reference_every=3,  # 4 does not divide a prompt's 6 micro-batches
            clip_norm=1.0,
            ema_max=0.9,
        ),
        evaluate=Evaluate(every=20, prompts=128, steps=40, solver="euler", grid=8, chunk=16, own=True),
        iterations=300,
        seed=42,
        save_every=5,
        encode_ahead=20,  # Gemma comes to the card for 960 prompts at a time
    )


def config(recipe: str) -> Config:
    """`recipe` is FAMILY, FAMILY_REWARD, or nothing for branch_pickscore; the original's "sana_" may be before it."""
    return choose(base, REWARDS, recipe.removeprefix("sana_"))
