"""What tenants may use: requests and tokens per minute, requests at a time, tokens of the month.

`admit` judges by what is known in memory and takes what the request may need; `settle` gives back what it did not. How
many tokens a request will need is not known before: a quarter of its body's bytes, and as many as it lets be generated.
A request is admitted as soon as anything is left, so that one larger than the limit is not refused for ever.

States of a worker, by what it last heard of the others (`exchange`, about twice a second while limits are used):

- alone: no other worker lives. The limit is its own.
- sharing: it uses its part of what was left, then asks anew. A tenant that nobody used lately has an even part of its
  limit everywhere, without a word. Over all workers at most `workers - 1` requests too many are admitted.
- on its own: the database is away, or was not heard of yet. Each worker keeps to its even part of the limits, counted
  by itself; of the month to what it was given last, or to an even part where it never was. Nothing raises.

What a worker that dies had used of the last minute is forgotten with it. A worker that joins may use an even part of a
limit that the others have begun to use since they last told.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import date

from loguru import logger

from controlplane.clock import utc_now
from controlplane.core.quotas import SlidingMinute, part
from controlplane.core.types import TenantLimits
from controlplane.db import Database, DatabaseError, limit_parts
from controlplane.proxy.errors import ApiError, Headers, insufficient_quota, rate_limit_exceeded

DEFAULT_COMPLETION_TOKENS = 512  # of a request that does not say how many it wants
_MOST_COMPLETION_TOKENS = 1_000_000  # more than any model generates: what a client asks for is not to be trusted
_BYTES_PER_TOKEN = 4

_REQUESTS, _TOKENS, _CONCURRENT, _MONTH = range(4)  # the order of the table's arrays
_KINDS = ("requests", "tokens", "concurrent", "budget")
_EVERY = range(4)
_ORDER = (_MONTH, _CONCURRENT, _REQUESTS, _TOKENS)  # of several that are reached, the one that lasts longest is named

_BUSY_SECONDS = 0.5  # between two exchanges while others work for the same tenants
_IDLE_SECONDS = 1.0
_UNHURRIED_SECONDS = 5.0  # alone, or no tenant has a limit; well below what a worker is forgotten after
_LEAST_GAP_SECONDS = 0.05
_SURE_SECONDS = 0.1
_ON_ITS_OWN_AFTER_SECONDS = 4.0
_CONCURRENT_RETRY_SECONDS = 2
_LONGEST_RETRY_SECONDS = 60

Tally = Callable[[str, date], tuple[int, int]]
"""(tenant, first of the month) -> tokens of that month that this process has recorded, and those of them it stored."""


class Grant:
    """One admitted request. `headers`: lines for the answer, which tell what is left of the limits."""

    __slots__ = ("_estimate", "_is_settled", "_tenant", "headers")

    def __init__(self, tenant: _Tenant, estimate: int, headers: bytes) -> None:
        self._tenant = tenant
        self._estimate = estimate
        self._is_settled = False
        self.headers = headers

    def settle(self, tokens: int | None) -> None:
        """The request has ended. `tokens`: prompt and completion; None: not known, so the estimate stays.

        Call it after what it used was recorded as usage; again is harmless.
        """
        if self._is_settled:
            return
        self._is_settled = True
        self._tenant.give_back(self._estimate, tokens)


class Limits:
    """Give it what the directory says (`follow`), keep `run` running, and `close` it at the end.

    `tally` is how it learns what the month's budget was used for since it was last read: `Usage.tally`.
    `expected_workers`: how many are assumed until the first exchange.
    """

    def __init__(
        self,
        db: Database,
        worker: str,
        *,
        tally: Tally,
        expected_workers: int = 1,
        clock: Callable[[], float] = time.monotonic,
        today: Callable[[], date] = lambda: utc_now().date(),
    ) -> None:
        self._db = db
        self._worker = worker
        self._tally = tally
        self._clock = clock
        self._tenants: dict[str, _Tenant] = {}
        self._wake = asyncio.Event()
        self._one_at_a_time = asyncio.Lock()
        self._is_busy = False
        self._is_failing = False
        self._shared = _Shared(expected_workers, today().replace(day=1), tally, self._wake)
        self.refused: Counter[tuple[str, str]] = Counter()  # by tenant and kind: requests, tokens, concurrent, budget

    @property
    def workers(self) -> int:
        """How many live, as last heard of."""
        return self._shared.workers

    def follow(self, tenants: Mapping[str, TenantLimits], now: float) -> None:
        """These are in force from now on. What was used before counts on."""
        known, self._tenants = self._tenants, {}
        is_news = False
        for name, limits in tenants.items():
            if not limits.is_limited:
                continue
            tenant = known.get(name)
            if tenant is None:
                tenant = _Tenant(name, self._shared)
            is_news = tenant.limit(limits, now) or is_news
            self._tenants[name] = tenant
        if is_news:
            self._wake.set()

    def admit(self, tenant: str, body_bytes: int, max_tokens: int | None, now: float) -> Grant | None:
        """None: the tenant has no limits. Raises ApiError (429) that names the limit it has reached."""
        found = self._tenants.get(tenant)
        if found is None:
            return None
        wanted = DEFAULT_COMPLETION_TOKENS if max_tokens is None else max_tokens
        if not 0 <= wanted <= _MOST_COMPLETION_TOKENS:
            wanted = _MOST_COMPLETION_TOKENS if wanted > 0 else 0
        estimate = body_bytes // _BYTES_PER_TOKEN + wanted
        headers = found.take(estimate, now)
        if headers is None:
            reached = found.look(now)
            if reached is not None:
                self.refused[tenant, _KINDS[reached]] += 1
                raise found.refusal(reached, now)
            headers = found.take_seen(estimate)
        return Grant(found, estimate, headers)

    def worker_joined(self) -> None:
        """Another one has, or may have: share with it at once."""
        self._wake.set()

    async def run(self) -> None:
        """Exchange until cancelled."""
        while True:
            await self.exchange()
            await asyncio.sleep(_LEAST_GAP_SECONDS)
            try:
                async with asyncio.timeout(self._pause_seconds()):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def exchange(self) -> bool:
        """Tell the other workers what was used, and take a part of what is left. False: the database is away."""
        async with self._one_at_a_time:
            self._wake.clear()  # before: who asks meanwhile is to be heard
            return await self._exchange()

    async def _exchange(self) -> bool:
        shared = self._shared
        budgeted = [one.name for one in self._tenants.values() if one.limits[_MONTH] is not None]
        # before it is read: what is stored meanwhile counts twice until the next exchange, which is better than never
        stored = {name: self._tally(name, shared.month)[1] for name in budgeted}
        month = shared.month
        growth: list[tuple[_Tenant, tuple[int | None, ...], list[float]]] = []

        def decide(heard: limit_parts.Exchanged) -> limit_parts.Own:
            now = self._clock()
            own = {}
            for tenant in self._tenants.values():
                if tenant.limits[_MONTH] is not None:
                    already = stored.get(tenant.name, 0) if heard.month == month else 0
                    tenant.month_base = heard.month_tokens.get(tenant.name, 0) - already
            shared.month = heard.month
            for tenant in self._tenants.values():
                said, more = tenant.share(heard.others.get(tenant.name), heard.workers, now)
                growth.append((tenant, tenant.limits, more))
                if said is not None:
                    own[tenant.name] = said
            return own

        try:
            heard = await limit_parts.exchange(
                self._db,
                self._worker,
                budgeted,
                decide,
                was_alone=shared.workers == 1 and math.isfinite(shared.heard_at),
            )
        except DatabaseError as error:
            if not self._is_failing:
                logger.warning("limits are not shared; each worker keeps to its part of them", error=str(error))
            self._is_failing = True
            now = self._clock()
            for tenant in self._tenants.values():
                tenant.turn(now)
            return False
        if self._is_failing:
            logger.info("limits are shared again", workers=heard.workers)
        self._is_failing = False
        shared.workers = heard.workers
        shared.heard_at = self._clock()
        for tenant, limits, more in growth:
            if tenant.limits is limits:  # else others are in force since, with parts of their own
                tenant.grow(more)
        self._is_busy = heard.workers > 1 and any(any(told.used) for told in heard.others.values())
        return True

    async def close(self) -> None:
        """Leave the others alone. What was used of the last minute is forgotten."""
        try:
            await limit_parts.leave(self._db, self._worker)
        except DatabaseError:
            return  # it is forgotten after a while

    def _pause_seconds(self) -> float:
        if not self._tenants or self._shared.workers == 1:
            return _UNHURRIED_SECONDS
        now = self._clock()
        if self._is_busy or any(one.is_used(now) for one in self._tenants.values()):
            return _BUSY_SECONDS
        return _IDLE_SECONDS


class _Shared:
    """What all tenants' states of one worker depend on."""

    __slots__ = ("heard_at", "month", "tally", "wake", "workers")

    def __init__(self, workers: int, month: date, tally: Tally, wake: asyncio.Event) -> None:
        self.workers = max(1, workers)
        self.month = month
        self.tally = tally
        self.wake = wake
        self.heard_at = -math.inf


class _Tenant:
    """What this worker counts of one tenant."""

    __slots__ = (
        "_concurrent",
        "_concurrent_before",
        "_far_concurrent",
        "_far_requests",
        "_far_tokens",
        "_left",
        "_minute_requests",
        "_minute_tokens",
        "_others_used",
        "_remaining",
        "_reserved",
        "_resets",
        "_shared",
        "_sure_concurrent",
        "_sure_requests",
        "_sure_tokens",
        "_sure_until",
        "_taken_at",
        "_taken_requests",
        "_taken_tokens",
        "_template",
        "_told",
        "limits",
        "month_base",
        "name",
    )

    def __init__(self, name: str, shared: _Shared) -> None:
        self.name = name
        self._shared = shared
        self.limits: tuple[int | None, ...] = (None,) * 4
        self._template = b""
        self._minute_requests = SlidingMinute()
        self._minute_tokens = SlidingMinute()
        self._concurrent = 0
        self._reserved = 0  # tokens of requests that have not ended
        self._left: list[float] = [0.0] * 4  # of this worker's part
        self._others_used = [0] * 4
        self.month_base = 0  # the month's tokens as stored, without those of this process
        # What was looked up last, and what was taken since: windows only slide towards more room, so that for a moment
        # this says surely that there is some, and spares a request the arithmetic.
        self._sure_until = -math.inf
        self._sure_requests = self._sure_tokens = self._sure_concurrent = 0.0
        self._taken_requests = self._taken_tokens = 0
        self._taken_at = 0.0
        self._concurrent_before = 0
        self._remaining = [0.0, 0.0]  # of the limits per minute, over all workers, at that time: for the headers
        self._resets = [0, 0]  # in how many seconds all of it is there again
        self._told = b""  # to clients, as long as no more is taken than this
        self._far_requests = self._far_tokens = self._far_concurrent = -1.0

    def limit(self, limits: TenantLimits, now: float) -> bool:
        """These hold from now on; says whether that is new. Until the others are heard of, an even part does."""
        asked = (limits.requests_per_minute, limits.tokens_per_minute, limits.max_concurrent, limits.monthly_tokens)
        if asked == self.limits:
            return False
        self._catch_up(now)
        self.limits = asked
        words = zip((b"requests", b"tokens"), asked, strict=False)
        self._template = b"".join(_template(word, limit) for word, limit in words)
        for kind in _EVERY:
            if asked[kind] is not None:
                own = self._own_used(kind, now)
                self._left[kind] = self._even_part(kind, self._shared.workers) - own
        self._sure_until = -math.inf
        return True

    # --- one request ----------------------------------------------------------------------------------------

    def take(self, tokens: int, now: float) -> bytes | None:
        """One request more; the headers that its answer tells. None: it takes a `look` to know that there is room."""
        requests = self._taken_requests + 1
        taken = self._taken_tokens + tokens
        if (
            now >= self._sure_until
            or requests > self._far_requests
            or taken > self._far_tokens
            or self._concurrent >= self._far_concurrent
        ):
            return None
        self._taken_requests = requests
        self._taken_tokens = taken
        self._concurrent += 1
        self._reserved += tokens
        return self._told

    def look(self, now: float) -> int | None:
        """The first kind of limit that leaves nothing; None: there is none."""
        self._catch_up(now)
        room = [
            math.inf if limit is None else self._left_of(kind, limit, now) for kind, limit in enumerate(self.limits)
        ]
        self._sure_requests = room[_REQUESTS]
        self._sure_tokens = min(room[_TOKENS], room[_MONTH])
        self._sure_concurrent = self._concurrent + room[_CONCURRENT]
        self._sure_until = self._taken_at = now + _SURE_SECONDS
        for kind, window in ((_REQUESTS, self._minute_requests), (_TOKENS, self._minute_tokens)):
            limit = self.limits[kind]
            if limit is not None:
                self._remaining[kind] = limit - window.used(now) - self._others_used[kind]
                # or, while nothing was used, once what is taken now was forgotten
                self._resets[kind] = math.ceil(window.seconds_to_empty(now) or window.longest_seconds(now))
        return next((kind for kind in _ORDER if room[kind] < 1), None)

    def take_seen(self, tokens: int) -> bytes:
        """The same after a `look` that found room."""
        self._taken_requests += 1
        self._taken_tokens += tokens
        self._concurrent += 1
        self._reserved += tokens
        if self._shared.workers > 1 and (
            self._taken_requests + 1 > self._sure_requests
            or self._taken_tokens + 1 > self._sure_tokens
            or self._concurrent + 1 > self._sure_concurrent
        ):
            self._shared.wake.set()  # others may have left something of their parts
        self._tell()
        return self._told

    def give_back(self, estimate: int, tokens: int | None) -> None:
        """One has ended, and used these tokens."""
        self._concurrent -= 1
        self._reserved -= estimate
        if tokens is not None:
            self._taken_tokens += tokens - estimate

    def _catch_up(self, now: float) -> None:
        """Write down what was taken since it was looked up."""
        at = min(now, self._taken_at)
        self._minute_requests.add(self._taken_requests, at)
        self._minute_tokens.add(self._taken_tokens, at)
        left = self._left
        left[_REQUESTS] -= self._taken_requests
        left[_TOKENS] -= self._taken_tokens
        left[_MONTH] -= self._taken_tokens
        left[_CONCURRENT] -= self._concurrent - self._concurrent_before
        self._taken_requests = self._taken_tokens = 0
        self._concurrent_before = self._concurrent
        self._sure_until = -math.inf

    def turn(self, now: float) -> None:
        """Let the minutes slide: what a request is found to have used when it ends counts from about then."""
        self._catch_up(now)
        self._minute_requests.used(now)
        self._minute_tokens.used(now)

    def _left_of(self, kind: int, limit: int, now: float) -> float:
        shared = self._shared
        if shared.workers == 1:
            return limit - self._used(kind, now)
        if kind != _MONTH and now - shared.heard_at > _ON_ITS_OWN_AFTER_SECONDS:
            return -(-limit // shared.workers) - self._own_used(kind, now)
        return self._left[kind]

    def _own_used(self, kind: int, now: float) -> float:
        if kind == _REQUESTS:
            return self._minute_requests.used(now)
        if kind == _TOKENS:
            return self._minute_tokens.used(now)
        if kind == _CONCURRENT:
            return self._concurrent
        recorded, stored = self._shared.tally(self.name, self._shared.month)
        return self._reserved + recorded - stored

    def _used(self, kind: int, now: float) -> float:
        """By all workers, as far as it is known here."""
        if kind == _MONTH:
            recorded, _ = self._shared.tally(self.name, self._shared.month)
            return self.month_base + recorded + self._reserved + self._others_used[kind]
        return self._own_used(kind, now) + self._others_used[kind]

    # --- the other workers ----------------------------------------------------------------------------------

    def share(
        self, told: limit_parts.Told | None, workers: int, now: float
    ) -> tuple[tuple[list[int], list[int]] | None, list[float]]:
        """What is said to the others (None: nothing), and by how much each part grows once that is written.

        What it shrinks by counts at once: a part that is too small for a moment does no harm.
        """
        if told is None:
            told = limit_parts.Told(0, (0, 0, 0, 0), (0, 0, 0, 0))
        self._catch_up(now)
        self._others_used = list(told.used)
        own = [0 if self.limits[kind] is None else max(0, math.ceil(self._own_used(kind, now))) for kind in _EVERY]
        is_used = any(own) or any(told.used)
        silent = max(0, workers - 1 - told.workers)
        parts = [0] * 4
        growth = [0.0] * 4
        for kind in _EVERY:
            limit = self.limits[kind]
            if limit is None:
                continue
            even = self._even_part(kind, workers)
            if is_used:
                others_parts = told.parts[kind] + silent * even
                is_idle = not own[kind]
                parts[kind] = part(limit, self._used(kind, now), others_parts, workers, is_idle=is_idle)
            else:
                parts[kind] = even
            growth[kind] = max(0.0, parts[kind] - self._left[kind])
            self._left[kind] = min(self._left[kind], parts[kind])
        return ((own, parts) if is_used and workers > 1 else None), growth

    def grow(self, more: list[float]) -> None:
        self._sure_until = -math.inf
        for kind in _EVERY:
            self._left[kind] += more[kind]

    def is_used(self, now: float) -> bool:
        self._catch_up(now)
        return any(self.limits[kind] is not None and self._own_used(kind, now) > 0 for kind in _EVERY)

    def _even_part(self, kind: int, workers: int) -> int:
        """Of what would be left had nobody used anything lately."""
        limit = self.limits[kind]
        assert limit is not None
        known = 0
        if kind == _MONTH:
            _, stored = self._shared.tally(self.name, self._shared.month)
            known = self.month_base + stored
        return max(0, -(-(limit - known) // workers))

    # --- what the client is told ----------------------------------------------------------------------------

    def _tell(self) -> None:
        """Write OpenAI's `x-ratelimit-` headers, of the limits per minute.

        They are good until a hundredth of what is left is taken, or somebody looks; and until then there is room.
        """
        told: list[int] = []
        self._far_requests = self._sure_requests - 1
        self._far_tokens = self._sure_tokens - 1
        self._far_concurrent = self._sure_concurrent - 1
        if self.limits[_REQUESTS] is not None:
            left = max(0, int(self._remaining[_REQUESTS] - self._taken_requests))
            told += (left, self._resets[_REQUESTS])
            self._far_requests = min(self._far_requests, self._taken_requests + left // 100)
        if self.limits[_TOKENS] is not None:
            left = max(0, int(self._remaining[_TOKENS] - self._taken_tokens))
            told += (left, self._resets[_TOKENS])
            self._far_tokens = min(self._far_tokens, self._taken_tokens + left // 100)
        self._told = self._template % tuple(told)

    def _headers(self) -> Headers:
        self._tell()
        pairs = (line.partition(b": ") for line in self._told.split(b"\r\n"))
        return tuple((name, value) for name, _, value in pairs if name)

    def refusal(self, kind: int, now: float) -> ApiError:
        limit = self.limits[kind]
        assert limit is not None
        used = max(0, math.ceil(self._used(kind, now)))
        if used < limit:  # others may have left something of their parts
            self._shared.wake.set()
        if kind == _MONTH:
            return insufficient_quota(
                f"The monthly budget of {limit} tokens is used up: {used} are used or reserved. "
                "It begins anew on the first of the month (UTC).",
                self._headers(),
            )
        if kind == _CONCURRENT:
            wait = _CONCURRENT_RETRY_SECONDS
            words = f"Limit of {limit} concurrent requests reached: {used} are under way."
        else:
            window = self._minute_requests if kind == _REQUESTS else self._minute_tokens
            wait = 1
            if used >= limit:
                enough = limit - 1 - self._others_used[kind]
                wait = max(1, min(_LONGEST_RETRY_SECONDS, math.ceil(window.seconds_until(enough, now))))
            words = f"Limit of {limit} {_KINDS[kind]} per minute reached: {used} were used in the last 60 s."
        return rate_limit_exceeded(f"{words} Try again in {wait} s.", wait, self._headers())


def _template(word: bytes, limit: int | None) -> bytes:
    """Of one limit's headers; what remains and the seconds until all of it does are to be filled in."""
    if limit is None:
        return b""
    return (b"x-ratelimit-limit-%s: %d\r\nx-ratelimit-remaining-%s: %%d\r\nx-ratelimit-reset-%s: %%ds\r\n") % (
        word,
        limit,
        word,
        word,
    )
