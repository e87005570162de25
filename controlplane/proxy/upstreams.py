"""Connections to endpoints, and what is in flight on them.

One httpx transport holds one connection: a pool of httpcore looks at all of its connections at every request, which
costs more than the request does once hundreds of streams run. Idle connections are kept per URL and reused newest
first; they are closed before vLLM closes its end, so that a request seldom meets a connection that is about to die.

An endpoint that is no longer routable gets no new requests; its idle connections are closed at once (vLLM waits for
them before it exits) and its busy ones when their answers end.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import httpx

_SWEEP_SECONDS = 1.0
_LIMITS = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=None)


class Upstreams:
    """Run `sweep` while it is used, and `close` it after."""

    def __init__(self, *, keepalive_seconds: float, avoid_seconds: float) -> None:
        self.in_flight: Counter[str] = Counter()  # by URL; one that has none is absent
        self._keepalive_seconds = keepalive_seconds
        self._avoid_seconds = avoid_seconds
        self._avoided_until: dict[str, float] = {}
        self._idle: defaultdict[str, deque[tuple[float, httpx.AsyncHTTPTransport]]] = defaultdict(deque)
        self._routable: frozenset[str] = frozenset()
        # The system's certificate authorities, where a site installs its own.
        self._tls = ssl.create_default_context()

    def keep(self, urls: Collection[str]) -> None:
        """These are the routable ones: what connects to others is closed as soon as it is idle."""
        self._routable = frozenset(urls)

    @contextmanager
    def request_in_flight(self, url: str) -> Iterator[None]:
        self.in_flight[url] += 1
        try:
            yield
        finally:
            self.in_flight[url] -= 1
            if not self.in_flight[url]:
                del self.in_flight[url]

    def avoid(self, url: str) -> None:
        """It could not be reached: for a moment, others are asked first."""
        self._avoided_until[url] = time.monotonic() + self._avoid_seconds

    def avoided(self) -> Collection[str]:
        now = time.monotonic()
        if any(until <= now for until in self._avoided_until.values()):
            self._avoided_until = {url: until for url, until in self._avoided_until.items() if until > now}
        return self._avoided_until.keys()

    def take(self, url: str) -> httpx.AsyncHTTPTransport:
        """A connection that is idle, or one that is made when it is first used."""
        idle = self._idle.get(url)
        if idle and idle[-1][0] + self._keepalive_seconds > time.monotonic():
            return idle.pop()[1]
        # No proxy of the environment: an endpoint is near, and its prompts are nobody else's.
        return httpx.AsyncHTTPTransport(verify=self._tls, trust_env=False, limits=_LIMITS)

    async def give_back(self, url: str, transport: httpx.AsyncHTTPTransport) -> None:
        """The answer was read to its end: the next request may use the connection."""
        if url in self._routable:
            self._idle[url].append((time.monotonic(), transport))
        else:
            await transport.aclose()

    async def sweep(self) -> None:
        """Close what has been idle for too long, or is of no more use, until cancelled."""
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            now = time.monotonic()
            for url, idle in list(self._idle.items()):
                while idle and (url not in self._routable or idle[0][0] + self._keepalive_seconds <= now):
                    await idle.popleft()[1].aclose()
                if not idle:
                    del self._idle[url]

    async def close(self) -> None:
        for idle in self._idle.values():
            while idle:
                await idle.pop()[1].aclose()
