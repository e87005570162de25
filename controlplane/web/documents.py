"""The nouns as JSON, field by field: what is not named here does not leave the house, and no secret is named."""

from __future__ import annotations

from dataclasses import asdict
from datetime import date, datetime
from typing import Any

from controlplane.core.nodes import NodeMark
from controlplane.core.stories import RecordedDecision
from controlplane.core.types import Alert, Endpoint, Freeze, Replica, ReplicaSet, ReplicaSetSpec, TenantLimits
from controlplane.db.audit import Said
from controlplane.db.back_offs import RecordedBackOff
from controlplane.db.job_logs import JobLog
from controlplane.db.tenants import Tenant
from controlplane.db.usage import Report

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
        "operator_bounds": one.operator_bounds
        and {
            "min_replicas": one.operator_bounds.min_replicas,
            "max_replicas": one.operator_bounds.max_replicas,
            "until": _time(one.operator_bounds.until),
        },
        "open_schedules": list(one.scheduled.schedules),
        "pin": one.pin
        and {
            "replicas": one.pin.replicas,
            "until": _time(one.pin.until),
            "actor": one.pin.actor,
            "reason": one.pin.reason,
        },
        "freezes": [freeze_document(freeze) for freeze in one.freezes],
        "scaled_up_at": _time(one.scaled_up_at),
        "scaled_down_at": _time(one.scaled_down_at),
        "start_lead_seconds": one.start_lead_seconds,
        "spec_hash": one.spec_hash,
        "spec": spec_document(one.spec),
    }


def freeze_document(one: Freeze) -> Document:
    return {
        "is_of_all": one.is_of_all,
        "actor": one.actor,
        "reason": one.reason,
        "since": _time(one.since),
        "until": _time(one.until),
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
        "cut_requests": one.cut_requests,
        "predecessor": one.predecessor,
    }


def log_document(one: JobLog | None) -> Document | None:
    """The end of the log of a job that ended unasked; None: it was not read, or is not worth reading."""
    return None if one is None else {"read_at": _time(one.read_at), "tail": one.tail, "problem": one.problem}


def back_off_document(one: RecordedBackOff | None) -> Document | None:
    if one is None:
        return None
    return {
        "failures": one.failures,
        "since": _time(one.since),
        "next_try_at": _time(one.next_try_at),
        "replica": one.replica,
        "reason": one.reason,
        "message": one.message,
        "log_tail": one.log_tail,
    }


def node_document(one: NodeMark) -> Document:
    return {
        "node": one.node,
        "cause": one.cause,
        "is_kept_out": one.is_active,
        "is_drained": one.drains,
        "reason": one.reason,
        "actor": one.actor,
        "since": _time(one.since),
        "until": _time(one.until),
        "strikes": one.strikes,
        "cleared_at": _time(one.cleared_at),
        "cleared_by": one.cleared_by,
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
        "stale_since": _time(one.stale_since),
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


def said_document(one: Said) -> Document:
    return {"at": _time(one.at), "actor": one.actor, "kind": one.kind, "subject": one.subject, "words": one.words}


def limits_document(limits: TenantLimits) -> Document:
    """None: no limit."""
    return asdict(limits)


def tenant_document(one: Tenant) -> Document:
    return {"name": one.name, "limits": limits_document(one.limits), "month_tokens": one.month_tokens}


def usage_document(report: Report, *, by: str, first: date, tenant: str | None) -> Document:
    """Idle seconds are nobody's: with one tenant's lines they are told all the same, for comparison."""
    return {
        "month": f"{first:%Y-%m}",
        "by": by,
        "tenant": tenant,
        "lines": [asdict(line) for line in report.lines],
        "idle_gpu_seconds": report.idle_gpu_seconds,
        "gpu_seconds": report.gpu_seconds,
    }


def _time(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat()
