"""Which nodes new jobs are kept off, for how long, and never so many that nothing could run.

A node is marked for one of three causes. An operator said so. An alert with `action: drain_node` fires: that lasts as
long as the alert presses, unless an operator clears it. Or failures point at the node: it failed under a job, or jobs
failed to start there in a row while others of the same spec started elsewhere; that lasts a time that doubles with each
strike. The first two also drain what runs there; the third only keeps new jobs off.

Marks are derived anew every round from what is known, so a crash loses none. What an operator cleared stays cleared:
the same alert, even if it was not heard of for a while, or the same failures, do not bring it back. Operators are
obeyed; marks that machines made keep at most a share of a partition's usable nodes out, oldest alerts first, and what
exceeds it is spared and told.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum

from controlplane.core import host_lists
from controlplane.core.types import Alert, Reason, SlurmResources

RECONCILER = "reconciler"
_NODE_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?", re.ASCII)
_FEATURE = re.compile(r"[\w.-]+", re.ASCII)


class NodeCause(StrEnum):
    OPERATOR = "operator"
    ALERT = "alert"
    FAILURES = "failures"


_DRAINING = frozenset({NodeCause.OPERATOR, NodeCause.ALERT})


@dataclass(frozen=True, slots=True)
class NodeMark:
    """Why one node is kept out, by whom, since and until when. One that was cleared only remembers that it was."""

    node: str
    cause: NodeCause
    actor: str
    reason: str
    since: datetime
    until: datetime | None = None  # None: until its cause ends, or it is cleared
    strikes: int = 0  # FAILURES only
    cleared_at: datetime | None = None
    cleared_by: str | None = None

    @property
    def is_active(self) -> bool:
        return self.cleared_at is None

    @property
    def drains(self) -> bool:
        """Must what runs there leave, too?"""
        return self.is_active and self.cause in _DRAINING


@dataclass(frozen=True, slots=True)
class SlurmNode:
    """One node as slurmrestd showed it. `is_usable`: Slurm itself would start a job there."""

    name: str
    partitions: frozenset[str]
    features: frozenset[str]
    is_usable: bool


@dataclass(frozen=True, slots=True)
class NodeRun:
    """What one replica's job did on one node. `failed_there`: Slurm says that the node failed under it.

    A job on several nodes has a run on each, and all of them tell the same: nobody knows which one was at fault. Those
    that were not are let in again by a start that succeeds on them, or soon.
    """

    replica: str
    replica_set: str
    spec_hash: str
    node: str
    reason: Reason | None
    ended_at: datetime | None  # None: it lives
    first_ready_at: datetime | None
    failed_there: bool = False


@dataclass(frozen=True, slots=True)
class NodeRules:
    failed_starts: int = 3  # in a row on one node, while others start elsewhere: one strike
    first_exclusion: timedelta = timedelta(minutes=10)  # doubles with each further strike
    longest_exclusion: timedelta = timedelta(hours=6)
    memory: timedelta = timedelta(hours=24)  # older failures count no more
    most_excluded_share: float = 0.5  # of a partition's usable nodes, by marks that machines made
    one_event: timedelta = timedelta(minutes=2)  # a node that fails under many jobs at once fails once


@dataclass(frozen=True, slots=True)
class Suspicion:
    strikes: int
    since: datetime  # the newest failure
    until: datetime
    reason: str


@dataclass(frozen=True, slots=True)
class KeptOut:
    """What the marks mean for the jobs of one replica set. Only nodes that Slurm knows: it refuses a job otherwise."""

    nodes: frozenset[str] = frozenset()
    spared: tuple[NodeMark, ...] = ()  # the bound let them in
    leaves_none: bool = False


# --- names -------------------------------------------------------------------------------------------------


def is_node_name(text: str) -> bool:
    """Could Slurm have a node of this name? No list, no range, nothing that a shell or Slurm would read otherwise."""
    return _NODE_NAME.fullmatch(text) is not None


def expand(expression: str) -> frozenset[str] | None:
    """The names that Slurm's node list expression stands for, such as `n[1-3,07],gpu1`. None: it cannot be read."""
    try:
        return host_lists.expand(expression)
    except ValueError:
        return None


def first_node(expression: str) -> str:
    """Of a job's nodes, the one where its batch script runs and its replica serves. What cannot be read is returned."""
    try:
        names = host_lists.in_order(expression)
    except ValueError:
        return expression
    return names[0] if names else ""


# --- which marks there shall be ----------------------------------------------------------------------------


def due_marks(
    known: Iterable[NodeMark],
    pressing: Iterable[Alert],
    runs: Iterable[NodeRun],
    *,
    now: datetime,
    rules: NodeRules,
) -> dict[tuple[str, NodeCause], NodeMark]:
    """Every mark that there shall be now, by node and cause; those of `known` that are not among them have ended.

    `pressing`: the fresh, firing alerts whose action is `drain_node`. May be asked again at any time.
    """
    before = {(mark.node, mark.cause): mark for mark in known}
    due = {key: mark for key, mark in before.items() if key[1] is NodeCause.OPERATOR and _is_wanted(mark, now)}
    by_node: dict[str, list[Alert]] = defaultdict(list)
    for alert in pressing:
        if is_node_name(node := alert.labels.get("node", "")):
            by_node[node].append(alert)
    for node, alerts in by_node.items():
        key = (node, NodeCause.ALERT)
        due[key] = _alert_mark(node, alerts, before.get(key), now)
    for key, mark in before.items():  # an alert may go stale and be confirmed again
        if key[1] is NodeCause.ALERT and key not in due and _is_remembered(mark, now, rules):
            due[key] = mark
    cleared = {
        mark.node: mark.cleared_at
        for mark in before.values()
        if mark.cause is NodeCause.FAILURES and mark.cleared_at is not None
    }
    suspected = suspicions(runs, cleared, now=now, rules=rules)
    for node, suspicion in suspected.items():
        key = (node, NodeCause.FAILURES)
        old = before.get(key)
        since = old.since if old is not None and old.is_active else now
        due[key] = NodeMark(
            node, NodeCause.FAILURES, RECONCILER, suspicion.reason, since, suspicion.until, suspicion.strikes
        )
    for node in cleared.keys() - suspected.keys():
        key = (node, NodeCause.FAILURES)
        if _is_remembered(before[key], now, rules):
            due[key] = before[key]
    return due


def _is_wanted(mark: NodeMark, now: datetime) -> bool:
    return mark.is_active and (mark.until is None or now < mark.until)


def _is_remembered(mark: NodeMark, now: datetime, rules: NodeRules) -> bool:
    return mark.cleared_at is not None and now < mark.cleared_at + rules.memory


def _alert_mark(node: str, alerts: Sequence[Alert], old: NodeMark | None, now: datetime) -> NodeMark:
    oldest = min(alerts, key=lambda alert: (alert.starts_at, alert.key))
    if old is not None and old.cleared_at is not None:
        newer = [alert for alert in alerts if alert.starts_at > old.cleared_at]
        if not newer:
            return old
        oldest, old = min(newer, key=lambda alert: (alert.starts_at, alert.key)), None
    summary = oldest.annotations.get("summary")
    reason = f"{oldest.alertname} is firing" + (f" ({summary})" if summary else "")
    since = old.since if old is not None else now
    return NodeMark(node, NodeCause.ALERT, f"alert {oldest.key}"[:256], reason[:256], since)


def suspicions(
    runs: Iterable[NodeRun], cleared: Mapping[str, datetime], *, now: datetime, rules: NodeRules
) -> dict[str, Suspicion]:
    """The nodes at which failures point, now. What happened before a node was cleared does not count."""
    runs = tuple(runs)
    found: dict[str, Suspicion] = {}
    for node in sorted({run.node for run in runs if is_node_name(run.node)}):
        since = max(now - rules.memory, cleared.get(node, now - rules.memory))
        strikes = _node_failures(node, runs, since, rules) + _failed_starts(node, runs, since, rules)
        if not strikes:
            continue
        strikes.sort()
        newest, words = strikes[-1]
        pause = min(rules.first_exclusion * 2 ** min(len(strikes) - 1, 20), rules.longest_exclusion)
        if now < newest + pause:
            found[node] = Suspicion(len(strikes), newest, newest + pause, words)
    return found


def _node_failures(node: str, runs: Iterable[NodeRun], since: datetime, rules: NodeRules) -> list[tuple[datetime, str]]:
    ends = sorted(
        (run.ended_at, run.replica)
        for run in runs
        if run.node == node and run.failed_there and run.ended_at is not None and run.ended_at > since
    )
    strikes: list[tuple[datetime, str]] = []
    began: datetime | None = None
    for at, replica in ends:
        if began is None or at - began > rules.one_event:
            began = at
        else:
            strikes.pop()
        strikes.append((at, f"it failed under {replica}"))
    return strikes


def _failed_starts(node: str, runs: Sequence[NodeRun], since: datetime, rules: NodeRules) -> list[tuple[datetime, str]]:
    strikes: list[tuple[datetime, str]] = []
    for spec in sorted({(run.replica_set, run.spec_hash) for run in runs if run.node == node}):
        same = [run for run in runs if (run.replica_set, run.spec_hash) == spec]
        started_here = max(
            (run.first_ready_at for run in same if run.node == node and run.first_ready_at), default=since
        )
        failed = sorted(
            run.ended_at
            for run in same
            if run.node == node
            and run.first_ready_at is None
            and run.reason in (Reason.CRASHED, Reason.START_TIMEOUT)
            and run.ended_at is not None
            and run.ended_at > max(since, started_here)
        )
        if len(failed) < rules.failed_starts or not _starts_elsewhere(node, same):
            continue
        count = len(failed) - len(failed) % rules.failed_starts
        words = f"{count} starts of {spec[0]} in a row failed there, and others start elsewhere"
        strikes += [(at, words) for at in failed[rules.failed_starts - 1 :: rules.failed_starts]]
    return strikes


def _starts_elsewhere(node: str, same: Iterable[NodeRun]) -> bool:
    """Has the same spec been ready on another node, as far as is remembered? Otherwise the spec may be at fault.

    It need not be there still: where one replica is wanted, Slurm may give each successor the same broken node.
    """
    same = tuple(same)
    were_here = {run.replica for run in same if run.node == node}
    return any(run.replica not in were_here and run.first_ready_at is not None for run in same)


# --- what the marks mean for one set's jobs ------------------------------------------------------------------


def kept_out(
    marks: Iterable[NodeMark], nodes: Iterable[SlurmNode], resources: SlurmResources, *, rules: NodeRules
) -> KeptOut:
    """Which nodes the jobs of a set that asks for these resources are kept off.

    Where no partition is asked for, the cluster's default is one of those there are: then no partition may lose more
    than its share. A constraint narrows what is counted if it is a single feature.
    """
    nodes = tuple(nodes)
    partition, constraint = resources.partition, resources.constraint
    fitting = [
        node
        for node in nodes
        if (partition is None or partition in node.partitions)
        and (constraint is None or not _FEATURE.fullmatch(constraint) or constraint in node.features)
    ]
    usable = {node.name for node in fitting if node.is_usable}
    scopes = {node.name: [partition] if partition is not None else sorted(node.partitions) for node in fitting}
    in_scope: dict[str, int] = defaultdict(int)
    for name in usable:
        for scope in scopes[name]:
            in_scope[scope] += 1
    left = {scope: int(count * rules.most_excluded_share) for scope, count in in_scope.items()}
    out: set[str] = set()
    spared: list[NodeMark] = []
    for mark in sorted(marks, key=_in_order):
        if not mark.is_active or mark.node not in scopes or mark.node in out:
            continue
        takes = scopes[mark.node] if mark.node in usable else []
        if mark.cause is not NodeCause.OPERATOR and any(left[scope] <= 0 for scope in takes):
            spared.append(mark)
            continue
        for scope in takes:
            left[scope] -= 1
        out.add(mark.node)
    return KeptOut(frozenset(out), tuple(spared), bool(usable) and usable <= out)


def _in_order(mark: NodeMark) -> tuple[int, datetime, str]:
    return (list(NodeCause).index(mark.cause), mark.since, mark.node)


def clear(mark: NodeMark, *, actor: str, now: datetime) -> NodeMark:
    """The same mark, after an operator has cleared it."""
    return replace(mark, cleared_at=now, cleared_by=actor)
