"""What one worker admits of a tenant, and what it says when it does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date
from typing import Any

import pytest

from controlplane.core.types import TenantLimits
from controlplane.db import Database, DatabaseOptions
from controlplane.proxy.errors import ApiError
from controlplane.proxy.limits import Grant, Limits

MONTH = date(2026, 1, 1)


class Recorded:
    """Stands for usage: what was recorded of the month, by tenant."""

    def __init__(self) -> None:
        self.tokens: dict[str, int] = {}

    def __call__(self, tenant: str, month: date) -> tuple[int, int]:
        return self.tokens.get(tenant, 0), 0


@pytest.fixture
def make() -> Callable[..., Limits]:
    """Limits of a tenant "lab", in a worker that never heard of any other."""

    def made(*, tally: Any = None, workers: int = 1, **limits: Any) -> Limits:
        nowhere = Database(DatabaseOptions("postgresql://127.0.0.1:1/x"))
        made = Limits(nowhere, "w", tally=tally or Recorded(), expected_workers=workers, today=lambda: MONTH)
        made.follow({"lab": TenantLimits(**limits), "free": TenantLimits()}, 0.0)
        return made

    return made


def refusal(limits: Limits, now: float, *, body_bytes: int = 0, max_tokens: int | None = 0) -> ApiError:
    with pytest.raises(ApiError) as caught:
        limits.admit("lab", body_bytes, max_tokens, now)
    return caught.value


def admitted(limits: Limits, now: float, *, body_bytes: int = 0, max_tokens: int | None = 0) -> Grant:
    grant = limits.admit("lab", body_bytes, max_tokens, now)
    assert grant is not None
    return grant


def header(error: ApiError, name: str) -> str | None:
    return next((value.decode() for key, value in error.headers if key == name.encode()), None)


async def test_a_tenant_without_limits_is_not_looked_at(make: Callable[..., Limits]) -> None:
    limits = make(requests_per_minute=1)
    assert limits.admit("free", 10, None, 0.0) is None
    assert limits.admit("never heard of", 10, None, 0.0) is None


async def test_requests_per_minute_slide(make: Callable[..., Limits]) -> None:
    limits = make(requests_per_minute=6)
    for _ in range(6):
        admitted(limits, 0.0)
    assert refusal(limits, 59.9).code == "rate_limit_exceeded"
    wait = int(header(refusal(limits, 59.9), "retry-after") or 0)
    admitted(limits, 59.9 + wait)
    assert refusal(limits, 59.9 + wait).status == 429
    assert sum(limits.refused.values()) == 3


async def test_a_refusal_names_the_limit_and_when_to_come_again(make: Callable[..., Limits]) -> None:
    limits = make(requests_per_minute=2)
    admitted(limits, 30.0)
    admitted(limits, 30.0)
    error = refusal(limits, 30.0)
    said = json.loads(error.body())["error"]
    assert said["message"] == (
        "Limit of 2 requests per minute reached: 2 were used in the last 60 s. Try again in 60 s."
    )
    assert (said["type"], said["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert header(error, "retry-after") == "60"
    assert header(error, "x-should-retry") is None
    assert header(error, "x-ratelimit-limit-requests") == "2"
    assert header(error, "x-ratelimit-remaining-requests") == "0"


@pytest.mark.parametrize("now", [0.0, 1.0, 29.5, 59.9, 60.0, 61.0, 119.0])
async def test_retry_after_is_never_longer_than_a_client_would_wait(make: Callable[..., Limits], now: float) -> None:
    limits = make(tokens_per_minute=10)
    admitted(limits, now, max_tokens=100_000)
    waits = []
    for later in range(0, 125, 7):
        waits.append(int(header(refusal(limits, now + later), "retry-after") or 0))
        if now + later + waits[-1] >= (now // 60 + 2) * 60:
            break
    assert all(1 <= wait <= 60 for wait in waits)
    admitted(limits, now + later + waits[-1])


async def test_what_is_left_is_told_with_every_answer(make: Callable[..., Limits]) -> None:
    limits = make(requests_per_minute=10, tokens_per_minute=1000)
    grant = admitted(limits, 15.0, body_bytes=400, max_tokens=50)
    assert grant.headers.decode().splitlines() == [
        "x-ratelimit-limit-requests: 10",
        "x-ratelimit-remaining-requests: 9",
        "x-ratelimit-reset-requests: 105s",
        "x-ratelimit-limit-tokens: 1000",
        "x-ratelimit-remaining-tokens: 850",
        "x-ratelimit-reset-tokens: 105s",
    ]
    assert make(max_concurrent=3).admit("lab", 0, 0, 0.0).headers == b""  # type: ignore[union-attr]


async def test_tokens_are_taken_as_they_may_be_needed_and_given_back_as_they_were_not(
    make: Callable[..., Limits],
) -> None:
    limits = make(tokens_per_minute=1000)
    grant = admitted(limits, 0.0, max_tokens=1000)
    assert refusal(limits, 0.0).code == "rate_limit_exceeded"
    grant.settle(400)
    second = admitted(limits, 1.0, max_tokens=600)
    assert refusal(limits, 1.0).code == "rate_limit_exceeded"
    second.settle(None)  # not known: the estimate stays
    assert refusal(limits, 2.0).code == "rate_limit_exceeded"


async def test_what_a_long_answer_used_counts_from_its_end_while_the_database_is_away() -> None:
    now = 0.0
    nowhere = Database(DatabaseOptions("postgresql://127.0.0.1:1/x"))
    limits = Limits(nowhere, "w", tally=Recorded(), today=lambda: MONTH, clock=lambda: now)
    limits.follow({"lab": TenantLimits(tokens_per_minute=1000)}, now)
    grant = admitted(limits, now, max_tokens=10)
    now = 150.0
    assert not await limits.exchange()
    grant.settle(5000)
    assert not await limits.exchange()
    assert refusal(limits, 151.0).code == "rate_limit_exceeded"


async def test_settling_twice_is_harmless(make: Callable[..., Limits]) -> None:
    limits = make(max_concurrent=2, tokens_per_minute=100)
    first = admitted(limits, 0.0)
    admitted(limits, 0.0)
    for tokens in (10, 10, None, 1000):
        first.settle(tokens)
    admitted(limits, 0.0)
    assert "2 are under way" in str(refusal(limits, 0.0))
    assert limits.refused == {("lab", "concurrent"): 1}


async def test_a_request_larger_than_the_limit_is_admitted_when_nothing_else_was_used(
    make: Callable[..., Limits],
) -> None:
    limits = make(tokens_per_minute=100)
    admitted(limits, 0.0, max_tokens=5000)
    assert refusal(limits, 100.0).code == "rate_limit_exceeded"
    admitted(limits, 120.0, max_tokens=5000)


@pytest.mark.parametrize("wanted", [-(10**6), 10**30])
async def test_an_absurd_number_of_tokens_neither_frees_any_nor_takes_more_than_a_model_generates(
    make: Callable[..., Limits], wanted: int
) -> None:
    limits = make(tokens_per_minute=2_000_000)
    admitted(limits, 0.0, max_tokens=1_500_000).settle(1_500_000)
    admitted(limits, 0.0, max_tokens=wanted).settle(0)
    admitted(limits, 0.0, max_tokens=500_000)
    assert refusal(limits, 0.0).code == "rate_limit_exceeded"


async def test_concurrent_requests_are_counted_until_they_end(make: Callable[..., Limits]) -> None:
    limits = make(max_concurrent=1)
    grant = admitted(limits, 0.0)
    assert header(refusal(limits, 0.0), "retry-after") == "2"
    assert refusal(limits, 1000.0).code == "rate_limit_exceeded"
    grant.settle(None)
    admitted(limits, 1000.0)


async def test_a_spent_monthly_budget_is_another_refusal_that_nobody_should_repeat(
    make: Callable[..., Limits],
) -> None:
    recorded = Recorded()
    limits = make(monthly_tokens=1000, tally=recorded)
    grant = admitted(limits, 0.0, max_tokens=1000)
    assert refusal(limits, 0.0).code == "insufficient_quota"  # reserved is as good as used
    recorded.tokens["lab"] = 999
    grant.settle(999)
    last = admitted(limits, 0.0, max_tokens=10)
    recorded.tokens["lab"] = 1009
    last.settle(10)
    error = refusal(limits, 3600.0)
    assert (error.status, error.code) == (429, "insufficient_quota")
    assert header(error, "x-should-retry") == "false"
    assert header(error, "retry-after") is None
    assert "budget of 1000 tokens is used up: 1009 are" in str(error)


async def test_new_limits_are_in_force_at_once_and_what_was_used_counts_on(make: Callable[..., Limits]) -> None:
    limits = make(requests_per_minute=2)
    grant = admitted(limits, 0.0)
    admitted(limits, 0.0)
    refusal(limits, 0.0)
    limits.follow({"lab": TenantLimits(requests_per_minute=3)}, 0.0)
    admitted(limits, 0.0)
    refusal(limits, 0.0)
    limits.follow({"lab": TenantLimits()}, 0.0)
    assert limits.admit("lab", 0, 0, 0.0) is None
    grant.settle(10)


async def test_a_worker_that_heard_of_nobody_keeps_to_its_part_of_the_limits(make: Callable[..., Limits]) -> None:
    limits = make(requests_per_minute=10, max_concurrent=100, workers=3)
    for _ in range(4):
        admitted(limits, 0.0)
    assert refusal(limits, 0.0).code == "rate_limit_exceeded"
    for _ in range(4):
        admitted(limits, 120.0)
    assert refusal(limits, 120.0).code == "rate_limit_exceeded"
