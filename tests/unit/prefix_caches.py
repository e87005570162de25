"""A made-up day of conversations in front of replicas with prefix caches, to compare routing policies by.

Every policy sees the same conversations: who speaks when, how long the turns are, how long people think. Replicas keep
the conversations that they answered last, as far as their cache goes; what a prompt repeats of them costs nothing, all
else is computed, and everything takes longer the more a replica has to do.
"""

from __future__ import annotations

import heapq
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from random import Random

from controlplane.core.types import RoutingPolicy
from controlplane.proxy.routing import Router
from tests.unit.upstreams import AT, NOW, Upstream, upstreams

REPLICAS = 6
CONVERSATIONS = 400
ARRIVALS_PER_SECOND = 2.0
CACHE_TOKENS = 400_000
SYSTEM_TOKENS = 400
PREFILL_TOKENS_PER_SECOND = 8000.0
SECONDS_PER_TOKEN = 0.02
COMFORTABLE_IN_FLIGHT = 16


@dataclass(frozen=True)
class Outcome:
    turns: int
    hit_ratio: float  # of all prompt tokens, those that were in the cache
    first_token_p95_seconds: float
    worst_share: float  # the busiest replica's requests in flight over the mean, at busy moments: the mean of that


@dataclass
class _Conversation:
    number: int
    application: int
    turns: list[tuple[int, int, float]]  # tokens asked, tokens answered, seconds until the next turn
    prompt_tokens: int = SYSTEM_TOKENS
    next_turn: int = 0
    messages: list[dict[str, str]] = field(default_factory=list)


class _Cache:
    """Least recently used goes first. A system prompt is shared by its application's conversations."""

    def __init__(self) -> None:
        self._tokens: OrderedDict[object, int] = OrderedDict()

    def found(self, conversation: _Conversation) -> int:
        system = self._tokens.get(("system", conversation.application), 0)
        return max(system, self._tokens.get(conversation.number, 0))

    def keep(self, conversation: _Conversation, tokens: int) -> None:
        for key, size in ((("system", conversation.application), SYSTEM_TOKENS), (conversation.number, tokens)):
            self._tokens[key] = size
            self._tokens.move_to_end(key)
        while sum(self._tokens.values()) > CACHE_TOKENS:
            self._tokens.popitem(last=False)


def replay(policy: RoutingPolicy, seed: int = 7) -> Outcome:
    those = upstreams(REPLICAS, policy)
    router: Router[Upstream] = Router(Random(seed))
    router.follow({"m": those}, {"m": policy}, NOW, AT)
    caches = {one.url: _Cache() for one in those}
    order = count()
    events: list[tuple[float, int, _Conversation, Upstream | None]] = []  # None: a turn begins, else it ends there
    for at, conversation in _conversations(Random(seed)):
        heapq.heappush(events, (at, next(order), conversation, None))
    prompts = hits = 0
    waits: list[float] = []
    shares: list[float] = []
    while events:
        at, _, conversation, upstream = heapq.heappop(events)
        asked, answered, pause = conversation.turns[conversation.next_turn]
        if upstream is not None:
            upstream.in_flight -= 1
            conversation.prompt_tokens += answered
            conversation.messages.append({"role": "assistant", "content": "a"})
            caches[upstream.url].keep(conversation, conversation.prompt_tokens)
            conversation.next_turn += 1
            if conversation.next_turn < len(conversation.turns):
                heapq.heappush(events, (at + pause, next(order), conversation, None))
            continue
        conversation.prompt_tokens += asked
        conversation.messages.append({"role": "user", "content": f"{conversation.number} {conversation.next_turn}"})
        upstream = _picked(router, conversation, at)
        cached = min(caches[upstream.url].found(conversation), conversation.prompt_tokens)
        upstream.in_flight += 1
        slowness = max(1.0, upstream.in_flight / COMFORTABLE_IN_FLIGHT)
        first_token = (conversation.prompt_tokens - cached) / PREFILL_TOKENS_PER_SECOND * slowness
        prompts += conversation.prompt_tokens
        hits += cached
        waits.append(first_token)
        shares += _share_of_the_busiest(those)
        end = at + first_token + answered * SECONDS_PER_TOKEN * slowness
        heapq.heappush(events, (end, next(order), conversation, upstream))
    assert not any(one.in_flight for one in those)
    return Outcome(len(waits), hits / prompts, sorted(waits)[len(waits) * 95 // 100], sum(shares) / len(shares))


def _conversations(rng: Random) -> list[tuple[float, _Conversation]]:
    at, made = AT, []
    for number in range(CONVERSATIONS):
        at += rng.expovariate(ARRIVALS_PER_SECOND)
        turns = [(rng.randint(100, 1500), rng.randint(100, 800), rng.uniform(5, 60)) for _ in range(rng.randint(3, 10))]
        made.append((at, _Conversation(number, number % 5, turns)))
    return made


def _picked(router: Router[Upstream], conversation: _Conversation, at: float) -> Upstream:
    affinity = None
    if router.wants_affinity("m"):
        system = {"role": "system", "content": f"application {conversation.application}"}
        body = json.dumps({"model": "m", "messages": [system, *conversation.messages]}).encode()
        affinity = router.affinity_of("m", [(b"x-session-id", b"%d" % conversation.number)], body)
    chosen = router.pick("m", affinity, (), at)
    assert chosen is not None
    return chosen


def _share_of_the_busiest(those: Sequence[Upstream]) -> list[float]:
    total = sum(one.in_flight for one in those)
    return [max(one.in_flight for one in those) * len(those) / total] if total >= 8 * len(those) else []
