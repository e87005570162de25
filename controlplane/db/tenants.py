"""Tenants and what they may use. A tenant is made with its first key."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from datetime import datetime

from psycopg.rows import DictRow

from controlplane.core.types import TenantLimits
from controlplane.db import audit
from controlplane.db.errors import NotFound
from controlplane.db.pool import Database

_LIMITS = tuple(field.name for field in fields(TenantLimits))
_COLUMNS = ", ".join(_LIMITS)
NAME = r"[A-Za-z0-9]([A-Za-z0-9_.@-]{0,62}[A-Za-z0-9])?"
LIMITS = f"SELECT name, {_COLUMNS} FROM tenants"
_MOST = {"requests_per_minute": 2**31 - 1, "max_concurrent": 2**31 - 1}  # as wide as their columns
_MOST_TOKENS = 2**53  # exact in every JSON reader
_MOST_WEIGHT = 1000


@dataclass(frozen=True, slots=True)
class Tenant:
    name: str
    limits: TenantLimits
    month_tokens: int  # prompt and completion, of the month that was asked for


async def load_all(db: Database, now: datetime) -> list[Tenant]:
    """By name, with what each has used of the month so far."""
    async with db.connection() as connection:
        cursor = await connection.execute(
            f"SELECT name, {_COLUMNS}, coalesce(m.tokens, 0) AS month_tokens FROM tenants t "
            "LEFT JOIN tenant_months m ON m.tenant = t.name AND m.month = %s ORDER BY name",
            (now.date().replace(day=1),),
        )
        return [Tenant(row["name"], _limits(row), row["month_tokens"]) for row in await cursor.fetchall()]


async def set_limits(
    db: Database,
    name: str,
    changes: Mapping[str, int | float | None],
    *,
    actor: str,
    now: datetime,
    dry_run: bool = False,
) -> tuple[TenantLimits, bool]:
    """Change these limits of a tenant; the others stay. Returns all that are in force then, and whether any changed.

    May be repeated. Proxies hear of it within a second. Raises NotFound: tenants are made with their first key.
    ValueError names the field at fault.
    """
    for field, value in changes.items():
        _check(field, value)
    async with db.transaction() as connection:
        row = None
        if re.fullmatch(NAME, name):
            cursor = await connection.execute(f"SELECT {_COLUMNS} FROM tenants WHERE name = %s FOR UPDATE", (name,))
            row = await cursor.fetchone()
        if row is None:
            raise NotFound(f"there is no tenant {name!r}; it is made with its first key")
        before = _limits(row)
        after = replace(before, **changes)  # type: ignore[arg-type] # checked above
        if after == before or dry_run:
            return after, after != before
        assigned = ", ".join(f"{field} = %({field})s" for field in _LIMITS)
        values = {field: getattr(after, field) for field in _LIMITS}
        await connection.execute(f"UPDATE tenants SET {assigned} WHERE name = %(name)s", {**values, "name": name})
        said = audit.Said(now, actor, "tenant", name, f"limits of {name}: {_words(before, after)}")
        await audit.record(connection, said)
    return after, True


def limits_of(rows: list[DictRow]) -> dict[str, TenantLimits]:
    """What `LIMITS` has found, by the tenant's name."""
    return {row["name"]: _limits(row) for row in rows}


def _limits(row: DictRow) -> TenantLimits:
    return TenantLimits(**{field: row[field] for field in _LIMITS})


def _check(field: str, value: object) -> None:
    if field not in _LIMITS:
        raise ValueError(f"{field}: is no limit")
    if field == "weight":
        if not isinstance(value, int | float) or not 0 < value <= _MOST_WEIGHT:
            raise ValueError(f"weight: must be more than 0, and at most {_MOST_WEIGHT}")
        return
    most = _MOST.get(field, _MOST_TOKENS)
    if value is not None and not (isinstance(value, int) and 1 <= value <= most):
        raise ValueError(f"{field}: must be a whole number from 1 to {most}, or none")


def _words(before: TenantLimits, after: TenantLimits) -> str:
    changed = [field for field in _LIMITS if getattr(before, field) != getattr(after, field)]
    return ", ".join(f"{field} {_word(getattr(before, field))} -> {_word(getattr(after, field))}" for field in changed)


def _word(value: object) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
