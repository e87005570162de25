"""The round that makes jobs follow decisions: load, decide, look at Slurm, advance, plan, act.

The order matters. The database is read before Slurm is asked, so that a job recorded in it cannot be younger than the
list that lacks it. Decisions need no Slurm and are taken first. When Slurm gives no complete answer, nothing is known
of any job: rows may be created and drains may begin, but nothing is submitted, cancelled or declared gone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from loguru import logger

from controlplane.core.back_off import BackOff, explained
from controlplane.core.lifecycle import advance, comment_for, is_anothers, job_of, twins_of
from controlplane.core.nodes import NodeRules, first_node
from controlplane.core.planning import PlanRules, Scene, back_off, idle_since, plan
from controlplane.core.reservations import Closing
from controlplane.core.scaling import Pressure, decide, help_for, longest_period, pressures
from controlplane.core.types import (
    Action,
    Alert,
    CancelJob,
    Change,
    Decision,
    DecisionReason,
    Endpoint,
    Health,
    JobList,
    JobState,
    PastReplica,
    Phase,
    Release,
    Replica,
    ReplicaSet,
    Report,
    SlurmJob,
    Unknown,
)
from controlplane.db import (
    Database,
    Stale,
    alerts,
    back_offs,
    decisions,
    endpoints,
    replica_sets,
    replicas,
    slurm_jobs,
)
from controlplane.metrics import ControlPlaneMetrics
from controlplane.reconcile.actions import ACTOR, Actor, Done
from controlplane.reconcile.ends import EndCounter
from controlplane.reconcile.nodes import NodeKeeper, Nodes
from controlplane.reconcile.reservations import ReservationWatch
from controlplane.reconcile.schedules import scheduled_bounds
from controlplane.slurm.client import SlurmClient
from controlplane.slurm.errors import SlurmError

_PAST_PER_SET = 10


@dataclass(frozen=True, slots=True)
class ReplicaOptions:
    instance_id: str
    interval_seconds: float = 5.0
    stale_after: timedelta = timedelta(minutes=15)  # an alert that nobody confirmed for so long presses no more
    orphan_grace: timedelta = timedelta(minutes=5)
    reservations_good_for: timedelta = timedelta(seconds=30)  # then they are read again
    rules: PlanRules = field(default_factory=PlanRules)
    nodes: NodeRules = field(default_factory=NodeRules)


@dataclass(slots=True)
class World:
    """What the database knew when the round began."""

    sets: dict[str, ReplicaSet]
    replicas: list[Replica]
    endpoints: dict[str, Endpoint]
    past: dict[str, list[PastReplica]]
    alerts: tuple[Alert, ...]
    loaded_at: datetime  # when the replicas had been read: what they say was written by then
    names: frozenset[str] = frozenset()  # of all replicas that were live
    ends_at: dict[str, datetime] = field(default_factory=dict)  # their walltimes' ends, as Slurm told before
    last_nodes: dict[str, str] = field(default_factory=dict)  # where their jobs ran, as Slurm told before
    forgiven: dict[str, datetime] = field(default_factory=dict)  # sets whose failures an operator forgave, and when
    outrun: set[str] = field(default_factory=set)  # sets of which somebody else has moved a replica meanwhile


class ReplicaLoop:
    name = "replicas"

    def __init__(
        self,
        db: Database,
        slurm: SlurmClient,
        actor: Actor,
        options: ReplicaOptions,
        metrics: ControlPlaneMetrics,
        clock: Callable[[], datetime],
    ) -> None:
        self._db = db
        self._slurm = slurm
        self._actor = actor
        self._options = options
        self._metrics = metrics
        self._clock = clock
        self._reservations = ReservationWatch(slurm, good_for=options.reservations_good_for)
        self._orphans: dict[int, datetime] = {}  # job id -> first seen
        self._pressing_since: dict[str, datetime] = {}  # replica set -> when the alert it still answers began
        self._reported: dict[str, str] = {}
        self._nodes = NodeKeeper(db, slurm, options.nodes, options.stale_after)
        self._ends = EndCounter(metrics)
        self._draining: dict[tuple[str, int], datetime] = {}  # name and version -> when it was first read so
        self.interval_seconds = options.interval_seconds

    async def run_once(self, now: datetime) -> str | None:
        """One round. It may be cut short anywhere, and repeated."""
        done = Done()
        world = await self._load(now)
        pauses = {name: self._back_off(world, one) for name, one in world.sets.items()}
        pressing = pressures(
            world.sets.values(),
            world.alerts,
            now=now,
            stale_after=self._options.stale_after,
            backing_off={name for name, one in pauses.items() if one is not None and now < one.next_try_at},
            help_there=help_for(world.sets.values(), world.replicas, world.endpoints, now),
        )
        actions: list[Action] = [*await self._decide(world, pressing, pauses, done, now)]
        observed = await self._observe(now)
        jobs: dict[str, SlurmJob] = {}
        if isinstance(observed, JobList):
            jobs = await self._follow(world, observed, done, now)
            actions += self._twins(world, observed) + await self._strays(world, observed, now)
            await self._reservations.refresh(now)
            actions += self._reservations.reports
        else:
            message = f"no usable answer, so nothing is submitted or cancelled: {observed.message}"
            actions.append(Report("Slurm", message))
        may_call = isinstance(observed, JobList)
        seen = await self._nodes.look(world.alerts, now, may_ask=may_call)  # after what has just ended was recorded
        done.moved += seen.changes
        await self._note_idle(world)
        pauses = {}  # anew: what has just ended counts
        for replica_set in world.sets.values():
            if replica_set.spec.slurm is not None and replica_set.name not in world.outrun:
                closing = self._reservations.calendar.closing(replica_set.spec.slurm, now)
                scene = _scene(world, replica_set, jobs, pressing[replica_set.name], seen, closing, now)
                actions += plan(scene, now=now, rules=self._options.rules)
                pauses[replica_set.name] = back_off(scene, self._options.rules)
        await back_offs.record(self._db, pauses, now=now)
        actions = seen.allowed(actions + _job_steps(world.replicas, jobs), world.sets)
        actions += seen.exclusions(world.sets, world.replicas, jobs) + seen.reports(world.sets.values())
        self._report(actions)
        kept_out = {name: out.nodes for name, one in world.sets.items() if (out := seen.kept_out(one)) is not None}
        await self._actor.carry_out(actions, world.sets, done, now, may_call=may_call, kept_out=kept_out)
        self._ends.count(world.past)
        self._measure(done)
        return done.sentence()

    async def _load(self, now: datetime) -> World:
        sets = {one.name: one for one in await replica_sets.load_all(self._db)}
        live = list(await replicas.load_live(self._db))
        loaded_at = self._clock()
        seen = {one.replica: one for one in await endpoints.load_live(self._db) if one.replica is not None}
        past = await self._load_past()
        longest_window = max((one.spec.scale_down.stabilization_window_seconds for one in sets.values()), default=0)
        since = now - self._options.stale_after - timedelta(seconds=longest_window)
        names = frozenset(one.name for one in live)
        ends_at = await slurm_jobs.load_ends(self._db)
        last_nodes = await slurm_jobs.load_nodes(self._db)
        forgiven = await back_offs.load_forgiven(self._db)
        heard = await alerts.load_since(self._db, since)
        return World(sets, live, seen, past, heard, loaded_at, names, ends_at, last_nodes, forgiven)

    async def _load_past(self) -> dict[str, list[PastReplica]]:
        past: dict[str, list[PastReplica]] = defaultdict(list)
        for one in await replicas.load_past(self._db, per_set=_PAST_PER_SET):
            past[one.replica_set].append(one)
        return past

    async def _load_changes(self, world: World, now: datetime) -> dict[str, list[Change]]:
        period = max(map(longest_period, world.sets.values()), default=timedelta(0))
        return await decisions.load_changes(self._db, now - period) if period else {}

    async def _decide(
        self,
        world: World,
        pressing: dict[str, Pressure],
        pauses: dict[str, BackOff | None],
        done: Done,
        now: datetime,
    ) -> list[Report]:
        latest = await decisions.load_latest(self._db)
        changes = await self._load_changes(world, now)
        reports: list[Report] = []
        for name, pressure in pressing.items():
            replica_set = world.sets[name]
            own = [one for one in world.replicas if one.replica_set == name]
            scheduled = scheduled_bounds(replica_set, now)
            if isinstance(scheduled, Report):
                reports.append(scheduled)
            decision = decide(
                replica_set,
                pressure,
                own,
                world.endpoints,
                now=now,
                scheduled=None if isinstance(scheduled, Report) else scheduled,
                changes=changes.get(name, ()),
            )
            decision = explained(decision, pauses[name])
            before = latest.get(name)
            is_news = before is None or (before.reason, before.alerts) != (decision.reason, decision.alerts)
            if before is not None and decision.reason is DecisionReason.BACKING_OFF:
                is_news |= before.explanation != decision.explanation  # each failed start is told, with its next try
            if not decision.changes_desired and decision.scheduled is None and not is_news:
                continue
            try:
                await replica_sets.decide(self._db, decision, actor=ACTOR, now=now)
            except Stale:
                continue  # an operator was faster; the next round sees what they said
            self._metrics.decisions.labels(name, decision.reason).inc()
            logger.info(
                "decision",
                replica_set=name,
                reason=decision.reason,
                previous=decision.previous,
                desired=decision.desired,
                why=decision.explanation,
            )
            if decision.changes_desired or decision.scheduled is not None:
                done.moved.append(f"{name}: {decision.previous} -> {decision.desired}, {decision.explanation}")
                world.sets[name] = await replica_sets.load(self._db, name)
                self._note_pressure(decision, pressure)
        return reports

    def _back_off(self, world: World, replica_set: ReplicaSet) -> BackOff | None:
        return back_off(_scene(world, replica_set, {}, Pressure(), Nodes(), None, world.loaded_at), self._options.rules)

    async def _observe(self, now: datetime) -> JobList | Unknown:
        try:
            listed = await self._slurm.list_jobs(now)
        except SlurmError as error:
            return Unknown(f"{type(error).__name__}: {error}")
        mine = tuple(job for job in listed.jobs if not is_anothers(job, self._options.instance_id))
        return JobList(mine, listed.asked_at)

    async def _follow(self, world: World, listed: JobList, done: Done, now: datetime) -> dict[str, SlurmJob]:
        """Let every replica take the steps that Slurm's answer asks for. Returns the jobs, by replica name."""
        seen: list[tuple[int, SlurmJob]] = []
        following: list[Replica] = []
        jobs: dict[str, SlurmJob] = {}
        for before in world.replicas:
            replica = before
            while (step := advance(replica, listed, now=now, submit_grace=self._slurm.submit_grace)) is not None:
                after = await self._actor.move(step, done, now)
                if after is None:
                    world.outrun.add(replica.replica_set)
                    break
                if replica.phase is Phase.RUNNING and after.phase is Phase.QUEUED:
                    await endpoints.distrust(self._db, after)
                    world.endpoints.pop(after.name, None)
                replica = after
            else:
                job = job_of(replica, listed.jobs)
                if job is not None:
                    jobs[replica.name] = job
                    seen.append((replica.id, job))
                if replica.phase is not Phase.ENDED:
                    following.append(replica)
        await slurm_jobs.record(self._db, seen, now)
        if len(following) < len(world.replicas):
            world.past = await self._load_past()  # what has just failed to start counts before the next one is made
        for replica in following:
            job = jobs.get(replica.name)
            endpoint = world.endpoints.get(replica.name)
            is_proven = endpoint is not None and endpoint.health is Health.READY
            if replica.phase is Phase.RUNNING and not is_proven and job is not None and job.state is JobState.RUNNING:
                await self._find_endpoint(replica, job)
        world.replicas = following
        return jobs

    async def _find_endpoint(self, replica: Replica, job: SlurmJob) -> None:
        """Nobody has to call home: the host is Slurm's to tell, the port and the secret are ours."""
        try:
            address = await self._slurm.node_address(job.batch_host or first_node(job.nodes))
        except SlurmError as error:
            logger.warning("the node's address is not known yet", replica=replica.name, why=str(error))
            return
        host = f"[{address}]" if ":" in address else address
        await endpoints.ensure(self._db, replica, f"http://{host}:{replica.port}")

    async def _note_idle(self, world: World) -> None:
        """`phase_since` is the time of the round that began the drain, which may have been written much later."""
        draining = {(one.name, one.version): one for one in world.replicas if one.phase is Phase.DRAINING}
        self._draining = {key: self._draining.get(key, world.loaded_at) for key in draining}
        for key, replica in draining.items():
            known = replace(replica, phase_since=max(replica.phase_since, self._draining[key]))
            since = idle_since(known, world.endpoints.get(replica.name), self._options.rules)
            if since != replica.idle_since:
                await replicas.mark_idle(self._db, replica, since)

    def _twins(self, world: World, listed: JobList) -> list[Action]:
        found = [twin for replica in world.replicas for twin in twins_of(replica, listed.jobs)]
        return [CancelJob(twin.job_id, twin.name) for twin in found]

    async def _strays(self, world: World, listed: JobList, now: datetime) -> list[Action]:
        """Live jobs of this installation that no live replica stands for: of an ended one, or of none at all."""
        live = {replica.name for replica in world.replicas}
        ours = [
            job
            for job in listed.jobs
            if not job.is_over
            and job.state is not JobState.COMPLETING
            and job.name not in live
            and job.comment == comment_for(job.name, self._options.instance_id)
        ]
        ended = await replicas.names_that_ended(self._db, [job.name for job in ours]) if ours else set()
        orphans = [job for job in ours if job.name not in ended and job.name not in world.names]
        self._orphans = {job.job_id: self._orphans.get(job.job_id, now) for job in orphans}
        due = [job for job in orphans if now - self._orphans[job.job_id] >= self._options.orphan_grace]
        actions: list[Action] = [CancelJob(job.job_id, job.name) for job in ours if job.name in ended or job in due]
        actions += [
            Report(f"job {job.job_id}", f"{job.name} is an orphan: no replica stands for it") for job in orphans
        ]
        return actions

    def _report(self, actions: Iterable[Action]) -> None:
        """Say what an operator should know, once as long as it stays the same."""
        reports = {one.subject: one.message for one in actions if isinstance(one, Report)}
        for subject, message in reports.items():
            if self._reported.get(subject) != message:
                logger.warning(message, subject=subject)
        self._reported = reports

    def _note_pressure(self, decision: Decision, pressure: Pressure) -> None:
        if decision.desired > decision.previous and pressure.up:
            self._pressing_since[decision.replica_set] = min(alert.starts_at for alert in pressure.up)

    def _measure(self, done: Done) -> None:
        for replica in done.cut:
            self._metrics.requests_cut.labels(replica.replica_set).inc(replica.cut_requests or 0)
        for replica in done.submitted:
            if (since := self._pressing_since.pop(replica.replica_set, None)) is not None:
                self._metrics.alert_to_submit_seconds.observe((self._clock() - since).total_seconds())


def _scene(
    world: World,
    replica_set: ReplicaSet,
    jobs: dict[str, SlurmJob],
    pressure: Pressure,
    seen: Nodes,
    closing: Closing | None,
    now: datetime,
) -> Scene:
    own = tuple(one for one in world.replicas if one.replica_set == replica_set.name)
    return Scene(
        replica_set=replica_set,
        replicas=own,
        endpoints=world.endpoints,
        past=tuple(world.past.get(replica_set.name, ())),
        ends_at=world.ends_at
        | {
            name: job.ends_at
            for name, job in jobs.items()
            # of a job that is being ended Slurm tells when that began: no walltime's end
            if job.ends_at is not None and job.state is not JobState.COMPLETING
        },
        to_replace=frozenset(alert.labels["replica"] for alert in pressure.replace),
        to_vacate=seen.to_vacate(replica_set, own, jobs, last_nodes=world.last_nodes, now=now),
        forgiven_at=world.forgiven.get(replica_set.name),
        closing=closing,
    )


def _job_steps(live: Iterable[Replica], jobs: dict[str, SlurmJob]) -> list[Action]:
    """What the job itself needs: a release as long as it is held, a cancel as long as it has not begun to end."""
    actions: list[Action] = []
    for replica in live:
        job = jobs.get(replica.name)
        if job is None or job.is_over:
            continue
        if replica.phase is Phase.QUEUED and job.is_held:
            actions.append(Release(replica))
        elif replica.phase is Phase.STOPPING and job.state is not JobState.COMPLETING:
            actions.append(CancelJob(job.job_id, job.name))
    return actions
