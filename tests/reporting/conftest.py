"""A dataset whose titles attack the page that shows them, and a workdir of a run over it."""

import dataclasses
import gzip
import html.parser
import json
import pathlib
import shutil

import numpy as np
import pytest

from configs import vixml
from xmc_jax.config import AugmentedConfig, EvalConfig
from xmc_jax.data import packaged, prepare, store
from xmc_jax.reporting import workdir_contents
from xmc_jax.retrieval import evaluate, saved_predictions
from xmc_jax.retrieval.evaluate import Evaluation

TRAIN, TEST, LABELS, STEP, WIDTH = 90, 50, 30, 12, 6
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=https://evil.example/x.png onerror=alert(1)>',
    "'><svg/onload=alert(1)>",
    "</style></title></svg><style>@import 'https://evil.example/a.css'</style>",
    "a &amp; b &lt;i&gt; <b>bold</b>",
    "javascript:alert(1)",
    "\u202eright to left\u202c, \x1b[31mred\x07",
    "url(https://evil.example/y.png)",
    "{{7*7}} ${7*7} <!-- ]]>",
    "long " * 2_000,
    "",
)


def title(kind: str, i: int) -> str:
    """Every other item of a split has a hostile title."""
    return f"{kind} {i}" if i % 2 else HOSTILE[i // 2 % len(HOSTILE)]


def write_raw(folder: pathlib.Path) -> None:
    generator = np.random.default_rng(0)
    weight = 1.0 / np.arange(1, LABELS + 1)

    def labels() -> list[int]:
        size = generator.integers(0, 6)
        chosen = generator.choice(LABELS, size, replace=False, p=weight / weight.sum())
        return sorted(chosen.tolist())

    for name, kind, count in (("trn", "train", TRAIN), ("tst", "test", TEST)):
        with gzip.open(folder / f"{name}.json.gz", "wt", encoding="utf-8") as file:
            for i in range(count):
                item = {"uid": f"{kind}{i}", "title": title(kind, i), "content": ""}
                file.write(json.dumps(item | {"target_ind": labels()}) + "\n")
    with gzip.open(folder / "lbl.json.gz", "wt", encoding="utf-8") as file:
        for i in range(LABELS):
            file.write(json.dumps({"uid": f"label{i}", "title": title("label", i)}) + "\n")
    for name in ("train", "test"):
        (folder / f"filter_labels_{name}.txt").write_text("")


@pytest.fixture(scope="session")
def raw(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("raw-hostile")
    write_raw(folder)
    return folder


@pytest.fixture(scope="session")
def data(raw, tmp_path_factory) -> store.Store:
    config = prepare.PrepareConfig(
        dataset="Hostile",
        data_dir=tmp_path_factory.mktemp("data-hostile"),
        tokenizer=str(packaged.minilm()),
        max_length=8,
        raw=raw,
    )
    return store.open(prepare.prepare(config))


def unit(generator, rows: int) -> np.ndarray:
    x = generator.standard_normal((rows, WIDTH)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Finished:
    """A workdir and what is in it."""

    folder: pathlib.Path
    zero_shot: Evaluation
    evaluation: Evaluation


@pytest.fixture(scope="session")
def evaluations(data) -> tuple[Evaluation, Evaluation]:
    """Before and after training: random embeddings, then labels moved towards their documents."""
    generator = np.random.default_rng(1)
    test, labels, train = (unit(generator, n) for n in (TEST, LABELS, TRAIN))
    positives = data.positives("test")
    moved = labels.copy()
    np.add.at(moved, positives.indices, 0.5 * test[positives.row_ids()])
    moved /= np.linalg.norm(moved, axis=1, keepdims=True)
    alone = EvalConfig(augmented=AugmentedConfig(enabled=False))
    before = evaluate.evaluate(test, labels, data, alone)
    after = evaluate.evaluate(test, moved, data, EvalConfig(), train)
    return before, after


def records(before: Evaluation, after: Evaluation) -> list[dict]:
    """metrics.jsonl of four epochs of three steps, the last one evaluated."""
    found = [{"step": 0, **{f"eval_zero_shot/{k}": v for k, v in before.metrics["plain"].items()}}]
    for step in range(1, STEP + 1):
        loss = 3.0 - 0.2 * step
        record = {"step": step, "train/loss": loss, "train/document_to_prototype": loss / 2}
        record |= {"train/regularizer": loss, "train/violators": 0.5 / step, "train/grad_norm": 1.5}
        record |= {"train/similarity_positive": 0.5, "train/similarity_negative": 0.1 / step}
        found.append(record | {"train/similarity_spread": 0.2, "time/documents_per_second": 99.5})
    last = {f"eval/{k}": v for k, v in after.metrics["plain"].items()}
    last |= {f"eval_augmented/{k}": v for k, v in after.metrics["augmented"].items()}
    found.append({"step": STEP, "time/eval": 1.0, **last})
    phases = {"step": 0.6, "compile": 0.3, "eval": 0.1, "data_wait": 0.0}
    return found + [{"step": STEP, **{f"time/share/{k}": v for k, v in phases.items()}}]


@pytest.fixture(scope="session")
def left(data, evaluations, tmp_path_factory) -> Finished:
    """What a run of twelve steps leaves; not to be changed."""
    before, after = evaluations
    config = vixml.get_config("tiny").to_dict()
    config["name"] = "tiny<script>"
    config["train"] |= {"batch_size": 30, "epochs": 4}
    provenance = {"data": data.digest, "backbone": {"revision": None, "sha256": "ab" * 32}}
    folder = tmp_path_factory.mktemp("left")
    evaluate.write(
        after,
        folder / "metrics.json",
        saved_predictions.path(folder, STEP),
        {"zero-shot": before.metrics["plain"]},
    )
    evaluate.write_predictions(before, saved_predictions.path(folder, 0), evaluate.sample(TEST))
    (folder / "config.json").write_text(json.dumps(config | {"provenance": provenance}))
    lines = (json.dumps(record) + "\n" for record in records(before, after))
    (folder / "metrics.jsonl").write_text("".join(lines))
    workdir_contents.write_facts(
        folder, {"step": 60.0, "compile": 30.0, "eval": 10.0, "data_wait": 0.0}
    )
    return Finished(folder, before, after)


@pytest.fixture
def finished(left, tmp_path) -> Finished:
    """A copy of it."""
    return dataclasses.replace(left, folder=shutil.copytree(left.folder, tmp_path / "run"))


class Page(html.parser.HTMLParser):
    """A page read as a browser reads it; fails on tags that do not match.

    Attributes:
        elements: (tag, attributes, text within), in the order of their ends.
        tables: rows of cells' texts, by table.
    """

    VOID = frozenset({"meta", "img", "br", "hr", "link", "input", "base"})
    RAW = frozenset({"style", "script"})

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str], str]] = []
        self.tables: list[list[list[str]]] = []
        self._open: list[tuple[str, dict[str, str], list[str]]] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs), tag
        attributes = {name: value or "" for name, value in attrs}
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        if tag in self.VOID:
            self.elements.append((tag, attributes, ""))
        else:
            self._open.append((tag, attributes, []))

    def handle_endtag(self, tag):
        opened, attributes, texts = self._open.pop()
        assert opened == tag, (opened, tag)
        text = "".join(texts)
        self.elements.append((tag, attributes, text))
        if tag in ("td", "th"):
            self.tables[-1][-1].append(text)
        if self._open:
            self._open[-1][2].append(text)

    def handle_data(self, data):
        if self._open:
            self._open[-1][2].append(data)

    def named(self, tag: str) -> list[tuple[dict[str, str], str]]:
        """(attributes, text) of the elements with a tag."""
        return [(attributes, text) for found, attributes, text in self.elements if found == tag]

    def table(self, corner: str) -> list[list[str]]:
        """The rows of the first table whose first cell says so."""
        return next(rows for rows in self.tables if rows and rows[0][:1] == [corner])


@pytest.fixture(scope="session")
def parsed() -> type[Page]:
    return Page
