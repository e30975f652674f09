"""Reads HTML pages for tests."""

import re
from html.parser import HTMLParser


class Page(HTMLParser):
    """Tags and attributes of a page; fails on tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def assert_loads_nothing(text: str) -> None:
    """The page needs no network and no other file, and runs no script but its own."""
    assert not re.search(r"(?i)\b(?:https?|ftp|file):|@import|//\w", re.sub(r'xmlns(?::\w+)?="[^"]*"', "", text))
    for tag, attributes in Page(text).tags:
        assert tag not in ("link", "img", "image", "iframe", "object", "embed", "base", "form")
        assert "src" not in attributes
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key in ("href", "xlink:href"):
                assert (value or "").startswith("#")
    assert "default-src 'none'" in text
