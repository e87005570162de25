"""Real servers for the tests, and a way to wait for facts.

Everything that a session starts belongs to one directory below the system's temporary folder, where other users may
look in (PostgreSQL and Slurm run as other users). It is removed at the end; what a killed session left is ended and
removed by the next one. A program that is missing is an error that names `make setup`, never a skipped test.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, overload

import pytest
from xdist.scheduler import LoadScopeScheduling

from controlplane.demo.children import free_ports
from controlplane.demo.claims import DirectoryInUse, claim
from controlplane.demo.postgres import PrivatePostgres

T = TypeVar("T")

_POLL_SECONDS = 0.02


@overload
async def eventually(fact: Callable[[], Awaitable[T | None]], *, timeout_seconds: float = 10) -> T: ...
@overload
async def eventually(fact: Callable[[], T | None], *, timeout_seconds: float = 10) -> T: ...
async def eventually(fact: Callable[[], Any], *, timeout_seconds: float = 10) -> Any:
    """What `fact` returns, once that is truthy; an AssertionError in it means not yet. Fails when the time is up."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        late = time.monotonic() > deadline
        try:
            found = fact()
            value = await found if inspect.isawaitable(found) else found
        except AssertionError:
            if late:
                raise
        else:
            if value or late:
                assert value, f"still {value!r} after {timeout_seconds:g} s"
                return value
        await asyncio.sleep(_POLL_SECONDS)


def eventually_sync(fact: Callable[[], T], *, timeout_seconds: float = 10) -> T:
    """`eventually` for tests without an event loop."""
    return asyncio.run(eventually(fact, timeout_seconds=timeout_seconds))


class OneSlurm(LoadScopeScheduling):  # type: ignore[misc] # xdist tells no types
    """What `make test` runs side by side: a file is one piece, and so are the end-to-end tests: they share ports."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "e2e" if "/e2e/" in file else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneSlurm:
    return OneSlurm(config, log)


@pytest.fixture(scope="session")
def session_directory() -> Iterator[Path]:
    """Where this session's servers live; short enough for unix sockets, and readable for other users."""
    parent = Path(tempfile.gettempdir()) / f"controlplane-tests-{os.getuid()}"
    parent.mkdir(mode=0o755, exist_ok=True)
    assert parent.stat().st_uid == os.getuid(), f"{parent} belongs to somebody else"
    parent.chmod(0o755)
    for left in parent.iterdir():
        try:
            with claim(left):
                shutil.rmtree(left)
        except DirectoryInUse:
            continue
    directory = Path(tempfile.mkdtemp(prefix="s", dir=parent))
    with claim(directory):
        directory.chmod(0o755)
        yield directory
    shutil.rmtree(directory, ignore_errors=True)  # a session that has just begun may be at it as well


@pytest.fixture(scope="session")
def postgres(session_directory: Path) -> Iterator[PrivatePostgres]:
    """A real PostgreSQL, quick because it would not survive a power cut."""
    with PrivatePostgres(session_directory / "postgres", is_durable=False) as server:
        yield server


@pytest.fixture(scope="session")
def template_database(postgres: PrivatePostgres) -> str:
    """The name of a database with the schema and nothing in it."""
    from controlplane.db import migrate

    migrate(postgres.create_database("template"))
    return "template"


_database_numbers = itertools.count(1)


@pytest.fixture
def database_url(postgres: PrivatePostgres, template_database: str) -> Iterator[str]:
    """The URI of a migrated database for this test alone."""
    name = f"test_{next(_database_numbers)}"
    yield postgres.create_database(name, template=template_database)
    postgres.drop_database(name)


@pytest.fixture
def free_port() -> int:
    """A port of 127.0.0.1 on which nothing listens."""
    return free_ports(1)[0]
