"""Valid inputs of every kind, damaged at random: each is read, or refused in one line, soon.

What is read is compared with small parsers that follow from the formats alone. They say that a
damaged input is still valid, that it is not, or, where that takes more than they know, nothing; an
input that they call invalid must be refused.
"""

import ast
import csv
import gzip
import hashlib
import io
import json
import math
import pathlib
import re
import shutil
import struct
from collections.abc import Callable
from typing import Any

import guarded
import numpy as np
import pytest
import valid_inputs

from xmc_jax.data import store

VALID, INVALID, UNKNOWN = "valid", "invalid", "unknown"

# How input is damaged.

NUMBERS = (b"-1", b"99999999999999999999", b"1e999", b"nan", b"2147483648", b"0.5", b"1" * 5000)
CRUMBS = (b"\x00", b"\xff", b"\xef\xbb\xbf", b"\r", b"\n\n", b"\t", b'"', b"[" * 3000, b"\\ud800")


def damaged_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    """Text or binary with one thing wrong, or perhaps not wrong."""
    at = int(rng.integers(len(content) + 1))
    kind = int(rng.integers(9))
    lines = content.split(b"\n")
    row = int(rng.integers(len(lines)))
    if kind == 0 and content:  # bits
        changed = bytearray(content)
        for place in rng.integers(len(content), size=int(rng.integers(1, 4))):
            changed[place] ^= 1 << int(rng.integers(8))
        return bytes(changed)
    if kind == 1:
        return content[:at]
    if kind == 2:
        return b"\n".join([*lines[: row + 1], *lines[row:]])
    if kind == 3:
        return b"\n".join([*lines[:row], *lines[row + 1 :]])
    if kind == 4 and (numbers := list(re.finditer(rb"[0-9]+", content))):
        start, end = numbers[int(rng.integers(len(numbers)))].span()
        return content[:start] + NUMBERS[int(rng.integers(len(NUMBERS)))] + content[end:]
    if kind == 5:
        return b"\xef\xbb\xbf" + content
    if kind == 6:
        return content.replace(b"\n", b"\r\n")
    if kind == 7:
        other = int(rng.integers(len(content) + 1))
        return content[:at] + content[other : other + 9] + content[at:]
    return content[:at] + CRUMBS[int(rng.integers(len(CRUMBS)))] + content[at:]


def nested(levels: int) -> Any:
    """A list in a list in a list."""
    found: Any = []
    for _ in range(levels):
        found = [found]
    return found


VALUES = (
    None, True, -1, 0, 1, 10**12, 10**30, 0.5, -0.5, math.nan, math.inf, "", "x", "../x",
    "/etc/passwd", "a\x00b", [], [1], ["x"], {}, {"x": 1}, nested(50),
)  # fmt: skip


def damaged_json(content: bytes, rng: np.random.Generator) -> bytes:
    """JSON in which a field is missing, of another type or value, or one too many."""
    tree = json.loads(content)
    node: Any = tree
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = keys[int(rng.integers(len(keys)))] if keys else "new"
        inner = node[key] if keys else None
        if isinstance(inner, dict | list) and inner and rng.random() < 0.7:
            node = inner
            continue
        break
    kind = int(rng.integers(4))
    if kind == 0 and keys:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node["new"] = VALUES[int(rng.integers(len(VALUES)))]
    elif isinstance(node, dict) or keys:
        node[key] = VALUES[int(rng.integers(len(VALUES)))]
    return json.dumps(tree).encode()


def damaged(path: pathlib.Path, rng: np.random.Generator) -> None:
    """Damages a file in its place; what is in a gzip file as often as the file."""
    content = path.read_bytes()
    if path.suffix == ".gz" and rng.random() < 0.8:
        path.write_bytes(gzip.compress(damaged_bytes(gzip.decompress(content), rng), 1))
    elif path.suffix == ".json" and rng.random() < 0.8:
        path.write_bytes(damaged_json(content, rng))
    elif path.suffix == ".safetensors" and rng.random() < 0.6:  # its header, which is JSON
        size = struct.unpack("<Q", content[:8])[0]
        header = damaged_json(content[8 : 8 + size], rng)
        path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + size :])
    elif path.suffix == ".npy" and path.stem != "objects" and rng.random() < 0.5:  # its values
        array = np.load(path, allow_pickle=False).copy()
        extremes = (-1, 0, 1, 2**15 - 1) if array.dtype.kind in "iu" else (np.nan, np.inf, 0, -1)
        if array.size:
            value = np.array(extremes[int(rng.integers(4))]).astype(array.dtype)
            array.flat[int(rng.integers(array.size))] = value
        np.save(path, array if rng.random() < 0.7 else array[:-1])
    else:
        path.write_bytes(damaged_bytes(content, rng))


# What the formats say, read without the package.


def lines_of(path: pathlib.Path) -> list[bytes] | None:
    """Of a file or its `.gz` form; None of a damaged one."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content) if content else None
        except (OSError, EOFError, gzip.zlib.error):
            return None
        if content is None:
            return None
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return [line.rstrip(b"\r") for line in (lines[:-1] if lines[-1] == b"" else lines)]


def loads(text: bytes | str) -> Any:
    """JSON; ValueError for anything else, also for text that is no Unicode."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested") from None


def judge_filter(folder: pathlib.Path) -> str:
    lines = lines_of(folder / "filter_labels_test.txt")
    for line in lines:
        words = line.replace(b"\t", b" ").split(b" ")
        words = [word for word in words if word]
        if not words and not line.strip():
            continue
        if len(words) != 2 or not all(re.fullmatch(rb"[0-9]+", word) for word in words):
            return INVALID
        if int(words[0][:30]) >= valid_inputs.TEST or int(words[1][:30]) >= valid_inputs.LABELS:
            return INVALID
    return VALID


def judge_groups(folder: pathlib.Path) -> str:
    groups: dict[str, str] = {}
    for line in lines_of(folder / "groups.tsv"):
        try:
            fields = line.decode().split("\t")
        except UnicodeDecodeError:
            return INVALID
        if len(fields) != 2 or groups.setdefault(*fields) != fields[1]:
            return INVALID
    return VALID


def judge_items(folder: pathlib.Path) -> str:
    lines, seen = lines_of(folder / "trn.json.gz"), set()
    if lines is None:
        return INVALID
    for line in lines:
        if not line.strip():
            seen.add("blank")
            continue
        if "blank" in seen:
            return INVALID
        try:
            item = loads(line.decode())
            "".join([item.get("uid", ""), item["title"], item.get("content", "")]).encode()
        except (ValueError, AttributeError, KeyError, TypeError):
            return INVALID
        targets = item.get("target_ind")
        seen.add("with" if targets is not None else "without")
        if targets is None:
            continue
        weights = item.get("target_rel", [1] * len(targets) if isinstance(targets, list) else 0)
        if not isinstance(targets, list) or not isinstance(weights, list):
            return INVALID
        if not all(type(one) is int and 0 <= one < valid_inputs.LABELS for one in targets):
            return INVALID
        if len(weights) != len(targets):
            return INVALID
        if not all(type(one) in (int, float) and 0 < one < math.inf for one in weights):
            return INVALID
    return INVALID if {"with", "without"} <= seen else VALID


def judge_matrix(folder: pathlib.Path) -> str:
    lines = lines_of(folder / "trn_X_Y.txt")
    header = lines[0].split() if lines else []
    if len(header) != 2 or not all(re.fullmatch(rb"[0-9]{1,10}", word) for word in header):
        return INVALID
    rows, columns = map(int, header)
    body = lines[1 : 1 + rows]
    if len(body) < rows or any(line.strip() for line in lines[1 + rows :]):
        return INVALID
    for word in b" ".join(body).split():
        label, colon, value = word.partition(b":")
        if not (colon and re.fullmatch(rb"[0-9]+", label)):
            return INVALID
        try:
            finite = math.isfinite(np.float32(float(value)))
        except ValueError:
            return INVALID
        if len(label) > 20 or int(label) >= columns or not finite:
            return INVALID
    return UNKNOWN  # signs, spaces and blank lines are judged nowhere else


def judge_objects(name: str, needed: tuple[str, ...]) -> Callable[[pathlib.Path], str]:
    """JSONL of objects with some fields, all texts, unless a record lacks them all."""

    def judge(folder: pathlib.Path) -> str:
        lines = lines_of(folder / name)
        if not any(line.strip() for line in lines):
            return INVALID
        for line in lines:
            if not line.strip():
                continue
            try:
                record = loads(line.decode())
            except ValueError:
                return INVALID
            if not isinstance(record, dict):
                return INVALID
            if any(isinstance(record.get(field), dict | bool) for field in needed):
                return INVALID
        return UNKNOWN

    return judge


def judge_csv(folder: pathlib.Path) -> str:
    text = (folder / "train.csv").read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        rows = [row for row in csv.reader(io.StringIO(text.decode(), newline="")) if row]
    except (UnicodeDecodeError, csv.Error):
        return INVALID
    if len(rows) < 2 or len({len(row) for row in rows}) > 1:
        return INVALID
    if len(set(rows[0])) < len(rows[0]) or "text" not in [name.strip() for name in rows[0]]:
        return INVALID
    return UNKNOWN


def judge_parquet(folder: pathlib.Path) -> str:
    content = (folder / "train.parquet").read_bytes()
    return UNKNOWN if content[:4] == content[-4:] == b"PAR1" else INVALID


def judge_prior(folder: pathlib.Path) -> str:
    found: dict[str, float] = {}
    for line in lines_of(folder / "prior.tsv"):
        try:
            text = line.decode()
            if not text.strip():
                continue
            label, tab, number = text.rpartition("\t")
            value = float(number)
        except ValueError:
            return INVALID
        if (
            not tab
            or not 0 <= value < math.inf
            or (label in found and label in valid_inputs.LABEL_IDS)
        ):
            return INVALID
        found[label] = value
    return VALID if set(found) >= set(valid_inputs.LABEL_IDS) else INVALID


def npy(path: pathlib.Path) -> np.ndarray | None:
    """The array of a file of version 1 whose header is as np.save writes it; None of another."""
    content = path.read_bytes()
    if content[:8] != b"\x93NUMPY\x01\x00":
        return None
    (size,) = struct.unpack("<H", content[8:10].ljust(2, b"\0"))
    try:
        header = ast.literal_eval(content[10 : 10 + size].decode("latin-1").strip())
        dtype, shape = np.dtype(header["descr"]), header["shape"]
        count = math.prod(shape) * dtype.itemsize
        if dtype.hasobject or header["fortran_order"] or len(content) < 10 + size + count:
            return None
        return np.frombuffer(content, dtype, math.prod(shape), 10 + size).reshape(shape)
    except Exception:
        return None


def judge_dataset(folder: pathlib.Path) -> str:
    try:
        manifest = loads((folder / "manifest.json").read_bytes())
        T, files = manifest["max_length"], manifest["files"]
        if manifest["format"] != 1 or type(T) is not int or type(manifest["dataset"]) is not str:
            return INVALID
        numbers = manifest["propensity"]
        if len(numbers) != 2 or not all(type(n) in (int, float) for n in numbers):
            return INVALID
        if not all(math.isfinite(n) for n in numbers):
            return INVALID
        if type(manifest["tokenizer"]["vocab_size"]) is not int:
            return INVALID
        arrays = {}
        for name, facts in files.items():
            if "/" in name or (folder / name).stat().st_size != facts["bytes"]:
                return INVALID
            if name.endswith(".npy"):
                arrays[name[:-4]] = array = npy(folder / name)
                if array is None or list(array.shape) != facts["shape"]:
                    return INVALID
                if str(array.dtype) != facts["dtype"]:
                    return INVALID
        counts = {split: len(arrays[f"{split}.lengths"]) for split in store.SPLITS}
        for split in store.SPLITS:
            tokens, lengths = arrays[f"{split}.tokens"], arrays[f"{split}.lengths"]
            if tokens.shape != (counts[split], T) or (lengths > T).any():
                return INVALID
            for kind in ("uids", "titles"):
                lines = (folder / f"{split}.{kind}.txt").read_bytes().decode().split("\n")
                if len(lines) != counts[split] + 1:
                    return INVALID
                if any(re.search(r"\\(?![\\n])", line.replace("\\\\", "")) for line in lines):
                    return INVALID
        for split in ("train", "test"):
            indptr = arrays[f"{split}.positives.indptr"]
            indices = arrays[f"{split}.positives.indices"]
            if len(indptr) != counts[split] + 1 or (np.diff(indptr) < 0).any():
                return INVALID
            if indptr[0] != 0 or indptr[-1] != len(indices):
                return INVALID
            if ((indices < 0) | (indices >= counts["label"])).any():
                return INVALID
        pairs = arrays["filter"]
        limits = counts["test"], counts["label"]
        if pairs.shape[1:] != (2,) or ((pairs < 0) | (pairs >= limits)).any():
            return INVALID
    except (ValueError, KeyError, TypeError, AttributeError, OSError, IndexError):
        return INVALID
    return UNKNOWN


def judge_images(folder: pathlib.Path) -> str:
    try:
        manifest = loads((folder / "manifest.json").read_bytes())
        if manifest["format"] != 1 or type(manifest["encoder"]["E"]) is not int:
            return INVALID
        for split in store.SPLITS:
            rows, indptr = (npy(folder / f"{split}.{kind}.npy") for kind in ("rows", "indptr"))
            for kind, array in (("rows", rows), ("indptr", indptr)):
                facts = manifest["files"][f"{split}.{kind}.npy"]
                size = (folder / f"{split}.{kind}.npy").stat().st_size
                if array is None or size != facts["bytes"] or list(array.shape) != facts["shape"]:
                    return INVALID
            if len(indptr) != manifest["counts"][split] + 1 or (np.diff(indptr) < 0).any():
                return INVALID
            if indptr[0] != 0 or indptr[-1] != len(rows):
                return INVALID
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return INVALID
    return UNKNOWN


def judge_map(folder: pathlib.Path) -> str:
    array = npy(folder / "map.npy")
    if array is None:
        return UNKNOWN  # perhaps another version of the header
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        return INVALID
    return INVALID if (array < -1).any() or (array >= 50).any() else UNKNOWN


def judge_encoder(folder: pathlib.Path) -> str:
    try:
        config = loads((folder / "config.json").read_bytes())
        loads((folder / "tokenizer.json").read_bytes())
        if config["model_type"] != "bert":
            return INVALID
        for name in ("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size"):
            if type(config[name]) is not int or not 0 < config[name] < 2**31:
                return INVALID
        content = (folder / "model.safetensors").read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        header = loads(content[8 : 8 + size])
        body, ends = len(content) - 8 - size, []
        for name, facts in header.items():
            if name == "__metadata__":
                continue
            start, end = facts["data_offsets"]
            width = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "F64": 8}.get(facts["dtype"])
            if width is None or end - start != width * math.prod(facts["shape"]):
                return INVALID
            ends.append((start, end))
        if sorted(ends)[0][0] != 0 or max(end for _, end in ends) != body:
            return INVALID
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, IndexError):
        return INVALID
    return UNKNOWN


def judge_artifact(folder: pathlib.Path) -> str:
    try:
        manifest = loads((folder / "artifact.json").read_bytes())
        if manifest["format"] != 1 or type(manifest["name"]) is not str:
            return INVALID
        for name, facts in manifest["files"].items():
            content = (folder / name).read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            if (len(content), digest) != (facts["bytes"], facts["sha256"]):
                return INVALID
        model = manifest["model"]
        if (model["width"], manifest["labels"]["count"]) != (
            valid_inputs.WIDTH,
            valid_inputs.LABELS,
        ):
            return INVALID
        if not 0 < manifest["ranking"]["temperature"] < math.inf:
            return INVALID
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return INVALID
    return UNKNOWN


def judge_tuned(folder: pathlib.Path) -> str:
    try:
        content = loads((folder / "tuned.json").read_bytes())
        chosen = content["augmented"]
        if content["format"] != 1 or not isinstance(content["belongs_to"], dict):
            return INVALID
        for name, kinds in (
            ("labels", (int,)),
            ("documents", (int,)),
            ("temperature", (int, float)),
            ("label_weight", (int, float)),
            ("normalize_rows", (bool,)),
            ("prior_weight", (int, float)),
        ):
            if type(chosen[name]) not in kinds or not math.isfinite(chosen[name]):
                return INVALID
        if not (chosen["temperature"] > 0 and 0 <= chosen["label_weight"] <= 1):
            return INVALID
    except (ValueError, KeyError, TypeError, AttributeError):
        return INVALID
    return UNKNOWN


def judge_workdir(folder: pathlib.Path) -> str:
    try:
        loads((folder / "config.json").read_bytes())
    except ValueError:
        return INVALID
    return UNKNOWN


def judge_index(folder: pathlib.Path) -> str:
    try:
        content = loads((folder / "index.json").read_bytes())
        for name, digest in content["files"].items():
            found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            if "/" in name or found != digest:
                return INVALID
        if type(content["count"]) is not int or type(content["width"]) is not int:
            return INVALID
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return INVALID
    return UNKNOWN


def judge_ids(folder: pathlib.Path) -> str:
    try:
        text = (folder / "only.txt").read_bytes().removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError:
        return INVALID
    ids = list(filter(None, map(str.strip, text.split("\n"))))
    return INVALID if not ids or any("\t" in uid or "\r" in uid for uid in ids) else VALID


def without_nulls(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value is not None}


def judge_request(folder: pathlib.Path) -> str:
    try:
        body = without_nulls(loads((folder / "request.json").read_bytes()))
        queries = body["queries"]
        if set(body) - {"queries", "k", "ranking"} or not 1 <= len(queries) <= 16:
            return INVALID
        if type(queries) is not list or not 1 <= body.get("k", 10) <= 100:
            return INVALID
        if type(body.get("k", 10)) is not int:
            return INVALID
        if body.get("ranking", "auto") not in ("auto", "plain", "augmented"):
            return INVALID
        for query in map(without_nulls, queries):
            if set(query) - {"text", "images", "only", "exclude"}:
                return INVALID
            if type(query.get("text", "")) is not str:
                return INVALID
            if not all(type(one) is str for one in query.get("exclude", [])):
                return INVALID
    except (ValueError, KeyError, TypeError, AttributeError):
        return INVALID
    return UNKNOWN


JUDGES = {
    "filter": judge_filter,
    "groups": judge_groups,
    "items": judge_items,
    "matrix": judge_matrix,
    "jsonl": judge_objects("train.jsonl", ("text", "labels", "id")),
    "csv": judge_csv,
    "parquet": judge_parquet,
    "prior": judge_prior,
    "edits": judge_objects("edits.jsonl", ("text", "id")),
    "queries": judge_objects("queries.jsonl", ()),
    "ids": judge_ids,
    "map": judge_map,
    "object map": None,
    "manifest": judge_dataset,
    "dataset": judge_dataset,
    "images": judge_images,
    "encoder": judge_encoder,
    "artifact": judge_artifact,
    "forged artifact": None,
    "index": judge_index,
    "tuned": judge_tuned,
    "workdir": judge_workdir,
    "request": judge_request,
}
KINDS = tuple(JUDGES)


def judged(kind: str, folder: pathlib.Path) -> str:
    judge = JUDGES[kind]
    return UNKNOWN if judge is None else judge(folder)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> valid_inputs.Inputs:
    return valid_inputs.Inputs(tmp_path_factory.mktemp("valid"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "seeds", [range(2), pytest.param(range(2, 50), marks=pytest.mark.reliability)], ids=str
)
def test_damaged_input_is_read_or_refused_in_one_line(inputs, tmp_path, kind, seeds):
    folder, names, read = inputs.kinds[kind]
    if kind == "index":
        pytest.importorskip("scann", reason="ships for x86-64 Linux only")
    failures = []
    for seed in seeds:
        rng = np.random.default_rng([KINDS.index(kind), seed])
        where = tmp_path / f"{seed}" / folder
        shutil.copytree(inputs.folder / folder, where)
        name = names[int(rng.integers(len(names)))]
        damaged(where / name, rng)
        if kind == "forged artifact":
            valid_inputs.forge(where)
        label = f"{kind} {seed}, {name}"
        try:
            said, verdict = guarded.outcome(read, where), judged(kind, where)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            failures.append(f"{label}: {type(error).__name__}: {error!s:.300}")
            continue
        if said is None and verdict == INVALID:
            failures.append(f"{label}: was read, and is invalid")
        if said is not None and verdict == VALID:
            failures.append(f"{label}: was refused, and is valid: {said}")
        shutil.rmtree(where.parent)
    assert failures == []


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_damaged_was_valid(inputs, tmp_path, kind):
    folder, _, read = inputs.kinds[kind]
    if kind == "index":
        pytest.skip("made without ScaNN: its files are whole, but no index")
    assert guarded.outcome(read, inputs.folder / folder) is None
    assert judged(kind, inputs.folder / folder) != INVALID


def test_every_kind_is_damaged(inputs):
    assert set(KINDS) == set(inputs.kinds)
