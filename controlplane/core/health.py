"""What a probe's result means for an endpoint: consecutive passes and fails.

    UNPROVEN --pass--> READY --fails in a row--> FAILING --passes in a row--> READY

A foreign server on our port is no failing endpoint of ours: it is out at once. `failing_since` is the first
fail since it served, or since it began to be looked at: the start budget is counted from there, too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime

from controlplane.core.types import Endpoint, Health, ProbeResult


@dataclass(frozen=True, slots=True)
class HealthRules:
    passes_to_recover: int = 2
    fails_to_fail: int = 3


def observe(endpoint: Endpoint, result: ProbeResult, *, now: datetime, rules: HealthRules) -> Endpoint:
    """The endpoint after this probe."""
    seen = replace(
        endpoint,
        running=result.running,
        waiting=result.waiting,
        generated_tokens=result.generated_tokens,
        message=result.message,
        probed_at=now,
    )
    return _after_pass(seen, now, rules) if result.passed else _after_fail(seen, result, now, rules)


def _after_pass(endpoint: Endpoint, now: datetime, rules: HealthRules) -> Endpoint:
    passes = endpoint.passes + 1
    endpoint = replace(endpoint, passes=passes, fails=0, confirmed_at=now)
    if endpoint.health is Health.FAILING and passes < rules.passes_to_recover:
        return endpoint
    first_ready_at = endpoint.first_ready_at or now
    return replace(endpoint, health=Health.READY, first_ready_at=first_ready_at, failing_since=None)


def _after_fail(endpoint: Endpoint, result: ProbeResult, now: datetime, rules: HealthRules) -> Endpoint:
    fails = endpoint.fails + 1
    endpoint = replace(endpoint, passes=0, fails=fails, failing_since=endpoint.failing_since or now)
    if endpoint.health is not Health.UNPROVEN and (result.is_foreign or fails >= rules.fails_to_fail):
        endpoint = replace(endpoint, health=Health.FAILING)
    return endpoint
