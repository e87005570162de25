"""Replica sets: the specs that operators apply, the bounds in force, and how many replicas are desired.

Every change of `desired_replicas` writes its decision in the same transaction: none is unexplained. The bounds in force
are written with whatever they are made of (`core.bounds`): the spec, open schedules, an operator's word, a pin.
External sets scale nothing; their endpoints are rows that follow the spec.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from datetime import datetime
from enum import StrEnum

from psycopg.rows import DictRow
from psycopg.types.json import Jsonb
from pydantic import TypeAdapter

from controlplane.core.alerts import Target
from controlplane.core.bounds import bounded, in_force
from controlplane.core.specs import spec_hash
from controlplane.core.types import (
    Decision,
    DecisionReason,
    Freeze,
    OperatorBounds,
    Pin,
    ReplicaSet,
    ReplicaSetSpec,
    ScheduledBounds,
)
from controlplane.db import back_offs, decisions
from controlplane.db.errors import NotFound, Stale
from controlplane.db.pool import Connection, Database, wake

SPECS: TypeAdapter[ReplicaSetSpec] = TypeAdapter(ReplicaSetSpec)

_COLUMNS = (
    "spec, spec_hash, min_replicas, max_replicas, desired_replicas, "
    "is_paused, paused_reason, paused_until, scaled_up_at, scaled_down_at, operator_min, operator_max, bounds_until, "
    "open_schedules, scheduled_min, scheduled_max, pinned_replicas, pinned_until, pinned_by, pinned_reason, "
    "start_lead_seconds"
)


class Applied(StrEnum):
    CREATED = "created"
    CHANGED = "changed"
    UNCHANGED = "unchanged"


async def load_all(db: Database) -> tuple[ReplicaSet, ...]:
    async with db.connection() as connection:
        return await load_all_in(connection)


async def load_all_in(connection: Connection, *, lock: bool = False) -> tuple[ReplicaSet, ...]:
    """`load_all` in the caller's transaction; `lock`: nobody else changes them before it ends."""
    cursor = await connection.execute(
        f"SELECT {_COLUMNS} FROM replica_sets ORDER BY name" + (" FOR UPDATE" if lock else "")
    )
    rows = await cursor.fetchall()
    freezes = await _freezes(connection)
    return tuple(_replica_set(row, freezes) for row in rows)


async def load_targets(db: Database) -> dict[str, Target]:
    """What alerts may name, by name: cheaper than whole replica sets, for every delivery is judged by it."""
    async with db.connection() as connection:
        cursor = await connection.execute("SELECT name, model, is_external FROM replica_sets")
        return {row["name"]: Target(**row) for row in await cursor.fetchall()}


async def load(db: Database, name: str) -> ReplicaSet:
    """Raises NotFound."""
    async with db.connection() as connection:
        return await load_in(connection, name)


async def apply(db: Database, spec: ReplicaSetSpec, *, actor: str, now: datetime, dry_run: bool = False) -> Applied:
    """`apply_all` of one."""
    [outcome] = await apply_all(db, [spec], actor=actor, now=now, dry_run=dry_run)
    return outcome


async def apply_all(
    db: Database, specs: Iterable[ReplicaSetSpec], *, actor: str, now: datetime, dry_run: bool = False
) -> list[Applied]:
    """Make the specs the ones in force, all of them or none. Their bounds replace an operator's.

    Desired is moved inside the bounds. Pins, pauses and freezes stay, and so do the bounds of open schedules, until the
    next round looks. Raises ValueError naming the field at fault. May be repeated.
    """
    async with db.transaction() as connection:
        return [await _apply(connection, spec, actor, now, dry_run) for spec in specs]


async def _apply(connection: Connection, spec: ReplicaSetSpec, actor: str, now: datetime, dry_run: bool) -> Applied:
    stored = replace(spec, endpoints=tuple(replace(endpoint, api_key=None) for endpoint in spec.endpoints))
    try:
        before: ReplicaSet | None = await load_in(connection, spec.name, lock=True)
    except NotFound:
        before = None
    if before is not None and before.spec.is_external != spec.is_external:
        raise ValueError(
            f"name: {spec.name} exists; a set cannot change between `slurm` and `endpoints`; use another name"
        )
    base = before or ReplicaSet(stored, 0, "", 0, 0)
    after = bounded(replace(base, spec=stored, spec_hash=spec_hash(spec), operator_bounds=None))
    same_keys = await _endpoints_are(connection, spec)
    if before is not None and before == after and same_keys:
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
               operator_min = NULL, operator_max = NULL, bounds_until = NULL, updated_at = excluded.updated_at
        """,
        {
            "name": spec.name,
            "model": spec.model,
            "priority": spec.priority,
            "is_external": spec.is_external,
            "spec": Jsonb(asdict(stored)),
            "spec_hash": after.spec_hash,
            "low": after.min_replicas,
            "high": after.max_replicas,
            "desired": after.desired_replicas,
            "now": now,
        },
    )
    await _follow_external_endpoints(connection, spec)
    await back_offs.forgive(connection, spec.name, now)
    count = len(spec.endpoints)
    between = f"between {after.min_replicas} and {after.max_replicas} replicas"
    what = f"{count} fixed endpoints" if spec.is_external else between
    await decisions.record(
        connection,
        Decision(
            replica_set=spec.name,
            desired=after.desired_replicas,
            previous=before.desired_replicas if before else after.desired_replicas,
            reason=DecisionReason.OPERATOR,
            explanation=f"spec {outcome} by {actor}: {what}",
        ),
        actor=actor,
        now=now,
    )
    await wake(connection)
    return outcome


async def decide(db: Database, decision: Decision, *, actor: str, now: datetime) -> None:
    """Record a decision and make it so, if desired still is what it was decided from.

    Raises Stale; also if the count is out of bounds, or somebody has frozen or pinned the set meanwhile.
    """
    async with db.transaction() as connection:
        if decision.changes_desired or decision.scheduled is not None:
            before = await load_in(connection, decision.replica_set, lock=True)
            after = before
            if decision.scheduled is not None:
                after = bounded(replace(before, scheduled=decision.scheduled))
            is_due = (
                before.desired_replicas == decision.previous
                and after.min_replicas <= decision.desired <= after.max_replicas
                and not before.freezes
                and (before.pin is None or before.pin.replicas == decision.desired)
            )
            if not is_due:
                raise Stale(f"{decision.replica_set}: desired is no longer {decision.previous}, or must not change")
            await _write(connection, _stamped(before, replace(after, desired_replicas=decision.desired), now), now)
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
    until: datetime | None = None,
    reason: str | None = None,
    dry_run: bool = False,
) -> ReplicaSet:
    """Set the desired count, the bounds in force, or both; a set that backs off is tried again at once.

    `until`: a count is held until then, whatever alerts and schedules say, and bounds end then. A count without it is
    where alerts go on from, and ends a pin. Raises NotFound; ValueError naming the field at fault.
    """
    check_until(until, now)
    async with db.transaction() as connection:
        before = await load_in(connection, name, lock=True)
        check_scalable(before)
        low, high = in_force(replace(before, pin=None))
        low = low if min_replicas is None else min_replicas
        high = high if max_replicas is None else max_replicas
        if low < 0:
            raise ValueError("min_replicas: must be 0 or more")
        if high < low:
            raise ValueError(f"max_replicas: {high} is less than min_replicas, {low}")
        if replicas is not None and not low <= replicas <= high:
            raise ValueError(f"replicas: {replicas} is not between {low} and {high}; change the bounds as well")
        bounds, pin = before.operator_bounds, before.pin
        if min_replicas is not None or max_replicas is not None:
            given = before.operator_bounds or OperatorBounds(None, None)
            bounds = OperatorBounds(
                given.min_replicas if min_replicas is None else min_replicas,
                given.max_replicas if max_replicas is None else max_replicas,
                until,
            )
        if replicas is not None:
            pin = None if until is None else Pin(replicas, until, actor, reason)
        desired = before.desired_replicas if replicas is None else replicas
        after = bounded(replace(before, operator_bounds=bounds, pin=pin, desired_replicas=desired))
        # an operator's word begins the same windows as a decision: no alert undoes it at once
        after = _stamped(before, after, now)
        if dry_run or (not await back_offs.forgive(connection, name, now) and after == before):
            return after
        await _write(connection, after, now)
        what = f"{after.desired_replicas} wanted, bounds {after.min_replicas} to {after.max_replicas}"
        end = f", until {until.isoformat()}" if until is not None else ""
        await record_verb(connection, before, after, f"scaled by {actor}: {what}{end}", reason, actor, now)
    return after


async def end_due(db: Database, now: datetime) -> list[str]:
    """End the pins and bounds of operators that were to hold until now; returns what ended, in words."""
    ended = [await _end_terms(db, one.name, now) for one in await load_all(db) if _without_due(one, now) != one]
    return [words for words in ended if words is not None]


async def _end_terms(db: Database, name: str, now: datetime) -> str | None:
    """Returns None if an operator was faster: what was made to last longer meanwhile stays."""
    async with db.transaction() as connection:
        before = await load_in(connection, name, lock=True)
        after = _without_due(before, now)
        if after == before:
            return None
        after = _stamped(before, bounded(after), now)
        await _write(connection, after, now)
        what = "pin" if after.pin != before.pin else ""
        what += " and bounds" if after.operator_bounds != before.operator_bounds else ""
        words = f"{name}: the operator's {what.removeprefix(' and ')} ended"
        in_force_now = f"{words}; bounds {after.min_replicas} to {after.max_replicas}"
        await record_verb(connection, before, after, in_force_now, None, "term-end", now)
    return words


def _without_due(one: ReplicaSet, now: datetime) -> ReplicaSet:
    bounds, pin = one.operator_bounds, one.pin
    return replace(
        one,
        operator_bounds=None if bounds is not None and bounds.until is not None and bounds.until <= now else bounds,
        pin=None if pin is not None and pin.until <= now else pin,
    )


def check_until(until: datetime | None, now: datetime) -> None:
    """Raises ValueError naming the field at fault."""
    if until is not None and until <= now:
        raise ValueError("until: must be in the future")


def check_scalable(one: ReplicaSet) -> None:
    """Raises ValueError naming the field at fault."""
    if one.spec.is_external:
        raise ValueError("replica_set: its endpoints are not run by Slurm and cannot be scaled; edit the spec")


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
    check_until(until, now)
    return await _set_pause(db, name, True, reason, until, actor, now, dry_run)


async def resume(db: Database, name: str, *, actor: str, now: datetime, dry_run: bool = False) -> ReplicaSet:
    """Put it back into service with the replicas it had desired, and try at once if it backs off. Raises NotFound."""
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
        before = await load_in(connection, name, lock=True)
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
        before = await load_in(connection, name, lock=True)
        after = replace(before, is_paused=is_paused, paused_reason=reason, paused_until=until)
        tries_again = not dry_run and not is_paused and await back_offs.forgive(connection, name, now)
        if tries_again or (not dry_run and after != before):
            await _write_pause(connection, before, after, actor, now)
    return after


async def _write_pause(
    connection: Connection, before: ReplicaSet, after: ReplicaSet, actor: str, now: datetime
) -> None:
    await _write(connection, after, now)
    what = "paused" if after.is_paused else "resumed"
    end = f" until {after.paused_until.isoformat()}" if after.paused_until else ""
    await record_verb(connection, before, after, f"{what} by {actor}{end}", after.paused_reason, actor, now)


def _stamped(before: ReplicaSet, after: ReplicaSet, now: datetime) -> ReplicaSet:
    """With the time at which desired rose or fell, if it did."""
    return replace(
        after,
        scaled_up_at=now if after.desired_replicas > before.desired_replicas else after.scaled_up_at,
        scaled_down_at=now if after.desired_replicas < before.desired_replicas else after.scaled_down_at,
    )


async def _write(connection: Connection, after: ReplicaSet, now: datetime) -> None:
    """All that is not the spec's, of a row that the caller has locked."""
    bounds, pin = after.operator_bounds, after.pin
    values = {
        "desired_replicas": after.desired_replicas,
        "min_replicas": after.min_replicas,
        "max_replicas": after.max_replicas,
        "scaled_up_at": after.scaled_up_at,
        "scaled_down_at": after.scaled_down_at,
        "is_paused": after.is_paused,
        "paused_reason": after.paused_reason,
        "paused_until": after.paused_until,
        "operator_min": bounds and bounds.min_replicas,
        "operator_max": bounds and bounds.max_replicas,
        "bounds_until": bounds and bounds.until,
        "open_schedules": list(after.scheduled.schedules),
        "scheduled_min": after.scheduled.min_replicas,
        "scheduled_max": after.scheduled.max_replicas,
        "pinned_replicas": pin and pin.replicas,
        "pinned_until": pin and pin.until,
        "pinned_by": pin and pin.actor,
        "pinned_reason": pin and pin.reason,
        "updated_at": now,
    }
    assignments = ", ".join(f"{column} = %({column})s" for column in values)
    await connection.execute(
        f"UPDATE replica_sets SET {assignments} WHERE name = %(name)s", {**values, "name": after.name}
    )


async def record_verb(
    connection: Connection,
    before: ReplicaSet,
    after: ReplicaSet,
    explanation: str,
    reason: str | None,
    actor: str,
    now: datetime,
) -> None:
    """Write an operator's word as a decision, in the caller's transaction, and wake the reconciler."""
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


async def load_in(connection: Connection, name: str, *, lock: bool = False) -> ReplicaSet:
    """`load` in the caller's transaction; `lock`: nobody else changes the row before it ends. Raises NotFound."""
    cursor = await connection.execute(
        f"SELECT {_COLUMNS} FROM replica_sets WHERE name = %s" + (" FOR UPDATE" if lock else ""), (name,)
    )
    row = await cursor.fetchone()
    if row is None:
        raise NotFound(f"there is no replica set {name!r}")
    return _replica_set(row, await _freezes(connection))


async def _freezes(connection: Connection) -> list[DictRow]:
    cursor = await connection.execute("SELECT * FROM freezes ORDER BY replica_set NULLS LAST")
    return await cursor.fetchall()


def _replica_set(row: DictRow, freezes: list[DictRow]) -> ReplicaSet:
    spec = SPECS.validate_python(row["spec"])
    bounds = OperatorBounds(row["operator_min"], row["operator_max"], row["bounds_until"])
    pin = None
    if row["pinned_replicas"] is not None:
        pin = Pin(row["pinned_replicas"], row["pinned_until"], row["pinned_by"], row["pinned_reason"])
    return ReplicaSet(
        spec=spec,
        desired_replicas=row["desired_replicas"],
        spec_hash=row["spec_hash"],
        min_replicas=row["min_replicas"],
        max_replicas=row["max_replicas"],
        is_paused=row["is_paused"],
        paused_reason=row["paused_reason"],
        paused_until=row["paused_until"],
        scaled_up_at=row["scaled_up_at"],
        scaled_down_at=row["scaled_down_at"],
        start_lead_seconds=row["start_lead_seconds"],
        operator_bounds=None if bounds == OperatorBounds(None, None) else bounds,
        scheduled=ScheduledBounds(tuple(row["open_schedules"]), row["scheduled_min"], row["scheduled_max"]),
        pin=pin,
        freezes=tuple(
            Freeze(one["replica_set"] is None, one["actor"], one["since"], one["reason"], one["until"])
            for one in freezes
            if not spec.is_external and one["replica_set"] in (None, spec.name)
        ),
    )
