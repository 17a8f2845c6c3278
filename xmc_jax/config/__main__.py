"""Prints docs/config.md."""

from xmc_jax.config import reference

print(reference.page(), end="")
