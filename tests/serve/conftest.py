"""An exported model, small and untrained, and a server of it."""

import pathlib
import shutil
from collections.abc import Iterator

import jax
import pytest
from served import CONFIG, Served, read, write


@pytest.fixture(scope="session")
def quick() -> Iterator[None]:
    """As `quick_compilation`, for what is compiled once for the session."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def exported(topics, backbone, tmp_path_factory, quick) -> pathlib.Path:
    """A folder as export writes it: untrained; labels are what their texts say."""
    folder = tmp_path_factory.mktemp("serve") / "export"
    shutil.copytree(backbone, folder)
    write(folder, *(read(topics / f"{name}.json.gz") for name in ("lbl", "trn")))
    return folder


@pytest.fixture(scope="session")
def served(exported, quick) -> Iterator[Served]:
    """A server of `exported`."""
    from xmc_jax.inference.predictor import Predictor

    server = Served(Predictor.open(exported), CONFIG)
    yield server
    server.close()
