"""The nouns as JSON, field by field: what is not named here does not leave the house, and no secret is named."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import Any

from controlplane.core.types import Alert, Endpoint, Replica, ReplicaSet, ReplicaSetSpec
from controlplane.db.decisions import RecordedDecision

Document = dict[str, Any]


def spec_document(spec: ReplicaSetSpec) -> Document:
    """As in the file, without the values of environment variables and the keys of endpoints, which may be secret.

    Only the variables' names are shown, under another key: to apply this document as it is fails, instead of
    taking the values away.
    """
    document = asdict(spec)
    del document["vllm"]["environment"]
    if spec.vllm.environment:
        document["vllm"]["environment_names"] = sorted(spec.vllm.environment)
    document["endpoints"] = [{"url": endpoint.url} for endpoint in spec.endpoints]
    return document


def replica_set_document(one: ReplicaSet) -> Document:
    return {
        "name": one.name,
        "model": one.spec.model,
        "desired_replicas": one.desired_replicas,
        "min_replicas": one.min_replicas,
        "max_replicas": one.max_replicas,
        "is_paused": one.is_paused,
        "paused_reason": one.paused_reason,
        "paused_until": _time(one.paused_until),
        "scaled_up_at": _time(one.scaled_up_at),
        "scaled_down_at": _time(one.scaled_down_at),
        "start_lead_seconds": one.start_lead_seconds,
        "spec_hash": one.spec_hash,
        "spec": spec_document(one.spec),
    }


def replica_document(one: Replica) -> Document:
    return {
        "name": one.name,
        "replica_set": one.replica_set,
        "phase": one.phase,
        "reason": one.reason,
        "message": one.message,
        "version": one.version,
        "spec_hash": one.spec_hash,
        "slurm_job_id": one.slurm_job_id,
        "port": one.port,
        "created_at": _time(one.created_at),
        "phase_since": _time(one.phase_since),
        "submitted_at": _time(one.submitted_at),
        "running_since": _time(one.running_since),
        "drain_deadline": _time(one.drain_deadline),
        "predecessor": one.predecessor,
    }


def endpoint_document(one: Endpoint, *, is_routable: bool) -> Document:
    return {
        "url": one.url,
        "model": one.model,
        "replica_set": one.replica_set,
        "replica": one.replica,
        "is_routable": is_routable,
        "health": one.health,
        "passes": one.passes,
        "fails": one.fails,
        "first_ready_at": _time(one.first_ready_at),
        "failing_since": _time(one.failing_since),
        "confirmed_at": _time(one.confirmed_at),
        "running": one.running,
        "waiting": one.waiting,
        "message": one.message,
    }


def alert_document(one: Alert) -> Document:
    return {
        "source": one.source,
        "org_id": one.org_id,
        "fingerprint": one.fingerprint,
        "alertname": one.alertname,
        "status": "firing" if one.is_firing else "resolved",
        "starts_at": _time(one.starts_at),
        "ends_at": _time(one.ends_at),
        "refreshed_at": _time(one.refreshed_at),
        "action": one.action,
        "step": one.step,
        "ignored_reason": one.ignored_reason,
        "labels": dict(one.labels),
        "annotations": dict(one.annotations),
        "values": dict(one.values),
    }


def decision_document(one: RecordedDecision) -> Document:
    return {
        "id": one.id,
        "at": _time(one.at),
        "replica_set": one.replica_set,
        "reason": one.reason,
        "previous": one.previous,
        "desired": one.desired,
        "explanation": one.explanation,
        "alerts": list(one.alerts),
        "actor": one.actor,
    }


def _time(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat()
