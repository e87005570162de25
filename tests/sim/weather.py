"""What becomes of each step: how often it meets which fault."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Self

from tests.sim.steps import Fate, Parked

MOMENTS = (  # when a process dies or is stopped: anywhere, or where it may hurt
    "",
    "GET jobs",
    "job/submit",
    "job/submit",
    "GET job/",
    "POST job/1",
    "DELETE",
    "replicas.create",
    "replicas.move",
    "replicas.move",
    "replica_sets.decide",
    "endpoints.save",
    "alerts.refresh",
)
_READ_FAULTS = (
    Fate.REFUSED,
    Fate.NOT_CONNECTED,
    Fate.TIMEOUT_BEFORE,
    Fate.ERROR_AFTER,
    Fate.TRUNCATED,
    Fate.SLOW,
    Fate.SLOW,
)
_CHANGE_FAULTS = (
    *_READ_FAULTS,
    Fate.TIMEOUT_AFTER,
    Fate.TIMEOUT_AFTER,
    Fate.BROKEN_AFTER,
    Fate.LATE,
    Fate.LATE,
)


@dataclass(frozen=True, slots=True)
class Weather:
    """How often a step meets a fault."""

    slurm: float
    database: float
    elsewhere: float  # at Grafana and at the nodes
    hurt: float  # the worst moment is chosen for what may happen at any

    @classmethod
    def drawn(cls, rng: Random) -> Self:
        return cls(
            slurm=rng.choice((0.0, 0.1, 0.25)),
            database=rng.choice((0.0, 0.0, 0.02)),
            elsewhere=rng.choice((0.0, 0.05)),
            hurt=rng.choice((0.0, 0.3, 0.6)),
        )

    def fate(self, parked: Parked, rng: Random) -> Fate:
        if parked.kind == "db":
            return rng.choice((Fate.DB_AWAY, Fate.DB_CUT)) if rng.random() < self.database else Fate.DONE
        if not parked.label.startswith("slurm"):
            return rng.choice(_READ_FAULTS[:3]) if rng.random() < self.elsewhere else Fate.DONE
        if rng.random() >= self.slurm:
            return Fate.DONE
        if " GET " in parked.label:
            return rng.choice((*_READ_FAULTS, Fate.STALE) if parked.label.endswith(" jobs") else _READ_FAULTS)
        return rng.choice(_CHANGE_FAULTS)


CALM = Weather(0, 0, 0, 0)
