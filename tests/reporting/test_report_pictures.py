"""Thumbnails: whose they are, how large, and what is said where there are none."""

import base64
import io
import sys

import numpy as np
import pytest
from PIL import Image

from xmc_jax.data import packaged, prepare, store
from xmc_jax.images import image_sources
from xmc_jax.reporting import embedded_images, page


def colour(split: str, i: int) -> tuple[int, int, int]:
    return (8 * (i % 30), 100 if split == "test" else 200, 255 - 8 * (i % 30))


@pytest.fixture(scope="module")
def source(data, tmp_path_factory) -> image_sources.Place:
    """A picture of one colour for every item whose number is no multiple of five."""
    folder = tmp_path_factory.mktemp("pictures")
    for split in ("train", "test", "label"):
        (folder / split).mkdir()
        for i, uid in enumerate(data.uids(split)):
            if i % 5:
                picture = Image.new("RGB", (240, 120), colour(split, i))
                picture.save(folder / split / f"{uid}.png")
    (folder / "test" / f"{data.uids('test')[1]}.png").write_bytes(b"no picture")
    return image_sources.Place(folder)


def opened(uri: str) -> Image.Image:
    head, _, data = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data, validate=True)))


def test_each_item_has_its_own_picture(source, data):
    wanted = [("test", i) for i in (7, 3, 1, 0, 3)] + [("label", 7)]
    found, reason = embedded_images.data_uris(source, data, wanted)
    # Of document 0 there is none, and of document 1 what is there is none.
    assert list(found) == [("test", 7), ("test", 3), ("label", 7)] and reason == ""
    for (split, i), uri in found.items():
        picture = opened(uri)
        assert picture.size == (96, 48)
        mean = np.asarray(picture, np.float64).mean(axis=(0, 1))
        np.testing.assert_allclose(mean, colour(split, i), atol=6)


def test_held_out_documents_have_those_of_the_raw_training_documents(raw, source, tmp_path):
    folder = prepare.prepare(
        prepare.PrepareConfig(
            dataset="Hostile",
            data_dir=tmp_path,
            tokenizer=str(packaged.minilm()),
            max_length=8,
            raw=raw,
            validation_fraction=0.3,
        )
    )
    held_out = store.open(folder)
    rows = np.load(folder / "test.raw_rows.npy")
    wanted = [("test", i) for i in range(held_out.num_test)]
    found, _ = embedded_images.data_uris(source, held_out, wanted)
    assert [i for _, i in found] == [i for i, row in enumerate(rows) if row % 5]
    for (_, i), uri in found.items():
        mean = np.asarray(opened(uri), np.float64).mean(axis=(0, 1))
        np.testing.assert_allclose(mean, colour("train", int(rows[i])), atol=6)


def test_there_are_few_and_small_ones(source, data, monkeypatch):
    wanted = [("label", i) for i in range(30)]
    every, _ = embedded_images.data_uris(source, data, wanted)
    assert len(every) == 24
    monkeypatch.setattr(embedded_images, "_PICTURE_BYTES", sum(map(len, every.values())) // 2)
    some, _ = embedded_images.data_uris(source, data, wanted)
    assert 8 <= len(some) <= 13 and list(some) == list(every)[: len(some)]
    monkeypatch.setattr(embedded_images, "_PICTURES", 4)
    assert (
        len(embedded_images.data_uris(source, data, wanted)[0]) == 3
    )  # the first four, of which one has none


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("_ITEMS", 100, "of up to 100 items"),
        ("_SOURCE_BYTES", -1, "of folders of up to"),
        ("PIL", None, "xmc_jax[vision]"),
        ("source", "absent", "is not there any more"),
        ("source", "damaged", "expected a Parquet file, found a damaged one"),
    ],
)
def test_it_says_why_there_are_none(
    finished, source, data, tmp_path, monkeypatch, name, value, said
):
    if name == "source":
        source = image_sources.Place(tmp_path / value)
    if value == "damaged":
        source.path.mkdir()
        (source.path / "test.parquet").write_bytes(b"PAR1" * 9)
    elif name == "PIL":
        monkeypatch.setitem(sys.modules, name, None)
    elif value != "absent":
        monkeypatch.setattr(embedded_images, name, value)
    found, reason = embedded_images.data_uris(source, data, [("test", 2)])
    assert found == {} and reason.startswith("No pictures: ") and said in reason
    text = page.write(finished.folder, data, pictures=source).read_text()
    assert "No pictures: " in text and "<img" not in text


def test_a_page_has_them(finished, source, data, parsed):
    read = parsed(page.write(finished.folder, data, pictures=source).read_text())
    images = [attributes for attributes, _ in read.named("img")]
    assert len(images) > 30 and {"item", "small"} == {a["class"] for a in images}
    assert all(max(opened(a["src"]).size) <= 96 for a in images)
    assert (finished.folder / page.NAME).stat().st_size < 3 << 20


def test_no_source_needs_no_reason(data):
    assert embedded_images.data_uris(None, data, [("test", 2)]) == ({}, "")
