"""The flow-matching schedule of a pipeline, from its scheduler_config.json; the sigmas are diffusers'."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from solrl_jax import sampler, weights
from solrl_jax.weights.options import Options

NAME = "scheduler_config.json"


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The fields of scheduler_config.json that determine the sigmas; the defaults are diffusers'."""

    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096

    options: ClassVar[Options] = Options(
        "diffusers",
        only={
            "_class_name": ("FlowMatchEulerDiscreteScheduler",),
            "num_train_timesteps": (1000,),
            "time_shift_type": ("exponential", None),
            "shift_terminal": (None,),
            **dict.fromkeys(("invert_sigmas", "stochastic_sampling"), (False, None)),
            **dict.fromkeys((f"use_{kind}_sigmas" for kind in ("karras", "exponential", "beta")), (False, None)),
        },
    )

    def __post_init__(self):
        if not 0 < self.shift < np.inf:
            raise ValueError(f"shift {self.shift} is not a number above 0")
        if self.max_image_seq_len == self.base_image_seq_len:
            raise ValueError(f"base_image_seq_len and max_image_seq_len are both {self.max_image_seq_len}")

    @classmethod
    def read(cls, folder: str | Path) -> "Schedule":
        """From scheduler_config.json; a scheduler or options that would give other sigmas are refused."""
        return weights.from_config(cls, folder, weights.read_json(Path(folder) / NAME), NAME)


@dataclasses.dataclass(frozen=True)
class SanaSchedule:
    """The field of scheduler_config.json that determines the sigmas. The solver is the user's choice."""

    flow_shift: float = 1.0

    options: ClassVar[Options] = Options(
        "diffusers",
        only={
            "_class_name": ("DPMSolverMultistepScheduler",),
            "prediction_type": ("flow_prediction",),
            "use_flow_sigmas": (True,),
            "num_train_timesteps": (1000,),
            "final_sigmas_type": ("zero",),
            "thresholding": (False,),
            **dict.fromkeys(("use_dynamic_shifting", "use_lu_lambdas"), (False, None)),
            **dict.fromkeys((f"use_{kind}_sigmas" for kind in ("karras", "exponential", "beta")), (False, None)),
        },
        idle=(
            *("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr", "variance_type"),
            *("dynamic_thresholding_ratio", "sample_max_value", "lambda_min_clipped", "timestep_spacing"),
            *("steps_offset", "time_shift_type", "algorithm_type", "solver_order", "solver_type", "lower_order_final"),
            "euler_at_final",
        ),
    )

    def __post_init__(self):
        if not 0 < self.flow_shift < np.inf:
            raise ValueError(f"flow_shift {self.flow_shift} is not a number above 0: download it again")

    @classmethod
    def read(cls, folder: str | Path) -> "SanaSchedule":
        """From scheduler_config.json. Missing fields get diffusers' defaults, two of which are refused."""
        defaults = {"prediction_type": "epsilon", "use_flow_sigmas": False}
        return weights.from_config(cls, folder, defaults | weights.read_json(Path(folder) / NAME), NAME)


def empirical_mu(tokens: int, steps: int) -> float:
    """FLUX.2's log of the shift: lines in the image's tokens, fitted at 10 and at 200 steps, and a line in the steps
    between them. Beyond 4300 tokens that of 200 steps. As compute_empirical_mu of diffusers' Flux2KleinPipeline."""
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    return at_200 + (at_200 - at_10) / 190 * (steps - 200)


def shifted(sigma: np.ndarray | float, shift: float) -> np.ndarray | float:
    """shift s / (1 + (shift - 1) s) for s in (0, 1]; 1 stays exactly 1."""
    return shift / (shift + (1 / sigma - 1))


class Grid(NamedTuple):
    """A model's `sigmas` and `shift` (structs.Model), functions of the number of steps."""

    sigmas: Callable[[int], np.ndarray]
    shift: Callable[[int], float]


def chosen(asked: float, own: Grid) -> Grid:
    """Equal steps with the shift that is `asked` for if it is not 0, else the model's `own` grid."""
    return Grid(lambda steps: sampler.shifted(steps, asked), lambda steps: asked) if asked else own
