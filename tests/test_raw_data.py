"""Benchmarks read any raw folder: compressed or not, JSON or lines and matrices, with contents."""

import argparse
import gzip
import json

import pytest

from benchmarks import clustering, raw_data, tfidf


def of(folder, *flags):
    parser = argparse.ArgumentParser()
    raw_data.add_flags(parser)
    return raw_data.of(parser.parse_args([f"--raw={folder}", *flags]))


@pytest.fixture
def unpacked(topics, tmp_path):
    """The same as lines of texts and matrices of labels, not compressed."""
    folder = tmp_path / topics.name
    folder.mkdir()
    labels = None
    for name in ("lbl", "trn", "tst"):
        with gzip.open(topics / f"{name}.json.gz", "rt", encoding="utf-8") as file:
            items = [json.loads(line) for line in file]
        labels = labels or len(items)
        (folder / f"{name}.raw.txt").write_text("".join(f"{one['title']}\n" for one in items))
        rows = [" ".join(f"{label}:1" for label in one.get("target_ind", ())) for one in items]
        text = f"{len(items)} {labels}\n" + "".join(f"{row}\n" for row in rows)
        (folder / f"{name}_X_Y.txt").write_text(text)
    (folder / "filter_labels_test.txt").write_text((topics / "filter_labels_test.txt").read_text())
    return folder


def test_the_figures_do_not_depend_on_the_files(topics, unpacked):
    data = of(unpacked)
    assert (data.dataset, data.text, data.propensity) == ("Topics-40", "title_content", (0.55, 1.5))
    found = tfidf.evaluate(data)
    assert found == tfidf.evaluate(of(topics)) and found["P@1"] > 0
    one = clustering.tfidf_vectors(of(topics, "--text=title"), 8)
    assert one == pytest.approx(clustering.tfidf_vectors(data, 8))


def test_constants_and_texts_by_name_or_by_flags(topics):
    data = of("x/LF-AmazonTitles-131K")
    assert (data.text, data.propensity) == ("title", (0.6, 2.6))
    data = of(topics, "--dataset=LF-Amazon-131K", "--propensity", "0.5", "0.4", "--text=title")
    assert (data.dataset, data.text, data.propensity) == ("LF-Amazon-131K", "title", (0.5, 0.4))
    assert data.fields()["propensity_b"] == 0.4
