"""Real servers that die or freeze at the moments that hurt. Whatever happens: a replica is one job, and runs once."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import httpx
import pytest

from controlplane.clock import utc_now
from controlplane.core.types import JobState, Phase, Reason
from controlplane.db import Database, DatabaseOptions, endpoints, leases, replica_sets, replicas
from controlplane.demo.slurm_cluster import SlurmCluster
from controlplane.slurm.tokens import MintedToken
from tests.conftest import eventually
from tests.e2e import plant
from tests.e2e.plant import SHORT_WAITS, Plant, jobs_of, living, twins
from tests.e2e.reconciling import reconciling
from tests.e2e.relay import Relay
from tests.e2e.slurm_matrix import release_under_test

SUBMIT = b"/job/submit"
LIST = b"/jobs HTTP"
HOLDS = "controlplane_lease_held"


@pytest.fixture(scope="module")
def slurm(session_directory: Path) -> Iterator[SlurmCluster]:
    """A cluster that may be broken."""
    directory = session_directory / "ill-slurm"
    with SlurmCluster(directory, extra_conf=SHORT_WAITS, root=release_under_test()) as cluster:
        yield cluster


@pytest.fixture
def impatient_slurm(session_directory: Path) -> Iterator[SlurmCluster]:
    """One that soon declares a silent node down, also for no other fault than a slurmctld that stood still."""
    directory = session_directory / "impatient-slurm"
    conf = (*SHORT_WAITS, "SlurmdTimeout=5")
    with SlurmCluster(directory, nodes=2, extra_conf=conf, root=release_under_test()) as cluster:
        yield cluster


async def submits_of(db: Database) -> dict[str, int]:
    """How often the intent to submit was written down, by replica."""
    found: dict[str, int] = {}
    for step in await replicas.load_history(db):
        if step.to_phase is Phase.SUBMITTING:
            found[step.replica] = found.get(step.replica, 0) + 1
    return found


async def messages_of(db: Database) -> list[str]:
    return [step.message or "" for step in await replicas.load_history(db)]


# --- slurmctld and slurmrestd ----------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["slurmrestd gives up", "slurmrestd is killed"])
async def test_a_submit_into_a_frozen_controller_is_adopted_when_that_wakes(
    slurm: SlurmCluster, database_url: str, end: str
) -> None:
    async def freeze() -> None:
        slurm.kill("slurmctld", signal.SIGSTOP)

    async with Relay(slurm.url) as relay, reconciling(slurm, database_url, url=relay.url) as site:
        relay.before(SUBMIT, freeze)
        await site.scale(1)
        try:

            async def is_under_way() -> bool:
                return [replica.phase for replica in await site.live()] == [Phase.SUBMITTING]

            await eventually(is_under_way)
            if end == "slurmrestd is killed":
                await until_slurmrestd_waits(slurm)
                slurm.kill("slurmrestd")
            await eventually(lambda: ("submit", "ambiguous") in site.calls, timeout_seconds=40)
            assert await is_under_way(), "what is not known moves nothing"
        finally:
            slurm.kill("slurmctld", signal.SIGCONT)
            if end == "slurmrestd is killed":
                await asyncio.to_thread(slurm.restart, "slurmrestd")
        await site.until_routable(1, timeout_seconds=60)
        assert "found by name and adopted" in await messages_of(site.db)
        assert list((await submits_of(site.db)).values()) == [1]
        [job] = await jobs_of(slurm, site.db)
        [replica] = await site.live()
        assert job.job_id == replica.slurm_job_id


async def test_a_submit_in_a_frozen_slurmrestd_is_adopted_by_the_control_plane_after_the_one_that_was_killed(
    directory: Path, slurm: SlurmCluster, database_url: str
) -> None:
    up = Plant(directory / "plant", slurm, database_url)
    await asyncio.to_thread(up.start)
    try:
        async with Relay(slurm.url) as relay, Database(DatabaseOptions(database_url)) as db:

            async def freeze() -> None:
                slurm.kill("slurmrestd", signal.SIGSTOP)

            async def is_under_way() -> bool:
                return [one.phase for one in await replicas.load_live(db)] == [Phase.SUBMITTING]

            async def is_up() -> bool:
                return len(await endpoints.load_routable(db)) == 1

            await replica_sets.apply(db, plant.SPEC, actor="test", now=utc_now())
            await asyncio.to_thread(up.serve, "control", "control", {"CONTROLPLANE_SLURM__URL": relay.url})
            relay.before(SUBMIT, freeze)
            try:
                await replica_sets.scale(db, plant.SPEC.name, replicas=1, actor="test", now=utc_now())
                await eventually(lambda: relay.is_done, timeout_seconds=30)
                assert await is_under_way()
                await asyncio.to_thread(up.kill, "control")
                await asyncio.to_thread(up.restart, "control")
                assert await is_under_way()
            finally:
                slurm.kill("slurmrestd", signal.SIGCONT)
            await eventually(is_up, timeout_seconds=60)
            assert "found by name and adopted" in await messages_of(db)
            assert list((await submits_of(db)).values()) == [1]
            assert len(await jobs_of(slurm, db)) == 1
    finally:
        await asyncio.to_thread(up.stop)


async def until_slurmrestd_waits(slurm: SlurmCluster) -> None:
    """Until it has sent the submit on: a connection to the frozen slurmctld holds bytes that nobody reads."""
    port = slurm.port("slurmctld")

    def is_sent() -> bool:
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        waiting = [row for row in rows if row[1].endswith(f":{port:04X}") and not row[4].endswith(":00000000")]
        return len(waiting) > 0

    await eventually(is_sent)


async def test_a_job_that_the_controller_lost_with_its_id_is_replaced_and_the_next_owner_of_the_id_is_left_alone(
    slurm: SlurmCluster, database_url: str
) -> None:
    async def lose() -> None:
        slurm.kill("slurmctld")
        slurm.kill("slurmrestd")  # so that the id is somebody else's before we can ask for a new one

    async with Relay(slurm.url) as relay, reconciling(slurm, database_url, url=relay.url) as site:
        await until_no_save_is_due(slurm)
        relay.after(SUBMIT, lose)
        await site.scale(1)

        async def is_given() -> int | None:
            given = await site.live()
            return given[0].slurm_job_id if given else None

        lost = await eventually(is_given)
        [first] = await site.live()
        await asyncio.to_thread(slurm.restart, "slurmctld")
        others = int(await eventually(lambda: anothers_job(slurm), timeout_seconds=60))
        try:
            assert others == lost, "the controller gave the lost id again"
            await asyncio.to_thread(slurm.restart, "slurmrestd")
            assert (await site.until_ended(first.name)).reason is Reason.LOST
            await site.until_routable(1, timeout_seconds=60)
            await site.scale(0)
            await site.until_routable(0)
            await eventually(lambda: not site.jobs(), timeout_seconds=30)
            assert f"{lost} PENDING others" in slurm.run("squeue", "--noheader", "--format=%i %T %j").splitlines()
        finally:
            slurm.run("scancel", "--name=others")
        assert set((await submits_of(site.db)).values()) == {1}


async def until_no_save_is_due(slurm: SlurmCluster) -> None:
    """slurmctld writes its jobs down at once if it did not for some seconds, and then not again for some."""
    state = slurm.directory / "state" / "job_state"
    before = state.stat().st_mtime_ns if state.exists() else 0
    anothers_job(slurm)
    await eventually(lambda: state.exists() and state.stat().st_mtime_ns != before, timeout_seconds=20)


def anothers_job(slurm: SlurmCluster) -> int:
    """A job of another user, which waits for ever."""
    command = ("--hold", "--job-name=others", "--uid=backup", "--chdir=/", "--output=/dev/null", "--wrap=true")
    return int(slurm.run("sbatch", "--parsable", *command))


# --- slurmd ----------------------------------------------------------------------------------------------


async def test_a_replica_on_a_node_that_falls_silent_is_replaced_and_its_process_is_never_taken_for_another(
    impatient_slurm: SlurmCluster, database_url: str
) -> None:
    slurm = impatient_slurm
    async with reconciling(slurm, database_url) as site:
        await site.scale(1)
        await site.until_routable(1)
        [first] = await site.live()
        [endpoint] = await endpoints.load_routable(site.db)
        [job] = await jobs_of(slurm, site.db)
        daemon = f"slurmd-{job.nodes}"
        slurm.kill(daemon)
        try:
            ended = await site.until_ended(first.name, timeout_seconds=90)
            assert ended.reason is Reason.NODE_FAIL
            await site.until_routable(1, timeout_seconds=60)
            [second] = await site.live()
            assert second.name != first.name
            headers = {"Authorization": f"Bearer {endpoint.api_key}"}
            async with httpx.AsyncClient() as http:
                answer = await http.get(f"{endpoint.url}/v1/models", headers=headers)
            assert answer.is_success, "NODE_FAIL is no proof of death: it answers still"
            assert endpoint.url not in {one.url for one in await endpoints.load_routable(site.db)}
        finally:
            await asyncio.to_thread(slurm.restart, daemon)
        await eventually(slurm.is_ready, timeout_seconds=60)
        await eventually(lambda: is_refused(endpoint.url), timeout_seconds=60)
        assert await site.live() == (await replicas.load(site.db, second.name),)
        assert twins(await jobs_of(slurm, site.db)) == []


async def is_refused(url: str) -> bool:
    async with httpx.AsyncClient() as http:
        try:
            await http.get(f"{url}/health")
        except httpx.ConnectError:
            return True
        except httpx.HTTPError:
            return False  # it is about to go
    return False


# --- two control planes ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Two:
    """`first` holds the lease and reaches Slurm through the relay; `second` waits for the lease.

    Their tokens are of others and outlive everything: only the holds, the names, the guards and the clock are left.
    While the gate is there, `first` waits for its next token.
    """

    up: Plant
    relay: Relay
    db: Database
    gate: Path
    first_term: int

    async def scale(self, count: int) -> None:
        await replica_sets.scale(self.db, plant.SPEC.name, replicas=count, actor="test", now=utc_now())

    async def until_taken_over(self) -> None:
        await eventually(lambda: self.up.metric("second", HOLDS) == 1, timeout_seconds=30)
        [lease] = await leases.load_held(self.db)
        assert lease.term == self.first_term + 1

    async def wake_up(self) -> None:
        self.up.wake("first")
        await eventually(lambda: self.up.said("first", "lease lost to another control plane"), timeout_seconds=30)

    async def intended(self) -> dict[str, int | None]:
        return {one.name: one.slurm_job_id for one in await replicas.load_live(self.db)}

    async def live_jobs(self) -> dict[str, int]:
        return {job.name: job.job_id for job in living(await jobs_of(self.up.slurm, self.db))}


@pytest.fixture
def directory(session_directory: Path) -> Path:
    path = session_directory / "two"
    path.mkdir(exist_ok=True)
    return path


@asynccontextmanager
async def two_control_planes(directory: Path, slurm: SlurmCluster, database_url: str) -> AsyncIterator[Two]:
    token, gate, command = (directory / name for name in ("token", "gate", "command"))
    lasting = MintedToken(slurm.jwt_key_file, slurm.user_name, timedelta(hours=1))
    token.write_text(await lasting.read(utc_now()))
    command.write_text(f"#!/bin/sh\nwhile [ -e {gate} ]; do sleep 0.05; done\ncat {token}\n")
    command.chmod(0o755)
    settings = {
        "CONTROLPLANE_SLURM__JWT_KEY_FILE": "",
        "CONTROLPLANE_SLURM__TOKEN_COMMAND": str(command),
        "CONTROLPLANE_SLURM__SUBMIT_GRACE_SECONDS": "3",
        "CONTROLPLANE_RECONCILE__LEASE_SECONDS": "4",  # so that a slow machine does not lose it by itself
    }
    others = {"CONTROLPLANE_SLURM__TOKEN_COMMAND": "", "CONTROLPLANE_SLURM__TOKEN_FILE": str(token)}
    up = Plant(directory / "plant", slurm, database_url, settings)
    await asyncio.to_thread(up.start)
    try:
        async with Relay(slurm.url) as relay, Database(DatabaseOptions(database_url)) as db:
            await replica_sets.apply(db, plant.SPEC, actor="test", now=utc_now())
            await asyncio.to_thread(up.serve, "first", "control", {"CONTROLPLANE_SLURM__URL": relay.url})
            await eventually(lambda: up.metric("first", HOLDS) == 1)
            [lease] = await leases.load_held(db)
            await asyncio.to_thread(up.serve, "second", "control", others)
            assert up.metric("second", HOLDS) == 0
            yield Two(up, relay, db, gate, lease.term)
    finally:
        gate.unlink(missing_ok=True)
        await asyncio.to_thread(up.stop)


async def test_a_holder_that_is_frozen_before_its_submit_and_wakes_up_late_submits_nothing(
    directory: Path, slurm: SlurmCluster, database_url: str
) -> None:
    """The worst moment: the intent is written down, and the request has not left."""
    async with two_control_planes(directory, slurm, database_url) as two:

        async def close_gate() -> None:
            two.gate.touch()

        async def phases() -> list[Phase]:
            return [one.phase for one in await replicas.load_live(two.db)]

        async def is_pending() -> bool:
            return await phases() == [Phase.PENDING]

        async def is_submitting() -> bool:
            return await phases() == [Phase.SUBMITTING]

        async def is_up() -> bool:
            return len(await endpoints.load_routable(two.db)) == 1

        slurm.kill("slurmrestd")  # nothing is submitted while no list can be had: so the next list is the last call
        try:
            await two.scale(1)
            await eventually(is_pending, timeout_seconds=30)
            two.relay.after(LIST, close_gate)
        finally:
            await asyncio.to_thread(slurm.restart, "slurmrestd")
        await eventually(is_submitting, timeout_seconds=30)
        two.up.freeze("first")
        await two.until_taken_over()
        await eventually(is_up, timeout_seconds=60)
        settled = await two.intended()
        assert list((await submits_of(two.db)).values()) == [2], "the second one had to ask again"
        two.gate.unlink()
        await two.wake_up()
        await eventually(lambda: two.up.said("first", "submit of "), timeout_seconds=30)
        assert twins(await jobs_of(slurm, two.db)) == []
        assert await two.live_jobs() == await two.intended() == settled


async def test_submits_of_a_frozen_holder_that_arrive_late_make_held_twins_which_never_run(
    directory: Path, slurm: SlurmCluster, database_url: str
) -> None:
    """Its requests are on their way when it freezes, and arrive after the other one has given them up."""
    arrive = asyncio.Event()
    async with two_control_planes(directory, slurm, database_url) as two:

        async def freeze() -> None:
            two.up.freeze("first")
            await arrive.wait()

        async def are_up() -> bool:
            return len(await endpoints.load_routable(two.db)) == 3

        async def is_quiet() -> bool:
            return len(twins(await jobs_of(slurm, two.db))) > 0 and await two.live_jobs() == settled

        two.relay.before(SUBMIT, freeze)
        try:
            await two.scale(3)
            await two.until_taken_over()
            await eventually(are_up, timeout_seconds=60)
            settled = await two.intended()
        finally:
            arrive.set()
        await two.wake_up()
        await eventually(is_quiet, timeout_seconds=60)
        assert await two.intended() == settled
        assert all(job.state is JobState.CANCELLED for job in twins(await jobs_of(slurm, two.db)))
