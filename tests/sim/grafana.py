"""Grafana's alerts as they are, the notifications it has sent out, and its list of active ones."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any


@dataclass(eq=False)
class Rule:
    """One alert instance, by its labels."""

    fingerprint: str
    labels: dict[str, str]
    is_firing: bool = False
    starts_at: datetime | None = None
    ends_at: datetime | None = None
    state_reason: str | None = None  # as Grafana annotates what is no alert of the threshold
    said_until: datetime | None = None  # when a notification last arrived that it fires, however late

    @property
    def action(self) -> str:
        return self.labels.get("action", "")

    def told(self) -> dict[str, Any]:
        """As a webhook tells it; of the newest state."""
        assert self.starts_at is not None
        ends_at = "0001-01-01T00:00:00Z" if self.ends_at is None else self.ends_at.isoformat()
        return {
            "status": "firing" if self.is_firing else "resolved",
            "labels": self.labels,
            "annotations": self.annotations(),
            "startsAt": self.starts_at.isoformat(),
            "endsAt": ends_at,
            "fingerprint": self.fingerprint,
            "values": {"A": 30} if self.is_firing else None,
            "orgId": 1,
        }

    def annotations(self) -> dict[str, str]:
        return {} if self.state_reason is None else {"grafana_state_reason": self.state_reason}


class Grafana:
    def __init__(self, rules: list[Rule]) -> None:
        self.rules = rules
        self.outbox: list[bytes] = []  # notifications under way, oldest first

    def change(self, rule: Rule, *, is_firing: bool, now: datetime) -> None:
        """Begin or end, and notify."""
        if is_firing == rule.is_firing:
            return
        rule.is_firing = is_firing
        if is_firing:
            rule.starts_at, rule.ends_at = now, None
        else:
            rule.ends_at = now
        self.notify([rule])

    def notify(self, rules: list[Rule]) -> None:
        self.outbox.append(
            json.dumps(
                {
                    "receiver": "control-plane",
                    "status": "firing" if any(rule.is_firing for rule in rules) else "resolved",
                    "alerts": [rule.told() for rule in rules],
                    "version": "1",
                    "orgId": 1,
                    "truncatedAlerts": 0,
                }
            ).encode()
        )

    def arrives(self, body: bytes, now: datetime) -> None:
        """A notification is delivered."""
        said = {one["fingerprint"] for one in json.loads(body)["alerts"] if one["status"] == "firing"}
        for rule in self.rules:
            if rule.fingerprint in said:
                rule.said_until = now

    def active(self) -> list[dict[str, Any]]:
        return [
            {
                "fingerprint": rule.fingerprint,
                "labels": rule.labels,
                "annotations": rule.annotations(),
                "startsAt": rule.starts_at.isoformat() if rule.starts_at else "",
                "status": {"state": "active"},
            }
            for rule in self.rules
            if rule.is_firing
        ]

    def rule(self, key: str) -> Rule | None:
        """By the key of its alert, as decisions name it."""
        return next((one for one in self.rules if key.endswith(f"/{one.fingerprint}")), None)
