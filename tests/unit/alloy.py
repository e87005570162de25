"""Reads Alloy's configuration language as far as the shipped file uses it: blocks, attributes, and their values.

No Alloy can be run in these tests. This is stricter than Alloy (what it does not know is an error), and says nothing of
what a component does with its arguments.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r]+|//[^\n]*)|(?P<newline>\n)|(?P<string>"(?:\\.|[^"\\\n])*")|(?P<number>\d+(?:\.\d+)?)"""
    r"""|(?P<name>[A-Za-z_][A-Za-z0-9_]*)|(?P<sign>[{}\[\]()=,.+])"""
)


class AlloyError(ValueError):
    """The text is not right; the message names the line."""


@dataclass(frozen=True)
class Reference:
    """What another component exports, such as `loki.write.loki.receiver`."""

    path: tuple[str, ...]


@dataclass(frozen=True)
class Call:
    """A function of the standard library, such as `sys.env("NAME")`."""

    function: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Sum:
    parts: tuple[Any, ...]


@dataclass
class Block:
    name: str
    label: str | None
    arguments: dict[str, Any] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)

    def all(self, name: str) -> list[Block]:
        return [one for one in self.blocks if one.name == name]

    def walk(self) -> Iterator[Block]:
        for one in self.blocks:
            yield one
            yield from one.walk()


def parse(text: str) -> Block:
    """The whole file as one block without a name. Raises `AlloyError`."""
    reader = _Reader(text)
    whole = Block("", None)
    reader.body(whole, end="")
    return whole


class _Reader:
    def __init__(self, text: str) -> None:
        self._tokens: list[tuple[str, str, int]] = []
        at, line = 0, 1
        while at < len(text):
            match = _TOKEN.match(text, at)
            if match is None:
                raise AlloyError(f"line {line}: {text[at : at + 20]!r}")
            kind = match.lastgroup or ""
            if kind != "space":
                self._tokens.append((kind, match[0], line))
            line += match[0].count("\n")
            at = match.end()
        self._tokens.append(("end", "", line))
        self._at = 0

    def body(self, block: Block, *, end: str) -> None:
        while True:
            self._skip_lines()
            if self._take(end):
                return
            words = [self._name()]
            while self._take("."):
                words.append(self._name())
            name = ".".join(words)
            if self._take("="):
                if name in block.arguments:
                    raise self._error(f"{name} is given twice")
                block.arguments[name] = self._value()
            else:
                label = json.loads(self._next("string")) if self._peek()[0] == "string" else None
                self._must("{")
                inner = Block(name, label)
                self.body(inner, end="}")
                block.blocks.append(inner)
            if self._peek()[0] not in ("newline", "end") and self._peek()[1] != end:
                raise self._error("one statement a line")

    def _value(self) -> Any:
        parts = [self._term()]
        while self._take("+"):
            parts.append(self._term())
        return parts[0] if len(parts) == 1 else Sum(tuple(parts))

    def _term(self) -> Any:
        kind, text, _ = self._peek()
        if kind == "string":
            return json.loads(self._next("string"))
        if kind == "number":
            return float(self._next("number"))
        if self._take("["):
            return list(self._items("]", self._value))
        if self._take("{"):
            return dict(self._items("}", self._pair))
        if text in ("true", "false"):
            return self._name() == "true"
        words = [self._name()]
        while self._take("."):
            words.append(self._name())
        if self._take("("):
            return Call(".".join(words), tuple(self._items(")", self._value)))
        return Reference(tuple(words))

    def _pair(self) -> tuple[str, Any]:
        key = json.loads(self._next("string")) if self._peek()[0] == "string" else self._name()
        self._must("=")
        return key, self._value()

    def _items(self, end: str, read: Any) -> Iterator[Any]:
        self._skip_lines()
        while not self._take(end):
            yield read()
            has_comma = self._take(",")
            before = self._peek()[0]
            self._skip_lines()
            if not has_comma and (before == "newline" or self._peek()[1] != end):
                raise self._error("a comma is missing")

    def _peek(self) -> tuple[str, str, int]:
        return self._tokens[self._at]

    def _take(self, text: str) -> bool:
        if self._peek()[1] != text or self._peek()[0] not in ("sign", "end"):
            return False
        self._at += 1
        return True

    def _must(self, text: str) -> None:
        if not self._take(text):
            raise self._error(f"expected {text!r}")

    def _next(self, kind: str) -> str:
        found, text, _ = self._peek()
        if found != kind:
            raise self._error(f"expected a {kind}")
        self._at += 1
        return text

    def _name(self) -> str:
        return self._next("name")

    def _skip_lines(self) -> None:
        while self._peek()[0] == "newline":
            self._at += 1

    def _error(self, why: str) -> AlloyError:
        return AlloyError(f"line {self._peek()[2]}: {why}, found {self._peek()[1]!r}")
