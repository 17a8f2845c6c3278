"""Writes the golden files beside it from torch `transformers`: `python tests/golden/make.py`.

bert/, distilbert/: config.json and model.safetensors of tiny random models.
bert.npz, distilbert.npz: tokens, lengths, hidden_states f32[layers + 1, n, T, D] of padded texts.
minilm.npz: tokens, lengths, embeddings f32[20, 384] of the first label titles of
LF-DebianTitles-3K by all-MiniLM-L6-v2, mean-pooled and normalised.
"""

import gzip
import json
import pathlib

import numpy as np
import safetensors.numpy
import torch
import transformers

import xmc_jax
from xmc_jax import packaged

HERE = pathlib.Path(__file__).parent
TITLES = pathlib.Path(xmc_jax.__file__).parent / "data/bundled/LF-DebianTitles-3K/lbl.json.gz"


def tiny(family: str, seed: int = 0) -> torch.nn.Module:
    """A tiny random model whose norms and biases are not at their trivial initial values."""
    torch.manual_seed(seed)
    common = {"vocab_size": 60, "max_position_embeddings": 24}
    if family == "bert":
        config = transformers.BertConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=32,
            **common,
        )
        model = transformers.BertModel(config)
    else:
        config = transformers.DistilBertConfig(
            dim=16, n_layers=2, n_heads=4, hidden_dim=32, **common
        )
        model = transformers.DistilBertModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.eval()


def texts(seed: int = 0, n: int = 5, T: int = 9, vocab: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Random padded texts: tokens i32[n, T], lengths i32[n] from 1 to T."""
    rng = np.random.default_rng(seed)
    lengths = np.linspace(1, T, n).astype(np.int32)
    tokens = rng.integers(1, vocab, (n, T), dtype=np.int32)
    return np.where(np.arange(T) < lengths[:, None], tokens, 0).astype(np.int32), lengths


def torch_hidden_states(model, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """f32[layers + 1, n, T, D] of a torch model."""
    mask = torch.arange(tokens.shape[1]) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        out = model(
            torch.tensor(tokens).long(), attention_mask=mask.long(), output_hidden_states=True
        )
    return torch.stack(out.hidden_states).numpy()


def titles(count: int) -> list[str]:
    """The first label titles of the bundled dataset."""
    with gzip.open(TITLES, "rt", encoding="utf-8") as file:
        return [json.loads(line)["title"] for _, line in zip(range(count), file)]


def tokenized(texts: list[str], T: int) -> tuple[np.ndarray, np.ndarray]:
    """tokens i32[n, T] and lengths i32[n] by the tokenizer of the packaged MiniLM."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(packaged.minilm())
    out = tokenizer(texts, max_length=T, truncation=True, padding="max_length", return_tensors="np")
    return out["input_ids"].astype(np.int32), out["attention_mask"].sum(1).astype(np.int32)


def torch_embeddings(model, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """f32[n, D], mean over real tokens, normalised, by torch."""
    hidden = torch.tensor(torch_hidden_states(model, tokens, lengths)[-1])
    mask = (torch.arange(tokens.shape[1]) < torch.tensor(lengths)[:, None]).float()[..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).numpy()


def main() -> None:
    for family in ("bert", "distilbert"):
        model = tiny(family)
        (HERE / family).mkdir(exist_ok=True)
        (HERE / family / "config.json").write_text(
            json.dumps(model.config.to_dict(), indent=2) + "\n"
        )
        weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
        safetensors.numpy.save_file(weights, HERE / family / "model.safetensors")
        tokens, lengths = texts()
        np.savez_compressed(
            HERE / f"{family}.npz",
            tokens=tokens,
            lengths=lengths,
            hidden_states=torch_hidden_states(model, tokens, lengths),
        )
    tokens, lengths = tokenized(titles(20), T=32)
    minilm = transformers.BertModel.from_pretrained(packaged.minilm()).eval()
    np.savez_compressed(
        HERE / "minilm.npz",
        tokens=tokens,
        lengths=lengths,
        embeddings=torch_embeddings(minilm, tokens, lengths),
    )


if __name__ == "__main__":
    main()
