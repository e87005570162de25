"""Proxies that hold requests while they know of nothing routable, and say so: two workers, each with its own view."""

from __future__ import annotations

from collections.abc import Coroutine
from datetime import datetime
from random import Random
from typing import TYPE_CHECKING, Any

from controlplane.db import DatabaseError, held_requests
from tests.sim.doors import Door
from tests.sim.steps import Process

if TYPE_CHECKING:
    from tests.sim.world import World

WORKERS = ("w1", "w2")


class Proxies:
    """`told_at`: when one of them last said, or may have said, that it holds requests."""

    def __init__(self, world: World, model: str) -> None:
        self._world = world
        self._model = model
        self._rng = Random(f"{world.seed}/proxies")  # of its own: other draws stay what they are
        self._held = dict.fromkeys(WORKERS, 0)
        self.process = Process("proxy")
        self.told_at: datetime | None = None

    def visits(self) -> list[tuple[Process, Coroutine[Any, Any, None]]]:
        """What their clients and their loops do now."""
        works = []
        for worker in WORKERS:
            before = self._held[worker]
            if self._world.nothing_is_routable():
                if self._rng.random() < 0.15:
                    self._held[worker] = self._rng.choice((1, 200))
            elif before and self._rng.random() < 0.8:  # else it has not heard of it yet
                self._held[worker] = 0
            if before or self._held[worker]:
                works.append((self.process, self._tell(worker)))
        return works

    def all_clients_leave(self) -> list[tuple[Process, Coroutine[Any, Any, None]]]:
        self._held = dict.fromkeys(WORKERS, 0)
        return [(self.process, self._tell(worker)) for worker in WORKERS]

    async def _tell(self, worker: str) -> None:
        world, held = self._world, self._held[worker]
        if held:
            self.told_at = world.now
        waiting = {self._model: (held, 0)} if held else {}
        try:
            told = await held_requests.tell(Door(world.db, self.process, world.stage), worker, waiting, now=world.now)
        except DatabaseError as error:
            world.say(f"proxy {worker}: {held} held could not be told: {error}")
        else:
            world.say(
                f"proxy {worker}: {held} held{', raised' * bool(told.raised)}{', resolved' * bool(told.resolved)}"
            )
