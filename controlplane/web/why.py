"""`why` as JSON: the stories field by field, each with its sentences and its timeline. No secret is named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime

from controlplane.core.explaining import is_so_because, made_because, pending, stays_because, timeline, wanted_because
from controlplane.core.stories import AlertThen, RecordedDecision, ReplicaStory, SetStory
from controlplane.core.times import parse_moment
from controlplane.db import Database, why
from controlplane.web.documents import Document, decision_document
from controlplane.web.errors import Refused


class Whys:
    """The answers to `GET .../why?at=`. They raise Refused and NotFound."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def of_set(self, name: str, parameters: Mapping[str, str], now: datetime) -> Document:
        return set_story_document(await why.of_set(self._db, name, at=_at(parameters, now), now=now))

    async def of_replica(self, name: str, parameters: Mapping[str, str], now: datetime) -> Document:
        return replica_story_document(await why.of_replica(self._db, name, at=_at(parameters, now), now=now))

    async def of_job(self, text: str, parameters: Mapping[str, str], now: datetime) -> Document:
        if not (text.isascii() and text.isdecimal()):
            raise Refused(400, "id: a Slurm job's id is a number", field="id")
        stories = await why.of_job(self._db, int(text[:20]), at=_at(parameters, now), now=now)
        return {"replicas": [replica_story_document(one) for one in stories]}


def _at(parameters: Mapping[str, str], now: datetime) -> datetime | None:
    if (text := parameters.get("at")) is None:
        return None
    try:
        return parse_moment(text, now)
    except ValueError as error:
        raise Refused(400, f"at: {error}", field="at") from None


def set_story_document(story: SetStory) -> Document:
    low, high = story.bounds or (None, None)
    return {
        "name": story.name,
        "model": story.model,
        "at": story.at.isoformat(),
        "desired_replicas": story.decision.desired if story.decision is not None else None,
        "min_replicas": low,
        "max_replicas": high,
        "is_paused": story.is_paused,
        "wanted_because": wanted_because(story),
        "stays_because": stays_because(story),
        "decision": _decision(story.decision),
        "changed": _decision(story.changed),
        "refused": [_decision(one) for one in story.refused],
        "alerts": [{**_alert(one), "pressed": story.pressed(one)} for one in story.alerts],
        "replicas": [replica_story_document(one) for one in story.replicas],
        "endpoints": [_timed(asdict(one)) for one in story.endpoints],
        "ended": [replica_story_document(one) for one in story.ended],
    }


def replica_story_document(story: ReplicaStory) -> Document:
    waits, job = pending(story), story.job
    return {
        "name": story.name,
        "replica_set": story.replica_set,
        "at": story.at.isoformat(),
        "phase": story.newest.to_phase,
        "phase_since": story.newest.at.isoformat(),
        "reason": story.newest.reason,
        "slurm_job_id": story.slurm_job_id,
        "slurm_job_state": job.raw_state if job is not None else None,
        "nodes": job.nodes if job is not None else None,
        "endpoint_health": story.health[-1].health if story.health else None,
        "made_because": made_because(story),
        "is_so_because": is_so_because(story),
        "pending": {**asdict(waits), "since": waits.since.isoformat()} if waits is not None else None,
        "decision": _decision(story.decision),
        "refused": [_decision(one) for one in story.refused],
        "replaces": story.replaces,
        "replaced_by": story.replaced_by,
        "named_by": [_alert(one) for one in story.named_by],
        "steps": [_timed(asdict(one)) for one in story.steps],
        "slurm_jobs": [_timed(asdict(one)) for one in story.jobs],
        "endpoint": [_timed(asdict(one)) for one in story.health],
        "timeline": [_timed(asdict(one)) for one in timeline(story)],
    }


def _decision(one: RecordedDecision | None) -> Document | None:
    if one is None:
        return None
    return {**decision_document(one), "refused": one.is_refusal, "evidence": [_alert(alert) for alert in one.evidence]}


def _alert(one: AlertThen) -> Document:
    return {
        "key": one.key,
        "alertname": one.alertname,
        "action": one.action,
        "starts_at": one.starts_at.isoformat(),
        "summary": one.summary,
        "labels": dict(one.labels),
        "values": dict(one.values),
        "rule_uid": one.rule_uid,
        "generator_url": one.generator_url,
        "ignored_reason": one.ignored_reason,
    }


def _timed(document: Document) -> Document:
    return {**document, "at": document["at"].isoformat()}
