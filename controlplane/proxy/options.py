"""What an operator may choose about the data plane."""

from __future__ import annotations

from dataclasses import dataclass, field

from controlplane.proxy.waiting import WaitingOptions


@dataclass(frozen=True, slots=True)
class ProxyOptions:
    max_body_bytes: int = 32 * 1024 * 1024  # a long context with a few images
    max_head_bytes: int = 64 * 1024  # of a request's line and headers
    refresh_seconds: float = 10.0  # between full reads of the directory; changes are heard of at once
    # --- a client
    head_timeout_seconds: float = 30.0  # from a request's first byte to the end of its headers
    body_timeout_seconds: float = 60.0  # between two pieces of a request's body
    client_timeout_seconds: float = 600.0  # how long a client may leave its answer unread
    keepalive_comment_seconds: float = 15.0  # of silence in a stream, then a comment: in front of us 60 s are common
    # --- an upstream
    connect_timeout_seconds: float = 2.0
    # Of the answer's body. Without streaming that is the whole generation, and OpenAI's own clients wait 600 s as well:
    # giving up earlier would fail what they still wait for.
    first_byte_timeout_seconds: float = 600.0
    idle_timeout_seconds: float = 300.0  # between two pieces of an answer: an engine that hangs says nothing at all
    keepalive_seconds: float = 4.0  # of an idle upstream connection; vLLM closes its end after 5 s
    max_tries: int = 3  # endpoints that one request is sent to, where the first ones cannot be reached
    access_log_sample: float = 0.0  # of requests that went well, how large a share is logged: 0 to 1
    waiting: WaitingOptions = field(default_factory=WaitingOptions)

    @property
    def tick_seconds(self) -> float:
        """How often deadlines are looked at: often enough that the shortest is missed by a quarter at most."""
        shortest = min(
            self.head_timeout_seconds,
            self.body_timeout_seconds,
            self.client_timeout_seconds,
            self.keepalive_comment_seconds,
            self.connect_timeout_seconds,
            self.first_byte_timeout_seconds,
            self.idle_timeout_seconds,
            self.keepalive_seconds,
        )
        return min(0.5, max(0.02, shortest / 4))
