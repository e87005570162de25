"""Who said what: the verbs of operators.

They are read from the decisions and the steps that they led to, and from `audit` where there are none.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from controlplane.db.pool import Connection, Database


@dataclass(frozen=True, slots=True)
class Said:
    """One verb. `kind` of the subject: replica set, replica, node, API key ..."""

    at: datetime
    actor: str
    kind: str
    subject: str
    words: str


async def record(connection: Connection, said: Said) -> None:
    """Write one, in the caller's transaction: of what leaves neither a decision nor a replica's step."""
    await connection.execute(
        "INSERT INTO audit (at, actor, kind, subject, words) VALUES (%s, %s, %s, %s, %s)",
        (said.at, said.actor, said.kind, said.subject, said.words),
    )


async def load_newest(db: Database, *, limit: int = 100) -> list[Said]:
    """Everything that anybody but the reconciler said, newest first."""
    async with db.connection() as connection:
        cursor = await connection.execute(
            "SELECT at, actor, kind, subject, words FROM said ORDER BY at DESC, kind, subject, words LIMIT %s", (limit,)
        )
        return [Said(**row) for row in await cursor.fetchall()]
