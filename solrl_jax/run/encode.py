"""What prompts become before the step: text encoders run outside it, and may leave the devices."""

import operator
from collections.abc import Iterable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from solrl_jax import sharding
from solrl_jax.structs import Model, Params, PyTree

MOST = 4096
"""Prompts kept in host memory, unless a call names more; one of FLUX.1-dev at 128 tokens takes 1 MiB."""


class Conditioner:
    """prompts -> conditioning, leaves [P, ...] split over the devices of `mesh`.

    What is encoded is kept in host memory and not encoded again, until MOST other prompts (or as many as one call
    named, if that is more) were asked for since. With `stay` the text encoders are on the devices for good; else they
    are brought there (FLUX's T5 is 9.5 GB) when a prompt is new, and leave when it is encoded: so name the prompts that
    come next as `ahead`. A call of the encoders always has `group` prompts, a multiple of the devices, so that a
    prompt's numbers do not depend on the others of its batch.
    """

    def __init__(self, model: Model, params: Params, mesh: Mesh, *, group: int, stay: bool):
        self.model, self.mesh, self.group, self.stay = model, mesh, group + -group % mesh.size, stay
        self.params = sharding.replicate(params, mesh) if stay else params
        self.encode = jax.jit(model.encode)
        self.kept: dict[str, PyTree] = {}  # those asked for last are last
        self.most = MOST

    def __call__(self, prompts: Sequence[str], ahead: Sequence[str] = ()) -> PyTree:
        """P is a multiple of the devices; `ahead` is encoded too where a prompt of `prompts` is new."""
        if any(prompt not in self.kept for prompt in prompts):
            self._encode([p for p in dict.fromkeys((*prompts, *ahead)) if p not in self.kept])
        found = [self.kept[prompt] for prompt in prompts]
        self._forget(dict.fromkeys((*prompts, *reversed(ahead))))
        return sharding.split(jax.tree.map(lambda *rows: np.stack(rows), *found), self.mesh)

    def _forget(self, named: Iterable[str]) -> None:
        """Drop the prompts that were asked for longest ago; never those just named, the nearest to come last."""
        named = [prompt for prompt in named if prompt in self.kept]
        self.most = max(self.most, len(named))
        self.kept |= {prompt: self.kept.pop(prompt) for prompt in named}
        for old in list(self.kept)[: max(0, len(self.kept) - self.most)]:
            del self.kept[old]

    def _encode(self, prompts: list[str]) -> None:
        params = self.params if self.stay else sharding.replicate(self.params, self.mesh)
        for i in range(0, len(prompts), self.group):
            some = prompts[i : i + self.group]
            tokens = self.model.tokenize([*some, *[some[-1]] * (self.group - len(some))])
            rows = jax.device_get(self.encode(params, sharding.split(tokens, self.mesh)))
            self.kept |= {prompt: jax.tree.map(operator.itemgetter(j), rows) for j, prompt in enumerate(some)}
        if not self.stay:
            jax.tree.map(lambda x: x.delete(), params)
