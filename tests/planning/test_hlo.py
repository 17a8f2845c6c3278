"""What compiled programs move: collectives, groups and bytes, as often as their loops turn."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from xmc_jax.planning import hlo
from xmc_jax.planning.hlo import Collective

P = PartitionSpec


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("x", "y"))


def compiled(function, *arguments) -> hlo.Costs:
    text = jax.jit(function).lower(*arguments).compile().as_text()
    return hlo.read(text, 8)


def on(mesh, shape, *axes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))


def mapped(mesh, function, inputs, outputs):
    return functools.partial(
        jax.shard_map, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False
    )(function)


def test_a_sum_over_one_axis_is_of_the_groups_of_that_axis(mesh):
    total = mapped(mesh, lambda x: jax.lax.psum(x, "y"), P("x", "y"), P("x"))
    (one,) = compiled(total, on(mesh, (16, 64), "x", "y")).collectives
    assert (one.kind, one.bytes, one.calls) == ("all-reduce", 4 * 32 * 4, 1)
    assert sorted(one.groups) == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert one.sent == one.bytes  # 2 (n - 1) / n of two devices


def test_a_gather_sends_what_each_device_has_to_all_others(mesh):
    gather = mapped(mesh, lambda x: jax.lax.all_gather(x, "x"), P("x"), P())
    found = compiled(gather, on(mesh, (16, 64), "x"))
    (one,) = found.collectives
    assert (one.kind, one.bytes, one.size) == ("all-gather", 4 * 64 * 4, 4)
    assert found.sent() == {"all-gather": 3 * one.bytes}


def test_a_collective_in_a_loop_counts_every_turn(mesh):
    def loop(x):
        def turn(x, _):
            return jnp.sin(jax.lax.psum(x, "x")), None

        return jax.lax.scan(turn, x, length=12)[0]

    (one,) = compiled(mapped(mesh, loop, P("x"), P("x")), on(mesh, (16, 64), "x")).collectives
    assert (one.kind, one.calls) == ("all-reduce", 12)


def test_loops_in_loops_multiply(mesh):
    def loop(x):
        def inner(x, _):
            return jnp.sin(jax.lax.psum(x, "x")), None

        def outer(x, _):
            return jnp.cos(jax.lax.scan(inner, x, length=5)[0]), None

        return jax.lax.scan(outer, x, length=7)[0]

    (one,) = compiled(mapped(mesh, loop, P("x"), P("x")), on(mesh, (16, 64), "x")).collectives
    assert one.calls == 35


def test_pairs_and_exchanges_are_told_apart(mesh):
    def exchange(x):
        y = jax.lax.all_to_all(x, "x", 1, 0, tiled=True)
        return jax.lax.ppermute(y, "x", [(i, (i + 1) % 4) for i in range(4)])

    found = compiled(mapped(mesh, exchange, P("x"), P(None, "x")), on(mesh, (16, 64), "x"))
    kinds = {one.kind: one for one in found.collectives}
    assert set(kinds) == {"all-to-all", "collective-permute"}
    assert kinds["all-to-all"].sent == 3 / 4 * kinds["all-to-all"].bytes
    assert kinds["collective-permute"].size == 2


def test_bytes_of_a_loop_count_every_turn_and_a_stack_only_its_slices():
    def layers(x, stacked):
        return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, stacked)[0]

    x = jax.ShapeDtypeStruct((64, 256), jnp.float32)
    stacked = jax.ShapeDtypeStruct((20, 256, 256), jnp.float32)
    weights, activation = 20 * 256 * 256 * 4, 64 * 256 * 4
    found = hlo.read(jax.jit(layers).lower(x, stacked).compile().as_text(), 1)
    assert weights < found.accessed < 3 * weights + 20 * 8 * activation
    assert found.unknown_loops == 0


# As libtpu writes programs, shortened: layouts with memory spaces, an asynchronous gather, a sum
# that is split at once, groups as a transposed range, a loop.
TPU = (pathlib.Path(__file__).parent / "loop_tpu.hlo").read_text(encoding="utf-8")

KNOWN = '"known_trip_count":{"n":"12"}'


def test_a_program_for_tpus_is_read():
    gather, scatter = hlo.read(TPU, 16).collectives
    columns = tuple(tuple(range(first, 16, 4)) for first in range(4))
    rows = tuple(tuple(range(first, first + 4)) for first in range(0, 16, 4))
    part = 16 * 128 * 2
    source = "jit(f)/layers/gather (of) weights"
    assert gather == Collective("all-gather", rows, part, 12, source)
    assert scatter == Collective("reduce-scatter", columns, 4 * part, 12, "")
    assert (gather.sent, scatter.sent) == (3 * part, 3 * part)


def test_turns_follow_from_first_step_and_bound_where_xla_does_not_say_them():
    found = hlo.read(TPU.replace(KNOWN, ""), 16)
    assert {one.calls for one in found.collectives} == {12}  # 1, 3, ... 23
    assert found.unknown_loops == 0


def test_a_loop_whose_turns_are_unknown_is_said():
    found = hlo.read(TPU.replace(KNOWN, "").replace("direction=LT", "direction=NE"), 16)
    assert found.unknown_loops == 1
    assert {one.calls for one in found.collectives} == {1}


def test_what_lies_in_a_chips_own_memory_is_not_moved():
    line = "  %out.1 = bf16[16,128]{1,0:T(8,128)(2,1)SPACE} negate(%p)\n"
    entry = TPU.index("  ROOT %out =")
    without = hlo.read(TPU, 16).accessed
    written = hlo.read(TPU[:entry] + line.replace("SPACE", "") + TPU[entry:], 16).accessed
    kept = hlo.read(TPU[:entry] + line.replace("SPACE", "S(1)") + TPU[entry:], 16).accessed
    assert (written - without, kept - without) == (2 * 16 * 128 * 2, 16 * 128 * 2)


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="expected the text of a compiled program"):
        hlo.read("module @jit_f {}", 8)


@pytest.mark.parametrize(
    "written, groups",
    [
        ("{{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("[2,2]<=[4]", ((0, 1), (2, 3))),
        ("[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("mesh['a'=2,'b'=2] {'b'}", ((0, 1), (2, 3))),
        ("mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
        ("mesh['a'=2,'b'=2] {'a','b'}", ((0, 1, 2, 3),)),
        ("mesh['a'=4] {'a':(2)2}", ((0, 1), (2, 3))),
        ("mesh['a'=4] {'a':(1)2}", ((0, 2), (1, 3))),
        ("mesh['a'=2,'b'=2], device_ids=([4]<=[2,2]T(1,0)) {'b'}", ((0, 2), (1, 3))),
        ("{}", ((0, 1, 2, 3),)),
    ],
)
def test_groups_are_read_in_every_notation(written, groups):
    listed = "replica_groups={{0,1,2,3},{4,5,6,7},{8,9,10,11},{12,13,14,15}}"
    found = hlo.read(TPU.replace(listed, f"replica_groups={written}"), 4)
    assert found.collectives[0].groups == groups


def test_a_chain_of_fusions_is_one_collective():
    """An asynchronous collective is written once in each of the fusions that it goes on in."""
    first = TPU.replace("use_global_device_ids=true, metadata", 'chain_id="0", metadata')
    assert [one.kind for one in hlo.read(first, 16).collectives] == ["reduce-scatter"]
    begun = '  %begun = s32[2]{0} custom-call(%start), custom_call_target="AsyncCollectiveStart"\n'
    place = first.index("  %whole =")
    started = hlo.read(first[:place] + begun + first[place:], 16)
    assert [one.kind for one in started.collectives] == ["all-gather", "reduce-scatter"]
