"""An exported folder: it opens wherever it lies, and not if anything in it is not what it was."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from xmc_jax.data.store import Split
from xmc_jax.files import digests
from xmc_jax.retrieval import exact
from xmc_jax.shipping import artifact, contents, exporting
from xmc_jax.shipping.predictor import Predictor

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def folder(exported, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(exported.folder, tmp_path / "moved"))


def change(folder: pathlib.Path, function, *names: str) -> None:
    """Changes artifact.json, as one who knows the format would: `names` get new digests."""
    path = folder / contents.MANIFEST
    manifest = json.loads(path.read_text())
    function(manifest)
    for name in names:
        content = folder / name
        manifest["files"][name] = {
            "bytes": content.stat().st_size,
            "sha256": digests.sha256(content),
        }
    path.write_text(json.dumps(manifest))


def flip(path: pathlib.Path) -> None:
    """Changes a bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_opens_where_it_was_moved_to_and_with_other_texts_for_people(exported, folder):
    (folder / "README.md").write_text("ours\n")
    (folder / "LICENSE.md").unlink()
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    opened, data = artifact.open(folder), exported.run.data
    assert (opened.name, opened.step, opened.folder) == ("topics", 0, folder)
    assert list(opened.labels.ids) == data.uids("label")
    assert list(opened.labels.texts) == data.texts("label")
    assert list(opened.documents.texts) == data.texts("train")
    np.testing.assert_array_equal(opened.labels.frequency, data.label_frequency)
    positives = data.positives("train")
    np.testing.assert_array_equal(opened.documents.positives.indices, positives.indices)
    np.testing.assert_array_equal(opened.documents.positives.indptr, positives.indptr)
    for kind in (opened.labels, opened.documents):
        np.testing.assert_allclose(np.linalg.norm(kind.embeddings, axis=1), 1, atol=1e-5)
    prototypes, tables = opened.prototypes(), exported.state.tables
    np.testing.assert_allclose(prototypes.centroids, tables.centroids, atol=1e-6)
    np.testing.assert_array_equal(prototypes.free_vector_of, tables.free_vector_of)
    assert prototypes.config == exported.run.config.prime


def test_labels_are_encoded_once(exported, tmp_path, monkeypatch):
    run, state = exported.run, exported.state
    labels, inputs, read = run.data.label, Split.inputs, []

    def counted(split, rows):
        if split is labels:
            read.extend(rows)
        return inputs(split, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Split, "inputs", counted)
        folder = exporting.whole(run, 0, state, tmp_path)
    assert sorted(read) == list(range(len(labels)))
    assert not (folder / "label_texts.npy").exists()
    for name, expected in (
        ("labels/embeddings.npy", exact.to_host(run.embed_index(state))),
        ("prototypes/text.npy", run.embed(state.params, "label", pooled=True)),
    ):
        np.testing.assert_allclose(np.load(folder / name), expected, atol=1e-6)


def test_says_nothing_of_where_it_was_made(exported):
    """Neither folders of the machine nor of the run, but in the config, which is for the record."""
    manifest = json.loads((exported.folder / contents.MANIFEST).read_text())
    manifest.pop("config")
    assert str(exported.folder.parent) not in json.dumps(manifest)
    assert all(not name.startswith("/") for name in manifest["files"])


def cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (lambda f: flip(f / "model.safetensors"), "model.safetensors: expected sha256"),
        (lambda f: cut(f / "labels/embeddings.npy"), "bytes, found"),
        (
            lambda f: (f / "tokenizer.json").unlink(),
            r"tokenizer.json: expected \d+ bytes, found no",
        ),
        (lambda f: shutil.rmtree(f / "documents"), "bytes, found no file"),
        (
            lambda f: (f / "artifact.json").unlink(),
            "artifact.json: expected artifact.json of an exported model, found none",
        ),
        (
            lambda f: (f / "artifact.json").write_text("[]"),
            "of an exported model, found a damaged file",
        ),
        (lambda f: (f / "artifact.json").write_text("[" * 10**5), "found a damaged file"),
        (lambda f: change(f, lambda m: m.update(format=2)), "expected format 1, found 2; export"),
        (lambda f: change(f, lambda m: m.update(files=[])), "files: expected an object, found"),
        (lambda f: change(f, lambda m: m.pop("labels")), "labels: expected a value, found none"),
        (
            lambda f: change(f, lambda m: m["model"].update(pooling="sum")),
            "model: pooling: expected 'mean'",
        ),
        (lambda f: change(f, lambda m: m["model"].pop("text")), "model: text: expected a value"),
        (lambda f: change(f, lambda m: m["model"].update(new=1)), "model: new: no such field"),
        (
            lambda f: change(f, lambda m: m["model"].update(width="32")),
            "model: width: expected a valid integer, found '32'",
        ),
        (
            lambda f: change(f, lambda m: m["ranking"].update(temperature=0)),
            "ranking: temperature: expected greater than 0, found 0",
        ),
        # Names that lead out of the folder.
        (
            lambda f: change(
                f, lambda m: m["files"].update({"../../etc/passwd": {"bytes": 1, "sha256": ""}})
            ),
            "expected a name within the folder, found '../../etc/passwd'",
        ),
        (
            lambda f: change(
                f, lambda m: m["files"].update({"/etc/passwd": {"bytes": 1, "sha256": ""}})
            ),
            "expected a name within the folder, found '/etc/passwd'",
        ),
        *(
            (
                lambda f, part=part: change(f, lambda m: m[part].update(folder="../labels")),
                "expected a name within the folder, found '../labels'",
            )
            for part in ("labels", "prototypes")
        ),
        # Parts of another model.
        *(
            (
                lambda f, part=part: change(f, lambda m: m[part].update(model="0" * 64)),
                f"expected {part} of the model",
            )
            for part in ("labels", "prototypes")
        ),
        (
            lambda f: [
                flip(f / "model.safetensors"),
                change(f, lambda m: None, "model.safetensors"),
            ],
            "its labels are of another model: export both together",
        ),
        # Files that are read, and that nobody recorded.
        (
            lambda f: shutil.copy(f / "model.safetensors", f / "model-2.safetensors"),
            "model-2.safetensors: expected only files that artifact.json names",
        ),
        (
            lambda f: (f / "labels/more.npy").write_bytes(b""),
            "labels/more.npy: expected only files that artifact.json names",
        ),
        (
            lambda f: change(f, lambda m: m["files"].pop("labels/embeddings.npy")),
            "labels/embeddings.npy: expected only files",
        ),
        # Contents that do not fit, though the digests do.
        (
            lambda f: [
                np.save(f / "labels/embeddings.npy", np.zeros((40, 31), np.float32)),
                change(f, lambda m: None, "labels/embeddings.npy"),
            ],
            r"embeddings.npy: expected float32\[40, 32\], found float32\[40, 31\]",
        ),
        (
            lambda f: [
                np.save(f / "labels/embeddings.npy", np.array([{}], object), allow_pickle=True),
                change(f, lambda m: None, "labels/embeddings.npy"),
            ],
            "labels/embeddings.npy: expected an array, found: Array can't be memory-mapped",
        ),
        (
            lambda f: [
                np.save(f / "documents/positives.indices.npy", _column(f, 40)),
                change(f, lambda m: None, "documents/positives.indices.npy"),
            ],
            r"positives.indices.npy: expected numbers in \[0, 40\), found others",
        ),
        (
            lambda f: [
                np.save(f / "documents/positives.indptr.npy", np.arange(201)[::-1]),
                change(f, lambda m: None, "documents/positives.indptr.npy"),
            ],
            "positives.indptr.npy: expected ascending offsets from 0",
        ),
        (
            lambda f: change(f, lambda m: m["labels"].update(count=39)),
            "labels/ids: expected 39 texts, found 40",
        ),
    ],
)
def test_whatever_is_not_as_it_was_is_refused_in_one_line(folder, tamper, message):
    tamper(folder)
    with pytest.raises(ValueError, match=message) as caught:
        artifact.open(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def _column(folder: pathlib.Path, value: int) -> np.ndarray:
    column = np.load(folder / "documents/positives.indices.npy")
    column[3] = value
    return column


def test_labels_of_another_export_are_refused(exported, folder, tmp_path):
    """As a whole folder, which nothing in it contradicts but what it was made by."""
    from xmc_jax.shipping import exporting

    params = jax.tree.map(lambda leaf: 1.1 * leaf, exported.state.params)
    state = exported.state.replace(params=params)
    made = pathlib.Path(str(exporting.whole(exported.run, 0, state, tmp_path)))
    theirs = json.loads((made / contents.MANIFEST).read_text())
    shutil.rmtree(folder / "labels")
    shutil.copytree(made / "labels", folder / "labels")
    with pytest.raises(ValueError, match=r"labels/embeddings\.npy: expected sha256"):
        artifact.open(folder)
    labels = [name for name in theirs["files"] if name.startswith("labels/")]
    change(folder, lambda m: m.update(labels=theirs["labels"]), *labels)
    with pytest.raises(ValueError, match=r"expected labels of the model .*, found those of"):
        artifact.open(folder)


def test_weights_that_do_not_fit_are_refused_when_they_are_loaded(folder):
    def wider(manifest):
        config = folder / "config.json"
        config.write_text(config.read_text().replace('"hidden_size": 32', '"hidden_size": 64'))
        for section in ("labels", "documents", "prototypes"):
            manifest[section]["model"] = "?"

    change(folder, wider, "config.json")
    manifest = json.loads((folder / contents.MANIFEST).read_text())
    digests = {name: facts["sha256"] for name, facts in manifest["files"].items()}
    digest = contents.digest_of_model(digests)
    for section in ("labels", "documents", "prototypes"):
        change(folder, lambda m, s=section: m[s].update(model=digest))
    change(folder, lambda m: m["model"].update(digest=digest))
    with pytest.raises(ValueError, match="weights do not fit a bert of 2 layers"):
        Predictor.open(folder)


def test_predicts_with_what_the_package_requires_alone(exported, tmp_path):
    """Without the extras, and without what training needs: no import of them, whatever is there."""
    (tmp_path / "in.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    code = f"""
import sys
refused = {REFUSED}
class Finder:
    def __init__(self, finder):
        self._finder = finder
    def __getattr__(self, name):
        return getattr(self._finder, name)
    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] in refused else self._finder.find_spec(name, *rest)
sys.meta_path[:] = map(Finder, sys.meta_path)
from xmc_jax.config import PredictConfig
from xmc_jax.shipping import artifact, contents, predict_files as files
from xmc_jax.shipping.predictor import Predictor
from xmc_jax.retrieval import exact
print(len(Predictor.open({str(exported.folder)!r}).predict(["abc"], k=3)[0]))
opened = artifact.open({str(exported.folder)!r})
print(files.predict(opened, PredictConfig(k=3), "in.jsonl", "out.jsonl").progress.documents)
try:
    files.predict(opened, PredictConfig(k=3), "in.jsonl", "out.parquet")
except ValueError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[:2] == ["3", "2"] and "expected the package pyarrow to write Parquet" in said[2]
    assert not (tmp_path / "out.parquet").exists()


REFUSED = (
    *("PIL", "pyarrow", "skimage", "sklearn", "scipy", "torch", "fastapi", "uvicorn"),
    *("gcsfs", "sentence_transformers", "peft", "pandas", "matplotlib"),
    *("grain", "optax", "orbax", "tensorboardX", "ml_collections"),
)
