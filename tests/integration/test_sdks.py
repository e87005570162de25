"""OpenAI's Python and JavaScript SDKs against the proxy: the right result, or the right exception for every refusal."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import httpx
import pytest
import pytest_asyncio

from controlplane.clock import utc_now
from controlplane.db import Database, keys, replica_sets, tenants
from controlplane.proxy import WaitingOptions
from tests.integration.proxy_rig import (
    CHAT,
    MODEL,
    QUICK,
    Connection,
    Received,
    Running,
    make_key,
    make_routable,
    make_scalable,
    opened,
    refusing_url,
    running_proxy,
    until_status,
    upstream,
)
from tests.integration.sdks import PythonSdk, Question, Raised, Sdk, running_js

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    # OpenAI has deprecated its own route for translations; vLLM serves it
    pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning"),
]

# then what starts is given up, and what queues
WAITS = WaitingOptions(hold_seconds=0.3, hold_seconds_without_stream=0.3, queue_seconds=0.3)
OPTIONS = replace(QUICK, max_body_bytes=20_000, first_byte_timeout_seconds=0.5, waiting=WAITS)
LONG = "x" * 30_000
MODELS = (MODEL, "asleep", "resting", "briefly", "dead", "late", "breaks", "strict", "busy", "crowded", "nobodys")
"""What the good key may use; `secret` it may not."""

TEXT_CALLS = ("chat", "completion", "embedding", "response")
AUDIO_CALLS = ("transcription", "translation")
CALLS = [*TEXT_CALLS, *AUDIO_CALLS]
STREAMS = ("chat", "completion", "response")


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table of errors: what is asked for, and what a client is told."""

    model: str
    status: int
    code: str
    kind: str
    type: str = "invalid_request_error"
    param: str | None = None
    key: str | None = None  # or the tenant whose key it is
    text: str = "hello"


ROWS = {
    "bad key": Row(MODEL, 401, "invalid_api_key", "AuthenticationError", key="sk-nobody"),
    "unknown model": Row("nobodys", 404, "model_not_found", "NotFoundError", param="model"),
    "not allowed": Row("secret", 404, "model_not_found", "NotFoundError", param="model"),
    "no model": Row("", 400, "invalid_request", "BadRequestError", param="model"),
    "too large": Row(MODEL, 413, "request_too_large", "APIError", text=LONG),
    "starting": Row("asleep", 503, "model_starting", "InternalServerError", type="service_unavailable_error"),
    "paused": Row("resting", 503, "model_paused", "InternalServerError", type="service_unavailable_error"),
    "not reached": Row("dead", 502, "upstream_error", "InternalServerError", type="server_error"),
    "too late": Row("late", 504, "upstream_timeout", "InternalServerError", type="server_error"),
    "refused by the engine": Row("strict", 400, "of_the_engine", "BadRequestError", type="BadRequestError", param="x"),
    "limited": Row("busy", 429, "rate_limit_exceeded", "RateLimitError", type="rate_limit_error"),
    "of a limited tenant": Row(
        MODEL, 429, "rate_limit_exceeded", "RateLimitError", type="rate_limit_error", key="limited"
    ),
    "of a tenant that used all": Row(
        MODEL, 429, "insufficient_quota", "RateLimitError", type="insufficient_quota", key="spent"
    ),
    "queue full": Row("crowded", 429, "queue_full", "RateLimitError", type="rate_limit_error"),
}

ANSWERS = {
    "/v1/chat/completions": '{"id":"c","object":"chat.completion","created":1,"model":"tiny","choices":[{"index":0,'
    '"finish_reason":"stop","message":{"role":"assistant","content":"hi"}}]}',
    "/v1/completions": '{"id":"c","object":"text_completion","created":1,"model":"tiny","choices":[{"index":0,'
    '"finish_reason":"stop","text":"hi","logprobs":null}]}',
    # both SDKs ask for base64
    "/v1/embeddings": '{"object":"list","model":"tiny","data":[{"object":"embedding","index":0,'
    '"embedding":"AAAAPw=="}],'
    '"usage":{"prompt_tokens":1,"total_tokens":1}}',
    "/v1/responses": '{"id":"r","object":"response","created_at":1,"model":"tiny","output":[],"status":"completed",'
    '"parallel_tool_calls":true,"tool_choice":"auto","tools":[]}',
    "/v1/audio/transcriptions": '{"text":"hi"}',
    "/v1/audio/translations": '{"text":"hi"}',
}
EVENTS = {
    "/v1/chat/completions": '{"id":"c","object":"chat.completion.chunk","created":1,"model":"tiny","choices":['
    '{"index":0,"delta":{"content":"hi"},"finish_reason":null}]}',
    "/v1/completions": '{"id":"c","object":"text_completion","created":1,"model":"tiny","choices":[{"index":0,'
    '"text":"hi","finish_reason":null,"logprobs":null}]}',
    "/v1/responses": '{"type":"response.output_text.delta","sequence_number":1,"item_id":"i","output_index":0,'
    '"content_index":0,"delta":"hi","logprobs":[]}',
}


async def engine(request: Received, connection: Connection) -> None:
    path = request.line.split(" ")[1]
    if b'"stream":true' not in request.body.replace(b" ", b""):
        await connection.answer(ANSWERS[path].encode())
        return
    await connection.begin_stream()
    await connection.event(EVENTS[path])
    if path != "/v1/responses":
        await connection.event("[DONE]")
    await connection.end_stream()


async def breaks(request: Received, connection: Connection) -> None:
    await connection.begin_stream()
    await connection.event(EVENTS[request.line.split(" ")[1]])
    connection.close()


async def hang(request: Received, connection: Connection) -> None:
    await connection.closed_by_the_proxy()


async def endless(request: Received, connection: Connection) -> None:
    await connection.begin_stream()
    await connection.event(EVENTS["/v1/chat/completions"])
    await connection.closed_by_the_proxy()


async def strict(request: Received, connection: Connection) -> None:
    body = b'{"error":{"message":"m","type":"BadRequestError","param":"x","code":"of_the_engine"}}'
    await connection.answer(body, status="400 Bad Request")


async def busy(request: Received, connection: Connection) -> None:
    """As the proxy itself says it of a tenant that asks too often."""
    body = b'{"error":{"message":"m","type":"rate_limit_error","param":null,"code":"rate_limit_exceeded"}}'
    head = f"HTTP/1.1 429 Too Many Requests\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    await connection.send(f"{head}retry-after: 1\r\n\r\n".encode() + body)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def db(shared_url: str) -> AsyncIterator[Database]:
    async with opened(shared_url) as database:
        yield database


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def proxy(db: Database) -> AsyncIterator[Running]:
    """A model for every row."""
    await make_scalable(db, "asleep")
    await replica_sets.pause(db, await make_scalable(db, "resting"), actor="test", now=utc_now())
    async with (
        upstream(engine) as good,
        upstream(hang) as late,
        upstream(breaks) as broken,
        upstream(strict) as stern,
        upstream(busy) as full,
        upstream(endless) as crowd,
    ):
        urls = {MODEL: good, "late": late, "breaks": broken, "strict": stern, "busy": full, "secret": good}
        for model, server in urls.items():
            await make_routable(db, server.url, model=model)
        with refusing_url() as dead:
            await make_routable(db, dead, model="dead")
            await make_routable(db, crowd.url, model="crowded", max_in_flight=1)
            await make_tenants(db)
            async with (
                running_proxy(db, OPTIONS, key=await make_key(db, *MODELS)) as running,
                reached(running),
            ):
                yield running


KEYS: dict[str, str] = {}
"""Of the tenants that are at a limit, by name."""


async def make_tenants(db: Database) -> None:
    now = utc_now()
    for name in ("limited", "spent"):
        KEYS[name], _ = await keys.create(db, name, models=None, expires_at=None, actor="test", now=now)
    await tenants.set_limits(db, "limited", {"max_concurrent": 1}, actor="test", now=now)
    await tenants.set_limits(db, "spent", {"monthly_tokens": 1}, actor="test", now=now)
    async with db.connection() as connection:
        await connection.execute(
            "INSERT INTO tenant_months (tenant, month, tokens) VALUES ('spent', %s, 2)", (now.date().replace(day=1),)
        )


@asynccontextmanager
async def reached(proxy: Running) -> AsyncIterator[None]:
    """Every limit is reached: by streams that do not end, and by what the month has cost."""
    body = {"model": "crowded", "messages": [], "stream": True}
    async with AsyncExitStack() as streams:
        for key in (KEYS["limited"], proxy.key, proxy.key):  # there is a seat in reserve for another tenant
            headers = {"authorization": f"Bearer {key}"}
            await streams.enter_async_context(proxy.client.stream("POST", CHAT, json=body, headers=headers))

        async def ask() -> httpx.Response:
            headers = {"authorization": f"Bearer {KEYS['spent']}"}
            return await proxy.client.post(CHAT, json={"model": MODEL, "messages": []}, headers=headers)

        await until_status(ask, 429)
        yield


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["Python", "JavaScript"])
async def sdk(request: pytest.FixtureRequest) -> AsyncIterator[Sdk]:
    if request.param == "Python":
        yield PythonSdk()
    else:
        async with running_js() as made:
            yield made


def question(proxy: Running, call: str, model: str = MODEL, text: str = "hello", **more: Any) -> Question:
    params: dict[str, Any] = {"model": model}
    match call:
        case "chat":
            params["messages"] = [{"role": "user", "content": text}]
        case "completion" | "transcription" | "translation":
            params["prompt"] = text
        case "embedding" | "response":
            params["input"] = text
    return Question(proxy.url, more.pop("key", None) or proxy.key, call, params, **more)


def asked(proxy: Running, model: str) -> float:
    """How often the proxy was asked for the model, whatever it answered."""
    return sum(
        sample.value
        for family in proxy.registry.collect()
        for sample in family.samples
        if sample.name == "proxy_requests_total" and sample.labels["model"] == model
    )


# --- results ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS)
async def test_a_call_gets_its_result(proxy: Running, sdk: Sdk, call: str) -> None:
    told = await sdk.ask(question(proxy, call))
    assert told.error is None
    match call:
        case "chat":
            assert told.result["choices"][0]["message"]["content"] == "hi"
        case "completion":
            assert told.result["choices"][0]["text"] == "hi"
        case "embedding":
            assert told.result["data"][0]["embedding"] == [0.5]
        case "response":
            assert told.result["status"] == "completed"
        case _:
            assert told.result["text"] == "hi"


@pytest.mark.parametrize("call", STREAMS)
async def test_a_stream_gives_its_events_and_ends(proxy: Running, sdk: Sdk, call: str) -> None:
    told = await sdk.ask(question(proxy, call, stream=True))
    assert told.error is None
    assert len(told.events) == 1


async def test_models_are_listed_and_retrieved_one_by_one(proxy: Running, sdk: Sdk) -> None:
    listed = await sdk.ask(question(proxy, "models"))
    assert {model["id"] for model in listed.result["data"]} >= {MODEL, "asleep", "resting"}
    one = await sdk.ask(question(proxy, "model"))
    assert (one.result["id"], one.result["object"], one.result["state"]) == (MODEL, "model", "routable")


# --- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("call", CALLS)
async def test_every_refusal_is_the_right_exception_with_its_fields(
    proxy: Running, sdk: Sdk, call: str, row: str
) -> None:
    expected = ROWS[row]
    key = KEYS.get(expected.key or "", expected.key)
    for stream in {False, call in STREAMS}:
        told = await sdk.ask(question(proxy, call, expected.model, expected.text, key=key, stream=stream))
        assert told.error is not None
        assert told.error.request_id
        assert replace(told.error, request_id=None) == Raised(
            expected.kind, expected.status, expected.code, expected.param, expected.type, None
        )
        assert told.events == []


async def test_models_are_refused_to_strangers_and_unknown_ones_are_not_found(proxy: Running, sdk: Sdk) -> None:
    for call in ("models", "model"):
        told = await sdk.ask(question(proxy, call, key="sk-nobody"))
        assert told.error is not None
        assert (told.error.kind, told.error.code) == ("AuthenticationError", "invalid_api_key")
    for model in ("nobodys", "secret"):
        told = await sdk.ask(question(proxy, "model", model))
        assert told.error is not None
        assert (told.error.kind, told.error.code, told.error.param) == ("NotFoundError", "model_not_found", "model")


@pytest.mark.parametrize("call", STREAMS)
async def test_a_stream_that_breaks_raises_instead_of_ending_as_if_it_were_whole(
    proxy: Running, sdk: Sdk, call: str
) -> None:
    told = await sdk.ask(question(proxy, call, "breaks", stream=True))
    assert len(told.events) == 1
    assert told.error is not None
    assert (told.error.kind, told.error.code) == ("APIError", "upstream_error")


async def test_no_done_follows_the_error_of_a_stream_that_broke(proxy: Running) -> None:
    answer = await proxy.chat(model="breaks", stream=True)
    assert answer.status_code == 200
    assert answer.text.rstrip().rpartition("\n")[2].startswith('data: {"error"')
    assert "[DONE]" not in answer.text


# --- retries ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "status", "requests"),
    [("dead", 502, 2), ("late", 504, 2), ("nobodys", 404, 1), ("strict", 400, 1), ("resting", 503, 1)],
)
async def test_what_may_pass_is_asked_again_and_what_lasts_is_not(
    proxy: Running, sdk: Sdk, model: str, status: int, requests: int
) -> None:
    label = "" if model == "nobodys" else model
    before = asked(proxy, label)
    told = await sdk.ask(question(proxy, "chat", model, max_retries=1))
    assert told.error is not None
    assert told.error.status == status
    assert asked(proxy, label) - before == requests


async def test_retry_after_is_waited_for(proxy: Running, sdk: Sdk) -> None:
    """Without the header both wait half a second at most before the first retry."""
    before, began_at = asked(proxy, "busy"), time.monotonic()
    told = await sdk.ask(question(proxy, "chat", "busy", max_retries=1))
    assert told.error is not None
    assert told.error.status == 429
    assert asked(proxy, "busy") - before == 2
    assert time.monotonic() - began_at >= 0.95


async def test_a_short_pause_is_outwaited_by_its_retry_after(proxy: Running, db: Database, sdk: Sdk) -> None:
    name = await make_scalable(db, "briefly")
    until = utc_now() + timedelta(seconds=2)
    await replica_sets.pause(db, name, until=until, actor="test", now=utc_now())
    answer = await proxy.chat(model="briefly")
    while answer.headers.get("retry-after") != "2":  # not heard of yet: it may know of the last one only
        answer = await proxy.chat(model="briefly")
    assert answer.status_code == 503
    before = asked(proxy, "briefly")
    await sdk.ask(question(proxy, "chat", "briefly", max_retries=1))
    assert utc_now() >= until
    assert asked(proxy, "briefly") - before == 2
