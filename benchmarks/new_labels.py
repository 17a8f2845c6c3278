"""New labels without training again: a fifth of the labels held out, added after, and measured.

python -m benchmarks.new_labels --split=validation
python -m benchmarks.new_labels
python -m benchmarks.new_labels --raw=.../LF-DebianTitles-26K --variant=minilm_l3/debian_26k

Per seed a fifth of the labels is drawn and taken out of a raw dataset; training documents that have
no other label go, too. The variant is trained on what is left. Then the held-out labels are added
to its index in the ways of `WAYS`. Rows beside them:

    popularity      labels by their training documents; new ones have none and come last, by number
    zero-shot       texts of all labels, by the encoder before training
    without them    the index before they are added
    all labels      trained on everything with the same seed: what there is to be had

Each way is shown plain and retrieval-augmented, where neighbouring documents vote for trained
labels only. P@5 and R@100 are of the test documents that have held-out labels, over all their
labels; "new" of their held-out labels alone; "among new" of these, ranked among themselves; "others
P@5" is of the documents that have none. The dataset's filter is applied.

--split=validation chooses the settings: test files are not read, 14 % of the training documents are
held out by source and measured, and other labels are drawn. Compared are all combinations of
`GRID`, and some ways that are not in the package; `choose` says which one is taken.

Runs go to --workdir, where a finished one is not repeated and an interrupted one goes on
(`accuracy`). The results go to --output: "benchmark", "settings", environment and "results": by row
and kind the figures of each seed, and their mean and standard deviation; of the validation split
means, and what was chosen.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import accuracy
from benchmarks.environment import environment, save
from configs import vixml
from xmc_jax.config import AugmentedConfig, NewLabelsConfig, RunConfig
from xmc_jax.data import bundled, raw_folder
from xmc_jax.data.csr import Csr
from xmc_jax.data.raw import RawItems
from xmc_jax.data.raw_folder import RawDataset
from xmc_jax.models import dual
from xmc_jax.retrieval import augmented, exact, new_labels
from xmc_jax.retrieval.evaluate import format_table
from xmc_jax.retrieval.metrics import drop_filtered, filtered_per_document, metrics
from xmc_jax.training import build, loop

Found = dict[str, dict[str, float]]
"""Kind of retrieval, "plain" or "augmented" -> metric -> fraction."""

FRACTION = 0.2  # of the labels, held out
VALIDATION = 0.14  # of the training documents, likewise; the size of the test split
SPLITS = ("test", "validation")
COLUMNS = (
    *("P@5", "R@100", "new R@10", "new R@100"),
    *("among new P@1", "among new R@10", "among new R@100", "others P@5", "all P@5"),
)
_TEXT = NewLabelsConfig(how="text", scale=1.0)
WAYS = {
    "text": _TEXT,
    "nearest label": NewLabelsConfig(neighbours=1, threshold=0.8, temperature=0.05, scale=0.95),
    "nearest labels": NewLabelsConfig(),
}
GRID = {
    "neighbours": (1, 2, 3, 5, 10, 20),
    "threshold": (-1.0, 0.7, 0.8, 0.9),
    "temperature": (0.05, 0.1, 1.0),
    "scale": (0.9, 0.95, 1.0, 1.05),
}


def draw(num_labels: int, seed: int, split: str) -> np.ndarray:
    """bool[L]: the labels that are held out; seeds and splits draw independently."""
    generator = np.random.default_rng([seed, SPLITS.index(split)])
    held = np.zeros(num_labels, bool)
    held[generator.permutation(num_labels)[: round(FRACTION * num_labels)]] = True
    return held


def without(dataset: RawDataset, held: np.ndarray) -> RawDataset:
    """The dataset without some labels, the others renumbered in their order.

    Training documents that have no other label are left out; documents that are measured stay.

    Args:
        dataset: a whole one.
        held: bool[L].
    """
    kept = np.flatnonzero(~held)
    splits = {"label": _take(dataset.splits["label"], kept, None)}
    for split in ("train", "test"):
        left = _columns(dataset.splits[split].positives, ~held)
        rows = np.flatnonzero(left.counts()) if split == "train" else np.arange(left.rows)
        splits[split] = _take(dataset.splits[split], rows, left)
    documents, labels = dataset.filter[~held[dataset.filter[:, 1]]].T
    pairs = np.stack([documents, np.searchsorted(kept, labels)], axis=1)
    return RawDataset(splits, {}, pairs, {"train": 0, "test": 0})


def write(dataset: RawDataset, folder: pathlib.Path) -> None:
    """Writes a dataset as raw files; equal ones as equal bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, name in (("train", "trn"), ("test", "tst"), ("label", "lbl")):
        items = dataset.splits[split]
        with (folder / f"{name}.json").open("w", encoding="utf-8") as file:
            for i, uid in enumerate(items.uids):
                line = {"uid": uid, "title": items.titles[i], "content": items.contents[i]}
                if items.positives is not None:
                    first, end = items.positives.indptr[i : i + 2]
                    line["target_ind"] = items.positives.indices[first:end].tolist()
                file.write(json.dumps(line) + "\n")
    pairs = "".join(f"{document} {label}\n" for document, label in dataset.filter)
    (folder / "filter_labels_test.txt").write_text(pairs)
    (folder / "filter_labels_train.txt").write_text("")


def _take(items: RawItems, rows: np.ndarray, positives: Csr | None) -> RawItems:
    lists = [[x[i] for i in rows] for x in (items.uids, items.titles, items.contents)]
    return RawItems(*lists, None if positives is None else positives.take(rows))


def _columns(matrix: Csr, kept: np.ndarray) -> Csr:
    """Some columns of a matrix, renumbered in their order; kept is bool[columns]."""
    entries = kept[matrix.indices]
    counts = np.bincount(matrix.row_ids()[entries], minlength=matrix.rows)
    numbers = (np.cumsum(kept) - 1)[matrix.indices[entries]]
    indptr = np.concatenate([[0], np.cumsum(counts)])
    return Csr(indptr, numbers.astype(np.int32), None, int(kept.sum()))


class Ground:
    """The documents that are measured, and how.

    Args:
        positives: [M, L] of the documents.
        pairs: i32[p, 2], the filter.
        held: bool[L], the new labels.

    Attributes:
        with_new: i64[m], documents that have new labels.
        others: i64[m], documents that have old labels alone.
        depth: labels to search for, so that 100 are left by the filter.
        excluded: [M, L], the filter.
    """

    def __init__(self, positives: Csr, pairs: np.ndarray, held: np.ndarray):
        self._all, self._new, self._pairs = positives, _columns(positives, held), pairs
        self._number = np.where(held, np.cumsum(held) - 1, -1)
        self.with_new = np.flatnonzero(self._new.counts())
        self.others = np.flatnonzero((positives.counts() > 0) & (self._new.counts() == 0))
        self.depth = 100 + filtered_per_document(pairs)
        self.excluded = Csr.of_pairs(pairs, positives.rows, positives.columns)

    def measure(self, ids: np.ndarray, among_new: np.ndarray | None = None) -> dict[str, float]:
        """What rankings are worth, as fractions; see the module.

        Args:
            ids: i32[M, K] labels, best first, before the filter.
            among_new: i32[M, J] likewise, of new labels alone.
        """
        best = self._best(ids)
        found = self._of(best, self._all, self.with_new)
        found = {name: found[name] for name in ("P@5", "R@100")}
        # Old labels keep their ranks, and count for nothing.
        new = self._of(self._as_new(best), self._new, self.with_new)
        found |= {f"new {name}": new[name] for name in ("R@10", "R@100")}
        if among_new is not None:
            new = self._of(self._as_new(self._best(among_new)), self._new, self.with_new)
            found |= {f"among new {name}": new[name] for name in ("P@1", "R@10", "R@100")}
        every = np.union1d(self.with_new, self.others)
        for name, rows in (("others", self.others), ("all", every)):
            found[f"{name} P@5"] = self._of(best, self._all, rows)["P@5"]
        return found

    def _best(self, ids: np.ndarray) -> np.ndarray:
        return drop_filtered(np.zeros(ids.shape, np.float32), ids, self._pairs, 100)[1]

    def _as_new(self, ids: np.ndarray) -> np.ndarray:
        return np.where(ids < 0, -1, self._number[ids])

    def _of(self, ids: np.ndarray, positives: Csr, rows: np.ndarray) -> dict[str, float]:
        of = positives.take(rows)
        return metrics(
            ids[rows], of.indptr, of.indices, np.ones(positives.columns), (1, 5, 10, 100)
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A run, and what it makes of labels that it may not have been trained on.

    Attributes:
        held: bool[L], the new labels; the other O are old.
        test: f32[M, D], unit embeddings of the documents that are measured.
        text: f32[L, D], text embeddings before normalisation.
        index: f32[O, D], prototypes of the old labels.
        own: f32[L - O, D], prototypes of the new labels, if they were trained.
        free: f32[O, D], free vectors of the old labels.
        centroids: f32[O, D].
        combine: the run's combiner.
        documents: f32[N, D], unit embeddings of its training documents.
        positives: [N, L] of those; none is a new label, unless they were trained.
        mix: how it augments.
    """

    held: np.ndarray
    test: np.ndarray
    text: np.ndarray
    index: np.ndarray
    own: np.ndarray | None
    free: np.ndarray
    centroids: np.ndarray
    combine: new_labels.Combine
    documents: np.ndarray
    positives: Csr
    mix: AugmentedConfig

    def new(self, config: NewLabelsConfig, free: float = 1, centroids: float = 1) -> np.ndarray:
        """f32[L - O, D]: the new labels by a way of the package.

        Args:
            config: the way.
            free: factor of what is borrowed of free vectors.
            centroids: factor of what is borrowed of centroids.
        """
        text, known = self.text[self.held], _unit(self.text[~self.held])
        found = new_labels.nearest(text, known, config)
        borrowed = [
            factor * new_labels.borrowed(found, table)
            for factor, table in ((free, self.free), (centroids, self.centroids))
        ]
        return new_labels.prototypes(text, *borrowed, found, self.combine, config)

    def others(self) -> Iterator[tuple[str, np.ndarray]]:
        """Ways that are not in the package, of length 1: name, f32[L - O, D]."""
        config = dataclasses.replace(WAYS["nearest labels"], scale=1.0)
        yield "nearest labels, free vectors alone", self.new(config, centroids=0)
        yield "nearest labels, centroids alone", self.new(config, free=0)
        text, known = self.text[self.held], _unit(self.text[~self.held])
        unit, tables = _unit(text), (self.free, self.centroids)
        means = [np.broadcast_to(table.mean(axis=0), unit.shape) for table in tables]
        yield "mean of all labels", np.asarray(self.combine(text, *means))
        for strength in (0.01, 0.1, 1.0):
            gram = known.T @ known + strength * np.eye(known.shape[1], dtype=np.float32)
            told = [unit @ np.linalg.solve(gram, known.T @ table) for table in tables]
            yield f"regression on texts, ridge {strength}", np.asarray(self.combine(text, *told))
        found = new_labels.nearest(text, known, config)
        free = new_labels.borrowed(found, self.free)
        for count in (5, 20):
            _, ids = exact.search(unit, self.documents, count)
            near = self.documents[ids].mean(axis=1)
            name = f"centroid of {count} nearest documents"
            yield name, np.asarray(self.combine(text, np.zeros_like(free), near))
            yield f"{name}, free vectors of labels", np.asarray(self.combine(text, free, near))

    def rank(self, new: np.ndarray | None, ground: Ground, mixed: bool = False) -> Found:
        """What the index is worth with the new labels in it.

        Args:
            new: f32[L - O, D], their prototypes; None leaves them out.
            ground: what is measured.
            mixed: retrieval-augmented, too.
        """
        index, numbers, among = self.index, np.flatnonzero(~self.held), None
        if new is not None:
            added = np.flatnonzero(self.held)
            _, places = exact.search(self.test, new, min(ground.depth, len(new)))
            among = added[places]
            index, numbers = np.concatenate([index, new]), np.concatenate([numbers, added])
        order = np.argsort(numbers)
        index, numbers = index[order], numbers[order].astype(np.int32)
        _, places = exact.search(self.test, index, min(ground.depth, len(index)))
        found = {"plain": ground.measure(numbers[places], among)}
        if mixed:
            labels, documents = augmented.depths(self.mix, 100)
            excluded = ground.excluded.select(numbers)
            scores, places = exact.search(
                self.test, index, min(labels, len(index)), excluded=excluded
            )
            nearest = scores, np.where(places < 0, -1, numbers[places])
            near = exact.search(self.test, self.documents, min(documents, len(self.documents)))
            mix = self.positives, self.mix
            _, ids = augmented.rank(nearest, near, *mix, 100, ground.excluded)
            found["augmented"] = ground.measure(ids)
        return found


def popularity(trained: Trained, ground: Ground) -> Found:
    """All documents get the labels by their training documents, ties by number."""
    frequency = np.bincount(trained.positives.indices, minlength=len(trained.held))
    order = np.lexsort((trained.held, -frequency)).astype(np.int32)
    among = np.flatnonzero(trained.held).astype(np.int32)
    every, among = (np.tile(x, (len(trained.test), 1)) for x in (order, among))
    return {"plain": ground.measure(every, among)}


@dataclasses.dataclass(frozen=True)
class Runs:
    """The data and the runs of a split; "all" is a dataset, the others lack labels.

    Attributes:
        raw: the raw dataset.
        variant: of configs/vixml.py.
        split: "test" or "validation".
        workdir: where all of it lies.
    """

    raw: pathlib.Path
    variant: str
    split: str
    workdir: pathlib.Path

    def read(self) -> RawDataset:
        """The dataset; its documents to be measured are those of the split."""
        validation = self.split == "validation"
        files = raw_folder.find(self.raw, train_only=validation)
        return raw_folder.read(files, self.raw.name, "utf-8", VALIDATION if validation else 0)

    def train(self, name: str, seed: int) -> None:
        """Trains on a dataset that is written, unless that was done."""
        data = [f"--config.data.{field}={value}" for field, value in self._data(name).items()]
        accuracy.run(self.variant, seed, self.workdir / name, data)

    def trained(self, name: str, seed: int, held: np.ndarray) -> tuple[Trained, Trained]:
        """A trained run, and the same texts by its encoder before training.

        Args:
            name: of its dataset; "all" is written, too.
            seed: of the run.
            held: bool[L].

        Raises:
            ValueError: the variant has no prototypes.
        """
        run = build.run(RunConfig.from_dict(self._fields(name, seed)))
        if run.model.prime is None:
            raise ValueError(
                f"--variant: expected one with prototypes, got {self.variant}, whose labels are "
                "their texts, new or not"
            )
        every = run if name == "all" else build.run(RunConfig.from_dict(self._fields("all", seed)))
        _, state = loop.restore(run, self.workdir / name / f"seed{seed}")
        before = every.initial_params(every.abstract.params)
        # Free vectors, of which there may be others, are no part of an encoder.
        after = before | {k: x for k, x in state.params.items() if k != "free_vectors"}
        index, own, positives = exact.to_host(run.embed_index(state)), None, None
        positives, old = run.data.positives("train"), np.flatnonzero(~held)
        free = np.asarray(state.params["free_vectors"])[np.asarray(state.tables.free_vector_of)]
        centroids = np.asarray(state.tables.centroids, np.float32)
        if name == "all":
            index, own, free, centroids = index[old], index[held], free[old], centroids[old]
        else:
            indices = old[positives.indices].astype(np.int32)
            positives = Csr(positives.indptr, indices, None, len(held))
        combiner = {"params": run.merged(state).get("combiner", {})}
        combine = jax.jit(functools.partial(dual.combiner(run.config.prime).apply, combiner))

        trained = Trained(
            held=held,
            test=every.embed(after, "test"),
            text=every.embed(after, "label", pooled=True),
            index=index,
            own=own,
            free=free,
            centroids=centroids,
            combine=combine,
            documents=np.asarray(state.tables.document_bank, np.float32),
            positives=positives,
            mix=run.config.eval.augmented,
        )
        text = every.embed(before, "label")
        untrained = dataclasses.replace(
            trained, test=every.embed(before, "test"), text=text, index=text[old]
        )
        return trained, untrained

    def _fields(self, name: str, seed: int) -> dict[str, Any]:
        fields = vixml.get_config(self.variant).to_dict()
        fields["data"] |= self._data(name)
        fields["train"]["seed"] = seed
        return fields

    def _data(self, name: str) -> dict[str, str]:
        folder = self.workdir / name
        return {
            "dataset": f"{self.raw.name}-{self.split}-{name}",
            "raw_dir": str(folder / "raw"),
            "data_dir": str(folder / "data"),
        }


def configs() -> dict[str, NewLabelsConfig]:
    """All of `GRID`, by name, what makes no difference left out."""
    found = [dataclasses.replace(_TEXT, scale=scale) for scale in GRID["scale"]]
    for values in itertools.product(*GRID.values()):
        config = NewLabelsConfig(how="nearest", **dict(zip(GRID, values)))
        if config.neighbours > 1 or config.temperature == GRID["temperature"][0]:
            found.append(config)
    return {describe(config): config for config in found}


def describe(config: NewLabelsConfig) -> str:
    """A way as a row is called."""
    if config.how == "text":
        return f"text, scale {config.scale}"
    near = f" from {config.threshold}" if config.threshold > -1 else ""
    soft = f", temperature {config.temperature}" if config.neighbours > 1 else ""
    return f"{config.neighbours} nearest{near}{soft}, scale {config.scale}"


def choose(
    means: Mapping[str, Mapping[str, float]], neighbours: int | None = None
) -> NewLabelsConfig:
    """The borrowing way with the highest R@100 of those that cost no P@5 against texts alone.

    P@5 is of all documents, whether they have new labels or not; R@100 of those that have. Of
    equals the first of `configs`.

    Args:
        means: rows of the validation split.
        neighbours: to choose among ways that borrow from so many; None for any.
    """
    least = means[describe(_TEXT)]["all P@5"]
    fair = [
        config
        for name, config in configs().items()
        if config.how == "nearest"
        and neighbours in (None, config.neighbours)
        and means[name]["all P@5"] >= least
    ]
    if not fair:
        raise ValueError("choose: expected a way that costs no P@5, found none")
    return max(fair, key=lambda config: means[describe(config)]["R@100"])


def validate(runs: Runs, seeds: Sequence[int]) -> dict[str, Any]:
    """Means over seeds of every way on the validation split, and what is chosen by them."""
    found: dict[str, dict[int, dict]] = {}
    for seed, trained, _, ground in _prepared(runs, seeds):
        ways = ((name, trained.new(config)) for name, config in configs().items())
        others = (
            (f"{name}, scale {scale}", scale * new)
            for name, new in trained.others()
            for scale in GRID["scale"]
        )
        for name, new in itertools.chain([("without them", None)], ways, others):
            found.setdefault(name, {})[seed] = trained.rank(new, ground)
    means = {name: accuracy.summary(of, "plain")["mean"] for name, of in found.items()}
    chosen = {
        "nearest label": choose(means, 1),
        "nearest labels": choose(means),
    }
    return {
        "means": means,
        "chosen": {name: dataclasses.asdict(config) for name, config in chosen.items()},
    }


def test(runs: Runs, seeds: Sequence[int]) -> dict[str, Any]:
    """Rows of the test split, by kind of retrieval: each seed, mean and standard deviation."""
    found: dict[str, dict[int, Found]] = {}
    for seed, trained, untrained, ground in _prepared(runs, seeds):
        runs.train("all", seed)
        every, _ = runs.trained("all", seed, trained.held)
        rows = {
            "popularity": popularity(trained, ground),
            "zero-shot": untrained.rank(untrained.text[trained.held], ground),
            "without them": trained.rank(None, ground, mixed=True),
        }
        for name, config in WAYS.items():
            rows[name] = trained.rank(trained.new(config), ground, mixed=True)
        rows["all labels"] = every.rank(every.own, ground, mixed=True)
        for name, row in rows.items():
            found.setdefault(name, {})[seed] = row
    return {
        kind: {
            name: accuracy.summary(of, kind) for name, of in found.items() if kind in of[seeds[0]]
        }
        for kind in ("plain", "augmented")
    }


def _prepared(runs: Runs, seeds: Sequence[int]) -> Iterator[tuple[int, Trained, Trained, Ground]]:
    """Of each seed: itself, its run, the untrained encoder, and what is measured."""
    dataset = runs.read()
    write(dataset, runs.workdir / "all" / "raw")
    for seed in seeds:
        held = draw(len(dataset.splits["label"].titles), seed, runs.split)
        name = f"without{seed}"
        write(without(dataset, held), runs.workdir / name / "raw")
        runs.train(name, seed)
        ground = Ground(dataset.splits["test"].positives, dataset.filter, held)
        print(
            f"seed {seed}: {held.sum():,} of {len(held):,} labels held out; "
            f"{len(ground.with_new):,} documents have some, {len(ground.others):,} others alone",
            flush=True,
        )
        yield seed, *runs.trained(name, seed, held), ground


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def show(split: str, results: Mapping[str, Any]) -> None:
    """Prints the tables."""
    if split == "validation":
        ordered = sorted(results["means"].items(), key=lambda row: -row[1]["R@100"])
        print(f"\nvalidation split, means, percent\n\n{format_table(dict(ordered), COLUMNS)}")
        for name, config in results["chosen"].items():
            print(f"{name}: {describe(NewLabelsConfig(**config))}")
        return
    for kind, rows in results.items():
        for of in ("mean", "standard deviation"):
            if all(of in row for row in rows.values()):
                table = format_table({name: row[of] for name, row in rows.items()}, COLUMNS)
                print(f"\ntest split, {kind}, {of}, percent\n\n{table}")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs a command line; what it printed, as it is written to --output."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--raw",
        type=pathlib.Path,
        default=bundled.path("LF-DebianTitles-3K"),
        help="raw dataset folder; the bundled one by default",
    )
    parser.add_argument("--variant", default="", help="of configs/vixml.py; its default if empty")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/new_labels"))
    parser.add_argument("--output", type=pathlib.Path, help="JSON file of the results")
    arguments = parser.parse_args(argv)
    split, name = arguments.split, arguments.raw.name
    try:
        folder = accuracy.run_folder(arguments.variant, [])
        workdir = arguments.workdir / folder / f"{name}-{split}"
        runs = Runs(arguments.raw, arguments.variant, split, workdir)
        results = (test if split == "test" else validate)(runs, arguments.seeds)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    show(split, results)
    content = {
        "benchmark": "new_labels",
        "settings": {
            "dataset": name,
            "variant": arguments.variant or vixml.DEFAULT,
            "split": split,
            "held_out": FRACTION,
            "seeds": arguments.seeds,
        },
        **environment(accuracy.PACKAGES),
        "results": results,
    }
    if split == "test":
        content["settings"]["ways"] = {n: dataclasses.asdict(c) for n, c in WAYS.items()}
    if arguments.output:
        save(arguments.output, content)
    return content


if __name__ == "__main__":
    main()
