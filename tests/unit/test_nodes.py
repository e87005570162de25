"""Which nodes are kept out, for how long, and never too many."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.core.nodes import (
    NodeCause,
    NodeMark,
    NodeRules,
    NodeRun,
    SlurmNode,
    clear,
    due_marks,
    expand,
    first_node,
    is_node_name,
    kept_out,
    suspicions,
)
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
    Replica,
    Report,
    SlurmJob,
    SlurmResources,
    Submit,
)
from controlplane.reconcile.nodes import Nodes
from tests.unit.worlds import NOW, a_job, a_replica, a_set, a_spec, ago, an_alert

RULES = NodeRules()
OPERATOR, ALERT, FAILURES = NodeCause


def a_mark(node: str, cause: NodeCause = OPERATOR, **changes: Any) -> NodeMark:
    return replace(NodeMark(node, cause, "ann", "fan", ago(60)), **changes)


def a_node(name: str, *partitions: str, features: str = "", is_usable: bool = True) -> SlurmNode:
    return SlurmNode(name, frozenset(partitions or ("gpu",)), frozenset(features.split()), is_usable)


def a_run(node: str, reason: Reason | None = None, ended: float | None = None, **changes: Any) -> NodeRun:
    whole = NodeRun(f"cp-on-{node}", "s", "hash", node, reason, None if ended is None else ago(ended), None)
    return replace(whole, **changes)


def drain(node: str, **changes: Any) -> Alert:
    return an_alert(AlertAction.DRAIN_NODE, labels={"node": node}, **changes)


def due(
    *known: NodeMark, alerts: list[Alert] | None = None, runs: list[NodeRun] | None = None, now: datetime = NOW
) -> dict[tuple[str, NodeCause], NodeMark]:
    return due_marks(known, alerts or [], runs or [], now=now, rules=RULES)


# --- names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ("", []),
        ("n1", ["n1"]),
        ("n1,n2", ["n1", "n2"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[08-10,12],gpu1", ["gpu1", "n08", "n09", "n10", "n12"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("n[1-2]-ib", ["n1-ib", "n2-ib"]),
    ],
)
def test_node_lists_of_slurm_are_read(expression: str, names: list[str]) -> None:
    assert expand(expression) == frozenset(names)


@pytest.mark.parametrize(
    ("expression", "name"), [("", ""), ("n1", "n1"), ("n[08-10,12],gpu1", "n08"), ("n2,n1", "n2"), ("n[", "n[")]
)
def test_of_a_jobs_nodes_the_first_one_runs_its_script(expression: str, name: str) -> None:
    assert first_node(expression) == name


@pytest.mark.parametrize("expression", ["n[1-", "n]1", "n[a-b]", "n[3-1]", "n[1-99999999]", "n[]", "n[[1]]"])
def test_what_is_no_node_list_is_not_known_rather_than_empty(expression: str) -> None:
    assert expand(expression) is None


@given(st.sets(st.from_regex(r"[a-z][a-z0-9.-]{0,5}[a-z0-9]", fullmatch=True), max_size=5))
def test_a_plain_list_means_its_names(names: set[str]) -> None:
    assert expand(",".join(sorted(names))) == frozenset(names)


@pytest.mark.parametrize("text", ["n1", "gpu-a100.site", "N_7", "x"])
def test_names_of_nodes(text: str) -> None:
    assert is_node_name(text)


@pytest.mark.parametrize("text", ["", "n[1-4]", "n1,n2", "-n1", "n1 ", "ALL\n", "n" * 254, "n\u00fc"])
def test_what_is_no_name_of_one_node(text: str) -> None:
    assert not is_node_name(text)


# --- which marks there shall be -------------------------------------------------------------------------------


def test_an_alert_keeps_its_node_out_as_long_as_it_presses() -> None:
    found = due(alerts=[drain("n1", annotations={"summary": "Xid 79"})])
    mark = found["n1", ALERT]
    assert (mark.reason, mark.since, mark.until) == ("QueueGrows is firing (Xid 79)", NOW, None)
    assert mark.actor == "alert grafana/1/f"
    assert due(mark, alerts=[drain("n1", annotations={"summary": "Xid 79"})], now=NOW + timedelta(hours=1)) == found
    assert due(mark) == {}


def test_an_alert_that_names_no_node_marks_none() -> None:
    assert due(alerts=[drain("n[1-4]"), drain("")]) == {}


def test_an_operators_clearance_holds_against_the_alert_that_fires_and_not_against_a_later_one() -> None:
    firing = drain("n1", starts_at=ago(30))
    cleared = clear(due(alerts=[firing])["n1", ALERT], actor="ann", now=NOW)
    assert due(cleared, alerts=[firing]) == {("n1", ALERT): cleared}
    assert not cleared.drains
    later = drain("n1", fingerprint="g", starts_at=NOW + timedelta(seconds=5))
    again = due(cleared, alerts=[firing, later], now=NOW + timedelta(seconds=9))["n1", ALERT]
    assert again.is_active
    assert again.actor == "alert grafana/1/g"
    stale = due(cleared)
    assert stale == {("n1", ALERT): cleared}, "it may only not have been heard of"
    assert due(*stale.values(), alerts=[firing], now=NOW + timedelta(hours=1)) == stale
    assert due(*stale.values(), alerts=[later], now=NOW + timedelta(hours=1))["n1", ALERT].is_active
    assert due(cleared, now=NOW + RULES.memory) == {}


def test_an_operators_mark_stays_until_its_time() -> None:
    lasting, ending, over = a_mark("n1"), a_mark("n2", until=NOW + timedelta(1)), a_mark("n3", until=NOW)
    assert set(due(lasting, ending, over).values()) == {lasting, ending}


def test_failures_keep_a_node_out_for_a_time_that_doubles_and_has_a_bound() -> None:
    def until(*ages: float) -> timedelta | None:
        found = suspicions(
            [a_run("n1", Reason.NODE_FAIL, age, failed_there=True) for age in ages], {}, now=NOW, rules=RULES
        )
        return found["n1"].until - NOW if found else None

    assert until() is None
    assert until(10) == timedelta(seconds=590)
    assert until(10, 11, 60) == timedelta(seconds=590), "many jobs on one node that fails: one failure"
    assert until(10, 1000) == timedelta(seconds=1190)
    assert until(10, 1000, 2000) == timedelta(seconds=2390)
    assert until(*range(10, 80_000, 1000)) == timedelta(hours=6, seconds=-10)
    assert until(600) is None, "its time is over"
    assert until(90_000) is None, "a day is forgotten"


def test_starts_that_fail_on_one_node_speak_against_it_only_if_others_start_elsewhere() -> None:
    failed = [a_run("n1", Reason.CRASHED, age) for age in (30, 20, 10)]
    serves = a_run("n2", first_ready_at=ago(500))
    assert suspicions(failed, {}, now=NOW, rules=RULES) == {}, "nobody has seen this spec start at all"
    found = suspicions([*failed, serves], {}, now=NOW, rules=RULES)["n1"]
    assert (found.strikes, found.since, found.until) == (1, ago(10), ago(10) + RULES.first_exclusion)
    assert found.reason == "3 starts of s in a row failed there, and others start elsewhere"
    over = replace(serves, reason=Reason.PREEMPTED, ended_at=ago(300))
    assert "n1" in suspicions([*failed, over], {}, now=NOW, rules=RULES), "the only one, and it had been elsewhere"
    for innocent in (
        [*failed[1:], serves],  # two in a row
        [*failed, serves, a_run("n1", first_ready_at=ago(15))],  # it starts there as well
        [*failed, replace(serves, spec_hash="other")],  # another spec starts elsewhere
        [replace(one, first_ready_at=ago(100)) for one in [*failed, serves]],  # they had started
        [replace(one, reason=Reason.CANCELLED_OUTSIDE) for one in failed] + [serves],
    ):
        assert suspicions(innocent, {}, now=NOW, rules=RULES) == {}


def test_starts_on_several_nodes_speak_against_each_until_one_succeeds_there() -> None:
    def runs(replica: str, *where: str, **changes: Any) -> list[NodeRun]:
        return [a_run(node, replica=replica, **changes) for node in where]

    failed = [run for age in (30, 20, 10) for run in runs(f"cp-s-{age}", "n1", "n2", reason=Reason.CRASHED, ended=age)]
    before = runs("cp-s-1", "n1", "n2", first_ready_at=ago(500), reason=Reason.PREEMPTED, ended=400)
    assert suspicions([*failed, *before], {}, now=NOW, rules=RULES) == {}, "it has never started without them"
    elsewhere = runs("cp-s-2", "n3", "n4", first_ready_at=ago(5))
    assert set(suspicions([*failed, *elsewhere], {}, now=NOW, rules=RULES)) == {"n1", "n2"}
    beside = runs("cp-s-3", "n2", "n3", first_ready_at=ago(3))
    assert set(suspicions([*failed, *elsewhere, *beside], {}, now=NOW, rules=RULES)) == {"n1"}


def test_what_was_cleared_counts_no_more_and_what_fails_later_does() -> None:
    failure = a_run("n1", Reason.NODE_FAIL, 10, failed_there=True)
    mark = due(runs=[failure])["n1", FAILURES]
    assert mark.strikes == 1
    cleared = clear(mark, actor="ann", now=ago(5))
    assert due(cleared, runs=[failure]) == {("n1", FAILURES): cleared}
    later = replace(failure, ended_at=ago(1))
    assert due(cleared, runs=[failure, later])["n1", FAILURES].is_active
    assert due(cleared, now=NOW + RULES.memory) == {}


@given(
    st.lists(
        st.builds(
            a_run,
            st.sampled_from(["n1", "n2", "n3"]),
            st.sampled_from([Reason.NODE_FAIL, Reason.CRASHED, Reason.START_TIMEOUT, Reason.SCALED_DOWN]),
            st.integers(0, 100_000),
            failed_there=st.booleans(),
            first_ready_at=st.none() | st.integers(0, 100_000).map(ago),
        ),
        max_size=12,
    )
)
def test_marks_are_the_same_when_derived_again_and_all_of_them_end(runs: list[NodeRun]) -> None:
    once = due(runs=runs)
    assert due(*once.values(), runs=runs) == once
    assert all(mark.until is not None and NOW < mark.until <= NOW + RULES.longest_exclusion for mark in once.values())
    assert due(*once.values(), runs=runs, now=NOW + RULES.longest_exclusion) == {}


# --- and never too many ----------------------------------------------------------------------------------------

GPU = SlurmResources(time_limit_seconds=60, partition="gpu")
FOUR = [a_node(f"n{number}") for number in range(1, 5)]


def out(marks: list[NodeMark], nodes: list[SlurmNode], resources: SlurmResources = GPU) -> list[str]:
    return sorted(kept_out(marks, nodes, resources, rules=RULES).nodes)


def test_machines_keep_half_of_a_partition_out_at_most_and_alerts_come_first() -> None:
    marks = [a_mark("n1", FAILURES), a_mark("n2", ALERT), a_mark("n3", ALERT, since=ago(99)), a_mark("n4", FAILURES)]
    found = kept_out(marks, FOUR, GPU, rules=RULES)
    assert found.nodes == {"n2", "n3"}
    assert [mark.node for mark in found.spared] == ["n1", "n4"]
    assert not found.leaves_none
    assert out([a_mark("n1", ALERT)], FOUR[:1]) == [], "the last one is never taken"


def test_operators_are_obeyed_and_what_they_take_counts() -> None:
    everything = [a_mark(node.name) for node in FOUR]
    found = kept_out(everything, FOUR, GPU, rules=RULES)
    assert (len(found.nodes), found.leaves_none) == (4, True)
    assert out([a_mark("n1"), a_mark("n2"), a_mark("n3", ALERT)], FOUR) == ["n1", "n2"]


def test_what_slurm_does_not_know_or_use_takes_no_place() -> None:
    nodes = [*FOUR[:2], a_node("n3", is_usable=False), a_node("n9", "cpu")]
    marks = [a_mark("n3", FAILURES), a_mark("n1", FAILURES), a_mark("nowhere"), a_mark("n9")]
    assert out(marks, nodes) == ["n1", "n3"]
    assert out([a_mark("n1", cleared_at=NOW, cleared_by="ann", cause=ALERT)], nodes) == []


def test_without_a_partition_none_may_lose_more_than_its_share() -> None:
    nodes = [a_node("n1", "gpu", "small"), a_node("n2", "gpu"), a_node("n3", "gpu"), a_node("n4", "gpu")]
    anywhere = SlurmResources(time_limit_seconds=60)
    assert out([a_mark("n1", ALERT)], nodes, anywhere) == [], "it is all that the partition small has"
    assert out([a_mark("n1", ALERT)], nodes) == ["n1"]


def test_a_feature_narrows_what_is_counted() -> None:
    nodes = [a_node("n1", features="a100"), *FOUR[1:]]
    assert out([a_mark("n1", ALERT)], nodes, replace(GPU, constraint="a100")) == []
    assert out([a_mark("n1", ALERT)], nodes, replace(GPU, constraint="a100|h100")) == ["n1"], "it cannot be told"


NODES = st.lists(
    st.builds(
        lambda number, partitions, is_usable: a_node(f"n{number}", *partitions, is_usable=is_usable),
        st.integers(0, 9),
        st.sets(st.sampled_from(["gpu", "cpu"]), min_size=1),
        st.booleans(),
    ),
    unique_by=lambda node: node.name,
)
MARKS = st.lists(st.builds(a_mark, st.integers(0, 12).map("n{}".format), st.sampled_from([ALERT, FAILURES])))


@given(MARKS, NODES, st.sampled_from([None, "gpu", "cpu"]))
def test_whatever_machines_mark_something_can_run(
    marks: list[NodeMark], nodes: list[SlurmNode], partition: str | None
) -> None:
    found = kept_out(marks, nodes, replace(GPU, partition=partition), rules=RULES)
    assert found.nodes <= {node.name for node in nodes}, "Slurm refuses a job that names a node it does not know"
    assert not found.leaves_none
    for one in ("gpu", "cpu") if partition is None else (partition,):
        usable = {node.name for node in nodes if node.is_usable and one in node.partitions}
        assert len(usable & found.nodes) <= len(usable) / 2


# --- what a round makes of it -----------------------------------------------------------------------------------

SET = a_set(2, spec=replace(a_spec(), slurm=GPU))
SETS = {"s": SET}
RUNNING, QUEUED = a_replica(1, Phase.RUNNING), a_replica(2, Phase.QUEUED)
JOBS = {
    RUNNING.name: a_job(RUNNING, JobState.RUNNING, nodes="n1"),
    QUEUED.name: a_job(QUEUED, JobState.PENDING, excluded_nodes="n[2-3]"),
}


def seen(*marks: NodeMark, known: list[SlurmNode] | None = FOUR, before: list[SlurmNode] | None = None) -> Nodes:
    whole = Nodes(marks, None if known is None else tuple(known), None if before is None else tuple(before))
    return replace(whole, problem=None if known is not None else "refused")


def vacates(
    view: Nodes, live: list[Replica], jobs: dict[str, SlurmJob], last: dict[str, str] | None = None
) -> dict[str, datetime]:
    return view.to_vacate(SET, live, jobs, last_nodes=last or {}, now=NOW)


def test_what_runs_on_a_drained_node_leaves_it_and_on_one_that_failed_it_stays() -> None:
    live = [RUNNING, QUEUED]
    assert vacates(seen(a_mark("n1")), live, JOBS) == {RUNNING.name: ago(60)}
    assert vacates(seen(a_mark("n1", ALERT)), live, JOBS) == {RUNNING.name: ago(60)}
    assert vacates(seen(a_mark("n1", FAILURES)), live, JOBS) == {}
    assert vacates(seen(a_mark("n1", ALERT), known=FOUR[:1]), live, JOBS) == {}, "the bound spared it"
    assert vacates(seen(a_mark("n1", ALERT), known=None), live, JOBS) == {}, "nothing is known of the bound"


def test_what_is_to_leave_its_node_stays_so_while_slurm_is_not_seen_and_its_time_does_not_pass() -> None:
    live, last = [RUNNING, QUEUED], {RUNNING.name: "n1"}
    is_to_leave = {RUNNING.name: NOW}
    assert vacates(seen(a_mark("n1")), live, {}, last) == is_to_leave
    assert vacates(seen(a_mark("n1"), known=None), live, {}, last) == is_to_leave
    assert vacates(seen(a_mark("n1"), known=None), live, JOBS) == is_to_leave
    assert vacates(seen(a_mark("n1", ALERT), known=None, before=FOUR), live, JOBS) == is_to_leave
    assert vacates(seen(a_mark("n1", ALERT), known=None, before=FOUR), live, {}, last) == is_to_leave
    assert vacates(seen(a_mark("n1", ALERT), known=None, before=FOUR[:1]), live, JOBS) == {}, "the bound spared it"
    assert vacates(seen(a_mark("n1")), live, {RUNNING.name: a_job(RUNNING, JobState.PENDING)}, last) == {}, "requeued"


def test_what_runs_on_several_nodes_leaves_when_one_of_them_is_drained() -> None:
    marks = a_mark("n1"), a_mark("n3", since=ago(90)), a_mark("n4", since=ago(120))
    jobs = {RUNNING.name: a_job(RUNNING, JobState.RUNNING, nodes="n[1-3]", batch_host="n1")}
    assert vacates(seen(*marks), [RUNNING], jobs) == {RUNNING.name: ago(90)}
    assert vacates(seen(*marks), [RUNNING], {}, {RUNNING.name: "n[1-2]"}) == {RUNNING.name: NOW}
    assert vacates(seen(marks[2]), [RUNNING], jobs) == {}


def test_none_is_let_go_as_one_too_many_while_nobody_can_tell_whether_its_node_is_drained() -> None:
    excess: list[Action] = [Move(QUEUED, Phase.STOPPING, reason=Reason.SCALED_DOWN)]
    assert seen(a_mark("n1", ALERT), known=None).allowed(excess, SETS) == []
    assert seen(a_mark("n1", ALERT), known=None, before=FOUR).allowed(excess, SETS) == excess
    assert seen(a_mark("n1"), known=None).allowed(excess, SETS) == excess
    to_none = {name: replace(one, desired_replicas=0) for name, one in SETS.items()}
    assert seen(a_mark("n1", ALERT), known=None).allowed(excess, to_none) == excess


def test_what_leaves_a_drained_node_goes_on_to_while_slurm_is_not_seen() -> None:
    leaving = a_replica(1, Phase.DRAINING, reason=Reason.NODE_DRAINED)
    still = {leaving.name: leaving.phase_since}
    assert vacates(seen(a_mark("n1", ALERT), known=None), [leaving], JOBS) == still
    assert vacates(seen(a_mark("n1")), [leaving], {}) == still
    assert vacates(seen(), [leaving], {}) == still
    assert vacates(seen(), [leaving], JOBS) == {}, "the node is used again"


def test_a_waiting_job_is_told_what_is_kept_out_now() -> None:
    def told(view: Nodes) -> list[frozenset[str]]:
        found = view.exclusions(SETS, [RUNNING, QUEUED], JOBS)
        assert all(isinstance(one, Exclude) and one.replica == QUEUED for one in found)
        return [one.nodes for one in found if isinstance(one, Exclude)]

    assert told(seen(a_mark("n2"), a_mark("n3"))) == []
    assert told(seen(a_mark("n2"))) == [frozenset({"n2"})]
    assert told(seen()) == [frozenset()]
    assert told(seen(known=None)) == [frozenset()], "nothing is marked: nothing needs to be known"
    assert told(seen(a_mark("n2"), known=None)) == []


def test_nothing_is_submitted_where_a_drain_cannot_be_kept_or_nothing_is_left() -> None:
    submits: list[Action] = [Create("s"), Submit(a_replica(3, Phase.PENDING)), Report("s", "m")]
    assert seen(a_mark("n1")).allowed(submits, SETS) == submits
    assert seen(a_mark("n1", FAILURES), known=None).allowed(submits, SETS) == submits
    assert seen(a_mark("n1", ALERT), known=None).allowed(submits, SETS) == submits[2:]
    assert seen(*(a_mark(node.name) for node in FOUR)).allowed(submits, SETS) == submits[2:]


def test_marks_that_do_not_work_as_meant_are_told() -> None:
    def said(view: Nodes) -> list[str]:
        return [f"{one.subject}: {one.message}" for one in view.reports([SET]) if isinstance(one, Report)]

    assert said(seen(a_mark("n1"))) == []
    assert said(seen(a_mark("n7"))) == ["node n7: it is marked, and Slurm knows no node of that name"]
    assert said(replace(seen(), strange=("a b",))) == [
        "node a b: an alert asks to drain it, and that is no node's name"
    ]
    assert said(seen(a_mark("n1"), known=None)) == [
        "nodes: Slurm's nodes are not known, so marks cannot be kept: refused"
    ]
    assert said(seen(a_mark("n1", ALERT), known=FOUR[:1])) == [
        "nodes of s: not kept out, or too few would be left for s: n1"
    ]
    assert said(seen(a_mark("n1"), known=FOUR[:1])) == [
        "nodes of s: every node is kept out, so nothing is submitted for s"
    ]
