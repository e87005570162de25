"""HTTP/1.1 as this proxy writes it to its clients."""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus

from controlplane.proxy.errors import ApiError

Fields = Iterable[tuple[bytes, bytes]]

HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
"""Headers that belong to one connection, and are passed on in neither direction; names in lower case."""

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"
CHUNKED = b"transfer-encoding: chunked\r\n"
CLOSE = b"connection: close\r\n"


def status_line(status: int) -> bytes:
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    return b"HTTP/1.1 %d %b\r\n" % (status, phrase.encode())


STATUS_LINES = {status: status_line(status) for status in range(200, 600)}


def lines(fields: Fields) -> bytes:
    return b"".join([b"%b: %b\r\n" % field for field in fields])


def chunk(piece: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(piece), piece)


END_OF_EVENT = b"\n\n"
END_OF_CHUNK_OF_EVENTS = END_OF_EVENT + b"\r\n"
_LONGEST_EVENTS = 2048  # that a chunk is recognised of at once
# how a chunk begins, by the bytes it has in all
_BEGINNINGS = {len(chunk(bytes(size))): b"%x\r\n" % size for size in range(len(END_OF_EVENT), _LONGEST_EVENTS)}


def is_chunk_of_events(data: bytes) -> bool:
    """Whether this is one whole chunk, as `chunk` writes it, and what is in it ends as an event does.

    To be asked only where a chunk begins. False: it has to be taken apart to know.
    """
    beginning = _BEGINNINGS.get(len(data))
    return beginning is not None and data.startswith(beginning) and data.endswith(END_OF_CHUNK_OF_EVENTS)


def without_named(header_lines: list[bytes], hops: bytes) -> list[bytes]:
    """Without those that a `Connection` header of this value names: they, too, belong to its connection.

    RFC 9110, 7.6.1. Names of `header_lines` are in lower case.
    """
    named = {token.strip().lower() for token in hops.split(b",")}
    return [line for line in header_lines if line[: line.index(b":")] not in named]


def document(
    status: int, body: bytes, request_id: bytes, default_lines: bytes, *, closes: bool, more_lines: bytes = b""
) -> bytes:
    """A whole answer that is JSON. `default_lines`: `date`, and what else the server says of itself."""
    return b"%b%bcontent-type: application/json\r\ncontent-length: %d\r\nx-request-id: %b\r\n%b%b\r\n%b" % (
        STATUS_LINES[status],
        default_lines,
        len(body),
        request_id,
        more_lines,
        CLOSE if closes else b"",
        body,
    )


def refusal(error: ApiError, request_id: bytes, default_lines: bytes, *, closes: bool) -> bytes:
    """A whole answer that says why there is none."""
    more_lines = lines(error.headers)
    return document(error.status, error.body(), request_id, default_lines, closes=closes, more_lines=more_lines)
