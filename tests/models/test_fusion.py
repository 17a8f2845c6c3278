"""Prompts, texts and images as one sequence: against numpy, and what the towers make of them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xmc_jax.models import dual, fusion
from xmc_jax.models.bert import BertConfig
from xmc_jax.models.decoder_config import DecoderConfig
from xmc_jax.types import ORDERS, Inputs, Prompts

T, K, E = 6, 3, 5
DECODER = DecoderConfig(
    family="qwen2",
    vocab_size=50,
    hidden=16,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=8,
    ff=24,
    qkv_bias=True,
)
ENCODER = BertConfig(vocab_size=50, hidden=16, layers=2, heads=2, ff=32, max_positions=T + K)
PROMPTS = {
    "all": Prompts(head=(7, 8, 9), middle=(12, 13), tail=(10, 11)),
    "around": Prompts(head=(7,), tail=(10,)),
    "head": Prompts(head=(7, 8)),
    "middle": Prompts(middle=(12,)),
    "tail": Prompts(tail=(10, 11, 12)),
    "none": fusion.NO_PROMPTS,
}
# Every tower that takes images: sizes, prompts and order.
TOWERS = {
    "encoder": (ENCODER, fusion.NO_PROMPTS, "image_text"),
    **{f"decoder, {order}": (DECODER, PROMPTS["all"], order) for order in ORDERS},
}


def items(n=16, shortest=1, images=True, seed=0):
    """Texts of all lengths and 0 to 3 images each; what pads them must not matter."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(shortest, T + 1, n)
    lengths[:4] = [shortest, T, shortest, T]  # with 0, 1, 2 and 3 images
    tokens = rng.integers(20, 50, (n, T), dtype=np.int32)
    if not images:
        return Inputs(tokens, lengths.astype(np.int32))
    vectors = rng.standard_normal((n, K, E)).astype(np.float16)
    return Inputs(tokens, lengths.astype(np.int32), vectors, np.arange(n, dtype=np.int32) % (K + 1))


def by_a_loop(inputs, prompts, order):
    """Of each item its sequence, of tokens and of images ("image", k); and its padded places."""
    width = 0 if inputs.images is None else inputs.images.shape[1]
    for row, (tokens, length) in enumerate(zip(inputs.tokens, inputs.lengths)):
        text = [*tokens[:length].tolist(), *[None] * (T - length)]
        count = inputs.image_count[row] if width else 0
        images = [("image", k) if k < count else None for k in range(width)]
        first, second = (text, images) if order == "text_image" else (images, text)
        padded = [*prompts.head, *first, *prompts.middle, *second, *prompts.tail]
        places = [place for place, piece in enumerate(padded) if piece is not None]
        yield [padded[place] for place in places], places


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("positions", fusion.POSITIONS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", PROMPTS)
def test_compose_by_a_loop(name, order, positions, images):
    prompts = PROMPTS[name]
    inputs = items(shortest=0 if prompts.head or prompts.tail else 1, images=images)
    made = jax.jit(lambda inputs: fusion.compose(inputs, prompts, order, positions))(inputs)
    n, S = made.tokens.shape
    around = len(prompts.head) + len(prompts.middle) + len(prompts.tail)
    assert (n, S) == (len(inputs.lengths), around + T + (K if images else 0))
    assert made.tokens.dtype == made.lengths.dtype == np.int32
    assert (made.positions is None) == (
        positions == "contiguous" or (not images and prompts == fusion.NO_PROMPTS)
    )
    assert (made.images is None) == (not images)
    at = np.broadcast_to(np.arange(S), (n, S)) if made.positions is None else made.positions
    assert (np.diff(at, axis=1) > 0).all()
    numbers = np.full((n, S), -1) if made.images is None else made.images
    for row, (sequence, places) in enumerate(by_a_loop(inputs, prompts, order)):
        length = len(sequence)
        assert made.lengths[row] == length
        ours = zip(made.tokens[row, :length].tolist(), numbers[row, :length].tolist())
        assert [("image", k) if k >= 0 else token for token, k in ours] == sequence
        padded = positions == "padded" and made.positions is not None
        assert at[row, :length].tolist() == (places if padded else list(range(length)))


def test_without_prompts_and_images_nothing_moves():
    inputs = items(images=False)
    for positions in fusion.POSITIONS:
        made = fusion.compose(inputs, fusion.NO_PROMPTS, positions=positions)
        assert made.lengths is inputs.lengths
        real = np.arange(T) < inputs.lengths[:, None]
        np.testing.assert_array_equal(made.tokens, np.where(real, inputs.tokens, -1))
        assert made.positions is None and made.images is None


def tower(name, **fields):
    sizes, prompts, order = TOWERS[name]
    return dual.DualEncoder(sizes, prompts=prompts, order=order, image_width=E, **fields)


@functools.cache
def params(sizes, image_width=E):
    """Random; norms and biases too."""
    model = dual.DualEncoder(sizes, image_width=image_width)
    if sizes is DECODER:
        model = model.clone(order="text_image")
    boxed = jax.eval_shape(lambda: dual.init_params(model, 0))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), nn.unbox(boxed)
    )


@functools.partial(jax.jit, static_argnums=0)
def encode(model, params, inputs):
    return model.apply({"params": params}, inputs, method="encode")


@functools.partial(jax.jit, static_argnums=0)
def run(sizes, params, vectors, positions):
    """The backbone over one item's embeddings as they are, none of them a token's."""
    S = vectors.shape[0]
    zeros, numbers = jnp.zeros((1, S), jnp.int32), jnp.arange(S)[None]
    return dual.DualEncoder(sizes).apply(
        {"params": {"backbone": params["backbone"]}},
        method=lambda model: model.backbone(
            zeros, jnp.full(1, S), positions=positions[None], images=(vectors[None], numbers)
        ),
    )[0]


@pytest.mark.parametrize("positions", fusion.POSITIONS)
@pytest.mark.parametrize(
    "name",
    [*(pytest.param(name, marks=pytest.mark.slow) for name in list(TOWERS)[:2]), *list(TOWERS)[2:]],
)
def test_towers_by_a_composition_in_numpy(name, positions):
    """0 to 3 images; each item by itself, unpadded, its embeddings composed in numpy."""
    sizes, prompts, order = TOWERS[name]
    inputs, weights = items(n=8), params(sizes)  # a program is compiled for each length
    table, projection = weights["backbone"]["token_embedding"], weights["projection"]
    projected = inputs.images.astype(np.float32) @ projection["kernel"] + projection["bias"]
    rows = []
    for row, (sequence, places) in enumerate(by_a_loop(inputs, prompts, order)):
        vectors = [
            projected[row, piece[1]] if isinstance(piece, tuple) else table[piece]
            for piece in sequence
        ]
        at = np.array(places if positions == "padded" else range(len(sequence)), np.int32)
        rows.append(run(sizes, weights, np.stack(vectors), at))
    expected = {
        "mean": [hidden.mean(0) for hidden in rows],
        "cls": [hidden[0] for hidden in rows],
        "last": [hidden[-1] for hidden in rows],
        "max": [hidden.max(0) for hidden in rows],
    }
    assert set(expected) == set(dual.POOLINGS)
    for pooling, vectors in expected.items():
        out = encode(tower(name, pooling=pooling, positions=positions), weights, inputs)
        np.testing.assert_allclose(out.pooled, np.stack(vectors), rtol=0, atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(out.unit, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("name", TOWERS)
def test_an_item_without_images_is_its_text_in_the_same_template(name):
    sizes, prompts, order = TOWERS[name]
    inputs, weights = items(), params(sizes)
    out = encode(tower(name), weights, inputs).pooled
    head, tail = prompts.head, prompts.middle + prompts.tail
    if order == "image_text":
        head, tail = prompts.head + prompts.middle, prompts.tail
    text_only = dual.DualEncoder(sizes, prompts=Prompts(head=head, tail=tail), order=order)
    texts = Inputs(inputs.tokens, inputs.lengths)
    expected = encode(text_only, {"backbone": weights["backbone"]}, texts).pooled
    without = inputs.image_count == 0
    np.testing.assert_allclose(out[without], expected[without], rtol=0, atol=1e-6)
    assert np.abs(out - expected)[~without].max(-1).min() > 1e-3


@pytest.mark.parametrize("positions", fusion.POSITIONS)
@pytest.mark.parametrize("name", TOWERS)
def test_the_order_of_items_and_what_pads_them_do_not_matter(name, positions):
    inputs, weights = items(), params(TOWERS[name][0])
    expected = encode(tower(name, positions=positions), weights, inputs)
    rng = np.random.default_rng(1)
    there = np.arange(T) < inputs.lengths[:, None]
    seen = (np.arange(K) < inputs.image_count[:, None])[..., None]
    other = Inputs(
        np.where(there, inputs.tokens, (inputs.tokens + 3) % 50),
        inputs.lengths,
        np.where(seen, inputs.images, rng.standard_normal(inputs.images.shape)).astype(np.float16),
        inputs.image_count,
    )
    order = rng.permutation(len(inputs.lengths))
    ours = encode(
        tower(name, positions=positions), weights, jax.tree.map(lambda x: x[order], other)
    )
    for field in ("pooled", "unit"):
        np.testing.assert_allclose(
            getattr(ours, field), getattr(expected, field)[order], rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("name", TOWERS)
def test_gaps_move_what_follows_only_where_the_padding_counts(name):
    inputs, weights = items(), params(TOWERS[name][0])
    contiguous, padded = (
        np.asarray(encode(tower(name, positions=positions), weights, inputs).pooled)
        for positions in fusion.POSITIONS
    )
    # A gap at the end moves nothing.
    _, prompts, order = TOWERS[name]
    gaps = inputs.image_count < K
    if order == "text_image" or prompts.tail:
        gaps |= inputs.lengths < T
    np.testing.assert_allclose(contiguous[~gaps], padded[~gaps], rtol=0, atol=1e-6)
    assert (~gaps).any() and np.abs(contiguous - padded)[gaps].max(-1).min() > 1e-5


@pytest.mark.slow
def test_gradients_reach_the_projection_from_what_is_there_alone():
    inputs, weights = items(), params(ENCODER)

    def total(images, params):
        output = encode(tower("encoder"), params, inputs.replace(images=images))
        return jnp.sum(output.pooled**2)

    of_images, of_params = jax.grad(total, (0, 1))(inputs.images.astype(np.float32), weights)
    there = np.arange(K) < inputs.image_count[:, None]
    assert (np.abs(of_images).max(-1) > 0).tolist() == there.tolist()
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(of_params["projection"]))


@pytest.mark.slow
def test_the_projection_is_drawn_as_pytorch_draws_it():
    model = dual.DualEncoder(ENCODER, image_width=400)
    projection = nn.unbox(dual.init_params(model, 0))["projection"]
    assert {name: leaf.shape for name, leaf in projection.items()} == {
        "kernel": (400, 16),
        "bias": (16,),
    }
    for leaf in projection.values():
        assert 0.7 / 20 < np.abs(leaf).max() <= 1 / 20


def test_encoders_refuse_prompts_and_images_behind_the_text():
    for fields, what in (
        ({"prompts": PROMPTS["head"]}, "expected no prefix and no suffix"),
        ({"order": "text_image"}, "fusion.order: expected 'image_text'"),
    ):
        with pytest.raises(ValueError, match=what) as error:
            dual.init_params(dual.DualEncoder(ENCODER, **fields), 0)
        assert "\n" not in str(error.value)


def test_images_must_be_there_and_fit():
    weights = params(ENCODER)
    for model, inputs in (
        (tower("encoder"), items(images=False)),
        (dual.DualEncoder(ENCODER), items()),
        (tower("encoder"), items().replace(images=np.zeros((16, K, E + 1), np.float16))),
    ):
        with pytest.raises(ValueError, match=r"images: expected vectors [05] wide .*, got [056]"):
            encode(model, weights, inputs)


def test_config_errors():
    with pytest.raises(ValueError, match=r"fusion.positions: .*'contiguous', 'padded'.*'absolute'"):
        fusion.FusionConfig(positions="absolute")
    with pytest.raises(ValueError, match=r"fusion.order: .*'text_image', 'image_text'.*'both'"):
        fusion.FusionConfig(order="both")
