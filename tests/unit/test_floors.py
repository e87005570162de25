"""The floors of the house: a file imports from floors below its own, never upwards and never sideways.

What is checked is read from the source by `ast`, so that imports inside functions and for type checkers count, too.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import controlplane

PACKAGE = Path(controlplane.__file__).parent

LEAVES = frozenset({"clock", "logs", "metrics"})
GROUND = frozenset({"core"})
FIRST = frozenset({"db", "slurm", "specs"})
SECOND = frozenset({"reconcile", "web", "proxy"})
# settings: only the roof may read it
ROOF = frozenset({"app", "cli", "demo", "dependencies", "servers", "settings", "workers"})
BELOW = {
    **dict.fromkeys(LEAVES, frozenset[str]()),
    **dict.fromkeys(GROUND, frozenset[str]()),
    **dict.fromkeys(FIRST, GROUND | LEAVES),
    **dict.fromkeys(SECOND, FIRST | GROUND | LEAVES),
    **dict.fromkeys(ROOF, ROOF | SECOND | FIRST | GROUND | LEAVES),
    "settings": frozenset[str](),
}
"""Which rooms each room may import; its own is always allowed, third parties' code is, except on the ground."""

NOT_PURE = frozenset({"asyncio", "contextvars", "logging", "os", "socket", "subprocess", "threading", "time"})
CLOCKS = frozenset({"now", "utcnow", "today"})


def violations(file: str, source: str) -> list[str]:
    """What the file (its path inside the package) imports or, on the ground, does although its floor forbids it."""
    room = _room(file)
    if room not in BELOW:
        return [f"{file}: no floor is known for {room!r}; give it one here and in docs/architecture.md"]
    tree = ast.parse(source, file)
    faults = [f"{file}:{line} imports {module}" for line, module in _imports(tree, file) if not _may(room, module)]
    if room in GROUND:
        faults += [f"{file}:{line} {fault}" for line, fault in _impurities(tree)]
    return faults


def _room(file: str) -> str:
    room = file.split("/", maxsplit=1)[0].removesuffix(".py")
    return "cli" if room.startswith("cli_") else room


def _may(room: str, module: str) -> bool:
    package, _, rest = module.partition(".")
    if package != "controlplane":
        return room not in GROUND or package in sys.stdlib_module_names - NOT_PURE
    other = _room(rest.split(".", maxsplit=1)[0])
    return other in ("", room) or other in BELOW[room]


def _imports(tree: ast.AST, file: str) -> Iterator[tuple[int, str]]:
    folder = ["controlplane", *file.split("/")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                module = ".".join([*folder[: len(folder) - node.level + 1], *filter(None, [module])])
            if module == "controlplane":
                yield from ((node.lineno, f"controlplane.{name.name}") for name in node.names if name.name[0] != "_")
            else:
                yield node.lineno, module


def _impurities(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.AsyncFunctionDef | ast.Await | ast.AsyncFor | ast.AsyncWith):
            yield node.lineno, "awaits"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CLOCKS:
            yield node.lineno, "reads a clock"


def test_every_file_imports_downwards_only() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert files
    found = [
        fault
        for path in files
        if path.name != "__init__.py" or path.parent != PACKAGE
        for fault in violations(path.relative_to(PACKAGE).as_posix(), path.read_text())
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("core/scaling.py", "import httpx"),
        ("core/scaling.py", "def rule() -> None:\n    from httpx import get"),
        ("core/scaling.py", "from controlplane.db import Database"),
        ("core/scaling.py", "from controlplane.clock import utc_now"),
        ("core/scaling.py", "import time"),
        ("core/scaling.py", "from ..settings import Settings"),
        ("core/scaling.py", "async def rule() -> None: ..."),
        ("core/scaling.py", "from datetime import datetime, UTC\nnow = datetime.now(UTC)"),
        ("db/pool.py", "from controlplane.slurm.client import SlurmClient"),
        ("db/pool.py", "from controlplane.settings import Settings"),
        ("slurm/client.py", "from controlplane import db"),
        ("specs.py", "import controlplane.db.replica_sets"),
        ("web/api.py", "from controlplane.proxy.api import create_app"),
        ("web/api.py", "from ..reconcile import loop"),
        ("reconcile/loop.py", "from controlplane.app import serve"),
        ("proxy/api.py", "from controlplane.cli import main"),
        ("proxy/api.py", "from controlplane.demo.children import claim"),
        ("metrics.py", "from controlplane.core.types import Replica"),
        ("settings.py", "from controlplane.db import DatabaseOptions"),
        ("attic/things.py", "import json"),
    ],
)
def test_an_import_upwards_or_sideways_is_found(file: str, source: str) -> None:
    assert violations(file, source)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("core/scaling.py", "import math\nfrom datetime import timedelta\nfrom controlplane.core.types import Alert"),
        ("core/balancing.py", "from random import Random\nfrom .types import Endpoint"),
        (
            "db/pool.py",
            "import psycopg\nfrom controlplane.core.types import Alert\nfrom controlplane.clock import utc_now",
        ),
        ("web/api.py", "from controlplane import __version__\nfrom controlplane.db import Database"),
        ("reconcile/loop.py", "from controlplane.slurm import SlurmClient"),
        ("app.py", "from controlplane.reconcile.loop import Runner\nfrom controlplane.settings import Settings"),
        ("cli_tables.py", "import rich\nfrom controlplane.db import replicas"),
        ("cli.py", "from controlplane.cli_tables import table\nfrom controlplane.demo import scenario"),
    ],
)
def test_an_import_downwards_is_allowed(file: str, source: str) -> None:
    assert violations(file, source) == []
