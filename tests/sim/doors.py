"""The product's two doors to the outside, each use of which is a step: its database and its HTTP."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from types import FrameType
from typing import Protocol

import httpx

from controlplane.db import Database, DbUnavailable
from controlplane.db.pool import Connection
from tests.sim.steps import Fate, Process, Stage


class Door(Database):
    """A process's way to the one real database."""

    def __init__(self, real: Database, process: Process, stage: Stage) -> None:
        self._real = real
        self._process = process
        self._stage = stage

    @asynccontextmanager
    async def connection(self, *, timeout_seconds: float | None = None) -> AsyncIterator[Connection]:
        async with self._stage.step(self._process, "db", _caller(inspect.currentframe())) as (fate, _):
            if fate is Fate.DB_AWAY:
                raise DbUnavailable("the server closed the connection unexpectedly")
            async with self._real.connection(timeout_seconds=timeout_seconds) as connection:
                yield connection
            if fate is Fate.DB_CUT:
                raise DbUnavailable("the server closed the connection unexpectedly")


def _caller(frame: FrameType | None) -> str:
    """The noun's function that opened the door, such as `replicas.move`."""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("controlplane.db.") and not module.endswith(".pool"):
            return f"{module.rpartition('.')[2]}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "database"


class Site(Protocol):
    """Everything that answers HTTP."""

    def answer(self, process: Process, request: httpx.Request, fate: Fate, composed_at: datetime) -> httpx.Response:
        """Raises what httpx would raise."""

    def composed(self, process: Process, request: httpx.Request) -> None:
        """A process is about to send this."""

    def words(self, request: httpx.Request) -> str:
        """The request, for the trace."""


class Wire(httpx.AsyncBaseTransport):
    """Carries one process's requests to the site as bytes, and the answers back."""

    def __init__(self, site: Site, process: Process, stage: Stage) -> None:
        self._site = site
        self._process = process
        self._stage = stage

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        self._site.composed(self._process, request)
        async with self._stage.step(self._process, "http", self._site.words(request)) as (fate, composed_at):
            return self._site.answer(self._process, request, fate, composed_at)
