"""OpenAI's own client against the proxy, with a fake vLLM behind it: what it gets, and which exception it raises."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from controlplane.clock import utc_now
from controlplane.db import Database, replica_sets
from controlplane.proxy import WaitingOptions
from tests.integration.proxy_rig import (
    MODEL,
    QUICK,
    Connection,
    Received,
    Running,
    make_key,
    make_routable,
    make_scalable,
    opened,
    running_proxy,
    upstream,
)
from tests.integration.test_fake_vllm import FakeProcess, running_fake

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeProcess]:
    with running_fake("--tokens-per-second", "500", key="the-endpoints-own-secret") as process:
        yield process


@pytest.fixture
async def db(shared_url: str) -> AsyncIterator[Database]:
    """One database for all: every test wants the same rows in it."""
    async with opened(shared_url) as database:
        yield database


@pytest.fixture
async def proxy(db: Database, fake: FakeProcess) -> AsyncIterator[Running]:
    """One model that the fake serves, one that nobody serves now, one that is paused."""
    await make_routable(db, fake.url, api_key=fake.key)
    await make_scalable(db, "asleep")
    await replica_sets.pause(db, await make_scalable(db, "resting"), actor="test", now=utc_now())
    options = replace(QUICK, waiting=WaitingOptions(hold_seconds_without_stream=0.3))
    async with running_proxy(db, options, key=await make_key(db)) as running:
        yield running


@pytest.fixture
async def client(proxy: Running) -> AsyncIterator[openai.AsyncOpenAI]:
    async with sdk(proxy, proxy.key) as made:
        yield made


def sdk(proxy: Running, key: str, max_retries: int = 0) -> openai.AsyncOpenAI:
    http = openai.DefaultAsyncHttpxClient(trust_env=False)
    return openai.AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key=key, max_retries=max_retries, http_client=http)


async def test_the_sdk_lists_models_and_retrieves_one(client: openai.AsyncOpenAI) -> None:
    listed = [model async for model in client.models.list()]
    assert [(model.id, model.object) for model in listed] == [
        ("asleep", "model"),
        ("resting", "model"),
        (MODEL, "model"),
    ]
    one = await client.models.retrieve(MODEL)
    assert one.model_extra is not None
    assert one.model_extra["state"] == "routable"


async def test_the_sdk_chats(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=8)
    assert answer.model == MODEL
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8


async def test_the_sdk_streams(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=8, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert [chunk.usage.completion_tokens for chunk in chunks if chunk.usage] == [8]


async def test_the_sdk_completes_a_prompt(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model=MODEL, prompt="Hello", max_tokens=4)
    assert answer.choices[0].text


async def test_the_sdk_knows_a_bad_key_when_the_proxy_says_so(proxy: Running) -> None:
    async with sdk(proxy, "sk-nobody") as stranger:
        with pytest.raises(openai.AuthenticationError) as caught:
            await stranger.chat.completions.create(model=MODEL, messages=HELLO)
    assert caught.value.code == "invalid_api_key"
    assert caught.value.request_id


async def test_the_sdk_knows_an_unknown_model(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="nobodys", messages=HELLO)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize(("model", "code"), [("asleep", "model_starting"), ("resting", "model_paused")])
async def test_the_sdk_knows_a_model_that_nobody_serves_now(client: openai.AsyncOpenAI, model: str, code: str) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        await client.chat.completions.create(model=model, messages=HELLO)
    assert (caught.value.status_code, caught.value.code) == (503, code)


async def test_the_sdk_does_not_retry_a_paused_model_although_it_would_retry_a_503(proxy: Running) -> None:
    async with sdk(proxy, proxy.key, max_retries=2) as patient:
        with pytest.raises(openai.InternalServerError):
            await patient.chat.completions.create(model="resting", messages=HELLO)
    assert proxy.metric("proxy_requests_total", model="resting", tenant="tenant", code="503") == 1


async def test_the_sdk_knows_a_bad_request_whoever_refuses_it(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as by_the_proxy:
        await client.post("/chat/completions", body={"messages": HELLO}, cast_to=object)
    assert (by_the_proxy.value.code, by_the_proxy.value.param) == ("invalid_request", "model")
    with pytest.raises(openai.BadRequestError):
        await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=10**6)


async def test_the_sdk_raises_when_a_stream_breaks_instead_of_ending_it_as_if_it_were_whole(db: Database) -> None:
    async def breaks(request: Received, connection: Connection) -> None:
        await connection.begin_stream()
        await connection.event('{"choices":[{"index":0,"delta":{"content":"half"}}]}')
        connection.close()

    async with upstream(breaks) as server:
        await make_routable(db, server.url)
        async with running_proxy(db, key=await make_key(db)) as proxy, sdk(proxy, proxy.key) as client:
            stream = await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
            assert (await anext(stream)).choices[0].delta.content == "half"
            with pytest.raises(openai.APIError) as caught:
                await anext(stream)
            assert caught.value.code == "upstream_error"
            await stream.close()
