"""`python -m controlplane.demo.fake_dcgm --node n1=9400 --node n2=9401 --gpus 8 --jobs DIR --replicas URL`.

One process is the exporter of every node, each on a port of its own of 127.0.0.1, with `/metrics` and `/health`.
`POST /fault` with `{"gpu": 3, "xid": 79}` pretends that the driver reported an XID there.

How busy a job is comes from the replicas that the service discovery at `--replicas` names, asked once a second. A
replica that does not answer, or a job that is none, has GPUs that are held and idle.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import httpx
import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from controlplane.demo.fake_dcgm import jobs
from controlplane.demo.fake_dcgm.gpus import NodeGpus

_LOOK_SECONDS = 1.0
_LEAST_BUSY_SHARE = 0.5  # a GPU that decodes one sequence is already half busy


def application(nodes: Mapping[int, NodeGpus], jobs_directory: Path, busy: Mapping[str, float]) -> Starlette:
    """The exporters of `nodes`, which are told apart by the port that was asked. `busy` may change meanwhile."""

    def asked(request: Request) -> NodeGpus:
        _, port = request.scope["server"]
        return nodes[port]

    async def metrics(request: Request) -> Response:
        node = asked(request)
        text = node.render(jobs.read(jobs_directory / node.node), busy, time.monotonic())
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    async def health(_request: Request) -> Response:
        return PlainTextResponse("OK")

    async def fault(request: Request) -> Response:
        node = asked(request)
        try:
            said = await request.json()
            node.gpus[int(said["gpu"])].fail(int(said["xid"]), time.monotonic())
        except (ValueError, KeyError, TypeError, IndexError):
            return PlainTextResponse('{"gpu": index, "xid": number} is wanted\n', 400)
        return Response(status_code=204)

    return Starlette(
        routes=[Route("/metrics", metrics), Route("/health", health), Route("/fault", fault, methods=["POST"])]
    )


async def follow(replicas_url: str, full_at_requests: int, busy: dict[str, float]) -> None:
    """Keep `busy` (by job id, 0 to 1) as the replicas tell it, for ever."""
    async with httpx.AsyncClient(timeout=_LOOK_SECONDS, trust_env=False) as client:
        while True:
            seen: dict[str, float] = {}
            with suppress(httpx.HTTPError, ValueError, KeyError):
                for group in (await client.get(replicas_url)).raise_for_status().json():
                    if job := group["labels"].get("slurm_job_id"):
                        running = await _running(client, group["targets"][0])
                        seen[job] = busy_with(running, full_at_requests)
            busy.clear()
            busy.update(seen)
            await asyncio.sleep(_LOOK_SECONDS)


def busy_with(running: float, full_at_requests: int) -> float:
    """How busy GPUs are that run so many requests at once."""
    return 0.0 if running <= 0 else min(1.0, _LEAST_BUSY_SHARE + (1 - _LEAST_BUSY_SHARE) * running / full_at_requests)


async def _running(client: httpx.AsyncClient, target: str) -> float:
    try:
        text = (await client.get(f"http://{target}/metrics")).raise_for_status().text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == "vllm:num_requests_running"
        )
    except (httpx.HTTPError, ValueError):
        return 0.0


async def _serve(given: argparse.Namespace) -> None:
    now = time.monotonic()
    nodes = {port: NodeGpus(name, given.gpus, now) for name, port in given.node}
    busy: dict[str, float] = {}
    bound = []
    for port in nodes:
        one = socket.socket()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind(("127.0.0.1", port))
        bound.append(one)
    app = application(nodes, given.jobs, busy)
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="warning", access_log=False))
    following = asyncio.create_task(follow(given.replicas, given.full_at_requests, busy)) if given.replicas else None
    await server.serve(sockets=bound)
    if following is not None:
        following.cancel()


def _node(text: str) -> tuple[str, int]:
    name, _, port = text.partition("=")
    return name, int(port)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m controlplane.demo.fake_dcgm", description=(__doc__ or "").strip())
    add = parser.add_argument
    add("--node", type=_node, action="append", required=True, help="NAME=PORT of a node; may be said several times")
    add("--gpus", type=int, default=8, help="GPUs of each node")
    add("--jobs", type=Path, required=True, help="job mapping files, in a folder for each node")
    add("--replicas", default="", help="the control plane's /sd/prometheus; without it, no GPU is ever busy")
    add("--full-at-requests", type=int, default=12, help="requests at once with which a replica's GPUs are fully busy")
    return parser


if __name__ == "__main__":
    asyncio.run(_serve(_parser().parse_args()))
