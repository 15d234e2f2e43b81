"""Recipes. configs/NAME.py defines config(recipe) -> solrl_jax.config.Config; --config=NAME:RECIPE calls it."""
