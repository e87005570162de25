"""Slurm's way to write many node names as one: `n[1-3,07],login,r[1-2]c[01-16]`."""

from __future__ import annotations

import itertools
import math
import re
from typing import Final

_MOST = 65_536  # names in one expression; there is no such cluster
_ELEMENT: Final = re.compile(r"(?:[^,\[\]\s]|\[[\d,-]+\])+")
_PIECE: Final = re.compile(r"\[([\d,-]+)\]|([^\[\]]+)")
_RANGE: Final = re.compile(r"(\d{1,12})(?:-(\d{1,12}))?")


def expand(expression: str) -> frozenset[str]:
    """Every name that the expression stands for; "" and "(null)" stand for none. Raises ValueError if it is not one."""
    return frozenset(in_order(expression))


def in_order(expression: str) -> list[str]:
    """The same names in the order in which they are written: of a job's nodes, the first one runs its batch script."""
    if expression in ("", "(null)"):
        return []
    names: list[str] = []
    at = 0
    while at < len(expression):
        element = _ELEMENT.match(expression, at)
        at = element.end() if element else at
        if element is None or expression[at : at + 1] not in ("", ",") or expression[at:] == ",":
            raise ValueError(f"not a list of nodes: {expression[:64]}")
        pieces = [_numbers(bracket) if bracket else [text] for bracket, text in _PIECE.findall(element[0])]
        if len(names) + math.prod(map(len, pieces)) > _MOST:
            raise ValueError(f"more than {_MOST} nodes: {expression[:64]}")
        names += ["".join(parts) for parts in itertools.product(*pieces)]
        at += 1
    return names


def _numbers(bracket: str) -> list[str]:
    """`1-3,07`: the first number's zeros are kept."""
    found: list[str] = []
    for part in bracket.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise ValueError(f"not a list of nodes: [{bracket[:64]}]")
        first, last = match[1], match[2] or match[1]
        if not 0 <= int(last) - int(first) <= _MOST:
            raise ValueError(f"no range, or one of more than {_MOST} nodes: [{bracket[:64]}]")
        found += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return found
