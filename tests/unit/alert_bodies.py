"""Webhook bodies that Hypothesis makes up: what Grafana and Alertmanager build of some history, and what nobody would.

A history is what truly happened to one alert: episodes, one after the other, of which the last may still go on. Each
of two peers evaluates it by itself, so one may see an episode begin and end a little later than the other.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import strategies as st

BEGAN = datetime(2026, 11, 22, 9, tzinfo=UTC)
MODEL = "qwen3-8b"
PEER_SECONDS = 5  # how much later the second peer sees what the first saw
_GO_ZERO = "0001-01-01T00:00:00Z"

Body = dict[str, Any]


@dataclass(frozen=True)
class Told:
    """One alert of a body."""

    fingerprint: str
    starts_at: int  # seconds after BEGAN
    ends_at: int | None
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, float] | None = None


@dataclass(frozen=True)
class History:
    fingerprint: str
    labels: Mapping[str, str]
    episodes: Sequence[tuple[int, int | None]]

    @property
    def is_firing(self) -> bool:
        return self.episodes[-1][1] is None

    def words(self) -> list[tuple[Told, Told]]:
        """What there is to tell of it, by each peer."""
        return [
            (self._told(starts_at, ends_at, 0), self._told(starts_at, ends_at, PEER_SECONDS))
            for begins, ended in self.episodes
            for starts_at, ends_at in ([(begins, None)] if ended is None else [(begins, None), (begins, ended)])
        ]

    def _told(self, starts_at: int, ends_at: int | None, late: int) -> Told:
        return Told(self.fingerprint, starts_at + late, None if ends_at is None else ends_at + late, self.labels)


def text(seconds: int) -> str:
    return (BEGAN + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def grafana_body(told: Sequence[Told], *, truncated: int = 0) -> Body:
    alerts = [
        {**_alert(one), "values": one.values, "valueString": "", "silenceURL": "", "orgId": 1, "ruleUID": "r"}
        for one in told
    ]
    return {
        **_group(alerts),
        "version": "1",
        "orgId": 1,
        "state": "alerting",
        "title": "t",
        "truncatedAlerts": truncated,
    }


def alertmanager_body(told: Sequence[Told], *, truncated: int = 0) -> Body:
    return {**_group([_alert(one) for one in told]), "version": "4", "truncatedAlerts": truncated}


def _alert(one: Told) -> Body:
    return {
        "status": "firing" if one.ends_at is None else "resolved",
        "labels": {"alertname": "queue", **one.labels},
        "annotations": dict(one.annotations),
        "startsAt": text(one.starts_at),
        "endsAt": _GO_ZERO if one.ends_at is None else text(one.ends_at),
        "generatorURL": "http://grafana.example/",
        "fingerprint": one.fingerprint,
    }


def _group(alerts: Sequence[Body]) -> Body:
    is_firing = any(one["status"] == "firing" for one in alerts)
    return {
        "receiver": "cp",
        "status": "firing" if is_firing else "resolved",
        "alerts": list(alerts),
        "groupKey": "{}:{}",
    }


def listed(history: History) -> Body:
    """The alert as the source's API lists it, while it fires."""
    starts_at, _ = history.episodes[-1]
    return {
        "fingerprint": history.fingerprint,
        "status": {"state": "active", "silencedBy": [], "inhibitedBy": []},
        "startsAt": text(starts_at),
        "endsAt": text(starts_at + 240),
        "labels": {"alertname": "queue", "__alert_rule_uid__": "r", **history.labels},
        "annotations": {"__values__": '{"A":1}'},
    }


# --- what truly happened --------------------------------------------------------------------------------------

actions = st.sampled_from(["scale_up", "scale_down", "replace", "drain_node", "dance"])


@st.composite
def labels(draw: st.DrawFn, action: st.SearchStrategy[str] = actions) -> dict[str, str]:
    """Those of a rule of ours, or of somebody else's."""
    found = {"owner": draw(st.sampled_from(["controlplane", "controlplane", "somebody"])), "action": draw(action)}
    found |= {"model": draw(st.sampled_from([MODEL, MODEL, "unheard-of"])), "node": "gpu01", "replica": "cp-a-1"}
    return found


@st.composite
def histories(draw: st.DrawFn, action: st.SearchStrategy[str] = actions) -> list[History]:
    """Of one to four alerts, each with one to three episodes."""
    found = []
    for number in range(draw(st.integers(1, 4))):
        at, episodes = 0, list[tuple[int, int | None]]()
        for last in [False] * draw(st.integers(0, 2)) + [True]:
            starts_at = at + draw(st.integers(2 * PEER_SECONDS, 60))
            at = starts_at + draw(st.integers(2 * PEER_SECONDS, 60))
            episodes.append((starts_at, None if last and draw(st.booleans()) else at))
        found.append(History(f"{number:016x}", draw(labels(action)), episodes))
    return found


@st.composite
def deliveries(draw: st.DrawFn, told: Sequence[History], *, may_lose: bool) -> list[list[Told]]:
    """What arrives of it, from either peer or both, in groups: in any order, some of it twice, and some of it never."""
    peers = st.sampled_from([(0,), (1,), (0, 1)])  # who tells the other in time that it was sent
    words = [word[peer] for history in told for word in history.words() for peer in draw(peers)]
    if may_lose:
        words = draw(st.lists(st.sampled_from(words), max_size=len(words), unique_by=repr))
    again = draw(st.lists(st.sampled_from(words), max_size=6)) if words else []
    order = draw(st.permutations([*words, *again]))
    groups = []
    while order:
        size = draw(st.integers(1, 4))
        groups.append(order[:size])
        order = order[size:]
    return groups


# --- what nobody would build ----------------------------------------------------------------------------------

_ODD: st.SearchStrategy[Any] = st.sampled_from(
    [
        *(
            "",
            "\0",
            "\ud800",
            "x" * 3000,
            "0001-01-01T00:00:00Z",
            "9999-12-31T23:59:59.999999999-23:59",
            "2026-02-30T00:00:00Z",
        ),
        *(-1, 0, 2**31, 2**63, 2**64, 10**300, 10**400, -0.0, float("inf"), float("nan"), True, None),
        *([], {}, [[]], {"": {"": []}}, {"a\0": "\udfff"}),
    ]
)
odd_values = _ODD | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def mutated(draw: st.DrawFn, body: Body) -> bytes:
    """The body with up to three things replaced, removed or added, and now and then cut or scrambled on its way."""
    changed = copy.deepcopy(body)
    for _ in range(draw(st.integers(0, 3))):
        parent, key = draw(st.sampled_from(list(_places(changed))))
        match draw(st.sampled_from(["replace", "remove", "add"])):
            case "replace":
                parent[key] = draw(odd_values)
            case "remove":
                del parent[key]
            case _ if isinstance(parent, dict):
                parent[draw(st.text(max_size=8))] = draw(odd_values)
            case _:
                parent.append(copy.deepcopy(parent[key]))
        if not changed:
            break
    raw = json.dumps(changed).encode()
    if draw(st.integers(0, 9)) == 0:
        at = draw(st.integers(0, len(raw)))
        raw = raw[:at] + draw(st.binary(max_size=4)) + raw[at + draw(st.integers(0, 4)) :]
    return raw


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a document, with each of its keys."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield value, key
        yield from _places(one)
