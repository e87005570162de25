"""Webhooks from the wire to PostgreSQL: who is let in, what is stored, and what each delivery is answered."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from controlplane.core.types import AlertAction
from controlplane.db import Database, DatabaseOptions
from controlplane.web import WebhookCredentials
from tests.conftest import eventually
from tests.integration.db_rows import make_set, opened
from tests.integration.webhook_rig import BEARER, FIXTURES, SIGNED_AT, TOKEN, Rig, fixture, forget_everything, ours

SIGNATURE, TIMESTAMP = "X-Grafana-Alerting-Signature", "X-Grafana-Alerting-Timestamp"
LIMIT = 4 * 1024 * 1024


@pytest.fixture
async def rig(shared_url: str) -> AsyncIterator[Rig]:
    async with opened(shared_url) as db:
        await forget_everything(db)
        yield Rig(db)


def basic(pair: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(pair.encode()).decode()}


# --- what is stored and answered ----------------------------------------------------------------------------


async def test_an_alert_that_may_act_is_stored_with_its_action_and_counted(rig: Rig) -> None:
    await make_set(rig.db, model="qwen3-8b")
    answer = await rig.post(ours(step="2"))
    assert answer.status_code == 202
    assert answer.json() == {"accepted": 1, "duplicates": 0, "ignored": 0, "ignored_reasons": {}, "truncated": 0}
    alert = (await rig.stored())["f67ccfbef6174272"]
    assert alert.key == "grafana/1/f67ccfbef6174272"
    assert (alert.is_firing, alert.action, alert.step) == (True, AlertAction.SCALE_UP, 2)
    assert (alert.starts_at, alert.ends_at) == (datetime(2026, 11, 22, 9, 51, 20, tzinfo=UTC), None)
    assert (alert.refreshed_at, alert.values) == (rig.now, {"A": 30, "B": 30, "C": 1})
    assert rig.counted("accepted") == 1


async def test_a_repeat_is_a_duplicate_and_refreshes(rig: Rig) -> None:
    await make_set(rig.db, model="qwen3-8b")
    await rig.post(ours("grafana-firing"))
    rig.now += timedelta(minutes=1)
    answer = await rig.post(ours("grafana-repeated"))
    assert (answer.status_code, answer.json()["accepted"], answer.json()["duplicates"]) == (202, 0, 1)
    assert (await rig.stored())["f67ccfbef6174272"].refreshed_at == rig.now


async def test_a_resolved_ends_the_alert_whichever_of_the_two_came_first(rig: Rig) -> None:
    await make_set(rig.db, model="qwen3-8b")
    for name in ("grafana-resolved", "grafana-firing", "grafana-resolved"):
        assert (await rig.post(ours(name))).status_code == 202
    alert = (await rig.stored())["f67ccfbef6174272"]
    assert not alert.is_firing
    assert alert.ends_at is not None


@pytest.mark.parametrize("name", sorted(file.stem for file in FIXTURES.glob("grafana-*.json") if "." not in file.stem))
async def test_every_recorded_body_of_grafana_is_stored_except_a_payload_of_its_owners_making(
    rig: Rig, name: str
) -> None:
    body = fixture(name)
    answer = await rig.post(body)
    if name == "grafana-custom-payload":
        assert (answer.status_code, answer.json()["error"]["field"]) == (400, "version")
        return
    assert answer.status_code == 202
    assert set(await rig.stored()) == {alert["fingerprint"] for alert in body["alerts"]}
    assert answer.json()["ignored"] == len(body["alerts"])  # none names us as its owner


@pytest.mark.parametrize("name", ["firing", "repeated", "resolved", "group-mixed", "xid-firing"])
async def test_every_recorded_body_of_alertmanager_is_stored_under_organization_zero(rig: Rig, name: str) -> None:
    body = fixture(f"alertmanager-{name}")
    headers = fixture(f"alertmanager-{name}.headers")
    answer = await rig.post(body, {"Authorization": headers["Authorization"]}, source="alertmanager")
    assert answer.status_code == 202
    found = await rig.stored()
    for alert in body["alerts"]:
        one = found[alert["fingerprint"]]
        assert (one.source, one.org_id) == ("alertmanager", 0)
        assert (one.is_firing, one.ends_at is None) == (alert["status"] == "firing",) * 2


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("grafana-test-notification", "test_alert"),
        ("grafana-nodata", "datasource_no_data"),
        ("grafana-error", "datasource_error"),
        ("grafana-error-as-alerting", "state_reason"),
        ("grafana-nodata-as-alerting", "state_reason"),
        ("grafana-resolved-missing-series", "state_reason"),
        ("grafana-resolved-rule-paused", "state_reason"),
    ],
)
async def test_blindness_never_acts_although_it_carries_the_rules_labels(rig: Rig, name: str, reason: str) -> None:
    await make_set(rig.db, model="qwen3-8b")
    body = ours(name)
    answer = await rig.post(body)
    assert (answer.status_code, answer.json()["accepted"]) == (202, 0)
    assert answer.json()["ignored_reasons"] == {reason: len(body["alerts"])}
    assert {alert.action for alert in (await rig.stored()).values()} == {None}
    assert rig.counted("ignored") == len(body["alerts"])


async def test_an_alert_for_an_unknown_model_acts_when_it_comes_again_and_the_model_is_there(rig: Rig) -> None:
    assert (await rig.post(ours())).json()["ignored_reasons"] == {"unknown_model": 1}
    await make_set(rig.db, model="qwen3-8b")
    assert (await rig.post(ours())).json()["duplicates"] == 1
    assert (await rig.stored())["f67ccfbef6174272"].action is AlertAction.SCALE_UP


async def test_a_replacement_and_a_node_drain_are_stored_as_such(rig: Rig) -> None:
    await make_set(rig.db, "qwen", model="qwen3-8b")
    await rig.post(ours(fingerprint="r", action="replace", replica="cp-qwen-7"))
    await rig.post(ours("grafana-xid-firing", fingerprint="n", action="drain_node", node="gpu01"))
    found = await rig.stored()
    assert (found["r"].action, found["n"].action) == (AlertAction.REPLACE, AlertAction.DRAIN_NODE)


async def test_what_the_sender_left_out_is_counted_and_told(rig: Rig) -> None:
    answer = await rig.post(fixture("grafana-truncated-max-alerts-1"))
    assert answer.json()["truncated"] == 2
    assert rig.counted("truncated") == 2


async def test_times_are_read_to_the_microsecond_in_any_zone(rig: Rig) -> None:
    body = fixture("grafana-resolved")
    body["alerts"][0] |= {"startsAt": "2026-11-22T11:21:20.123456789+01:30", "endsAt": "2026-11-22T09:55:00Z"}
    await rig.post(body)
    (alert,) = (await rig.stored()).values()
    assert alert.starts_at == datetime(2026, 11, 22, 9, 51, 20, 123456, tzinfo=UTC)


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ("null", {}),
        ('{"A": null, "B": 2}', {"B": 2}),
        ('{"A": NaN, "B": Infinity, "C": -1e999, "D": -1}', {"D": -1}),
        ('{"A": 1' + "0" * 400 + "}", {}),
    ],
)
async def test_values_may_be_missing_or_no_number_at_all(rig: Rig, values: str, kept: dict[str, float]) -> None:
    body = fixture("grafana-firing")
    body["alerts"][0]["values"] = "VALUES"
    assert (await rig.post(json.dumps(body).replace('"VALUES"', values).encode())).status_code == 202
    (alert,) = (await rig.stored()).values()
    assert alert.values == kept


async def test_what_postgresql_cannot_hold_is_replaced_and_the_alert_is_kept(rig: Rig) -> None:
    body = fixture("grafana-firing")
    body["alerts"][0]["annotations"]["summary"] = "a\0b\ud800c\U0001f600"
    assert (await rig.post(body)).status_code == 202
    (alert,) = (await rig.stored()).values()
    assert alert.annotations["summary"] == "a\ufffdb\ufffdc\U0001f600"


async def test_unknown_keys_and_missing_optional_ones_do_not_matter(rig: Rig) -> None:
    body = fixture("grafana-v11.6-firing")
    alert = body["alerts"][0]
    body = {"version": "1", "orgId": 1, "news": {"a": []}, "alerts": [{**alert, "news": 1, "annotations": None}]}
    del body["alerts"][0]["values"]
    assert (await rig.post(body)).status_code == 202


async def test_a_group_of_no_alerts_is_fine(rig: Rig) -> None:
    answer = await rig.post({"version": "4", "alerts": []}, source="alertmanager")
    assert (answer.status_code, answer.json()["accepted"]) == (202, 0)


async def test_the_answer_waits_for_the_commit(rig: Rig) -> None:
    """While PostgreSQL cannot commit there is no 202; when there is, another connection sees the row."""
    body = ours()
    async with rig.db.transaction() as blocker:
        await blocker.execute("LOCK TABLE alerts IN EXCLUSIVE MODE")
        posting = asyncio.create_task(rig.post(body))

        async def is_waiting() -> bool:
            async with rig.db.connection() as connection:
                cursor = await connection.execute("SELECT FROM pg_locks WHERE NOT granted")
                return await cursor.fetchone() is not None

        is_blocked: bool = await eventually(is_waiting)
        assert is_blocked
        assert not posting.done()
    assert (await posting).status_code == 202
    assert list(await rig.stored()) == ["f67ccfbef6174272"]


async def test_an_answer_lost_and_a_delivery_repeated_store_one_alert(rig: Rig) -> None:
    await make_set(rig.db, model="qwen3-8b")
    answers = await asyncio.gather(*(rig.post(ours()) for _ in range(6)))
    assert sorted(answer.json()["accepted"] for answer in answers) == [0, 0, 0, 0, 0, 1]


# --- what is refused ------------------------------------------------------------------------------------------


def at(path: str, value: Any) -> dict[str, Any]:
    """The recorded body with one thing changed; `...` takes it away."""
    body = fixture("grafana-group-mixed")
    *parents, last = path.replace("[", ".").replace("]", "").split(".")
    node: Any = body
    for part in parents:
        node = node[int(part)] if part.isdigit() else node[part]
    if value is ...:
        del node[last]
    else:
        node[int(last) if last.isdigit() else last] = value
    return body


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("version", "4"),
        ("version", 1),
        ("version", ...),
        ("alerts", ...),
        ("alerts", {}),
        ("truncatedAlerts", "many"),
        ("truncatedAlerts", -1),
        ("alerts[1]", "x"),
        ("alerts[1].fingerprint", ...),
        ("alerts[1].fingerprint", ""),
        ("alerts[1].fingerprint", "f" * 3000),
        ("alerts[1].status", "pending"),
        ("alerts[1].startsAt", ...),
        ("alerts[1].startsAt", 5),
        ("alerts[1].startsAt", "yesterday"),
        ("alerts[1].startsAt", "0001-01-01T00:00:00Z"),
        ("alerts[1].labels", []),
        ("alerts[1].labels.model", 5),
        ("alerts[1].values", [1]),
        ("alerts[1].values.A", "1"),
    ],
)
async def test_a_wrong_shape_is_refused_whole_with_the_field_at_fault(rig: Rig, path: str, value: Any) -> None:
    answer = await rig.post(at(path, value))
    assert (answer.status_code, answer.json()["error"]["field"]) == (400, path)
    assert answer.json()["error"]["message"].startswith(path)
    assert await rig.stored() == {}
    assert rig.counted("malformed") == 1


async def test_a_resolved_without_its_end_and_an_alert_without_organization_are_refused(rig: Rig) -> None:
    for end in (None, "0001-01-01T00:00:00Z"):
        body = fixture("grafana-resolved")
        body["alerts"][0]["endsAt"] = end
        assert (await rig.post(body)).json()["error"]["field"] == "alerts[0].endsAt"
    body = fixture("grafana-firing") | {"orgId": 2**70}
    del body["alerts"][0]["orgId"]
    assert (await rig.post(body)).json()["error"]["field"] == "orgId"


async def test_a_body_on_the_wrong_path_says_where_it_belongs(rig: Rig) -> None:
    answer = await rig.post(fixture("alertmanager-firing"))
    assert "/webhooks/alertmanager" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff\xff", b"[1]", b'"x"', b"[" * 100_000, b'{"a": 1' + b"0" * 5000 + b"}"]
)
async def test_what_is_not_a_json_object_is_refused(rig: Rig, body: bytes) -> None:
    answer = await rig.post(body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


async def test_a_body_of_the_limit_is_read_and_one_byte_more_is_not_chunked_or_whole(rig: Rig) -> None:
    body = json.dumps({"version": "1", "orgId": 1, "alerts": []}).encode()
    fits, too_large = body.ljust(LIMIT), body.ljust(LIMIT + 1)

    async def chunks(content: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(content), 65536):
            yield content[start : start + 65536]

    assert (await rig.post(fits)).status_code == 202
    assert (await rig.post(chunks(fits))).status_code == 202
    for refused in (await rig.post(too_large), await rig.post(chunks(too_large))):
        assert refused.status_code == 413
        assert refused.json()["error"]["message"]
    assert rig.counted("too_large") == 2


async def test_a_lying_content_length_is_refused_before_the_body_is_read(rig: Rig) -> None:
    answer = await rig.post(b"{}", {**BEARER, "Content-Length": str(LIMIT + 1)})
    assert answer.status_code == 413


async def test_without_postgresql_the_answer_is_503_and_says_no_more_than_that(free_port: int) -> None:
    url = f"postgresql://user:password@127.0.0.1:{free_port}/x"
    async with Database(DatabaseOptions(url=url, timeout_seconds=0.2)) as db:
        rig = Rig(db)
        answer = await rig.post(fixture("grafana-firing"))
        assert answer.status_code == 503
        assert "password" not in answer.text
        assert rig.counted("unavailable") == 1


@pytest.mark.parametrize("path", ["/webhooks/grafana/", "/webhooks//grafana", "/webhooks/pager"])
async def test_nothing_is_ever_redirected(rig: Rig, path: str) -> None:
    assert (await rig.post(fixture("grafana-firing"), path=path)).status_code == 404


# --- who is let in --------------------------------------------------------------------------------------------

RAW = (FIXTURES / "grafana-firing.raw").read_bytes()
SIGNED = {SIGNATURE: fixture("grafana-firing.headers")[SIGNATURE]}
SIGNED_WITH_TIME = {name: fixture("grafana-firing-timestamp.headers")[name] for name in (SIGNATURE, TIMESTAMP)}
HMAC = WebhookCredentials(hmac_secrets=("new-secret", "test-secret"))
TIMED = WebhookCredentials(hmac_secrets=("new-secret", "test-secret"), hmac_timestamp_header=TIMESTAMP)
BOTH = WebhookCredentials(bearer_tokens=("test-token",), hmac_secrets=("test-secret",))
BASIC = WebhookCredentials(basic_credentials=("old:pass:word", "grafana:pässword"))
WRONG = {SIGNATURE: "0" * 64}


def signed(seconds: str, body: bytes = RAW, secret: str = "test-secret") -> dict[str, str]:
    digest = hmac.new(secret.encode(), seconds.encode() + b":" + body, hashlib.sha256).hexdigest()
    return {SIGNATURE: digest, TIMESTAMP: seconds}


@pytest.mark.parametrize(
    ("credentials", "headers"),
    [
        (WebhookCredentials(bearer_tokens=("a", "test-token")), BEARER),
        (TOKEN, {"Authorization": "bearer  test-token "}),
        (BASIC, basic("grafana:pässword")),
        (BASIC, basic("old:pass:word")),
        (HMAC, SIGNED),
        (WebhookCredentials(hmac_secrets=("test-secret",), hmac_header="X-Mine"), {"x-mine": SIGNED[SIGNATURE]}),
        (TIMED, SIGNED_WITH_TIME),
        (BOTH, BEARER),
        (BOTH, SIGNED),
        (BOTH, BEARER | SIGNED),
        (BOTH, SIGNED | basic("somebody:between")),
        (TOKEN, BEARER | WRONG),
    ],
)
async def test_a_right_credential_of_a_configured_kind_is_enough(
    rig: Rig, credentials: WebhookCredentials, headers: dict[str, str]
) -> None:
    rig.credentials = credentials
    assert (await rig.post(RAW, headers)).status_code == 202


@pytest.mark.parametrize(
    ("credentials", "headers"),
    [
        (WebhookCredentials(), BEARER | SIGNED),
        (BOTH, {}),
        (BOTH, {"Authorization": "Bearer wrong"}),
        (BOTH, {"Authorization": "Bearer"}),
        (BOTH, {"Authorization": "Bearer tést-token"}),
        (BOTH, BEARER | WRONG),
        (BOTH, {"Authorization": "Bearer wrong"} | SIGNED),
        (BOTH, basic("grafana:password")),
        (BASIC, basic("grafana:wrong")),
        (BASIC, {"Authorization": "Basic %%%"}),
        (BASIC, {"Authorization": "Basic"}),
        (HMAC, WRONG),
        (HMAC, {SIGNATURE: ""}),
        (HMAC, {SIGNATURE: SIGNED[SIGNATURE].upper()}),
        (HMAC, SIGNED_WITH_TIME),
        (TIMED, SIGNED),
        (TIMED, {SIGNATURE: SIGNED_WITH_TIME[SIGNATURE]}),
        (TIMED, SIGNED_WITH_TIME | {TIMESTAMP: "1795341084"}),
        (TIMED, signed("1795341083", secret="wrong")),
        (TIMED, signed("1795341083.5")),
        (TIMED, signed("9" * 40)),
        (TIMED, signed("\u0661")),
    ],
)
async def test_everybody_else_is_refused_and_leaves_no_row(
    rig: Rig, credentials: WebhookCredentials, headers: dict[str, str]
) -> None:
    rig.credentials = credentials
    raw_headers = {name: value.encode() for name, value in headers.items()}
    answer = await rig.post(RAW, raw_headers)  # type: ignore[arg-type]
    assert answer.status_code == 401
    assert "WWW-Authenticate" in answer.headers
    assert "test-" not in answer.text
    assert await rig.stored() == {}
    assert rig.counted("unauthorized") == 1


async def test_a_body_changed_by_one_space_is_not_the_one_that_was_signed(rig: Rig) -> None:
    rig.credentials = HMAC
    assert (await rig.post(RAW + b" ", SIGNED)).status_code == 401


@pytest.mark.parametrize(("minutes", "status"), [(-5, 202), (5, 202), (-5.1, 401), (5.1, 401)])
async def test_a_signature_is_good_for_five_minutes_either_way(rig: Rig, minutes: float, status: int) -> None:
    rig.credentials = TIMED
    rig.now = SIGNED_AT + timedelta(minutes=minutes)
    assert (await rig.post(RAW, SIGNED_WITH_TIME)).status_code == status


async def test_a_replayed_signature_is_refused_for_as_long_as_it_would_be_good(rig: Rig) -> None:
    rig.credentials = TIMED
    rig.now = SIGNED_AT - timedelta(minutes=5)
    assert (await rig.post(RAW, SIGNED_WITH_TIME)).status_code == 202
    rig.now = SIGNED_AT + timedelta(minutes=5)
    answer = await rig.post(RAW, SIGNED_WITH_TIME)
    assert (answer.status_code, rig.counted("unauthorized")) == (401, 1)
    assert "used before" in answer.json()["error"]["message"]
    assert (await rig.stored())["f67ccfbef6174272"].refreshed_at == SIGNED_AT - timedelta(minutes=5)
    assert (await rig.post(RAW, signed(str(1795341083 + 1)))).status_code == 202  # the same body, signed anew


async def test_of_a_signature_sent_twice_at_once_one_is_let_in(rig: Rig) -> None:
    rig.credentials = TIMED
    answers = await asyncio.gather(*(rig.post(RAW, SIGNED_WITH_TIME) for _ in range(5)))
    assert sorted(answer.status_code for answer in answers) == [202, 401, 401, 401, 401]


async def test_a_malformed_delivery_does_not_use_up_its_signature(rig: Rig) -> None:
    rig.credentials = TIMED
    headers = signed("1795341083", b"{")
    for _ in range(2):
        assert (await rig.post(b"{", headers)).status_code == 400


async def test_without_a_signed_time_a_repeat_is_a_repeat_and_no_replay(rig: Rig) -> None:
    rig.credentials = HMAC
    for _ in range(2):
        assert (await rig.post(RAW, SIGNED)).status_code == 202


def test_credentials_are_never_shown_and_never_empty() -> None:
    assert "secret" not in repr(WebhookCredentials(hmac_secrets=("secret-x",), bearer_tokens=("secret-y",))).replace(
        "hmac_secrets", ""
    )
    with pytest.raises(ValueError, match="empty secret"):
        WebhookCredentials(bearer_tokens=("",))


async def test_the_recorded_signature_with_a_time_is_refused_a_day_later_and_a_day_before(rig: Rig) -> None:
    rig.credentials = TIMED
    for days in (-1, 1):
        rig.now = SIGNED_AT + timedelta(days=days)
        answer = await rig.post(RAW, SIGNED_WITH_TIME)
        assert answer.status_code == 401
        assert "compare the clocks" in answer.json()["error"]["message"]
    assert await rig.stored() == {}


async def test_a_replay_is_refused_by_every_control_plane_and_after_a_restart(rig: Rig) -> None:
    rig.credentials = TIMED
    assert (await rig.post(RAW, SIGNED_WITH_TIME)).status_code == 202
    again = Rig(rig.db, credentials=TIMED)
    assert (await again.post(RAW, SIGNED_WITH_TIME)).status_code == 401


async def test_of_one_signature_sent_many_times_at_once_one_is_good(rig: Rig) -> None:
    rig.credentials = TIMED
    answers = await asyncio.gather(*(rig.post(RAW, SIGNED_WITH_TIME) for _ in range(20)))
    assert sorted(answer.status_code for answer in answers) == [202, *[401] * 19]


async def test_without_a_time_the_same_signature_is_a_repeat_as_every_repeat_is(rig: Rig) -> None:
    rig.credentials = HMAC
    assert [(await rig.post(RAW, SIGNED)).status_code for _ in range(3)] == [202, 202, 202]
    assert rig.counted("duplicates") == 2


async def test_secrets_rotate_without_a_gap_and_the_old_one_is_refused_when_it_is_removed(rig: Rig) -> None:
    def secrets(*names: str) -> WebhookCredentials:
        return WebhookCredentials(hmac_secrets=names, hmac_timestamp_header=TIMESTAMP)

    async def tried(secret: str, at: int) -> int:
        return (await rig.post(RAW, signed(str(1795341083 + at), secret=secret))).status_code

    rig.credentials = secrets("old")
    assert (await tried("old", 0), await tried("new", 1)) == (202, 401)
    rig.credentials = secrets("new", "old")
    assert (await tried("old", 2), await tried("new", 3)) == (202, 202)
    rig.credentials = secrets("new")
    assert (await tried("old", 4), await tried("new", 5)) == (401, 202)


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "application/json; charset=utf-16", ""]
)
async def test_the_body_counts_and_not_what_it_is_said_to_be(rig: Rig, kind: str) -> None:
    assert (await rig.post(fixture("grafana-firing"), {**BEARER, "Content-Type": kind})).status_code == 202
    refused = await rig.post(b"payload=%7B%7D", {**BEARER, "Content-Type": kind})
    assert (refused.status_code, refused.json()["error"]["message"]) == (400, "the body is not JSON")


async def test_a_payload_of_its_owners_making_is_told_to_use_the_default_one(rig: Rig) -> None:
    answer = await rig.post(fixture("grafana-custom-payload"))
    assert (answer.status_code, answer.json()["error"]["field"]) == (400, "version")
    assert "use the default payload" in answer.json()["error"]["message"]


async def test_a_group_of_thousands_of_alerts_is_stored_whole(rig: Rig) -> None:
    await make_set(rig.db, model="qwen3-8b")
    body = ours()
    body["alerts"] = [{**body["alerts"][0], "fingerprint": f"{n:016x}"} for n in range(2500)]
    assert len(json.dumps(body)) < LIMIT
    answer = await rig.post(body)
    assert (answer.status_code, answer.json()["accepted"]) == (202, 2500)
    assert len(await rig.stored()) == 2500
