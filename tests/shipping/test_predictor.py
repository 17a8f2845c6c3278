"""Ranked labels of an exported model: the run's own evaluation, and short numpy versions of it."""

import dataclasses
import pathlib
import threading

import numpy as np
import pytest

from tests.shipping.conftest import ROWS
from xmc_jax.config import ScannConfig
from xmc_jax.shipping.predictor import Predictor, Query

pytestmark = pytest.mark.slow
K = 20


def open_with(exported, **ranking) -> Predictor:
    """The predictor of another mixture than the exported one."""
    one = Predictor.open(exported.folder, verify=False)
    mix = dataclasses.replace(one.artifact.ranking, **ranking)
    return Predictor(dataclasses.replace(one.artifact, ranking=mix), one._encoder, "exact")


def same(scores, rows, expected_scores, expected_rows) -> None:
    """The same ranking, but for the order of what scores alike."""
    np.testing.assert_allclose(scores, expected_scores, atol=1e-5)
    for ours, theirs, score in zip(rows, expected_rows, expected_scores):
        for at in np.flatnonzero(ours != theirs):
            alike = np.abs(score - score[at]) < 1e-6
            if alike[-1]:  # the last ones may tie with what is cut off
                continue
            assert set(ours[alike]) == set(theirs[alike])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"separate_softmax": True, "labels": 5},
        {"mode": "joint", "labels": 4, "documents": 8, "normalize_rows": True},
    ],
    ids=lambda changes: "-".join(changes) or "default",
)
def test_ranks_as_the_run_evaluates(exported, queries, changes):
    one, run = open_with(exported, **changes), exported.run
    config = dataclasses.replace(run.config.eval, augmented=one.artifact.ranking, k=K, ks=(1,))
    evaluation = run.evaluate(exported.state, config)
    for kind in ("plain", "augmented") if not changes else ("augmented",):
        scores, rows, _ = one.rank(queries, K, kind, ROWS)
        same(scores, rows, evaluation.scores[kind], evaluation.ids[kind])


def test_nothing_depends_on_what_else_is_ranked(exported, predictor, queries):
    """To the bit: alone, in sevens, in 64s, all at once; with lists and filters among them."""
    ids = list(predictor.artifact.labels.ids)
    some = [
        dataclasses.replace(q, exclude=ids[i : i + 40 * (i % 2)]) for i, q in enumerate(queries)
    ]
    some[3] = dataclasses.replace(some[3], only=ids[::3])
    some += [Query(text) for text in exported.run.data.texts("train")]
    for kind in ("plain", "augmented"):
        whole = predictor.rank(some, K, kind, ROWS)
        for size, count in ((1, 12), (7, 70), (64, len(some)), (1000, len(some))):
            for start in range(0, count, size):
                part = predictor.rank(some[start : start + size], K, kind, ROWS)
                for ours, all_at_once in zip(part, whole):
                    np.testing.assert_array_equal(ours, all_at_once[start : start + size])


def test_a_list_of_one_document_is_a_predictor_of_that_list(exported, queries):
    one = open_with(exported, mode="joint", labels=4, documents=8)
    only = list(one.artifact.labels.ids)[3:25]
    for kind in ("plain", "augmented"):
        expected = one.restricted(only).rank(queries[:9], K, kind, ROWS)
        listed = [dataclasses.replace(query, only=only) for query in queries[:9]]
        scores, rows, _ = one.rank(listed, K, kind, ROWS)
        np.testing.assert_array_equal(rows, expected[1])
        np.testing.assert_allclose(scores, expected[0], atol=1e-5)
    # A list within another: what is in both.
    fewer = one.restricted(only[:-3])
    expected = fewer.rank(queries[:9], K, "plain", ROWS)
    np.testing.assert_array_equal(fewer.rank(listed, K, "plain", ROWS)[1], expected[1])


@pytest.mark.parametrize(
    ("mode", "prior", "index"),
    [("split", False, "scann"), ("split", True, "exact"), ("joint", True, "exact")],
)
def test_page_after_page_until_all_labels_were_seen(
    exported, predictor, tmp_path, mode, prior, index
):
    """Few labels are mixed; the others follow, but for those whose prior is 0."""
    from xmc_jax.retrieval import scann

    artifact, count = predictor.artifact, len(predictor.artifact.labels)
    stock = np.ones(count)
    stock[::3] = 0
    mix = dataclasses.replace(artifact.ranking, mode=mode, labels=3, documents=2)
    labels = dataclasses.replace(artifact.labels, prior=stock) if prior else artifact.labels
    artifact = dataclasses.replace(artifact, ranking=mix, labels=labels)
    if index == "scann":
        if not scann.available():
            pytest.skip("scann is not installed")
        config = ScannConfig(brute_force_below=1, leaves_searched=0.01, reorder=1.0)
        scann.ScannIndex.build(np.array(labels.embeddings), config).save(tmp_path)
        artifact = dataclasses.replace(artifact, index=pathlib.Path(tmp_path))
    one = Predictor(artifact, predictor._encoder, index)
    for kind in ("plain", "augmented"):
        expected = np.flatnonzero(stock) if prior and kind == "augmented" else np.arange(count)
        seen: list[str] = []
        while page := one.predict(Query("a text", exclude=seen), 7, kind)[0]:
            assert len(page) == min(7, len(expected) - len(seen))
            seen += [label.id for label in page]
            assert [label.score for label in page] == sorted((x.score for x in page), reverse=True)
        ids = list(labels.ids)
        assert sorted(map(ids.index, seen)) == expected.tolist()
        whole = one.predict("a text", count, kind)[0]
        assert sorted(ids.index(label.id) for label in whole) == expected.tolist()
        if index == "exact":
            assert whole[:7] == one.predict("a text", 7, kind)[0]
        listed = one.predict(Query("a text", only=ids), count, kind)[0]
        assert sorted(ids.index(label.id) for label in listed) == expected.tolist()


def test_predictions_have_ids_texts_and_scores(predictor, exported):
    data = exported.run.data
    text = data.texts("label")[7]
    (found,) = predictor.predict([text], k=3, ranking="plain")
    scores, rows, _ = predictor.rank([text], 3, "plain")
    assert [one.id for one in found] == [data.uids("label")[row] for row in rows[0]]
    assert [one.text for one in found] == [data.texts("label")[row] for row in rows[0]]
    assert [one.score for one in found] == scores[0].tolist() == sorted(scores[0])[::-1]
    assert len(predictor.predict([text], k=1000)[0]) <= len(predictor.artifact.labels)
    assert predictor.predict([], k=3) == []
    assert predictor.predict([Query(text, only=[])], k=3) == [[]]
    # A single document is a list of one; any collection will do, and any kind of whole number.
    for one in (text, Query(text, exclude=None), (text,), np.array([text]), iter([text])):
        assert predictor.predict(one, np.int64(3), "plain") == [found]


def test_a_text_that_was_cut_is_marked(predictor):
    short, long = "red mug", "red mug " * 50
    for found in (predictor.predict([short, long]), predictor.neighbours([short, long])):
        assert [one.cut for one in found] == [False, True]
    assert predictor.rank([long, short]).cut.tolist() == [True, False]
    vectors, cut = predictor.embed_measured([short, long])
    np.testing.assert_array_equal(vectors, predictor.embed([short, long]))
    assert cut.tolist() == [False, True]


def test_neighbours_are_the_nearest_documents(predictor, queries):
    there = predictor.artifact.documents
    embedded = predictor.embed(queries[:1])
    found = predictor.neighbours(queries[:1], k=4)
    for vector, few in zip(embedded, found):
        scores = there.embeddings @ vector
        nearest = np.sort(scores)[::-1][:4]
        np.testing.assert_allclose([one.score for one in few], nearest, atol=1e-6)
        assert all(there.texts[list(there.ids).index(one.id)] == one.text for one in few)


def test_what_cannot_be_ranked_is_told_and_the_rest_is_ranked(predictor, queries):
    bad = {
        1: (Query("x", only=["nowhere"]), "only: label 'nowhere': expected one of the 40 labels"),
        3: (Query("x", exclude=["topic1", "nor"]), "exclude: label 'nor': expected one of the 40"),
        2: (Query(" \n"), "expected a text or a picture, got neither"),
        4: (Query("x", images=[b"x"]), "expected no pictures, since the model was trained without"),
        5: (Query("a <beyond> b"), "expected token ids below 30522, the rows of the model's table"),
    }
    predictor._encoder._tokenizer.add_tokens(["<beyond>"])  # an entry without a row in the table
    some = [*queries[:6]]
    for number, (query, _) in bad.items():
        some[number] = query
    problems: dict[int, str] = {}
    scores, rows, _ = predictor.rank(some, K, "augmented", ROWS, problems)
    assert problems.keys() == bad.keys()
    expected = predictor.rank(queries[:6], K, "augmented", ROWS)
    for number in range(6):
        if number in bad:
            assert problems[number].startswith(bad[number][1])
            assert (rows[number] == -1).all() and (scores[number] == -np.inf).all()
            with pytest.raises(ValueError, match=bad[number][1].replace("(", r"\(")[:40]):
                predictor.predict([some[number]])
        else:
            np.testing.assert_array_equal(rows[number], expected[1][number])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *(
            (lambda p, k=k: p.predict(["x"], k), rf"k: expected a whole number .*, got {k!r}")
            for k in (0, 2.5, True)
        ),
        *(
            (
                lambda p, x=x: p.predict(x),
                rf"documents: expected texts or Query .*{type(x).__name__}",
            )
            for x in (None, b"x", {"text": "x"})
        ),
        *(
            (lambda p, x=x: p.rank(["x", x]), r"documents\[1\]: expected a text or a Query, got ")
            for x in (None, ["x"])
        ),
        (lambda p: p.predict(["\ud800"]), "item 0: expected a text in Unicode, got half of a"),
        *(
            (call, "item 1: expected a text or a picture, got neither")
            for call in (lambda p: p.predict(["x", " "]), lambda p: p.embed(["x", ""]))
        ),
        (lambda p: p.predict(Query(None)), "item 0: expected a text, got None"),
        (lambda p: p.predict(Query("x", images=b"x")), "images: expected a list of image files"),
        (lambda p: p.predict(Query("x", exclude=5)), "exclude: expected a list of label ids, got"),
        (lambda p: p.predict(Query("x", only=[["a"]])), r"only: label \['a'\]: expected one of"),
        (lambda p: p.restricted("topic1"), "labels: expected a list of label ids, got 'topic1'"),
        (lambda p: Predictor.open(p.artifact.folder, "best"), "index: expected one of"),
        (lambda p: Predictor.open(None), "expected a folder, got None"),
        (lambda p: p.predict(["x"], ranking="best"), "ranking: expected one of"),
        (
            lambda p: Predictor.open(p.artifact.folder, "scann"),
            "expected a ScaNN index, found none",
        ),
    ],
)
def test_mistakes(predictor, call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(predictor)
    assert "\n" not in str(caught.value)


def test_without_documents_nothing_is_mixed(exported):
    one = Predictor.open(exported.folder, verify=False)
    alone = Predictor(dataclasses.replace(one.artifact, documents=None), one._encoder)
    alone.predict(["x"], ranking="plain")
    for call in (
        lambda: alone.predict(["x"], ranking="augmented"),
        lambda: alone.neighbours(["x"]),
    ):
        with pytest.raises(ValueError, match="expected training documents"):
            call()


def test_threads_share_a_predictor(predictor, queries):
    expected = predictor.rank(queries, K, "augmented", ROWS)
    found = [None] * 4

    def rank(number: int) -> None:
        found[number] = predictor.rank(queries, K, "augmented", ROWS)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(len(found))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in found:
        for ours, theirs in zip(one, expected):
            np.testing.assert_array_equal(ours, theirs)


def test_an_index_ranks_as_it_says(exported, predictor, queries, tmp_path):
    """Of all leaves, ScaNN finds what exact search finds, whatever else it is asked."""
    from xmc_jax.retrieval import scann

    if not scann.available():
        pytest.skip("scann is not installed")
    config = ScannConfig(brute_force_below=1, leaves_searched=1.0, reorder=8.0)
    scann.ScannIndex.build(np.array(predictor.artifact.labels.embeddings), config).save(tmp_path)
    opened = dataclasses.replace(predictor.artifact, index=pathlib.Path(tmp_path))
    one = Predictor(opened, predictor._encoder, "scann")
    expected = predictor.rank(queries, 5, "plain", ROWS)
    whole = one.rank(queries, 5, "plain", ROWS)
    assert (whole[1] == expected[1]).mean() > 0.95
    for start in range(0, len(queries), 7):
        part = one.rank(queries[start : start + 7], 5, "plain", ROWS)
        np.testing.assert_array_equal(part[1], whole[1][start : start + 7])
    other = np.array(predictor.artifact.labels.embeddings)[::-1]
    scann.ScannIndex.build(other, config).save(tmp_path / "other")
    opened = dataclasses.replace(opened, index=tmp_path / "other")
    with pytest.raises(ValueError, match="expected an index of the given"):
        Predictor(opened, predictor._encoder, "auto")
