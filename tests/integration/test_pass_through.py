"""Every route of the contract passes bodies and answers byte for byte, in both directions, whatever they look like."""

from __future__ import annotations

import gzip
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from controlplane.db import Database
from tests.integration.proxy_rig import (
    CHAT,
    MODEL,
    Connection,
    Received,
    make_key,
    make_routable,
    opened,
    running_proxy,
    upstream,
)

JSON_ROUTES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
    "/v1/rerank",
    "/v1/score",
    "/tokenize",
    "/detokenize",
)
AUDIO_ROUTES = ("/v1/audio/transcriptions", "/v1/audio/translations")

BODIES = {
    "odd whitespace": b'\r\n\t { "model"\t:\n"tiny" ,"x" : [ ] }  \n',
    "model last": b'{"messages":[{"role":"user","content":"{\\"model\\":\\"other\\"}"}],"n":1,"model":"tiny"}',
    "unicode escapes": '{"model":"t\\u0069ny","s":"\\u00e9 é \\ud83d\\ude00 🜚 \\/"}'.encode(),
    "an escaped key": b'{"mod\\u0065l":"tiny"}',
    "duplicate keys": b'{"a":1,"model":"tiny","a":2,"a":{"model":"other","model":3}}',
    "numbers as written": b'{"model":"tiny","x":[1.0e0,1E+2,-0,123456789012345678901234567890,0.1000]}',
    "deep": b'{"model":"tiny","x":' + b"[" * 200 + b"]" * 200 + b"}",
    "nothing but the model": b'{"model":"tiny"}',
    "half a megabyte": b'{"model":"tiny","input":"' + b"x" * 524_288 + b'"}',
}

ANSWERS = {
    "odd JSON": ("200 OK", "application/json", b'{ "b":1.0e0,\n\t"a" : "\\u00e9" }\n'),
    "an error of the engine": ("400 Bad Request", "application/json", b'{"error":{"message":"m","code":400}}'),
    "another status": ("422 Unprocessable Entity", "application/json; charset=utf-8", b'{"detail":[]}'),
    "a fault of the engine": ("500 Internal Server Error", "text/plain", b"Internal Server Error"),
    "bytes": ("200 OK", "application/octet-stream", bytes(range(256))),
    "nothing": ("200 OK", "application/json", b""),
}

EVENTS = (
    b": a comment\n\n"
    b'event: message_start\r\nid: 7\r\ndata: {"a" :  1}\r\n\r\n'
    b"data: first line\ndata: second line\n\n"
    b"retry: 10\n\ndata:no space\n\n"
    b'data: {"x":"\\u00e9 \xc3\xa9"}\n\n'
    b"data: [DONE]\n\n"
)


@pytest.fixture
async def db(shared_url: str) -> AsyncIterator[Database]:
    """One database for all: each test gives the one replica set an endpoint of its own."""
    async with opened(shared_url) as database:
        yield database


async def reply(request: Received, connection: Connection) -> None:
    await connection.answer(b"{}")


# --- requests --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", JSON_ROUTES)
async def test_any_json_body_arrives_as_it_was_sent(db: Database, route: str) -> None:
    async with upstream(reply) as server:
        await make_routable(db, server.url)
        async with running_proxy(db, key=await make_key(db)) as proxy:
            headers = {"content-type": "application/json; charset=UTF-8"}
            for body in BODIES.values():
                answer = await proxy.client.post(f"{route}?a=%2F&a=b", content=body, headers=headers)
                assert answer.status_code == 200, answer.text
    for (name, body), request in zip(BODIES.items(), server.requests, strict=True):
        assert request.line == f"POST {route}?a=%2F&a=b HTTP/1.1"
        assert request.body == body, name
        assert request.header("content-type") == ["application/json; charset=UTF-8"]


@pytest.mark.parametrize("route", JSON_ROUTES)
async def test_a_body_that_comes_in_chunks_arrives_whole(db: Database, route: str) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for byte in BODIES["unicode escapes"]:
            yield bytes([byte])

    async with upstream(reply) as server:
        await make_routable(db, server.url)
        async with running_proxy(db, key=await make_key(db)) as proxy:
            assert (await proxy.client.post(route, content=pieces())).status_code == 200
    assert [request.body for request in server.requests] == [BODIES["unicode escapes"]]


async def test_of_two_models_in_one_body_the_last_counts_as_it_does_for_vllm(db: Database) -> None:
    async with upstream(reply) as allowed, upstream(reply) as secret:
        await make_routable(db, allowed.url)
        await make_routable(db, secret.url, model="secret")
        async with running_proxy(db, key=await make_key(db, MODEL)) as proxy:
            for body, status in (
                (b'{"model":"tiny","model":"secret"}', 404),
                (b'{"model":"tiny","mod\\u0065l":"secret"}', 404),
                (b'{"model":"secret","model":"tiny"}', 200),
            ):
                assert (await proxy.client.post(CHAT, content=body)).status_code == status, body
    assert secret.requests == []
    assert [request.body for request in allowed.requests] == [b'{"model":"secret","model":"tiny"}']


def form(*, model_first: bool, boundary: bytes = b"----x0") -> bytes:
    def part(disposition: bytes, value: bytes) -> bytes:
        return b"--" + boundary + b"\r\nContent-Disposition: form-data; " + disposition + b"\r\n\r\n" + value + b"\r\n"

    model = part(b'name="model"', b"tiny")
    audio = part(b'name="file"; filename="a b.wav"', b"RIFF\r\n--" + bytes(range(256)) * 4096)
    parts = model + audio if model_first else audio + model
    return parts + part(b'name="language"', b"de") + b"--" + boundary + b"--\r\n"


@pytest.mark.parametrize("model_first", [True, False])
@pytest.mark.parametrize("route", AUDIO_ROUTES)
async def test_a_form_arrives_as_it_was_sent(db: Database, route: str, model_first: bool) -> None:
    body = form(model_first=model_first)
    content_type = 'multipart/form-data; boundary="----x0"'

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 10_007):
            yield body[start : start + 10_007]

    async with upstream(reply) as server:
        await make_routable(db, server.url)
        async with running_proxy(db, key=await make_key(db)) as proxy:
            for content in (body, pieces()):
                answer = await proxy.client.post(route, content=content, headers={"content-type": content_type})
                assert answer.status_code == 200, answer.text
    assert [request.line for request in server.requests] == [f"POST {route} HTTP/1.1"] * 2
    assert [request.header("content-type") for request in server.requests] == [[content_type]] * 2
    assert all(request.body == body for request in server.requests)


# --- answers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", [*JSON_ROUTES, *AUDIO_ROUTES])
async def test_any_answer_comes_back_as_it_was_given(db: Database, route: str) -> None:
    is_audio = route in AUDIO_ROUTES
    body = form(model_first=True) if is_audio else b'{"model":"tiny"}'
    content_type = "multipart/form-data; boundary=----x0" if is_audio else "application/json"
    wanted = iter(ANSWERS.values())

    async def answer(request: Received, connection: Connection) -> None:
        status, kind, content = next(wanted)
        await connection.answer(content, status, kind)

    async with upstream(answer) as server:
        await make_routable(db, server.url)
        async with running_proxy(db, key=await make_key(db)) as proxy:
            for name, (status, kind, content) in ANSWERS.items():
                got = await proxy.client.post(route, content=body, headers={"content-type": content_type})
                assert f"{got.status_code} {got.reason_phrase}" == status, name
                assert got.headers["content-type"] == kind, name
                assert got.content == content, name
                assert got.headers["x-request-id"], name


@pytest.mark.parametrize("route", JSON_ROUTES)
async def test_any_stream_of_events_comes_back_as_it_was_given(db: Database, route: str) -> None:
    async def stream(request: Received, connection: Connection) -> None:
        await connection.begin_stream()
        for start in range(0, len(EVENTS), 7):
            await connection.chunk(EVENTS[start : start + 7])
        await connection.end_stream()

    body = {"model": MODEL, "stream": True, "stream_options": {"include_usage": True}}
    async with upstream(stream) as server:
        await make_routable(db, server.url)
        async with running_proxy(db, key=await make_key(db)) as proxy:
            answer = await proxy.client.post(route, json=body)
    assert answer.content == EVENTS
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"


async def test_a_compressed_answer_stays_compressed(db: Database) -> None:
    packed = gzip.compress(b'{"answer":1}')

    async def answer(request: Received, connection: Connection) -> None:
        head = f"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: {len(packed)}\r\n\r\n"
        await connection.send(head.encode(), packed)

    async with upstream(answer) as server:
        await make_routable(db, server.url)
        async with running_proxy(db, key=await make_key(db)) as proxy:
            request = proxy.client.build_request("POST", CHAT, json={"model": MODEL})
            got = await proxy.client.send(request, stream=True)
            assert b"".join([piece async for piece in got.aiter_raw()]) == packed
            assert got.headers["content-encoding"] == "gzip"


# --- usage in streams ------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("options", [None, {"include_usage": True}, {"include_usage": False}])
async def test_only_who_asked_for_usage_sees_its_chunk(
    db: Database, route: str, options: dict[str, Any] | None
) -> None:
    async def stream(request: Received, connection: Connection) -> None:
        wants = (json.loads(request.body).get("stream_options") or {}).get("include_usage")
        await connection.begin_stream()
        await connection.event('{"choices":[{"index":0,"delta":{"content":"one"}}]}')
        await connection.event('{"choices":[{"index":0,"delta":{"content":"two"},"finish_reason":"stop"}]}')
        if wants:
            await connection.event('{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}')
        await connection.event("[DONE]")
        await connection.end_stream()

    sent = {"model": MODEL, "messages": [], "stream": True, **({} if options is None else {"stream_options": options})}
    async with upstream(stream) as server:
        await make_routable(db, server.url)
        async with running_proxy(db, key=await make_key(db)) as proxy:
            answer = await proxy.client.post(route, json=sent)
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    choices = [json.loads(event) for event in events[:-1]]
    assert len([one for one in choices if one["choices"]]) == 2
    asked = bool(options and options["include_usage"])
    assert len([one for one in choices if not one["choices"]]) == asked
    [request] = server.requests
    received = json.loads(request.body)
    if asked:
        assert request.body == json.dumps(sent, separators=(",", ":")).encode()
    received.pop("stream_options", None)
    sent.pop("stream_options", None)
    assert received == sent
