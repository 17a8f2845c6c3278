"""The training objective: losses of documents, label texts and label prototypes, and PRIME's
regulariser.

Similarities [B, U] are looked at whole where they are small, else in blocks of rows, which are
computed again for the gradient: memory is that of a block, and the results are the same.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from xmc_jax.config import LossConfig
from xmc_jax.runtime import sharding
from xmc_jax.training import losses
from xmc_jax.training.state import Pairs

_OF_LABELS = ("label_to_document", "prototype_to_document")  # whose rows are labels

# Unless `LossConfig.block` says otherwise: up to so many similarities on a device are whole ...
_WHOLE = 2**26
# ... and more are in blocks of so many ...
_BLOCK = 2**24
# ... or of so many documents of a device, if that is more: each block reads all labels.
_DOCUMENTS = 64


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
        prototype = prototype.at[at].set(pairs.positive_cosines, mode="drop")
    return raw, prototype, relevance


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
            What a violator is says the loss.

    Raises:
        ValueError: shapes do not fit, blocks do not, or every weight in use is 0.

    Source: PRIME; ViXML reference, utils.py, train.
    """
    _expect_one_shape(pairs)
    in_use = losses.TERMS if pairs.prototype is not None else ("document_to_label",)
    terms = [name for name in losses.TERMS if name in in_use and getattr(cfg, name) > 0]
    if not terms:
        raise ValueError(
            "objective: every loss weight in use is 0; set --config.loss.document_to_label=1.0"
        )
    size, width = len(pairs.document), len(pairs.label)
    blocks = num_blocks(size, width, cfg, sharding.groups())
    if blocks == 1:
        parts = _whole(pairs, terms, key, cfg)
    else:
        parts = _in_blocks(pairs, terms, key, cfg, blocks)

    similarity, first = parts["similarity"], parts[terms[0]]
    dtype = similarity["mean"].dtype
    metrics = {name: jnp.mean(parts[name].loss) for name in terms}
    metrics["violators"] = _share(first.violators, first.negatives).astype(dtype)
    loss = sum(getattr(cfg, name) * metrics[name] for name in terms)
    if "regularizer" in parts:
        metrics["regularizer"] = _regularizer(parts["regularizer"])
        loss += cfg.regularizer * metrics["regularizer"]
    # As floats: the sums of these counts may be too large for integers.
    positives = similarity["positives"].astype(dtype)
    metrics["loss"] = loss
    metrics["similarity_positive"] = _share(similarity["positive_sum"], positives)
    metrics["similarity_negative"] = _share(similarity["negative_sum"], width - positives)
    # The variance within rows and that between them; whole, the latter is 0.
    variance = jnp.mean(similarity["variance"]) + jnp.var(similarity["mean"])
    metrics["similarity_spread"] = jnp.sqrt(variance)
    return loss, metrics


def _expect_one_shape(pairs: Pairs) -> None:
    prototype = pairs.label if pairs.prototype is None else pairs.prototype
    size = len(pairs.document)
    shapes = [(size, len(pairs.label)), (size, len(prototype))]
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
    parts = _of_documents(raw, prototype, relevance, terms, key, cfg)
    if not set(terms).isdisjoint(_OF_LABELS):
        similarity = dict(zip(_OF_LABELS, (_transposed(raw), _transposed(prototype))))
        parts |= _by_term(similarity, _transposed(relevance), terms, key, cfg)
    return parts


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
        parts = sharding.on_shards(of_documents, labels, documents)
    else:  # all labels stay where they are, and documents go to them
        parts = of_documents(labels, jax.tree.map(sharding.constrain, documents))
    if not set(terms).isdisjoint(_OF_LABELS):
        parts |= _labels_in_blocks(pairs, terms, key, cfg, blocks)
    return parts


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
                prototype = prototype.at[at].set(documents.positive_cosines, mode="drop")
            similarity = dict(zip(_OF_LABELS, (raw, prototype)))
            return _by_term(similarity, relevance, terms, key, cfg, rows)

        return _by_block(of_block, labels, blocks)

    documents = pairs.replace(label=None, prototype=None, relevance=None)
    parts = sharding.on_shards(of_labels, documents, labels)
    return jax.tree.map(lambda x: x[:count], parts)


def _by_block(function: Callable[[Any], Any], rows: Any, blocks: int) -> Any:
    """`function`, from some rows to arrays [m], of one block of rows after the other."""
    parts = jax.tree.map(lambda x: x.reshape(blocks, -1, *x.shape[1:]), rows)
    kept = jax.checkpoint_policies.save_only_these_names(losses.KEPT)
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
    parts: dict[str, Any] = _by_term(similarity, relevance, terms, key, cfg, rows)
    if prototype is not None and cfg.regularizer > 0:
        positive = _positive(relevance, "regularizer", key, rows)
        parts["regularizer"] = _regularizer_sums(raw, prototype, relevance, positive, cfg, axis)

    ranked_by = jax.lax.stop_gradient(raw if prototype is None else prototype)
    parts["similarity"] = {
        "positives": jnp.sum(relevance, axis=1),
        "positive_sum": jnp.sum(jnp.where(relevance, ranked_by, 0), axis=axis),
        "negative_sum": jnp.sum(jnp.where(~relevance, ranked_by, 0), axis=axis),
        "mean": jnp.mean(ranked_by, axis=axis),
        "variance": jnp.var(ranked_by, axis=axis),
    }
    return parts


def _by_term(
    similarity: Mapping[str, jax.Array | None],
    relevance: jax.Array,
    terms: Sequence[str],
    key: jax.Array,
    cfg: LossConfig,
    rows: jax.Array | None = None,
) -> dict[str, losses.RowLosses]:
    """Each term's losses by row."""
    loss = losses.find(cfg.kind)
    return {
        name: loss.rows(similarity[name], relevance, _positive(relevance, name, key, rows), cfg)
        for name in similarity
        if name in terms
    }


def _positive(relevance: jax.Array, term: str, key: jax.Array, rows: jax.Array | None) -> jax.Array:
    """A positive of each row, drawn for one term, or for the regulariser."""
    number = [*losses.TERMS, "regularizer"].index(term)
    return losses.keep(losses.draw_positive(relevance, jax.random.fold_in(key, number), rows))


def _regularizer_sums(
    raw: jax.Array,
    prototype: jax.Array,
    relevance: jax.Array,
    positive: jax.Array,
    cfg: LossConfig,
    axis: int | None = None,
) -> tuple[tuple[jax.Array, jax.Array], ...]:
    """Sum and number of the non-zero entries, of positives and of negatives."""
    columns, valid = losses.hardest(prototype, relevance, cfg.num_negatives)
    gain_p = losses.take(prototype - raw, positive[:, None])
    gain_n = losses.take(prototype - raw, columns)
    has_positive = losses.keep(jnp.any(relevance, axis=1, keepdims=True))
    a = jnp.where(has_positive, jnp.maximum(cfg.regularizer_margin - gain_p, 0), 0)
    b = jnp.where(valid, jnp.maximum(cfg.regularizer_margin + gain_n, 0), 0)
    return tuple((jnp.sum(x, axis=axis), jnp.sum(x > 0, axis=axis)) for x in (a, b))


def _regularizer(sums: tuple[tuple[jax.Array, jax.Array], ...]) -> jax.Array:
    a, b = (_share(total, count) for total, count in sums)
    return (a + b) / 2


def _within(index: jax.Array, length: int) -> jax.Array:
    """An index, but `length` for those outside [0, length): what is written there is dropped."""
    return jnp.where((index >= 0) & (index < length), index, length)


def _transposed(x: jax.Array) -> jax.Array:
    # Its rows over the devices again: the hardest of a row are found where the row is.
    return sharding.constrain(x.T, "batch")


def _share(part: jax.Array, of: jax.Array) -> jax.Array:
    return jnp.sum(part) / jnp.maximum(jnp.sum(of), 1)


def _wide(x: jax.Array) -> jax.Array:
    """At least float32, if it is a float."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
