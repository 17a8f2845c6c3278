"""Vectors of the pictures of new documents, by the image encoder of training."""

import functools
import os
import pathlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from xmc_jax.shipping.contents import ImageInput

_IMAGES = 8  # encoded at a time on a device


class PictureVectors:
    """Encodes image files as training did.

    Args:
        expected: the image encoder of training.
    """

    def __init__(self, folder: pathlib.Path, expected: ImageInput):
        self._folder, self._expected = folder, expected
        self._lock = threading.Lock()

    def encode(
        self, images: Sequence[Sequence[bytes | np.ndarray]], problems: dict[int, str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """f16[n, K, E] and i32[n]; needs the encoder only where there are pictures."""
        limit = self._expected.per_item
        counts = np.array([min(len(of_item), limit) for of_item in images], np.int32)
        vectors = np.zeros((len(images), limit, self._expected.width), np.float16)
        places = [(i, k) for i, count in enumerate(counts.tolist()) for k in range(count)]
        if not places:
            return vectors, counts
        encoder = self._loaded()
        parts = [places[i : i + self._size] for i in range(0, len(places), self._size)]
        for part, prepared in zip(parts, self._prepared(images, parts)):
            whole = []
            for (i, k), pixels in zip(part, prepared):
                if isinstance(pixels, str):
                    problems.setdefault(i, f"picture {k}: {pixels}")
                else:
                    whole.append((i, k, pixels))
            if whole:
                rows = jax.device_get(encoder.embed([pixels for *_, pixels in whole]))
                for (i, k, _), row in zip(whole, np.asarray(rows)):
                    vectors[i, k] = row.astype(np.float16)  # as image folders hold them
        return vectors, counts

    def _prepared(
        self,
        images: Sequence[Sequence[bytes | np.ndarray]],
        parts: list[list[tuple[int, int]]],
    ) -> Iterator[list[np.ndarray | str]]:
        """Pixels or an error of each picture, by part; the next part is decoded meanwhile."""
        under_way: list[list[Future]] = []
        for part in parts:
            files = [images[i][k] for i, k in part]
            under_way.append([self._threads.submit(self._prepare, x) for x in files])
            if len(under_way) > 1:
                yield [future.result() for future in under_way.pop(0)]
        for futures in under_way:
            yield [future.result() for future in futures]

    def _prepare(self, image: bytes | np.ndarray) -> np.ndarray | str:
        if isinstance(image, np.ndarray):
            return image
        try:
            return self.prepare(image)
        except ValueError as error:
            return str(error)

    def prepare(self, image: bytes, limits: Any = None) -> np.ndarray:
        """See `QueryEncoder.prepare`."""
        encoder = self._loaded()
        from xmc_jax.images import decoding

        return encoder.prepare(
            decoding.decode(image, limits or decoding.DecodeLimits(), self._expected.alpha)
        )

    def warm_up(self) -> None:
        """See `QueryEncoder.warm_up_pictures`."""
        encoder = self._loaded()
        from xmc_jax.images import preprocessing

        jax.block_until_ready(encoder.embed([encoder.prepare(preprocessing.white(8))]))

    @functools.cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(os.cpu_count())

    def _loaded(self) -> Any:
        with self._lock:  # several threads may prepare
            return self._encoder

    @property
    def _size(self) -> int:
        return _IMAGES * jax.local_device_count()

    @functools.cached_property
    def _encoder(self) -> Any:
        expected = self._expected
        name = expected.encoder if expected.folder is None else str(self._folder / expected.folder)
        try:
            from xmc_jax.images import descriptor, encoders

            bare = expected.folder is not None or name == descriptor.NAME  # without revisions
            encoder = encoders.build(
                name,
                self._size,
                None if bare else expected.revision,
                layout=expected.layout,
                dtype=expected.dtype,
            )
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"{self._folder}: pictures need the image encoder {expected.encoder}"
                f"{f' at {expected.revision}' if expected.revision else ''}, which is not "
                f"available ({str(error).splitlines()[0]}); export with "
                '--config.export.vision=carried, install ".[vision]", or leave the pictures out'
            ) from error
        if encoder.identity["digest"] != expected.digest:
            raise ValueError(
                f"{name}: expected the image encoder of training (sha256 {expected.digest[:12]}), "
                f"found another (sha256 {encoder.identity['digest'][:12]}); set its revision"
            )
        return encoder
