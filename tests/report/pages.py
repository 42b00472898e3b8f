"""What must be true of every page: it is complete, and its markup is sound."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

_VOID = {"meta", "link", "br", "img", "input", "hr"}
_LOADS = {"src", "srcset", "data", "poster", "action", "formaction", "background", "href", "xlink:href"}


class Page(HTMLParser):
    """A parsed page: its elements, ids, text, and whether its tags are balanced."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.problems: list[str] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        self.problems += [f"<{tag}> is not closed" for tag in self.stack]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.stack or self.stack[-1] != tag:
            self.problems.append(f"</{tag}> closes {self.stack[-1:] or 'nothing'}")
        else:
            self.stack.pop()

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.stack):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]


def sound(path: Path) -> Page:
    """Parse a page and check what every page must keep; returns it."""
    page = Page(path)
    assert page.problems == []
    ids = Counter(a["id"] for _, a in page.elements if "id" in a)
    assert [i for i, n in ids.items() if n > 1] == []
    for tag, attrs in page.elements:
        for name in _LOADS & set(attrs):
            value = attrs[name] or ""
            assert value.startswith(("#", "data:")), f"<{tag} {name}={value[:60]!r}> loads something"
            if value.startswith("#") and len(value) > 1:
                assert value[1:] in ids, f"{value} points nowhere"
        for name in ("aria-controls",):
            assert name not in attrs or attrs[name] in ids
        if tag == "img":
            assert attrs.get("alt")
        if tag == "svg":
            assert attrs.get("aria-label") or attrs.get("aria-hidden") == "true"
    assert not re.search(
        r"(https?:)?//[a-z]", re.sub(r"data:image/png;base64,[\w+/=]*", "", page.source.split("</style>")[0])
    )
    assert "url(http" not in page.source
    assert "@import" not in page.source
    assert len(page.all("title")) >= 1
    assert page.all("html")[0]["lang"] == "en"
    return page


def requests(browser: Any) -> list[str]:
    """The URLs that the browser asked for since the last call."""
    import json

    found = []
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            found.append(message["params"]["request"]["url"])
    return found
