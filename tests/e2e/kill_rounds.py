"""Kills the control plane once in each of many cycles 0 -> 3 -> 0 on a real Slurm, and counts what came of it.

Run as `make kill-rounds ROUNDS=100`. Moments are drawn at random: some time after the count was raised or lowered, or
just when a submit leaves (and is lost), has left, or was answered (and the answer is lost). How far the way up goes
before the count is lowered is drawn as well. A round fails, and the run with it, unless every intended replica is one
job and every job an intended replica, no name has run twice, and nothing is left when it is quiet.

What makes a round last seconds and not minutes, and is no less true: tokens that outlive the run, with a submit grace
of 3 s (the site's estimate of how late a lost request may act: slurmctld is never frozen here, and answers within
milliseconds), a lease of 1 s, and a replica that is up at once. Ended jobs are forgotten after a minute, so that lists
stay short.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from controlplane.clock import utc_now
from controlplane.core.types import Phase, Replica
from controlplane.db import Database, DatabaseOptions, endpoints, replica_sets, replicas
from controlplane.demo.children import StartFailed
from controlplane.demo.postgres import PrivatePostgres
from controlplane.demo.slurm_cluster import SlurmCluster
from controlplane.slurm.tokens import MintedToken
from tests.conftest import eventually
from tests.e2e.plant import SHORT_WAITS, SPEC, Plant, jobs_of, living, twins
from tests.e2e.relay import Relay
from tests.e2e.slurm_matrix import release_under_test

SLURM_CONF = (*SHORT_WAITS, "MinJobAge=60")
MOMENTS = ("on the way up", "a submit is lost", "a submit has left", "a submit's answer is lost", "on the way down")
TURNS = ("all intended", "all submitted", "all running", "all routable")
_ODDS = (4, 1, 1, 1, 4)  # of the moments
_SUBMIT = b"/job/submit"
_PATIENCE_SECONDS = 120.0
_NAME = "control plane"


@dataclass(slots=True)
class Tally:
    rounds: int = 0
    kills: Counter[str] = field(default_factory=Counter)  # by moment
    phases: Counter[str] = field(default_factory=Counter)  # of replicas, when it was killed
    intended: int = 0
    jobs: int = 0
    adopted: int = 0
    twins: int = 0  # cancelled without having run
    orphans: int = 0

    def summary(self) -> str:
        return "\n".join(
            (
                f"rounds: {self.rounds}",
                f"kills: {sum(self.kills.values())}, {_listed(self.kills)}",
                f"replicas by phase when it was killed: {_listed(self.phases)}",
                f"replicas intended: {self.intended}, jobs submitted: {self.jobs}, adopted: {self.adopted}",
                f"twins cancelled: {self.twins}, orphans: {self.orphans}",
            )
        )


class Killing:
    """Rounds on one plant, each beginning and ending with nothing."""

    def __init__(self, up: Plant, relay: Relay, db: Database, rng: random.Random) -> None:
        self.tally = Tally()
        self._up = up
        self._relay = relay
        self._db = db
        self._rng = rng
        self._killed = asyncio.Event()

    async def round(self) -> str:
        """One cycle; returns a sentence about it. AssertionError: what must hold did not."""
        moment = self._rng.choices(MOMENTS, _ODDS)[0]
        turn = self._rng.choice(TURNS)
        before = {one.id for one in await replicas.load_newest(self._db, limit=1)} or {0}
        self._killed.clear()
        if moment == "a submit is lost":
            self._relay.swallow(_SUBMIT)
        if moment in ("a submit is lost", "a submit has left"):
            self._relay.before(_SUBMIT, self._kill)
        if moment == "a submit's answer is lost":
            self._relay.after(_SUBMIT, self._kill)
        await self._scale(3)
        if moment == "on the way up":
            await asyncio.sleep(self._rng.uniform(0, 2.5))
            await self._kill()
        if moment != "on the way down":
            await asyncio.wait_for(self._killed.wait(), _PATIENCE_SECONDS)
            await self._come_back()
        await eventually(lambda: self._is_up(turn), timeout_seconds=_PATIENCE_SECONDS)
        await self._scale(0)
        if moment == "on the way down":
            await asyncio.sleep(self._rng.uniform(0, 2.5))
            await self._kill()
            await self._come_back()
        await eventually(self._is_quiet, timeout_seconds=_PATIENCE_SECONDS)
        await self._judge(min(before))
        self.tally.rounds += 1
        self.tally.kills[moment] += 1
        return f"killed {moment}, turned when {turn}"

    async def _scale(self, count: int) -> None:
        await replica_sets.scale(self._db, SPEC.name, replicas=count, actor="test", now=utc_now())

    async def _kill(self) -> None:
        await asyncio.to_thread(self._up.kill, _NAME)
        self.tally.phases.update(one.phase for one in await replicas.load_live(self._db))
        self._killed.set()

    async def _come_back(self) -> None:
        self._relay.forget()
        await asyncio.to_thread(self._up.restart, _NAME)

    async def _is_up(self, turn: str) -> bool:
        live = [one for one in await replicas.load_live(self._db) if one.exists]
        if turn == "all intended":
            return len(live) == 3
        if turn == "all routable":
            return len(await endpoints.load_routable(self._db)) == 3 and await self._jobs_are(live)
        phases = (Phase.RUNNING,) if turn == "all running" else (Phase.QUEUED, Phase.RUNNING)
        return sum(one.phase in phases for one in live) == 3 and await self._jobs_are(live)

    async def _jobs_are(self, intended: list[Replica]) -> bool:
        """Is every intended replica one live job, and every live job an intended replica?"""
        jobs = living(await jobs_of(self._up.slurm, self._db))
        return sorted((job.name, job.job_id) for job in jobs) == sorted(
            (one.name, one.slurm_job_id or 0) for one in intended
        )

    async def _is_quiet(self) -> bool:
        return not await replicas.load_live(self._db) and not living(await jobs_of(self._up.slurm, self._db))

    async def _judge(self, last_id: int) -> None:
        """What the round has made, by what both sides remember of it."""
        made = {one.name: one for one in await replicas.load_newest(self._db) if one.id > last_id}
        jobs = [job for job in await jobs_of(self._up.slurm, self._db) if int(job.name.split("-")[-1]) > last_id]
        orphans = [job for job in jobs if job.name not in made]
        assert not orphans, f"no replica stands for {orphans}"
        late = twins(jobs)
        for job in jobs:
            assert job in late or job.job_id == made[job.name].slurm_job_id, f"{job} is not its replica's"
        recorded = {one.slurm_job_id for one in made.values()} - {None}
        assert recorded == {job.job_id for job in jobs if job not in late}, f"{recorded} were recorded, not {jobs}"
        self.tally.intended += len(made)
        self.tally.jobs += len(jobs)
        self.tally.twins += len(late)
        for name in made:
            steps = await replicas.load_history(self._db, name=name)
            self.tally.adopted += any(step.message == "found by name and adopted" for step in steps)


async def kill(directory: Path, slurm: SlurmCluster, database_url: str, *, rounds: int, seed: int) -> Tally:
    """So many rounds. AssertionError or StartFailed: what must hold did not; the message names the round."""
    token = directory / "token"
    lasting = MintedToken(slurm.jwt_key_file, slurm.user_name, timedelta(days=1))
    token.write_text(await lasting.read(utc_now()))
    async with Relay(slurm.url) as relay, Database(DatabaseOptions(database_url)) as db:
        settings = {
            "CONTROLPLANE_SLURM__URL": relay.url,
            "CONTROLPLANE_SLURM__JWT_KEY_FILE": "",
            "CONTROLPLANE_SLURM__TOKEN_FILE": str(token),
            "CONTROLPLANE_SLURM__SUBMIT_GRACE_SECONDS": "3",
            "CONTROLPLANE_RECONCILE__LEASE_SECONDS": "1",
        }
        up = Plant(directory / "plant", slurm, database_url, settings)
        await asyncio.to_thread(up.start)
        try:
            await replica_sets.apply(db, SPEC, actor="test", now=utc_now())
            await asyncio.to_thread(up.serve, _NAME, "control")
            killing = Killing(up, relay, db, random.Random(seed))
            for number in range(1, rounds + 1):
                started = time.monotonic()
                try:
                    said = await killing.round()
                except (AssertionError, StartFailed, TimeoutError) as error:
                    raise AssertionError(f"round {number} of seed {seed}: {error}") from error
                print(f"round {number}: {said} ({time.monotonic() - started:.1f} s)", flush=True)
            killing.tally.orphans = up.children.log_file(_NAME).read_text().count("is an orphan")
            return killing.tally
        finally:
            await asyncio.to_thread(up.stop)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.kill_rounds", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1_000_000))
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    started = time.monotonic()
    directory = Path(tempfile.mkdtemp(prefix="cp-kill-"))
    directory.chmod(0o755)  # others run Slurm and PostgreSQL
    try:
        with (
            PrivatePostgres(directory / "postgres") as postgres,
            SlurmCluster(directory / "slurm", extra_conf=SLURM_CONF, root=release_under_test()) as slurm,
        ):
            url = postgres.create_database("rounds")
            tally = asyncio.run(kill(directory, slurm, url, rounds=given.rounds, seed=given.seed))
    except AssertionError as error:
        print(f"FAILED: {error}")
        return 1
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    print(f"jobs == intents after every round, in {time.monotonic() - started:.0f} s (seed {given.seed})")
    print(tally.summary())
    return 0


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none"


if __name__ == "__main__":
    sys.exit(main())
