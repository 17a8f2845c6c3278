"""Words of synthetic products: attributes and how sellers name them, brands and titles."""

import numpy as np

ATTRIBUTES = ("shape", "colour", "pattern")
"""What titles may state of a look; pictures show the pattern's colour besides."""

# Ways to say a value; the first is its name.
SHAPES = (
    ("round", "circular"),
    ("square", "boxy"),
    ("triangular", "three-cornered"),
    ("star-shaped", "star"),
    ("heart-shaped", "heart"),
    ("cross-shaped", "plus-shaped"),
    ("ring-shaped", "donut-shaped"),
    ("diamond-shaped", "diamond"),
)
COLOURS = (
    ("red", "scarlet", "crimson"),
    ("orange", "tangerine"),
    ("yellow", "lemon"),
    ("green", "emerald"),
    ("turquoise", "teal"),
    ("blue", "navy"),
    ("purple", "violet"),
    ("pink", "rose"),
    ("brown", "chocolate"),
    ("black", "jet black"),
)
PATTERNS = (
    ("plain", "solid"),
    ("striped", "pinstripe"),
    ("dotted", "polka dot"),
    ("checked", "checkerboard"),
    ("chevron", "zigzag"),
    ("bordered", "edged"),
)
PLAIN = 0  # has no colour of its own
SIZES = ("mini", "small", "medium", "large", "extra large")
MATERIALS = (
    "wooden",
    "bamboo",
    "steel",
    "ceramic",
    "glass",
    "plastic",
    "cotton",
    "leather",
    "felt",
)
NOUNS = (
    ("teapot", "mug", "saucer", "plate", "bowl", "sugar jar"),
    ("pillow", "blanket", "duvet cover", "bed sheet", "mattress topper", "throw"),
    ("table lamp", "pendant light", "lampshade", "night light", "floor lamp", "wall sconce"),
    ("backpack", "handbag", "wallet", "suitcase", "tote bag", "luggage tag"),
    ("notebook", "pencil case", "stapler", "desk organizer", "binder", "bookmark"),
    ("necklace", "bracelet", "earrings", "brooch", "pendant", "anklet"),
    ("toy car", "puzzle", "building blocks", "doll", "plush toy", "spinning top"),
    ("dog collar", "pet bed", "feeding dish", "leash", "cat tree", "chew toy"),
    ("flower pot", "watering can", "garden gnome", "bird feeder", "planter", "wind chime"),
    ("phone case", "charger", "earbuds", "screen protector", "phone stand", "power bank"),
    ("shower curtain", "bath mat", "towel", "soap dispenser", "toothbrush holder", "robe"),
    ("scarf", "beanie", "gloves", "socks", "sweater", "mittens"),
    ("skillet", "saucepan", "baking tray", "spatula", "casserole", "oven mitt"),
    ("tent", "sleeping bag", "camp stove", "hammock", "cooler", "folding chair"),
    ("guitar strap", "drumsticks", "music stand", "tambourine", "ukulele", "capo"),
    ("yoga mat", "dumbbell", "jump rope", "foam roller", "kettlebell", "resistance band"),
    ("wall clock", "picture frame", "mirror", "vase", "candle holder", "tapestry"),
    ("baby bib", "pacifier", "stroller toy", "crib mobile", "teether", "changing pad"),
    ("fishing rod", "tackle box", "lure", "fishing net", "bobber", "fishing vest"),
    ("bicycle bell", "saddle", "handlebar grips", "water bottle", "bike helmet", "pedal"),
)
HYPES = ("premium", "classic", "new", "deluxe", "everyday", "original", "handy", "luxury")
EXTRAS = ("gift idea", "set of 2", "with gift box", "easy clean", "lightweight", "2024 edition")
_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
_SAID = np.array([0.3, 0.3, 0.6, 0.3, 0.3])  # chance of what distracts in a title


def brand(category: int) -> str:
    """A made-up name, a different one for each category."""
    block = len(_SYLLABLES) ** 3
    # A step that is coprime to the block: neighbours do not sound alike.
    number, name = category // block * block + (category * 7919 + 4321) % block, ""
    while number or len(name) < 6:
        number, digit = divmod(number, len(_SYLLABLES))
        name += _SYLLABLES[digit]
    return name.title()


def title(rng, brand: str, noun: str, material: str, code: str, attributes, states) -> str:
    """A title as a seller would write it."""
    shape, colour, pattern = (
        words[value][rng.integers(len(words[value]))]
        for words, value in zip((SHAPES, COLOURS, PATTERNS), attributes)
    )
    hype, extra = HYPES[rng.integers(len(HYPES))], EXTRAS[rng.integers(len(EXTRAS))]
    size = SIZES[rng.integers(len(SIZES))]
    says_hype, says_size, says_material, says_code, says_extra = rng.random(5) < _SAID
    modifiers = [
        hype if says_hype else "",
        size if says_size else "",
        colour if states[1] else "",
        pattern if states[2] else "",
        shape if states[0] else "",
        material if says_material else "",
    ]
    modifiers = [m for m in modifiers if m]
    form = rng.integers(3)
    if form == 0:
        words = " ".join([brand, *modifiers, noun])
    elif form == 1:
        words = ", ".join([f"{brand} {noun}", *modifiers])
    else:
        words = " ".join([*modifiers, noun, "by", brand])
    words += f", {extra}" if says_extra else ""
    return words.title().replace(" By ", " by ") + (f" {code}" if says_code else "")
