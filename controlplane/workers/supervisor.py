"""The supervisor: keeps as many workers as were asked for, and is the one place where their numbers are added up.

Each worker has a place: a listening socket that is this process's own, so that a connection which the kernel has given
to a place waits there while its worker is being replaced, and is not lost. A worker that ends is replaced at once. If
it did not live long, and the one before it neither, the place is closed for a while, longer each time, so that the
kernel gives its share of the connections to the others.

A worker that was told to stop takes no more connections, is replaced at once, and has the drain timeout to finish. What
it has counted is asked for now and then and told at its end, and is never forgotten: no counter falls. After kill -9
what it counted since it was asked last is lost.

Workers are processes of their own, started anew and not forked: no database connection and no event loop is shared.
They are in sessions of their own, or a terminal's Ctrl-C would reach them, too. They read the same environment, so that
no secret is on a command line.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from loguru import logger

import controlplane
from controlplane.metrics import Numbers, exposition, lasting, total
from controlplane.metrics.proxy import FAMILIES
from controlplane.servers import CannotListen, listen_beside, listen_together
from controlplane.workers.channel import Channel, Kind

_ANSWER_SECONDS = 0.2  # who takes longer counts with what it said last
_LOOK_SECONDS = 5.0  # between two looks at what was counted, should nobody scrape
_MARGIN_SECONDS = 10.0  # beyond the drain timeout, to write down usage and close the database
_SHORT_LIFE_SECONDS = 10.0
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 30.0


class Supervisor:
    """Of `count` workers on one address, which is taken at once. Raises CannotListen."""

    def __init__(self, *, host: str, port: int, count: int, drain_timeout_seconds: float) -> None:
        sockets = listen_together("proxy", host, port, count)
        self._host = host
        self._port: int = sockets[0].getsockname()[1]
        self._places = dict(enumerate(sockets, 1))
        self._patience_seconds = drain_timeout_seconds + _MARGIN_SECONDS
        self._stopping = asyncio.Event()
        self._workers: set[_Worker] = set()
        self._of_the_gone: Numbers = {}
        self.is_clean = True
        """No worker had to be killed, and none failed, while everything was stopping."""

    def stop(self) -> None:
        self._stopping.set()
        for listening in self._places.values():
            listening.close()  # the workers' ends are left: what waits is theirs, who comes later is refused

    async def work(self) -> None:
        """Until every worker has ended after `stop`. Cancelled, it kills them."""
        async with asyncio.TaskGroup() as tasks:
            looking = tasks.create_task(self._look())
            async with asyncio.TaskGroup() as places:
                for number in self._places:
                    places.create_task(self._keep(number, places))
            looking.cancel()

    # --- one place ----------------------------------------------------------------------------------------

    async def _keep(self, number: int, tasks: asyncio.TaskGroup) -> None:
        """Have a worker at this place until all shall stop."""
        short_lives = 0
        while not self._stopping.is_set():
            try:
                worker = await self._start(number, tasks)
            except OSError as error:
                logger.error("a worker cannot be started; trying again", number=number, error=str(error))
                await _within(_FIRST_PAUSE_SECONDS, self._stopping)
                continue
            await _first_of(worker.leaves, self._stopping)
            if not self._stopping.is_set() and worker.ended.is_set():
                short_lives = short_lives + 1 if worker.age_seconds < _SHORT_LIFE_SECONDS else 0
                pause_seconds = _pause_seconds(short_lives)
                logger.warning(
                    f"worker {number} ended by {worker.end}; another takes its place",
                    pid=worker.pid,
                    age_seconds=round(worker.age_seconds, 1),
                    pause_seconds=pause_seconds,
                )
                if pause_seconds:
                    await self._close_for(number, pause_seconds)
            elif not self._stopping.is_set():
                logger.info(f"worker {number} stops; another takes its place", pid=worker.pid)

    async def _start(self, number: int, tasks: asyncio.TaskGroup) -> _Worker:
        worker = await _Worker.start(number, self._places[number])
        self._workers.add(worker)
        for attention in (worker.watch(), self._see_off(worker), self._attend(worker)):
            tasks.create_task(attention)
        return worker

    async def _close_for(self, number: int, pause_seconds: float) -> None:
        """Leave the place's connections to others for so long, and until it can be had again."""
        self._places[number].close()
        while True:
            await _within(pause_seconds, self._stopping)
            if self._stopping.is_set():
                return
            try:
                self._places[number] = listen_beside("proxy", self._host, self._port)
            except CannotListen as error:
                logger.error("a worker's place is lost", number=number, error=str(error))
            else:
                return

    async def _see_off(self, worker: _Worker) -> None:
        """Have the worker stop when all shall, and kill it when it takes too long to."""
        try:
            await _first_of(worker.leaves, self._stopping)
            if self._stopping.is_set():
                worker.ask_to_stop()
            if not await _within(self._patience_seconds, worker.ended):
                logger.warning(f"worker {worker.number} did not end in time and is killed", pid=worker.pid)
                self.is_clean = False
        finally:
            await worker.kill()

    async def _attend(self, worker: _Worker) -> None:
        """Hear the worker out until it is gone, and keep what it has counted."""
        try:
            async with asyncio.TaskGroup() as answers:  # beside the hearing: the total is asked of this worker as well
                while message := await worker.channel.receive():
                    if message.kind is Kind.COUNTED:
                        worker.has_told(message.numbers)
                    elif message.kind is Kind.STOPPING:
                        worker.leaves.set()
                    elif message.kind is Kind.SCRAPE:
                        answers.create_task(self._tell_total(worker))
            if not await _within(_MARGIN_SECONDS, worker.ended):  # it has nothing to say any more, and does not end
                await worker.kill()
            if self._stopping.is_set() and worker.has_failed:
                self.is_clean = False
        finally:
            self._workers.discard(worker)
            self._of_the_gone = total(FAMILIES, [self._of_the_gone, lasting(FAMILIES, worker.numbers)])
            await worker.channel.close()

    # --- numbers ------------------------------------------------------------------------------------------

    async def _look(self) -> None:
        """Now and then, so that little is lost with a worker that is killed."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            await self._total()

    async def _tell_total(self, worker: _Worker) -> None:
        numbers = await self._total()
        text = await asyncio.to_thread(exposition, numbers)  # takes a while where there are many models and tenants
        worker.channel.send(Kind.TOTAL, text=text.decode())

    async def _total(self) -> Numbers:
        """What all workers have counted, those included that are gone."""
        if asked := [asyncio.ensure_future(worker.ask()) for worker in self._workers]:
            _, late = await asyncio.wait(asked, timeout=_ANSWER_SECONDS)
            for one in late:
                one.cancel()
        return total(FAMILIES, [self._of_the_gone, *(worker.numbers for worker in self._workers)])


class _Worker:
    """One process, from its start to its end."""

    def __init__(self, number: int, process: Process, channel: Channel) -> None:
        self.number = number
        self.channel = channel
        self.numbers: Numbers = {}  # as it has told them last
        self.leaves = asyncio.Event()  # it takes no more connections, or has ended
        self.ended = asyncio.Event()
        self._process = process
        self._told = asyncio.Event()
        self._started_at = time.monotonic()
        self._ended_at: float | None = None

    @classmethod
    async def start(cls, number: int, listening: socket.socket) -> _Worker:
        """Raises OSError."""
        ours, theirs = socket.socketpair()
        handed = (listening.fileno(), theirs.fileno())
        with theirs, ExitStack() as undo:
            undo.callback(ours.close)
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-P", "-m", "controlplane.workers", str(number), *map(str, handed)),
                pass_fds=handed,
                stdin=DEVNULL,
                start_new_session=True,
                env=_environment(os.environ),
            )
            undo.pop_all()
        return cls(number, process, await Channel.over(ours))

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    @property
    def age_seconds(self) -> float:
        return (self._ended_at or time.monotonic()) - self._started_at

    @property
    def has_failed(self) -> bool:
        """It ended otherwise than asked to; before it listens to signals, the signal itself ends it."""
        return self._process.returncode not in (0, -signal.SIGTERM)

    @property
    def end(self) -> str:
        code = self._process.returncode or 0
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    async def watch(self) -> None:
        await self._process.wait()
        self._ended_at = time.monotonic()
        self.ended.set()
        self.leaves.set()

    def ask_to_stop(self) -> None:
        if self._process.returncode is None:
            self._process.terminate()

    async def kill(self) -> None:
        """At once, and until it is gone; harmless to one that has ended."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    async def ask(self) -> None:
        """Until it has told what it has counted."""
        self._told.clear()
        self.channel.send(Kind.ASK)
        await self._told.wait()

    def has_told(self, numbers: Numbers) -> None:
        self.numbers = numbers
        self._told.set()


def _environment(ours: Mapping[str, str]) -> dict[str, str]:
    """With this package's place, because `-P` keeps the current directory's files from being taken for it."""
    place = str(Path(controlplane.__file__).parent.parent)
    return {**ours, "PYTHONPATH": os.pathsep.join(filter(None, [place, ours.get("PYTHONPATH")]))}


def _pause_seconds(short_lives: int) -> float:
    """Before the next start, after so many short lives in a row: the first is no reason to wait."""
    if short_lives < 2:
        return 0
    return min(_FIRST_PAUSE_SECONDS * 2.0 ** min(short_lives - 2, 16), _LONGEST_PAUSE_SECONDS)


async def _first_of(*events: asyncio.Event) -> None:
    waiting = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for one in waiting:
            one.cancel()


async def _within(seconds: float, event: asyncio.Event) -> bool:
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return False
