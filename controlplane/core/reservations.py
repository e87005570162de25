"""Reservations of nodes, and what they leave: a job that would reach into one asks for a shorter time limit, or waits.

A job that names no reservation can use none, so each one closes its nodes to us, whatever it is for; those for
maintenance are the usual case. What counts is the last node of the partition to close: as long as one stays open,
Slurm places jobs there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from controlplane.core.types import SlurmResources, TimeLimit, seconds

_MINUTE = timedelta(minutes=1)
# a job has to be submitted, released and placed, and ends up to half a minute after its limit
_SLACK = timedelta(seconds=90)
_TO_THE_SECOND = "%Y-%m-%d %H:%M:%S"


@dataclass(frozen=True, slots=True)
class Reservation:
    name: str
    starts_at: datetime
    ends_at: datetime
    nodes: frozenset[str]
    is_maintenance: bool = False


@dataclass(frozen=True, slots=True)
class Closing:
    """From `at` to `until` a partition has too few nodes that are not reserved."""

    words: str  # which reservation, for people
    at: datetime
    until: datetime

    @property
    def waiting(self) -> str:
        return f"nothing is submitted before {self.until:{_TO_THE_SECOND}}: {self.opening}"

    @property
    def opening(self) -> str:
        return f"{self.words} begins at {self.at:{_TO_THE_SECOND}}"


@dataclass(frozen=True, slots=True)
class Calendar:
    """All reservations that are known, and the nodes of each partition; empty: nothing is reserved."""

    reservations: tuple[Reservation, ...] = ()
    partitions: Mapping[str, frozenset[str]] = field(default_factory=dict)
    default_partition: str | None = None  # None: Slurm does not tell

    def closing(self, resources: SlurmResources, now: datetime) -> Closing | None:
        """When these resources can be had no more. Where the partition is not known, any node will do."""
        asked = (resources.partition or self.default_partition or "").split(",")
        known = [self.partitions[name] for name in asked if name in self.partitions]
        nodes = frozenset().union(*(known or self.partitions.values()))
        return closing_of(nodes, self.reservations, needed=resources.nodes, now=now)


def closing_of(
    nodes: frozenset[str], reservations: Iterable[Reservation], *, needed: int, now: datetime
) -> Closing | None:
    """When fewer than `needed` of the nodes are open; None: no reservation that is known leads to that."""
    known = [one for one in reservations if one.ends_at > now]
    firsts: list[Reservation] = []
    for node in nodes:
        on_node = [one for one in known if node in one.nodes]
        if on_node:
            firsts.append(min(on_node, key=lambda one: (one.starts_at, one.name)))
    stays_open = len(nodes) - len(firsts)
    if not nodes or stays_open >= needed:
        return None
    firsts.sort(key=lambda one: (one.starts_at, one.name), reverse=True)
    last = firsts[min(needed - stays_open, len(firsts)) - 1]
    kind = "maintenance reservation" if last.is_maintenance else "reservation"
    return Closing(f"{kind} {last.name}", last.starts_at, last.ends_at)


def fit(
    resources: SlurmResources, closing: Closing | None, *, lead: timedelta, now: datetime
) -> TimeLimit | Closing | None:
    """The shorter time limit to ask for; None if the spec's fits; the closing itself if there is nothing but to wait.

    In whole minutes, as Slurm counts. `lead`: what a start takes, of which the job may spend any part in the queue.
    """
    wanted = seconds(resources.time_limit_seconds)
    if closing is None:
        return None
    available = closing.at - now - lead - _SLACK
    if wanted <= available:
        return None
    left = available // _MINUTE * _MINUTE
    if left < min(max(seconds(resources.min_time_limit_seconds), _MINUTE), wanted):
        return closing
    limit = int(left.total_seconds())
    return TimeLimit(limit, f"{limit} s asked for instead of {resources.time_limit_seconds} s: {closing.opening}")
