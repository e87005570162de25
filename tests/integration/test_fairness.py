"""Two tenants at one engine that is full: the one that asks for everything does not make the other wait."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from statistics import quantiles

from controlplane.clock import utc_now
from controlplane.db import keys
from tests.conftest import eventually
from tests.integration.arrivals import CUT, WHOLE, Arrivals
from tests.integration.proxy_process import proxy_process
from tests.integration.proxy_rig import make_routable, opened
from tests.integration.test_fake_vllm import running_fake

GREEDY_AT_ONCE = 500
RUNS_AT_ONCE = 16
POLITE_AT_ONCE, POLITE_EACH = 2, 20
FIELDS = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}  # 0.4 s when a slot is free


async def test_500_requests_of_a_greedy_tenant_raise_anothers_p95_by_at_most_a_fifth(
    database_url: str, tmp_path: Path
) -> None:
    with running_fake("--tokens-per-second", "20", "--max-num-seqs", str(RUNS_AT_ONCE)) as fake:
        async with opened(database_url) as db:
            polite, _ = await keys.create(db, "polite", models=None, expires_at=None, actor="test", now=utc_now())
        async with proxy_process(tmp_path, database_url, fake.url) as proxy:
            async with opened(database_url) as db:
                await make_routable(db, fake.url, max_in_flight=RUNS_AT_ONCE)
            alone = await p95_seconds(Arrivals(proxy.port, polite))
            greedy = Arrivals(proxy.port, proxy.key, limit_seconds=120)
            is_over = asyncio.Event()

            async def insist() -> None:
                while not is_over.is_set():
                    await greedy.one(FIELDS)

            crowd = [asyncio.create_task(insist()) for _ in range(GREEDY_AT_ONCE)]
            try:
                await eventually(lambda: greedy.ended.total() >= 32, timeout_seconds=30)
                async with asyncio.timeout(25):  # a fair share of it takes ten
                    beside = await p95_seconds(Arrivals(proxy.port, polite))
            finally:
                for task in crowd:
                    task.cancel()
                await asyncio.gather(*crowd, return_exceptions=True)
            await proxy.until_at_rest()
    assert set(greedy.ended) <= {WHOLE, CUT}
    assert beside <= alone * 1.2, f"alone {alone:.3f} s, beside the greedy {beside:.3f} s"


async def p95_seconds(arrivals: Arrivals) -> float:
    took: list[float] = []

    async def ask() -> None:
        for _ in range(POLITE_EACH):
            began_at = time.monotonic()
            await arrivals.one(FIELDS)
            took.append(time.monotonic() - began_at)

    await asyncio.gather(*(ask() for _ in range(POLITE_AT_ONCE)))
    assert set(arrivals.ended) == {WHOLE}
    return quantiles(took, n=20)[-1]
