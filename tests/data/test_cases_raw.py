"""Raw folders as other tools write them; `tests/cases/raw` has one for each case."""

import pathlib

import pytest

from xmc_jax.data import prepare, store

CASES = pathlib.Path(__file__).parents[1] / "cases" / "raw"


@pytest.fixture
def made(tokenizer_folder, tmp_path):
    def make(case: str) -> store.Store:
        return store.open(
            prepare.prepare(
                prepare.PrepareConfig("Case", tmp_path, str(tokenizer_folder), 8, CASES / case)
            )
        )

    return make


def test_the_names_of_deepxml_are_read(made):
    data = made("r15_deepxml_names")
    assert data.texts("label") == ["shoes", "hats", "coats"]
    assert data.texts("train")[:2] == ["red shoes", "blue hat"] and data.num_test == 2


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "r05_threehdr",
            r"trn_X_Y\.txt:1: expected 'rows columns' of a matrix of labels, found '4 100 3', as a "
            "file of features begins",
        ),
        ("j10_duplbluid", r"lbl\.json:2: expected labels whose uids differ, found 'x', as line 1"),
    ],
)
def test_others_are_refused_by_name(made, case, message):
    with pytest.raises(ValueError, match=message):
        made(case)
