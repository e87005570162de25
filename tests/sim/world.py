"""One life: what a seed makes of a Slurm, a Grafana, one or two control planes, operators and clients.

A life has events, many of which begin rounds of the control planes; any step of a round may meet a fault, and anything
may happen between two steps. Then it becomes quiet: no more faults, one control plane, and the world must settle.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import httpx

from controlplane.db import Database, DatabaseError, replica_sets, slurm_jobs
from controlplane.reconcile.alerts import UnreadableAlerts
from tests.sim import product
from tests.sim.database import empty
from tests.sim.dialects import New, Old
from tests.sim.doors import Door, Wire
from tests.sim.grafana import Grafana, Rule
from tests.sim.happenings import Happenings
from tests.sim.invariants import Broken, Watch, has_certainly_failed
from tests.sim.proxies import Proxies
from tests.sim.site import FakeSite
from tests.sim.slurm import NODES, Slurm
from tests.sim.steps import Fate, Killed, Parked, Process, Stage
from tests.sim.visitors import Visitors
from tests.sim.weather import CALM, MOMENTS, Weather

BEGIN = datetime(2026, 1, 1, 12, 0, tzinfo=UTC)
QUIET_ROUNDS = 120
# seconds from one event to the next
_TEMPI = ((0.3, 0.3, 1, 1, 2, 130), (1, 2, 5, 5, 15, 60), (2, 5, 15, 40, 150), (5, 10, 15, 20))
_MODEL = "m"
_NAME = re.compile(rb'"name":\s?"(cp-[a-z0-9-]+)"')
_PROXY_LAG = timedelta(seconds=10)  # a proxy that no announcement reaches reads its directory at least that often


class World:
    """`seed` decides everything. `url` is of a migrated database that nobody else uses; it is emptied first."""

    def __init__(self, seed: int, db: Database, url: str, *, tells: Callable[[str], None] | None = None) -> None:
        self.seed = seed
        self.rng = Random(f"{seed}/world")
        self.now = BEGIN
        self.trace: list[str] = []
        self._tells = tells
        self.stage = Stage(lambda: self.now)
        self.slurm = Slurm(New() if seed % 2 else Old(), Random(f"{seed}/slurm"), BEGIN)
        self.slurm.on_change = lambda words: self.say(f"slurm: {words}")
        self.grafana = Grafana(self._rules())
        self.site = FakeSite(self.slurm, self.grafana, Random(f"{seed}/site"), self.pass_time)
        self.weather = CALM
        self.script: list[tuple[str, Fate]] = []  # fates that are told: of the first step with this in its label
        self.planes: dict[Process, product.ControlPlane] = {}
        self.db, self._url = db, url
        self._numbers = 0
        self._directories: list[tuple[datetime, list[str]]] = []
        self._tempo = self.rng.choice(_TEMPI)
        lifetime, good_until = self.rng.choice(
            [(timedelta(seconds=45), None), (None, None), (None, BEGIN + timedelta(seconds=90))]
        )
        self.token = product.Token(lifetime, good_until)
        self.web = Process("web")
        self.stage.processes.append(self.web)
        self._visitors = Visitors(self)
        self._proxies = Proxies(self, _MODEL)
        self.stage.processes.append(self._proxies.process)
        self._happenings = Happenings(self)

    def _rules(self) -> list[Rule]:
        def rule(action: str, **labels: str) -> Rule:
            name = "-".join((action, *labels.values()))
            return Rule(name, {"alertname": name, "owner": "controlplane", "action": action, **labels})

        blind = rule("scale_down", replica_set="a")
        blind.state_reason = "NoData"
        return [
            rule("scale_up", model=_MODEL),
            rule("scale_down", model=_MODEL),
            rule("scale_up", replica_set="a"),
            rule("drain_node", node="n1"),
            blind,
        ]

    # --- from birth to the end -----------------------------------------------------------------------------

    async def live(self) -> None:
        """Raises `Broken`, with everything that led there in `trace`."""
        await self.begin()
        try:
            await self._make_sets()
            if self.rng.random() < 0.7:
                await self._come_up()
            self.weather = Weather.drawn(self.rng)
            for _ in range(self.rng.randint(16, 26) + (8 if self.is_steady else 0)):
                await self.event()
            await self.settle()
        finally:
            await self.end()

    async def begin(self) -> None:
        await empty(self.db)
        self.instance_id = await slurm_jobs.instance_id(self.db)
        lifetime = self.token.lifetime
        # as long as a lost request can act, or is said to: 120 s is the client's default where tokens do not tell
        grace = timedelta(seconds=120) if lifetime is None else product.REQUEST_TIMEOUT + lifetime
        self.watch = Watch(
            self._url,
            slurm=self.slurm,
            grafana=self.grafana,
            clock=lambda: self.now,
            instance_id=self.instance_id,
            submit_grace=grace,
        )
        self.watch.told = self.say
        self.watch.held_told_at = lambda: self._proxies.told_at
        self.watch.sees_stale_list = lambda: any(process.saw_stale_jobs for process in self.planes)
        self.slurm.on_start = self.watch.on_start
        self.site.asks_slurm = self._on_request
        self.site.answered = self._on_answer
        self.site.on_composed = self._on_composed

    async def end(self) -> None:
        for process in [*self.planes, self.web, self._proxies.process]:
            await self.stage.kill(process)
        self.watch.close()

    async def _make_sets(self) -> None:
        rng = self.rng
        shared: dict[str, Any] = {
            "min_replicas": rng.choice((0, 0, 1)),
            "max_replicas": rng.choice((1, 2, 2, 3)),
            "surge": rng.choice((0, 1, 1)),
            "slurm": product.resources(240 if self.is_steady else rng.choice((240, 3600))),
        }
        specs = [product.a_spec("a", _MODEL, **shared)]
        if rng.random() < 0.2:
            specs.append(product.a_spec("b", _MODEL, **{**shared, "min_replicas": 0, "max_replicas": 1}))
        for spec in specs:
            await replica_sets.apply(self.db, spec, actor=product.OPERATOR, now=self.now)
        wanted = rng.randint(0, specs[0].max_replicas)
        await replica_sets.scale(self.db, "a", replicas=max(wanted, specs[0].min_replicas), actor="ann", now=self.now)
        for _ in range(1 + (rng.random() < 0.5)):
            self.new_plane()

    async def grown(self, replicas: int, *, ticks: int = 4, **changes: Any) -> Process:
        """For scenarios: one plane and the set `a` with so many replicas, which serve after four ticks."""
        spec = product.a_spec("a", _MODEL, **changes)
        await replica_sets.apply(self.db, spec, actor=product.OPERATOR, now=self.now)
        await replica_sets.scale(self.db, "a", replicas=replicas, actor=product.OPERATOR, now=self.now)
        plane = self.new_plane()
        for seconds in (1, 3, 25, 5)[:ticks]:
            self.pass_time(timedelta(seconds=seconds))
            await self.run(*self.rounds(plane, pulls=False))
        return plane

    async def _come_up(self) -> None:
        """All goes well at first."""
        process = next(iter(self.planes))
        for seconds in (1, 3, 25, 5):
            self.pass_time(timedelta(seconds=seconds))
            await self.run(*self.rounds(process, pulls=False))

    def new_plane(self) -> Process:
        self._numbers += 1
        process = Process(f"cp{self._numbers}")
        door, wire = Door(self.db, process, self.stage), Wire(self.site, process, self.stage)
        rng = Random(f"{self.seed}/{process.name}")
        plane = product.control_plane(door, wire, self.token, self.instance_id, lambda: self.now, rng)
        self.planes[process] = plane
        self.stage.processes.append(process)
        self.say(f"{process.name} begins")
        return process

    async def order(self, path: str, body: dict[str, Any]) -> None:
        """For scenarios: what an operator says."""
        await self._visitors.order(path, body)

    @property
    def is_hasty(self) -> bool:
        """Little time passes from one event to the next."""
        return self._tempo is _TEMPI[0]

    @property
    def is_steady(self) -> bool:
        """Rounds follow each other closely, few disturb, and walltimes end."""
        return self._tempo is _TEMPI[-1]

    # --- time and steps ------------------------------------------------------------------------------------

    def say(self, words: str) -> None:
        self.trace.append(f"{self.now:%H:%M:%S}.{self.now.microsecond // 1000:03} {words}")
        if self._tells is not None:
            self._tells(self.trace[-1])

    def pass_time(self, duration: timedelta) -> None:
        self.now += duration
        self.slurm.advance(self.now)

    async def run(self, *works: tuple[Process, Coroutine[Any, Any, None]]) -> None:
        """Let the processes work, step by step, until whoever is awake has ended."""
        for process, work in works:
            process.begin(work)
        while ready := await self.stage.awake():
            if self.weather.hurt and self.rng.random() < 0.04:
                self._happenings.something()
            parked = ready[0] if len(ready) == 1 else self.rng.choice(ready)
            if self._falls_asleep(parked):
                continue
            self._happenings.hurt(parked)
            await self.let_go(parked, self._fate(parked))
        for process in [one for one in self.planes if one.is_dead]:
            await self._bury(process)
        for process in self.stage.processes:
            done = [task for task in process.tasks if task.done()]
            process.tasks = [task for task in process.tasks if not task.done()]
            for task in done:
                if isinstance(error := task.exception(), Exception):
                    raise error

    async def let_go(self, parked: Parked, fate: Fate) -> None:
        self.say(f"{parked.process.name}: {parked.label}{'' if fate is Fate.DONE else f' [{fate}]'}")
        if parked.kind == "db":
            self.pass_time(timedelta(milliseconds=3))
        if parked.label == "replicas.move":
            self.proxies_read()  # at the last moment at which it may say so, if this begins a drain
        await self.stage.let_go(parked, fate)
        self.watch.check_slurm()
        if parked.label in ("replicas.move", "replicas.create"):
            self.watch.check_replicas()
        elif parked.label.startswith("replica_sets.") and ".load" not in parked.label:
            self.watch.check_decisions()
        elif parked.label in ("nodes.follow", "nodes.drain", "nodes.undrain"):
            self.watch.note_marks()

    def _falls_asleep(self, parked: Parked) -> bool:
        process = parked.process
        if process.sleeps_at is None or process.sleeps_at not in parked.label:
            return False
        process.sleeps_at = None
        process.is_asleep = True
        process.wakes_at = self.now + timedelta(seconds=self.rng.choice((3, 20, 130, 400)))
        self.say(f"{process.name} is stopped before {parked.label}")
        return True

    async def _bury(self, process: Process) -> None:
        self.say(f"{process.name} is dead")
        await self.stage.kill(process)
        self.stage.processes.remove(process)
        del self.planes[process]

    # --- faults --------------------------------------------------------------------------------------------

    def _fate(self, parked: Parked) -> Fate:
        for at, (words, fate) in enumerate(self.script):
            if words in parked.label:
                del self.script[at]
                return fate
        if parked.process.dies_at is not None and parked.process.dies_at in parked.label:
            return self.rng.choice((Fate.DIES_BEFORE, Fate.DIES_AFTER))
        if self.slurm.is_gone and parked.label.startswith("slurm"):
            return Fate.REFUSED
        return self.weather.fate(parked, self.rng)

    def _on_request(self, process: Process, request: httpx.Request, composed_at: datetime) -> None:
        self.watch.on_request(process, request.method, request.url.path, _submitted_name(request), request.content)

    def _on_composed(self, process: Process, request: httpx.Request) -> None:
        if (name := _submitted_name(request)) is not None:
            self.watch.on_submit_composed(name)

    def _on_answer(self, process: Process, request: httpx.Request, fate: Fate, status: int, content: bytes) -> None:
        """`status` is 0 where nothing was answered."""
        if (name := _submitted_name(request)) is not None:
            if has_certainly_failed(fate, status, content):
                self.watch.on_submit_failed(name)
        elif request.url.path.endswith("/jobs") and status == 200:
            process.has_seen_jobs = fate in (Fate.DONE, Fate.SLOW, Fate.STALE)
            process.saw_stale_jobs = fate is Fate.STALE
        elif status == 200 and fate in (Fate.DONE, Fate.SLOW):
            if request.url.path.endswith("/reservations"):
                process.told_reservations = tuple(self.slurm.reservations)
                process.calendar = process.calendar if process.told_reservations else ()
            elif request.url.path.endswith("/partitions"):
                process.calendar = process.told_reservations

    # --- what may happen -----------------------------------------------------------------------------------

    async def event(self) -> None:
        rng = self.rng
        self.pass_time(timedelta(seconds=rng.choice(self._tempo)))
        self._clients()
        if self.slurm.is_ill and rng.random() < 0.4:
            self.slurm.recover()
            self.say("slurm: well again")
        for process in self.planes:
            if process.wakes_at is not None and process.wakes_at <= self.now:
                self.wake(process)
        if all(one.is_asleep for one in self.planes):
            self.new_plane()
        for _ in range(rng.choice((0, 0, 0, 0, 1) if self.is_steady else (0, 0, 1, 1, 2))):
            self._happenings.something()
        if rng.random() < 0.12:
            rng.choice(list(self.planes)).dies_at = rng.choice(MOMENTS)
        if rng.random() < 0.15:
            rng.choice(list(self.planes)).sleeps_at = rng.choice(MOMENTS)
        awake = [one for one in self.planes if not one.is_asleep and not one.is_busy]
        chosen = awake if rng.random() < 0.5 else [rng.choice(awake)] if awake else []
        rounds = [work for process in chosen for work in self.rounds(process)]
        await self.run(*rounds, *self._visitors.visits(), *self._proxies.visits())

    def wake(self, process: Process) -> None:
        process.is_asleep, process.wakes_at = False, None
        self.say(f"{process.name} wakes up")

    def rounds(self, process: Process, *, pulls: bool | None = None) -> list[tuple[Process, Coroutine[Any, Any, None]]]:
        """What one process does of its own accord: its loops side by side."""
        plane = self.planes[process]
        works = [self.probes(process), self.follows(process)]
        if pulls or (pulls is None and self.rng.random() < 0.3):
            works.append((process, self._round(process, "alerts", plane.alerts.run_once)))
            works.append((process, self._round(process, "pauses", plane.pauses.run_once)))
            works.append((process, self._round(process, "staleness", plane.staleness.run_once)))
        return works

    def probes(self, process: Process) -> tuple[Process, Coroutine[Any, Any, None]]:
        return process, self._round(process, "endpoints", self.planes[process].endpoints.run_once)

    def follows(self, process: Process) -> tuple[Process, Coroutine[Any, Any, None]]:
        return process, self._round(process, "replicas", self.planes[process].replicas.run_once)

    async def _round(
        self, process: Process, name: str, run_once: Callable[[datetime], Coroutine[Any, Any, str | None]]
    ) -> None:
        if name == "replicas":
            process.has_seen_jobs = process.saw_stale_jobs = False
            process.round_began = self.now
        try:
            sentence = await run_once(self.now)
        except Killed:
            return
        except (DatabaseError, UnreadableAlerts) as error:
            self.say(f"{process.name}: round {name} failed: {type(error).__name__}: {error}")
            return
        if sentence:
            self.say(f"{process.name}: {sentence}")

    # --- clients -------------------------------------------------------------------------------------------

    def _clients(self) -> None:
        """Requests end, and new ones begin where a proxy that may lag behind believes that it may send them."""
        if self.rng.random() < 0.4:
            self.clients_are_answered()
        self.proxies_read()
        self.lagging_proxies_send(timedelta(seconds=self.rng.uniform(0, _PROXY_LAG.total_seconds())))

    def clients_are_answered(self) -> None:
        for engine in self.slurm.engines:
            engine.in_flight = 0

    def proxies_read(self) -> None:
        urls = [row["url"] for row in self.watch.rows("SELECT url FROM routable_endpoints")]
        self._directories.append((self.now, urls))

    def nothing_is_routable(self) -> bool:
        """As far as the newest directory knows."""
        return bool(self._directories) and not self._directories[-1][1]

    def lagging_proxies_send(self, lag: timedelta) -> None:
        """One request to every endpoint of the newest directory that is as old as that: a proxy has no newer."""
        self._directories = [one for one in self._directories if one[0] >= self.now - _PROXY_LAG]
        seen = [urls for at, urls in self._directories if at <= self.now - lag]
        for url in seen[-1] if seen else ():
            host, _, port = url.removeprefix("http://").partition(":")
            for engine in self.slurm.engines:
                is_there = (NODES[engine.node], engine.port) == (host, int(port))
                if is_there and engine.serves_from is not None and engine.serves_from <= self.now:
                    engine.in_flight += 1
                    self.say(f"a request to {engine.name} begins")

    # --- and then ------------------------------------------------------------------------------------------

    async def settle(self) -> None:
        """Quiet: sleepers wake, what is ill gets well, and one control plane, just started, finds what there is."""
        self.say("--- quiet from here on")
        self.weather = CALM
        for process in self.planes:
            self.wake(process)
            process.dies_at = process.sleeps_at = None
        await self.run()
        for process in list(self.planes):
            await self._bury(process)
        self.slurm.recover()
        self.site.blind_to_nodes = self.slurm.engines_crash = False
        self.token.good_until = None
        self.slurm.reservations.clear()
        await self.run(*self._proxies.all_clients_leave())
        for node in NODES:
            await self.run((self.web, self.order(f"nodes/{node}/undrain", {})))
        for engine in self.slurm.engines:
            engine.is_frozen, engine.in_flight = False, 0
        for job in self.slurm.jobs.values():
            job.odd_state = None
        if self.rng.random() < 0.6:
            for rule in self.grafana.rules:
                self.grafana.change(rule, is_firing=False, now=self.now)
        process = self.new_plane()
        calm, why = 0, None
        for number in range(QUIET_ROUNDS):
            self.pass_time(timedelta(seconds=5 if number < 4 else 15))
            await self.run(*self.rounds(process, pulls=number % 4 == 0))
            self.watch.check_replicas()
            self.watch.check_decisions()
            why = self.watch.unsettled()
            calm = calm + 1 if why is None else 0
            if calm == 2:
                return
        raise Broken(f"7: not settled after {QUIET_ROUNDS} quiet rounds: {why}")


def _submitted_name(request: httpx.Request) -> str | None:
    if not request.url.path.endswith("/job/submit"):
        return None
    found = _NAME.search(request.content)
    assert found is not None
    return found[1].decode()
