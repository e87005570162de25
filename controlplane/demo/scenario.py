"""The demo: a request wakes a model that nobody runs, load comes, alerts fire, more replicas start, and drain again.

Every chapter waits for a fact, within a limit. The demo fails if a fact does not come, if any request failed, if any
stream broke, or if it could not end cleanly; then its exit code is not 0.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

from rich.console import Console

from controlplane import cli_why
from controlplane.clock import utc_now
from controlplane.core.types import ReplicaSetSpec, RoutingPolicy, ScaleDown, ScaleUp, SlurmResources, VllmOptions
from controlplane.db import Database, DatabaseOptions, why
from controlplane.demo.children import MissingProgram, StartFailed
from controlplane.demo.claims import DirectoryInUse
from controlplane.demo.load import Load, LoadOptions
from controlplane.demo.site import Site, SiteOptions
from controlplane.demo.story import Snapshot, Story
from controlplane.demo.view import Face, face, summary

_LOOK_SECONDS = 0.25
_BUSY_CLIENTS = 34
_QUIET_CLIENTS = 2
_RECOVERED_SHARE = 1 / 3  # of the worst time to first token

REPLICA_SET = ReplicaSetSpec(
    name="demo",
    model="demo-8b",
    template="fake-vllm",
    min_replicas=0,
    max_replicas=3,
    slurm=SlurmResources(partition="gpu", gpus_per_node=8, cpus_per_task=8, time_limit_seconds=3600),
    vllm=VllmOptions(args=("--max-num-seqs", "12", "--tokens-per-second", "30"), load_seconds=3),
    scale_up=ScaleUp(cooldown_seconds=10),
    scale_down=ScaleDown(cooldown_seconds=5, stabilization_window_seconds=15),
    start_timeout_seconds=60,
    drain_timeout_seconds=60,
    # More than an engine runs at once, so that its own queue grows, and the alert rules see it. Without it requests
    # would wait in the proxy, which asks for a replica itself: that is shown by the first request.
    routing=RoutingPolicy(max_in_flight=64, slow_start_seconds=5),
)


class ChapterMissed(Exception):
    """A fact that the story tells did not come in time."""


@dataclass(frozen=True, slots=True)
class Chapter:
    title: str
    clients: int
    fact: Callable[[Snapshot, Story], bool]
    limit_seconds: float


@dataclass(frozen=True, slots=True)
class Play:
    """What a demo shows, and on what site."""

    site: SiteOptions
    chapters: tuple[Chapter, ...]
    tokens: int = 60  # of each answer
    request_timeout_seconds: float = 120.0


CHAPTERS = (
    Chapter(
        "nothing runs; one request comes, is held, and is answered by the replica that it asked for",
        1,
        lambda seen, story: seen.routable == 1 and story.load.count.done >= 1,
        60,
    ),
    Chapter(
        f"{_BUSY_CLIENTS} clients ask; one replica cannot keep up",
        _BUSY_CLIENTS,
        lambda seen, _: seen.routable >= 2,
        60,
    ),
    Chapter("two are not enough either", _BUSY_CLIENTS, lambda seen, _: seen.routable >= 3, 60),
    Chapter(
        "three are: first tokens come soon again",
        _BUSY_CLIENTS,
        lambda seen, story: seen.ttft_p95 is not None and seen.ttft_p95 < story.worst_ttft * _RECOVERED_SHARE,
        60,
    ),
    Chapter(
        f"the load ends but for {_QUIET_CLIENTS} clients; two replicas drain under their streams",
        _QUIET_CLIENTS,
        lambda seen, _: seen.routable == 1 and len(seen.replicas) == 1,
        120,
    ),
)

STAND_IN = Play(SiteOptions(REPLICA_SET), CHAPTERS)
"""With stand-ins for vLLM, which are quick: needs nothing but Debian's packages."""


def run(
    directory: Path, play: Play = STAND_IN, *, keep: bool = False, plain: bool = False, database_url: str | None = None
) -> int:
    """Bring the site up, tell the story, clean up. `keep`: stay up afterwards, until Ctrl-C. Returns the exit code."""
    console = Console(highlight=False)
    # TERM ends the demo as Ctrl-C does: with everything it started
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    site = Site(directory, replace(play.site, database_url=database_url))
    began = time.monotonic()
    try:
        with console.status(
            "Starting Slurm, PostgreSQL, Prometheus, Alertmanager, the control plane and its proxy ..."
        ):
            site.start()
        console.print(f"Everything is up after {time.monotonic() - began:.1f} s, below {directory}")
        faults = asyncio.run(_tell(site, play, console, plain=plain))
        if keep:
            with suppress(KeyboardInterrupt):  # which is how it is to end
                _stay(site, play, console)
        return 1 if faults else 0
    except KeyboardInterrupt:
        console.print("Interrupted; ending everything that was started.")
        return 130
    except (MissingProgram, StartFailed, DirectoryInUse) as error:
        console.print(f"[bold red]The demo could not start:[/] {error}", soft_wrap=True)
        return 1
    finally:
        with console.status("Ending everything that was started ..."):
            site.stop()


async def _tell(site: Site, play: Play, console: Console, *, plain: bool) -> list[str]:
    """Tell every chapter and sum up. Returns what was not shown."""
    spec = play.site.replica_set
    load = Load(LoadOptions(site.proxy_url, site.api_key, spec.model, play.tokens, play.request_timeout_seconds))
    faults: list[str] = []
    async with Database(DatabaseOptions(site.database_url)) as db:
        story = Story(db, spec.name, load, began=utc_now() - timedelta(seconds=1))
        running = asyncio.create_task(load.run())
        try:
            with face(console, is_plain=plain) as shown:
                for chapter in play.chapters:
                    await _tell_chapter(chapter, story, shown)
        except ChapterMissed as missed:
            faults.append(str(missed))
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
        await load.finish()
        await story.look(utc_now())
        faults += _faults_of(story, spec)
        summary(console, story, await story.alert_to_job(), await story.starts_and_drains(), faults)
        await _tell_why(db, spec, console)
    return faults


async def _tell_why(db: Database, spec: ReplicaSetSpec, console: Console) -> None:
    """As `controlplane why` tells it: the life of one replica that an alert rule asked for."""
    told = await why.of_set(db, spec.name, at=None, now=utc_now())
    grown = [
        one
        for one in (*told.ended, *told.replicas)
        if one.decision is not None and any(alert.generator_url for alert in one.decision.evidence)
    ]
    if grown:
        console.rule(f"controlplane why {grown[0].name}")
        await cli_why.show(db, grown[0].name, None, "text", console)


async def _tell_chapter(chapter: Chapter, story: Story, shown: Face) -> None:
    story.tell(utc_now(), chapter.title)
    story.load.wanted = chapter.clients
    deadline = time.monotonic() + chapter.limit_seconds
    while True:
        snapshot = await story.look(utc_now())
        shown.show(story)
        if chapter.fact(snapshot, story):
            return
        if time.monotonic() > deadline:
            raise ChapterMissed(f"“{chapter.title}” did not come true within {chapter.limit_seconds:.0f} s")
        await asyncio.sleep(_LOOK_SECONDS)


def _faults_of(story: Story, spec: ReplicaSetSpec) -> list[str]:
    count = story.load.count
    faults = []
    if count.failed or count.broken:
        faults.append(f"{count.failed} requests failed and {count.broken} streams broke")
    if count.done == 0:
        faults.append("no request was answered")
    if story.most_routable < spec.max_replicas:
        faults.append(f"at most {story.most_routable} replicas were routable")
    return faults


def _stay(site: Site, play: Play, console: Console) -> None:
    """Say where everything is, and wait for Ctrl-C."""
    model = play.site.replica_set.model
    variables = {**site.settings(), "SLURM_CONF": str(site.slurm.conf_file)}
    exports = "\n".join(f"export {name}='{value}'" for name, value in variables.items())
    console.rule("everything stays up until Ctrl-C")
    console.print(
        f"proxy          {site.proxy_url}   API key {site.api_key}\n"
        f"control plane  {site.web_url}   operator token {site.operator_token}\n"
        f"Prometheus     {site.prometheus.url}\n"
        f"Alertmanager   {site.alertmanager.url}\n"
        f"slurmrestd     {site.slurm.url}   (SLURM_CONF={site.slurm.conf_file}, logs in {site.slurm.jobs_directory})\n"
        f"PostgreSQL     {site.database_url}\n\n"
        f"curl {site.proxy_url}/v1/chat/completions -H 'Authorization: Bearer {site.api_key}' \\\n"
        f"  -H 'Content-Type: application/json' \\\n"
        f"""  -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'\n\n"""
        f"For the command lines (`controlplane get replicas --watch`, `squeue`):\n{exports}",
        soft_wrap=True,
        markup=False,
    )
    console.rule("for Grafana 12")
    console.print(f"Prometheus   {site.prometheus.url}\n{site.data_sources.told()}", soft_wrap=True, markup=False)
    asyncio.run(_keep_asking(site, play))


async def _keep_asking(site: Site, play: Play) -> None:
    """A few requests all the time: what is looked at then moves."""
    model = play.site.replica_set.model
    load = Load(LoadOptions(site.proxy_url, site.api_key, model, play.tokens, play.request_timeout_seconds))
    load.wanted = _QUIET_CLIENTS
    await load.run()
