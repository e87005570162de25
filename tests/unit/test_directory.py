"""What the proxy's directory says of being told of changes, and when. What it reads is `test_proxy_directory`'s."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from datetime import datetime
from typing import Any, cast

import pytest
from loguru import logger

from controlplane.db import Database, DbUnavailable
from controlplane.proxy import directory
from controlplane.proxy.directory import Directory, Snapshot

DEAF = "the directory is not told of changes"
FAILS, WORKS = False, True


@pytest.fixture
def lines() -> Iterator[list[str]]:
    seen: list[str] = []
    sink = logger.add(lambda message: seen.append(message.record["message"]), level="INFO")
    yield seen
    logger.remove(sink)


class Told:
    """A database that can be listened to, and read, as often as is said; then it can be for ever."""

    def __init__(self, listens: list[bool], reads: list[bool]) -> None:
        self._listens = iter(listens)
        self._reads = iter(reads)
        self.is_heard = asyncio.Event()

    async def listen(self, *_: str) -> AsyncIterator[str]:
        if not next(self._listens, WORKS):
            raise DbUnavailable("refused")
        yield ""
        self.is_heard.set()
        await asyncio.Event().wait()

    async def read(self, *_: object) -> Snapshot:
        if not next(self._reads, WORKS):
            raise DbUnavailable("refused")
        return cast("Snapshot", object())


async def follow(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it is listened to."""

    async def read(db: Any, now: datetime) -> Snapshot:
        return await told.read(db, now)

    monkeypatch.setattr(directory, "_read", read)
    followed = Directory(cast("Database", told), refresh_seconds=60.0, on_read=lambda _: None)
    running = asyncio.create_task(followed.run())
    async with asyncio.timeout(10):
        await told.is_heard.wait()
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running


async def test_a_database_that_comes_back_between_the_listening_and_the_read_is_one_outage(
    lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    await follow(Told([FAILS, FAILS], [FAILS, WORKS]), monkeypatch)
    assert lines == ["the directory cannot be read; the last one stays in use", "the directory can be read again"]


@pytest.mark.parametrize("reads", [[WORKS], [FAILS, WORKS]])
async def test_a_database_that_can_be_read_and_not_listened_to_is_said_once(
    reads: list[bool], lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    await follow(Told([FAILS] * 4, reads), monkeypatch)
    assert lines.count(DEAF) == 1
