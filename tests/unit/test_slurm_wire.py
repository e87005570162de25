"""The shapes of slurmrestd's JSON that no recording shows, and what is certain about every request."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.core.nodes import SlurmNode
from controlplane.core.types import JobState, SlurmJob, SlurmResources
from controlplane.slurm.errors import (
    SlurmAmbiguous,
    SlurmError,
    SlurmForbidden,
    SlurmProtocolError,
    SlurmRejected,
    SlurmUnreachable,
    foreign_text,
)
from controlplane.slurm.faults import judge
from controlplane.slurm.transport import Answer
from controlplane.slurm.wire import DIALECTS, JobRequest, read_jobs, read_nodes, write_exclusion, write_submit

OLD = DIALECTS["v0.0.38"]
NEW = DIALECTS["v0.0.42"]


def job(**fields: Any) -> SlurmJob:
    entry = {"job_id": 7, "name": "cp-a-1", "user_name": "u", "job_state": "RUNNING", **fields}
    return read_jobs(Answer(200, {"jobs": [entry]}), prefix="cp-", user_names={})[0]


@pytest.mark.parametrize(
    ("words", "state"),
    [
        ("RUNNING", JobState.RUNNING),
        ("CONFIGURING", JobState.PENDING),
        (["RUNNING", "CONFIGURING"], JobState.PENDING),
        (["TIMEOUT", "COMPLETING"], JobState.COMPLETING),
        (["COMPLETING", "PENDING"], JobState.COMPLETING),
        (["COMPLETED", "STAGE_OUT"], JobState.COMPLETING),
        (["PENDING", "REQUEUED"], JobState.PENDING),
        (["PENDING", "REQUEUE_HOLD"], JobState.PENDING),
        (["RUNNING", "STOPPED"], JobState.SUSPENDED),
        (["RUNNING", "SIGNALING"], JobState.RUNNING),
        (["FAILED", "LAUNCH_FAILED"], JobState.FAILED),
        (["OUT_OF_MEMORY"], JobState.OUT_OF_MEMORY),
        ("REVOKED", JobState.UNKNOWN),
        (["RUNNING", "A_FLAG_OF_TOMORROW"], JobState.UNKNOWN),
        (["RUNNING", "PENDING"], JobState.UNKNOWN),
        ("UNKNOWN", JobState.UNKNOWN),
        ("", JobState.UNKNOWN),
        ([], JobState.UNKNOWN),
    ],
)
def test_words_of_a_state_are_folded_and_unheard_of_ones_are_unknown(words: Any, state: JobState) -> None:
    assert job(job_state=words).state is state


@pytest.mark.parametrize(
    ("fields", "is_held"),
    [
        ({"hold": True}, True),
        ({"priority": 0}, True),
        ({"priority": {"set": True, "infinite": False, "number": 0}}, True),
        ({"priority": {"set": False, "infinite": False, "number": 0}}, False),
        ({"state_reason": "JobHeldUser"}, True),
        ({"state_reason": "JobHeldAdmin"}, True),
        ({"state_reason": "Dependency", "priority": 1, "hold": False}, False),
        ({"state_reason": "JobHeldUser", "job_state": "CANCELLED", "priority": 0}, False),
    ],
)
def test_only_a_pending_job_is_held(fields: dict[str, Any], is_held: bool) -> None:
    assert job(**{"job_state": "PENDING", **fields}).is_held is is_held


def test_numbers_beyond_32_bits_are_whole_and_slurms_no_value_is_none() -> None:
    wide = job(job_id=2**40 + 1, submit_time=2**33, end_time=0xFFFF_FFFE, start_time={"set": True, "infinite": True})
    assert wide.job_id == 2**40 + 1
    assert wide.submitted_at is not None
    assert wide.submitted_at.timestamp() == 2**33
    assert (wide.ends_at, wide.started_at) == (None, None)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text("a0-", max_size=3)
KEYS = st.sampled_from(["set", "infinite", "number", "signal", "return_code", "id"])
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=4
)
UNNEEDED = st.sampled_from(
    ["comment", "priority", "hold", "state_reason", "nodes", "start_time", "end_time", "exit_code", "restart_cnt", "x"]
)
NEEDED = st.fixed_dictionaries(
    {},
    optional={
        "job_id": ANYTHING,
        "name": st.sampled_from(["cp-a-1", ""]) | SCALARS,
        "job_state": st.lists(st.sampled_from(["RUNNING", "x"]), max_size=2) | SCALARS,
        "user_name": st.just("u") | SCALARS,
    },
)


@given(st.dictionaries(UNNEEDED, ANYTHING, max_size=4), st.sampled_from(["RUNNING", "FAILED", "PENDING"]))
def test_no_shape_of_an_unneeded_field_hides_a_job(fields: dict[str, Any], state: str) -> None:
    assert job(**fields, job_state=[state]).state == state


@given(SCALARS | st.lists(NEEDED | ANYTHING, max_size=3))
def test_a_list_of_jobs_is_read_or_refused(entries: Any) -> None:
    try:
        jobs = read_jobs(Answer(200, {"jobs": entries}), prefix="", user_names={})
    except SlurmProtocolError:
        return
    assert len(jobs) == len(entries)


@pytest.mark.parametrize(
    ("status", "numbers", "of_a_read", "of_a_change"),
    [
        (500, [1800], SlurmUnreachable, SlurmUnreachable),
        (502, [1800], SlurmUnreachable, SlurmUnreachable),
        (500, [2007], SlurmUnreachable, SlurmUnreachable),  # job table full: a no for now only
        (500, [5004], SlurmUnreachable, SlurmAmbiguous),
        (500, [5005], SlurmUnreachable, SlurmAmbiguous),
        (500, [-1], SlurmUnreachable, SlurmAmbiguous),
        (403, [1], SlurmUnreachable, SlurmAmbiguous),  # what 26.05 says to a cancel without its controller
        (500, [2090], SlurmUnreachable, SlurmAmbiguous),
        (500, [], SlurmUnreachable, SlurmAmbiguous),
        (200, [0], SlurmUnreachable, SlurmAmbiguous),
        (401, [], SlurmForbidden, SlurmForbidden),
        (511, [1007], SlurmForbidden, SlurmForbidden),
        (500, [6010], SlurmForbidden, SlurmForbidden),
        (500, [2000], SlurmRejected, SlurmRejected),
        (500, [2014], SlurmRejected, SlurmRejected),
        (400, [9001], SlurmRejected, SlurmRejected),
        (400, [], SlurmRejected, SlurmRejected),
    ],
)
def test_the_number_decides_what_the_caller_may_do_next(
    status: int, numbers: list[int], of_a_read: type[SlurmError], of_a_change: type[SlurmError]
) -> None:
    answer = Answer(status, {"errors": [{"error_number": number, "error": "why"} for number in numbers]})
    assert type(judge(answer, changes=False)) is of_a_read
    assert type(judge(answer, changes=True)) is of_a_change


@given(st.integers(1, 10**7), st.sampled_from(sorted(DIALECTS)))
def test_the_time_limit_is_never_shorter_than_asked_and_less_than_a_minute_longer(seconds: int, version: str) -> None:
    request = JobRequest("n", "c", "#!", {"A": "b"}, "/d", "/d/o", SlurmResources(time_limit_seconds=seconds))
    limit = write_submit(request, DIALECTS[version])["job"]["time_limit"]
    minutes = limit["number"] if DIALECTS[version].is_tagged else limit
    assert seconds <= minutes * 60 < seconds + 60


def test_everything_asked_for_is_written_in_both_dialects() -> None:
    resources = SlurmResources(
        3600, partition="p", account="a", qos="q", constraint="c", nodes=2, gpus_per_node=4, cpus_per_task=8,
        memory_mb_per_node=1000,
    )  # fmt: skip
    request = JobRequest("n", "c", "#!", {"A": "b=c", "E": ""}, "/d", "/d/o", resources, warning_seconds=90)
    common = {
        "name": "n", "comment": "c", "hold": True, "current_working_directory": "/d", "standard_output": "/d/o",
        "partition": "p", "account": "a", "qos": "q", "constraints": "c", "nodes": "2", "tasks": 2,
        "cpus_per_task": 8,
    }  # fmt: skip
    assert write_submit(request, OLD) == {
        "script": "#!",
        "job": {
            **common, "environment": {"A": "b=c", "E": ""}, "gpus_per_node": "4", "time_limit": 60,
            "memory_per_node": 1000,
        },
    }  # fmt: skip
    assert write_submit(request, NEW) == {
        "script": "#!",
        "job": {
            **common,
            "environment": ["A=b=c", "E="],
            "tres_per_node": "gres/gpu:4",
            "time_limit": {"set": True, "infinite": False, "number": 60},
            "memory_per_node": {"set": True, "infinite": False, "number": 1000},
            "requeue": False,
            "kill_warning_signal": "USR1",
            "kill_warning_flags": ["BATCH_JOB"],
            "kill_warning_delay": {"set": True, "infinite": False, "number": 90},
        },
    }


@pytest.mark.parametrize("dialect", [OLD, NEW], ids=lambda dialect: dialect.version)
def test_what_is_left_to_the_cluster_is_left_out(dialect: Any) -> None:
    job = write_submit(JobRequest("n", "c", "#!", {"A": "b"}, "/d", "/d/o", SlurmResources(60)), dialect)["job"]
    assert not {"partition", "account", "qos", "constraints", "cpus_per_task", "memory_per_node"} & job.keys()
    assert not {"gpus_per_node", "tres_per_node", "kill_warning_signal", "signal"} & job.keys()


@given(st.text())
def test_foreign_text_is_short_and_on_one_line(text: str) -> None:
    shown = foreign_text(text)
    assert len(shown) <= 256
    assert shown.isprintable()


def test_excluded_nodes_have_the_name_and_shape_that_each_release_takes() -> None:
    """Tried on 22.05.8 and 24.11.5. Any other is refused by the one, and dropped by the other with a remark."""
    nodes = frozenset({"n2", "n1"})
    assert write_exclusion(nodes, OLD) == {"exclude_nodes": "n1,n2"}
    assert write_exclusion(nodes, NEW) == {"excluded_nodes": ["n1", "n2"]}
    # of a list without names later releases change nothing
    assert write_exclusion(frozenset(), OLD) == {"exclude_nodes": ""}
    assert write_exclusion(frozenset(), NEW) == {"excluded_nodes": ""}


@pytest.mark.parametrize(
    ("fields", "is_usable"),
    [
        ({"state": "idle", "state_flags": []}, True),
        ({"state": "mixed", "state_flags": ["DRAIN"]}, False),
        ({"state": "down", "state_flags": ["NOT_RESPONDING"]}, False),
        ({"state": ["MIXED", "PLANNED"]}, True),
        ({"state": ["IDLE", "POWERED_DOWN"]}, True),  # Slurm wakes it for a job
        ({"state": ["IDLE", "DRAIN"]}, False),
        ({"state": ["IDLE", "NOT_RESPONDING"]}, False),
        ({"state": []}, False),
        ({}, False),
    ],
)
def test_a_node_is_usable_if_slurm_would_start_a_job_there(fields: dict[str, Any], is_usable: bool) -> None:
    entry = {"name": "n1", "partitions": ["gpu"], "active_features": "a100,ib", **fields}
    (node,) = read_nodes(Answer(200, {"nodes": [entry]}))
    assert node == SlurmNode("n1", frozenset({"gpu"}), frozenset({"a100", "ib"}), is_usable)


@given(SCALARS | st.lists(ANYTHING, max_size=3))
def test_a_list_of_nodes_is_read_or_refused(entries: Any) -> None:
    try:
        nodes = read_nodes(Answer(200, {"nodes": entries}))
    except SlurmProtocolError:
        return
    assert len(nodes) == len(entries)
