"""The TF-IDF neighbours baseline: documents get the labels of training documents that read alike.

python -m benchmarks.tfidf --raw=xmc_jax/data/bundled/LF-DebianTitles-3K
"""

import argparse
import pathlib
import time

import numpy as np
import scipy.sparse
from sklearn.feature_extraction.text import TfidfVectorizer

from xmc_jax.data import propensity, raw
from xmc_jax.data.csr import Csr
from xmc_jax.retrieval.metrics import drop_filtered, filtered_per_document, metrics

NEIGHBOURS = 50
BLOCK = 512  # test documents scored at a time


def predict(
    train_texts: list[str],
    train_positives: Csr,
    label_texts: list[str],
    test_texts: list[str],
    k: int,
    neighbours: int = NEIGHBOURS,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores a label by the sum of squared cosines of the nearest training documents that have it.

    Args:
        train_texts: N texts.
        train_positives: labels of each training document.
        label_texts: L texts; they only add to the document frequencies.
        test_texts: M texts.
        k: labels to return per document, at most L.
        neighbours: training documents that vote.

    Returns:
        f32[M, k] scores, descending, and i32[M, k] labels; -inf and -1 where neighbours have no
        more labels.
    """
    vectorizer = TfidfVectorizer(sublinear_tf=True).fit(train_texts + label_texts)
    train = vectorizer.transform(train_texts).T.tocsr()
    test = vectorizer.transform(test_texts)
    labels = scipy.sparse.csr_matrix(
        (
            np.ones(len(train_positives.indices)),
            train_positives.indices,
            train_positives.indptr,
        ),
        shape=(len(train_texts), len(label_texts)),
    )
    scores = np.empty((len(test_texts), k), np.float32)
    ids = np.empty((len(test_texts), k), np.int32)
    for start in range(0, len(test_texts), BLOCK):
        rows = slice(start, start + BLOCK)
        similarity = (test[rows] @ train).toarray()
        nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :neighbours]
        votes = scipy.sparse.csr_matrix(
            (
                np.take_along_axis(similarity, nearest, axis=1).ravel() ** 2,
                nearest.ravel(),
                np.arange(0, nearest.size + 1, nearest.shape[1]),
            ),
            shape=similarity.shape,
        )
        voted = (votes @ labels).toarray()
        ids[rows] = np.argsort(-voted, axis=1, kind="stable")[:, :k]
        scores[rows] = np.take_along_axis(voted, ids[rows], axis=1)
    missing = scores <= 0
    scores[missing], ids[missing] = -np.inf, -1
    return scores, ids


def evaluate(folder: pathlib.Path, a: float = 0.6, b: float = 2.6) -> dict[str, float]:
    """Metrics of the baseline on the test split of a raw Extreme Classification folder.

    Args:
        folder: has {trn,tst,lbl}.json.gz and filter_labels_test.txt.
        a, b: the dataset's propensity constants.

    Returns:
        What `retrieval.metrics.metrics` gives, with the filter applied.
    """
    train, test = raw.read_items(folder / "trn.json.gz"), raw.read_items(folder / "tst.json.gz")
    label_texts = raw.read_items(folder / "lbl.json.gz").titles
    num_labels = len(label_texts)
    pairs = raw.read_filter(folder / "filter_labels_test.txt", len(test.titles), num_labels)
    k = 100
    scores, ids = predict(
        train.titles,
        train.positives,
        label_texts,
        test.titles,
        min(num_labels, k + filtered_per_document(pairs)),
    )
    _, ids = drop_filtered(scores, ids, pairs, k)
    frequency = np.bincount(train.positives.indices, minlength=num_labels)
    weights = propensity.inverse_propensity(frequency, len(train.titles), a, b)
    return metrics(ids, test.positives.indptr, test.positives.indices, weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--raw", type=pathlib.Path, required=True, help="raw dataset folder")
    start = time.perf_counter()
    found = evaluate(parser.parse_args().raw)
    shown = ("P@1", "P@3", "P@5", "nDCG@5", "PSP@1", "PSP@5", "R@100")
    print("  ".join(f"{name} {100 * found[name]:.2f}" for name in shown))
    print(f"{time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
