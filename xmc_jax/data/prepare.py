"""Raw Extreme Classification files, or a user's own records, to a dataset folder: `python -m
xmc_jax.data.prepare --help`.

Idempotent: a folder made from the same inputs is left as it is. Restartable: a folder appears under
its name only when it is whole. Texts are cut at `max_length` tokens, duplicate labels of a document
are merged, and documents without positives are kept, as the reference keeps them (in training they
are paired with a random label, a negative); the report counts all three.
"""

import contextlib
import hashlib
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import tqdm
from pydantic import Field

from xmc_jax.config.declare import ShareBelowOne, Whole, section
from xmc_jax.data import bundled, known, raw_folder, store
from xmc_jax.data import tokenizer as tokenizers
from xmc_jax.data.raw import RawItems
from xmc_jax.files import array_files, array_folders, atomic, json_files, locks, manifests
from xmc_jax.runtime.wording import counted

_CUT = "texts_cut.json"  # split -> texts that were cut at max_length


_Constant = Annotated[float, Field(ge=0, le=100)]


@section("")
class PrepareConfig:
    """What to prepare, and how; the descriptions are the help of the command's flags."""

    dataset: str = Field(description=f"name of the dataset; known: {', '.join(known.KNOWN)}")
    data_dir: pathlib.Path = Field(description="folder in which dataset folders are made")
    tokenizer: str = Field(description="folder with tokenizer files, or a name on the hub")
    max_length: Annotated[int, Field(ge=1, lt=1 << 16)] = Field(
        description="tokens of a text, special ones and prompt included"
    )
    raw: pathlib.Path | None = Field(
        None, description="folder of the raw files; a bundled dataset needs none"
    )
    tokenizer_name: str | None = Field(
        None, description="name of the tokenizer in the folder's name and manifest"
    )
    revision: str | None = Field(None, description="revision of the tokenizer on the hub")
    special_tokens: bool = Field(
        True, description="texts get the tokenizer's special tokens; decoders need none"
    )
    prompts: tuple[str, str] = Field(
        ("", ""), description="prompts before the text of each document and of each label"
    )
    encoding: Literal["utf-8", "latin-1"] = Field(
        "utf-8", description="encoding of the raw texts; the reference reads latin-1"
    )
    text: Literal["title", "title_content"] | None = Field(
        None, description="text of an item; none follows from the name of the dataset"
    )
    propensity: tuple[_Constant, _Constant] | None = Field(
        None, description="constants A and B; none follows from the name of the dataset"
    )
    validation_fraction: ShareBelowOne = Field(
        0.0,
        description="share of the training documents to hold out, by source, in place of the test "
        "split",
    )
    seed: Whole = Field(0, description="seed of the choice of held-out sources")
    overwrite: bool = Field(False, description="replace a folder that differs or is damaged")

    def __post_init__(self):
        name = pathlib.Path(self.dataset).name
        if not name or self.dataset != name or name == "..":
            raise ValueError(f"dataset: expected a name without slashes, got {self.dataset!r}")

    @property
    def short_name(self) -> str:
        """The tokenizer's name, the same for one on the hub and for a folder of that name."""
        return self.tokenizer_name or pathlib.Path(self.tokenizer).name

    @property
    def folder(self) -> pathlib.Path:
        """The dataset folder, `<data_dir>/<dataset>/<tokenizer>-<T>` and what is unusual."""
        name = f"{self.short_name}-{self.max_length}"
        if not self.special_tokens:
            name += "-bare"
        if any(self.prompts):
            name += f"-{hashlib.sha256(repr(self.prompts).encode()).hexdigest()[:8]}"
        if self.validation_fraction:
            name += f"-val{100 * self.validation_fraction:g}-seed{self.seed}"
        return self.data_dir / self.dataset / name


def prepare(config: PrepareConfig) -> pathlib.Path:
    """Makes the dataset folder, unless it is there already.

    Returns:
        The folder, for `store.open`.

    Raises:
        ValueError: bad raw files, counts other than the published ones, or a folder of that name
            that was made from other inputs or is damaged.
    """
    source = config.raw or bundled.path(config.dataset)
    files = raw_folder.find(source, train_only=config.validation_fraction > 0)
    tokenizer = tokenizers.load(config.tokenizer, config.revision)
    identity = tokenizers.identity(tokenizer, config.special_tokens)
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
    from xmc_jax.data import prepare_command

    return prepare_command.main(arguments)


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
    contents = array_folders.facts(partial)
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
