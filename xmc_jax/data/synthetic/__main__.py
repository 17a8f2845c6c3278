"""`python -m xmc_jax.data.synthetic`."""

import sys

from xmc_jax.data.synthetic import product_set

if __name__ == "__main__":
    sys.exit(product_set.main())
