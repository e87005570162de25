"""The fake vLLM as a process, over real sockets, held against what vLLM 0.32 was recorded to answer."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

FIXTURES = Path(__file__).parents[1] / "fixtures" / "vllm"
LIMIT_SECONDS = 10.0
SHUTDOWN_BODY = (
    '{"error":{"message":"cannot schedule new futures after shutdown",'
    '"type":"InternalServerError","param":null,"code":500}}'
)
FOR_SCALING = (
    *("num_requests_running", "num_requests_waiting", "num_requests_waiting_by_reason", "kv_cache_usage_perc"),
    *("admission_rejections", "request_queue_time_seconds", "time_to_first_token_seconds"),
    *("inter_token_latency_seconds", "request_time_per_output_token_seconds", "e2e_request_latency_seconds"),
    *("generation_tokens", "prompt_tokens", "num_preemptions"),
)


@dataclass
class FakeProcess:
    """A running fake and a way to talk to it."""

    process: subprocess.Popen[bytes]
    port: int
    key: str | None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> httpx.AsyncClient:
        headers = {} if self.key is None else {"authorization": f"Bearer {self.key}"}
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=LIMIT_SECONDS, trust_env=False)

    def is_listening(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    async def has_stopped_listening(self) -> bool:
        return not self.is_listening()

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    async def exit_code(self) -> int:
        return await asyncio.to_thread(self.process.wait, LIMIT_SECONDS)


def free_port() -> int:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port: int = chosen.getsockname()[1]
        return port


@contextmanager
def running_fake(
    *arguments: str, key: str | None = None, port: int | None = None, is_awaited: bool = True
) -> Iterator[FakeProcess]:
    chosen = port or free_port()
    environment = {**os.environ}
    if key is not None:
        environment["VLLM_API_KEY"] = key
    command = [sys.executable, "-m", "controlplane.demo.fake_vllm", "--model", "tiny", "--port", str(chosen)]
    process = subprocess.Popen([*command, *arguments], env=environment, stdout=subprocess.DEVNULL)
    fake = FakeProcess(process, chosen, key)
    try:
        deadline = time.monotonic() + LIMIT_SECONDS
        while is_awaited and not fake.is_listening():
            assert process.poll() is None, "the fake ended before it listened"
            assert time.monotonic() < deadline, "the fake does not listen"
            time.sleep(0.02)
        yield fake
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def open_fake() -> Iterator[FakeProcess]:
    with running_fake("--max-model-len", "2048", "--tokens-per-second", "25") as fake:
        yield fake


@pytest.fixture(scope="module")
def guarded_fake() -> Iterator[FakeProcess]:
    speed = ("--tokens-per-second", "500")
    with running_fake("--api-key", "sk-one", "sk-two", "--max-model-len", "32768", *speed) as fake:
        fake.key = "sk-one"
        yield fake


async def eventually(fact: Callable[[], Any]) -> None:
    """Wait until the awaitable `fact()` is true."""
    async with asyncio.timeout(LIMIT_SECONDS):
        while True:
            if await fact():
                return
            await asyncio.sleep(0.02)


async def samples(client: httpx.AsyncClient) -> dict[str, float]:
    """Every sample of /metrics by name; those with labels beside model and engine as name{label=value}."""
    found = {}
    for family in text_string_to_metric_families((await client.get("/metrics")).text):
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name not in {"model_name", "engine"}}
            suffix = ",".join(f"{name}={value}" for name, value in sorted(labels.items()))
            found[f"{sample.name}{{{suffix}}}" if suffix else sample.name] = sample.value
    return found


async def has_load(client: httpx.AsyncClient, running: int, waiting: int) -> bool:
    seen = await samples(client)
    return (seen["vllm:num_requests_running"], seen["vllm:num_requests_waiting"]) == (running, waiting)


def chat(max_tokens: int, **fields: Any) -> dict[str, Any]:
    message = {"role": "user", "content": "Hello"}
    return {"model": "tiny", "messages": [message], "max_tokens": max_tokens, "ignore_eos": True, **fields}


@asynccontextmanager
async def open_stream(client: httpx.AsyncClient, max_tokens: int) -> AsyncIterator[AsyncIterator[str]]:
    """A chat stream that has been answered 200, as an iterator over its data lines."""
    async with client.stream("POST", "/v1/chat/completions", json=chat(max_tokens, stream=True)) as response:
        assert response.status_code == 200
        yield (line.removeprefix("data: ") async for line in response.aiter_lines() if line)


async def rest_of(lines: AsyncIterator[str]) -> list[str]:
    return [line async for line in lines]


async def wait_for_silence(lines: AsyncIterator[str]) -> None:
    """Read what is still on its way, until nothing comes for the time of some ten tokens."""
    async with asyncio.timeout(LIMIT_SECONDS):
        while await has_another(lines, within_seconds=0.4):
            pass


async def has_another(lines: AsyncIterator[str], within_seconds: float) -> bool:
    try:
        await asyncio.wait_for(anext(lines), within_seconds)
    except TimeoutError:
        return False
    return True


# --- recorded answers ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recording:
    """One curl command and the answer that vLLM gave."""

    method: str
    target: str
    is_guarded: bool
    headers: dict[str, str]
    content: bytes | None
    status: int
    answer_headers: dict[str, str]
    answer: str


def read_recording(name: str) -> Recording:
    command, _, answer = (FIXTURES / "http" / f"{name}.txt").read_bytes().decode().partition("\n")
    words = shlex.split(command.removeprefix("$ curl "))
    options = list(zip(words, [*words[1:], ""], strict=True))
    url = urlsplit(next(word for word in words if word.startswith("http://")))
    data = next((value for word, value in options if word == "-d"), None)
    if data is not None and data.startswith("@"):  # the file was not kept: a prompt of more than 2048 tokens
        messages = [{"role": "user", "content": "long " * 4000}]
        data = json.dumps({"model": "tiny", "messages": messages, "stream": "longs" in data})
    method = "HEAD" if "-I" in words else "GET" if data is None else "POST"
    head, _, body = answer.partition("\r\n\r\n")
    status_line, *header_lines = head.split("\r\n")
    return Recording(
        method=next((value for word, value in options if word == "-X"), method),
        target=url.path,
        is_guarded=url.port == 18104,
        headers=dict(value.split(": ", 1) for word, value in options if word == "-H"),
        content=None if data is None else data.encode(),
        status=int(status_line.split()[1]),
        answer_headers=dict(line.split(": ", 1) for line in header_lines),
        answer=body.rstrip("\n"),
    )


def shape(value: Any) -> Any:
    """The fields in order, with types for values: equal shapes are parsed by the same client code."""
    if isinstance(value, dict):
        return [(name, shape(inner)) for name, inner in value.items()]
    if isinstance(value, list):
        return [shape(inner) for inner in value[:1]]
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


def shapes(answer: str, content_type: str) -> Any:
    """The shape of a JSON answer; of a stream, the shapes of its events with repetitions left out."""
    if not content_type.startswith("text/event-stream"):
        return shape(json.loads(answer)) if answer else None
    events = [event.removeprefix("data: ") for event in answer.split("\n\n") if event]
    return [key for key, _ in groupby(event if event == "[DONE]" else shape(json.loads(event)) for event in events)]


REPLAYED = sorted(path.stem for path in (FIXTURES / "http").glob("*.txt") if not path.stem.startswith("err-queue-full"))


@pytest.mark.parametrize("name", REPLAYED)
async def test_recorded_request_gets_the_recorded_answer(
    name: str, open_fake: FakeProcess, guarded_fake: FakeProcess
) -> None:
    recorded = read_recording(name)
    fake = guarded_fake if recorded.is_guarded else open_fake
    async with httpx.AsyncClient(base_url=fake.url, timeout=LIMIT_SECONDS, trust_env=False) as client:
        answer = await client.request(
            recorded.method, recorded.target, headers=recorded.headers, content=recorded.content
        )
    assert answer.status_code == recorded.status
    ignored = {"date", "x-request-id", "content-length"}  # request ids are echoed only by a server told to
    expected = {name: value for name, value in recorded.answer_headers.items() if name not in ignored}
    assert {name: value for name, value in answer.headers.items() if name not in ignored} == expected
    if recorded.status >= 400:
        assert answer.text == recorded.answer
    else:
        content_type = answer.headers.get("content-type", "")
        assert shapes(answer.text, content_type) == shapes(recorded.answer, content_type)


async def test_request_id_of_the_client_becomes_the_id_of_the_answer(open_fake: FakeProcess) -> None:
    async with open_fake.client() as client:
        answer = await client.post("/v1/chat/completions", json=chat(1), headers={"x-request-id": "my-req-42"})
    assert answer.json()["id"] == "chatcmpl-my-req-42"


async def test_same_prompt_gets_the_same_text_streamed_or_whole(guarded_fake: FakeProcess) -> None:
    async with guarded_fake.client() as client:
        whole = (await client.post("/v1/chat/completions", json=chat(40))).json()
        async with open_stream(client, 40) as lines:
            events = [json.loads(line) async for line in lines if line != "[DONE]"]
    assert whole["usage"]["completion_tokens"] == 40
    text = "".join(event["choices"][0]["delta"]["content"] for event in events)
    assert text == whole["choices"][0]["message"]["content"]
    assert len(text.split()) == 40


async def test_answer_without_limits_ends_by_itself(guarded_fake: FakeProcess) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}]}
    async with guarded_fake.client() as client:
        answer = (await client.post("/v1/chat/completions", json=body)).json()
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert 16 <= answer["usage"]["completion_tokens"] <= 128


async def test_tokens_turn_back_into_their_text(open_fake: FakeProcess) -> None:
    text = "Grüße, world \N{SNOWMAN}"
    async with open_fake.client() as client:
        tokens = (await client.post("/tokenize", json={"prompt": text})).json()["tokens"]
        assert (await client.post("/detokenize", json={"tokens": tokens})).json() == {"prompt": text}


async def test_embedding_model_embeds_and_does_not_chat() -> None:
    with running_fake("--task", "embed") as fake:
        async with fake.client() as client:
            body = {"model": "tiny", "input": ["one", "two"]}
            numbers = (await client.post("/v1/embeddings", json=body)).json()
            packed = (await client.post("/v1/embeddings", json={**body, "encoding_format": "base64"})).json()
            refused = await client.post("/v1/chat/completions", json=chat(1))
            seen = await samples(client)
    assert [item["index"] for item in numbers["data"]] == [0, 1]
    assert len(numbers["data"][0]["embedding"]) == 16
    assert numbers["data"][0]["embedding"] != numbers["data"][1]["embedding"]
    assert isinstance(packed["data"][0]["embedding"], str)
    assert numbers["usage"]["prompt_tokens"] == 2
    assert (refused.status_code, refused.json()) == (404, {"detail": "Not Found"})
    assert seen["vllm:request_success_total{finished_reason=stop}"] == 2
    assert seen["vllm:generation_tokens_total"] == 0


# --- metrics ------------------------------------------------------------------------------------------------


def described(exposition: str) -> dict[str, tuple[str, set[frozenset[str]], list[str]]]:
    """The vLLM families of an exposition: type, sets of label names, bucket edges."""
    return {
        family.name: (
            family.type,
            {frozenset(sample.labels) for sample in family.samples},
            list(dict.fromkeys(sample.labels["le"] for sample in family.samples if "le" in sample.labels)),
        )
        for family in text_string_to_metric_families(exposition)
        if family.name.startswith("vllm:")
    }


async def test_metric_families_have_the_types_labels_and_buckets_of_vllm(open_fake: FakeProcess) -> None:
    recorded = described((FIXTURES / "metrics-after-load.txt").read_text())
    async with open_fake.client() as client:
        exposed = described((await client.get("/metrics")).text)
    assert {name: recorded.get(name) for name in exposed} == exposed
    assert {f"vllm:{name}" for name in FOR_SCALING} <= exposed.keys()


async def test_metrics_add_up_after_requests() -> None:
    with running_fake("--tokens-per-second", "200") as fake:
        async with fake.client() as client:
            answers = [(await client.post("/v1/chat/completions", json=chat(20))).json() for _ in range(3)]
            await client.get("/nosuchroute")
            seen = await samples(client)
    assert seen["vllm:generation_tokens_total"] == 60
    assert seen["vllm:prompt_tokens_total"] == sum(answer["usage"]["prompt_tokens"] for answer in answers)
    assert seen["vllm:request_success_total{finished_reason=length}"] == 3
    assert seen["vllm:time_to_first_token_seconds_count"] == seen["vllm:e2e_request_latency_seconds_count"] == 3
    assert seen["vllm:e2e_request_latency_seconds_sum"] == pytest.approx(
        seen["vllm:request_queue_time_seconds_sum"]
        + seen["vllm:request_prefill_time_seconds_sum"]
        + seen["vllm:request_decode_time_seconds_sum"]
    )
    assert seen["vllm:e2e_request_latency_seconds_sum"] >= 3 * 20 / 200
    assert seen["http_requests_total{handler=/v1/chat/completions,method=POST,status=2xx}"] == 3
    assert seen["http_requests_total{handler=none,method=GET,status=4xx}"] == 1


# --- queue --------------------------------------------------------------------------------------------------


async def test_queue_shows_in_metrics_refuses_when_full_and_forgets_clients_that_left() -> None:
    with running_fake("--max-num-seqs", "2", "--max-num-queued-reqs", "4", "--max-model-len", "8192") as fake:
        async with fake.client() as client:
            requests = [
                asyncio.create_task(client.post("/v1/chat/completions", json=chat(8000, stream=is_streamed)))
                for is_streamed in (True, False)
            ]
            await eventually(lambda: has_load(client, 2, 0))
            requests += [asyncio.create_task(client.post("/v1/chat/completions", json=chat(8000))) for _ in range(2)]
            await eventually(lambda: has_load(client, 2, 2))
            seen = await samples(client)
            assert seen["vllm:num_requests_waiting_by_reason{reason=capacity}"] == 2
            assert 0 < seen["vllm:kv_cache_usage_perc"] < 1

            for is_streamed in (True, False):
                refused = await client.post("/v1/chat/completions", json=chat(4, stream=is_streamed))
                assert refused.status_code == 503
                assert refused.text == read_recording("err-queue-full-nonstream").answer
            seen = await samples(client)
            assert seen["vllm:admission_rejections_total{reason=max_num_queued_reqs}"] == 2

            requests[0].cancel()
            await eventually(lambda: has_load(client, 2, 1))
            requests[1].cancel()
            await eventually(lambda: has_load(client, 2, 0))
            for request in requests:
                request.cancel()
            await eventually(lambda: has_load(client, 0, 0))
            await asyncio.wait(requests)
            seen = await samples(client)
            assert seen["vllm:request_success_total{finished_reason=abort}"] == 0
            assert seen["vllm:e2e_request_latency_seconds_count"] == 0


async def test_burst_beyond_the_queue_is_refused_before_or_inside_the_stream_and_the_rest_is_served() -> None:
    with running_fake("--max-num-queued-reqs", "3", "--tokens-per-second", "20") as fake:
        async with fake.client() as client:
            burst = [client.post("/v1/chat/completions", json=chat(10, stream=True)) for _ in range(12)]
            answers = await asyncio.gather(*burst)
    served = [answer for answer in answers if answer.status_code == 200 and '"error"' not in answer.text]
    refused = [answer for answer in answers if answer not in served]
    assert len(served) == 3
    for answer in refused:
        event = answer.text.removeprefix("data: ").split("\n\n")[0]
        assert json.loads(event)["error"]["code"] == 503
        assert answer.status_code == 503 or answer.text.endswith("\n\ndata: [DONE]\n\n")


# --- start, shutdown, faults --------------------------------------------------------------------------------


async def test_port_is_refused_while_loading_then_everything_answers() -> None:
    with running_fake("--load-seconds", "1.0", "--fault", "slow-start=0.2", is_awaited=False) as fake:
        started = time.monotonic()
        while not fake.is_listening():
            assert time.monotonic() - started < LIMIT_SECONDS
            await asyncio.sleep(0.02)
        assert time.monotonic() - started >= 1.0
        async with fake.client() as client:
            for path in ("/health", "/v1/models", "/metrics", "/ping"):
                assert (await client.get(path)).status_code == 200


async def test_port_that_somebody_listens_on_ends_the_process_with_1(open_fake: FakeProcess) -> None:
    with running_fake(port=open_fake.port, is_awaited=False) as second:
        assert await second.exit_code() == 1


async def test_sigterm_with_a_timeout_lets_requests_finish_and_refuses_new_ones() -> None:
    with running_fake("--shutdown-timeout", "20", "--max-num-seqs", "1", key="secret") as fake:
        async with fake.client() as client, open_stream(client, 30) as lines:
            waiting = asyncio.create_task(client.post("/v1/chat/completions", json=chat(2)))
            await eventually(lambda: has_load(client, 1, 1))
            fake.terminate()

            async def is_refused() -> bool:
                refused = await client.post("/v1/chat/completions", json=chat(2))
                return (refused.status_code, refused.text) == (500, SHUTDOWN_BODY)

            await eventually(is_refused)
            assert (await client.get("/health")).status_code == 200
            assert (await rest_of(lines))[-1] == "[DONE]"
            assert (await waiting).status_code == 200
        assert await fake.exit_code() == 0


@pytest.mark.parametrize("timeout_seconds", ["0", "0.5"])
async def test_sigterm_without_time_leaves_streams_hanging_until_the_client_closes(timeout_seconds: str) -> None:
    with running_fake("--shutdown-timeout", timeout_seconds) as fake:
        async with fake.client() as client, open_stream(client, 5000) as lines:
            await anext(lines)
            fake.terminate()
            await eventually(fake.has_stopped_listening)
            await wait_for_silence(lines)
            assert fake.process.poll() is None
        assert await fake.exit_code() == 0


async def test_second_sigterm_ends_the_process_at_once() -> None:
    with running_fake() as fake:
        async with fake.client() as client, open_stream(client, 5000) as lines:
            await anext(lines)
            fake.terminate()
            await eventually(fake.has_stopped_listening)
            fake.terminate()
            assert await fake.exit_code() == 130


async def test_crash_ends_requests_as_recorded_and_the_process_with_0() -> None:
    recorded_event = re.search(rb"data: \{.*\}", (FIXTURES / "crash-enginecore-stream.raw").read_bytes())
    assert recorded_event is not None
    recorded_body = (FIXTURES / "crash-enginecore-nonstream.raw").read_text().splitlines()[-1]
    with running_fake("--max-num-seqs", "1", key="secret") as fake:
        async with fake.client() as client, open_stream(client, 5000) as lines:
            await anext(lines)
            waiting = asyncio.create_task(client.post("/v1/chat/completions", json=chat(2)))
            await eventually(lambda: has_load(client, 1, 1))
            assert (await client.post("/fault", json={"kind": "crash"})).status_code == 200
            rest = await rest_of(lines)
            assert rest[-2:] == [recorded_event.group().decode().removeprefix("data: "), "[DONE]"]
            assert ((await waiting).status_code, (await waiting).text) == (500, recorded_body)
        assert await fake.exit_code() == 0


async def test_crash_can_be_planned_at_the_start() -> None:
    with running_fake("--fault", "crash-after=0.1", is_awaited=False) as fake:
        assert await fake.exit_code() == 0


async def test_frozen_engine_looks_healthy_and_makes_no_token_until_healed() -> None:
    with running_fake(key="secret") as fake:
        async with fake.client() as client, open_stream(client, 5000) as lines:
            await anext(lines)
            await client.post("/fault", json={"kind": "freeze"})
            before = await samples(client)
            probe = asyncio.create_task(client.post("/v1/chat/completions", json=chat(1)))
            for path in ("/health", "/v1/models", "/metrics"):
                assert (await client.get(path)).status_code == 200
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(probe), 0.3)
            after = await samples(client)
            assert after["vllm:generation_tokens_total"] == before["vllm:generation_tokens_total"]
            assert after["vllm:num_requests_running"] == 1
            await client.post("/fault", json={"kind": "heal"})
            assert (await probe).status_code == 200


async def test_errors_come_at_the_given_rate_and_speed_falls_by_the_given_factor() -> None:
    with running_fake("--tokens-per-second", "200", "--fault", "error-rate=1", key="secret") as fake:
        async with fake.client() as client:

            async def status() -> int:
                answer = await client.post("/v1/chat/completions", json=chat(1))
                return answer.status_code

            assert await status() == 500
            await client.post("/fault", json={"kind": "errors", "rate": 0.25})
            assert sorted([await status() for _ in range(8)]) == [200] * 6 + [500] * 2
            await client.post("/fault", json={"kind": "heal"})
            assert [await status() for _ in range(4)] == [200] * 4
            await client.post("/fault", json={"kind": "slow", "factor": 10})
            started = time.monotonic()
            await client.post("/v1/chat/completions", json=chat(10))
            assert time.monotonic() - started >= 0.4


async def test_faults_need_the_key_and_a_known_kind(guarded_fake: FakeProcess) -> None:
    async with guarded_fake.client() as client:
        del client.headers["authorization"]
        assert (await client.post("/fault", json={"kind": "crash"})).status_code == 401
        client.headers["authorization"] = "Bearer sk-one"
        for fault in ({"kind": "flood"}, {"kind": "errors", "rate": 2}, {"kind": "slow", "factor": 0}, {}):
            assert (await client.post("/fault", json=fault)).status_code == 400
