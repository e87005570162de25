"""The documents as tests read them: which there are, their sections, tables and lists."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import controlplane

PACKAGE = Path(controlplane.__file__).parent
ROOT = PACKAGE.parent
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def section(name: str, title: str) -> str:
    """The text below a heading, up to the next one of its rank or above."""
    text = text_of(name)
    match = re.search(rf"^(#+) {re.escape(title)}\n", text, re.MULTILINE)
    assert match, f"{name} has no heading {title!r}"
    rest = text[match.end() :]
    end = re.search(rf"^#{{1,{len(match[1])}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


def table(name: str, title: str) -> list[list[str]]:
    """The rows of the first table below a heading, without its head."""
    lines = itertools.dropwhile(lambda line: not line.startswith("|"), section(name, title).splitlines())
    rows = [
        line.strip().strip("|").split("|") for line in itertools.takewhile(lambda line: line.startswith("|"), lines)
    ]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def column(name: str, title: str, number: int = 0) -> list[str]:
    return [row[number] for row in table(name, title)]
