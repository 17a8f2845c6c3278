"""Pages of the docs keep to 100 columns, as the code does."""

import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]
COLUMNS = 100


def prose(page: str) -> list[str]:
    """The lines of a page but for code, tables, and what cannot be broken: links and commands."""
    lines, code = [], False
    for line in page.splitlines():
        if line.lstrip().startswith("```"):
            code = not code
        elif not code and not line.lstrip().startswith("|"):
            lines.append(line)
    return [line for line in lines if " " in line[:COLUMNS].lstrip("-* ").partition("`")[0]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_line_of_prose_is_too_long(page):
    long = [line for line in prose(page.read_text(encoding="utf-8")) if len(line) > COLUMNS]
    assert not long
