"""Images to an image folder: from anywhere, interrupted, and on any number of devices."""

import base64
import contextlib
import hashlib
import http.server
import io
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from benchmarks import vision_embed
from tests.models import test_vision as towers
from xmc_jax.data import image_import, image_writer, raw_folder, store
from xmc_jax.data import image_vectors as image_folders
from xmc_jax.data.records import own_records
from xmc_jax.data.store import SPLITS
from xmc_jax.images import (
    changes,
    decoding,
    descriptor,
    embed,
    encoders,
    item_vectors,
    preprocessing,
)
from xmc_jax.images.embed import ImagesConfig
from xmc_jax.models import backbone, vision

ROOT = pathlib.Path(__file__).parents[2]
SIDE, WIDTH = towers.SIZES["image_size"], towers.SIZES["hidden_size"]
PREPROCESSOR = {
    "image_processor_type": "SiglipImageProcessor",
    "size": {"height": SIDE, "width": SIDE},
    "resample": 3,
    "image_mean": [0.5, 0.4, 0.5],
    "image_std": [0.5, 0.5, 0.6],
}
UIDS = {
    "train": [f"a{i}" for i in range(40)],
    "test": [f"b{i}" for i in range(9)],
    "label": [f"c{i}" for i in range(17)],
}
BROKEN = {("a3", 0), ("a3", 1), ("a11", 1), ("b2", 0), ("c16", 0)}


def picture(seed: int, format: str = "PNG") -> bytes:
    generator = np.random.default_rng(seed)
    size = tuple(generator.integers(5, 40, 2))
    file = io.BytesIO()
    Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8)).save(file, format)
    return file.getvalue()


def make_pictures() -> dict[str, list[bytes]]:
    """What items have: 0 to 4 files, a few of them damaged."""
    generator = np.random.default_rng(5)
    found = {}
    for uid in (uid for split in SPLITS for uid in UIDS[split]):
        count = 2 if uid == "a3" else int(generator.integers(5))
        files = [picture(1000 * len(found) + k, ("PNG", "JPEG")[k % 2]) for k in range(count)]
        found[uid] = [data[:40] if (uid, k) in BROKEN else data for k, data in enumerate(files)]
    found["b2"] = [b"no picture"]
    found["a11"] = [picture(1), b"", picture(2)]
    found["c16"] = [b"\xff\xd8\xff"]
    return found


PICTURES = make_pictures()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Files of pictures, in one folder."""
    folder = tmp_path_factory.mktemp("pictures")
    for uid, files in PICTURES.items():
        for k, data in enumerate(files):
            (folder / f"{uid}_{k}.img").write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def tower(tmp_path_factory) -> pathlib.Path:
    """A tiny random SigLIP."""
    folder = tmp_path_factory.mktemp("towers") / "tiny-siglip"
    folder.mkdir()
    towers.write(folder, "siglip")
    (folder / encoders.PROCESSOR).write_text(json.dumps(PREPROCESSOR))
    return folder


@pytest.fixture(scope="module")
def shared(tower) -> encoders.ImageTower:
    """That on all devices, for many tests: a new one would be compiled anew."""
    return encoders.ImageTower(str(tower), 16, dtype="float32")


@pytest.fixture
def compiled(shared, monkeypatch) -> None:
    """Makes every encoder the shared one."""
    monkeypatch.setattr(encoders, "build", lambda *_: shared)


@pytest.fixture
def config(tmp_path, folder, tower):
    """Makes configs of the tiny tower over the pictures."""

    def make(**changes) -> ImagesConfig:
        fields = {
            "dataset": "Toy",
            "data_dir": tmp_path / "data",
            "name": "tiny",
            "source": folder,
            "encoder": str(tower),
            "batch_size": 16,
            "dtype": "float32",
        }
        return ImagesConfig(**fields | changes)

    return make


@pytest.fixture(scope="module")
def straight(tmp_path_factory, folder, tower) -> pathlib.Path:
    """The image folder as one run makes it."""
    data_dir = tmp_path_factory.mktemp("straight")
    config = ImagesConfig(
        "Toy", data_dir, "tiny", folder, str(tower), batch_size=16, dtype="float32"
    )
    return embed.make(config, UIDS)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rows(folder: pathlib.Path) -> dict[str, list[np.ndarray]]:
    """Split -> the vectors of each item."""
    found = image_folders.open(folder, verify=True)
    return {
        split: np.split(getattr(found, split).rows, getattr(found, split).indptr[1:-1])
        for split in SPLITS
    }


def readable(uid: str, limit: int = 3) -> list[Image.Image]:
    found = []
    for data in PICTURES[uid][:limit]:
        with contextlib.suppress(ValueError):
            found.append(decoding.decode(data))
    return found


def expected(tower: pathlib.Path, limit: int = 3, layout: str = "pad") -> dict[str, list]:
    """The vectors by the tower as it is applied to the processor's pixels, one item at a time."""
    config, params = towers.load(tower)
    processor = preprocessing.from_hf(PREPROCESSOR)
    pixels, owners = [], []
    for split in SPLITS:
        for item, uid in enumerate(UIDS[split]):
            for image in readable(uid, limit):
                image = preprocessing.pad_square(image, SIDE) if layout == "pad" else image
                pixels.append(processor(image))
                owners.append((split, item))
    full = np.resize(pixels, (192, SIDE, SIDE, 3))  # compiled once
    pooled, _ = towers.encode(config, np.float32, params, full)
    vectors = {split: [[] for _ in UIDS[split]] for split in SPLITS}
    for (split, item), vector in zip(owners, np.asarray(pooled)):
        vectors[split][item].append(vector)
    return vectors


def assert_close(found: dict[str, list], wanted: dict[str, list]) -> None:
    for split in SPLITS:
        assert len(found[split]) == len(wanted[split])
        for item, (one, other) in enumerate(zip(found[split], wanted[split])):
            assert len(one) == len(other), (split, item)
            if len(one):
                np.testing.assert_allclose(one, np.asarray(other, np.float32), rtol=1e-3, atol=2e-4)


def test_pictures_of_a_folder_become_the_towers_vectors(straight, tower):
    assert_close(rows(straight), expected(tower))
    manifest = image_folders.open(straight).manifest
    assert manifest["encoder"]["name"] == str(tower) and manifest["encoder"]["E"] == WIDTH
    assert len(manifest["encoder"]["digest"]) == 64
    assert manifest["source"]["processing"]["layout"] == "pad"


def test_images_that_cannot_be_read_are_listed_in_order(straight):
    lines = [json.loads(line) for line in (straight / changes.FAILURES).read_bytes().splitlines()]
    assert [(line["uid"], line["k"]) for line in lines] == sorted(BROKEN, key=order)
    for line in lines:
        assert set(line) == {"split", "item", "uid", "k", "reason"}
        assert UIDS[line["split"]][line["item"]] == line["uid"]
        assert line["reason"] and "\n" not in line["reason"]
    assert "an empty file" in next(line["reason"] for line in lines if line["uid"] == "a11")


def order(broken: tuple[str, int]) -> tuple[str, int, int]:
    uid, k = broken
    return uid[0], int(uid[1:]), k


def test_layouts_and_the_number_of_images(config, tower, shared, monkeypatch):
    chosen = config(per_item=1, layout="stretch")
    prepare = encoders.build(chosen.encoder, 16, layout="stretch").prepare
    monkeypatch.setattr(encoders, "build", lambda *_: shared)
    monkeypatch.setattr(shared, "prepare", prepare)
    assert_close(rows(embed.make(chosen, UIDS)), expected(tower, 1, "stretch"))


def test_base64_in_jsonl_gives_the_same_folder_of_vectors(tmp_path, config, straight, compiled):
    path = tmp_path / "pictures.jsonl"
    with path.open("w") as file:
        for uid in reversed(PICTURES):
            for data in PICTURES[uid]:
                line = {"uid": uid, "base64": base64.b64encode(data).decode()}
                file.write(json.dumps(line) + "\n")
    # A null cell is no image, whereas an empty file is one that cannot be read.
    path.write_text(path.read_text().replace('"base64": ""', '"base64": "!"'))
    made = embed.make(config(source=path), UIDS)
    for split in SPLITS:
        for kind in ("rows", "indptr"):
            name = f"{split}.{kind}.npy"
            assert (made / name).read_bytes() == (straight / name).read_bytes()


def test_published_embeddings_are_imported_and_nothing_is_encoded(tmp_path, config, monkeypatch):
    monkeypatch.setattr(encoders, "build", None)
    published = tmp_path / "published"
    published.mkdir()
    vectors = np.random.default_rng(0).standard_normal((100, WIDTH)).astype(np.float32)
    names = {"train": ("trn", "train"), "test": ("tst", "test"), "label": ("lbl", "labels")}
    for split, (of_rows, of_map) in names.items():
        np.save(published / f"{of_rows}_embs_imgs_3_{WIDTH}_some.npy", vectors)
        listed = np.empty(len(UIDS[split]), object)
        listed[:] = [[i] if i % 2 else -1 for i in range(len(listed))]
        np.save(published / f"{of_map}_imgs_14_3_map.npy", listed, allow_pickle=True)
    chosen = {"source": published, "encoder": "some"}
    made = embed.make(config(**chosen), UIDS)
    assert image_folders.open(made).encoder == "some"
    for found in rows(made).values():
        for item, one in enumerate(found):
            np.testing.assert_array_equal(one, vectors[[item] if item % 2 else []].astype("f2"))
    with pytest.raises(ValueError, match=r"40\b.*\b41|41\b.*\b40"):
        embed.make(config(**chosen, name="other"), UIDS | {"train": [*UIDS["train"], "x"]})


def test_pictures_beside_published_embeddings_are_taken_by_other_encoders(tmp_path, config):
    published = tmp_path / "published"
    published.mkdir()
    np.save(published / "trn_embs_imgs_1_4_pix.npy", np.zeros((1, 4), np.float32))
    with pytest.raises(ValueError, match="embeddings there are of pix with 1 image per item"):
        embed.make(config(source=published, encoder=descriptor.NAME), UIDS)
    (published / "a7.png").write_bytes(picture(0))
    made = embed.make(config(source=published, encoder=descriptor.NAME), UIDS)
    manifest = image_folders.open(made).manifest
    assert (manifest["encoder"]["name"], manifest["images"]["train"]) == (descriptor.NAME, 1)


class Server(http.server.ThreadingHTTPServer):
    """Serves pictures by `/uid/k`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests = 0
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests += 1
        _, uid, k = self.path.split("/")
        self.send_response(404 if uid == "a0" else 200)
        data = b"" if uid == "a0" else PICTURES[uid][int(k)]
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_urls_are_fetched_once_then_encoded(tmp_path, config, straight, compiled, monkeypatch):
    server = Server()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "trn.json.gz").write_bytes(b"not looked at")
    path = raw / "img_urls.jsonl"
    with path.open("w") as file:
        for uid, files in PICTURES.items():
            urls = [f"{address}/{uid}/{k}" for k in range(len(files))]
            file.write(json.dumps({"id": uid, "url": urls}) + "\n")
    chosen = config(source=raw, allow_private=("127.0.0.0/8",))
    made = embed.make(chosen, UIDS)
    found, wanted = rows(made), rows(straight)
    wanted["train"][0] = wanted["train"][0][:0]  # those that the server does not have
    assert_close(found, wanted)
    requests = server.requests
    assert requests == sum(min(len(files), 3) for files in PICTURES.values())
    assert "failed" in (text := embed.report(chosen)) and "http_404" in text
    monkeypatch.setattr(encoders.ImageTower, "embed", None)
    assert embed.make(chosen, UIDS) == made and server.requests == requests
    assert embed.is_current(chosen, UIDS)
    server.shutdown()
    with pytest.raises(ValueError, match="allow_private"):
        embed.make(config(source=path), UIDS)
    path.write_text(path.read_text().replace("/a7/", "/a8/"))
    with pytest.raises(ValueError, match=r"expected the URLs that \S* was fetched from.*--name"):
        embed.is_current(chosen, UIDS)


@pytest.mark.slow
def test_images_of_records(tmp_path, config, folder, straight, compiled):
    """URLs of documents and of labels with the same ids, and paths, each of its own split."""
    server = Server()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    own, ids = tmp_path / "own", {"train": "x", "test": "y", "label": "x"}
    shutil.copytree(folder, own / "pictures")
    for split in SPLITS:
        with (own / f"{split}.jsonl").open("w") as file:
            for i, uid in enumerate(UIDS[split]):
                images = [f"{address}/{uid}/{k}" for k in range(len(PICTURES[uid]))]
                if split == "test":
                    images = [f"pictures/{uid}_{k}.img" for k in range(len(PICTURES[uid]))]
                line = {"id": f"{ids[split]}{i}", "text": uid, "labels": ["x0"], "images": images}
                file.write(json.dumps(line) + "\n")
    raw = tmp_path / "raw"
    own_records.convert(own_records.RecordsConfig(own), raw)
    chosen = config(source=raw, allow_private=("127.0.0.0/8",), allow_paths=True)
    made = embed.make(chosen, embed.read_uids("Toy", raw))
    server.shutdown()
    found, wanted = rows(made), rows(straight)
    wanted["train"][0] = wanted["train"][0][:0]  # those that the server does not have
    assert_close(found, wanted)
    assert embed.report(chosen).count("images of") == 2  # of training documents and of labels


class Killed(BaseException):
    pass


@pytest.mark.parametrize("torn", [b"", b'{"split": "train", "item": 99', b"\x00\xff\n"])
def test_interrupted_runs_give_the_same_bytes(config, straight, compiled, monkeypatch, torn):
    extend = image_writer.ImageWriter.extend
    calls = 0

    def dying(writer, *arguments):
        nonlocal calls
        calls += 1
        if calls % 2 == 0:  # every other time, what was appended last was not made durable
            monkeypatch.setattr(image_writer, "_COMMIT_SECONDS", 1e9 if calls % 4 else -1.0)
        extend(writer, *arguments)
        if calls % 3 == 0:
            raise Killed

    monkeypatch.setattr(image_writer.ImageWriter, "extend", dying)
    chosen, runs = config(), 0
    while True:
        runs += 1
        try:
            embed.make(chosen, UIDS)
            break
        except Killed:
            if torn:
                with (image_folders.partial(chosen.folder) / changes.FAILURES).open("ab") as file:
                    file.write(torn)
    assert runs >= 3
    assert contents(chosen.folder) == contents(straight)


@pytest.mark.slow
def test_killed_commands_give_the_same_bytes(topics, tmp_path, tower):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(200):
        (pictures / f"train{i}.png").write_bytes(picture(i) if i % 7 else b"broken")
        (pictures / f"topic{i}_1.png").write_bytes(picture(1000 + i))

    def command(out: str) -> list[str]:
        return [
            *(sys.executable, "-m", "xmc_jax.images.embed", "--dataset=Topics-40", "--name=x"),
            *(f"--raw={topics}", f"--images={pictures}", f"--encoder={tower}", "--dtype=float32"),
            *("--batch_size=8", f"--out={tmp_path / out}"),
        ]

    subprocess.run(command("whole"), cwd=ROOT, check=True, capture_output=True)
    whole = contents(tmp_path / "whole" / "Topics-40" / "images-x")
    folder = tmp_path / "killed" / "Topics-40" / "images-x"
    code = (
        "import os, sys, signal, xmc_jax.data.image_writer as f, xmc_jax.images.embed as e\n"
        "f._COMMIT_SECONDS, extend, left = -1.0, f.ImageWriter.extend, [int(sys.argv.pop(1))]\n"
        "def dying(*a):\n"
        "    extend(*a)\n"
        "    left[0] -= 1\n"
        "    left[0] or os.kill(os.getpid(), signal.SIGKILL)\n"
        "f.ImageWriter.extend = dying\n"
        "sys.exit(e.main())"
    )
    for batches in (1, 5, 3):
        flags = command("killed")[3:]
        run = [sys.executable, "-c", code, str(batches), *flags]
        assert subprocess.run(run, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
    assert not (folder / "manifest.json").exists()
    subprocess.run(command("killed"), cwd=ROOT, check=True, capture_output=True)
    assert contents(folder) == whole


def test_batches_begun_again_are_the_same(monkeypatch):
    monkeypatch.setattr(item_vectors, "_BATCH_ITEMS", 7)
    generator = np.random.default_rng(0)
    counts = generator.integers(0, 4, 200) * (generator.random(200) < 0.4)
    counts[50:80] = 0
    found = [
        (item, k, (bytes(32), "why" if (item + k) % 11 == 0 else np.array([item, k])))
        for item, count in enumerate(counts)
        for k in range(count)
    ]

    def batches(first: int) -> list:
        ready = (image for image in found if image[0] >= first)
        return [
            (b.first, b.end, b.counts, np.array(b.prepared).tolist(), b.failures)
            for b in item_vectors._batches(ready, first, len(counts), 5)
        ]

    whole = batches(0)
    assert [b[0] for b in whole] == [0, *(b[1] for b in whole[:-1])] and whole[-1][1] == 200
    assert max(len(b[3]) for b in whole) <= 5 and max(b[1] - b[0] for b in whole) <= 7
    assert [image for b in whole for image in b[3]] == [
        image.tolist() for *_, (_, image) in found if not isinstance(image, str)
    ]
    for number, (first, *_) in enumerate(whole):
        assert batches(first) == whole[number:]
    assert batches(200) == []


def test_vectors_do_not_depend_on_batches_or_devices(tower, shared):
    generator = np.random.default_rng(2)
    prepared = list(generator.integers(0, 256, (13, SIDE, SIDE, 3), np.uint8))
    whole = encoders.ImageTower(str(tower), 13, dtype="float32", devices=jax.devices()[:1])
    wanted = jax.device_get(whole.embed(prepared))
    assert wanted.shape == (13, WIDTH) and wanted.dtype == np.float32
    half = encoders.ImageTower(str(tower), 4, dtype="float32", devices=jax.devices()[4:6])
    for encoder, batch_size, devices in ((half, 4, 2), (shared, 16, 8)):
        found = []
        for start in range(0, 13, batch_size):
            part = prepared[start : start + batch_size]
            vectors = encoder.embed(part)
            assert len(vectors.devices()) == devices
            found += list(jax.device_get(vectors)[: len(part)])
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_bfloat16_is_close_and_stored_as_such(tower, shared):
    prepared = list(np.random.default_rng(2).integers(0, 256, (8, SIDE, SIDE, 3), np.uint8))
    narrow = encoders.ImageTower(str(tower), 16)
    assert narrow._params["layers"]["up"]["kernel"].dtype == "bfloat16"
    assert narrow._params["layers"]["mlp_norm"]["scale"].dtype == "float32"
    one, other = jax.device_get(narrow.embed(prepared)), jax.device_get(shared.embed(prepared))
    lengths = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    assert ((one * other).sum(-1) > 0.999 * lengths).all()


def test_a_finished_folder_is_left_as_it_is(config, straight, monkeypatch):
    chosen = config(data_dir=straight.parents[1])
    before = contents(straight)
    monkeypatch.setattr(encoders.ImageTower, "embed", None)
    monkeypatch.setattr(encoders.hf_weights, "load_params", None)
    assert embed.make(chosen, UIDS) == straight
    assert contents(straight) == before


@pytest.mark.parametrize(
    "others, message",
    [
        ({"per_item": 2}, "source.per_item: 3 there, 2 here"),
        ({"layout": "stretch"}, "source.processing.layout: 'pad' there, 'stretch' here"),
        ({"alpha": "drop"}, "source.alpha: 'white' there, 'drop' here"),
        ({"dtype": "bfloat16"}, "source.processing.dtype: 'float32' there, 'bfloat16' here"),
        ({"encoder": descriptor.NAME}, "encoder.name: '.*tiny-siglip' there, 'hog-colour' here"),
    ],
)
def test_other_inputs_are_refused(config, straight, others, message):
    with pytest.raises(ValueError, match=message) as error:
        embed.make(config(data_dir=straight.parents[1], **others), UIDS)
    assert "\n" not in str(error.value) and "--overwrite" in str(error.value)


def test_other_items_and_weights_are_refused_until_overwritten(tmp_path, config, straight, tower):
    data = tmp_path / "data" / "Toy"
    data.mkdir(parents=True)
    shutil.copytree(straight, data / straight.name)
    with pytest.raises(ValueError, match=r"source\.uids\.test: "):
        embed.make(config(), UIDS | {"test": UIDS["test"][::-1]})
    other = shutil.copytree(tower, tmp_path / "tiny-siglip")
    towers.edit(other, lambda tensors: tensors["vision_model.head.probe"].__iadd__(1))
    with pytest.raises(ValueError, match=r"encoder\.name: "):
        embed.make(config(encoder=str(other)), UIDS)
    manifest = data / straight.name / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(tower), str(other)))
    with pytest.raises(ValueError, match=r"encoder\.digest: "):
        embed.make(config(encoder=str(other)), UIDS)
    made = embed.make(config(encoder=str(other), overwrite=True), UIDS)
    assert_close(rows(made), expected(other))


def test_descriptors_take_the_place_of_a_tower(config):
    chosen = config(encoder=descriptor.NAME, name="hog", layout="stretch", batch_size=3)
    made = embed.make(chosen, UIDS)
    wanted = {
        split: [descriptor.describe(readable(uid)) for uid in UIDS[split]] for split in SPLITS
    }
    assert_close(rows(made), wanted)
    assert image_folders.open(made).manifest["encoder"]["revision"] == descriptor.REVISION
    padded = encoders.Descriptor("pad").prepare(Image.new("RGB", (65536, 1)))
    assert padded.shape == (descriptor.WIDTH,)


@pytest.mark.parametrize(
    "others, message",
    [
        ({"per_item": 0}, "per_item: expected at least 1, got 0"),
        ({"batch_size": 2}, "batch_size: expected at least 3 images, got 2"),
        ({"layout": "crop"}, "layout: expected 'pad' or 'stretch', got 'crop'"),
        ({"alpha": "black"}, "alpha: expected 'white' or 'drop'"),
        ({"dtype": "float16"}, "dtype: expected 'bfloat16' or"),
        ({"by": "title"}, "by: expected 'uid' or 'index'"),
        ({"name": "a/b"}, "name: expected a name without slashes"),
        ({"allow_private": ("here",)}, "allow_private.*not a valid IPv4 or IPv6 network"),
    ],
)
def test_other_configs_are_refused(config, others, message):
    with pytest.raises(ValueError, match=message):
        config(**others)


def test_what_cannot_be_encoded_is_said_before_anything_is_written(tmp_path, config, tower):
    def refused(uids=UIDS, **changes) -> str:
        with pytest.raises(ValueError) as error:
            embed.make(config(**changes), uids)
        assert "\n" not in str(error.value) and not (tmp_path / "data").exists()
        return str(error.value)

    strangers = {split: [f"x{uid}" for uid in uids] for split, uids in UIDS.items()}
    assert "expected images of items such as 'xa0', found none" in refused(strangers)
    assert "expected a file or folder of images, found none" in refused(source=tmp_path / "no")
    nested = tmp_path / "nested"
    (nested / "x" / "y").mkdir(parents=True)
    assert refused(source=nested).endswith("need --by=index")
    (nested / "x" / "y" / "a1.png").write_bytes(picture(0))
    assert "files such as 'x/y/a1.png', where <id>.png, <id>_1.png" in refused(source=nested)
    (nested / "t.csv").write_text("uid,file\na1,x/y/a1.png\n")
    assert "t.csv: expected a column uid, id, index and one of" in refused(source=nested)
    assert "expected a multiple of the 8 devices, got 12" in refused(batch_size=12)
    other = shutil.copytree(tower, tmp_path / "other")
    (other / encoders.PROCESSOR).unlink()
    assert "expected a JSON file, found none; name another" in refused(encoder=str(other))
    path = tmp_path / "processor.json"
    path.write_text(json.dumps(PREPROCESSOR | {"size": 15}))
    message = refused(encoder=str(other), processor=str(path))
    assert "resize to [14, 14]" in message and "got [15, 15]" in message
    path.write_text(json.dumps({"image_processor_type": "CLIPImageProcessor"}))
    assert str(tmp_path) in refused(processor=str(path))
    message = refused(encoder=descriptor.NAME, processor=str(path))
    assert "processor: expected none for hog-colour" in message


def flags(topics: pathlib.Path, pictures: pathlib.Path, out: pathlib.Path) -> list[str]:
    return [
        *("--dataset=Topics-40", f"--raw={topics}", f"--images={pictures}", "--name=hog"),
        *(f"--out={out}", f"--encoder={descriptor.NAME}"),
    ]


@pytest.fixture
def pictures(tmp_path) -> pathlib.Path:
    """Of half the labels of the dataset `topics`; one is broken."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(0, 40, 2):
        (folder / f"topic{i}.png").write_bytes(picture(i) if i else b"broken")
    return folder


def test_the_command_reports_and_takes_items_as_prepare_does(topics, pictures, tmp_path, capsys):
    command = flags(topics, pictures, tmp_path / "out")
    for _ in range(2):  # the second time it is there
        assert embed.main(command) == 0
        printed = capsys.readouterr().out
        assert "label  items 40  images 19  with an image 47.50 %" in printed
        assert "train  items 200  images 0  with an image 0.00 %" in printed
        assert "could not be read  1 image: " in printed and changes.FAILURES in printed
    raw = raw_folder.read(raw_folder.find(topics), "Topics-40", "utf-8")
    uids = embed.read_uids("Topics-40", topics)
    assert uids == {split: raw.splits[split].uids for split in SPLITS}
    found = image_folders.open(tmp_path / "out" / "Topics-40" / "images-hog").manifest["source"]
    assert found["uids"]["label"] == hashlib.sha256(store.lines(uids["label"])).hexdigest()


def test_shares_of_known_datasets_are_compared(topics, pictures, tmp_path, capsys, monkeypatch):
    command = flags(topics, pictures, tmp_path / "out")
    monkeypatch.setitem(image_import.SHARES, "Topics-40", (0.0, 0.0, 47.5))
    assert embed.main(command) == 0
    monkeypatch.setitem(image_import.SHARES, "Topics-40", (0.0, 0.0, 50.0))
    assert embed.main(command) == 1
    said = capsys.readouterr()
    assert "50.00 % of label" in said.err and "47.50 %" in said.err and said.err.count("\n") == 1
    assert said.out.count("with an image 47.50 %") == 2


@pytest.mark.parametrize(
    "change, status, message",
    [
        ("--nonsense", 2, "unrecognized arguments: --nonsense"),
        ("--max_images=0", 2, "per_item: expected at least 1, got 0"),
        ("--max_images=x", 2, "expected a whole number, such as 1000"),
        ("--encoding=ascii", 2, "--encoding: expected utf-8 or latin-1"),
        ("--name=a/b", 2, "name: expected a name without slashes"),
        ("--raw=absent", 1, "expected a folder of raw files"),
        ("--images=absent", 1, "expected a file or folder of images"),
        ("--encoder=./absent", 1, "expected a folder with a model, found none"),
    ],
)
def test_mistakes_are_one_line(topics, pictures, tmp_path, capsys, change, status, message):
    assert embed.main([*flags(topics, pictures, tmp_path / "out"), change]) == status
    said = capsys.readouterr()
    assert said.err.startswith("embed: ") and said.err.count("\n") == 1 and message in said.err
    assert said.out == ""


def test_an_interrupt_is_no_error(topics, pictures, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(encoders.Descriptor, "prepare", interrupted)
    assert embed.main(flags(topics, pictures, tmp_path / "out")) == 130
    assert "run the same command again" in capsys.readouterr().err


@pytest.mark.slow
def test_fused_attention_takes_the_place_of_the_written_out(monkeypatch):
    calls, fused = [], jax.nn.dot_product_attention

    def on_cpu(*arrays, implementation):
        calls.append(implementation)
        return fused(*arrays)

    monkeypatch.setattr(jax.nn, "dot_product_attention", on_cpu)
    generator = np.random.default_rng(0)

    def arrays(width: int, dtype) -> list[jax.Array]:
        return [jnp.asarray(generator.standard_normal((2, 9, 3, width)), dtype) for _ in range(3)]

    narrow = arrays(72, jnp.bfloat16)
    written_out = vision._attention(*narrow)
    assert not calls  # there is no such device here
    monkeypatch.setattr(vision, "_has_cudnn", lambda: True)
    found = vision._attention(*narrow)
    assert calls == ["cudnn"] and found.shape == written_out.shape == (2, 9, 216)
    np.testing.assert_allclose(
        np.asarray(found, np.float32), np.asarray(written_out, np.float32), atol=0.02
    )
    for unfit in (arrays(72, jnp.float32), arrays(4, jnp.bfloat16), arrays(136, jnp.bfloat16)):
        jax.eval_shape(vision._attention, *unfit)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "name, file",
    [
        ("base-224", "siglip2-base-patch16-224"),
        ("large-256", "siglip2-large-patch16-256"),
        ("so400m-384", "siglip2-so400m-patch14-384"),
        ("vit-base-224", "vit-base-patch16-224-in21k"),
    ],
)
def test_the_benchmarks_sizes_are_published(name, file):
    assert vision_embed.MODELS[name] == backbone.images_from_hf(towers.published(file))


def test_the_benchmark_counts_products():
    # 27 x 27 patches of 3 x 14 x 14 numbers
    layers = 27 * (729 * (4 * 1152**2 + 2 * 1152 * 4304) + 2 * 729**2 * 1152)
    head = 2 * 729 * 1152**2 + 2 * 729 * 1152 + 2 * 1152**2 + 2 * 1152 * 4304
    assert vision_embed.flops(vision_embed.MODELS["so400m-384"]) == 2 * (
        729 * 588 * 1152 + layers + head
    )
    program = vision_embed.Program(vision_embed.Settings("so400m-384"), jax.devices()[0])
    assert program.parameters == towers.EXPECTED["siglip2-so400m-patch14-384"][1]


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(vision_embed, "matmul_rate", lambda *_: 0.5)  # takes seconds
    out = tmp_path / "out.json"
    shown = vision_embed.main(["--batch=2", "--repeats=2", f"--out={out}"])
    assert json.loads(out.read_text()) == shown
    assert set(shown) >= {"benchmark", "model", "settings", "device", "commit", "results"}
    results = shown["results"]
    assert results["images_per_second"] == 2 / min(results["batch_seconds_each"])
    assert results["milliseconds_per_image"] * results["images_per_second"] == pytest.approx(1e3)
    assert "images" in capsys.readouterr().out
    for flag in ("--batch=0", "--dtype=float16"):
        with pytest.raises(SystemExit, match=flag.partition("=")[0]):
            vision_embed.main([flag])


@pytest.mark.slow
def test_the_benchmark_needs_no_more_than_jax_and_flax():
    absent = (
        *("PIL", "grain", "huggingface_hub", "ml_collections", "orbax", "safetensors", "scann"),
        *("torch", "transformers"),
    )
    code = (
        "import sys, benchmarks.vision_embed;"
        f"print([name for name in {absent} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
