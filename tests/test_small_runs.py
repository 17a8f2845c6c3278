"""The recipes as they are, over a handful of documents and labels: from records to predictions.

Rankings and metrics are those of `oracle`, with a filter, `only` and `exclude`.
"""

import json
import pathlib

import jax
import numpy as np
import oracle
import pytest

from configs import vixml
from xmc_jax.config import PredictConfig, RunConfig
from xmc_jax.retrieval import exact
from xmc_jax.runtime import sharding
from xmc_jax.shipping import artifact, exporting, predict_files
from xmc_jax.shipping.predictor import Predictor, Query
from xmc_jax.training import build, loop

pytestmark = pytest.mark.slow
CASES = pathlib.Path(__file__).parent / "cases" / "records"
WORDS = ["tea", "pot", "dog", "toy", "red", "blue", "card"]


def written(folder: pathlib.Path, documents: int, labels: int, most: int) -> pathlib.Path:
    """Records of so many training documents and labels; a document has up to `most` labels."""
    generator = np.random.default_rng(0)
    folder.mkdir()

    def text() -> str:
        return " ".join(generator.choice(WORDS, 3))

    def document(name: str) -> dict:
        count = generator.integers(1, min(most, labels) + 1)
        chosen = [f"l{i}" for i in generator.permutation(labels)]
        filtered = chosen[count : count + generator.integers(labels)]
        text_of = f"{text()} {name}"
        return {"id": name, "text": text_of, "labels": chosen[:count], "filter": filtered}

    rows = {"labels": [{"id": f"l{label}", "text": text()} for label in range(labels)]}
    for split, count in (("train", documents), ("test", 3)):
        rows[split] = [document(f"{split}{number}") for number in range(count)]
    for name, records in rows.items():
        lines = (json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def sets(matrix) -> list[set[int]]:
    return [set(row.tolist()) for row in np.split(matrix.indices, matrix.indptr[1:-1])]


@pytest.mark.parametrize(
    ("variant", "records", "k", "devices"),
    [
        ("minilm_l6/own,margin", CASES / "few_labels", 3, 8),
        ("tiny,ngame", (1, 1, 1), 2, 8),
        ("minilm_l6/own", (2, 20, 3), 20, 1),
        ("minilm_l6/own", CASES / "x01_exclude" / "records", 10, 1),
        *(
            pytest.param(*case, marks=pytest.mark.reliability)
            for case in (
                ("minilm_l6/own", CASES / "f01_readme_shop", 100, 1),
                ("tiny,ema", (19, 17, 17), 20, 2),
                ("tiny", (20, 9, 4), 5, 8),
            )
        ),
    ],
)
def test_a_recipe_ranks_as_its_formulas_say(
    backbone, tmp_path, caplog, variant, records, k, devices
):
    caplog.set_level("INFO", logger="absl")
    if isinstance(records, tuple):
        records = written(tmp_path / "records", *records)
    fields = vixml.get_config(variant).to_dict()
    fields["data"] |= {"dataset": "Few", "records": str(records), "data_dir": str(tmp_path)}
    fields["encoder"] |= {"backbone": str(backbone), "layers": None}
    fields["train"] |= {"encode_batch_size": 64}  # of random weights, nothing but speed
    fields["eval"] |= {"k": k, "ks": tuple(sorted({1, min(3, k), k}))}
    run = build.run(RunConfig.from_dict(fields), jax.devices()[:devices])
    assert "train.batch_size" not in caplog.text  # a run that is not trained is not told of it
    trained = loop.train(run, tmp_path / "run")
    small = run.config.train.batch_size < fields["train"]["batch_size"]
    assert ("train.batch_size" in caplog.text) == small
    check_evaluation(run, trained, fields["eval"])
    folder = exporting.whole(run, trained.step, trained.state, tmp_path)
    check_predictions(folder, fields["eval"]["augmented"], k)
    if "x01_exclude" in str(records):
        check_file(folder, CASES / "x01_exclude" / "new.jsonl", tmp_path / "out.jsonl", k)


def check_evaluation(run, trained, settings) -> None:
    data, found, k = run.data, trained.evaluation, settings["k"]
    labels = exact.to_host(run.embed_index(trained.state)).astype(np.float64)
    train = sharding.fetch(trained.state.tables.document_bank).astype(np.float64)
    test = run.embed(trained.state.params, "test").astype(np.float64)
    filtered = {(document, label) for document, label in data.filter("test").tolist()}
    of_train, truth = sets(data.positives("train")), sets(data.positives("test"))
    assert set(found.ids) == {"plain", "augmented"}
    for name, ids in found.ids.items():
        ranked = [row[row >= 0].tolist() for row in ids]
        for number, (document, row) in enumerate(zip(test, ranked)):
            allowed = [i for i in range(len(labels)) if (number, i) not in filtered]
            key = oracle.plain(document, labels, allowed)
            if name == "augmented":
                mix = settings["augmented"]
                key = oracle.augmented(document, labels, train, of_train, allowed, mix)
            oracle.check(row, key, k)
        weights = data.inverse_propensity
        expected = oracle.metrics(ranked, truth, weights, settings["ks"])
        assert found.metrics[name] == pytest.approx(expected, abs=1e-12), name


def check_predictions(folder, mix, k) -> None:
    predictor = Predictor.open(folder, index="exact")
    opened = predictor.artifact
    labels = opened.labels.embeddings.astype(np.float64)
    train = opened.documents.embeddings.astype(np.float64)
    names, positives = list(opened.labels.ids), sets(opened.documents.positives)
    queries = [
        Query("red tea pot"),
        Query("dog", exclude=names[::2]),
        Query("blue card", only=names[1:6], exclude=names[2:4]),
        Query("toy", exclude=names),
    ]
    for kind in ("plain", "augmented"):
        for query, found in zip(queries, predictor.predict(queries, k, kind)):
            document = predictor.embed(query)[0].astype(np.float64)
            allowed = [
                row
                for row, name in enumerate(names)
                if name not in query.exclude and (query.only is None or name in query.only)
            ]
            key = oracle.plain(document, labels, allowed)
            if kind == "augmented":
                key = oracle.augmented(document, labels, train, positives, allowed, mix)
            oracle.check([names.index(one.id) for one in found], key, k, near=1e-4)


def check_file(folder, source, target, k) -> None:
    """A document that excludes most labels gets as many as any other."""
    opened = artifact.open(folder)
    predict_files.predict(opened, PredictConfig(k=k), str(source), str(target))
    asked = [json.loads(line) for line in source.read_text().splitlines()]
    for record, line in zip(asked, target.read_text().splitlines(), strict=True):
        found = [label["id"] for label in json.loads(line)["labels"]]
        left = set(record.get("only", opened.labels.ids)) - set(record.get("exclude", ()))
        assert len(set(found)) == len(found) == min(k, len(left))
        assert set(found) <= left
