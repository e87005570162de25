"""Heads of requests that were read before, and need not be taken apart again.

A client says the same line and the same headers with every request: its library's name, its key, what it accepts. Only
the length of the body differs. So a head that the parser has read, and found good, is remembered without that length;
one that is equal to it, byte for byte, means the same. That spares a third of what a request costs.

Nothing is guessed: a head that is not known, a body that is not here whole, anything unusual goes to the parser. What
is remembered is bounded. Keys are looked up anew for each request.
"""

from __future__ import annotations

from hashlib import sha256

_LONGEST = 8192
_MOST = 2048  # then all are forgotten: clients that say something new each time must not fill the memory
_NAMES = (b"\r\ncontent-length: ", b"\r\nContent-Length: ")
_NAME_LENGTH = len(_NAMES[0])
_LONGEST_LENGTH = 9  # digits

# what differs from request to request, and would only fill the memory
_VARIES = frozenset({b"x-request-id", b"traceparent", b"tracestate", b"idempotency-key", b"b3", b"x-b3-traceid"})


class KnownHead:
    """What a head says. `headers`: those that are sent on, as lines."""

    __slots__ = ("credential_hash", "fields", "headers", "path", "query")

    def __init__(
        self, path: bytes, query: bytes, headers: bytes, fields: list[tuple[bytes, bytes]], credential: bytes
    ) -> None:
        self.path = path
        self.query = query
        self.headers = headers
        self.fields = fields
        self.credential_hash = sha256(credential).digest()


class KnownHeads:
    def __init__(self) -> None:
        self._known: dict[bytes, KnownHead] = {}

    def find(self, data: bytes) -> tuple[KnownHead, bytes] | None:
        """The head and the body, if `data` is one whole request whose head is known."""
        parts = _split(data)
        if parts is None:
            return None
        head, digits, body_at = parts
        known = self._known.get(head)
        if known is None or len(data) - body_at != int(digits):
            return None
        return known, data[body_at:]

    def learn(self, data: bytes, known: KnownHead) -> None:
        """`data` begins with a request that was found good and plain: kept alive, with a length, in HTTP/1.1."""
        parts = _split(data)
        if parts is None or any(name in _VARIES for name, _ in known.fields):
            return
        if len(self._known) >= _MOST:
            self._known.clear()
        self._known[parts[0]] = known


def _split(data: bytes) -> tuple[bytes, bytes, int] | None:
    """The head without its length, the length's digits, and where the body begins.

    The first header line that is a length is cut out, so that no two heads become one: where the digits were can be
    told from what is left.
    """
    end = data.find(b"\r\n\r\n", 0, _LONGEST)
    at = data.find(_NAMES[0], 0, end)
    if at < 0:
        at = data.find(_NAMES[1], 0, end)
    if end < 0 or at < 0:
        return None
    start = at + _NAME_LENGTH
    stop = data.find(b"\r\n", start, end + 2)
    digits = data[start:stop]
    if not digits.isdigit() or len(digits) > _LONGEST_LENGTH:
        return None
    return data[:start] + data[stop:end], digits, end + 4
