"""`GET /health`: this process answers. `GET /ready`: it can work, and if not, which part is to blame and what to do.

Degraded is not unready: with Slurm away, alerts are still stored and requests still served. Unready (503) is what
nothing works without: no database, or one of another schema.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from controlplane.db import Database, DatabaseError, leases, missing_migrations


class PartStatus(StrEnum):
    OK = "ok"
    DEGRADED = "degraded"  # works less well without it
    UNREADY = "unready"  # does not work without it


@dataclass(frozen=True, slots=True)
class Part:
    """How one part of the system is, and what an operator should do about it."""

    status: PartStatus
    message: str
    remedy: str | None = None


def routes(db: Database, slurm_status: Callable[[], Part | None]) -> list[Route]:
    async def answer_alive(_request: Request) -> JSONResponse:
        return JSONResponse({"status": "ok"})

    async def answer_ready(_request: Request) -> JSONResponse:
        parts = await _database_parts(db)
        parts["slurm"] = slurm_status() or Part(PartStatus.OK, "not configured: only fixed endpoints are served")
        statuses = {part.status for part in parts.values()}
        worst = next(status for status in reversed(PartStatus) if status in statuses)
        return JSONResponse(
            {
                "status": "ready" if worst is PartStatus.OK else worst,
                "parts": {name: asdict(part) for name, part in parts.items()},
            },
            status_code=503 if worst is PartStatus.UNREADY else 200,
        )

    return [Route("/health", answer_alive), Route("/ready", answer_ready)]


async def _database_parts(db: Database) -> dict[str, Part]:
    try:
        if missing := await missing_migrations(db):
            lacks = Part(PartStatus.UNREADY, f"lacks {', '.join(missing)}", "run `controlplane migrate`")
            return {"database": Part(PartStatus.OK, "answers"), "schema": lacks}
        held = await leases.load_held(db)
    except DatabaseError as error:
        remedy = "see that PostgreSQL runs and that DATABASE_URL is right; this is tried again by itself"
        return {"database": Part(PartStatus.UNREADY, str(error)[:256], remedy)}
    return {
        "database": Part(PartStatus.OK, "answers"),
        "schema": Part(PartStatus.OK, "is current"),
        "lease": Part(PartStatus.OK, "; ".join(f"{one.name}: {one.holder}, term {one.term}" for one in held))
        if held
        else Part(
            PartStatus.DEGRADED,
            "nobody holds one: nothing is reconciled",
            "start `controlplane serve` with the role all or control",
        ),
    }
