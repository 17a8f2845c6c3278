"""Values of the section of examples: documents with predictions, and confused labels."""

from typing import Any

import numpy as np

from xmc_jax.reporting import analysis, embedded_images
from xmc_jax.reporting.analysis import DEPTH
from xmc_jax.reporting.predictions import MatchedPredictions

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


def examples(matched: MatchedPredictions, source: Any | None) -> dict[str, Any]:
    """Documents with their predictions, and labels that are taken for each other.

    Args:
        source: the source of pictures, a `vision.sources.Place`; None without.
    """
    plain = matched.hits["plain"]
    scores = matched.rankings["plain"].scores
    chosen = analysis.examples(scores, plain.right, matched.positives, _EACH)
    kinds = [
        (*_KINDS[kind], [_card(matched, row) for row in rows.tolist()])
        for kind, rows in chosen.items()
    ]
    pairs = analysis.confused(plain, matched.positives, _PAIRS)
    documents = matched.documents[pairs.example]
    columns = pairs.missed, pairs.predicted, pairs.documents, documents
    confused = list(zip(*(column.tolist() for column in columns)))
    cards = [card for _, _, of_kind in kinds for card in of_kind]
    wanted = {
        "test": [*(card["document"] for card in cards), *documents.tolist()],
        "label": [
            *(
                entry[0]
                for card in cards
                for entry in (*card["predicted"], *card["missed"], *card["before"])
            ),
            *pairs.missed.tolist(),
            *pairs.predicted.tolist(),
        ],
    }
    texts = {}
    for split, numbers in wanted.items():
        ids = np.unique(np.array(numbers, np.int64))
        of_split = matched.data.texts(split, ids)
        texts |= {(split, i): text for i, text in zip(ids.tolist(), of_split)}
    items = [(split, i) for split, numbers in wanted.items() for i in numbers]
    images, reason = embedded_images.data_uris(source, matched.data, items)
    return {
        "kinds": kinds,
        "confused": confused,
        "texts": texts,
        "images": images,
        "reason": reason,
        "frequency": matched.data.label_frequency,
    }


def _card(matched: MatchedPredictions, row: int) -> dict[str, Any]:
    """A document: its number, and labels by number."""
    hits, scores = matched.hits["plain"], matched.rankings["plain"].scores
    part = slice(matched.positives.indptr[row], matched.positives.indptr[row + 1])
    ranked = sorted(zip(hits.rank[part].tolist(), matched.positives.indices[part].tolist()))
    missed = [
        (label, rank + 1 if rank < hits.ids.shape[1] else None)
        for rank, label in ranked
        if rank >= DEPTH
    ]
    predicted = zip(hits.ids[row, :DEPTH].tolist(), scores[row].tolist(), hits.right[row].tolist())
    before = []
    if "zero-shot" in matched.hits:
        earlier = matched.hits["zero-shot"]
        before = list(zip(earlier.ids[row, :_BEFORE].tolist(), earlier.right[row].tolist()))
    return {
        "document": int(matched.documents[row]),
        "predicted": [entry for entry in predicted if entry[0] >= 0],
        "missed": missed[:_MISSED],
        "more": len(missed[_MISSED:]),
        "before": [entry for entry in before if entry[0] >= 0],
    }
