"""What the proxy answers by itself: who may ask, which models there are, every refusal, and what operators look at."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import httpx
import pytest
from loguru import logger
from prometheus_client.parser import text_string_to_metric_families

from controlplane.clock import utc_now
from controlplane.db import Database, endpoints, replica_sets
from controlplane.proxy import WaitingOptions
from tests.integration.proxy_rig import (
    CHAT,
    MODEL,
    QUICK,
    Connection,
    Received,
    make_key,
    make_routable,
    make_scalable,
    opened,
    refusing_url,
    running_proxy,
    start_replica,
    until_status,
    upstream,
)


@pytest.fixture
async def db(shared_url: str) -> AsyncIterator[Database]:
    """One database for all: tests that change more than the endpoints of `MODEL` use models of their own."""
    async with opened(shared_url) as database:
        yield database


async def reply(request: Received, connection: Connection) -> None:
    await connection.answer(b"{}")


def refusal(response: httpx.Response) -> tuple[int, str | None, str, str | None]:
    """Status, code, type and param, from an answer of OpenAI's shape that names its request."""
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    return response.status_code, error["code"], error["type"], error["param"]


# --- keys ------------------------------------------------------------------------------------------------


async def test_without_a_good_key_the_answer_is_401_in_openais_words(db: Database) -> None:
    key = await make_key(db)
    async with running_proxy(db) as proxy:
        wrong: list[dict[str, str]] = [
            {},
            {"authorization": "Bearer sk-nobody"},
            {"authorization": f"Basic {key}"},
            {"authorization": key},
            {"authorization": "Bearer"},
            {"authorization": f"Bearer {key}x"},
            {"x-api-key": "sk-nobody"},
        ]
        for headers in wrong:
            del proxy.client.headers["authorization"]
            for response in (
                await proxy.client.get("/v1/models", headers=headers),
                await proxy.client.post(CHAT, content=b"not even json", headers=headers),
            ):
                assert refusal(response) == (401, "invalid_api_key", "invalid_request_error", None)
                assert response.headers["www-authenticate"] == "Bearer"
            proxy.client.headers["authorization"] = "Bearer sk-nobody"
        assert proxy.metric("proxy_requests_total", model="", tenant="", code="401") == 2 * len(wrong)


async def test_a_key_is_taken_as_bearer_in_any_case_and_as_x_api_key(db: Database) -> None:
    key = await make_key(db)
    async with running_proxy(db) as proxy:
        for headers in ({"authorization": f"bearer {key}"}, {"authorization": f"BEARER  {key}"}, {"x-api-key": key}):
            proxy.client.headers.pop("authorization", None)
            assert (await proxy.client.get("/v1/models", headers=headers)).status_code == 200


async def test_a_key_stops_working_the_moment_it_expires(db: Database) -> None:
    key = await make_key(db, lasts=timedelta(seconds=0.5))
    async with running_proxy(db, key=key) as proxy:
        assert (await proxy.models()).status_code == 200
        await until_status(proxy.models, 401)


# --- models ----------------------------------------------------------------------------------------------


async def test_models_are_listed_with_their_state_and_how_long_a_start_takes(db: Database) -> None:
    mine = ("Org/Served-Model", "asleep", "awaking", "resting", "measured")
    await make_routable(db, "http://127.0.0.1:1", model="Org/Served-Model")
    await make_scalable(db, "asleep")
    await start_replica(db, await make_scalable(db, "awaking"))
    await replica_sets.pause(db, await make_scalable(db, "resting"), actor="test", now=utc_now())
    await start_measured_replica(db, await make_scalable(db, "measured"), took=timedelta(seconds=45))
    async with running_proxy(db, key=await make_key(db, *mine)) as proxy:
        body = (await proxy.models()).json()
        one = (await proxy.client.get("/v1/models/Org/Served-Model")).json()
        missing = await proxy.client.get("/v1/models/none")
    assert body["object"] == "list"
    shown = {model.pop("id"): model for model in body["data"]}
    assert all(model["object"] == "model" and model["owned_by"] for model in shown.values())
    assert all(abs(model["created"] - utc_now().timestamp()) < 60 for model in shown.values())
    assert {name: model["state"] for name, model in shown.items()} == {
        "Org/Served-Model": "routable",
        "asleep": "scaled_to_zero",
        "awaking": "starting",
        "measured": "starting",
        "resting": "paused",
    }
    assert 35 <= shown["measured"]["start_estimate_seconds"] <= 45
    assert "start_estimate_seconds" not in shown["awaking"]
    assert one == {"id": "Org/Served-Model", **shown["Org/Served-Model"]}
    assert refusal(missing) == (404, "model_not_found", "invalid_request_error", "model")


async def start_measured_replica(db: Database, name: str, *, took: timedelta) -> None:
    """A replica that is starting again, of a set whose starts have been seen to take this long."""
    replica = await start_replica(db, name)
    await endpoints.ensure(db, replica, "http://127.0.0.1:2")
    async with db.connection() as connection:
        await connection.execute(
            "UPDATE endpoints SET first_ready_at = %s WHERE replica_id = %s", (replica.created_at + took, replica.id)
        )


async def test_a_key_sees_and_uses_only_its_models_and_a_forbidden_one_looks_like_an_unknown_one(db: Database) -> None:
    async with upstream(reply) as server:
        await make_routable(db, server.url, model="mine")
        await make_routable(db, server.url, model="theirs")
        async with running_proxy(db, key=await make_key(db, "mine")) as proxy:
            body = (await proxy.models()).json()
            assert [model["id"] for model in body["data"]] == ["mine"]
            assert (await proxy.chat(model="mine")).status_code == 200
            forbidden, unknown = await proxy.chat(model="theirs"), await proxy.chat(model="nobodys")
            assert (await proxy.client.get("/v1/models/theirs")).status_code == 404
            assert proxy.metric("proxy_requests_total", model="", tenant="tenant", code="404") == 3
    assert refusal(forbidden) == refusal(unknown) == (404, "model_not_found", "invalid_request_error", "model")
    assert forbidden.text.replace("theirs", "nobodys") == unknown.text
    assert len(server.requests) == 1


# --- requests that cannot be passed on -------------------------------------------------------------------


async def test_a_body_that_names_no_model_is_400_with_the_parameter_at_fault(db: Database) -> None:
    bodies = {
        "body": (
            b"",
            b"{",
            b'{"model": "tiny"',
            b'{"model": "\xff"}',
            b"[" * 100_000,
            b"9" * 5000,
            b'["tiny"]',
            b'"tiny"',
        ),
        "model": (b"{}", b'{"model": null}', b'{"model": ["tiny"]}', b'{"model": 1}', b'{"model": ""}'),
    }
    async with running_proxy(db, key=await make_key(db)) as proxy:
        for param, wrong in bodies.items():
            for body in wrong:
                answer = refusal(await proxy.client.post(CHAT, content=body))
                assert answer == (400, "invalid_request", "invalid_request_error", param), body[:32]


async def test_a_body_above_the_limit_is_413_whether_announced_or_not(db: Database) -> None:
    limit = 100_000

    async def in_pieces() -> AsyncIterator[bytes]:
        for _ in range(11):
            yield b"x" * (limit // 10)

    async with upstream(reply) as server:
        await make_routable(db, server.url)
        async with running_proxy(db, replace(QUICK, max_body_bytes=limit), key=await make_key(db)) as proxy:
            just_right = json.dumps({"model": MODEL}).encode().ljust(limit)
            assert (await proxy.client.post(CHAT, content=just_right)).status_code == 200
            for content in (just_right + b" ", in_pieces()):
                answer = refusal(await proxy.client.post(CHAT, content=content))
                assert answer == (413, "request_too_large", "invalid_request_error", None)
    assert [len(request.body) for request in server.requests] == [limit]


async def test_unknown_routes_and_wrong_methods_are_refused_in_openais_shape(db: Database) -> None:
    async with running_proxy(db, key=await make_key(db)) as proxy:
        for path in ("/v1/nothing", "/v1/models/", "/", "/v1"):
            assert refusal(await proxy.client.get(path))[:2] == (404, None)
        wrong = await proxy.client.get(CHAT)
        assert refusal(wrong)[0] == 405
        assert wrong.headers["allow"] == "POST"
        assert refusal(await proxy.client.post("/v1/models"))[0] == 405


# --- models that nobody serves just now ------------------------------------------------------------------


async def test_a_model_without_a_ready_replica_is_503_with_a_retry_after_from_the_estimate(db: Database) -> None:
    await make_scalable(db, "napping")
    await start_measured_replica(db, await make_scalable(db, "timed"), took=timedelta(seconds=45))
    options = replace(QUICK, waiting=WaitingOptions(hold_seconds_without_stream=0.1))
    async with running_proxy(db, options, key=await make_key(db)) as proxy:
        asleep, measured = await proxy.chat(model="napping"), await proxy.chat(model="timed")
    for response in (asleep, measured):
        assert refusal(response) == (503, "model_starting", "service_unavailable_error", None)
        assert "x-should-retry" not in response.headers
    assert asleep.headers["retry-after"] == "30"
    assert 35 <= int(measured.headers["retry-after"]) <= 45


async def test_a_paused_model_says_when_to_retry_only_if_its_pause_ends_soon(db: Database) -> None:
    now = utc_now()
    for name, until in (("open", None), ("long", timedelta(hours=1)), ("short", timedelta(seconds=40))):
        replica_set = await make_scalable(db, name)
        await replica_sets.pause(db, replica_set, actor="test", now=now, until=now + until if until else None)
    async with running_proxy(db, key=await make_key(db)) as proxy:
        answers = {name: await proxy.chat(model=name) for name in ("open", "long", "short")}
    for response in answers.values():
        assert refusal(response) == (503, "model_paused", "service_unavailable_error", None)
    for name in ("open", "long"):
        assert answers[name].headers["x-should-retry"] == "false"
        assert "retry-after" not in answers[name].headers
    assert 30 <= int(answers["short"].headers["retry-after"]) <= 40
    assert "x-should-retry" not in answers["short"].headers


async def test_a_paused_external_model_is_not_routed_although_its_server_is_well(db: Database) -> None:
    async with upstream(reply) as server:
        name = await make_routable(db, server.url, model="well")
        await replica_sets.pause(db, name, actor="test", now=utc_now())
        async with running_proxy(db, key=await make_key(db)) as proxy:
            assert refusal(await proxy.chat(model="well"))[:2] == (503, "model_paused")
    assert server.requests == []


# --- operators -------------------------------------------------------------------------------------------


async def test_health_ready_and_metrics_need_no_key(db: Database) -> None:
    async with upstream(reply) as server:
        await make_routable(db, server.url)
        async with running_proxy(db, key=await make_key(db)) as proxy:
            await proxy.chat()
            async with httpx.AsyncClient(base_url=proxy.url, trust_env=False) as anybody:
                assert (await anybody.get("/health")).json() == {"status": "ok"}
                assert (await anybody.get("/ready")).json() == {"status": "ready"}
                assert (await anybody.head("/health")).status_code == 200
                text = (await anybody.get("/metrics")).text
    families = {family.name for family in text_string_to_metric_families(text)}
    assert families >= {"proxy_requests", "proxy_request_seconds", "proxy_in_flight", "proxy_directory_age_seconds"}


async def test_the_log_has_one_line_for_a_failed_request_with_neither_prompt_nor_key(db: Database) -> None:
    lines: list[str] = []
    key = await make_key(db)
    sink = logger.add(lambda message: lines.append(f"{message} {message.record['extra']}"), level="INFO")
    try:
        with refusing_url() as dead:
            async with upstream(reply) as server:
                await make_routable(db, dead, model="dead")
                await make_routable(db, server.url)
                async with running_proxy(db, key=key) as proxy:
                    secret = {"messages": [{"role": "user", "content": "a-secret-prompt"}]}
                    assert (await proxy.chat(**secret)).status_code == 200
                    assert (await proxy.chat(model="dead", **secret)).status_code == 502
                    assert (await proxy.chat(model="unknown", **secret)).status_code == 404
    finally:
        logger.remove(sink)
    failed = [line for line in lines if "request failed" in line]
    assert len(failed) == 2
    assert "'status': 502" in failed[0]
    assert dead in failed[0]
    assert "'status': 404" in failed[1]
    assert key not in "".join(lines)
    assert "a-secret-prompt" not in "".join(lines)
