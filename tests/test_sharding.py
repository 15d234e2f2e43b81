"""The mesh: blocks stay where they are, and a number of devices that does not divide is refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solrl_jax import sharding
from tests import nano
from tests.nano import begun, parts_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("nano")


def test_blocks_stay_on_the_devices_that_hold_them(folder):
    """4 prompts on 2 devices, one of each a call: nothing is gathered on the way in or out, and the order stays."""
    parts = parts_of(nano.build(folder), 2)
    with jax.set_mesh(parts.mesh):
        _, prompts, keys = begun(parts)
        keys = sharding.split(keys, parts.mesh)
        given = (prompts.cond, prompts.tokens, keys)
        blocks = [sharding.block(given, i, 1) for i in range(2)]
        back = sharding.joined(tuple(blocks))
        text = sharding.block.lower(given, 0, 1).compile().as_text()
        text += sharding.joined.lower(tuple(blocks)).compile().as_text()
    for x in jax.tree.leaves((blocks, back)):
        assert x.sharding.spec[0] in (sharding.AXES, sharding.DATA) and not x.sharding.is_fully_replicated
    assert not re.search("all-gather|all-reduce|all-to-all|collective-permute", text)
    for whole, one, two, again in zip(*map(jax.tree.leaves, (given, *blocks, back)), strict=True):
        whole, one, two, again = (
            np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
            for x in (whole, one, two, again)
        )
        np.testing.assert_array_equal(one, whole[[0, 2]])
        np.testing.assert_array_equal(two, whole[[1, 3]])
        np.testing.assert_array_equal(again, whole)


def test_a_device_count_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"6 prompts do not divide over 4 devices: use a multiple of 4"):
        sharding.check_divides(sharding.make_mesh(4), 6)
    with pytest.raises(ValueError, match=r"16 prompts do not divide over 3 .*--devices with one of \[1, 2, 4\]$"):
        sharding.check_divides(sharding.make_mesh(3), 16)  # of the 4 that there are
