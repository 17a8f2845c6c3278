"""Every test runs on 8 virtual CPU devices, offline; a small dataset and encoder for all."""

import copy
import gzip
import json
import os
import pathlib
import signal

import processes

# Eight devices on few cores may wait long for each other, where XLA else gives up after 40 s.
os.environ.setdefault(
    "XLA_FLAGS",
    processes.xla_flags(8) + " --xla_cpu_collective_call_warn_stuck_timeout_seconds=120"
    " --xla_cpu_collective_call_terminate_timeout_seconds=600",
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # unless a module uses `optimized`

import jax
import numpy as np
import pytest

# Ignored where a shell started us in the background, and so by every command that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

TOPICS, TRAIN, TEST = 40, 200, 60
KEPT = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


# The files that take longest, so that no process is left with one of them at the end.
LONGEST_FIRST = (
    *("test_step.py", "test_main.py", "test_resume.py", "test_losses.py", "test_multimodal.py"),
    *("test_configs.py", "test_tiny_decoder.py", "test_several_processes.py"),
    *("test_small_runs.py", "test_labels.py", "test_segments.py", "test_distributed.py"),
    *("test_tune.py", "test_interrupted_changes.py", "test_decoder.py", "test_health.py"),
    *("test_curriculum.py", "test_fetch.py", "test_checkpoint_damage.py", "test_predict_files.py"),
)


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items) -> None:
    """Marks as slow what takes a minute or more, and puts the longest files first."""
    for item in items:
        if item.get_closest_marker("scale") or item.get_closest_marker("reliability"):
            item.add_marker(pytest.mark.slow)
    place = {name: i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="module")
def optimized():
    """For modules that read or time compiled programs; others compile more than they compute."""
    jax.config.update("jax_disable_most_optimizations", False)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "0"
    yield
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def terminated_after(monkeypatch):
    """A function that has this process get SIGTERM after each of some steps, once."""
    from xmc_jax.training import loop

    def arrange(*steps: int) -> None:
        remaining, at = list(steps), loop._Signals.at

        def signalled(self, step: int) -> loop.Interrupted | None:
            if remaining and step == remaining[0]:
                remaining.pop(0)
                os.kill(os.getpid(), signal.SIGTERM)
            return at(self, step)

        monkeypatch.setattr(loop._Signals, "at", signalled)

    return arrange


@pytest.fixture(scope="session", autouse=True)
def _caches(tmp_path_factory) -> None:
    """What is compiled is kept for the session: for both processes of tests and what they start."""
    from xmc_jax.runtime import compilation

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # whose folders lie in one
        folder = folder.parent
    os.environ["XDG_CACHE_HOME"] = str(folder / "caches")
    compilation.keep(None)
    for name in KEPT:  # for processes that run no command
        os.environ[name.upper()] = str(getattr(jax.config, name))


@pytest.fixture(scope="session")
def topics(tmp_path_factory) -> pathlib.Path:
    """A raw dataset: each label is a topic of three words, a title has one word of each label."""
    folder = tmp_path_factory.mktemp("raw") / "Topics-40"
    folder.mkdir()
    generator = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(generator.choice(letters, 6)) for _ in range(3 * TOPICS)]

    def write(name: str, items: list[dict]) -> None:
        with gzip.open(folder / name, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(item) + "\n" for item in items)

    def document(uid: str) -> dict:
        labels = np.sort(generator.choice(TOPICS, generator.integers(1, 4), replace=False))
        title = " ".join(words[3 * label + generator.integers(3)] for label in labels)
        return {"uid": uid, "title": title, "content": "", "target_ind": labels.tolist()}

    train = [document(f"train{i}") for i in range(TRAIN)]
    test = [document(f"test{i}") for i in range(TEST)]
    write("trn.json.gz", train)
    write("tst.json.gz", test)
    labels = [" ".join(words[3 * i : 3 * i + 3]) for i in range(TOPICS)]
    write("lbl.json.gz", [{"uid": f"topic{i}", "title": t} for i, t in enumerate(labels)])
    free = [(i, int(j)) for i in range(3) for j in (5, 6) if j not in test[i]["target_ind"]]
    (folder / "filter_labels_test.txt").write_text("".join(f"{i} {j}\n" for i, j in free))
    (folder / "filter_labels_train.txt").write_text("")
    return folder


@pytest.fixture(scope="session")
def backbone(tmp_path_factory) -> pathlib.Path:
    """A two-layer BERT of width 32 with random weights and MiniLM's tokenizer, as a folder."""
    from flax.core import meta

    from xmc_jax.data import packaged, tokenizer
    from xmc_jax.models import dual, hf_export
    from xmc_jax.models.bert import BertConfig

    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    config = BertConfig(hidden=32, layers=2, heads=2, ff=64, max_positions=64)
    init = jax.jit(lambda: meta.unbox(dual.init_params(dual.DualEncoder(config), 0)))
    params = init()["backbone"]
    hf_export.merged(folder, params, config, pooling="mean", max_length=16)
    tokenizer.export(packaged.minilm(), folder, 16)
    return folder


@pytest.fixture(scope="session")
def fields(topics, backbone, tmp_path_factory) -> dict:
    """The config of a run over `topics` with `backbone`, as nested values; copy before changing."""
    from configs import vixml

    fields = vixml.get_config("tiny").to_dict()
    fields["data"] |= {
        "dataset": "Topics-40",
        "raw_dir": str(topics),
        "data_dir": str(tmp_path_factory.mktemp("data")),
        "max_length": 16,
    }
    fields["encoder"] |= {
        "backbone": str(backbone),
        "layers": None,
        "init": "pretrained",
        "dropout": 0.1,
    }
    # PRIME in full; the tests of our own recipe change what it changes.
    fields["prime"] = copy.deepcopy(vixml.BASE["prime"]) | {"free_vectors": 16, "ff_dim": 64}
    loss = {"num_negatives": 8, "weighted": False, "block": None}
    fields["loss"] = copy.deepcopy(vixml.BASE["loss"]) | loss
    fields["optimizer"]["lr"] = ((".*", 2e-3),)
    fields["curriculum"] |= {"start": 0, "update_every": 1, "cluster_size": 8, "double_at": (1,)}
    fields["train"] |= {
        "labels": "sampled",
        "batch_size": 40,
        "epochs": 3,
        "encode_batch_size": 64,
        "checkpoint_every": 2,
        "log_every": 2,
        "eval_every": 1,
    }
    return fields


@pytest.fixture(scope="session")
def with_random_images():
    """A function that gives a dataset 0 to 3 random vectors per item, in a folder of their own."""
    from xmc_jax.data import image_vectors, image_writer
    from xmc_jax.data.store import SPLITS

    def add(data, folder: pathlib.Path, per_item: int = 2, width: int = 8, seed: int = 0):
        generator = np.random.default_rng(seed)
        counts = {split: len(getattr(data, split)) for split in SPLITS}
        uids = {s: data.manifest["files"][f"{s}.uids.txt"]["sha256"] for s in SPLITS}
        encoder = {"name": "random", "revision": None, "digest": str(seed)}
        with image_writer.ImageWriter(
            folder, counts, width, data.name, encoder, {"uids": uids}
        ) as writer:
            for split in SPLITS:
                each = generator.integers(4, size=counts[split])
                writer.extend(split, 0, each, generator.standard_normal((each.sum(), width)))
            return data.with_images(image_vectors.open(writer.finish()), per_item)

    return add
