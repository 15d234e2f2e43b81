"""Make the small world's checkpoints: tokenizers, VAE, FLUX pipeline and CLIP, all from the drawing program.

    python -m experiments.tiny.pretrain                        # minutes on a GPU; hours on two CPU cores
    python -m experiments.tiny.pretrain --scale=0.02 --out=/tmp/world    # a short run, on a CPU

experiments/pretraining.py says how they are trained; `python -m experiments.tiny.check` measures their quality.
"""

import argparse
import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import pretraining
from experiments.pretraining import Fit, Folders
from experiments.tiny import check, world
from solrl_jax import config, device
from solrl_jax.models import flux, public
from solrl_jax.models.folders import tokenize as tokenize_by

HERE = Path(__file__).parent
TOKENS, SIZE = 24, 32

VAE = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 8,
    "block_out_channels": [16, 32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "act_fn": "silu",
    "sample_size": SIZE,
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": True,
    "force_upcast": True,
}
TRANSFORMER = {
    "_class_name": "FluxTransformer2DModel",
    "patch_size": 1,
    "in_channels": 4 * VAE["latent_channels"],
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 5,
    "joint_attention_dim": 128,
    "pooled_projection_dim": 96,
    "guidance_embeds": True,
    "axes_dims_rope": [4, 14, 14],
}
SCHEDULER = public.FLUX_DEV["scheduler/scheduler_config.json"] | {"num_train_timesteps": 1000}
TEXT = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": TOKENS,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 96,
}
T5 = {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "feed_forward_proj": "gated-gelu",
    "is_gated_act": True,
    "dense_act_fn": "gelu_new",
    "layer_norm_epsilon": 1e-6,
    "is_encoder_decoder": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
CLIP = {
    "architectures": ["CLIPModel"],
    "model_type": "clip",
    "projection_dim": 96,
    "logit_scale_init_value": 2.6592,
    "text_config": {**TEXT, "model_type": "clip_text_model", "hidden_size": 96, "num_hidden_layers": 3},
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": 4,
        "num_channels": 3,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": 96,
    },
}


CONFIGS = {
    "vae": VAE,
    "transformer": TRANSFORMER,
    "text_encoder": TEXT,
    "text_encoder_2": T5,
    "clip": CLIP,
    "scheduler": SCHEDULER,
}


# --- data -----------------------------------------------------------------------------------------------------------


def make_pool(rng: np.random.Generator, count: int, tokenize) -> dict[str, Any]:
    """`count` train scenes with the tokens of one caption each; the pictures are drawn later, on the device."""
    scenes = world.sample_scenes(rng, count, "train")
    return {"scenes": tuple(scenes), "tokens": tokenize(world.captions(scenes, rng))}


def pictures(batch: dict[str, Any]) -> jax.Array:
    return world.draw(world.Scenes(*batch["scenes"]), SIZE)


def paired_pool(rng: np.random.Generator, count: int, tokenize) -> dict[str, Any]:
    """[count, 2, ...]: pairs of a train scene and one that differs in a single stated fact."""
    scenes = world.sample_scenes(rng, count, "train")
    other, _ = world.mutate(scenes, rng)
    tokens = [tokenize(world.captions(s, rng)) for s in (scenes, other)]
    return {"scenes": tuple(np.stack(p, 1) for p in zip(scenes, other, strict=True)), "tokens": np.stack(tokens, 1)}


# --- all of it ------------------------------------------------------------------------------------------------------


def watch(cfg: config.Model, decoder, base, text) -> str:
    """Exact accuracy on 400 test captions, 10 steps."""
    rng = np.random.default_rng(2)
    captions = world.captions(world.sample_scenes(rng, 400, "test"), rng)
    model = flux.make(cfg)
    cond = jax.jit(model.encode)(text, jax.tree.map(jnp.asarray, model.tokenize(captions)))
    images = check.draw_samples(cfg, base, decoder, cond, 2, config.Stage(steps=10, chunk=2))
    return f"exact {check.exact(images, captions)[1].mean():.3f}"


def main(argv: list[str] | None = None) -> None:
    device.setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", default="vae,flow,clip", help="which to train; flow and clip need the vae's files")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full number of steps and scenes")
    parser.add_argument("--vae_steps", type=int, default=12_000)
    parser.add_argument("--flow_steps", type=int, default=6_500)
    parser.add_argument("--flow_batch", type=int, default=512)
    parser.add_argument("--flow_rate", type=float, default=2e-3)
    parser.add_argument("--go_on", action="store_true", help="flow: begin with the weights that are there")
    parser.add_argument("--clip_steps", type=int, default=15_000)
    args = parser.parse_args(argv)
    folders, start = Folders(args.out / "pipeline", args.out / "clip"), time.time()
    stages = args.stages.split(",")

    def count(full: int, least: int = 2) -> int:
        return max(least, int(full * args.scale))

    def rng_of(purpose: str) -> np.random.Generator:
        """Each training draws its own scenes, so that running --stages separately gives the same result."""
        return np.random.default_rng([args.seed, ("words", "vae", "flow", "clip").index(purpose)])

    if "vae" in stages:
        world.write_prompts(args.out / "prompts", args.seed)
        rng = rng_of("words")
        texts = world.captions(world.sample_scenes(rng, count(50_000, 2_000)), rng)
        pretraining.write_folders(*folders, texts, CONFIGS, TOKENS)
        pool = {"scenes": tuple(world.sample_scenes(rng_of("vae"), count(200_000, 32)))}
        how = Fit(count(args.vae_steps), 256, 2e-3, args.seed, "vae")
        pretraining.save_vae(folders, *pretraining.train_vae(VAE, pictures, pool, how))
    cfg = check.model_config(folders.pipeline)
    tokenize = functools.partial(tokenize_by, str(folders.pipeline), flux.ENCODERS, TOKENS)
    vae_params = pretraining.stored_vae(folders.pipeline)

    if "flow" in stages:
        pool = make_pool(rng_of("flow"), count(200_000, 32), tokenize)
        how = Fit(count(args.flow_steps), args.flow_batch, args.flow_rate, args.seed, "flow")
        seen = functools.partial(watch, cfg, vae_params["decoder"])
        flow = pretraining.train_flow(cfg, vae_params, pictures, pool, how, go_on=args.go_on, watch=seen)
        pretraining.save_flow(folders, flow)

    if "clip" in stages:
        pool = paired_pool(rng_of("clip"), count(150_000, 16), lambda texts: tokenize(texts)["clip"])
        how = Fit(count(args.clip_steps), 256, 1e-3, args.seed, "clip")
        trained = pretraining.train_clip(folders.clip, folders.pipeline, vae_params, pictures, pool, how)
        pretraining.save_clip(folders, trained)
    print(f"{args.stages} of {args.out} in {time.time() - start:.0f} s on {jax.devices()[0].device_kind}", flush=True)


if __name__ == "__main__":
    main()
