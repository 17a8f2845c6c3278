"""A run with everything that has state, as a command; figures of the campaigns for the docs."""

import copy
import json
import os
import pathlib
import subprocess
import sys

import processes
import pytest

from configs import vixml
from xmc_jax.data.synthetic import product_set

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="session")
def full(fields, tmp_path_factory) -> dict:
    """PRIME, pictures, a curriculum that clusters and doubles, evaluations, dropout."""
    raw = tmp_path_factory.mktemp("raw") / "Products"
    config = product_set.SyntheticConfig(documents=120, test_documents=40, labels=60, pixels=32)
    product_set.generate(config, raw)
    fields = copy.deepcopy(fields)
    fields["name"] = "products"
    fields["data"] |= {
        "dataset": "Products",
        "raw_dir": str(raw),
        "data_dir": str(tmp_path_factory.mktemp("data")),
        "images": vixml.get_config("mm").to_dict()["data"]["images"] | {"per_item": 2},
    }
    fields["train"] |= {"batch_size": 24, "epochs": 4, "checkpoint_every": 2, "log_every": 1}
    return fields


@pytest.fixture(scope="session")
def config(full, tmp_path_factory) -> str:
    """--config=... of that run."""
    return processes.config(full, tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="session")
def start():
    """A function that starts the command; on one device, which compiles fastest."""

    def start(*flags: str, **options) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "xmc_jax.main", *flags],
            env=os.environ | {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            **options,
        )

    return start


@pytest.fixture
def figures(request):
    """A function that keeps what a campaign counted, in $RELIABILITY_FIGURES if that is a folder.

    The table of docs/reliability.md is made of them.
    """

    def keep(**counted) -> None:
        if folder := os.environ.get("RELIABILITY_FIGURES"):
            path = pathlib.Path(folder) / f"{request.node.name}.json"
            path.write_text(json.dumps(counted, indent=1) + "\n")

    return keep
