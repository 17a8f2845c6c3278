"""Raw Extreme Classification files, or a user's own records, to a dataset folder: `python -m
xmc_jax.data.prepare --help`.

Idempotent: a folder made from the same inputs is left as it is. Restartable: a folder appears under
its name only when it is whole. Texts are cut at `max_length` tokens, duplicate labels of a document
are merged, and documents without positives are kept, as the reference keeps them (in training they
are paired with a random label, a negative); the report counts all three.
"""

import dataclasses
import fcntl
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import tqdm

from xmc_jax import command, packaged
from xmc_jax.data import bundled, holdout, raw_folder, record_report, record_scan, records, store
from xmc_jax.data import tokenizer as tokenizers
from xmc_jax.data.known import KNOWN
from xmc_jax.data.raw import Items
from xmc_jax.data.raw_folder import RawDataset
from xmc_jax.files.digests import sha256

_BLOCK = 1 << 14  # texts tokenised at a time


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """What to prepare, and how.

    Attributes:
        dataset: its name; published counts of known names are checked.
        data_dir: where dataset folders go; the result is `<data_dir>/<dataset>/<tokenizer>-<T>`,
            with `-bare` behind it without special tokens.
        tokenizer: a folder with tokenizer files, or a name on the hub.
        max_length: T, tokens per text, special ones included.
        raw: folder of the raw files; None for a bundled dataset's own.
        tokenizer_name: what the folder and its manifest call the tokenizer; None for the last part
            of `tokenizer`.
        revision: the tokenizer's revision on the hub.
        special_tokens: whether texts get the tokenizer's special tokens, as encoders need them; or
            none, for decoders, which put prompts around them.
        encoding: of the raw texts, "utf-8", or "latin-1" as the reference reads them.
        text: "title" or "title_content"; None for the reference's rule, titles alone where the
            dataset's name says so.
        propensity: constants (A, B); None for those of a known name, else 0.55 and 1.5 (pyxclib).
        validation_fraction: share of the training documents to hold out, by whole sources of
            groups.tsv, as the test split; the test files are then not read. 0 for the real split.
        seed: of the choice of held-out sources.
        overwrite: replace a folder that was made from other inputs or is damaged.
    """

    dataset: str
    data_dir: str | pathlib.Path
    tokenizer: str
    max_length: int
    raw: str | pathlib.Path | None = None
    tokenizer_name: str | None = None
    revision: str | None = None
    special_tokens: bool = True
    encoding: str = "utf-8"
    text: str | None = None
    propensity: tuple[float, float] | None = None
    validation_fraction: float = 0.0
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self):
        folder_safe = bool(self.dataset) and self.dataset == pathlib.Path(self.dataset).name
        for field, fits, expected in (
            ("dataset", folder_safe and self.dataset != "..", "a name without slashes"),
            ("max_length", 1 <= self.max_length < 1 << 16, "1 to 65535 tokens"),
            ("encoding", self.encoding in ("utf-8", "latin-1"), "utf-8 or latin-1"),
            ("text", self.text in (None, "title", "title_content"), "title or title_content"),
            ("validation_fraction", 0 <= self.validation_fraction < 1, "a fraction in [0, 1)"),
            ("seed", self.seed >= 0, "0 or more"),
            (
                "propensity",
                self.propensity is None or all(0 <= number <= 100 for number in self.propensity),
                "two numbers from 0 to 100",
            ),
        ):
            if not fits:
                raise ValueError(
                    f"prepare: {field}: expected {expected}, got {getattr(self, field)!r}"
                )

    @property
    def short_name(self) -> str:
        """The tokenizer's name, the same for one on the hub and for a folder of that name."""
        return self.tokenizer_name or pathlib.Path(self.tokenizer).name

    @property
    def folder(self) -> pathlib.Path:
        """The dataset folder."""
        held_out = f"-val{100 * self.validation_fraction:g}-seed{self.seed}"
        name = f"{self.short_name}-{self.max_length}"
        name += "" if self.special_tokens else "-bare"
        name += held_out if self.validation_fraction else ""
        return pathlib.Path(self.data_dir) / self.dataset / name


def prepare(config: PrepareConfig) -> pathlib.Path:
    """Makes the dataset folder, unless it is there already.

    Returns:
        The folder, for `store.open`.

    Raises:
        ValueError: bad raw files, counts other than the published ones, or a folder of that name
            that was made from other inputs or is damaged.
    """
    source = bundled.path(config.dataset) if config.raw is None else pathlib.Path(config.raw)
    files = raw_folder.find(source, train_only=config.validation_fraction > 0)
    tokenizer = tokenizers.load(config.tokenizer, config.revision)
    identity = tokenizers.identity(tokenizer, config.special_tokens)
    inputs = _inputs(config, raw_folder.digests(files), identity)
    folder = config.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two processes of one host prepare one after the other
        if folder.exists() and not config.overwrite:
            _check_same(folder, inputs)
            return folder
        dataset = raw_folder.read(files, config.dataset, config.encoding)
        if config.validation_fraction:
            dataset = holdout.hold_out(dataset, config.validation_fraction, config.seed)
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # what an interrupted run left
        partial.mkdir()
        _write(partial, dataset, inputs, tokenizer)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    return folder


def report(folder: pathlib.Path) -> str:
    """A few lines on a dataset folder: counts, labels per document, token lengths, what was cut."""
    manifest = store.open(folder).manifest
    lines = [f"{manifest['dataset']} in {folder}"]
    for split, counts in manifest["report"].items():
        lines.append(f"  {split:5}  " + "  ".join(f"{k} {v:,}" for k, v in counts.items()))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status, see `command.run`."""
    return command.run("prepare", lambda: _parse(arguments), lambda asked: _act(*asked))


def _act(config: PrepareConfig | None, own: records.RecordsConfig | None, only_check: bool) -> None:
    if own is not None:
        print(f"{records.describe(own)}\n", flush=True)
        if only_check:
            print(record_report.text(records.check(own)))
            return
        print(f"{record_report.text(records.convert(own, pathlib.Path(config.raw))[0])}\n")
    print(report(prepare(config)))


def _parse(
    arguments: list[str] | None,
) -> tuple[PrepareConfig | None, records.RecordsConfig | None, bool]:
    """What to prepare, the records to make its raw folder of, and whether only to check these."""
    parser = command.Parser(prog="python -m xmc_jax.data.prepare", allow_abbrev=False)
    known = ", ".join(KNOWN)
    parser.add_argument("--dataset", help=f"its name; known: {known}")
    parser.add_argument("--raw", help="folder of the raw files; a bundled dataset needs none")
    parser.add_argument("--out", dest="data_dir", help="where dataset folders go")
    parser.add_argument(
        "--tokenizer",
        default=packaged.MINILM_NAME,
        help=f"a folder, a hub name, or {packaged.MINILM_NAME} (default)",
    )
    parser.add_argument("--revision", help="the tokenizer's revision on the hub")
    parser.add_argument("--max_length", type=int, default=32, help="tokens per text (default 32)")
    parser.add_argument(
        "--bare",
        dest="special_tokens",
        action="store_false",
        help="without special tokens, as decoders need texts",
    )
    parser.add_argument("--encoding", default="utf-8", help="utf-8 (default) or latin-1")
    parser.add_argument("--text", help="title or title_content; by default as the name says")
    parser.add_argument(
        "--propensity", nargs=2, type=float, metavar=("A", "B"), help="by default as the name says"
    )
    parser.add_argument(
        "--validation_fraction",
        type=float,
        default=0.0,
        help="hold out this share of the training documents, by source, in place of the test split",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the held-out sources")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that differs")
    own = parser.add_argument_group(
        "own records", "JSONL, CSV or Parquet in place of raw files; see docs/data.md"
    )
    defaults = records.RecordsConfig
    own.add_argument(
        "--records", help="a folder with train.*, perhaps test.*, and labels.*; or a file"
    )
    own.add_argument("--labels", help="the file of the labels, if not labels.* in that folder")
    own.add_argument(
        "--column",
        dest="columns",
        action="append",
        metavar="FIELD=NAME",
        help="where a field's column has another name, e.g. text=product_name; again for others",
    )
    own.add_argument("--separator", help=f"of ids in a text (default {defaults.separator})")
    own.add_argument(
        "--test_fraction",
        type=float,
        help="share of the documents for testing, by whole groups, where nothing says which "
        f"(default {defaults.test_fraction})",
    )
    own.add_argument("--split_seed", type=int, help="of that choice (default 0)")
    own.add_argument(
        "--unknown_labels",
        choices=record_scan.UNKNOWN,
        help="ids that no label has: an error (default), left out, or made labels",
    )
    own.add_argument("--check", action="store_true", help="read the records, write nothing")
    fields = vars(parser.parse_args(arguments))
    only_check = fields.pop("check")
    names = {field.name for field in dataclasses.fields(defaults)} - {"overwrite"}
    given = {name: value for name in names if (value := fields.pop(name)) is not None}
    if "records" not in given and (given or only_check):
        flag = "check" if only_check else min(given).replace("columns", "column")
        raise ValueError(f"--{flag}: expected --records with it")
    required = {"--dataset": fields["dataset"], "--out": fields["data_dir"]}
    absent = [flag for flag, value in required.items() if value is None]
    if absent and not only_check:
        parser.error(f"the following arguments are required: {', '.join(absent)}")
    if "records" in given:
        given["columns"] = tuple(given.get("columns", ()))
        own_config = defaults(**given, overwrite=fields["overwrite"])
        if only_check:
            return None, own_config, True
        if fields["raw"] is not None:
            raise ValueError("--raw: expected none with --records, of which raw files are made")
        if fields["encoding"] != "utf-8":
            raise ValueError("--encoding: expected utf-8, as records are")
        fields["raw"] = records.folder(fields["data_dir"], fields["dataset"])
    if fields["propensity"]:
        fields["propensity"] = tuple(fields["propensity"])
    if fields["tokenizer"] == packaged.MINILM_NAME:
        fields |= {"tokenizer": str(packaged.minilm()), "tokenizer_name": packaged.MINILM_NAME}
    return PrepareConfig(**fields), own_config if given else None, False


def _inputs(config: PrepareConfig, digests: dict, identity: dict[str, Any]) -> dict[str, Any]:
    """All that the folder's contents follow from, as the manifest says it."""
    constants = config.propensity
    if constants is None:
        known = KNOWN.get(config.dataset)
        constants = (known.a, known.b) if known else (0.55, 1.5)
    by_name = "title" if "title" in config.dataset.lower() else "title_content"
    validation = {"fraction": config.validation_fraction, "seed": config.seed}
    return {
        "format": store.FORMAT,
        "dataset": config.dataset,
        "max_length": config.max_length,
        # By its digest, and the name that the folder has: a path or revision may differ.
        "tokenizer": {
            "name": config.short_name,
            **identity,
        },
        "text": config.text or by_name,
        "encoding": config.encoding,
        "propensity": list(constants),
        "validation": validation if config.validation_fraction else None,
        "raw": digests,
        # Absent where true: the manifests of encoders, whose digests checkpoints name, stay the
        # same byte for byte.
        **({} if config.special_tokens else {"special_tokens": False}),
    }


def _check_same(folder: pathlib.Path, inputs: dict[str, Any]) -> None:
    recorded = {"special_tokens": True} | dict(_leaves(store.open(folder).manifest))
    for field, value in _leaves({"special_tokens": True} | inputs):
        if recorded.get(field) != value:
            raise ValueError(
                f"{folder}: expected to have been prepared with {field} {value}, found "
                f"{recorded.get(field)}; choose another folder (--out, --config.data.data_dir), or "
                "make this one anew with python -m xmc_jax.data.prepare --overwrite"
            )


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _write(partial: pathlib.Path, dataset: RawDataset, inputs: dict[str, Any], tokenizer) -> None:
    total = sum(len(items.titles) for items in dataset.splits.values())
    with tqdm.tqdm(total=total, desc="tokenising", unit="text", disable=None) as bar:
        summary = {
            split: _write_texts(partial, split, items, inputs, tokenizer, bar)
            for split, items in dataset.splits.items()
        }
    for split, merged in dataset.merged.items():
        positives = dataset.splits[split].positives
        np.save(partial / f"{split}.positives.indptr.npy", positives.indptr)
        np.save(partial / f"{split}.positives.indices.npy", positives.indices)
        summary[split] |= {
            "labels_per_document": round(len(positives.indices) / positives.rows, 4),
            "without_positives": int((positives.counts() == 0).sum()),
            "duplicates_merged": merged,
        }
    for split, groups in dataset.groups.items():
        np.save(partial / f"{split}.groups.npy", groups)
    for split, rows in dataset.raw_rows.items():
        np.save(partial / f"{split}.raw_rows.npy", rows)
    np.save(partial / "filter.npy", dataset.filter)
    summary["test"]["filter_pairs"] = len(dataset.filter)
    used = np.unique(dataset.splits["train"].positives.indices)
    summary["label"]["without_documents"] = len(dataset.splits["label"].titles) - len(used)
    files = {}
    for path in sorted(partial.iterdir()):
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        if path.suffix == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            files[path.name] |= {"dtype": str(array.dtype), "shape": list(array.shape)}
    manifest = json.dumps(inputs | {"report": summary, "files": files}, indent=1)
    (partial / "manifest.json").write_text(manifest + "\n", encoding="utf-8")


def _write_texts(partial, split: str, items: Items, inputs, tokenizer, bar) -> dict[str, Any]:
    """Writes tokens, lengths, uids and titles of a split; returns the facts for the report."""
    texts = items.titles
    if inputs["text"] == "title_content":
        texts = [f"{title} {content}".strip() for title, content in zip(texts, items.contents)]
    shape = (len(texts), inputs["max_length"])
    tokens = np.lib.format.open_memmap(partial / f"{split}.tokens.npy", "w+", np.int32, shape)
    lengths, whole = np.zeros((2, len(texts)), np.int32)
    for start in range(0, len(texts), _BLOCK):
        block = slice(start, start + _BLOCK)
        tokens[block], lengths[block], whole[block] = tokenizers.encode_measured(
            tokenizer, texts[block], inputs["max_length"], inputs.get("special_tokens", True)
        )
        bar.update(len(texts[block]))
    tokens.flush()
    np.save(partial / f"{split}.lengths.npy", lengths.astype(np.uint16))
    for name, column in (("uids", items.uids), ("titles", items.titles)):
        (partial / f"{split}.{name}.txt").write_bytes(store.lines(column))
    return {
        "count": len(texts),
        "tokens_mean": round(float(whole.mean()), 2),
        **{f"tokens_p{p}": int(np.percentile(whole, p)) for p in (50, 90, 99, 100)},
        "truncated": round(float((whole > lengths).mean()), 4),
        "blank_texts": sum(not text.strip() for text in texts),
    }


if __name__ == "__main__":
    sys.exit(main())
