"""OpenAI's two SDKs behind one question: a call, and what became of it, told in the same words by both."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import openai

JS_DIRECTORY = Path(__file__).with_name("openai_js")
_ANSWER_SECONDS = 30.0
_AUDIO = ("speech.wav", b"RIFF")


@dataclass(frozen=True, slots=True)
class Question:
    url: str  # of the proxy
    key: str
    call: str
    params: dict[str, Any]
    stream: bool = False
    max_retries: int = 0


@dataclass(frozen=True, slots=True)
class Raised:
    """An exception of an SDK. `kind`: its class, without the two languages' different names for what has none."""

    kind: str
    status: int | None
    code: str | None
    param: str | None
    type: str | None
    request_id: str | None


@dataclass(frozen=True, slots=True)
class Told:
    result: Any = None
    events: list[Any] = field(default_factory=list)
    error: Raised | None = None


class Sdk(Protocol):
    async def ask(self, question: Question) -> Told: ...


_PLAIN = "APIError"
_KINDS = {"APIStatusError": _PLAIN}  # Python has a class for a status without a class of its own; JavaScript has not


class PythonSdk:
    async def ask(self, question: Question) -> Told:
        events: list[Any] = []
        async with openai.AsyncOpenAI(
            base_url=f"{question.url}/v1",
            api_key=question.key,
            max_retries=question.max_retries,
            http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
        ) as client:
            try:
                answer = await self._called(client, question)
                if not question.stream:
                    return Told(answer.model_dump() if hasattr(answer, "model_dump") else answer)
                async for event in answer:
                    events.append(event.model_dump())  # noqa: PERF401 - those before an error are wanted
                return Told(events=events)
            except openai.APIError as error:
                return Told(events=events, error=_raised(error))

    async def _called(self, client: openai.AsyncOpenAI, question: Question) -> Any:
        params = {**question.params, **({"stream": True} if question.stream else {})}
        match question.call:
            case "chat":
                return await client.chat.completions.create(**params)
            case "completion":
                return await client.completions.create(**params)
            case "embedding":
                return await client.embeddings.create(**params)
            case "response":
                return await client.responses.create(**params)
            case "transcription":
                return await client.audio.transcriptions.create(file=_AUDIO, **params)
            case "translation":
                return await client.audio.translations.create(file=_AUDIO, **params)
            case "models":
                return await client.models.list()
            case "model":
                return await client.models.retrieve(params["model"])
            case call:
                raise ValueError(call)


def _raised(error: openai.APIError) -> Raised:
    kind = type(error).__name__
    return Raised(
        _KINDS.get(kind, kind),
        getattr(error, "status_code", None),
        error.code,
        error.param,
        error.type,
        getattr(error, "request_id", None),
    )


class JsSdk:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def ask(self, question: Question) -> Told:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = {
            "baseURL": f"{question.url}/v1",
            "apiKey": question.key,
            "maxRetries": question.max_retries,
            "call": question.call,
            "params": question.params,
            "stream": question.stream,
        }
        self._process.stdin.write(json.dumps(line).encode() + b"\n")
        async with asyncio.timeout(_ANSWER_SECONDS):
            answer = await self._process.stdout.readline()
        assert answer, "the JavaScript program has ended; what it said is above"
        told = json.loads(answer)
        error = told.get("error")
        return Told(
            told.get("result"),
            told.get("events", []),
            error
            and Raised(
                error["kind"], error["status"], error["code"], error["param"], error["type"], error["requestID"]
            ),
        )


@asynccontextmanager
async def running_js() -> AsyncIterator[JsSdk]:
    """Fails with a sentence where Node or the SDK is missing."""
    node = shutil.which("node")
    assert node, "node is missing: run `make setup`"
    assert (JS_DIRECTORY / "node_modules" / "openai").is_dir(), "the openai package for Node is missing: `make setup`"
    process = await asyncio.create_subprocess_exec(
        node,
        "ask.mjs",
        cwd=JS_DIRECTORY,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=2**22,
    )
    try:
        yield JsSdk(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        async with asyncio.timeout(_ANSWER_SECONDS):
            await process.wait()
