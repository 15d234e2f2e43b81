"""What a quantisation rule covers: which Linears, and their shares of weights and FLOPs, from shapes alone."""

from typing import NamedTuple

import flax.linen as nn
import jax

from solrl_jax import quant
from solrl_jax.models.layers import Linear
from solrl_jax.structs import Model, leaves_by_path


class Use(NamedTuple):
    """One Linear of the network (a stack of equal layers is one entry): its work for one image and one forward pass."""

    path: str
    layers: int
    weights: int  # of all layers
    flops: int  # 2 x multiply-adds, of all layers
    stacked: bool  # part of the transformer's blocks
    quantised: bool


def uses(model: Model, precision: str) -> list[Use]:
    """Every Linear of `model` in the order of the forward pass, and whether `precision` quantises it.

    The number of rows is recorded while the shapes are traced.
    """
    rows: dict[str, int] = {}

    def watch(call, args, kwargs, context):
        if isinstance(context.module, Linear):
            rows["/".join(context.module.path)] = args[0].size // args[0].shape[-1]
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        params = jax.eval_shape(lambda key: model.init(key), jax.random.key(0))  # a new function: no cached trace
    chosen = quant.chosen(params, quant.rule_of(model.quant_rules, precision))
    kernels = leaves_by_path(params)
    found = []
    for path, count in rows.items():
        shape = kernels[f"{path}/kernel"].shape
        size = kernels[f"{path}/kernel"].size
        stacked = len(shape) == 3
        found.append(Use(path, shape[0] if stacked else 1, size, 2 * count * size, stacked, f"{path}/kernel" in chosen))
    return found


def share(found: list[Use], what: str, blocks: bool = False) -> float:
    """The quantised share of "weights" or "flops", over all Linears or over those of the blocks."""
    rows = [u for u in found if u.stacked or not blocks]
    return sum(getattr(u, what) for u in rows if u.quantised) / sum(getattr(u, what) for u in rows)


def check(model: Model, precision: str, least: float) -> list[Use]:
    """The Linears, if the precision's rule covers at least `least` of the blocks' FLOPs; ConfigError otherwise."""
    from solrl_jax.config import ConfigError

    found = uses(model, precision)
    covered = share(found, "flops", blocks=True)
    if covered < least:
        raise ConfigError(
            f"the rule of {precision} covers {covered:.1%} of the blocks' FLOPs, model.min_quantised_flops asks for "
            f"{least:.0%}: lower model.min_dim={model.quant_rules.nvfp4.min_dim} or model.min_quantised_flops"
        )
    return found


def report(found: list[Use], precision: str) -> list[str]:
    """Lines for the log: totals, then what stays in full precision."""
    linears, low = sum(u.layers for u in found), sum(u.layers for u in found if u.quantised)
    size, bits = sum(u.weights for u in found if u.quantised), quant.bits(precision)
    kept = ", ".join(u.path.replace("/", ".") for u in found if not u.quantised)
    return [
        f"{precision}: {low} of {linears} Linears, {share(found, 'weights'):.1%} of their weights, "
        f"{share(found, 'flops'):.1%} of their FLOPs ({share(found, 'flops', blocks=True):.1%} in the blocks), "
        f"{size * bits / 8 / 1e6:.2f} MB at {bits:g} bits instead of {size * 2 / 1e6:.2f} MB in bf16",
        f"in full precision: {kept or 'none'}",
    ]
