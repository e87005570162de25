"""How far a set may grow or shrink now, counted from its own past changes.

The arithmetic is that of Kubernetes' HorizontalPodAutoscaler (autoscaling/v2, `spec.behavior`): the count at the
beginning of a policy's period is that of now, less what was added since, plus what was taken away, by whomever; the
policy allows `value` replicas, or per cent of that count, more or fewer. A percentage is rounded up, and is one replica
at least: else nothing could ever grow from zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from controlplane.core.types import Change, PolicyType, ScaleDown, ScaleUp, ScalingPolicy, SelectPolicy, seconds


@dataclass(frozen=True, slots=True)
class Limit:
    """The count that a policy allows to be reached now, and when the oldest change in its period drops out of it."""

    policy: ScalingPolicy
    count: int
    loosens_at: datetime | None  # None: nothing changed within the period

    def in_words(self) -> str:
        unit = "%" if self.policy.type is PolicyType.PERCENT else " replicas"
        until = f" until {self.loosens_at:%H:%M:%S}" if self.loosens_at is not None else ""
        return f"the policy {self.policy.value}{unit} in {self.policy.period_seconds} s allows {self.count}{until}"


def growth_limit(rules: ScaleUp, current: int, changes: Sequence[Change], *, now: datetime) -> Limit | None:
    """How many there may be at most. None: any number."""
    limits = [_limit(policy, current, changes, now, +1) for policy in rules.policies]
    pick = min if rules.select_policy is SelectPolicy.MIN else max
    return pick(limits, key=lambda limit: limit.count, default=None)


def shrink_limit(rules: ScaleDown, current: int, changes: Sequence[Change], *, now: datetime) -> Limit | None:
    """How few there may be at least. None: any number."""
    limits = [_limit(policy, current, changes, now, -1) for policy in rules.policies]
    pick = max if rules.select_policy is SelectPolicy.MIN else min
    return pick(limits, key=lambda limit: limit.count, default=None)


def _limit(policy: ScalingPolicy, current: int, changes: Sequence[Change], now: datetime, sign: int) -> Limit:
    begins = now - seconds(policy.period_seconds)
    recent = [change for change in changes if change.at > begins]
    at_first = current - sum(change.desired - change.previous for change in recent)
    may = policy.value
    if policy.type is PolicyType.PERCENT:
        may = max(1, -(-at_first * policy.value // 100))
    oldest = min((change.at for change in recent), default=None)
    count = max(0, at_first + sign * may)
    return Limit(policy, count, oldest + seconds(policy.period_seconds) if oldest is not None else None)
