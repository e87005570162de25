"""The hash of a spec changes exactly with what a running job cannot change."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from controlplane.core.specs import spec_hash
from controlplane.core.types import (
    ChooseBy,
    ExternalEndpoint,
    HandOver,
    Mode,
    ReplicaSetSpec,
    RoutingPolicy,
    ScaleDown,
    ScaleUp,
    Schedule,
    SlurmResources,
    VllmOptions,
)
from tests.unit.worlds import a_spec

NEEDS_A_NEW_JOB: dict[str, Any] = {
    "model": "another",
    "template": "another",
    "slurm": SlurmResources(time_limit_seconds=3601),
    "vllm": VllmOptions(image="one.sif", args=("--max-model-len", "8192")),
    "probe": "chat",
}
LEAVES_JOBS_ALONE: dict[str, Any] = {
    "name": "another",
    "priority": 1,
    "min_replicas": 1,
    "max_replicas": 9,
    "surge": 0,
    "endpoints": (ExternalEndpoint("http://10.0.0.7:8000"),),
    "scale_up": ScaleUp(step=2),
    "scale_down": ScaleDown(step=2),
    "hand_over": HandOver(margin_seconds=2),
    "routing": RoutingPolicy(ChooseBy.PREFIX, weight=7),
    "start_timeout_seconds": 1,
    "drain_timeout_seconds": 1,
    "unhealthy_timeout_seconds": 1,
    "mode": Mode.ADVISORY,
    "schedules": (Schedule("night", "0 22 * * *", 3600, min_replicas=0),),
}


def test_every_field_of_a_spec_is_on_one_side() -> None:
    assert NEEDS_A_NEW_JOB.keys() | LEAVES_JOBS_ALONE.keys() == {field.name for field in fields(ReplicaSetSpec)}
    assert not NEEDS_A_NEW_JOB.keys() & LEAVES_JOBS_ALONE.keys()


@pytest.mark.parametrize("field", NEEDS_A_NEW_JOB)
def test_what_a_running_job_cannot_change_changes_the_hash(field: str) -> None:
    assert spec_hash(replace(a_spec(), **{field: NEEDS_A_NEW_JOB[field]})) != spec_hash(a_spec())


@pytest.mark.parametrize("field", LEAVES_JOBS_ALONE)
def test_what_says_how_many_and_how_long_does_not_change_the_hash(field: str) -> None:
    assert spec_hash(replace(a_spec(), **{field: LEAVES_JOBS_ALONE[field]})) == spec_hash(a_spec())


def test_every_field_of_the_resources_and_of_vllm_changes_the_hash() -> None:
    slurm: dict[str, Any] = {field.name: 7 for field in fields(SlurmResources)}
    del slurm["min_time_limit_seconds"]  # says when to submit, not what
    hashes = {spec_hash(a_spec(slurm=replace(SlurmResources(3600), **{name: to}))) for name, to in slurm.items()}
    assert len(hashes - {spec_hash(a_spec())}) == len(slurm)
    patient = replace(SlurmResources(3600), min_time_limit_seconds=7)
    assert spec_hash(a_spec(slurm=patient)) == spec_hash(a_spec())
    vllm: dict[str, Any] = {
        "image": "two.sif",
        "model_path": "/models/m",
        "args": ("--x",),
        "environment": {"A": "1"},
        "load_seconds": 3,
    }
    assert vllm.keys() == {field.name for field in fields(VllmOptions)}
    hashes = {spec_hash(a_spec(vllm=replace(a_spec().vllm, **{name: to}))) for name, to in vllm.items()}
    assert len(hashes - {spec_hash(a_spec())}) == len(vllm)


def test_the_order_of_arguments_counts_and_the_order_of_variables_does_not() -> None:
    def hashed(args: tuple[str, ...], environment: dict[str, str]) -> str:
        return spec_hash(a_spec(vllm=VllmOptions(args=args, environment=environment)))

    assert hashed(("--a", "--b"), {}) != hashed(("--b", "--a"), {})
    assert hashed((), {"A": "1", "B": "2"}) == hashed((), {"B": "2", "A": "1"})


def test_a_hash_is_the_same_in_every_process() -> None:
    """It is stored: another value after an upgrade rolls every replica of every site."""
    assert spec_hash(a_spec()) == "2074931a6f0d0278"
