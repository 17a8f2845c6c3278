"""Words of messages and reports that depend on numbers."""


def counted(count: int, noun: str, plural: str = "") -> str:
    """A number with its noun, such as "1 step" or "1,200 steps".

    Args:
        plural: for other numbers; the noun with an s by default.
    """
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"
