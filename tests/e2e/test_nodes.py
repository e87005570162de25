"""Nodes on a real Slurm: drained by alerts, failing under jobs, requeued jobs, preemption, and starts that fail.

A cluster of its own: it has partitions that preempt, and its nodes are taken away.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from controlplane.clock import utc_now
from controlplane.core.nodes import NodeCause
from controlplane.core.types import (
    Alert,
    AlertAction,
    DecisionReason,
    Phase,
    Reason,
    Replica,
    SlurmResources,
    VllmOptions,
)
from controlplane.db import (
    Duplicate,
    alerts,
    back_offs,
    decisions,
    endpoints,
    job_logs,
    nodes,
    replica_sets,
    replicas,
)
from controlplane.demo.slurm_cluster import SlurmCluster
from controlplane.slurm.wire import JobRequest
from tests.conftest import eventually
from tests.e2e.reconciling import RULES, SPEC, Reconciling, reconciling

ONE = replace(SPEC, min_replicas=1)
_PREEMPTING = (
    "PreemptType=preempt/partition_prio",
    "PreemptMode=CANCEL",
    "PartitionName=low Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=CANCEL",
    "PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=100 PreemptMode=OFF",
)


@pytest.fixture(scope="module")
def small_slurm(session_directory: Path) -> Iterator[SlurmCluster]:
    """Three nodes of two GPUs; the partition `high` preempts `low`."""
    with SlurmCluster(session_directory / "nodes", nodes=3, gpus=2, extra_conf=_PREEMPTING) as cluster:
        yield cluster


def node_of(site: Reconciling, replica: Replica) -> str:
    return site.slurm.run("squeue", "--noheader", f"--jobs={replica.slurm_job_id}", "--format=%N").strip()


async def routable(site: Reconciling) -> Replica:
    await site.until_routable(1, timeout_seconds=60)
    [replica] = await site.live()
    return replica


def drain_alert(node: str, *, is_firing: bool = True) -> Alert:
    now = utc_now()
    return Alert(
        source="alertmanager",
        org_id=0,
        fingerprint=f"drain-{node}",
        alertname="GpuXidErrors",
        is_firing=is_firing,
        starts_at=now if is_firing else now - timedelta(seconds=1),
        ends_at=None if is_firing else now,
        refreshed_at=now,
        labels={"owner": "controlplane", "action": "drain_node", "node": node},
        action=AlertAction.DRAIN_NODE,
    )


async def test_an_alert_drains_its_node_successor_first_and_jobs_stay_off_until_it_resolves(
    small_slurm: SlurmCluster, database_url: str
) -> None:
    async with reconciling(small_slurm, database_url, spec=ONE) as site:
        first = await routable(site)
        node = node_of(site, first)
        firing = drain_alert(node)
        await alerts.store(site.db, [(firing, {})], now=utc_now())

        fewest = 1
        async with asyncio.timeout(120):
            while (await replicas.load(site.db, first.name)).phase is not Phase.ENDED:
                fewest = min(fewest, len(await endpoints.load_routable(site.db)))
        assert fewest == 1, "the successor was ready before its predecessor left"
        assert (await replicas.load(site.db, first.name)).reason is Reason.NODE_DRAINED
        second = await routable(site)
        assert node_of(site, second) != node

        [mark] = await nodes.load(site.db)
        assert (mark.node, mark.cause) == (node, NodeCause.ALERT)
        job = await site.client.get_job(second.slurm_job_id or 0)
        assert job is not None
        assert job.excluded_nodes == node

        await alerts.store(site.db, [(replace(firing, is_firing=False, ends_at=utc_now()), {})], now=utc_now())
        await eventually(lambda: _no_marks(site), timeout_seconds=20)


async def _no_marks(site: Reconciling) -> bool:
    return not await nodes.load(site.db)


async def test_a_job_that_waits_is_told_of_a_node_that_is_drained_after_its_submit(
    small_slurm: SlurmCluster, database_url: str
) -> None:
    whole_node = SlurmResources(time_limit_seconds=600, gpus_per_node=2)
    async with reconciling(small_slurm, database_url, spec=replace(SPEC, slurm=whole_node, max_replicas=4)) as site:
        await site.scale(4)  # one more than there are nodes

        async def waiting() -> Replica | None:
            live = await site.live()
            by_phase = Counter(one.phase for one in live)
            if by_phase != {Phase.RUNNING: 3, Phase.QUEUED: 1}:
                return None
            return next(one for one in live if one.phase is Phase.QUEUED)

        last = await eventually(waiting, timeout_seconds=60)
        taken = {node_of(site, one) for one in await site.live() if one is not last} - {""}
        assert taken == {"n1", "n2", "n3"}
        await nodes.drain(site.db, "n2", actor="ann", now=utc_now(), reason="fan")

        async def excluded(expected: str) -> bool:
            job = await site.client.get_job(last.slurm_job_id or 0)
            return job is not None and job.excluded_nodes == expected

        await eventually(lambda: excluded("n2"), timeout_seconds=20)
        await nodes.undrain(site.db, "n2", actor="ann", now=utc_now())
        await eventually(lambda: excluded(""), timeout_seconds=20)


async def test_a_node_that_fails_is_kept_out_and_its_replica_is_replaced_elsewhere(
    small_slurm: SlurmCluster, database_url: str
) -> None:
    async with reconciling(small_slurm, database_url, spec=ONE) as site:
        first = await routable(site)
        node = node_of(site, first)
        # its slurmd says at once that it is well, so it comes back by itself
        small_slurm.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
        ended = await site.until_ended(first.name)
        assert ended.reason is Reason.NODE_FAIL
        second = await routable(site)
        assert node_of(site, second) != node
        [mark] = await nodes.load(site.db)
        assert (mark.node, mark.cause, mark.strikes) == (node, NodeCause.FAILURES, 1)
        assert mark.until is not None
        assert mark.reason == f"it failed under {first.name}"
        assert await back_offs.load(site.db) == {}, "once is an accident"
        # nobody saw the process end: its port is not given again
        replica_set = await replica_sets.load(site.db, SPEC.name)
        with pytest.raises(Duplicate):
            await replicas.create(site.db, replica_set, port=first.port, secret="x" * 32, actor="test", now=utc_now())
        assert (await eventually(lambda: log_of(site, first))).tail is not None
    await eventually(small_slurm.is_ready, timeout_seconds=30)


async def log_of(site: Reconciling, replica: Replica) -> job_logs.JobLog | None:
    return (await job_logs.load(site.db, [replica.name])).get(replica.name)


async def test_a_requeued_job_is_the_same_replica_and_has_to_prove_itself_again(
    small_slurm: SlurmCluster, database_url: str
) -> None:
    async with reconciling(small_slurm, database_url, spec=ONE) as site:
        first = await routable(site)
        job_id = str(first.slurm_job_id)
        small_slurm.run("scontrol", "update", f"jobid={job_id}", "requeue=1")
        small_slurm.run("scontrol", "requeue", job_id)

        async def is_waiting() -> bool:
            assert list(site.jobs()) == [job_id], "no second job for it"
            return (await replicas.load(site.db, first.name)).phase is Phase.QUEUED

        await eventually(is_waiting, timeout_seconds=30)
        assert not await endpoints.load_routable(site.db)
        # by itself it would wait two minutes; in the second of its end its node refuses it ("credential revoked")
        small_slurm.run("scontrol", "update", f"jobid={job_id}", "starttime=now+3")
        again = await routable(site)
        assert (again.name, again.slurm_job_id) == (first.name, first.slurm_job_id)
        steps = [step.message for step in await replicas.load_history(site.db, name=first.name)]
        assert "Slurm requeued the job" in steps
        assert list(site.jobs()) == [job_id]


async def test_a_preempted_replica_is_replaced_at_once_and_serves_when_there_is_room(
    small_slurm: SlurmCluster, database_url: str
) -> None:
    spec = replace(ONE, slurm=SlurmResources(time_limit_seconds=600, gpus_per_node=1, partition="low"))
    async with reconciling(small_slurm, database_url, spec=spec) as site:
        first = await routable(site)
        everything = SlurmResources(time_limit_seconds=600, nodes=3, cpus_per_task=16, partition="high")
        urgent = await site.client.submit(
            JobRequest(
                name="cp-urgent-1",
                comment=f"cp-urgent-1 {'0' * 32}",
                script="#!/bin/sh\nsleep 300\n",
                environment={"PATH": "/usr/bin:/bin"},
                working_directory=str(small_slurm.jobs_directory),
                standard_output="/dev/null",
                resources=everything,
            )
        )
        try:
            assert await site.client.release(urgent.job_id, name="cp-urgent-1")
            ended = await site.until_ended(first.name)
            assert ended.reason is Reason.PREEMPTED

            async def successor() -> Replica | None:
                return next((one for one in await site.live() if one.phase is Phase.QUEUED), None)

            await eventually(successor, timeout_seconds=20)
            assert await back_offs.load(site.db) == {}
        finally:
            small_slurm.run("scancel", str(urgent.job_id))
        await routable(site)


async def test_starts_that_fail_back_off_visibly_with_the_end_of_the_log_until_an_operator_says_to_try_again(
    small_slurm: SlurmCluster, database_url: str
) -> None:
    broken = replace(ONE, vllm=VllmOptions(args=("--no-such-option",), environment={"HF_TOKEN": "hush-hush"}))
    patient = replace(RULES, first_back_off=timedelta(minutes=5))
    async with reconciling(small_slurm, database_url, spec=broken, rules=patient) as site:

        async def told() -> back_offs.RecordedBackOff | None:
            pause = (await back_offs.load(site.db)).get(SPEC.name)
            return pause if pause is not None and pause.log_tail else None

        pause = await eventually(told, timeout_seconds=30)
        [failed] = await replicas.load_newest(site.db)
        assert (pause.failures, pause.replica, pause.reason) == (1, failed.name, Reason.CRASHED)
        assert pause.message is not None
        assert "exit code 2" in pause.message
        assert pause.log_tail is not None
        assert "--no-such-option" in pause.log_tail
        assert "replica: the server ended unasked, with exit code 2" in pause.log_tail
        assert failed.secret not in pause.log_tail

        async def decided() -> bool:
            return (await decisions.load_latest(site.db))[SPEC.name].reason is DecisionReason.BACKING_OFF

        await eventually(decided)
        await replica_sets.resume(site.db, SPEC.name, actor="ann", now=utc_now())

        async def is_tried_again() -> bool:
            return len(await replicas.load_newest(site.db)) == 2

        await eventually(is_tried_again, timeout_seconds=30)
        # what an operator forgave counts no more: this is the first failure again
        again = await eventually(told, timeout_seconds=30)
        assert (again.failures, again.replica != failed.name) == (1, True)


BROKEN_ON_ONE_NODE = """\
{% extends "fake-vllm.sbatch" %}
{% block server %}
if [[ $SLURMD_NODENAME == n1 ]]; then echo "no GPU is seen here" >&2; exit 3; fi
command=({{ python }} -m controlplane.demo.fake_vllm --model {{ model }} --host 127.0.0.1 --port {{ port }})
{% endblock %}
"""


async def test_a_node_on_which_nothing_starts_is_found_out_and_the_set_serves_elsewhere(
    small_slurm: SlurmCluster, database_url: str, tmp_path: Path
) -> None:
    (tmp_path / "broken-on-n1.sbatch").write_text(BROKEN_ON_ONE_NODE)
    spec = replace(ONE, template="broken-on-n1")
    quick = replace(RULES, first_back_off=timedelta(milliseconds=100))
    async with reconciling(small_slurm, database_url, spec=spec, rules=quick, templates=(tmp_path,)) as site:
        await nodes.drain(site.db, "n1", actor="ann", now=utc_now())
        first = await routable(site)
        assert node_of(site, first) != "n1"
        await nodes.undrain(site.db, "n1", actor="ann", now=utc_now())
        await site.scale(2)  # Slurm fills its first node first
        await site.until_routable(2, timeout_seconds=60)
        [mark] = [mark for mark in await nodes.load(site.db) if mark.is_active]
        assert (mark.node, mark.cause, mark.strikes) == ("n1", NodeCause.FAILURES, 1)
        ends = [one for one in await replicas.load_newest(site.db) if "exit code 3" in (one.message or "")]
        assert [one.reason for one in ends] == [Reason.CRASHED] * 3, "and then it was given another node"
        log = await eventually(lambda: log_of(site, ends[0]))
        assert log.tail is not None
        assert "no GPU is seen here" in log.tail
