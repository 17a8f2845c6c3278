"""The mesh, and the one table in which logical axis names meet mesh axes.

Nothing else knows a mesh axis.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from xmc_jax.config import MeshConfig, choices

AXES = ("data", "fsdp", "tensor")

Axis = str | tuple[str, int] | None
"""Logical name of an array's axis. ("kv", 2) is an axis of two heads, none of which is split."""

# Logical axis -> mesh axes that split it. `token_width` (embedding tables) is split by width over
# both parameter axes, `tensor` outside: see `layers.lookup`.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "copy": ("data",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv": ("tensor",),
    "mlp": ("tensor",),
    "width": ("tensor",),
    "token_width": ("tensor", "fsdp"),
    "vocab": (),
    "layers": (),
    "length": (),
    "rank": ("fsdp",),
}
_SPLIT = choices(MeshConfig, "replicate")
# Tables are split by width, so that writing and reading rows is local; by rows, every write gathers
# the batch. Of these the first with the most devices that divides the width.
TABLE_WIDTH = (("tensor", "data", "fsdp"), ("data", "fsdp"), ("data",), ("fsdp",), ("tensor",))


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh (data, fsdp, tensor); one device is the mesh (1, 1, 1), not another path.

    Args:
        devices: what the mesh is made of; all devices of all processes by default.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    sizes = [config.data, config.fsdp, config.tensor]
    devices = jax.devices() if devices is None else devices
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(
            f"mesh: expected positive sizes and at most one -1, got {dict(zip(AXES, sizes))}"
        )
    if -1 in sizes:
        known = int(np.prod([size for size in sizes if size != -1]))
        sizes[sizes.index(-1)] = max(len(devices) // known, 1)
    if int(np.prod(sizes)) != len(devices):
        raise ValueError(
            f"mesh: expected sizes whose product is the number of devices, {len(devices)}, got "
            f"{dict(zip(AXES, sizes))}; set --config.mesh.data=-1 to take the devices that are left"
        )
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def mesh_of(x: jax.Array) -> Mesh:
    """The mesh that an array is on; one of its single device where it has none."""
    if isinstance(x.sharding, NamedSharding):
        return x.sharding.mesh
    return make_mesh(MeshConfig(data=1), list(x.sharding.device_set))


def spec(
    logical: tuple[Axis, ...],
    shape: tuple[int, ...],
    mesh: Mesh,
    name: str | None,
    replicate: Sequence[str] = (),
) -> PartitionSpec:
    """The mesh axes of an array from the logical names of its axes.

    Args:
        logical: one name of `RULES`, "table_width" or None for each axis.
        name: what to call the array in an error; None if it may be padded.

    Raises:
        ValueError: a mesh axis does not divide the array's axis.
    """
    parts = []
    for axis, size in zip(logical, shape, strict=True):
        axis, units = axis if isinstance(axis, tuple) else (axis, size)
        if axis == "table_width":
            fitting = [c for c in TABLE_WIDTH if size % _extent(mesh, c) == 0]
            mesh_axes = max(fitting, key=lambda c: _extent(mesh, c), default=())
        else:
            mesh_axes = () if axis is None or axis in replicate else RULES[axis]
            mesh_axes = tuple(a for a in mesh_axes if a not in mesh.manual_axes)
        extent = _extent(mesh, mesh_axes)
        if units % extent and name is not None:
            what = f"size {size}" if units == size else f"{units} heads"
            remedy = f", or --config.mesh.replicate=\"('{axis}',)\"" if axis in _SPLIT else ""
            raise ValueError(
                f"sharding: {name} {shape}: axis {axis!r} of {what} does not divide into the "
                f"{extent} shards of mesh axes {mesh_axes}; choose a mesh whose sizes divide it"
                + remedy
            )
        parts.append(mesh_axes if extent > 1 else None)
    return PartitionSpec(*parts)


def named(
    logical: tuple[Axis, ...], shape: tuple[int, ...], mesh: Mesh, name: str
) -> NamedSharding:
    """`spec` as a NamedSharding on `mesh`."""
    return NamedSharding(mesh, spec(logical, shape, mesh, name))


def of_params(boxed: Any, mesh: Mesh, replicate: Sequence[str] = ()) -> Any:
    """NamedShardings of a parameter tree as `Module.init` gives it, boxed with logical names.

    Args:
        boxed: tree (abstract or not) whose leaves are `nn.LogicallyPartitioned`, or plain arrays,
            which are replicated.

    Raises:
        ValueError: an axis does not divide; names the parameter.
    """

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if isinstance(leaf, nn.Partitioned):
            parts = spec(leaf.names, leaf.value.shape, mesh, name, replicate)
            return NamedSharding(mesh, parts)
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(
        one, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned)
    )


def of_batch(batch: Any, mesh: Mesh) -> Any:
    """NamedShardings of a batch or of inputs: the first axis of every array over the batch axes.

    Raises:
        ValueError: the batch does not divide over the devices.
    """

    def one(path, leaf):
        name = "batch" + jax.tree_util.keystr(path, simple=True, separator=".")
        return named(("batch",) + (None,) * (leaf.ndim - 1), leaf.shape, mesh, name)

    return jax.tree_util.tree_map_with_path(one, batch)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def num_shards(logical: str, mesh: Mesh) -> int:
    """Into how many parts the mesh splits an axis of `RULES`."""
    return _extent(mesh, RULES[logical])


def row_multiple(mesh: Mesh, least: bool = False) -> int:
    """What the places of a row of texts are a multiple of, as products on these devices like it.

    Args:
        least: what they may be a multiple of where lengths are known; see `rows.suited`.
    """
    return (8 if least else 64) if mesh.devices.flat[0].platform == "cpu" else 128


def local_rows(size: int, mesh: Mesh) -> np.ndarray:
    """i64[n], which rows of a batch the devices of this process hold, ascending.

    Args:
        size: rows of the global batch.

    Raises:
        ValueError: the batch does not divide over the devices.
    """
    split = named(("batch",), (size,), mesh, "batch")
    parts = {
        index[0].indices(size) for index in split.addressable_devices_indices_map((size,)).values()
    }
    return np.concatenate([np.arange(*part) for part in sorted(parts)])


def put_batch(local: Any, size: int, mesh: Mesh) -> Any:
    """Numpy arrays of this process's rows -> arrays of the whole batch, split over the batch axes.

    Args:
        local: pytree of arrays. The first axis has the rows `local_rows(size, mesh)`, or the same
            part of another number of rows.
        size: rows of the global batch.
    """
    rows = len(local_rows(size, mesh))

    def one(x):
        shape = (len(x) * size // rows, *x.shape[1:])
        split = named(("batch",) + (None,) * (x.ndim - 1), shape, mesh, "batch")
        return jax.make_array_from_process_local_data(split, x, shape)

    return jax.tree.map(one, local)


def put_whole(tree: Any, mesh: Mesh) -> Any:
    """Numpy arrays, the same in all processes, as arrays that every device holds whole."""
    return jax.tree.map(lambda x: put(np.asarray(x), replicated(mesh)), tree)


def put(x: np.ndarray, split: NamedSharding) -> jax.Array:
    """A numpy array, whole and the same in all processes, split as asked."""
    return jax.make_array_from_process_local_data(split, x, x.shape)


def fetch(x: jax.Array) -> np.ndarray:
    """A global array as numpy, in every process; all processes must call it."""
    if not (x.is_fully_addressable or x.is_fully_replicated):
        x = _gather(replicated(x.sharding.mesh))(x)
    return jax.device_get(x)


@functools.cache
def _gather(whole: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    """One function for each sharding: a new one would be compiled at every call."""
    return jax.jit(lambda x: x, out_shardings=whole)


def constrain(x: jax.Array, *logical: Axis, name: str | None = None) -> jax.Array:
    """Within `under`, pins an activation to logical axes; does nothing elsewhere.

    Args:
        *logical: as of `spec`; axes after those named are not split.

    Raises:
        ValueError: it has a name, and a mesh axis does not divide one of its axes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    logical += (None,) * (x.ndim - len(logical))
    return jax.lax.with_sharding_constraint(x, spec(logical, x.shape, mesh, name))


def groups() -> int:
    """Within `under`, into how many parts a batch is split that are not looked at one by one."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = () if mesh.empty else RULES["batch"]
    return _extent(mesh, tuple(a for a in axes if a not in mesh.manual_axes))


def gathered(x: jax.Array, logical: tuple[Axis, ...]) -> jax.Array:
    """A parameter as it is used: whole along what `fsdp` splits, other axes as they are.

    Left to choose, XLA sends activations here and there.

    Args:
        x: the parameter, in the dtype that it is computed in: what is sent.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1:
        return x
    whole = (not isinstance(axis, tuple) and RULES.get(axis) == ("fsdp",) for axis in logical)
    parts = (None if here else PartitionSpec.UNCONSTRAINED for here in whole)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*parts))


def rows(table: jax.Array, ids: jax.Array) -> jax.Array:
    """`table[ids]`, split like a batch.

    Args:
        table: [n, D], split by width: rows are read where they lie, and one all-to-all of what is
            read follows; neither the table nor the result is ever whole on a device.
        ids: i32[m, ...].
    """
    by_width = constrain(table[constrain(ids)], *(None,) * ids.ndim, "table_width")
    return width_to_batch(by_width)


def width_to_batch(x: jax.Array) -> jax.Array:
    """[m, ..., D] split by width, split like a batch instead.

    In two moves that XLA knows: an all-to-all, then a gather over `tensor`. Left to find the way
    itself, it may gather all of x on every device.
    """
    inner = (None,) * (x.ndim - 2)
    return constrain(constrain(x, "batch", *inner, "width"), "batch")


def batch_to_width(x: jax.Array) -> jax.Array:
    """[m, D] split like a batch, split like a table instead: as rows are written to one."""
    return constrain(constrain(x, "batch", "width"), None, "table_width")


def by_row(function: Callable[[jax.Array], Any], x: jax.Array) -> Any:
    """`function(x)`, which treats rows alike, on each device's rows of what is split like a batch.

    For what XLA does not know to be local to a row, such as a search for the largest of each: it
    would gather all of x first. Where the devices do not divide the rows, it may.

    Args:
        function: of [m, ...] to a pytree of [m, ...].
        x: [m, ...].
    """
    if len(x) % groups():
        return function(x)
    return on_shards(lambda _, x: function(x), (), x)


def on_shards(function: Callable[[Any, Any], Any], whole: Any, rows: Any) -> Any:
    """`function(whole, rows)`, which treats rows alike, on each device's rows.

    What is whole is sent to every device once, and its gradient summed over them once, whatever
    loops there are within.

    Args:
        function: of (whole, [m, ...]) to a pytree of [m, ...]; sees one device.
        rows: pytree of arrays split like a batch, whose devices divide their rows.
    """
    if groups() == 1:
        return function(whole, rows)
    axes = RULES["batch"]
    split = PartitionSpec(axes)

    def on_shard(whole, rows):
        return function(jax.lax.pcast(whole, axes, to="varying"), rows)

    return jax.shard_map(on_shard, in_specs=(PartitionSpec(), split), out_specs=split)(whole, rows)


def on_copies(function: Callable[..., Any], params: Any, items: Any) -> Any:
    """`function` on each of the copies of the parameters along "data" and its part of the items.

    So the gradient of the parameters is summed over the copies once, where they enter; otherwise it
    would be wherever they are used, in every layer of every chunk. Outside `under`, with one copy,
    and with copies that are split themselves, it is `function(params, items, 0)`.

    Args:
        function: of (params, items, number of the copy), by rows of the items.
        items: pytree of arrays split like a batch.
    """
    mesh = jax.sharding.get_abstract_mesh()
    # A map over some axes of a mesh, the others left to XLA, gives wrong results or none (0.10.2).
    if mesh.empty or mesh.shape["data"] == 1 or mesh.size > mesh.shape["data"]:
        return function(params, items, 0)

    def on_copy(params, items, number):
        return function(jax.lax.pcast(params, "data", to="varying"), items, number[0])

    whole, split = PartitionSpec(), PartitionSpec("data")
    return jax.shard_map(
        on_copy, in_specs=(whole, split, split), out_specs=split, axis_names={"data"}
    )(params, items, jnp.arange(mesh.shape["data"]))


def under(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, traced so that `constrain` within it knows the mesh."""

    @functools.wraps(function)
    def traced(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return traced


def _extent(mesh: Mesh, axes: tuple[str, ...]) -> int:
    return int(np.prod([mesh.shape[axis] for axis in axes], dtype=int))
