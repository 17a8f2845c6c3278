"""What images add: text alone, text with images, and text with other items' images, over seeds.

python -m benchmarks.image_gain --variant=minilm_l3/synthetic
python -m benchmarks.image_gain --variant=minilm_l3/mm_debian_3k --no_shuffled

Three runs per seed, of the variant with the option text_only, of the variant, and of the variant
with the images of each split dealt out anew to its items: those have as many images and say nothing
of the items; --no_shuffled leaves them out. A gain is that of a run over the text-only run of its
seed. Where the dataset is synthetic, beside them what predictors reach that know the shop and all
its labels and see the attributes (the ceiling), the title, or title and pictures. A finished run is
not repeated (`accuracy`).

The results go to --output: "benchmark", "settings" ("variant", "dataset", and "images": their
encoder, and the percent of items that have one), environment ("processor", "cores", "python",
"versions", "date", "commit") and "results": "oracles", and by kind of retrieval ("plain",
"augmented") and run.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks import accuracy
from benchmarks.environment import environment, save
from configs import vixml
from xmc_jax.config import RunConfig
from xmc_jax.data import image_vectors, image_writer
from xmc_jax.data.store import SPLITS, Store
from xmc_jax.retrieval.evaluate import format_table
from xmc_jax.training import build

SHOWN = ("P@1", "P@5", "nDCG@5", "PSP@1", "R@100")


def shuffled(real: image_vectors.ImageStore, seed: int = 0) -> str:
    """Deals a folder's images out anew within each split; returns the new folder's name.

    Args:
        real: of any dataset; its items keep neither their images nor their number of them.
        seed: of the permutations.
    """
    folder = real.folder.with_name(f"{real.folder.name}-shuffled")
    facts, rng = real.manifest, np.random.default_rng(seed)
    identity = {key: facts["encoder"][key] for key in ("name", "revision", "digest")}
    source = facts["source"] | {"shuffled": seed, "of": real.digest}
    with image_writer.ImageWriter(
        folder, facts["counts"], real.width, facts["dataset"], identity, source
    ) as writer:
        for split in SPLITS:
            rows = getattr(real, split)
            order = rng.permutation(len(rows))
            for item in range(writer.written[split], len(rows)):
                first, end = rows.indptr[order[item] : order[item] + 2]
                writer.append(split, item, rows.rows[first:end])
        writer.finish()
    return folder.name.removeprefix("images-")


def oracles(data: Store, fields: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """P@1 of predictors that know a synthetic shop, as fractions; {} of other datasets."""
    if fields["data"]["raw_dir"] != build.SYNTHETIC:
        return {}
    stats = json.loads((data.folder.parent / "raw" / "stats.json").read_text())
    return {name: {"P@1": value} for name, value in stats["P@1 of oracles"].items()}


def table(found: Mapping[str, Mapping[int, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Rows of a table: of each run its mean and deviation over seeds, and those of its gain.

    Args:
        found: run -> seed -> metric -> fraction; the first run is what gains are over.
    """
    rows, base = {}, next(iter(found.values()))
    for run, by_seed in found.items():
        summary = accuracy.summary({s: {"row": m} for s, m in by_seed.items()}, "row")
        gains = {s: {"row": {k: m[k] - base[s][k] for k in m}} for s, m in by_seed.items()}
        gained = accuracy.summary(gains, "row")
        for name in ("mean", "standard deviation"):
            if name in summary:
                rows[f"{run}, {name}"] = summary[name]
        for name in ("mean", "standard deviation"):
            if by_seed is not base and name in gained:
                rows[f"{run}, gain, {name}"] = gained[name]
    return rows


def parse(argv: list[str]) -> argparse.Namespace:
    """Arguments of a command line; exits with a message if it is mistaken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="minilm_l3/synthetic", help="of configs/vixml.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--no_shuffled", action="store_true", help="without shuffled images")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/image_gain"))
    parser.add_argument("--output", type=pathlib.Path, help="JSON file of the results")
    return parser.parse_args(argv)


def main() -> None:
    arguments = parse(sys.argv[1:])
    variant = arguments.variant
    try:
        fields = vixml.get_config(variant).to_dict()
        data = build.data(RunConfig.from_dict(fields))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if data.images is None:
        sys.exit(f"error: --variant: expected a dataset with images, got {variant}")
    runs = {"text only": (f"{variant},text_only", []), "text + images": (variant, [])}
    if not arguments.no_shuffled:
        other = f"--config.data.images.name={shuffled(data.images)}"
        runs["text + shuffled images"] = variant, [other]
    found: dict[str, dict[int, dict]] = {}
    for run, (of, overrides) in runs.items():
        workdir = arguments.workdir / accuracy.run_folder(of, overrides)
        found[run] = {s: accuracy.run(of, s, workdir, overrides) for s in arguments.seeds}
    known = oracles(data, fields)
    print(f"\n{image_vectors.report(data.images.folder)}")
    results = {}
    for kind in ("plain", "augmented"):
        by_run = {run: {s: m[kind] for s, m in by.items()} for run, by in found.items()}
        results[kind] = by_run
        rows = {f"knows the shop, sees {name}": row for name, row in known.items()}
        print(f"\n{data.name}, {kind}, test split, {len(arguments.seeds)} seeds, percent\n")
        print(format_table(rows | table(by_run), SHOWN))
    if arguments.output:
        settings = {"variant": variant, "dataset": data.name}
        settings["images"] = {"encoder": data.images.encoder, "percent": data.images.shares}
        content = {"benchmark": "image_gain", "settings": settings}
        content |= environment(accuracy.PACKAGES) | {"results": {"oracles": known} | results}
        save(arguments.output, content)


if __name__ == "__main__":
    main()
