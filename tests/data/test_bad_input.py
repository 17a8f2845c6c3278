"""Damaged files: each reader gives what a slow, literal parser gives, or a one-line ValueError."""

import contextlib
import gzip
import json
import math
import re
import signal

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from xmc_jax.data import raw

settings = hypothesis.settings(
    max_examples=400,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)

FRAGMENTS = [
    b"",
    b" ",
    b"\n",
    b"\r\n",
    b"\r",
    b"\t",
    b"\xef\xbb\xbf",
    b"\xff",
    b"\x00",
    b"-",
    b"-1",
    b"0",
    b"7",
    b"99999999999999999999",
    b"1" * 5000,
    b":",
    b"1:",
    b":1",
    b"3:1",
    b"3:nan",
    b"3:inf",
    b"3:1e999",
    b"1.5",
    b"e5",
    b"2 3",
    b"2 3 4",
    b"NaN",
    b"null",
    b"{",
    b"[",
    b"[" * 3000,
    b'"',
    b"\\",
    b"\\ud800",
    b'"target_ind"',
    b"->",
]

NUMBERS = [b"0", b"9", b"10", b"11", b"2147483648", b"1" * 30, b"1" * 5000, b"0.5", b"1e3"]
NUMBERS += [b"1e999", b"nan", b"NaN", b"Infinity"]

edit = st.tuples(
    st.sampled_from(
        ["insert", "replace", "number", "sign", "delete line", "double line", "swap lines", "cut"]
    ),
    st.integers(0, 10_000),
    st.integers(0, 12),
    st.sampled_from(FRAGMENTS),
)


edit_lists = st.lists(edit, min_size=1, max_size=3) | st.just([])


def mutate(content: bytes, edits) -> bytes:
    for kind, spread, size, fragment in edits:
        position = spread * 7919  # small numbers are drawn most; let them fall anywhere
        at = position % (len(content) + 1)
        lines = content.split(b"\n")
        row = position % len(lines)
        if kind == "insert":
            content = content[:at] + fragment + content[at:]
        elif kind == "replace":
            content = content[:at] + fragment + content[at + size :]
        elif kind in ("number", "sign"):
            numbers = list(re.finditer(rb"[0-9]+", content)) or [re.match(b"", content)]
            start, end = numbers[position % len(numbers)].span()
            new = NUMBERS[size] if kind == "number" else b"-" + content[start:end]
            content = content[:start] + new + content[end:]
        elif kind == "cut":
            content = content[:at]
        else:
            if kind == "delete line":
                del lines[row]
            elif kind == "double line":
                lines.insert(row, lines[row])
            else:
                other = (row + size) % len(lines)
                lines[row], lines[other] = lines[other], lines[row]
            content = b"\n".join(lines)
    return content


@contextlib.contextmanager
def within(seconds: int):
    def stop(*_):
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def read_or_message(read, path, *arguments):
    """What the reader gives; None after checking that it refused in one line with the name."""
    with within(20):
        try:
            return read(path, *arguments)
        except ValueError as error:
            message = str(error)
            assert type(error) is ValueError and message.startswith(str(path))
            assert "expected" in message and "\n" not in message and len(message) < 700
            return None


def file_lines(content: bytes) -> list[bytes]:
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    return [line.rstrip(b"\r") for line in lines]


ENTRY = re.compile(rb"[0-9]+:[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
SPACES = re.compile(rb"[ \t]+")


def words(line: bytes) -> list[bytes]:
    return [word for word in SPACES.split(line) if word]


def oracle_matrix(content: bytes):
    lines = file_lines(content)
    header = words(lines[0]) if lines else []
    if len(header) != 2 or not all(re.fullmatch(rb"[0-9]{1,10}", n) for n in header):
        return None
    rows, columns = map(int, header)
    body = lines[1:]
    if columns > 2**31 - 1 or len(body) < rows or any(line.strip() for line in body[rows:]):
        return None
    table = []
    for line in body[:rows]:
        entries = []
        for word in words(line):
            if not ENTRY.fullmatch(word):
                return None
            label, value = word.split(b":")
            with np.errstate(over="ignore"):
                value = np.float32(float(value))
            if len(label) > 20 or int(label) >= columns or not np.isfinite(value):
                return None
            entries.append((int(label), value))
        table.append(entries)
    return table


def oracle_pairs(content: bytes, points: int, labels: int):
    pairs = []
    for line in file_lines(content):
        if not line.strip():
            continue
        numbers = words(line)
        if len(numbers) != 2 or not all(re.fullmatch(rb"[0-9]{1,20}", n) for n in numbers):
            return None
        point, label = map(int, numbers)
        if point >= points or label >= labels:
            return None
        pairs.append([point, label])
    return pairs


def oracle_items(content: bytes, labels: int):
    lines = file_lines(content)
    while lines and not lines[-1].strip():
        lines.pop()
    items = []
    for line in lines:
        try:
            item = json.loads(line.decode())
            uid = item.get("uid", str(len(items)))
            texts = [uid, item["title"], item.get("content", "")]
            "".join(texts).encode()
        except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
            return None
        targets = item.get("target_ind")
        if targets is not None:
            if not isinstance(targets, list):
                return None
            weights = item.get("target_rel", [1] * len(targets))
            if not isinstance(weights, list) or len(weights) != len(targets):
                return None
            if not all(type(t) is int and 0 <= t < labels for t in targets):
                return None
            if not all(type(w) in (int, float) and 0 < w < math.inf for w in weights):
                return None
        items.append((*texts, targets))
    if len({targets is None for *_, targets in items}) > 1:
        return None
    return items


def store(folder, name: str, content: bytes, zipped: bool):
    path = folder / (name + (".gz" if zipped else ""))
    path.write_bytes(gzip.compress(content, 1) if zipped else content)
    return path


rows = st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=6)


@settings
@hypothesis.given(rows, edit_lists, st.booleans())
def test_label_matrix(tmp_path, table, edits, zipped):
    lines = [b"%d 10" % len(table)]
    lines += [b" ".join(b"%d:1.00000" % label for label in row) for row in table]
    content = mutate(b"\n".join(lines) + b"\n", edits)
    matrix = read_or_message(raw.read_label_matrix, store(tmp_path, "m.txt", content, zipped))
    expected = oracle_matrix(content)
    assert (matrix is None) == (expected is None)
    if matrix is not None:
        assert np.diff(matrix.indptr).tolist() == [len(row) for row in expected]
        assert matrix.indices.tolist() == [label for row in expected for label, _ in row]
        assert matrix.values.tolist() == [float(value) for row in expected for _, value in row]


@settings
@hypothesis.given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=6),
    edit_lists,
    st.booleans(),
)
def test_filter(tmp_path, pairs, edits, zipped):
    content = mutate(b"".join(b"%d %d\n" % pair for pair in pairs), edits)
    path = store(tmp_path, "f.txt", content, zipped)
    found = read_or_message(raw.read_filter, path, 10, 10)
    expected = oracle_pairs(content, 10, 10)
    assert (found is None) == (expected is None)
    if found is not None:
        assert found.shape == (len(expected), 2) and found.tolist() == expected


@pytest.mark.slow
@settings
@hypothesis.given(rows, edit_lists, st.booleans())
def test_items(tmp_path, table, edits, zipped):
    lines = [
        {"uid": "u", "title": "Crème", "target_ind": row, "target_rel": [1.0] * len(row)}
        for row in table
    ]
    text = "".join(json.dumps(line, ensure_ascii=bool(len(table) % 2)) + "\n" for line in lines)
    content = mutate(text.encode(), edits)
    path = store(tmp_path, "trn.json", content, zipped)
    items = read_or_message(raw.read_items, path, "utf-8", 10)
    expected = oracle_items(content, 10)
    assert (items is None) == (expected is None)
    if items is not None:
        assert list(zip(items.uids, items.titles, items.contents)) == [row[:3] for row in expected]
        targets = [row[3] for row in expected]
        if not targets or targets[0] is None:
            assert items.positives is None
        else:
            assert items.positives.counts().tolist() == [len(row) for row in targets]
            assert items.positives.indices.tolist() == [label for row in targets for label in row]


@settings
@hypothesis.given(edit_lists, st.sampled_from(["utf-8", "latin-1"]))
def test_texts(tmp_path, edits, encoding):
    content = mutate("B1->Crème\nB2->Lamp\nB3->a -> b\n".encode(), edits)
    path = store(tmp_path, "lbl.raw.txt", content, False)
    items = read_or_message(raw.read_items, path, encoding)
    try:
        texts = [line.decode(encoding) for line in file_lines(content)]
    except UnicodeDecodeError:
        assert items is None
        return
    with_ids = [f"{uid}->{title}" for uid, title in zip(items.uids, items.titles)]
    assert texts in (items.titles, with_ids)


@settings
@hypothesis.given(st.integers(0, 10_000), st.binary(max_size=8), st.booleans())
def test_damaged_gzip(tmp_path, position, noise, cut):
    good = "".join(f"{i} {i % 7}\n" for i in range(200)).encode()
    content = gzip.compress(good, mtime=0)
    at = position % len(content)
    damaged = content[:at] if cut else content[:at] + noise + content[at + len(noise) :]
    path = tmp_path / "f.txt.gz"
    path.write_bytes(damaged)
    pairs = read_or_message(raw.read_filter, path)
    # Bytes of the gzip header do not change the contents; anything else must be noticed.
    assert pairs is None or pairs.tolist() == [[i, i % 7] for i in range(200)]
    assert not (cut and pairs is not None)


@settings
@hypothesis.given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=4))
def test_damaged_npz(tmp_path, changes):
    import scipy.sparse

    path = tmp_path / "m.npz"
    scipy.sparse.save_npz(path, scipy.sparse.csr_matrix(np.eye(4)), compressed=False)
    content = bytearray(path.read_bytes())
    for position, value in changes:
        content[position % len(content)] = value
    path.write_bytes(content)
    matrix = read_or_message(raw.read_label_matrix, path)
    assert matrix is None or matrix.indices.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "arrays",
    [
        {"indptr": [0, 2, 1, 3]},
        {"indptr": [0, 1, 3]},
        {"indptr": [1, 1, 2, 3]},
        {"indices": [0, 1, 4]},
        {"indices": [0, -1, 2]},
        {"indices": [0, 1]},
        {"indices": [0.0, 1.0, 2.0]},
        {"data": [1.0, np.nan, 1.0]},
        {"data": ["a", "b", "c"]},
        {"shape": [3]},
        {"shape": [-1, 4]},
        {"format": "coo"},
    ],
)
def test_inconsistent_npz(tmp_path, arrays):
    good = {"indptr": [0, 1, 2, 3], "indices": [0, 1, 2], "data": [1.0, 1.0, 1.0]}
    good |= {"shape": [3, 4], "format": b"csr"}
    path = tmp_path / "m.npz"
    np.savez(path, **good)
    assert raw.read_label_matrix(path).indices.tolist() == [0, 1, 2]
    np.savez(path, **(good | arrays))
    assert read_or_message(raw.read_label_matrix, path) is None
