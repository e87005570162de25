"""Heads of requests that were read before, and need not be taken apart again.

A client says the same line and the same headers with every request: its library's name, its key, what it accepts. Only
the length of the body differs. So a head that the parser has read, and found good, is remembered without that length;
one that is equal to it, byte for byte, means the same. That spares a third of what a request costs.

Nothing is guessed: a head that is not known, a body that is not here whole, anything unusual goes to the parser. What
is remembered is bounded. Keys are looked up anew for each request.
"""

from __future__ import annotations

from hashlib import sha256

from controlplane.proxy.request import RequestHead

_LONGEST = 8192
_MOST = 2048  # then all are forgotten: clients that say something new each time must not fill the memory
_NAMES = (b"\r\ncontent-length: ", b"\r\nContent-Length: ")
_NAME_LENGTH = len(_NAMES[0])
_LONGEST_LENGTH = 9  # digits

# what differs from request to request, and would only fill the memory
_VARIES = frozenset({b"x-request-id", b"traceparent", b"tracestate", b"idempotency-key", b"b3", b"x-b3-traceid"})


class KnownHead:
    """A head that was found good, in two parts: what stands before its length's digits, and behind them."""

    __slots__ = ("_after", "_before", "_start", "credential_hash", "says")

    def __init__(self, before: bytes, after: bytes, says: RequestHead, credential: bytes) -> None:
        self._before = before
        self._after = after
        self._start = len(before)
        self.says = says
        self.credential_hash = sha256(credential).digest()

    def body_in(self, data: bytes) -> bytes | None:
        """The body, if `data` is one whole request with this head; nothing else is ever taken for one."""
        if not data.startswith(self._before):
            return None
        start = self._start
        stop = data.find(b"\r\n", start, start + _LONGEST_LENGTH + 2)
        body_at = stop + len(self._after)
        digits = data[start:stop]
        if digits.isdigit() and data[stop:body_at] == self._after and len(data) - body_at == int(digits):
            return data[body_at:]
        return None


class KnownHeads:
    def __init__(self) -> None:
        self._known: dict[tuple[bytes, bytes], KnownHead] = {}

    def find(self, data: bytes) -> KnownHead | None:
        """The one that `data` may begin with."""
        parts = _split(data)
        return None if parts is None else self._known.get(parts)

    def learn(self, data: bytes, says: RequestHead, credential: bytes) -> None:
        """`data` begins with a request that was found good and plain: kept alive, with a length, in HTTP/1.1."""
        parts = _split(data)
        if parts is None or any(name in _VARIES for name, _ in says.fields):
            return
        if len(self._known) >= _MOST:
            self._known.clear()
        self._known[parts] = KnownHead(*parts, says, credential)


def _split(data: bytes) -> tuple[bytes, bytes] | None:
    """A head's two parts. The first header line that is a length is cut out."""
    end = data.find(b"\r\n\r\n", 0, _LONGEST)
    at = data.find(_NAMES[0], 0, end)
    if at < 0:
        at = data.find(_NAMES[1], 0, end)
    if end < 0 or at < 0:
        return None
    start = at + _NAME_LENGTH
    stop = data.find(b"\r\n", start, end + 2)
    if not data[start:stop].isdigit() or stop - start > _LONGEST_LENGTH:
        return None
    return data[:start], data[stop : end + 4]
