"""An exported model, small and untrained, and a server of it."""

import pathlib
import shutil
from collections.abc import Iterator

import numpy as np
import pytest
from served import CONFIG, Served, read, write

from xmc_jax.models import hf_export
from xmc_jax.shipping import contents


@pytest.fixture(scope="session")
def exported(topics, backbone, tmp_path_factory) -> pathlib.Path:
    """A folder as export writes it: untrained; labels are what their texts say."""
    folder = tmp_path_factory.mktemp("serve") / "export"
    shutil.copytree(backbone, folder)
    write(folder, *(read(topics / f"{name}.json.gz") for name in ("lbl", "trn")))
    return folder


@pytest.fixture(scope="session")
def served(exported) -> Iterator[Served]:
    """A server of `exported`."""
    from xmc_jax.shipping.predictor import Predictor

    server = Served(Predictor.open(exported), CONFIG)
    yield server
    server.close()


@pytest.fixture(scope="session")
def pictured(backbone, tmp_path_factory) -> pathlib.Path:
    """The folder of a model that takes pictures, of synthetic products; untrained, too."""
    from xmc_jax.data.synthetic import product_set
    from xmc_jax.images import encoders, image_sources

    raw, folder = tmp_path_factory.mktemp("products"), tmp_path_factory.mktemp("serve") / "export"
    product_set.generate(product_set.SyntheticConfig(120, 40, 2, looks=4, styles=8), raw / "raw")
    items = [read(raw / "raw" / f"{name}.json.gz") for name in ("lbl", "trn")]
    items[0][0]["title"] = "<img src=x onerror=alert(1)> <b>jar</b>"  # as no page should read it
    pictures = {}
    for kind, split, of_split in zip(("labels", "documents"), ("label", "train"), items):
        uids = [item["uid"] for item in of_split]
        found = image_sources.open(raw / "raw", split, uids).read(1)
        pictures[kind] = {uids[item]: image for item, _, image in found}
    shutil.copytree(backbone, folder)
    made_by = encoders.build("hog-colour", 1)
    noise = np.random.default_rng(0).standard_normal((made_by.width, 32)).astype(np.float32)
    projection = {"kernel": 3 * noise / made_by.width**0.5, "bias": np.zeros(32, np.float32)}
    hf_export.projection(folder, projection, made_by.identity)
    images = contents.ImageInput(
        encoder="hog-colour",
        revision=made_by.identity["revision"],
        digest=made_by.identity["digest"],
        width=made_by.width,
        per_item=2,
        layout="pad",
        alpha="white",
        dtype="float32",
        folder=None,
    )
    write(folder, *items, "products", images, pictures)
    return folder


@pytest.fixture(scope="session")
def products(pictured) -> Iterator[Served]:
    """A server of `pictured`."""
    from xmc_jax.shipping.predictor import Predictor

    server = Served(Predictor.open(pictured), CONFIG)
    yield server
    server.close()
