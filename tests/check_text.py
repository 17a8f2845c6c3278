"""Checks of text and names that ruff does not know; run by `make lint`.

Pages have at most 100 columns and name files that exist. Names in the package say what a thing is:
some words are banned, and no two classes or modules share a name.
"""

import ast
import collections
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "xmc_jax"
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]
COLUMNS = 100

# They say that something was looked for or made, and not what it is.
BANNED = {"asked", "found", "shown", "making", "done", "room", "own", "around", "judged"}


def long_lines(page: str) -> list[str]:
    """Lines that are too long and could be broken: no rows of tables, no links."""
    lines = [x for x in page.splitlines() if len(x) > COLUMNS and not x.startswith("|")]
    return [x for x in lines if " " in x[:COLUMNS].lstrip("-* ").partition("`")[0]]


def missing_files(page: str) -> list[str]:
    """Paths and modules of the package that a page names and that do not exist."""
    paths = re.findall(r"`((?:[\w.-]+/)+[\w-]+\.(?:py|sh|md))`", page)
    modules = re.findall(r"(?<![.\w])xmc_jax((?:\.[a-z]\w*)+)", page)
    paths = [x for x in paths if "NAME" not in x]  # which stands for any
    missing = [x for x in paths if not (ROOT / x).exists() and not (PACKAGE / x).exists()]
    for name in modules:
        # The last part may be a name within the module.
        parts = name.strip(".").split(".")
        places = [PACKAGE.joinpath(*parts), PACKAGE.joinpath(*parts[:-1])]
        files = [places[0], places[0].with_suffix(".py"), places[1].with_suffix(".py")]
        if not any(x.exists() for x in files):
            missing.append(f"xmc_jax{name}")
    return missing


def names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of what a module defines: classes, functions, arguments, variables."""
    for node in ast.walk(tree):
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
                yield node.lineno, name
            case ast.AsyncFunctionDef(name=name) | ast.arg(arg=name):
                yield node.lineno, name
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield node.lineno, name
            case ast.alias(asname=str(name)) | ast.ExceptHandler(name=str(name)):
                yield node.lineno, name


def banned_names(source: str) -> list[str]:
    """The banned names that a module defines, each with its line."""
    return [
        f"{line}: {name}"
        for line, name in names(ast.parse(source))
        if name.strip("_").lower() in BANNED
    ]


def repeated(sources: Mapping[str, str]) -> list[str]:
    """Classes and modules of one name, from the text of each file by its path."""
    places = collections.defaultdict(list)
    for file, source in sources.items():
        stem = pathlib.PurePosixPath(file).stem
        if stem not in ("__init__", "__main__"):
            places[f"module {stem}"].append(file)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                places[f"class {node.name}"].append(file)
    return [f"{name}: in {' and '.join(files)}" for name, files in places.items() if files[1:]]


def problems() -> list[str]:
    """All that is wrong, one line each."""
    lines = []
    for page in PAGES:
        text, name = page.read_text(encoding="utf-8"), page.relative_to(ROOT)
        lines += [f"{name}: more than {COLUMNS} columns: {x[:60]}..." for x in long_lines(text)]
        if page.name != "CHANGELOG.md":  # which speaks of what is gone
            lines += [f"{name}: {x} does not exist" for x in missing_files(text)]
    sources = {
        path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(PACKAGE.rglob("*.py"))
    }
    for file, source in sources.items():
        lines += [f"xmc_jax/{file}:{x} is a banned name" for x in banned_names(source)]
    return lines + repeated(sources)


if __name__ == "__main__":
    print(*problems(), sep="\n")
    sys.exit(bool(problems()))
