"""What the contract promises and the data plane does not do yet: the one list of expected failures.

Each entry is a reason by a short name. A test that needs one is marked `@not_yet("name")`, and may fail while the entry
is here. Delete an entry and its tests count.
"""

from __future__ import annotations

import pytest

NOT_YET = {
    "audio": "the audio routes are not passed on yet",
    "host": "HTTP/1.1 without a Host, or with two, is served (RFC 9112, 3.2: 400)",
    "versions": "HTTP/0.9 and HTTP/2.0 in a request line are served as if they were 1.1",
    "header limit": "request heads and trailers may be as large as their sender likes",
    "trailers": "trailer fields of a chunked request become header fields of what is sent upstream (RFC 9110, 6.5.1)",
    "upgrade": "a request that offers an upgrade (h2c, as `curl --http2` does) is never answered; a body is not read",
    "log of broken connections": "answering a connection that was reset is logged as an exception, with a traceback",
    "lost before the first byte": "a request whose endpoint died before the first byte gets a 502, not another try",
    "hold": "a request for a model with zero replicas is answered 503 at once, and starts none",
    "fairness": "whoever asks most waits least: nothing is queued in the proxy, and the engine's queue is one for all",
}


def not_yet(name: str) -> pytest.MarkDecorator:
    """Expected to fail while the name is listed; no mark at all once it is not."""
    return pytest.mark.xfail(name in NOT_YET, reason=NOT_YET.get(name, ""), strict=False)
