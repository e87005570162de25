"""A small pure model of everything a plan meets: rows behind their guards, a simple Slurm, processes, probes, clients.

It carries out what the core decides as the reconciler does (follow Slurm's list, plan, write rows, call Slurm), may be
cut short before any single effect, and states after every effect what must never happen. Its rows obey the guards and
CHECKs of the schema; its Slurm may lose answers, make jobs late, start, crash, requeue, forget, and give ids again.
While it is blind every call fails, as the reconciler's are not even made; rows may still be written.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from enum import Enum, auto
from random import Random

from controlplane.core.health import HealthRules, observe
from controlplane.core.lifecycle import advance, job_of, twins_of
from controlplane.core.planning import PlanRules, Scene, idle_since, plan
from controlplane.core.specs import spec_hash
from controlplane.core.types import (
    Action,
    CancelJob,
    Create,
    Endpoint,
    Health,
    JobList,
    JobState,
    Move,
    PastReplica,
    Phase,
    ProbeResult,
    Reason,
    Release,
    Replica,
    ReplicaSet,
    ReplicaSetSpec,
    SlurmJob,
    Submit,
)
from controlplane.core.verbs import Verb, VerbRefused, interpret
from tests.unit.worlds import NOW

SUBMIT_GRACE = timedelta(seconds=120)
LOAD = timedelta(seconds=20)  # from the job's start to the first answer of its engine
TICK = timedelta(seconds=5)
RULES, HEALTH_RULES = PlanRules(), HealthRules()
_PAST_KEPT = 10
_LEAVING = (Phase.DRAINING, Phase.STOPPING, Phase.ENDED)


class Answer(Enum):
    """What becomes of one submit."""

    GIVEN = auto()
    LOST = auto()  # the job was made, and nobody was told
    LATE = auto()  # nobody was told, and the job may be made at any later time
    UNREACHABLE = auto()  # certainly nothing happened
    REFUSED = auto()


class CutShort(Exception):
    """The process died before its next effect."""


class SmallWorld:
    def __init__(self, replica_set: ReplicaSet, *, has_walltimes: bool = False) -> None:
        self.replica_set = replica_set
        self.has_walltimes = has_walltimes  # do jobs end at their time limit?
        self.cut_by_walltimes = 0  # requests
        self.starts: list[float] = []  # seconds from creation to ready
        self.now = NOW
        self.is_blind = False
        self.replicas: dict[int, Replica] = {}
        self.past: list[PastReplica] = []  # newest first
        self.endpoints: dict[str, Endpoint] = {}
        self.jobs: dict[int, SlurmJob] = {}
        self.strange: set[int] = set()  # jobs that Slurm shows in a state of which nobody has heard
        self.frozen: set[int] = set()  # jobs whose engine answers no more
        self.in_flight: dict[str, int] = {}  # requests, by replica name
        self.last_jobs: dict[str, SlurmJob] = {}  # as Slurm last showed them, by replica name
        self.drained: dict[str, datetime] = {}  # nodes that jobs are kept off, since when
        self.late: list[str] = []  # names for which a job may still be made
        self.asleep: list[list[Action]] = []  # decided by processes that have not acted yet
        self.effects_left: int | None = None
        self._answers: list[Answer] = []
        self._numbers = itertools.count(1)
        self._next_job_id = 101

    # --- what the reconciler does ----------------------------------------------------------------------------

    def round(
        self,
        rng: Random,
        *,
        cut_after: int | None = None,
        answers: Sequence[Answer] = (),
        falls_asleep: bool = False,
    ) -> None:
        """One round; cut short after so many effects, or asleep between its decisions and its deeds."""
        self.effects_left, self._answers = cut_after, list(answers)
        try:
            actions = self._decide()
            rng.shuffle(actions)
            if falls_asleep:
                self.asleep.append(actions)
            else:
                self._carry_out(actions)
        except CutShort:
            pass
        finally:
            self.effects_left = None

    def wake(self, rng: Random) -> None:
        """A process that slept does what it had decided, however long ago."""
        self._carry_out(self.asleep.pop(rng.randrange(len(self.asleep))))

    def _decide(self) -> list[Action]:
        jobs: dict[str, SlurmJob] = {}
        actions: list[Action] = []
        if not self.is_blind:
            listed = JobList(tuple(self._shown()), asked_at=self.now)
            jobs = self._follow(listed)
            live = self.live()
            actions += [CancelJob(twin.job_id, twin.name) for one in live for twin in twins_of(one, listed.jobs)]
            actions += self._strays(listed)
        for replica in self.live():
            if replica.phase is Phase.DRAINING:
                since = idle_since(replica, self.endpoints.get(replica.name), RULES)
                self.replicas[replica.id] = replace(replica, idle_since=since)
        planned = plan(self.scene(), now=self.now, rules=RULES)
        self.check_plan(planned)
        actions += planned
        for replica in self.live():
            job = jobs.get(replica.name)
            if job is None or job.is_over:
                continue
            if replica.phase is Phase.QUEUED and job.is_held:
                actions.append(Release(replica))
            elif replica.phase is Phase.STOPPING and job.state is not JobState.COMPLETING:
                actions.append(CancelJob(job.job_id, job.name))
        return actions

    def _follow(self, listed: JobList) -> dict[str, SlurmJob]:
        jobs: dict[str, SlurmJob] = {}
        for before in self.live():
            replica = before
            while (step := advance(replica, listed, now=self.now, submit_grace=SUBMIT_GRACE)) is not None:
                after = self._move(step)
                if after is None:
                    break
                if (replica.phase, after.phase) == (Phase.RUNNING, Phase.QUEUED):
                    self._distrust(replica.name)
                replica = after
            job = job_of(replica, listed.jobs)
            if job is not None and replica.phase is not Phase.ENDED:
                jobs[replica.name] = self.last_jobs[replica.name] = job
                self._find_endpoint(replica, job)
        return jobs

    def _strays(self, listed: JobList) -> list[Action]:
        live = {replica.name for replica in self.live()}
        return [
            CancelJob(job.job_id, job.name)
            for job in listed.jobs
            if job.name not in live and not job.is_over and job.state is not JobState.COMPLETING
        ]

    def _find_endpoint(self, replica: Replica, job: SlurmJob) -> None:
        known = self.endpoints.get(replica.name)
        is_proven = known is not None and known.health is Health.READY
        if replica.phase is not Phase.RUNNING or is_proven or job.state is not JobState.RUNNING:
            return
        url = f"http://{job.nodes}:{replica.port}"
        if known is None:
            self.endpoints[replica.name] = Endpoint(
                replica.id, replica.replica_set, "m", url, replica.secret, replica.name
            )
        elif known.url != url:
            self.endpoints[replica.name] = replace(known, url=url)
            self._distrust(replica.name)

    def _distrust(self, name: str) -> None:
        if name in self.endpoints:
            self.endpoints[name] = replace(
                self.endpoints[name], health=Health.UNPROVEN, passes=0, fails=0, failing_since=None
            )

    def scene(self) -> Scene:
        ends_at = {job.name: job.ends_at for job in self.jobs.values() if job.ends_at is not None}
        return Scene(
            self.replica_set,
            tuple(self.live()),
            self.endpoints,
            tuple(self.past),
            ends_at,
            frozenset(),
            to_vacate=self._to_vacate(),
        )

    def _to_vacate(self) -> dict[str, datetime]:
        """Where Slurm is not seen, what it last showed counts, but nobody's time to wait for a successor passes."""
        found: dict[str, datetime] = {}
        for one in self.live():
            job = None if self.is_blind else job_of(one, self._shown())
            if job is not None and job.nodes in self.drained:
                found[one.name] = self.drained[job.nodes]
            elif job is None and self._last_node(one) in self.drained:
                found[one.name] = self.now
            elif job is None and one.reason is Reason.NODE_DRAINED:
                found[one.name] = one.phase_since
        return found

    def _last_node(self, replica: Replica) -> str | None:
        job = self.last_jobs.get(replica.name)
        return job.nodes if job is not None and job.job_id == replica.slurm_job_id else None

    def _carry_out(self, actions: Iterable[Action]) -> None:
        calls: list[Submit | Release | CancelJob] = []
        for action in actions:
            match action:
                case Create():
                    if (fresh := self._create(action.beside, action.succeeds)) is not None:
                        calls.append(Submit(fresh))
                case Move():
                    self._move(action)
                case Submit() | Release() | CancelJob():
                    calls.append(action)
        for call in () if self.is_blind else calls:
            match call:
                case Submit(replica):
                    self._submit(replica)
                case Release(replica):
                    assert replica.slurm_job_id is not None
                    self._release(replica.slurm_job_id, replica.name)
                case CancelJob(job_id, name):
                    self._cancel(job_id, name)

    def _submit(self, replica: Replica) -> None:
        sent = self._move(Move(replica, Phase.SUBMITTING))
        if sent is None:
            return
        answer = self._answers.pop(0) if self._answers else Answer.GIVEN
        match answer:
            case Answer.UNREACHABLE:
                self._move(Move(sent, Phase.PENDING))
            case Answer.REFUSED:
                self._move(Move(sent, Phase.ENDED, reason=Reason.REJECTED))
            case Answer.LATE:
                self._effect()
                self.late.append(replica.name)
            case Answer.LOST:
                self._make_job(replica.name)
            case Answer.GIVEN:
                job_id = self._make_job(replica.name)
                recorded = self._move(Move(sent, Phase.QUEUED, slurm_job_id=job_id))
                if recorded is not None:
                    self._release(job_id, replica.name)

    # --- rows, behind their guards ---------------------------------------------------------------------------

    def live(self) -> list[Replica]:
        return [replica for replica in self.replicas.values() if replica.phase is not Phase.ENDED]

    def _create(self, beside: Sequence[str], succeeds: int | None) -> Replica | None:
        wanted = self.replica_set
        followed = {one.succeeds for one in self.live() if one.exists}
        predecessor = self.replicas.get(succeeds or 0)
        if succeeds is not None and (
            predecessor is None or predecessor.phase is not Phase.RUNNING or succeeds in followed
        ):
            return None
        left = {one.id for one in self.live() if one.name in beside}
        if (
            wanted.is_paused
            or self._counted(followed | {succeeds} | left) >= wanted.desired_replicas
            or len(self.live()) >= wanted.max_replicas + wanted.spec.surge
        ):
            return None
        self._effect()
        number = next(self._numbers)
        fresh = Replica(
            id=number,
            name=f"cp-s-{number}",
            replica_set="s",
            phase=Phase.PENDING,
            version=1,
            spec=wanted.spec,
            spec_hash=wanted.spec_hash,
            port=20000 + number,
            secret="x" * 32,
            created_at=self.now,
            phase_since=self.now,
            succeeds=succeeds,
        )
        self.replicas[number] = fresh
        self.check()
        return fresh

    def _counted(self, followed: Collection[int | None], leaving: Iterable[int] = ()) -> int:
        """Those of the spec in force that count against max: of a predecessor and its successor only the one does."""
        return sum(
            one.exists and one.spec_hash == self.replica_set.spec_hash and one.id not in {*followed, *leaving}
            for one in self.live()
        )

    def _move(self, step: Move, *, is_forced: bool = False) -> Replica | None:
        before = self.replicas[step.replica.id]
        if (before.phase, before.version) != (step.replica.phase, step.replica.version):
            return None  # stale
        is_leaving = step.to in _LEAVING
        after = replace(
            before,
            phase=step.to,
            version=before.version + 1,
            phase_since=self.now,
            reason=(step.reason or before.reason) if is_leaving else None,
            slurm_job_id=None if step.to is Phase.PENDING else step.slurm_job_id or before.slurm_job_id,
            submitted_at=self.now if step.to is Phase.SUBMITTING else before.submitted_at,
            running_since=None if step.to is Phase.QUEUED else step.running_since or before.running_since,
            drain_deadline=None if step.to is Phase.RUNNING else step.drain_deadline or before.drain_deadline,
            idle_since=None,
        )
        others = (one for one in self.live() if one.id != after.id and one.slurm_job_id is not None)
        if any(one.slurm_job_id == after.slurm_job_id for one in others):
            return None  # Slurm gave the id of a lost job again: the other row has to go first
        self._effect()
        self.check_step(before, after, is_forced=is_forced)
        self.replicas[after.id] = after
        if after.phase is Phase.ENDED:
            self._remember(after)
        self.check()
        return after

    def _remember(self, ended: Replica) -> None:
        assert ended.reason is not None
        endpoint = self.endpoints.get(ended.name)
        was_ready = endpoint is not None and endpoint.first_ready_at is not None
        past = PastReplica(ended.name, "s", ended.spec_hash, ended.reason, None, self.now, was_ready, ended.created_at)
        self.past = [past, *self.past][:_PAST_KEPT]

    # --- Slurm, as called ------------------------------------------------------------------------------------

    def _shown(self) -> list[SlurmJob]:
        return [
            replace(job, state=JobState.UNKNOWN) if job.job_id in self.strange else job for job in self.jobs.values()
        ]

    def _make_job(self, name: str) -> int:
        self._effect()
        job_id, self._next_job_id = self._next_job_id, self._next_job_id + 1
        self.jobs[job_id] = SlurmJob(job_id, name, "us", JobState.PENDING, is_held=True, nodes="")
        self.check()
        return job_id

    def _ours(self, job_id: int, name: str) -> SlurmJob | None:
        job = self.jobs.get(job_id)
        return job if job is not None and job.name == name and not job.is_over else None

    def _release(self, job_id: int, name: str) -> None:
        if (job := self._ours(job_id, name)) is not None and job.is_held:
            self._effect()
            self.jobs[job_id] = replace(job, is_held=False)
            self.check()

    def _cancel(self, job_id: int, name: str) -> None:
        if (job := self._ours(job_id, name)) is None:
            return
        self._effect()
        whose = [one for one in self.live() if one.name == name and one.slurm_job_id == job_id]
        assert all(one.phase is Phase.STOPPING for one in whose), f"job {job_id} of {whose} was cancelled"
        state = JobState.COMPLETING if job.state in (JobState.RUNNING, JobState.COMPLETING) else JobState.CANCELLED
        self.jobs[job_id] = replace(job, state=state)
        self.check()

    # --- what happens outside --------------------------------------------------------------------------------

    def some_jobs(self, *states: JobState) -> list[SlurmJob]:
        return [job for job in self.jobs.values() if job.state in states]

    def pass_seconds(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)

    def start(self, job: SlurmJob) -> None:
        """On another node each time, and none that jobs are kept off; Slurm never starts what is held."""
        assert not job.is_held
        node = f"n{job.restart_count}"
        node = "m" if node in self.drained else node
        slurm = self.replica_set.spec.slurm
        assert slurm is not None
        ends_at = self.now + timedelta(seconds=slurm.time_limit_seconds) if self.has_walltimes else None
        self.jobs[job.job_id] = replace(job, state=JobState.RUNNING, started_at=self.now, ends_at=ends_at, nodes=node)

    def end(self, job: SlurmJob, state: JobState) -> None:
        self.jobs[job.job_id] = replace(job, state=state)
        self.in_flight.pop(job.name, None)

    def requeue(self, job: SlurmJob) -> None:
        self.jobs[job.job_id] = replace(
            job, state=JobState.PENDING, started_at=None, nodes="", restart_count=job.restart_count + 1
        )
        self.frozen.discard(job.job_id)
        self.in_flight.pop(job.name, None)

    def forget(self, job: SlurmJob) -> None:
        """A crash of slurmctld: what was not saved yet is gone, and its id is given again."""
        del self.jobs[job.job_id]
        if job.job_id == self._next_job_id - 1:
            self._next_job_id = job.job_id

    def arrive(self, name: str) -> None:
        """A request that was on its way makes its job."""
        self.late.remove(name)
        self._make_job(name)

    def is_routable(self, replica: Replica) -> bool:
        endpoint = self.endpoints.get(replica.name)
        is_ready = endpoint is not None and endpoint.health is Health.READY
        return replica.phase is Phase.RUNNING and is_ready and not self.replica_set.is_paused

    def clients_send(self) -> None:
        """One request to each; a drain is noticed a little later than it begins."""
        for replica in self.live():
            endpoint = self.endpoints.get(replica.name)
            was_routable = (
                replica.phase is Phase.DRAINING
                and endpoint is not None
                and endpoint.first_ready_at is not None
                and endpoint.first_ready_at <= replica.phase_since
                and self.now < replica.phase_since + RULES.drain_settle
            )
            if (was_routable or self.is_routable(replica)) and self._answers_probes(replica):
                self.in_flight[replica.name] = self.in_flight.get(replica.name, 0) + 1

    def probe(self) -> None:
        """Look at every live endpoint once."""
        for replica in self.live():
            endpoint = self.endpoints.get(replica.name)
            if replica.phase not in (Phase.RUNNING, Phase.DRAINING) or endpoint is None:
                continue
            result = ProbeResult(passed=False, message="connection refused")
            if self._answers_probes(replica):
                result = ProbeResult(passed=True, running=self.in_flight.get(replica.name, 0), waiting=0)
            self.endpoints[replica.name] = after = observe(endpoint, result, now=self.now, rules=HEALTH_RULES)
            if after.first_ready_at is not None and endpoint.first_ready_at is None:
                self.starts.append((after.first_ready_at - replica.created_at).total_seconds())
                self.replica_set = replace(self.replica_set, start_lead_seconds=max(self.starts[-20:]))

    def _answers_probes(self, replica: Replica) -> bool:
        job = self.jobs.get(replica.slurm_job_id or 0)
        if job is None or job.name != replica.name or job.state is not JobState.RUNNING or job.job_id in self.frozen:
            return False
        assert job.started_at is not None
        is_there = self.endpoints[replica.name].url == f"http://{job.nodes}:{replica.port}"
        return is_there and self.now >= job.started_at + LOAD

    # --- operators -------------------------------------------------------------------------------------------

    def scale(self, desired: int, max_replicas: int) -> None:
        bounded = min(desired, max_replicas)
        self.replica_set = replace(self.replica_set, desired_replicas=bounded, max_replicas=max_replicas)

    def drain_node(self, node: str | None) -> None:
        """Keep jobs off this node, and let them use every other one."""
        self.drained = {} if node is None else {node: self.drained.get(node, self.now)}

    def apply(self, spec: ReplicaSetSpec) -> None:
        self.replica_set = replace(self.replica_set, spec=spec, spec_hash=spec_hash(spec))

    def say(self, verb: Verb, replica: Replica) -> None:
        try:
            step = interpret(verb, replica, actor="ann", now=self.now)
        except VerbRefused:
            return
        if step is not None:
            self._move(step, is_forced=True)

    # --- calm ------------------------------------------------------------------------------------------------

    def calm_tick(self, rng: Random, *, cut_after: int | None = None) -> None:
        """Everybody does what is expected of them for five seconds, and then there is a round, cut short or whole."""
        for job in self.some_jobs(JobState.PENDING):
            if not job.is_held:
                self.start(job)
        for job in self.some_jobs(JobState.COMPLETING):
            self.end(job, JobState.CANCELLED)
        self.now += TICK
        for job in self.some_jobs(JobState.RUNNING):
            if job.ends_at is not None and job.ends_at <= self.now:
                self.cut_by_walltimes += self.in_flight.get(job.name, 0)
                self.end(job, JobState.TIMEOUT)
        self.probe()
        self.round(rng, cut_after=cut_after)

    def becomes_quiet(self) -> None:
        """No more faults: what was on its way never comes, what slept never wakes, clients are content."""
        self.is_blind = False
        self.late.clear()
        self.asleep.clear()
        self.strange.clear()
        self.in_flight.clear()

    def is_settled(self) -> bool:
        """As many serve as are wanted, all of the spec in force, and Slurm runs their jobs and no others."""
        scene, live = self.scene(), self.live()
        is_as_wanted = len(live) == scene.target and all(
            scene.is_serving(one) and self._answers_probes(one) and one.spec_hash == self.replica_set.spec_hash
            for one in live
        )
        is_as_wanted = is_as_wanted and not self._to_vacate()
        jobs = {job.job_id for job in self.jobs.values() if not job.is_over}
        return is_as_wanted and jobs == {one.slurm_job_id for one in live}

    def serving(self) -> int:
        scene = self.scene()
        return sum(scene.is_serving(one) for one in self.live())

    def described(self) -> str:
        rows = [f"{one.name} {one.phase} {one.reason} job {one.slurm_job_id}" for one in self.live()]
        jobs = [
            f"job {job.job_id} {job.name} {job.state}{' held' * job.is_held}"
            for job in self.jobs.values()
            if not job.is_over
        ]
        return "; ".join([f"target {self.scene().target} of {self.replica_set.max_replicas}", *rows, *jobs])

    # --- what must never happen ------------------------------------------------------------------------------

    def _effect(self) -> None:
        if self.effects_left is not None:
            if self.effects_left == 0:
                raise CutShort
            self.effects_left -= 1

    def check(self) -> None:
        """After every effect: one job of a name at most can run."""
        released = [job.name for job in self.jobs.values() if not job.is_over and not job.is_held]
        assert len(released) == len(set(released)), f"two live jobs of one name: {sorted(released)}"

    def check_plan(self, actions: Sequence[Action]) -> None:
        """What a fresh plan asks for stays within the bounds, and condemns nobody who was not looked at."""
        wanted, live = self.replica_set, len(self.live())
        leaves = {action.replica.id for action in actions if isinstance(action, Move) and action.to in _LEAVING}
        followed = {one.succeeds for one in self.live() if one.exists and one.succeeds is not None}
        for predecessor in (one.succeeds for one in actions if isinstance(one, Create) and one.succeeds is not None):
            assert predecessor not in followed, f"cp-s-{predecessor} would have two successors"
            assert predecessor not in leaves, f"cp-s-{predecessor} leaves, and nobody could succeed it any more"
            followed.add(predecessor)
        vacating = {one.id for one in self.live() if one.name in self._to_vacate()}  # successors start beside them
        stays = self._counted(followed | vacating, leaves)
        creates = sum(isinstance(action, Create) for action in actions)
        returns = sum(isinstance(action, Move) and action.to is Phase.RUNNING for action in actions)
        if creates:
            assert live + creates <= wanted.max_replicas + wanted.spec.surge, "more would live than max and surge"
        if creates or returns:
            assert stays + creates + returns <= wanted.max_replicas, "more would exist than max"
        if self.is_blind:
            fit = {
                one.id
                for one in self.live()
                if one.exists and one.spec_hash == wanted.spec_hash and self._last_node(one) not in self.drained
            }
            excess = fit & {
                one.replica.id for one in actions if isinstance(one, Move) and one.reason is Reason.SCALED_DOWN
            }
            assert len(fit) - len(excess) >= min(len(fit), self.scene().target), "blindness made them too many"
        for action in actions:
            if isinstance(action, Move) and action.reason in (Reason.START_TIMEOUT, Reason.UNHEALTHY):
                assert self.endpoints[action.replica.name].fails, f"{action.replica.name} was given up unseen"

    def check_step(self, before: Replica, after: Replica, *, is_forced: bool) -> None:
        """The schema's CHECKs, and how a replica may leave."""
        phase = after.phase
        assert before.phase is not Phase.ENDED, "ENDED is final"
        assert phase is not Phase.PENDING or after.slurm_job_id is None
        assert phase not in (Phase.QUEUED, Phase.RUNNING, Phase.DRAINING) or after.slurm_job_id is not None
        assert phase not in (Phase.RUNNING, Phase.DRAINING) or after.running_since is not None
        assert phase is not Phase.DRAINING or after.drain_deadline is not None
        assert phase not in _LEAVING or after.reason is not None
        if phase is Phase.ENDED and after.slurm_job_id is not None:
            assert self._ours(after.slurm_job_id, after.name) is None, (
                f"{after.name} was called ended while its job lives"
            )
        if phase is Phase.STOPPING and not is_forced:
            assert before.phase is not Phase.RUNNING, f"{before.name} was to be cancelled before it was drained"
            in_flight = self.in_flight.get(before.name, 0)
            is_late = before.drain_deadline is not None and self.now >= before.drain_deadline
            assert not in_flight or is_late, f"{in_flight} requests of {before.name} were cut before its deadline"
