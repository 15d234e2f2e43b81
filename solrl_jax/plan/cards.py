"""GPUs and the links between them, and the shares of their makers' figures that the plan assumes."""

from collections import Counter
from typing import NamedTuple

import jax

from solrl_jax.config import ConfigError


class Card(NamedTuple):
    """GiB that CUDA tells of its memory, peak in TFLOP/s (dense bf16), compute capability."""

    memory: float | int
    peak: float | int
    capability: float


CARDS = {
    "H100 80GB": Card(79.1, 989, 9.0),
    "H200 141GB": Card(139.8, 989, 9.0),
    "A100 80GB": Card(79.2, 312, 8.0),
    "A100 40GB": Card(39.4, 312, 8.0),
    "L40S 48GB": Card(44.4, 362, 8.9),
    "RTX 6000 Ada 48GB": Card(44.4, 364, 8.9),
    "RTX 4090 24GB": Card(23.5, 165, 8.9),
    "B200 180GB": Card(178.3, 2250, 10.0),
}
"""CUDA tells less than a card's name: some is its own, and error correction takes a sixteenth of GDDR6. The H200's is
measured here, the others are what people's out-of-memory messages say, the least where they differ."""
CAUTION = 0.3  # share of the planned activations by which they may be too high
SLACK = 0.1  # share of them by which they may be too low: of FLUX's 59.9 GB an H100 took 62 at first, 58.5 later
USABLE = 0.92  # share of a card's memory that JAX reserves (XLA_PYTHON_CLIENT_MEM_FRACTION)
FRACTION = 0.6  # assumed share of its peak that a card reaches
EMULATED = 0.8  # factor on that for NVFP4 emulated in bf16
RATES = {
    "float32": 0.5,
    "float32 highest": 1 / 16,
    "float8_e4m3fn": 2.0,
    "float4_e2m1fn": 4.0,
}  # peaks relative to bf16's; f32 without HIGHEST runs as TF32


class Link(NamedTuple):
    """What a device receives in GB/s at most, and the share of it that a gather is assumed to reach."""

    rate: float | int
    share: float


LINKS = {
    "NVLink": Link(450, 0.8),  # an H100's and a B200's share of 900 both ways; an A100 has 2/3 of it
    "PCIe 5 x16": Link(64, 0.8),
    "PCIe 4 x16": Link(32, 0.8),
    "400 Gb/s a GPU": Link(50, 0.9),
}
"""Assumptions, not measurements: each device has the link to itself, and all receive at the same time."""


def card_of(name: str) -> Card:
    """ConfigError for an unknown card."""
    if name not in CARDS:
        raise ConfigError(f"--card={name}: use one of {', '.join(CARDS)}")
    return CARDS[name]


def room(card: Card) -> float:
    """Bytes of a card that a run can use."""
    return USABLE * card.memory * 2**30


def card_with(room: float | int) -> Card:
    """A card of which a run can use so many bytes; only its memory means something."""
    return Card(room / USABLE / 2**30, 1, 0.0)


def seconds(flops: Counter[str], card: Card, devices: int = 1) -> float:
    """Time of these FLOPs at FRACTION of the peak of `devices` cards."""
    return sum(n / RATES.get(dtype, 1.0) for dtype, n in flops.items()) / (FRACTION * card.peak * 1e12 * devices)


def transfer(received: int, link: Link) -> float:
    """Seconds in which a device receives so many bytes."""
    return received / (link.rate * link.share * 1e9)


def memory_limit() -> float | int | None:
    """Bytes that JAX may take on each device; None if the device does not say (a CPU)."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def device_card() -> Card | None:
    """The first device as a card, with the memory that JAX can reserve on it and the peak of the card of that name.

    None on a CPU, and for a GPU that is not in CARDS.
    """
    kind, most = jax.local_devices()[0].device_kind, memory_limit()
    known = [card for name, card in CARDS.items() if name.rpartition(" ")[0] in kind]
    return known[0]._replace(memory=most / USABLE / 2**30) if known and most else None
