"""The TF-IDF neighbours baseline: documents get the labels of training documents that read alike.

python -m benchmarks.tfidf --raw=xmc_jax/data/bundled/LF-DebianTitles-3K
"""

import argparse
import time

import numpy as np
import scipy.sparse
from sklearn.feature_extraction.text import TfidfVectorizer

from benchmarks import raw_data
from benchmarks.raw_data import RawData
from xmc_jax.data import propensity
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


def evaluate(data: RawData) -> dict[str, float]:
    """Metrics of the baseline on the test split of a raw folder.

    Args:
        data: the folder, which texts are read, and the propensity constants.

    Returns:
        What `retrieval.metrics.metrics` gives, with the filter applied.
    """
    dataset = data.read()
    train, test, label = (dataset.splits[split] for split in ("train", "test", "label"))
    k = 100
    scores, ids = predict(
        train.texts(data.text),
        train.positives,
        label.texts(data.text),
        test.texts(data.text),
        min(len(label), k + filtered_per_document(dataset.filter)),
    )
    _, ids = drop_filtered(scores, ids, dataset.filter, k)
    frequency = np.bincount(train.positives.indices, minlength=len(label))
    weights = propensity.inverse_propensity(frequency, len(train), *data.propensity)
    return metrics(ids, test.positives.indptr, test.positives.indices, weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    raw_data.add_flags(parser)
    start = time.perf_counter()
    found = evaluate(raw_data.of(parser.parse_args()))
    shown = ("P@1", "P@3", "P@5", "nDCG@5", "PSP@1", "PSP@5", "R@100")
    print("  ".join(f"{name} {100 * found[name]:.2f}" for name in shown))
    print(f"{time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
