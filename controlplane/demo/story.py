"""What happened at the demo's site, gathered from the database and from the clients: for the view and the summary."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta

from controlplane.core.stories import RecordedDecision
from controlplane.core.types import Endpoint, Phase, Replica
from controlplane.db import Database, alerts, decisions, endpoints, replicas
from controlplane.demo.load import Load

_LONGEST_WORDS = 160


@dataclass(frozen=True, slots=True)
class Event:
    """One line of the timeline."""

    at: datetime
    kind: str  # story | alert | decision | replica
    words: str
    is_detail: bool = False  # the summary leaves it out


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One look at the site."""

    at: datetime
    replicas: tuple[Replica, ...]  # live ones
    endpoints: dict[str, Endpoint]
    nodes: dict[str, str]  # by replica
    routable: int
    desired: str
    why: str
    ttft_p50: float | None
    ttft_p95: float | None


@dataclass(slots=True)
class Story:
    """Grows as the demo runs. `look` may be called at any pace: nothing is told twice."""

    db: Database
    replica_set: str
    load: Load
    began: datetime
    events: list[Event] = field(default_factory=list)
    most_routable: int = 0
    worst_ttft: float = 0.0
    latest: Snapshot | None = None
    _told: set[tuple[str, datetime, str]] = field(default_factory=set)
    _alerts: set[tuple[str, datetime]] = field(default_factory=set)
    _routable_since: dict[str, datetime] = field(default_factory=dict)  # by replica

    @property
    def chapter(self) -> str:
        """Where the story is."""
        return next((event.words for event in reversed(self.events) if event.kind == "story"), "")

    def tell(self, at: datetime, words: str, kind: str = "story", *, is_detail: bool = False) -> None:
        """Add an event, if it has not been told."""
        words = words if len(words) <= _LONGEST_WORDS else words[: _LONGEST_WORDS - 1] + "…"
        key = (kind, at, words)
        if key not in self._told:
            self._told.add(key)
            self.events.append(Event(at, kind, words, is_detail))
            self.events.sort(key=lambda event: event.at)

    async def look(self, now: datetime) -> Snapshot:
        """Look at the site, and tell what is new."""
        live = await replicas.load_live(self.db)
        seen = {one.replica: one for one in await endpoints.load_live(self.db) if one.replica is not None}
        routable = len([one for one in await endpoints.load_routable(self.db) if one.replica_set == self.replica_set])
        await self._tell_alerts()
        latest = await self._tell_decisions()
        await self._tell_steps()
        for endpoint in seen.values():
            if endpoint.replica is not None and endpoint.first_ready_at is not None:
                self._routable_since[endpoint.replica] = endpoint.first_ready_at
                self.tell(endpoint.first_ready_at, f"{endpoint.replica} is routable at {endpoint.url}", "replica")
        p50 = self.load.recent_ttft_seconds(0.5)
        self.most_routable = max(self.most_routable, routable)
        self.worst_ttft = max(self.worst_ttft, p50 or 0.0)
        self.latest = Snapshot(
            at=now,
            replicas=tuple(one for one in live if one.replica_set == self.replica_set),
            endpoints=seen,
            nodes={one.replica: one.node for one in await endpoints.load_targets(self.db)},
            routable=routable,
            desired=str(latest.desired) if latest else "?",
            why=latest.explanation if latest else "",
            ttft_p50=p50,
            ttft_p95=self.load.recent_ttft_seconds(0.95),
        )
        return self.latest

    async def alert_to_job(self) -> list[tuple[str, timedelta, timedelta]]:
        """For every scale-up: its job, and how long Slurm took to have it since the alert came, since the decision."""
        receipts = await alerts.load_first_receipts(self.db, self.began)
        steps = [one for one in await replicas.load_history(self.db, since=self.began) if one.to_phase is Phase.QUEUED]
        found = []
        for decision in reversed(await decisions.load_newest(self.db, replica_set=self.replica_set)):
            after = [step for step in steps if step.at >= decision.at]
            if decision.at < self.began or decision.desired <= decision.previous or not after or not decision.alerts:
                continue
            came = max(receipts[key] for key in decision.alerts if key in receipts)
            found.append(
                (f"{after[0].replica}, job {after[0].slurm_job_id}", after[0].at - came, after[0].at - decision.at)
            )
        return found

    async def starts_and_drains(self) -> list[tuple[str, str, timedelta]]:
        """How long each replica took to be routable since it was made, and to have drained: (what, replica, time)."""
        history = await replicas.load_history(self.db, since=self.began)
        # reversed: of several times that a replica reached a phase, the first counts
        reached = {(step.replica, step.to_phase): step.at for step in reversed(history)}
        found = [
            ("made to routable", name, at - reached[name, Phase.PENDING])
            for name, at in sorted(self._routable_since.items())
            if (name, Phase.PENDING) in reached
        ]
        found += [
            ("drained in", name, reached[name, Phase.STOPPING] - at)
            for (name, phase), at in sorted(reached.items())
            if phase is Phase.DRAINING and (name, Phase.STOPPING) in reached
        ]
        return found

    async def _tell_alerts(self) -> None:
        for alert in await alerts.load_since(self.db, self.began):
            if alert.starts_at < self.began:
                continue
            if (alert.key, alert.starts_at) not in self._alerts:  # its words change with its value: told once
                self._alerts.add((alert.key, alert.starts_at))
                summary = alert.annotations.get("summary", "")
                self.tell(alert.starts_at, f"{alert.alertname} fires: {summary}", "alert")
            if not alert.is_firing and alert.ends_at is not None:
                self.tell(alert.ends_at, f"{alert.alertname} is resolved", "alert")

    async def _tell_decisions(self) -> RecordedDecision | None:
        newest = [
            one for one in await decisions.load_newest(self.db, replica_set=self.replica_set) if one.at >= self.began
        ]
        for one in newest:
            arrow = f"{one.previous} -> {one.desired}" if one.previous != one.desired else f"stays at {one.desired}"
            is_detail = one.previous == one.desired
            self.tell(one.at, f"{one.reason}: {arrow}, {one.explanation}", "decision", is_detail=is_detail)
        return newest[0] if newest else None

    async def _tell_steps(self) -> None:
        for step in await replicas.load_history(self.db, since=self.began):
            job = f", job {step.slurm_job_id}" if step.slurm_job_id is not None else ""
            why = f" ({step.reason})" if step.reason else ""
            said = f": {step.message}" if step.message else ""
            words = f"{step.replica} is {step.to_phase}{why}{job}{said}"
            self.tell(step.at, words, "replica", is_detail=step.to_phase in (Phase.PENDING, Phase.SUBMITTING))
