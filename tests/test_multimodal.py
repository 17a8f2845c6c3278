"""Training with images, on a small synthetic dataset and the descriptor of its pictures."""

import copy
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import processes
import pytest
import safetensors
from PIL import Image

from configs import vixml
from xmc_jax.config import RunConfig
from xmc_jax.data import batches
from xmc_jax.data.synthetic import product_set
from xmc_jax.data.types import ORDERS
from xmc_jax.files import workdirs
from xmc_jax.images import descriptor
from xmc_jax.models import hf_weights
from xmc_jax.shipping import exporting
from xmc_jax.training import build, loop
from xmc_jax.training.run import Run

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[1]
STEPS_PER_EPOCH, STEPS = 3, 6


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("raw") / "Products"
    config = product_set.SyntheticConfig(documents=120, test_documents=40, labels=60, pixels=32)
    product_set.generate(config, folder)
    return folder


@pytest.fixture(scope="module")
def with_images(fields, raw, tmp_path_factory) -> dict:
    """The config of a run of a small encoder with images; copy before changing."""
    fields = copy.deepcopy(fields)
    fields["data"] |= {
        "dataset": "Products",
        "raw_dir": str(raw),
        "data_dir": str(tmp_path_factory.mktemp("data")),
        "images": vixml.get_config("mm").to_dict()["data"]["images"] | {"per_item": 2},
    }
    fields["encoder"]["dropout"] = fields["prime"]["dropout"] = 0.0
    fields["prime"]["enabled"] = False
    fields["optimizer"]["weight_decay"] = ((".*", 0.01),)
    fields["train"] |= {"batch_size": 48, "epochs": 2, "eval_every": 0, "zero_shot": False}
    return fields


@pytest.fixture(scope="module")
def in_full(with_images, fields) -> dict:
    """The same with PRIME."""
    decays = fields["optimizer"]["weight_decay"]
    return changed(with_images, prime={"enabled": True}, optimizer={"weight_decay": decays})


@pytest.fixture(scope="module")
def decoder_fields(with_images) -> dict:
    fields = vixml.get_config("tiny_decoder").to_dict()
    fields["data"] |= {
        name: with_images["data"][name] for name in ("dataset", "raw_dir", "data_dir", "images")
    }
    fields["prime"] |= {"free_vectors": 16, "dropout": 0.0}
    fields["train"] |= {"batch_size": 48, "n_chunks": 1}
    return fields


@pytest.fixture(scope="module")
def program(with_images) -> Run:
    return build.run(RunConfig.from_dict(with_images))


@pytest.fixture(scope="module")
def stepped(program):
    return run(program)


def run(program: Run, steps: int = 2):
    """The state before and after some steps in order of the documents, and the last metrics."""
    state = program.initial_state()
    before = jax.device_get(state)
    order = batches.complete(
        np.arange(program.data.num_documents, dtype=np.int32), program.config.train.batch_size
    )
    for i in range(steps):
        batch = program.put(program.sampler.build(order, i, i))
        state, metrics = program.train_step(state, program.frozen, batch)
    return before, state, jax.device_get(metrics)


def changed(fields: dict, **sections) -> dict:
    return fields | {name: fields[name] | values for name, values in sections.items()}


def text_only(fields: dict) -> dict:
    return changed(fields, data={"images": fields["data"]["images"] | {"name": None}})


def test_the_dataset_has_the_pictures_of_its_items(program, raw):
    data = program.data
    assert data.shape.image_width == descriptor.WIDTH
    assert data.images.manifest["encoder"]["name"] == "hog-colour"
    shop = product_set.Shop(
        product_set.SyntheticConfig(documents=120, test_documents=40, labels=60, pixels=32)
    )
    for split in ("train", "test", "label"):
        items = list(shop.items(split))
        inputs = getattr(data, split).inputs(np.arange(len(items)))
        assert inputs.image_count.tolist() == [min(item.images, 2) for item in items]


def test_a_step_trains_the_projection(stepped):
    before, after, metrics = stepped
    assert np.isfinite(metrics["loss"])
    ours, theirs = before.params["projection"], jax.device_get(after.params["projection"])
    assert ours["kernel"].shape == (descriptor.WIDTH, 32) and ours["bias"].shape == (32,)
    for name in ours:
        assert np.isfinite(theirs[name]).all() and (theirs[name] != ours[name]).mean() > 0.9


def test_images_change_the_embeddings_of_items_that_have_some(program, with_images, stepped):
    """And of no others: an item without images is its text."""
    _, state, _ = stepped
    texts = Run(
        RunConfig.from_dict(text_only(with_images)),
        build.data(RunConfig.from_dict(text_only(with_images))),
    )
    alone = {name: leaf for name, leaf in state.params.items() if name != "projection"}
    for split in ("test", "label"):
        ours, theirs = program.embed(state.params, split), texts.embed(alone, split)
        count = getattr(program.data, split).inputs(np.arange(len(ours))).image_count
        difference = np.abs(ours - theirs).max(axis=1)
        assert difference[count == 0].max() < 1e-6 and difference[count > 0].min() > 1e-3


@pytest.mark.scale
@pytest.mark.parametrize("tower", ["encoder", *ORDERS])
def test_chunks_and_devices_do_not_change_a_step(in_full, decoder_fields, tower):
    if tower == "encoder":
        fields, others = in_full, ((2, 2), (1, 1))
    else:
        fields, others = changed(decoder_fields, fusion={"order": tower}), ((1, 2),)
    _, whole, metrics = run(build.run(RunConfig.from_dict(fields)))
    bank = jax.device_get(whole.tables.document_bank)
    for devices, n_chunks in others:
        some = build.run(
            RunConfig.from_dict(changed(fields, train={"n_chunks": n_chunks})),
            jax.devices()[:devices],
        )
        _, other, found = run(some)
        np.testing.assert_allclose(found["loss"], metrics["loss"], rtol=1e-5)
        found = jax.device_get(other.tables.document_bank)
        np.testing.assert_allclose(found, bank, rtol=0, atol=1e-5)


@pytest.mark.reliability
def test_interrupted_in_an_epoch_and_at_a_boundary(in_full, tmp_path, terminated_after):
    program = build.run(RunConfig.from_dict(in_full))
    straight = loop.train(program, tmp_path / "straight")
    assert straight.step == STEPS
    terminated_after(2, STEPS_PER_EPOCH)
    for stop in (2, STEPS_PER_EPOCH):
        with pytest.raises(loop.Interrupted, match=f"saved at step {stop}"):
            loop.train(program, tmp_path / "stopped")
    resumed = loop.train(program, tmp_path / "stopped")
    leaves = jax.tree_util.tree_leaves_with_path(resumed.state)
    for (path, a), b in zip(leaves, jax.tree.leaves(straight.state)):
        np.testing.assert_array_equal(jax.device_get(a), jax.device_get(b), err_msg=str(path))
    assert "projection" in resumed.state.params
    assert resumed.evaluation.metrics == straight.evaluation.metrics


def test_goes_on_from_its_export(with_images, program, stepped, tmp_path):
    """The exported folder is a backbone like any other, with its projection or without."""
    _, state, _ = stepped
    folder = exporting.encoder(program, state, tmp_path)
    with safetensors.safe_open(folder / hf_weights.PROJECTION, "np") as file:
        projection = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert file.metadata()["encoder.name"] == "hog-colour"
    again = changed(with_images, encoder={"backbone": str(folder)})
    reopened = build.run(RunConfig.from_dict(again))
    params = reopened.initial_state().params
    np.testing.assert_array_equal(params["projection"]["kernel"], projection["weight"].T)
    np.testing.assert_array_equal(params["projection"]["bias"], projection["bias"])
    ours = program.embed(state.params, "test")
    np.testing.assert_allclose(reopened.embed(params, "test"), ours, rtol=0, atol=1e-5)
    drawn = changed(again, encoder={"init": "random"})
    other = build.run(RunConfig.from_dict(drawn)).abstract.params["projection"]["kernel"]
    assert other.shape == projection["weight"].T.shape

    texts = build.run(RunConfig.from_dict(text_only(again)))
    params = texts.initial_state().params
    assert "projection" not in params
    assert "images" in reopened.provenance() and "images" not in texts.provenance()
    alone = texts.embed(params, "test")
    without = program.data.test.inputs(np.arange(len(ours))).image_count == 0
    np.testing.assert_allclose(alone[without], ours[without], rtol=0, atol=1e-5)


@pytest.mark.scale
@pytest.mark.parametrize("order", ORDERS)
def test_a_decoder_goes_on_from_its_export(decoder_fields, tmp_path, order):
    fields = changed(decoder_fields, fusion={"order": order})
    program = build.run(RunConfig.from_dict(fields))
    _, state, _ = run(program)
    folder = exporting.encoder(program, state, tmp_path)
    again = changed(
        fields,
        encoder={
            "backbone": str(folder),
            "init": "pretrained",
            "frozen_dtype": "float32",  # merged weights are not bfloat16's any more
            "lora": fields["encoder"]["lora"] | {"rank": 0},
        },
        optimizer={"trainable": (("backbone/.*", False), (".*", True)), "lr": ((".*", 1e-3),)},
    )
    reopened = build.run(RunConfig.from_dict(again))
    assert reopened.layout.prompts == program.layout.prompts and program.layout.prompts.middle
    ours = program.embed(state.params, "test")
    theirs = reopened.embed(reopened.initial_state().params, "test")
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-5)


def test_a_projection_of_other_images_is_refused(
    with_images, program, stepped, with_random_images, tmp_path
):
    folder = exporting.encoder(program, stepped[1], tmp_path)
    data = with_random_images(program.data, tmp_path / "images-x")
    again = changed(with_images, encoder={"backbone": str(folder)})
    with pytest.raises(ValueError, match=r"of images 8 wide, got one of \[32, 452\]") as refused:
        Run(RunConfig.from_dict(again), data).initial_state()
    assert "\n" not in str(refused.value)


def test_an_image_folder_that_was_made_otherwise_is_refused(with_images, program):
    def ask(**fields):
        images = with_images["data"]["images"] | fields
        return build.data(RunConfig.from_dict(changed(with_images, data={"images": images})))

    for field, value, made in (
        ("per_item", 3, "2"),
        ("encoder", "some/encoder", "hog-colour"),
        ("layout", "pad", "stretch"),
        ("revision", "2", "1"),
    ):
        with pytest.raises(
            ValueError, match=rf"data\.images\.{field} = {value}, found .* with {made}; set that"
        ) as refused:
            ask(**{field: value})
        assert "\n" not in str(refused.value)
    fewer = ask(per_item=1).test.inputs(np.arange(40)).image_count
    expected = program.data.test.inputs(np.arange(40)).image_count
    np.testing.assert_array_equal(fewer, np.minimum(expected, 1))


def test_a_run_sees_that_pictures_have_changed(with_images, raw, tmp_path):
    """Where they were named, and where the config leaves that to the folder."""
    (tmp_path / "train").mkdir()
    uids = build.data(RunConfig.from_dict(text_only(with_images))).uids("train")
    for number in range(20):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / "train" / f"{uids[number]}.png")
    for split in ("test", "label"):
        (tmp_path / split).mkdir()
    images = with_images["data"]["images"] | {"name": "other", "source": str(tmp_path)}
    asked = changed(with_images, data={"images": images})
    before = build.data(RunConfig.from_dict(asked)).images.digest
    assert build.data(RunConfig.from_dict(asked)).images.digest == before
    path = tmp_path / "train" / f"{uids[7]}.png"
    Image.new("RGB", (32, 32), (0, 255, 0)).save(path)
    os.utime(path, ns=(1, 1))
    after = build.data(
        RunConfig.from_dict(changed(with_images, data={"images": images | {"source": None}}))
    ).images
    assert after.digest != before and after.manifest["images"]["train"] == 20


def test_other_images_under_a_run_are_refused(with_images, program, with_random_images, tmp_path):
    config = with_images | {"provenance": program.provenance()}
    workdirs.write_config(tmp_path, config)
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    (tmp_path / "checkpoints" / "2" / "file").touch()
    workdirs.check_config(tmp_path, config)
    data = with_random_images(program.data, tmp_path / "images-hog-colour")
    other = Run(RunConfig.from_dict(with_images), data).provenance()
    there, here = program.provenance()["images"], other["images"]
    assert there == program.data.images.digest and here != there
    with pytest.raises(
        ValueError, match=rf"\(provenance\.images: '{there}' there, '{here}' here\); choose anoth"
    ) as refused:
        workdirs.check_config(tmp_path, with_images | {"provenance": other})
    assert "\n" not in str(refused.value)


def test_text_and_images_side_by_side_in_one_command(tmp_path):
    workdir = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "xmc_jax.main", "--config=configs/vixml.py:mm"),
        f"--workdir={workdir}",
        f"--config.data.data_dir={tmp_path / 'data'}",
        "--config.data.synthetic.documents=160",
        "--config.data.synthetic.labels=60",
        "--config.encoder.layers=1",
        "--config.train.batch_size=80",
        "--config.train.epochs=1",
        "--config.eval.compare_scann=False",
    ]
    environment = os.environ | {"XLA_FLAGS": processes.xla_flags()}  # one device compiles fastest
    first = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert first.returncode == 0, first.stderr[-3000:]
    tables = first.stdout.splitlines()
    images = f"{tmp_path}/data/Synthetic-160x60-seed0/images-hog-colour"
    assert f"Synthetic-160x60-seed0 in {images}: hog-colour, 452 wide" in tables
    kinds = ("zero-shot", "trained", "trained + augmented")
    for row in (f"{run}: {kind}" for run in ("text only", "text + hog-colour") for kind in kinds):
        assert any(line.startswith(f"{row}  ") for line in tables), row
    found = {
        folder: json.loads((folder / "metrics.json").read_text())
        for folder in (workdir, workdir / "baseline")
    }
    assert all(set(rows) == {"zero-shot", "plain", "augmented"} for rows in found.values())
    assert found[workdir]["plain"] != found[workdir / "baseline"]["plain"]
    for folder, images in ((workdir, "hog-colour"), (workdir / "baseline", None)):
        config = json.loads((folder / "config.json").read_text())
        assert config["data"]["images"]["name"] == images
        assert ("images" in config["provenance"]) == (images is not None)
