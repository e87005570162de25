"""The load process of the webhook benchmark: offers signed posts at a fixed rate, and tells what became of each.

It is open-loop: a post is due at its time whether or not the ones before were answered, and its answer's time counts
from then. A post that is due while every connection is busy opens another one, until `connections`; then it waits.
Prints one JSON object: the count of each status, the seconds of each answer, and which posts were accepted. A post
without an answer counts as "lost": what became of it is not known.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import hmac
import json
import time
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import uvloop

SIGNATURE, TIMESTAMP = b"X-Grafana-Alerting-Signature", b"X-Grafana-Alerting-Timestamp"


def signed_request(body: bytes, secret: bytes) -> bytes:
    """A whole HTTP request as Grafana makes it, signed now."""
    at = str(int(time.time())).encode()
    digest = hmac.new(secret, at + b":" + body, hashlib.sha256).hexdigest().encode()
    head = [b"POST /webhooks/grafana HTTP/1.1", b"Host: controlplane", b"User-Agent: Grafana"]
    head += [b"Content-Type: application/json", b"Content-Length: " + str(len(body)).encode()]
    head += [SIGNATURE + b": " + digest, TIMESTAMP + b": " + at]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


class Connection(asyncio.Protocol):
    """One request at a time; `answered` is resolved with the status, or with 0 when the connection breaks."""

    def __init__(self) -> None:
        self.answered: asyncio.Future[int] | None = None
        self.is_open = True
        self._received = bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one, and says it is not

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, ended, rest = self._received.partition(b"\r\n\r\n")
        if not ended:
            return
        lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        if len(rest) >= int(lengths[0].split(b":")[1]):
            self._received.clear()
            self._settle(int(head[9:12]))

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        self._settle(0)

    def ask(self, request: bytes) -> asyncio.Future[int]:
        assert self._transport is not None
        self.answered = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self.answered

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def _settle(self, status: int) -> None:
        if self.answered is not None and not self.answered.done():
            self.answered.set_result(status)


class Load:
    def __init__(self, port: int, secret: bytes, bodies: Sequence[bytes], *, connections: int, is_fresh: bool) -> None:
        self._port = port
        self._secret = secret
        self._bodies = bodies
        self._room = asyncio.Semaphore(connections)
        self._is_fresh = is_fresh
        self._idle: deque[Connection] = deque()
        self.statuses: Counter[int] = Counter()
        self.seconds: list[float] = []
        self.accepted: list[int] = []

    async def offer(self, rate: float) -> float:
        """Offer every body, one each 1/rate seconds; returns how long the offering took."""
        started = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for number in range(len(self._bodies)):
                due = started + number / rate
                if (early := due - time.perf_counter()) > 0:
                    await asyncio.sleep(early)
                tasks.create_task(self._post(number, due))
            took = time.perf_counter() - started
        for connection in self._idle:
            connection.close()
        return took

    async def _post(self, number: int, due: float) -> None:
        async with self._room:
            status = await self._answer(self._bodies[number])
        self.seconds.append(time.perf_counter() - due)
        self.statuses[status] += 1
        if status == 202:
            self.accepted.append(number)

    async def _answer(self, body: bytes) -> int:
        try:
            connection = self._idle_one() or await self._new()
        except OSError:
            return 0
        status = await connection.ask(signed_request(body, self._secret))
        if self._is_fresh or not connection.is_open:
            connection.close()
        else:
            self._idle.append(connection)
        return status

    def _idle_one(self) -> Connection | None:
        while self._idle:
            if (connection := self._idle.pop()).is_open:
                return connection
        return None

    async def _new(self) -> Connection:
        _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", self._port)
        return connection


async def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bodies", type=Path, help="one body a line")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--secret", required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--connections", type=int, default=512)
    parser.add_argument("--fresh-connections", action="store_true", help="one for each post, as Grafana does")
    options = parser.parse_args()
    load = Load(
        options.port,
        options.secret.encode(),
        options.bodies.read_bytes().splitlines(),
        connections=options.connections,
        is_fresh=options.fresh_connections,
    )
    took = await load.offer(options.rate)
    statuses = {"lost" if status == 0 else str(status): count for status, count in load.statuses.items()}
    print(json.dumps({"took": took, "statuses": statuses, "seconds": load.seconds, "accepted": load.accepted}))


if __name__ == "__main__":
    uvloop.run(_main())
