"""One small valid input of every kind that is read, made without compiling anything."""

import asyncio
import csv
import dataclasses
import gzip
import json
import pathlib
import shutil
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import served

from xmc_jax.config import AugmentedConfig, DataConfig, PrimeConfig, RunConfig
from xmc_jax.data import (
    image_maps,
    image_vectors,
    image_writer,
    prepare,
    priors,
    raw,
    store,
    texts,
    tokenizer,
)
from xmc_jax.data.records import own_records
from xmc_jax.files import workdirs
from xmc_jax.files.digests import sha256
from xmc_jax.models import backbone, bert, hf, hf_tensors, hf_weights
from xmc_jax.retrieval import tuned, tuning
from xmc_jax.shipping import artifact, contents, documents

Read = Callable[[pathlib.Path], None]

LABEL_IDS = [f"lbl{i}" for i in range(6)]
WORDS = "red green blue small large round square lamp chair table mug bowl plate box key".split()  # noqa: SIM905
TRAIN, TEST, LABELS, LENGTH, WIDTH = 12, 5, 6, 6, 8
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def raw_files(folder: pathlib.Path) -> None:
    """A dataset of the Extreme Classification Repository's kind, plain and gzipped."""
    folder.mkdir(parents=True)
    groups = []
    for name, count in (("trn", TRAIN), ("tst", TEST), ("lbl", LABELS)):
        lines = []
        for i in range(count):
            title = " ".join(WORDS[(i + k) % len(WORDS)] for k in range(1 + i % 4))
            item: dict[str, Any] = {"uid": f"{name}{i}", "title": title, "content": "Crème"}
            if name != "lbl":
                targets = sorted({i % LABELS, (2 * i + 1) % LABELS})
                item |= {"target_ind": targets, "target_rel": [1.0] * len(targets)}
                groups.append(f"{name}{i}\t{name}-source{i // 2}\n")
            lines.append(json.dumps(item, ensure_ascii=False) + "\n")
        with gzip.open(folder / f"{name}.json.gz", "wt", encoding="utf-8") as file:
            file.writelines(lines)
    (folder / "filter_labels_test.txt").write_text("1 4\n0 2\n")
    (folder / "groups.tsv").write_text("".join(groups))


def own_files(folder: pathlib.Path, suffix: str) -> None:
    """A user's own records as `.jsonl`, `.csv` or `.parquet`."""
    folder.mkdir(parents=True)
    labels = [{"id": f"L{i}", "text": WORDS[i]} for i in range(LABELS)]
    documents = [
        {
            "id": f"D{i}",
            "text": f"{WORDS[i]} {WORDS[i + 1]}",
            "labels": [f"L{i % LABELS}", f"L{(i + 1) % LABELS}"],
            "split": "test" if i % 4 == 3 else "train",
        }
        for i in range(TRAIN)
    ]
    for name, rows in (("labels", labels), ("train", documents)):
        path = folder / f"{name}{suffix}"
        if suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif suffix == ".parquet":
            pyarrow = pytest.importorskip("pyarrow", reason='needs the extra "vision"')
            parquet = pytest.importorskip("pyarrow.parquet")
            parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
                writer.writeheader()
                for row in rows:
                    if "labels" in row:
                        row = row | {"labels": "|".join(row["labels"])}
                    writer.writerow(row)


def encoder_files(folder: pathlib.Path) -> None:
    """A BERT of one layer with its tokenizer, as Hugging Face folders are."""
    folder.mkdir(parents=True)
    sizes = bert.BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden=WIDTH,
        layers=1,
        heads=2,
        ff=16,
        max_positions=16,
    )
    generator, tensors = np.random.default_rng(0), {}
    for parameter in hf_tensors.layout(sizes).values():
        for name in parameter.names:
            tensors[name] = generator.standard_normal(parameter.stored).astype(np.float32)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(backbone.to_hf(sizes)))
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    template = [
        {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "[SEP]", "type_id": 0}},
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                **{"id": i, "content": token, "single_word": False, "lstrip": False},
                **{"rstrip": False, "normalized": False, "special": True},
            }
            for i, token in enumerate(SPECIAL)
        ],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": template,
            "pair": [*template, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                token: {"id": token, "ids": [i], "tokens": [token]}
                for i, token in enumerate(SPECIAL)
                if token in ("[CLS]", "[SEP]")
            },
        },
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 16}
    named |= {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))


def dataset_files(
    folder: pathlib.Path, source: pathlib.Path, tokenizer: pathlib.Path
) -> pathlib.Path:
    """The dataset folder of `raw`."""
    return prepare.prepare(
        prepare.PrepareConfig("ToyTitles", folder, str(tokenizer), LENGTH, str(source))
    )


def image_files(folder: pathlib.Path) -> None:
    """An image folder."""
    counts = dict(zip(store.SPLITS, (TRAIN, TEST, LABELS)))
    facts = {"name": "random", "revision": None, "digest": "0"}
    uids = {split: [str(i) for i in range(count)] for split, count in counts.items()}
    source = {"uids": image_vectors.digests(uids)}
    with image_writer.ImageWriter(folder, counts, 4, "ToyTitles", facts, source) as writer:
        for split, count in counts.items():
            writer.extend(split, 0, [1] * count, np.ones((count, 4)))
        writer.finish()


def artifact_files(folder: pathlib.Path) -> None:
    """An exported model, of an encoder that lies there already; its embeddings are random."""
    files = {path.name: sha256(path) for path in folder.iterdir() if path.is_file()}
    model = served.described(files, WIDTH, LENGTH)
    generator = np.random.default_rng(0)
    content: dict[str, Any] = {
        "name": "toy",
        "step": 3,
        "config": {"prime": {"enabled": True}, "eval": {"scann": {}}},
        "created": "2026-11-27T00:00:00+00:00",
        "dataset": {"name": "ToyTitles"},
        "model": dataclasses.asdict(model),
        "metrics": {"plain": {"P@1": 0.25}},
        "index": None,
        "thumbnails": None,
        "ranking": dataclasses.asdict(AugmentedConfig(labels=4, documents=4)),
    }
    for kind, count in (("labels", LABELS), ("documents", TRAIN)):
        (folder / kind).mkdir()
        texts.save(folder / kind, "ids", [f"{kind}{i}" for i in range(count)])
        texts.save(folder / kind, "texts", [WORDS[i % len(WORDS)] for i in range(count)])
        vectors = generator.standard_normal((count, WIDTH)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        np.save(folder / kind / "embeddings.npy", vectors)
        content[kind] = {"folder": kind, "count": count, "model": model.digest}
    np.save(folder / "labels" / "frequency.npy", np.ones(LABELS, np.int64))
    np.save(folder / "documents" / "positives.indptr.npy", np.arange(TRAIN + 1, dtype=np.int64))
    flat = np.arange(TRAIN, dtype=np.int32) % LABELS
    np.save(folder / "documents" / "positives.indices.npy", flat)
    prime = PrimeConfig(combiner="sum")
    made_of = folder / "prototypes"
    made_of.mkdir()
    for name in ("text", "centroids", "free_vectors"):
        np.save(made_of / f"{name}.npy", np.ones((LABELS, WIDTH), np.float32))
    np.save(made_of / "free_vector_of.npy", np.arange(LABELS, dtype=np.int32))
    content["prototypes"] = {"folder": "prototypes", "count": LABELS, "model": model.digest}
    content["prototypes"]["config"] = dataclasses.asdict(prime)
    contents.write_manifest(folder, content)


def workdir_files(workdir: pathlib.Path, config: RunConfig, data: Any) -> None:
    """A workdir's config.json and tuned.json."""
    workdir.mkdir(parents=True)
    content = {
        "format": tuned.FORMAT,
        "augmented": tuning.values_of(AugmentedConfig(temperature=0.1)),
        "prior": None,
        "belongs_to": tuned.belongs(config, data),
    }
    (workdir / tuned.FILE).write_text(json.dumps(content))
    (workdir / "config.json").write_text(json.dumps(dataclasses.asdict(config)))


def index_files(folder: pathlib.Path) -> None:
    """What `ScannIndex.save` writes for few rows, without ScaNN."""
    folder.mkdir(parents=True)
    np.save(folder / "dataset.npy", np.ones((LABELS, WIDTH), np.float32))
    (folder / "scann_config.pb").write_bytes(b"")
    (folder / "scann_assets.pbtxt").write_text(
        'assets {\n  asset_type: DATASET_NPY\n  asset_path: "dataset.npy"\n}\n'
    )
    config = {"brute_force_below": 20_000, "recall_target": 0.98, "leaves": 7}
    config |= {"dimensions_per_block": 2, "leaves_searched": 1.0, "reorder": 1.0}
    files = {path.name: sha256(path) for path in folder.iterdir()}
    content = {"config": config, "count": LABELS, "width": WIDTH, "database_sha256": "0" * 64}
    (folder / "index.json").write_text(json.dumps(content | {"files": files}))


def forge(folder: pathlib.Path) -> None:
    """Writes digests of what lies there, as whoever sends a folder can."""
    manifest = json.loads((folder / contents.MANIFEST).read_text())
    content = {k: v for k, v in manifest.items() if k not in ("format", "files")}
    contents.write_manifest(folder, content)


# Readers: whatever a user can reach with such an input.


def read_dataset(folder: pathlib.Path) -> None:
    data = store.open(folder)
    for split in store.SPLITS:
        data.uids(split)
        data.texts(split)
        data.texts(split, np.arange(2))
        data.groups(split)
        getattr(data, split).inputs(np.arange(2))
    assert len(data.label_frequency) == data.num_labels
    assert data.largest_token() and data.shape and data.inverse_propensity is not None


def read_images(folder: pathlib.Path) -> None:
    opened = image_vectors.open(folder)
    for split in store.SPLITS:
        getattr(opened, split).gather(np.arange(2), 2)
    assert opened.width and image_vectors.report(folder)


def read_encoder(folder: pathlib.Path) -> None:
    source = hf.resolve(str(folder))
    sizes = hf.load_config(source)
    hf_weights.load_params(source, sizes)
    loaded = tokenizer.load(folder)
    tokenizer.encode_measured(loaded, ["red lamp", ""], LENGTH)
    tokenizer.identity(loaded)


def read_artifact(folder: pathlib.Path) -> None:
    opened = artifact.open(folder)
    for kind in (opened.labels, opened.documents):
        if kind is not None:
            list(kind.ids), list(kind.texts)
    opened.prototypes()
    assert opened.name and opened.step >= 0


def read_index(folder: pathlib.Path) -> None:
    from xmc_jax.retrieval import scann

    scann.ScannIndex.load(folder)


class Inputs:
    """Valid inputs by kind, and the readers that they are given to.

    Attributes:
        folder: of all of them, to be copied from.
        kinds: name -> folder, the files of it that may be damaged, and the reader.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        raw_files(folder / "raw")
        lines = [f"{TRAIN} {LABELS}"]
        lines += [f"{i % LABELS}:1.0 0:0.5" for i in range(TRAIN)]
        (folder / "raw" / "trn_X_Y.txt").write_text("\n".join(lines) + "\n")
        for suffix in ("jsonl", "csv", "parquet"):
            own_files(folder / suffix, f".{suffix}")
        encoder_files(folder / "encoder")
        prepared = dataset_files(folder / "data", folder / "raw", folder / "encoder")
        shutil.copytree(prepared, folder / "dataset")
        image_files(folder / "images")
        shutil.copytree(folder / "encoder", folder / "artifact")
        artifact_files(folder / "artifact")
        index_files(folder / "index")
        some = folder / "some"
        some.mkdir()
        (some / "prior.tsv").write_text("".join(f"{name}\t1.5\n" for name in LABEL_IDS))
        (some / "only.txt").write_text("".join(f"{name}\n" for name in LABEL_IDS))
        texts = [{"id": f"N{i}", "text": word} for i, word in enumerate(WORDS[:5])]
        for name in ("edits", "queries"):
            (some / f"{name}.jsonl").write_text("".join(json.dumps(t) + "\n" for t in texts))
        pairs = np.empty(4, object)
        pairs[:] = [[0, 1], -1, [2], [3]]
        np.save(some / "objects.npy", pairs, allow_pickle=True)
        np.save(some / "map.npy", np.array([[0, 1], [-1, -1], [2, -1]], np.int64))
        body = {"queries": [{"text": "red", "exclude": ["a"]}, {"text": "lamp"}], "k": 3}
        (some / "request.json").write_text(json.dumps(body | {"ranking": "plain"}))
        data = store.open(prepared)
        config = RunConfig(data=DataConfig(dataset="ToyTitles"))
        workdir_files(folder / "workdir", config, data)
        model = artifact.open(folder / "artifact").model
        labels = types.SimpleNamespace(uids=lambda split: LABEL_IDS)
        sizes = TEST, LABELS

        def queries(where: pathlib.Path) -> None:
            for one in documents.DocumentFile(str(where / "queries.jsonl"), model).documents():
                assert one.problem is None or "\n" not in one.problem

        def checked(where: pathlib.Path) -> None:
            own_records.check(own_records.RecordsConfig(where))

        def of(name: str) -> Callable[[pathlib.Path], pathlib.Path]:
            return lambda where: where / name

        arrays = [path.name for path in sorted((folder / "dataset").iterdir())]
        parts = [
            path.relative_to(folder / "artifact").as_posix()
            for path in sorted((folder / "artifact").rglob("*.npy"))
        ]
        weights = ["config.json", "model.safetensors", "tokenizer.json"]
        self.kinds: dict[str, tuple[str, list[str], Read]] = {
            "filter": (
                *("raw", ["filter_labels_test.txt"]),
                lambda where: raw.read_filter(where / "filter_labels_test.txt", *sizes),
            ),
            "groups": (
                *("raw", ["groups.tsv"]),
                lambda where: raw.read_groups(where / "groups.tsv"),
            ),
            "items": (
                *("raw", ["trn.json.gz"]),
                lambda where: raw.read_items(where / "trn.json.gz", num_labels=sizes[1]),
            ),
            "matrix": (
                *("raw", ["trn_X_Y.txt"]),
                lambda where: raw.read_label_matrix(where / "trn_X_Y.txt"),
            ),
            "jsonl": (
                *("jsonl", ["train.jsonl"]),
                checked,
            ),
            "csv": ("csv", ["train.csv"], checked),
            "parquet": ("parquet", ["train.parquet"], checked),
            "prior": (
                *("some", ["prior.tsv"]),
                lambda where: priors.read(str(where / "prior.tsv"), labels),
            ),
            "edits": (
                *("some", ["edits.jsonl"]),
                lambda where: list(documents.labels(str(where / "edits.jsonl"), model)),
            ),
            "queries": ("some", ["queries.jsonl"], queries),
            "ids": (
                *("some", ["only.txt"]),
                lambda where: documents.ids_of(str(where / "only.txt")),
            ),
            "map": (
                *("some", ["map.npy"]),
                lambda where: image_maps.read(where / "map.npy", 50),
            ),
            "object map": (
                *("some", ["objects.npy"]),
                lambda where: image_maps.read(where / "objects.npy", 50),
            ),
            "manifest": ("dataset", ["manifest.json"], read_dataset),
            "dataset": ("dataset", arrays, read_dataset),
            "images": (
                *("images", ["manifest.json", "train.indptr.npy", "label.rows.npy"]),
                read_images,
            ),
            "encoder": ("encoder", weights, read_encoder),
            "artifact": ("artifact", ["artifact.json"], read_artifact),
            "forged artifact": ("artifact", parts, read_artifact),
            "index": (
                *("index", ["index.json", "scann_assets.pbtxt"]),
                read_index,
            ),
            "tuned": (
                *("workdir", ["tuned.json"]),
                lambda where: tuned.read(where, config, data),
            ),
            "workdir": (
                *("workdir", ["config.json"]),
                workdirs.read_run_config,
            ),
            "request": ("some", ["request.json"], Asked()),
        }


class Asked:
    """Gives a request's body to the server's application; no model is loaded, so 503 is right."""

    def __init__(self) -> None:
        pytest.importorskip("fastapi", reason='needs the extra "serve"')
        from xmc_jax.config import ServeConfig
        from xmc_jax.shipping.serve import app
        from xmc_jax.shipping.serve.service import Service

        self._app = app.create(Service(ServeConfig(port=0)))

    def __call__(self, where: pathlib.Path) -> None:
        status, answer = asyncio.run(self.post((where / "request.json").read_bytes()))
        assert status in (400, 413, 422, 503), (status, answer)
        if status != 503:
            raise ValueError(json.loads(answer)["error"])

    async def post(self, body: bytes, *headers: tuple[bytes, bytes]) -> tuple[int, bytes]:
        scope = {
            **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1"},
            **{"method": "POST", "path": "/v1/predict", "raw_path": b"/v1/predict"},
            **{"query_string": b"", "scheme": "http", "root_path": "", "client": ("::1", 1)},
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json"), *headers],
        }
        sent: list[dict[str, Any]] = []
        given = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            return given.pop() if given else {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        await self._app(scope, receive, send)
        return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])
