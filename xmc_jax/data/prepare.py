"""Raw Extreme Classification files, or a user's own records, to a dataset folder: `python -m
xmc_jax.data.prepare --help`.

Idempotent: a folder made from the same inputs is left as it is. Restartable: a folder appears under
its name only when it is whole. Texts are cut at `max_length` tokens, duplicate labels of a document
are merged, and documents without positives are kept, as the reference keeps them (in training they
are paired with a random label, a negative); the report counts all three.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import tqdm

from xmc_jax.data import bundled, known, packaged, raw_folder, store
from xmc_jax.data import tokenizer as tokenizers
from xmc_jax.data.raw import RawItems
from xmc_jax.data.records import data_report, own_records, record_scan
from xmc_jax.data.records.record_scan import Scan
from xmc_jax.files import array_files, atomic, json_files, locks, manifests
from xmc_jax.runtime import command
from xmc_jax.runtime.wording import counted

_CHECKED = 1 << 20  # characters of texts that are tokenised at a time when records are checked
_CUT = "texts_cut.json"  # split -> texts that were cut at max_length


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """What to prepare, and how.

    Attributes:
        dataset: its name; published counts of known names are checked.
        data_dir: where dataset folders go; the result is `<data_dir>/<dataset>/<tokenizer>-<T>`,
            with `-bare` behind it without special tokens, or a digest of the prompts with some.
        tokenizer: a folder with tokenizer files, or a name on the hub.
        max_length: T, tokens per text, special ones included.
        raw: folder of the raw files; None for a bundled dataset's own.
        tokenizer_name: what the folder and its manifest call the tokenizer; None for the last part
            of `tokenizer`.
        revision: the tokenizer's revision on the hub.
        prompts: what is put before the text of each document and of each label, before both are
            tokenised as one; its tokens count in T.
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
    prompts: tuple[str, str] = ("", "")
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
        name += (
            f"-{hashlib.sha256(repr(self.prompts).encode()).hexdigest()[:8]}"
            if any(self.prompts)
            else ""
        )
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
    tokenizer, identity = _tokenizer(config)
    for prompt in config.prompts:
        (ids,) = tokenizers.encode(tokenizer, [prompt], config.special_tokens)
        if prompt and len(ids) >= config.max_length:
            raise ValueError(
                f"max_length: expected more than the {counted(len(ids), 'token')} that the prompt "
                f"{prompt!r} "
                f"takes, special ones included, got {config.max_length}; set data.max_length"
            )
    inputs = _inputs(config, raw_folder.digests(files), identity)
    folder = config.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Two processes of one host prepare one after the other.
    with locks.locked(folder.with_name(f".{folder.name}.lock"), str(folder), wait=True):
        if folder.exists() and not config.overwrite:
            _check_same(folder, inputs)
            return folder
        with atomic.replaced_folder(folder) as partial:
            _write(partial, config, files, inputs, tokenizer)
    return folder


def _tokenizer(config: PrepareConfig) -> tuple[Any, dict[str, Any]]:
    """The tokenizer, and what tells it from others."""
    tokenizer = tokenizers.load(config.tokenizer, config.revision)
    return tokenizer, tokenizers.identity(tokenizer, config.special_tokens)


def cut_texts(folder: pathlib.Path) -> dict[str, int]:
    """Split -> how many texts were cut at max_length; empty for folders of earlier versions."""
    return json_files.read(folder / _CUT, optional=True)


def report(folder: pathlib.Path) -> str:
    """A few lines on a dataset folder: counts, labels per document, token lengths, cut texts."""
    manifest, cut = store.open(folder).manifest, cut_texts(folder)
    lines = [f"{manifest['dataset']} in {folder}"]
    for split, counts in manifest["report"].items():
        if split in cut:
            counts = counts | {"texts_cut": cut[split]}
        lines.append(f"  {split:5}  " + "  ".join(f"{k} {v:,}" for k, v in counts.items()))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status, see `command.run`."""
    return command.run("prepare", lambda: _parse(arguments), lambda parsed: _act(*parsed))


def _act(config: PrepareConfig, own: own_records.RecordsConfig | None, only_check: bool) -> None:
    if own is not None:
        print(f"{own_records.describe(own)}\n", flush=True)
        if only_check:
            found, refusal = _check(own, config)
            print(data_report.text(found), flush=True)
            if refusal is not None:
                raise ValueError(refusal)
            return
        print(f"{data_report.text(own_records.convert(own, pathlib.Path(config.raw))[0])}\n")
    print(report(prepare(config)))


def _check(
    own: own_records.RecordsConfig, config: PrepareConfig
) -> tuple[dict[str, Any], str | None]:
    """The report on records, with the texts that would be cut; nothing is written.

    Also why `prepare` would refuse them; None if it would not.
    """
    tokenizer, kind = _tokenizer(config)[0], config.text or known.text(config.dataset)
    waiting: dict[str, list[str]] = {"document": [], "label": []}
    size, cut = dict.fromkeys(waiting, 0), dict.fromkeys(waiting, 0)

    def count(of: str) -> None:
        cut[of] += int(
            tokenizers.are_longer(
                tokenizer, waiting[of], config.max_length, config.special_tokens
            ).sum()
        )
        waiting[of], size[of] = [], 0

    def keep(of: str, item: dict[str, Any], _: list[str]) -> None:
        text = RawItems([item["uid"]], [item["title"]], [item["content"]], None).texts(kind)[0]
        waiting[of].append(text)
        size[of] += len(text)
        if size[of] > _CHECKED:
            count(of)

    found, scan = own_records.check(own, keep)
    for of in waiting:
        count(of)
    found |= {"cut": cut | {"max_length": config.max_length, "tokenizer": config.short_name}}
    return found, scan.refusal or _refusal(own, config, found, scan)


def _refusal(
    own: own_records.RecordsConfig, config: PrepareConfig, report: Mapping[str, Any], scan: Scan
) -> str | None:
    """Why the dataset of these records could not be prepared; None if it could."""
    validation = report.get("validation", {"documents": 0, "pairs": 0})
    train = report["train"]["documents"] + validation["documents"]
    pairs = report["train"]["pairs"] + validation["pairs"]
    counts = {"labels": report["label"]["labels"], "train": train}
    try:
        if config.validation_fraction:
            if validation["documents"]:
                raise raw_folder.already_named(own.records)
            sources = np.unique(scan.groups[scan.of("train")], return_inverse=True)[1]
            raw_folder.draw(sources, config.validation_fraction, config.seed)
        else:
            counts["test"] = report["test"]["documents"]
        raw_folder.check_published(config.dataset, counts, pairs)
    except ValueError as error:
        return str(error)
    return None


def _parse(
    arguments: list[str] | None,
) -> tuple[PrepareConfig, own_records.RecordsConfig | None, bool]:
    """What to prepare, the records to make its raw folder of, and whether only to check these."""
    parser = command.Parser(prog="python -m xmc_jax.data.prepare", allow_abbrev=False)
    names = ", ".join(known.KNOWN)
    parser.add_argument("--dataset", help=f"its name; known: {names}")
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
    defaults = own_records.RecordsConfig
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
        "--delimiter", help="of cells in CSV, or tab; by default the header of each file tells it"
    )
    own.add_argument(
        "--label_columns",
        type=lambda listed: tuple(name.strip() for name in listed.split(",")),
        metavar="NAME,NAME",
        help="columns of 0 and 1, one for each label; * for all that are no other field's",
    )
    own.add_argument(
        "--row_per_pair",
        action="store_true",
        default=None,
        help="rows of one id that follow each other are one document with several labels",
    )
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
    own.add_argument(
        "--allow_paths",
        action="store_true",
        default=None,
        help="paths of images may lead out of the folder of the file that has them",
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
        if only_check:  # what is made, and where, does not matter
            fields |= {"dataset": fields["dataset"] or "records", "data_dir": "."}
        if fields["raw"] is not None:
            raise ValueError("--raw: expected none with --records, of which raw files are made")
        if fields["encoding"] != "utf-8":
            raise ValueError("--encoding: expected utf-8, as records are")
        fields["raw"] = own_records.folder(fields["data_dir"], fields["dataset"])
    if fields["propensity"]:
        fields["propensity"] = tuple(fields["propensity"])
    if fields["tokenizer"] == packaged.MINILM_NAME:
        fields |= {"tokenizer": str(packaged.minilm()), "tokenizer_name": packaged.MINILM_NAME}
    return PrepareConfig(**fields), own_config if given else None, only_check


def _inputs(config: PrepareConfig, digests: dict, identity: dict[str, Any]) -> dict[str, Any]:
    """All that the folder's contents follow from, as the manifest says it."""
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
        "text": config.text or known.text(config.dataset),
        "encoding": config.encoding,
        "propensity": list(config.propensity or known.propensity(config.dataset)),
        "validation": validation if config.validation_fraction else None,
        "raw": digests,
        # Absent where true: the manifests of encoders, whose digests checkpoints name, stay the
        # same byte for byte.
        **({} if config.special_tokens else {"special_tokens": False}),
        **({"prompts": list(config.prompts)} if any(config.prompts) else {}),
    }


def _check_same(folder: pathlib.Path, inputs: dict[str, Any]) -> None:
    """Raises ValueError if a folder was made from other inputs, or is damaged."""
    absent = {"special_tokens": True, "prompts": None}
    recorded, inputs = (absent | x for x in (store.open(folder).manifest, inputs))
    differ = manifests.difference({name: recorded.get(name) for name in inputs}, inputs)
    if differ:
        raise ValueError(
            f"{folder}: made from other inputs ({'; '.join(differ)}); choose another folder "
            "(--out, --config.data.data_dir), or make this one anew: remove it and "
            "run the same command again (of prepare: --overwrite)"
        )


def _write(
    partial: pathlib.Path,
    config: PrepareConfig,
    files: Mapping[str, pathlib.Path],
    inputs: dict[str, Any],
    tokenizer: Any,
) -> None:
    """Fills the folder, block by block of the raw files."""
    written: dict[str, _SplitTexts] = {}
    with (
        contextlib.ExitStack() as stack,
        tqdm.tqdm(desc="tokenising", unit="text", disable=None) as bar,
    ):

        def keep(split: str, items: RawItems) -> None:
            if split not in written:
                written[split] = stack.enter_context(_SplitTexts(partial, split, inputs, tokenizer))
            written[split].add(items)
            bar.update(len(items))

        dataset = raw_folder.read(
            files, config.dataset, config.encoding, config.validation_fraction, config.seed, keep
        )
    summary = {split: written[split].facts() for split in dataset.splits}
    cut = {split: written[split].cut for split in dataset.splits}
    for split, items in dataset.splits.items():
        if split == "label":
            continue
        positives = items.positives
        array_files.save(partial / f"{split}.positives.indptr.npy", positives.indptr)
        array_files.save(partial / f"{split}.positives.indices.npy", positives.indices)
        summary[split] |= {
            "labels_per_document": round(len(positives.indices) / positives.rows, 4),
            "without_positives": int((positives.counts() == 0).sum()),
            "duplicates_merged": dataset.merged.get(split, 0),
        }
    for split, groups in dataset.groups.items():
        array_files.save(partial / f"{split}.groups.npy", groups)
    for split, rows in dataset.raw_rows.items():
        array_files.save(partial / f"{split}.raw_rows.npy", rows)
    array_files.save(partial / "filter.npy", dataset.filter)
    summary["test"]["filter_pairs"] = len(dataset.filter)
    if dataset.validation_filter is not None:
        array_files.save(partial / "validation.filter.npy", dataset.validation_filter)
        summary["validation"]["filter_pairs"] = len(dataset.validation_filter)
    used = np.unique(dataset.splits["train"].positives.indices)
    summary["label"]["without_documents"] = len(dataset.splits["label"]) - len(used)
    contents = manifests.files(partial)
    for name in contents:
        if name.endswith(".npy"):
            array = array_files.mapped(partial / name)
            contents[name] |= {"dtype": str(array.dtype), "shape": list(array.shape)}
    manifest = json.dumps(inputs | {"report": summary, "files": contents}, indent=1)
    # Beside the manifest, whose digest checkpoints name: it says what it always said.
    (partial / _CUT).write_text(json.dumps(cut) + "\n", encoding="utf-8")
    (partial / "manifest.json").write_text(manifest + "\n", encoding="utf-8")


class _SplitTexts:
    """The files of a split's texts, written block by block: tokens, lengths, uids, titles."""

    def __init__(self, partial: pathlib.Path, split: str, inputs: dict[str, Any], tokenizer: Any):
        self._lengths_file = partial / f"{split}.lengths.npy"
        self._max_length, self._tokenizer = inputs["max_length"], tokenizer
        self._text = inputs["text"]
        self._special_tokens = inputs.get("special_tokens", True)
        self._prompt = inputs.get("prompts", ("", ""))[split == "label"]
        self._lengths: list[np.ndarray] = []
        self._whole: list[np.ndarray] = []
        self._blank = 0
        self._stack = contextlib.ExitStack()
        self._tokens = self._stack.enter_context(
            array_files.appended(partial / f"{split}.tokens.npy", np.int32, self._max_length)
        )
        self._files = {
            name: self._stack.enter_context((partial / f"{split}.{name}.txt").open("wb"))
            for name in ("uids", "titles")
        }

    def __enter__(self) -> "_SplitTexts":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)
        if self._lengths and error[0] is None:
            array_files.save(self._lengths_file, np.concatenate(self._lengths).astype(np.uint16))

    def add(self, items: RawItems) -> None:
        """Writes the items that follow."""
        texts = items.texts(self._text)
        self._blank += sum(not text.strip() for text in texts)
        if self._prompt:
            texts = [self._prompt + text for text in texts]
        tokens, lengths, whole = tokenizers.encode_measured(
            self._tokenizer, texts, self._max_length, self._special_tokens
        )
        self._tokens(tokens)
        self._lengths.append(lengths)
        self._whole.append(whole)
        self._files["uids"].write(store.lines(items.uids))
        self._files["titles"].write(store.lines(items.titles))

    @property
    def cut(self) -> int:
        """Texts that are longer than the tokens of them that are kept."""
        return int((np.concatenate(self._whole) > np.concatenate(self._lengths)).sum())

    def facts(self) -> dict[str, Any]:
        """What the report says of the texts."""
        whole = np.concatenate(self._whole)
        return {
            "count": len(whole),
            "tokens_mean": round(float(whole.mean()), 2),
            **{f"tokens_p{p}": int(np.percentile(whole, p)) for p in (50, 90, 99, 100)},
            "truncated": round(self.cut / len(whole), 4),
            "blank_texts": self._blank,
        }


if __name__ == "__main__":
    sys.exit(main())
