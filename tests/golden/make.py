"""Writes the golden files beside it from torch `transformers`: `python tests/golden/make.py`.

<family>/: config.json, as transformers writes it, and model.safetensors of a tiny random model.
<family>.npz: tokens, lengths, hidden_states f32[layers + 1, n, T, D] of padded texts.
minilm.npz: tokens, lengths, embeddings f32[20, 384] of the first label titles of
LF-DebianTitles-3K by all-MiniLM-L6-v2, mean-pooled and normalised.
"""

import gzip
import json
import pathlib
from typing import Any

import numpy as np
import safetensors.numpy
import torch
import transformers

import xmc_jax
from xmc_jax.data import packaged

HERE = pathlib.Path(__file__).parent
TITLES = pathlib.Path(xmc_jax.__file__).parent / "data/bundled/LF-DebianTitles-3K/lbl.json.gz"


torch.set_num_threads(1)  # the models are so small that threads only wait for each other
ENCODERS = ("bert", "distilbert")
DECODERS = ("qwen2", "qwen3", "llama", "gemma3")


def published(family: str, **changes: Any) -> dict[str, Any]:
    """The config.json of a tiny decoder in the style of the hub, from before transformers 5."""
    config = {
        "model_type": family,
        "vocab_size": 60,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_theta": 1e6,
    }
    if family != "gemma3":
        config["hidden_act"] = "silu"
    if family in ("qwen2", "qwen3"):
        config |= {
            "rope_scaling": None,
            "use_sliding_window": False,
            "sliding_window": 4,
            "max_window_layers": 1,
        }
    if family != "qwen2":  # H * W is not D
        config |= {"head_dim": 6, "attention_bias": False}
    if family == "llama":
        config |= {
            "mlp_bias": False,
            "rope_theta": 100.0,  # so that one frequency is high, one between, one low
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 48,
            },
        }
    if family == "gemma3":
        config |= {
            "model_type": "gemma3_text",
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 10,
            "sliding_window": 4,  # shorter than the texts
            "sliding_window_pattern": 2,
            "rope_local_base_freq": 100.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        }
    return config | changes


def tiny(
    family: str, seed: int = 0, auto: Any = transformers.AutoModel, **changes: Any
) -> torch.nn.Module:
    """A tiny random model whose norms and biases are not at their trivial initial values.

    Args:
        family: one of ENCODERS or DECODERS.
        seed: of the weights.
        auto: of a decoder, the class whose `from_config` makes it.
        **changes: of a decoder's `published`.
    """
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
    elif family == "distilbert":
        config = transformers.DistilBertConfig(
            dim=16, n_layers=2, n_heads=4, hidden_dim=32, **common
        )
        model = transformers.DistilBertModel(config)
    else:
        config = transformers.AutoConfig.for_model(**published(family, **changes))
        model = auto.from_config(config)
    return _moved(model)


def with_images(seed: int = 0) -> torch.nn.Module:
    """A tiny random Gemma 3 with its vision tower."""
    torch.manual_seed(seed)
    config = transformers.Gemma3Config(
        text_config=published("gemma3"),
        vision_config={
            "hidden_size": 8,
            "intermediate_size": 12,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
        },
        mm_tokens_per_image=4,
        image_token_index=50,
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    return _moved(model)


def _moved(model: torch.nn.Module) -> torch.nn.Module:
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
    for family in (*ENCODERS, *DECODERS):
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
