"""Waiting rooms, one for each model: who may pass on a request now, who waits, and for how long.

A room has as many seats as its replicas run requests at once. Whoever comes while one is free takes it and goes on;
most requests do no more than that. Others wait, for one of two facts. *Hold*: nothing is routable, because the model is
scaled to zero or its replica still starts. *Queue*: every replica has as much to do as it may.

Seats. One tenant alone may take as many as the replicas run at once. A quarter more is for tenants that hold less than
their share: so a newcomer gets in at once while a greedy tenant fills the replicas, and the greedy one's rest waits
here and not in an engine's own queue, which is first come, first served. What is in flight on an endpoint that is
leaving has its seat until it ends, and takes none from the others.

Turns. A free seat goes to the tenant that holds the fewest for its weight: what is scarce is seats, and long requests
keep theirs longer. Between equals it is start-time fair queueing (Goyal et al., SIGCOMM 1996), one unit a request:
whoever was served less goes first, however much it has waiting. Within a tenant: first come, first served.

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
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import Enum, auto
from typing import Any, Protocol

from controlplane.clock import utc_now
from controlplane.core.types import RoutableEndpoint
from controlplane.proxy.directory import ModelState, Snapshot, retry_after_seconds, seconds_to_ready
from controlplane.proxy.errors import ApiError, model_not_found, model_paused, model_starting, queue_full

_RESERVE = 0.25  # seats above what the replicas run at once, for tenants that hold less than their share
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
    return getattr(endpoint, "max_in_flight", None) or endpoint.runs_at_once


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


class _Guest:
    """A tenant in a room. It is there while it has a seat or waits."""

    __slots__ = ("line", "seats", "start", "tenant", "weight")

    def __init__(self, tenant: str, weight: float) -> None:
        self.tenant = tenant
        self.weight = weight
        self.seats = 0
        self.line: OrderedDict[Waiting, None] = OrderedDict()
        self.start = 0.0  # virtual time at which its next request is due

    @property
    def is_here(self) -> bool:
        return self.seats > 0 or bool(self.line)


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
        guest: _Guest,
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
            self._room.stand_up(self._guest)
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
    """The seats and the lines of one model."""

    def __init__(self, model: str, weight_of: Callable[[str], float]) -> None:
        self.model = model
        self.door = _Door.GONE
        self.endpoints: tuple[RoutableEndpoint, ...] = ()
        self.leaving: set[str] = set()  # URLs that are routable no more, and still answer
        self.runs = 0  # how many requests the replicas run at once, as far as they are this worker's
        self.most = 0  # with the reserve
        self.taken = 0
        self.waiting = 0
        self.routable_since: float | None = None
        self.queued_since: float | None = None  # since when somebody has waited all the time, while it is routable
        self.next_end = math.inf  # nobody's wait ends before
        self.guests: dict[str, _Guest] = {}
        self.lines: dict[_Guest, None] = {}  # who waits
        self._weights = 0.0  # of all who are here
        self._virtual_time = 0.0
        self._weight_of = weight_of

    # --- seats --------------------------------------------------------------------------------------------

    def enter(self, tenant: str) -> bool:
        guest = self.guests.get(tenant)
        if guest is None:
            guest = self.guests[tenant] = _Guest(tenant, self._weight_of(tenant))
        if guest.line or (self.taken >= self.runs and not self._has_reserved_seat(guest)):
            return False
        self.sit_down(guest)
        return True

    def sit_down(self, guest: _Guest) -> None:
        if not guest.seats and not guest.line:
            self._weights += guest.weight
        self.taken += 1
        guest.seats += 1

    def stand_up(self, guest: _Guest) -> None:
        self.taken -= 1
        guest.seats -= 1
        if not guest.seats and not guest.line:
            self._goes(guest)

    def _goes(self, guest: _Guest) -> None:
        self._weights -= guest.weight
        if not self.taken and not self.waiting:
            self._weights = 0.0  # no rounding error is carried on

    def _has_reserved_seat(self, guest: _Guest) -> bool:
        if self.taken >= self.most:
            return False
        weights = self._weights if guest.is_here else self._weights + guest.weight
        return guest.seats < self.runs * guest.weight / weights

    def forget_idle(self) -> None:
        """Weights that were changed hold from a tenant's next visit on."""
        self.guests = {name: guest for name, guest in self.guests.items() if guest.is_here}

    # --- lines --------------------------------------------------------------------------------------------

    def line_up(self, guest: _Guest, waiting: Waiting) -> None:
        if not guest.is_here:
            self._weights += guest.weight
        if not guest.line:
            self.lines[guest] = None
            guest.start = max(guest.start, self._virtual_time)
        guest.line[waiting] = None
        self.waiting += 1

    def withdraw(self, guest: _Guest, waiting: Waiting) -> None:
        del guest.line[waiting]
        self.waiting -= 1
        if not guest.line:
            del self.lines[guest]
            if not guest.seats:
                self._goes(guest)
        if not self.waiting:
            self.queued_since = None
            self.next_end = math.inf

    def next_turn(self) -> Waiting | None:
        """Takes whose turn it is out of its line, and gives it a seat; None while there is none for anybody."""
        if not self.waiting or self.taken >= self.most:
            return None
        is_reserve = self.taken >= self.runs
        chosen = min(
            (one for one in self.lines if not is_reserve or self._has_reserved_seat(one)),
            key=lambda one: (one.seats / one.weight, one.start),
            default=None,
        )
        if chosen is None:
            return None
        self._virtual_time = max(self._virtual_time, chosen.start)
        chosen.start += 1 / chosen.weight
        waiting = next(iter(chosen.line))
        self.sit_down(chosen)  # first, so that the guest is here all the time
        self.withdraw(chosen, waiting)
        return waiting

    def all_waiting(self) -> Iterable[tuple[_Guest, Waiting]]:
        return [(guest, waiting) for guest in self.lines for waiting in guest.line]


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

    @property
    def loop(self) -> Timers:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        return self._loop

    # --- requests -----------------------------------------------------------------------------------------

    def enter(self, model: str, tenant: str) -> bool:
        """True: a seat was taken, to be given back with `leave`. False: `wait` says why, or lets it wait."""
        room = self._rooms.get(model)
        return room is not None and room.enter(tenant)

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
        guest = room.guests.get(tenant)
        if guest is None:
            guest = room.guests[tenant] = _Guest(tenant, self._weight_of(tenant))
        options = self._options
        if room.waiting >= options.max_waiting_per_model or len(guest.line) >= options.max_waiting_per_tenant:
            raise queue_full(model, _QUEUE_RETRY_SECONDS)
        waiting = Waiting(self, room, guest, on_turn, on_refused, now, is_stream=is_stream)
        is_first = not room.waiting
        room.line_up(guest, waiting)
        room.next_end = min(room.next_end, self._end_of(room, waiting))
        if is_first:
            if room.endpoints:
                room.queued_since = now
            else:
                self.on_hold()
        self.settle(room)
        self._sweep_later()
        return waiting

    def leave(self, model: str, tenant: str) -> None:
        """Give a seat back; the endpoint counts the request no more. Whose turn it is then, is called soon."""
        room = self._rooms[model]
        room.stand_up(room.guests[tenant])
        if room.leaving:
            self._fit(room)
        if room.waiting:
            self.settle(room)

    def settle(self, room: _Room) -> None:
        """Give turns as long as there are seats."""
        while (waiting := room.next_turn()) is not None:
            waiting.give_turn()

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
            self._note_routable(room, now)
            self._fit(room)
            if (refusal := self._refusal(room)) is not None:
                self._refuse_all(room, refusal)
            self.settle(room)
            room.forget_idle()
            if room.door is _Door.GONE and not room.guests:
                del self._rooms[name]

    @property
    def held(self) -> Mapping[str, int]:
        """How many wait for a first replica, by model; those for whom nobody does are absent."""
        return {name: room.waiting for name, room in self._rooms.items() if room.waiting and not room.endpoints}

    @property
    def queued(self) -> Mapping[str, int]:
        """How many wait because all replicas are full, by model; those for whom nobody does are absent."""
        return {name: room.waiting for name, room in self._rooms.items() if room.waiting and room.endpoints}

    def asks(self, now: float) -> dict[str, Waits]:
        """Which models ask for a replica: what is held does at once, a queue when it has lasted."""
        asking: dict[str, Waits] = {}
        for name, room in self._rooms.items():
            if not room.waiting:
                continue
            if not room.endpoints:
                asking[name] = Waits(held=room.waiting)
            elif room.queued_since is not None and now - room.queued_since >= self._options.queue_pressure_seconds:
                asking[name] = Waits(queued=room.waiting)
        return asking

    def _note_routable(self, room: _Room, now: float) -> None:
        if bool(room.endpoints) == (room.routable_since is not None):
            return
        room.routable_since = now if room.endpoints else None
        room.queued_since = now if room.endpoints and room.waiting else None
        room.next_end = -math.inf  # other budgets: look at all of them
        if room.waiting and not room.endpoints:
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
        room.runs = runs + gone if runs else 0
        room.most = room.runs + math.ceil(runs * _RESERVE)

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
        for guest, waiting in room.all_waiting():
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
            if not room.waiting:
                continue
            self._fit(room)  # what was leaving may have gone; workers come and go
            self.settle(room)
            if now >= room.next_end:
                self._end_waits(room, now)
            if room.waiting:
                self._sweep_later()

    def _end_waits(self, room: _Room, now: float) -> None:
        refusal: ApiError | None = None
        room.next_end = math.inf
        for guest, waiting in room.all_waiting():
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
