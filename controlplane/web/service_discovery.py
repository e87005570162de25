"""`GET /sd/prometheus`: every live endpoint, for Prometheus' http_sd.

No database, no list: a 503 lets Prometheus keep the targets it had, where an empty list would drop them all.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from controlplane.db import Database, endpoints


def routes(db: Database) -> list[Route]:
    async def list_targets(_request: Request) -> JSONResponse:
        return JSONResponse([target_group(target) for target in await endpoints.load_targets(db)])

    return [Route("/sd/prometheus", list_targets)]


def target_group(target: endpoints.Target) -> dict[str, object]:
    """One http_sd group. Labels that do not apply are empty, which to Prometheus is absent."""
    url = urlsplit(target.url)
    host = f"[{url.hostname}]" if ":" in (url.hostname or "") else url.hostname
    labels = {
        "model": target.model,
        "replica_set": target.replica_set,
        "replica": target.replica,
        "node": target.node,
        "slurm_job_id": "" if target.slurm_job_id is None else str(target.slurm_job_id),
    }
    if url.scheme == "https":
        labels["__scheme__"] = "https"
    return {"targets": [f"{host}:{url.port or (443 if url.scheme == 'https' else 80)}"], "labels": labels}
