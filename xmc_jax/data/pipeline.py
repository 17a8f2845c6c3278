"""Batches built ahead of the devices, in threads. No shuffling, no state but the step's number."""

from collections.abc import Callable, Iterator
from typing import Any

import grain


def open(
    build: Callable[[int], Any],
    first: int,
    steps: int,
    put: Callable[[Any], Any],
    prefetch: int = 2,
    threads: int = 2,
) -> Iterator[Any]:
    """Yields `put(build(s))` for s = first, ..., steps - 1, in this order.

    Both functions run in reading threads, so they must not depend on the order of calls; an error
    in them is raised to the consumer. Closing or dropping the iterator ends the threads once what
    they are building is built.

    Args:
        build: step in the epoch -> batch of numpy arrays.
        first: the first step wanted; `steps` or more gives nothing.
        put: hands a batch over to the devices, with an explicit `jax.device_put` or
            `jax.make_array_from_process_local_data`.
        prefetch: batches ahead; they lie on the devices.

    Raises:
        ValueError: a negative first step, or no batch or thread to read ahead with.
    """
    if first < 0 or prefetch < 1 or threads < 1:
        raise ValueError(
            "pipeline: expected first >= 0, prefetch >= 1 and threads >= 1, got "
            f"{first}, {prefetch} and {threads}"
        )
    return _batches(build, first, steps, put, prefetch, threads)


def _batches(build, first, steps, put, prefetch, threads) -> Iterator[Any]:
    dataset = grain.MapDataset.range(min(first, steps), steps).map(lambda step: put(build(step)))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    iterator = iter(dataset.to_iter_dataset(options))
    try:
        yield from iterator
    finally:
        iterator.close()
