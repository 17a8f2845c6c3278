"""Devices by name, of a kind that need not be here: `v5e:4x4`, `gpu:h100x8`, `cpu:8`."""

import contextlib
import dataclasses
import math
import os
import re

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from xmc_jax.planning import hardware
from xmc_jax.planning.hardware import Chip, Slice

_FORCED = "xla_force_host_platform_device_count"
_EXAMPLES = "v5e:4x4, v5p:2x2x4, gpu:h100x8 or cpu:8"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices that programs are compiled for.

    Attributes:
        name: as asked for.
        devices: of TPUs, descriptions; of others, as many devices of this machine's processor.
        chip: what is published about them; None for a processor.
        memory: bytes of one device that programs may use.
        sides: chips along each dimension of the torus; () elsewhere.
        exact: whether what is compiled is what would run there; otherwise figures are estimates.
    """

    name: str
    devices: tuple[jax.Device, ...]
    chip: Chip | None
    memory: int
    sides: tuple[int, ...]
    exact: bool

    @property
    def hosts(self) -> int:
        """Machines that hold the devices."""
        return 1 if self.chip is None else math.ceil(len(self.devices) / self.chip.host)

    def slice(self, mesh: Mesh) -> Slice | None:
        """Where the devices of a mesh lie; None where no rates are published."""
        if self.chip is None:
            return None
        devices = mesh.devices.flatten()
        if not self.sides:
            return Slice(self.chip, tuple((place,) for place in range(len(devices))), ())
        places = tuple(tuple(device.coords[: len(self.sides)]) for device in devices)
        return Slice(self.chip, places, self.sides)


def find(name: str) -> Topology:
    """The devices of a name. JAX has this machine's processor as its only backend afterwards.

    Args:
        name: `<v4|v5e|v5p|v6e>:<sides>`, compiled for by libtpu, without any TPU;
            `gpu:<a100|h100|h200>[x<devices>]`; or `cpu[:<devices>]`.

    Raises:
        ValueError: no such topology, or there is no libtpu.
    """
    if match := re.fullmatch(r"(v\d\w*):(\d+(?:x\d+)*)", name):
        chip = hardware.TPUS.get(match[1])
        if chip is not None:
            return _tpu(name, chip, tuple(map(int, match[2].split("x"))))
    if match := re.fullmatch(r"gpu:([a-z]+\d+)(?:x(\d+))?", name):
        chip = hardware.GPUS.get(match[1])
        if chip is not None:
            devices = _processor(int(match[2] or 1))
            return Topology(name, devices, chip, chip.memory, (), exact=False)
    if match := re.fullmatch(r"cpu(?::(\d+))?", name):
        devices = _processor(int(match[1] or 1))
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Topology(name, devices, None, memory // len(devices), (), exact=True)
    raise ValueError(
        f"--topology: expected one like {_EXAMPLES}, of {', '.join(hardware.TPUS)} with sides, "
        f"{', '.join(hardware.GPUS)} with a number, or cpu, got {name!r}"
    )


def _tpu(name: str, chip: Chip, sides: tuple[int, ...]) -> Topology:
    if len(sides) != chip.dimensions:
        raise ValueError(
            f"--topology: expected {chip.dimensions} sides of a {chip.name} slice, got {name!r}"
        )
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no cloud machine to ask for one
    try:
        devices = topologies.get_topology_desc(name, platform="tpu").devices
    except (RuntimeError, ImportError, ValueError) as error:
        raise ValueError(
            f"--topology={name}: expected libtpu and a slice that it knows ({error}); install it "
            "with pip install libtpu, or set TPU_LIBRARY_PATH to its libtpu.so; one process at a "
            "time may use it"
        ) from error
    return Topology(name, tuple(devices), chip, chip.memory, sides, exact=True)


def _processor(count: int) -> tuple[jax.Device, ...]:
    """As many devices of this machine's processor."""
    if count < 1:
        raise ValueError(f"--topology: expected at least 1 device, got {count}")
    jax.config.update("jax_platforms", "cpu")
    if _FORCED not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX has started; it may have enough of them
            jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(
            f"--topology: expected {count} devices before JAX starts, got {len(devices)}; set "
            f"XLA_FLAGS=--{_FORCED}={count}"
        )
    return tuple(devices[:count])
