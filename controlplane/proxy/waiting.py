"""Waiting rooms, one for each model: who may pass on a request now, who waits, and for how long.

A room has as many seats as its replicas run requests at once (`core.seats`, which also says whose turn it is). Whoever
comes while one is free takes it and goes on; most requests do no more than that. Others wait, for one of two facts.
*Hold*: nothing is routable, because the model is scaled to zero or its replica still starts. *Queue*: every replica has
as much to do as it may. What is in flight on an endpoint that is leaving has its seat until it ends, and takes none
from the others.

States of one who waits: waiting -> its turn (a seat is taken, `on_turn` is due) -> gone; or waiting -> refused
(`on_refused` is due) -> gone. It may leave in any of them. Callbacks come from the loop, never from within a call.

Failure: nothing here waits for the database. Rooms are bounded, for a model and for a tenant in it, and every wait ends
in time. The bounds are this process's own; seats are shared out among the live workers, which is exact while the kernel
spreads requests evenly, and wastes what one worker has free while another's are taken.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import Enum, auto
from typing import Any, Protocol

from controlplane.clock import utc_now
from controlplane.core.seats import Guest, Seats
from controlplane.core.types import RoutableEndpoint
from controlplane.proxy.directory import ModelState, Snapshot, retry_after_seconds, seconds_to_ready
from controlplane.proxy.errors import ApiError, model_not_found, model_paused, model_starting, queue_full

_SWEEP_SECONDS = 0.25
_QUEUE_RETRY_SECONDS = 5
_LONGEST_PAUSE_WORTH_WAITING_FOR_SECONDS = 60


@dataclass(frozen=True, slots=True)
class WaitingOptions:
    """Bounds are of one worker."""

    hold_seconds: float = 600.0
    hold_seconds_without_stream: float = 50.0  # what says nothing meanwhile is given up by many a proxy after 60 s
    queue_seconds: float = 60.0
    max_waiting_per_model: int = 1000
    max_waiting_per_tenant: int = 500  # for one model
    queue_pressure_seconds: float = 5.0  # a queue that never was empty for so long asks for one more replica


@dataclass(frozen=True, slots=True)
class Waits:
    """How many wait for a model, as far as it asks for a replica."""

    held: int = 0
    queued: int = 0


class Timers(Protocol):
    """What is used of an event loop."""

    def call_soon(self, callback: Callable[[], None], /) -> Any: ...

    def call_later(self, delay: float, callback: Callable[[], None], /) -> Any: ...


def max_in_flight_of(endpoint: RoutableEndpoint) -> int:
    """How many requests it may have at once: what its set says, or else what its engine runs."""
    return endpoint.max_in_flight or endpoint.runs_at_once


class _Door(Enum):
    """What becomes of one who has to wait."""

    OPEN = auto()
    PAUSED = auto()
    NEVER_STARTS = auto()  # no set of the model may start a replica
    GONE = auto()


class _State(Enum):
    WAITING = auto()
    TURN = auto()
    REFUSED = auto()
    OVER = auto()


class Waiting:
    """One request that waits. `leave` when nobody waits for its answer any more."""

    __slots__ = (
        "_guest",
        "_on_refused",
        "_on_turn",
        "_refusal",
        "_room",
        "_rooms",
        "_state",
        "entered_at",
        "is_stream",
    )

    def __init__(
        self,
        rooms: WaitingRooms,
        room: _Room,
        guest: Guest[Waiting],
        on_turn: Callable[[], None],
        on_refused: Callable[[ApiError], None],
        entered_at: float,
        *,
        is_stream: bool,
    ) -> None:
        self._rooms = rooms
        self._room = room
        self._guest = guest
        self._on_turn = on_turn
        self._on_refused = on_refused
        self._refusal: ApiError | None = None
        self._state = _State.WAITING
        self.entered_at = entered_at
        self.is_stream = is_stream

    def leave(self) -> None:
        """No callback comes after this. May be called at any time, and again.

        Once `on_turn` was called it does nothing: then the seat is the caller's to give back.
        """
        state, self._state = self._state, _State.OVER
        if state is _State.WAITING:
            self._room.withdraw(self._guest, self)
            self._rooms.settle(self._room)
        elif state is _State.TURN:
            self._room.seats.leave(self._guest)
            self._rooms.settle(self._room)

    def give_turn(self) -> None:
        """A seat was taken for it."""
        self._state = _State.TURN
        self._rooms.loop.call_soon(self._call)

    def refuse(self, refusal: ApiError) -> None:
        """It is in no line any more."""
        self._state = _State.REFUSED
        self._refusal = refusal
        self._rooms.loop.call_soon(self._call)

    def _call(self) -> None:
        state, self._state = self._state, _State.OVER
        if state is _State.TURN:
            self._on_turn()
        elif state is _State.REFUSED:
            assert self._refusal is not None
            self._on_refused(self._refusal)


class _Room:
    """One model, its seats, and who waits for them."""

    def __init__(self, model: str, weight_of: Callable[[str], float]) -> None:
        self.model = model
        self.seats: Seats[Waiting] = Seats(weight_of)
        self.door = _Door.GONE
        self.endpoints: tuple[RoutableEndpoint, ...] = ()
        self.leaving: set[str] = set()  # URLs that are routable no more, and still answer
        self.routable_since: float | None = None
        self.queued_since: float | None = None  # since when somebody has waited all the time, while it is routable
        self.next_end = math.inf  # nobody's wait ends before

    def withdraw(self, guest: Guest[Waiting], waiting: Waiting) -> None:
        self.seats.withdraw(guest, waiting)
        self.note_waiting()

    def note_waiting(self) -> None:
        if not self.seats.waiting:
            self.queued_since = None
            self.next_end = math.inf


class WaitingRooms:
    """Every model's room. All calls are of one thread, that of the event loop; none of them waits."""

    def __init__(
        self,
        options: WaitingOptions | None = None,
        *,
        live_workers: Callable[[], int] = lambda: 1,
        in_flight_of: Callable[[str], int] = lambda _: 0,
        weight_of: Callable[[str], float] = lambda _: 1.0,
        max_in_flight_of: Callable[[RoutableEndpoint], int] = max_in_flight_of,
        clock: Callable[[], float] = time.monotonic,
        utc_clock: Callable[[], datetime] = utc_now,
        loop: Timers | None = None,
    ) -> None:
        """`live_workers`: those that share the replicas, this one included. `in_flight_of`: this worker's, by URL.

        `weight_of`: a tenant's weight, above 0. `max_in_flight_of`: how many requests an endpoint runs at once.
        `clock`: the one that every `now` here is of.
        """
        self._options = options or WaitingOptions()
        self._live_workers = live_workers
        self._in_flight_of = in_flight_of
        self._weight_of = weight_of
        self._max_in_flight_of = max_in_flight_of
        self._clock = clock
        self._utc_clock = utc_clock
        self._loop = loop
        self._rooms: dict[str, _Room] = {}
        self._snapshot: Snapshot | None = None
        self._workers = 1
        self._is_sweeping = False
        self.on_hold: Callable[[], None] = lambda: None  # called when a hold begins
        self.on_queue: Callable[[], None] = lambda: None  # when a queue does, which at a full model is often

    @property
    def loop(self) -> Timers:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        return self._loop

    # --- requests -----------------------------------------------------------------------------------------

    def enter(self, model: str, tenant: str) -> bool:
        """True: a seat was taken, to be given back with `leave`. False: `wait` says why, or lets it wait."""
        room = self._rooms.get(model)
        return room is not None and room.seats.enter(tenant)

    def wait(
        self,
        model: str,
        tenant: str,
        on_turn: Callable[[], None],
        on_refused: Callable[[ApiError], None],
        now: float,
        *,
        is_stream: bool,
    ) -> Waiting:
        """Wait for a seat. Exactly one of the two is called, later, unless it leaves before.

        Raises ApiError at once when it cannot wait: 404, 503 `model_paused` and `model_starting`, 429 `queue_full`.
        """
        room = self._rooms.get(model)
        if room is None:
            raise model_not_found(model)
        if (refusal := self._refusal(room)) is not None:
            raise refusal
        seats, options = room.seats, self._options
        guest = seats.guest(tenant)
        if seats.waiting >= options.max_waiting_per_model or len(guest.line) >= options.max_waiting_per_tenant:
            raise queue_full(model, _QUEUE_RETRY_SECONDS)
        waiting = Waiting(self, room, guest, on_turn, on_refused, now, is_stream=is_stream)
        is_first = not seats.waiting
        seats.line_up(guest, waiting)
        room.next_end = min(room.next_end, self._end_of(room, waiting))
        if is_first:
            if room.endpoints:
                room.queued_since = now
                self.on_queue()
            else:
                self.on_hold()
        self.settle(room)
        self._sweep_later()
        return waiting

    def leave(self, model: str, tenant: str) -> None:
        """Give a seat back; the endpoint counts the request no more. Whose turn it is then, is called soon."""
        room = self._rooms[model]
        seats = room.seats
        seats.leave(seats.guest(tenant))
        if room.leaving:
            self._fit(room)
        if seats.waiting:
            self.settle(room)

    def settle(self, room: _Room) -> None:
        """Give turns as long as there are seats."""
        while (waiting := room.seats.next_turn()) is not None:
            waiting.give_turn()
        room.note_waiting()

    # --- what is known of the models ----------------------------------------------------------------------

    def follow(self, snapshot: Snapshot, now: float) -> None:
        """What is routable now. Those for whom there is a seat are let in; those who wait in vain are refused."""
        self._snapshot = snapshot
        self._workers = max(1, self._live_workers())
        for name in snapshot.models.keys() - self._rooms.keys():
            self._rooms[name] = _Room(name, self._weight_of)
        for name, room in list(self._rooms.items()):
            endpoints = snapshot.endpoints.get(name, ()) if name in snapshot.models else ()
            urls = {one.url for one in endpoints}
            room.leaving |= {one.url for one in room.endpoints}
            room.leaving -= urls
            room.endpoints = endpoints
            room.door = _door(snapshot, name)
            room.seats.weigh(now)
            self._note_routable(room, now)
            self._fit(room)
            if (refusal := self._refusal(room)) is not None:
                self._refuse_all(room, refusal)
            self.settle(room)
            if room.door is _Door.GONE and room.seats.is_empty:
                del self._rooms[name]

    @property
    def held(self) -> Mapping[str, int]:
        """How many wait for a first replica, by model; those for whom nobody does are absent."""
        return {
            name: room.seats.waiting for name, room in self._rooms.items() if room.seats.waiting and not room.endpoints
        }

    @property
    def queued(self) -> Mapping[str, int]:
        """How many wait because all replicas are full, by model; those for whom nobody does are absent."""
        return {name: room.seats.waiting for name, room in self._rooms.items() if room.seats.waiting and room.endpoints}

    @property
    def waiting(self) -> Mapping[str, int]:
        """How many wait for either, by model: of every model that is known."""
        return {name: room.seats.waiting for name, room in self._rooms.items()}

    def asks(self, now: float) -> dict[str, Waits]:
        """Which models ask for a replica: what is held does at once, a queue when it has lasted."""
        asking = {name: Waits(held=count) for name, count in self.held.items()}
        for name, count in self.queued.items():
            since = self._rooms[name].queued_since
            if since is not None and now - since >= self._options.queue_pressure_seconds:
                asking[name] = Waits(queued=count)
        return asking

    def _note_routable(self, room: _Room, now: float) -> None:
        if bool(room.endpoints) == (room.routable_since is not None):
            return
        room.routable_since = now if room.endpoints else None
        room.queued_since = now if room.endpoints and room.seats.waiting else None
        room.next_end = -math.inf  # other budgets: look at all of them
        if room.seats.waiting and not room.endpoints:
            self.on_hold()

    def _fit(self, room: _Room) -> None:
        """How many seats there are. What is in flight on endpoints that leave has its own."""
        shared = sum(map(self._max_in_flight_of, room.endpoints))
        gone = 0
        for url in [*room.leaving]:
            if count := self._in_flight_of(url):
                gone += count
            else:
                room.leaving.discard(url)
        runs = max(1, shared // self._workers) if shared else 0
        room.seats.fit(runs, leaving=gone)

    # --- refusals and ends --------------------------------------------------------------------------------

    def _refusal(self, room: _Room) -> ApiError | None:
        """Why nobody can wait in this room, if nobody can."""
        match room.door:
            case _Door.OPEN:
                return None
            case _Door.GONE:
                return model_not_found(room.model)
            case _Door.NEVER_STARTS:
                return self._starting(room)
            case _Door.PAUSED:
                model = self._snapshot.models.get(room.model) if self._snapshot is not None else None
                until = model.paused_until if model is not None else None
                left = None if until is None else (until - self._utc_clock()).total_seconds()
                is_near = left is not None and left <= _LONGEST_PAUSE_WORTH_WAITING_FOR_SECONDS
                return model_paused(room.model, retry_after_seconds(left) if is_near else None)

    def _starting(self, room: _Room) -> ApiError:
        model = self._snapshot.models.get(room.model) if self._snapshot is not None else None
        estimate = None if model is None else seconds_to_ready(model, self._utc_clock())
        return model_starting(room.model, retry_after_seconds(estimate))

    def _refuse_all(self, room: _Room, refusal: ApiError) -> None:
        for guest, waiting in room.seats.all_waiting():
            room.withdraw(guest, waiting)
            waiting.refuse(refusal)

    def _end_of(self, room: _Room, waiting: Waiting) -> float:
        options = self._options
        if waiting.is_stream and room.routable_since is None:
            return waiting.entered_at + options.hold_seconds
        if waiting.is_stream:
            return max(waiting.entered_at, room.routable_since or 0.0) + options.queue_seconds
        held = waiting.entered_at + options.hold_seconds_without_stream
        if room.routable_since is None:
            return held
        return min(held, max(waiting.entered_at, room.routable_since) + options.queue_seconds)

    def _sweep_later(self) -> None:
        if not self._is_sweeping:
            self._is_sweeping = True
            self.loop.call_later(_SWEEP_SECONDS, self._sweep)

    def _sweep(self) -> None:
        """Ends the waits whose time is up. One timer for all, and none while nobody waits."""
        now = self._clock()
        self._is_sweeping = False
        self._workers = max(1, self._live_workers())
        for room in self._rooms.values():
            if not room.seats.waiting:
                continue
            self._fit(room)  # what was leaving may have gone; workers come and go
            self.settle(room)
            if now >= room.next_end:
                self._end_waits(room, now)
            if room.seats.waiting:
                self._sweep_later()

    def _end_waits(self, room: _Room, now: float) -> None:
        refusal: ApiError | None = None
        room.next_end = math.inf
        for guest, waiting in room.seats.all_waiting():
            end = self._end_of(room, waiting)
            if end > now:
                room.next_end = min(room.next_end, end)
                continue
            if refusal is None:
                is_queue = bool(room.endpoints)
                refusal = queue_full(room.model, _QUEUE_RETRY_SECONDS) if is_queue else self._starting(room)
            room.withdraw(guest, waiting)
            waiting.refuse(refusal)


def _door(snapshot: Snapshot, name: str) -> _Door:
    model = snapshot.models.get(name)
    if model is None:
        return _Door.GONE
    match snapshot.state_of(model):
        case ModelState.ROUTABLE:
            return _Door.OPEN
        case ModelState.PAUSED:
            return _Door.PAUSED
        case _:
            return _Door.OPEN if model.can_start else _Door.NEVER_STARTS
