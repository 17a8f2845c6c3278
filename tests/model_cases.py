"""Folders of models in the layouts of other tools, made of one tiny BERT: `model_cases.make`.

The BERT has two layers of width 16 and 64 words, with random weights; `tests/cases/models/bert`.
"""

import copy
import gzip
import json
import pathlib
import shutil

import numpy as np
import safetensors.numpy

BERT = pathlib.Path(__file__).parent / "cases" / "models" / "bert"
QWEN3 = pathlib.Path(__file__).parent / "golden" / "qwen3"
TEXTS = ["red clay teapot 42", "query: dog's collar, bell!", "", "Garden shears for making tea"]

_ST = "sentence_transformers.models."


def make(name: str, folder: pathlib.Path) -> pathlib.Path:
    """Makes a folder with the layout called `name` below `folder`; returns it."""
    return _MADE[name](folder / name)


def write(path: pathlib.Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def edit(folder: pathlib.Path, **changes) -> None:
    """Changes fields of config.json."""
    path = folder / "config.json"
    write(path, json.loads(path.read_text()) | changes)


def renamed(folder: pathlib.Path, name_of, heads=()) -> pathlib.Path:
    """Renames the tensors of a folder, and adds others of zeros: pairs of name and shape."""
    path = folder / "model.safetensors"
    tensors = {name_of(k): v for k, v in safetensors.numpy.load_file(path).items()}
    tensors |= {name: np.zeros(shape, np.float32) for name, shape in heads}
    safetensors.numpy.save_file(tensors, path, {"format": "pt"})
    return folder


def modules(folder: pathlib.Path, pooling: dict, kinds=("Normalize",), at: str = "") -> None:
    """Writes modules.json: the backbone at a path, its pooling, and more modules."""
    names = ["Transformer", "Pooling", *kinds]
    paths = [at, *(f"{i}_{kind}" for i, kind in enumerate(names) if i)]
    entries = [
        {"idx": i, "name": str(i), "path": path, "type": _ST + kind}
        for i, (kind, path) in enumerate(zip(names, paths))
    ]
    write(folder / "modules.json", entries)
    write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 16} | pooling)
    for path in paths[2:]:
        (folder / path).mkdir(exist_ok=True)


def raw_files(folder) -> list[str]:
    """Raw files of 40 documents and 20 labels in the words of the tiny BERT; their titles."""
    words = (BERT / "vocab.txt").read_text().split()[5:34]
    rng = np.random.default_rng(0)
    titles = [" ".join(rng.choice(words, rng.integers(1, 14))) for _ in range(60)]
    folder.mkdir()
    for name, start, stop in (("trn", 0, 32), ("tst", 32, 40), ("lbl", 40, 60)):
        with gzip.open(folder / f"{name}.json.gz", "wt") as file:
            for i in range(start, stop):
                item = {"uid": f"u{i}", "title": titles[i], "content": "", "target_ind": [i % 20]}
                file.write(json.dumps(item) + "\n")
    for split in ("train", "test"):
        (folder / f"filter_labels_{split}.txt").write_text("")
    return titles


def fields_of(folder, fields: dict, tmp_path) -> dict:
    """A config over `raw_files(tmp_path / "raw")` that leaves pooling and prompts to the folder."""
    fields = copy.deepcopy(fields)
    fields["encoder"] |= {"backbone": str(folder), "pooling": None}
    fields["fusion"] |= {"prefix": None, "label_prefix": None}
    data = {"dataset": "Tools", "raw_dir": str(tmp_path / "raw"), "max_length": 12}
    fields["data"] |= data | {"data_dir": str(tmp_path / "data")}
    fields["train"] |= {"batch_size": 16}
    fields["prime"]["free_vectors"] = 8
    return fields


def _bert(folder: pathlib.Path) -> pathlib.Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return pathlib.Path(shutil.copytree(BERT, folder))


def _gamma_beta(folder: pathlib.Path) -> pathlib.Path:
    def old(name: str) -> str:
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        return "bert." + name.replace("LayerNorm.bias", "LayerNorm.beta")

    heads = [("cls.predictions.bias", 64), ("bert.embeddings.position_ids", 80)]
    return renamed(_bert(folder), old, heads)


def _qwen3(folder: pathlib.Path, name_of, heads=(), **changes) -> pathlib.Path:
    shutil.copytree(QWEN3, folder)
    edit(folder, **changes)
    return renamed(folder, name_of, heads)


def _tied(name: str) -> str:
    return "lm_head.weight" if name == "embed_tokens.weight" else f"model.{name}"


def _cls(folder: pathlib.Path) -> pathlib.Path:
    modules(_bert(folder), {"pooling_mode": "cls", "include_prompt": True})
    return folder


def _dense(folder: pathlib.Path) -> pathlib.Path:
    """Narrower, as distiluse has it: [CLS], 8 numbers by tanh."""
    modules(_bert(folder), {"pooling_mode": "cls"}, ("Dense", "Normalize"))
    activation = "torch.nn.modules.activation.Tanh"
    sizes = {"in_features": 16, "out_features": 8, "bias": True}
    write(folder / "2_Dense" / "config.json", sizes | {"activation_function": activation})
    rng = np.random.default_rng(0)
    tensors = {"linear.weight": rng.standard_normal((8, 16)), "linear.bias": np.arange(8) / 10}
    safetensors.numpy.save_file(
        {name: tensor.astype(np.float32) for name, tensor in tensors.items()},
        folder / "2_Dense" / "model.safetensors",
        {"format": "pt"},
    )
    return folder


def _prompts(folder: pathlib.Path) -> pathlib.Path:
    modules(_bert(folder), {"pooling_mode_mean_tokens": True})
    settings = {
        "prompts": {"query": "query: ", "document": "tools: "},
        "default_prompt_name": "query",
    }
    write(folder / "config_sentence_transformers.json", settings)
    return folder


def _old(folder: pathlib.Path) -> pathlib.Path:
    _bert(folder / "0_Transformer")
    pooling = {"pooling_mode_cls_token": False, "pooling_mode_max_tokens": True}
    modules(folder, pooling, (), "0_Transformer")
    return folder


def _adapter(folder: pathlib.Path) -> pathlib.Path:
    """Of the model in the folder tiny-bert beside it, which is named without a path."""
    _bert(folder.parent / "tiny-bert")
    folder.mkdir()
    for path in BERT.glob("tokenizer*"):
        shutil.copy(path, folder)
    config = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": "tiny-bert",
        "r": 2,
        "lora_alpha": 8,
        "use_rslora": False,
        "target_modules": ["query", "value"],
        "alpha_pattern": {},
        "bias": "none",
    }
    write(folder / "adapter_config.json", config)
    rng, shapes = np.random.default_rng(0), {"A": (2, 16), "B": (16, 2)}
    tensors = {
        f"base_model.model.encoder.layer.{layer}.attention.self.{module}.lora_{kind}.weight": (
            0.3 * rng.standard_normal(shape, np.float32)
        )
        for layer in range(2)
        for module in ("query", "value")
        for kind, shape in shapes.items()
    }
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def _pre_tokenizer(folder: pathlib.Path) -> pathlib.Path:
    path = _bert(folder) / "tokenizer.json"
    steps = [{"type": "Whitespace"}, {"type": "Digits", "individual_digits": True}]
    content = json.loads(path.read_text())
    content["model"]["vocab"] |= {"4": 61, "2": 62}
    write(path, content | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}})
    return folder


def _vocab_only(folder: pathlib.Path) -> pathlib.Path:
    (_bert(folder) / "tokenizer.json").unlink()
    return folder


def _left(folder: pathlib.Path) -> pathlib.Path:
    path = _bert(folder) / "tokenizer_config.json"
    write(path, json.loads(path.read_text()) | {"padding_side": "left"})
    return folder


_MADE = {
    "bert": _bert,
    "bert_gamma_beta": _gamma_beta,
    "colbert_linear": lambda folder: renamed(
        _bert(folder), "bert.{}".format, [("linear.weight", (8, 16))]
    ),
    "prefix_model": lambda folder: renamed(_bert(folder), "model.{}".format),
    "sentence_transformers_state": lambda folder: renamed(_bert(folder), "0.auto_model.{}".format),
    "compiled": lambda folder: renamed(_bert(folder), "_orig_mod.module.bert.{}".format),
    "qwen3": lambda folder: _qwen3(folder, "{}".format),
    "qwen3_seq_cls": lambda folder: _qwen3(folder, "model.{}".format, [("score.weight", (2, 16))]),
    "tied_lm_head_only": lambda folder: _qwen3(folder, _tied, tie_word_embeddings=True),
    "st_cls_pooling": _cls,
    "st_dense": _dense,
    "st_prompts": _prompts,
    "st_0_Transformer": _old,
    "peft_adapter": _adapter,
    "wordpiece_pre_tokenizer": _pre_tokenizer,
    "vocab_txt_only": _vocab_only,
    "padding_side_left": _left,
}
