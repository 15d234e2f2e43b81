"""Recipes. configs/NAME.py defines config(recipe) -> solrl_jax.config.Config; --config=NAME:RECIPE calls it.

One takes from another by `from . import flux`: a user's own folder of the same name may stand before this one.
"""
