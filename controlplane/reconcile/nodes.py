"""What a round knows of nodes: which are marked, and what that means for each set's jobs.

Marks follow alerts, failures and operators' words; Slurm is asked for its nodes only while there are marks, and not in
every round. Without its answer nothing is known of nodes: drains go on as far as they are operators', no job is
submitted or released for a set that an operator or an alert wants kept off some node, and one that only failures speak
against is submitted unrestricted. What was known before, of nodes and of where jobs run, still says which replicas are
to leave theirs: otherwise each would count beside its successor as one too many. Jobs that wait are told of nodes that
are kept out, or let in, after they were submitted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from controlplane.core.nodes import (
    KeptOut,
    NodeCause,
    NodeMark,
    NodeRules,
    SlurmNode,
    due_marks,
    expand,
    is_node_name,
    kept_out,
)
from controlplane.core.scaling import presses
from controlplane.core.types import (
    Action,
    Alert,
    AlertAction,
    Create,
    Exclude,
    JobState,
    Move,
    Phase,
    Reason,
    Release,
    Replica,
    ReplicaSet,
    Report,
    SlurmJob,
    SlurmResources,
    Submit,
)
from controlplane.db import Database, nodes
from controlplane.reconcile.actions import ACTOR
from controlplane.slurm.client import SlurmClient
from controlplane.slurm.errors import SlurmError

_ALERT = NodeCause.ALERT
_NODES_GOOD_FOR = timedelta(seconds=30)


@dataclass(frozen=True, slots=True)
class Nodes:
    """One round's view. `known` is None while Slurm's nodes are not known, and nothing is marked or Slurm is away."""

    marks: tuple[NodeMark, ...] = ()
    known: tuple[SlurmNode, ...] | None = None
    last_known: tuple[SlurmNode, ...] | None = None  # earlier, by this process; good enough for what runs already
    rules: NodeRules = field(default_factory=NodeRules)
    problem: str | None = None  # why they are not known
    changes: tuple[str, ...] = ()  # in words, for the round's sentence
    strange: tuple[str, ...] = ()  # labels of alerts that are no node's name
    _found: dict[SlurmResources, KeptOut] = field(default_factory=dict, compare=False, repr=False)

    def kept_out(self, replica_set: ReplicaSet) -> KeptOut | None:
        """What jobs of this set are kept off. None: not known, and it matters."""
        resources = replica_set.spec.slurm
        if resources is None or not self.marks:
            return KeptOut()
        if self.known is None:
            return None if any(mark.drains for mark in self.marks) else KeptOut()
        return self._find(resources, self.known)

    def _find(self, resources: SlurmResources, known: tuple[SlurmNode, ...]) -> KeptOut:
        if resources not in self._found:  # a cluster may have thousands of nodes
            self._found[resources] = kept_out(self.marks, known, resources, rules=self.rules)
        return self._found[resources]

    def _last_kept_out(self, replica_set: ReplicaSet) -> KeptOut | None:
        """As far as is known, now or from before. None: nobody can tell if an alert's drain is in force."""
        resources, known = replica_set.spec.slurm, self.known if self.known is not None else self.last_known
        if resources is None or known is None:
            is_unknown = resources is not None and any(mark.drains and mark.cause is _ALERT for mark in self.marks)
            return None if is_unknown else KeptOut()
        return self._find(resources, known)

    def to_vacate(
        self,
        replica_set: ReplicaSet,
        replicas: Iterable[Replica],
        jobs: Mapping[str, SlurmJob],
        *,
        last_nodes: Mapping[str, str],
        now: datetime,
    ) -> dict[str, datetime]:
        """Which replicas run on a node that is drained, if only on one of several; by name, and since when it is.

        `last_nodes`: where those ran of which no job is seen now. They are to leave as before, but their time to wait
        for a successor does not pass meanwhile: none can start. What leaves already goes on to as long as it is not
        known that it need not.
        """
        out = self._last_kept_out(replica_set)
        is_known = self.kept_out(replica_set) is not None
        since: dict[str, datetime] = {}
        for mark in self.marks:
            is_in_force = mark.cause is NodeCause.OPERATOR or (out is not None and mark.node in out.nodes)
            if mark.drains and is_in_force:
                since[mark.node] = min(mark.since, since.get(mark.node, mark.since))
        found: dict[str, datetime] = {}
        for one in replicas:
            job = jobs.get(one.name)
            where = last_nodes.get(one.name, "") if job is None else job.nodes or job.batch_host
            drained = [since[node] for node in expand(where) or () if node in since]
            if drained:
                found[one.name] = now if job is None or not is_known else min(drained)
            elif one.reason is Reason.NODE_DRAINED and (job is None or not is_known):
                found[one.name] = one.phase_since
        return found

    def allowed(self, actions: Iterable[Action], sets: Mapping[str, ReplicaSet]) -> list[Action]:
        """The actions, without submits and releases that could land on a node to be left alone, or nowhere at all.

        Where nobody can tell whether an alert's drain is in force, none is let go as one too many either.
        """
        out = {name: self.kept_out(one) for name, one in sets.items()}
        unknown = {name for name, one in out.items() if one is None}
        withheld = unknown | {name for name, one in out.items() if one is not None and one.leaves_none and self.marks}
        uncounted = {one.name for one in sets.values() if one.desired_replicas and self._last_kept_out(one) is None}
        return [
            action
            for action in actions
            if not (isinstance(action, Move) and _is_excess(action) and action.replica.replica_set in uncounted)
            and not (isinstance(action, Create) and action.replica_set in withheld)
            and not (isinstance(action, Submit) and action.replica.replica_set in withheld)
            and not (isinstance(action, Release) and action.replica.replica_set in unknown)
        ]

    def exclusions(
        self, sets: Mapping[str, ReplicaSet], replicas: Iterable[Replica], jobs: Mapping[str, SlurmJob]
    ) -> list[Action]:
        """What jobs that wait have to be told, because nodes were kept out or let in since."""
        actions: list[Action] = []
        for replica in replicas:
            job, replica_set = jobs.get(replica.name), sets.get(replica.replica_set)
            if replica.phase is not Phase.QUEUED or job is None or job.state is not JobState.PENDING:
                continue
            told = expand(job.excluded_nodes)
            if replica_set is None or told is None or (self.known is None and self.marks):
                continue
            out = self.kept_out(replica_set)
            if out is not None and out.nodes != told:
                actions.append(Exclude(replica, out.nodes))
        return actions

    def reports(self, sets: Iterable[ReplicaSet]) -> list[Action]:
        """What an operator should know about marks that do not work as they were meant."""
        reports: list[Action] = [
            Report(f"node {node}", "an alert asks to drain it, and that is no node's name") for node in self.strange
        ]
        if self.known is None:
            if self.problem is not None:
                reports.append(Report("nodes", f"Slurm's nodes are not known, so marks cannot be kept: {self.problem}"))
            return reports
        names = {node.name for node in self.known}
        reports += [
            Report(f"node {mark.node}", "it is marked, and Slurm knows no node of that name")
            for mark in self.marks
            if mark.node not in names
        ]
        for one in sets:
            out = self.kept_out(one)
            if out is not None and out.spared:
                spared = ", ".join(sorted({mark.node for mark in out.spared}))
                reports.append(
                    Report(f"nodes of {one.name}", f"not kept out, or too few would be left for {one.name}: {spared}")
                )
            if out is not None and out.leaves_none:
                reports.append(
                    Report(f"nodes of {one.name}", f"every node is kept out, so nothing is submitted for {one.name}")
                )
        return reports


def _is_excess(step: Move) -> bool:
    return step.reason is Reason.SCALED_DOWN and step.replica.exists


class NodeKeeper:
    """Keeps the marks as they are due. Safe to run from several processes."""

    def __init__(self, db: Database, slurm: SlurmClient, rules: NodeRules, stale_after: timedelta) -> None:
        self._db = db
        self._slurm = slurm
        self._rules = rules
        self._stale_after = stale_after
        self._known: tuple[tuple[SlurmNode, ...], datetime] | None = None

    async def look(self, alerts: Iterable[Alert], now: datetime, *, may_ask: bool) -> Nodes:
        """Bring the marks up to date and read what Slurm says of its nodes, if that matters.

        `may_ask` is False while Slurm gives no usable answer: it would only be waited for a second time.
        """
        pressing = [
            alert
            for alert in alerts
            if alert.action is AlertAction.DRAIN_NODE and presses(alert, now=now, stale_after=self._stale_after)
        ]
        strange = {node for alert in pressing if not is_node_name(node := alert.labels.get("node", ""))}
        runs = await nodes.load_runs(self._db, now - self._rules.memory)
        changes = await nodes.follow(
            self._db,
            lambda known: due_marks(known, pressing, runs, now=now, rules=self._rules),
            actor=ACTOR,
            now=now,
        )
        marks = tuple(mark for mark in await nodes.load(self._db) if mark.is_active)
        known, problem = await self._nodes(now) if marks and may_ask else (None, None)
        last_known = None if self._known is None else self._known[0]
        return Nodes(marks, known, last_known, self._rules, problem, tuple(changes), tuple(sorted(strange)))

    async def _nodes(self, now: datetime) -> tuple[tuple[SlurmNode, ...] | None, str | None]:
        if self._known is not None and now - self._known[1] < _NODES_GOOD_FOR:
            return self._known[0], None
        try:
            found = await self._slurm.list_nodes()
        except SlurmError as error:
            return None, f"{type(error).__name__}: {error}"
        self._known = (found, now)
        return found, None
