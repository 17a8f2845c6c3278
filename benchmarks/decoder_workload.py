"""What a decoder's training step is measured on: published sizes, settings, drawn batches.

Everything is drawn from the seed, so that two processes that are given the same settings have the
same batches. Needs jax, flax and numpy only.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import numpy as np

from xmc_jax.data.types import Inputs, Prompts, own_tokens
from xmc_jax.models import layers
from xmc_jax.models.decoder_config import DecoderConfig, RopeScaling
from xmc_jax.runtime import rng

EPOCHS = 30  # of the schedule
LENGTHS = ("lognormal", "26k")
# Titles of LF-DebianTitles-26K by number of tokens, of the packaged MiniLM's tokenizer, without its
# special ones: that of decoders could not be had. The last are those of _MOST and more tokens.
_LEAST, _MOST = 4, 48
_TITLES_26K = {
    "train": (
        *(4, 31, 115, 273, 457, 679, 918, 1160, 1431, 1634, 1795, 2057, 2093, 2311, 2161, 2139),
        *(2094, 1818, 1782, 1464, 1175, 1037, 907, 702, 519, 469, 315, 256, 185, 148, 80, 112),
        *(78, 49, 44, 17, 17, 23, 9, 11, 7, 4, 4, 3, 19),
    ),
    "label": (
        *(3, 24, 126, 177, 300, 459, 676, 815, 1104, 1277, 1436, 1713, 1794, 1963, 1845, 1758),
        *(1691, 1516, 1464, 1147, 880, 788, 705, 542, 380, 349, 191, 169, 124, 89, 67, 69),
        *(44, 27, 15, 12, 13, 10, 6, 8, 3, 3, 3, 0, 14),
    ),
}
_IMAGES = 256  # different ones that are drawn

_LLAMA_ROPE = RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
_QWEN = {"rope_theta": 1e6, "bos_id": 151643, "eos_id": 151645}
_qwen25 = functools.partial(DecoderConfig, "qwen2", qkv_bias=True, **_QWEN)
_qwen3 = functools.partial(DecoderConfig, "qwen3", max_positions=40960, qk_norm=True, **_QWEN)
_llama32 = functools.partial(
    DecoderConfig,
    "llama",
    max_positions=131072,
    eps=1e-5,
    rope_theta=5e5,
    rope=_LLAMA_ROPE,
    bos_id=128000,
    eos_id=(128001, 128008, 128009),
)


def _gemma3(vocab_size: int, hidden: int, layer_count: int, *sizes: int, **more) -> DecoderConfig:
    return DecoderConfig(
        *("gemma3", vocab_size, hidden, layer_count, *sizes),
        hidden_act="gelu_pytorch_tanh",
        qk_norm=True,
        post_norms=True,
        norm_offset=1.0,
        embedding_scale=math.sqrt(hidden),
        query_width=256,
        rope_theta=1e6,
        sliding=tuple((layer + 1) % 6 != 0 for layer in range(layer_count)),
        local_rope_theta=1e4,
        pad_id=0,
        bos_id=2,
        **more,
    )


# The published sizes: V, D, layers, H, G, width of a head, F.
MODELS = {
    "tiny": _qwen25(512, 64, 2, 4, 2, 16, 128),
    "qwen2.5-0.5b": _qwen25(151936, 896, 24, 14, 2, 64, 4864),
    "qwen2.5-1.5b": _qwen25(151936, 1536, 28, 12, 2, 128, 8960),
    "qwen2.5-3b": _qwen25(151936, 2048, 36, 16, 2, 128, 11008),
    "qwen2.5-7b": _qwen25(152064, 3584, 28, 28, 4, 128, 18944, tied=False),
    "llama3.2-1b": _llama32(128256, 2048, 16, 32, 8, 64, 8192),
    "llama3.2-3b": _llama32(128256, 3072, 28, 24, 8, 128, 8192),
    "qwen3-0.6b": _qwen3(151936, 1024, 28, 16, 8, 128, 3072),
    "qwen3-4b": _qwen3(151936, 2560, 36, 32, 8, 128, 9728),
    "gemma3-1b": _gemma3(262144, 1152, 26, 4, 1, 256, 6912, window=512, eos_id=(1, 106)),
    "gemma3-4b": _gemma3(
        *(262208, 2560, 34, 8, 4, 256, 10240),
        max_positions=131072,
        rope=RopeScaling("linear", 8.0),
        window=1024,
        eos_id=1,
    ),
}
# For steps on a CPU in which products are what takes time.
MODELS["small"] = dataclasses.replace(MODELS["qwen2.5-0.5b"].first(4), vocab_size=4096)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured; the defaults are LF-AmazonTitles-131K and the decoder script's recipe.

    Attributes:
        model: a name of `MODELS`, or that of a config.json.
        batch: B; as many labels are sampled, so that 2 B texts are encoded.
        length: T, without prompts.
        lengths: how texts are long: "lognormal", a mean of about 0.6 T; or "26k", as the training
            titles (documents) and label titles (labels) of LF-DebianTitles-26K, cut at T.
        prompt_tokens: around every item: the last at its end, the others before the text.
        images: K, of every item, after its text; 0 is text only.
        image_width: E.
        image_prompt_tokens: between text and images, where there are some.
        chunks: parts in which a batch is encoded.
        remat: see `EncoderConfig`.
        dtype: of activations and products; the base is bfloat16, what is trained float32.
        lora_rank: R; alpha is 256, rsLoRA, on all seven projections.
        documents: N, rows of the document bank, float32.
        labels: L, rows of the centroids, float32.
        free_vectors: C.
        combiner_heads: of the label prototype network.
        combiner_ff: of the label prototype network.
        combiner_dropout: of the label prototype network, fraction.
        steps: timed steps.
        seed: of everything drawn.
        padded: keep the padding of texts; by default they are packed.

    Source: ViXML supp. A; reference code, run script for decoders.
    """

    model: str
    batch: int = 2048
    length: int = 32
    lengths: str = "lognormal"
    prompt_tokens: int = 4
    images: int = 0
    image_width: int = 1152
    image_prompt_tokens: int = 3
    chunks: int = 16
    remat: str = "projections"
    dtype: str = "bfloat16"
    lora_rank: int = 256
    documents: int = 294_805
    labels: int = 131_073
    free_vectors: int = 65_536
    combiner_heads: int = 8
    combiner_ff: int = 1024
    combiner_dropout: float = 0.1
    steps: int = 5
    seed: int = 0
    padded: bool = False

    def __post_init__(self):
        for name in (
            *("batch", "length", "image_width", "chunks", "lora_rank", "labels", "free_vectors"),
            "steps",
        ):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"--{name}: expected at least 1, got {value}")
        for name, fits, expected in (
            ("lengths", self.lengths in LENGTHS, f"one of {LENGTHS}"),
            ("prompt_tokens", self.prompt_tokens >= 0, "at least 0"),
            ("images", self.images >= 0, "at least 0"),
            ("image_prompt_tokens", self.image_prompt_tokens >= 0, "at least 0"),
            ("combiner_dropout", 0 <= self.combiner_dropout < 1, "a fraction in [0, 1)"),
            ("documents", self.documents >= self.batch, f"at least the batch, {self.batch}"),
            ("remat", self.remat in layers.REMAT, f"one of {layers.REMAT}"),
            ("dtype", self.dtype in ("float32", "bfloat16"), "float32 or bfloat16"),
            ("chunks", self.batch % self.chunks == 0, f"a divisor of the batch, {self.batch}"),
        ):
            if not fits:
                raise ValueError(f"--{name}: expected {expected}, got {getattr(self, name)!r}")

    @property
    def prompts(self) -> Prompts:
        """Around every item: "This product text", "and its image" where there are some, an end."""
        ids = tuple(range(self.prompt_tokens))
        middle = range(len(ids), len(ids) + self.image_prompt_tokens) if self.images else ()
        return Prompts(head=ids[:-1], middle=tuple(middle), tail=ids[-1:])

    @property
    def width(self) -> int:
        """S, places of an item with its padding, prompts included."""
        p = self.prompts
        return self.length + self.images + len(p.head) + len(p.middle) + len(p.tail)


# What is not given, of the models that are not published.
_ON_CPU = {"lora_rank": 64, "documents": 4096, "labels": 4096, "free_vectors": 4096}
CHOSEN = {
    "tiny": _ON_CPU
    | {"batch": 64, "chunks": 4, "lora_rank": 8, "labels": 2048, "free_vectors": 256}
    | {"combiner_ff": 128, "image_width": 32},
    "small": _ON_CPU | {"batch": 32, "chunks": 2},
}


class DrawnBatch(NamedTuple):
    """A batch before it is laid out: numpy arrays.

    Attributes:
        document: texts and images of the B documents.
        document_ids: i32[B].
        label: the same of the label of each.
        label_ids: i32[B].
        relevance: bool[B, B].
    """

    document: Inputs
    document_ids: np.ndarray
    label: Inputs
    label_ids: np.ndarray
    relevance: np.ndarray


def text_lengths(
    generator: np.random.Generator, n: int, length: int, lengths: str = "lognormal", kind="train"
) -> np.ndarray:
    """i32[n] in [1, T], tokens of texts.

    Args:
        generator: of numbers.
        n: of texts.
        length: T, where texts are cut.
        lengths: see `Settings`.
        kind: "train" or "label"; of "26k".
    """
    if lengths == "26k":
        counts = np.array(_TITLES_26K[kind])
        drawn = generator.choice(np.arange(_LEAST, _MOST + 1), n, p=counts / counts.sum())
    else:
        drawn = np.round(np.exp(generator.normal(math.log(0.56 * length), 0.5, n)))
    return np.clip(drawn, 1, length).astype(np.int32)


def batch_of(settings: Settings, sizes: DecoderConfig, step: int) -> DrawnBatch:
    """The batch of a step as numpy arrays: drawn texts and images, documents and labels.

    Args:
        settings: what is measured.
        sizes: of the decoder.
        step: which.
    """
    s, generator = settings, rng.host(settings.seed, rng.Stream.SAMPLE, step)

    def texts(kind: str) -> Inputs:
        lengths = text_lengths(generator, s.batch, s.length, s.lengths, kind)
        tokens = generator.integers(sizes.vocab_size, size=(s.batch, s.length), dtype=np.int32)
        return Inputs(tokens=tokens, lengths=lengths)

    def with_images(items: Inputs) -> Inputs:
        if not s.images:
            return items
        different = generator.standard_normal((_IMAGES, s.image_width)).astype(np.float16)
        return items.replace(
            images=different[generator.integers(_IMAGES, size=(s.batch, s.images))],
            image_count=np.full(s.batch, s.images, np.int32),
        )

    label_ids = generator.integers(s.labels, size=s.batch, dtype=np.int32)
    document = texts("train")
    document_ids = generator.choice(s.documents, s.batch, replace=False).astype(np.int32)
    label = texts("label")
    return DrawnBatch(
        document=with_images(document),
        document_ids=document_ids,
        label=with_images(label),
        label_ids=label_ids,
        relevance=label_ids[:, None] == label_ids,
    )


def real_tokens(batch: DrawnBatch, prompts: Prompts) -> int:
    """Tokens that a step encodes, prompts and images included, padding not.

    Args:
        batch: of numpy arrays.
        prompts: around every item.
    """
    sides = (batch.document, batch.label)
    own = sum(int(own_tokens(side.lengths, side.image_count, prompts).sum()) for side in sides)
    return own + len(prompts.head) * sum(len(side.lengths) for side in sides)
