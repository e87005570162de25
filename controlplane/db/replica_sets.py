"""Replica sets: the specs that operators apply, the bounds in force, and how many replicas are desired.

Every change of `desired_replicas` writes its decision in the same transaction: none is unexplained.
External sets scale nothing; their endpoints are rows that follow the spec.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from datetime import datetime
from enum import StrEnum
from typing import Any

from psycopg.rows import DictRow
from psycopg.types.json import Jsonb
from pydantic import TypeAdapter

from controlplane.core.specs import spec_hash
from controlplane.core.types import Decision, DecisionReason, ReplicaSet, ReplicaSetSpec
from controlplane.db import decisions
from controlplane.db.errors import NotFound, Stale
from controlplane.db.pool import Connection, Database, wake

SPECS: TypeAdapter[ReplicaSetSpec] = TypeAdapter(ReplicaSetSpec)

_COLUMNS = (
    "spec, spec_hash, min_replicas, max_replicas, desired_replicas, "
    "is_paused, paused_reason, paused_until, scaled_up_at, scaled_down_at, start_lead_seconds"
)


class Applied(StrEnum):
    CREATED = "created"
    CHANGED = "changed"
    UNCHANGED = "unchanged"


async def load_all(db: Database) -> tuple[ReplicaSet, ...]:
    async with db.connection() as connection:
        cursor = await connection.execute(f"SELECT {_COLUMNS} FROM replica_sets ORDER BY name")
        return tuple(_replica_set(row) for row in await cursor.fetchall())


async def load(db: Database, name: str) -> ReplicaSet:
    """Raises NotFound."""
    async with db.connection() as connection:
        return await _load(connection, name)


async def apply(db: Database, spec: ReplicaSetSpec, *, actor: str, now: datetime, dry_run: bool = False) -> Applied:
    """`apply_all` of one."""
    [outcome] = await apply_all(db, [spec], actor=actor, now=now, dry_run=dry_run)
    return outcome


async def apply_all(
    db: Database, specs: Iterable[ReplicaSetSpec], *, actor: str, now: datetime, dry_run: bool = False
) -> list[Applied]:
    """Make the specs the ones in force, all of them or none. Their bounds replace an operator's.

    Desired is moved inside the bounds. Raises ValueError naming the field at fault. May be repeated.
    """
    async with db.transaction() as connection:
        return [await _apply(connection, spec, actor, now, dry_run) for spec in specs]


async def _apply(connection: Connection, spec: ReplicaSetSpec, actor: str, now: datetime, dry_run: bool) -> Applied:
    stored = replace(spec, endpoints=tuple(replace(endpoint, api_key=None) for endpoint in spec.endpoints))
    bounds = (0, 0) if spec.is_external else (spec.min_replicas, spec.max_replicas)
    try:
        before: ReplicaSet | None = await _load(connection, spec.name, lock=True)
    except NotFound:
        before = None
    if before is not None and before.spec.is_external != spec.is_external:
        raise ValueError(
            f"name: {spec.name} exists; a set cannot change between `slurm` and `endpoints`; use another name"
        )
    desired = max(bounds[0], min(bounds[1], before.desired_replicas if before else bounds[0]))
    same_keys = await _endpoints_are(connection, spec)
    same_bounds = before is not None and (before.min_replicas, before.max_replicas) == bounds
    if before is not None and before.spec == stored and same_keys and same_bounds:
        return Applied.UNCHANGED
    outcome = Applied.CHANGED if before else Applied.CREATED
    if dry_run:
        return outcome
    await connection.execute(
        """
        INSERT INTO replica_sets (name, model, priority, is_external, spec, spec_hash,
                                  min_replicas, max_replicas, desired_replicas, created_at, updated_at)
        VALUES (%(name)s, %(model)s, %(priority)s, %(is_external)s, %(spec)s, %(spec_hash)s,
                %(low)s, %(high)s, %(desired)s, %(now)s, %(now)s)
        ON CONFLICT (name) DO UPDATE
           SET model = excluded.model, priority = excluded.priority, spec = excluded.spec,
               spec_hash = excluded.spec_hash, min_replicas = excluded.min_replicas,
               max_replicas = excluded.max_replicas, desired_replicas = excluded.desired_replicas,
               updated_at = excluded.updated_at
        """,
        {
            "name": spec.name,
            "model": spec.model,
            "priority": spec.priority,
            "is_external": spec.is_external,
            "spec": Jsonb(asdict(stored)),
            "spec_hash": spec_hash(spec),
            "low": bounds[0],
            "high": bounds[1],
            "desired": desired,
            "now": now,
        },
    )
    await _follow_external_endpoints(connection, spec)
    count = len(spec.endpoints)
    what = f"{count} fixed endpoints" if spec.is_external else f"between {bounds[0]} and {bounds[1]} replicas"
    await decisions.record(
        connection,
        Decision(
            replica_set=spec.name,
            desired=desired,
            previous=before.desired_replicas if before else desired,
            reason=DecisionReason.OPERATOR,
            explanation=f"spec {outcome} by {actor}: {what}",
        ),
        actor=actor,
        now=now,
    )
    await wake(connection)
    return outcome


async def decide(db: Database, decision: Decision, *, actor: str, now: datetime) -> None:
    """Record a decision and make it so, if desired still is what it was decided from. Raises Stale."""
    async with db.transaction() as connection:
        if decision.changes_desired:
            column = "scaled_up_at" if decision.desired > decision.previous else "scaled_down_at"
            cursor = await connection.execute(
                f"UPDATE replica_sets SET desired_replicas = %s, {column} = %s, updated_at = %s "
                "WHERE name = %s AND desired_replicas = %s AND %s BETWEEN min_replicas AND max_replicas",
                (decision.desired, now, now, decision.replica_set, decision.previous, decision.desired),
            )
            if cursor.rowcount != 1:
                raise Stale(f"{decision.replica_set}: desired is no longer {decision.previous}")
        await decisions.record(connection, decision, actor=actor, now=now)


async def scale(
    db: Database,
    name: str,
    *,
    actor: str,
    now: datetime,
    replicas: int | None = None,
    min_replicas: int | None = None,
    max_replicas: int | None = None,
    reason: str | None = None,
    dry_run: bool = False,
) -> ReplicaSet:
    """Set the desired count, the bounds in force, or both. Raises NotFound; ValueError naming the field at fault."""
    async with db.transaction() as connection:
        before = await _load(connection, name, lock=True)
        if before.spec.is_external:
            raise ValueError("replica_set: its endpoints are not run by Slurm and cannot be scaled; edit the spec")
        low = before.min_replicas if min_replicas is None else min_replicas
        high = before.max_replicas if max_replicas is None else max_replicas
        if low < 0:
            raise ValueError("min_replicas: must be 0 or more")
        if high < low:
            raise ValueError(f"max_replicas: {high} is less than min_replicas, {low}")
        desired = max(low, min(high, before.desired_replicas)) if replicas is None else replicas
        if not low <= desired <= high:
            raise ValueError(f"replicas: {desired} is not between {low} and {high}; change the bounds as well")
        after = replace(
            before,
            desired_replicas=desired,
            min_replicas=low,
            max_replicas=high,
            # an operator's word begins the same windows as a decision: no alert undoes it at once
            scaled_up_at=now if desired > before.desired_replicas else before.scaled_up_at,
            scaled_down_at=now if desired < before.desired_replicas else before.scaled_down_at,
        )
        if dry_run or after == before:
            return after
        await connection.execute(
            "UPDATE replica_sets SET desired_replicas = %s, min_replicas = %s, max_replicas = %s, "
            "scaled_up_at = %s, scaled_down_at = %s, updated_at = %s WHERE name = %s",
            (desired, low, high, after.scaled_up_at, after.scaled_down_at, now, name),
        )
        await _record_verb(
            connection,
            after,
            before,
            f"scaled by {actor}: {desired} wanted, bounds {low} to {high}",
            reason,
            actor,
            now,
        )
    return after


async def pause(
    db: Database,
    name: str,
    *,
    actor: str,
    now: datetime,
    reason: str | None = None,
    until: datetime | None = None,
    dry_run: bool = False,
) -> ReplicaSet:
    """Take the set out of service: no new requests, its replicas drain, nothing is started. Raises NotFound."""
    if until is not None and until <= now:
        raise ValueError("until: must be in the future")
    return await _set_pause(db, name, True, reason, until, actor, now, dry_run)


async def resume(db: Database, name: str, *, actor: str, now: datetime, dry_run: bool = False) -> ReplicaSet:
    """Put it back into service with the replicas it had desired. Raises NotFound."""
    return await _set_pause(db, name, False, None, None, actor, now, dry_run)


async def resume_due(db: Database, now: datetime) -> list[str]:
    """Resume the sets whose pause has reached its end; returns their names."""
    due = [one.name for one in await load_all(db) if _pause_is_over(one, now)]
    return [name for name in due if await _end_pause(db, name, now)]


def _pause_is_over(one: ReplicaSet, now: datetime) -> bool:
    return one.is_paused and one.paused_until is not None and one.paused_until <= now


async def _end_pause(db: Database, name: str, now: datetime) -> bool:
    """Returns False if an operator was faster: a pause that was made longer meanwhile stays."""
    async with db.transaction() as connection:
        before = await _load(connection, name, lock=True)
        if not _pause_is_over(before, now):
            return False
        after = replace(before, is_paused=False, paused_reason=None, paused_until=None)
        await _write_pause(connection, before, after, "pause-end", now)
    return True


async def _set_pause(
    db: Database,
    name: str,
    is_paused: bool,
    reason: str | None,
    until: datetime | None,
    actor: str,
    now: datetime,
    dry_run: bool,
) -> ReplicaSet:
    async with db.transaction() as connection:
        before = await _load(connection, name, lock=True)
        after = replace(before, is_paused=is_paused, paused_reason=reason, paused_until=until)
        if not dry_run and after != before:
            await _write_pause(connection, before, after, actor, now)
    return after


async def _write_pause(
    connection: Connection, before: ReplicaSet, after: ReplicaSet, actor: str, now: datetime
) -> None:
    await connection.execute(
        "UPDATE replica_sets SET is_paused = %s, paused_reason = %s, paused_until = %s, updated_at = %s "
        "WHERE name = %s",
        (after.is_paused, after.paused_reason, after.paused_until, now, after.name),
    )
    what = "paused" if after.is_paused else "resumed"
    end = f" until {after.paused_until.isoformat()}" if after.paused_until else ""
    await _record_verb(connection, after, before, f"{what} by {actor}{end}", after.paused_reason, actor, now)


async def _record_verb(
    connection: Connection,
    after: ReplicaSet,
    before: ReplicaSet,
    explanation: str,
    reason: str | None,
    actor: str,
    now: datetime,
) -> None:
    decision = Decision(
        replica_set=after.name,
        desired=after.desired_replicas,
        previous=before.desired_replicas,
        reason=DecisionReason.OPERATOR,
        explanation=f"{explanation} ({reason})" if reason else explanation,
    )
    await decisions.record(connection, decision, actor=actor, now=now)
    await wake(connection)


async def _endpoints_are(connection: Connection, spec: ReplicaSetSpec) -> bool:
    cursor = await connection.execute(
        "SELECT url, api_key FROM endpoints WHERE replica_set = %s AND replica_id IS NULL", (spec.name,)
    )
    stored = {(row["url"], row["api_key"]) for row in await cursor.fetchall()}
    return stored == {(endpoint.url, endpoint.api_key) for endpoint in spec.endpoints}


async def _follow_external_endpoints(connection: Connection, spec: ReplicaSetSpec) -> None:
    await connection.execute(
        "DELETE FROM endpoints WHERE replica_set = %s AND replica_id IS NULL AND url <> ALL (%s)",
        (spec.name, [endpoint.url for endpoint in spec.endpoints]),
    )
    for endpoint in spec.endpoints:
        # a new key must be proven again
        await connection.execute(
            """
            INSERT INTO endpoints AS e (replica_set, url, api_key) VALUES (%s, %s, %s)
            ON CONFLICT (replica_set, url) WHERE replica_id IS NULL DO UPDATE
               SET api_key = excluded.api_key, health = 'UNPROVEN', passes = 0, fails = 0
             WHERE e.api_key IS DISTINCT FROM excluded.api_key
            """,
            (spec.name, endpoint.url, endpoint.api_key),
        )


async def _load(connection: Connection, name: str, *, lock: bool = False) -> ReplicaSet:
    cursor = await connection.execute(
        f"SELECT {_COLUMNS} FROM replica_sets WHERE name = %s" + (" FOR UPDATE" if lock else ""), (name,)
    )
    row = await cursor.fetchone()
    if row is None:
        raise NotFound(f"there is no replica set {name!r}")
    return _replica_set(row)


def _replica_set(row: DictRow) -> ReplicaSet:
    fields: dict[str, Any] = {**row, "spec": SPECS.validate_python(row["spec"])}
    return ReplicaSet(**fields)
