"""Make the small world's checkpoints: tokenizers, VAE, FLUX pipeline and CLIP, all from the drawing program.

    python -m experiments.tiny.pretrain                        # minutes on a GPU; hours on two CPU cores
    python -m experiments.tiny.pretrain --scale=0.02 --out=/tmp/world    # a short run, on a CPU

Order: a VAE on drawn pictures; a FLUX transformer together with its T5 and CLIP text encoders by the flow-matching
loss, one caption in ten empty; a CLIP by its contrastive loss, each picture beside one that differs in a single stated
fact, some of the pictures decoded from noisy latents. The results are written as a diffusers FluxPipeline folder (bf16,
safetensors) and a transformers CLIPModel folder; `python -m experiments.tiny.check` then measures their quality.
"""

import argparse
import functools
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax

from experiments.tiny import check, tokenizers_local, world
from solrl_jax import config, device, weights
from solrl_jax.models import flux, public, text, vae
from solrl_jax.models.folders import text_modules
from solrl_jax.models.folders import tokenize as tokenize_by
from solrl_jax.rewards import clip_tower, preprocess
from solrl_jax.structs import Model

HERE = Path(__file__).parent
TOKENS, SIZE = 24, 32
BF16 = ml_dtypes.bfloat16

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


# --- folders --------------------------------------------------------------------------------------------------------


def write_json(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2) + "\n")


CONFIGS = {"vae": VAE, "transformer": TRANSFORMER, "text_encoder": TEXT, "text_encoder_2": T5, "clip": CLIP}


def write_folders(pipeline: Path, clip: Path, texts: list[str], configs: dict[str, Any] = CONFIGS) -> None:
    """Everything but the weights: model_index, configs, tokenizers trained on the captions."""
    diffusers, transformers = "diffusers", "transformers"
    parts = {
        "scheduler": [diffusers, "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": [transformers, "CLIPTextModel"],
        "text_encoder_2": [transformers, "T5EncoderModel"],
        "tokenizer": [transformers, "CLIPTokenizer"],
        "tokenizer_2": [transformers, "T5TokenizerFast"],
        "transformer": [diffusers, "FluxTransformer2DModel"],
        "vae": [diffusers, "AutoencoderKL"],
    }
    write_json(pipeline / "model_index.json", {"_class_name": "FluxPipeline", "_diffusers_version": "0.31.0", **parts})
    clip_vocabulary = tokenizers_local.write_clip_tokenizer(pipeline / "tokenizer", texts, TOKENS)
    tokenizers_local.write_clip_tokenizer(clip, texts, TOKENS)
    t5_vocabulary = tokenizers_local.write_t5_tokenizer(pipeline / "tokenizer_2", texts)
    ids = {"vocab_size": clip_vocabulary, "bos_token_id": clip_vocabulary - 2, "eos_token_id": clip_vocabulary - 1}
    write_json(pipeline / "scheduler/scheduler_config.json", SCHEDULER)
    write_json(pipeline / "transformer/config.json", configs["transformer"])
    write_json(pipeline / "vae/config.json", configs["vae"])
    write_json(pipeline / "text_encoder/config.json", {**configs["text_encoder"], **ids})
    write_json(pipeline / "text_encoder_2/config.json", {**configs["text_encoder_2"], "vocab_size": t5_vocabulary})
    write_json(clip / "config.json", {**configs["clip"], "text_config": {**configs["clip"]["text_config"], **ids}})


# --- data -----------------------------------------------------------------------------------------------------------


def make_pool(rng: np.random.Generator, count: int, tokenize) -> dict[str, Any]:
    """`count` train scenes with the tokens of one caption each; the pictures are drawn later, on the device."""
    scenes = world.sample_scenes(rng, count, "train")
    return {"scenes": tuple(scenes), "tokens": tokenize(world.captions(scenes, rng))}


def pictures(batch: dict[str, Any]) -> jax.Array:
    return world.draw(world.Scenes(*batch["scenes"]), SIZE)


def fit(loss, params, pool, *, steps: int, batch: int, rate: float, seed: int, label: str, watch=lambda average: ""):
    """AdamW with warm-up and cosine, batches drawn on the device; returns the weights' running average.

    `watch(average)` gives a text for the log, ten times a training.
    """
    decay = 0.999
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, min(200, steps // 10 + 1), steps, 0.01 * rate)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=1e-2))
    size = jax.tree.leaves(pool)[0].shape[0]
    batch = min(batch, size)
    stretch = max(1, min(100, steps))

    def step(carry, key):
        params, ema, state, count = carry
        key_pick, key_loss = jax.random.split(key)
        pick = jax.random.randint(key_pick, (batch,), 0, size)
        value, grads = jax.value_and_grad(loss)(params, jax.tree.map(lambda x: x[pick], pool), key_loss)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        d = jnp.minimum(decay, (1 + count) / (10 + count))
        return (params, jax.tree.map(lambda e, p: d * e + (1 - d) * p, ema, params), state, count + 1), value

    run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))
    pool = jax.tree.map(jnp.asarray, pool)
    carry = (params, params, optimizer.init(params), jnp.zeros(()))
    start = time.time()
    for i in range(0, steps, stretch):
        carry, values = run(carry, jax.random.split(jax.random.fold_in(jax.random.key(seed), i), stretch))
        done = i + stretch
        if done * 10 // steps > i * 10 // steps:
            line = f"{label} {done}/{steps} loss {float(values.mean()):.4f} {time.time() - start:.0f} s"
            print(line, watch(carry[1]), flush=True)
    return carry[1]


# --- the three trainings --------------------------------------------------------------------------------------------


def train_vae(pool, steps: int, batch: int, seed: int):
    """Train with L1 + L2 and a small KL term; then set shift and scale from the latents' mean and deviation."""
    known = [(k, v) for k, v in VAE.items() if k in vae.VaeConfig.__dataclass_fields__]
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in known}
    cfg = vae.VaeConfig(**fields)
    encoder, decoder = vae.Encoder(cfg, jnp.float32), vae.Decoder(cfg, jnp.float32)
    k1, k2 = jax.random.split(jax.random.key(seed))
    side = SIZE // cfg.factor
    params = {
        "encoder": encoder.init(k1, jnp.zeros((1, SIZE, SIZE, 3)))["params"],
        "decoder": decoder.init(k2, jnp.zeros((1, side, side, cfg.latent_channels)))["params"],
    }

    def loss(params, batch, key):
        x = pictures(batch) * 2 - 1
        moments: Any = encoder.apply({"params": params["encoder"]}, x)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        logvar = jnp.clip(logvar, -30, 20)
        z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        drawn: Any = decoder.apply({"params": params["decoder"]}, z)
        error = drawn - x
        kl = 0.5 * jnp.mean(mean**2 + jnp.exp(logvar) - 1 - logvar)
        return jnp.mean(jnp.abs(error)) + jnp.mean(error**2) + 1e-4 * kl

    params = fit(loss, params, pool, steps=steps, batch=batch, rate=2e-3, seed=seed, label="vae")
    sample = jax.tree.map(lambda x: jnp.asarray(x[:2048]), pool)
    moments: Any = encoder.apply({"params": params["encoder"]}, pictures(sample) * 2 - 1)
    mean, _ = jnp.split(moments, 2, axis=-1)
    return params, {**VAE, "scaling_factor": float(1 / jnp.std(mean)), "shift_factor": float(jnp.mean(mean))}


def shift(model: Model) -> float:
    """e^mu of the sampler's sigmas: sigma = e^mu / (e^mu + 1/u - 1) at u = 1/2 is e^mu / (e^mu + 1)."""
    first = model.sigmas(2)[1]
    return float(first / (1 - first))


def flow_matching(velocity, x0: jax.Array, k_t: jax.Array, k_eps: jax.Array, shift: float) -> jax.Array:
    """E |v(x_t, t) - (eps - x0)|^2 over a batch x0; t is logit-normal, shifted as the sampler's sigmas are."""
    u = jax.nn.sigmoid(jax.random.normal(k_t, (x0.shape[0],)))
    t = shift * u / (1 + (shift - 1) * u)
    eps = jax.random.normal(k_eps, x0.shape)
    s = t[:, None, None, None]
    return jnp.mean((velocity((1 - s) * x0 + s * eps, t) - (eps - x0)) ** 2)


def train_flow(model_cfg: config.Model, vae_params, pool, empty, go_on: bool, **how):
    """Flow matching; trains transformer and both text encoders together; one caption in ten is empty."""
    model = flux.make(model_cfg)
    folder = Path(model_cfg.path)
    clip, t5 = text_modules(folder, flux.ENCODERS, jnp.bfloat16).values()
    k1, k2, k3 = jax.random.split(jax.random.key(how["seed"]), 3)
    ids = jnp.zeros((1, TOKENS), jnp.int32)
    if go_on:
        base, _, words = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), flux.load(model_cfg))
    else:
        base, words = model.init(k1), {"clip": clip.init(k2, ids)["params"], "t5": t5.init(k3, ids)["params"]}
    params = {"base": base, "text": words}
    encoder = vae.Encoder(vae.VaeConfig.read(folder / "vae"), jnp.float32)
    empty, by = jax.tree.map(jnp.asarray, empty), shift(model)

    def loss(params, batch, key):
        k_t, k_eps, k_drop = jax.random.split(key, 3)
        x0, _ = vae.encode(encoder, vae_params["encoder"], pictures(batch))
        drop = jax.random.uniform(k_drop, (x0.shape[0], 1)) < 0.1
        tokens = jax.tree.map(lambda t, e: jnp.where(drop, jnp.broadcast_to(e, t.shape), t), batch["tokens"], empty)
        cond = model.encode(params["text"], tokens)
        return flow_matching(lambda x, t: model.velocity({"params": params["base"]}, x, t, cond), x0, k_t, k_eps, by)

    watched = iter(range(1, 11))

    def watch(average) -> str:
        """Exact accuracy on 400 test captions, 10 steps; called half way and at the end."""
        if next(watched) not in (5, 10):
            return ""
        rng = np.random.default_rng(2)
        captions = world.captions(world.sample_scenes(rng, 400, "test"), rng)
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), average)
        cond = jax.jit(model.encode)(params["text"], jax.tree.map(jnp.asarray, model.tokenize(captions)))
        stage = config.Stage(steps=10, chunk=2)
        images = check.draw_samples(model_cfg, params["base"], vae_params["decoder"], cond, 2, stage)
        return f"exact {check.exact(images, captions)[1].mean():.3f}"

    return fit(loss, params, pool, label="flow", watch=watch, **how)


def train_clip(folder: Path, pipeline: Path, vae_params, pool, steps: int, batch: int, seed: int):
    """Contrastive loss over pictures and captions; `batch` scenes and as many one-fact mutations of them.

    Half of the pictures go through the VAE with noise in the latents: the reward will only ever see decoded pictures,
    some of them poor. Equal captions in a batch are no negatives of each other.
    """
    tower = clip_tower.ClipTower(clip_tower.ClipConfig.read(folder), jnp.bfloat16)
    ids = jnp.zeros((1, TOKENS), jnp.int32)
    params = tower.init(jax.random.key(seed), jnp.zeros((1, SIZE, SIZE, 3)), ids)["params"]
    cfg = vae.VaeConfig.read(pipeline / "vae")
    encoder, decoder = vae.Encoder(cfg, jnp.float32), vae.Decoder(cfg, jnp.float32)

    def soften(x, key):
        k1, k2, k3 = jax.random.split(key, 3)
        z, _ = vae.encode(encoder, vae_params["encoder"], x)
        strength = 0.5 * jax.random.uniform(k1, (x.shape[0], 1, 1, 1))
        poor = vae.decode(decoder, vae_params["decoder"], z + strength * jax.random.normal(k2, z.shape))
        return jnp.where(jax.random.uniform(k3, (x.shape[0], 1, 1, 1)) < 0.5, poor, x)

    def loss(params, batch, key):
        both = jax.tree.map(lambda x: x.reshape((-1, *x.shape[2:])), batch)  # [n, 2, ...]: a scene and its mutation
        pixels = preprocess.standardise(soften(pictures(both), key), preprocess.OPENAI_MEAN, preprocess.OPENAI_STD)
        found: Any = tower.apply({"params": params}, pixels, both["tokens"])
        image, words = found
        same = jnp.all(both["tokens"][:, None] == both["tokens"][None], axis=-1) & ~jnp.eye(len(pixels), dtype=bool)
        scale = jnp.exp(jnp.minimum(params["logit_scale"], np.log(100.0)))
        logits = jnp.where(same, -1e9, scale * image @ words.T)
        rows, cols = (jnp.diag(jax.nn.log_softmax(logits, axis=a)) for a in (0, 1))
        return -jnp.mean(rows + cols) / 2

    return fit(loss, params, pool, steps=steps, batch=batch, rate=1e-3, seed=seed, label="clip")


def paired_pool(rng: np.random.Generator, count: int, tokenize) -> dict[str, Any]:
    """[count, 2, ...]: pairs of a train scene and one that differs in a single stated fact."""
    scenes = world.sample_scenes(rng, count, "train")
    other, _ = world.mutate(scenes, rng)
    tokens = [tokenize(world.captions(s, rng)) for s in (scenes, other)]
    return {"scenes": tuple(np.stack(p, 1) for p in zip(scenes, other, strict=True)), "tokens": np.stack(tokens, 1)}


# --- all of it ------------------------------------------------------------------------------------------------------


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
    pipeline, clip_folder, start = args.out / "pipeline", args.out / "clip", time.time()
    stages = args.stages.split(",")

    def count(full: int, least: int = 2) -> int:
        return max(least, int(full * args.scale))

    def rng_of(purpose: str) -> np.random.Generator:
        """Each training draws its own scenes, so that running --stages separately gives the same result."""
        return np.random.default_rng([args.seed, ("words", "vae", "flow", "clip").index(purpose)])

    if "vae" in stages:
        world.write_prompts(args.out / "prompts", args.seed)
        rng = rng_of("words")
        write_folders(pipeline, clip_folder, world.captions(world.sample_scenes(rng, count(50_000, 2_000)), rng))
    cfg = check.model_config(pipeline)
    tokenize = functools.partial(tokenize_by, str(pipeline), flux.ENCODERS, TOKENS)

    if "vae" in stages:
        pool = {"scenes": tuple(world.sample_scenes(rng_of("vae"), count(200_000, 32)))}
        vae_params, vae_config = train_vae(pool, count(args.vae_steps), 256, args.seed)
        write_json(pipeline / "vae/config.json", vae_config)
        weights.save(vae_params, vae.VAE_KEYS, pipeline / "vae/diffusion_pytorch_model.safetensors", dtype=BF16)
    # Rounded to bf16, as stored: the later trainings use the stored values.
    decoder, encoder = (vae.load_vae(pipeline / "vae", jnp.float32, encoder=e)[1] for e in (False, True))
    vae_params = {"encoder": encoder, "decoder": decoder}

    if "flow" in stages:
        pool = make_pool(rng_of("flow"), count(200_000, 32), tokenize)
        how = {"steps": count(args.flow_steps), "batch": args.flow_batch, "rate": args.flow_rate, "seed": args.seed}
        flow = train_flow(cfg, vae_params, pool, tokenize([""]), args.go_on, **how)
        weights.save(flow["base"], flux.KEYS, pipeline / "transformer/diffusion_pytorch_model.safetensors", dtype=BF16)
        weights.save(flow["text"]["clip"], text.CLIP_TEXT_KEYS, pipeline / "text_encoder/model.safetensors", dtype=BF16)
        weights.save(flow["text"]["t5"], text.T5_KEYS, pipeline / "text_encoder_2/model.safetensors", dtype=BF16)

    if "clip" in stages:
        pairs = paired_pool(rng_of("clip"), count(150_000, 16), lambda texts: tokenize(texts)["clip"])
        clip_params = train_clip(clip_folder, pipeline, vae_params, pairs, count(args.clip_steps), 256, args.seed)
        weights.save(clip_params, clip_tower.HF_KEYS, clip_folder / "model.safetensors", dtype=BF16)
    print(f"{args.stages} of {args.out} in {time.time() - start:.0f} s on {jax.devices()[0].device_kind}", flush=True)


if __name__ == "__main__":
    main()
