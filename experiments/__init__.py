"""Programs whose results are committed beside them. Importing the package first quiets JAX without a GPU."""

import solrl_jax  # noqa: F401
