"""Which candidates of a prompt are kept: rewards [P, N] -> indices [P, K]."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def select(
    reward: Float[Array, "P N"], kept: int, rule: str, chance: Float[Array, "P N"] | None = None
) -> Int[Array, "P {kept}"]:
    """Indices of the kept candidates, no candidate twice.

    best_worst: the K - K//2 highest and the K//2 lowest, best first; top: the K highest; random: the K of highest
    `chance`, numbers drawn independently; max_variance: the K with the largest variance of rewards, always some of the
    best and some of the worst (arXiv 2504.13818); all: every candidate, in order (K = N). Both ends come from one
    stable sort, so ties never select a candidate twice (the original's rule does).

    Raises ValueError for an unknown rule, or if `kept` is more than the number of candidates.
    """
    prompts, candidates = reward.shape
    if not 1 <= kept <= candidates:
        raise ValueError(f"kept={kept} of {candidates} candidates: keep between 1 and {candidates}")
    if rule == "all":
        return jnp.broadcast_to(jnp.arange(candidates)[None, :kept], (prompts, kept))
    if rule == "random":
        if chance is None:
            raise ValueError("rule random keeps by chance: give random numbers, like the rewards")
        reward = chance
    order = jnp.argsort(-reward, axis=-1, stable=True)
    if rule in ("top", "random"):
        return order[:, :kept]
    if rule == "best_worst":
        worst = kept // 2
        return jnp.concatenate([order[:, : kept - worst], order[:, candidates - worst :]], axis=-1)
    if rule == "max_variance":
        place = jnp.arange(kept)[None]
        best = jnp.arange(kept + 1)[:, None]  # row i keeps the i best and the K - i worst
        place = place + jnp.where(place < best, 0, candidates - kept)
        splits = take(reward, order)[:, place]  # [P, K + 1, K]
        return take(order, place[jnp.argmax(jnp.var(splits, axis=-1), axis=-1)])
    raise ValueError(f"unknown selection rule {rule!r}: use best_worst, top, max_variance, random or all")


def take(x: Array, index: Int[Array, "P K"]) -> Array:
    """x [P, N, ...] -> [P, K, ...] at the kept indices."""
    return jax.vmap(lambda row, i: row[i])(x, index)


def ranks(x: Float[Array, "*batch N"]) -> Float[Array, "*batch N"]:
    """Ranks 0..N-1 along the last axis; ties get their average rank."""
    below = jnp.sum(x[..., None, :] < x[..., :, None], axis=-1, dtype=jnp.float32)
    equal = jnp.sum(x[..., None, :] == x[..., :, None], axis=-1, dtype=jnp.float32)
    return below + (equal - 1) * 0.5


def spearman(a: Float[Array, "P N"], b: Float[Array, "P N"]) -> Float[Array, "P"]:
    """Rank correlation within each prompt; 0 where one side is constant."""
    return correlation(ranks(a), ranks(b))


def correlation(a: Float[Array, "P N"], b: Float[Array, "P N"]) -> Float[Array, "P"]:
    """Pearson's, within each prompt; 0 where one side is constant."""
    a, b = (x - jnp.mean(x, axis=-1, keepdims=True) for x in (a, b))
    norm = jnp.sqrt(jnp.sum(a * a, axis=-1) * jnp.sum(b * b, axis=-1))
    return jnp.where(norm > 0, jnp.sum(a * b, axis=-1) / jnp.where(norm > 0, norm, 1.0), 0.0)


def mean_of_ranked(x: Float[Array, "P"], truth: Float[Array, "P N"]) -> Float[Array, ""]:
    """Mean over the prompts whose rewards `truth` are finite and not all equal: the others have no order. NaN if none
    has one."""
    return jnp.mean(x, where=jnp.max(truth, axis=-1) > jnp.min(truth, axis=-1))


def fidelity(preview: Float[Array, "P N"], truth: Float[Array, "P N"], kept: int) -> dict[str, Float[Array, "P"]]:
    """How well `preview` replaces `truth` when best_worst keeps K of N by it; 1 means as well as `truth` itself.

    spearman: rank correlation. overlap: share of the true best K/2 among those chosen as the best K/2. kept_contrast:
    mean true reward of the chosen best minus that of the chosen worst, divided by the same difference if `truth`
    chooses; 0 if all true rewards are equal.
    """
    best, worst = kept - kept // 2, kept // 2
    chosen, perfect = (select(r, kept, "best_worst") for r in (preview, truth))
    same = chosen[:, :best, None] == perfect[:, None, :best]

    def contrast(index: Int[Array, "P K"]) -> Float[Array, "P"]:
        rewards = take(truth, index)
        low = rewards[:, best:] if worst else rewards
        return jnp.mean(rewards[:, :best], axis=-1) - jnp.mean(low, axis=-1)

    most = contrast(perfect)
    return {
        "spearman": spearman(preview, truth),
        "overlap": jnp.sum(same, axis=(1, 2), dtype=jnp.float32) / best,
        "kept_contrast": jnp.where(most > 0, contrast(chosen) / jnp.where(most > 0, most, 1.0), 0.0),
    }
