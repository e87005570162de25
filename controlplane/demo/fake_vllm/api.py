"""The routes of the fake, as one ASGI app.

The API key guards what vLLM guards with it (/v1, /v2, /inference), and /fault; everything else is open. A prompt is
checked, admitted by the engine, and read while the engine extends it; when the client leaves, its generation is aborted
at once. As in vLLM there are two chances to find the queue full: before the answer starts (503), and, for requests that
arrive together, after a stream has started (200 with an error event).
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from controlplane.demo.fake_vllm import answers, metrics, prompts
from controlplane.demo.fake_vllm.answers import ChatAnswer, CompletionAnswer, Refusal
from controlplane.demo.fake_vllm.engine import (
    Engine,
    EngineDead,
    EngineState,
    EngineStopping,
    Generation,
    GenerationAborted,
    QueueFull,
)
from controlplane.demo.fake_vllm.exchange import ClientGone, Exchange, Receive, Scope, Send
from controlplane.demo.fake_vllm.faults import Faults
from controlplane.demo.fake_vllm.prompts import Prompt, ServedModel
from controlplane.demo.fake_vllm.text import generated_text

Handler = Callable[[Exchange], Awaitable[None]]
Task = Literal["generate", "embed"]

_GUARDED = ("/v1", "/v2", "/inference", "/fault")


@dataclass(frozen=True, slots=True)
class ApiOptions:
    """What is served; without keys nothing is guarded."""

    model: ServedModel
    task: Task = "generate"
    api_keys: tuple[str, ...] = field(default=(), repr=False)


class FakeVllm:
    """The ASGI app."""

    def __init__(self, options: ApiOptions, engine: Engine, seen: metrics.VllmMetrics, faults: Faults) -> None:
        self._model = options.model
        self._keys = [key.encode() for key in options.api_keys]
        self._engine = engine
        self._metrics = seen
        self._faults = faults
        self._routes: dict[str, dict[str, Handler]] = {
            "/health": {"GET": self._health},
            "/ping": {"GET": self._health, "POST": self._health},
            "/version": {"GET": self._version},
            "/load": {"GET": self._server_load},
            "/metrics": {"GET": self._vllm_metrics},
            "/tokenize": {"POST": self._tokenize},
            "/detokenize": {"POST": self._detokenize},
            "/v1/models": {"GET": self._models},
            "/fault": {"POST": self._fault},
        }
        if options.task == "generate":
            self._routes["/v1/chat/completions"] = {"POST": self._chat}
            self._routes["/v1/completions"] = {"POST": self._complete}
        else:
            self._routes["/v1/embeddings"] = {"POST": self._embed}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        methods = self._routes.get(exchange.path)
        if exchange.path.startswith(_GUARDED) and not self._is_authorized(exchange.header("authorization")):
            await exchange.answer(401, b'{"error":"Unauthorized"}', has_cors=False)
        elif methods is None:
            await exchange.answer(404, b'{"detail":"Not Found"}')
        elif exchange.method not in methods:
            await exchange.answer(405, b'{"detail":"Method Not Allowed"}', allow=", ".join(methods))
        else:
            try:
                await methods[exchange.method](exchange)
            except Refusal as refusal:
                await exchange.refuse(refusal)
            except (QueueFull, EngineStopping, EngineDead) as error:
                await exchange.refuse(_refusal_of(error))
            except (ClientGone, GenerationAborted):
                pass  # nobody is left to answer
        if exchange.status is not None:
            route = exchange.path if methods is not None else "none"
            self._metrics.saw_http_request(route, exchange.method, exchange.status)

    def _is_authorized(self, authorization: str | None) -> bool:
        if not self._keys:
            return True
        scheme, _, key = (authorization or "").partition(" ")
        given = key.strip().encode()
        return scheme.lower() == "bearer" and any(secrets.compare_digest(given, known) for known in self._keys)

    # --- prompts ---

    async def _chat(self, exchange: Exchange) -> None:
        prompt = prompts.chat_prompt(await _json_of(exchange), self._model)
        await self._generate(exchange, prompt, ChatAnswer(exchange.header("x-request-id"), self._model.names[0]))

    async def _complete(self, exchange: Exchange) -> None:
        prompt = prompts.completion_prompt(await _json_of(exchange), self._model)
        answer = CompletionAnswer(exchange.header("x-request-id"), self._model.names[0])
        await self._generate(exchange, prompt, answer)

    async def _embed(self, exchange: Exchange) -> None:
        prompt = prompts.embedding_prompt(await _json_of(exchange), self._model)
        self._check_admission()
        async with self._inside_engine(exchange, prompt.generation()) as generation:
            await generation.reach(1)
        body = answers.embeddings(
            exchange.header("x-request-id"),
            self._model.names[0],
            prompt.seeds,
            prompt.prompt_tokens,
            is_base64=prompt.is_base64,
        )
        await exchange.answer(200, body)

    async def _generate(self, exchange: Exchange, prompt: Prompt, answer: CompletionAnswer) -> None:
        self._check_admission()
        if prompt.is_streamed:
            await exchange.start_stream()
        await asyncio.sleep(0)  # the way to the engine: of requests that arrive together, all have passed the check
        async with self._inside_engine(exchange, prompt.generation()) as generation:
            if prompt.is_streamed:
                await _stream(exchange, generation, prompt, answer)
                return
            tokens = await generation.reach(prompt.output_tokens)
        text = generated_text(prompt.seed, 0, tokens)
        await exchange.answer(200, answer.whole(text, prompt.finish_reason, prompt.prompt_tokens, tokens))

    def _check_admission(self) -> None:
        if self._faults.takes_this_request():
            raise Refusal(500, "Internal server error")
        self._engine.check_admission()

    @asynccontextmanager
    async def _inside_engine(self, exchange: Exchange, generation: Generation) -> AsyncIterator[Generation]:
        """Submit a generation; it leaves the engine with this block, or earlier if the client leaves."""
        self._engine.submit(generation, _now())
        departure = asyncio.create_task(exchange.wait_for_disconnect())
        departure.add_done_callback(lambda _: self._engine.abort(generation))
        try:
            yield generation
        finally:
            departure.cancel()

    async def _tokenize(self, exchange: Exchange) -> None:
        await exchange.answer(200, answers.compact(prompts.tokenized(await _json_of(exchange), self._model)))

    async def _detokenize(self, exchange: Exchange) -> None:
        await exchange.answer(200, answers.compact(prompts.detokenized(await _json_of(exchange), self._model)))

    # --- everything else ---

    async def _models(self, exchange: Exchange) -> None:
        model = self._model
        await exchange.answer(200, answers.model_list(model.names, model.root, model.max_model_len))

    async def _health(self, exchange: Exchange) -> None:
        is_dead = self._engine.state is EngineState.DEAD
        await exchange.answer(503 if is_dead else 200, content_type=None)

    async def _version(self, exchange: Exchange) -> None:
        await exchange.answer(200, answers.compact({"version": answers.VERSION}))

    async def _server_load(self, exchange: Exchange) -> None:
        """Always 0, as vLLM answers unless it was told to track its load."""
        await exchange.answer(200, b'{"server_load":0}')

    async def _vllm_metrics(self, exchange: Exchange) -> None:
        await exchange.answer(200, self._metrics.render(self._engine.load), metrics.CONTENT_TYPE)

    async def _fault(self, exchange: Exchange) -> None:
        fault = await _json_of(exchange)
        try:
            self._faults.apply(fault)
        except ValueError as error:
            raise Refusal(400, str(error)) from None
        await exchange.answer(200, b"{}")


async def _stream(exchange: Exchange, generation: Generation, prompt: Prompt, answer: CompletionAnswer) -> None:
    """Send tokens as they come; several in one event if they came together or the client reads slowly."""
    sent = await generation.reach(1)
    text = generated_text(prompt.seed, 0, sent)
    if opening := answer.opening():
        await exchange.write(opening)
    while sent < prompt.output_tokens:
        await exchange.write(answer.event(text))
        so_far = await generation.reach(sent + 1)
        text = generated_text(prompt.seed, sent, so_far)
        sent = so_far
    await exchange.write(answer.last_event(text, prompt.finish_reason, is_end=not prompt.has_usage))
    if prompt.has_usage:
        await exchange.write(answer.usage_event(prompt.prompt_tokens, sent))
    await exchange.end_stream()


async def _json_of(exchange: Exchange) -> dict[str, Any]:
    return prompts.parse_json(exchange.header("content-type") or "", await exchange.body())


def _refusal_of(error: QueueFull | EngineStopping | EngineDead) -> Refusal:
    if isinstance(error, QueueFull):
        return Refusal(503, answers.QUEUE_FULL)
    if isinstance(error, EngineStopping):
        return Refusal(500, answers.ENGINE_STOPPING, has_cors=False)
    return Refusal(500, answers.ENGINE_DEAD)


def _now() -> float:
    return asyncio.get_running_loop().time()
