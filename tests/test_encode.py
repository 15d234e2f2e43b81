"""Prompts are kept when encoded, in calls of one size; the text encoders leave the devices if they are not to stay."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solrl_jax import sharding, structs
from solrl_jax.run import encode
from solrl_jax.run.encode import Conditioner

PROMPTS = [f"prompt {i}" for i in range(10)]


ROW = 4 * 2 + 4
"""Bytes of a prompt's conditioning here: four bf16 numbers and a float32 one."""


class Seen(types.SimpleNamespace):
    """What was asked of the model: each call's prompts, and how often `encode` was traced."""


def made(stay: bool, devices: int = 2, group: int = 3, negative: str | None = None) -> tuple[Seen, Conditioner]:
    """Tokens are the prompt's number; conditioning is table[number] in bf16, and its first entry squared."""
    seen, table = Seen(calls=[], traces=0), np.arange(40, dtype=np.float32).reshape(10, 4) / 8

    def tokenize(prompts):
        seen.calls.append(list(prompts))
        return np.asarray([int(p.split()[1]) for p in prompts], np.int32)

    def encode(params, tokens):
        seen.traces += 1
        row = params["table"][tokens]
        return {"text": row.astype(jnp.bfloat16), "pooled": row[:, :1] ** 2}

    nothing = dict.fromkeys(structs.Model._fields, lambda *_: None) | {
        "name": "numbers",
        "lora_targets": (),
        "keys": (),
    }
    nothing["quant_rules"] = structs.QuantRules(structs.QuantRule((), 0), structs.QuantRule((), 0))
    fields = {k: v for k, v in nothing.items() if k not in structs.Model._field_defaults}
    model = structs.Model(**fields | {"tokenize": tokenize, "encode": encode})
    how = {"group": group, "stay": stay, "negative": negative}
    return seen, Conditioner(model, {"table": table}, sharding.make_mesh(devices), **how)


@pytest.mark.parametrize("stay", [True, False])
def test_each_prompt_once_in_calls_of_one_size(stay):
    seen, conditioner = made(stay)
    first = conditioner(PROMPTS[:4], ahead=PROMPTS[4:6])
    assert [len(call) for call in seen.calls] == [4, 4]  # 3 prompts would not divide over 2 devices
    assert seen.calls == [PROMPTS[:4], [*PROMPTS[4:6], PROMPTS[5], PROMPTS[5]]]
    np.testing.assert_array_equal(np.asarray(first["pooled"])[:, 0], (np.arange(4) * 0.5) ** 2)
    assert first["text"].dtype == jnp.bfloat16 and first["text"].sharding.spec == sharding.SPLIT
    again = conditioner([PROMPTS[5], PROMPTS[0], PROMPTS[5], PROMPTS[1]], ahead=PROMPTS)  # all known: nothing runs
    np.testing.assert_array_equal(np.asarray(again["pooled"])[:, 0], [6.25, 0, 6.25, 0.25])
    assert len(seen.calls) == 2 and seen.traces == 1
    conditioner(PROMPTS[6:8])
    assert len(seen.calls) == 3 and seen.traces == 1  # one compiled program serves all


def test_the_encoders_leave_unless_they_stay():
    held = jax.live_arrays()  # alive, so that no new array has the id of one of them
    before = set(map(id, held))
    _, conditioner = made(stay=False)
    kept = conditioner(PROMPTS[:2])
    own = [x for x in jax.live_arrays() if id(x) not in before]
    assert {x.shape for x in own} == {kept["text"].shape, kept["pooled"].shape}
    _, staying = made(stay=True)
    staying(PROMPTS[:2])
    assert any(x.shape == (10, 4) for x in jax.live_arrays() if id(x) not in before)


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(encode, "MOST", 5 * ROW - 1)  # four prompts
    seen, conditioner = made(stay=True, devices=1, group=2)
    for i in range(0, 10, 2):
        conditioner(PROMPTS[i : i + 2])
    assert list(conditioner.kept) == PROMPTS[6:] and len(seen.calls) == 5
    conditioner(PROMPTS[:2])
    assert len(seen.calls) == 6 and list(conditioner.kept) == [*PROMPTS[8:], *PROMPTS[:2]]
    conditioner(PROMPTS[8:])  # what was used is kept longer than what is newer
    conditioner(PROMPTS[4:6])
    assert len(seen.calls) == 7 and set(conditioner.kept) == {*PROMPTS[8:], *PROMPTS[4:6]}


def test_what_comes_next_is_not_forgotten(monkeypatch):
    """Three iterations of 2 prompts are encoded together, 6 fit: each is encoded once while they are drawn."""
    monkeypatch.setattr(encode, "MOST", 6 * ROW)
    seen, conditioner = made(stay=False, devices=1, group=2)
    drawn = [0, 1, 2, 3, 4, 5, 6, 7, 2, 3, 8, 9]  # 2 and 3 come again while they are kept
    for i in range(0, 12, 2):
        now, ahead = ([PROMPTS[j] for j in drawn[a:b]] for a, b in ((i, i + 2), (i + 2, i + 6)))
        first = conditioner(now, ahead)
        np.testing.assert_array_equal(np.asarray(first["pooled"])[:, 0], (np.asarray(drawn[i : i + 2]) * 0.5) ** 2)
        assert set(now) <= set(conditioner.kept) and len(conditioner.kept) <= 6
    asked = [int(p.split()[1]) for call in seen.calls for p in call]
    assert asked == list(range(10))
    conditioner(PROMPTS[:2])  # as an evaluation does, without naming what comes
    assert len(conditioner.kept) == 6


def bytes_of(conditioner: Conditioner) -> int:
    """Of all memory that the kept conditionings hold: none is a view of a larger array."""
    leaves = jax.tree.leaves(conditioner.kept)
    assert all(isinstance(x, np.ndarray) and x.base is None for x in leaves)
    return sum(x.nbytes for x in leaves)


def test_what_comes_next_is_encoded_as_far_as_it_fits(monkeypatch):
    """Of 8 prompts ahead 3 fit beside the call's own 2 and the negative one; later the rest."""
    monkeypatch.setattr(encode, "MOST", 6 * ROW)
    seen, conditioner = made(stay=False, devices=1, group=1, negative=PROMPTS[9])
    conditioner(PROMPTS[:2], PROMPTS[2:9])
    assert [p for call in seen.calls for p in call] == [*PROMPTS[:5], PROMPTS[9]] and bytes_of(conditioner) == 6 * ROW
    conditioner(PROMPTS[2:4], PROMPTS[4:9])
    assert len(seen.calls) == 6
    conditioner(PROMPTS[4:6], PROMPTS[6:9])
    assert [p for call in seen.calls[6:] for p in call] == PROMPTS[5:9]
    assert set(conditioner.kept) == set(PROMPTS[4:]) and bytes_of(conditioner) == 6 * ROW


def test_old_prompts_make_room_before_new_ones_come(monkeypatch):
    """Four prompts fit and are kept; four others are encoded one after another, and never are there more than five."""
    monkeypatch.setattr(encode, "MOST", 4 * ROW)
    _, conditioner = made(stay=True, devices=1, group=1)
    conditioner(PROMPTS[:4])
    held, tokenize = [], conditioner.model.tokenize
    conditioner.model = conditioner.model._replace(tokenize=lambda p: held.append(bytes_of(conditioner)) or tokenize(p))
    conditioner(PROMPTS[4:6], PROMPTS[6:10])
    assert held == [4 * ROW] * 4 and set(conditioner.kept) == set(PROMPTS[4:8])


def test_a_call_that_is_larger_than_what_fits(monkeypatch):
    """Eight prompts a call, of which two are needed and three fit: the needed ones stay."""
    monkeypatch.setattr(encode, "MOST", 3 * ROW)
    seen, conditioner = made(stay=True, devices=1, group=8)
    found = conditioner(PROMPTS[:2], PROMPTS[2:10])
    assert len(seen.calls) == 1 and set(conditioner.kept) == set(PROMPTS[:3]) and bytes_of(conditioner) == 3 * ROW
    np.testing.assert_array_equal(np.asarray(found["pooled"])[:, 0], [0, 0.25])


def test_a_calls_own_prompts_always_fit(monkeypatch):
    """Seven prompts, where two fit: they are kept, and then no more than these."""
    monkeypatch.setattr(encode, "MOST", 2 * ROW)
    seen, conditioner = made(stay=True, devices=1, group=2)
    found = conditioner(PROMPTS[:7], PROMPTS[7:])
    np.testing.assert_array_equal(np.asarray(found["pooled"])[:, 0], (np.arange(7) * 0.5) ** 2)
    assert [p for call in seen.calls for p in call] == [*PROMPTS[:7], PROMPTS[6]]  # nothing of what comes next
    assert bytes_of(conditioner) == 7 * ROW
    conditioner(PROMPTS[7:])
    assert bytes_of(conditioner) == 7 * ROW


def test_what_the_bound_holds():
    """Prompts of FLUX.1-dev at 128 tokens, of FLUX.2-klein-4B, and of Z-Image at 128."""
    held = [encode.MOST // (2 * n) for n in (128 * 4096 + 768, 512 * 7680, 128 * 2560)]
    assert held == [4090, 546, 6553]


@pytest.mark.parametrize("stay", [True, False])
def test_the_negative_prompt_is_encoded_with_the_first_and_stays(stay, monkeypatch):
    """One row, whole on every device, of the same numbers as in a batch."""
    monkeypatch.setattr(encode, "MOST", 5 * ROW)
    seen, conditioner = made(stay, devices=2, group=2, negative=PROMPTS[9])
    for i in range(0, 8, 2):
        conditioner(PROMPTS[i : i + 2], PROMPTS[i + 2 : i + 4])
    asked = [p for call in seen.calls for p in call]
    assert seen.calls[2] == [PROMPTS[9], PROMPTS[9]] and asked.count(PROMPTS[9]) == 2  # once, in a call filled up
    row = conditioner.negative()
    assert sum(map(len, seen.calls)) == len(asked)
    np.testing.assert_array_equal(row["text"].astype(np.float32), np.arange(36, 40, dtype=np.float32)[None] / 8)
    assert row["pooled"].shape == (1, 1) and row["text"].sharding.is_fully_replicated
    _, alone = made(stay, negative=PROMPTS[9])
    np.testing.assert_array_equal(alone.negative()["pooled"], row["pooled"])  # also before the first prompts
