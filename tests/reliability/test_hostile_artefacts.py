"""Files made to do harm: nothing in them is executed, and each is refused in one line or harmless.

Every artefact is a valid input in which an attacker has changed what he may; digests that he can
make, he has made. Its reader runs watched by Python's audit events: no code that was not installed
is executed, no process started, no connection opened, nothing written outside of the run's folder,
no memory taken beyond a bound, and no more than ten seconds.
"""

import gzip
import io
import json
import os
import pathlib
import pickle
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import guarded
import numpy as np
import pytest
import valid_inputs

from xmc_jax.data import raw
from xmc_jax.files.digests import sha256
from xmc_jax.shipping import documents

REFUSED, HARMLESS = "refused", "harmless"
CANARY = "canary"  # a file that a payload makes


class Payload:
    """Unpickled, makes the canary."""

    def __init__(self, folder: pathlib.Path):
        self._canary = str(folder / CANARY)

    def __reduce__(self):
        return os.system, (f"touch {self._canary}",)


def bomb(mebibytes: int, byte: bytes = b" ", head: bytes = b"", tail: bytes = b"") -> bytes:
    """A gzip file of one long line, or of so many, that takes no time to make."""
    part = gzip.compress(byte * (1 << 24), 9)
    return gzip.compress(head) + part * (mebibytes // 16) + gzip.compress(tail)


def zip_of_zeros(name: bytes, head: bytes, mebibytes: int) -> bytes:
    """An archive of one member: `head`, then zeros."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    first = squeeze.compress(head) + squeeze.flush(zlib.Z_FULL_FLUSH)
    zeros = squeeze.compress(bytes(1 << 24)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    data = first + zeros * (mebibytes // 16) + squeeze.flush()
    size = len(head) + (mebibytes << 20)
    facts = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 33, 0, len(data), size, len(name), 0)
    local = b"PK\x03\x04" + facts + name + data
    central = b"PK\x01\x02" + struct.pack("<H", 20) + facts + bytes(14) + name
    end = struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(local), 0)
    return local + central + b"PK\x05\x06" + end


def npy(header: str, body: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    """A file of NumPy's format with any text for a header."""
    size = struct.pack("<H" if version[0] == 1 else "<I", len(header) + 1)
    return b"\x93NUMPY" + version + size + header.encode() + b"\n" + body


def object_npy(folder: pathlib.Path) -> bytes:
    file = io.BytesIO()
    objects = np.empty(1, object)
    objects[0] = Payload(folder)
    np.save(file, objects, allow_pickle=True)
    return file.getvalue()


def npz(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


SIZES = "{'descr': '<i4', 'fortran_order': False, 'shape': %s, }"
ARRAYS: dict[str, Callable[[pathlib.Path], bytes]] = {
    "objects": object_npy,
    "a pickle": lambda folder: pickle.dumps(Payload(folder)),
    "a shape of a thousand trillions": lambda folder: npy(SIZES % "(1000000000000000,)"),
    "a shape below zero": lambda folder: npy(SIZES % "(-1, 6)"),
    "a shape of true": lambda folder: npy(SIZES % "(True,)"),
    "a call for a header": lambda folder: npy(
        f"__import__('os').system('touch {folder / CANARY}')"
    ),
    "a deep header": lambda folder: npy("(" * 9000),
    "a header of four gigabytes": lambda folder: b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b"(" * 100,
    "a structure with objects": lambda folder: npy(
        "{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (1,), }",
        pickle.dumps(Payload(folder)),
    ),
    "an archive": lambda folder: npz(a=object_npy(folder)),
    "a cut header": lambda folder: b"\x93NUMPY\x01\x00",
}


def in_dataset(folder: pathlib.Path, name: str, content: bytes) -> None:
    """Puts a file into a dataset folder, and what it is into the manifest."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    facts = manifest["files"][name]
    facts |= {"bytes": len(content), "sha256": sha256(folder / name)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def changed(path: pathlib.Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def safetensors(folder: pathlib.Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the header of the weights."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    found = change(header)
    text = found if isinstance(found, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


def first(header: dict[str, Any]) -> dict[str, Any]:
    return header[next(name for name in header if name != "__metadata__")]


def indexed(folder: pathlib.Path, name: str, content: bytes) -> None:
    """Puts a file into a ScaNN index, and its digest into index.json."""
    path = folder / name
    path.write_bytes(content)
    changed(folder / "index.json", lambda m: m["files"].update({name: sha256(path)}))


def assets(path: str) -> bytes:
    return f'assets {{\n  asset_type: DATASET_NPY\n  asset_path: "{path}"\n}}\n'.encode()


def forged(folder: pathlib.Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    valid_inputs.forge(folder)


def fifo(path: pathlib.Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def link(path: pathlib.Path, target: str | pathlib.Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


DEEP = "[" * 100_000
LONG = "1" * 100_000
NESTED = '{"a":' * 100_000

Make = Callable[[pathlib.Path], Any]
ARTEFACTS: dict[str, tuple[str, Make, str]] = {}
"""Name -> the kind of `valid_inputs` that it is made of, how it is made, what becomes of it."""


def add(kind: str, name: str, make: Make, becomes: str = REFUSED) -> None:
    ARTEFACTS[f"{kind}: {name}"] = (kind, make, becomes)


for array_name, array in ARRAYS.items():
    add(
        *("dataset", array_name),
        lambda f, a=array: in_dataset(f, "train.tokens.npy", a(f)),
    )
    add(
        *("artifact", array_name),
        lambda f, a=array: forged(f, "labels/embeddings.npy", a(f)),
    )
for array_name in ("objects", "a call for a header", "a deep header", "an archive"):
    array = ARRAYS[array_name]
    add("images", array_name, lambda f, a=array: (f / "train.rows.npy").write_bytes(a(f)))
for array_name in ("objects", "a pickle", "a deep header", "a call for a header"):
    array = ARRAYS[array_name]
    add("map", array_name, lambda f, a=array: (f / "map.npy").write_bytes(a(f)))

for call, code in {
    "os.system": lambda f: pickle.dumps(Payload(f)),
    "exec": lambda f: b"cbuiltins\nexec\n(S'open(%r, \"w\")'\ntR." % str(f / CANARY),
    "an import": lambda f: b"\x80\x04\x8c\x0cimage_rows.x\x8c\x04evil\x93.",
    "a memo of a billion": lambda f: b"\x80\x02]r\xff\xff\xff\x3f.",
    "a long number": lambda f: b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "lists of lists": lambda f: b"\x80\x02" + b"]" * 100_000 + b".",
}.items():
    add(
        *("object map", f"a pickle with {call}"),
        lambda f, c=code: (f / "objects.npy").write_bytes(
            npy("{'descr': '|O', 'fortran_order': False, 'shape': (4,), }", c(f))
        ),
    )

# Compressed: what is small and grows.
LINE = b'{"text": "'
add("jsonl", "a line of a gigabyte", lambda f: unpacked(f, "train.jsonl", bomb(1024, head=LINE)))
add("csv", "a quote that is not closed", lambda f: unpacked(f, "train.csv", bomb(1024, head=b'"')))
add("items", "a title of a gigabyte", lambda f: (f / "trn.json.gz").write_bytes(bomb(1024)))
add("items", "blank lines", lambda f: (f / "trn.json.gz").write_bytes(bomb(1024, b"\n")))
add("items", "a cut bomb", lambda f: (f / "trn.json.gz").write_bytes(bomb(1024)[:-9]))


def unpacked(folder: pathlib.Path, name: str, content: bytes) -> None:
    (folder / name).unlink()
    (folder / f"{name}.gz").write_bytes(content)


def many_rows(folder: pathlib.Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason='needs the extra "vision"')
    parquet = pytest.importorskip("pyarrow.parquet")
    nothing = pyarrow.nulls(20_000_000, pyarrow.string())
    table = pyarrow.table({"text": nothing, "labels": nothing})
    parquet.write_table(table, folder / "train.parquet", compression="zstd")


add("parquet", "twenty million rows of nothing", many_rows)
add("jsonl", "deep", lambda f: (f / "train.jsonl").write_text(f'{{"text": {DEEP}\n'))
add("jsonl", "a long number", lambda f: (f / "train.jsonl").write_text(f'{{"text": {LONG}}}\n'))
add(
    *("jsonl", "a list in a cell, deep"),
    lambda f: (f / "train.jsonl").write_text(
        json.dumps({"text": "a", "labels": DEEP + "]" * 100_000}) + "\n"
    ),
)
add("edits", "deep", lambda f: (f / "edits.jsonl").write_text(NESTED))
add("queries", "deep", lambda f: (f / "queries.jsonl").write_text(NESTED))
add(
    *("queries", "a picture by the path of a device"),
    lambda f: (f / "queries.jsonl").write_text('{"text": "a", "images": ["/dev/zero"]}\n'),
    HARMLESS,
)
add("request", "deep", lambda f: (f / "request.json").write_text(NESTED))
add("request", "a long number", lambda f: (f / "request.json").write_text(f'{{"k": {LONG}}}'))
add("request", "a body without end", lambda f: (f / "request.json").write_bytes(b" " * (1 << 27)))

# Weights.
add("encoder", "header: longer than the file", lambda f: header_length(f, 1 << 40))
add("encoder", "header: of 2^63 bytes", lambda f: header_length(f, 1 << 63))
add("encoder", "header: of no bytes", lambda f: header_length(f, 0))
for tensor_name, change in {
    "overlapping": lambda h: first(h).update(data_offsets=[0, 8]),
    "offsets below zero": lambda h: first(h).update(data_offsets=[-8, 0]),
    "offsets that go back": lambda h: first(h).update(data_offsets=[64, 0]),
    "an unknown dtype": lambda h: first(h).update(dtype="PICKLE"),
    "another dtype": lambda h: first(h).update(dtype="F64"),
    "a shape of NaN": lambda h: first(h).update(shape=[float("nan")]),
    "a shape that overflows": lambda h: first(h).update(shape=[1 << 40, 1 << 40]),
    "a shape below zero": lambda h: first(h).update(shape=[-1]),
    "another tensor": lambda h: h.update(evil=dict(first(h))),
    "deep": lambda h: NESTED.encode(),
    "a long number": lambda h: b'{"a": %s}' % LONG.encode(),
    "no object": lambda h: b"[]",
}.items():
    add(*("encoder", f"header: {tensor_name}"), lambda f, c=change: safetensors(f, c))
add(
    *("encoder", "header: a name twice"),
    lambda f: safetensors(
        f, lambda h: json.dumps(h)[:-1].encode() + b"," + json.dumps(h)[1:].encode()
    ),
    HARMLESS,  # the same twice
)


def header_length(folder: pathlib.Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", size) + path.read_bytes()[8:])


def instead(name: str) -> Make:
    def make(folder: pathlib.Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(pickle.dumps(Payload(folder)))

    return make


for pickled in ("pytorch_model.bin", "model.pt", "model.pkl", "model.safetensors.pkl"):
    add("encoder", f"{pickled} in place of safetensors", instead(pickled))
    add(
        *("encoder", f"{pickled} beside safetensors"),
        lambda f, n=pickled: (f / n).write_bytes(pickle.dumps(Payload(f))),
        HARMLESS,
    )
add("encoder", "weights that are a pickle", lambda f: as_weights(f, pickle.dumps(Payload(f))))
add("encoder", "weights of nothing", lambda f: as_weights(f, b""))
add("encoder", "weights that are a pipe", lambda f: fifo(f / "model.safetensors"))
add("encoder", "weights that are a device", lambda f: link(f / "model.safetensors", "/dev/zero"))


def as_weights(folder: pathlib.Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)


def sharded(folder: pathlib.Path, file: str) -> None:
    shutil.move(folder / "model.safetensors", folder.parent / "outside.safetensors")
    index = {"weight_map": {"embeddings.word_embeddings.weight": file}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


add("encoder", "shards outside", lambda f: sharded(f, "../outside.safetensors"))
add("encoder", "shards by a full path", lambda f: sharded(f, str(f.parent / "outside.safetensors")))
add(
    *("encoder", "a list of shards, deep"),
    lambda f: [
        sharded(f, "a"),
        (f / "model.safetensors.index.json").write_text(NESTED),
    ],
)


# Sizes, and code that comes with a model.
def own_code(folder: pathlib.Path, of_tokenizer: bool = False) -> None:
    code = f"open({str(folder / CANARY)!r}, 'w')\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py"):
        (folder / name).write_text(code)
    classes = {
        "AutoModel": "modeling_evil.EvilModel",
        "AutoConfig": "configuration_evil.EvilConfig",
        "AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.EvilFast"],
    }
    changed(folder / "config.json", lambda c: c.update(auto_map=classes, trust_remote_code=True))
    if of_tokenizer:
        named = {"auto_map": classes, "tokenizer_class": "EvilFast", "trust_remote_code": True}
        changed(folder / "tokenizer_config.json", lambda c: c.update(named))


add("encoder", "code beside the model", own_code, HARMLESS)
add("encoder", "a tokenizer of its own code", lambda f: own_code(f, True), HARMLESS)
for field, value in {
    "hidden_size": 10**12,
    "num_hidden_layers": 10**12,
    "vocab_size": 10**30,
    "max_position_embeddings": 10**12,
    "layer_norm_eps": float("nan"),
    "num_attention_heads": 0,
    "model_type": ["bert"],
}.items():
    add(
        *("encoder", f"config: {field} {value}"),
        lambda f, n=field, v=value: changed(f / "config.json", lambda c: c.update({n: v})),
    )
add("encoder", "config: deep", lambda f: (f / "config.json").write_text(NESTED))
add("encoder", "config: a long number", lambda f: (f / "config.json").write_text(f'{{"a":{LONG}}}'))
add("encoder", "config: a pipe", lambda f: fifo(f / "config.json"))
add("encoder", "tokenizer: deep", lambda f: (f / "tokenizer.json").write_text(NESTED))
add(
    *("encoder", "tokenizer: an expression that backtracks"),
    lambda f: changed(
        f / "tokenizer.json",
        lambda t: t.update(
            pre_tokenizer={
                **{"type": "Split", "pattern": {"Regex": "(a|a|ab?)+$"}},
                **{"behavior": "Isolated", "invert": False},
            }
        ),
    ),
    HARMLESS,
)
add(
    *("encoder", "tokenizer: ids below zero"),
    lambda f: changed(f / "tokenizer.json", lambda t: t["model"]["vocab"].update(red=-5)),
)

# An index of ScaNN.
add("index", "its pickle, named", lambda f: indexed(f, "scann_docids.pkl", evil(f)))
add("index", "a list that leads out", lambda f: indexed(f, "scann_assets.pbtxt", assets("../x")))
add(
    "index", "a list of full paths", lambda f: indexed(f, "scann_assets.pbtxt", assets("/dev/zero"))
)
add(
    *("index", "a list with escapes"),
    lambda f: indexed(f, "scann_assets.pbtxt", assets("\\056\\056/dataset.npy")),
)
add(
    *("index", "a list of more than that"),
    lambda f: indexed(f, "scann_assets.pbtxt", assets("dataset.npy") + b'x: "/etc/passwd"\n'),
)
add(
    *("index", "files that lead out"),
    lambda f: changed(f / "index.json", lambda m: m["files"].update({"../a.npy": "0"})),
)
add("index", "a file that is a pipe", lambda f: fifo(f / "dataset.npy"))
add("index", "deep", lambda f: (f / "index.json").write_text(NESTED))
add("index", "without a list", lambda f: changed(f / "index.json", lambda m: m.update(files={})))


def evil(folder: pathlib.Path) -> bytes:
    return pickle.dumps(Payload(folder))


# An exported model.
for way, name in {"up": "../evil.npy", "from the root": "/etc/passwd", "a nul": "a\0b"}.items():
    add(
        *("artifact", f"files that lead {way}"),
        lambda f, n=name: changed(
            f / "artifact.json", lambda m: m["files"].update({n: {"bytes": 1, "sha256": ""}})
        ),
    )
    add(
        *("artifact", f"a part that leads {way}"),
        lambda f, n=name: changed(f / "artifact.json", lambda m: m["labels"].update(folder=n)),
    )
    add(
        *("manifest", f"files that lead {way}"),
        lambda f, n=name: changed(
            f / "manifest.json", lambda m: m["files"].update({n: {"bytes": 1, "sha256": ""}})
        ),
    )
for kind, file in (("artifact", "artifact.json"), ("manifest", "manifest.json")):
    add(kind, "deep", lambda f, n=file: (f / n).write_text(NESTED))
    add(kind, "a long number", lambda f, n=file: (f / n).write_text(f'{{"files": {LONG}}}'))
add("artifact", "a manifest that is a pipe", lambda f: fifo(f / "artifact.json"))
add("artifact", "a file that is a pipe", lambda f: fifo(f / "labels" / "embeddings.npy"))
add("artifact", "a file that is a device", lambda f: link(f / "labels/embeddings.npy", "/dev/zero"))
add("artifact", "links in a circle", lambda f: link(f / "labels/embeddings.npy", "embeddings.npy"))
add("artifact", "a link out", lambda f: link(f / "labels/embeddings.npy", "/etc/passwd"))
add("artifact", "a pickle nobody named", lambda f: (f / "evil.bin").write_bytes(evil(f)))
add("artifact", "a pickle", lambda f: (f / "evil.pkl").write_bytes(evil(f)), HARMLESS)
for field, value in {"max_length": 10**12, "width": 10**12, "pooling": "__import__('os')"}.items():
    add(
        *("artifact", f"{field} {value}"),
        lambda f, n=field, v=value: changed(
            f / "artifact.json", lambda m: m["model"].update({n: v})
        ),
    )
add(
    *("artifact", "texts past the end"),
    lambda f: [
        np.save(f / "labels/texts.offsets.npy", np.array([0] + [1 << 62] * 6)),
        valid_inputs.forge(f),
    ],
)
add("dataset", "a pipe", lambda f: fifo(f / "train.tokens.npy"))
add("dataset", "links in a circle", lambda f: link(f / "filter.npy", "filter.npy"))
add("images", "deep", lambda f: (f / "manifest.json").write_text(NESTED))
add("tuned", "deep", lambda f: (f / "tuned.json").write_text(NESTED))
add("tuned", "a long number", lambda f: (f / "tuned.json").write_text(f'{{"a": {LONG}}}'))


_read: set[str] = set()  # kinds


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> valid_inputs.Inputs:
    return valid_inputs.Inputs(tmp_path_factory.mktemp("valid"))


def check(read: valid_inputs.Read, where: pathlib.Path, becomes: str) -> None:
    """Runs a reader under all guards."""
    with guarded.watched(where.parent) as found, guarded.bounded():
        said = guarded.outcome(read, where)
    assert found == []
    assert not list(where.parent.rglob(CANARY))
    assert (said is not None) == (becomes == REFUSED), said


IN_SHORT = (
    "dataset: objects", "artifact: a call for a header", "object map: a pickle with os.system",
    "items: a title of a gigabyte", "encoder: weights that are a pickle",
    "encoder: a tokenizer of its own code", "encoder: config: a pipe", "index: its pickle, named",
    "index: a list of full paths", "artifact: a file that is a pipe",
    "manifest: files that lead up",
    "encoder: config: num_hidden_layers 1000000000000", "request: deep",
)  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        name if name in IN_SHORT else pytest.param(name, marks=pytest.mark.reliability)
        for name in ARTEFACTS
    ],
)
def test_nothing_is_executed(inputs, tmp_path, name):
    kind, make, becomes = ARTEFACTS[name]
    if kind == "index":
        pytest.importorskip("scann", reason="ships for x86-64 Linux only")
    folder, _, read = inputs.kinds[kind]
    where = tmp_path / folder
    shutil.copytree(inputs.folder / folder, where)
    if kind not in _read and kind != "index":  # imports what it needs
        read(inputs.folder / folder)
        _read.add(kind)
    make(where)
    check(read, where, becomes)


ARCHIVES: dict[str, Make] = {
    "objects": lambda f: npz(**{"format.npy": object_npy(f), "shape.npy": object_npy(f)}),
    "names that lead up": lambda f: npz(**{"../../evil.npy": object_npy(f)}),
    "a name from the root": lambda f: npz(**{f"{f}/{CANARY}": b"x"}),
    "a shape of a thousand trillions": lambda f: npz(
        **{"indptr.npy": npy(SIZES % "(1000000000000000,)")}
    ),
    "a gigabyte of zeros": lambda f: zip_of_zeros(
        b"indptr.npy", npy(SIZES % f"({1 << 28},)"), 1024
    ),
    "a pickle": lambda f: evil(f),
    "nothing": lambda f: b"",
}


@pytest.mark.parametrize("name", ARCHIVES)
@pytest.mark.reliability
def test_archives_of_label_matrices(tmp_path, name):
    where = tmp_path / "raw"
    where.mkdir()
    (where / "m.npz").write_bytes(ARCHIVES[name](where))
    check(lambda folder: raw.read_label_matrix(folder / "m.npz"), where, REFUSED)


TEXTS = {
    "filter": ("f.txt.gz", raw.read_filter, b"\n"),
    "matrix": ("m.txt.gz", raw.read_label_matrix, b" "),
    "groups": ("groups.tsv.gz", raw.read_groups, b" "),
    "texts": ("lbl.raw.txt.gz", raw.read_items, b"\n"),
    "ids": ("only.txt.gz", lambda path: documents.ids_of(str(path)), b"\n"),
}


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.reliability
def test_gzip_files_that_grow(tmp_path, kind):
    name, read, byte = TEXTS[kind]
    where = tmp_path / "raw"
    where.mkdir()
    (where / name).write_bytes(bomb(1024, byte))
    check(lambda folder: read(folder / name), where, REFUSED)


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        check_sum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check_sum)

    facts = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(1 << 20), 9)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", facts) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


SVG = b"""<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">
<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;&a;">]><svg xmlns="http://www.w3.org/2000/svg">
<image href="http://127.0.0.1/"/><text>&x;&b;</text></svg>"""
PICTURES: dict[str, Make] = {
    "a PNG of five billion pixels": lambda f: png(70_000, 70_000),
    "a PNG of no pixels": lambda f: png(0, 0),
    "a GIF of four billion pixels": lambda f: b"GIF89a" + b"\xff" * 4 + bytes(3) + b"," * 40,
    "a BMP of pixels below zero": lambda f: b"BM" + bytes(12) + struct.pack("<Iii", 40, -9, 9),
    "an SVG with entities": lambda f: SVG,
    "a PostScript program": lambda f: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nquit\n",
    "a GIF that is an archive": lambda f: b"GIF89a" + npz(a=object_npy(f)),
    "a pickle": lambda f: evil(f),
    "a TIFF of tiles": lambda f: b"II*\0\x08\0\0\0\x04\0" + b"".join(
        struct.pack("<HHII", tag, 4, 1, value)
        for tag, value in ((256, 1), (257, 1), (322, 1 << 30), (323, 1 << 30))
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.reliability
def test_pictures(tmp_path, name):
    vision = pytest.importorskip("xmc_jax.images.decoding", reason='needs the extra "vision"')
    where = tmp_path / "pictures"
    where.mkdir()
    (where / "a.png").write_bytes(PICTURES[name](where))
    check(lambda folder: vision.decode((folder / "a.png").read_bytes()), where, REFUSED)


def test_there_are_enough():
    assert len(ARTEFACTS) + len(ARCHIVES) + len(TEXTS) + len(PICTURES) >= 60
    assert set(IN_SHORT) <= set(ARTEFACTS)


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: os.system("true"),
        lambda folder: pickle.loads(pickle.dumps(Payload(folder))),
        lambda folder: exec(compile("1", "<read>", "exec")),
        lambda folder: (folder.parents[1] / "outside").write_text("x"),
        lambda folder: np.load(folder / "a.npy", allow_pickle=True),
    ],
)
def test_the_guards_see_harm(tmp_path, harm):
    """Each of these would be found, were it done by a reader."""
    folder = tmp_path / "run" / "folder"
    folder.mkdir(parents=True)
    (folder / "a.npy").write_bytes(object_npy(folder))
    with guarded.watched(folder) as found:
        harm(folder)
    assert found
