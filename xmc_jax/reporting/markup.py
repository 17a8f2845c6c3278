"""HTML and SVG as trees of elements: whatever is text is escaped when they are written."""

import re
from collections.abc import Mapping
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

# Neither in HTML nor worth showing: control characters but tab and line ends, and what is no text.
_UNSHOWN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

Child = Element | str | None
"""What an element holds; None is nothing."""


def element(tag: str, attributes: Mapping[str, object] | None = None, *children: Child) -> Element:
    """An element of HTML or SVG.

    Args:
        tag: its name.
        attributes: name -> value, written as text; those that are None are left out.
        *children: elements and texts, in order.
    """
    made = Element(
        tag, {name: plain(value) for name, value in (attributes or {}).items() if value is not None}
    )
    add(made, *children)
    return made


def add(parent: Element, *children: Child) -> None:
    """Appends elements and texts to an element."""
    for child in children:
        if isinstance(child, Element):
            parent.append(child)
        elif child is not None and len(parent):
            parent[-1].tail = (parent[-1].tail or "") + plain(child)
        elif child is not None:
            parent.text = (parent.text or "") + plain(child)


def plain(value: object) -> str:
    """A value as text that may stand in a page, without what cannot be shown."""
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return _UNSHOWN.sub("\N{REPLACEMENT CHARACTER}", str(value))


def quoted(text: str, limit: int = 160) -> Element:
    """A text from data, cut after `limit` characters, that keeps its direction to itself."""
    return element("bdi", None, text if len(text) <= limit else text[: limit - 1].rstrip() + "…")


def render(root: Element) -> str:
    """The page of an `html` element."""
    return "<!DOCTYPE html>\n" + ElementTree.tostring(root, encoding="unicode", method="html")
