"""The section of examples: documents with what was predicted, and labels that are confused."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np

from xmc_jax.data.store import Store
from xmc_jax.reporting import analysis, parts, pictures
from xmc_jax.reporting.analysis import DEPTH, Confused
from xmc_jax.reporting.markup import Child, element, quoted
from xmc_jax.reporting.parts import NAMES
from xmc_jax.reporting.predictions import Predictions

_EACH = 6  # examples of a kind
_PAIRS = 12
_MISSED = 4  # positives that an example names
_BEFORE = 3  # predictions of zero-shot that it names
_KINDS = {
    "best": (
        "Best",
        "most of what could be right is among the first five, with the highest scores",
    ),
    "worst": ("Worst", "nothing is right among the first five, for all their score"),
    "random": ("At random", "drawn from all documents with positives"),
}


def examples(seen: Predictions, source: Any | None) -> Element:
    """Documents with their predictions, and labels that are taken for each other.

    Args:
        seen: the predictions.
        source: where pictures are; None where none are at hand.
    """
    chosen = analysis.examples(
        seen.rankings["plain"].scores, seen.found["plain"].right, seen.positives, _EACH
    )
    shown = {kind: [_example(seen, row) for row in rows.tolist()] for kind, rows in chosen.items()}
    pairs = analysis.confused(seen.found["plain"], seen.positives, _PAIRS)
    every = [one for some in shown.values() for one in some]
    items = _Items.of(
        seen.data,
        source,
        [*(one.document for one in every), *seen.documents[pairs.example].tolist()],
        [
            *(label for one in every for label in one.labels),
            *pairs.missed.tolist(),
            *pairs.predicted.tolist(),
        ],
    )
    blocks: list[Child] = []
    for kind, (title, note) in _KINDS.items():
        if shown[kind]:
            note = element("span", {"class": "quiet"}, f" – {note}")
            cards = [_card(one, items) for one in shown[kind]]
            blocks += [
                element("h3", None, title, note),
                element("div", {"class": "examples"}, *cards),
            ]
    lead = (
        f"{seen.note}The first five predictions of the row “{NAMES['plain']}” with their scores; × "
        f"says how many training documents a label has. {items.reason}"
    )
    return parts.section("examples", "Examples", lead, *blocks, *_confused(seen, pairs, items))


@dataclasses.dataclass(frozen=True)
class _Example:
    """A test document.

    Attributes:
        document: its number.
        predicted: label, score and whether it is right, of the first predictions.
        missed: positives that are not among them, and their ranks; None beyond all predictions.
        more: missed positives that are not named.
        before: label and whether it is right, of the first predictions of zero-shot.
    """

    document: int
    predicted: tuple[tuple[int, float, bool], ...]
    missed: tuple[tuple[int, int | None], ...]
    more: int
    before: tuple[tuple[int, bool], ...]

    @property
    def labels(self) -> list[int]:
        """All labels that are named."""
        return [one[0] for one in (*self.predicted, *self.missed, *self.before)]


@dataclasses.dataclass(frozen=True, eq=False)
class _Items:
    """What is shown of documents ("test") and labels ("label").

    Attributes:
        texts: by item.
        images: by item, data URIs; not of all.
        frequency: i64[L].
        reason: why there are no images, or "".
    """

    texts: Mapping[pictures.Item, str]
    images: Mapping[pictures.Item, str]
    frequency: np.ndarray
    reason: str

    @classmethod
    def of(
        cls,
        data: Store,
        source: Any | None,
        documents: Sequence[int],
        labels: Sequence[int],
    ) -> "_Items":
        texts = {}
        for split, ids in (("test", documents), ("label", labels)):
            ids = np.unique(np.array(ids, np.int64))
            texts |= {(split, i): text for i, text in zip(ids.tolist(), data.texts(split, ids))}
        wanted = [*(("test", i) for i in documents), *(("label", i) for i in labels)]
        images, reason = pictures.thumbnails(source, data, wanted)
        return cls(texts, images, data.label_frequency, reason)

    def image(self, item: pictures.Item, kind: str) -> Element | None:
        """The picture of an item, whose text says what it is."""
        uri = self.images.get(item)
        return element("img", {"class": kind, "src": uri, "alt": ""}) if uri else None

    def text(self, item: pictures.Item) -> Element:
        text = self.texts[item]
        return quoted(text) if text.strip() else element("em", None, "no title")

    def label(self, label: int) -> list[Child]:
        """Picture, text and frequency of a label."""
        count = element("span", {"class": "quiet"}, f" ×{self.frequency[label]:,}")
        return [self.image(("label", label), "small"), self.text(("label", label)), count]


def _example(seen: Predictions, row: int) -> _Example:
    found, ranking = seen.found["plain"], seen.rankings["plain"]
    part = slice(seen.positives.indptr[row], seen.positives.indptr[row + 1])
    ranks, labels = found.rank[part], seen.positives.indices[part]
    order = np.argsort(ranks, kind="stable")
    missed = [i for i in order.tolist() if ranks[i] >= DEPTH]
    depth = found.ids.shape[1]
    before: list[tuple[int, bool]] = []
    if "zero-shot" in seen.found:
        earlier = seen.found["zero-shot"]
        before = [
            (label, bool(right))
            for label, right in zip(earlier.ids[row, :_BEFORE].tolist(), earlier.right[row])
            if label >= 0
        ]
    return _Example(
        document=int(seen.documents[row]),
        predicted=tuple(
            (label, score, bool(right))
            for label, score, right in zip(
                found.ids[row, :DEPTH].tolist(), ranking.scores[row].tolist(), found.right[row]
            )
            if label >= 0
        ),
        missed=tuple(
            (int(labels[i]), int(ranks[i]) + 1 if ranks[i] < depth else None)
            for i in missed[:_MISSED]
        ),
        more=len(missed[_MISSED:]),
        before=tuple(before),
    )


def _card(one: _Example, items: _Items) -> Element:
    document = ("test", one.document)
    rows = [
        element(
            "tr",
            None,
            element("td", {"class": "s"}, _sign(right)),
            element("td", None, *items.label(label)),
            element("td", {"class": "n"}, f"{score:.3f}"),
        )
        for label, score, right in one.predicted
    ]
    notes: list[Child] = []
    if one.missed:
        named: list[Child] = ["Missed: "]
        for i, (label, rank) in enumerate(one.missed):
            where = f" (rank {rank})" if rank else " (not found)"
            named += ["; " if i else None, *items.label(label), where]
        named.append(f"; and {one.more:,} more" if one.more else None)
        notes.append(element("p", {"class": "was"}, *named))
    if one.before:
        named = ["Zero-shot: "]
        for i, (label, right) in enumerate(one.before):
            named += ["; " if i else None, _sign(right), items.text(("label", label))]
        notes.append(element("p", {"class": "was"}, *named))
    header = element(
        "header", None, items.image(document, "item"), element("h4", None, items.text(document))
    )
    body = element("table", None, element("tbody", None, *rows))
    return element("article", {"class": "example"}, header, body, *notes)


def _sign(right: bool) -> Element:
    kind, shown, said = ("right", "✓", "right: ") if right else ("wrong", "✗", "wrong: ")
    return element(
        "span",
        {"class": f"sign {kind}"},
        element("span", {"aria-hidden": "true"}, shown),
        element("span", {"class": "hidden"}, said),
    )


def _confused(seen: Predictions, pairs: Confused, items: _Items) -> list[Child]:
    if not len(pairs.documents):
        return []
    rows = (
        (
            f"{count:,}",
            element("span", None, *items.label(missed)),
            element("span", None, *items.label(predicted)),
            items.text(("test", int(seen.documents[row]))),
        )
        for missed, predicted, count, row in zip(
            pairs.missed.tolist(),
            pairs.predicted.tolist(),
            pairs.documents.tolist(),
            pairs.example.tolist(),
        )
    )
    note = " – a positive that is not among the first five, and what is first, wrongly, instead"
    heads = ("documents", "missed", "predicted", "one of the documents")
    return [
        element("h3", None, "Confused", element("span", {"class": "quiet"}, note)),
        parts.table(heads, rows, texts=4),
    ]
