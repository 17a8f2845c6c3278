"""ScaNN index: approximate maximum-inner-product search on the host; scann is imported on use."""

import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import pathlib
import tempfile
import time
from typing import Any

import numpy as np
from etils import epath

from xmc_jax.retrieval import exact

_MANIFEST = "index.json"


@dataclasses.dataclass(frozen=True)
class ScannConfig:
    """How an index is built and searched; what is None follows from the database [L, D].

    Attributes:
        brute_force_below: a database of fewer rows is searched exhaustively.
        leaves: of the tree; sqrt(L) by default.
        leaves_searched: fraction of the leaves that a query visits; more where they hold too few.
        dimensions_per_block: quantised together; 2, or what makes 256 blocks of a larger D, which
            ScaNN's fast path needs.
        reorder: candidates scored exactly, in multiples of k.
    """

    brute_force_below: int = 20_000
    leaves: int | None = None
    leaves_searched: float = 0.3
    dimensions_per_block: int | None = None
    reorder: int = 4

    def __post_init__(self):
        for name in ("leaves", "dimensions_per_block", "reorder"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"eval.scann.{name}: expected at least 1, got {value}")
        if not 0 < self.leaves_searched <= 1:
            raise ValueError(
                f"eval.scann.leaves_searched: expected a fraction of the leaves, got "
                f"{self.leaves_searched}"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class ScannIndex:
    """A built index.

    Attributes:
        config: what it was built with, nothing left None.
        count: L.
        width: D.
        digest: SHA-256 of the database's float32 bytes.
    """

    config: ScannConfig
    count: int
    width: int
    digest: str
    _searcher: Any

    @classmethod
    def build(cls, database: np.ndarray, config: ScannConfig) -> "ScannIndex":
        """Builds an index for inner products; above `brute_force_below` a tree with SOAR spilling.

        Args:
            database: f32[L, D], finite.
            config: see `ScannConfig`.

        Raises:
            ValueError: scann is not installed, or an embedding is not finite.
        """
        scann = _import()
        database = np.ascontiguousarray(database, np.float32)
        count, width = database.shape
        if not np.isfinite(database).all():
            raise ValueError("scann: expected finite embeddings in the database, got others")
        config = dataclasses.replace(
            config,
            leaves=config.leaves or round(math.sqrt(count)),
            dimensions_per_block=config.dimensions_per_block or max(2, -(-width // 256)),
        )
        builder = scann.scann_ops_pybind.builder(database, 1, "dot_product")
        if count < config.brute_force_below:
            builder = builder.score_brute_force()
        else:
            builder = builder.tree(
                num_leaves=config.leaves,
                num_leaves_to_search=config.leaves,
                training_sample_size=min(count, 250_000),
                soar_lambda=1.5,
            )
            builder = builder.score_ah(
                config.dimensions_per_block, anisotropic_quantization_threshold=0.2
            ).reorder(config.reorder)
        return cls(config, count, width, _digest(database), builder.build())

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """About the k rows with the highest inner product, on all cores.

        Args:
            queries: f32[Q, D].
            k: how many, in [1, L].

        Returns:
            f32[Q, k] inner products, descending, and i32[Q, k] row numbers; -inf and -1 where too
            few candidates were found.

        Raises:
            ValueError: k or the queries' width does not fit.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.width:
            raise ValueError(
                f"scann: expected queries [Q, {self.width}], got shape {queries.shape}"
            )
        if not 1 <= k <= self.count:
            raise ValueError(f"scann: expected k in [1, {self.count}], the rows indexed, got {k}")
        options = {"final_num_neighbors": k}
        if self.count >= self.config.brute_force_below:
            candidates = min(self.config.reorder * k, self.count)
            share = max(self.config.leaves_searched, candidates / self.count)
            options["pre_reorder_num_neighbors"] = candidates
            options["leaves_to_search"] = math.ceil(share * self.config.leaves)
        ids, scores = self._searcher.search_batched_parallel(queries, **options)
        missing = np.isnan(scores)  # past its candidates, ScaNN returns row 0 with score NaN
        return (
            np.where(missing, np.float32(-np.inf), scores),
            np.where(missing, -1, ids.astype(np.int32)),
        )

    def save(self, folder: epath.PathLike) -> None:
        """Writes the index; its folder, local or remote, can be moved.

        `index.json` goes last: a folder without it does not hold an index.
        """
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _MANIFEST).unlink(missing_ok=True)
        with tempfile.TemporaryDirectory() as local:
            self._searcher.serialize(local, relative_path=True)
            files = {name: _file_digest(local, name) for name in sorted(os.listdir(local))}
            for name in files:
                epath.Path(local, name).copy(folder / name, overwrite=True)
        manifest = {
            "config": dataclasses.asdict(self.config),
            "count": self.count,
            "width": self.width,
            "database_sha256": self.digest,
            "files": files,
        }
        (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2))

    @classmethod
    def load(cls, folder: epath.PathLike, database: np.ndarray | None = None) -> "ScannIndex":
        """Reads what `save` wrote.

        Args:
            folder: see `save`.
            database: f32[L, D] that the index must be of; not checked by default.

        Raises:
            ValueError: there is no index, a file is missing or damaged, or the database differs.
        """
        scann = _import()
        folder = epath.Path(folder)
        try:
            manifest = json.loads((folder / _MANIFEST).read_text())
            count, width = manifest["count"], manifest["width"]
            digest, files = manifest["database_sha256"], manifest["files"]
            config = ScannConfig(**manifest["config"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{folder / _MANIFEST}: expected the description of a ScaNN index, got {error!r}; "
                f"build the index again"
            ) from error
        if database is not None:
            database = np.ascontiguousarray(database, np.float32)
            if database.shape != (count, width) or _digest(database) != digest:
                raise ValueError(
                    f"{folder}: expected an index of the given {list(database.shape)} embeddings "
                    f"(sha256 {_digest(database)[:8]}), got one of [{count}, {width}] "
                    f"(sha256 {digest[:8]}); build the index again"
                )
        # Only files that `save` recorded reach ScaNN, which would also read pickles lying there.
        with tempfile.TemporaryDirectory() as local:
            for name, recorded in files.items():
                if not (folder / name).exists():
                    raise ValueError(f"{folder / name}: expected a file of the index, got none")
                (folder / name).copy(epath.Path(local, os.path.basename(name)))
                if _file_digest(local, name) != recorded:
                    raise ValueError(f"{folder / name}: expected sha256 {recorded}, got another")
            return cls(config, count, width, digest, scann.scann_ops_pybind.load_searcher(local))


def compare(
    index: ScannIndex, database: np.ndarray, queries: np.ndarray, k: int
) -> dict[str, float]:
    """The index against exact search.

    Args:
        index: an index of `database`.
        database: f32[L, D].
        queries: f32[Q, D].
        k: how many to retrieve.

    Returns:
        "recall", the mean fraction of the exact k that the index finds; "queries_per_second" and
        "exact_queries_per_second", each after a warm-up.
    """
    seconds, found = {}, {}
    for name, search in (
        ("scann", index.search),
        ("exact", lambda x, k: exact.search(x, database, k)),
    ):
        search(queries[:1], k)
        start = time.perf_counter()
        _, found[name] = search(queries, k)
        seconds[name] = time.perf_counter() - start
    # Searched by (query, row) keys; -1 matches nothing.
    row = np.arange(len(queries))[:, None] * index.count
    hits = np.isin((row + found["scann"])[found["scann"] >= 0], row + found["exact"]).sum()
    return {
        "recall": float(hits / found["exact"].size),
        "queries_per_second": len(queries) / seconds["scann"],
        "exact_queries_per_second": len(queries) / seconds["exact"],
    }


def available() -> bool:
    """Whether the scann package is installed."""
    return importlib.util.find_spec("scann") is not None


def require() -> None:
    """Raises a ValueError with the remedy where scann is not installed."""
    _import()


def _import():
    try:
        import scann
    except ImportError as error:
        raise ValueError(
            "scann: expected the scann package, got none; it ships for x86-64 Linux and Python "
            "below 3.14 only: pip install scann there, or search exactly with "
            "--config.eval.index=exact"
        ) from error
    return scann


def _digest(database: np.ndarray) -> str:
    return hashlib.sha256(database).hexdigest()


def _file_digest(folder: str, name: str) -> str:
    with pathlib.Path(folder, os.path.basename(name)).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
