"""Losses on cosine similarities: the margin loss with online hard negatives, PRIME's objective and
regulariser, DEXML's decoupled softmax, and the test for a collapsed run. Pure functions of arrays.

Rows without a positive or without a negative contribute 0, and stay in the mean over rows.

Similarities [B, U] are looked at whole where they are small, else in blocks of rows, which are
computed again for the gradient: memory is that of a block, and the results are the same.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from xmc_jax.config import LossConfig
from xmc_jax.runtime import sharding
from xmc_jax.training.state import Pairs

# In order of importance: `violators` is of the first one in use.
_TERMS = (
    "document_to_prototype",
    "document_to_label",
    "label_to_document",
    "prototype_to_document",
)

_OF_LABELS = ("label_to_document", "prototype_to_document")  # whose rows are labels

# Unless `LossConfig.block` says otherwise: up to so many similarities on a device are whole ...
_WHOLE = 2**26
# ... and more are in blocks of so many ...
_BLOCK = 2**24
# ... or of so many documents of a device, if that is more: each block reads all labels.
_DOCUMENTS = 64
# What a block keeps for its gradient: little, and from it the margin loss needs no search again.
_KEPT = "hardest"

# The similarity a softmax weight is made of where the hinge is zero: no weight beside any violator.
# ViXML reference, loss.py.
_NO_VIOLATOR = -50.0

# A run counts as collapsed once, on average, similarities differ by no more than this ...
_SPREAD = 0.01
# ... this share of the negatives violates ...
_VIOLATORS = 0.95
# ... and each margin term lies within this fraction of the minimum margin.
_AT_MINIMUM = 0.1


def num_blocks(documents: int, labels: int, cfg: LossConfig, shards: int = 1) -> int:
    """In how many blocks similarities are computed; see `LossConfig.block`.

    Args:
        documents: B.
        labels: U.
        cfg: see `LossConfig`.
        shards: devices that a batch is split over.

    Raises:
        ValueError: the block does not fit the batch or the devices.
    """
    if cfg.block is not None:
        if documents % cfg.block or cfg.block % shards:
            raise ValueError(
                f"loss.block: expected a divisor of the {documents} documents of a batch and a "
                f"multiple of the {shards} shards it is split into, got {cfg.block}"
            )
        return documents // cfg.block
    rows = documents // shards
    if rows * labels <= _WHOLE:
        return 1
    fewest = -(-rows // max(_BLOCK // labels, _DOCUMENTS))
    return next(n for n in range(fewest, rows + 1) if rows % n == 0)


def similarities(
    pairs: Pairs, rows: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """f32[B, U], cosines of documents and label texts; the same to prototypes; bool[B, U].

    Args:
        pairs: see `Pairs`.
        rows: i32[n], the rows of the batch that the documents of `pairs` are, one after the other;
            None for all of them.
    """
    raw, prototype, relevance = cosines(pairs.document, pairs.label), None, pairs.relevance
    if pairs.prototype is not None:
        prototype = cosines(pairs.document, pairs.prototype)
    if pairs.positives is None:
        return raw, prototype, relevance
    # What moves is a device's share of the labels and all of the documents, nothing of B times U.
    raw = sharding.constrain(raw, None, "batch")
    owners = pairs.owners
    if rows is not None:
        owners = _within(owners - rows[0], len(rows))
    at = (owners, pairs.positives)
    relevance = sharding.constrain(jnp.zeros(raw.shape, bool), None, "batch")
    relevance = relevance.at[at].set(True, mode="drop")
    if prototype is not None:
        prototype = sharding.constrain(prototype, None, "batch")
        prototype = prototype.at[at].set(pairs.own, mode="drop")
    return raw, prototype, relevance


def draw_positive(relevance: jax.Array, key: jax.Array, rows: jax.Array | None = None) -> jax.Array:
    """One positive of each row, uniform among them.

    Args:
        relevance: bool[rows, columns].
        key: device key.
        rows: i32[rows], which rows of a matrix these are, for what is drawn with it whole; None for
            all of it.

    Returns:
        i32[rows], columns; 0 for a row without a positive.
    """
    height, width = relevance.shape
    rows = jnp.arange(height) if rows is None else rows
    # The bits that `jax.random.bits` gives to a place of the matrix, as many as its floats have.
    place = rows.astype(jnp.uint32)[:, None] * jnp.uint32(width) + jnp.arange(width, dtype="uint32")
    halves = jax.random.key_data(jax.vmap(jax.vmap(lambda i: jax.random.fold_in(key, i)))(place))
    bits = (halves[..., 0] ^ halves[..., 1]) >> 9
    scores = jnp.where(relevance, bits.astype(jnp.int32), -1)
    return jnp.argmax(scores, axis=1).astype(jnp.int32)


def margin_loss(
    similarity: jax.Array, relevance: jax.Array, positive: jax.Array, cfg: LossConfig
) -> tuple[jax.Array, jax.Array]:
    """Hinge between one positive and the hardest negatives of each row, with a dynamic margin.

    With d_k = s_p - s_k: margin m_k = clip(|d_k|, margin_min, margin_max) without gradient, hinge
    t_k = max(0, m_k - d_k). A row's loss is sum_k w_k t_k with w = softmax(s_k / temperature) over
    its violators (gradient flows through w), or, unweighted, the mean of its t_k. The loss is the
    mean over rows.

    The hinge is 0 from d_k = margin_min on, but its gradient is not: up to margin_max the margin
    equals d_k, so max(0, x) is taken at x = 0 exactly, where its derivative is 1/2 in JAX as in
    PyTorch. The reference trains with that half gradient, and so do we.

    Args:
        similarity: f32[rows, columns], cosines.
        relevance: bool[rows, columns].
        positive: i32[rows], the column of each row's positive, of `draw_positive`.
        cfg: see `LossConfig`.

    Returns:
        loss: f32[].
        violators: f32[], share of the chosen negatives whose hinge is positive, in [0, 1].

    Source: ViXML reference, loss.py, with `reduction` "custom" when weighted and "mean" when not;
    ViXML eq. 2 is its plain form.
    """
    loss, violators, chosen = _margin_of_rows(similarity, relevance, positive, cfg)
    return jnp.mean(loss), _share(violators, chosen).astype(similarity.dtype)


def decoupled_softmax(similarity: jax.Array, relevance: jax.Array, temperature: float) -> jax.Array:
    """Softmax in which the positives of a row do not compete with each other.

    For each positive j: -log(e^{s_j/t} / (e^{s_j/t} + sum over the row's negatives of e^{s_n/t}));
    the mean over a row's positives, then over rows.

    Args:
        similarity: f32[rows, columns], cosines.
        relevance: bool[rows, columns].
        temperature: t.

    Returns:
        f32[].

    Source: DEXML (Gupta et al., 2024), decoupled softmax.
    """
    return jnp.mean(_softmax_of_rows(similarity, relevance, temperature))


def regularizer(
    raw: jax.Array, prototype: jax.Array, relevance: jax.Array, positive: jax.Array, cfg: LossConfig
) -> jax.Array:
    """Asks prototypes to be closer to positives, and farther from negatives, than label texts are.

    With margin m, one positive p and the hardest negatives n by prototype similarity of each row:
    a = max(0, raw_p - prototype_p + m), b = max(0, prototype_n - raw_n + m); each averaged over its
    non-zero entries in the whole batch (0 if there are none); (a + b) / 2.

    Args:
        raw: f32[B, U], cosines of documents and label texts.
        prototype: f32[B, U], cosines of documents and label prototypes.
        relevance: bool[B, U].
        positive: i32[B], of `draw_positive`.
        cfg: see `LossConfig`.

    Returns:
        f32[].

    Source: PRIME; ViXML reference, loss.py, RegLoss.
    """
    return _regularizer(_regularizer_sums(raw, prototype, relevance, positive, cfg))


def cosines(rows: jax.Array, columns: jax.Array) -> jax.Array:
    """f32[m, n], inner products of unit vectors [m, D] and [n, D], at full precision."""
    return jnp.matmul(_wide(rows), _wide(columns).T, precision="highest")


@jax.named_scope("loss")
def objective(
    pairs: Pairs, key: jax.Array, cfg: LossConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The training objective of a batch.

    With PRIME: the weighted sum of up to four losses and the regulariser, each with positives of
    its own. Without: the term documents -> label texts alone (NGAME), whatever the other weights.

    Args:
        pairs: what is compared.
        key: device key, of the POSITIVE stream.
        cfg: see `LossConfig`.

    Returns:
        loss: f32[].
        metrics: f32[] each. `loss` and its parts before weighting; `violators`; the means over
            relevant and other pairs, `similarity_positive` and `similarity_negative`, and the
            standard deviation over all pairs, `similarity_spread`. The last four are of the
            similarities that retrieval uses: to prototypes with PRIME, to label texts without.
            With the decoupled softmax, `violators` is the share of negatives above their row's
            mean positive.

    Raises:
        ValueError: shapes do not fit, blocks do not, or every weight in use is 0.

    Source: PRIME; ViXML reference, utils.py, train.
    """
    _expect_one_shape(pairs)
    in_use = _TERMS if pairs.prototype is not None else ("document_to_label",)
    terms = [name for name in _TERMS if name in in_use and getattr(cfg, name) > 0]
    if not terms:
        raise ValueError(
            "objective: every loss weight in use is 0; set --config.loss.document_to_label=1.0"
        )
    size, width = len(pairs.document), len(pairs.label)
    blocks = num_blocks(size, width, cfg, sharding.groups())
    if blocks == 1:
        found = _whole(pairs, terms, key, cfg)
    else:
        found = _in_blocks(pairs, terms, key, cfg, blocks)

    judged = found["judged"]
    dtype = judged["mean"].dtype
    loss, metrics = jnp.zeros((), dtype), {}
    for name in terms:
        rows = found[name]
        if cfg.kind == "margin":
            metrics.setdefault("violators", _share(rows["violators"], rows["chosen"]).astype(dtype))
        metrics[name] = jnp.mean(rows["loss"])
        loss += getattr(cfg, name) * metrics[name]
    if "regularizer" in found:
        metrics["regularizer"] = _regularizer(found["regularizer"])
        loss += cfg.regularizer * metrics["regularizer"]
    # As floats: the sums of these counts may be too large for integers.
    positives = judged["positives"].astype(dtype)
    negatives = width - positives
    if cfg.kind == "decoupled_softmax":
        metrics["violators"] = _share(judged["violators"].astype(dtype), negatives)
    metrics["loss"] = loss
    metrics["similarity_positive"] = _share(judged["positive_sum"], positives)
    metrics["similarity_negative"] = _share(judged["negative_sum"], negatives)
    # The variance within rows and that between them; whole, the latter is 0.
    metrics["similarity_spread"] = jnp.sqrt(jnp.mean(judged["variance"]) + jnp.var(judged["mean"]))
    return loss, metrics


def collapse(
    metrics: Mapping[str, float], cfg: LossConfig, first_spread: float = math.inf
) -> str | None:
    """Whether a run has collapsed: every text has the same embedding, and the loss cannot undo it.

    Args:
        metrics: means of `objective`'s metrics over the latest steps: an epoch, or its last
            quarter, which sees a collapse that began within the epoch.
        cfg: the objective in use.
        first_spread: "similarity_spread" of the run's first steps. Embeddings of an untrained tower
            may be as close together as collapsed ones; training moves them apart.

    Returns:
        What is seen and what to do about it, one line; None for a sound run.
    """
    if metrics["similarity_spread"] > _SPREAD:
        return None
    seen = f"all similarities are {metrics['similarity_negative']:.3f} or nearly so"
    if cfg.kind == "margin":
        terms = [metrics[name] for name in _TERMS if name in metrics]
        limit = _AT_MINIMUM * cfg.margin_min
        # Embeddings of an untrained decoder are as close together, but their hinges are not
        # minimal.
        at_minimum = all(abs(term - cfg.margin_min) <= limit for term in terms)
        if metrics["violators"] < _VIOLATORS or not at_minimum:
            return None
        seen += (
            f", every loss term is at the minimum margin {cfg.margin_min:g}, and "
            f"{100 * metrics['violators']:.0f} % of the negatives violate"
        )
    elif metrics["similarity_spread"] >= first_spread:
        return None
    remedies = ["a larger batch", "a smaller learning rate"]
    if cfg.kind == "margin" and (cfg.weighted or cfg.num_negatives < 200):
        flags = "--config.loss.num_negatives=200 --config.loss.weighted=False"
        remedies.insert(0, f"more negatives and their plain mean ({flags})")
    return f"training has collapsed: {seen}; start again with {', '.join(remedies)}"


def _expect_one_shape(pairs: Pairs) -> None:
    judged = pairs.label if pairs.prototype is None else pairs.prototype
    size = len(pairs.document)
    shapes = [(size, len(pairs.label)), (size, len(judged))]
    if pairs.relevance is not None:
        shapes.append(pairs.relevance.shape)
    if len(set(shapes)) > 1:
        raise ValueError(
            "objective: expected raw, prototype and relevance of one shape [B, U], got "
            f"{', '.join(map(str, shapes[:2]))} and {shapes[-1]}"
        )


def _whole(pairs: Pairs, terms: Sequence[str], key: jax.Array, cfg: LossConfig) -> dict[str, Any]:
    """What `objective` is made of: terms by row, and sums of the rest."""
    raw, prototype, relevance = similarities(pairs)
    found = _of_documents(raw, prototype, relevance, terms, key, cfg)
    if not set(terms).isdisjoint(_OF_LABELS):
        similarity = dict(zip(_OF_LABELS, (_transposed(raw), _transposed(prototype))))
        found |= _by_term(similarity, _transposed(relevance), terms, key, cfg)
    return found


def _in_blocks(
    pairs: Pairs, terms: Sequence[str], key: jax.Array, cfg: LossConfig, blocks: int
) -> dict[str, Any]:
    """As `_whole`, all of it by row: blocks of documents, then blocks of labels."""
    pairs = jax.tree.map(_wide, pairs)  # gradients are summed over blocks
    labels = (pairs.label, pairs.prototype)
    documents = (pairs.document, pairs.relevance, jnp.arange(len(pairs.document)))

    def of_documents(labels: tuple, documents: tuple) -> dict[str, Any]:
        def of_block(block: tuple) -> dict[str, Any]:
            document, relevance, rows = block
            compared = pairs.replace(
                document=document, label=labels[0], prototype=labels[1], relevance=relevance
            )
            return _of_documents(*similarities(compared, rows), terms, key, cfg, rows)

        return _by_block(of_block, documents, blocks)

    if pairs.positives is None:
        found = sharding.on_shards(of_documents, labels, documents)
    else:  # all labels stay where they are, and documents go to them
        found = of_documents(labels, jax.tree.map(sharding.constrain, documents))
    if not set(terms).isdisjoint(_OF_LABELS):
        found |= _labels_in_blocks(pairs, terms, key, cfg, blocks)
    return found


def _labels_in_blocks(
    pairs: Pairs, terms: Sequence[str], key: jax.Array, cfg: LossConfig, blocks: int
) -> dict[str, Any]:
    count = len(pairs.label)
    missing = -count % (blocks * sharding.groups())
    labels = (pairs.label, pairs.prototype)
    if missing:  # rows without positives, which give 0
        labels = jax.tree.map(lambda x: jnp.pad(x, [(0, missing), (0, 0)]), labels)
    relevance = None if pairs.relevance is None else _transposed(pairs.relevance)
    labels = (*labels, relevance, jnp.arange(count + missing))

    def of_labels(documents: Pairs, labels: tuple) -> dict[str, Any]:
        def of_block(block: tuple) -> dict[str, Any]:
            label, prototype, relevance, rows = block
            raw = cosines(label, documents.document)
            prototype = cosines(prototype, documents.document)
            if relevance is None:
                positives = jnp.where(documents.positives < count, documents.positives, -1)
                at = (_within(positives - rows[0], len(rows)), documents.owners)
                relevance = jnp.zeros(raw.shape, bool).at[at].set(True, mode="drop")
                prototype = prototype.at[at].set(documents.own, mode="drop")
            similarity = dict(zip(_OF_LABELS, (raw, prototype)))
            return _by_term(similarity, relevance, terms, key, cfg, rows)

        return _by_block(of_block, labels, blocks)

    documents = pairs.replace(label=None, prototype=None, relevance=None)
    found = sharding.on_shards(of_labels, documents, labels)
    return jax.tree.map(lambda x: x[:count], found)


def _by_block(function: Callable[[Any], Any], rows: Any, blocks: int) -> Any:
    """`function`, from some rows to arrays [m], of one block of rows after the other."""
    parts = jax.tree.map(lambda x: x.reshape(blocks, -1, *x.shape[1:]), rows)
    kept = jax.checkpoint_policies.save_only_these_names(_KEPT)
    function = jax.checkpoint(function, policy=kept, prevent_cse=False)  # a loop keeps them apart
    return jax.tree.map(lambda x: x.reshape(-1), jax.lax.map(function, parts))


def _of_documents(
    raw: jax.Array,
    prototype: jax.Array | None,
    relevance: jax.Array,
    terms: Sequence[str],
    key: jax.Array,
    cfg: LossConfig,
    rows: jax.Array | None = None,
) -> dict[str, Any]:
    """Terms by row, and sums of the rest: by row, too, where rows are given, a part of a batch."""
    axis = None if rows is None else 1
    similarity = {"document_to_label": raw, "document_to_prototype": prototype}
    found: dict[str, Any] = _by_term(similarity, relevance, terms, key, cfg, rows)
    if prototype is not None and cfg.regularizer > 0:
        positive = _positive(relevance, len(_TERMS), key, rows)
        found["regularizer"] = _regularizer_sums(raw, prototype, relevance, positive, cfg, axis)

    judged = jax.lax.stop_gradient(raw if prototype is None else prototype)
    positives = jnp.sum(relevance, axis=1)
    found["judged"] = {
        "positives": positives,
        "positive_sum": jnp.sum(jnp.where(relevance, judged, 0), axis=axis),
        "negative_sum": jnp.sum(jnp.where(~relevance, judged, 0), axis=axis),
        "mean": jnp.mean(judged, axis=axis),
        "variance": jnp.var(judged, axis=axis),
    }
    if cfg.kind == "decoupled_softmax":
        total = jnp.sum(jnp.where(relevance, judged, 0), axis=1)
        mean = (total / jnp.maximum(positives, 1))[:, None]
        found["judged"]["violators"] = jnp.sum((judged > mean) & ~relevance, axis=1)
    return found


def _by_term(
    similarity: Mapping[str, jax.Array | None],
    relevance: jax.Array,
    terms: Sequence[str],
    key: jax.Array,
    cfg: LossConfig,
    rows: jax.Array | None = None,
) -> dict[str, dict[str, jax.Array]]:
    """Each term's loss by row, and how many negatives violate, of how many."""
    found = {}
    for name in (name for name in similarity if name in terms):
        if cfg.kind == "decoupled_softmax":
            loss = _softmax_of_rows(similarity[name], relevance, cfg.softmax_temperature)
            found[name] = {"loss": loss}
        else:
            positive = _positive(relevance, _TERMS.index(name), key, rows)
            of_rows = _margin_of_rows(similarity[name], relevance, positive, cfg)
            found[name] = dict(zip(("loss", "violators", "chosen"), of_rows))
    return found


def _positive(relevance: jax.Array, term: int, key: jax.Array, rows: jax.Array | None) -> jax.Array:
    return _keep(draw_positive(relevance, jax.random.fold_in(key, term), rows))


def _margin_of_rows(
    similarity: jax.Array, relevance: jax.Array, positive: jax.Array, cfg: LossConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Each row's loss, how many of its negatives violate, and of how many."""
    # Departs: where a row has fewer than num_negatives negatives, the reference fills up with its
    # positives; here it has fewer terms, and the plain mean is over those.
    columns, valid = _hardest(similarity, relevance, cfg.num_negatives)
    s_p = _take(similarity, positive[:, None])
    s_n = _take(similarity, columns)
    gap = s_p - s_n
    margin = jax.lax.stop_gradient(jnp.clip(jnp.abs(gap), cfg.margin_min, cfg.margin_max))
    hinge = jnp.where(valid, jnp.maximum(margin - gap, 0), 0)
    chosen = jnp.sum(valid, axis=1)
    if cfg.weighted:
        logits = jnp.where(hinge > 0, s_n, _NO_VIOLATOR) / cfg.weight_temperature
        loss = jnp.sum(jax.nn.softmax(logits, axis=1) * hinge, axis=1)
    else:
        loss = jnp.sum(hinge, axis=1) / jnp.maximum(chosen, 1)
    return loss, jnp.sum(hinge > 0, axis=1), chosen


def _softmax_of_rows(similarity: jax.Array, relevance: jax.Array, temperature: float) -> jax.Array:
    logits = similarity / temperature
    negatives = jax.nn.logsumexp(jnp.where(relevance, -jnp.inf, logits), axis=1, keepdims=True)
    losses = jnp.where(relevance, jax.nn.softplus(negatives - logits), 0)
    return jnp.sum(losses, axis=1) / jnp.maximum(jnp.sum(relevance, axis=1), 1)


def _regularizer_sums(
    raw: jax.Array,
    prototype: jax.Array,
    relevance: jax.Array,
    positive: jax.Array,
    cfg: LossConfig,
    axis: int | None = None,
) -> tuple[tuple[jax.Array, jax.Array], ...]:
    """Sum and number of the non-zero entries, of positives and of negatives."""
    columns, valid = _hardest(prototype, relevance, cfg.num_negatives)
    gain_p = _take(prototype - raw, positive[:, None])
    gain_n = _take(prototype - raw, columns)
    has_positive = _keep(jnp.any(relevance, axis=1, keepdims=True))
    a = jnp.where(has_positive, jnp.maximum(cfg.regularizer_margin - gain_p, 0), 0)
    b = jnp.where(valid, jnp.maximum(cfg.regularizer_margin + gain_n, 0), 0)
    return tuple((jnp.sum(x, axis=axis), jnp.sum(x > 0, axis=axis)) for x in (a, b))


def _regularizer(sums: tuple[tuple[jax.Array, jax.Array], ...]) -> jax.Array:
    a, b = (_share(total, count) for total, count in sums)
    return (a + b) / 2


def _hardest(
    similarity: jax.Array, relevance: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """The `count` most similar negatives of each row, ties to the lower column, and which exist."""
    has_positive = jnp.any(relevance, axis=1, keepdims=True)
    usable = ~relevance & has_positive
    width = similarity.shape[1]
    if count >= width:  # all of them: nothing to sort
        return jnp.broadcast_to(jnp.arange(width), similarity.shape), usable
    masked = jnp.where(usable, jax.lax.stop_gradient(similarity), -jnp.inf)
    values, columns = sharding.by_row(lambda rows: jax.lax.top_k(rows, count), masked)
    # True for NaN, so that a broken run shows in its loss.
    return _keep(columns), _keep(values != -jnp.inf)


def _within(index: jax.Array, length: int) -> jax.Array:
    """An index, but `length` for those outside [0, length): what is written there is dropped."""
    return jnp.where((index >= 0) & (index < length), index, length)


def _transposed(x: jax.Array) -> jax.Array:
    # Its rows over the devices again: the hardest of a row are found where the row is.
    return sharding.constrain(x.T, "batch")


def _take(similarity: jax.Array, columns: jax.Array) -> jax.Array:
    taken = jnp.take_along_axis(similarity, columns, axis=1)
    return _keep(taken) if taken.shape[1] < similarity.shape[1] else taken


def _keep(x: jax.Array) -> jax.Array:
    return checkpoint_name(x, _KEPT)


def _share(part: jax.Array, of: jax.Array) -> jax.Array:
    return jnp.sum(part) / jnp.maximum(jnp.sum(of), 1)


def _wide(x: jax.Array) -> jax.Array:
    """At least float32, if it is a float."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
