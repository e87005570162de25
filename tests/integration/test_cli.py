"""The command line against a real database: what it does, what it says, and its exit codes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jwt
import pytest
from typer.testing import CliRunner, Result

from controlplane.cli import cli
from controlplane.core.types import JobState, Phase, ReplicaSet
from controlplane.db import Database, decisions, keys, replica_sets, slurm_jobs
from controlplane.demo.postgres import PrivatePostgres
from controlplane.demo.slurm_cluster import SlurmCluster
from tests.integration.db_rows import NOW, make_replica, make_set, opened
from tests.integration.lives import fires, job, whole_life

T = TypeVar("T")

NOWHERE = "postgresql://someone:hunter2@127.0.0.1:1/nothing"
NOUNS = ("replica-sets", "replicas", "endpoints", "alerts", "decisions", "audit", "nodes")
VERBS: tuple[str, ...]
VERBS = ("serve", "migrate", "apply", "get", "scale", "pause", "resume", "drain", "undrain", "cancel", "check", "demo")
VERBS += ("tenants get", "tenants set", "usage")
VERBS += ("freeze", "unfreeze", "why", "keys create", "keys list", "keys revoke", "nodes drain", "nodes undrain")
OFFICE_BOX = """
replica_sets:
  - name: office-box
    model: gemma-small
    endpoints: [{url: "http://127.0.0.1:9", api_key: topsecret}]
"""


def environment(database_url: str | None, **more: str) -> dict[str, str]:
    """A whole environment: nothing of the one that the tests run in."""
    given = {} if database_url is None else {"DATABASE_URL": database_url}
    return {"PATH": os.environ["PATH"], "COLUMNS": "60", **given, **more}


@pytest.fixture
def run(database_url: str) -> Callable[..., Result]:
    """Run a verb in this process."""

    def invoke(*arguments: str, stdin: str | None = None, **more: str) -> Result:
        return CliRunner().invoke(cli, arguments, input=stdin, env=environment(database_url, **more))

    return invoke


def command(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a verb as an operator does."""
    line = [sys.executable, "-m", "controlplane.cli", *arguments]
    return subprocess.run(line, env=env, capture_output=True, text=True, timeout=60, check=False)


@contextmanager
def started(*arguments: str, env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    line = [sys.executable, "-m", "controlplane.cli", *arguments]
    # a child inherits that SIGINT is ignored, as it is in what a shell starts in the background
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        child = subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    with child as process:
        try:
            yield process
        finally:
            process.kill()


def with_db(url: str, work: Callable[[Database], Awaitable[T]]) -> T:
    async def opened_for() -> T:
        async with opened(url) as db:
            return await work(db)

    return asyncio.run(opened_for())


def apply(run: Callable[..., Result], text: str = OFFICE_BOX, *more: str) -> Result:
    return run("apply", "-f", "-", *more, stdin=text)


def one_sentence(result: Result) -> str:
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.output
    return result.stderr


# --- what every verb owes --------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str) -> None:
    result = CliRunner().invoke(cli, [*verb.split(), "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_help_does_not_wait_for_what_it_does_not_need() -> None:
    heavy = "httpx psycopg pydantic starlette uvicorn rich.table"
    code = f"import sys, controlplane.cli; print([name for name in '{heavy}'.split() if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_the_version_is_the_packages() -> None:
    from importlib.metadata import version

    assert CliRunner().invoke(cli, ["--version"]).output.strip() == f"controlplane {version('controlplane')}"


def test_wrong_settings_are_all_named_and_exit_2() -> None:
    done = command("get", "replicas", env=environment(None, CONTROLPLANE_WEB__PORT="x", CONTROLPLANE_LOG__LEVL="info"))
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert [line.split(":")[1].strip() for line in lines] == [
        "CONTROLPLANE_LOG__LEVL",
        "CONTROLPLANE_WEB__PORT",
        "DATABASE_URL",
    ]
    assert "Traceback" not in done.stderr


def test_a_wrong_command_line_exits_2() -> None:
    done = command("get", "replikas", env=environment(NOWHERE))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [("get", "replicas"), ("migrate",), ("scale", "a", "--replicas", "1")])
def test_a_database_that_is_away_is_one_sentence_without_its_password(arguments: tuple[str, ...]) -> None:
    done = command(*arguments, env=environment(NOWHERE))
    assert done.returncode == 1
    assert done.stderr.startswith("error: PostgreSQL: ")
    assert "Connection refused" in done.stderr
    assert "see that it runs and that DATABASE_URL is right" in done.stderr
    assert done.stderr.count("\n") == 1
    assert "hunter2" not in done.stderr


def test_a_database_without_the_schema_says_to_migrate_and_migrating_helps(postgres: PrivatePostgres) -> None:
    env = environment(postgres.create_database("unmigrated"))
    runner = CliRunner(env=env)
    assert "run `controlplane migrate`" in one_sentence(runner.invoke(cli, ["get", "replicas"]))
    first = runner.invoke(cli, ["migrate"])
    assert first.output.startswith("applied 0001")
    assert runner.invoke(cli, ["migrate"]).output == "nothing to do: the schema is current\n"
    assert runner.invoke(cli, ["get", "replicas"]).exit_code == 0


# --- replica sets ----------------------------------------------------------------------------------------


def test_apply_makes_a_set_and_repeating_it_changes_nothing(run: Callable[..., Result], database_url: str) -> None:
    assert apply(run).output == "office-box created\n"
    assert apply(run).output == "office-box unchanged\n"
    assert apply(run, OFFICE_BOX.replace("gemma-small", "gemma")).output == "office-box changed\n"
    [decision, *_] = with_db(database_url, decisions.load_newest)
    assert decision.actor.startswith("cli:")


def test_apply_reads_a_file_and_key_files_beside_it(run: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "key").write_text("topsecret\n")
    file = tmp_path / "sets.yaml"
    file.write_text(OFFICE_BOX.replace("api_key: topsecret", "api_key_file: key"))
    assert run("apply", "--file", str(file)).output == "office-box created\n"


def test_a_dry_run_changes_nothing(run: Callable[..., Result], database_url: str) -> None:
    assert apply(run, OFFICE_BOX, "--dry-run").output == "office-box created (dry run: nothing was changed)\n"
    assert with_db(database_url, replica_sets.load_all) == ()


def test_apply_names_every_fault_and_applies_nothing(run: Callable[..., Result], database_url: str) -> None:
    result = apply(run, f"{OFFICE_BOX}  - {{name: Bad Name, model: m, endpoints: [{{url: nonsense}}]}}\n")
    assert result.exit_code == 1
    assert "replica_sets[1].name" in result.stderr
    assert "replica_sets[1].endpoints[0].url" in result.stderr
    assert with_db(database_url, replica_sets.load_all) == ()


def test_a_file_that_is_not_there_is_one_sentence(run: Callable[..., Result]) -> None:
    assert "No such file" in one_sentence(run("apply", "-f", "/no/such/file.yaml"))


def test_without_slurm_only_fixed_endpoints_can_be_applied(run: Callable[..., Result]) -> None:
    text = "replica_sets: [{name: a, model: m, slurm: {time_limit_seconds: 60}}]"
    assert "CONTROLPLANE_SLURM__URL is not set" in one_sentence(apply(run, text))


def test_a_set_that_no_job_script_can_be_made_of_is_refused(run: Callable[..., Result]) -> None:
    text = "replica_sets: [{name: a, model: m, template: no-such-template, slurm: {time_limit_seconds: 60}}]"
    slurm = {
        "CONTROLPLANE_SLURM__URL": "unix:/nowhere",
        "CONTROLPLANE_SLURM__USER_NAME": "vllm",
        "CONTROLPLANE_SLURM__JOB_DIRECTORY": "/scratch",
    }
    assert "a: template: no template" in one_sentence(run("apply", "-f", "-", stdin=text, **slurm))


async def a_set(db: Database) -> ReplicaSet:
    return await make_set(db, "a", min_replicas=0, max_replicas=4)


def test_scale_says_what_is_in_force(run: Callable[..., Result], database_url: str) -> None:
    with_db(database_url, a_set)
    assert run("scale", "a", "--replicas", "2").output == "a: 2 wanted, bounds 0 to 4\n"
    assert run("scale", "a", "--min", "3", "--max", "8", "--reason", "launch").output == "a: 3 wanted, bounds 3 to 8\n"
    [newest, *_] = with_db(database_url, decisions.load_newest)
    assert "(launch)" in newest.explanation
    assert run("scale", "a", "--replicas", "5", "--dry-run").output.startswith("a: 5 wanted")
    assert with_db(database_url, lambda db: replica_sets.load(db, "a")).desired_replicas == 3


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (("scale", "a", "99999999999999"), "less than or equal to 10000"),
        (("scale", "a", "--max", "99999999999999"), "less than or equal to 10000"),
        (("nodes", "drain", "n1", "--reason", "two\nfans"), "must not contain line breaks"),
        (("freeze", "--all", "--reason", "x\x1b[31m"), "control characters"),
        (("pause", "a", "--reason", "x" * 257), "at most 256 characters"),
    ],
)
def test_what_the_api_would_refuse_is_refused_with_its_option(
    run: Callable[..., Result], arguments: tuple[str, ...], wrong: str
) -> None:
    result = run(*arguments, COLUMNS="200")
    assert result.exit_code == 2, result.output
    assert wrong in result.stderr
    assert (arguments[-2] if arguments[-2].startswith("--") else "[count]") in result.stderr


def test_scale_names_the_field_at_fault(run: Callable[..., Result], database_url: str) -> None:
    with_db(database_url, a_set)
    assert "replicas: 9 is not between 0 and 4" in one_sentence(run("scale", "a", "--replicas", "9"))
    assert "there is no replica set 'b'" in one_sentence(run("scale", "b", "--replicas", "1"))
    assert run("scale", "a").exit_code == 2
    assert run("scale", "a", "--replicas", "-1").exit_code == 2


def test_pause_and_resume(run: Callable[..., Result], database_url: str) -> None:
    with_db(database_url, a_set)
    assert run("pause", "a").output == "a: paused until resumed\n"
    assert run("pause", "a", "--until", "2099-01-31T19:00+01:00").output == "a: paused until 2099-01-31 18:00 UTC\n"
    assert run("pause", "a", "--until", "2h").output.startswith("a: paused until ")
    assert run("resume", "a").output == "a: 0 wanted, bounds 0 to 4\n"
    assert "until: must be in the future" in one_sentence(run("pause", "a", "--until", "2020-01-01T00:00Z"))
    for text in ("tomorrow", "2099-01-31T18:00"):
        refused = run("pause", "a", "--until", text)
        assert refused.exit_code == 2
        assert "--until" in refused.stderr


def test_a_count_is_pinned_and_said_to_be(run: Callable[..., Result], database_url: str) -> None:
    with_db(database_url, a_set)
    end = "2099-01-31T19:00+01:00"
    pinned = "a: 3 wanted, bounds 0 to 4; pinned until 2099-01-31 18:00 UTC"
    assert run("scale", "a", "3", "--until", end, "--dry-run").output == f"{pinned} (dry run: nothing was changed)\n"
    assert run("scale", "a", "3", "--until", end).output == f"{pinned}\n"
    assert "pinned at 3 until 2099-01-31 18:00 UTC" in run("get", "replica-sets").output
    assert run("scale", "a", "--max", "8", "--until", "2h").output.startswith("a: 3 wanted, bounds 0 to 8; pinned")
    assert run("scale", "a", "2").output == "a: 2 wanted, bounds 0 to 8\n"
    assert "operator's bounds until 20" in run("get", "replica-sets").output
    assert run("scale", "a", "2", "--replicas", "2").exit_code == 2
    assert run("scale", "a", "--until", "2h").exit_code == 2
    assert "until: must be in the future" in one_sentence(run("scale", "a", "2", "--until", "2020-01-01T00:00Z"))


def test_freezing_one_set_and_all(run: Callable[..., Result], database_url: str) -> None:
    with_db(database_url, a_set)
    assert "automatic" in run("get", "replica-sets").output
    frozen = run("freeze", "a", "--until", "2099-01-31T18:00Z", "--reason", "demo")
    assert frozen.output == "a: 0 wanted, bounds 0 to 4; frozen until 2099-01-31 18:00 UTC\n"
    assert run("freeze", "--all", "--dry-run").output.startswith("all sets: frozen until unfrozen (dry run")
    assert run("freeze", "--all").output == "all sets: frozen until unfrozen\n"
    assert "frozen until 2099-01-31 18:00 UTC, frozen with all" in run("get", "replica-sets").output
    assert run("unfreeze", "--all").output == "all sets: not frozen, but for a, by a freeze of its own\n"
    run("freeze", "--all")
    assert run("unfreeze", "a").output == "a: 0 wanted, bounds 0 to 4; all sets are frozen until unfrozen\n"
    assert run("unfreeze", "--all").output == "all sets: not frozen\n"
    assert "automatic" in run("get", "replica-sets").output
    for wrong in (("freeze",), ("freeze", "a", "--all"), ("unfreeze",), ("unfreeze", "a", "--all")):
        assert run(*wrong).exit_code == 2
    assert "there is no replica set 'b'" in one_sentence(run("freeze", "b"))
    [newest, *_] = with_db(database_url, decisions.load_newest)
    assert newest.actor.startswith("cli:")


# --- replicas --------------------------------------------------------------------------------------------


def test_drain_undrain_and_cancel_are_obeyed_and_may_be_repeated(run: Callable[..., Result], database_url: str) -> None:
    async def running(db: Database) -> str:
        return (await make_replica(db, await a_set(db), Phase.RUNNING)).name

    name = with_db(database_url, running)
    assert run("drain", name, "--dry-run").output == f"{name} is DRAINING (dry run: nothing was changed)\n"
    assert run("drain", name).output == f"{name} is DRAINING\n"
    assert run("drain", name).output == f"{name} is DRAINING, as before\n"
    assert run("undrain", name).output == f"{name} is RUNNING\n"
    assert run("cancel", name).output == f"{name} is STOPPING\n"
    assert "too late" in one_sentence(run("undrain", name))
    assert "there is no replica" in one_sentence(run("drain", "cp-a-999"))


# --- get -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noun", NOUNS)
def test_what_there_is_can_be_read_by_people_and_programs(
    run: Callable[..., Result], database_url: str, noun: str
) -> None:
    assert json.loads(run("get", noun, "-o", "json").output) == []

    async def world(db: Database) -> None:
        one = await a_set(db)
        await make_replica(db, one, Phase.RUNNING)
        await make_replica(db, one, Phase.ENDED)

    assert apply(run).exit_code == 0
    with_db(database_url, world)
    for output in ("table", "wide", "json"):
        for more in ((), ("--all",)):
            result = run("get", noun, "-o", output, *more)
            assert result.exit_code == 0, result.output
            assert "topsecret" not in result.output
            assert "x" * 32 not in result.output, "a replica's secret"
            if output == "json":
                json.loads(result.output)


def test_the_json_of_replicas_is_stable(run: Callable[..., Result], database_url: str) -> None:
    async def world(db: Database) -> None:
        one = await a_set(db)
        await make_replica(db, one, Phase.RUNNING)
        await make_replica(db, one, Phase.ENDED)

    with_db(database_url, world)
    [live] = json.loads(run("get", "replicas", "-o", "json").output)
    assert (live["replica_set"], live["phase"], live["slurm_job_id"]) == ("a", "RUNNING", 1000 + int(live["name"][5:]))
    assert live["created_at"] == "2026-01-01T12:00:00+00:00"
    assert [one["phase"] for one in json.loads(run("get", "replicas", "--all", "-o", "json").output)] == [
        "RUNNING",
        "ENDED",
    ]


def test_the_table_of_replica_sets_shows_the_numbers_that_matter(run: Callable[..., Result], database_url: str) -> None:
    async def world(db: Database) -> None:
        await make_replica(db, await a_set(db), Phase.RUNNING)

    with_db(database_url, world)
    run("scale", "a", "--replicas", "3")
    header, row = run("get", "replica-sets").output.splitlines()
    shown: dict[str, Any] = dict(zip(header.split(), row.split(), strict=False))
    assert shown["DESIRED"] == "3"
    assert shown["EXISTING"] == "1"
    assert shown["BOUNDS"] == "0..4"


def test_watching_json_gives_a_line_for_every_change_and_ends_cleanly(
    run: Callable[..., Result], database_url: str
) -> None:
    with_db(database_url, a_set)
    with started("get", "replica-sets", "--watch", "-o", "json", env=environment(database_url)) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["desired_replicas"] == 0
        assert run("scale", "a", "--replicas", "2").exit_code == 0
        assert json.loads(process.stdout.readline())["desired_replicas"] == 2
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in stderr


def test_watching_a_table_in_a_pipe_prints_it_again_when_something_changed(
    run: Callable[..., Result], database_url: str
) -> None:
    with_db(database_url, a_set)
    with started("get", "replica-sets", "--watch", env=environment(database_url)) as process:
        assert process.stdout is not None
        assert [process.stdout.readline().split()[2] for _ in range(2)] == ["DESIRED", "0"]
        assert run("scale", "a", "--replicas", "2").exit_code == 0
        assert [process.stdout.readline().split()[2] for _ in range(2)] == ["DESIRED", "2"]


def test_watching_a_table_ends_cleanly(database_url: str) -> None:
    with_db(database_url, a_set)
    env = environment(database_url, FORCE_COLOR="1")  # draws as on a terminal, frame by frame
    with started("get", "replica-sets", "--watch", env=env) as process:
        assert process.stdout is not None
        while "BOUNDS" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in stderr


# --- why ---------------------------------------------------------------------------------------------------


def test_why_tells_of_a_replica_from_the_alert_to_its_end(run: Callable[..., Result], database_url: str) -> None:
    replica = with_db(database_url, whole_life)
    for subject in (replica.name, str(replica.slurm_job_id)):
        told = run("why", subject)
        assert told.exit_code == 0, told.output
        assert "x" * 32 not in told.output, "a replica's secret"
        lines = [" ".join(line.split()) for line in told.output.splitlines()]
        assert lines[0].startswith(
            f"{replica.name} of a ENDED since 2026-01-01 12:00:52 UTC, job {replica.slurm_job_id}"
        )
        assert lines[1] == "made because: SCALED_UP, 0 -> 1: SCALED_UP for a test"
        words = [line.split(maxsplit=2)[2] for line in lines if line.startswith("2026-01-01")]
        assert words[0].startswith("alert Requests queue (scale_up): m: 22 requests wait; A = 22")
        assert words[1] == "refused because COOLDOWN: COOLDOWN for a test"
        assert words[-1] == "end ENDED, SCALED_DOWN"


def test_why_tells_of_a_set_now_and_then(run: Callable[..., Result], database_url: str) -> None:
    replica = with_db(database_url, whole_life)
    now, then = run("why", "a").output, run("why", "a", "--at", "2026-01-01T13:00:12+01:00").output
    assert "a (model m): 0 wanted, bounds 0 to 4" in now
    assert "no alert fires" in now
    assert f"{replica.name} ENDED" in now
    assert then.startswith("as it was at 2026-01-01 12:00:12 UTC")
    assert "a (model m): 1 wanted" in then
    assert "presses: Requests queue (scale_up)" in then
    assert f"{replica.name} QUEUED" in then
    assert "Jobs with a higher priority come first." in then
    assert "what to do: Wait, or want fewer with `controlplane scale a`." in then
    assert json.loads(run("why", "a", "-o", "json").output)["desired_replicas"] == 0


def test_why_of_a_set_with_fixed_endpoints_tells_how_they_are(run: Callable[..., Result]) -> None:
    assert apply(run).exit_code == 0
    told = run("why", "office-box").output
    assert "fixed endpoint UNPROVEN at http://127.0.0.1:9" in told
    assert "no replicas" not in told
    assert "topsecret" not in told + run("why", "office-box", "-o", "json").output


def test_what_others_wrote_does_not_steer_the_terminal(run: Callable[..., Result], database_url: str) -> None:
    async def world(db: Database) -> None:
        await make_set(db, "a")
        await fires(db, NOW, annotations={"summary": "[bold]red[/] \x1b[31m\nand more"})

    with_db(database_url, world)
    told = run("why", "a").output
    assert "[bold]red[/] \N{REPLACEMENT CHARACTER}[31m\N{REPLACEMENT CHARACTER}and more" in told


def test_why_says_what_it_does_not_understand(run: Callable[..., Result], database_url: str) -> None:
    with_db(database_url, a_set)
    assert "there is no replica set and no replica 'nothing'" in one_sentence(run("why", "nothing"))
    assert "had the Slurm job 4711" in one_sentence(run("why", "4711"))
    assert "at: the replica set a was made at" in one_sentence(run("why", "a", "--at", "2020-01-01T00:00Z"))
    for text in ("10m", "yesterday", "2026-01-01T12:00", "2999-01-01T00:00Z", "-10y"):
        refused = run("why", "a", "--at", text)
        assert refused.exit_code == 2, text
        assert "--at" in refused.stderr


def test_a_queued_replica_says_what_it_waits_for(run: Callable[..., Result], database_url: str) -> None:
    async def world(db: Database) -> None:
        queued = await make_replica(db, await a_set(db), Phase.QUEUED)
        waiting = job(queued, JobState.PENDING, state_reason="QOSMaxGRESPerUser")
        await slurm_jobs.record(db, [(queued.id, waiting)], NOW)

    with_db(database_url, world)
    [one] = json.loads(run("get", "replicas", "-o", "json").output)
    assert one["pending"]["state_reason"] == "QOSMaxGRESPerUser"
    assert "QOSMaxGRESPerUser" in run("get", "replicas").output
    assert one["pending"]["remedy"] in run("get", "replicas", "-o", "wide").output


# --- keys ------------------------------------------------------------------------------------------------


def test_a_key_is_printed_alone_once_and_can_be_revoked(run: Callable[..., Result], database_url: str) -> None:
    made = run("keys", "create", "--tenant", "physics", "--model", "a", "--model", "b", "--expires-in-days", "9")
    key = made.stdout.strip()
    assert key.startswith("sk-")
    [stored] = with_db(database_url, keys.load_all)
    assert stored.key_hash == keys.hash_key(key)
    assert stored.models == frozenset({"a", "b"})
    assert stored.expires_at is not None
    assert (stored.expires_at - stored.created_at).days == 9
    for output in ("table", "json"):
        listed = run("keys", "list", "-o", output).output
        assert stored.prefix in listed
        assert key not in listed
    assert run("keys", "revoke", stored.prefix).output == f"{stored.prefix} of physics is revoked\n"
    assert "revoked" in run("keys", "list").output
    said = json.loads(run("get", "audit", "-o", "json").output)
    assert [one["subject"] for one in said] == [stored.prefix] * 2
    assert key not in str(said)


def test_a_key_made_as_json_is_whole(run: Callable[..., Result]) -> None:
    made = json.loads(run("keys", "create", "--tenant", "physics", "-o", "json").stdout)
    assert made["key"].startswith(made["prefix"])
    assert made["models"] is None


def test_keys_say_what_is_wrong(run: Callable[..., Result]) -> None:
    assert run("keys", "create", "--tenant", "no spaces").exit_code == 2
    assert "no API key begins with 'sk-nothing'" in one_sentence(run("keys", "revoke", "sk-nothing"))


# --- check -----------------------------------------------------------------------------------------------


def test_check_says_that_all_is_well(run: Callable[..., Result]) -> None:
    result = run("check", CONTROLPLANE_WEBHOOK__BEARER_TOKENS="t")
    assert result.exit_code == 0, result.output
    lines = {line.split(":")[0].split(maxsplit=1)[1]: line.split()[0] for line in result.output.splitlines()}
    assert lines == {"settings": "ok", "webhooks": "ok", "database": "ok", "migrations": "ok", "slurm": "ok"}


def test_check_says_what_to_do_about_each_part_that_fails(tmp_path: Path) -> None:
    done = command(
        "check",
        env=environment(
            NOWHERE,
            CONTROLPLANE_SLURM__URL="http://127.0.0.1:1",
            CONTROLPLANE_SLURM__USER_NAME="vllm",
            CONTROLPLANE_SLURM__TOKEN_FILE=str(tmp_path / "absent"),
            CONTROLPLANE_SLURM__JOB_DIRECTORY=str(tmp_path / "absent"),
            CONTROLPLANE_SLURM__TEMPLATE_DIRECTORY=str(tmp_path / "absent"),
        ),
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    lines = {line.split(":")[0].split(maxsplit=1)[1]: line for line in done.stdout.splitlines()}
    for subject in ("database", "slurm", "templates"):
        assert lines[subject].startswith("failed")
        assert "; " in lines[subject]
    for subject in ("webhooks", "job directory"):
        assert lines[subject].startswith("warning")
    assert "renew the Slurm token" in lines["slurm"]
    assert "hunter2" not in done.stdout


def test_check_names_wrong_settings() -> None:
    done = command("check", env=environment(None))
    assert done.returncode == 1
    assert done.stdout.startswith("failed   settings: DATABASE_URL: is not set; give a libpq URI")


def test_check_says_to_migrate(postgres: PrivatePostgres) -> None:
    result = CliRunner(env=environment(postgres.create_database("unchecked"))).invoke(cli, ["check"])
    assert result.exit_code == 1
    assert "run `controlplane migrate`" in result.output


@pytest.fixture
def slurm(session_directory: Path) -> Iterator[SlurmCluster]:
    with SlurmCluster(session_directory / "slurm-of-the-cli", nodes=1) as cluster:
        yield cluster


def test_check_asks_a_real_slurm_and_tells_how_long_the_token_is_good(
    run: Callable[..., Result], database_url: str, slurm: SlurmCluster, tmp_path: Path
) -> None:
    given = {
        "CONTROLPLANE_SLURM__URL": slurm.url,
        "CONTROLPLANE_SLURM__USER_NAME": slurm.user_name,
        "CONTROLPLANE_SLURM__JOB_DIRECTORY": str(slurm.jobs_directory),
    }
    with_db(database_url, a_set)
    well = run("check", **given, CONTROLPLANE_SLURM__JWT_KEY_FILE=str(slurm.jwt_key_file))
    assert well.exit_code == 0, well.output
    lines = {line.split(":")[0].split(maxsplit=1)[1]: line for line in well.output.splitlines()}
    assert "API v0.0." in lines["slurm"]
    for subject in ("slurm", "token", "templates", "job directory"):
        assert lines[subject].startswith("ok"), lines[subject]

    claims = {"iat": 1, "sun": slurm.user_name}
    for life, word, remedy in ((600, "warning", "renewed in time"), (-600, "failed", "renew the Slurm token")):
        token = jwt.encode({**claims, "exp": int(time.time()) + life}, slurm.jwt_key_file.read_bytes(), "HS256")
        (tmp_path / "token").write_text(token)
        told = run("check", **given, CONTROLPLANE_SLURM__TOKEN_FILE=str(tmp_path / "token")).output
        [line] = [line for line in told.splitlines() if remedy in line]
        assert line.startswith(word)
        assert token not in told
