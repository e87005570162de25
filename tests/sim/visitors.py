"""Who comes in by the web app: Grafana's notifications, of which some are lost, and operators."""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import httpx

from controlplane.core.types import ReplicaSetSpec, VllmOptions
from controlplane.db import DatabaseError, replica_sets
from tests.sim import product
from tests.sim.doors import Door
from tests.sim.invariants import Broken
from tests.sim.slurm import NODES
from tests.sim.steps import Process

if TYPE_CHECKING:
    from tests.sim.world import World


class Visitors:
    def __init__(self, world: World) -> None:
        self._world = world
        self._image = 1
        app = product.web_app(Door(world.db, world.web, world.stage), lambda: world.now)
        self._http = httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://controlplane", trust_env=False
        )

    def visits(self) -> list[tuple[Process, Coroutine[Any, Any, None]]]:
        rng = self._world.rng
        visits = []
        if self._world.grafana.outbox and rng.random() < 0.6:
            visits.append((self._world.web, self._deliver()))
        if rng.random() < (0.6 if self._world.is_hasty else 0.1 if self._world.is_steady else 0.3):
            visits.append((self._world.web, self._operate()))
        return visits

    async def _deliver(self) -> None:
        """The oldest, or a later one first; once, twice, or never."""
        rng, outbox = self._world.rng, self._world.grafana.outbox
        body = outbox.pop(rng.randrange(len(outbox)) if rng.random() < 0.3 else 0)
        times = rng.choice((0, 1, 1, 1, 2))
        for _ in range(times):
            self._world.grafana.arrives(body, self._world.now)
            headers = {"Authorization": f"Bearer {product.WEBHOOK_TOKEN}"}
            answer = await self._http.post("/webhooks/grafana", content=body, headers=headers)
            self._world.say(f"webhook: {answer.status_code} {answer.text[:80]}")
            if answer.status_code not in (202, 503):
                raise Broken(f"a webhook was answered {answer.status_code}: {answer.text}")
        if not times:
            self._world.say("webhook: lost")

    async def _operate(self) -> None:
        rng = self._world.rng
        live = [
            row["name"]
            for row in self._world.watch.rows("SELECT name FROM replicas WHERE phase <> 'ENDED' ORDER BY id")
        ]
        match rng.randrange(11):
            case 0 | 1:
                await self.order("replica-sets/a/scale", {"replicas": rng.randint(0, 3)})
            case 2 if self._world.weather.slurm:
                await self.order("replica-sets/a/scale", {"replicas": rng.randint(0, 1)})
            case 2:
                low = rng.randint(0, 1)
                await self.order("replica-sets/a/scale", {"min_replicas": low, "max_replicas": low + rng.randint(0, 2)})
            case 3:
                await self.order(f"replica-sets/a/{rng.choice(('pause', 'resume', 'resume'))}", {})
            case 4:
                await self._apply()
            case 5 | 6:
                node = rng.choice(sorted(NODES))
                await self.order(f"nodes/{node}/{rng.choice(('drain', 'drain', 'undrain'))}", {})
            case 7:
                await self._hold()
            case _ if live:
                await self.order(f"replicas/{rng.choice(live)}/{rng.choice(('drain', 'undrain', 'cancel', 'cancel'))}")
            case _:
                await self.order("replica-sets/a/scale", {"replicas": 1})

    async def order(self, path: str, body: dict[str, Any] | None = None) -> None:
        """What an operator says, and is answered."""
        headers = {"Authorization": f"Bearer {product.OPERATOR_TOKEN}"}
        answer = await self._http.post(f"/api/v1/{path}", json=body, headers=headers)
        self._world.say(f"operator: {path} {body or ''} -> {answer.status_code}")
        if answer.status_code not in (200, 400, 409, 503):
            raise Broken(f"an operator was answered {answer.status_code}: {answer.text}")

    async def _hold(self) -> None:
        """No automatic scaling, or one count, for a time or for ever; or not any more."""
        rng = self._world.rng
        until = {"until": (self._world.now + timedelta(seconds=rng.choice((20, 100, 300)))).isoformat()}
        match rng.randrange(6):
            case 0 | 1:
                await self.order(f"{rng.choice(('', 'replica-sets/a/'))}freeze", rng.choice((until, {})))
            case 2 | 3:
                await self.order(f"{rng.choice(('', 'replica-sets/a/'))}unfreeze", {})
            case _:
                await self.order("replica-sets/a/scale", {"replicas": rng.randint(0, 3), **until})

    async def _apply(self) -> None:
        """A changed spec rolls the replicas."""
        self._image += 1
        found = self._world.watch.rows("SELECT spec FROM replica_sets WHERE name = 'a'")
        spec: ReplicaSetSpec = replica_sets.SPECS.validate_python(found[0]["spec"])
        spec = replace(spec, vllm=VllmOptions(image=f"image-{self._image}"))
        try:
            await replica_sets.apply(
                Door(self._world.db, self._world.web, self._world.stage),
                spec,
                actor=product.OPERATOR,
                now=self._world.now,
            )
        except DatabaseError as error:
            self._world.say(f"operator: apply failed: {error}")
