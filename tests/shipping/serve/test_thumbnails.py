"""Small pictures in an exported folder: written, found again, damaged; and where they come from."""

import io
import types

import numpy as np
import pytest

from xmc_jax.shipping import packed_thumbnails
from xmc_jax.shipping.packed_thumbnails import Thumbnails

PICTURES = {"b": b"beta", "a/1": b"", "ü": b"umlaut" * 5, "c": b"gamma"}


@pytest.fixture
def folder(tmp_path):
    assert packed_thumbnails.save(tmp_path, "labels", PICTURES.items()) == 4
    return tmp_path


def test_each_is_found_by_its_id(folder):
    opened = Thumbnails(folder, "labels")
    assert len(opened) == 4
    for name, data in PICTURES.items():
        assert name in opened and opened.get(name) == data
    for name in ("", "a", "a/2", "z", "\U0001f600"):
        assert name not in opened and opened.get(name) is None


def test_a_kind_without_pictures_has_no_files(tmp_path):
    assert packed_thumbnails.save(tmp_path, "documents", []) == 0
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_are_refused(folder):
    spans = np.load(folder / "labels.spans.npy")
    for wrong in (spans[:-1], spans + 1, spans[:, ::-1], spans.astype(np.int32), -spans):
        np.save(folder / "labels.spans.npy", wrong)
        with pytest.raises(ValueError, match="expected places of 4 pictures of labels"):
            Thumbnails(folder, "labels")
    np.save(folder / "labels.spans.npy", spans)
    (folder / "labels.images.bin").write_bytes(b"beta")
    with pytest.raises(ValueError, match="in 4 bytes, found others"):
        Thumbnails(folder, "labels")
    (folder / "labels.images.bin").unlink()
    with pytest.raises(ValueError, match="expected pictures of labels, found: "):
        Thumbnails(folder, "labels")


def test_the_first_picture_of_each_item(tmp_path):
    """Of what can be read; of each id once."""
    images = pytest.importorskip("PIL.Image", reason='needs the extra "vision"')
    from xmc_jax.images import image_sources
    from xmc_jax.images import thumbnails as making

    for name, colour in (("a_0", "red"), ("a_1", "blue"), ("c_0", "lime")):
        images.new("RGB", (200, 100), colour).save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    uids = ["c", "a", "none", "b"]
    made = dict(making.make(image_sources.open(tmp_path, "label", uids), uids))
    assert set(made) == {"a", "c"}
    for name, colour in (("a", (255, 0, 0)), ("c", (0, 255, 0))):
        picture = images.open(io.BytesIO(made[name]))
        assert picture.format == "WEBP" and picture.size == (96, 48)
        assert np.abs(np.asarray(picture.convert("RGB"), int) - colour).max() < 12


@pytest.mark.slow
def test_export_takes_them_from_the_dataset(tmp_path):
    pytest.importorskip("PIL.Image", reason='needs the extra "vision"')
    from configs import vixml
    from xmc_jax.config import RunConfig
    from xmc_jax.data.synthetic import product_set
    from xmc_jax.shipping import exporting

    def exported(fields, **settings):
        config = RunConfig.from_dict(fields | {"export": settings})
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return exporting._thumbnails(folder, types.SimpleNamespace(config=config)), folder

    fields = vixml.get_config("minilm_l3/synthetic").to_dict()
    fields["data"]["data_dir"] = str(tmp_path / "data")
    fields["data"]["synthetic"] = {"documents": 60, "labels": 30, "seed": 0}
    section, folder = exported(fields)
    config = product_set.SyntheticConfig(documents=60, labels=30)
    expected = {}
    for kind, share in (("labels", 0.96), ("documents", 0.79)):
        opened = Thumbnails(folder, kind)
        assert len(opened) == section[kind]
        count = {"labels": config.labels, "documents": config.documents}[kind]
        assert abs(section[kind] / count - share) < 0.15
        expected[kind] = section[kind]
    assert section["folder"] == folder.name
    section, _ = exported(fields, documents=False)
    assert (section["labels"], section["documents"]) == (expected["labels"], 0)
    # Where there are no files there are no pictures, unless they are asked for.
    fields["data"]["images"]["source"] = str(tmp_path / "nowhere")
    assert exported(fields)[0] is None
    with pytest.raises(ValueError, match=r"export\.thumbnails: expected image files, found none"):
        exported(fields, thumbnails="always")
