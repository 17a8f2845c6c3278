"""Labels of an exported model added, changed and removed without training."""

import copy
import functools
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from etils import epath

from xmc_jax.config import NewLabelsConfig, RunConfig
from xmc_jax.shipping import artifact, contents, exporting, labels
from xmc_jax.shipping.labels import Label, LabelChanges
from xmc_jax.shipping.predictor import Predictor, Query
from xmc_jax.shipping.query_encoder import QueryEncoder
from xmc_jax.training import build

pytestmark = pytest.mark.slow
NEAREST = NewLabelsConfig(how="nearest", neighbours=2, threshold=-1.0, temperature=0.2, scale=0.9)


@pytest.fixture(scope="module")
def exported(fields, tmp_path_factory):
    """A function: an artifact of the untrained model with a combiner; it has centroids.

    Its free vectors are not zero.
    """

    @functools.cache
    def export(combiner: str) -> pathlib.Path:
        changed = copy.deepcopy(fields)
        changed["name"] = "topics"
        changed["prime"] |= {"combiner": combiner, "free_vectors": 64}
        changed["export"] |= {"index": "scann"}
        run = build.run(RunConfig.from_dict(changed))
        folder = epath.Path(tmp_path_factory.mktemp("labels"))
        return pathlib.Path(exporting.whole(run, 0, run.initial_state(), folder))

    return export


@pytest.fixture
def folder(exported, tmp_path) -> pathlib.Path:
    return shutil.copytree(exported("transformer"), tmp_path / "export")


@pytest.fixture(params=["transformer", "sum"])
def each_folder(request, exported, tmp_path) -> pathlib.Path:
    """One for each combiner."""
    return shutil.copytree(exported(request.param), tmp_path / "export")


def all_files(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_a_label_in_its_own_words_stays_what_it_was(each_folder):
    before = artifact.open(each_folder)
    rows = range(0, len(before.labels), 3)
    changes = [Label(before.labels.texts[r], id=before.labels.ids[r]) for r in rows]
    found = labels.change(each_folder, LabelChanges(update=changes), NEAREST)
    after = artifact.open(each_folder)
    assert (found.updated, found.added, found.removed) == (len(changes), 0, 0)
    np.testing.assert_allclose(after.labels.embeddings, before.labels.embeddings, atol=2e-6)
    assert list(after.labels.ids) == list(before.labels.ids)
    assert list(after.labels.texts) == list(before.labels.texts)


def test_a_label_in_other_words_keeps_its_free_vector_and_centroid(each_folder):
    before = artifact.open(each_folder)
    row = int(np.flatnonzero(before.labels.frequency)[2])
    name, text = before.labels.ids[row], before.labels.texts[row + 1]
    old = before.prototypes()
    labels.change(each_folder, LabelChanges(update=[Label(text, id=name)]), NEAREST)
    after = artifact.open(each_folder)
    assert after.labels.texts[row] == text
    new = after.prototypes()
    np.testing.assert_array_equal(new.centroids[row], old.centroids[row])
    assert new.free_vector_of[row] == old.free_vector_of[row]
    np.testing.assert_allclose(new.text[row], old.text[row + 1], atol=2e-6)
    others = np.arange(len(before.labels)) != row
    np.testing.assert_array_equal(after.labels.embeddings[others], before.labels.embeddings[others])
    assert np.abs(after.labels.embeddings[row] - before.labels.embeddings[row]).max() > 1e-3


@pytest.mark.parametrize("how", ["text", "nearest"])
def test_added_labels_are_what_the_definition_says(each_folder, how):
    config = NewLabelsConfig(how, 2, -1.0, 0.2, 0.9)
    before = artifact.open(each_folder)
    made_of = before.prototypes()
    combine = labels._combiner(made_of)
    texts = [f"{before.labels.texts[3]} {before.labels.texts[5]}", before.labels.texts[7]]
    new = [Label(text, id=f"new{i}") for i, text in enumerate(texts)]
    found = labels.change(each_folder, LabelChanges(add=new), config)
    assert (found.added, found.borrowing) == (2, 2 if how == "nearest" else 0)
    after = artifact.open(each_folder)
    assert list(after.labels.ids)[-2:] == ["new0", "new1"] and after.labels.frequency[-1] == 0

    pooled = QueryEncoder(before).encode(new, pooled=True)
    expected = unit(pooled)
    if how == "nearest":
        trained = np.flatnonzero(before.labels.frequency)
        cosines = unit(pooled) @ unit(made_of.text[trained]).T
        free, centroid = np.zeros((2, 2, pooled.shape[1]), np.float32)
        for i in range(2):
            best = np.argsort(-cosines[i])[:2]
            weights = np.exp(cosines[i][best] / 0.2)
            weights /= weights.sum()
            rows = trained[best]
            free[i] = weights @ made_of.free_vectors[made_of.free_vector_of[rows]]
            centroid[i] = weights @ made_of.centroids[rows]
        expected = combine(pooled, free, centroid)
        if made_of.config.combiner == "sum":
            expected = unit(unit(pooled) + free + unit(centroid))
    np.testing.assert_allclose(after.labels.embeddings[-2:], 0.9 * expected, atol=1e-5)
    np.testing.assert_array_equal(after.labels.embeddings[:-2], before.labels.embeddings)

    # In other words it is made anew, as if it had been added so.
    labels.change(each_folder, LabelChanges(update=[Label(texts[1], id="new0")]), config)
    again = artifact.open(each_folder).labels.embeddings
    np.testing.assert_allclose(again[-2], again[-1], atol=1e-5)


def test_a_new_label_is_predicted(folder):
    text = "quite another subject than any"
    labels.change(
        folder, LabelChanges(add=[Label(text, id="new")]), NewLabelsConfig("text", scale=1.0)
    )
    predictor = Predictor.open(folder)
    assert predictor.predict([text], 1, "plain")[0][0].id == "new"
    assert "new" in {label.id for label in predictor.predict([text], 10, "augmented")[0]}


def test_a_removed_label_is_not_predicted_and_others_as_if_it_were_excluded(folder):
    before = Predictor.open(folder, index="exact")
    texts = [before.artifact.labels.texts[i] for i in range(12)]
    gone = [before.artifact.labels.ids[i] for i in (0, 4, 5, 39)]
    excluded = [Query(text, exclude=gone) for text in texts]
    expected = before.predict(excluded, 36, "plain")
    found = labels.change(folder, LabelChanges(remove=gone), NEAREST)
    assert (found.removed, found.labels) == (4, 36)
    after = Predictor.open(folder, index="exact")
    assert after.predict(texts, 36, "plain") == expected
    kept = [i for i in range(40) if i not in (0, 4, 5, 39)]
    old = before.artifact.documents.positives
    new = after.artifact.documents.positives
    for row in range(old.rows):
        labels_of = old.indices[old.indptr[row] : old.indptr[row + 1]]
        there = new.indices[new.indptr[row] : new.indptr[row + 1]]
        assert [kept[i] for i in there] == [i for i in labels_of if i in kept]
    assert not {label.id for row in after.predict(texts, 36) for label in row} & set(gone)


def test_the_index_is_of_the_labels_there_are(folder):
    text = "quite another subject than any"
    found = labels.change(
        folder, LabelChanges(add=[Label(text, id="new")], remove=["topic3"]), NEAREST
    )
    assert found.recall == 1.0  # few labels are searched exhaustively
    by_index = Predictor.open(folder, index="scann").predict([text], 40, "plain")[0]
    exactly = Predictor.open(folder, index="exact").predict([text], 40, "plain")[0]
    assert [p.id for p in by_index] == [p.id for p in exactly]
    assert "new" in {p.id for p in by_index}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (LabelChanges(add=[Label("x", id="topic1")]), "add: label 'topic1'.*is not yet in.*update"),
        (
            LabelChanges(update=[Label("x", id="other")]),
            "update: label 'other'.*is in.*leave it out",
        ),
        (LabelChanges(remove=["other"]), "remove: label 'other'"),
        (LabelChanges(remove=["topic1", "topic1"]), "once, got it again"),
        (LabelChanges(add=[Label("x")]), "without"),
        (LabelChanges(remove=[f"topic{i}" for i in range(40)]), "labels to be left"),
        (
            LabelChanges(add=[Label("x", [b"GIF89a"], "new", "a.csv:2")]),
            "a.csv:2: expected no pictures",
        ),
    ],
)
def test_what_does_not_fit_changes_nothing(folder, changes, message):
    before = all_files(folder)
    with pytest.raises(ValueError, match=message):
        labels.change(folder, changes, NEAREST)
    assert all_files(folder) == before


def test_changed_elsewhere_the_original_stays_and_texts_for_people_go_along(folder, tmp_path):
    (folder / "LICENSE.md").write_text("ours\n")
    (folder / "notes").mkdir()
    (folder / "notes" / "first.html").write_text("of people\n")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    before, out = all_files(folder), tmp_path / "changed"
    labels.change(folder, LabelChanges(remove=["topic3"]), NEAREST, out=out)
    assert all_files(folder) == before
    assert len(artifact.open(out).labels) == 39
    for name in ("LICENSE.md", "DATA_CARD.md", "notes/first.html", ".gitattributes"):
        assert (out / name).read_bytes() == before[name]
    card = (out / "README.md").read_bytes()
    assert card.startswith(before["README.md"].rstrip()) and b"1 removed; 39 now" in card
    assert {path.name for path in tmp_path.iterdir()} == {"export", "changed"}
    with pytest.raises(ValueError, match="expected no such folder, found one"):
        labels.change(folder, LabelChanges(remove=["topic3"]), NEAREST, out=out)
    with pytest.raises(ValueError, match="expected no such folder, found a part of"):
        labels.change(folder, LabelChanges(remove=["topic3"]), NEAREST, out=folder / "changed")


def test_one_process_changes_a_folder_at_a_time(folder):
    with (
        contents.locked(folder),
        pytest.raises(ValueError, match="expected no other process, fo"),
    ):
        labels.change(folder, LabelChanges(remove=["topic3"]), NEAREST)
    labels.change(folder, LabelChanges(remove=["topic3"]), NEAREST)
    assert not (folder / ".lock").exists()


def test_without_what_prototypes_are_made_of_it_says_so(fields, tmp_path):
    fields = copy.deepcopy(fields)
    fields["export"] |= {"prototypes": False, "documents": False}
    run = build.run(RunConfig.from_dict(fields))
    folder = exporting.whole(run, 0, run.initial_state(), epath.Path(tmp_path))
    with pytest.raises(ValueError, match=r"export with --config\.export\.prototypes=True"):
        labels.change(folder, LabelChanges(add=[Label("x", id="new")]), NEAREST)
    with pytest.raises(ValueError, match=r"export with --config\.export\.documents=True"):
        Predictor.open(folder).predict(["x"], ranking="augmented")


def test_without_prototypes_a_new_label_is_its_text(fields, tmp_path):
    fields = copy.deepcopy(fields)
    fields["prime"]["enabled"] = False
    fields["optimizer"]["weight_decay"] = ((".*", 0.01),)
    run = build.run(RunConfig.from_dict(fields))
    folder = exporting.whole(run, 0, run.initial_state(), epath.Path(tmp_path))
    labels.change(folder, LabelChanges(add=[Label("some words", id="new")]), NEAREST)
    opened = artifact.open(folder)
    expected = QueryEncoder(opened).encode([Label("some words")])[0]
    np.testing.assert_allclose(opened.labels.embeddings[-1], expected, atol=1e-6)


def command(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "xmc_jax.main", "--mode=labels", *arguments],
        capture_output=True,
        text=True,
    )


def test_the_command(folder, tmp_path):
    (tmp_path / "new.csv").write_text('key,text\nnew1,"some words, new"\nnew2,others\n')
    (tmp_path / "gone.txt").write_text("topic3\n")
    done = command(
        *(f"--artifact={folder}", f"--labels.add={tmp_path / 'new.csv'}"),
        *("--labels.columns=id=key", f"--labels.remove={tmp_path / 'gone.txt'}"),
        *("--labels.how=text", f"--labels.out={tmp_path / 'changed'}"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        "2 labels added, 0 of them by the documents of similar trained labels, 0 updated, "
        "1 removed; 41 now" in (done.stdout)
    )
    after = artifact.open(tmp_path / "changed")
    assert list(after.labels.ids)[-2:] == ["new1", "new2"] and "topic3" not in after.labels.ids
    assert after.labels.texts[-2] == "some words, new"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected a file of labels"),
        (("--labels.add={folder}/twice.csv",), "twice.csv:3: add: label 'x': expected each"),
        (("--labels.remove={folder}/gone.txt",), "gone.txt:2: remove: label 'other': expected an"),
    ],
)
def test_mistakes_of_the_command_are_one_line(folder, tmp_path, arguments, message):
    file = tmp_path / "new.jsonl"
    file.write_text('{"text": "some words"}\n')
    (tmp_path / "twice.csv").write_text("id,text\nx,some words\nx,others\n")
    (tmp_path / "gone.txt").write_text("topic3\nother\n")
    given = [argument.format(file=file, folder=tmp_path) for argument in arguments]
    done = command(f"--artifact={folder}", *given)
    assert done.returncode in (1, 2) and message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
