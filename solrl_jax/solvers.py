"""What each solver of sampler.py takes, without JAX: config.py checks stages by it, so that --help stays instant."""

import math
from typing import NamedTuple


class Limits(NamedTuple):
    """`noise`: the most eta that a solver takes, 0 of one that solves the ODE. `gaussian`: its steps with eta > 0 are
    Gaussians given the state that they begin with, so they have a probability."""

    noise: float = 0.0
    gaussian: bool = False


SOLVERS = {
    "euler": Limits(),
    "dpm1": Limits(),
    "dpm2": Limits(),
    "ddim": Limits(1.0, gaussian=True),
    "sde": Limits(math.inf, gaussian=True),
    "dance": Limits(math.inf, gaussian=True),
    "cps": Limits(1.0, gaussian=True),
    "sa_solver": Limits(math.inf),
}
GAUSSIAN = tuple(name for name, limits in SOLVERS.items() if limits.gaussian)
