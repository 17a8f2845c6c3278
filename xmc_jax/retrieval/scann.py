"""ScaNN index: approximate maximum-inner-product search on the host; scann is imported on use."""

import bisect
import dataclasses
import hashlib
import importlib.util
import json
import math
import pathlib
import re
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from xmc_jax.config import MeshConfig, ScannConfig
from xmc_jax.data.csr import Csr
from xmc_jax.files import atomic
from xmc_jax.files.digests import sha256
from xmc_jax.retrieval import exact
from xmc_jax.retrieval.metrics import drop_filtered
from xmc_jax.runtime import command, sharding

_MANIFEST = "index.json"
_ASSETS = "scann_assets.pbtxt"
# What ScaNN may be given: not its pickle, and no name that leads out of the folder.
_FILE = re.compile(r"[A-Za-z0-9_]+\.(?:npy|pb)|" + re.escape(_ASSETS))
# The list of these files, as ScaNN writes it, and nothing else that the format allows.
_ASSET = re.compile(
    r'assets \{\n  asset_type: [A-Z0-9_]+\n  asset_path: "([A-Za-z0-9_]+\.(?:npy|pb))"\n\}\n'
)
_ASSETS_END = re.compile(r"(?:trained_on_the_fly: (?:true|false)\n)?")
_SAMPLE = 1_000  # at most this many queries tune an index
# What is tried: shares of the leaves, a factor of 1.25 apart, and candidates in multiples of k.
_SHARES = tuple(0.8**i for i in reversed(range(25)))
_REORDERS = (1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 10.0)
# A candidate scored exactly takes as long as so many of a leaf's rows by their codes (2 cores of an
# AMD EPYC, D = 384, 131,073 rows).
_CANDIDATE = 50
_TOGETHER = 4  # queries that a tree is given at a time


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
    def build(
        cls,
        database: np.ndarray,
        config: ScannConfig,
        queries: np.ndarray | None = None,
        k: int = 100,
    ) -> "ScannIndex":
        """Builds an index for inner products: with many rows a tree with SOAR spilling.

        Args:
            database: f32[L, D], finite.
            config: see `ScannConfig`.
            queries: f32[Q, D], like those to come, of which up to 1,000 tune the search; rows of
                the database, which are found more easily, by default.
            k: how many are to be searched for.

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
            leaves=config.leaves or min(round(3 * math.sqrt(count)), count),
            dimensions_per_block=config.dimensions_per_block or max(2, -(-width // 256)),
        )
        builder = scann.scann_ops_pybind.builder(database, 1, "dot_product")
        exhaustive = not config.builds_tree(count)
        if exhaustive:
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
            ).reorder(1)
        with command.native_log_left_out():
            searcher = builder.build()
        index = cls(config, count, width, _digest(database), searcher)
        if exhaustive:
            return index._with(leaves_searched=1.0, reorder=1.0)
        if queries is None or not len(queries):
            queries = database
        return index._tuned(database, queries, min(k, count))

    def _with(self, **fields) -> "ScannIndex":
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **fields))

    def _tuned(self, database: np.ndarray, queries: np.ndarray, k: int) -> "ScannIndex":
        """With the cheapest search that reaches the target by two standard errors of the sample.

        Costs are counted and not timed, so that the same index is searched alike every time.
        """
        config = self.config
        shares = _SHARES if config.leaves_searched is None else (config.leaves_searched,)
        reorders = _REORDERS if config.reorder is None else (config.reorder,)
        if len(shares) == len(reorders) == 1:
            return self
        sample = queries[:: -(-len(queries) // _SAMPLE)]
        _, exactly = exact.search(sample, database, k)

        def reaches(share: float, reorder: float) -> bool:
            ids = self._with(leaves_searched=share, reorder=reorder).search(sample, k)[1]
            each = _share_found(ids, exactly, self.count)
            error = each.std() / math.sqrt(len(each))
            return each.mean() - 2 * error >= config.recall_target

        best, least = None, math.inf
        for reorder in reorders:
            at = bisect.bisect_left(shares, True, key=lambda share: reaches(share, reorder))
            if at < len(shares):
                cost = shares[at] * self.count + _CANDIDATE * reorder * k
                if cost < least:
                    best, least = (shares[at], reorder), cost
        if best is None:
            best = shares[-1], reorders[-1]
            logging.warning(
                "scann: no search finds %.1f %% of the exact %d for %d queries; the most thorough "
                "is kept: lower --config.eval.scann.recall_target, set "
                "--config.eval.scann.dimensions_per_block=1, or search exactly",
                100 * config.recall_target,
                k,
                len(sample),
            )
        return self._with(leaves_searched=best[0], reorder=best[1])

    def search(
        self, queries: np.ndarray, k: int, excluded: Csr | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """About the k rows with the highest inner product, on all cores.

        What a query finds does not depend on the queries beside it, nor on how many they are.

        Args:
            queries: f32[Q, D].
            k: how many, in [1, L].
            excluded: [Q, L], rows that each query must not find; None for none.

        Returns:
            f32[Q, k] inner products, descending, and i32[Q, k] row numbers; -inf and -1 where fewer
            than k rows are not excluded.

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
        if excluded is None or not len(excluded.indices):
            return self._nearest(queries, k)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        ids = np.full((len(queries), k), -1, np.int32)
        more = 2 ** np.ceil(np.log2(np.maximum(excluded.counts(), 1))).astype(np.int64)
        more[excluded.counts() == 0] = 0
        for number in np.unique(more):
            rows = np.flatnonzero(more == number)
            nearest = self._nearest(queries[rows], min(k + int(number), self.count))
            scores[rows], ids[rows] = drop_filtered(*nearest, excluded.take(rows).pairs(), k)
        return scores, ids

    def _nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores, ids = self._searched(queries, k, self.config.leaves_searched, self.config.reorder)
        short = np.flatnonzero(ids[:, -1] < 0)  # their leaves hold too few rows
        if len(short):
            everything = 1.0, self.count / k
            scores[short], ids[short] = self._searched(queries[short], k, *everything)
        return scores, ids

    def _searched(
        self, queries: np.ndarray, k: int, share: float, reorder: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `search`; -inf and -1 where the leaves hold too few rows."""
        options, size = {"final_num_neighbors": k}, 1
        if self.config.builds_tree(self.count):
            candidates = min(math.ceil(reorder * k), self.count)
            share = max(share, candidates / self.count)
            options["pre_reorder_num_neighbors"] = candidates
            options["leaves_to_search"] = math.ceil(share * self.config.leaves)
            size = _TOGETHER
        # ScaNN ranks leaves by other sums where a batch has one query, a few, or more than 32; as
        # it is, a query finds the same in whatever company.
        padded = np.pad(queries, ((0, -len(queries) % size), (0, 0)), mode="edge")
        ids, scores = self._searcher.search_batched_parallel(padded, batch_size=size, **options)
        ids, scores = ids[: len(queries)], scores[: len(queries)]
        missing = np.isnan(scores)  # past its candidates, ScaNN returns row 0 with score NaN
        return (
            np.where(missing, np.float32(-np.inf), scores),
            np.where(missing, -1, ids.astype(np.int32)),
        )

    def save(self, folder: epath.PathLike) -> None:
        """Writes the index to a folder of its own, local or remote, which can be moved.

        See `atomic.replaced_folder`; a folder without `index.json` does not hold an index.
        """
        with atomic.replaced_folder(folder, _MANIFEST) as local:
            self._searcher.serialize(str(local), relative_path=True)
            manifest = {
                "config": dataclasses.asdict(self.config),
                "count": self.count,
                "width": self.width,
                "database_sha256": self.digest,
                "files": {path.name: sha256(path) for path in sorted(local.iterdir())},
            }
            (local / _MANIFEST).write_text(json.dumps(manifest, indent=2))

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
            if not (type(count) is type(width) is int and type(digest) is str):
                raise TypeError(f"count {count!r:.40}, width {width!r:.40}, digest {digest!r:.40}")
            if None in dataclasses.astuple(config):
                raise ValueError("a config that leaves something open")
            others = [name for name in files if not _FILE.fullmatch(name)]
            if others or _ASSETS not in files:
                raise ValueError(f"files that ScaNN does not write: {others!r:.100}")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
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
                if not (folder / name).is_file():
                    raise ValueError(f"{folder / name}: expected a file of the index, got none")
                (folder / name).copy(epath.Path(local, name))
                if sha256(pathlib.Path(local, name)) != recorded:
                    raise ValueError(f"{folder / name}: expected sha256 {recorded}, got another")
            _check_assets(folder / _ASSETS, pathlib.Path(local, _ASSETS).read_bytes(), files)
            try:
                with command.native_log_left_out():
                    searcher = scann.scann_ops_pybind.load_searcher(local)
            except RuntimeError as error:  # of the library, whatever the files lack
                reason = " ".join(str(error).split())[:200]
                raise ValueError(
                    f"{folder}: expected a ScaNN index, got one that does not load ({reason}); "
                    "build the index again"
                ) from error
            return cls(config, count, width, digest, searcher)


def build_measured(
    database: np.ndarray, config: ScannConfig, queries: np.ndarray, k: int
) -> tuple[ScannIndex, dict[str, Any]]:
    """An index tuned on every other query, and measured on the rest; see `ScannIndex.build`.

    Returns:
        The index; its "recall" of the exact "k", and how many "queries" measured it.
    """
    index = ScannIndex.build(database, config, queries[1::2], k)
    some = queries[::2]
    measured = compare(index, np.asarray(database), some, k)
    return index, {"recall": measured["recall"], "k": k, "queries": len(some)}


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
    mesh = sharding.make_mesh(MeshConfig(data=1), jax.local_devices()[:1])
    placed = exact.place(database, mesh)
    seconds, neighbours = {}, {}
    for name, search in (
        ("scann", index.search),
        ("exact", lambda x, k: exact.search(x, placed, k)),
    ):
        search(queries[:1], k)
        start = time.perf_counter()
        _, neighbours[name] = search(queries, k)
        seconds[name] = time.perf_counter() - start
    return {
        "recall": float(_share_found(neighbours["scann"], neighbours["exact"], index.count).mean()),
        "queries_per_second": len(queries) / seconds["scann"],
        "exact_queries_per_second": len(queries) / seconds["exact"],
    }


def _share_found(ids: np.ndarray, exactly: np.ndarray, count: int) -> np.ndarray:
    """f64[Q], the share of the `exactly` i32[Q, k] that is among `ids`, which are -1 for none."""
    # Looked for by (query, row) keys; -1 matches nothing.
    row = np.arange(len(ids))[:, None] * count
    hits = np.isin(row + exactly, (row + ids)[ids >= 0])
    return hits.mean(axis=1)


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


def _check_assets(path: epath.Path, content: bytes, files: Mapping[str, str]) -> None:
    """Raises ValueError unless ScaNN's list of files names files of the index."""
    text = content.decode("latin-1")
    rest = _ASSET.sub("", text)
    outside = [name for name in _ASSET.findall(text) if name not in files]
    if outside or not _ASSETS_END.fullmatch(rest):
        name = outside[0] if outside else rest
        raise ValueError(
            f"{path}: expected names of files of the index, got {name[:80]!r}; build the index "
            "again"
        )
