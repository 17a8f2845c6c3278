"""Published capacities of accelerators, and what a collective takes at their link rates."""

import dataclasses
import math
from collections.abc import Sequence

from xmc_jax.planning.hlo import Collective, Costs
from xmc_jax.training.flops import Flops

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What is published about an accelerator.

    Attributes:
        name: as topologies call it.
        memory: bytes of main memory that programs may use.
        fast: FLOP/s of dense products in bfloat16.
        exact: FLOP/s of products in float32 precision.
        bandwidth: bytes/s of main memory.
        link: bytes/s in one direction: of one link to a neighbour on a torus, of all links of a
            chip behind a switch.
        dimensions: of the torus; 0 behind a switch.
        ring: a side is a ring if it has this many chips (2D), or if every side has a multiple of
            it (3D).
        host: chips per host.
        network: bytes/s per chip between hosts that links do not join.
    """

    name: str
    memory: int
    fast: float
    exact: float
    bandwidth: float
    link: float
    dimensions: int
    ring: int
    host: int
    network: float


# TPUs. Source: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, "System architecture", read 2026-11-21:
# HBM, peak bf16, HBM bandwidth, ICI bandwidth and ports. v5e: 16 GB, 197 TFLOPs, 819 GBps, 400 GBps
# over 4 ports, both directions: 50 per link and direction. v6e: 32 GB, 918, 1638 GBps, 800 GBps
# over 4: 100. v5p: 95 GiB, 459, 2765 GBps, 1200 GBps over 6: 100. v4: 32 GiB, 275, 1200 GBps,
# 2400 Gbps over 6 in one direction: 50. Network per host: v5e 2 x 100 Gbps for 8 chips, v6e
# 4 x 200; v5p 50 Gbps a chip; v4 has none published, 50 Gbps a chip assumed.
# HBM is what XLA lets programs have of it, as its out-of-memory errors say.
# A product in float32 precision is six in bfloat16 (jax.lax.Precision.HIGHEST).
# Rings: a v5e or v6e slice along the pod's full side of 16; a v4 or v5p slice of whole cubes of
# 4 x 4 x 4, whose optical links close every side.
_V5E = Chip("v5e", int(15.75 * GIB), 197e12, 197e12 / 6, 819e9, 50e9, 2, 16, 4, 3.1e9)
_V6E = Chip("v6e", int(31.25 * GIB), 918e12, 918e12 / 6, 1638e9, 100e9, 2, 16, 4, 12.5e9)
_V4 = Chip("v4", int(31.75 * GIB), 275e12, 275e12 / 6, 1200e9, 50e9, 3, 4, 4, 6.25e9)
_V5P = Chip("v5p", int(95.74 * GIB), 459e12, 459e12 / 6, 2765e9, 100e9, 3, 4, 4, 6.25e9)
# GPUs, SXM. Source: NVIDIA's data sheets of A100 80GB, H100 and H200: memory, dense bfloat16,
# float32 on CUDA cores, memory bandwidth, NVLink (600, 900, 900 GB/s in both directions); network:
# one 200 or 400 Gbps adapter a GPU, as in DGX A100 and H100. XLA takes 3/4 of the memory unless
# XLA_PYTHON_CLIENT_MEM_FRACTION says more; 0.92 of it is what is left beside CUDA's own.
_A100 = Chip("a100", int(0.92 * 80e9), 312e12, 19.5e12, 2039e9, 300e9, 0, 0, 8, 25e9)
_H100 = Chip("h100", int(0.92 * 80e9), 989e12, 67e12, 3350e9, 450e9, 0, 0, 8, 50e9)
_H200 = Chip("h200", int(0.92 * 141e9), 989e12, 67e12, 4800e9, 450e9, 0, 0, 8, 50e9)

TPUS = {chip.name: chip for chip in (_V4, _V5E, _V5P, _V6E)}
GPUS = {chip.name: chip for chip in (_A100, _H100, _H200)}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips that run one program together.

    Attributes:
        chip: of which kind.
        coordinates: where each lies on the torus, in the order of the flattened mesh; behind a
            switch their numbers.
        sides: chips along each dimension of the torus.
    """

    chip: Chip
    coordinates: tuple[tuple[int, ...], ...]
    sides: tuple[int, ...]

    def hops(self, pair: Sequence[int]) -> int:
        """Links between two chips, given by their places in the flattened mesh."""
        if not self.chip.dimensions:
            return 1
        between = 0
        for a, b, side in zip(*(self.coordinates[place] for place in pair), self.sides):
            along = abs(a - b)
            between += min(along, side - along) if self._is_ring(side) else along
        return between

    def _is_ring(self, side: int) -> bool:
        if self.chip.dimensions == 3:
            return not any(side % self.chip.ring for side in self.sides)
        return side == self.chip.ring

    def rate(self, group: Sequence[int]) -> float:
        """Bytes/s that each chip of a group can send to the others, all groups at once.

        Along each dimension that the group spans a chip has one link, or two where the dimension
        is a ring; groups that share the links of their bounding box share the rate.

        Args:
            group: places in the flattened mesh.
        """
        chip = self.chip
        if not chip.dimensions:
            nodes = {place // chip.host for place in group}
            return chip.link if len(nodes) == 1 else chip.network
        spans = [
            (min(along), max(along) - min(along) + 1, side)
            for along, side in zip(zip(*(self.coordinates[place] for place in group)), self.sides)
        ]
        ports = sum(
            2 if span == side and self._is_ring(side) else 1 for _, span, side in spans if span > 1
        )
        share = len(set(group)) / math.prod(span for _, span, _ in spans)
        return chip.link * max(ports, 1) * share


@dataclasses.dataclass(frozen=True)
class Seconds:
    """What one run of a program takes at published rates, each part by itself.

    Attributes:
        compute: matrix products.
        memory: reading and writing main memory, at the same time as computing.
        collectives: between chips; after it: nothing overlaps.
    """

    compute: float
    memory: float
    collectives: float

    @property
    def total(self) -> float:
        """The longer of computing and main memory, and then the collectives."""
        return max(self.compute, self.memory) + self.collectives


def seconds(where: Slice, flops: Flops, costs: Costs) -> Seconds:
    """The least that one run of a program takes; `flops` are of all chips, `costs` of one."""
    chips = len(where.coordinates)
    return Seconds(
        compute=(flops.fast / where.chip.fast + flops.exact / where.chip.exact) / chips,
        memory=costs.accessed / where.chip.bandwidth,
        collectives=sum(collective_seconds(where, one) for one in costs.collectives),
    )


def collective_seconds(where: Slice, one: Collective) -> float:
    """All calls of one collective within a run of its program; the slowest group counts."""
    if one.kind == "collective-permute":
        links = max(where.hops(pair) for pair in one.groups)
        return one.calls * one.sent * links / where.rate(one.groups[0][:1])
    return one.calls * one.sent / min(where.rate(group) for group in one.groups)
