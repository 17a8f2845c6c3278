"""The folder that is shipped: a model, what it ranks, and how good it was; it opens offline.

    artifact.json            what is in it: see `Artifact`; digests of all files it names
    config.json, model*.safetensors, tokenizer.json, modules.json, ...
                             the encoder, as transformers and sentence-transformers open it
    image_projection.safetensors of images
    labels/                  embeddings.npy f32[L, D], what is searched; frequency.npy i64[L];
                             ids and texts, see `xmc_jax.data.texts`; perhaps prior.npy f64[L]
    prototypes/              what prototypes of changed labels are made of: text.npy f32[L, D],
                             centroids.npy f32[L, D], free_vector_of.npy i32[L], free_vectors.npy
                             f32[C, D], combiner.safetensors
    documents/               embeddings.npy f32[N, D]; their labels: positives.indptr.npy,
                             positives.indices.npy; ids and texts
    index/                   of ScaNN, over the labels
    thumbnails/              small pictures of labels and documents, see `packed_thumbnails`
    vision/                  the image encoder, where it is carried
    README.md, DATA_CARD.md, LICENSE.md for people, who can add to them: artifact.json has their
                             digests as they were written, so that an edit is known

`artifact.json` is written last and names the folders of the parts, so a part is
replaced as a whole: the new one is written beside the old one, and the manifest decides.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from xmc_jax.config import AugmentedConfig, PrimeConfig
from xmc_jax.data import texts
from xmc_jax.data.csr import Csr
from xmc_jax.files import array_files, manifests
from xmc_jax.runtime.wording import counted
from xmc_jax.shipping import contents
from xmc_jax.shipping.contents import MANIFEST, ArtifactManifest, ModelInput, ThumbnailsPart
from xmc_jax.shipping.packed_thumbnails import KINDS, Thumbnails


@dataclasses.dataclass(frozen=True, eq=False)
class Labels:
    """The L labels.

    Attributes:
        ids: identifiers, all different.
        texts: what they say.
        embeddings: f32[L, D], prototypes with PRIME, else of their texts: unit vectors, but for
            labels added later, see `NewLabelsConfig.scale`.
        frequency: i64[L], training documents of each; 0 for those added later.
        prior: f64[L], see `augmented.rank`; None without.
    """

    ids: texts.Texts
    texts: texts.Texts
    embeddings: np.ndarray
    frequency: np.ndarray
    prior: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.embeddings)


@dataclasses.dataclass(frozen=True, eq=False)
class Documents:
    """The N training documents, for retrieval-augmented ranking.

    Attributes:
        ids: identifiers.
        texts: what they say.
        embeddings: f32[N, D], unit vectors.
        positives: [N, L].
    """

    ids: texts.Texts
    texts: texts.Texts
    embeddings: np.ndarray
    positives: Csr

    def __len__(self) -> int:
        return len(self.embeddings)


@dataclasses.dataclass(frozen=True, eq=False)
class Prototypes:
    """What prototypes are made of; see the module and `dual.DualEncoder.prototype`.

    Attributes:
        config: of the combiner.
        text: f32[L, D], pooled embeddings of the labels' texts.
        centroids: f32[L, D].
        free_vector_of: i32[L].
        free_vectors: f32[C, D].
        combiner: file of its parameters; one without any has none.
    """

    config: PrimeConfig
    text: np.ndarray
    centroids: np.ndarray
    free_vector_of: np.ndarray
    free_vectors: np.ndarray
    combiner: pathlib.Path


@dataclasses.dataclass(frozen=True, eq=False)
class Artifact:
    """An opened artifact; arrays are memory-mapped.

    Attributes:
        folder: where it lies.
        manifest: the content of artifact.json.
        parts: what was read of it.
        digest: SHA-256 of artifact.json: two with the same are the same.
        ranking: weights of the score, see `AugmentedConfig`; not enabled without documents.
        documents: None where they were left out.
        index: folder of the labels' ScaNN index; None without.
        thumbnails: pictures of "labels" and "documents", where some have one.
    """

    folder: pathlib.Path
    manifest: Mapping[str, Any]
    parts: ArtifactManifest
    digest: str
    model: ModelInput
    ranking: AugmentedConfig
    labels: Labels
    documents: Documents | None
    index: pathlib.Path | None
    thumbnails: Mapping[str, Thumbnails]

    @property
    def name(self) -> str:
        """What the config called the run."""
        return self.parts.name

    @property
    def step(self) -> int:
        """Of the checkpoint that was exported."""
        return self.parts.step

    def prototypes(self) -> Prototypes | None:
        """What prototypes are made of; None without PRIME, or where it was left out.

        Raises:
            ValueError: damaged files.
        """
        part = self.parts.prototypes
        if part is None:
            return None
        folder = self.folder / part.folder
        shape = self.labels.embeddings.shape
        free_vectors = _array(folder / "free_vectors.npy", np.float32, (None, shape[1]))
        return Prototypes(
            config=part.config,
            text=_array(folder / "text.npy", np.float32, shape),
            centroids=_array(folder / "centroids.npy", np.float32, shape),
            free_vector_of=_ids(
                folder / "free_vector_of.npy", np.int32, shape[:1], len(free_vectors)
            ),
            free_vectors=free_vectors,
            combiner=folder / "combiner.safetensors",
        )


def open(folder, verify: bool = True) -> Artifact:
    """Opens an artifact after checking it against its manifest.

    Args:
        folder: local.
        verify: also hash every file (2 GB a second, about); sizes are always checked.

    Raises:
        ValueError: no artifact, one of another format, a file that is missing or not the recorded
            one, or labels, documents or an index of another model.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise ValueError(f"artifact: expected a folder, got {folder!r:.60}")
    folder = pathlib.Path(folder)
    content, parts = contents.read(folder)
    manifest = json.loads(content)
    files = manifest["files"]
    if damage := manifests.damage(folder, files, verify):
        raise ValueError(
            f"{damage}: a damaged file, or one of another model; copy or export the folder again"
        )
    _check_models(folder, parts)
    labels = _labels(folder / parts.labels.folder, parts)
    if parts.index is not None and parts.index.count != len(labels):
        raise ValueError(
            f"{folder / parts.index.folder}: expected an index of the "
            f"{counted(len(labels), 'label')}, found one of {parts.index.count}; build it again"
        )
    for name, path in contents.files(folder, manifest):
        if name not in files and path.suffix.lower() in contents.READ:
            raise ValueError(
                f"{path}: expected only files that {MANIFEST} names, found another; remove it, or "
                "copy or export the folder again"
            )
    return Artifact(
        folder=folder,
        manifest=manifest,
        parts=parts,
        digest=hashlib.sha256(content).hexdigest(),
        model=parts.model,
        ranking=parts.ranking,
        labels=labels,
        documents=_documents(folder, parts),
        index=None if parts.index is None else folder / parts.index.folder,
        thumbnails=_thumbnails(folder, parts.thumbnails),
    )


def _check_models(folder: pathlib.Path, parts: ArtifactManifest) -> None:
    """Raises ValueError for parts of different models."""
    digest = contents.digest_of_model({name: facts.sha256 for name, facts in parts.files.items()})
    if digest != parts.model.digest:
        raise ValueError(
            f"{folder}: expected the model {parts.model.digest[:12]}, found {digest[:12]}; its "
            "labels are of another model: export both together"
        )
    for name in ("labels", "prototypes", "documents", "index"):
        part = getattr(parts, name)
        if part is not None and part.model != digest:
            raise ValueError(
                f"{folder / part.folder}: expected {name} of the model {digest[:12]}, found those "
                f"of {part.model[:12]}; export labels and model together"
            )


def _labels(folder: pathlib.Path, parts: ArtifactManifest) -> Labels:
    count = parts.labels.count
    has_prior = parts.ranking.prior is not None
    return Labels(
        ids=_texts(folder, "ids", count),
        texts=_texts(folder, "texts", count),
        embeddings=_array(folder / "embeddings.npy", np.float32, (count, parts.model.width)),
        frequency=_array(folder / "frequency.npy", np.int64, (count,)),
        prior=_array(folder / "prior.npy", np.float64, (count,)) if has_prior else None,
    )


def _documents(folder: pathlib.Path, parts: ArtifactManifest) -> Documents | None:
    if parts.documents is None:
        return None
    folder, count = folder / parts.documents.folder, parts.documents.count
    indptr = _array(folder / "positives.indptr.npy", np.int64, (count + 1,))
    if indptr[0] != 0 or (np.diff(indptr) < 0).any():
        raise ValueError(f"{folder}/positives.indptr.npy: expected ascending offsets from 0")
    path = folder / "positives.indices.npy"
    indices = _ids(path, np.int32, (int(indptr[-1]),), parts.labels.count)
    return Documents(
        ids=_texts(folder, "ids", count),
        texts=_texts(folder, "texts", count),
        embeddings=_array(folder / "embeddings.npy", np.float32, (count, parts.model.width)),
        positives=Csr(indptr, indices, None, parts.labels.count),
    )


def _thumbnails(folder: pathlib.Path, part: ThumbnailsPart | None) -> dict[str, Thumbnails]:
    opened: dict[str, Thumbnails] = {}
    for kind in KINDS if part is not None else ():
        if count := getattr(part, kind):
            opened[kind] = thumbnails = Thumbnails(folder / part.folder, kind)
            if len(thumbnails) != count:
                raise ValueError(
                    f"{folder / part.folder}: expected {counted(count, 'picture')} of {kind}, "
                    f"found {len(thumbnails)}; copy or export the folder again"
                )
    return opened


def _texts(folder: pathlib.Path, name: str, count: int) -> texts.Texts:
    opened = texts.open(folder, name)
    if len(opened) != count:
        raise ValueError(f"{folder / name}: expected {counted(count, 'text')}, found {len(opened)}")
    return opened


def _ids(path: pathlib.Path, dtype: type, shape: tuple[int, ...], limit: int) -> np.ndarray:
    ids = _array(path, dtype, shape)
    if len(ids) and (ids.min() < 0 or ids.max() >= limit):
        raise ValueError(f"{path}: expected numbers in [0, {limit}), found others")
    return ids


def _array(path: pathlib.Path, dtype: type, shape: tuple[int | None, ...]) -> np.ndarray:
    try:
        array = array_files.mapped(path)
    except ValueError as error:
        raise ValueError(f"{path}: expected an array, found: {error}") from error
    fits = len(array.shape) == len(shape) and all(
        size in (None, actual) for size, actual in zip(shape, array.shape)
    )
    if array.dtype != dtype or not fits:
        raise ValueError(
            f"{path}: expected {np.dtype(dtype)}{list(shape)}, found "
            f"{array.dtype}{list(array.shape)}"
        )
    return array
