"""A whole Slurm in virtual time: slurmrestd's answers, slurmctld's memory and what of it is on disk, nodes, processes.

It does what was measured on real ones: a job is held until released, and held jobs never run; what was accepted since
the last save is lost when slurmctld crashes, its id is given again, and its process lives on for some seconds; a job
saved as pending is then started a second time under the same id; NODE_FAIL is shown while the process still lives;
an expired token keeps a late request from acting.

`truth` is what tests may ask; the product only ever sees the bytes that `exchange` returns.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from random import Random
from typing import Any

from controlplane.slurm.tokens import expires_at
from tests.sim.dialects import DOWN, FORBIDDEN, FROZEN, NO_CREDENTIALS, UNKNOWN_PATH, Dialect, Reply, Trouble

US = "www-data"
ANOTHER_INSTALLATION = "0" * 32  # of the control plane, under the same Slurm user, with names like ours
SAVE_EVERY = timedelta(seconds=5)
KILL_WAIT = timedelta(seconds=10)
MIN_JOB_AGE = timedelta(seconds=300)
ORPHAN_STEP_LIVES = timedelta(seconds=6)  # from the crash until slurmd registers
REQUEUE_WAIT = timedelta(seconds=120)
OVER = frozenset({"COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"})
NODES = {f"n{number}": f"10.0.0.{number}" for number in (1, 2, 3)}
_PARTITION, _ITS_NODES = "gpu", "n[1-3]"
_SLOTS = 3  # jobs a node takes
_SCRIPT = re.compile(r"# port=(\d+) model=(\S+)")


@dataclass(eq=False)
class Job:
    job_id: int
    name: str
    user: str
    comment: str
    submitted_at: datetime
    limit: timedelta
    port: int = 0
    secret: str = field(default="", repr=False)
    model: str = ""
    may_requeue: bool = False
    excluded: frozenset[str] = frozenset()  # nodes
    told_excluded: frozenset[str] = frozenset()  # before a crash may have forgotten it
    is_held: bool = False
    state: str = "PENDING"
    state_reason: str = "None"
    odd_state: str | None = None  # shown instead, if any: a word that nobody has heard of
    is_completing: bool = False
    node: str = ""
    eligible_at: datetime | None = None
    started_at: datetime | None = None
    ends_at: datetime | None = None  # while it runs: the walltime's end
    exit_code: int | None = None
    signal: int | None = None
    restarts: int = 0

    @property
    def is_ours(self) -> bool:
        return self.user == US and not self.comment.endswith(ANOTHER_INSTALLATION)

    @property
    def is_over(self) -> bool:
        return self.state in OVER and not self.is_completing

    @property
    def may_run(self) -> bool:
        """Released, and neither over nor ending."""
        return not self.is_held and self.state in ("PENDING", "RUNNING") and not self.is_completing


@dataclass(eq=False)
class Engine:
    """The process of one job: a vLLM that loads for a while and then serves."""

    job_id: int
    name: str
    node: str
    port: int
    secret: str = field(repr=False)
    model: str = ""
    serves_from: datetime | None = None
    dies_at: datetime | None = None
    is_frozen: bool = False
    in_flight: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Reservation:
    """For maintenance: no job whose time limit reaches into it starts on these nodes."""

    name: str
    starts_at: datetime
    ends_at: datetime
    nodes: frozenset[str]


@dataclass
class _Disk:
    """slurmctld's last save."""

    jobs: dict[int, Job]
    next_id: int


@dataclass
class _Limbo:
    """A request on its way to a slurmctld that does not answer: it acts then, if its token still is good."""

    due: datetime | None  # None: when slurmctld wakes up
    token: str
    method: str
    path: str
    body: Any


class Slurm:
    def __init__(self, dialect: Dialect, rng: Random, now: datetime) -> None:
        self.dialect = dialect
        self.now = now
        self.jobs: dict[int, Job] = {}
        self.engines: list[Engine] = []
        self.reservations: list[Reservation] = []
        self.is_gone = False  # slurmrestd is
        self.is_down = False
        self.is_frozen = False
        self.refuses_tokens = False
        self.load_seconds = 10
        self.engines_crash = False  # at their start
        self.on_change: Callable[[str], None] = lambda words: None  # tells the trace
        self.on_start: Callable[[Engine], None] = lambda engine: None
        self._rng = rng
        self._limbo: list[_Limbo] = []
        self._next_id = 101
        self.highest_id = 100  # ever given: what comes at or below it is given again
        self._ends: dict[int, datetime] = {}  # completing jobs: when their processes are gone
        self._past: list[tuple[datetime, list[Job]]] = []  # for stale lists
        self._disk = _Disk({}, self._next_id)
        self._saved_at = now

    # --- what the product can do ---------------------------------------------------------------------------

    def exchange(self, method: str, path: str, headers: Mapping[str, str], content: bytes) -> tuple[int, bytes]:
        """One request, acted upon and answered."""
        status, body = self._answer(method, path, headers, content)
        return status, (body if isinstance(body, str) else json.dumps(body)).encode()

    def stale_list(self, age: timedelta) -> tuple[int, bytes]:
        """The list as it was so long ago."""
        then = [jobs for at, jobs in self._past if at <= self.now - age]
        status, body = self.dialect.jobs(then[-1] if then else list(self.jobs.values()))
        return status, json.dumps(body).encode()

    def later(self, method: str, path: str, headers: Mapping[str, str], content: bytes, due: datetime) -> None:
        """A request that is on its way until then."""
        body = json.loads(content) if content else None
        self._limbo.append(_Limbo(due, headers["x-slurm-user-token"], method, path.split("/", 3)[3], body))

    @property
    def is_quiet(self) -> bool:
        return not self._limbo and not self._ends

    def _answer(self, method: str, path: str, headers: Mapping[str, str], content: bytes) -> Reply:
        _, _, version, what = path.split("/", 3)
        if version != self.dialect.version:
            return UNKNOWN_PATH
        token = headers.get("x-slurm-user-token", "")
        if not token or headers.get("x-slurm-user-name") != US:
            return NO_CREDENTIALS
        body = json.loads(content) if content else None
        trouble = self._trouble(token)
        if what == "ping":
            return self.dialect.ping(trouble)
        if trouble is FROZEN and method != "GET":
            self._limbo.append(_Limbo(None, token, method, what, body))
        return self.refusal(method, what, trouble) if trouble is not None else self._act(method, what, body)

    def _trouble(self, token: str) -> Trouble | None:
        if self.is_down:
            return DOWN
        if self.is_frozen:
            return FROZEN
        return FORBIDDEN if self.refuses_tokens or self._has_expired(token) else None

    def _has_expired(self, token: str) -> bool:
        expiry = expires_at(token)
        return expiry is not None and expiry <= self.now

    def refusal(self, method: str, what: str, trouble: Trouble) -> Reply:
        """What is answered instead."""
        noun = what.partition("/")[0]
        if noun not in ("job", "jobs"):
            return self.dialect.no_list("nodes" if noun == "node" else noun, trouble)
        if method == "GET":
            return self.dialect.no_jobs(trouble, is_list=what == "jobs")
        if what == "job/submit":
            return self.dialect.not_submitted(trouble)
        return self.dialect.not_done(trouble, cancels=method == "DELETE")

    def _act(self, method: str, what: str, body: Any) -> Reply:
        if what == "jobs":
            return self.dialect.jobs(list(self.jobs.values()))
        if what == "job/submit":
            return self._submit(body)
        noun, _, key = what.partition("/")
        match noun:
            case "node":
                return self.dialect.nodes({key: NODES[key]}, _PARTITION)
            case "nodes":
                return self.dialect.nodes(NODES, _PARTITION)
            case "partitions":
                return self.dialect.partitions(_PARTITION, _ITS_NODES)
            case "reservations":
                return self.dialect.reservations(self.reservations)
        job = self.jobs.get(int(key))
        if method == "GET":
            return self.dialect.unknown_job() if job is None else self.dialect.jobs([job])
        cancels = method == "DELETE"
        if job is None:
            return self.dialect.no_such_job(cancels=cancels)
        if job.is_over:
            return self.dialect.already_over(cancels=cancels)
        if cancels:
            if not job.is_completing or job.state == "PENDING":
                self.end(job, "CANCELLED", "None", signal=15)
        elif body == {"hold": False}:
            self._release(job)
        else:
            return self._exclude(job, body)
        return self.dialect.done()

    def _exclude(self, job: Job, body: Any) -> Reply:
        assert body.keys() == {self.dialect.excluded_nodes}
        if job.state != "PENDING":
            return self.dialect.not_pending()
        names = self.dialect.asked_to_exclude(body[self.dialect.excluded_nodes])
        assert names is None or names <= NODES.keys()
        if names is not None:
            job.excluded = job.told_excluded = frozenset(names)
            self.on_change(f"job {job.job_id} {job.name} is kept off {', '.join(sorted(names)) or 'no node'}")
        return self.dialect.done()

    def _submit(self, body: Any) -> Reply:
        asked = body["job"]
        environment = asked["environment"]
        if isinstance(environment, list):
            environment = dict(pair.split("=", 1) for pair in environment)
        found = _SCRIPT.search(body["script"])
        assert found is not None
        excluded, limit = self._asked_for(asked)
        if not excluded <= NODES.keys():
            return self.dialect.unknown_nodes()
        job = self.add(asked["name"], US, asked.get("comment", ""), is_held=asked.get("hold", False))
        job.port, job.model = int(found[1]), found[2]
        job.excluded = job.told_excluded = excluded
        job.secret = environment["VLLM_API_KEY"]
        job.limit = limit
        job.may_requeue = not self.dialect.can_forbid_requeue or asked.get("requeue") is True
        return self.dialect.submitted(job.job_id, is_held=job.is_held)

    def asked_for(self, content: bytes) -> tuple[frozenset[str], timedelta]:
        """The excluded nodes and the time limit in the body of a submit."""
        return self._asked_for(json.loads(content)["job"])

    def _asked_for(self, asked: Mapping[str, Any]) -> tuple[frozenset[str], timedelta]:
        limit = asked["time_limit"]
        assert asked.keys() & {"exclude_nodes", "excluded_nodes"} <= {self.dialect.excluded_nodes}
        excluded = self.dialect.asked_to_exclude(asked.get(self.dialect.excluded_nodes, "")) or set()
        return frozenset(excluded), timedelta(minutes=limit["number"] if isinstance(limit, dict) else limit)

    def add(self, name: str, user: str, comment: str = "", *, is_held: bool = False) -> Job:
        """A new job, of whoever."""
        job = Job(self._next_id, name, user, comment, self.now, timedelta(minutes=1), is_held=is_held)
        job.state_reason = "JobHeldUser" if is_held else "None"
        job.eligible_at = None if is_held else self._soon()
        self._next_id += 1
        self.highest_id = max(self.highest_id, job.job_id)
        self.jobs[job.job_id] = job
        self.on_change(f"job {job.job_id} {name} of {user} was made{', held' if is_held else ''}")
        return job

    def _release(self, job: Job) -> None:
        if job.is_held:
            job.is_held, job.state_reason, job.eligible_at = False, "Priority", self._soon()
            self.on_change(f"job {job.job_id} {job.name} was released")

    def _soon(self) -> datetime:
        return self.now + timedelta(seconds=self._rng.choice((0.5, 1, 2, 20)))

    # --- what happens by itself ----------------------------------------------------------------------------

    def advance(self, now: datetime) -> None:
        """Let time pass, with all that is due meanwhile."""
        while self.now < now:
            left = now - self.now
            self.now += min(left, timedelta(seconds=1 if left <= timedelta(seconds=20) else 5))
            self._pass()

    def _pass(self) -> None:
        now = self.now
        if not self.is_frozen and not self.is_down:
            self._arrive(now)
            if now - self._saved_at >= SAVE_EVERY:
                self.save()
        self.reservations = [one for one in self.reservations if one.ends_at > now]
        for engine in [one for one in self.engines if one.dies_at is not None and one.dies_at <= now]:
            self.engines.remove(engine)
        if not self.is_frozen and not self.is_down:
            for job in list(self.jobs.values()):
                self._live(job, now)
        self._past = [one for one in self._past if one[0] > now - timedelta(seconds=12)]
        self._past.append((now, [copy.copy(job) for job in self.jobs.values()]))

    def _arrive(self, now: datetime) -> None:
        due = [one for one in self._limbo if one.due is None or one.due <= now]
        self._limbo = [one for one in self._limbo if one not in due]
        for one in due:
            if not self._has_expired(one.token) and not self.refuses_tokens:
                self.on_change(f"late: {one.method} {one.path}")
                self._act(one.method, one.path, one.body)

    def _live(self, job: Job, now: datetime) -> None:
        if job.state == "PENDING" and not job.is_held and job.eligible_at is not None and job.eligible_at <= now:
            self._start(job)
        elif job.state == "RUNNING" and job.ends_at is not None and job.ends_at <= now:
            self.end(job, "TIMEOUT", "TimeLimit", signal=9)
        if job.is_completing and self._ends.get(job.job_id, now) <= now:
            self._ends.pop(job.job_id, None)
            job.is_completing = False
            job.ends_at = now
            if job.state == "PENDING":  # it was requeued
                job.node, job.started_at, job.ends_at = "", None, None
        if job.is_over and job.ends_at is not None and job.ends_at <= now - MIN_JOB_AGE:
            del self.jobs[job.job_id]

    def _start(self, job: Job) -> None:
        if any(one.job_id == job.job_id and one.name != job.name for one in self.engines):
            self.end(job, "CANCELLED", "None")  # slurmd: already running, do not launch a second copy
            return
        running = [one.node for one in self.jobs.values() if one.state == "RUNNING"]
        free = [node for node in NODES if running.count(node) < _SLOTS and self._may_have(job, node)]
        if not free:
            job.state_reason = "Resources"
            return
        job.node, job.state, job.state_reason = self._rng.choice(free), "RUNNING", "None"
        job.started_at, job.ends_at = self.now, self.now + job.limit
        self.on_change(f"job {job.job_id} {job.name} started on {job.node}")
        if not job.is_ours:
            return
        taken = any((one.node, one.port) == (job.node, job.port) for one in self.engines)
        if taken or self.engines_crash:
            self.end(job, "FAILED", "NonZeroExitCode", exit_code=1)
            return
        engine = Engine(job.job_id, job.name, job.node, job.port, job.secret, job.model)
        engine.serves_from = self.now + timedelta(seconds=self.load_seconds)
        self.engines.append(engine)
        self.on_start(engine)

    def _may_have(self, job: Job, node: str) -> bool:
        is_reserved = any(
            node in one.nodes and one.starts_at < self.now + job.limit and self.now < one.ends_at
            for one in self.reservations
        )
        return node not in job.excluded and not is_reserved

    # --- what may happen to it -----------------------------------------------------------------------------

    def engine_of(self, job: Job) -> Engine | None:
        """The youngest: Slurm may have started the job twice."""
        return next((one for one in reversed(self.engines) if (one.job_id, one.name) == (job.job_id, job.name)), None)

    def end(
        self, job: Job, state: str, state_reason: str, *, exit_code: int | None = None, signal: int | None = None
    ) -> None:
        """Its processes get TERM now, and are gone within KillWait."""
        was_running = job.state == "RUNNING"
        job.state, job.state_reason, job.exit_code, job.signal = state, state_reason, exit_code, signal
        job.is_held = False
        self.on_change(f"job {job.job_id} {job.name} is ending: {state}")
        if not was_running:
            job.ends_at = self.now
            return
        job.is_completing = True
        gone_at = self.now + (KILL_WAIT if exit_code is None else timedelta(seconds=1))
        self._ends[job.job_id] = gone_at
        for engine in [one for one in self.engines if (one.job_id, one.name) == (job.job_id, job.name)]:
            engine.dies_at = gone_at
            engine.serves_from = None  # its API is gone at the TERM

    def requeue(self, job: Job) -> None:
        """Same id, and later again; as after a preemption or the loss of a node."""
        self.end(job, "PENDING", "BeginTime")
        job.restarts += 1
        job.eligible_at = self.now + REQUEUE_WAIT

    def fail_node(self, job: Job, *, lives_for: timedelta) -> None:
        """NODE_FAIL at once, while the process lives on until the node is back."""
        job.state, job.state_reason, job.ends_at = "NODE_FAIL", "NodeDown", self.now
        self.on_change(f"job {job.job_id} {job.name} shows NODE_FAIL, its process lives on")
        for engine in [one for one in self.engines if one.job_id == job.job_id]:
            engine.dies_at = self.now + lives_for
        if job.may_requeue:
            job.state, job.state_reason, job.node = "PENDING", "BeginTime", ""
            job.started_at = job.ends_at = None
            job.restarts += 1
            job.eligible_at = self.now + REQUEUE_WAIT

    def recover(self) -> None:
        self.is_gone = self.is_down = self.is_frozen = self.refuses_tokens = False

    @property
    def is_ill(self) -> bool:
        return self.is_gone or self.is_down or self.is_frozen or self.refuses_tokens

    @property
    def next_id(self) -> int:
        return self._next_id

    def save(self) -> None:
        self._saved_at = self.now
        self._disk = _Disk({job.job_id: copy.copy(job) for job in self.jobs.values()}, self._next_id)

    def unsaved(self) -> set[int]:
        """Ids that a crash now would give again."""
        return set(range(self._disk.next_id, self._next_id))

    def crash(self) -> None:
        """kill -9 and start again: back to the last save, ids and all. Processes of lost jobs live on for a while."""
        before, self.jobs = self.jobs, {job_id: copy.copy(job) for job_id, job in self._disk.jobs.items()}
        self._next_id = self._disk.next_id
        self._saved_at = self.now
        self.on_change(f"slurmctld crashed; lost {sorted(before.keys() - self.jobs.keys())}")
        for engine in self.engines:
            job = self.jobs.get(engine.job_id)
            if job is None or job.name != engine.name or job.state != "RUNNING":
                engine.dies_at = min(filter(None, (engine.dies_at, self.now + ORPHAN_STEP_LIVES)))
        self._ends = {job_id: at for job_id, at in self._ends.items() if job_id in self.jobs}
        for job in self.jobs.values():
            job.told_excluded = before[job.job_id].told_excluded if job.job_id in before else job.told_excluded
            self._follow_up(job)

    def _follow_up(self, job: Job) -> None:
        if job.is_completing:
            self._ends.setdefault(job.job_id, self.now + KILL_WAIT)
        elif job.state == "RUNNING" and job.is_ours and self.engine_of(job) is None:
            self.end(job, "FAILED", "NonZeroExitCode", exit_code=1)  # it had ended, and that was lost
        elif job.state == "PENDING" and job.eligible_at is not None:
            job.eligible_at = max(job.eligible_at, self.now + ORPHAN_STEP_LIVES)
        if not job.is_completing:
            self._ends.pop(job.job_id, None)

    # --- what is so ----------------------------------------------------------------------------------------

    def ours_alive(self) -> list[Job]:
        """Jobs of ours that are there and neither over nor ending."""
        return [job for job in self.jobs.values() if job.is_ours and not job.is_over and not job.is_completing]
