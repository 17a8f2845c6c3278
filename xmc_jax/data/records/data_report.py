"""What is in records: a report as JSON, and as text with bars."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xmc_jax.data.records.record_scan import Scan
from xmc_jax.runtime.wording import counted

_BAR = 40  # characters of the longest bar
_DOCUMENTS = ("train", "test", "validation")  # the last one where there are any


def make(scan: Scan, treated: str, unlabelled: Sequence[str] = ()) -> dict[str, Any]:
    """Counts of a scan; they follow from the records alone, not from their format.

    Args:
        scan: see `Scan`.
        treated: what was done with unknown labels.
        unlabelled: names of test files without labels.
    """
    labels, documents = scan.labels, scan.documents
    chosen = {split: scan.of(split) for split in _DOCUMENTS}
    owner = documents.owners[~scan.filtered]
    counts = np.bincount(owner, minlength=len(documents))
    positive = documents.labels[~scan.filtered]
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
            "repeated_labels": int(documents.repeated[rows].sum()),
            "filter_pairs": int(rows[of_filter].sum()),
            "empty_texts": int(documents.blank[rows].sum()),
            "duplicate_texts": int(again[rows].sum()),
            **_images(documents.images[rows], documents.missing[rows]),
        }
    splits["test"]["positives_filtered"] = int(scan.filtered.sum())
    splits["test"]["drawn"] = scan.drawn
    unseen = (in_test > 0) & (in_train == 0)
    return {
        **splits,
        "label": {
            "labels": len(labels),
            "without_documents": int((in_train == 0).sum()),
            "empty_texts": int(labels.blank.sum()),
            "duplicate_texts": int((label_text != np.arange(len(labels))).sum()),
            "ids_as_texts": scan.ids_as_texts,
            **_images(labels.images, labels.missing),
        },
        "test_files_without_labels": list(unlabelled),
        "unknown_labels": {
            "treated": treated,
            "ids": scan.unknown[0],
            "pairs": scan.unknown[1],
            "filter_pairs": scan.filter_unknown,
            "joined": scan.joined and dict(zip(("separator", "ids", "first"), scan.joined)),
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
        "words_per_document": _histogram(documents.words),
        "words_per_label": _histogram(labels.words),
        "labels_per_document": _histogram(counts),
        "refusal": scan.refusal,
    }


def text(report: Mapping[str, Any]) -> str:
    """A report for a terminal; also one that an earlier version made."""
    rows = {
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
        "images_missing": "image files that are not there",
    }
    splits = [split for split in (*_DOCUMENTS, "label") if split in report]
    lines = [f"{'':34}" + "".join(f"{split:>12}" for split in splits)]
    for key, said in rows.items():
        values = [report[split].get(key) for split in splits]
        if any(values) or not key.startswith(("with_image", "images", "repeated")):
            cells = "".join(f"{'' if value is None else f'{value:,}':>12}" for value in values)
            lines.append(f"{said:34}{cells}".rstrip())
    unseen = report["unseen_test_labels"]
    lines.append(
        f"labels of test documents that no training document has: {unseen['labels']:,} of "
        f"{unseen['of']:,} ({unseen['labels'] / max(unseen['of'], 1):.1%}), in "
        f"{unseen['pairs'] / max(report['test']['pairs'], 1):.1%} of the pairs"
    )
    groups = report["groups"]
    total = sum(report[split]["documents"] for split in splits if split != "label")
    if groups["count"] < total:
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
    for key, said in (
        ("words_per_document", "words per document"),
        ("words_per_label", "words per label"),
        ("labels_per_document", "labels per document"),
    ):
        lines += ["", *_bars(said, report[key])]
    return "\n".join(lines)


def _remarks(report: Mapping[str, Any]) -> list[str]:
    """What somebody should look at, in words."""
    unknown = report["unknown_labels"]
    done = {"add": "made labels of, their ids being their texts", "drop": "left out"}
    remarks = []
    for name in report.get("test_files_without_labels", ()):
        remarks.append(
            f"{name} has no labels: it is not used for evaluation; python -m xmc_jax.main "
            f"--mode=predict --artifact=RUN/export --input={name} --output=predictions.jsonl ranks "
            "labels for it"
        )
    if report["label"].get("ids_as_texts"):
        remarks.append("the labels have ids alone: their ids are taken for their texts")
    if unknown["ids"]:
        remarks.append(
            f"{counted(unknown['ids'], 'unknown label')}, in "
            f"{counted(unknown['pairs'], 'pair')}: "
            f"{done[unknown['treated']]}"
        )
    if joined := unknown.get("joined"):
        remarks.append(
            f"{joined['ids']:,} of these have {joined['separator']!r} in their id, as "
            f"{joined['first']!r:.60}: if that is several labels, "
            f"--separator={joined['separator']!r}"
        )
    if unknown["filter_pairs"]:
        remarks.append(f"{counted(unknown['filter_pairs'], 'unknown label')} in filters: left out")
    repeated = sum(report[s].get("repeated_labels", 0) for s in _DOCUMENTS if s in report)
    if repeated:
        remarks.append(
            f"{counted(repeated, 'label repeats', 'labels repeat')} one of the same document: "
            "counted once"
        )
    if report["test"]["positives_filtered"]:
        remarks.append(
            f"{counted(report['test']['positives_filtered'], 'label')} of test documents taken "
            "out, since they may not be predicted"
        )
    for split, key in (("test", "across_the_split"), ("validation", "across_validation")):
        across = report.get(key, {})
        for shared, said in (
            ("texts", "a text that training has, too"),
            ("plain_texts", "a text that differs from one of training in capitals or blanks alone"),
            ("groups", "a group that training has, too"),
        ):
            if across.get(shared):
                documents = f"{split} document"
                documents = counted(across[shared], f"{documents} has", f"{documents}s have")
                remarks.append(f"{documents} {said}")
    missing = sum(report[s]["images_missing"] for s in (*_DOCUMENTS, "label") if s in report)
    if missing:
        remarks.append(f"{counted(missing, 'image file is', 'image files are')} not there")
    return remarks


def _across(scan: Scan, split: str) -> dict[str, int]:
    """Documents of a split that share something with some training document.

    "plain_texts" are those whose text differs in capitals or white space.
    """
    documents = scan.documents
    train, other, text = scan.of("train"), scan.of(split), ~documents.blank

    def shared(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
        found = np.zeros(len(documents), bool)
        found[other & counts] = np.isin(first[other & counts], first[train & counts])
        return found

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


def _bars(said: str, histogram: Mapping[str, Any]) -> list[str]:
    counts = histogram["counts"]
    median, most = histogram["p50"], histogram["p100"]
    lines = [f"{said}: mean {histogram['mean']:,}, median {median:,}, at most {most:,}"]
    for slot, count in enumerate(counts):
        first, last = (slot, slot) if slot < 2 else ((1 << slot - 2) + 1, 1 << slot - 1)
        span = f"{first:,}" if first == last else f"{first:,}-{last:,}"
        bar = "#" * -(-_BAR * count // max(*counts, 1))
        if count or any(counts[:slot]):
            lines.append(f"{span:>15} {count:>12,} {bar}".rstrip())
    return lines
