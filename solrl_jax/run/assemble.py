"""Build everything that a run needs from its config: model, weights, rewards, prompts, mesh. Errors are found here.

Cheap checks come first, so that a typo is reported before gigabytes are read. Nothing is written.
"""

import dataclasses
import importlib
import json
import types
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from solrl_jax import device, guidance, learn, processes, quant, rewards, rollout, sharding
from solrl_jax.config import Config, ConfigError, Stage
from solrl_jax.models import MODELS
from solrl_jax.quant import coverage
from solrl_jax.rewards import Score, bound
from solrl_jax.rewards.bound import Bound
from solrl_jax.run import base_loras, checkpoint, convert, data
from solrl_jax.run.base_loras import BaseLoras
from solrl_jax.run.encode import Conditioner
from solrl_jax.structs import Frozen, Model, Params, Prompts, TrainState, leaves_by_path
from solrl_jax.weights import Source, lora_files

INFERENCE = ("model.name", "lora.")
"""Prefixes of the config fields that must equal a checkpoint's to draw with it; other fields may differ."""


class Parts(NamedTuple):
    """Everything that no update changes. `judged` holds the trained rewards, then the held-out ones."""

    cfg: Config
    mesh: Mesh
    model: Model
    text: Conditioner  # prompts -> conditioning
    optimizer: optax.GradientTransformation
    score: Score
    judged: Score
    frozen: Frozen  # with the trained rewards' towers
    towers: dict[str, Params]  # the held-out rewards' towers
    prompts: data.PromptSet
    base_loras: BaseLoras | None = None
    bound: Bound = Bound()  # which rewards a prompt asks for


def resolved(cfg: Config, capability: float | None) -> Config:
    """The config with "auto" precisions chosen for a device of that compute capability (`quant.resolve`).

    Raises ConfigError if the device does not support a precision.
    """

    def stage(name: str) -> Stage:
        s = getattr(cfg, name)
        try:
            return dataclasses.replace(s, precision=quant.resolve(s.precision, capability))
        except quant.Unsupported as e:
            raise ConfigError(f"{name}.{e}") from None

    return dataclasses.replace(cfg, **{name: stage(name) for name, _, _ in cfg.stages()})


def told_of_auto(asked: Config, found: Config) -> list[str]:
    """A line for each precision "auto" of `asked`, by what `resolved` made of it."""
    pairs = zip(asked.stages(), found.stages(), strict=True)
    auto = [(name, there.precision) for (name, stage, _), (_, there, _) in pairs if stage.precision == "auto"]
    return [f"{name}.precision=auto comes to {precision} on this device" for name, precision in auto]


def capability() -> float | None:
    """CUDA's compute capability of the first device; 0 for a TPU, None for a CPU."""
    first = jax.devices()[0]
    if first.platform == "gpu":
        return float(first.compute_capability)
    return 0.0 if first.platform == "tpu" else None


def assemble(cfg: Config, devices: int | None = None, settled: Config | None = None) -> Parts:
    """Read what training with `cfg` needs and place it on the first `devices` devices (all by default).

    `settled` is what `plan.settled` makes of `cfg`; several processes must give it. Raises ConfigError, DataError or
    WeightsError.
    """
    use_compilation_cache()
    cfg = resolved(cfg, capability())
    check_rewards(cfg)
    settled = settled or settled_here(cfg, devices)
    mesh = make_mesh(devices, settled.shard, cfg.prompts)
    check_divides(cfg, mesh.size)
    check_shard(cfg, mesh, cfg.low_precision)
    prompts = open_prompts(cfg, train=cfg.prompts, test=cfg.evaluate.prompts if cfg.evaluate.every else 0)
    check_binding(cfg, prompts)
    model = model_module(cfg).make(settled.model)
    guidance.check(cfg, model)
    guidance.check_training(cfg, model)
    if cfg.low_precision:
        coverage.check(model, cfg.low_precision, cfg.model.min_quantised_flops)
    judges = open_rewards(cfg, prompts, judging=cfg.evaluate.every > 0)
    if not cfg.staged and judges.score.on_host:
        raise ConfigError(f"staged=false, but reward {judges.score.on_host[0].name} runs on the host: set staged=true")
    return _placed(cfg, mesh, model, prompts, judges, guidance.text_of_training(cfg, model))


def for_evaluation(
    cfg: Config, devices: int | None = None, negative: str | None = None, settled: Config | None = None
) -> Parts:
    """As `assemble`, for --mode=eval: checks that only matter for training are left out. `negative` is --negative."""
    use_compilation_cache()
    check_rewards(cfg)
    settled = settled or settled_here(cfg, devices, drawing=True)
    mesh = make_mesh(devices, settled.shard)
    check_shard(cfg, mesh)
    prompts = open_prompts(cfg, test=cfg.evaluate.prompts)
    model = model_module(cfg).make(cfg.model)
    guidance.check(cfg, model, negative)
    judges = open_rewards(cfg, prompts)
    text = (negative or "") if model.guidance == "cfg" else None  # also for the base at its own w (evaluate.at_own)
    return _told(_placed(cfg, mesh, model, prompts, judges, text), negative)


def unscored(cfg: Config) -> Config:
    """`cfg` without rewards."""
    return dataclasses.replace(cfg, reward="", evaluate=dataclasses.replace(cfg.evaluate, rewards=""))


def for_drawing(
    cfg: Config, devices: int | None = None, negative: str | None = None, settled: Config | None = None
) -> Parts:
    """As `assemble`, for --mode=sample: without prompt files and rewards. `negative` is --negative."""
    use_compilation_cache()
    nothing = Judges(Score((), ()), Score((), ()), {})
    settled = settled or settled_here(unscored(cfg), devices, drawing=True)
    mesh = make_mesh(devices, settled.shard)
    check_shard(cfg, mesh)
    model = model_module(cfg).make(cfg.model)
    guidance.check(cfg, model, negative)
    text = guidance.text_of(cfg, model, negative)
    return _told(_placed(cfg, mesh, model, data.PromptSet((), (), 0, 0), nothing, text), negative)


def _told(parts: Parts, negative: str | None) -> Parts:
    """`parts`, after printing what a training's log says in its `notes`, and whether --negative is cut."""
    for name in data.cut((negative,), parts.model.tokenize) if negative else ():
        print(f"--negative is longer than {name or 'the text encoder'} reads and is cut")
    for line in (*base_loras.notes(parts.base_loras, parts.cfg.lora), *network(parts)):
        print(line)
    return parts


class Judges(NamedTuple):
    """`score`: the trained rewards; `judged`: these and the held-out ones; `towers`: the weights of all by name;
    `bound`: which of them a prompt asks for."""

    score: Score
    judged: Score
    towers: dict[str, Params]
    bound: Bound = Bound()


def binding(cfg: Config, prompts: data.PromptSet) -> Bound:
    """Which rewards the prompts ask for. ConfigError if one names a reward that `cfg` does not."""
    held_out = rewards.held_out(cfg.reward, cfg.evaluate.rewards)
    return bound.read(prompts.rows.values(), rewards.parse(cfg.reward), held_out, cfg.reward_unused)


def check_binding(cfg: Config, prompts: data.PromptSet) -> None:
    """ConfigError if the prompts ask for rewards that are not configured, or in a way that cannot be trained on."""
    trained = tuple(rewards.parse(cfg.reward))
    bound.check_training(binding(cfg, prompts), prompts.rows_of(prompts.train), trained, cfg)


def open_rewards(cfg: Config, prompts: data.PromptSet | None = None, judging: bool = True) -> Judges:
    """Load the rewards that `cfg` names; a reward that is both trained on and held out counts as trained on. Those that
    are only held out are left out if nothing is `judging`.

    Raises ConfigError if one of `prompts` asks for a reward that is not configured, or if a reward cannot read one that
    asks for it, or its row; WeightsError if weights cannot be used.
    """
    asked = Bound() if prompts is None else binding(cfg, prompts)
    paths = rewards.parse_paths(cfg.reward_paths)
    score, towers = rewards.load_rewards(cfg.reward, paths, cfg.reward_dtype)
    names = rewards.held_out(cfg.reward, cfg.evaluate.rewards) if judging else ()
    held_out, more = rewards.load_rewards(",".join(names), paths, cfg.reward_dtype)
    judged = Score(score.rewards + held_out.rewards, score.weights + held_out.weights)
    if prompts is not None:  # finds prompts that a reward cannot read before the large weights are read
        texts = (*prompts.train, *prompts.test)
        rows = prompts.rows_of(texts)
        rewards.tokenize(judged, texts, rows, asked.masks(judged.names, rows))
    return Judges(score, judged, {**towers, **more}, asked)


def open_prompts(cfg: Config, *, train: int = 0, test: int = 0) -> data.PromptSet:
    """Read the prompt files. ConfigError if they have fewer than `train` or `test` distinct prompts."""
    if not cfg.prompt_files:
        raise ConfigError(f"prompt_files is empty: give the prompts with --prompts={data.LAYOUT}")
    prompts = data.read(cfg.prompt_files, cfg.evaluate.held_out, cfg.seed)
    wanted = ("prompts", "training", train, prompts.train), ("evaluate.prompts", "test", test, prompts.test)
    short = [
        f"{name}={count}, but {cfg.prompt_files} has {len(found)} distinct {split} prompts: use {len(found)} or fewer"
        for name, split, count, found in wanted
        if count > len(found)
    ]
    if short:
        raise ConfigError("; ".join(short))
    return prompts


def open_weights(cfg: Config, mesh: Mesh) -> convert.Trees:
    """Load a public or converted folder: base and VAE on the devices of `mesh`, text encoders as numpy.

    Of the base, every device gets its part and no more.
    """
    module = model_module(cfg)
    if (folder := converted(cfg)) is not None:
        return convert.restore(folder, module.shapes(cfg.model), mesh)

    def in_parts(path: str, leaf: Source) -> jax.Array:
        return sharding.placed(leaf.shape, leaf.read, mesh, sharding.spec(path, len(leaf.shape)))

    def whole(path: str, leaf: Source) -> jax.Array:
        return sharding.placed(leaf.shape, leaf.read, mesh)

    return module.load(cfg.model, in_parts, whole)


def _placed(
    cfg: Config, mesh: Mesh, model: Model, prompts: data.PromptSet, judges: Judges, negative: str | None
) -> Parts:
    """Read the large weights and build `Parts`. This comes last, after everything that may find an error.

    `negative` is the text that classifier-free guidance leads away from; None if nothing is guided.
    """
    loras = base_loras.read(cfg.model, model)  # a LoRA that does not fit is found before gigabytes are read
    base, vae, text = open_weights(cfg, mesh)
    base = base_loras.fold(base, loras, mesh)
    trained = {name: tower for name, tower in judges.towers.items() if name in judges.score.names}
    held_out = {name: tower for name, tower in judges.towers.items() if name not in trained}
    return Parts(
        cfg=cfg,
        mesh=mesh,
        model=model,
        text=Conditioner(model, text, mesh, group=cfg.prompts, stay=not cfg.encode_ahead, negative=negative),
        optimizer=learn.make_optimizer(cfg),
        score=judges.score,
        judged=judges.judged,
        frozen=Frozen(base, vae, sharding.replicate(trained, mesh)),
        towers=sharding.replicate(held_out, mesh),
        prompts=prompts,
        base_loras=loras,
        bound=judges.bound,
    )


def check_divides(cfg: Config, devices: int) -> None:
    """ConfigError unless the samples of one device divide into chunks and micro-batches."""
    learn.micro_batches(cfg, cfg.prompts * cfg.kept // cfg.learn.updates // devices)
    for _, stage, images in cfg.stages():
        rollout.block_shape(stage.chunk, cfg.prompts // devices, images)


def check_shard(cfg: Config, mesh: Mesh, precision: str | None = None) -> None:
    """ConfigError unless the mesh's K divides each axis along which frozen weights are cut, those of kernels in a low
    `precision` too. Reads the folder's configs."""
    shard = mesh.shape[sharding.FSDP]
    if shard == 1:
        return
    module = model_module(cfg)
    base, _, text = module.shapes(cfg.model)
    cut = sharding.cuts(base) | sharding.cuts(text)
    if precision:  # a kernel is quantised in parts by output
        rule = quant.rule_of(module.make(cfg.model).quant_rules, precision)
        cut |= {f"{path}, quantised": s[2] for path, s in quant.chosen(base, rule).items() if len(s) == 3}
    for path, length in cut.items():
        if length % shard:
            fits = sharding.shards_that_fit(cut.values(), mesh.size)
            raise ConfigError(f"shard={shard} does not divide an axis of {path} ({length}): use one of {fits}")


def converted(cfg: Config) -> Path | None:
    """model.path if it is a converted folder, else None. ConfigError if model.weights names other weights."""
    folder = Path(cfg.model.path)
    if not convert.is_converted(folder):
        return None
    if cfg.model.weights:
        raise ConfigError(f"model.weights={cfg.model.weights}, but {folder} holds converted weights: leave it empty")
    return folder


def reward_names(cfg: Config) -> tuple[str, ...]:
    """Names of the trained and of the held-out rewards. Reads no weights.

    ConfigError if one does not exist, or if reward_unused or reward_paths cannot be as they are.
    """
    rewards.parse_paths(cfg.reward_paths)
    rewards.check_unused(cfg)
    return (*rewards.parse(cfg.reward), *rewards.parse(cfg.evaluate.rewards))


def check_rewards(cfg: Config) -> None:
    """ConfigError if a reward does not exist or none is trained on. Reads no weights."""
    reward_names(cfg)
    if not rewards.parse(cfg.reward):
        raise ConfigError(f"reward is empty: name what to train on, of {', '.join(rewards.REWARDS)}")


def make_mesh(devices: int | None, shard: int = 1, prompts: int = 0) -> Mesh:
    """The mesh of a run. ConfigError if the prompts or `shard` do not divide over its devices."""
    try:
        mesh = sharding.make_mesh(devices, shard)
        sharding.check_divides(mesh, prompts)
    except ValueError as e:
        raise ConfigError(str(e)) from None
    return mesh


def settled_by_all(cfg: Config, devices: int | None, drawing: bool = False) -> tuple[Config, list[str]]:
    """`plan.settled` by the least memory of all processes, which must choose alike; they wait for each other.

    ConfigError, before any weight is read, if even then the training, or a `drawing` of pictures, does not fit.
    """
    from solrl_jax import plan  # which plans what this module assembles

    stages, host = plan.DRAWING if drawing else (), jax.local_device_count()
    least = json.loads(processes.exchanged(json.dumps(plan.memory_limit()), least_of))
    count = devices or jax.device_count()
    return processes.together(lambda: plan.settled(cfg, count, least, host=host, stages=stages))


def least_of(limits: Sequence[str]) -> str:
    """Of the memory limits of all processes, as JSON, the least."""
    return json.dumps(min((limit for text in limits if (limit := json.loads(text)) is not None), default=None))


def settled_here(cfg: Config, devices: int | None, drawing: bool = False) -> Config:
    """`settled_by_all`, after printing its lines."""
    found, said = settled_by_all(cfg, devices, drawing)
    for line in said:
        print(line)
    return found


def model_module(cfg: Config) -> types.ModuleType:
    """The module models/<name>.py. ConfigError if the name is not in MODELS."""
    if cfg.model.name not in MODELS:
        raise ConfigError(f"model.name={cfg.model.name}: there is no such model; use one of {', '.join(MODELS)}")
    return importlib.import_module(f"solrl_jax.models.{cfg.model.name}")


def use_compilation_cache() -> None:
    """Cache compiled programs in ~/.cache/solrl_jax, unless the user set JAX_COMPILATION_CACHE_DIR."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "solrl_jax"))


def notes(parts: Parts) -> list[str]:
    """The first lines of a run: LoRAs in the base, quantised layers, numbers of prompts, prompts that are cut,
    guidance, weights that the network carries, how a CPU multiplies."""
    p = parts.prompts
    precision = parts.cfg.low_precision
    low = coverage.report(coverage.uses(parts.model, precision), precision) if precision else []
    out = [f"{len(p.train)} training prompts, {len(p.test)} test prompts"]
    if p.blank or p.repeated:
        out[0] += f" ({p.repeated} repeated and {p.blank} blank lines dropped)"
    out += cut(parts, (*p.train, *p.test)) + bound.notes(parts.bound, p.rows_of(p.train), parts.judged.names)
    return (
        base_loras.notes(parts.base_loras, parts.cfg.lora)
        + low
        + out
        + guidance.told(parts.cfg, parts.model)
        + network(parts)
        + device.notes()
    )


def cut(parts: Parts, prompts: Sequence[str]) -> list[str]:
    """A line for each text encoder that does not read some prompts to their ends."""
    return [
        f"{len(texts)} prompts are longer than {name or 'the text encoder'} reads and are cut, e.g. {texts[0]!r}"
        for name, texts in data.cut(prompts, parts.model.tokenize).items()
    ]


def network(parts: Parts) -> list[str]:
    """A warning if the base lies over more devices than a host has; else nothing."""
    shard, here = parts.mesh.shape[sharding.FSDP], jax.local_device_count()
    if shard <= here:
        return []
    in_parts = sharding.cuts(parts.frozen.base)
    size = sum(x.nbytes for path, x in leaves_by_path(parts.frozen.base).items() if path in in_parts)
    price = size * (shard - 1) / shard / 1e9
    return [
        f"shard={shard}, but this host has {here} devices: in each forward pass a device fetches up to {price:.3g} GB "
        f"of the base over the network: use shard={here} or less, or fewer, larger devices"
    ]


def encode(parts: Parts, prompts: Sequence[str], score: Score, ahead: Sequence[str] = ()) -> Prompts:
    """P prompts split over the devices: conditioning, reward tokens and which rewards they ask for; P is a multiple of
    the device count."""
    rows = parts.prompts.rows_of(prompts)
    asked = parts.bound.masks(score.names, rows)
    tokens = rewards.tokenize(score, prompts, rows, asked)
    return Prompts(parts.text(prompts, ahead), *sharding.split((tokens, asked), parts.mesh))


def fresh(parts: Parts) -> TrainState:
    """The state before iteration 1, replicated; call it under the mesh."""
    key = jax.random.key(parts.cfg.seed)
    state = learn.init_state(key, parts.frozen, model=parts.model, optimizer=parts.optimizer, cfg=parts.cfg)
    return sharding.replicate(state, parts.mesh)


def blank(cfg: Config, model: Model, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of a run's state, without weights; a checkpoint is restored with these."""
    optimizer = learn.make_optimizer(cfg)

    def make() -> TrainState:
        key = jax.random.key(cfg.seed)
        return learn.init_state(key, Frozen(model.init(key), {}, {}), model=model, optimizer=optimizer, cfg=cfg)

    whole = NamedSharding(mesh, sharding.WHOLE)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), jax.eval_shape(make))


def check_policy(cfg: Config, place: Path | None, lora_file: Path | None) -> None:
    """Raises, before weights are read, what `adapter` would for a file or checkpoint that is damaged or not of the
    model."""
    if lora_file is None and place is None:
        return
    model = model_module(cfg).make(cfg.model)
    if lora_file is not None:
        base = jax.eval_shape(model.init, jax.random.key(0))
        _of_file(lora_file, base, model, cfg, base_loras.read(cfg.model, model))
    elif place is not None:
        checkpoint.check_fields(place, {"ema": blank(cfg, model, make_mesh(1)).ema}, cfg, INFERENCE)


def adapter(parts: Parts, place: Path | None, lora_file: Path | None) -> Params:
    """The LoRA to draw with: that of `lora_file`, or else the running average in checkpoint `place`, or else zeros.

    For a file, prints how much of the model it adapts.
    """
    like = blank(parts.cfg, parts.model, parts.mesh)
    if place is not None and lora_file is None:
        return checkpoint.restore_fields(place, {"ema": like.ema}, parts.cfg, INFERENCE)["ema"]
    if lora_file is None:
        found = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like.lora)
    else:
        found, said = _of_file(lora_file, parts.frozen.base, parts.model, parts.cfg, parts.base_loras)
        print("\n".join(f"{lora_file}: {line}" for line in said))
    return sharding.replicate(found, parts.mesh)


def _of_file(file: Path, base: Params, model: Model, cfg: Config, loras: BaseLoras | None) -> lora_files.Loaded:
    """`lora_files.load`, after a look that the file holds none of the LoRAs in the base."""
    if loras is not None:
        base_loras.check_held_once(file, loras)
    return lora_files.load(file, base, model.keys, cfg.lora, model.comfy, model.native)
