"""Prompts around texts: against a loop, and what the encoder makes of them."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from xmc_jax.models import dual, fusion
from xmc_jax.models.bert import BertConfig
from xmc_jax.models.decoder_config import DecoderConfig
from xmc_jax.types import Inputs, Prompts

SIZES = DecoderConfig(
    family="qwen2",
    vocab_size=50,
    hidden=16,
    layers=1,
    heads=2,
    kv_heads=1,
    head_dim=8,
    ff=24,
    qkv_bias=True,
)
PROMPTS = {
    "both": Prompts(head=(7, 8, 9), tail=(10, 11)),
    "one of each": Prompts(head=(7,), tail=(10,)),
    "head": Prompts(head=(7, 8)),
    "tail": Prompts(tail=(10, 11, 12)),
}


def texts(n=9, T=6, empty=True, seed=0):
    """Padded with tokens, which must not matter."""
    rng = np.random.default_rng(seed)
    lengths = np.concatenate([[0 if empty else 1, T], rng.integers(1, T + 1, n - 2)])
    return Inputs(rng.integers(20, 50, (n, T), dtype=np.int32), lengths.astype(np.int32))


def by_a_loop(inputs, prompts, positions):
    """Of each text, its sequence and the positions of that."""
    T = inputs.tokens.shape[1]
    for tokens, length in zip(inputs.tokens, inputs.lengths):
        text = tokens[:length].tolist()
        sequence = [*prompts.head, *text, *prompts.tail]
        if positions == "contiguous":
            yield sequence, list(range(len(sequence)))
        else:
            begin = len(prompts.head)
            end = begin + T  # as if the text filled its T places
            yield (
                sequence,
                [*range(begin + length), *range(end, end + len(prompts.tail))],
            )


@pytest.mark.parametrize("positions", fusion.POSITIONS)
@pytest.mark.parametrize("name", PROMPTS)
def test_compose_by_a_loop(name, positions):
    prompts, inputs = PROMPTS[name], texts()
    compose = jax.jit(lambda inputs: fusion.compose(inputs, prompts, positions))
    tokens, lengths, at = compose(inputs)
    n, T = inputs.tokens.shape
    assert tokens.shape == (n, len(prompts.head) + T + len(prompts.tail))
    assert tokens.dtype == lengths.dtype == np.int32
    assert (at is None) == (positions == "contiguous")
    if at is None:
        at = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    assert at.shape == tokens.shape and (np.diff(at, axis=1) > 0).all()
    for row, (sequence, expected) in enumerate(by_a_loop(inputs, prompts, positions)):
        assert lengths[row] == len(sequence)
        assert tokens[row, : len(sequence)].tolist() == sequence
        assert at[row, : len(sequence)].tolist() == expected


@pytest.mark.parametrize("positions", fusion.POSITIONS)
def test_without_prompts_nothing_is_done(positions):
    inputs = texts(empty=False)
    tokens, lengths, at = fusion.compose(inputs, fusion.NO_PROMPTS, positions)
    assert tokens is inputs.tokens and lengths is inputs.lengths and at is None


@functools.cache
def params():
    """Random; norms and biases too."""
    boxed = jax.eval_shape(lambda: dual.init_params(dual.DualEncoder(SIZES), 0))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), nn.unbox(boxed)
    )


@functools.partial(jax.jit, static_argnums=0)
def encode(model, params, inputs):
    return model.apply({"params": params}, inputs, method="encode")


def by_hand(inputs, prompts):
    """The vectors of the composed texts as plain ones, and their lengths."""
    sequences = [sequence for sequence, _ in by_a_loop(inputs, prompts, "contiguous")]
    tokens = np.zeros((len(sequences), max(map(len, sequences))), np.int32)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = sequence
    lengths = np.array([len(sequence) for sequence in sequences], np.int32)
    apply = jax.jit(
        lambda params: dual.DualEncoder(SIZES).apply(
            {"params": params}, tokens, lengths, method=lambda m, t, n: m.backbone(t, n)
        )
    )
    return apply(params()), lengths


def test_pooling_takes_in_the_prompts():
    prompts, inputs = PROMPTS["both"], texts()
    hidden, lengths = by_hand(inputs, prompts)
    model = functools.partial(dual.DualEncoder, SIZES, prompts=prompts)
    expected = {
        "mean": [hidden[row, :length].mean(0) for row, length in enumerate(lengths)],
        "cls": hidden[:, 0],
        # the last token of the tail, wherever the text ends
        "last": [hidden[row, length - 1] for row, length in enumerate(lengths)],
    }
    assert set(expected) == set(dual.POOLINGS)
    for pooling, vectors in expected.items():
        out = encode(model(pooling=pooling), params(), inputs)
        np.testing.assert_allclose(out.pooled, np.stack(vectors), rtol=0, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(out.unit, axis=1), 1, atol=1e-5)


def test_positions_of_the_padding_change_what_follows_it():
    prompts, inputs = PROMPTS["both"], texts(empty=False)
    models = [
        dual.DualEncoder(SIZES, pooling="last", prompts=prompts, positions=positions)
        for positions in fusion.POSITIONS
    ]
    contiguous, padded = (np.asarray(encode(model, params(), inputs).pooled) for model in models)
    full = inputs.lengths == inputs.tokens.shape[1]
    np.testing.assert_allclose(contiguous[full], padded[full], rtol=0, atol=1e-6)
    assert np.abs(contiguous - padded)[~full].max(-1).min() > 1e-5


def test_the_order_of_texts_and_their_padding_do_not_matter():
    inputs = texts()
    model = dual.DualEncoder(SIZES, prompts=PROMPTS["both"])
    expected = encode(model, params(), inputs).pooled
    other = np.where(
        np.arange(6) < inputs.lengths[:, None], inputs.tokens, (inputs.tokens + 3) % 50
    )
    ours = encode(model, params(), Inputs(other[::-1], inputs.lengths[::-1])).pooled
    np.testing.assert_allclose(ours[::-1], expected, rtol=0, atol=1e-5)


def test_encoders_refuse_prompts():
    sizes = BertConfig(vocab_size=50, hidden=16, layers=1, heads=2, ff=32, max_positions=12)
    model = dual.DualEncoder(sizes, prompts=PROMPTS["head"])
    with pytest.raises(ValueError, match="expected no prefix and no suffix") as error:
        dual.init_params(model, 0)
    assert "\n" not in str(error.value)


def test_config_errors():
    with pytest.raises(ValueError, match=r"fusion.positions: .*'contiguous', 'padded'.*'absolute'"):
        fusion.FusionConfig(positions="absolute")
