"""Mistakes that the simulation must find: each is one small patch of the product, for as long as it is in force."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from datetime import datetime
from typing import Any
from unittest.mock import patch

from controlplane.core.scaling import pressures
from controlplane.core.types import Alert, AlertAction, JobList, Move, Replica, SlurmJob, Unknown
from controlplane.db import Database, Stale, replicas
from controlplane.reconcile import replicas as rounds
from controlplane.slurm import wire
from controlplane.slurm.client import SlurmClient
from controlplane.slurm.errors import SlurmAmbiguous
from controlplane.slurm.wire import Dialect, JobRequest, Submitted


def submit_without_hold() -> AbstractContextManager[Any]:
    """A twin of a lost answer runs."""
    right = wire.write_submit

    def wrong(request: JobRequest, dialect: Dialect) -> dict[str, Any]:
        body = right(request, dialect)
        del body["job"]["hold"]
        return body

    return patch.object(wire, "write_submit", wrong)


def resend_on_ambiguity() -> AbstractContextManager[Any]:
    """No answer came: once more, then."""
    right = SlurmClient.submit

    async def wrong(self: SlurmClient, request: JobRequest, *, intended_at: datetime | None = None) -> Submitted:
        try:
            return await right(self, request, intended_at=intended_at)
        except SlurmAmbiguous:
            return await right(self, request, intended_at=intended_at)

    return patch.object(SlurmClient, "submit", wrong)


def cancel_without_checking_the_name() -> AbstractContextManager[Any]:
    """The id was ours a moment ago."""

    async def wrong(self: SlurmClient, job_id: int, name: str) -> SlurmJob | None:
        return await self.get_job(job_id)

    return patch.object(SlurmClient, "_ours", wrong)


def unknown_treated_as_absent() -> AbstractContextManager[Any]:
    """No list came, so there are no jobs."""
    right = rounds.ReplicaLoop._observe

    async def wrong(self: rounds.ReplicaLoop, now: datetime) -> JobList | Unknown:
        observed = await right(self, now)
        return JobList((), now) if isinstance(observed, Unknown) else observed

    return patch.object(rounds.ReplicaLoop, "_observe", wrong)


def resolved_scales_down() -> AbstractContextManager[Any]:
    """It is over, so fewer will do."""
    right = pressures

    def wrong(replica_sets: Any, alerts: Iterable[Alert], **rest: Any) -> Any:
        return right(replica_sets, [_inverted(alert) for alert in alerts], **rest)

    return patch("controlplane.reconcile.replicas.pressures", wrong)


def _inverted(alert: Alert) -> Alert:
    if alert.action is not AlertAction.SCALE_UP or alert.is_firing:
        return alert
    return replace(alert, action=AlertAction.SCALE_DOWN, is_firing=True)


def unguarded_update_of_phase() -> AbstractContextManager[Any]:
    """Whoever has moved on meanwhile is overruled."""
    right = replicas.move

    async def wrong(db: Database, step: Move, *, actor: str, now: datetime) -> Replica:
        try:
            return await right(db, step, actor=actor, now=now)
        except Stale:
            newer = await replicas.load(db, step.replica.name)
            return await right(db, replace(step, replica=newer), actor=actor, now=now)

    return patch.object(replicas, "move", wrong)


MUTATIONS: Mapping[str, Callable[[], AbstractContextManager[Any]]] = {
    one.__name__: one
    for one in (
        submit_without_hold,
        resend_on_ambiguity,
        cancel_without_checking_the_name,
        unknown_treated_as_absent,
        resolved_scales_down,
        unguarded_update_of_phase,
    )
}


@contextmanager
def mutated(name: str | None) -> Iterator[None]:
    """The product with this mistake in it; None: as it is."""
    if name is None:
        yield
        return
    with MUTATIONS[name]():
        yield
