"""A model as the server's answers show it."""

import functools
import urllib.parse
from importlib import metadata
from typing import Any

import numpy as np

from xmc_jax.config import ServeConfig
from xmc_jax.shipping.predictor import Predictor

PLAIN, AUGMENTED, NEIGHBOURS = "plain", "augmented", "neighbours"
"""Kinds of answers: labels by inner product, labels mixed with neighbours, documents."""

_LABELS = 10  # of a document that is shown
_REMEMBERED = 2**16  # labels, and documents, whose texts need not be looked up again
_EXAMPLES = 3
_LIMITS = (
    *("max_queries", "max_k", "max_text", "max_only", "max_exclude"),
    *("max_body", "max_image_bytes", "max_image_pixels"),
)


class ServedModel:
    """An artifact as answers show it.

    Args:
        no_images: why queries may not have images; None if they may.
    """

    def __init__(self, predictor: Predictor, no_images: str | None):
        self.predictor, self.no_images = predictor, no_images
        self.artifact = artifact = predictor.artifact
        best = AUGMENTED if artifact.ranking.enabled else PLAIN
        known = (PLAIN,) if artifact.documents is None else (PLAIN, AUGMENTED)
        self.rankings = sorted(known, key=lambda ranking: ranking != best)
        self.images_per_query = 0 if no_images else artifact.model.images.per_item
        self.label = functools.lru_cache(_REMEMBERED)(self._label)
        self._document = functools.lru_cache(_REMEMBERED)(self._read_document)

    def _label(self, row: int) -> dict[str, Any]:
        labels = self.artifact.labels
        name = labels.ids[row]
        return {"id": name, "text": labels.texts[row], "image": self.image_path("labels", name)}

    def _read_document(self, row: int) -> dict[str, Any]:
        documents = self.artifact.documents
        name, positives = documents.ids[row], documents.positives
        first = positives.indices[positives.indptr[row] : positives.indptr[row + 1]][:_LABELS]
        labels = [{key: self.label(i)[key] for key in ("id", "text")} for i in first.tolist()]
        image = self.image_path("documents", name)
        return {"id": name, "text": documents.texts[row], "image": image, "labels": labels}

    def image_path(self, kind: str, name: str) -> str | None:
        """Of the picture of a label or document, from the server's root; None without."""
        thumbnails = self.artifact.thumbnails.get(kind)
        if thumbnails is None or name not in thumbnails:
            return None
        return f"v1/{kind}/{urllib.parse.quote(name, safe='')}/image"

    def row(self, name: str) -> int | None:
        """Of a label's id."""
        try:
            return self.predictor.row(name)
        except ValueError:
            return None

    def results(
        self, scores: np.ndarray, rows: np.ndarray, cut: np.ndarray, k: int, kind: str
    ) -> list[dict[str, Any]]:
        """The best k labels or documents of each query, as JSON has them.

        Args:
            scores: f32[n, K].
            rows: i32[n, K] of labels or documents; -1 where there are no more.
            cut: bool[n], whether a text was cut; said only where it was.
            k: at most K are shown.
        """
        what, show = ("documents", self._document) if kind == NEIGHBOURS else ("labels", self.label)
        return [
            {what: [show(row) | {"score": score} for row, score in zip(*pair) if row >= 0]}
            | ({"cut": True} if is_cut else {})
            for *pair, is_cut in zip(rows[:, :k].tolist(), scores[:, :k].tolist(), cut.tolist())
        ]

    def info(self, config: ServeConfig) -> dict[str, Any]:
        """What /v1/info says."""
        artifact, manifest, documents = (
            self.artifact,
            self.artifact.manifest,
            self.artifact.documents,
        )
        examples: list[str] = []
        if documents is not None and config.show_documents:
            rows = np.linspace(0, len(documents) - 1, _EXAMPLES + 2).astype(int)[1:-1].tolist()
            examples = [documents.texts[row] for row in dict.fromkeys(rows)]
        limits = {name: getattr(config, name) for name in _LIMITS}
        return {
            "name": artifact.name,
            "digest": artifact.digest,
            "created": manifest["created"],
            "version": metadata.version("xmc_jax"),
            "dataset": manifest["dataset"]["name"],
            "labels": len(artifact.labels),
            "documents": 0 if documents is None else len(documents),
            "shows_documents": bool(documents is not None and config.show_documents),
            "rankings": self.rankings,
            "images": {
                "possible": self.no_images is None,
                "reason": self.no_images,
                "per_query": self.images_per_query,
            },
            "metrics": manifest["metrics"],
            "limits": limits,
            "examples": [text for text in examples if text.strip()],
        }
