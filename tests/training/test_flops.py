"""Operations of traced programs: those of their matrix products, however they are wrapped."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from xmc_jax.training import flops
from xmc_jax.training.flops import Flops

SQUARE = jax.ShapeDtypeStruct((4, 4), jnp.float32)
ONE = 2 * 4**3  # of a product of two squares


def counted(function, *arguments) -> Flops:
    return flops.count(jax.jit(function).trace(*arguments).jaxpr)


def test_a_product_is_two_operations_for_each_term():
    a, b = jax.ShapeDtypeStruct((3, 5), jnp.bfloat16), jax.ShapeDtypeStruct((5, 7), jnp.bfloat16)
    assert counted(jnp.dot, a, b) == Flops(fast=2 * 3 * 5 * 7)


def test_batched_products_count_every_batch():
    a = jax.ShapeDtypeStruct((6, 3, 5), jnp.float32)
    b = jax.ShapeDtypeStruct((6, 5, 7), jnp.float32)
    assert counted(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), a, b).fast == 2 * 6 * 3 * 5 * 7


def test_a_convolution_counts_its_window_at_every_place():
    image = jax.ShapeDtypeStruct((2, 3, 8, 8), jnp.float32)
    kernel = jax.ShapeDtypeStruct((5, 3, 2, 2), jnp.float32)

    def convolve(image, kernel):
        return jax.lax.conv(image, kernel, (2, 2), "VALID")

    assert counted(convolve, image, kernel).total == 2 * (2 * 5 * 4 * 4) * (3 * 2 * 2)


@pytest.mark.parametrize(
    "asked, fast, exact", [("highest", 0, ONE), ("default", ONE, 0), (None, ONE, 0)]
)
def test_products_of_full_precision_are_counted_apart(asked, fast, exact):
    found = counted(lambda a, b: jnp.matmul(a, b, precision=asked), SQUARE, SQUARE)
    assert found == Flops(fast, exact)


def test_a_scan_counts_as_often_as_it_turns():
    def layers(x, stacked):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, stacked)[0]

    stacked = jax.ShapeDtypeStruct((9, 4, 4), jnp.float32)
    assert counted(layers, SQUARE, stacked).fast == 9 * ONE


def test_a_loop_between_numbers_counts_as_often_as_it_turns():
    def loop(x, w):
        def more(carry):
            return carry[0] < 7

        return jax.lax.while_loop(more, lambda c: (c[0] + 1, c[1] @ w), (2, x))[1]

    assert counted(loop, SQUARE, SQUARE).fast == 5 * ONE
    assert counted(
        lambda x, w: jax.lax.fori_loop(0, 6, lambda _, x: x @ w, x), SQUARE, SQUARE
    ).fast == (6 * ONE)


def test_a_loop_of_unknown_turns_is_refused():
    def loop(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 7, lambda x: x @ w, x)

    with pytest.raises(ValueError, match="fixed number of times"):
        counted(loop, SQUARE, SQUARE)


def test_what_nothing_uses_does_not_count():
    assert counted(lambda a, b: (a @ b, a + b)[1], SQUARE, SQUARE).total == 0


def test_gradients_count_what_is_computed_again():
    def loss(w, x, remat):
        def layer(x, w):
            return jnp.sin(x @ w), None

        layer = jax.checkpoint(layer) if remat else layer
        return jax.lax.scan(layer, x, w)[0].sum()

    stacked = jax.ShapeDtypeStruct((3, 4, 4), jnp.float32)
    # Forward, and the gradients of both factors.
    kept = counted(lambda w, x: jax.grad(loss)(w, x, False), stacked, SQUARE)
    again = counted(lambda w, x: jax.grad(loss)(w, x, True), stacked, SQUARE)
    assert again.total - kept.total == 3 * ONE


def test_a_branch_counts_as_its_dearest():
    def choose(p, a, b):
        return jax.lax.cond(p, lambda: a @ b, lambda: a @ b @ b)

    assert counted(choose, jax.ShapeDtypeStruct((), bool), SQUARE, SQUARE).total == 2 * ONE


def test_what_each_device_does_counts_for_every_device():
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("x",), axis_types=auto, devices=jax.devices()[:4])
    rows = jax.ShapeDtypeStruct((8, 4), jnp.float32)
    product = jax.shard_map(
        jnp.dot,
        mesh=mesh,
        in_specs=(PartitionSpec("x"), PartitionSpec()),
        out_specs=PartitionSpec("x"),
    )
    assert counted(product, rows, SQUARE) == counted(jnp.dot, rows, SQUARE)
