"""benchmarks/decoder_step.py: the sizes it knows, what it counts, and that it runs."""

import json
import math
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import decoder_peer, decoder_step, decoder_workload, remat
from benchmarks.decoder_workload import MODELS, Settings
from xmc_jax.data.types import Prompts
from xmc_jax.models import backbone

PUBLISHED = pathlib.Path(__file__).parent / "models" / "published"
FILES = {
    "qwen2.5-0.5b": "qwen2.5-0.5b-instruct",
    "qwen2.5-1.5b": "qwen2.5-1.5b-instruct",
    "qwen2.5-3b": "qwen2.5-3b-instruct",
    "qwen2.5-7b": "qwen2.5-7b-instruct",
    "llama3.2-1b": "llama-3.2-1b-instruct",
    "llama3.2-3b": "llama-3.2-3b-instruct",
    "qwen3-0.6b": "qwen3-0.6b",
    "qwen3-4b": "qwen3-4b",
    "gemma3-1b": "gemma-3-1b-it",
    "gemma3-4b": "gemma-3-4b-it",
}
SMALL = ("--model=tiny", "--batch=8", "--chunks=2", "--length=8", "--steps=2", "--documents=64")
# Might be missing where the benchmark is run.
ABSENT = ("grain", "huggingface_hub", "ml_collections", "orbax", "safetensors", "scann", "torch")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[dict, dict]:
    """What a small run returns, and what it writes."""
    out = tmp_path_factory.mktemp("results") / "small.json"
    content = decoder_step.main([*SMALL, f"--out={out}"])
    return content, json.loads(out.read_text(encoding="utf-8"))


def program(name: str = "tiny", **settings) -> decoder_step.Program:
    return decoder_step.Program(Settings(name, **settings), MODELS[name], jax.devices()[0])


def test_every_model_but_the_small_ones_is_published():
    assert set(MODELS) == {"tiny", "small", *FILES}


@pytest.mark.parametrize("name", FILES)
def test_models_are_as_published(name):
    published = (PUBLISHED / f"{FILES[name]}.json").read_text(encoding="utf-8")
    assert MODELS[name] == backbone.from_hf(json.loads(published))


def test_needs_no_more_than_jax_and_flax():
    code = (
        "import sys, benchmarks.decoder_step;"
        f"print([name for name in {(*ABSENT, 'transformers')} if name in sys.modules])"
    )
    folder = pathlib.Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_texts_are_as_long_as_titles():
    lengths = decoder_workload.text_lengths(np.random.default_rng(0), 100_000, 32)
    assert lengths.dtype == np.int32
    assert (lengths.min() >= 1, lengths.max()) == (True, 32)
    assert lengths.mean() / 32 == pytest.approx(0.6, abs=0.02)


def test_texts_are_as_long_as_those_of_the_debian_titles():
    drawn = {
        kind: decoder_workload.text_lengths(np.random.default_rng(0), 100_000, 32, "26k", kind)
        for kind in ("train", "label")
    }
    for kind, (titles, mean) in {"train": (32606, 18.4698), "label": (25799, 18.4000)}.items():
        assert sum(decoder_workload._TITLES_26K[kind]) == titles
        assert (drawn[kind].min() >= 4, drawn[kind].max()) == (True, 32)
        assert drawn[kind].mean() == pytest.approx(mean, abs=0.05)
    # Where they are cut, there are as many as were longer.
    assert (drawn["train"] == 32).mean() == pytest.approx((625 + 185) / 32606, abs=0.002)


def test_batches_differ_from_step_to_step_and_not_from_run_to_run():
    settings = Settings("tiny", batch=16, length=8, labels=8)
    first, again, second = (
        decoder_workload.batch_of(settings, MODELS["tiny"], step) for step in (0, 0, 1)
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, first, again))
    assert not np.array_equal(first.document.tokens, second.document.tokens)
    assert len(set(first.document_ids)) == 16
    np.testing.assert_array_equal(
        first.relevance, [[a == b for b in first.label_ids] for a in first.label_ids]
    )
    assert first.relevance.sum() > 16  # eight labels for sixteen documents


def test_real_tokens_have_prompts_and_no_padding():
    settings = Settings("tiny", batch=16, length=8)
    batch = decoder_workload.batch_of(settings, MODELS["tiny"], 0)
    texts = [*batch.document.lengths, *batch.label.lengths]
    found = decoder_workload.real_tokens(batch, settings.prompts)
    assert found == sum(length + 4 for length in texts)


def test_images_stand_between_prompts():
    settings = Settings("tiny", batch=16, length=8, images=2, image_width=5)
    assert settings.prompts == Prompts(head=(0, 1, 2), middle=(4, 5, 6), tail=(3,))
    text_only = Settings("tiny", batch=16, length=8)
    batch, plain = (decoder_workload.batch_of(s, MODELS["tiny"], 0) for s in (settings, text_only))
    for side, other in ((batch.document, plain.document), (batch.label, plain.label)):
        assert (side.images.shape, side.images.dtype) == ((16, 2, 5), np.float16)
        assert (side.image_count == 2).all()
        np.testing.assert_array_equal(side.tokens, other.tokens)
    extra = 2 * 16 * (3 + 2)
    found, without = (
        decoder_workload.real_tokens(b, s.prompts)
        for b, s in ((batch, settings), (plain, text_only))
    )
    assert found == without + extra
    # All items have all images: what is padded is the same.
    padded, plain = (
        program(batch=16, chunks=1, length=8, documents=64, padded=True, images=images).positions
        for images in (2, 0)
    )
    assert padded == plain + extra


def test_parameters_are_told_apart():
    found = program(lora_rank=8, labels=32, free_vectors=16).parameters()
    projections = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]
    assert found["frozen_matmul"] == 2 * sum(a * b for a, b in projections)
    assert found["lora"] == 2 * sum(8 * (a + b) for a, b in projections)
    assert found["frozen_embedding"] == 512 * 64
    biases_and_norms = 2 * (64 + 32 + 32 + 64 + 64) + 64
    assert found["frozen"] == found["frozen_matmul"] + 512 * 64 + biases_and_norms
    assert found["trainable"] > found["lora"] + 16 * 64


def test_the_base_is_of_the_published_size():
    found = program("qwen2.5-3b").parameters()
    assert found["frozen"] == 3_085_938_688
    query_and_out, key_and_value, feed_forward = 2 * 4096, 2 * 2304, 3 * 13056
    assert found["lora"] == 36 * 256 * (query_and_out + key_and_value + feed_forward)


def test_flops_are_what_training_needs():
    parameters = {"frozen_matmul": 10**9, "lora": 10**8, "frozen_embedding": 10**12}
    assert decoder_step.flops(parameters, 1000) == pytest.approx(4.6e12)


@pytest.mark.slow
def test_writes_what_it_measures(small):
    content, written = small
    assert written == json.loads(json.dumps(content))
    assert list(written)[:3] == ["benchmark", "model", "settings"]
    assert {
        "device",
        "processor",
        "cores",
        "python",
        "versions",
        "date",
        "commit",
        "results",
    } < set(written)
    results = written["results"]
    assert len(results["step_seconds_each"]) == 2
    assert len(results["loss_each"]) == decoder_step.WARM_UP + 2
    assert results["memory"]["aliased"] == pytest.approx(results["memory"]["outputs"], rel=0.01)
    assert (results["memory"]["peak"], results["peak_bytes"]) == (None, None)  # none on CPU
    numbers = [leaf for leaf in jax.tree.leaves(results) if leaf is not None]
    assert all(math.isfinite(number) for number in numbers)
    assert 0 < results["mfu"] < 1
    seconds = results["step_seconds"]
    assert results["pairs_per_second"] == pytest.approx(8 / seconds)
    # Of 2 x 8 texts of up to 8 tokens, one prompt token behind each, three ahead once a chunk.
    assert 2 * 8 * (1 + 1) < results["positions_per_step"] < 2 * 8 * (8 + 1)
    assert results["tokens_per_step"] < 2 * 8 * (8 + 4)


@pytest.mark.slow
def test_compile_only_allocates_and_writes_nothing(monkeypatch, capsys):
    monkeypatch.setattr(decoder_step.Program, "draw", None)
    content = decoder_step.main([*SMALL, "--compile_only"])
    assert set(content["results"]["memory"]) >= {"arguments", "aliased", "temporary", "total"}
    printed = capsys.readouterr().out
    assert "memory, total" in printed
    assert "written" not in printed


@pytest.mark.slow
def test_draws_each_array_in_its_own_type():
    p = program(lora_rank=8, labels=32, free_vectors=16, documents=2048)
    state, frozen = p.draw()
    for drawn, abstract in ((state, p.abstract), (frozen, p.frozen)):
        assert jax.tree.map(lambda x: (x.shape, x.dtype), drawn) == jax.tree.map(
            lambda x: (x.shape, x.dtype), abstract
        )
    assert {x.dtype for x in jax.tree.leaves(frozen)} == {jnp.dtype("bfloat16")}
    kernel = np.asarray(frozen["backbone"]["layers"]["gate"]["kernel"], np.float32)
    assert kernel.std() == pytest.approx(0.02, rel=0.05)
    assert not np.array_equal(kernel[0], kernel[1])
    assert (np.asarray(frozen["backbone"]["final_norm"]["scale"]) == 1).all()


def fake(step) -> types.SimpleNamespace:
    """Stands for a Program whose compiled step is `step`."""
    p = program(labels=32, free_vectors=16, documents=2048, batch=8, chunks=1, steps=2)
    return types.SimpleNamespace(
        settings=p.settings,
        model=p.model,
        compile=lambda: (step, 0.0),
        draw=lambda: (jnp.zeros(()), None),
        put=lambda batch: batch,
        parameters=p.parameters,
    )


def test_a_loss_that_is_not_finite_is_an_error():
    with pytest.raises(RuntimeError, match="step 0: expected a finite loss"):
        decoder_step.measure(
            fake(
                lambda state, frozen, batch: (state, {"loss": jnp.asarray(jnp.nan), "health": None})
            ),
            jax.devices()[0],
        )


def test_compiling_after_the_warm_up_is_an_error():
    def step(state, frozen, batch):
        loss = jax.jit(lambda x: x + 1)(state)  # another function each time
        return state, {"loss": loss, "health": None}

    with pytest.raises(RuntimeError, match="expected no compilation after 2 steps, got 2"):
        decoder_step.measure(fake(step), jax.devices()[0])


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--batch=8", "--chunks=3"), "--chunks: expected a divisor of the batch, 8, got 3"),
        (("--documents=8",), "--documents: expected at least the batch, 64, got 8"),
        (("--remat=everything",), "--remat: expected one of"),
        (("--steps=0",), "--steps: expected at least 1, got 0"),
        (("--images=-1",), "--images: expected at least 0, got -1"),
        (("--lengths=27k",), "--lengths: expected one of"),
    ],
)
def test_a_mistaken_flag_is_one_line(flags, message):
    with pytest.raises(SystemExit, match=message):
        decoder_step.main(["--model=tiny", *flags])


def test_a_topology_is_only_compiled_for(capsys):
    with pytest.raises(SystemExit):
        decoder_step.main(["--topology=v5p:2x2x1"])
    assert "--topology: expected with --compile_only" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--torch_apart",), "--torch_apart: expected with --torch"),
        (("--torch_checkpointing",), "--torch_checkpointing: expected with --torch"),
        (("--torch", "--compile_only"), "--torch: expected without --compile_only"),
        (("--torch",), "--torch: expected the packages torch, no_such_package, found no no_such"),
    ],
)
def test_flags_of_torch_that_do_not_fit_are_refused(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(decoder_peer, "PACKAGES", ("torch", "no_such_package"))
    monkeypatch.setattr(decoder_peer, "missing", lambda: "no_such_package")
    with pytest.raises(SystemExit):
        decoder_step.main(["--model=tiny", *flags])
    assert message in capsys.readouterr().err


def test_what_torch_lacks_is_found(monkeypatch):
    monkeypatch.setattr(decoder_peer, "PACKAGES", ("json", "no_such_package", "nor_this"))
    assert decoder_peer.missing() == "no_such_package"


def test_sizes_may_come_from_a_file():
    path = PUBLISHED / "qwen3-0.6b.json"
    arguments = decoder_step.parse([f"--config_json={path}", "--compile_only"])
    assert (arguments.model, arguments.config_json) == (None, path)
    with pytest.raises(SystemExit):
        decoder_step.parse([f"--config_json={path}", "--model=tiny"])


@pytest.mark.scale
def test_what_is_kept_changes_memory_and_no_result(tmp_path, capsys):
    out = tmp_path / "remat.json"
    flags = ("--model=tiny", "--batch=16", "--chunks=1", "--steps=2", f"--out={out}")
    remat.main([*flags, "--policies", "none", "nothing_saveable"])
    results = json.loads(out.read_text(encoding="utf-8"))["results"]
    assert list(results) == ["none", "nothing_saveable"]
    everything, nothing = results.values()
    assert everything["loss"] == pytest.approx(nothing["loss"], abs=1e-5)
    assert nothing["memory"]["temporary"] < everything["memory"]["temporary"]
    assert everything["times_first"] == 1
    assert all(len(one["step_seconds_each"]) == 2 for one in results.values())
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[:2]] == ["none", "nothing_saveable"]


def test_a_mistaken_flag_of_remat_is_one_line():
    with pytest.raises(SystemExit, match="--chunks: expected a divisor of the batch, 64, got 3"):
        remat.main(["--model=tiny", "--chunks=3"])
