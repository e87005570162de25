"""HTTP/1.1 as this proxy writes it to its clients."""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus

from controlplane.proxy.errors import ApiError

Fields = Iterable[tuple[bytes, bytes]]

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


def refusal(error: ApiError, request_id: bytes, default_lines: bytes, *, closes: bool) -> bytes:
    """A whole answer that says why there is none. `default_lines`: `date`, and what else the server says of itself."""
    body = error.body()
    return b"%b%bcontent-type: application/json\r\ncontent-length: %d\r\nx-request-id: %b\r\n%b%b\r\n%b" % (
        STATUS_LINES[error.status],
        default_lines,
        len(body),
        request_id,
        lines(error.headers),
        CLOSE if closes else b"",
        body,
    )
