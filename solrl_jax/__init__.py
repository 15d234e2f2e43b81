"""Reinforcement learning of text-to-image flow models in JAX: explore in low precision, train in bfloat16.

Start with iteration.py. A program calls `device.setup()` before its first array; importing changes no setting.
"""
