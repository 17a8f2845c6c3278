"""Synthetic product-like items with pictures, any size: `python -m xmc_jax.data.synthetic --help`.

What is hidden: a product has a category, which its noun and brand tell; a look, that is a shape, a
colour, a pattern and the pattern's colour; and, to distract, a material and a size. A shop has
`styles` looks, all different, each category a selection of `looks` of them, with 2 to 8 labels in
each. A document goes with most labels of its own look in its own category.

What is seen: a title states the shape, the colour and the pattern with probability `stated` each;
pictures show all of the look, and nothing of the category. So titles alone leave several looks
possible, pictures alone several categories, and both together few mistakes. `oracles` says how many
for readers that know all looks and labels: the ceilings for models of text, of images and of both.

Every product, item and picture is drawn by a generator of its own, keyed by (seed, kind, number):
any of them can be made alone, and more documents leave the first ones as they were.
"""

import dataclasses
import enum
import functools
import gzip
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np
import tqdm
from pydantic import Field

from xmc_jax.config.declare import Share, options, section
from xmc_jax.data.synthetic import product_pictures, product_words
from xmc_jax.data.synthetic.product_words import (
    ATTRIBUTES,
    COLOURS,
    MATERIALS,
    NOUNS,
    PATTERNS,
    PLAIN,
    SHAPES,
)
from xmc_jax.files import atomic, locks
from xmc_jax.runtime import command

FORMAT = 1
"""Version of the items: the same config gives the same items for as long as it stays the same."""
SPLITS = {"train": "trn", "test": "tst", "label": "lbl"}
_LOOK_SIZES = np.array([8, 6, 5, 4, 4, 3, 3, 2])  # labels of a look, over and over
_LOOK_STARTS = np.concatenate([[0], np.cumsum(_LOOK_SIZES)])
_PERIOD = int(_LOOK_SIZES.sum())
# A document has the p-th label of its look with the p-th chance: a head and a tail in each look.
_KEPT = np.array([0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6])
_LOOK_EXPONENT = 0.8  # Zipf's, of the looks of a category
_STYLES = len(SHAPES) * len(COLOURS) * len(PATTERNS)
_ORACLE_DOCUMENTS = 10_000  # test documents that oracles are asked about
_ROWS = 512  # pictures of a row group


class _Kind(enum.IntEnum):
    """What a generator draws. Items follow from the values: append, never renumber."""

    SHOP = 0
    CATEGORY = 1
    TRAIN_PRODUCT = 2
    TEST_PRODUCT = 3
    LABEL_PRODUCT = 4
    TRAIN_ITEM = 5
    TEST_ITEM = 6
    LABEL_ITEM = 7
    TRAIN_PICTURE = 8
    TEST_PICTURE = 9
    LABEL_PICTURE = 10


_Number = Annotated[int, Field(ge=1, lt=2**31)]


@section("")
class SyntheticConfig:
    """How many items, and how hard. The defaults of the latter are the set that results are for.

    Source: ViXML Table 8 (shares of items with an image).
    """

    documents: _Number = Field(2000, description="training documents")
    labels: _Number = Field(1000, description="labels")
    test_documents: _Number | None = Field(
        None, description="test documents; none is half of the training documents"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="seed of everything")
    stated: Share = Field(0.4, description="chance that a title states an attribute of the look")
    looks: _Number = Field(
        24, description="looks of a category; more make a title alone less telling"
    )
    styles: Annotated[int, Field(ge=1, le=_STYLES)] = Field(
        48, description="looks of the shop; fewer make a picture alone less telling"
    )
    noise: Share = Field(
        0.05, description="share of products whose labels are those of another look"
    )
    image_share: Share = Field(0.79, description="share of documents with 1 to 3 images")
    label_image_share: Share = Field(0.96, description="share of labels with 1 to 3 images")
    siblings: Annotated[int, Field(ge=1, le=100)] = Field(
        2, description="documents that show one product; they are one group"
    )
    pixels: Annotated[int, Field(ge=16, le=1024)] = Field(64, description="side of a picture")

    def __post_init__(self):
        if self.looks > self.styles:
            raise ValueError(
                f"looks: expected at most the {self.styles} styles of the shop, got {self.looks}"
            )

    def count(self, split: str) -> int:
        """Items of "train", "test" or "label"."""
        test = max(1, self.documents // 2) if self.test_documents is None else self.test_documents
        return {"train": self.documents, "test": test, "label": self.labels}[split]


@dataclasses.dataclass(frozen=True)
class Product:
    """A document or a label: what it shows, and what its title says."""

    uid: str  # unique over the splits
    title: str
    group: str  # the same for siblings
    category: int
    look: int  # its number within the category
    attributes: tuple[int, int, int, int]  # shape, colour, pattern, the pattern's colour or -1
    stated: tuple[bool, bool, bool]  # which of the first three the title states
    images: int  # 0 to 3
    positives: tuple[int, ...]  # labels of a document, ascending; () for a label


@dataclasses.dataclass(frozen=True, eq=False)
class _Category:
    nouns: tuple[str, ...]
    brand: str
    looks: tuple[tuple[int, int, int, int], ...]  # attributes
    order: np.ndarray  # looks, most wanted first
    wanted: np.ndarray  # f64[looks], cumulative share of the products that have order[:r + 1]


class Shop:
    """All items of a config, none of them made until asked for."""

    def __init__(self, config: SyntheticConfig):
        self.config = config
        # Looks have consecutive places; an affine permutation scatters places over label numbers.
        rng = self._rng(_Kind.SHOP, 0)
        size = config.labels
        self._shift = int(rng.integers(size))
        self._step = size
        while math.gcd(self._step, size) != 1:
            self._step = int(rng.integers(size)) + 1
        self._back = pow(self._step, -1, size)
        shape_colour, patterns = np.divmod(rng.permutation(_STYLES)[: config.styles], len(PATTERNS))
        shapes, colours = np.divmod(shape_colour, len(COLOURS))
        seconds = (colours + rng.integers(1, len(COLOURS), size=config.styles)) % len(COLOURS)
        seconds[patterns == PLAIN] = -1
        self._styles = tuple(zip(*(a.tolist() for a in (shapes, colours, patterns, seconds))))
        periods, rest = divmod(size, _PERIOD)
        self._looks = periods * len(_LOOK_SIZES) + int(np.searchsorted(_LOOK_STARTS, rest))
        self.num_categories = -(-self._looks // config.looks)
        self.category = functools.lru_cache(maxsize=4096)(self._category)

    def item(self, split: str, number: int) -> Product:
        """The item of that number, 0 <= number < config.count(split)."""
        kinds = {
            "train": (_Kind.TRAIN_PRODUCT, _Kind.TRAIN_ITEM, self.config.siblings),
            "test": (_Kind.TEST_PRODUCT, _Kind.TEST_ITEM, self.config.siblings),
            "label": (_Kind.LABEL_PRODUCT, _Kind.LABEL_ITEM, 1),
        }
        product_kind, item_kind, siblings = kinds[split]
        product = number // siblings
        rng = self._rng(product_kind, product)
        if split == "label":
            category, look = divmod(self._look_of(number), self.config.looks)
        else:
            category, look = self._wanted(rng)
        of_category = self.category(category)
        goes_with = look
        if split != "label" and rng.random() < self.config.noise:
            goes_with = int(rng.integers(len(of_category.looks)))
        noun = of_category.nouns[rng.integers(len(of_category.nouns))]
        material = MATERIALS[rng.integers(len(MATERIALS))]
        code = "".join(chr(ord("A") + c) for c in rng.integers(26, size=2))
        code += str(rng.integers(10, 1000))
        rng = self._rng(item_kind, number)
        attributes = of_category.looks[look]
        states = rng.random(len(ATTRIBUTES)) < self.config.stated
        share = self.config.label_image_share if split == "label" else self.config.image_share
        images = int(rng.random() < share) * (1 + int(np.searchsorted([0.5, 0.8], rng.random())))
        kept = rng.random(len(_KEPT)) < _KEPT
        title = product_words.title(
            rng, of_category.brand, noun, material, code, attributes, states
        )
        positives = () if split == "label" else self._positives(category, goes_with, kept)
        return Product(
            uid=f"{SPLITS[split]}{number}",
            title=title,
            group=f"{SPLITS[split]}-product{product}",
            category=category,
            look=look,
            attributes=attributes,
            stated=tuple(states.tolist()),
            images=images,
            positives=positives,
        )

    def items(self, split: str) -> Iterator[Product]:
        """All items of a split, in order."""
        return (self.item(split, number) for number in range(self.config.count(split)))

    def picture(self, split: str, number: int, k: int) -> bytes:
        """PNG of the k-th image of an item; there is one for any k, also past `images`."""
        kind = _Kind[f"{split.upper()}_PICTURE"]
        attributes = self.item(split, number).attributes
        return product_pictures.render(
            self._rng(kind, number * 16 + k), attributes, self.config.pixels
        )

    def labels_of(self, category: int, look: int) -> list[int]:
        """Labels of a look, the most frequent first."""
        period, place = divmod(category * self.config.looks + look, len(_LOOK_SIZES))
        first = period * _PERIOD + _LOOK_STARTS[place]
        last = min(first + _LOOK_SIZES[place], self.config.labels)
        return [
            (place - self._shift) * self._back % self.config.labels
            for place in range(int(first), int(last))
        ]

    def _rng(self, kind: _Kind, number: int) -> np.random.Generator:
        key = np.array([self.config.seed, kind << 56 | number], np.uint64)
        return np.random.Generator(np.random.Philox(key=key))

    def _look_of(self, label: int) -> int:
        period, place = divmod((label * self._step + self._shift) % self.config.labels, _PERIOD)
        return period * len(_LOOK_SIZES) + int(np.searchsorted(_LOOK_STARTS, place, "right")) - 1

    def _category(self, number: int) -> _Category:
        rng = self._rng(_Kind.CATEGORY, number)
        count = min(self.config.looks, self._looks - number * self.config.looks)
        chosen = rng.permutation(self.config.styles)[:count]
        shares = (1.0 + np.arange(count)) ** -_LOOK_EXPONENT
        return _Category(
            nouns=NOUNS[number % len(NOUNS)],
            brand=product_words.brand(number),
            looks=tuple(self._styles[style] for style in chosen),
            order=rng.permutation(count),
            wanted=np.cumsum(shares) / shares.sum(),
        )

    def _wanted(self, rng: np.random.Generator) -> tuple[int, int]:
        """Category and look of a product: few categories and few looks have many products."""
        category = int(self.num_categories * rng.random() ** 2)  # density falls as c^(-1/2)
        of_category = self.category(category)
        rank = int(np.searchsorted(of_category.wanted, rng.random(), "right"))
        return category, int(of_category.order[min(rank, len(of_category.order) - 1)])

    def _positives(self, category: int, look: int, kept: np.ndarray) -> tuple[int, ...]:
        labels = self.labels_of(category, look)
        return tuple(sorted(x for x, k in zip(labels, kept) if k) or labels[:1])


def oracles(shop: Shop) -> dict[str, float]:
    """P@1 on at most 10,000 test documents, as a share, of predictors that know the shop.

    They choose the likeliest look that fits what they see of a document, and its first label; none
    knows which products have another look's labels (`noise`). "attributes" knows category and look,
    the ceiling of any model; "text" what the title states, category included; "image" what the
    pictures show, if there are any, and nothing of the text; "text and image" both.
    """
    likeliest: dict[tuple[int, ...], tuple[float, int]] = {}  # look -> share, first label
    for number in range(shop.num_categories):
        category, count = shop.category(number), shop.num_categories
        share = np.diff(category.wanted, prepend=0) * (
            ((number + 1) / count) ** 0.5 - (number / count) ** 0.5
        )
        for rank, look in enumerate(category.order.tolist()):
            attributes = category.looks[look]
            if share[rank] > likeliest.get(attributes, (0.0, -1))[0]:
                likeliest[attributes] = float(share[rank]), shop.labels_of(number, look)[0]
    most_wanted = max(likeliest.values())[1]
    hits = dict.fromkeys(("attributes", "text", "image", "text and image"), 0)
    count = min(shop.config.count("test"), _ORACLE_DOCUMENTS)
    for number in range(count):
        item = shop.item("test", number)
        category = shop.category(item.category)
        looks_of = category.looks
        told = next(
            look
            for look in category.order.tolist()
            if all(
                value == actual
                for value, actual, states in zip(looks_of[look], item.attributes, item.stated)
                if states
            )
        )
        known = shop.labels_of(item.category, item.look)[0]
        read = shop.labels_of(item.category, told)[0]
        hits["attributes"] += known in item.positives
        hits["text"] += read in item.positives
        hits["image"] += (
            likeliest[item.attributes][1] if item.images else most_wanted
        ) in item.positives
        hits["text and image"] += (known if item.images else read) in item.positives
    return {name: round(hit / count, 4) for name, hit in hits.items()}


def generate(config: SyntheticConfig, folder: str | pathlib.Path) -> dict[str, Any]:
    """Writes a raw folder: what `prepare` reads, and the pictures.

    `{trn,tst,lbl}.json.gz`, empty filter files, `groups.tsv.gz`; `{trn,tst,lbl}.images.parquet`
    with columns uid, k and bytes (PNG), in the order of items; `stats.json`. Items are written as
    they are made. A folder appears only when it is whole; one of the same config is left as it is.

    Returns:
        What is in stats.json.

    Raises:
        ValueError: the folder is there and holds something else; Pillow or pyarrow are missing.
    """
    _libraries()
    folder = pathlib.Path(folder)
    made_from = {"format": FORMAT, **dataclasses.asdict(config)}
    made_from["test_documents"] = config.count("test")
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_name(f".{folder.name}.lock")
    with locks.locked(lock, str(folder), wait=True, remove=True):
        if folder.exists():
            stats = _stats(folder)
            if stats.get("synthetic") != made_from:
                there = stats.get("synthetic", "something else")
                raise ValueError(
                    f"{folder}: expected to be free, or made with {made_from}, found {there}; "
                    "choose another folder or delete it"
                )
            return stats
        shop = Shop(config)
        with atomic.replaced_folder(folder) as partial:
            stats = {"name": folder.name, "synthetic": made_from}
            with _gzip(partial / "groups.tsv.gz") as groups:
                stats |= {split: _write(shop, split, partial, groups) for split in SPLITS}
            for split in ("train", "test"):
                (partial / f"filter_labels_{split}.txt").write_bytes(b"")
            stats["P@1 of oracles"] = oracles(shop)
            content = json.dumps(stats, indent=1) + "\n"
            (partial / "stats.json").write_text(content, encoding="utf-8")
    return stats


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status, see `command.run`."""
    return command.run(
        "synthetic",
        lambda: _parse(arguments),
        lambda parsed: print(json.dumps(generate(*parsed), indent=1)),
    )


def _parse(arguments: list[str] | None) -> tuple[SyntheticConfig, str]:
    """What to make, and the raw folder it goes to."""
    parser = command.Parser(prog="python -m xmc_jax.data.synthetic", allow_abbrev=False)
    parser.add_argument("--out", required=True, help="the raw folder to make")
    for option in options(SyntheticConfig):
        usual = "" if option.default is None else f" (default {option.default})"
        parser.add_argument(
            f"--{option.name}", type=option.kind, default=option.default, help=option.text + usual
        )
    fields = vars(parser.parse_args(arguments))
    folder = fields.pop("out")
    return SyntheticConfig(**fields), folder


def _write(shop: Shop, split: str, folder: pathlib.Path, groups) -> dict[str, Any]:
    """Writes the items of a split and their pictures; returns facts about them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    count, name = shop.config.count(split), SPLITS[split]
    frequency = np.zeros(shop.config.labels, np.int64)
    with_image = images = words = stated = 0
    schema = pa.schema([("uid", pa.string()), ("k", pa.int32()), ("bytes", pa.binary())])
    rows: list[dict[str, Any]] = []
    with (
        _gzip(folder / f"{name}.json.gz") as lines,
        pq.ParquetWriter(folder / f"{name}.images.parquet", schema, compression="none") as pictures,
        tqdm.tqdm(total=count, desc=split, unit="item", disable=None) as bar,
    ):
        for number, item in enumerate(shop.items(split)):
            line = {"uid": item.uid, "title": item.title, "content": ""}
            line["target_ind"] = list(item.positives)
            lines.write(json.dumps(line).encode() + b"\n")
            if split != "label":
                groups.write(f"{item.uid}\t{item.group}\n".encode())
            frequency[list(item.positives)] += 1
            with_image += item.images > 0
            images += item.images
            words += len(item.title.split())
            stated += sum(item.stated)
            for k in range(item.images):
                rows.append({"uid": item.uid, "k": k, "bytes": shop.picture(split, number, k)})
            if len(rows) >= _ROWS:
                pictures.write_table(pa.Table.from_pylist(rows, schema))
                rows = []
            bar.update()
        pictures.write_table(pa.Table.from_pylist(rows, schema))
    facts = {
        "count": count,
        "words_per_title": round(words / count, 2),
        "stated_per_title": round(stated / count, 2),
        "with_image": round(with_image / count, 4),
        "images": images,
    }
    if split == "label":
        return facts
    descending = np.sort(frequency)[::-1]
    total, head = int(frequency.sum()), descending[: -(-len(descending) // 10)]
    return facts | {
        "labels_per_document": round(total / count, 3),
        "documents_per_label_max": int(descending[0]),
        "documents_per_label_median": float(np.median(frequency)),
        "labels_without_documents": int((frequency == 0).sum()),
        "pairs_of_top_tenth": round(float(head.sum()) / total, 4),
    }


def _stats(folder: pathlib.Path) -> dict[str, Any]:
    try:
        stats = json.loads((folder / "stats.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # the caller says that the folder is another
        return {}
    return stats if isinstance(stats, dict) else {}


def _gzip(path: pathlib.Path):
    return gzip.GzipFile(path, "wb", mtime=0)  # without the time: equal items, equal bytes


def _libraries() -> None:
    try:
        import PIL.Image  # noqa: F401
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"expected Pillow and pyarrow, found no {error.name}; pip install 'xmc_jax[vision]'"
        ) from error
