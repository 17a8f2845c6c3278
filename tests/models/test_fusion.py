"""Prompts, texts and images as one sequence: against numpy, and what the towers make of them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xmc_jax.data import rows
from xmc_jax.data.types import ORDERS, Inputs, Prompts
from xmc_jax.models import dual, fusion
from xmc_jax.models.bert import BertConfig
from xmc_jax.models.decoder_config import DecoderConfig
from xmc_jax.models.segments import POOLINGS

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
def test_rows_by_a_loop(name, order, positions, images):
    prompts = PROMPTS[name]
    inputs = items(shortest=0 if prompts.head or prompts.tail else 1, images=images)
    layout = rows.layout(prompts, order, positions, T, K if images else 0, 64)
    fitted = rows.fit(layout, layout.own_tokens(inputs))
    made = rows.compose(layout, inputs, fitted, fitted.rows + 1)
    head, (count, R) = len(prompts.head), made.tokens.shape
    assert made.head == head and count < len(inputs.lengths) and R % 64 == 0
    assert all(x.dtype == np.int32 for x in (made.tokens, made.segments, made.positions))
    assert (made.tokens[:, :head] == prompts.head).all() and (made.segments[:, :head] < 0).all()
    assert (made.positions[:, :head] == np.arange(head)).all()
    written = np.zeros((count, R), bool)
    written[:, :head] = True
    image_at = (
        {}
        if made.image_places is None
        else {place: pair for pair, place in np.ndenumerate(made.image_places) if place < count * R}
    )
    for item, (sequence, places) in enumerate(by_a_loop(inputs, prompts, order)):
        row, number = divmod(made.slots[item], made.per_row)
        mine = np.flatnonzero(made.segments[row] == number)
        own = sequence[head:]
        assert len(mine) == len(own) and (np.diff(mine) == 1).all()
        assert not written[row, mine].any()
        written[row, mine] = True
        expected = places[head:] if positions == "padded" else range(head, len(sequence))
        assert made.positions[row, mine].tolist() == list(expected)
        for place, piece in zip(mine, own):
            if isinstance(piece, tuple):
                assert made.tokens[row, place] == -1
                assert image_at.pop(row * R + place) == (item, piece[1])
            else:
                assert made.tokens[row, place] == piece
    assert not image_at and (made.segments[~written] == -1).all()
    assert (made.tokens[~written] == -1).all()
    for x in (made.slots, made.image_places):
        assert x is None or len(np.unique(x)) == x.size


def tower(name, **fields):
    return dual.DualEncoder(TOWERS[name][0], image_width=E, **fields)


@functools.cache
def params(sizes, image_width=E):
    """Random; norms and biases too."""
    model = dual.DualEncoder(sizes, image_width=image_width)
    boxed = jax.eval_shape(lambda: dual.init_params(model, 0))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), nn.unbox(boxed)
    )


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, inputs):
    return model.apply({"params": params}, inputs, method="encode")


def encode(name, params, inputs, positions="contiguous", **fields):
    """Items in rows of their own."""
    _, prompts, order = TOWERS[name]
    return apply(tower(name, **fields), params, rows.one_each(inputs, prompts, order, positions))


@functools.partial(jax.jit, static_argnums=0)
def run(sizes, params, vectors, positions):
    """The backbone over one item's embeddings as they are, none of them a token's."""
    S = vectors.shape[0]
    zeros, numbers = jnp.zeros((1, S), jnp.int32), jnp.arange(S)[None]
    return dual.DualEncoder(sizes).apply(
        {"params": {"backbone": params["backbone"]}},
        method=lambda model: model.backbone(
            zeros, zeros, positions[None], images=(vectors[None], numbers)
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
    inputs, weights = items(n=5), params(sizes)  # a program is compiled for each length
    table, projection = weights["backbone"]["token_embedding"], weights["projection"]
    projected = inputs.images.astype(np.float32) @ projection["kernel"] + projection["bias"]
    hidden = []
    for row, (sequence, places) in enumerate(by_a_loop(inputs, prompts, order)):
        vectors = [
            projected[row, piece[1]] if isinstance(piece, tuple) else table[piece]
            for piece in sequence
        ]
        at = np.array(places if positions == "padded" else range(len(sequence)), np.int32)
        hidden.append(run(sizes, weights, np.stack(vectors), at))
    expected = {
        "mean": [x.mean(0) for x in hidden],
        "cls": [x[0] for x in hidden],
        "last": [x[-1] for x in hidden],
        "max": [x.max(0) for x in hidden],
    }
    assert set(expected) == set(POOLINGS)
    for pooling, vectors in expected.items():
        out = encode(name, weights, inputs, positions, pooling=pooling)
        np.testing.assert_allclose(out.pooled, np.stack(vectors), rtol=0, atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(out.unit, axis=1), 1, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", TOWERS)
def test_an_item_without_images_is_its_text_in_the_same_template(name):
    sizes, prompts, order = TOWERS[name]
    inputs, weights = items(), params(sizes)
    out = encode(name, weights, inputs).pooled
    head, tail = prompts.head, prompts.middle + prompts.tail
    if order == "image_text":
        head, tail = prompts.head + prompts.middle, prompts.tail
    texts = rows.one_each(Inputs(inputs.tokens, inputs.lengths), Prompts(head, (), tail), order)
    text_only = dual.DualEncoder(sizes)
    expected = apply(text_only, {"backbone": weights["backbone"]}, texts).pooled
    without = inputs.image_count == 0
    np.testing.assert_allclose(out[without], expected[without], rtol=0, atol=1e-6)
    assert np.abs(out - expected)[~without].max(-1).min() > 1e-3


@pytest.mark.parametrize("positions", fusion.POSITIONS)
@pytest.mark.parametrize("name", TOWERS)
def test_the_order_of_items_and_what_pads_them_do_not_matter(name, positions):
    inputs, weights = items(), params(TOWERS[name][0])
    expected = encode(name, weights, inputs, positions)
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
    ours = encode(name, weights, jax.tree.map(lambda x: x[order], other), positions)
    for field in ("pooled", "unit"):
        np.testing.assert_allclose(
            getattr(ours, field), getattr(expected, field)[order], rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("name", TOWERS)
def test_gaps_move_what_follows_only_where_the_padding_counts(name):
    inputs, weights = items(), params(TOWERS[name][0])
    contiguous, padded = (
        np.asarray(encode(name, weights, inputs, positions).pooled)
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
    made = rows.one_each(inputs)

    def total(images, params):
        output = apply(tower("encoder"), params, made.replace(images=images))
        return jnp.sum(output.pooled**2)

    of_images, of_params = jax.grad(total, (0, 1))(inputs.images.astype(np.float32), weights)
    there = np.arange(K) < inputs.image_count[:, None]
    assert (np.abs(of_images).max(-1) > 0).tolist() == there.tolist()
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(of_params["projection"]))


@pytest.mark.slow
def test_the_projection_is_drawn_as_pytorch_draws_it():
    model = dual.DualEncoder(ENCODER, image_width=400)
    projection = nn.unbox(jax.jit(lambda: dual.init_params(model, 0))())["projection"]
    assert {name: leaf.shape for name, leaf in projection.items()} == {
        "kernel": (400, 16),
        "bias": (16,),
    }
    for leaf in projection.values():
        assert 0.7 / 20 < np.abs(leaf).max() <= 1 / 20


def test_what_a_backbone_does_not_take_is_refused():
    for arguments, what in (
        ((False, 9, 12, PROMPTS["head"], "image_text"), "expected no prefix and no suffix"),
        ((False, 9, 12, fusion.NO_PROMPTS, "text_image"), "fusion.order: expected 'image_text'"),
        (
            (False, 13, 12, fusion.NO_PROMPTS, "image_text"),
            "most 12 tokens, images included, got 13",
        ),
        ((True, 13, 12, PROMPTS["head"], "text_image"), "most 12 tokens, prompts included, got 13"),
    ):
        with pytest.raises(ValueError, match=what) as error:
            fusion.check(*arguments)
        assert "\n" not in str(error.value)
    fusion.check(True, 12, 12, PROMPTS["all"], "text_image")


def test_images_must_be_there_and_fit():
    weights = params(ENCODER)
    for model, inputs in (
        (tower("encoder"), items(images=False)),
        (dual.DualEncoder(ENCODER), items()),
        (tower("encoder"), items().replace(images=np.zeros((16, K, E + 1), np.float16))),
    ):
        with pytest.raises(ValueError, match=r"images: expected vectors [05] wide .*, got [056]"):
            apply(model, weights, rows.one_each(inputs))
