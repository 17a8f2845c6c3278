"""What is in records: a report as JSON, and as text with bars."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from xmc_jax.data.record_scan import Scan

_BAR = 40  # characters of the longest bar


def make(scan: Scan, treated: str) -> dict[str, Any]:
    """Counts of a scan; they follow from the records alone, not from their format.

    Args:
        scan: see `Scan`.
        treated: what was done with unknown labels.
    """
    labels, documents, test = scan.labels, scan.documents, scan.test
    chosen = {"train": np.flatnonzero(~test), "test": np.flatnonzero(test)}
    owner = documents.owners[~scan.filtered]
    counts = np.bincount(owner, minlength=len(documents))
    tested, positive = test[owner], documents.labels[~scan.filtered]
    in_train = np.bincount(positive[~tested], minlength=len(labels))
    in_test = np.bincount(positive[tested], minlength=len(labels))
    of_filter = documents.filter[:, 0]
    text, label_text = documents.first_of_text(), labels.first_of_text()
    again = text != np.arange(len(documents))
    splits = {}
    for split, rows in chosen.items():
        splits[split] = {
            "documents": len(rows),
            "pairs": int(counts[rows].sum()),
            "without_labels": int((counts[rows] == 0).sum()),
            "filter_pairs": int(np.isin(of_filter, rows).sum()),
            "empty_texts": int(documents.blank[rows].sum()),
            "duplicate_texts": int(again[rows].sum()),
            **_images(documents.images[rows], documents.missing[rows]),
        }
    splits["test"]["positives_filtered"] = int(scan.filtered.sum())
    unseen = (in_test > 0) & (in_train == 0)
    group = documents.first_of_group()
    return {
        **splits,
        "label": {
            "labels": len(labels),
            "without_documents": int((in_train == 0).sum()),
            "empty_texts": int(labels.blank.sum()),
            "duplicate_texts": int((label_text != np.arange(len(labels))).sum()),
            **_images(labels.images, labels.missing),
        },
        "unknown_labels": {
            "treated": treated,
            "ids": scan.unknown[0],
            "pairs": scan.unknown[1],
            "filter_pairs": scan.filter_unknown,
        },
        "groups": {
            "count": len(np.unique(scan.groups)),
            "largest": int(np.bincount(scan.groups).max()),
        },
        "across_the_split": {
            "texts": _shared(text[~documents.blank], test[~documents.blank]),
            "groups": _shared(group, test),
        },
        "unseen_test_labels": {
            "labels": int(unseen.sum()),
            "of": int((in_test > 0).sum()),
            "pairs": int(in_test[unseen].sum()),
        },
        "words_per_document": _histogram(documents.words),
        "words_per_label": _histogram(labels.words),
        "labels_per_document": _histogram(counts),
    }


def text(report: Mapping[str, Any]) -> str:
    """A report for a terminal."""
    rows = {
        "documents": "documents",
        "labels": "labels",
        "pairs": "pairs of a document and a label",
        "without_labels": "documents without labels",
        "without_documents": "labels without training documents",
        "filter_pairs": "pairs that may not be predicted",
        "empty_texts": "empty texts",
        "duplicate_texts": "texts that an earlier one has",
        "with_image": "items with images",
        "images": "images",
        "images_missing": "image files that are not there",
    }
    splits = ("train", "test", "label")
    lines = [f"{'':34}{'train':>12}{'test':>12}{'label':>12}"]
    for key, said in rows.items():
        values = [report[split].get(key) for split in splits]
        if any(values) or not key.startswith(("with_image", "images")):
            cells = "".join(f"{'' if value is None else f'{value:,}':>12}" for value in values)
            lines.append(f"{said:34}{cells}".rstrip())
    unseen = report["unseen_test_labels"]
    lines.append(
        f"labels of test documents that no training document has: {unseen['labels']:,} of "
        f"{unseen['of']:,} ({unseen['labels'] / max(unseen['of'], 1):.1%}), in "
        f"{unseen['pairs'] / max(report['test']['pairs'], 1):.1%} of the pairs"
    )
    groups = report["groups"]
    total = report["train"]["documents"] + report["test"]["documents"]
    if groups["count"] < total:
        lines.append(f"groups: {groups['count']:,}, the largest of {groups['largest']:,} documents")
    lines += [f"! {remark}" for remark in _remarks(report)]
    for key, said in (
        ("words_per_document", "words per document"),
        ("words_per_label", "words per label"),
        ("labels_per_document", "labels per document"),
    ):
        lines += ["", *_bars(said, report[key])]
    return "\n".join(lines)


def _remarks(report: Mapping[str, Any]) -> list[str]:
    """What somebody should look at, in words."""
    unknown, across = report["unknown_labels"], report["across_the_split"]
    done = {"add": "made labels of, their ids being their texts", "drop": "left out"}
    remarks = []
    if unknown["ids"]:
        remarks.append(
            f"{unknown['ids']:,} unknown labels, in {unknown['pairs']:,} pairs: "
            f"{done[unknown['treated']]}"
        )
    if unknown["filter_pairs"]:
        remarks.append(f"{unknown['filter_pairs']:,} unknown labels in filters: left out")
    if report["test"]["positives_filtered"]:
        remarks.append(
            f"{report['test']['positives_filtered']:,} labels of test documents taken out, since "
            "they may not be predicted"
        )
    for key, said in (("texts", "a text"), ("groups", "a group")):
        if across[key]:
            remarks.append(f"{across[key]:,} test documents have {said} that training has, too")
    missing = sum(report[split]["images_missing"] for split in ("train", "test", "label"))
    if missing:
        remarks.append(f"{missing:,} image files are not there")
    return remarks


def _images(images: np.ndarray, missing: np.ndarray) -> dict[str, int]:
    return {
        "with_image": int((images > 0).sum()),
        "images": int(images.sum()),
        "images_missing": int(missing.sum()),
    }


def _shared(first: np.ndarray, test: np.ndarray) -> int:
    """Test documents that share a text or a group with some training document."""
    return int(np.isin(first[test], first[~test]).sum())


def _histogram(values: np.ndarray) -> dict[str, Any]:
    """Mean and percentiles, and counts of 0, 1, 2, 3-4, 5-8, ...: by powers of two."""
    slots = np.ceil(np.log2(np.maximum(values, 1))).astype(int) + (values > 0)
    return {
        "mean": round(float(values.mean()), 2),
        **{f"p{p}": int(np.percentile(values, p)) for p in (50, 90, 99, 100)},
        "counts": np.bincount(slots).tolist(),
    }


def _bars(said: str, histogram: Mapping[str, Any]) -> list[str]:
    counts = histogram["counts"]
    median, most = histogram["p50"], histogram["p100"]
    lines = [f"{said}: mean {histogram['mean']:,}, median {median:,}, at most {most:,}"]
    for slot, count in enumerate(counts):
        first, last = (slot, slot) if slot < 2 else ((1 << slot - 2) + 1, 1 << slot - 1)
        span = f"{first:,}" if first == last else f"{first:,}-{last:,}"
        bar = "#" * -(-_BAR * count // max(counts))
        if count or any(counts[:slot]):
            lines.append(f"{span:>15} {count:>12,} {bar}".rstrip())
    return lines
