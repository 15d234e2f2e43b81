"""Cases of a parametrised test that belong to another tier than the rest."""

import pytest


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def long(*values):
    return pytest.param(*values, marks=pytest.mark.long)
