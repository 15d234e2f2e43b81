"""Which precision products ask for: float32 means float32, also on cards that would take TF32 for it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solrl_jax import config, iteration, learn, lora, plan
from solrl_jax.config import Lora, Stage
from solrl_jax.models import convolutions, layers
from solrl_jax.plan import jaxpr, shapes
from tests import card, nano
from tests.tiers import long, slow

EXACT = {"model.dtype": "float32", "model.vae_dtype": "float32", "explore.precision": "bf16"}
EXACT |= {"reward_dtype": "float32_exact"}
HALF = {"explore.precision": "bf16", "reward_dtype": "bfloat16"}
STAGES = ("encode", "quantise", "regenerate", "learn")
HIGHEST = {"float32 highest"}
MODELS = [("flux", "clipscore,imagereward"), ("sd35", "pickscore"), ("sana", "hpsv2")]


def asked(name: str, folder, words: dict[str, str]) -> dict[str, dict[str, int]]:
    """{stage: FLOPs by what their products ask for} of a config on its public sizes, traced as it runs."""
    cfg = shapes.with_configs(config.load(f"{name}:sol_rl", {"prompts": "1", **words}), folder)
    found, h100 = shapes.read(cfg, 1), plan.CARDS["H100 80GB"]
    return {stage: dict(plan.use_of(stage, cfg, found, 1, h100).flops) for stage in STAGES}


@pytest.mark.parametrize(("name", "reward"), [slow(*MODELS[0]), *(long(*model) for model in MODELS[1:])])
def test_float32_is_float32(name, reward, tmp_path):
    """Encoders, merges, networks, decoders, rewards, the LoRA's gradient: no product may be TF32."""
    found = asked(name, tmp_path, EXACT | {"reward": reward})
    assert {stage: set(kinds) for stage, kinds in found.items()} == {stage: HIGHEST for stage in STAGES}
    assert found["learn"]["float32 highest"] > 1e14 and found["quantise"]["float32 highest"] > 1e10


@pytest.mark.long
@pytest.mark.skipif(not jaxpr.as_on_gpus(), reason="traced as for a CPU, where bf16 products give float32")
@pytest.mark.parametrize(("name", "reward"), MODELS)
def test_bfloat16_asks_for_nothing(name, reward, tmp_path):
    """But for the merge of the LoRA, which is float32 always, and the sums of SANA's linear attention: TF32."""
    found = asked(name, tmp_path, HALF | {"reward": reward})
    kinds = {"bfloat16", "float32"} if name == "sana" else {"bfloat16"}
    assert set(found["encode"]) == {"bfloat16"} and set(found["learn"]) == kinds
    assert set(found["quantise"]) == HIGHEST and set(found["regenerate"]) == kinds | HIGHEST
    assert found["regenerate"]["float32 highest"] < 1e-3 * found["regenerate"]["bfloat16"]  # a reward's text and resize


@pytest.mark.slow
def test_float32_rewards_are_products_of_bfloat16_pairs(tmp_path):
    """Only theirs: of CLIPScore's blocks, three times; without a CUDA plugin too, when no GPU can be described."""
    found = asked("flux", tmp_path, EXACT | {"reward": "clipscore", "reward_dtype": "float32"})
    exact = asked("flux", tmp_path, EXACT | {"reward": "clipscore"})
    assert all(found[stage] == exact[stage] for stage in ("encode", "quantise", "learn"))
    assert found["regenerate"]["bfloat16"] == 3 * 24 * 24 * 257 * 24 * 1024**2


def products(program: jax.stages.Compiled) -> list[tuple[str, bool]]:
    """(dtype of the result, whether it asks for the highest precision) of a compiled program's products."""
    found = re.finditer(r"= \(?(\w+)\[.*(?:__cublas|__cudnn\$conv| dot\(| convolution\().*", program.as_text() or "")
    both = r'"operand_precision":\["HIGHEST","HIGHEST"\]|operand_precision=\{highest,highest'
    return [(line[1], bool(re.search(both, line[0]))) for line in found]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_compiled_for_an_h100(dtype):
    """A network's gradient by its LoRA, through a scan that is made anew, a convolution and both attentions."""
    on, cfg = card.mesh(), Lora(rank=4)

    def network(variables, x):
        first = convolutions.conv(32, (3, 3), dtype=dtype, padding="SAME")
        y = jnp.asarray(first.apply({"params": variables["conv"]}, x))
        step = jax.checkpoint(lambda y, v: (layers.Linear(32, dtype=dtype).apply(v, y), None))
        y, _ = jax.lax.scan(step, y, variables["linear"])
        heads = [y.reshape(len(y), -1, 2, 16)] * 3
        return jnp.sum((layers.attention(*heads) + layers.linear_attention(*heads)).astype(jnp.float32) ** 2)

    base = {"blocks": {"kernel": jnp.ones((3, 32, 32), dtype), "bias": jnp.ones((3, 32), dtype)}}
    first = {"kernel": jnp.ones((3, 3, 8, 32), dtype), "bias": jnp.ones(32, dtype)}

    def loss(adapter, base, first, x):
        kernels = lora.graft(base, lora.merged_kernels(base, adapter, cfg))
        policy = lora.policy(base, adapter, cfg)
        linear = {"params": policy["params"]["blocks"], "lora": policy["lora"]["blocks"]}
        drawn = {"conv": first, "linear": {"params": kernels["blocks"]}}
        return network({"conv": first, "linear": linear}, x) + network(jax.lax.stop_gradient(drawn), x)

    adapter = lora.init(jax.random.key(0), base, ("blocks",), cfg)
    x = jnp.ones((2, 8, 8, 8), dtype)
    made = products(card.compiled(jax.value_and_grad(loss), adapter, base, first, x, on=on))
    exact = {kind: {highest for found, highest in made if found == kind} for kind, _ in made}
    if dtype == jnp.float32:
        assert exact == {"f32": {True}} and len(made) > 12
    else:
        assert exact == {"bf16": {False}, "f32": {True, False}}  # the merge; the sums of the linear attention
        assert made.count(("f32", True)) == 1


@pytest.mark.long
def test_a_whole_iteration_in_float32_compiled_for_an_h100(tmp_path):
    cfg = nano.build(tmp_path, explore=Stage(steps=2, precision="bf16", chunk=4), reward_dtype="float32_exact")
    found = shapes.read(cfg, 1)
    statics = {"model": found.model, "score": found.score, "optimizer": learn.make_optimizer(cfg), "cfg": cfg}
    step, prompts = functools.partial(iteration.iteration_step, **statics), shapes.batch(found.prompts, cfg.prompts)
    program = card.compiled(step, shapes.blank(cfg, found), found.frozen, on=card.mesh(), split=(prompts,))
    made = products(program)
    assert len(made) > 200 and all(highest for _, highest in made)


def test_errors_on_the_device_that_is_here():
    """On a card (JAX_PLATFORMS=cuda) TF32 would be 3e-4 off, here as there float32 is 100 times as near."""
    x, w = (jax.random.normal(jax.random.key(i), (256, 256)) for i in range(2))
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)

    def error(y) -> float:
        return float(np.linalg.norm(np.asarray(y, np.float64).reshape(exact.shape) - exact) / np.linalg.norm(exact))

    linear = layers.Linear(256, use_bias=False, dtype=jnp.float32)
    assert error(jax.jit(linear.apply)({"params": {"kernel": w}}, x)) < 3e-6
    patches = convolutions.conv(256, (2, 2), strides=2, padding="VALID", use_bias=False, dtype=jnp.float32)
    picture = x.reshape(1, 16, 16, 2, 2, 64).transpose(0, 1, 3, 2, 4, 5).reshape(1, 32, 32, 64)
    assert error(jax.jit(patches.apply)({"params": {"kernel": w.reshape(2, 2, 64, 256)}}, picture)) < 3e-6
    merge = jax.jit(functools.partial(lora.merged_kernels, cfg=Lora(rank=256, alpha=256.0)))
    assert error(merge({"to_q": {"kernel": 0 * w}}, {"to_q": {"a": x, "b": w}})["to_q/kernel"]) < 3e-6
