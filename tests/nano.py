"""The small world's pipeline at a size that compiles in seconds, with random weights, in the public folder layout."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import pretraining, worlds
from experiments.tiny import pretrain
from solrl_jax import config, weights
from solrl_jax.config import Config, Evaluate, Learn, Lora, Model, Stage, Watch
from solrl_jax.keys import sample_keys
from solrl_jax.models import flux, text, vae
from solrl_jax.models.folders import text_modules
from solrl_jax.rewards import clip_tower
from solrl_jax.run import assemble

PROMPTS = [
    "a red circle",
    "a small blue square on a white background",
    "a green triangle left of a yellow circle",
    "a large pink square",
    "a cyan triangle on the right",
    "an orange circle above a blue triangle",
    "a purple circle on a black background",
    "a yellow square below a red triangle",
]
CONFIGS = {
    **pretrain.CONFIGS,
    "vae": {**pretrain.VAE, "block_out_channels": [8, 16], "norm_num_groups": 4, "latent_channels": 4},
    "transformer": {
        **pretrain.TRANSFORMER,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 16,
        "axes_dims_rope": [4, 6, 6],
    },
    "text_encoder": {**pretrain.TEXT, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2},
    "text_encoder_2": {**pretrain.T5, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
}
_SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIGS["clip"] = {
    **pretrain.CLIP,
    "text_config": {**pretrain.CLIP["text_config"], **_SMALL},
    "vision_config": {**pretrain.CLIP["vision_config"], **_SMALL, "image_size": 16, "patch_size": 8},
}
CONFIGS["vae"] |= {k: v[:2] for k, v in pretrain.VAE.items() if k.endswith("block_types")}


def random(spec, seed: int, size: float = 0.2):
    """Random values for shapes, made on the host: nothing to compile. Norm gains stay near one."""
    rng = np.random.default_rng(seed)

    def leaf(path, x):
        base = {"scale": 1.0, "logit_scale": 4.6}.get(path[-1].key, 0.0)
        return (base + size * rng.standard_normal(x.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, spec)


def build(folder: Path, configs=CONFIGS, **changes) -> Config:
    """Write the folders, and return a config of one whole sol_rl iteration on them; `changes` replace its fields."""
    pipeline, clip = folder / "pipeline", folder / "clip"
    if not pipeline.exists():
        write(pipeline, clip, configs)
        (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    fields = {
        "model": Model(path=str(pipeline), size=16, text_tokens=8, dtype="float32", remat=False, min_dim=0),
        "prompt_files": str(folder / "prompts.txt"),
        "reward": "clipscore",
        "reward_paths": (f"clipscore={clip}",),
        "prompts": 4,
        "candidates": 8,
        "kept": 4,
        "explore": Stage(steps=2, precision="nvfp4_emulated", chunk=4),
        "regenerate": Stage(steps=3, chunk=4),
        "lora": Lora(rank=4, alpha=8.0),
        "learn": Learn(timestep_fraction=0.7, updates=2, micro_batch=2, learning_rate=1e-3),
        "evaluate": Evaluate(every=2, prompts=4, steps=2, grid=2, chunk=4),
        "watch": Watch(every=0),
        "iterations": 2,
        "save_every": 1,
        "seed": 195,
    }
    return Config(**{"name": "nano", **fields, **changes})


def emoji(folder: Path, **changes) -> Config:
    """`build` at the emoji world's 64 px, on its captions of objects."""
    model = Model(path=str(folder / "pipeline"), size=64, text_tokens=24, dtype="float32", remat=False, min_dim=0)
    fields = {"name": "emoji", "model": model, "prompt_files": str(worlds.EMOJI.prompts)}
    return build(folder, **fields, **changes)


def write(pipeline: Path, clip: Path, configs=CONFIGS, texts=PROMPTS, size: float = 0.2) -> None:
    """The two folders, with tokenizers of the words in `texts` and weights of that size."""
    pretraining.write_folders(pipeline, clip, texts, configs, pretrain.TOKENS)
    model_cfg = config.Model(path=str(pipeline), size=16, text_tokens=8, dtype="float32", remat=False, min_dim=0)
    model, key = flux.make(model_cfg), jax.random.key(0)
    cfg = vae.VaeConfig.read(pipeline / "vae")
    words, t5 = text_modules(pipeline, flux.ENCODERS, jnp.float32).values()
    tower = clip_tower.ClipTower(clip_tower.ClipConfig.read(clip), jnp.float32)
    side, channels = configs["clip"]["vision_config"]["image_size"], configs["vae"]["latent_channels"]
    ids, image, latent = jnp.zeros((1, 8), jnp.int32), jnp.zeros((1, side, side, 3)), jnp.zeros((1, 8, 8, channels))

    def shapes(module, *args):
        return jax.eval_shape(module.init, key, *args)["params"]

    halves = {
        "encoder": shapes(vae.Encoder(cfg, jnp.float32), image),
        "decoder": shapes(vae.Decoder(cfg, jnp.float32), latent),
    }
    for spec, keys, file in (
        (jax.eval_shape(model.init, key), flux.KEYS, pipeline / "transformer/diffusion_pytorch_model.safetensors"),
        (halves, vae.VAE_KEYS, pipeline / "vae/diffusion_pytorch_model.safetensors"),
        (shapes(words, ids), text.CLIP_TEXT_KEYS, pipeline / "text_encoder/model.safetensors"),
        (shapes(t5, ids), text.T5_KEYS, pipeline / "text_encoder_2/model.safetensors"),
        (shapes(tower, image, ids), clip_tower.HF_KEYS, clip / "model.safetensors"),
    ):
        weights.save(random(spec, 1, size), keys, file)


# --- one iteration of it ---

STATICS = ("model", "score", "optimizer", "cfg")


@functools.cache
def parts_of(cfg: Config, devices: int = 1):
    return assemble.assemble(cfg, devices)


def statics_of(parts):
    return parts.model, parts.score, parts.optimizer, parts.cfg


def begun(parts):
    """A fresh state, 4 prompts and the keys of their 8 candidates; call it under the mesh."""
    state = assemble.fresh(parts)
    return state, assemble.encode(parts, PROMPTS[:4], parts.score), sample_keys(state, 4, 8)


def numbers(tree):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])
