"""No source file has a call through which a file's contents could run as code; read from the trees.

A config given as `--config=file.py` is the user's own program and is run by absl's flag, outside
this check; SECURITY.md says so.
"""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("xmc_jax", "configs", "benchmarks", "launch")
    for path in (ROOT / folder).rglob("*.py")
) + ["setup.py"]

BUILTINS = {"eval", "exec", "compile", "__import__", "breakpoint"}

# Modules whose formats are programs, or which run what they are given.
MODULES = (
    "_pickle", "cPickle", "cloudpickle", "code", "codeop", "ctypes", "dill", "hickle", "imp",
    "joblib", "jsonpickle", "klepto", "lxml", "marshal", "pickle", "pickle5", "runpy", "shelve",
    "xml.dom", "xml.sax", "xmlrpc",
)  # fmt: skip

CALLS = (
    "asyncio.create_subprocess_shell", "importlib.import_module",
    "importlib.machinery.SourceFileLoader", "importlib.reload",
    "importlib.util.module_from_spec", "importlib.util.spec_from_file_location",
    "numpy.fromregex", "numpy.lib.npyio.load", "os.execl", "os.execle", "os.execlp",
    "os.execlpe", "os.execv", "os.execve", "os.execvp", "os.execvpe", "os.popen",
    "os.posix_spawn", "os.posix_spawnp", "os.spawnl", "os.spawnle", "os.spawnlp", "os.spawnlpe",
    "os.spawnv", "os.spawnve", "os.spawnvp", "os.spawnvpe", "os.system", "pandas.eval",
    "pandas.read_pickle", "pandas.read_hdf", "pyarrow.deserialize", "pyarrow.read_serialized",
    "shutil.unpack_archive", "subprocess.getoutput", "subprocess.getstatusoutput",
    "tempfile.mktemp", "torch.hub.load", "torch.jit.load", "torch.load",
    "xml.etree.ElementTree.XML", "xml.etree.ElementTree.XMLID",
    "xml.etree.ElementTree.XMLParser", "xml.etree.ElementTree.fromstring",
    "xml.etree.ElementTree.fromstringlist", "xml.etree.ElementTree.iterparse",
    "xml.etree.ElementTree.parse", "yaml.full_load", "yaml.full_load_all", "yaml.load",
    "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all",
)  # fmt: skip

# What is needed: the C library's own settings of memory; and the file that --config names, which is
# run again to say what its variants are.
ALLOWED = {
    ("xmc_jax/runtime/command.py", "ctypes"),
    ("xmc_jax/files/atomic.py", "ctypes"),  # renameat2, of the C library alone
    ("xmc_jax/main.py", "runpy"),
}

METHODS = {"exec_module", "extractall", "load_module", "read_pickle"}

# Arguments that may be nothing but False, wherever they are given.
SWITCHES = {"allow_pickle", "shell", "trust_remote_code"}

# Calls that must say so, and not rely on a default of today.
MUST_SAY = {
    "jax.numpy.load": "allow_pickle",
    "numpy.lib.format.read_array": "allow_pickle",
    "numpy.load": "allow_pickle",
}


def _names(tree: ast.AST) -> tuple[dict[str, str], list[tuple[int, str]]]:
    """What each imported name stands for, and line and full name of every import."""
    stands, imports = {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                imports.append((node.lineno, alias.name))
                top = alias.name.partition(".")[0]
                stands[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                imports.append((node.lineno, full))
                stands[alias.asname or alias.name] = full
    return stands, imports


def _full_name(node: ast.AST, stands: dict[str, str]) -> str | None:
    """The dotted name that an expression is, through the imports; None for anything else."""
    if isinstance(node, ast.Name):
        return stands.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        base = _full_name(node.value, stands)
        return base and f"{base}.{node.attr}"
    return None


def _is_false(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def violations(file: str, source: str) -> list[str]:
    """Where a source could run what it reads.

    Args:
        file: its name, for the messages.
        source: its text.
    """
    tree = ast.parse(source, file)
    stands, imports = _names(tree)
    found = []

    def report(node: ast.AST, what: str) -> None:
        found.append(f"{file}:{node.lineno}: {what}")

    for line, name in imports:
        if (file, name) in ALLOWED:
            continue
        if any(name == module or name.startswith(f"{module}.") for module in MODULES):
            found.append(f"{file}:{line}: imports {name}")
        if name in CALLS or name.removeprefix("builtins.") in BUILTINS:
            found.append(f"{file}:{line}: imports {name}")
    for node in ast.walk(tree):
        # Named at all: called, handed on, or kept under another name.
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            name = _full_name(node, stands)
            if name and (name.removeprefix("builtins.") in BUILTINS or name in CALLS):
                report(node, f"uses {name}")
            if isinstance(node, ast.Attribute) and node.attr in METHODS:
                report(node, f"uses .{node.attr}")
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values):
                if isinstance(key, ast.Constant) and key.value in SWITCHES and not _is_false(value):
                    report(node, f"gives {key.value!r} something other than False")
        if not isinstance(node, ast.Call):
            continue
        said = {keyword.arg: keyword.value for keyword in node.keywords}
        for switch in SWITCHES & set(said):
            if not _is_false(said[switch]):
                report(node, f"gives {switch} something other than False")
        name = _full_name(node.func, stands) or ""
        needed = MUST_SAY.get(name)
        if name.startswith("transformers.Auto") and name.endswith(".from_pretrained"):
            needed = "trust_remote_code"
        if needed and needed not in said:
            report(node, f"calls {name} without {needed}=False")
    return found


@pytest.mark.parametrize("file", FILES)
def test_sources(file):
    assert violations(file, (ROOT / file).read_text(encoding="utf-8")) == []


PLANTED = [
    "eval('1')",
    "exec(open(path).read())",
    "code = compile(text, 'f', 'exec')",
    "__import__('os')",
    "run = eval",
    "map(eval, lines)",
    "import builtins\nbuiltins.exec(text)",
    "from builtins import eval as read",
    "import pickle",
    "from pickle import loads",
    "def f():\n    import marshal",
    "import shelve as s",
    "from cloudpickle import load",
    "import dill, joblib",
    "import runpy",
    "import ctypes.util",
    "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
    "from yaml import unsafe_load",
    "import torch\ntorch.load('a.pt', weights_only=True)",
    "from torch import load",
    "import torch\nread = torch.jit.load",
    "import numpy as np\nnp.load('a.npy', allow_pickle=True)",
    "import numpy as np\nnp.load('a.npy', allow_pickle=trusted)",
    "import numpy as np\nnp.load('a.npy')",
    "import numpy as np\nnp.load('a.npy', mmap_mode='r')",
    "from numpy import load\nload('a.npy')",
    "import numpy\nnumpy.lib.format.read_array(file)",
    "import numpy as np\noptions = {'allow_pickle': True}\nnp.load('a.npy', **options)",
    "from transformers import AutoModel\nAutoModel.from_pretrained('a', trust_remote_code=True)",
    "import transformers\ntransformers.AutoConfig.from_pretrained('a')",
    "load(name, trust_remote_code=flag)",
    "import subprocess\nsubprocess.run(command, shell=True)",
    "import subprocess as s\ns.Popen(command, shell=1)",
    "import subprocess\nsubprocess.getoutput(command)",
    "import os\nos.system('true')",
    "from os import popen",
    "import os as o\no.execv(path, words)",
    "import tarfile\ntarfile.open('a').extractall()",
    "import zipfile\nwith zipfile.ZipFile('a') as z:\n    z.extractall('b')",
    "import shutil\nshutil.unpack_archive('a.zip')",
    "from xml.etree import ElementTree\nElementTree.parse('a.xml')",
    "from xml.etree.ElementTree import fromstring",
    "import xml.dom.minidom",
    "import lxml.etree",
    "import tempfile\ntempfile.mktemp()",
    "import importlib\nimportlib.import_module(name)",
    "spec.loader.exec_module(module)",
    "import pandas as pd\npd.read_pickle('a')",
]


@pytest.mark.parametrize("file, name", sorted(ALLOWED))
def test_what_is_allowed_is_used(file, name):
    """The list names nothing that its file has left."""
    assert (ROOT / file).is_file() and f"import {name}\n" in (ROOT / file).read_text()


@pytest.mark.parametrize("source", PLANTED)
def test_a_violation_is_seen(source):
    assert violations("planted.py", source)


@pytest.mark.parametrize(
    "source",
    [
        "import re\nre.compile('a')",
        "lowered.compile(compiler_options=options)",
        "model.eval()",
        "import numpy as np\nnp.load('a.npy', mmap_mode='r', allow_pickle=False)",
        "import subprocess\nsubprocess.run(['true'], shell=False)",
        "from xml.etree.ElementTree import Element, tostring",
        "import json\njson.load(file)",
        "import yaml\nyaml.safe_load(text)",
        "import transformers as t\nt.AutoModel.from_pretrained('a', trust_remote_code=False)",
    ],
)
def test_what_is_allowed_passes(source):
    assert violations("plain.py", source) == []
