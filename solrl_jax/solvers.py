"""The limits of sampler.py's solvers. config.py checks stages by them without JAX, so that --help stays instant."""

import math
from typing import NamedTuple


class Limits(NamedTuple):
    """`noise`: the largest eta that a solver takes, 0 for a solver of the ODE. `gaussian`: with eta > 0 a step is a
    Gaussian given the state before it, so it has a probability."""

    noise: float = 0.0
    gaussian: bool = False


LIMITS = {
    "euler": Limits(),
    "dpm1": Limits(),
    "dpm2": Limits(),
    "ddim": Limits(1.0, gaussian=True),
    "sde": Limits(math.inf, gaussian=True),
    "dance": Limits(math.inf, gaussian=True),
    "cps": Limits(1.0, gaussian=True),
    "sa_solver": Limits(math.inf),
}
GAUSSIAN = tuple(name for name, limits in LIMITS.items() if limits.gaussian)
ODE = tuple(name for name, limits in LIMITS.items() if not limits.noise)
"""Without noise at any eta: a branch can continue from their state."""
