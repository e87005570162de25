"""Clients that stream from a proxy, and what became of each stream: for tests in which none may break unseen."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import httpx

_POLL_SECONDS = 0.05

WHOLE, CUT = "whole", "cut with an error event"


async def until_served(http: httpx.AsyncClient, model: str) -> None:
    """Return when the proxy knows a replica of the model, of which it hears a moment after the database does."""
    while True:
        with suppress(httpx.HTTPError):
            answer = await http.get(f"/v1/models/{model}")
            if answer.status_code == 200 and answer.json()["state"] == "routable":
                return
        await asyncio.sleep(_POLL_SECONDS)


@dataclass(slots=True)
class Streams:
    """Streams of one model, opened at the proxies by turns. `ended` counts outcomes; all but two are in plain words."""

    urls: Sequence[str]
    api_key: str = field(repr=False)
    model: str
    ended: Counter[str] = field(default_factory=Counter)
    _opened: int = 0
    _running: set[asyncio.Task[None]] = field(default_factory=set)

    async def open(self, count: int, *, tokens: int) -> None:
        """Open so many at proxies that serve the model; return when each has its first token, or has failed."""
        await self._until_served()
        begun = [asyncio.Event() for _ in range(count)]
        for has_begun in begun:
            task = asyncio.create_task(self._run(self.urls[self._opened % len(self.urls)], tokens, has_begun))
            self._opened += 1
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        await asyncio.gather(*(has_begun.wait() for has_begun in begun))

    async def all_ended(self) -> Counter[str]:
        await asyncio.gather(*self._running)
        return self.ended

    @asynccontextmanager
    async def trickle(self) -> AsyncIterator[None]:
        """Short streams, one after another at each proxy, until the block ends."""

        async def go_on(url: str) -> None:
            while not is_enough.is_set():
                await self._run(url, 2, asyncio.Event())

        await self._until_served()
        is_enough = asyncio.Event()
        tasks = [asyncio.create_task(go_on(url)) for url in self.urls]
        try:
            yield
        finally:
            is_enough.set()
            await asyncio.gather(*tasks)

    async def _until_served(self) -> None:
        for url in self.urls:
            async with asyncio.timeout(30), httpx.AsyncClient(base_url=url, headers=self._headers()) as http:
                await until_served(http, self.model)

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"}

    async def _run(self, url: str, tokens: int, has_begun: asyncio.Event) -> None:
        try:
            outcome = await self._outcome(url, tokens, has_begun)
        except httpx.HTTPError as error:
            outcome = f"{type(error).__name__}: {error}"
        has_begun.set()
        self.ended[outcome] += 1

    async def _outcome(self, url: str, tokens: int, has_begun: asyncio.Event) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": f"Tell me {self._opened} things."}],
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        generated = 0
        events: list[str] = []
        async with (
            httpx.AsyncClient(timeout=120, trust_env=False) as http,
            http.stream("POST", f"{url}/v1/chat/completions", json=body, headers=self._headers()) as answer,
        ):
            if answer.status_code != 200:
                return f"{answer.status_code}: {(await answer.aread()).decode()[:200]}"
            async for line in answer.aiter_lines():
                if line.startswith("data: "):
                    has_begun.set()
                    events.append(line.removeprefix("data: "))
                    with suppress(ValueError):
                        generated = ((json.loads(events[-1]).get("usage")) or {}).get("completion_tokens", generated)
        if events[-1:] == ["[DONE]"]:
            return WHOLE if generated == tokens else f"[DONE] after {generated} of {tokens} tokens"
        error = json.loads(events[-1]).get("error") if events else None
        return (
            CUT if error and error["code"] == "upstream_error" else f"ended without [DONE] after {len(events)} events"
        )
