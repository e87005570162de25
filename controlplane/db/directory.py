"""All that a proxy routes by, read at once: one connection, and one journey to the server and back."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from controlplane.core.types import ApiKey, RoutableEndpoint, ServedModel, TenantLimits
from controlplane.db import endpoints, keys, tenants
from controlplane.db.pool import Database


@dataclass(frozen=True, slots=True)
class Listed:
    """Each list was read by a statement of its own: another process may have written between two of them."""

    endpoints: tuple[RoutableEndpoint, ...]  # that requests may be sent to, now
    models: tuple[ServedModel, ...]  # every one that a replica set serves, scaled to zero or not
    keys: tuple[ApiKey, ...]  # that are neither revoked nor expired
    limits: dict[str, TenantLimits]  # of every tenant, by name


async def read(db: Database, now: datetime) -> Listed:
    """Raises DbUnavailable, DatabaseError."""
    async with db.connection() as connection, connection.pipeline():
        routable = await connection.execute(endpoints.ROUTABLE)
        served = await connection.execute(endpoints.SERVED)
        active = await connection.execute(keys.ACTIVE, (now,))
        limits = await connection.execute(tenants.LIMITS)
        return Listed(
            endpoints.routable_of(await routable.fetchall()),
            endpoints.served_of(await served.fetchall()),
            keys.keys_of(await active.fetchall()),
            tenants.limits_of(await limits.fetchall()),
        )
