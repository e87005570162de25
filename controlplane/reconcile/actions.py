"""Carries out what a plan asks for: every outside effect as intent, call, outcome.

The intent is committed before the call and the outcome is a guarded write after it, so that a crash between any two
lines leaves what the next round understands. No transaction is open during a call. A stale write is dropped: somebody
else has moved on, and the next round looks again.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from loguru import logger

from controlplane.core.lifecycle import comment_for
from controlplane.core.types import (
    Action,
    CancelJob,
    Create,
    Exclude,
    Move,
    Phase,
    Reason,
    Release,
    Replica,
    ReplicaSet,
    Report,
    Submit,
    TimeLimit,
)
from controlplane.db import Database, DatabaseError, Duplicate, Stale, replicas
from controlplane.reconcile.job_logs import log_path
from controlplane.slurm.client import SlurmClient
from controlplane.slurm.errors import SlurmAmbiguous, SlurmError, SlurmProtocolError, SlurmRejected
from controlplane.slurm.script import ScriptError, ScriptOptions, render
from controlplane.slurm.wire import JobRequest

ACTOR = "reconciler"
_CALLS_AT_ONCE = 4
_PORT_TRIES = 20


@dataclass(frozen=True, slots=True)
class ActionOptions:
    """`first_port` to `last_port`: where replicas listen; no two live ones share a port, so they may share a node."""

    job_directory: Path  # on a file system that the compute nodes see, too
    scripts: ScriptOptions
    instance_id: str
    first_port: int = 20000
    last_port: int = 29999


Call = Submit | Release | Exclude | CancelJob
"""The actions that ask something of Slurm."""


@dataclass(slots=True)
class Done:
    """What a round did, for its one sentence and for the metrics."""

    created: list[str] = field(default_factory=list)
    submitted: list[Replica] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    cut: list[Replica] = field(default_factory=list)  # with requests in flight, at the deadline of their drain

    def sentence(self) -> str | None:
        parts = [
            f"created {', '.join(self.created)}" if self.created else "",
            f"submitted {', '.join(f'{r.name} as job {r.slurm_job_id}' for r in self.submitted)}"
            if self.submitted
            else "",
            *self.moved,
        ]
        return "; ".join(part for part in parts if part) or None


class Actor:
    """Acts for one round after another. Safe to run from several processes: every write is guarded."""

    def __init__(
        self,
        db: Database,
        slurm: SlurmClient,
        options: ActionOptions,
        clock: Callable[[], datetime],
        rng: random.Random,
    ) -> None:
        self._db = db
        self._slurm = slurm
        self._options = options
        self._clock = clock
        self._rng = rng
        self._calls = asyncio.Semaphore(_CALLS_AT_ONCE)
        self._kept_out: Mapping[str, frozenset[str]] = {}  # nodes, by replica set: as the newest round saw them

    async def carry_out(
        self,
        actions: Sequence[Action],
        sets: dict[str, ReplicaSet],
        done: Done,
        now: datetime,
        *,
        may_call: bool,
        kept_out: Mapping[str, frozenset[str]] | None = None,
    ) -> None:
        """Database first, so that what Slurm delays is at least intended; then Slurm, a few calls at a time.

        `may_call` is False while Slurm gives no complete answer: then nothing is asked of it either.
        `kept_out`: the nodes that a set's new jobs must not be given, by its name.
        """
        self._kept_out = kept_out or {}
        calls: list[Call] = []
        for action in actions:
            match action:
                case Create():
                    if (fresh := await self._create(sets[action.replica_set], action, done, now)) is not None:
                        calls.append(Submit(fresh, action.limit))
                case Move():
                    await self.move(action, done, now)
                case Submit() | Release() | Exclude() | CancelJob():
                    calls.append(action)
                case Report():
                    pass  # said by the round
        if may_call:
            # before a job is released it is told where it must not start; as long as it could not be told, it waits
            exclusions = [call for call in calls if isinstance(call, Exclude)]
            were_told = await asyncio.gather(*(self._call(call, done) for call in exclusions))
            untold = {call.replica.name for call, was_told in zip(exclusions, were_told, strict=True) if not was_told}
            others = [call for call in calls if not isinstance(call, Exclude) and not _releases(call, untold)]
            await asyncio.gather(*(self._call(call, done) for call in others))

    async def move(self, step: Move, done: Done, now: datetime) -> Replica | None:
        """Take the step, or drop it: somebody else has moved on, or a live row has a job id that was given again."""
        try:
            after = await replicas.move(self._db, step, actor=ACTOR, now=now)
        except (Stale, Duplicate):
            return None
        why = f" ({after.reason})" if after.reason else ""
        done.moved.append(f"{after.name} {step.replica.phase} -> {after.phase}{why}")
        if step.cut_requests:
            done.cut.append(after)
        logger.info(
            "replica moved",
            replica=after.name,
            replica_set=after.replica_set,
            from_phase=step.replica.phase,
            to_phase=after.phase,
            reason=after.reason,
            why=step.message,
            slurm_job_id=after.slurm_job_id,
        )
        return after

    async def _create(self, replica_set: ReplicaSet, wanted: Create, done: Done, now: datetime) -> Replica | None:
        for _ in range(_PORT_TRIES):
            port = self._rng.randint(self._options.first_port, self._options.last_port)
            try:
                fresh = await replicas.create(
                    self._db,
                    replica_set,
                    port=port,
                    secret=secrets.token_urlsafe(32),
                    actor=ACTOR,
                    now=now,
                    beside=wanted.beside,
                    succeeds=wanted.succeeds,
                )
            except Duplicate:
                continue  # a live replica has this port, or a process that may be alive
            except Stale:
                return None
            done.created.append(fresh.name)
            return fresh
        logger.warning("no free port was found", replica_set=replica_set.name, tries=_PORT_TRIES)
        return None

    async def _call(self, call: Call, done: Done) -> bool:
        """Whether it was done; what failed is said, and tried again by a later round."""
        queued: Replica | None = None
        async with self._calls:
            try:
                match call:
                    case Submit():
                        queued = await self._submit(call.replica, call.limit, done)
                    case Release():
                        await self._release(call.replica)
                    case Exclude():
                        await self._exclude(call)
                    case CancelJob():
                        await self._slurm.cancel(call.job_id, name=call.job_name)
            except Stale:
                return False  # somebody else has moved on
            except (SlurmError, DatabaseError) as error:
                logger.warning(f"{_words(call)} failed; trying again", why=f"{type(error).__name__}: {error}")
                return False
        if queued is not None:
            await self._call(Release(queued), done)
        return True

    async def _submit(self, replica: Replica, limit: TimeLimit | None, done: Done) -> Replica | None:
        """Submit held. Returns the replica once its job id is recorded: then the job may be released."""
        try:
            request = self._request(replica, limit)
        except ScriptError as error:
            step = Move(replica, Phase.ENDED, reason=Reason.REJECTED, message=f"not submitted: {error}")
            await self.move(step, done, self._clock())
            return None
        # stamped when it leaves, not when the round began: from here on the request's life is counted
        intent = Move(replica, Phase.SUBMITTING)
        replica = await replicas.move(self._db, intent, actor=ACTOR, now=self._clock())
        try:
            submitted = await self._slurm.submit(request, intended_at=replica.submitted_at)
        except SlurmRejected as error:
            step = Move(replica, Phase.ENDED, reason=Reason.REJECTED, message=f"Slurm refused it: {error}")
            await self.move(step, done, self._clock())
            return None
        except (SlurmAmbiguous, SlurmProtocolError) as error:
            # it may have happened: stay SUBMITTING; a later list finds the job by its name, or proves it absent
            logger.warning("the outcome of a submit is not known", replica=replica.name, why=str(error))
            return None
        except SlurmError as error:
            await self.move(Move(replica, Phase.PENDING, message=f"not submitted: {error}"), done, self._clock())
            raise
        outcome = Move(replica, Phase.QUEUED, slurm_job_id=submitted.job_id, message=limit.why if limit else None)
        replica = await replicas.move(self._db, outcome, actor=ACTOR, now=self._clock())
        done.submitted.append(replica)
        logger.info("job submitted", replica=replica.name, slurm_job_id=submitted.job_id, warnings=submitted.warnings)
        return replica

    async def _release(self, replica: Replica) -> None:
        assert replica.slurm_job_id is not None  # a queued replica has one
        await self._slurm.release(replica.slurm_job_id, name=replica.name)

    async def _exclude(self, call: Exclude) -> None:
        replica = call.replica
        assert replica.slurm_job_id is not None  # a queued replica has one
        if await self._slurm.exclude(replica.slurm_job_id, call.nodes, name=replica.name):
            words = ", ".join(sorted(call.nodes)) or "none"
            logger.info("nodes kept from a waiting job", replica=replica.name, nodes=words)

    def _request(self, replica: Replica, limit: TimeLimit | None) -> JobRequest:
        spec, directory = replica.spec, self._options.job_directory
        assert spec.slurm is not None  # only sets that Slurm runs have replicas
        script = render(
            spec, name=replica.name, port=replica.port, secret=replica.secret, options=self._options.scripts
        )
        return JobRequest(
            name=replica.name,
            comment=comment_for(replica.name, self._options.instance_id),
            script=script.text,
            environment=script.environment,
            working_directory=str(directory),
            standard_output=log_path(directory, replica.name, "%j", spec.model),
            resources=replace(spec.slurm, time_limit_seconds=limit.seconds) if limit else spec.slurm,
            excluded_nodes=self._kept_out.get(replica.replica_set, frozenset()),
        )


def _releases(call: Call, names: Container[str]) -> bool:
    return isinstance(call, Release) and call.replica.name in names


def _words(call: Call) -> str:
    match call:
        case Submit() | Release():
            return f"{type(call).__name__.lower()} of {call.replica.name}"
        case Exclude():
            return f"exclusion of nodes for {call.replica.name}"
        case CancelJob():
            return f"cancel of job {call.job_id}"
