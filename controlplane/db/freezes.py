"""Freezes: an operator keeps one set, or all of them, from being scaled automatically.

A row is a freeze; that of all sets names none. Every word is recorded as a decision of each set that it is about, or in
the audit where there is no such set, with its actor; and may be repeated: what already is as asked is left alone, with
the time at which it began.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from controlplane.core.types import Freeze, ReplicaSet
from controlplane.db import audit, replica_sets
from controlplane.db.pool import Connection, Database


async def freeze(
    db: Database,
    name: str,
    *,
    actor: str,
    now: datetime,
    reason: str | None = None,
    until: datetime | None = None,
    dry_run: bool = False,
) -> ReplicaSet:
    """Raises NotFound; ValueError naming the field at fault."""
    replica_sets.check_until(until, now)
    wanted = Freeze(False, actor, now, reason, until)
    _, (after,) = await _set(db, name, wanted, actor=actor, now=now, dry_run=dry_run)
    return after


async def unfreeze(db: Database, name: str, *, actor: str, now: datetime, dry_run: bool = False) -> ReplicaSet:
    """Lift the set's own; that of all sets stays. Raises NotFound."""
    _, (after,) = await _set(db, name, None, actor=actor, now=now, dry_run=dry_run)
    return after


async def freeze_all(
    db: Database,
    *,
    actor: str,
    now: datetime,
    reason: str | None = None,
    until: datetime | None = None,
    dry_run: bool = False,
) -> Freeze | None:
    """Also the sets that are made later. Returns what is then in force. Raises ValueError naming the field at fault."""
    replica_sets.check_until(until, now)
    wanted = Freeze(True, actor, now, reason, until)
    in_force, _ = await _set(db, None, wanted, actor=actor, now=now, dry_run=dry_run)
    return in_force


async def unfreeze_all(db: Database, *, actor: str, now: datetime, dry_run: bool = False) -> Freeze | None:
    """Lift the freeze of all sets; a set's own stays. Returns what is then in force of all: nothing."""
    in_force, _ = await _set(db, None, None, actor=actor, now=now, dry_run=dry_run)
    return in_force


async def load_of_all(db: Database) -> Freeze | None:
    """The freeze of all sets, if there is one."""
    async with db.connection() as connection:
        return await _load(connection, None)


async def lift_due(db: Database, now: datetime) -> list[str]:
    """Lift the freezes that have reached their end; returns whose, in words."""
    async with db.connection() as connection:
        cursor = await connection.execute("SELECT replica_set FROM freezes WHERE until <= %s", (now,))
        due = [row["replica_set"] for row in await cursor.fetchall()]
    for name in due:
        await _set(db, name, None, actor="freeze-end", now=now, only_due=True)
    return ["all sets" if name is None else name for name in due]


async def _set(
    db: Database,
    name: str | None,
    wanted: Freeze | None,
    *,
    actor: str,
    now: datetime,
    dry_run: bool = False,
    only_due: bool = False,
) -> tuple[Freeze | None, tuple[ReplicaSet, ...]]:
    """Returns the freeze that is in force then, and the sets that it is about.

    `only_due`: leave alone what an operator has made to last longer meanwhile.
    """
    async with db.transaction() as connection:
        sets = await _locked(connection, name)
        before = await _load(connection, name)
        if only_due and (before is None or before.until is None or before.until > now):
            return before, sets
        if before is not None and wanted is not None:
            is_same = replace(wanted, since=before.since) == before
            wanted = before if is_same else wanted
        kept = [tuple(one for one in each.freezes if one.is_of_all is not (name is None)) for each in sets]
        new = () if wanted is None else (wanted,)
        after = tuple(
            replace(each, freezes=others + new if name is None else new + others)
            for each, others in zip(sets, kept, strict=True)
        )
        if dry_run or wanted == before:
            return wanted, after
        await _write(connection, name, wanted)
        words = f"{'all sets ' if name is None else ''}{'unfrozen' if wanted is None else 'frozen'} by {actor}"
        if wanted is not None and wanted.until is not None:
            words += f" until {wanted.until.isoformat()}"
        reason = wanted.reason if wanted is not None else None
        for was, one in zip(sets, after, strict=True):
            await replica_sets.record_verb(connection, was, one, words, reason, actor, now)
        if not sets:  # no decision tells of it
            said = words + (f" ({reason})" if reason else "")
            await audit.record(connection, audit.Said(now, actor, "replica set", "all", said))
    return wanted, after


async def _write(connection: Connection, name: str | None, wanted: Freeze | None) -> None:
    if wanted is None:
        await connection.execute("DELETE FROM freezes WHERE replica_set IS NOT DISTINCT FROM %s", (name,))
        return
    await connection.execute(
        """
        INSERT INTO freezes (replica_set, actor, reason, since, until) VALUES (%s, %s, %s, %s, %s)
        ON CONFLICT (coalesce(replica_set, '')) DO UPDATE
           SET actor = excluded.actor, reason = excluded.reason, since = excluded.since, until = excluded.until
        """,
        (name, wanted.actor, wanted.reason, wanted.since, wanted.until),
    )


async def _locked(connection: Connection, name: str | None) -> tuple[ReplicaSet, ...]:
    """The sets that it is about, which no decision can change before the transaction ends."""
    if name is not None:
        one = await replica_sets.load_in(connection, name, lock=True)
        replica_sets.check_scalable(one)
        return (one,)
    every = await replica_sets.load_all_in(connection, lock=True)
    return tuple(one for one in every if not one.spec.is_external)


async def _load(connection: Connection, name: str | None) -> Freeze | None:
    cursor = await connection.execute("SELECT * FROM freezes WHERE replica_set IS NOT DISTINCT FROM %s", (name,))
    row = await cursor.fetchone()
    if row is None:
        return None
    return Freeze(name is None, row["actor"], row["since"], row["reason"], row["until"])
