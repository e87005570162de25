"""Who takes the next step: every call that the product makes outwards waits here until it is let go.

A step is one use of the database or one HTTP exchange. One step is under way at a time, and who goes next is drawn
from the seed; so two control planes are interleaved at every boundary, a sleeper is one that is not let go, and a kill
takes a process before or after any step. While no step is under way nothing waits for the outside world, so that the
same draws give the same life.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum, auto
from typing import Any

from tests.sim.slurm import Reservation

_HOPS = 8  # turns of the event loop in which a process comes from one step to the next; more are taken if need be
_MOST_HOPS = 5_000


class Killed(BaseException):
    """The process died here: nothing of it runs any further."""


class Stuck(AssertionError):
    """A process neither ends nor asks for anything: it waits for something that this world does not have."""


class Fate(StrEnum):
    """What becomes of one step."""

    DONE = auto()
    DIES_BEFORE = auto()  # the process does
    DIES_AFTER = auto()
    # of the database
    DB_AWAY = auto()  # refused before anything was written
    DB_CUT = auto()  # written, and the answer is lost
    # of HTTP
    REFUSED = auto()  # no connection
    NOT_CONNECTED = auto()  # no answer to the connection's first packet
    TIMEOUT_BEFORE = auto()  # sent, and never arrived
    TIMEOUT_AFTER = auto()  # acted upon, and no answer came
    BROKEN_AFTER = auto()  # acted upon, and the connection broke
    ERROR_AFTER = auto()  # acted upon, and answered with a 500 that says it may not have happened
    LATE = auto()  # no answer came, and it is acted upon later
    TRUNCATED = auto()  # the answer lacks its end
    SLOW = auto()  # all is well, and takes its time
    STALE = auto()  # a list as it was some seconds ago


@dataclass(eq=False)
class Process:
    """One operating-system process: it can be killed, or stopped and woken up late."""

    name: str
    is_dead: bool = False
    is_asleep: bool = False
    dies_at: str | None = None  # the first step whose label has this in it
    sleeps_at: str | None = None
    wakes_at: datetime | None = None
    tasks: list[asyncio.Task[Any]] = field(default_factory=list)
    has_seen_jobs: bool = False  # in its present round: a complete list came
    saw_stale_jobs: bool = False
    round_began: datetime | None = None
    told_reservations: tuple[Reservation, ...] = ()
    calendar: tuple[Reservation, ...] = ()  # of these it knows on which nodes they matter, too

    def begin(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.append(task)
        return task

    @property
    def is_busy(self) -> bool:
        return any(not task.done() for task in self.tasks)


@dataclass(eq=False)
class Parked:
    """A step that waits to be let go."""

    process: Process
    kind: str  # db | http
    label: str
    since: datetime
    fate: asyncio.Future[Fate]


class Stage:
    """Where the steps wait. `clock` is the virtual one."""

    def __init__(self, clock: Callable[[], datetime]) -> None:
        self._clock = clock
        self.processes: list[Process] = []
        self.parked: list[Parked] = []
        self.taken = 0
        self._ended = asyncio.Event()

    @asynccontextmanager
    async def step(self, process: Process, kind: str, label: str) -> AsyncIterator[tuple[Fate, datetime]]:
        """Wait to be let go; yields the step's fate, and when it began to wait: what it says was made up then."""
        if process.is_dead:
            raise Killed
        parked = Parked(process, kind, label, self._clock(), asyncio.get_running_loop().create_future())
        self.parked.append(parked)
        try:
            fate = await parked.fate
        except asyncio.CancelledError:  # the process itself has thought better of it
            self.parked = [one for one in self.parked if one is not parked]
            raise
        try:
            if fate is Fate.DIES_BEFORE:
                process.is_dead = True
                raise Killed
            yield fate, parked.since
            if fate is Fate.DIES_AFTER:
                process.is_dead = True
                raise Killed
        finally:
            self._ended.set()

    async def let_go(self, parked: Parked, fate: Fate) -> None:
        """Returns when the step has ended and its process has come to its next one."""
        self.parked.remove(parked)
        self.taken += 1
        self._ended.clear()
        parked.fate.set_result(fate)
        await self._ended.wait()

    async def awake(self) -> list[Parked]:
        """The steps that could be next; none: whoever is awake has ended."""
        for _ in range(_HOPS):
            await asyncio.sleep(0)
        for _ in range(_MOST_HOPS):
            ready = [one for one in self.parked if not one.process.is_asleep]
            if ready or not any(one.is_busy and not one.is_asleep for one in self.processes):
                return ready
            await asyncio.sleep(0)
        raise Stuck("a process neither ends nor asks for anything")

    async def kill(self, process: Process) -> None:
        """End a process where it stands."""
        process.is_dead = True
        for parked in [one for one in self.parked if one.process is process]:
            self.parked.remove(parked)
            parked.fate.set_exception(Killed())
        await asyncio.gather(*process.tasks, return_exceptions=True)
        for _ in range(_HOPS):
            await asyncio.sleep(0)  # what its tasks had begun ends as well
