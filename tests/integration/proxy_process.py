"""The proxy as a process of its own, for tests in which it must outlive what is done to it: bytes, kills, load.

The rows that it routes by are written here, and nobody probes them: what is routable stays so.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import eventually
from tests.integration.proxy_rig import MODEL, make_key, make_routable, opened
from tests.integration.test_serve import Serve, serving, until_ready

SETTLE_SECONDS = 10.0
"""Within which counters return to 0 and connections are closed, on a busy machine."""


@dataclass
class ProxyProcess:
    """A running `controlplane serve --role proxy`, and a good key."""

    serve: Serve
    key: str

    @property
    def url(self) -> str:
        return self.serve.proxy

    @property
    def port(self) -> int:
        return self.serve.proxy_port

    @property
    def pid(self) -> int:
        return self.serve.process.pid

    def client(self, *, seconds: float = 30.0) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None)
        headers = {"authorization": f"Bearer {self.key}"}
        return httpx.AsyncClient(base_url=self.url, headers=headers, trust_env=False, timeout=seconds, limits=limits)

    async def metrics(self) -> dict[str, float]:
        """Every sample, summed over its labels."""
        async with self.client() as client:
            text = (await client.get("/metrics")).raise_for_status().text
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
        return found

    async def until_at_rest(self) -> None:
        """Return when no request is in flight; fail if one stays."""

        async def is_at_rest() -> bool:
            return (await self.metrics()).get("proxy_in_flight", 0.0) == 0.0

        await eventually(is_at_rest, timeout_seconds=SETTLE_SECONDS)

    def check_log(self) -> None:
        """Fail if it logged what only a mistake of ours can cause."""
        wrong = [one for one in self.serve.events() if "traceback" in one]
        assert not wrong, f"{len(wrong)} faults in the log, the first: {wrong[0]}"


@asynccontextmanager
async def proxy_process(
    directory: Path, database_url: str, *urls: str, model: str = MODEL, **settings: str
) -> AsyncIterator[ProxyProcess]:
    """A proxy before these upstreams, which serve the model. Settings are variables of the environment."""
    async with opened(database_url) as db:
        await make_routable(db, *urls, model=model)
        key = await make_key(db)
    settings = {"CONTROLPLANE_LOG__LEVEL": "warning", **settings}
    with serving(directory, database_url, "--role", "proxy", **settings) as serve:
        await asyncio.to_thread(until_ready, serve, serve.proxy)
        yield ProxyProcess(serve, key)
