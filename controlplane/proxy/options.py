"""What an operator may choose about the data plane."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProxyOptions:
    max_body_bytes: int = 32 * 1024 * 1024  # a long context with a few images
    refresh_seconds: float = 10.0  # between full reads of the directory; changes are heard of at once
    connect_timeout_seconds: float = 2.0
    # Of the answer's body. Without streaming that is the whole generation, and OpenAI's own clients wait 600 s as well:
    # giving up earlier would fail what they still wait for.
    first_byte_timeout_seconds: float = 600.0
    idle_timeout_seconds: float = 300.0  # between two pieces of an answer: an engine that hangs says nothing at all
    keepalive_seconds: float = 4.0  # of an idle upstream connection; vLLM closes its end after 5 s
    avoid_seconds: float = 1.0  # how long an endpoint that could not be reached is used only if there is no other
    access_log_sample: float = 0.0  # of requests that went well, how large a share is logged: 0 to 1
