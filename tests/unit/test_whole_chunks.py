"""A stream's chunks are passed on untouched where each comes whole, and mean what the parser would have read."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from controlplane.core.breaker import Breaker
from controlplane.proxy import wire
from controlplane.proxy.upstreams import Head, Upstream, UpstreamConnection
from tests.unit.upstreams import an_endpoint

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
EVENT = b'data: {"text":"a"}\n\n'

# what looks like the framing around it, or nearly
EVENTS = st.sampled_from(
    [
        EVENT,
        b"data: 5\n\n",
        b"\n\n",
        b"\n",
        b"5\r\n5",
        b"5\n\n\r\n",
        wire.chunk(EVENT),
        b"0\r\n\r\n",
        EVENT * 40,
        EVENT + b"data: half",
        b"x" * 3000 + b"\n\n",
    ]
)


class Transport:
    def write(self, data: bytes) -> None: ...

    def abort(self) -> None: ...

    def close(self) -> None: ...

    def is_closing(self) -> bool:
        return False


class Caller:
    """Hears an answer; `takes_chunks` says whether it takes those that come whole."""

    def __init__(self, *, takes_chunks: bool = True) -> None:
        self.takes_chunks = takes_chunks
        self.body = b""
        self.whole_chunks = 0
        self.ends = 0
        self.is_lost = False

    def head_came(self, head: Head) -> None:
        assert head.status == 200

    def body_came(self, piece: bytes) -> None:
        self.body += piece

    def chunk_came(self, chunk: bytes) -> bool:
        if self.takes_chunks:
            self.whole_chunks += 1
            size, _, rest = chunk.partition(b"\r\n")
            assert len(rest) == int(size, 16) + 2
            self.body += rest[:-2]
        return self.takes_chunks

    def answer_ended(self, last: bytes) -> None:
        self.body += last
        self.ends += 1

    def upstream_lost(self) -> None:
        self.is_lost = True


def hear(reads: list[bytes], *, takes_chunks: bool = True) -> Caller:
    connection = UpstreamConnection(Upstream(an_endpoint("n1"), Breaker(), cast("Any", None)))
    connection.connection_made(cast("Any", Transport()))
    caller = Caller(takes_chunks=takes_chunks)
    connection.send(cast("Any", caller), b"")
    for read in reads:
        if caller.ends == 0 and not caller.is_lost:
            connection.data_received(read)
    return caller


def cut(data: bytes, at: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(place % (len(data) + 1) for place in at)})
    return [data[start:end] for start, end in pairwise(places)]


@given(st.lists(EVENTS, min_size=1, max_size=8), st.booleans())
@example([b"5", b"5\n\n", EVENT], True)
def test_chunks_that_come_one_by_one_mean_what_they_say(events: list[bytes], takes_chunks: bool) -> None:
    heard = hear([HEAD, *map(wire.chunk, events), wire.LAST_CHUNK], takes_chunks=takes_chunks)
    assert (heard.body, heard.ends, heard.is_lost) == (b"".join(events), 1, False)


@given(st.lists(EVENTS, min_size=1, max_size=8), st.lists(st.integers(0, 10_000), max_size=12))
def test_chunks_that_come_in_any_pieces_mean_what_they_say(events: list[bytes], at: list[int]) -> None:
    heard = hear(cut(HEAD + b"".join(map(wire.chunk, events)) + wire.LAST_CHUNK, at))
    assert (heard.body, heard.ends, heard.is_lost) == (b"".join(events), 1, False)


@pytest.mark.parametrize("first", [HEAD + wire.chunk(EVENT), HEAD + wire.chunk(EVENT) + wire.chunk(EVENT)])
def test_after_the_first_every_event_in_a_chunk_of_its_own_is_passed_on_as_it_is(first: bytes) -> None:
    heard = hear([first, *[wire.chunk(EVENT)] * 5, wire.LAST_CHUNK])
    assert heard.whole_chunks == 5


@pytest.mark.parametrize("beginning", [b"014\r\n", b"14;a=b\r\n", b"14 \r\n", b"13\r\n", b"15\r\n"])
def test_a_chunk_that_is_written_otherwise_is_left_to_the_parser(beginning: bytes) -> None:
    assert len(EVENT) == 0x14
    assert hear([HEAD + wire.chunk(EVENT), beginning + EVENT + b"\r\n"]).whole_chunks == 0


def test_what_is_no_chunk_is_refused_as_before() -> None:
    heard = hear([HEAD + wire.chunk(EVENT), wire.chunk(EVENT), b"+14\r\n" + EVENT + b"\r\n"])
    assert heard.is_lost
    assert heard.body == 2 * EVENT


def test_a_body_with_a_length_is_never_taken_for_chunks() -> None:
    body = EVENT + wire.chunk(EVENT) * 2
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n" % len(body)
    heard = hear([head, EVENT, wire.chunk(EVENT), wire.chunk(EVENT)])
    assert (heard.body, heard.ends, heard.whole_chunks) == (body, 1, 0)
