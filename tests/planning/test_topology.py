"""Names of topologies; those that need libtpu are compiled for where it is installed."""

import os

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from xmc_jax.planning import hardware, topology


def test_a_processor_is_split_into_devices_that_share_its_memory():
    one, four = topology.find("cpu"), topology.find("cpu:4")
    assert [len(found.devices) for found in (one, four)] == [1, 4]
    assert four.memory == one.memory // 4
    assert one.memory == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert (one.chip, one.exact, one.hosts) == (None, True, 1)


def test_gpus_have_published_capacities_and_are_estimates():
    found = topology.find("gpu:h100x8")
    assert (len(found.devices), found.chip) == (8, hardware.GPUS["h100"])
    assert found.memory == hardware.GPUS["h100"].memory
    assert not found.exact
    assert topology.find("gpu:a100").devices == found.devices[:1]


def test_a_mesh_lies_on_its_devices_in_its_own_order():
    found = topology.find("gpu:h100x8")
    mesh = Mesh(np.array(jax.devices("cpu")[:8]).reshape(2, 4), ("data", "fsdp"))
    assert found.slice(mesh).rate((0, 7)) == hardware.GPUS["h100"].link
    assert topology.find("cpu:8").slice(mesh) is None


@pytest.mark.parametrize(
    "name", ["v5e", "v5e:", "v9:2x2", "v5e:4x4x4", "v5p:4x4", "gpu:b9", "gpu:h100x", "cpu:", "8"]
)
def test_another_name_is_refused_with_what_was_expected(name):
    with pytest.raises(ValueError, match="--topology: expected"):
        topology.find(name)


@pytest.mark.parametrize("name", ["cpu:0", "gpu:h100x0", "cpu:512"])
def test_devices_that_cannot_be_had_are_refused(name):
    with pytest.raises(ValueError, match="--topology: expected"):
        topology.find(name)


def test_slices_without_libtpu_are_an_error_of_one_line(monkeypatch):
    def absent(*arguments, **more):
        raise RuntimeError("libtpu.so not found")

    monkeypatch.setattr(topology.topologies, "get_topology_desc", absent)
    with pytest.raises(ValueError, match=r"pip install libtpu") as error:
        topology.find("v5e:4x4")
    assert "\n" not in str(error.value)
