"""Encoding of prompts. Text encoders run outside the training step and may leave the devices in between."""

import functools
from collections.abc import Iterable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from solrl_jax import processes, sharding
from solrl_jax.structs import Model, Params, PyTree

MOST = 4 * 2**30
"""Bytes of conditionings kept in host memory, unless one call's own prompts need more. A prompt takes 1 MiB in
FLUX.1-dev at 128 tokens, 7.5 MiB in FLUX.2-klein-4B: 4090 prompts and 546."""


class Conditioner:
    """prompts -> conditioning, leaves [P, ...] split over the devices of `mesh`.

    Conditionings are kept in host memory, MOST bytes of them or as many as the largest call's own prompts need; the
    least recently used are dropped. With `stay`, the text encoders remain on the devices. Otherwise they are copied
    there (FLUX's T5 is 9.5 GB) when a prompt is new, and deleted after encoding, so pass the prompts of the next calls
    as `ahead`: those that fit in MOST are encoded too. The encoders always get `group` prompts, a multiple of the
    devices, so that a prompt's numbers do not depend on the other prompts of its batch.

    Of several processes each encodes and keeps the prompts of its own devices.

    The conditioning of `negative`, the text that guidance leads away from, is encoded with the first prompts and never
    dropped; None where there is no such guidance.
    """

    def __init__(
        self, model: Model, params: Params, mesh: Mesh, *, group: int, stay: bool, negative: str | None = None
    ):
        self.model, self.mesh, self.stay = model, mesh, stay
        self.group = len(sharding.rows_here(group + -group % mesh.size, mesh))  # this process's share
        self.constant: tuple[str, ...] = () if negative is None else (negative,)
        self.params = sharding.place(params, mesh) if stay else params
        self.encode = functools.partial(_encoded, model=model)
        self.kept: dict[str, PyTree] = {}  # most recently used last
        self.most, self.each = MOST, 0  # bytes of all, and of one; 0 before the first prompt

    def __call__(self, prompts: Sequence[str], ahead: Sequence[str] = (), batch: int = 0) -> PyTree:
        """P is a multiple of the devices. If a prompt of `prompts` is new, `ahead` is encoded too, if it fits: later
        calls' prompts, `batch` each (0: as many as now)."""
        prompts, ahead = self._mine(prompts, len(prompts)), self._mine(ahead, batch or len(prompts))
        if processes.any_of(any(prompt not in self.kept for prompt in prompts)):
            self._encode(dict.fromkeys((*prompts, *ahead, *self.constant)), {*prompts, *self.constant})
        found = [self.kept[prompt] for prompt in prompts]
        self._forget(dict.fromkeys((*prompts, *reversed(ahead), *self.constant)))
        return sharding.from_here(jax.tree.map(lambda *rows: np.stack(rows), *found), self.mesh)

    def _mine(self, prompts: Sequence[str], batch: int) -> list[str]:
        """Of calls with `batch` prompts each, the prompts of this process's devices."""
        rows = sharding.rows_here(batch, self.mesh)
        return [prompts[i + row] for i in range(0, len(prompts), batch) for row in rows if i + row < len(prompts)]

    def negative(self) -> PyTree:
        """The conditioning of the negative text, leaves [1, ...], whole on every device."""
        (text,) = self.constant
        if text not in self.kept:
            self._encode([text], {text})
        return sharding.replicate(jax.tree.map(lambda row: np.asarray(row)[None], self.kept[text]), self.mesh)

    def _forget(self, named: Iterable[str]) -> None:
        """Mark `named` as most recently used, in this order, and drop the least recently used others."""
        self.kept |= {prompt: self.kept.pop(prompt) for prompt in named if prompt in self.kept}
        for old in list(self.kept)[: max(0, len(self.kept) - self.most // self.each)]:
            del self.kept[old]

    def _encode(self, named: Iterable[str], needed: set[str]) -> None:
        """Encode those of `named` that are not kept: all `needed` ones, and of the others the first that fit."""
        params = self.params if self.stay else sharding.place(self.params, self.mesh)
        named, new = list(named), []
        order = sorted(reversed(named), key=needed.__contains__)  # in which others are dropped, never a needed one
        while processes.any_of(bool(new := self._fitting(named, needed))):
            some = new[: self.group]
            tokens = self.model.tokenize([*some, *[(some or named)[-1]] * (self.group - len(some))])
            with jax.set_mesh(self.mesh):
                rows = sharding.here(self.encode(params, sharding.from_here(tokens, self.mesh)))
            # Copies: a row that is a view would keep the rows of all its call in memory.
            self.kept |= {prompt: jax.tree.map(lambda x, j=j: x[j].copy(), rows) for j, prompt in enumerate(some)}
            self.each = sum(x[0].nbytes for x in jax.tree.leaves(rows))
            self.most = max(self.most, len(needed) * self.each)
            self._forget(order)
        if not self.stay:
            jax.tree.map(lambda x: x.delete(), params)

    def _fitting(self, named: Sequence[str], needed: set[str]) -> list[str]:
        """Those of `named` that are not kept, without those that are not `needed` and are too many for `most` bytes."""
        room = self.most // self.each if self.each else len(named)
        room -= sum(prompt in needed or prompt in self.kept for prompt in named)
        found = []
        for prompt in named:
            if prompt in self.kept:
                continue
            room -= prompt not in needed
            if prompt in needed or room >= 0:
                found.append(prompt)
        return found


def encoded(params: Params, tokens: PyTree, *, model: Model) -> PyTree:
    """Each device encodes its own prompts."""
    specs = sharding.specs_of(params), sharding.SPLIT
    return sharding.over_data(model.encode, specs, sharding.SPLIT)(params, tokens)


_encoded = jax.jit(encoded, static_argnames="model")  # once for all Conditioners of a model
