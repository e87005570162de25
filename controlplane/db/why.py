"""Stories read back: why a replica set, a replica or a Slurm job is as it is, now or at an earlier moment.

A moment is told of with what had been written by then, and nothing younger. `at` is None for now.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, LiteralString

from psycopg.rows import DictRow

from controlplane.core.stories import (
    AlertThen,
    HealthStep,
    JobStep,
    RecordedDecision,
    ReplicaStory,
    SetStory,
)
from controlplane.core.types import JobState, Reason
from controlplane.db.causes import ALERT, DELIVERY, alert_then
from controlplane.db.decisions import COLUMNS, recorded
from controlplane.db.errors import NotFound
from controlplane.db.pool import Connection, Database
from controlplane.db.replicas import read_step

_REFUSALS_TOLD = 5
_ENDED_TOLD = 3
_LARGEST_JOB_ID = 2**63 - 1

_EPISODES = """
    SELECT a.source, a.org_id, a.fingerprint, a.alertname, a.action, a.starts_at, a.annotations, a.labels, a.values,
           a.ignored_reason, coalesce(told.first_received_at, a.starts_at) AS known_from,
           CASE WHEN a.status = 'resolved' THEN coalesce(ended.first_received_at, a.ends_at) END AS known_until
      FROM alerts a
      LEFT JOIN alert_deliveries told
        ON (told.source, told.org_id, told.fingerprint, told.starts_at, told.status)
         = (a.source, a.org_id, a.fingerprint, a.starts_at, 'firing')
      LEFT JOIN alert_deliveries ended
        ON (ended.source, ended.org_id, ended.fingerprint, ended.starts_at, ended.status)
         = (a.source, a.org_id, a.fingerprint, a.starts_at, 'resolved')
    UNION ALL
    SELECT f.source, f.org_id, f.fingerprint, coalesce(f.payload->'labels'->>'alertname', ''),
           f.payload->'labels'->>'action', f.starts_at, coalesce(nullif(f.payload->'annotations', 'null'), '{}'),
           coalesce(nullif(f.payload->'labels', 'null'), '{}'), '{}', NULL,
           f.first_received_at, least(ended.first_received_at, a.starts_at)
      FROM alert_deliveries f
      JOIN alerts a ON (a.source, a.org_id, a.fingerprint) = (f.source, f.org_id, f.fingerprint)
                   AND f.starts_at < a.starts_at
      LEFT JOIN alert_deliveries ended
        ON (ended.source, ended.org_id, ended.fingerprint, ended.starts_at, ended.status)
         = (f.source, f.org_id, f.fingerprint, f.starts_at, 'resolved')
     WHERE f.status = 'firing'"""
"""Every time that an alert fired: the newest from its level, earlier ones from the deliveries that told of them."""


async def of(db: Database, subject: str, *, at: datetime | None, now: datetime) -> SetStory | tuple[ReplicaStory, ...]:
    """The story of what bears this name: a replica set, else a replica, else a Slurm job's id. Raises NotFound."""
    async with db.connection() as connection:
        cursor = await connection.execute(
            "SELECT EXISTS (SELECT FROM replica_sets WHERE name = %(name)s) AS is_set, "
            "EXISTS (SELECT FROM replicas WHERE name = %(name)s) AS is_replica",
            {"name": subject},
        )
        found = await cursor.fetchone()
    assert found is not None
    if found["is_set"]:
        return await of_set(db, subject, at=at, now=now)
    if found["is_replica"]:
        return (await of_replica(db, subject, at=at, now=now),)
    if not (subject.isascii() and subject.isdecimal()):
        raise NotFound(f"there is no replica set and no replica {subject[:64]!r}, and a Slurm job's id is a number")
    return await of_job(db, int(subject[:20]), at=at, now=now)


async def of_set(db: Database, name: str, *, at: datetime | None, now: datetime) -> SetStory:
    """Raises NotFound, also when the set was not there yet."""
    async with db.connection() as connection:
        cursor = await connection.execute(
            "SELECT model, min_replicas, max_replicas, is_paused, created_at FROM replica_sets WHERE name = %s", (name,)
        )
        row = await cursor.fetchone()
        if row is None:
            raise NotFound(f"there is no replica set {name!r}")
        if at is not None and at < row["created_at"]:
            raise NotFound(f"at: the replica set {name} was made at {row['created_at'].isoformat()}, after that")
        decision = await _newest_decision(connection, name, at)
        changed = await _newest_decision(connection, name, at, "AND desired <> previous")
        cursor = await connection.execute(
            f"SELECT {_REPLICA} FROM replicas WHERE replica_set = %(set)s AND created_at <= {_AT} "
            f"AND (ended_at IS NULL OR ended_at > {_AT}) ORDER BY id",
            {"set": name, "at": at},
        )
        live = await cursor.fetchall()
        cursor = await connection.execute(
            f"SELECT {_REPLICA} FROM replicas WHERE replica_set = %(set)s AND ended_at <= {_AT} "
            "ORDER BY ended_at DESC, id DESC LIMIT %(limit)s",
            {"set": name, "at": at, "limit": _ENDED_TOLD},
        )
        ended = await cursor.fetchall()
        return SetStory(
            name=name,
            model=row["model"],
            at=at or now,
            is_now=at is None,
            bounds=(row["min_replicas"], row["max_replicas"]) if at is None else None,
            is_paused=row["is_paused"] if at is None else None,
            decision=decision,
            changed=changed,
            refused=await _refusals(connection, name, after=changed, before=None, at=at),
            alerts=await _alerts(connection, name, row["model"], at),
            replicas=await _stories(connection, live, at, now),
            endpoints=await _fixed_endpoints(connection, name, at),
            ended=await _stories(connection, ended, at, now),
        )


async def of_replica(db: Database, name: str, *, at: datetime | None, now: datetime) -> ReplicaStory:
    """Raises NotFound, also when the replica was not there yet."""
    async with db.connection() as connection:
        cursor = await connection.execute(f"SELECT {_REPLICA} FROM replicas WHERE name = %s", (name,))
        row = await cursor.fetchone()
        if row is None:
            raise NotFound(f"there is no replica {name!r}")
        if at is not None and at < row["created_at"]:
            raise NotFound(f"at: the replica {name} was made at {row['created_at'].isoformat()}, after that")
        [story] = await _stories(connection, [row], at, now)
    return story


async def of_job(db: Database, job_id: int, *, at: datetime | None, now: datetime) -> tuple[ReplicaStory, ...]:
    """Every replica that has had this job id, newest first: Slurm gives ids again. Raises NotFound."""
    async with db.connection() as connection:
        cursor = await connection.execute(
            f"SELECT {_REPLICA} FROM replicas WHERE created_at <= {_AT} AND id IN ("
            "SELECT replica_id FROM replica_history WHERE slurm_job_id = %(job)s "
            "UNION SELECT replica_id FROM slurm_jobs WHERE job_id = %(job)s) ORDER BY id DESC",
            {"job": min(job_id, _LARGEST_JOB_ID), "at": at},
        )
        rows = await cursor.fetchall()
        if not rows:
            raise NotFound(f"no replica that is remembered had the Slurm job {job_id}" + (" by then" if at else ""))
        return await _stories(connection, rows, at, now)


async def forget(db: Database, *, older_than: timedelta, now: datetime) -> int:
    """Delete what goes with no replica: what probes found so long ago, and the audit; returns how many rows went.

    What an endpoint still was at that time stays, for it is told of every moment since, until it changes.
    """
    async with db.transaction() as connection:
        before = now - older_than
        cursor = await connection.execute(
            "DELETE FROM endpoint_history old WHERE at < %(before)s AND EXISTS (SELECT FROM endpoint_history newer "
            "WHERE newer.endpoint_id = old.endpoint_id AND newer.id > old.id AND newer.at < %(before)s)",
            {"before": before},
        )
        return cursor.rowcount + (await connection.execute("DELETE FROM audit WHERE at < %s", (before,))).rowcount


_REPLICA = "id, name, replica_set, created_at, decision_id, replaces"
_AT = "coalesce(%(at)s::timestamptz, 'infinity')"


async def _stories(
    connection: Connection, rows: Iterable[DictRow], at: datetime | None, now: datetime
) -> tuple[ReplicaStory, ...]:
    """The stories of these replicas, in their order."""
    rows = list(rows)
    given = {"ids": [row["id"] for row in rows], "names": [row["name"] for row in rows], "at": at}
    steps = await _by_replica(
        connection,
        "SELECT h.replica_id, r.name AS replica, h.at, h.from_phase, h.to_phase, h.reason, h.message, h.slurm_job_id, "
        "h.actor FROM replica_history h JOIN replicas r ON r.id = h.replica_id "
        f"WHERE h.replica_id = ANY (%(ids)s) AND h.at <= {_AT} ORDER BY h.replica_id, h.version",
        given,
    )
    jobs = await _by_replica(
        connection,
        "SELECT replica_id, at, job_id, state, raw_state, state_reason, is_held, nodes, restart_count "
        f"FROM slurm_job_history WHERE replica_id = ANY (%(ids)s) AND at <= {_AT} ORDER BY id",
        given,
    )
    health = await _by_replica(
        connection,
        "SELECT e.replica_id, h.at, h.health, h.url, h.message FROM endpoint_history h "
        f"JOIN endpoints e ON e.id = h.endpoint_id WHERE e.replica_id = ANY (%(ids)s) AND h.at <= {_AT} ORDER BY h.id",
        given,
    )
    cursor = await connection.execute(
        f"SELECT replaces, name FROM replicas WHERE replaces = ANY (%(names)s) AND created_at <= {_AT}", given
    )
    takers = {row["replaces"]: row["name"] for row in await cursor.fetchall()}
    named_by = await _named_by(connection, given)
    left = await _why_they_left(connection, [row["replaces"] for row in rows if row["replaces"] is not None], at)
    origins = await _origins(connection, {row["decision_id"] for row in rows} - {None})
    stories = []
    for row in rows:
        decision, refused = origins.get(row["decision_id"], (None, ()))
        stories.append(
            ReplicaStory(
                name=row["name"],
                replica_set=row["replica_set"],
                at=at or now,
                steps=tuple(read_step(one) for one in steps[row["id"]]),
                decision=decision,
                refused=refused,
                replaces=row["replaces"],
                replaced_left=left.get(row["replaces"]),
                replaced_by=takers.get(row["name"]),
                named_by=tuple(named_by[row["name"]]),
                jobs=tuple(JobStep(**{**one, "state": JobState(one["state"])}) for one in jobs[row["id"]]),
                health=tuple(HealthStep(**one) for one in health[row["id"]]),
            )
        )
    return tuple(stories)


async def _fixed_endpoints(connection: Connection, name: str, at: datetime | None) -> tuple[HealthStep, ...]:
    cursor = await connection.execute(
        "SELECT DISTINCT ON (e.id) h.at, h.health, h.url, h.message "
        "FROM endpoints e JOIN endpoint_history h ON h.endpoint_id = e.id "
        f"WHERE e.replica_set = %(set)s AND e.replica_id IS NULL AND h.at <= {_AT} ORDER BY e.id, h.id DESC",
        {"set": name, "at": at},
    )
    return tuple(HealthStep(**row) for row in await cursor.fetchall())


async def _by_replica(
    connection: Connection, query: LiteralString, given: Mapping[str, Any]
) -> defaultdict[int, list[dict[str, Any]]]:
    found: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in await (await connection.execute(query, given)).fetchall():
        found[row.pop("replica_id")].append(row)
    return found


async def _named_by(connection: Connection, given: Mapping[str, Any]) -> defaultdict[str, list[AlertThen]]:
    """Every time that an alert asked to replace one of the replicas, by the replica's name."""
    cursor = await connection.execute(
        f"""
        SELECT a.labels->>'replica' AS replica, {ALERT} AS alert FROM ({_EPISODES}) a {DELIVERY}
         WHERE a.action = 'replace' AND a.labels->>'replica' = ANY (%(names)s) AND a.known_from <= {_AT}
         ORDER BY a.starts_at, a.fingerprint
        """,
        given,
    )
    found: defaultdict[str, list[AlertThen]] = defaultdict(list)
    for row in await cursor.fetchall():
        found[row["replica"]].append(alert_then(row["alert"]))
    return found


async def _why_they_left(connection: Connection, names: list[str], at: datetime | None) -> dict[str, Reason]:
    """Of those that had left by then."""
    cursor = await connection.execute(
        "SELECT DISTINCT ON (r.name) r.name, h.reason FROM replicas r JOIN replica_history h ON h.replica_id = r.id "
        f"WHERE r.name = ANY (%(names)s) AND h.at <= {_AT} ORDER BY r.name, h.version DESC",
        {"names": names, "at": at},
    )
    return {row["name"]: Reason(row["reason"]) for row in await cursor.fetchall() if row["reason"] is not None}


async def _origins(
    connection: Connection, ids: Iterable[int]
) -> dict[int, tuple[RecordedDecision, tuple[RecordedDecision, ...]]]:
    """The decisions, each with what had been refused since the count was changed before."""
    cursor = await connection.execute(f"SELECT {COLUMNS} FROM decisions WHERE id = ANY (%s)", (list(ids),))
    origins = {}
    for row in await cursor.fetchall():
        decision = recorded(row)
        cursor = await connection.execute(
            f"SELECT {COLUMNS} FROM decisions WHERE replica_set = %s AND id < %s AND desired <> previous "
            "ORDER BY id DESC LIMIT 1",
            (decision.replica_set, decision.id),
        )
        earlier = await cursor.fetchone()
        refused = await _refusals(
            connection, decision.replica_set, after=recorded(earlier) if earlier else None, before=decision, at=None
        )
        origins[decision.id] = (decision, refused)
    return origins


async def _newest_decision(
    connection: Connection, name: str, at: datetime | None, further: LiteralString = ""
) -> RecordedDecision | None:
    cursor = await connection.execute(
        f"SELECT {COLUMNS} FROM decisions WHERE replica_set = %(set)s AND at <= {_AT} {further} "
        "ORDER BY id DESC LIMIT 1",
        {"set": name, "at": at},
    )
    row = await cursor.fetchone()
    return recorded(row) if row is not None else None


async def _refusals(
    connection: Connection,
    name: str,
    *,
    after: RecordedDecision | None,
    before: RecordedDecision | None,
    at: datetime | None,
) -> tuple[RecordedDecision, ...]:
    """The newest decisions between the two that did not follow the alerts that pressed; oldest first."""
    cursor = await connection.execute(
        f"SELECT {COLUMNS} FROM decisions WHERE replica_set = %(set)s AND at <= {_AT} AND id > %(after)s "
        "AND (%(before)s::bigint IS NULL OR id < %(before)s) AND desired = previous AND alerts <> '{}' "
        "ORDER BY id DESC LIMIT %(limit)s",
        {
            "set": name,
            "at": at,
            "after": after.id if after else 0,
            "before": before.id if before else None,
            "limit": _REFUSALS_TOLD,
        },
    )
    return tuple(recorded(row) for row in reversed(await cursor.fetchall()))


async def _alerts(connection: Connection, name: str, model: str, at: datetime | None) -> tuple[AlertThen, ...]:
    """What fired then and names the set, its model or one of its replicas; oldest first."""
    cursor = await connection.execute(
        f"""
        SELECT DISTINCT ON (a.source, a.org_id, a.fingerprint) {ALERT} AS alert
          FROM ({_EPISODES}) a {DELIVERY}
         WHERE a.known_from <= {_AT} AND (a.known_until IS NULL OR a.known_until > {_AT})
           AND CASE WHEN coalesce(a.labels->>'replica_set', '') <> '' THEN a.labels->>'replica_set' = %(set)s
                    ELSE a.labels->>'model' = %(model)s
                         OR regexp_replace(a.labels->>'replica', '-[0-9]+$', '') = 'cp-' || %(set)s END
         ORDER BY a.source, a.org_id, a.fingerprint, a.starts_at DESC
        """,
        {"set": name, "model": model, "at": at},
    )
    fired = [alert_then(row["alert"]) for row in await cursor.fetchall()]
    return tuple(sorted(fired, key=lambda alert: (alert.starts_at, alert.key)))
