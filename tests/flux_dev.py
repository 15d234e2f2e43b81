"""FLUX.1-dev without its gigabytes: a pipeline folder of configs alone."""

from pathlib import Path

from solrl_jax.config import Config, Model
from solrl_jax.models import public
from solrl_jax.weights import hub


def configs(folder: Path) -> Path:
    """Write FLUX.1-dev's public config files into `folder`, and return it."""
    return hub.write_configs(folder, public.FLUX_DEV)


def config(folder: Path, **changes) -> Config:
    """The paper's run on it: 48 prompts x 96 candidates, 24 kept, at 512 px; `changes` replace fields of Config."""
    fields = {"model": Model(path=str(configs(folder))), "reward": "clipscore", "encode_ahead": 20}
    return Config(**{"name": "flux", **fields, **changes})
