"""How proxies' workers tell each other what they have used of tenants' limits, and take their parts of what is left.

One transaction under one lock: a worker sees what all others have used and may use still, and says its own before
anybody else looks. A worker that was not heard of for `LIVE_SECONDS`, by the database's clock, is forgotten with all
that it had used and was given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date

from controlplane.db.pool import WORKERS_CHANNEL, Connection, Database

LIVE_SECONDS = 12.0
_LOCK = 0x6C696D697473  # "limits": any constant that nobody else in this database uses


@dataclass(frozen=True, slots=True)
class Told:
    """What the other workers said of one tenant. By kind of limit, in the order of the table's arrays."""

    workers: int
    used: tuple[int, ...]
    parts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Exchanged:
    workers: int  # that live, this one included
    others: Mapping[str, Told]  # by tenant; one of whom nobody tells is absent
    month: date  # the first of the current one, UTC
    month_tokens: Mapping[str, int]  # of the tenants that were asked for, as far as usage was stored


Own = Mapping[str, tuple[Sequence[int], Sequence[int]]]
"""By tenant: used, and part. A tenant that is not in it is no longer told of."""


async def exchange(
    db: Database,
    worker: str,
    budgeted: Sequence[str],
    decide: Callable[[Exchanged], Own],
    *,
    was_alone: bool = False,
) -> Exchanged:
    """Hear the others, `decide` what this worker says, and say it. `decide` runs under the lock: it must not wait.

    `was_alone`: when it heard last. Then one statement tells whether it still is, and there is nobody to be told; who
    joins takes the lock first, and is seen by the next of them.

    Raises DbUnavailable: it may have been said or not.
    """
    if was_alone:
        async with db.connection() as connection:
            alone = await _look_round(connection, worker, budgeted)
        if alone is not None:
            decide(alone)
            return alone
    async with db.transaction() as connection:
        await connection.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
        heard = await _hear(connection, worker, budgeted)
        own = decide(heard)
        await _say(connection, worker, own)
    return heard


async def leave(db: Database, worker: str) -> None:
    """Forget a worker that ends."""
    async with db.connection() as connection:
        await connection.execute("DELETE FROM proxy_workers WHERE worker = %s", (worker,))


async def _look_round(connection: Connection, worker: str, budgeted: Sequence[str]) -> Exchanged | None:
    """What there is to hear if no other worker lives; None: one does."""
    cursor = await connection.execute(
        """
        WITH own AS (
            INSERT INTO proxy_workers (worker, seen_at) VALUES (%(worker)s, clock_timestamp())
            ON CONFLICT (worker) DO UPDATE SET seen_at = excluded.seen_at
            RETURNING xmax = 0 AS has_joined
        ), said AS (
            DELETE FROM limit_parts WHERE worker = %(worker)s
               AND NOT EXISTS (SELECT FROM proxy_workers WHERE worker <> %(worker)s)
        ), this AS (
            SELECT date_trunc('month', clock_timestamp() AT TIME ZONE 'UTC')::date AS month
        )
        SELECT month, (SELECT has_joined FROM own) AS has_joined,
               EXISTS (SELECT FROM proxy_workers WHERE worker <> %(worker)s) AS has_others,
               (SELECT jsonb_object_agg(tenant, tokens) FROM tenant_months
                 WHERE tenant_months.month = this.month AND tenant = ANY (%(budgeted)s)) AS tokens
          FROM this
        """,
        {"worker": worker, "budgeted": list(budgeted)},
    )
    row = await cursor.fetchone()
    assert row is not None
    if row["has_joined"]:  # it had been forgotten
        await _announce(connection)
    return None if row["has_others"] else Exchanged(1, {}, row["month"], row["tokens"] or {})


async def _hear(connection: Connection, worker: str, budgeted: Sequence[str]) -> Exchanged:
    cursor = await connection.execute(
        """
        INSERT INTO proxy_workers (worker, seen_at) VALUES (%s, clock_timestamp())
        ON CONFLICT (worker) DO UPDATE SET seen_at = excluded.seen_at
        RETURNING xmax = 0 AS has_joined
        """,
        (worker,),
    )
    [said] = await cursor.fetchall()
    if said["has_joined"]:
        await _announce(connection)
    await connection.execute(
        "DELETE FROM proxy_workers WHERE seen_at < clock_timestamp() - make_interval(secs => %s)", (LIVE_SECONDS,)
    )
    cursor = await connection.execute(
        """
        SELECT (SELECT count(*) FROM proxy_workers) AS workers,
               date_trunc('month', clock_timestamp() AT TIME ZONE 'UTC')::date AS month
        """
    )
    row = await cursor.fetchone()
    assert row is not None
    cursor = await connection.execute(
        """
        SELECT tenant, count(*) AS workers,
               ARRAY[sum(used[1]), sum(used[2]), sum(used[3]), sum(used[4])]::bigint[] AS used,
               ARRAY[sum(part[1]), sum(part[2]), sum(part[3]), sum(part[4])]::bigint[] AS parts
          FROM limit_parts WHERE worker <> %s GROUP BY tenant
        """,
        (worker,),
    )
    others = {
        one["tenant"]: Told(one["workers"], tuple(one["used"]), tuple(one["parts"])) for one in await cursor.fetchall()
    }
    tokens: dict[str, int] = {}
    if budgeted:
        cursor = await connection.execute(
            "SELECT tenant, tokens FROM tenant_months WHERE month = %s AND tenant = ANY (%s)",
            (row["month"], list(budgeted)),
        )
        tokens = {one["tenant"]: one["tokens"] for one in await cursor.fetchall()}
    return Exchanged(row["workers"], others, row["month"], tokens)


async def _announce(connection: Connection) -> None:
    await connection.execute("SELECT pg_notify(%s, '')", (WORKERS_CHANNEL,))


async def _say(connection: Connection, worker: str, own: Own) -> None:
    await connection.execute("DELETE FROM limit_parts WHERE worker = %s AND tenant <> ALL (%s)", (worker, list(own)))
    if own:
        rows = [(worker, tenant, list(used), list(part)) for tenant, (used, part) in own.items()]
        cursor = connection.cursor()
        await cursor.executemany(
            """
            INSERT INTO limit_parts (worker, tenant, used, part) VALUES (%s, %s, %s, %s)
            ON CONFLICT (worker, tenant) DO UPDATE SET used = excluded.used, part = excluded.part
            """,
            rows,
        )
