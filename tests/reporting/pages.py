"""Reading a report's page as a browser does: its elements, without a browser."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = frozenset({"meta", "link", "br", "hr", "img", "input"})


@dataclass
class Element:
    """One element with its text, its children's included."""

    tag: str
    attrs: dict[str, str | None]
    text: str = ""
    parents: tuple[str, ...] = ()


@dataclass
class Page(HTMLParser):
    """All elements of a page in order; raises AssertionError where tags do not match."""

    elements: list[Element] = field(default_factory=list)
    _open: list[Element] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    @classmethod
    def read(cls, text: str) -> Page:
        """Parse a whole page."""
        page = cls()
        page.feed(text)
        page.close()
        assert not page._open, f"never closed: {[element.tag for element in page._open]}"
        return page

    def all(self, tag: str, kind: str = "") -> list[Element]:
        """Elements of a tag, and of a class where one is named."""
        found = [element for element in self.elements if element.tag == tag]
        return [e for e in found if not kind or kind in (e.attrs.get("class") or "").split()]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open an element."""
        element = Element(tag, dict(attrs), parents=tuple(parent.tag for parent in self._open))
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An element without content."""
        parents = tuple(parent.tag for parent in self._open)
        self.elements.append(Element(tag, dict(attrs), parents=parents))

    def handle_endtag(self, tag: str) -> None:
        """Close the innermost element, which must be of this tag."""
        assert self._open, f"</{tag}> closes nothing"
        assert self._open[-1].tag == tag, f"</{tag}> closes <{self._open[-1].tag}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        """Text belongs to every open element."""
        for element in self._open:
            element.text += data
