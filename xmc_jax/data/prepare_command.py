"""The command `python -m xmc_jax.data.prepare`: its flags, and what it does with own records."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from xmc_jax.config import RecordsOptions, choices
from xmc_jax.config.declare import options
from xmc_jax.data import known, packaged, prepare, raw_folder
from xmc_jax.data import tokenizer as tokenizers
from xmc_jax.data.prepare import PrepareConfig
from xmc_jax.data.raw import RawItems
from xmc_jax.data.records import data_report, own_records
from xmc_jax.data.records.own_records import RecordsConfig
from xmc_jax.data.records.record_scan import Scan
from xmc_jax.runtime import command

_CHECKED = 1 << 20  # characters of texts that are tokenised at a time when records are checked
_FLAGS = {"data_dir": "--out", "columns": "--column"}  # where a flag has another name


@dataclasses.dataclass(frozen=True)
class _Task:
    """What the flags ask for."""

    config: PrepareConfig
    records: RecordsConfig | None
    only_check: bool


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status, see `command.run`."""
    return command.run("prepare", lambda: _parse(arguments), _act)


def _act(task: _Task) -> None:
    if task.records is not None:
        print(f"{own_records.describe(task.records)}\n", flush=True)
        if task.only_check:
            report, refusal = _check(task.records, task.config)
            print(data_report.text(report), flush=True)
            if refusal is not None:
                raise ValueError(refusal)
            return
        report, _ = own_records.convert(task.records, task.config.raw)
        print(f"{data_report.text(report)}\n")
    print(prepare.report(prepare.prepare(task.config)))


def _check(records: RecordsConfig, config: PrepareConfig) -> tuple[dict[str, Any], str | None]:
    """The report on records with the texts that would be cut, and why `prepare` would refuse."""
    tokenizer = tokenizers.load(config.tokenizer, config.revision)
    kind = config.text or known.text(config.dataset)
    waiting: dict[str, list[str]] = {"document": [], "label": []}
    size, cut = dict.fromkeys(waiting, 0), dict.fromkeys(waiting, 0)

    def count(of: str) -> None:
        longer = tokenizers.are_longer(
            tokenizer, waiting[of], config.max_length, config.special_tokens
        )
        cut[of] += int(longer.sum())
        waiting[of], size[of] = [], 0

    def keep(of: str, item: dict[str, Any], _: list[str]) -> None:
        text = RawItems([item["uid"]], [item["title"]], [item["content"]], None).texts(kind)[0]
        waiting[of].append(text)
        size[of] += len(text)
        if size[of] > _CHECKED:
            count(of)

    report, scan = own_records.check(records, keep)
    for of in waiting:
        count(of)
    report |= {"cut": cut | {"max_length": config.max_length, "tokenizer": config.short_name}}
    return report, scan.refusal or _refusal(records, config, report, scan)


def _refusal(
    records: RecordsConfig, config: PrepareConfig, report: Mapping[str, Any], scan: Scan
) -> str | None:
    """Why the dataset of these records could not be prepared; None if it could."""
    validation = report.get("validation", {"documents": 0, "pairs": 0})
    train = report["train"]["documents"] + validation["documents"]
    pairs = report["train"]["pairs"] + validation["pairs"]
    counts = {"labels": report["label"]["labels"], "train": train}
    try:
        if config.validation_fraction:
            if validation["documents"]:
                raise raw_folder.already_named(records.records)
            sources = np.unique(scan.groups[scan.of("train")], return_inverse=True)[1]
            raw_folder.draw(sources, config.validation_fraction, config.seed)
        else:
            counts["test"] = report["test"]["documents"]
        raw_folder.check_published(config.dataset, counts, pairs)
    except ValueError as error:
        return str(error)
    return None


def _parse(arguments: list[str] | None) -> _Task:
    parser = command.Parser(prog="python -m xmc_jax.data.prepare", allow_abbrev=False)
    _add_flags(parser, PrepareConfig, ("tokenizer_name", "prompts", "special_tokens", "propensity"))
    parser.add_argument(
        "--bare",
        dest="special_tokens",
        action="store_const",
        const=False,
        help="without special tokens, as decoders need texts",
    )
    parser.add_argument(
        "--propensity", nargs=2, type=float, metavar=("A", "B"), help="by default as the name says"
    )
    group = parser.add_argument_group(
        "own records", "JSONL, CSV or Parquet in place of raw files; see docs/data.md"
    )
    group.add_argument(
        "--records", help="a folder with train.*, perhaps test.*, and labels.*; or a file"
    )
    _add_flags(group, RecordsOptions)
    parser.add_argument("--check", action="store_true", help="read the records, write nothing")
    given = {name: x for name, x in vars(parser.parse_args(arguments)).items() if x is not None}
    only_check, records = given.pop("check"), None
    names = {"records"} | {option.name for option in options(RecordsOptions)}
    of_records = {name: given.pop(name) for name in names & given.keys()}
    if "records" not in of_records and (of_records or only_check):
        flag = "--check" if only_check else _flag(min(of_records))
        raise ValueError(f"{flag}: expected --records with it")
    missing = [_flag(name) for name in ("dataset", "data_dir") if name not in given]
    if missing and not only_check:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    if of_records:
        for name in ("raw", "encoding"):
            if name in given:
                raise ValueError(f"--{name}: expected none with --records, as raw files are made")
        try:
            records = RecordsConfig(**of_records, overwrite=given.get("overwrite", False))
        except ValueError as error:
            raise ValueError(str(error).removeprefix("data.records_options.")) from None
        if only_check:  # neither name nor place matters
            given |= {"dataset": given.get("dataset", "records"), "data_dir": "."}
        given["raw"] = own_records.folder(given["data_dir"], given["dataset"])
    if given.setdefault("tokenizer", packaged.MINILM_NAME) == packaged.MINILM_NAME:
        given |= {"tokenizer": str(packaged.minilm()), "tokenizer_name": packaged.MINILM_NAME}
    given.setdefault("max_length", 32)
    return _Task(PrepareConfig(**given), records, only_check)


def _flag(name: str) -> str:
    return _FLAGS.get(name, f"--{name}")


def _add_flags(parser: Any, kind: type, without: tuple[str, ...] = ()) -> None:
    """A flag for each field of a section, None where it is not given."""
    for option in options(kind):
        if option.name in without:
            continue
        how: dict[str, Any] = {"type": option.kind if option.kind in (int, float) else str}
        if option.kind is bool:
            how = {"action": "store_true", "default": None}
        elif option.name == "columns":
            how = {"action": "append", "metavar": "FIELD=NAME"}
        elif option.name == "label_columns":
            how = {"type": _names, "metavar": "NAME,NAME"}
        elif values := choices(kind, option.name):
            how = {"choices": [value for value in values if isinstance(value, str)]}
        default = {"tokenizer": packaged.MINILM_NAME, "max_length": 32}.get(
            option.name, option.default
        )
        usual = f" (default {default})" if type(default) in (int, float, str) and default else ""
        text = option.text.replace("%", "%%") + usual
        parser.add_argument(_flag(option.name), dest=option.name, help=text, **how)


def _names(listed: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in listed.split(","))
