"""Which upstream takes a request: the directory's endpoints and policies, brought together with what is in flight.

The rules are `core.balancing` and `core.affinity`; this keeps one pool of candidates for each model and reads from a
request what its affinity goes by. With `prefix` that is the conversation's beginning, system prompt and first user
message, which every later turn repeats; with `session` a header's value, and the beginning where a client sends none.
Tenants are not told apart: engines share their caches between equal beginnings as well. Nothing of it is kept but a
hash, and the hash only while the request lasts.

Everything here is called for every request and awaits nothing. A body that cannot be read has no affinity, and is
nobody's fault: whoever needs its fields will refuse it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime
from random import Random
from typing import Generic

import msgspec

from controlplane.core.affinity import Ring, key_of
from controlplane.core.balancing import C, Candidate, Pool
from controlplane.core.types import ChooseBy, RoutingPolicy

__all__ = ["Candidate", "Router", "beginning_of"]

_PART_BYTES = 16 * 1024
"""Of a system prompt or a first message: more of it tells no conversations apart that share so much."""

_PROMPT_BYTES = 256
"""Of a text without turns. A prompt that grows from request to request keeps its beginning, so little of it counts."""

_NOTHING = msgspec.Raw()


class Router(Generic[C]):
    """Picks among the candidates that `follow` was given last; models that it does not name have none."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._pools: dict[str, Pool[C]] = {}
        self._affinities: dict[str, bytes | None] = {}  # by model: the session's header, None where there is none

    def follow(
        self,
        candidates: Mapping[str, Sequence[C]],
        routing: Mapping[str, RoutingPolicy],
        now: datetime,
        at: float,
    ) -> None:
        """From now on these, by model, are routable. `at` is `now` by the monotonic clock, which `pick` is asked by."""
        pools: dict[str, Pool[C]] = {}
        affinities: dict[str, bytes | None] = {}
        for model, those in candidates.items():
            pools[model] = pool = Pool(those, self._rng, now, at)
            policy = routing.get(model)
            if policy is not None and policy.policy is not ChooseBy.LEAST_IN_FLIGHT and len(those) > 1:
                pool.form_ring(self._ring(model))
                by_session = policy.policy is ChooseBy.SESSION
                affinities[model] = policy.session_header.encode() if by_session else None
        self._pools = pools
        self._affinities = affinities

    def wants_affinity(self, model: str) -> bool:
        """Whether `affinity_of` is worth asking: it reads the body."""
        return model in self._affinities

    def affinity_of(self, model: str, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> bytes | None:
        """What `pick` shall go by; None: by load alone. Names of headers are in lower case."""
        header = self._affinities.get(model)
        if header is not None:
            for name, value in headers:
                if name == header and value:
                    return key_of(value)
        return beginning_of(body)

    def pick(self, model: str, affinity: bytes | None, tried: Collection[str], now: float) -> C | None:
        """Where to send the request, or send it again; never to a URL in `tried`. None: there is no other.

        The caller counts it in flight, tells the candidate's breaker that it `began`, and later how it went.
        """
        pool = self._pools.get(model)
        return None if pool is None else pool.pick(affinity, tried, now)

    def _ring(self, model: str) -> Ring | None:
        pool = self._pools.get(model)
        return None if pool is None else pool.ring


# --- the conversation's beginning -------------------------------------------------------------------------


class _Body(msgspec.Struct):
    """The fields that can begin a conversation; all others are skipped, and these are not decoded either."""

    messages: list[msgspec.Raw] = []
    system: msgspec.Raw = _NOTHING  # of /v1/messages
    instructions: msgspec.Raw = _NOTHING  # of /v1/responses
    input: msgspec.Raw = _NOTHING  # of /v1/responses: text, or messages. The texts of /v1/embeddings begin nothing
    prompt: msgspec.Raw = _NOTHING  # of /v1/completions


class _Message(msgspec.Struct):
    content: msgspec.Raw = _NOTHING
    role: str = ""


_read_body = msgspec.json.Decoder(_Body).decode
_read_message = msgspec.json.Decoder(_Message).decode
_read_list = msgspec.json.Decoder(list[msgspec.Raw]).decode


def beginning_of(body: bytes) -> bytes | None:
    """A key for how the conversation in a JSON body begins, equal for all its turns; None if there is nothing to read.

    What is compared is JSON text: a client that writes the same words differently gets another key, and is served
    as well, if colder.
    """
    try:
        fields = _read_body(body)
        parts = [_start(part, _PART_BYTES) for part in (fields.system, fields.instructions) if part]
        messages = fields.messages
        if not messages and _start(fields.input, 1).tobytes() == b"[":
            messages = _read_list(fields.input)
        parts += _first_words(messages)
    except (msgspec.MsgspecError, RecursionError):
        return None
    if not messages:
        text = fields.prompt or fields.input
        if text:
            parts.append(_start(text, _PROMPT_BYTES))
    return key_of(*parts) if parts else None


def _first_words(messages: Sequence[msgspec.Raw]) -> list[memoryview]:
    """The contents up to the first user message's."""
    words = []
    for message in messages:
        read = _read_message(message)
        words.append(_start(read.content, _PART_BYTES))
        if read.role == "user":
            break
    return words


def _start(raw: msgspec.Raw, length: int) -> memoryview:
    return memoryview(raw)[:length]
