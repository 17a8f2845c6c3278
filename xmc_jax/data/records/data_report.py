"""What is in records: a report as JSON, and as text with bars."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from xmc_jax.data.records.record_scan import Scan
from xmc_jax.runtime.wording import counted

_BAR = 40  # characters of the longest bar
_DOCUMENTS = ("train", "test", "validation")  # the last one where there are any
_ROWS = {
    "documents": "documents",
    "labels": "labels",
    "pairs": "pairs of a document and a label",
    "without_labels": "documents without labels",
    "without_documents": "labels without training documents",
    "repeated_labels": "labels that a document repeats",
    "filter_pairs": "pairs that may not be predicted",
    "empty_texts": "empty texts",
    "duplicate_texts": "texts that an earlier one has",
    "with_image": "items with images",
    "images": "images",
    "images_missing": "image files that do not exist",
}
_OPTIONAL_ROWS = ("with_image", "images", "images_missing", "repeated_labels")
_HISTOGRAMS = {
    "words_per_document": "words per document",
    "words_per_label": "words per label",
    "labels_per_document": "labels per document",
}


def make(scan: Scan, treated: str, unlabelled: Sequence[str] = ()) -> dict[str, Any]:
    """Counts of a scan; they follow from the records alone, not from their format.

    Args:
        unlabelled: names of test files without labels.
    """
    labels, documents = scan.labels, scan.documents
    chosen = {split: scan.of(split) for split in _DOCUMENTS}
    owner = documents.owners[~scan.filtered]
    counts = np.bincount(owner, minlength=len(documents))
    positive = np.asarray(documents.labels)[~scan.filtered]
    in_train, in_test = (
        np.bincount(positive[chosen[split][owner]], minlength=len(labels))
        for split in ("train", "test")
    )
    of_filter = documents.filter[:, 0]
    text, label_text = documents.first_of_text(), labels.first_of_text()
    again = text != np.arange(len(documents))
    splits = {}
    for split, rows in chosen.items():
        if split == "validation" and not rows.any():
            continue
        splits[split] = {
            "documents": int(rows.sum()),
            "pairs": int(counts[rows].sum()),
            "without_labels": int((counts[rows] == 0).sum()),
            "repeated_labels": int(np.asarray(documents.repeated)[rows].sum()),
            "filter_pairs": int(rows[of_filter].sum()),
            "empty_texts": int(documents.blank[rows].sum()),
            "duplicate_texts": int(again[rows].sum()),
            **_images(np.asarray(documents.images)[rows], np.asarray(documents.missing)[rows]),
        }
    splits["test"]["positives_filtered"] = int(scan.filtered.sum())
    splits["test"]["drawn"] = scan.drawn
    unseen = (in_test > 0) & (in_train == 0)
    joined = scan.joined()
    return {
        **splits,
        "label": {
            "labels": len(labels),
            "without_documents": int((in_train == 0).sum()),
            "empty_texts": int(labels.blank.sum()),
            "duplicate_texts": int((label_text != np.arange(len(labels))).sum()),
            "ids_as_texts": scan.ids_as_texts,
            **_images(np.asarray(labels.images), np.asarray(labels.missing)),
        },
        "test_files_without_labels": list(unlabelled),
        "unknown_labels": {
            "treated": treated,
            "ids": len(scan.unknown_ids),
            "pairs": scan.unknown_pairs,
            "filter_pairs": scan.filter_unknown,
            "joined": joined and dict(zip(("separator", "ids", "first"), joined)),
        },
        "groups": {
            "count": len(np.unique(scan.groups)),
            "largest": int(np.bincount(scan.groups).max()),
        },
        "across_the_split": _across(scan, "test"),
        **({"across_validation": _across(scan, "validation")} if "validation" in splits else {}),
        "unseen_test_labels": {
            "labels": int(unseen.sum()),
            "of": int((in_test > 0).sum()),
            "pairs": int(in_test[unseen].sum()),
        },
        "words_per_document": _histogram(np.asarray(documents.words)),
        "words_per_label": _histogram(np.asarray(labels.words)),
        "labels_per_document": _histogram(counts),
        "refusal": scan.refusal,
    }


def text(report: Mapping[str, Any]) -> str:
    """A report for a terminal; also one that an earlier version made."""
    splits = [split for split in (*_DOCUMENTS, "label") if split in report]
    lines = [f"{'':34}" + "".join(f"{split:>12}" for split in splits)]
    for key, title in _ROWS.items():
        values = [report[split].get(key) for split in splits]
        if any(values) or key not in _OPTIONAL_ROWS:
            cells = "".join(f"{'' if value is None else f'{value:,}':>12}" for value in values)
            lines.append(f"{title:34}{cells}".rstrip())
    unseen = report["unseen_test_labels"]
    lines.append(
        f"labels of test documents that no training document has: {unseen['labels']:,} of "
        f"{unseen['of']:,} ({unseen['labels'] / max(unseen['of'], 1):.1%}), in "
        f"{unseen['pairs'] / max(report['test']['pairs'], 1):.1%} of the pairs"
    )
    groups = report["groups"]
    if groups["count"] < sum(report[split]["documents"] for split in splits if split != "label"):
        largest = counted(groups["largest"], "document")
        lines.append(f"groups: {groups['count']:,}, the largest of {largest}")
    if report["test"].get("drawn"):
        lines.append("the test documents were drawn: --test_fraction, --split_seed")
    if cut := report.get("cut"):
        lines.append(
            f"texts of more than {cut['max_length']} tokens of {cut['tokenizer']} (--max_length), "
            f"which are cut: {counted(cut['document'], 'document')}, "
            f"{counted(cut['label'], 'label')}"
        )
    lines += [f"! {remark}" for remark in _remarks(report)]
    for key, title in _HISTOGRAMS.items():
        lines += ["", *_bars(title, report[key])]
    return "\n".join(lines)


def _remarks(report: Mapping[str, Any]) -> Iterator[str]:
    """What somebody should look at, in words."""
    splits = [report[split] for split in (*_DOCUMENTS, "label") if split in report]
    for name in report.get("test_files_without_labels", ()):
        yield (
            f"{name} has no labels: it is not used for evaluation; python -m xmc_jax.main "
            f"--mode=predict --artifact=RUN/export --input={name} --output=predictions.jsonl ranks "
            "labels for it"
        )
    if report["label"].get("ids_as_texts"):
        yield "the labels have ids alone: their ids are taken for their texts"
    unknown = report["unknown_labels"]
    if unknown["ids"]:
        treated = {"add": "made labels of, their ids being their texts", "drop": "left out"}
        ids, pairs = counted(unknown["ids"], "unknown label"), counted(unknown["pairs"], "pair")
        yield f"{ids}, in {pairs}: {treated[unknown['treated']]}"
    if joined := unknown.get("joined"):
        yield (
            f"{joined['ids']:,} of these have {joined['separator']!r} in their id, as "
            f"{joined['first']!r:.60}: if that is several labels, "
            f"--separator={joined['separator']!r}"
        )
    if unknown["filter_pairs"]:
        yield f"{counted(unknown['filter_pairs'], 'unknown label')} in filters: left out"
    if repeated := sum(split.get("repeated_labels", 0) for split in splits):
        labels = counted(repeated, "label repeats", "labels repeat")
        yield f"{labels} one of the same document: counted once"
    if filtered := report["test"]["positives_filtered"]:
        labels = counted(filtered, "label")
        yield f"{labels} of test documents taken out, since they may not be predicted"
    for split, key in (("test", "across_the_split"), ("validation", "across_validation")):
        for shared, what in (
            ("texts", "a text that training has, too"),
            ("plain_texts", "a text that differs from one of training in capitals or blanks alone"),
            ("groups", "a group that training has, too"),
        ):
            if count := report.get(key, {}).get(shared):
                yield f"{counted(count, f'{split} document has', f'{split} documents have')} {what}"
    if missing := sum(split["images_missing"] for split in splits):
        yield counted(missing, "image file does not exist", "image files do not exist")


def _across(scan: Scan, split: str) -> dict[str, int]:
    """Documents of a split that share something with some training document."""
    documents = scan.documents
    train, other, text = scan.of("train"), scan.of(split), ~documents.blank

    def shared(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
        result = np.zeros(len(documents), bool)
        result[other & counts] = np.isin(first[other & counts], first[train & counts])
        return result

    equal = shared(documents.first_of_text(), text)
    alike = shared(documents.first_of_plain_text(), text)
    return {
        "texts": int(equal.sum()),
        "plain_texts": int((alike & ~equal).sum()),
        "groups": int(shared(documents.first_of_group(), np.ones(len(documents), bool)).sum()),
    }


def _images(images: np.ndarray, missing: np.ndarray) -> dict[str, int]:
    return {
        "with_image": int((images > 0).sum()),
        "images": int(images.sum()),
        "images_missing": int(missing.sum()),
    }


def _histogram(values: np.ndarray) -> dict[str, Any]:
    """Mean and percentiles, and counts of 0, 1, 2, 3-4, 5-8, ...: by powers of two."""
    percentiles = (50, 90, 99, 100)
    if not len(values):
        return {"mean": 0.0, **{f"p{p}": 0 for p in percentiles}, "counts": [0]}
    slots = np.ceil(np.log2(np.maximum(values, 1))).astype(int) + (values > 0)
    return {
        "mean": round(float(values.mean()), 2),
        **{f"p{p}": int(np.percentile(values, p)) for p in percentiles},
        "counts": np.bincount(slots).tolist(),
    }


def _bars(title: str, histogram: Mapping[str, Any]) -> list[str]:
    counts = histogram["counts"]
    median, most = histogram["p50"], histogram["p100"]
    lines = [f"{title}: mean {histogram['mean']:,}, median {median:,}, at most {most:,}"]
    for slot, count in enumerate(counts):
        first, last = (slot, slot) if slot < 2 else ((1 << slot - 2) + 1, 1 << slot - 1)
        span = f"{first:,}" if first == last else f"{first:,}-{last:,}"
        bar = "#" * -(-_BAR * count // max(*counts, 1))
        if count or any(counts[:slot]):
            lines.append(f"{span:>15} {count:>12,} {bar}".rstrip())
    return lines
