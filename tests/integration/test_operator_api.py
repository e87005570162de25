"""The operators' API: reads, verbs, dry runs, and what is refused."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from loguru import logger

from controlplane.core.types import Alert, AlertAction, ExternalEndpoint, Phase, ReplicaSetSpec, VllmOptions
from controlplane.db import (
    Database,
    DatabaseError,
    DatabaseOptions,
    alerts,
    decisions,
    endpoints,
    keys,
    replica_sets,
    replicas,
    usage,
)
from controlplane.web import OperatorToken
from tests.integration.db_rows import NOW, make_replica, make_set, opened
from tests.integration.web_rig import OPTIONS, WebRig

SECRET = "x" * 32  # of every replica made by db_rows


@pytest.fixture
async def rig(shared_url: str) -> AsyncIterator[WebRig]:
    async with opened(shared_url) as db:
        async with db.connection() as connection:
            await connection.execute("TRUNCATE alerts, replica_sets, freezes, tenants, usage, job_runs CASCADE")
        yield WebRig(db)


SLURM_SET = {
    "name": "a",
    "model": "m",
    "template": "fake-vllm",
    "max_replicas": 4,
    "slurm": {"time_limit_seconds": 3600},
}
READS = ["replica-sets", "replicas", "endpoints", "alerts", "decisions", "audit", "nodes", "tenants"]
STORIES = ["replica-sets/a/why", "replicas/cp-a-1/why", "slurm-jobs/1/why"]
VERBS = [
    ("PUT", "replica-sets/a"),
    ("POST", "replica-sets/a/scale"),
    ("POST", "replica-sets/a/pause"),
    ("POST", "replica-sets/a/resume"),
    ("POST", "replica-sets/a/freeze"),
    ("POST", "replica-sets/a/unfreeze"),
    ("POST", "freeze"),
    ("POST", "unfreeze"),
    ("POST", "replicas/cp-a-1/drain"),
    ("POST", "replicas/cp-a-1/undrain"),
    ("POST", "replicas/cp-a-1/cancel"),
    ("POST", "nodes/n1/drain"),
    ("POST", "nodes/n1/undrain"),
    ("PUT", "tenants/lab/limits"),
]


async def sets(rig: WebRig) -> list[str]:
    return [one.name for one in await replica_sets.load_all(rig.db)]


@pytest.mark.parametrize("authorization", [None, "Bearer wrong", "Bearer ", "Basic YW5uOmFubi10b2tlbg==", "ann-token"])
async def test_without_an_operators_token_nothing_is_shown_and_nothing_is_done(
    rig: WebRig, authorization: str | None
) -> None:
    headers = {"Authorization": authorization} if authorization else {}
    for method, path in [*(("GET", read) for read in (*READS, *STORIES, "usage")), *VERBS]:
        answer = await rig.ask(method, f"/api/v1/{path}", SLURM_SET if method == "PUT" else None, headers=headers)
        assert answer.status_code == 401, path
        assert "token" not in answer.json()["error"]["message"].replace("bearer token", "")
    assert await sets(rig) == []


async def test_with_no_operators_configured_everybody_is_refused(rig: WebRig) -> None:
    rig.options = replace(OPTIONS, operators=())
    assert (await rig.ask("GET", "/api/v1/replicas")).status_code == 401
    with pytest.raises(ValueError, match="a name and a value"):
        OperatorToken("ann", "")


async def test_everything_is_shown_but_no_secret(rig: WebRig) -> None:
    a = await make_set(rig.db, vllm=VllmOptions(environment={"HF_TOKEN": "hf-secret"}))
    running = await make_replica(rig.db, a, Phase.RUNNING)
    ended = await make_replica(rig.db, a, Phase.ENDED)
    await endpoints.ensure(rig.db, running, "http://n1:20000")
    box = ReplicaSetSpec("box", "m", endpoints=(ExternalEndpoint("http://h:1", "key-secret"),))
    await replica_sets.apply(rig.db, box, actor="ann", now=NOW)
    alert = Alert("grafana", 1, "f", "queue", True, NOW, None, NOW, action=AlertAction.SCALE_UP, values={"A": 1.5})
    await alerts.store(rig.db, [(alert, {})], now=NOW)
    answers = {read: await rig.ask("GET", f"/api/v1/{read}") for read in READS}
    for answer in answers.values():
        assert answer.status_code == 200
        for secret in (SECRET, "hf-secret", "key-secret"):
            assert secret not in answer.text
    shown = {read: answer.json()[read.replace("-", "_")] for read, answer in answers.items()}
    assert [one["name"] for one in shown["replica-sets"]] == ["a", "box"]
    assert shown["replica-sets"][0]["spec"]["vllm"]["environment_names"] == ["HF_TOKEN"]
    assert [(one["name"], one["phase"]) for one in shown["replicas"]] == [
        (ended.name, "ENDED"),
        (running.name, "RUNNING"),
    ]
    assert [(one["url"], one["replica"], one["is_routable"]) for one in shown["endpoints"]] == [
        ("http://n1:20000", running.name, False),
        ("http://h:1", None, False),
    ]
    assert [(one["fingerprint"], one["status"], one["action"]) for one in shown["alerts"]] == [
        ("f", "firing", "scale_up")
    ]
    assert [one["actor"] for one in shown["decisions"]] == ["ann", "test", "test"]


async def test_what_the_database_refuses_is_in_the_log_that_the_answer_points_to(
    rig: WebRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(_db: Database) -> None:
        raise DatabaseError("no such column")

    monkeypatch.setattr(replica_sets, "load_all", refuse)
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(f"{message} {message.record['extra']}"), level="ERROR")
    try:
        assert (await rig.ask("GET", "/api/v1/replica-sets")).status_code == 500
    finally:
        logger.remove(sink)
    assert "no such column" in "".join(lines)


async def test_a_live_replica_is_shown_however_many_ended_after_it(rig: WebRig) -> None:
    a = await make_set(rig.db)
    old = await make_replica(rig.db, a)
    ended = [await make_replica(rig.db, a, Phase.ENDED) for _ in range(3)]
    shown = (await rig.ask("GET", "/api/v1/replicas?limit=2")).json()["replicas"]
    assert [one["name"] for one in shown] == [ended[2].name, ended[1].name, old.name]


async def test_reads_can_be_narrowed(rig: WebRig) -> None:
    await make_set(rig.db, "a")
    await make_set(rig.db, "b")
    shown = (await rig.ask("GET", "/api/v1/decisions?replica_set=b&limit=1")).json()["decisions"]
    assert [one["replica_set"] for one in shown] == ["b"]
    alert = Alert("grafana", 1, "f", "q", True, NOW, None, NOW, action=AlertAction.SCALE_UP)
    await alerts.store(rig.db, [(alert, {})], now=NOW)
    rig.now = NOW + timedelta(days=2)
    assert (await rig.ask("GET", "/api/v1/alerts")).json() == {"alerts": []}
    since = (NOW - timedelta(minutes=1)).isoformat().replace("+00:00", "Z")
    assert len((await rig.ask("GET", f"/api/v1/alerts?since={since}")).json()["alerts"]) == 1


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("replicas?limit=0", "limit"),
        ("replicas?limit=1001", "limit"),
        ("decisions?limit=x", "limit"),
        ("alerts?since=yesterday", "since"),
        ("replicas?dry_run=true", "dry_run"),
        ("endpoints?colour=red", "colour"),
    ],
)
async def test_a_parameter_that_is_wrong_or_unknown_is_named(rig: WebRig, path: str, field: str) -> None:
    answer = await rig.ask("GET", f"/api/v1/{path}")
    assert (answer.status_code, answer.json()["error"]["field"]) == (400, field)


async def test_a_set_is_applied_once_and_its_actor_is_remembered(rig: WebRig) -> None:
    dry = await rig.ask("PUT", "/api/v1/replica-sets/a?dry_run=true", SLURM_SET)
    assert dry.json()["outcome"] == "created"
    assert dry.json()["dry_run"] is True
    assert await sets(rig) == []
    outcomes = [(await rig.ask("PUT", "/api/v1/replica-sets/a", SLURM_SET)).json()["outcome"] for _ in range(2)]
    assert outcomes == ["created", "unchanged"]
    assert [one.actor for one in await decisions.load_newest(rig.db)] == ["ann"]
    nameless = {key: value for key, value in SLURM_SET.items() if key != "name"}
    assert (await rig.ask("PUT", "/api/v1/replica-sets/a", nameless | {"max_replicas": 2})).json()["changed"] is True


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"name": "b"}, "name"),
        ({"model": 5}, "model"),
        ({"max_replica": 5}, "max_replica"),
        ({"slurm": {"time_limit_seconds": 0}}, "slurm.time_limit_seconds"),
        ({"template": "no-such-template"}, "template"),
        ({"vllm": {"args": ["--port", "1"]}}, "vllm.args[0]"),
    ],
)
async def test_a_spec_that_cannot_work_is_refused_with_its_field(rig: WebRig, body: dict[str, Any], field: str) -> None:
    answer = await rig.ask("PUT", "/api/v1/replica-sets/a", {**SLURM_SET, **body})
    assert answer.status_code == 400
    assert answer.json()["error"]["field"] == field
    assert await sets(rig) == []


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
async def test_a_body_that_is_no_json_object_is_refused(rig: WebRig, body: bytes) -> None:
    await make_set(rig.db)
    assert (await rig.ask("PUT", "/api/v1/replica-sets/a", body)).status_code == 400
    if body:
        assert (await rig.ask("POST", "/api/v1/replica-sets/a/scale", body)).status_code == 400


async def test_a_body_beyond_the_limit_is_refused(rig: WebRig) -> None:
    rig.options = replace(OPTIONS, max_body_bytes=100)
    answer = await rig.ask("PUT", "/api/v1/replica-sets/a", b" " * 101)
    assert answer.status_code == 413
    assert answer.json()["error"]["message"]


async def test_every_fault_of_a_spec_is_listed(rig: WebRig) -> None:
    answer = await rig.ask("PUT", "/api/v1/replica-sets/A", {"slurm": {}, "probe": "x"})
    assert {fault["field"] for fault in answer.json()["error"]["faults"]} == {
        "name",
        "model",
        "slurm.time_limit_seconds",
        "probe",
    }


async def test_without_slurm_only_endpoints_are_accepted(rig: WebRig) -> None:
    rig.options = replace(OPTIONS, script=None)
    answer = await rig.ask("PUT", "/api/v1/replica-sets/a", SLURM_SET)
    assert (answer.status_code, answer.json()["error"]["field"]) == (400, "slurm")
    box = {"model": "m", "endpoints": [{"url": "http://h:1", "api_key": "key-secret"}]}
    answer = await rig.ask("PUT", "/api/v1/replica-sets/box", box)
    assert answer.status_code == 200
    assert "key-secret" not in answer.text
    (endpoint,) = await endpoints.load_live(rig.db)
    assert endpoint.api_key == "key-secret"


async def test_a_caller_does_not_choose_which_files_are_read(rig: WebRig) -> None:
    box = {"model": "m", "endpoints": [{"url": "http://h:1", "api_key_file": "/etc/hostname"}]}
    answer = await rig.ask("PUT", "/api/v1/replica-sets/box", box)
    assert (answer.status_code, answer.json()["error"]["field"]) == (400, "endpoints[0].api_key_file")
    assert await sets(rig) == []


async def test_a_set_does_not_change_its_kind(rig: WebRig) -> None:
    await make_set(rig.db)
    answer = await rig.ask("PUT", "/api/v1/replica-sets/a", {"model": "m", "endpoints": [{"url": "http://h:1"}]})
    assert (answer.status_code, answer.json()["error"]["field"]) == (400, "name")


async def test_scaling_is_done_once_and_explained(rig: WebRig) -> None:
    await make_set(rig.db)
    order = {"replicas": 3, "min_replicas": 1, "reason": "exam week"}
    for query, changed in (("?dry_run=true", True), ("", True), ("", False)):
        answer = await rig.ask("POST", f"/api/v1/replica-sets/a/scale{query}", order)
        assert (answer.status_code, answer.json()["changed"]) == (200, changed)
        assert answer.json()["replica_set"]["desired_replicas"] == 3
    newest, _ = await decisions.load_newest(rig.db)
    assert (newest.actor, newest.previous, newest.desired) == ("ann", 0, 3)
    assert "exam week" in newest.explanation


@pytest.mark.parametrize(
    ("verb", "body", "field"),
    [
        ("scale", {}, "replicas"),
        ("scale", {"replicas": 9}, "replicas"),
        ("scale", {"replicas": "3"}, "replicas"),
        ("scale", {"replicas": True}, "replicas"),
        ("scale", {"replicas": -1}, "replicas"),
        ("scale", {"replicas": 10**12}, "replicas"),
        ("scale", {"min_replicas": 9}, "max_replicas"),
        ("scale", {"replicas": 1, "until": "2025-02-01T00:00:00Z"}, "until"),
        ("scale", {"until": "2026-02-01T00:00:00Z"}, "replicas"),
        ("freeze", {"until": "2025-01-01T00:00:00Z"}, "until"),
        ("freeze", {"because": "x"}, "because"),
        ("unfreeze", {"reason": "x"}, "reason"),
        ("scale", {"replicas": 1, "reason": "a\nb"}, "reason"),
        ("pause", {"until": "2025-01-01T00:00:00Z"}, "until"),
        ("pause", {"until": "2027-01-01T00:00:00"}, "until"),
        ("pause", {"until": "0001-01-01T00:00:00+01:00"}, "until"),
        ("pause", {"until": 1767225600}, "until"),
        ("pause", {"because": "x"}, "because"),
        ("resume", {"reason": "x"}, "reason"),
    ],
)
async def test_an_order_that_makes_no_sense_is_refused_with_its_field(
    rig: WebRig, verb: str, body: dict[str, Any], field: str
) -> None:
    before = await make_set(rig.db)
    answer = await rig.ask("POST", f"/api/v1/replica-sets/a/{verb}", body)
    assert (answer.status_code, answer.json()["error"].get("field")) == (400, field)
    assert await replica_sets.load(rig.db, "a") == before


async def test_a_misspelt_dry_run_does_nothing(rig: WebRig) -> None:
    before = await make_set(rig.db)
    for query in ("dry-run=true", "dry_run=yes", "dryrun=true", "dry_run="):
        answer = await rig.ask("POST", f"/api/v1/replica-sets/a/scale?{query}", {"replicas": 1})
        assert answer.status_code == 400
    assert await replica_sets.load(rig.db, "a") == before


async def test_a_pause_and_its_end(rig: WebRig) -> None:
    await make_set(rig.db)
    order = {"reason": "repair", "until": "2026-01-02T00:00:00+01:00"}
    for changed in (True, False):
        answer = await rig.ask("POST", "/api/v1/replica-sets/a/pause", order)
        assert answer.json()["changed"] is changed
        assert answer.json()["replica_set"]["paused_until"] == "2026-01-01T23:00:00+00:00"
    for changed in (True, False):
        answer = await rig.ask("POST", "/api/v1/replica-sets/a/resume")
        assert (answer.json()["changed"], answer.json()["replica_set"]["is_paused"]) == (changed, False)


async def test_a_count_is_pinned_until_its_end(rig: WebRig) -> None:
    await make_set(rig.db)
    order = {"replicas": 3, "until": "2026-01-02T00:00:00+01:00", "reason": "demo"}
    pin = {"replicas": 3, "until": "2026-01-01T23:00:00+00:00", "actor": "ann", "reason": "demo"}
    for query, changed in (("?dry_run=true", True), ("", True), ("", False)):
        answer = await rig.ask("POST", f"/api/v1/replica-sets/a/scale{query}", order)
        assert (answer.json()["changed"], answer.json()["replica_set"]["pin"]) == (changed, pin)
    answer = await rig.ask("POST", "/api/v1/replica-sets/a/scale", {"max_replicas": 8, "until": order["until"]})
    bounds = {"min_replicas": None, "max_replicas": 8, "until": pin["until"]}
    assert answer.json()["replica_set"]["operator_bounds"] == bounds
    [shown] = (await rig.ask("GET", "/api/v1/replica-sets")).json()["replica_sets"]
    assert (shown["pin"], shown["operator_bounds"], shown["open_schedules"]) == (pin, bounds, [])


async def test_a_set_and_all_sets_are_frozen_and_unfrozen(rig: WebRig) -> None:
    await make_set(rig.db)
    order = {"reason": "incident", "until": "2026-01-02T00:00:00Z"}
    said = {"actor": "ann", "reason": "incident", "since": NOW.isoformat(), "until": "2026-01-02T00:00:00+00:00"}
    for query, changed in (("?dry_run=true", True), ("", True), ("", False)):
        own = (await rig.ask("POST", f"/api/v1/replica-sets/a/freeze{query}", order)).json()
        assert (own["changed"], own["replica_set"]["freezes"][0]) == (changed, {"is_of_all": False, **said})
        of_all = (await rig.ask("POST", f"/api/v1/freeze{query}", order)).json()
        assert (of_all["changed"], of_all["freeze"]) == (changed, {"is_of_all": True, **said})
    [shown] = (await rig.ask("GET", "/api/v1/replica-sets")).json()["replica_sets"]
    assert [one["is_of_all"] for one in shown["freezes"]] == [False, True]
    assert (await rig.ask("POST", "/api/v1/freeze", {"until": "2025-01-01T00:00:00Z"})).status_code == 400
    for query, changed in (("?dry_run=true", True), ("", True), ("", False)):
        assert (await rig.ask("POST", f"/api/v1/replica-sets/a/unfreeze{query}")).json()["changed"] is changed
        assert (await rig.ask("POST", f"/api/v1/unfreeze{query}")).json()["changed"] is changed
    assert {one.actor for one in await decisions.load_newest(rig.db)} == {"ann", "test"}
    assert (await replica_sets.load(rig.db, "a")).freezes == ()


async def test_a_spec_with_policies_and_schedules_is_shown_as_it_can_be_applied_again(rig: WebRig) -> None:
    policy = {"type": "Percent", "value": 50, "period_seconds": 60}
    night = {"name": "night", "cron": "0 22 * * *", "time_zone": "Europe/Berlin", "duration_seconds": 60}
    scaling = {
        "mode": "advisory",
        "scale_up": {"policies": [policy], "select_policy": "Min"},
        "schedules": [{**night, "max_replicas": 1}],
    }
    answer = await rig.ask("PUT", "/api/v1/replica-sets/a", {**SLURM_SET, **scaling})
    shown = answer.json()["spec"]
    assert (shown["mode"], shown["scale_up"]["policies"]) == ("advisory", [policy])
    again = await rig.ask("PUT", "/api/v1/replica-sets/a", shown | {"endpoints": []})
    assert (again.status_code, again.json()["changed"]) == (200, False)


async def test_a_replica_is_drained_brought_back_and_cancelled(rig: WebRig) -> None:
    replica = await make_replica(rig.db, await make_set(rig.db), Phase.RUNNING)
    for verb, phase in (("drain", "DRAINING"), ("undrain", "RUNNING"), ("cancel", "STOPPING")):
        path = f"/api/v1/replicas/{replica.name}/{verb}"
        dry = await rig.ask("POST", f"{path}?dry_run=true")
        assert (dry.json()["replica"]["phase"], dry.json()["changed"]) == (phase, True)
        for changed in (True, False):
            answer = await rig.ask("POST", path, {})
            assert (answer.json()["replica"]["phase"], answer.json()["changed"]) == (phase, changed)
            assert SECRET not in answer.text
    assert (await rig.ask("POST", f"/api/v1/replicas/{replica.name}/undrain")).status_code == 409
    assert [step.actor for step in await replicas.load_history(rig.db, name=replica.name)][-3:] == ["ann"] * 3


async def test_a_replica_that_is_being_submitted_is_answered_try_again(rig: WebRig) -> None:
    replica = await make_replica(rig.db, await make_set(rig.db), Phase.SUBMITTING)
    answer = await rig.ask("POST", f"/api/v1/replicas/{replica.name}/drain")
    assert answer.status_code == 409
    assert "try again" in answer.json()["error"]["message"]


@pytest.mark.parametrize("name", ["b", "B", "%00", "a%2Fb", "ä", "a" * 300])
async def test_what_is_not_there_is_not_found(rig: WebRig, name: str) -> None:
    for path in (f"replica-sets/{name}/resume", f"replicas/{name}/drain"):
        answer = await rig.ask("POST", f"/api/v1/{path}")
        assert answer.status_code == 404
        assert answer.json()["error"]["message"]


async def test_a_wrong_path_or_method_is_answered_in_the_same_shape(rig: WebRig) -> None:
    for method, path, status in (("GET", "/api/v1/nothing", 404), ("DELETE", "/api/v1/replicas", 405)):
        answer = await rig.ask(method, path)
        assert (answer.status_code, list(answer.json())) == (status, ["error"])


async def test_without_postgresql_every_order_is_answered_503(free_port: int) -> None:
    url = f"postgresql://user:password@127.0.0.1:{free_port}/x"
    async with Database(DatabaseOptions(url=url, timeout_seconds=0.2)) as db:
        rig = WebRig(db)
        for method, path in (("GET", "replicas"), ("POST", "replica-sets/a/resume"), ("POST", "replicas/cp-a-1/drain")):
            answer = await rig.ask(method, f"/api/v1/{path}")
            assert answer.status_code == 503
            assert "password" not in json.dumps(answer.json())


# --- tenants ---------------------------------------------------------------------------------------------


async def test_limits_of_a_tenant_are_set_shown_and_audited(rig: WebRig) -> None:
    await keys.create(rig.db, "lab", models=None, expires_at=None, actor="ann", now=NOW)
    wanted = {"requests_per_minute": 60, "monthly_tokens": 10**12, "weight": 2}
    for is_dry_run in ("true", "false"):
        answer = await rig.ask("PUT", f"/api/v1/tenants/lab/limits?dry_run={is_dry_run}", wanted)
        assert answer.json() == {
            "changed": True,
            "dry_run": is_dry_run == "true",
            "tenant": "lab",
            "limits": {
                "requests_per_minute": 60,
                "tokens_per_minute": None,
                "max_concurrent": None,
                "monthly_tokens": 10**12,
                "weight": 2.0,
            },
        }
    assert (await rig.ask("PUT", "/api/v1/tenants/lab/limits", wanted)).json()["changed"] is False
    other = await rig.ask("PUT", "/api/v1/tenants/lab/limits", {"requests_per_minute": None, "max_concurrent": 5})
    assert other.json()["limits"]["monthly_tokens"] == 10**12
    [shown] = (await rig.ask("GET", "/api/v1/tenants")).json()["tenants"]
    assert shown == {"name": "lab", "limits": other.json()["limits"], "month_tokens": 0}
    said = [one for one in (await rig.ask("GET", "/api/v1/audit")).json()["audit"] if one["kind"] == "tenant"]
    assert sorted(one["words"] for one in said) == [
        "limits of lab: requests_per_minute 60 -> none, max_concurrent none -> 5",
        "limits of lab: requests_per_minute none -> 60, monthly_tokens none -> 1000000000000, weight 1 -> 2",
    ]
    assert {one["actor"] for one in said} == {"ann"}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"requests_per_minute": 0}, "requests_per_minute"),
        ({"requests_per_minute": 2**31}, "requests_per_minute"),
        ({"monthly_tokens": 10**40}, "monthly_tokens"),
        ({"max_concurrent": True}, "max_concurrent"),
        ({"tokens_per_minute": 1.5}, "tokens_per_minute"),
        ({"weight": 0}, "weight"),
        (b'{"weight": NaN}', "weight"),
        ({"weight": None}, "weight"),
        ({"request_per_minute": 1}, "request_per_minute"),
    ],
)
async def test_wrong_limits_are_refused_with_the_field_at_fault(rig: WebRig, body: Any, field: str) -> None:
    await keys.create(rig.db, "lab", models=None, expires_at=None, actor="ann", now=NOW)
    answer = await rig.ask("PUT", "/api/v1/tenants/lab/limits", body)
    assert answer.status_code == 400
    assert field in answer.text


@pytest.mark.parametrize("name", ["nobody", "%00", "-", "a" * 300])
async def test_limits_of_a_tenant_that_is_not_there_are_404(rig: WebRig, name: str) -> None:
    assert (await rig.ask("PUT", f"/api/v1/tenants/{name}/limits", {"max_concurrent": 1})).status_code == 404
    assert (await rig.ask("PUT", f"/api/v1/tenants/{name}/limits", {})).status_code == 400


async def test_usage_is_told_by_month_and_wrong_questions_are_refused(rig: WebRig) -> None:
    for batch, day in enumerate((NOW.date(), NOW.date() - timedelta(days=1)), 1):
        await usage.store(rig.db, "api", batch, [usage.Row(day, "lab", "m", 1, "cp-a-1", 2, 1, 30, 12, 10)])
    answer = (await rig.ask("GET", "/api/v1/usage")).json()
    line = {"requests": 2, "aborted": 1, "prompt_tokens": 30, "completion_tokens": 12, "cached_tokens": 10}
    assert answer == {
        "month": "2026-01",
        "by": "tenant",
        "tenant": None,
        "lines": [{"name": "lab", **line, "gpu_seconds": 0.0}],
        "idle_gpu_seconds": 0.0,
        "gpu_seconds": 0.0,
    }
    december = (await rig.ask("GET", "/api/v1/usage?by=replica-set&month=2025-12&tenant=lab")).json()
    assert [(one["name"], one["requests"]) for one in december["lines"]] == [("a", 2)]
    for wrong in ("by=user", "month=2026-13", "month=9999-12", "month=", "tenant=%00", "since=1"):
        assert (await rig.ask("GET", f"/api/v1/usage?{wrong}")).status_code == 400, wrong
