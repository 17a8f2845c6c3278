"""Plans read programs as they run."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def _optimized(optimized) -> None:
    """See `optimized`."""
