"""Clients that ask the proxy for chat completions, in a closed loop, and keep count of how that went.

Three of four requests stream; the first does not, so that what it waits for a replica is in no time to first token. A
stream that ends without `[DONE]`, or with an error inside, is broken; any other answer
than 200 is a failure. A client whose service is no longer wanted finishes the request it is at.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from dataclasses import dataclass, field

import httpx

_STREAMED_OF = 4
_RECENT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class LoadOptions:
    url: str  # the proxy's root
    api_key: str = field(repr=False)
    model: str
    tokens: int = 60  # of each answer
    timeout_seconds: float = 120.0


@dataclass(slots=True)
class Count:
    """What came of the requests so far."""

    sent: int = 0
    done: int = 0
    failed: int = 0
    broken: int = 0
    first_words: list[str] = field(default_factory=list)  # of the first failures, for people


class Load:
    """As many clients as `wanted` says. `run` until cancelled; `finish` lets the requests under way end."""

    def __init__(self, options: LoadOptions) -> None:
        self.count = Count()
        self.wanted = 0
        self._options = options
        self._clients: set[asyncio.Task[None]] = set()
        self._first_tokens: deque[tuple[float, float]] = deque()  # (when, seconds)
        self._http = httpx.AsyncClient(
            base_url=options.url,
            headers={"Authorization": f"Bearer {options.api_key}"},
            limits=httpx.Limits(max_connections=None),
            timeout=options.timeout_seconds,
            trust_env=False,
        )

    @property
    def in_flight(self) -> int:
        return self.count.sent - self.count.done - self.count.failed - self.count.broken

    def recent_ttft_seconds(self, quantile: float = 0.5) -> float | None:
        """Time to first token of the streams that began lately, or None if there were none."""
        while self._first_tokens and self._first_tokens[0][0] < time.monotonic() - _RECENT_SECONDS:
            self._first_tokens.popleft()
        recent = sorted(seconds for _, seconds in self._first_tokens)
        return recent[min(len(recent) - 1, int(len(recent) * quantile))] if recent else None

    async def run(self) -> None:
        """Keep the wanted number of clients busy."""
        while True:
            self._clients = {client for client in self._clients if not client.done()}
            for number in range(len(self._clients), self.wanted):
                self._clients.add(asyncio.create_task(self._client(number)))
            await asyncio.sleep(0.1)

    async def finish(self) -> None:
        """Send no further request; return when every one under way has ended."""
        self.wanted = 0
        await asyncio.gather(*self._clients)
        await self._http.aclose()

    async def _client(self, number: int) -> None:
        while number < self.wanted:
            self.count.sent += 1
            is_streamed = self.count.sent % _STREAMED_OF != 1
            try:
                await (self._stream() if is_streamed else self._ask())
            except httpx.HTTPError as error:
                self._note_failure(f"{type(error).__name__}: {error}")
                await asyncio.sleep(0.5)  # a proxy that is away is not hammered

    async def _ask(self) -> None:
        answer = await self._http.post("/v1/chat/completions", json=self._body(stream=False))
        if answer.status_code != 200:
            self._note_failure(f"{answer.status_code}: {answer.text[:200]}")
            return
        self.count.done += 1

    async def _stream(self) -> None:
        started = time.monotonic()
        is_complete = False
        async with self._http.stream("POST", "/v1/chat/completions", json=self._body(stream=True)) as answer:
            if answer.status_code != 200:
                await answer.aread()
                self._note_failure(f"{answer.status_code}: {answer.text[:200]}")
                return
            try:
                async for line in answer.aiter_lines():
                    if line == "data: [DONE]":
                        is_complete = True
                    elif line.startswith("data: "):
                        chunk = json.loads(line.removeprefix("data: "))
                        if "error" in chunk:
                            self._note_broken(line)
                            return
                        if started and _has_content(chunk):
                            self._first_tokens.append((time.monotonic(), time.monotonic() - started))
                            started = 0.0
            except httpx.HTTPError as error:
                self._note_broken(f"{type(error).__name__}: {error}")
                return
        if is_complete:
            self.count.done += 1
        else:
            self._note_broken("the stream ended without [DONE]")

    def _body(self, *, stream: bool) -> dict[str, object]:
        return {
            "model": self._options.model,
            "messages": [{"role": "user", "content": f"Tell me about replica number {self.count.sent}."}],
            "max_tokens": self._options.tokens,
            "ignore_eos": True,
            "stream": stream,
        }

    def _note_failure(self, words: str) -> None:
        self.count.failed += 1
        self.count.first_words = [*self.count.first_words, words][:5]

    def _note_broken(self, words: str) -> None:
        self.count.broken += 1
        self.count.first_words = [*self.count.first_words, words][:5]


def _has_content(chunk: dict[str, list[dict[str, dict[str, str]]]]) -> bool:
    return any(choice.get("delta", {}).get("content") for choice in chunk.get("choices", []))
