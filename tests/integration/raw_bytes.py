"""Bytes as no HTTP library would send them: a connection that says exactly them, the shapes that smuggle, and a fuzzer.

`SHAPES` is a table of requests that RFC 9112 has an opinion on, each with what must become of it. `Fuzz` makes up
conversations from a seed: good requests, cut, bent and glued together. A case is named by its seed and number.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from random import Random

from tests.integration.proxy_rig import CHAT, MODEL

ANSWER_SECONDS = 10.0
"""Within which what was said must be answered, or the connection closed, on a busy machine."""

BODY = json.dumps({"model": MODEL, "messages": []}).encode()
SMUGGLED = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-smuggled: 1\r\ncontent-length: %d\r\n\r\n%b" % (
    len(BODY),
    BODY,
)

_STATUS_LINE = re.compile(rb"HTTP/1\.[01] (\d{3}) ")


class Outcome(Enum):
    REFUSED = "answered 400 or 431 or not at all, and closed; no upstream hears of it"
    TAKEN = "passed on once, as one request"
    ANSWERED = "answered once with less than 500, or closed; at most one request is passed on"


@dataclass(frozen=True, slots=True)
class Shape:
    name: str
    said: Callable[[bytes], bytes]  # by the authorization header line
    outcome: Outcome = Outcome.REFUSED


@dataclass(slots=True)
class Heard:
    """What came back over one connection."""

    data: bytes = b""
    is_closed: bool = False  # by the other side

    @property
    def statuses(self) -> list[int]:
        """Of all answers, without 100 Continue; what an upstream answers here never looks like a status line."""
        return [status for status in map(int, _STATUS_LINE.findall(self.data)) if status != 100]


async def say(port: int, *pieces: bytes, until: Callable[[Heard], bool], seconds: float = ANSWER_SECONDS) -> Heard:
    """Say the pieces, and listen until that is so or the other side closes. Raises TimeoutError: that is a hang."""
    heard = Heard()
    async with asyncio.timeout(seconds):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            await _speak(writer, pieces)
            while not until(heard):
                piece = await _read(reader)
                heard.data += piece
                if not piece:
                    heard.is_closed = True
                    break
        finally:
            writer.close()
    return heard


async def _speak(writer: asyncio.StreamWriter, pieces: Sequence[bytes]) -> None:
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
    except ConnectionError:
        pass  # refused before all was said


async def _read(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read(65536)
    except ConnectionError:
        return b""


# --- shapes ----------------------------------------------------------------------------------------------


def post(
    *lines: bytes, body: bytes = BODY, target: bytes = CHAT.encode(), version: bytes = b"HTTP/1.1"
) -> Callable[[bytes], bytes]:
    """A request with these header lines, host and credentials first."""

    def said(credentials: bytes) -> bytes:
        head = [b"POST %b %b" % (target, version), b"host: x", credentials, *lines]
        return b"\r\n".join(head) + b"\r\n\r\n" + body

    return said


def chunked(
    *chunks: bytes, end: bytes = b"0\r\n\r\n", header: bytes = b"transfer-encoding: chunked"
) -> Callable[[bytes], bytes]:
    return post(header, body=b"".join(chunks) + end)


def verbatim(template: bytes) -> Callable[[bytes], bytes]:
    return lambda credentials: template.replace(b"AUTH", credentials)


_LENGTH = b"content-length: %d" % len(BODY)
_TE = b"transfer-encoding: chunked"
_CHUNK = b"%x\r\n%b\r\n" % (len(BODY), BODY)
_WHOLE = _CHUNK + b"0\r\n\r\n"
_T, _A = Outcome.TAKEN, Outcome.ANSWERED


def _length(value: bytes) -> Callable[[bytes], bytes]:
    return post(b"content-length:" + value, body=BODY + SMUGGLED)


def _coding(line: bytes) -> Callable[[bytes], bytes]:
    return post(line, body=_WHOLE + SMUGGLED)


def _size(line: bytes) -> Callable[[bytes], bytes]:
    return chunked(line + b"\r\n" + BODY + b"\r\n")


def _header(line: bytes, outcome: Outcome = Outcome.REFUSED) -> tuple[Callable[[bytes], bytes], Outcome]:
    return post(line, _LENGTH), outcome


SHAPES: tuple[Shape, ...] = (
    # RFC 9112, 6.1 and 6.3: which framing counts
    Shape("length and coding", post(_LENGTH, _TE, body=_WHOLE + SMUGGLED)),
    Shape("coding and length", post(_TE, b"content-length: 4", body=_WHOLE + SMUGGLED)),
    Shape("length 0 and coding", post(b"content-length: 0", _TE, body=_WHOLE)),
    Shape("two lengths that differ", post(b"content-length: 3", _LENGTH, body=BODY + SMUGGLED)),
    Shape("two lengths alike", post(_LENGTH, _LENGTH), _A),
    Shape("a list of lengths", _length(b" %d, %d" % (len(BODY), len(BODY))), _A),
    Shape("a list of lengths that differ", _length(b" 3, %d" % len(BODY))),
    Shape("length below zero", _length(b" -1")),
    Shape("length with a plus", _length(b" +%d" % len(BODY))),
    Shape("length in hexadecimal", _length(b" 0x%x" % len(BODY))),
    Shape("length with a fraction", _length(b" %d.0" % len(BODY))),
    Shape("length in two words", _length(b" %d 0" % len(BODY))),
    Shape("length that is empty", _length(b"")),
    Shape("length of 2 to the 64", _length(b" 18446744073709551616")),
    Shape("length of 100 digits", _length(b" " + b"9" * 100)),
    Shape("length with a vertical tab", _length(b" %d\x0b" % len(BODY))),
    Shape("length with other digits", _length(" ٣".encode())),
    Shape("coding unknown", _coding(b"transfer-encoding: xchunked")),
    Shape("coding not last", _coding(b"transfer-encoding: chunked, identity")),
    Shape("coding twice in a list", _coding(b"transfer-encoding: chunked, chunked")),
    Shape("coding in quotes", _coding(b'transfer-encoding: "chunked"')),
    Shape("coding behind a vertical tab", _coding(b"transfer-encoding: \x0bchunked")),
    Shape("coding behind NUL", _coding(b"transfer-encoding: \x00chunked")),
    Shape("two codings, the last unknown", post(_TE, b"transfer-encoding: x", body=_WHOLE + SMUGGLED)),
    Shape("coding that is identity", _coding(b"transfer-encoding: identity")),
    Shape("coding in other letters", post(b"Transfer-Encoding: Chunked", body=_WHOLE), _T),
    Shape("coding in HTTP/1.0", post(_TE, body=_WHOLE, version=b"HTTP/1.0"), _A),
    # RFC 9112, 5.1 and 5.2: header lines
    Shape("space before the colon of the length", post(b"content-length : %d" % len(BODY))),
    Shape("space before the colon of the coding", post(b"transfer-encoding : chunked", body=_WHOLE)),
    Shape("tab before a colon", *_header(b"x-a\t: 1")),
    Shape("folded line", *_header(b"x-a: 1\r\n 2")),
    Shape("folded length", post(b"content-length:\r\n %d" % len(BODY))),
    Shape("folded coding", post(b"transfer-encoding:\r\n chunked", body=_WHOLE)),
    Shape("space before the first header", verbatim(b"POST /v1/chat/completions HTTP/1.1\r\n x: y\r\nAUTH\r\n\r\n")),
    Shape("header without a colon", *_header(b"x-a")),
    Shape("header without a name", *_header(b": 1")),
    Shape("name with a space", *_header(b"x a: 1")),
    Shape("name with a parenthesis", *_header(b"x(a): 1")),
    Shape("name beyond ASCII", *_header("x-ä: 1".encode())),
    Shape("name with NUL", *_header(b"x\x00a: 1")),
    Shape("value with NUL", *_header(b"x-a: 1\x00")),
    Shape("value with a bare CR", *_header(b"x-a: 1\rx-b: 2")),
    Shape("value with a bare CR before a length", *_header(b"x-a: 1\rcontent-length: 0")),
    Shape("value beyond ASCII", *_header("x-a: ä".encode(), _T)),
    Shape("value that is empty", *_header(b"x-a:", _T)),
    # bare LF: a front server that reads lines otherwise sees other headers
    Shape("LF in the request line", verbatim(b"POST /v1/chat/completions HTTP/1.1\nhost: x\r\nAUTH\r\n\r\n")),
    Shape("LF after a header", *_header(b"x-a: 1\nx-b: 2")),
    Shape("LF before a length", post(b"x-a: 1\ncontent-length: %d" % len(BODY))),
    Shape("LF at the end of the head", verbatim(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nAUTH\r\n\n")),
    # RFC 9112, 7.1: chunks
    Shape("chunks", chunked(_CHUNK), _T),
    Shape("chunks of one byte", chunked(*(b"1\r\n%b\r\n" % bytes([byte]) for byte in BODY)), _T),
    Shape("chunk with an extension", chunked(b"%x;a=b;c\r\n%b\r\n" % (len(BODY), BODY)), _T),
    Shape("chunk with trailers", chunked(_CHUNK, end=b"0\r\nx-a: 1\r\n\r\n"), _T),
    Shape("size in leading zeros", chunked(b"0000%x\r\n%b\r\n" % (len(BODY), BODY)), _A),
    Shape("size below zero", _size(b"-1")),
    Shape("size with a plus", _size(b"+%x" % len(BODY))),
    Shape("size with 0x", _size(b"0x%x" % len(BODY))),
    Shape("size that is no number", _size(b"G")),
    Shape("size that is empty", _size(b"")),
    Shape("size behind a space", _size(b" %x" % len(BODY))),
    Shape("size of 68 bits", _size(b"FFFFFFFFFFFFFFFFF")),
    Shape("size with LF alone", chunked(b"%x\n%b\r\n" % (len(BODY), BODY))),
    Shape("extension with LF alone", chunked(b"%x;a\n%b\r\n" % (len(BODY), BODY))),
    Shape("extension with NUL", chunked(b"%x;a=\x00\r\n%b\r\n" % (len(BODY), BODY))),
    Shape("chunk longer than its size", chunked(b"%x\r\n%bxx\r\n" % (len(BODY), BODY))),
    Shape("chunk that ends with LF alone", chunked(b"%x\r\n%b\n" % (len(BODY), BODY))),
    Shape("chunk that ends with anything", chunked(b"%x\r\n%bXY" % (len(BODY), BODY))),
    Shape("trailer with a fault", chunked(_CHUNK, end=b"0\r\nx a: 1\r\n\r\n"), _A),
    Shape("trailer that names a length", chunked(_CHUNK, end=b"0\r\ncontent-length: 5\r\n\r\n"), _A),
    Shape("extension of a megabyte", chunked(b"%x;%b\r\n%b\r\n" % (len(BODY), b"a" * 2**20, BODY)), _A),
    # RFC 9112, 3: request lines
    Shape("absolute form", post(_LENGTH, target=b"http://elsewhere" + CHAT.encode()), _T),
    Shape("method in lower case", verbatim(b"post /v1/chat/completions HTTP/1.1\r\nhost: x\r\nAUTH\r\n\r\n")),
    Shape("method unknown", verbatim(b"BREW /v1/models HTTP/1.1\r\nhost: x\r\nAUTH\r\n\r\n"), _A),
    Shape("no target", verbatim(b"POST HTTP/1.1\r\nhost: x\r\nAUTH\r\n\r\n")),
    Shape("no version", verbatim(b"GET /v1/models\r\n\r\n")),
    Shape("HTTP/0.9 by name", post(_LENGTH, version=b"HTTP/0.9")),
    Shape("HTTP/1.2", post(_LENGTH, version=b"HTTP/1.2"), _A),
    Shape("HTTP/2.0 by name", post(_LENGTH, version=b"HTTP/2.0")),
    Shape("two versions", post(_LENGTH, version=b"HTTP/1.1 HTTP/1.1")),
    Shape("a version of letters", post(_LENGTH, version=b"HTTP/x.y")),
    Shape("target with a space", post(_LENGTH, target=b"/v1/chat completions")),
    Shape("target with NUL", post(_LENGTH, target=b"/v1/chat\x00completions")),
    Shape("target with a control character", post(_LENGTH, target=b"/v1/\x01")),
    Shape("target with dots", post(_LENGTH, target=b"/v1/../v1/chat/completions"), _A),
    Shape("asterisk", verbatim(b"OPTIONS * HTTP/1.1\r\nhost: x\r\nAUTH\r\n\r\n"), _A),
    Shape("authority form", verbatim(b"CONNECT x:80 HTTP/1.1\r\nhost: x\r\nAUTH\r\n\r\n"), _A),
    Shape("empty lines first", lambda credentials: b"\r\n\r\n" + post(_LENGTH)(credentials), _T),
    # RFC 9112, 3.2: one Host, and that a good one
    Shape("no host", verbatim(b"GET /v1/models HTTP/1.1\r\nAUTH\r\n\r\n")),
    Shape("two hosts", verbatim(b"GET /v1/models HTTP/1.1\r\nhost: x\r\nhost: y\r\nAUTH\r\n\r\n")),
    Shape("no host in HTTP/1.0", verbatim(b"GET /v1/models HTTP/1.0\r\nAUTH\r\n\r\n"), _A),
    # more than anybody needs
    Shape("header of a megabyte", *_header(b"x-a: " + b"a" * 2**20)),
    Shape("header name of a megabyte", *_header(b"a" * 2**20 + b": 1")),
    Shape("a hundred thousand headers", *_header(b"\r\n".join([b"x-a: 1"] * 100_000))),
    Shape("target of a megabyte", post(_LENGTH, target=CHAT.encode() + b"?" + b"a" * 2**20)),
    Shape(
        "trailers of a megabyte",
        chunked(_CHUNK, end=b"0\r\nx-a: " + b"a" * 2**20 + b"\r\n\r\n"),
        _A,
    ),
    # other protocols
    Shape("HTTP/2 preface", verbatim(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9))),
    Shape("TLS hello", verbatim(bytes.fromhex("16030100c8010000c40303") + bytes(range(197)))),
    Shape("an answer", verbatim(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")),
    Shape("PROXY line", verbatim(b"PROXY TCP4 1.1.1.1 2.2.2.2 1 2\r\nGET / HTTP/1.1\r\nhost: x\r\n\r\n")),
    Shape("bytes of all kinds", verbatim(bytes(range(256)))),
)


# --- conversations that are made up -----------------------------------------------------------------------


class Ending(Enum):
    END_OF_FILE = "nothing more comes: the other side must close"
    ABORT = "the connection is reset"


@dataclass(frozen=True, slots=True)
class Conversation:
    name: str  # seed and number: makes it again
    pieces: tuple[bytes, ...]
    ending: Ending


_NASTY = (
    *(
        b"\x00",
        b"\r",
        b"\n",
        b"\r\n",
        b"\r\n\r\n",
        b"\n\n",
        b"\r\r\n",
        b" ",
        b"\t",
        b"\x0b",
        b":",
        b";",
        b",",
        b"%",
        b"\xff",
    ),
    *(b"-1", b"0", b"+1", b"0x", b"18446744073709551616", b"4294967296", b"ffffffffffffffff", b"9" * 40),
    *(b"\r\ncontent-length: 0", b"\r\ncontent-length: 5", b"\r\ntransfer-encoding: chunked", b"\r\nconnection: close"),
    *(b"\r\nexpect: 100-continue", b"\r\nupgrade: h2c\r\nconnection: upgrade", b"\r\nconnection: keep-alive, host"),
    *(
        b"\r\n folded",
        b"\r\nhost: y",
        b"\r\nte: trailers",
        b"\r\ntransfer-encoding: identity",
        b"0\r\n\r\n",
        b"1;a=b\r\n",
    ),
    *(
        b"HTTP/1.0",
        b"HTTP/0.9",
        b"HTTP/2.0",
        b"GET ",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01",
        b"a" * 9000,
    ),
    SMUGGLED,
)


def conversation(seed: int, number: int, credentials: bytes) -> Conversation:
    """Some good requests behind one another, bent a little or not at all, cut into pieces, and ended in some way."""
    rng = Random(f"{seed}/{number}")
    said = bytearray(b"".join(rng.choice(_GOOD)(credentials) for _ in range(rng.choice((1, 1, 1, 2, 3)))))
    for _ in range(rng.choice((0, 0, 0, 1, 1, 1, 2, 8))):
        _bend(said, rng)
    return Conversation(
        f"seed {seed}, number {number}",
        _cut(bytes(said), rng),
        rng.choice((Ending.END_OF_FILE, Ending.END_OF_FILE, Ending.ABORT)),
    )


_GOOD: tuple[Callable[[bytes], bytes], ...] = (
    post(_LENGTH),
    post(_LENGTH, b"connection: close"),
    post(_LENGTH, version=b"HTTP/1.0"),
    post(_TE, body=_WHOLE),
    post(_TE, body=b"".join(b"1;x=y\r\n%b\r\n" % bytes([byte]) for byte in BODY) + b"0\r\nx-trailer: 1\r\n\r\n"),
    post(_LENGTH, b"expect: 100-continue"),
    post(b"content-length: %d" % len(SMUGGLED), body=SMUGGLED),
    verbatim(b"GET /v1/models HTTP/1.1\r\nhost: x\r\nAUTH\r\n\r\n"),
    verbatim(b"HEAD /v1/models/tiny HTTP/1.1\r\nhost: x\r\nAUTH\r\n\r\n"),
    verbatim(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"),
    verbatim(b"DELETE /nowhere HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"),
)


def _bend(said: bytearray, rng: Random) -> None:
    if not said:
        return
    at = rng.randrange(len(said))
    match rng.randrange(8):
        case 0:
            said[at] = rng.randrange(256)
        case 1:
            del said[at : at + rng.choice((1, 2, 7, 60))]
        case 2:
            said[at:at] = said[max(0, at - rng.choice((1, 8, 80))) : at]
        case 3:
            said[at:] = b""
        case 4 | 5:
            said[at:at] = rng.choice(_NASTY)
        case 6:  # at the end of a line, where it matters most
            ends = [match.start() for match in re.finditer(rb"\r\n", said)] or [at]
            end = rng.choice(ends)
            said[end:end] = rng.choice(_NASTY)
        case _:
            old, new = rng.choice(
                ((b"\r\n", b"\n"), (b"\r\n", b"\r"), (b": ", b" : "), (b": ", b":"), (b"1.1", b"1.0"))
            )
            said[:] = said.replace(old, new, rng.choice((1, 2, -1)))


def _cut(said: bytes, rng: Random) -> tuple[bytes, ...]:
    match rng.randrange(4):
        case 0:
            size = 1 if len(said) < 2000 else 97
            return tuple(said[start : start + size] for start in range(0, len(said), size))
        case 1:
            edges = sorted(rng.randrange(len(said) + 1) for _ in range(rng.randrange(6)))
            return tuple(said[start:end] for start, end in pairwise([0, *edges, len(said)]))
        case _:
            return (said,)


async def converse(port: int, what: Conversation, *, seconds: float = ANSWER_SECONDS) -> Heard:
    """Say it all, end it as it says, and return what was heard until then. Raises TimeoutError: that is a hang."""
    heard = Heard()
    async with asyncio.timeout(seconds):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            await _speak(writer, what.pieces)
            if what.ending is Ending.ABORT:
                with suppress(OSError):  # closed by the other side before
                    raw: socket.socket = writer.get_extra_info("socket")
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return heard
            with suppress(OSError):
                writer.write_eof()
            while piece := await _read(reader):
                heard.data += piece
            heard.is_closed = True
        finally:
            writer.close()
    return heard
