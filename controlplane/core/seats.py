"""Seats, and whose turn it is: how many may be in flight at once for one model, shared out among tenants.

*Seats.* One tenant alone may take as many as the replicas run at once. A quarter more is in reserve, for tenants that
hold less than their share: so a newcomer gets in at once while a greedy tenant fills the replicas, and the greedy one's
rest waits here and not in an engine's own queue, which is first come, first served. Where others came lately, a fifth
of what the replicas run is kept free for whoever holds less than its share: one who comes now and then would else find
the engine full each time, and wait there until a request of the greedy one ends.

*Turns.* A free seat goes to the tenant that holds the fewest for its weight: what is scarce is seats, and long requests
keep theirs longer. Between equals it is start-time fair queueing (Goyal et al., SIGCOMM 1996), one unit a request:
whoever was served less goes first, however much it has waiting. Within a tenant: first come, first served.

Nobody waits while there is a seat for anybody, if the caller asks for turns whenever a seat may have become free.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

RESERVE = 0.25
"""Seats above what the replicas run at once, as a share of it."""

KEPT_FREE = 0.2
"""Of what the replicas run at once, where more than one tenant came lately."""

REMEMBERED_SECONDS = 300.0
"""How long a tenant is expected back."""

W = TypeVar("W")  # one that waits; told apart by identity


class Guest(Generic[W]):
    """A tenant. It is here while it has a seat or waits, and remembered for a while."""

    __slots__ = ("line", "seats", "seen_at", "start", "weight")

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.seats = 0
        self.line: OrderedDict[W, None] = OrderedDict()
        self.start = 0.0  # virtual time at which its next one is due
        self.seen_at: float | None = None  # when it was looked for last and was here; None: it has come since

    @property
    def is_here(self) -> bool:
        return self.seats > 0 or bool(self.line)


class Seats(Generic[W]):
    """`weight_of`: a tenant's weight, above 0. Begins with no seat at all: see `fit`."""

    def __init__(self, weight_of: Callable[[str], float]) -> None:
        self.runs = 0  # at once, in all engines
        self.open = 0  # seats for anybody
        self.most = 0  # with those in reserve
        self.taken = 0
        self.waiting = 0
        self._kept = 0  # free, of those that run, where others came lately
        self._weight_of = weight_of
        self._guests: dict[str, Guest[W]] = {}
        self._lines: dict[Guest[W], None] = {}  # who waits
        self._weights = 0.0  # of all who are remembered
        self._virtual_time = 0.0

    def fit(self, runs: int, *, leaving: int = 0) -> None:
        """So many run at once from now on. `leaving`: those in flight where nobody is sent any more keep theirs.

        Fewer than are taken is no fault: then nobody gets one until enough were given back.
        """
        self.runs = runs + leaving if runs else 0
        self.most = self.runs + math.ceil(runs * RESERVE)
        self._kept = int(runs * KEPT_FREE)  # of what leaves, nothing will be free
        self._keep_free()

    def guest(self, tenant: str) -> Guest[W]:
        guest = self._guests.get(tenant)
        if guest is None:
            guest = self._guests[tenant] = Guest(self._weight_of(tenant))
            self._weights += guest.weight
            self._keep_free()
        return guest

    @property
    def is_empty(self) -> bool:
        return not self.taken and not self.waiting

    def weigh(self, now: float) -> None:
        """Take the weights of now, and forget who has not been here for long. Call it every few seconds."""
        remembered = {}
        for tenant, guest in self._guests.items():
            if guest.is_here or guest.seen_at is None:
                guest.seen_at = now
            if now - guest.seen_at < REMEMBERED_SECONDS:
                guest.weight = self._weight_of(tenant)
                remembered[tenant] = guest
        self._guests = remembered
        self._weights = sum(guest.weight for guest in remembered.values())
        self._keep_free()

    def _keep_free(self) -> None:
        self.open = self.runs - self._kept if len(self._guests) > 1 else self.runs

    # --- seats --------------------------------------------------------------------------------------------

    def enter(self, tenant: str) -> bool:
        """Take a seat now, if there is one for this tenant and none of its own waits."""
        guest = self._guests.get(tenant) or self.guest(tenant)
        if guest.line or (self.taken >= self.open and not self._has_reserved_seat(guest)):
            return False
        self.taken += 1
        guest.seats += 1
        return True

    def leave(self, guest: Guest[W]) -> None:
        """Give one of its seats back."""
        self.taken -= 1
        guest.seats -= 1
        guest.seen_at = None

    def _has_reserved_seat(self, guest: Guest[W]) -> bool:
        return self.taken < self.most and guest.seats * self._weights < self.runs * guest.weight

    # --- lines --------------------------------------------------------------------------------------------

    def line_up(self, guest: Guest[W], one: W) -> None:
        if not guest.line:
            self._lines[guest] = None
            guest.start = max(guest.start, self._virtual_time)
        guest.line[one] = None
        self.waiting += 1

    def withdraw(self, guest: Guest[W], one: W) -> None:
        del guest.line[one]
        self.waiting -= 1
        if not guest.line:
            del self._lines[guest]

    def next_turn(self) -> W | None:
        """Takes whose turn it is out of its line, and gives it a seat; None while there is none for anybody."""
        if not self.waiting or self.taken >= self.most:
            return None
        chosen, least = None, math.inf
        for guest in self._lines:
            load = guest.seats / guest.weight
            if chosen is None or load < least or (load == least and guest.start < chosen.start):
                chosen, least = guest, load
        # if it is above its share, so is everybody else who waits
        if chosen is None or (self.taken >= self.open and not self._has_reserved_seat(chosen)):
            return None
        self._virtual_time = max(self._virtual_time, chosen.start)
        chosen.start += 1 / chosen.weight
        first = next(iter(chosen.line))
        self.withdraw(chosen, first)
        self.taken += 1
        chosen.seats += 1
        return first

    def all_waiting(self) -> list[tuple[Guest[W], W]]:
        return [(guest, one) for guest in self._lines for one in guest.line]
