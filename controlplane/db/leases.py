"""A time-limited right to act, judged by the database's clock alone.

A lease saves work; nothing is correct because of it: every write is guarded, whoever does it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from controlplane.db.pool import Database


@dataclass(frozen=True, slots=True)
class Lease:
    name: str
    holder: str
    term: int


async def acquire(db: Database, name: str, holder: str, lasts: timedelta) -> int | None:
    """Take the lease, or keep it. Returns the term held, or None while another holder's has not expired.

    The term grows by one whenever the lease passes to somebody else.
    """
    async with db.connection() as connection:
        cursor = await connection.execute(
            """
            INSERT INTO leases AS l (name, holder, term, expires_at)
            VALUES (%(name)s, %(holder)s, 1, clock_timestamp() + %(lasts)s)
            ON CONFLICT (name) DO UPDATE
               SET holder = excluded.holder,
                   term = l.term + (l.holder <> excluded.holder)::int,
                   expires_at = excluded.expires_at
             WHERE l.holder = excluded.holder OR l.expires_at < clock_timestamp()
            RETURNING term
            """,
            {"name": name, "holder": holder, "lasts": lasts},
        )
        row = await cursor.fetchone()
        return row["term"] if row else None


async def give_back(db: Database, name: str, holder: str) -> None:
    """Let the next one in at once. Harmless when the lease is somebody else's."""
    async with db.connection() as connection:
        await connection.execute(
            "UPDATE leases SET expires_at = '-infinity' WHERE name = %s AND holder = %s", (name, holder)
        )


async def load_held(db: Database) -> list[Lease]:
    """Those that have not expired."""
    async with db.connection() as connection:
        cursor = await connection.execute(
            "SELECT name, holder, term FROM leases WHERE expires_at >= clock_timestamp() ORDER BY name"
        )
        return [Lease(**row) for row in await cursor.fetchall()]
