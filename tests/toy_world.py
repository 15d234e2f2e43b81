"""The toy world: a linear "network" on 4x4 latents, brightness as the reward. conftest.py has its fixture, `toy`."""

import dataclasses
import os
import signal
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np

from solrl_jax import config, iteration, rewards
from solrl_jax.run import assemble, data, log
from solrl_jax.structs import Model, QuantRule, QuantRules, Reward
from solrl_jax.weights import Rule, Source

WIDTH = 16


def tokenize(prompts):
    return np.array([[ord(c) for c in f"{p:12.12}"] for p in prompts], np.int32)


def velocity(variables, x, sigma, cond):
    flat = x.reshape((x.shape[0], WIDTH))
    v = flat @ variables["params"]["to_q"]["kernel"] + 0.1 * cond["text"]
    if "lora" in variables:
        v = v + flat @ variables["lora"]["to_q"]["a"] @ variables["lora"]["to_q"]["b"]
    return v.reshape(x.shape)


TOY = Model(
    name="toy",
    tokenize=tokenize,
    encode=lambda params, ids: {"text": params["embed"][ids % 8].mean(1)},
    noise=lambda key: jax.random.normal(key, (4, 4, 1)),
    sigmas=lambda steps: np.linspace(1, 0, steps + 1),
    shift=lambda steps: 1.0,
    velocity=velocity,
    largest=lambda *_: {},
    decode=lambda params, x: jnp.broadcast_to(jax.nn.sigmoid(x), (*x.shape[:3], 3)),
    init=lambda key: {"to_q": {"kernel": jax.random.normal(key, (WIDTH, WIDTH))}},
    lora_targets=("to_q",),
    quant_rules=QuantRules(QuantRule((), 0), QuantRule((), 0)),
    keys=(Rule(r"(.+)/kernel", r"\1.weight", "linear"),),
)


def load(cfg, place, place_vae):
    rng = np.random.default_rng(0)
    kernel = rng.normal(0, 0.2, (WIDTH, WIDTH)).astype(np.float32)
    base = {"to_q": {"kernel": place("to_q/kernel", Source(kernel.shape, kernel.dtype, kernel.__getitem__))}}
    return base, {}, {"embed": rng.normal(0, 1, (8, WIDTH)).astype(np.float32)}


def reward_module(name, score):
    return types.SimpleNamespace(
        make=lambda path=None, dtype=None: (Reward(name, tokenize, score), {"scale": np.float32(1)})
    )


def bright(params, images, tokens):
    return images.mean((1, 2, 3)) * params["scale"]


def broken(params, images, tokens):
    return jnp.log(-images.mean((1, 2, 3)))


def plain(params, images, tokens):
    return jnp.full(images.shape[0], 0.25)


def dark(params, images, tokens):
    return 1 - images.min((1, 2, 3))


def traced_once(stages=iteration.stages):
    """iteration.stages that gives runs the same functions, so that these are traced once, if they differ in nothing
    that a stage reads. The optimiser is of cfg.learn alone."""
    made, unread = {}, {"name": "", "prompt_files": "", "iterations": 1, "save_every": 0, "keep": 1}

    def shared(model, score, optimizer, cfg):
        which = model, score, dataclasses.replace(cfg, **unread)
        if which not in made:
            made[which] = stages(model, score, optimizer, cfg)
        return made[which]

    return shared


def world(monkeypatch, folder):
    """The toy config, with its rewards, and its prompts in `folder`."""
    monkeypatch.setattr(rewards, "REWARDS", ("bright", "dark", "broken", "plain"))
    for score in (bright, dark, broken, plain):
        monkeypatch.setitem(sys.modules, f"solrl_jax.rewards.{score.__name__}", reward_module(score.__name__, score))
    return unrewarded(monkeypatch, folder)


def unrewarded(monkeypatch, folder):
    """The toy config with the package's own rewards, among which its reward is not."""
    monkeypatch.setattr(assemble, "model_module", lambda cfg: types.SimpleNamespace(make=lambda c: TOY, load=load))
    (folder / "prompts.txt").write_text("".join(f"prompt {i}\n" for i in range(7)))
    return config.Config(
        name="toy",
        model=config.Model(name="toy"),
        prompt_files=str(folder / "prompts.txt"),
        reward="bright",
        prompts=4,
        candidates=4,
        kept=2,
        explore=config.Stage(steps=2, solver="euler", precision="bf16", chunk=4),
        regenerate=config.Stage(steps=4, chunk=2),
        lora=config.Lora(rank=2, alpha=4.0),
        learn=config.Learn(micro_batch=2, learning_rate=0.03),
        evaluate=config.Evaluate(every=2, prompts=3, images=2, grid=2, steps=3, rewards="dark", chunk=4),
        iterations=5,
        watch=config.Watch(every=0),
        save_every=2,
    )


def metrics_of(run):
    """{iteration: metrics without times}."""
    lines = log.read(run / "metrics.jsonl")
    return {line["iteration"]: {k: v for k, v in line.items() if not k.startswith("time/")} for line in lines}


def interrupt_at(monkeypatch, step, kind=signal.SIGINT):
    """A signal while the prompts of `step` are drawn."""
    batch = data.batch

    def interrupted(prompts, seed, number, count):
        if number == step and count == 4:
            os.kill(os.getpid(), kind)
        return batch(prompts, seed, number, count)

    monkeypatch.setattr(data, "batch", interrupted)


def as_branch(cfg):
    """The toy config's preview of 4 steps, of which the kept go on from the second."""
    explore = dataclasses.replace(cfg.explore, steps=4)
    regenerate = dataclasses.replace(cfg.regenerate, solver="euler")
    return dataclasses.replace(cfg, explore=explore, regenerate=regenerate, branch=config.Branch(2, 2))
