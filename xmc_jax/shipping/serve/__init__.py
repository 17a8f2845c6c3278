"""An exported model behind HTTP: `python -m xmc_jax.main --mode=serve`; see docs/serve.md."""
