"""benchmarks/decoder_torch.py does our step's work, and `--torch` times both and says the ratio."""

import functools
import json
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from benchmarks import decoder_peer, decoder_step
from benchmarks.decoder_workload import MODELS, Settings, batch_of
from xmc_jax.data import rows as row_layout
from xmc_jax.models import hf, hf_export

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
decoder_torch = pytest.importorskip("benchmarks.decoder_torch")

pytestmark = pytest.mark.slow

SIZES = MODELS["tiny"]
SMALL = {
    "batch": 8,
    "chunks": 2,
    "length": 8,
    "lora_rank": 4,
    "documents": 64,
    "free_vectors": 256,
    "combiner_ff": 32,
    "image_width": 6,
    "steps": 2,
    "dtype": "float32",
    "combiner_dropout": 0.0,
}
IMAGES = pytest.mark.parametrize("images", [0, 2])


def settings(**changes) -> Settings:
    return Settings("tiny", **SMALL | changes)


@functools.cache
def ours(images: int):
    """Program, state with adapters that do something, and base."""
    program = decoder_step.Program(settings(images=images), SIZES, jax.devices()[0])
    state, frozen = program.draw()
    stack = state.params["backbone"]["layers"]
    for number, leaves in enumerate(stack.values()):
        shape = leaves["lora_b"].shape
        leaves["lora_b"] = jax.random.normal(jax.random.key(number), shape) * 0.02
    return program, state, frozen


def copied(program, state, frozen, folder) -> dict[str, torch.Tensor]:
    """Our parameters under the names of `TorchStep`, through the folders that we export."""
    params = jax.tree.map(np.asarray, state.params)
    base = jax.tree.map(np.asarray, frozen["backbone"])
    stack = params["backbone"]["layers"]
    whole = base | {"layers": {k: v | stack.get(k, {}) for k, v in base["layers"].items()}}
    written = {"pooling": "mean", "max_length": program.settings.width}
    hf_export.merged(folder / "base", base, SIZES, **written)
    source = hf.resolve(str(folder / "base"))
    lora = program.model.lora
    hf_export.adapter(folder / "lora", whole, SIZES, lora=lora, source=source, **written)

    found = {}
    for name, tensor in safetensors.numpy.load_file(folder / "base" / hf.WEIGHTS).items():
        module, _, kind = name.rpartition(".")
        if module.endswith(decoder_torch.TARGETS):
            module += ".base_layer"
        found[f"tower.model.base_model.model.{module}.{kind}"] = tensor
    adapters = safetensors.numpy.load_file(folder / "lora" / "adapter_model.safetensors")
    for name, tensor in adapters.items():
        found[f"tower.model.{name.removesuffix('.weight')}.default.weight"] = tensor

    def dense(name: str, leaves) -> None:
        found[f"{name}.weight"] = leaves["kernel"].T
        found[f"{name}.bias"] = leaves["bias"]

    if program.settings.images:
        dense("tower.projection", params["projection"])
    combiner = params["combiner"]
    heads = [combiner[name] for name in ("query", "key", "value")]
    for kind, leaf in (("weight", "kernel"), ("bias", "bias")):
        joined = np.concatenate([leaves[leaf].T for leaves in heads])
        found[f"combiner.self_attn.in_proj_{kind}"] = joined
    dense("combiner.self_attn.out_proj", combiner["out"])
    dense("combiner.linear1", combiner["up"])
    dense("combiner.linear2", combiner["down"])
    for name in ("norm1", "norm2"):
        found[f"combiner.{name}.weight"] = combiner[name]["scale"]
        found[f"combiner.{name}.bias"] = combiner[name]["bias"]
    found["free_vectors"] = params["free_vectors"]
    return {name: torch.tensor(np.array(x, np.float32)) for name, x in found.items()}


@pytest.fixture
def both(images, tmp_path):
    """Ours, and torch's step with the same parameters and tables."""
    program, state, frozen = ours(images)
    theirs = decoder_torch.TorchStep(program.settings, SIZES, "cpu")
    theirs.load_state_dict(copied(program, state, frozen, tmp_path))
    theirs.centroids = torch.tensor(np.asarray(state.tables.centroids))
    return program, state, frozen, theirs


@IMAGES
def test_embeddings_are_the_same(both, images):
    program, state, frozen, theirs = both
    host = batch_of(program.settings, SIZES, 0)
    for padding in decoder_peer.PADDINGS:
        batch = theirs.batch(0, padding)
        with torch.no_grad():
            pooled = torch.cat([theirs.tower(chunk) for chunk in batch.chunks])
        found = torch.nn.functional.normalize(pooled, dim=1).view(2, 2, 4, -1)
        for side, items in enumerate((host.document, host.label)):
            rows = row_layout.one_each(items, program.settings.prompts, "text_image")
            unit = program.step.encode(state.params, frozen, rows).unit
            for chunk in range(2):  # takes every second row
                np.testing.assert_allclose(found[chunk, side], unit[chunk::2], atol=1e-4)


@IMAGES
def test_loss_gradient_and_bank_are_the_same(both, images):
    program, state, frozen, theirs = both
    host = batch_of(program.settings, SIZES, 0)
    assert len(set(host.label_ids)) == 8  # so that positives are not drawn among several
    norms = {}
    for padding in decoder_peer.PADDINGS:  # at the first step the learning rate is 0
        loss, norms[padding] = theirs.update(theirs.batch(0, padding))
    compiled, _ = program.compile()
    after, metrics = compiled(jax.tree.map(jnp.copy, state), frozen, program.put(host))
    assert loss.item() == pytest.approx(float(metrics["loss"]), abs=1e-5)
    assert norms["static"].item() == pytest.approx(float(metrics["grad_norm"]), rel=1e-3)
    bank = np.asarray(after.tables.document_bank)
    np.testing.assert_allclose(theirs.bank, bank, atol=1e-4)
    assert (np.abs(bank).sum(1) > 0).sum() == 8


@IMAGES
def test_positions_are_as_many(images):
    s = settings(images=images, padded=True)
    theirs = decoder_torch.TorchStep(s, SIZES, "cpu")
    counted = {
        padding: decoder_peer.positions(s, SIZES, 1, padding) for padding in decoder_peer.PADDINGS
    }
    assert counted == {
        padding: theirs.batch(1, padding).positions for padding in decoder_peer.PADDINGS
    }
    padded = decoder_step.Program(s, SIZES, jax.devices()[0])
    assert counted["longest"] <= counted["static"] == padded.positions


def test_what_is_trained_is_float32_and_the_base_is_not():
    theirs = decoder_torch.TorchStep(settings(dtype="bfloat16"), SIZES, "cpu", checkpointing=True)
    kinds = {p.dtype for p in theirs.trained}
    frozen = {p.dtype for p in theirs.parameters() if not p.requires_grad}
    assert (kinds, frozen) == ({torch.float32}, {torch.bfloat16})
    program = decoder_step.Program(settings(), SIZES, jax.devices()[0])
    trained = sum(p.numel() for p in theirs.trained)
    assert trained == program.parameters()["trainable"]
    losses = [theirs.update(theirs.batch(step, "static"))[0].item() for step in range(2)]
    assert np.isfinite(losses).all()


@pytest.mark.parametrize(
    "flags, apart, checkpointing",
    [
        (("--lengths=26k", "--length=20"), False, False),
        (("--images=2", "--torch_apart", "--torch_checkpointing"), True, True),
    ],
)
def test_says_how_much_faster_ours_is(flags, apart, checkpointing, tmp_path, capsys):
    out = tmp_path / "out.json"
    small = [f"--{name}={value}" for name, value in SMALL.items()]
    decoder_step.main(["--model=tiny", *small, *flags, "--torch", f"--out={out}"])
    results = json.loads(out.read_text(encoding="utf-8"))["results"]
    theirs = results["torch"]
    assert (theirs["apart"], theirs["checkpointing"], theirs["failure"]) == (
        apart,
        checkpointing,
        None,
    )
    assert set(theirs["versions"]) == {"torch", "transformers", "peft"}
    for one in theirs["paddings"].values():
        assert (len(one["step_seconds_each"]), len(one["loss_each"])) == (2, 4)
        assert one["mfu"] / results["mfu"] == pytest.approx(
            results["step_seconds"] / one["step_seconds"]
        )
        ratios = [a / b for a, b in zip(one["step_seconds_each"], results["step_seconds_each"])]
        assert one["times_torch"] == pytest.approx(statistics.median(ratios))
    fastest = theirs["paddings"][theirs["fastest"]]
    assert fastest["step_seconds"] == min(
        one["step_seconds"] for one in theirs["paddings"].values()
    )
    assert theirs["times_torch"] == fastest["times_torch"]
    assert f"times torch{'':17}{theirs['times_torch']:.2f}" in capsys.readouterr().out


def test_a_failure_of_torch_leaves_ours(tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("nothing fails there")
    peer = decoder_peer.Peer
    monkeypatch.setattr(
        decoder_peer, "Peer", lambda s, sizes, platform, *more: peer(s, sizes, "gpu", *more)
    )
    out = tmp_path / "out.json"
    small = [f"--{name}={value}" for name, value in SMALL.items()]
    with pytest.raises(SystemExit, match=r"error: --torch: .*(CUDA|NVIDIA)"):
        decoder_step.main(["--model=tiny", *small, "--torch", f"--out={out}"])
    results = json.loads(out.read_text(encoding="utf-8"))["results"]
    assert results["pairs_per_second"] > 0
    assert results["torch"]["paddings"] == {}
