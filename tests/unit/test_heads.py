"""Heads that are remembered: whatever is taken for one of them, the parser would have read the same way."""

from __future__ import annotations

from random import Random

import httptools
import pytest

from controlplane.proxy.heads import KnownHead, KnownHeads
from controlplane.proxy.request import RequestHead

GOOD = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\n%b: %b\r\nauthorization: Bearer k\r\naccept: */*\r\n\r\n%b"
PIECES = (
    *(b"\r\n", b"\n", b"\r", b" ", b"\t", b"\0", b":", b"0", b"5", b"9", b"\r\n\r\n", b"abc", b"-1", b"+5", b"\xb2"),
    *(b"\r\ncontent-length: 3", b"\r\nContent-Length: 3", b"\r\nCONTENT-LENGTH: 3", b"\r\ncontent-length:3"),
    *(b"\r\ntransfer-encoding: chunked", b"\r\nconnection: close", b"POST / HTTP/1.1\r\nhost: b\r\n\r\n"),
)


class Parsed:
    """What the parser makes of bytes; `is_one`: exactly one request, which is whole, and nothing behind it."""

    def __init__(self, data: bytes) -> None:
        self.target = b""
        self.fields: list[tuple[bytes, bytes]] = []
        self.body = b""
        self.begun = self.ended = 0
        try:
            httptools.HttpRequestParser(self).feed_data(data)
        except httptools.HttpParserError:
            self.ended = -1
        self.is_one = self.begun == self.ended == 1

    def on_message_begin(self) -> None:
        self.begun += 1

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields.append((name.lower(), value))

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.ended += 1

    @property
    def other_fields(self) -> list[tuple[bytes, bytes]]:
        return [(name, value) for name, value in self.fields if name != b"content-length"]


def learned(data: bytes) -> tuple[KnownHeads, KnownHead | None]:
    heads, parsed = KnownHeads(), Parsed(data)
    assert parsed.is_one
    heads.learn(data, RequestHead(parsed.target, b"", parsed.fields), b"k")
    return heads, heads.find(data)


@pytest.mark.parametrize("name", [b"content-length", b"Content-Length"])
def test_the_same_head_with_another_length_is_known(name: bytes) -> None:
    _, head = learned(GOOD % (name, b"5", b"hello"))
    assert head is not None
    assert head.body_in(GOOD % (name, b"2", b"hi")) == b"hi"
    assert head.body_in(GOOD % (name, b"0002", b"hi")) == b"hi"


@pytest.mark.parametrize(
    "data",
    [
        GOOD % (b"content-length", b"3", b"hi"),
        GOOD % (b"content-length", b"1", b"hi"),
        GOOD % (b"Content-Length", b"2", b"hi"),
        GOOD % (b"content-length", b" 2", b"hi"),
        GOOD % (b"content-length", b"2 ", b"hi"),
        GOOD % (b"content-length", b"+2", b"hi"),
        GOOD % (b"content-length", b"", b""),
        GOOD % (b"content-length", b"0000000002", b"hi"),
        GOOD % (b"content-length", b"2\r\ncontent-length: 2", b"hi"),
        GOOD % (b"content-length", b"2", b"hi") + GOOD % (b"content-length", b"2", b"hi"),
        GOOD % (b"content-length", b"2", b"hi") + b"\r\n",
        (GOOD % (b"content-length", b"2", b"hi")).replace(b"Bearer k", b"Bearer j"),
        GOOD[:40],
        b"",
    ],
)
def test_anything_else_is_the_parsers_to_read(data: bytes) -> None:
    _, head = learned(GOOD % (b"content-length", b"5", b"hello"))
    assert head is not None
    assert head.body_in(data) is None


@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_taken_for_a_known_head_the_parser_reads_the_same_way(seed: int) -> None:
    rng = Random(seed)
    taken = 0
    bodies = (b"", b"x" * 5, b"\r\ncontent-length: 3\r\n\r\nabc", b"\r\n\r\n")
    for _ in range(400):
        body = rng.choice(bodies)
        good = GOOD % (rng.choice([b"content-length", b"Content-Length"]), b"%d" % len(body), body)
        data = good = good if rng.random() < 0.8 else mutated(rng, good)
        if not Parsed(good).is_one:
            continue
        heads, usual = learned(good)
        for _ in range(rng.randrange(4)):
            data = mutated(rng, data)
        for head in (usual, heads.find(data)):
            found = None if head is None else head.body_in(data)
            if head is None or found is None:
                continue
            taken += 1
            parsed = Parsed(data)
            assert parsed.is_one, data
            assert parsed.body == found, data
            assert parsed.target == head.says.path, data
            assert parsed.other_fields == [one for one in head.says.fields if one[0] != b"content-length"], data
    assert taken > 50, "it would pass if nothing ever was known"


def mutated(rng: Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    match rng.randrange(4):
        case 0:
            return data[:at] + rng.choice(PIECES) + data[at:]
        case 1:
            return data[:at] + data[at + 1 :]
        case 2:
            return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        case _:  # a length that is another one, and sometimes right
            body = data.partition(b"\r\n\r\n")[2]
            return data.replace(b"ngth: 5", b"ngth: %d" % rng.choice([len(body), rng.randrange(40)]), 1)
