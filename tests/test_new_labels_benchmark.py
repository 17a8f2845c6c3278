"""benchmarks/new_labels.py: what is held out, what is measured, and the choice that was made."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from benchmarks import accuracy, new_labels
from configs import vixml
from xmc_jax.config import NewLabelsConfig
from xmc_jax.data import raw_folder
from xmc_jax.data.csr import Csr
from xmc_jax.training import build, loop

RESULTS = pathlib.Path(__file__).parents[1] / "benchmarks" / "results"
HELD = np.array([False, True, False, False, True, False])


def csr(rows: list[list[int]], columns: int) -> Csr:
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return Csr(indptr, np.array([x for row in rows for x in row], np.int32), None, columns)


def sets(matrix: Csr) -> list[list[int]]:
    return [row.tolist() for row in np.split(matrix.indices, matrix.indptr[1:-1])]


def test_a_fifth_of_the_labels_is_drawn_anew_by_seed_and_split():
    drawn = {
        (seed, split): new_labels.draw(2_598, seed, split)
        for seed in (0, 1)
        for split in new_labels.SPLITS
    }
    assert {held.sum() for held in drawn.values()} == {520}
    assert len({held.tobytes() for held in drawn.values()}) == 4
    np.testing.assert_array_equal(drawn[0, "test"], new_labels.draw(2_598, 0, "test"))


def test_nothing_of_held_out_labels_is_left(topics, tmp_path):
    dataset = raw_folder.read(raw_folder.find(topics), "Topics-40", "utf-8")
    held = new_labels.draw(40, 0, "test")
    held[5], held[6] = True, False  # both are in the filter
    new_labels.write(new_labels.without(dataset, held), tmp_path)
    left = raw_folder.read(raw_folder.find(tmp_path), "Topics-left", "utf-8")
    kept = np.flatnonzero(~held)
    assert left.splits["label"].titles == [dataset.splits["label"].titles[i] for i in kept]

    def expected(split: str) -> list[tuple[str, str, list[int]]]:
        items = dataset.splits[split]
        rows = zip(items.uids, items.titles, sets(items.positives))
        return [(uid, title, [i for i in labels if not held[i]]) for uid, title, labels in rows]

    for split in ("train", "test"):
        items = left.splits[split]
        labels = [[int(kept[i]) for i in row] for row in sets(items.positives)]
        found = list(zip(items.uids, items.titles, labels))
        # Documents are trained on if a label is left, and measured in any case.
        assert found == [row for row in expected(split) if row[2] or split == "test"]
    assert len(left.splits["train"].uids) < len(dataset.splits["train"].uids)
    pairs = [(d, label) for d, label in dataset.filter.tolist() if not held[label]]
    assert [(d, int(kept[label])) for d, label in left.filter.tolist()] == pairs
    assert 0 < len(pairs) < len(dataset.filter)


def test_measures_are_those_of_the_definitions(monkeypatch):
    """Four documents: two with new labels, one without, one without any; one pair is filtered."""
    positives = csr([[0, 1, 4], [4], [2, 3], []], 6)
    ground = new_labels.Ground(positives, np.array([[0, 2]], np.int32), HELD)
    np.testing.assert_array_equal(ground.with_new, [0, 1])
    np.testing.assert_array_equal(ground.others, [2])
    assert ground.depth == 101
    ranked = np.array(
        [[2, 4, 0, 5, 3, 1], [0, 1, 2, 3, 5, 4], [3, 0, 1, 4, 5, 2], [0, 1, 2, 3, 4, 5]]
    )
    among = np.array([[4, 1], [1, 4], [1, 4], [1, 4]])
    found = ground.measure(ranked, among)
    # Document 0 keeps 4, 0, 5, 3, 1: hits at 1, 2 and 5. Document 1 hits at 6 alone.
    assert found == pytest.approx(
        {
            "P@5": (3 / 5 + 0) / 2,
            "R@100": 1.0,
            "new R@10": 1.0,
            "new R@100": 1.0,
            "among new P@1": 1 / 2,
            "among new R@10": 1.0,
            "among new R@100": 1.0,
            "others P@5": 1 / 5,
            "all P@5": (3 / 5 + 0 + 1 / 5) / 3,
        }
    )
    missed = ground.measure(ranked[:, :2])
    assert missed["new R@10"] == pytest.approx((1 / 2 + 0) / 2)
    assert "among new P@1" not in missed


def test_popularity_puts_new_labels_last():
    trained = dataclasses.make_dataclass("Trained", ["held", "test", "positives"])(
        HELD, np.zeros((2, 3)), csr([[2], [2, 5], [3, 5], [2]], 6)
    )
    asked = []
    ground = dataclasses.make_dataclass("Ground", ["measure"])(lambda *ids: asked.extend(ids))
    new_labels.popularity(trained, ground)
    np.testing.assert_array_equal(asked[0], [[2, 5, 3, 0, 1, 4]] * 2)
    np.testing.assert_array_equal(asked[1], [[1, 4]] * 2)


def test_the_choice_costs_no_precision():
    means = {name: {"all P@5": 0.2, "R@100": 0.5} for name in new_labels.configs()}
    text = new_labels.describe(NewLabelsConfig(how="text", scale=1.0))
    dear = NewLabelsConfig(neighbours=20, threshold=0.7, temperature=0.1, scale=1.05)
    good = NewLabelsConfig(neighbours=10, threshold=0.8, temperature=0.1, scale=0.9)
    for config, row in ((dear, (0.19, 0.7)), (good, (0.21, 0.6))):
        name = new_labels.describe(config)
        assert name in means
        means[name] = dict(zip(("all P@5", "R@100"), row))
    assert new_labels.choose(means) == good
    assert new_labels.choose(means, 1).neighbours == 1
    means[text]["all P@5"] = 0.3
    with pytest.raises(ValueError, match="expected a way that costs no P@5"):
        new_labels.choose(means)


def test_defaults_are_what_validation_chose():
    content = json.loads((RESULTS / "new_labels_validation.json").read_text())
    assert content["settings"]["split"] == "validation"
    means, chosen = content["results"]["means"], content["results"]["chosen"]
    assert NewLabelsConfig(**chosen["nearest labels"]) == NewLabelsConfig()
    for name, most in (("nearest label", 1), ("nearest labels", None)):
        config = new_labels.choose(means, most)
        assert NewLabelsConfig(**chosen[name]) == config == new_labels.WAYS[name]


def test_a_mistaken_folder_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"error: .*expected a folder of raw files"):
        new_labels.main([f"--raw={tmp_path / 'none'}", f"--workdir={tmp_path}"])


@pytest.fixture
def untrained(monkeypatch):
    """Runs of the benchmark that are taken as they begin, on little and on one device."""
    get_config, run = vixml.get_config, build.run

    def small(variant: str):
        config = get_config(variant)
        config.train.batch_size = 64
        return config

    monkeypatch.setattr(vixml, "get_config", small)
    monkeypatch.setattr(build, "run", lambda fields: run(fields, jax.devices()[:1]))
    monkeypatch.setattr(accuracy, "run", lambda *_: None)
    monkeypatch.setattr(loop, "restore", lambda run, _: (0, run.initial_state()))


@pytest.mark.scale
def test_the_command_measures_every_row(untrained, topics, tmp_path):
    output = tmp_path / "results.json"
    flags = [f"--raw={topics}", "--variant=tiny", f"--workdir={tmp_path}", f"--output={output}"]
    content = new_labels.main([*flags, "--seeds", "0"])
    assert json.loads(output.read_text()) == json.loads(json.dumps(content))
    plain, mixed = content["results"]["plain"], content["results"]["augmented"]
    trained = ("without them", *new_labels.WAYS, "all labels")
    assert tuple(plain) == ("popularity", "zero-shot", *trained)
    assert tuple(mixed) == trained
    assert {tuple(sorted(row["mean"])) for row in plain.values()} <= {
        tuple(sorted(new_labels.COLUMNS)),
        tuple(sorted(x for x in new_labels.COLUMNS if not x.startswith("among"))),
    }
    mean = {name: row["mean"] for name, row in plain.items()}
    assert mean["without them"]["new R@100"] == mean["popularity"]["new R@10"] == 0
    assert mean["text"]["new R@100"] > 0
    # Of 40 labels all are among the best 100.
    assert mean["all labels"]["R@100"] == pytest.approx(1) == mean["text"]["R@100"]
