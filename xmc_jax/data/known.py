"""Published facts of datasets known by name, which `prepare` checks and uses."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Known:
    """What is published about a dataset."""

    train: int  # training documents
    test: int  # test documents
    labels: int  # labels
    labels_per_document: float  # mean positives of a training document
    a: float = 0.6  # propensity exponent
    b: float = 2.6  # propensity offset


# Source: the Extreme Classification Repository's table, 28 Feb 2025; A and B as in ViXML's run
# scripts. The Debian sets: their stats.json.
KNOWN = {
    "LF-AmazonTitles-131K": Known(294_805, 134_835, 131_073, 2.29),
    "LF-Amazon-131K": Known(294_805, 134_835, 131_073, 2.29),
    "MM-AmazonTitles-300K": Known(586_781, 260_536, 303_296, 8.13),
    "LF-AmazonTitles-1.3M": Known(2_248_619, 970_237, 1_305_265, 22.20),
    "LF-DebianTitles-3K": Known(4_008, 677, 2_598, 5.845),
    "LF-DebianTitles-26K": Known(32_606, 5_588, 25_799, 4.387),
}


def propensity(dataset: str) -> tuple[float, float]:
    """Constants A and B of a dataset by name; of unknown ones pyxclib's."""
    entry = KNOWN.get(dataset)
    return (entry.a, entry.b) if entry else (0.55, 1.5)


def text(dataset: str) -> str:
    """What is read of a dataset by name: "title" where the name says so, else "title_content".

    Source: the ViXML reference's rule.
    """
    return "title" if "title" in dataset.lower() else "title_content"
