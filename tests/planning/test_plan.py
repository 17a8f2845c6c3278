"""Plans: what stays on a device, what is said, and what is changed where a run does not fit."""

import dataclasses
import math
import shutil

import jax
import numpy as np
import pytest

from configs import vixml
from xmc_jax.config import RunConfig
from xmc_jax.data.types import DataShape
from xmc_jax.planning import plan, programs, shape, summary, topology
from xmc_jax.planning.hlo import Costs
from xmc_jax.planning.plan import Compiled
from xmc_jax.training import build
from xmc_jax.training.flops import Flops
from xmc_jax.training.program import Program

COUNTS = DataShape(documents=640, test=64, labels=320, length=16, pairs=1000, positives=(3,))


@pytest.fixture(scope="module")
def config(fields) -> RunConfig:
    return RunConfig.from_dict(fields)


@pytest.fixture(scope="module")
def where() -> topology.Topology:
    return topology.find("cpu:8")


def on(config: RunConfig, where: topology.Topology, **mesh: int) -> Program:
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **mesh))
    return Program(config, COUNTS, devices=where.devices)


def test_parts_add_up_to_the_state_and_the_frozen_weights(config):
    one = topology.find("cpu")
    program = Program(config, COUNTS, devices=one.devices)
    every = jax.tree.leaves((program.abstract, program.abstract_frozen))
    scalars = 2 * 4  # step and boundaries
    assert sum(plan.parts(program).values()) == (
        sum(leaf.size * leaf.dtype.itemsize for leaf in every) - scalars
    )


def test_tables_are_divided_among_devices_and_copies_of_weights_are_not(config, where):
    copies, shards = (plan.parts(on(config, where, **mesh)) for mesh in ({}, {"fsdp": 4}))
    assert copies["document bank"] == 640 * 32 * 4 // 8
    assert shards["document bank"] == copies["document bank"]
    assert copies["other trained weights"] / 4 < shards["other trained weights"]
    assert shards["other trained weights"] < copies["other trained weights"] / 2


def test_what_a_program_is_not_given_stays_beside_it(config, where):
    program = on(config, where)
    encode = next(each for each in programs.of(program) if each.name == "encode")
    found = plan.compile_one(encode, program, where)
    held = plan.parts(program)
    weights = held["other trained weights"]
    # Step and boundaries; of a device two rows and slots of eight items, of weights all.
    assert found.beside == sum(held.values()) - weights + 8
    assert found.arguments == weights + (2 * 3 * 64 + 8) * 4
    assert found.memory > sum(held.values())


def test_every_program_of_a_run_is_there(config, where):
    names = [each.name for each in programs.of(on(config, where))]
    assert names == [
        *("train_step", "encode", "prototype", "centroids", "cluster"),
        *("search labels", "search documents"),
    ]
    plain = dataclasses.replace(
        config,
        prime=dataclasses.replace(config.prime, enabled=False),
        curriculum=dataclasses.replace(config.curriculum, start=None),
        optimizer=dataclasses.replace(config.optimizer, weight_decay=((".*", 0.01),)),
    )
    names = [each.name for each in programs.of(on(plain, where))]
    assert names == ["train_step", "encode", "search labels", "search documents"]


def test_calls_are_those_of_an_epoch(config, where):
    calls = {each.name: each.per_epoch for each in programs.of(on(config, where))}
    assert calls["train_step"] == 640 / 40
    # Three epochs, three evaluations and one before: all once at the start, documents at the end.
    assert calls["encode"] == (2 * 640 + 320 + 4 * (64 + 320)) / 64 / 3
    assert calls["search labels"] == 4 * 64 / 256 / 3


def compiled(name: str, memory: int, fits: bool = True) -> Compiled:
    costs = Costs(accessed=2**30, collectives=(), unknown_loops=0) if fits else None
    return Compiled(name, 10.0, 0, 0, memory, Flops(fast=10**12), costs, None)


def planned(where, *found: Compiled) -> plan.Plan:
    return plan.Plan(where, {"data": 8}, {"moments": 2**30}, found, 10, 3, {}, {})


def test_a_run_fits_if_each_of_its_programs_does(where):
    room = where.memory
    assert planned(where, compiled("train_step", room), compiled("encode", 1)).fits
    assert not planned(where, compiled("train_step", room), compiled("encode", room + 1)).fits
    assert not planned(where, compiled("train_step", 1), compiled("encode", 1, fits=False)).fits


@pytest.fixture
def costly(monkeypatch, config):
    """Compiling takes no time, and memory as a function of the config; notes what was compiled."""
    compilations = []

    def measure(memory):
        def compile_one(each, program, topology):
            compilations.append(each.name)
            return compiled(each.name, memory(each.name, program.config))

        monkeypatch.setattr(plan, "compile_one", compile_one)
        return compilations

    return measure


def search(config, where, memory):
    needy = planned(where, *(compiled(n, memory(n, config)) for n in ("train_step", "encode")))
    return plan.cheapest_change(
        lambda changed: Program(changed, COUNTS, devices=where.devices), config, where, needy
    )


def test_the_first_change_that_is_enough_is_named(config, where, costly):
    def memory(name, config):
        narrow = config.tables.dtype == "bfloat16"
        return where.memory + (name == "train_step" and not narrow)

    costly(memory)
    change, tried = search(config, where, memory)
    assert change == "--config.tables.dtype=bfloat16"
    assert tried[-1] == change
    assert "--config.encoder.remat=nothing_saveable" in tried[:-1]


def test_a_change_that_leaves_another_program_too_large_is_not_enough(config, where, costly):
    def memory(name, config):
        return where.memory + (name == ("encode", "train_step")[config.train.n_chunks == 1])

    costly(memory)
    change, _ = search(config, where, memory)
    assert change is None


def test_what_cannot_fit_is_not_compiled(config, costly):
    small = dataclasses.replace(topology.find("cpu:8"), memory=1000)
    compilations = costly(lambda name, config: 10_000)
    change, tried = search(config, small, lambda name, config: 10_000)
    assert (change, compilations) == (None, [])
    assert len(tried) > 2


def test_the_verdict_says_what_is_missing(where):
    enough = summary._verdict(planned(where, compiled("train_step", 2**30)))
    assert enough.startswith(f"fits: 1.00 of {where.memory / 2**30:,.2f} GiB")
    short = summary._verdict(planned(where, compiled("train_step", 2 * where.memory)))
    assert short.startswith("does not fit")


def published(tmp_path, model: str) -> str:
    folder = tmp_path / model
    folder.mkdir()
    source = f"tests/models/published/{model}.json"
    shutil.copy(source, folder / "config.json")
    return str(folder)


def test_counts_are_those_published_where_there_is_no_folder(tmp_path):
    fields = vixml.get_config("qwen25_3b/amazontitles_1_3m").to_dict()
    fields["encoder"]["backbone"] = published(tmp_path, "qwen2.5-3b-instruct")
    fields["data"]["data_dir"] = str(tmp_path)
    found, said = shape.of(RunConfig.from_dict(fields))
    assert (found.documents, found.labels, found.test) == (2_248_619, 1_305_265, 970_237)
    assert found.pairs == round(2_248_619 * 22.20)
    assert (found.image_width, found.images_per_item) == (1152, 3)
    assert "as published" in said
    fields["data"]["images"]["name"] = None
    assert shape.of(RunConfig.from_dict(fields))[0].image_width == 0


def test_counts_are_those_of_the_folder_where_it_is(fields):
    opened = build.data(RunConfig.from_dict(fields))
    found, said = shape.of(RunConfig.from_dict(fields))
    assert found == opened.shape
    assert str(opened.folder) in said


def test_a_dataset_of_which_nothing_is_known_is_refused(fields, tmp_path):
    unknown = fields | {"data": fields["data"] | {"data_dir": str(tmp_path)}}
    with pytest.raises(ValueError, match="--mode=prepare first"):
        shape.of(RunConfig.from_dict(unknown))


def test_prompts_without_a_tokenizer_have_a_token_per_word(tmp_path):
    fields = vixml.get_config("qwen25_3b/amazontitles_131k").to_dict()
    fields["encoder"]["backbone"] = published(tmp_path, "qwen2.5-3b-instruct")
    found, said = shape.prompts(RunConfig.from_dict(fields))
    assert tuple(map(len, (found.head, found.middle, found.tail))) == (3, 3, 1)
    assert "a token per word" in said


@pytest.mark.scale
@pytest.mark.parametrize("name", ["cpu:2", "gpu:h100x8"])
def test_a_run_is_planned_whole(fields, name):
    build.data(
        RunConfig.from_dict(fields)
    )  # makes the dataset folder, whose counts are planned with
    text, fits = summary.make(RunConfig.from_dict(fields), name)
    assert fits
    assert ("ESTIMATE" in text) == name.startswith("gpu")
    assert ("ms collectives" in text and "epoch" in text) and "fits: " in text
    for program in ("train_step", "encode", "centroids", "cluster", "search labels"):
        assert f"\n{program} " in text
    if name.startswith("gpu"):
        assert "all-reduce" in text and "step 0." in text


def test_bytes_of_a_device_are_those_of_its_shard():
    mesh = jax.make_mesh((8,), ("x",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arrays = [
        jax.ShapeDtypeStruct((10, 16), np.float32, sharding=sharding) for sharding in (split, whole)
    ]
    assert plan.per_device(arrays) == 4 * math.prod((10, 16)) * 9 // 8
