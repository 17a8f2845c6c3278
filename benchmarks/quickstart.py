"""The quickstart's table: a finished run beside TF-IDF neighbours, computed then and there.

python -m benchmarks.quickstart --workdir runs/quickstart

TF-IDF neighbours are those of the test split; beside a run on a validation split there are none.
"""

import argparse
import json
import pathlib

from benchmarks import tfidf
from benchmarks.raw_data import RawData
from xmc_jax.data import bundled, known
from xmc_jax.data.records import own_records
from xmc_jax.retrieval.evaluate import format_index, format_table

_ROWS = {"zero-shot": "zero-shot", "plain": "trained", "augmented": "trained + augmented"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="of a finished run")
    workdir = parser.parse_args().workdir
    data = json.loads((workdir / "config.json").read_text())["data"]
    found = json.loads((workdir / "metrics.json").read_text())
    split, rows = "validation" if data["validation_fraction"] > 0 else "test", {}
    if split == "test":
        raw = pathlib.Path(data["raw_dir"])
        if data.get("records") is not None:
            raw = own_records.folder(data["data_dir"], data["dataset"])
        elif data["raw_dir"] == "bundled":
            raw = bundled.path(data["dataset"])
        constants = data["propensity_a"], data["propensity_b"]
        text = data["text"] or known.text(data["dataset"])
        rows["TF-IDF neighbours"] = tfidf.evaluate(RawData(raw, data["dataset"], text, constants))
    rows |= {shown: found[name] for name, shown in _ROWS.items() if name in found}
    print(f"\n{data['dataset']}, {split} split, percent\n")
    print(format_table(rows))
    if "index" in found:
        print()
        print(format_index(found["index"]))


if __name__ == "__main__":
    main()
