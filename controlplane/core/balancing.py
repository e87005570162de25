"""Which endpoint gets the next request, and whether a request that failed there may be sent to another one.

Least in-flight: the work of one request differs a thousandfold between prompts, so that taking turns would pile the
long ones up somewhere; counting what is unfinished does not. Ties are broken by chance, because several proxies count
apart and would otherwise all choose the same endpoint. An endpoint whose walltime is about to end gets new requests
only if no other can take them: a request that it is given may not find the time to finish.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from random import Random

from controlplane.core.types import RoutableEndpoint


class Failure(StrEnum):
    """How far a request had got at the upstream that failed it."""

    REFUSED = "refused"  # no connection was made: refused, unreachable, name or certificate wrong
    CONNECT_TIMEOUT = "connect_timeout"  # no connection was made in time
    LOST = "lost"  # connected, then closed without an answer: the request may have been received
    LATE = "late"  # connected, and no byte of the answer in time: it is probably being worked on
    ENGINE_FAILED = "engine_failed"  # answered with 500, 502, 503 or 504, or with an error as a stream's first event
    BROKEN = "broken"  # the answer ended before its end


_NOTHING_WAS_SENT = frozenset({Failure.REFUSED, Failure.CONNECT_TIMEOUT})
_NOTHING_WAS_DONE = frozenset({Failure.LOST, Failure.ENGINE_FAILED})


def pick(
    endpoints: Sequence[RoutableEndpoint],
    in_flight: Mapping[str, int],
    rng: Random,
    excluded: Collection[str] = (),
    *,
    now: datetime,
) -> RoutableEndpoint | None:
    """One of the endpoints that last, with the fewest requests in flight; None when all are excluded.

    `in_flight` and `excluded` go by URL: that is what has a load, and what can be unreachable.
    """
    candidates = [endpoint for endpoint in endpoints if endpoint.url not in excluded]
    if not candidates:
        return None
    candidates = [one for one in candidates if one.yields_at is None or now < one.yields_at] or candidates
    fewest = min(in_flight.get(endpoint.url, 0) for endpoint in candidates)
    return rng.choice([endpoint for endpoint in candidates if in_flight.get(endpoint.url, 0) == fewest])


def may_retry(failure: Failure, before: Collection[Failure] = (), *, is_repeatable: bool = True) -> bool:
    """Whether the same request may be sent to another endpoint; `before`: the failures that it was sent again for.

    Always where certainly none of it was received. Where the engine failed, or its connection ended without a byte of an
    answer, generation ends with it, and OpenAI's own clients would ask again: once, because a request that kills engines
    must not be handed round; and not if the upstream may keep something of it (`is_repeatable`). One that is late is
    being worked on.
    """
    if failure in _NOTHING_WAS_SENT:
        return True
    return failure in _NOTHING_WAS_DONE and is_repeatable and _NOTHING_WAS_DONE.isdisjoint(before)
