"""Hugging Face folders in and out: safetensors and config.json <-> our parameters. No pickles."""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from typing import Any

import flax.linen as nn
import huggingface_hub
import huggingface_hub.errors
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath
from flax import traverse_util

from xmc_jax import packaged
from xmc_jax.models import bert
from xmc_jax.models.bert import BertConfig

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
)

# Our path -> Hugging Face's name; {} is the layer, stacked on our side. Kernels are transposed.
NAMES: dict[str, dict[str, str]] = {
    "bert": {
        "token_embedding": "embeddings.word_embeddings.weight",
        "position_embedding": "embeddings.position_embeddings.weight",
        "type_embedding": "embeddings.token_type_embeddings.weight",
        "embedding_norm": "embeddings.LayerNorm",
        "layers/query": "encoder.layer.{}.attention.self.query",
        "layers/key": "encoder.layer.{}.attention.self.key",
        "layers/value": "encoder.layer.{}.attention.self.value",
        "layers/out": "encoder.layer.{}.attention.output.dense",
        "layers/attention_norm": "encoder.layer.{}.attention.output.LayerNorm",
        "layers/up": "encoder.layer.{}.intermediate.dense",
        "layers/down": "encoder.layer.{}.output.dense",
        "layers/output_norm": "encoder.layer.{}.output.LayerNorm",
    },
    "distilbert": {
        "token_embedding": "embeddings.word_embeddings.weight",
        "position_embedding": "embeddings.position_embeddings.weight",
        "embedding_norm": "embeddings.LayerNorm",
        "layers/query": "transformer.layer.{}.attention.q_lin",
        "layers/key": "transformer.layer.{}.attention.k_lin",
        "layers/value": "transformer.layer.{}.attention.v_lin",
        "layers/out": "transformer.layer.{}.attention.out_lin",
        "layers/attention_norm": "transformer.layer.{}.sa_layer_norm",
        "layers/up": "transformer.layer.{}.ffn.lin1",
        "layers/down": "transformer.layer.{}.ffn.lin2",
        "layers/output_norm": "transformer.layer.{}.output_layer_norm",
    },
}
# What a checkpoint may hold besides: position buffers, pooler, heads of pretraining and tasks.
_UNUSED = re.compile(
    r"(bert\.|distilbert\.)?(embeddings\.position_ids|pooler\.|cls\.|classifier\.|pre_classifier\.|"
    r"qa_outputs\.|vocab_(transform|layer_norm|projector)\.)"
)
_LAYER = re.compile(
    r"(?:bert\.encoder|distilbert\.transformer|encoder|transformer)\.layer\.(\d+)\."
)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where weights come from, pinned.

    Attributes:
        folder: local, with config.json, safetensors and tokenizer files.
        name: as asked for.
        revision: the commit of a Hugging Face repository; None for a folder or a package.
        digest: SHA-256 of the weights (of the shards' digests, when there are several); "" where
            no weights were asked for.
    """

    folder: pathlib.Path
    name: str
    revision: str | None
    digest: str


def resolve(name: str, revision: str | None = None, *, weights: bool = True) -> Source:
    """Finds a model: a local folder, "minilm-l6-packaged", or a name on the Hugging Face hub.

    Args:
        name: of the model. A name on the hub is `organisation/name`, downloaded on first use unless
            HF_HUB_OFFLINE is set.
        revision: branch, tag or commit on the hub.
        weights: whether there must be weights; without, for a tokenizer, the digest is "".

    Raises:
        ValueError: no such folder, nothing on the hub or no network, or no safetensors in it.
    """
    commit = None
    local = pathlib.Path(name).expanduser()
    if name == packaged.MINILM_NAME:
        folder = packaged.minilm()
    elif local.is_dir():
        folder = local
    elif name.startswith(("/", ".", "~")) or name.count("/") > 1:
        kind = "model" if weights else "tokenizer"
        raise ValueError(f"{name}: expected a folder with a {kind}, found none")
    else:
        folder = _download(name, revision, weights)
        commit = folder.name
    if revision is not None and commit is None:
        raise ValueError(
            f"{name}: expected no revision, got {revision!r}; only names on the hub have one"
        )
    if not weights:
        return Source(folder=folder, name=name, revision=commit, digest="")
    digests = [_sha256(path) for path in _weight_files(folder)]
    digest = digests[0] if len(digests) == 1 else _digest_of("\n".join(digests))
    if name == packaged.MINILM_NAME and digest != packaged.MINILM_SHA256:
        raise ValueError(
            f"{folder / WEIGHTS}: expected SHA-256 {packaged.MINILM_SHA256}, got {digest}; "
            f"reinstall {packaged.MINILM_DISTRIBUTION}=={packaged.MINILM_VERSION}"
        )
    return Source(folder=folder, name=name, revision=commit, digest=digest)


def load_config(source: Source, layers: int | None = None) -> BertConfig:
    """The sizes of a model, of its first layers only if asked.

    Args:
        source: see `resolve`.
        layers: how many of the first layers to keep; None keeps all.

    Raises:
        ValueError: config.json missing, malformed or of another architecture, or fewer layers.
    """
    path = source.folder / "config.json"
    raw = _read_json(path)
    try:
        config = bert.from_hf(raw)
    except ValueError as error:
        raise ValueError(f"{source.folder}: {error}") from error
    if layers is None:
        return config
    if not 1 <= layers <= config.layers:
        raise ValueError(
            f"encoder.layers: expected 1 to {config.layers}, as {source.name} has, got {layers}"
        )
    return dataclasses.replace(config, layers=layers)


def load_params(source: Source, config: BertConfig) -> dict[str, Any]:
    """The parameters of the backbone.

    Args:
        source: see `resolve`.
        config: of the model; layers past `config.layers` are left out.

    Returns:
        The subtree "backbone": numpy float32, layers stacked.

    Raises:
        ValueError: unreadable weights; or all tensors missing, not known or of another shape.
    """
    home: dict[str, pathlib.Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _weight_files(source.folder):
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                home[name], shapes[name] = path, tuple(file.get_slice(name).get_shape())

    word_embeddings = NAMES[config.family]["token_embedding"]
    prefix = next((p for p in ("bert.", "distilbert.") if p + word_embeddings in shapes), "")
    wanted = {path: [prefix + name for name in names] for path, names in _hf_names(config).items()}
    expected = {
        name: _hf_shape(path, shape)
        for path, shape in _shapes(config).items()
        for name in wanted[path]
    }
    total = load_config(source).layers
    missing = sorted(set(expected) - set(shapes))
    unused = sorted(
        name
        for name in set(shapes) - set(expected)
        if not _known_unused(name, range(config.layers, total))
    )
    misshaped = [
        f"{name} expected {expected[name]} got {shapes[name]}"
        for name in sorted(set(expected) & set(shapes))
        if expected[name] != shapes[name]
    ]
    if missing or unused or misshaped:
        raise ValueError(
            f"{source.folder}: weights do not fit a {config.family} of {config.layers} layers. "
            f"Missing: {missing}. Not known: {unused}. Misshaped: {misshaped}"
        )

    tensors: dict[str, np.ndarray] = {}
    for path in sorted(set(home.values())):
        with _open(path) as file:
            for name in expected:
                if home[name] == path:
                    tensors[name] = np.asarray(file.get_tensor(name), np.float32)

    def ours(path: str, names: list[str]) -> np.ndarray:
        parts = [_transposed(path, tensors[name]) for name in names]
        return np.stack(parts) if path.startswith("layers/") else np.ascontiguousarray(parts[0])

    flat = {path: ours(path, names) for path, names in wanted.items()}
    return traverse_util.unflatten_dict(flat, sep="/")


def export(
    folder: str | epath.Path,
    params: dict[str, Any],
    config: BertConfig,
    *,
    tokenizer_folder: pathlib.Path,
    pooling: str,
    max_length: int,
) -> None:
    """Writes a folder that `transformers` and `SentenceTransformer(folder)` load.

    It holds the backbone, all that documents need: label prototypes are rows of an index.

    Args:
        folder: created if need be; may be remote.
        params: the subtree "backbone", unboxed.
        config: of the model.
        tokenizer_folder: whose tokenizer files are copied.
        pooling: "mean" or "cls", as trained.
        max_length: T, as trained.

    Raises:
        ValueError: no tokenizer.json to copy.
    """
    if not (tokenizer_folder / "tokenizer.json").is_file():
        raise ValueError(f"{tokenizer_folder}: expected a tokenizer.json, found none")
    flat = traverse_util.flatten_dict(jax.tree.map(np.asarray, params), sep="/")
    tensors = {}
    for path, names in _hf_names(config).items():
        parts = flat[path] if path.startswith("layers/") else flat[path][None]
        for name, part in zip(names, parts):
            tensors[name] = np.ascontiguousarray(_transposed(path, part).astype(np.float32))
    modes = {"mean": "mean_tokens", "cls": "cls_token"}
    files = {
        "config.json": bert.to_hf(config),
        "sentence_bert_config.json": {"max_seq_length": max_length, "do_lower_case": False},
        "1_Pooling/config.json": {
            "word_embedding_dimension": config.hidden,
            **{f"pooling_mode_{name}": mode == pooling for mode, name in modes.items()},
        },
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(
                (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
            )
        ],
    }
    folder = epath.Path(folder)
    for subfolder in ("1_Pooling", "2_Normalize"):
        (folder / subfolder).mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_bytes(safetensors.numpy.save(tensors, metadata={"format": "pt"}))
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    for name in TOKENIZER_FILES:
        if (tokenizer_folder / name).is_file():
            (folder / name).write_bytes((tokenizer_folder / name).read_bytes())


def _download(name: str, revision: str | None, weights: bool) -> pathlib.Path:
    patterns = ["config.json", *TOKENIZER_FILES]
    if weights:
        patterns += ["model*.safetensors", INDEX]
    try:
        folder = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns)
    except (OSError, huggingface_hub.errors.HFValidationError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{name}: expected a local folder or a model on the Hugging Face hub"
            f"{f' at revision {revision}' if revision else ''}, got neither: {reason}. Download it "
            f"where there is a network (HF_HUB_OFFLINE unset) and give the folder"
        ) from error
    return pathlib.Path(folder)


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        weight_map = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{folder / INDEX}: expected a weight_map of names to files")
        paths = [folder / str(file) for file in sorted(set(map(str, weight_map.values())))]
        absent = [path.name for path in paths if path.parent != folder or not path.is_file()]
        if absent:
            raise ValueError(f"{folder}: expected the shards {absent} that {INDEX} names")
        return paths
    pickled = " (pytorch_model.bin is a pickle, which is never read)" * (
        (folder / "pytorch_model.bin").is_file()
    )
    raise ValueError(
        f"{folder}: expected {WEIGHTS}, found none{pickled}; convert the model to safetensors"
    )


def _open(path: pathlib.Path):
    try:
        return safetensors.safe_open(path, framework="flax")
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: expected a safetensors file, found {path.stat().st_size} bytes that are not "
            f"one ({error}); download it again"
        ) from error


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: expected a JSON file, found none")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, found: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content


def _shapes(config: BertConfig) -> dict[str, tuple[int, ...]]:
    tokens, lengths = jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32)
    model = bert.Bert(config)
    boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens, lengths)["params"])
    flat = traverse_util.flatten_dict(nn.unbox(boxed), sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}


def _hf_names(config: BertConfig) -> dict[str, list[str]]:
    # Our path -> the tensors it is made of: one, or one per layer.
    names = {}
    for path in _shapes(config):
        table = NAMES[config.family]
        if path in table:
            template = table[path]
        else:
            module, parameter = path.rsplit("/", 1)
            template = table[module] + (".bias" if parameter == "bias" else ".weight")
        count = config.layers if path.startswith("layers/") else 1
        names[path] = [template.format(layer) for layer in range(count)]
    return names


def _hf_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    shape = shape[1:] if path.startswith("layers/") else shape
    return shape[::-1] if path.endswith("/kernel") else shape


def _transposed(path: str, tensor: np.ndarray) -> np.ndarray:
    return tensor.T if path.endswith("/kernel") else tensor


def _known_unused(name: str, layers_left_out: range) -> bool:
    layer = _LAYER.match(name)
    return bool(_UNUSED.match(name)) or (layer is not None and int(layer[1]) in layers_left_out)


def _sha256(path: pathlib.Path) -> str:
    stat = path.stat()
    return _sha256_of_version(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache
def _sha256_of_version(path: pathlib.Path, size: int, mtime_ns: int) -> str:
    # Gigabytes, and a process may resolve a model more than once: a file is read once per version.
    del size, mtime_ns
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
