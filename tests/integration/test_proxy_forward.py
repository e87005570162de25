"""One request through the proxy: what reaches an upstream, what comes back, and what becomes of failures."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import httpx
import pytest

from controlplane.db import Database
from tests.conftest import eventually
from tests.integration.proxy_rig import (
    CHAT,
    MODEL,
    QUICK,
    SECONDS,
    Connection,
    Received,
    Running,
    make_key,
    make_routable,
    opened,
    refusing_url,
    running_proxy,
    silent_url,
    until,
    upstream,
)

REPLY = b'{"id":"chatcmpl-1",  "choices":[]}'


@pytest.fixture
async def db(shared_url: str) -> AsyncIterator[Database]:
    """One database for all: each test gives the one replica set endpoints of its own, replacing the last one's."""
    async with opened(shared_url) as database:
        yield database


async def reply(request: Received, connection: Connection) -> None:
    await connection.answer(REPLY)


async def hang(request: Received, connection: Connection) -> None:
    await connection.closed_by_the_proxy()


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


# --- byte for byte ---------------------------------------------------------------------------------------


async def test_body_and_answer_are_passed_on_byte_for_byte(db: Database) -> None:
    body = '{ "model":\t"tiny" , "messages":[{"content":"\\u00e9 é 🜚"}],\n"x":1.0e0 }  '.encode()

    async def odd(request: Received, connection: Connection) -> None:
        await connection.answer(b'{ "odd" :  1.0e0}\n', status="418 I'm a Teapot", content_type="application/odd")

    async with upstream(odd) as server:
        await make_routable(db, server.url)
        async with running_proxy(db, key=await make_key(db)) as proxy:
            response = await proxy.client.post(CHAT + "?beta=true&x=%2F", content=body)
    assert (response.status_code, response.content) == (418, b'{ "odd" :  1.0e0}\n')
    assert response.headers["content-type"] == "application/odd"
    [request] = server.requests
    assert request.line == f"POST {CHAT}?beta=true&x=%2F HTTP/1.1"
    assert request.body == body


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages", "/tokenize"])
async def test_every_json_route_is_passed_on_under_its_own_path(db: Database, path: str) -> None:
    async with upstream(reply) as server:
        await make_routable(db, server.url)
        async with running_proxy(db, key=await make_key(db)) as proxy:
            response = await proxy.client.post(path, json={"model": MODEL})
    assert response.content == REPLY
    assert [request.line for request in server.requests] == [f"POST {path} HTTP/1.1"]


async def test_an_upstream_is_given_its_own_key_and_never_the_clients(db: Database) -> None:
    async with upstream(reply) as server:
        await make_routable(db, server.url, api_key="the-endpoints-own")
        key = await make_key(db)
        async with running_proxy(db, key=key) as proxy:
            headers = {"x-api-key": key, "api-key": key, "cookie": "session=1", "proxy-authorization": "Basic eDp5"}
            await proxy.client.post(CHAT, json={"model": MODEL}, headers=headers)
    [request] = server.requests
    assert request.header("authorization") == ["Bearer the-endpoints-own"]
    assert key not in str(request)
    assert {"x-api-key", "api-key", "cookie", "proxy-authorization"}.isdisjoint(dict(request.headers))


async def test_hop_by_hop_headers_stop_at_the_proxy_in_both_directions(db: Database) -> None:
    async def chatty(request: Received, connection: Connection) -> None:
        head = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: x-hop\r\nx-hop: 1\r\nx-end: 2\r\nserver: up\r\n\r\n"
        await connection.send(head.encode() + b"{}")

    async with upstream(chatty) as server:
        await make_routable(db, server.url)
        async with running_proxy(db, key=await make_key(db)) as proxy:
            headers = {"connection": "keep-alive, x-mine", "x-mine": "1", "te": "trailers", "x-kept": "2"}
            response = await proxy.client.post(CHAT, json={"model": MODEL}, headers=headers)
    sent = dict(server.requests[0].headers)
    assert sent["x-kept"] == "2"
    assert {"connection", "x-mine", "te"}.isdisjoint(sent)
    assert response.headers["x-end"] == "2"
    assert "x-hop" not in response.headers
    assert response.headers.get_list("server") == ["uvicorn"]
    assert len(response.headers.get_list("date")) == 1


async def test_a_sane_request_id_is_kept_and_an_odd_one_is_replaced(db: Database) -> None:
    async with upstream(reply) as server:
        await make_routable(db, server.url)
        async with running_proxy(db, key=await make_key(db)) as proxy:
            answers = [
                await proxy.client.post(CHAT, json={"model": MODEL}, headers={"x-request-id": given})
                for given in ("my-req:42", "no spaces allowed", "x" * 129)
            ]
            bare = await proxy.chat()
    ids = [answer.headers["x-request-id"] for answer in [*answers, bare]]
    assert ids[0] == "my-req:42"
    assert len(set(ids)) == 4
    assert all(len(made) == 32 for made in ids[1:])
    assert [request.header("x-request-id") for request in server.requests] == [[one] for one in ids]


async def test_a_streams_events_arrive_one_by_one_as_the_upstream_sends_them(db: Database) -> None:
    go_on = asyncio.Event()

    async def paced(request: Received, connection: Connection) -> None:
        await connection.begin_stream("cache-control: max-age=9")
        for number in range(3):
            await connection.event(str(number))
            await go_on.wait()
            go_on.clear()
        await connection.event("[DONE]")
        await connection.end_stream()

    async with upstream(paced) as server:
        await make_routable(db, server.url)
        async with running_proxy(db, key=await make_key(db)) as proxy:
            body = {"model": MODEL, "stream": True}
            async with proxy.client.stream("POST", CHAT, json=body) as response:
                pieces = response.aiter_raw()
                for number in range(3):
                    assert await anext(pieces) == b"data: %d\n\n" % number
                    go_on.set()
                rest = b"".join([piece async for piece in pieces])
    assert rest == b"data: [DONE]\n\n"
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers.get_list("cache-control") == ["no-cache"]
    assert response.headers["x-accel-buffering"] == "no"


async def test_a_client_that_reads_slowly_is_not_the_upstreams_fault(db: Database) -> None:
    size = 24 * 1024 * 1024

    async def large(request: Received, connection: Connection) -> None:
        await connection.answer(b"x" * size)

    options = replace(QUICK, idle_timeout_seconds=0.3)
    async with upstream(large) as server:
        await make_routable(db, server.url)
        async with running_proxy(db, options, key=await make_key(db)) as proxy:
            reader, writer = await proxy.raw()
            head = await reader.readuntil(b"\r\n\r\n")
            await asyncio.sleep(2 * options.idle_timeout_seconds)  # the time itself is what is tested
            body = await reader.readexactly(size)
            writer.close()
    assert head.startswith(b"HTTP/1.1 200")
    assert body.count(b"x") == size


# --- balancing and retry ---------------------------------------------------------------------------------


async def test_requests_go_to_the_endpoint_with_the_fewest_in_flight(db: Database) -> None:
    release = asyncio.Event()

    async def wait(request: Received, connection: Connection) -> None:
        await release.wait()
        await connection.answer(REPLY)

    async with upstream(wait) as one, upstream(wait) as two:
        await make_routable(db, one.url, two.url)
        async with running_proxy(db, key=await make_key(db)) as proxy:
            calls = [asyncio.create_task(proxy.chat()) for _ in range(8)]
            await eventually(lambda: sum(proxy.app.in_flight.values()) == 8)
            assert set(proxy.app.in_flight.values()) == {4}
            assert proxy.metric("proxy_in_flight", model=MODEL) == 8
            release.set()
            assert {(await call).status_code for call in calls} == {200}
            await eventually(lambda: not proxy.app.in_flight)
            assert proxy.metric("proxy_in_flight", model=MODEL) == 0


async def test_a_refused_connection_is_tried_at_another_endpoint_and_avoided_for_a_while(db: Database) -> None:
    with refusing_url() as dead:
        async with upstream(reply) as alive:
            await make_routable(db, dead, alive.url)
            async with running_proxy(db, key=await make_key(db)) as proxy:
                answers = [await proxy.chat() for _ in range(20)]
                assert {answer.status_code for answer in answers} == {200}
                assert proxy.metric("proxy_upstream_retries_total", model=MODEL, reason="refused") == 1
                assert not proxy.app.in_flight
    assert len(alive.requests) == 20


async def test_a_node_that_does_not_answer_the_connect_is_tried_at_another_endpoint(db: Database) -> None:
    with silent_url() as silent:
        async with upstream(reply) as alive:
            await make_routable(db, silent, alive.url)
            async with running_proxy(db, key=await make_key(db)) as proxy:
                answers = [await proxy.chat() for _ in range(20)]
                assert {answer.status_code for answer in answers} == {200}
                assert proxy.metric("proxy_upstream_retries_total", model=MODEL, reason="connect_timeout") == 1


async def test_when_no_endpoint_can_be_reached_each_is_tried_once_and_the_answer_is_502(db: Database) -> None:
    async with AsyncExitStack() as stack:
        dead = [stack.enter_context(refusing_url()) for _ in range(3)]
        await make_routable(db, *dead)
        proxy = await stack.enter_async_context(running_proxy(db, key=await make_key(db)))
        response = await proxy.chat()
        assert response.status_code == 502
        error = error_of(response)
        assert (error["code"], error["type"]) == ("upstream_error", "server_error")
        assert "127.0.0.1" not in response.text
        assert proxy.metric("proxy_upstream_retries_total", model=MODEL, reason="refused") == 2
        assert proxy.metric("proxy_requests_total", model=MODEL, tenant="tenant", code="502") == 1


async def test_an_endpoint_that_left_while_a_body_was_on_its_way_gets_no_request(db: Database) -> None:
    async with upstream(reply) as drained, upstream(reply) as left:
        await make_routable(db, drained.url)
        async with running_proxy(db, key=await make_key(db)) as proxy:
            body = json.dumps({"model": MODEL, "messages": []}).encode()
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            writer.write(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {proxy.key}\r\n".encode())
            writer.write(b"content-length: %d\r\n\r\n" % len(body) + body[:5])
            await writer.drain()
            assert (await proxy.chat()).status_code == 200  # the head that was sent before it is read by now
            await make_routable(db, left.url)
            await until(proxy.chat, lambda _: left.requests)
            before = len(drained.requests)
            writer.write(body[5:])
            assert b" 200 " in await reader.readline()
            writer.close()
    assert len(drained.requests) == before


async def test_an_endpoint_that_left_while_another_was_tried_gets_no_request(db: Database) -> None:
    options = replace(QUICK, connect_timeout_seconds=2.0)
    with silent_url() as silent:
        async with upstream(reply) as drained:
            await make_routable(db, silent, drained.url)
            async with running_proxy(db, options, key=await make_key(db)) as proxy:
                calls = []
                while silent not in proxy.app.in_flight:  # the others are answered by the one that will leave
                    calls.append(asyncio.create_task(proxy.chat()))
                    await asyncio.sleep(0.05)
                await make_routable(db, silent)
                statuses = [(await call).status_code for call in calls]
    assert (statuses[:-1], statuses[-1]) == ([200] * len(drained.requests), 502)


async def test_an_endpoint_that_is_avoided_is_still_used_when_there_is_no_other(db: Database) -> None:
    with refusing_url() as dead:
        await make_routable(db, dead)
        async with running_proxy(db, key=await make_key(db)) as proxy:
            assert (await proxy.chat()).status_code == 502
            assert (await proxy.chat()).status_code == 502


async def test_a_request_that_is_dropped_without_an_answer_is_sent_to_one_other_endpoint_and_no_third(
    db: Database,
) -> None:
    async def swallow(request: Received, connection: Connection) -> None:
        connection.close()

    async with upstream(swallow) as one, upstream(swallow) as two, upstream(swallow) as three:
        await make_routable(db, one.url, two.url, three.url)
        async with running_proxy(db, key=await make_key(db)) as proxy:
            response = await proxy.chat()
            assert response.status_code == 502
            assert error_of(response)["code"] == "upstream_error"
            assert sorted(len(each.requests) for each in (one, two, three)) == [0, 1, 1]
            assert proxy.metric("proxy_upstream_retries_total", model=MODEL, reason="lost") == 1
            assert not proxy.app.in_flight


async def test_what_an_upstream_may_keep_is_never_sent_twice(db: Database) -> None:
    async def swallow(request: Received, connection: Connection) -> None:
        connection.close()

    async with upstream(swallow) as one, upstream(swallow) as two:
        await make_routable(db, one.url, two.url)
        async with running_proxy(db, key=await make_key(db)) as proxy:
            response = await proxy.client.post("/v1/responses", json={"model": MODEL, "background": True})
            assert response.status_code == 502
            assert len(one.requests) + len(two.requests) == 1


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_an_engine_that_fails_before_its_answer_began_is_replaced_by_another(
    db: Database, is_streamed: bool
) -> None:
    async def fail(request: Received, connection: Connection) -> None:
        error = '{"error":{"message":"EngineCore died","type":"InternalServerError","param":null,"code":500}}'
        if not is_streamed:
            await connection.answer(error.encode(), status="500 Internal Server Error")
            return
        await connection.begin_stream()
        await connection.chunk(b": keep-alive\n\n")  # vLLM sends these while a request is queued
        await connection.event(error)
        await connection.event("[DONE]")
        await connection.end_stream()

    async def well(request: Received, connection: Connection) -> None:
        if not is_streamed:
            await connection.answer(REPLY)
            return
        await connection.begin_stream()
        await connection.event('{"delta":"a"}')
        await connection.end_stream()

    async with upstream(fail) as broken, upstream(well) as alive:
        await make_routable(db, broken.url, alive.url)
        async with running_proxy(db, key=await make_key(db)) as proxy:
            answers = [await proxy.chat(stream=is_streamed) for _ in range(6)]
            assert {(answer.status_code, answer.content) for answer in answers} == {
                (200, b'data: {"delta":"a"}\n\n' if is_streamed else REPLY)
            }
            assert broken.requests
            assert proxy.metric("proxy_upstream_retries_total", model=MODEL, reason="engine_failed") >= 1


async def test_a_stream_that_begins_with_an_error_is_answered_with_its_status(db: Database) -> None:
    error = b'{"error":{"message":"queue is full","type":"Service Unavailable","param":null,"code":503}}'

    async def full(request: Received, connection: Connection) -> None:
        await connection.begin_stream()
        await connection.event(error.decode())
        await connection.event("[DONE]")
        await connection.end_stream()

    async with upstream(full) as server:
        await make_routable(db, server.url)
        async with running_proxy(db, key=await make_key(db)) as proxy:
            answer = await proxy.chat(stream=True)
            assert (answer.status_code, answer.content) == (503, error)
            assert answer.headers["content-type"] == "application/json"
            assert not proxy.app.in_flight


async def test_a_kept_connection_that_dies_under_a_request_is_replaced_by_a_fresh_one_once(db: Database) -> None:
    async def only_once(request: Received, connection: Connection) -> None:
        if len(server.requests) in (2, 5, 6):
            connection.close()
        else:
            await connection.answer(REPLY)

    async with upstream(only_once) as server:
        await make_routable(db, server.url)
        async with running_proxy(db, key=await make_key(db)) as proxy:
            assert [(await proxy.chat()).status_code for _ in range(4)] == [200, 200, 200, 502]
    assert (len(server.requests), server.connections) == (6, 3)


async def test_a_kept_connection_that_the_upstream_has_closed_is_replaced_unnoticed(db: Database) -> None:
    has_closed = asyncio.Event()

    async def close_after_the_answer(request: Received, connection: Connection) -> None:
        await connection.answer(REPLY)
        connection.close()
        await connection.writer.wait_closed()
        has_closed.set()

    async with upstream(close_after_the_answer) as server:
        await make_routable(db, server.url)
        async with running_proxy(db, key=await make_key(db)) as proxy:
            for _ in range(3):
                assert (await proxy.chat()).status_code == 200
                await has_closed.wait()
                has_closed.clear()
    assert server.connections == 3


async def test_idle_connections_are_reused_and_closed_before_vllm_would_close_them(db: Database) -> None:
    closed = asyncio.Event()

    async def watch(request: Received, connection: Connection) -> None:
        await connection.answer(REPLY)
        if len(server.requests) == 3:
            await connection.closed_by_the_proxy()
            closed.set()

    async with upstream(watch) as server:
        await make_routable(db, server.url)
        async with running_proxy(db, replace(QUICK, keepalive_seconds=0.2), key=await make_key(db)) as proxy:
            assert [(await proxy.chat()).status_code for _ in range(3)] == [200, 200, 200]
            assert server.connections == 1
            async with asyncio.timeout(SECONDS):
                await closed.wait()


# --- late and broken -------------------------------------------------------------------------------------


async def test_a_late_first_byte_is_504_and_ends_the_upstream_request(db: Database) -> None:
    ended = asyncio.Event()

    async def headers_only(request: Received, connection: Connection) -> None:
        await connection.begin_stream()  # vLLM sends these at once; they promise nothing
        await connection.closed_by_the_proxy()
        ended.set()

    async with upstream(headers_only) as one, upstream(headers_only) as two:
        await make_routable(db, one.url, two.url)
        options = replace(QUICK, first_byte_timeout_seconds=0.2)
        async with running_proxy(db, options, key=await make_key(db)) as proxy:
            response = await proxy.chat(stream=True)
            assert response.status_code == 504
            assert error_of(response)["code"] == "upstream_timeout"
            async with asyncio.timeout(1.0):
                await ended.wait()
            assert len(one.requests) + len(two.requests) == 1
            assert not proxy.app.in_flight


async def broken_stream(db: Database, cut: bytes, *, hangs: bool = False) -> tuple[httpx.Response, Running]:
    """The answer when an upstream sends one whole event, then `cut`, and then closes or says nothing more."""

    async def stop(request: Received, connection: Connection) -> None:
        await connection.begin_stream()
        await connection.event('{"delta":"a"}')
        if cut:
            await connection.chunk(cut)
        if hangs:
            await connection.closed_by_the_proxy()
        else:
            connection.close()

    async with upstream(stop) as server:
        await make_routable(db, server.url)
        options = replace(QUICK, idle_timeout_seconds=0.2)
        async with running_proxy(db, options, key=await make_key(db)) as proxy:
            response = await proxy.chat(stream=True)
            await eventually(lambda: proxy.metric("proxy_broken_streams_total", model=MODEL) == 1)
            assert not proxy.app.in_flight
            return response, proxy


@pytest.mark.parametrize("hangs", [False, True], ids=["closed", "hanging"])
async def test_a_stream_that_breaks_ends_with_one_error_event_and_no_done(db: Database, hangs: bool) -> None:
    response, _ = await broken_stream(db, b"", hangs=hangs)
    assert response.status_code == 200
    first, last, rest = response.text.split("\n\n")
    assert first == 'data: {"delta":"a"}'
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "upstream_error"
    assert rest == ""


async def test_an_event_whose_end_never_came_is_not_passed_on(db: Database) -> None:
    response, _ = await broken_stream(db, b'data: {"del')
    first, last, rest = response.text.split("\n\n")
    assert (first, rest) == ('data: {"delta":"a"}', "")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "upstream_error"


async def test_a_body_that_breaks_off_reaches_the_client_visibly_short(db: Database) -> None:
    async def cut(request: Received, connection: Connection) -> None:
        await connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{")
        connection.close()

    async def cut_chunked(request: Received, connection: Connection) -> None:
        await connection.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\n{\r\n")
        connection.close()

    for script in (cut, cut_chunked):
        async with upstream(script) as server:
            await make_routable(db, server.url)
            async with running_proxy(db, key=await make_key(db)) as proxy:
                with pytest.raises(httpx.RemoteProtocolError):
                    await proxy.chat()
                await eventually(lambda: proxy.metric("proxy_broken_streams_total", model=MODEL) == 1)


# --- what a stream is asked and told on its way ----------------------------------------------------------


USAGE = '{"id":"x","choices":[],"usage":{"prompt_tokens":7,"total_tokens":9,"completion_tokens":2}}'


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("cut", [None, 1, 30, 60])
async def test_a_streams_usage_is_asked_for_and_hidden_from_who_did_not_ask(
    db: Database, asks: bool, cut: int | None
) -> None:
    events = [b'data: {"id":"x","choices":[{"delta":{"content":"\\"usage\\": {}"}}]}\n\n', b"data: [DONE]\n\n"]
    usage = f"data: {USAGE}\n\n".encode()

    async def tell(request: Received, connection: Connection) -> None:
        whole = events[0] + usage + events[1]
        await connection.begin_stream()
        for start in range(0, len(whole), cut or len(whole)):
            await connection.chunk(whole[start : start + (cut or len(whole))])
        await connection.end_stream()

    options = {"stream_options": {"include_usage": True, "other": 1}} if asks else {}
    async with upstream(tell) as server:
        await make_routable(db, server.url)
        async with running_proxy(db, key=await make_key(db)) as proxy:
            response = await proxy.chat(stream=True, **options)
    assert response.content == (events[0] + usage + events[1] if asks else b"".join(events))
    [request] = server.requests
    assert json.loads(request.body)["stream_options"]["include_usage"] is True
    sent = json.dumps({"model": MODEL, "messages": [], "stream": True, **options}, separators=(",", ":"))
    without = request.body.decode().replace('"stream_options":{"include_usage":true},', "", 0 if asks else 1)
    assert json.loads(without) == json.loads(sent)


async def test_a_silent_stream_is_kept_alive_by_comments_and_still_tells_an_error(db: Database) -> None:
    go_on = asyncio.Event()

    async def slow(request: Received, connection: Connection) -> None:
        if b"refuse" in request.body:
            await go_on.wait()
            await connection.answer(b'{"error":{"message":"no"}}', status="400 Bad Request")
            return
        await connection.begin_stream()
        await go_on.wait()
        await connection.event("1")
        go_on.clear()
        await go_on.wait()
        await connection.event("[DONE]")
        await connection.end_stream()

    comment = b": keep-alive\n\n"
    async with upstream(slow) as server:
        await make_routable(db, server.url)
        options = replace(QUICK, keepalive_comment_seconds=0.1)
        async with running_proxy(db, options, key=await make_key(db)) as proxy:
            async with proxy.client.stream("POST", CHAT, json={"model": MODEL, "stream": True}) as response:
                pieces = response.aiter_raw()
                assert [await anext(pieces), await anext(pieces)] == [comment, comment]
                go_on.set()
                got = b"".join([piece async for piece in _until(pieces, b"1\n\n")])
                assert got.removeprefix(comment) == b"data: 1\n\n"
                assert await anext(pieces) == comment
                go_on.set()
                rest = b"".join([piece async for piece in pieces])
                assert rest.replace(comment, b"") == b"data: [DONE]\n\n"
                assert response.headers["content-type"].startswith("text/event-stream")
            go_on.clear()
            body = {"model": MODEL, "stream": True, "user": "refuse"}
            async with proxy.client.stream("POST", CHAT, json=body) as response:
                pieces = response.aiter_raw()
                assert await anext(pieces) == comment
                go_on.set()
                rest = b"".join([piece async for piece in pieces])
            assert rest.replace(comment, b"") == b'data: {"error":{"message":"no"}}\n\n'
            plain = asyncio.create_task(proxy.chat(user="refuse"))
            assert (await plain).status_code == 400  # who does not stream gets no comments


async def _until(pieces: AsyncIterator[bytes], end: bytes) -> AsyncIterator[bytes]:
    async for piece in pieces:
        yield piece
        if piece.endswith(end):
            return


# --- clients that leave ----------------------------------------------------------------------------------


async def test_upstream_is_closed_within_a_second_when_the_client_leaves_before_the_first_byte(db: Database) -> None:
    has_request, has_closed = asyncio.Event(), asyncio.Event()

    async def wait(request: Received, connection: Connection) -> None:
        has_request.set()
        await connection.closed_by_the_proxy()
        has_closed.set()

    async with upstream(wait) as server:
        await make_routable(db, server.url)
        async with running_proxy(db, key=await make_key(db)) as proxy:
            _, writer = await proxy.raw()
            await has_request.wait()
            assert proxy.app.in_flight == {server.url: 1}
            writer.close()
            async with asyncio.timeout(1.0):
                await has_closed.wait()
            await eventually(lambda: proxy.metric("proxy_client_disconnects_total", model=MODEL) == 1)
            assert proxy.metric("proxy_requests_total", model=MODEL, tenant="tenant", code="499") == 1
            assert not proxy.app.in_flight


@pytest.mark.parametrize("is_aborted", [False, True], ids=["closed", "reset"])
async def test_upstream_is_closed_within_a_second_when_the_client_leaves_mid_stream(
    db: Database, is_aborted: bool
) -> None:
    has_closed = asyncio.Event()

    async def one_event(request: Received, connection: Connection) -> None:
        await connection.begin_stream()
        await connection.event("1")
        await connection.closed_by_the_proxy()
        has_closed.set()

    async with upstream(one_event) as server:
        await make_routable(db, server.url)
        async with running_proxy(db, key=await make_key(db)) as proxy:
            reader, writer = await proxy.raw(stream=True)
            await reader.readuntil(b"data: 1\n\n")
            writer.transport.abort() if is_aborted else writer.close()
            async with asyncio.timeout(1.0):
                await has_closed.wait()
            await eventually(lambda: proxy.metric("proxy_client_disconnects_total", model=MODEL) == 1)
            assert proxy.metric("proxy_requests_total", model=MODEL, tenant="tenant", code="200") == 1
            assert proxy.metric("proxy_broken_streams_total", model=MODEL) == 0
            assert not proxy.app.in_flight


async def test_upstream_is_closed_when_a_client_leaves_that_did_not_read(db: Database) -> None:
    has_closed = asyncio.Event()

    async def flood(request: Received, connection: Connection) -> None:
        await connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n")
        try:
            while True:
                await connection.send(b"x" * 65536)
        except ConnectionError:
            has_closed.set()

    async with upstream(flood) as server:
        await make_routable(db, server.url)
        async with running_proxy(db, key=await make_key(db)) as proxy:
            reader, writer = await proxy.raw()
            await reader.readuntil(b"\r\n\r\n")
            writer.transport.abort()
            async with asyncio.timeout(1.0):
                await has_closed.wait()
            await eventually(lambda: not proxy.app.in_flight)


async def test_a_client_that_leaves_while_it_sends_its_body_costs_nothing(db: Database) -> None:
    async with upstream(reply) as server:
        await make_routable(db, server.url)
        async with running_proxy(db, key=await make_key(db)) as proxy:
            _, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            writer.write(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {proxy.key}\r\n".encode())
            writer.write(b'content-length: 100\r\n\r\n{"model":')
            await writer.drain()
            writer.close()
            await eventually(lambda: proxy.metric("proxy_requests_total", model="", tenant="tenant", code="499") == 1)
    assert server.requests == []


# --- many ------------------------------------------------------------------------------------------------


async def test_two_hundred_streams_at_once_all_arrive_whole(db: Database) -> None:
    everybody = asyncio.Barrier(200)

    async def together(request: Received, connection: Connection) -> None:
        who = json.loads(request.body)["user"]
        await connection.begin_stream()
        await connection.event(who)
        await everybody.wait()  # all of them are under way at the same time
        for number in range(5):
            await connection.event(f"{who}.{number}")
        await connection.event("[DONE]")
        await connection.end_stream()

    async with upstream(together) as one, upstream(together) as two:
        await make_routable(db, one.url, two.url)
        async with running_proxy(db, key=await make_key(db)) as proxy:
            answers = await asyncio.gather(*(proxy.chat(stream=True, user=f"u{number}") for number in range(200)))
            for number, answer in enumerate(answers):
                user = f"u{number}"
                events = [user, *(f"{user}.{step}" for step in range(5)), "[DONE]"]
                assert answer.text == "".join(f"data: {event}\n\n" for event in events)
            assert (len(one.requests), len(two.requests)) == (100, 100)
            await eventually(lambda: not proxy.app.in_flight)
            assert proxy.metric("proxy_requests_total", model=MODEL, tenant="tenant", code="200") == 200
            assert proxy.metric("proxy_first_byte_seconds_count", model=MODEL) == 200
            assert proxy.metric("proxy_overhead_seconds_count") == 200
