"""How the networks of a small world are trained: VAE, FLUX with its text encoders, CLIP.

`experiments.tiny.pretrain` and `experiments.emoji.pretrain` are the commands. In this order: a VAE on drawn pictures; a
FLUX transformer together with its T5 and CLIP text encoders by the flow-matching loss, one caption in ten empty; a CLIP
by its contrastive loss, each picture beside one that differs in a single stated fact, some of the pictures decoded from
noisy latents. The results are a diffusers FluxPipeline folder and a transformers CLIPModel folder (bf16, safetensors).
"""

import json
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax

from experiments import tokenizers_local
from solrl_jax import config, disk, weights
from solrl_jax.models import flux, text, vae
from solrl_jax.models.folders import text_modules
from solrl_jax.rewards import clip_tower, preprocess
from solrl_jax.structs import Model

BF16 = ml_dtypes.bfloat16
CHUNK = 500  # pictures encoded at once; divides the pools, so that one program does
Draw = Callable[[dict[str, Any]], jax.Array]
"""The pictures [n, H, W, 3], in [0, 1], of a batch of a pool; called on the device."""


# --- folders --------------------------------------------------------------------------------------------------------


class Folders(NamedTuple):
    """Where a world's networks are, or will be."""

    pipeline: Path
    clip: Path

    @property
    def done(self) -> dict[str, Path]:
        """{training: a file that its end writes}"""
        return {
            "vae": self.pipeline / "vae/diffusion_pytorch_model.safetensors",
            "flow": self.pipeline / "text_encoder_2/model.safetensors",
            "clip": self.clip / "model.safetensors",
        }


def write_json(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2) + "\n")


def write_folders(pipeline: Path, clip: Path, texts: list[str], configs: dict[str, Any], tokens: int) -> None:
    """Everything but the weights: model_index, configs, and tokenizers of so many tokens, trained on the captions.

    `configs`: the config.json of vae, transformer, text_encoder, text_encoder_2, clip and scheduler.
    """
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
    clip_vocabulary = tokenizers_local.write_clip_tokenizer(pipeline / "tokenizer", texts, tokens)
    tokenizers_local.write_clip_tokenizer(clip, texts, tokens)
    t5_vocabulary = tokenizers_local.write_t5_tokenizer(pipeline / "tokenizer_2", texts)
    ids = {"vocab_size": clip_vocabulary, "bos_token_id": clip_vocabulary - 2, "eos_token_id": clip_vocabulary - 1}
    write_json(pipeline / "scheduler/scheduler_config.json", configs["scheduler"])
    write_json(pipeline / "transformer/config.json", configs["transformer"])
    write_json(pipeline / "vae/config.json", configs["vae"])
    write_json(pipeline / "text_encoder/config.json", {**configs["text_encoder"], **ids})
    write_json(pipeline / "text_encoder_2/config.json", {**configs["text_encoder_2"], "vocab_size": t5_vocabulary})
    write_json(clip / "config.json", {**configs["clip"], "text_config": {**configs["clip"]["text_config"], **ids}})


# --- a training -----------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """The time is over; what was trained is in the file of the state."""


class Fit(NamedTuple):
    """How a training goes: `batch` of the pool a step, peak `rate`. With `state`, progress is saved in that file every
    `save_every` seconds and after `until` (a time.time()), when Stopped is raised; it goes on from there, to the same
    weights as without an interruption."""

    steps: int
    batch: int
    rate: float
    seed: int
    label: str
    state: Path | None = None
    until: float = float("inf")
    save_every: float = 120.0


def fit(loss, params, pool, how: Fit, watch: Callable[[Any, int], str] = lambda average, tenth: ""):
    """AdamW with warm-up and cosine, batches drawn on the device; returns the weights' running average.

    `loss(params, batch, key)`; `pool` has a leading axis over its rows. `watch(average, tenth)` gives a text for the
    log after the first steps (0) and after each tenth of the training, 1 to 10.
    """
    decay, steps = 0.999, how.steps
    schedule = optax.warmup_cosine_decay_schedule(0.0, how.rate, min(200, steps // 10 + 1), steps, 0.01 * how.rate)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=1e-2))
    size = jax.tree.leaves(pool)[0].shape[0]
    batch = min(how.batch, size)
    stretch = max(1, min(100, steps))

    def step(carry, key, pool):
        params, ema, state, count = carry
        key_pick, key_loss = jax.random.split(key)
        pick = jax.random.randint(key_pick, (batch,), 0, size)
        value, grads = jax.value_and_grad(loss)(params, jax.tree.map(lambda x: x[pick], pool), key_loss)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        d = jnp.minimum(decay, (1 + count) / (10 + count))
        return (params, jax.tree.map(lambda e, p: d * e + (1 - d) * p, ema, params), state, count + 1), value

    run = jax.jit(lambda carry, keys, pool: jax.lax.scan(lambda c, key: step(c, key, pool), carry, keys))
    pool = jax.tree.map(jnp.asarray, pool)
    carry: Any = (params, params, optimizer.init(params), jnp.zeros(()))
    identity = _identity(how, pool)
    if how.state is not None and how.state.exists():
        carry = flax.serialization.from_state_dict(carry, _saved(how.state, identity))
        print(f"{how.label} goes on after {int(carry[3])} steps", flush=True)
    start = saved = time.time()
    for i in range(int(carry[3]), steps, stretch):
        carry, values = run(carry, jax.random.split(jax.random.fold_in(jax.random.key(how.seed), i), stretch), pool)
        done = i + stretch
        if i == 0 or done * 10 // steps > i * 10 // steps:
            line = f"{how.label} {done}/{steps} loss {float(values.mean()):.4f} {time.time() - start:.0f} s"
            print(line, watch(carry[1], min(10, done * 10 // steps)), flush=True)
        over = int(carry[3]) < steps and time.time() > how.until
        if how.state is not None and (over or time.time() > saved + how.save_every):
            with disk.whole(how.state) as f:
                f.write(flax.serialization.to_bytes({"how": identity, "carry": jax.device_get(carry)}))
            saved = time.time()
            if over:
                raise Stopped(f"{how.label}: the time is over after {done} of {steps} steps")
    return carry[1]


def _identity(how: Fit, pool) -> dict[str, Any]:
    """What the weights of a training depend on: of the pool its size and a digest of its first rows' integers, tokens
    and templates; floats that a network computed differ between devices."""
    leaves = jax.tree.leaves(pool)
    first = [np.asarray(x[:100]) for x in leaves if jnp.issubdtype(x.dtype, jnp.integer)]
    digest = zlib.crc32(b"".join(x.tobytes() for x in first))
    fields = {"steps": how.steps, "batch": how.batch, "rate": how.rate, "seed": how.seed}
    return fields | {"rows": len(leaves[0]), "digest of rows": digest}


def _saved(file: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The carry of a state; ValueError if another training wrote it."""
    found: Any = flax.serialization.msgpack_restore(file.read_bytes())
    for name, value in identity.items():
        if (other := found["how"].get(name)) != value:
            rule = "give the same to go on, or remove the file to begin anew"
            raise ValueError(f"{file} is of a training with {name}={other}, and this one has {value}: {rule}")
    return found["carry"]


# --- the three trainings --------------------------------------------------------------------------------------------


def train_vae(settings: dict[str, Any], draw: Draw, pool, how: Fit):
    """L1 + L2 and a small KL term; then shift and scale from the latents' mean and deviation. Products are in bf16.

    Returns the parameters and the config.json: `settings` with both.
    """
    known = [(k, v) for k, v in settings.items() if k in vae.VaeConfig.__dataclass_fields__]
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in known}
    cfg, size = vae.VaeConfig(**fields), settings["sample_size"]
    encoder, decoder = vae.Encoder(cfg, jnp.bfloat16), vae.Decoder(cfg, jnp.bfloat16)
    k1, k2 = jax.random.split(jax.random.key(how.seed))
    side = size // cfg.factor
    params = {
        "encoder": encoder.init(k1, jnp.zeros((1, size, size, 3)))["params"],
        "decoder": decoder.init(k2, jnp.zeros((1, side, side, cfg.latent_channels)))["params"],
    }

    def loss(params, batch, key):
        x = draw(batch) * 2 - 1
        moments: Any = encoder.apply({"params": params["encoder"]}, x)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        logvar = jnp.clip(logvar, -30, 20)
        z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        drawn: Any = decoder.apply({"params": params["decoder"]}, z)
        error = drawn - x
        kl = 0.5 * jnp.mean(mean**2 + jnp.exp(logvar) - 1 - logvar)
        return jnp.mean(jnp.abs(error)) + jnp.mean(error**2) + 1e-4 * kl

    params = fit(loss, params, pool, how)
    sample = jax.tree.map(lambda x: jnp.asarray(x[:2048]), pool)
    moments: Any = jax.jit(lambda p, x: encoder.apply({"params": p}, draw(x) * 2 - 1))(params["encoder"], sample)
    mean, _ = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return params, {**settings, "scaling_factor": float(1 / jnp.std(mean)), "shift_factor": float(jnp.mean(mean))}


def stored_vae(pipeline: Path) -> dict[str, Any]:
    """The VAE's weights rounded to bf16, as stored: the later trainings use the stored values."""
    decoder, encoder = (vae.load_vae(pipeline / "vae", jnp.float32, encoder=e)[1] for e in (False, True))
    return {"encoder": encoder, "decoder": decoder}


def latents_of(cfg: vae.VaeConfig, encoder_params, draw: Draw, pool) -> jax.Array:
    """The latents [n, h, w, C] of a pool's pictures, in bf16: each picture is drawn and encoded once."""
    encoder, size = vae.Encoder(cfg, jnp.bfloat16), jax.tree.leaves(pool)[0].shape[0]
    encode = jax.jit(lambda params, rows: vae.encode(encoder, params, draw(rows))[0].astype(jnp.bfloat16))
    chunks = (jax.tree.map(lambda x, i=i: x[i : i + CHUNK], pool) for i in range(0, size, CHUNK))
    return jnp.concatenate([encode(encoder_params, rows) for rows in chunks])


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


def train_flow(model_cfg: config.Model, vae_params, draw: Draw, pool, how: Fit, *, go_on: bool = False, watch):
    """Flow matching; transformer and both text encoders together; one caption in ten is empty.

    `pool["tokens"]` are of the pictures' captions. `go_on`: begin with the weights that are in the folder.
    `watch(base, text)` is called at the end, with the averages in bf16. Returns {"base", "text"}.
    """
    model = flux.make(model_cfg)
    folder = Path(model_cfg.path)
    clip, t5 = text_modules(folder, flux.ENCODERS, jnp.bfloat16).values()
    k1, k2, k3 = jax.random.split(jax.random.key(how.seed), 3)
    ids = jnp.zeros((1, model_cfg.text_tokens), jnp.int32)
    if go_on:
        base, _, words = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), flux.load(model_cfg))
    else:
        base, words = model.init(k1), {"clip": clip.init(k2, ids)["params"], "t5": t5.init(k3, ids)["params"]}
    latents = latents_of(vae.VaeConfig.read(folder / "vae"), vae_params["encoder"], draw, pool)
    empty, by = jax.tree.map(jnp.asarray, model.tokenize([""])), shift(model)

    def loss(params, batch, key):
        k_t, k_eps, k_drop = jax.random.split(key, 3)
        x0 = batch["latents"].astype(jnp.float32)
        drop = jax.random.uniform(k_drop, (x0.shape[0], 1)) < 0.1
        tokens = jax.tree.map(lambda t, e: jnp.where(drop, jnp.broadcast_to(e, t.shape), t), batch["tokens"], empty)
        cond = model.encode(params["text"], tokens)
        return flow_matching(lambda x, t: model.velocity({"params": params["base"]}, x, t, cond), x0, k_t, k_eps, by)

    def seen(average, tenth: int) -> str:
        if tenth < 10:
            return ""
        stored = jax.tree.map(lambda x: x.astype(jnp.bfloat16), average)
        return watch(stored["base"], stored["text"])

    return fit(loss, {"base": base, "text": words}, {"latents": latents, "tokens": pool["tokens"]}, how, seen)


def train_clip(folder: Path, pipeline: Path, vae_params, draw: Draw, pool, how: Fit):
    """Contrastive loss over pictures and captions; `how.batch` scenes and as many one-fact mutations of them.

    `pool` is [n, 2, ...]: a scene and its mutation. Half of the pictures are decoded from latents with noise: the
    reward will only ever see decoded pictures, some of them poor. Equal captions in a batch are no negatives of each
    other.
    """
    settings = clip_tower.ClipConfig.read(folder)
    tower = clip_tower.ClipTower(settings, jnp.bfloat16)
    size, tokens = settings.vision.image_size, pool["tokens"].shape[-1]
    images, ids = jnp.zeros((1, size, size, 3)), jnp.zeros((1, tokens), jnp.int32)
    params = tower.init(jax.random.key(how.seed), images, ids)["params"]
    cfg = vae.VaeConfig.read(pipeline / "vae")
    decoder, flat = vae.Decoder(cfg, jnp.bfloat16), jax.tree.map(lambda x: x.reshape((-1, *x.shape[2:])), pool)
    latents = latents_of(cfg, vae_params["encoder"], draw, flat)
    latents = latents.reshape((-1, 2, *latents.shape[1:]))

    def decoded(z: jax.Array, key) -> jax.Array:
        """Pictures of latents with noise of deviation 0 to 1/2."""
        k1, k2 = jax.random.split(key)
        strength = 0.5 * jax.random.uniform(k1, (z.shape[0], 1, 1, 1))
        return vae.decode(decoder, vae_params["decoder"], z + strength * jax.random.normal(k2, z.shape))

    def loss(params, batch, key):
        both = jax.tree.map(lambda x: x.reshape((-1, *x.shape[2:])), batch)
        half = both["latents"].shape[0] // 2
        pictures = [decoded(both["latents"][:half], key), draw(jax.tree.map(lambda x: x[half:], both))]
        pixels = preprocess.standardise(jnp.concatenate(pictures), preprocess.OPENAI_MEAN, preprocess.OPENAI_STD)
        found: Any = tower.apply({"params": params}, pixels, both["tokens"])
        image, words = found
        same = jnp.all(both["tokens"][:, None] == both["tokens"][None], axis=-1) & ~jnp.eye(len(pixels), dtype=bool)
        scale = jnp.exp(jnp.minimum(params["logit_scale"], np.log(100.0)))
        logits = jnp.where(same, -1e9, scale * image @ words.T)
        rows, cols = (jnp.diag(jax.nn.log_softmax(logits, axis=a)) for a in (0, 1))
        return -jnp.mean(rows + cols) / 2

    return fit(loss, params, pool | {"latents": latents}, how)


# --- their files ----------------------------------------------------------------------------------------------------


def save_vae(folders: Folders, params, settings: dict[str, Any]) -> None:
    write_json(folders.pipeline / "vae/config.json", settings)
    weights.save(params, vae.VAE_KEYS, folders.done["vae"], dtype=BF16)


def save_flow(folders: Folders, flow) -> None:
    pipeline = folders.pipeline
    weights.save(flow["base"], flux.KEYS, pipeline / "transformer/diffusion_pytorch_model.safetensors", dtype=BF16)
    weights.save(flow["text"]["clip"], text.CLIP_TEXT_KEYS, pipeline / "text_encoder/model.safetensors", dtype=BF16)
    weights.save(flow["text"]["t5"], text.T5_KEYS, folders.done["flow"], dtype=BF16)


def save_clip(folders: Folders, params) -> None:
    weights.save(params, clip_tower.HF_KEYS, folders.done["clip"], dtype=BF16)
