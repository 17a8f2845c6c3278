"""Pages and names keep to the rules of `check_text`, which sees what breaks them."""

import runpy

import check_text
import pytest


def test_no_rule_is_broken():
    assert check_text.problems() == []


@pytest.mark.parametrize("line", ["word " * 21, "- a `name` " + "and more " * 12])
def test_a_long_line_is_seen(line):
    assert check_text.long_lines(f"# Page\n\n{line}\n") == [line]


def test_what_cannot_be_broken_may_be_long():
    page = "\n".join(["[" + "x" * 120 + "]", "| " + "cell " * 30 + "|"])
    assert check_text.long_lines(page) == []


def test_a_missing_file_is_seen():
    page = "`data/gone.py` `docs/gone.md` `python -m xmc_jax.gone` xmc_jax.data.gone.f"
    assert len(check_text.missing_files(page)) == 4
    page = "`data/rows.py`, `docs/data.md`, xmc_jax.data.rows.compose, `x.py`, xmc_jax.main"
    assert check_text.missing_files(page) == []


@pytest.mark.parametrize(
    "source",
    [
        "class Asked: ...",
        "def found(): ...",
        "def f(*, own=1): ...",
        "_done = 1",
        "for room in x: ...",
        "self.shown = 1",
        "import a as around",
    ],
)
def test_a_banned_name_is_seen(source):
    assert len(check_text.banned_names(source)) == 1


def test_names_of_others_are_not_banned():
    assert check_text.banned_names("future.done()\nnot_found = bedroom = x.found") == []


def test_names_of_two_things_are_seen():
    sources = {"a/b.py": "class C: ...", "d/b.py": "def f():\n    class C: ...", "d/e.py": ""}
    assert check_text.repeated(sources) == [
        "module b: in a/b.py and d/b.py",
        "class C: in a/b.py and d/b.py",
    ]


def test_the_picture_is_of_the_folders():
    """`python docs/picture.py` writes it anew."""
    picture = runpy.run_path(str(check_text.ROOT / "docs" / "picture.py"))
    text = picture["PAGE"].read_text(encoding="utf-8")
    assert picture["page"](text) == text
    drawn = {folder for edge in picture["WAY"] for folder in edge[:2]} | set(picture["BASE"])
    assert drawn == set(picture["folders"]())
