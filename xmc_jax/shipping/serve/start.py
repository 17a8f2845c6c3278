"""The mode `serve`, for where its extra may be missing."""

import pathlib
from collections.abc import Callable

from xmc_jax.config import ServeConfig


def run(find: Callable[[], pathlib.Path], config: ServeConfig) -> None:
    """See `server.run`.

    Raises:
        ValueError: likewise; or the extra "serve" is not installed.
    """
    try:
        from xmc_jax.shipping.serve import server
    except ImportError as error:
        raise ValueError(
            f'--mode=serve: expected the packages of the extra "serve", found no {error.name}; '
            'install it: pip install -e ".[serve]"'
        ) from error
    server.run(find, config)
