"""The ranks of one fake on several nodes: who they are, how they meet, and what becomes of one when another goes.

| event | leader (rank 0) | followers |
|---|---|---|
| start, in any order | listens on its port only when every follower has come | wait for the leader to come |
| a follower goes | a second later its engine is dead: a crash as in `server`, with exit code 0 | the others stay |
| the leader goes | | stay for ever |
| SIGTERM | as `server` tells; followers do not hear of it | exit 0 |

So it is with vLLM 0.32's `--nnodes`. Ranks meet at the leader's master port; one connection per follower says that
both live.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NoReturn

_NOTICE_SECONDS = 1.0
_RETRY_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Ranks:
    """As the options of the same names."""

    nnodes: int
    node_rank: int
    master: tuple[str, int]


def gather(ranks: Ranks) -> list[socket.socket]:
    """Wait, as the leader, until every follower has come. Raises OSError if the port is taken or a stranger comes."""
    if ranks.nnodes == 1:
        return []
    with socket.create_server(ranks.master) as door:
        print(f"Waiting for {ranks.nnodes - 1} more ranks at {ranks.master[0]}:{ranks.master[1]}", flush=True)
        followers: dict[int, socket.socket] = {}
        while len(followers) < ranks.nnodes - 1:
            follower, _ = door.accept()
            rank = int.from_bytes(follower.recv(2), "big")
            if not 0 < rank < ranks.nnodes or rank in followers:
                raise OSError(f"a stranger came as rank {rank} of {ranks.nnodes}")
            followers[rank] = follower
    return list(followers.values())


def watch(followers: Iterable[socket.socket], crash: Callable[[], None]) -> None:
    """Call `crash` a moment after a follower is gone. To be called where an event loop runs."""
    loop = asyncio.get_running_loop()

    def noticed(follower: socket.socket) -> None:
        loop.remove_reader(follower)
        print("A follower is gone", flush=True)
        loop.call_later(_NOTICE_SECONDS, crash)

    for follower in followers:
        loop.add_reader(follower, noticed, follower)


def follow(ranks: Ranks) -> NoReturn:
    """Be a follower, until SIGTERM ends the process with exit code 0."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    with _meet(ranks) as leader:
        leader.sendall(ranks.node_rank.to_bytes(2, "big"))
        print(f"Rank {ranks.node_rank} of {ranks.nnodes} follows", flush=True)
        while True:
            signal.pause()


def _meet(ranks: Ranks) -> socket.socket:
    while True:
        try:
            return socket.create_connection(ranks.master)
        except OSError:  # the leader has not come yet
            time.sleep(_RETRY_SECONDS)
