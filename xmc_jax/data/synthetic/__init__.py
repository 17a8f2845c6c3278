"""Synthetic products with pictures, any size: `python -m xmc_jax.data.synthetic --help`."""
