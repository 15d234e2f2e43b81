"""Fields of a config on an experiment's command line: --set=FIELD=VALUE, and again for more fields.

python -m experiments.efficiency.run --set=model.remat_keeps=attention,mlp --set=explore.chunk=12
"""

import argparse
from collections.abc import Mapping


def add_argument(parser: argparse.ArgumentParser, what: str = "config fields: reward=pickscore") -> None:
    """--set, a list of (field, value); `what` is for its help."""
    parser.add_argument(
        "--set", type=_field, action="append", default=[], metavar="FIELD=VALUE", help=f"{what}; again for more fields"
    )


def _field(word: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{word!r}: use FIELD=VALUE")
    return name, value


def arguments(fields: Mapping[str, str]) -> list[str]:
    """The fields as arguments of another experiment."""
    return [f"--set={name}={value}" for name, value in fields.items()]
