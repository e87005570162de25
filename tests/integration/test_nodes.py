"""Nodes, back-offs and logs in a real PostgreSQL, through the operators' API and the command line."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from random import Random
from typing import cast

import pytest
from prometheus_client import CollectorRegistry
from typer.testing import CliRunner

from controlplane.cli import cli
from controlplane.core.back_off import BackOff
from controlplane.core.nodes import NodeCause, NodeMark, NodeRules, SlurmNode, due_marks
from controlplane.core.reservations import Calendar
from controlplane.core.types import (
    Alert,
    AlertAction,
    JobList,
    JobState,
    Move,
    PastReplica,
    Phase,
    Reason,
    Replica,
    SlurmJob,
    VllmOptions,
)
from controlplane.db import (
    Database,
    Duplicate,
    Stale,
    alerts,
    back_offs,
    decisions,
    endpoints,
    job_logs,
    nodes,
    replica_sets,
    replicas,
    slurm_jobs,
)
from controlplane.metrics import ControlPlaneMetrics
from controlplane.reconcile.actions import ActionOptions, Actor
from controlplane.reconcile.job_logs import JobLogLoop, JobLogOptions, log_path
from controlplane.reconcile.replicas import ReplicaLoop, ReplicaOptions
from controlplane.slurm.client import SlurmClient
from controlplane.slurm.errors import SlurmUnreachable
from controlplane.slurm.script import ScriptOptions
from tests.conftest import eventually
from tests.integration.db_rows import NOW, make_ready, make_replica, make_set, opened, slurm_spec, to
from tests.integration.web_rig import WebRig

LATER = NOW + timedelta(minutes=1)


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    async with opened(database_url) as db:
        yield db


@pytest.fixture
def rig(db: Database) -> WebRig:
    return WebRig(db)


def drain_alert(node: str = "n1") -> Alert:
    return Alert("grafana", 1, "f", "Xid", True, NOW, None, NOW, {"node": node}, action=AlertAction.DRAIN_NODE)


def due(*alerts: Alert, now: datetime = NOW) -> Callable[[tuple[NodeMark, ...]], nodes.Due]:
    return lambda known: due_marks(known, alerts, (), now=now, rules=NodeRules())


async def ended(db: Database, replica: Replica, reason: Reason, now: datetime = NOW) -> Replica:
    return await replicas.move(db, Move(replica, Phase.ENDED, reason=reason, message="it said why"), actor="t", now=now)


def a_job(replica: Replica, state: JobState, node: str) -> SlurmJob:
    return SlurmJob(replica.slurm_job_id or 0, replica.name, "us", state, nodes=node)


# --- marks -----------------------------------------------------------------------------------------------------


async def test_an_operators_drain_is_kept_with_its_actor_and_may_be_said_again(rig: WebRig) -> None:
    until = "2026-01-01T14:00:00Z"
    body = {"reason": "fan", "until": until}
    dry = (await rig.ask("POST", "/api/v1/nodes/n1/drain?dry_run=true", body)).json()
    assert (dry["changed"], dry["dry_run"], dry["marks"][0]["node"]) == (True, True, "n1")
    assert (await rig.ask("GET", "/api/v1/nodes")).json() == {"nodes": []}
    first = (await rig.ask("POST", "/api/v1/nodes/n1/drain", body)).json()
    again = (await rig.ask("POST", "/api/v1/nodes/n1/drain", body)).json()
    assert (first["changed"], again["changed"]) == (True, False)
    assert again["marks"] == first["marks"] == dry["marks"]
    rig.now = LATER
    changed = (await rig.ask("POST", "/api/v1/nodes/n1/drain", {"reason": "two fans"})).json()
    assert changed["changed"]
    [shown] = (await rig.ask("GET", "/api/v1/nodes")).json()["nodes"]
    assert (shown["cause"], shown["reason"], shown["actor"], shown["until"]) == ("operator", "two fans", "ann", None)
    assert shown["since"] == NOW.isoformat()
    assert (shown["is_kept_out"], shown["is_drained"]) == (True, True)
    gone = (await rig.ask("POST", "/api/v1/nodes/n1/undrain")).json()
    assert (gone["changed"], gone["marks"]) == (True, [])
    assert not (await rig.ask("POST", "/api/v1/nodes/n1/undrain")).json()["changed"]
    history = [(row["event"], row["reason"], row["actor"]) for row in await nodes.load_history(rig.db, "n1")]
    assert history == [("cleared", "two fans", "ann"), ("changed", "two fans", "ann"), ("kept_out", "fan", "ann")]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("nodes/n[1-4]/drain", {}, "node"),
        ("nodes/n1,n2/undrain", {}, "node"),
        ("nodes/n1/drain", {"until": "2025-12-31T00:00:00Z"}, "until"),
        ("nodes/n1/drain", {"because": "x"}, "because"),
        ("nodes/n1/drain?force=true", {}, "force"),
    ],
)
async def test_a_wrong_word_about_a_node_names_what_is_wrong(
    rig: WebRig, path: str, body: dict[str, str], field: str
) -> None:
    answer = await rig.ask("POST", f"/api/v1/{path}", body)
    assert answer.status_code == 400
    assert field in answer.text
    assert await nodes.load(rig.db) == ()


async def test_marks_follow_what_is_due_and_an_operators_clearance_is_not_undone(db: Database) -> None:
    assert await nodes.follow(db, due(drain_alert()), actor="r", now=NOW) == ["node n1 is kept out: Xid is firing"]
    assert await nodes.follow(db, due(drain_alert(), now=LATER), actor="r", now=LATER) == []
    await nodes.undrain(db, "n1", actor="ann", now=LATER)
    assert await nodes.follow(db, due(drain_alert(), now=LATER), actor="r", now=LATER) == []
    [mark] = await nodes.load(db)
    assert (mark.is_active, mark.cleared_by) == (False, "ann")
    assert await nodes.follow(db, due(), actor="r", now=LATER) == [], "nobody needs to hear of it again"
    assert await nodes.follow(db, due(drain_alert()), actor="r", now=LATER) == [], "it had only not been heard of"
    assert await nodes.load(db) == (mark,)
    newer = replace(drain_alert(), starts_at=LATER + timedelta(seconds=1))
    await nodes.follow(db, due(newer), actor="r", now=LATER)
    assert await nodes.follow(db, due(), actor="r", now=LATER) == ["node n1 is let in again: Xid is firing"]
    events = [row["event"] for row in await nodes.load_history(db, "n1")]
    assert events == ["ended", "kept_out", "cleared", "kept_out"]
    assert await nodes.forget_history(db, older_than=timedelta(0), now=LATER + timedelta(1)) == 4


async def test_two_control_planes_that_follow_at_once_make_one_mark(db: Database) -> None:
    said = await asyncio.gather(*(nodes.follow(db, due(drain_alert()), actor="r", now=NOW) for _ in range(4)))
    assert sorted(map(len, said)) == [0, 0, 0, 1]
    assert len(await nodes.load_history(db, "n1")) == 1


async def test_what_jobs_did_on_their_nodes_is_read_back(db: Database) -> None:
    a = await make_set(db)
    serving, failed = [await make_replica(db, a, Phase.RUNNING) for _ in range(2)]
    await endpoints.ensure(db, serving, "http://n2:1")
    await slurm_jobs.record(
        db,
        [(serving.id, a_job(serving, JobState.RUNNING, "n2")), (failed.id, a_job(failed, JobState.NODE_FAIL, "n1"))],
        NOW,
    )
    await ended(db, failed, Reason.NODE_FAIL)
    runs = {run.replica: run for run in await nodes.load_runs(db, NOW - timedelta(hours=1))}
    assert (runs[serving.name].node, runs[serving.name].failed_there, runs[serving.name].ended_at) == (
        "n2",
        False,
        None,
    )
    lost = runs[failed.name]
    assert (lost.node, lost.failed_there, lost.reason, lost.ended_at) == ("n1", True, Reason.NODE_FAIL, NOW)
    assert failed.name not in {run.replica for run in await nodes.load_runs(db, NOW)}
    await slurm_jobs.record(db, [(serving.id, a_job(serving, JobState.RUNNING, "n[2-3],m1"))], LATER)
    of_several = [run for run in await nodes.load_runs(db, NOW) if run.replica == serving.name]
    assert [run.node for run in of_several] == ["m1", "n2", "n3"]
    [target] = await endpoints.load_targets(db)
    assert target.node == "n2", "the first one serves"


def test_nodes_on_the_command_line(database_url: str) -> None:
    def run(*words: str) -> str:
        done = CliRunner().invoke(cli, words, env={"DATABASE_URL": database_url, "PATH": os.environ["PATH"]})
        assert done.exit_code == 0, done.output
        return done.output.strip()

    assert run("get", "nodes") == "No node is kept out of new jobs."
    assert "dry run" in run("nodes", "drain", "n1", "--reason", "fan", "--dry-run")
    assert run("nodes", "drain", "n1", "--reason", "fan") == "n1 is kept out of new jobs: fan"
    assert run("nodes", "drain", "n1", "--reason", "fan").endswith(", as before")
    table = run("get", "nodes")
    assert "n1" in table
    assert "drained" in table
    assert "fan" in table
    assert "cli:" in table
    assert "UTC" in run("nodes", "drain", "n1", "--reason", "fan", "--until", "2h")
    assert run("nodes", "undrain", "n1") == "n1 is used again"
    assert run("nodes", "undrain", "n1") == "n1 is used again, as before"
    refused = CliRunner().invoke(cli, ["nodes", "drain", "n[1-4]"], env={"DATABASE_URL": database_url})
    assert refused.exit_code == 1
    assert "node: must be one node's name" in refused.output


# --- replicas --------------------------------------------------------------------------------------------------


async def test_the_port_of_a_replica_that_may_live_on_rests(db: Database) -> None:
    a = await make_set(db)
    lost, stopped = [await make_replica(db, a, Phase.RUNNING) for _ in range(2)]
    await slurm_jobs.record(db, [(stopped.id, a_job(stopped, JobState.RUNNING, "n1"))], NOW)
    await ended(db, lost, Reason.LOST)
    await ended(db, stopped, Reason.CRASHED)

    async def given(port: int, now: datetime) -> Replica:
        return await replicas.create(db, a, port=port, secret="x" * 32, actor="t", now=now)

    with pytest.raises(Duplicate):
        await given(lost.port, LATER)
    assert (await given(stopped.port, LATER)).port == stopped.port
    assert (await given(lost.port, NOW + replicas.PORT_REST)).port == lost.port


async def test_the_port_rests_also_if_the_node_failed_while_the_replica_left_for_another_reason(db: Database) -> None:
    a = await make_set(db)
    leaving = await make_replica(db, a, Phase.DRAINING)
    await slurm_jobs.record(db, [(leaving.id, a_job(leaving, JobState.NODE_FAIL, "n1"))], NOW)
    gone = await replicas.move(db, Move(leaving, Phase.ENDED), actor="t", now=NOW)
    assert gone.reason is Reason.SCALED_DOWN
    with pytest.raises(Duplicate):
        await replicas.create(db, a, port=leaving.port, secret="x" * 32, actor="t", now=LATER)


@pytest.mark.parametrize("where", ["n1", "n[1-2]", "n1,m1"])
async def test_a_successor_is_made_beside_the_one_that_it_succeeds_and_no_more(db: Database, where: str) -> None:
    a = await make_set(db, max_replicas=1, surge=1)
    first = await make_replica(db, a, Phase.RUNNING)

    async def create(port: int, *beside: str) -> Replica:
        return await replicas.create(db, a, port=port, secret="x" * 32, actor="t", now=NOW, beside=beside)

    await slurm_jobs.record(db, [(first.id, a_job(first, JobState.RUNNING, where))], NOW)
    with pytest.raises(Stale):
        await create(31000, first.name)  # its node is drained no more
    await nodes.drain(db, "n1", actor="ann", now=NOW)
    with pytest.raises(Stale):
        await create(31000)
    second = await create(31000, first.name)
    with pytest.raises(Stale):
        await create(31001, first.name)
    with pytest.raises(Stale):
        await create(31001, first.name, second.name)  # no more than max and surge live, whatever is said


class HalfBlindSlurm:
    """Answers with its jobs and nodes, or not."""

    submit_grace = timedelta(seconds=120)

    def __init__(self, *jobs: SlurmJob) -> None:
        self._jobs = jobs
        self.answers_jobs = self.answers_nodes = True

    async def list_jobs(self, now: datetime) -> JobList:
        if not self.answers_jobs:
            raise SlurmUnreachable("refused")
        return JobList(self._jobs, now)

    async def list_nodes(self) -> tuple[SlurmNode, ...]:
        if not self.answers_nodes:
            raise SlurmUnreachable("refused")
        return tuple(SlurmNode(f"n{number}", frozenset({"p"}), frozenset(), True) for number in range(1, 5))

    async def calendar(self) -> Calendar:
        return Calendar()


@pytest.mark.parametrize("cause", [NodeCause.OPERATOR, NodeCause.ALERT])
@pytest.mark.parametrize("is_restarted", [False, True])
@pytest.mark.parametrize(("answers_jobs", "answers_nodes"), [(False, True), (True, False), (False, False)])
async def test_an_unanswered_call_lets_no_successor_go(
    db: Database, cause: NodeCause, is_restarted: bool, answers_jobs: bool, answers_nodes: bool
) -> None:
    a = await make_set(db, max_replicas=1, surge=1)
    old = await make_replica(db, a, Phase.RUNNING)
    await make_ready(db, old, "http://n1:1", ends_at=NOW + timedelta(days=1))
    if cause is NodeCause.OPERATOR:
        await nodes.drain(db, "n1", actor="ann", now=NOW)
    else:
        await alerts.refresh(db, "grafana", 1, [drain_alert()], now=NOW)
        await nodes.follow(db, due(drain_alert()), actor="r", now=NOW)
    runs = replace(a_job(old, JobState.RUNNING, "n1"), ends_at=NOW + timedelta(days=1), started_at=NOW)
    await slurm_jobs.record(db, [(old.id, runs)], NOW)
    fresh = await replicas.create(db, a, port=31000, secret="x" * 32, actor="t", now=NOW, beside=[old.name])
    for phase in (Phase.SUBMITTING, Phase.QUEUED):
        fresh = await replicas.move(db, to(fresh, phase), actor="t", now=NOW)
    waits = replace(a_job(fresh, JobState.PENDING, ""), is_held=False, excluded_nodes="n1")
    slurm = HalfBlindSlurm(runs, waits)

    def made() -> ReplicaLoop:
        client = cast("SlurmClient", slurm)
        actor = Actor(db, client, ActionOptions(Path("/"), ScriptOptions(), "us"), lambda: NOW, Random(1))
        metrics = ControlPlaneMetrics(CollectorRegistry())
        return ReplicaLoop(db, client, actor, ReplicaOptions("us"), metrics, lambda: NOW)

    async def phases() -> dict[str, Phase]:
        return {one.name: one.phase for one in await replicas.load_live(db)}

    both = {old.name: Phase.RUNNING, fresh.name: Phase.QUEUED}
    loop = made()
    await loop.run_once(NOW)
    assert await phases() == both
    slurm.answers_jobs, slurm.answers_nodes = answers_jobs, answers_nodes
    loop = made() if is_restarted else loop
    await loop.run_once(NOW + timedelta(seconds=40))
    assert await phases() == both
    slurm.answers_jobs = slurm.answers_nodes = True
    await loop.run_once(NOW + timedelta(seconds=80))
    assert await phases() == both


# --- back-offs -------------------------------------------------------------------------------------------------


def a_pause(replica: Replica, failures: int = 2) -> BackOff:
    past = PastReplica(replica.name, "a", "h", Reason.CRASHED, "it said why", NOW, was_ready=False)
    return BackOff(failures, LATER, past)


async def test_a_back_off_is_shown_with_the_end_of_the_log_until_it_is_over(rig: WebRig) -> None:
    a = await make_set(rig.db)
    failed = await ended(rig.db, await make_replica(rig.db, a, Phase.RUNNING), Reason.CRASHED)
    await back_offs.record(rig.db, {"a": a_pause(failed)}, now=NOW)
    await back_offs.record(rig.db, {"a": a_pause(failed, 3), "gone": a_pause(failed)}, now=LATER)
    await job_logs.save(rig.db, failed.id, job_logs.JobLog(NOW, "it fell", None))
    [shown] = (await rig.ask("GET", "/api/v1/replica-sets")).json()["replica_sets"]
    assert shown["back_off"] == {
        "failures": 3,
        "since": NOW.isoformat(),
        "next_try_at": LATER.isoformat(),
        "replica": failed.name,
        "reason": "CRASHED",
        "message": "it said why",
        "log_tail": "it fell",
    }
    [replica] = (await rig.ask("GET", "/api/v1/replicas")).json()["replicas"]
    assert replica["log"] == {"read_at": NOW.isoformat(), "tail": "it fell", "problem": None}
    await nodes.drain(rig.db, "n1", actor="ann", now=NOW)
    metrics = (await rig.ask("GET", "/metrics", headers={})).text
    assert 'controlplane_back_off{replica_set="a"} 3.0' in metrics
    assert 'controlplane_nodes_excluded{cause="operator"} 1.0' in metrics
    assert 'controlplane_nodes_excluded{cause="alert"} 0.0' in metrics
    await back_offs.record(rig.db, {"b": None}, now=LATER)
    assert len(await back_offs.load(rig.db)) == 1, "of a set that is not named nothing was found"
    await back_offs.record(rig.db, {"a": None}, now=LATER)
    assert (await rig.ask("GET", "/api/v1/replica-sets")).json()["replica_sets"][0]["back_off"] is None


async def test_an_operators_word_forgives_what_failed_and_is_recorded(db: Database) -> None:
    a = await make_set(db)
    failed = await ended(db, await make_replica(db, a, Phase.RUNNING), Reason.CRASHED)

    async def newest() -> str:
        return (await decisions.load_latest(db))["a"].explanation

    async def back_off() -> None:
        await back_offs.record(db, {"a": a_pause(failed)}, now=NOW)

    await back_off()
    before = await newest()
    await replica_sets.resume(db, "a", actor="ann", now=LATER, dry_run=True)
    assert (await back_offs.load_forgiven(db))["a"] < LATER
    assert await newest() == before
    await replica_sets.resume(db, "a", actor="ann", now=LATER)
    assert (await back_offs.load_forgiven(db))["a"] == LATER
    assert await newest() == "resumed by ann"

    await back_off()
    even_later = LATER + timedelta(minutes=1)
    wanted = (await replica_sets.load(db, "a")).desired_replicas
    await replica_sets.scale(db, "a", replicas=wanted, actor="ann", now=even_later)
    assert (await back_offs.load_forgiven(db))["a"] == even_later
    assert (await newest()).startswith("scaled by ann")

    await replica_sets.pause(db, "a", actor="ann", now=even_later + timedelta(minutes=1))
    assert (await back_offs.load_forgiven(db))["a"] == even_later, "a pause forgives nothing"


# --- logs ------------------------------------------------------------------------------------------------------


async def crashed(db: Database, environment: Mapping[str, str] | None = None) -> Replica:
    spec = slurm_spec("a", vllm=VllmOptions(environment=environment or {}))
    await replica_sets.apply(db, spec, actor="test", now=NOW)
    made = await make_replica(db, await replica_sets.load(db, "a"), Phase.RUNNING)
    return await ended(db, made, Reason.CRASHED)


def a_loop(db: Database, directory: Path, timeout_seconds: float = 5) -> JobLogLoop:
    return JobLogLoop(db, JobLogOptions(directory, timeout_seconds=timeout_seconds))


def the_log(directory: Path, replica: Replica, text: str | None = None) -> Path:
    path = Path(log_path(directory, replica.name, replica.slurm_job_id or 0))
    if text is not None:
        path.write_text(text)
    return path


async def log_of(db: Database, replica: Replica) -> job_logs.JobLog | None:
    return (await job_logs.load(db, [replica.name])).get(replica.name)


async def test_the_end_of_a_crashed_jobs_log_is_kept_without_its_secrets(db: Database, tmp_path: Path) -> None:
    replica = await crashed(db, {"HF_HOME": "/very/private"})
    text = "old\n" * 100_000 + f"key {replica.secret} in /very/private\n\x1b[31mit fell\x1b[0m\n"
    the_log(tmp_path, replica, text)
    assert await a_loop(db, tmp_path).run_once(NOW) == f"kept the end of the logs of {replica.name}"
    log = await log_of(db, replica)
    assert log is not None
    assert log.tail is not None
    assert log.tail.endswith("old\nkey <secret> in <secret>\nit fell")
    assert len(log.tail) <= 2048
    assert await a_loop(db, tmp_path).run_once(NOW) is None


async def test_a_log_that_is_not_seen_is_looked_for_again_and_then_told(db: Database, tmp_path: Path) -> None:
    replica = await crashed(db)
    loop = a_loop(db, tmp_path)
    assert await loop.run_once(NOW) is None
    await loop.run_once(NOW + timedelta(minutes=1))
    log = await log_of(db, replica)
    assert log is not None
    assert log.problem is not None
    assert "there is no such file on this host; is the job directory shared?" in log.problem


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
async def test_what_is_no_plain_file_is_not_read(db: Database, tmp_path: Path, kind: str) -> None:
    replica = await crashed(db)
    path = the_log(tmp_path, replica)
    if kind == "link":
        path.symlink_to(the_log(tmp_path, replace(replica, name="private"), "private"))
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    await a_loop(db, tmp_path).run_once(NOW + timedelta(minutes=1))
    log = await log_of(db, replica)
    assert log is not None
    assert log.tail is None


async def test_what_ended_as_asked_has_no_log_read(db: Database, tmp_path: Path) -> None:
    await make_replica(db, await make_set(db), Phase.ENDED)
    assert await a_loop(db, tmp_path).run_once(NOW + timedelta(minutes=1)) is None


async def test_a_file_system_that_hangs_holds_up_nobody_and_one_thread_only(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = await crashed(db)
    the_log(tmp_path, replica, "it fell\n")
    begun: list[str] = []
    works_again = threading.Event()
    really = os.open

    def hanging(path: str, flags: int) -> int:
        begun.append(path)
        works_again.wait(60)
        return really(path, flags)

    monkeypatch.setattr("controlplane.reconcile.job_logs.os.open", hanging)
    loop = a_loop(db, tmp_path, timeout_seconds=0.05)
    for _ in range(3):
        assert await loop.run_once(NOW) is None
    assert len(begun) == 1
    works_again.set()

    async def is_kept() -> bool:
        await loop.run_once(NOW)
        return await log_of(db, replica) is not None

    await eventually(is_kept)
    log = await log_of(db, replica)
    assert log is not None
    assert log.tail == "it fell"


def test_causes_in_the_schema_are_those_of_the_rules() -> None:
    schema = (Path(nodes.__file__).parent / "migrations" / "0005.nodes.sql").read_text()
    assert all(f"'{cause}'" in schema for cause in NodeCause)
    assert all(f"'{reason}'" in schema for reason in Reason)
