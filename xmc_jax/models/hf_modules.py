"""What sentence-transformers does around a backbone: pooling, layers behind it, prompts.

Read from a folder to start from, and written into the folders that we export.
"""

import dataclasses
import pathlib
from collections.abc import Mapping

from etils import epath

from xmc_jax.files import json_files
from xmc_jax.models import hf, pooled_dense
from xmc_jax.models.backbone import Sizes
from xmc_jax.models.hf import ModelSource

POOLINGS = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken", "max": "max_tokens"}
"""Our name of a pooling -> the end of the name of its flag in 1_Pooling/config.json."""
_CURRENT = {"mean": "mean", "cls": "cls", "lasttoken": "last", "max": "max"}
_FLAG = "pooling_mode_"
_DEFAULT = "mean"
_SETTINGS = "config_sentence_transformers.json"
# Modules that we compute; of a backbone whose output is normalised anyway, nothing is to be done.
_KNOWN = ("Transformer", "Pooling", "Normalize")
_DENSE = "2_Dense"


@dataclasses.dataclass(frozen=True)
class Modules:
    """What a folder says about how its backbone becomes an encoder of texts.

    Attributes:
        where: the folder.
        poolings: as we call them, or as the folder does where we have none such; several are
            concatenated, none is said where it is no folder of sentence-transformers.
        include_prompt: whether the tokens of a prompt are pooled, too.
        others: folders of modules that are not computed here.
        prompts: name -> text that is put before a text.
        default_prompt: the name of the one that `SentenceTransformer.encode` uses; None for none.
    """

    where: pathlib.Path
    poolings: tuple[str, ...] = ()
    include_prompt: bool = True
    others: tuple[str, ...] = ()
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    default_prompt: str | None = None

    def pooling(self, prompt: bool = False) -> str:
        """The pooling to use where the config leaves it to the folder.

        Args:
            prompt: whether texts get a prompt.

        Raises:
            ValueError: the folder asks for something that is not computed here.
        """
        if problem := self.departs(prompt=prompt):
            raise ValueError(
                f"{self.where}: expected modules Transformer, Pooling of one kind "
                f"({', '.join(POOLINGS)}), Dense and Normalize, found {problem}; "
                f"--config.encoder.pooling={_DEFAULT} trains the backbone without"
            )
        return (*self.poolings, _DEFAULT)[0]

    def departs(self, pooling: str | None = None, prompt: bool = False) -> str:
        """What the folder does and we do not, in words; "" if there is nothing.

        Args:
            pooling: ours; None for the folder's own.
            prompt: whether texts get one.
        """
        ours = (pooling,) if pooling else tuple(x for x in self.poolings if x in POOLINGS)[:1]
        parts = [*self.others]
        if self.poolings and self.poolings != ours:
            parts.insert(0, f"pooling by {' and '.join(self.poolings)}")
        if prompt and not self.include_prompt:
            parts.append("prompts that are not pooled")
        return ", ".join(parts)

    def prompt(self, kind: str) -> str:
        """The prompt of our documents or labels: documents are queries, labels what they look for.

        As in `SentenceTransformer.encode_query` and `encode_document`.

        Args:
            kind: "document" or "label".
        """
        names = ("query",) if kind == "document" else ("document", "passage", "corpus")
        name = next((name for name in names if name in self.prompts), self.default_prompt)
        return self.prompts.get(name, "")


def read(source: ModelSource) -> Modules:
    """What a folder says; of one that is not from sentence-transformers, nothing.

    Raises:
        ValueError: a malformed file.
    """
    folder = source.first_with(hf.MODULES)
    poolings: tuple[str, ...] = ()
    include_prompt, others = True, []
    dense = hf.load_config(source).dense if (folder / hf.MODULES).is_file() else None
    for module in hf.modules_of(folder):
        if module.kind == "Pooling":
            path = folder / module.path / "config.json"
            config = json_files.read(path)
            poolings = _poolings(path, config)
            include_prompt = config.get("include_prompt", True) is not False
        elif module.kind not in _KNOWN and not (module.kind == "Dense" and dense):
            others.append(f"{module.path} ({module.kind})")
    path = source.first_with(_SETTINGS) / _SETTINGS
    settings = json_files.read(path, optional=True)
    prompts, default = settings.get("prompts") or {}, settings.get("default_prompt_name")
    texts = isinstance(prompts, dict) and all(isinstance(x, str) for x in prompts.values())
    if not texts or not (default is None or default in prompts):
        raise ValueError(
            f"{path}: expected prompts to be texts by name, and default_prompt_name to be one of "
            f"the names or null, found {prompts!r:.100} and {default!r:.50}"
        )
    return Modules(folder, poolings, include_prompt, tuple(others), prompts, default)


def _poolings(path: pathlib.Path, config: Mapping) -> tuple[str, ...]:
    """Of 1_Pooling/config.json, as sentence-transformers before or since version 6 writes it."""
    modes = config.get("pooling_mode")
    if modes is None:
        on = [name.removeprefix(_FLAG) for name, on in config.items() if on is True]
        ours = {flag: name for name, flag in POOLINGS.items()}
        modes_on = [ours.get(name, name) for name in on if _FLAG + name in config]
        return tuple(modes_on) or (_DEFAULT,)
    modes = modes if isinstance(modes, list) else [modes]
    if not modes or not all(isinstance(mode, str) for mode in modes):
        raise ValueError(f"{path}: expected pooling_mode to be a name, found {modes!r:.100}")
    return tuple(_CURRENT.get(mode, mode) for mode in modes)


def write(
    folder: epath.Path,
    sizes: Sizes,
    pooling: str,
    max_length: int,
    prompts: tuple[str, str] = ("", ""),
) -> epath.Path | None:
    """Makes a folder with a backbone one that `SentenceTransformer(folder)` opens.

    Args:
        folder: exists; may be remote.
        sizes: of the model.
        pooling: as trained.
        max_length: S, tokens of the longest sequence.
        prompts: before documents and before labels, where the tokenizer does not put them there.
            `SentenceTransformer.encode` and `encode_query` are then ours of documents,
            `encode_document` is ours of labels.

    Returns:
        The folder for the weights of the layer behind the pooling; None if the model has none.
    """
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")]
    if sizes.dense is not None:
        kinds.append((_DENSE, "Dense"))
    kinds.append((f"{len(kinds)}_Normalize", "Normalize"))
    document, label = prompts
    files = {
        "sentence_bert_config.json": {"max_seq_length": max_length, "do_lower_case": False},
        "1_Pooling/config.json": {
            "word_embedding_dimension": sizes.hidden,
            **{_FLAG + flag: name == pooling for name, flag in POOLINGS.items()},
        },
        hf.MODULES: [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(kinds)
        ],
        _SETTINGS: {
            "prompts": {"query": document, "document": label},
            "default_prompt_name": "query" if document else None,
            "similarity_fn_name": "cosine",
        },
    }
    if sizes.dense is not None:
        files[f"{_DENSE}/config.json"] = pooled_dense.to_config(sizes.dense, sizes.hidden)
    for path, _ in kinds:
        (folder / path).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        json_files.write(folder / name, content)
    return None if sizes.dense is None else folder / _DENSE
