"""Synthetic items: what they follow from, what titles and pictures give away, and the files."""

import collections
import dataclasses
import io
import itertools
import json
import re
import sys

import numpy as np
import pytest

pytest.importorskip("PIL", reason="pictures need the extra vision")
pq = pytest.importorskip("pyarrow.parquet", reason="pictures need the extra vision")

from PIL import Image  # noqa: E402

from xmc_jax.data import raw_folder  # noqa: E402
from xmc_jax.data.synthetic import product_set  # noqa: E402
from xmc_jax.data.synthetic.product_set import Shop, SyntheticConfig  # noqa: E402

SMALL = SyntheticConfig(documents=101, test_documents=40, labels=90, pixels=24)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A raw folder of SMALL."""
    folder = tmp_path_factory.mktemp("synthetic") / "Synthetic-100"
    product_set.generate(SMALL, folder)
    return folder


@pytest.fixture(scope="module")
def shop():
    """The default difficulty."""
    return Shop(SyntheticConfig(test_documents=1500))


def read(folder, fraction=0.0):
    files = raw_folder.find(folder, train_only=fraction > 0)
    return raw_folder.read(files, folder.name, "utf-8", fraction)


def pictures(folder, split):
    return pq.read_table(folder / f"{split}.images.parquet").to_pylist()


def test_an_item_does_not_depend_on_how_many_there_are():
    few, many = Shop(SMALL), Shop(dataclasses.replace(SMALL, documents=10**6, test_documents=7))
    for number in (0, 1, 57, 100):
        assert few.item("train", number) == many.item("train", number)
        assert few.picture("train", number, 0) == many.picture("train", number, 0)
    assert few.item("test", 3) == many.item("test", 3)
    assert few.item("label", 3) == many.item("label", 3)
    assert many.item("train", 10**6 - 1).positives  # at once, without those before it


def test_an_item_does_not_depend_on_what_was_made_before(made):
    items = list(Shop(SMALL).items("train"))
    assert items[83] == Shop(SMALL).item("train", 83)
    assert read(made).splits["train"].titles == [item.title for item in items]


def test_seeds_and_splits_are_different_shops():
    titles = [
        tuple(item.title for item in itertools.islice(Shop(config).items(split), 20))
        for config in (SMALL, dataclasses.replace(SMALL, seed=1))
        for split in product_set.SPLITS
    ]
    assert len(set(titles)) == 6


def test_the_same_config_gives_the_same_bytes(made, tmp_path):
    product_set.generate(SMALL, tmp_path / "again" / made.name)
    files = sorted(path.name for path in made.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "again" / made.name).iterdir())
    for name in files:
        assert (made / name).read_bytes() == (tmp_path / "again" / made.name / name).read_bytes()


def test_reads_as_an_extreme_classification_dataset(made):
    dataset = read(made)
    assert {s: len(items.titles) for s, items in dataset.splits.items()} == {
        "train": 101,
        "test": 40,
        "label": 90,
    }
    assert len(dataset.filter) == 0 and dataset.merged == {"train": 0, "test": 0}
    for split in ("train", "test"):
        counts = dataset.splits[split].positives.counts()
        assert counts.min() >= 1 and counts.max() <= 8


def test_siblings_show_one_product_and_stay_together(made):
    dataset = read(made)
    groups = dataset.groups["train"]
    np.testing.assert_array_equal(groups, np.arange(101) // 2)
    assert not set(groups) & set(dataset.groups["test"])
    kept = read(made, 0.2)
    assert not set(kept.groups["train"]) & set(kept.groups["test"])
    first, second = (Shop(SMALL).item("train", number) for number in (10, 11))
    assert (first.group, first.category, first.look) == (second.group, second.category, second.look)
    assert first.title != second.title


def test_pictures_lie_in_the_order_of_items(made):
    shop = Shop(SMALL)
    for split, name in product_set.SPLITS.items():
        rows = [(row["uid"], row["k"]) for row in pictures(made, name)]
        assert rows == [(item.uid, k) for item in shop.items(split) for k in range(item.images)]
    row = pictures(made, "tst")[5]
    assert row["bytes"] == shop.picture("test", int(row["uid"].removeprefix("tst")), row["k"])
    image = Image.open(io.BytesIO(row["bytes"]))
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", (24, 24))


def test_pictures_are_read_by_the_embedding_command(made):
    from xmc_jax.images import image_sources

    uids = read(made).splits["label"].uids
    found = list(image_sources.open(made, "label", uids).read(limit=3))
    expected = [(uids.index(row["uid"]), row["k"], row["bytes"]) for row in pictures(made, "lbl")]
    assert found == expected


def test_labels_are_the_items_of_the_same_look_and_category(shop):
    labels = [shop.item("label", number) for number in range(1000)]
    others = 0
    for item in itertools.islice(shop.items("train"), 400):
        assert {labels[label].category for label in item.positives} == {item.category}
        looks = {labels[label].attributes for label in item.positives}
        assert len(looks) == 1
        others += looks != {item.attributes}
    assert 0.01 < others / 400 < 0.1  # noise, 0.05 less those that draw their own look


@pytest.mark.parametrize("count", [1, 2, 34, 35, 36, 1000])
def test_each_label_has_one_look(count):
    shop = Shop(SyntheticConfig(labels=count))
    listed = []
    for category in range(shop.num_categories):
        for look in range(len(shop.category(category).looks)):
            found = shop.labels_of(category, look)
            assert 1 <= len(found) <= 8
            assert all(shop.item("label", n).category == category for n in found)
            assert all(shop.item("label", n).look == look for n in found)
            listed += found
    assert sorted(listed) == list(range(count))


def test_looks_of_a_category_differ_in_what_titles_may_state(shop):
    for category in range(shop.num_categories):
        looks = shop.category(category).looks
        assert len({look[:3] for look in looks}) == len(looks)
    # And the shop has them in several categories, so that a picture does not tell which.
    styles = collections.Counter(
        look for c in range(shop.num_categories) for look in shop.category(c).looks
    )
    assert len(styles) == 48 and np.mean(list(styles.values())) > 3


def test_titles_state_some_attributes_and_nothing_of_the_others(shop):
    stated = []
    for item in itertools.islice(shop.items("train"), 500):
        stated.append(item.stated)
        words = f" {re.sub('[^a-z0-9-]+', ' ', item.title.lower())} "
        for told, value, names in zip(
            item.stated,
            item.attributes,
            (product_set.SHAPES, product_set.COLOURS, product_set.PATTERNS),
        ):
            found = {n for n, ways in enumerate(names) for way in ways if f" {way} " in words}
            assert found == ({value} if told else set()), item.title
    np.testing.assert_allclose(np.mean(stated, axis=0), 0.4, atol=0.07)


def test_pictures_of_equal_looks_differ_in_most_pixels(shop):
    by_look = collections.defaultdict(list)
    for number in range(300):
        by_look[shop.item("train", number).attributes].append(number)
    first, second = next(numbers[:2] for numbers in by_look.values() if len(numbers) > 1)
    arrays = [
        np.asarray(Image.open(io.BytesIO(shop.picture("train", number, k))), np.int64)
        for number, k in ((first, 0), (first, 1), (second, 0))
    ]
    for one, other in itertools.combinations(arrays, 2):
        assert (one != other).mean() > 0.8


def test_shares_of_items_with_images(shop):
    counts = np.array([item.images for item in itertools.islice(shop.items("train"), 1000)])
    assert set(counts) == {0, 1, 2, 3}
    assert abs((counts > 0).mean() - 0.79) < 0.05
    label_counts = np.array([item.images for item in shop.items("label")])
    assert abs((label_counts > 0).mean() - 0.96) < 0.03
    none = Shop(dataclasses.replace(shop.config, image_share=0.0, label_image_share=1.0))
    assert not any(none.item("test", n).images for n in range(50))
    assert all(none.item("label", n).images for n in range(50))


def test_label_frequencies_have_a_head_and_a_tail(shop):
    positives = np.concatenate([item.positives for item in shop.items("train")])
    frequency = np.sort(np.bincount(positives, minlength=1000))[::-1]
    assert frequency[:100].sum() > 0.35 * frequency.sum()
    assert (frequency <= 2).mean() > 0.25
    assert frequency[0] > 10 * np.median(frequency)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_default_difficulty_leaves_room_for_images(seed):
    found = product_set.oracles(Shop(SyntheticConfig(test_documents=1000, seed=seed)))
    assert 0.5 < found["text"] < 0.6
    assert found["text and image"] > found["text"] + 0.2
    assert found["image"] < 0.5
    assert 0.85 < found["attributes"] < 0.95
    assert found["text and image"] < found["attributes"]


def test_oracles_know_what_they_are_shown():
    told = product_set.oracles(Shop(dataclasses.replace(SMALL, stated=1.0, image_share=0.0)))
    assert told["text"] == told["attributes"] == told["text and image"]
    shown = product_set.oracles(Shop(dataclasses.replace(SMALL, stated=0.0, image_share=1.0)))
    assert shown["text and image"] == shown["attributes"] > shown["text"] + 0.3


def test_stats_say_what_was_asked_and_found(made):
    found = json.loads((made / "stats.json").read_text())
    assert found["name"] == "Synthetic-100"
    assert found["synthetic"] == {"format": 1, **dataclasses.asdict(SMALL)}
    images = {split: len(pictures(made, name)) for split, name in product_set.SPLITS.items()}
    assert {split: found[split]["images"] for split in images} == images
    per_document = read(made).splits["train"].positives.counts().mean()
    assert found["train"]["labels_per_document"] == pytest.approx(per_document, abs=1e-3)
    assert found["P@1 of oracles"] == product_set.oracles(Shop(SMALL))


def test_the_command_makes_a_folder_once(tmp_path, capsys):
    flags = ["--documents=6", "--labels=5", "--pixels=16", f"--out={tmp_path / 'made'}"]
    assert product_set.main(flags) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["synthetic"]["test_documents"] == printed["test"]["count"] == 3
    when = (tmp_path / "made" / "stats.json").stat().st_mtime_ns
    assert product_set.main(flags) == 0
    assert json.loads(capsys.readouterr().out) == printed
    assert (tmp_path / "made" / "stats.json").stat().st_mtime_ns == when
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made"]
    assert product_set.main([*flags, "--seed=1"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "choose another folder or delete it" in error


def test_an_interrupted_run_leaves_no_folder(tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(product_set, "oracles", interrupt)
        flags = ["--documents=3", "--labels=5", "--pixels=16", f"--out={tmp_path / 'made'}"]
        assert product_set.main(flags) == 130
    assert not (tmp_path / "made").exists()
    assert product_set.main(flags) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made"]
    assert "run the same command again" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--documents=0", "documents: expected at least 1, got 0"),
        ("--stated=1.5", "stated: expected at most 1, got 1.5"),
        ("--looks=49", "looks: expected at most the 48 styles"),
        ("--labels=many", "--labels: expected a whole number, such as 1000, got 'many'"),
        ("--colour=red", "unrecognized arguments"),
    ],
)
def test_bad_flags_are_refused_in_one_line(tmp_path, capsys, flag, message):
    assert product_set.main([f"--out={tmp_path / 'made'}", flag]) == 2
    error = capsys.readouterr().err
    assert error.startswith("synthetic: ") and error.count("\n") == 1 and message in error


def test_a_missing_library_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert product_set.main([f"--out={tmp_path / 'made'}"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install 'xmc_jax[vision]'" in error
