"""Endpoints: where requests can go, what probes found there, and the views that the proxy and Prometheus are given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from psycopg.rows import DictRow
from pydantic import TypeAdapter

from controlplane.core.engines import runs_at_once
from controlplane.core.hand_over import yields_at
from controlplane.core.nodes import first_node
from controlplane.core.types import Endpoint, HandOver, Health, Replica, RoutableEndpoint, RoutingPolicy, ServedModel
from controlplane.db.pool import Database

_MODEL = "coalesce(r.spec->>'model', s.model) AS model"  # a replica serves what it was started for
_COLUMNS = (
    f"e.id, e.replica_set, {_MODEL}, e.url, e.api_key, r.name AS replica, "
    "coalesce(r.spec->>'probe', s.spec->>'probe') AS probe, "
    "coalesce(r.phase = 'DRAINING', false) AS is_draining, e.health, e.passes, e.fails, e.first_ready_at, "
    "e.failing_since, e.probed_at, e.confirmed_at, e.running, e.waiting, e.generated_tokens, e.message"
)
ROUTABLE = (
    "SELECT endpoint_id, model, replica_set, priority, url, api_key, replica, first_ready_at, ends_at, running_since, "
    "hand_over_margin_seconds, routing, vllm_args FROM routable_endpoints ORDER BY endpoint_id"
)
SERVED = (
    "SELECT model, created_at, is_paused, paused_until, routable, starting_since, start_seconds_p95, can_start, "
    "load_seconds_p95, loading_since, expected_start_at FROM served_models ORDER BY model"
)
_ROUTING: TypeAdapter[RoutingPolicy] = TypeAdapter(RoutingPolicy)
_FROM = "endpoints e JOIN replica_sets s ON s.name = e.replica_set LEFT JOIN replicas r ON r.id = e.replica_id"


@dataclass(frozen=True, slots=True)
class Target:
    """What Prometheus is told of one live endpoint."""

    url: str
    model: str
    replica_set: str
    replica: str
    node: str  # of several, the one where the server answers
    slurm_job_id: int | None


async def ensure(db: Database, replica: Replica, url: str) -> None:
    """Where this running replica serves. A job that started elsewhere must be proven again."""
    async with db.connection() as connection:
        await connection.execute(
            """
            INSERT INTO endpoints AS e (replica_set, replica_id, url, api_key) VALUES (%s, %s, %s, %s)
            ON CONFLICT (replica_id) DO UPDATE
               SET url = excluded.url, health = 'UNPROVEN', passes = 0, fails = 0, failing_since = NULL
             WHERE e.url <> excluded.url
            """,
            (replica.replica_set, replica.id, url, replica.secret),
        )


async def distrust(db: Database, replica: Replica) -> None:
    """The job no longer runs where it did: whatever answers there must prove itself from the start."""
    async with db.connection() as connection:
        await connection.execute(
            "UPDATE endpoints SET health = 'UNPROVEN', passes = 0, fails = 0, failing_since = NULL "
            "WHERE replica_id = %s",
            (replica.id,),
        )


async def load_live(db: Database) -> tuple[Endpoint, ...]:
    """The endpoints of running and draining replicas, and all external ones."""
    async with db.connection() as connection:
        cursor = await connection.execute(
            f"SELECT {_COLUMNS} FROM {_FROM} "
            "WHERE e.replica_id IS NULL OR r.phase IN ('RUNNING', 'DRAINING') ORDER BY e.id"
        )
        return tuple(_endpoint(row) for row in await cursor.fetchall())


async def save(db: Database, endpoint: Endpoint, *, seen: Endpoint) -> None:
    """Keep what a probe found, unless the endpoint was changed since the probe began: moved, distrusted, or probed.

    A control plane that was stopped in the middle of a look must not tell later what it saw then.
    """
    async with db.connection() as connection:
        await connection.execute(
            """
            UPDATE endpoints
               SET health = %s, passes = %s, fails = %s, first_ready_at = %s, failing_since = %s, probed_at = %s,
                   confirmed_at = %s, running = %s, waiting = %s, generated_tokens = %s, message = %s
             WHERE id = %s AND url = %s AND api_key IS NOT DISTINCT FROM %s
               AND health = %s AND passes = %s AND fails = %s AND probed_at IS NOT DISTINCT FROM %s
            """,
            (
                endpoint.health,
                endpoint.passes,
                endpoint.fails,
                endpoint.first_ready_at,
                endpoint.failing_since,
                endpoint.probed_at,
                endpoint.confirmed_at,
                endpoint.running,
                endpoint.waiting,
                endpoint.generated_tokens,
                endpoint.message[:256] if endpoint.message else None,
                endpoint.id,
                seen.url,
                seen.api_key,
                seen.health,
                seen.passes,
                seen.fails,
                seen.probed_at,
            ),
        )


async def load_routable(db: Database) -> tuple[RoutableEndpoint, ...]:
    """What the proxy may send requests to, now."""
    async with db.connection() as connection:
        cursor = await connection.execute(ROUTABLE)
        return routable_of(await cursor.fetchall())


async def load_targets(db: Database) -> list[Target]:
    """Every live endpoint, ready or not: a server that is not ready is worth watching, too."""
    async with db.connection() as connection:
        cursor = await connection.execute(
            f"SELECT e.url, {_MODEL}, s.name AS replica_set, coalesce(r.name, '') AS replica, "
            "coalesce(j.nodes, '') AS node, r.slurm_job_id "
            f"FROM {_FROM} LEFT JOIN slurm_jobs j ON j.replica_id = r.id AND j.job_id = r.slurm_job_id "
            "WHERE e.replica_id IS NULL OR (r.phase IN ('RUNNING', 'DRAINING') AND j.state = 'RUNNING') ORDER BY e.id"
        )
        return [Target(**{**row, "node": first_node(row["node"])}) for row in await cursor.fetchall()]


def routable_of(rows: list[DictRow]) -> tuple[RoutableEndpoint, ...]:
    """What `ROUTABLE` has found."""
    return tuple(_routable(row) for row in rows)


def served_of(rows: list[DictRow]) -> tuple[ServedModel, ...]:
    """What `SERVED` has found."""
    return tuple(ServedModel(**row) for row in rows)


def _routable(row: DictRow) -> RoutableEndpoint:
    margin, since, ends_at = row.pop("hand_over_margin_seconds"), row.pop("running_since"), row["ends_at"]
    row["routing"] = RoutingPolicy() if row["routing"] is None else _ROUTING.validate_python(row["routing"])
    row["runs_at_once"] = runs_at_once(row.pop("vllm_args") or ())
    if ends_at is None or since is None:
        return RoutableEndpoint(**row)
    rules = HandOver() if margin is None else HandOver(margin_seconds=margin)
    return RoutableEndpoint(**row, yields_at=yields_at(rules, since, ends_at))


def _endpoint(row: DictRow) -> Endpoint:
    fields: dict[str, Any] = {**row, "health": Health(row["health"])}
    return Endpoint(**fields)
