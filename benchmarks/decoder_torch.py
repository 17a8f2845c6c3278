"""The decoder's training step by transformers and peft on PyTorch, for `benchmarks.decoder_peer`.

The same work as the step of `benchmarks.decoder_step`, on the same batches, written as one would
with these libraries: documents and labels through the model of transformers in as many chunks, its
base frozen in --dtype, adapters of peft in float32 under autocast, mean pooling; gradient caching
in two passes (embeddings without gradient, the loss of all, then each chunk again with the gradient
of its embeddings); PRIME's combiner, free vectors and four-part loss; clipping, AdamW with a linear
schedule, the write to the document bank.

Where there was a choice, it is what makes PyTorch faster: fused scaled dot-product attention
without a mask, which causal attention over texts padded on the right does not need; a fused AdamW;
TF32 for what is float32; activations kept within a chunk. Nothing is compiled.

Needs torch, transformers and peft besides.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import peft
import torch
import transformers
from torch import nn

from benchmarks.decoder_workload import EPOCHS, DrawnBatch, Settings, batch_of
from xmc_jax.config import LossConfig
from xmc_jax.data.types import Inputs, Prompts
from xmc_jax.models import backbone
from xmc_jax.models.decoder_config import DecoderConfig

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_NO_VIOLATOR = -50.0  # as in `xmc_jax.training.losses`
_WARM_UP = 100  # steps of the schedule


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Items that are encoded together.

    Attributes:
        tokens: i64[n, S], prompts included; 0 where an image stands, and as padding.
        lengths: i64[n].
        images: f16[n, K, E], or None.
        first_image: i64[n], the place of each item's first image.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    images: torch.Tensor | None
    first_image: torch.Tensor

    def to(self, device: torch.device) -> "Chunk":
        """The same on a device."""
        fields = (getattr(self, field.name) for field in dataclasses.fields(self))
        return Chunk(*(None if x is None else x.to(device) for x in fields))


@dataclasses.dataclass(frozen=True)
class TorchBatch:
    """A batch on the device: n chunks, each of every n-th document and, after those, their labels.

    Attributes:
        chunks: as they are encoded.
        document_ids: i64[B].
        label_ids: i64[B].
        relevance: bool[B, B].
    """

    chunks: list[Chunk]
    document_ids: torch.Tensor
    label_ids: torch.Tensor
    relevance: torch.Tensor

    @property
    def positions(self) -> int:
        """Places that are computed, padding included, once forward."""
        return sum(chunk.tokens.numel() for chunk in self.chunks)


def collate(items: Inputs, prompts: Prompts, width: int | None) -> Chunk:
    """Items as the model takes them: head, text, middle, images, tail, padded on the right.

    Args:
        items: numpy arrays, of the order "text_image".
        prompts: around each.
        width: places of each; None is as many as the longest takes.
    """
    rows, first_image = [], []
    for number, (tokens, length) in enumerate(zip(items.tokens, items.lengths)):
        before = [*prompts.head, *tokens[:length], *prompts.middle]
        count = 0 if items.images is None else items.image_count[number]
        first_image.append(len(before))
        rows.append([*before, *[0] * count, *prompts.tail])
    lengths = [len(row) for row in rows]
    tokens = np.zeros((len(rows), width or max(lengths)), np.int64)
    for row, content in zip(tokens, rows):
        row[: len(content)] = content
    images = None if items.images is None else torch.from_numpy(items.images)
    return Chunk(torch.from_numpy(tokens), torch.tensor(lengths), images, torch.tensor(first_image))


class Tower(nn.Module):
    """Items to pooled embeddings: base, adapters, projection of images.

    Args:
        settings: what is measured.
        sizes: of the decoder.
        checkpointing: whether a layer's activations are computed again in the backward pass.
    """

    def __init__(self, settings: Settings, sizes: DecoderConfig, checkpointing: bool):
        super().__init__()
        fields = backbone.to_hf(sizes) | dict.fromkeys(("bos_token_id", "eos_token_id"))
        kind = fields.pop("model_type")
        base = transformers.AutoModel.from_config(
            transformers.AutoConfig.for_model(kind, **fields, use_cache=False),
            attn_implementation="sdpa",
            dtype=getattr(torch, settings.dtype),
        )
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        adapters = peft.LoraConfig(
            r=settings.lora_rank,
            lora_alpha=256,
            use_rslora=True,
            target_modules=list(TARGETS),
        )
        self.model = peft.get_peft_model(base, adapters)
        self.projection = None
        if settings.images:
            self.projection = nn.Linear(settings.image_width, sizes.hidden)

    def forward(self, chunk: Chunk) -> torch.Tensor:
        """f32[n, D], the mean over each item's tokens."""
        x = self.model.get_input_embeddings()(chunk.tokens)
        places = torch.arange(x.shape[1], device=x.device)
        if self.projection is not None:
            images = self.projection(chunk.images.to(x.dtype)).to(x.dtype)
            for k in range(images.shape[1]):
                here = places == chunk.first_image[:, None] + k
                x = torch.where(here[..., None], images[:, k, None], x)
        hidden = self.model(inputs_embeds=x).last_hidden_state.float()
        real = (places < chunk.lengths[:, None])[..., None]
        return (hidden * real).sum(1) / chunk.lengths[:, None]


class TorchStep(nn.Module):
    """The training step.

    Args:
        settings: what is measured.
        sizes: of the decoder.
        platform: "cpu" or "gpu".
        checkpointing: see `Tower`.
    """

    def __init__(
        self,
        settings: Settings,
        sizes: DecoderConfig,
        platform: str,
        checkpointing: bool = False,
    ):
        super().__init__()
        s = self.settings = settings
        self.sizes, self.loss = sizes, LossConfig()
        self.device = torch.device("cpu" if platform == "cpu" else "cuda")
        torch.manual_seed(s.seed)
        torch.set_float32_matmul_precision("high")
        with self.device:
            self.tower = Tower(s, sizes, checkpointing)
            self.combiner = nn.TransformerEncoderLayer(
                sizes.hidden,
                s.combiner_heads,
                s.combiner_ff,
                s.combiner_dropout,
                "gelu",
                batch_first=True,
            )
            self.free_vectors = nn.Parameter(torch.empty(s.free_vectors, sizes.hidden))
            nn.init.xavier_uniform_(self.free_vectors)
            self.free_vector_of = torch.arange(s.labels) % s.free_vectors
            self.centroids = torch.randn(s.labels, sizes.hidden) * sizes.hidden**-0.5
            self.bank = torch.zeros(s.documents, sizes.hidden)
        self.train()
        adapters = [p for p in self.tower.model.parameters() if p.requires_grad]
        others = [p for name, p in self.named_parameters() if not name.startswith("tower.model.")]
        self.trained = adapters + others
        self.optimizer = torch.optim.AdamW(
            [{"params": adapters, "lr": 5e-5}, {"params": others, "lr": 5e-4}],
            eps=1e-6,
            weight_decay=0.01,
            fused=self.device.type == "cuda",
        )
        total_steps = EPOCHS * math.ceil(s.documents / s.batch)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min(
                step / _WARM_UP, (total_steps - step) / max(total_steps - _WARM_UP, 1)
            ),
        )

    def batch(self, step: int, padding: str) -> TorchBatch:
        """The batch of a step, on the device.

        Args:
            step: which.
            padding: to all places an item may take, "static", or the "longest" of its chunk.
        """
        s, drawn = self.settings, batch_of(self.settings, self.sizes, step)
        width = s.width if padding == "static" else None
        chunks = [collate(items, s.prompts, width).to(self.device) for items in _parts(drawn, s)]

        def put(x: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(x).to(self.device)

        ids = (put(x.astype(np.int64)) for x in (drawn.document_ids, drawn.label_ids))
        return TorchBatch(chunks, *ids, put(drawn.relevance))

    def update(self, batch: TorchBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step: the loss and the norm of the gradient, f32[] each."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad(), self._autocast():
            pooled = torch.cat([self.tower(chunk) for chunk in batch.chunks])
        loss, document = self.objective(pooled.requires_grad_(), batch)
        loss.backward()
        for chunk, gradient in zip(batch.chunks, pooled.grad.chunk(len(batch.chunks))):
            with self._autocast():
                again = self.tower(chunk)
            again.backward(gradient)
        norm = nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.bank[batch.document_ids] = document
        return loss.detach(), norm

    def objective(
        self, pooled: torch.Tensor, batch: TorchBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """PRIME's loss, f32[], and the documents' unit embeddings, f32[B, D], without gradient.

        Args:
            pooled: f32[2 B, D], chunk by chunk.
            batch: what was encoded.
        """
        n, width = len(batch.chunks), pooled.shape[1]
        both = pooled.view(n, 2, -1, width).permute(1, 2, 0, 3).reshape(2, -1, width)
        document, label = nn.functional.normalize(both[0], dim=1), both[1]
        free = self.free_vectors[self.free_vector_of[batch.label_ids]]
        triple = torch.stack([label, free, self.centroids[batch.label_ids]], dim=1)
        prototypes = nn.functional.normalize(self.combiner(triple).mean(1), dim=1)
        raw = document @ nn.functional.normalize(label, dim=1).T
        prototype = document @ prototypes.T
        terms = (
            margin_loss(raw, batch.relevance, self.loss),
            margin_loss(prototype, batch.relevance, self.loss),
            margin_loss(raw.T, batch.relevance.T, self.loss),
            self.loss.regularizer * regularizer(raw, prototype, batch.relevance, self.loss),
        )
        return sum(terms), document.detach()

    def _autocast(self) -> Any:
        half = self.settings.dtype == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=half)


def margin_loss(similarity: torch.Tensor, relevance: torch.Tensor, cfg: LossConfig) -> torch.Tensor:
    """`xmc_jax.training.losses.margin` with a positive drawn for each row, f32[].

    Args:
        similarity: f32[rows, columns], cosines.
        relevance: bool[rows, columns].
        cfg: weighted.
    """
    columns, valid = _hardest(similarity, relevance, cfg)
    hard = similarity.gather(1, columns)
    gap = similarity.gather(1, _draw_positive(relevance)) - hard
    margin = gap.detach().abs().clamp(cfg.margin_min, cfg.margin_max)
    hinge = torch.where(valid, torch.maximum(margin - gap, torch.zeros_like(gap)), 0)
    logits = torch.where(hinge > 0, hard, _NO_VIOLATOR) / cfg.weight_temperature
    return (logits.softmax(1) * hinge).sum(1).mean()


def regularizer(
    raw: torch.Tensor, prototype: torch.Tensor, relevance: torch.Tensor, cfg: LossConfig
) -> torch.Tensor:
    """`xmc_jax.training.objective.regularizer` with a positive drawn for each row, f32[].

    Args:
        raw: f32[B, B], cosines of documents and label texts.
        prototype: f32[B, B], cosines of documents and label prototypes.
        relevance: bool[B, B].
        cfg: its margin, and how many negatives.
    """
    columns, valid = _hardest(prototype, relevance, cfg)
    gain = prototype - raw
    a = (cfg.regularizer_margin - gain.gather(1, _draw_positive(relevance))).relu()
    b = torch.where(valid, (cfg.regularizer_margin + gain.gather(1, columns)).relu(), 0)
    return sum(x.sum() / (x > 0).sum().clamp(min=1) for x in (a, b)) / 2


def _draw_positive(relevance: torch.Tensor) -> torch.Tensor:
    drawn = torch.rand(relevance.shape, device=relevance.device)
    return torch.where(relevance, drawn, -1.0).argmax(1, keepdim=True)


def _hardest(
    similarity: torch.Tensor, relevance: torch.Tensor, cfg: LossConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    masked = similarity.detach().masked_fill(relevance, -torch.inf)
    values, columns = masked.topk(min(cfg.num_negatives, masked.shape[1]), dim=1)
    return columns, values > -torch.inf


def _parts(batch: DrawnBatch, settings: Settings) -> Iterator[Inputs]:
    """Every n-th document and, after those, their labels, as ours divides a batch."""
    for number in range(settings.chunks):
        sides = [
            [None if x is None else x[number :: settings.chunks] for x in _arrays(side)]
            for side in (batch.document, batch.label)
        ]
        yield Inputs(*(None if d is None else np.concatenate([d, u]) for d, u in zip(*sides)))


def _arrays(items: Inputs) -> tuple[Any, ...]:
    return items.tokens, items.lengths, items.images, items.image_count
