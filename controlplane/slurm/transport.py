"""One HTTP exchange with slurmrestd, over TCP or a unix socket: the answer, or what its absence means.

A connection is made for every request and not kept: slurmrestd closes idle ones, and a request sent on a closed one
could not be told from a submit that got lost. Only a connection that could not be made is tried again, since then
certainly nothing was sent; everything later is the caller's to repeat.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

import httpx
import tenacity

from controlplane.slurm.errors import SlurmAmbiguous, SlurmUnreachable, foreign_text

_CERTAINLY_NOT_SENT: Final = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_SHORTEST_SECRET: Final = 16  # a word of the answer's own, such as a key in its JSON, must not be taken for one
_RETRY_SECONDS: Final = 0.1  # the first pause before a connection is tried again


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. `body` is the JSON object in it, or None: slurmrestd's own errors are plain text."""

    status: int
    body: Mapping[str, Any] | None
    text: str = ""  # cut, for people

    @classmethod
    def read(cls, status: int, content: bytes) -> Self:
        text = content.decode("utf-8", "replace")  # job names may hold any bytes
        try:
            body = json.loads(text)
        except ValueError:
            body = None
        return cls(status, body if isinstance(body, dict) else None, foreign_text(text[:1024]))


class Transport:
    """Sends requests to one slurmrestd. `url` is `http://host:port`, `https://...` or `unix:/path/to/socket`.

    `network`: what carries the bytes instead of a socket; a connection that it cannot make is tried again at once.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_seconds: float,
        connect_timeout_seconds: float,
        network: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        is_socket = url.startswith("unix:")
        self._timeout_seconds = timeout_seconds
        self._retry_seconds = _RETRY_SECONDS if network is None else 0.0
        self._client = httpx.AsyncClient(
            base_url="http://localhost" if is_socket else url,
            transport=network
            or httpx.AsyncHTTPTransport(
                uds=url.removeprefix("unix:") if is_socket else None,
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
                trust_env=False,
            ),
            timeout=httpx.Timeout(None, connect=connect_timeout_seconds),
            trust_env=False,  # a proxy taken from the environment would be shown the token
        )

    async def aclose(self) -> None:
        await self._client.aclose()

    async def exchange(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str],
        body: Mapping[str, Any] | None,
        changes: bool,
        secrets: Iterable[str] = (),
    ) -> Answer:
        """Send one request and read its whole answer, within the time limit.

        `changes` says whether the request could change anything: if it was sent and no answer came, then
        `SlurmAmbiguous` is raised, else `SlurmUnreachable`. `secrets`: what of the request must not be in the answer,
        should whoever answers quote it.
        """
        after_sending = SlurmAmbiguous if changes else SlurmUnreachable
        request = self._client.build_request(method, path, headers=dict(headers), json=body)
        try:
            async with asyncio.timeout(self._timeout_seconds):
                response = await self._send(request)
        except TimeoutError:
            raise after_sending(f"{method} {path}: no answer within {self._timeout_seconds:g} s") from None
        except _CERTAINLY_NOT_SENT as error:
            raise SlurmUnreachable(f"no connection to slurmrestd: {_words(error)}") from None
        except httpx.HTTPError as error:
            raise after_sending(f"{method} {path}: connection broken: {_words(error)}") from None
        content = response.content
        for secret in secrets:
            if len(secret) >= _SHORTEST_SECRET:
                content = content.replace(secret.encode(), b"<secret>")
        return Answer.read(response.status_code, content)

    async def _send(self, request: httpx.Request) -> httpx.Response:
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(httpx.ConnectError),
            stop=tenacity.stop_after_attempt(3),
            wait=tenacity.wait_random_exponential(multiplier=self._retry_seconds, max=1.0),
            reraise=True,
        )
        return await retrying(self._client.send, request)


def _words(error: Exception) -> str:
    return foreign_text(str(error)) or type(error).__name__
