"""What collectives take: links of a torus, or a switch."""

import itertools

import pytest

from xmc_jax.planning import hardware
from xmc_jax.planning.hardware import Slice
from xmc_jax.planning.hlo import Collective, Costs
from xmc_jax.training.flops import Flops

V5E, V5P, H100 = hardware.TPUS["v5e"], hardware.TPUS["v5p"], hardware.GPUS["h100"]


def torus(chip, *sides) -> Slice:
    return Slice(chip, tuple(itertools.product(*map(range, sides))), sides)


def test_a_line_has_one_link_and_a_ring_two():
    assert torus(V5E, 4, 4).rate((0, 1, 2, 3)) == V5E.link
    assert torus(V5E, 16, 16).rate(range(16)) == 2 * V5E.link


def test_a_part_of_a_ring_is_a_line():
    assert torus(V5E, 16, 16).rate((0, 1, 2, 3)) == V5E.link


def test_every_dimension_that_a_group_spans_adds_its_links():
    assert torus(V5E, 4, 4).rate(range(16)) == 2 * V5E.link
    assert torus(V5E, 16, 16).rate(range(256)) == 4 * V5E.link
    assert torus(V5P, 4, 4, 4).rate(range(64)) == 6 * V5P.link


def test_a_small_slice_of_cubes_does_not_wrap():
    assert torus(V5P, 2, 2, 4).rate(range(4)) == V5P.link  # along the side of four


def test_groups_that_share_links_share_the_rate():
    assert torus(V5E, 4, 4).rate((0, 2)) == V5E.link * 2 / 3


def test_behind_a_switch_any_group_has_all_links_up_to_the_host():
    where = Slice(H100, tuple((i,) for i in range(16)), ())
    assert where.rate((0, 3, 5)) == H100.link
    assert where.rate((0, 8)) == H100.network


def test_a_collective_takes_what_its_slowest_group_takes():
    where = torus(V5E, 16, 16)
    ring, line = tuple(range(16)), tuple(range(4))
    one = Collective("all-gather", (ring, line), 1000, calls=3, source="")
    assert hardware.collective_seconds(where, one) == pytest.approx(3 * 15_000 / V5E.link)


def test_compute_and_memory_overlap_and_collectives_do_not():
    where = torus(V5E, 1, 2)
    one = Collective("all-reduce", ((0, 1),), 50, calls=1, source="")
    found = hardware.seconds(
        where, Flops(fast=int(2 * 197e12)), Costs(int(2 * 819e9), (one,), unknown_loops=0)
    )
    assert (found.compute, found.memory) == pytest.approx((1.0, 2.0))
    assert found.total == pytest.approx(2.0 + 50 / V5E.link)


def test_products_of_full_precision_take_six_times_as_long_on_tpus():
    where, nothing = torus(V5E, 1, 1), Costs(0, (), 0)
    fast = hardware.seconds(where, Flops(fast=10**15), nothing)
    exact = hardware.seconds(where, Flops(exact=10**15), nothing)
    assert exact.total == pytest.approx(6 * fast.total)


@pytest.mark.parametrize("chip", [*hardware.TPUS.values(), *hardware.GPUS.values()])
def test_figures_are_of_the_right_order(chip):
    """A slip of a unit is a factor of 8 or 1000."""
    assert 10e9 < chip.memory < 200e9
    assert 100e12 < chip.fast < 2000e12
    assert 4 < chip.fast / chip.exact < 20
    assert 800e9 < chip.bandwidth < 5000e9
    assert 50e9 <= chip.link <= 450e9
    assert 3e9 < chip.network <= 50e9
