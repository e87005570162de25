"""The demo's face: a live view on a terminal, plain lines elsewhere, and the summary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from controlplane.core.types import Health, Phase, Replica
from controlplane.demo.load import Count
from controlplane.demo.story import Event, Snapshot, Story

_STYLES = {"story": "bold cyan", "alert": "yellow", "decision": "magenta", "replica": "green"}
_EVENTS_SHOWN = 12


class Face(Protocol):
    """Shows a story as it grows."""

    def show(self, story: Story) -> None: ...


@contextmanager
def face(console: Console, *, is_plain: bool) -> Iterator[Face]:
    """A live view on a terminal; elsewhere, or if asked for, a line per event."""
    if is_plain or not console.is_terminal:
        yield _Lines(console)
        return
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        yield _View(live)


class _Lines:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: set[int] = set()

    def show(self, story: Story) -> None:
        for event in story.events:
            if id(event) not in self._shown:
                self._shown.add(id(event))
                self._console.print(event_line(event, story.began), soft_wrap=True)


class _View:
    def __init__(self, live: Live) -> None:
        self._live = live

    def show(self, story: Story) -> None:
        if (snapshot := story.latest) is not None:
            self._live.update(_screen(story, snapshot))


def _screen(story: Story, snapshot: Snapshot) -> RenderableType:
    title = f"controlplane demo · {_clock(snapshot.at - story.began)} · {story.chapter}"
    events = Text("\n").join(event_line(event, story.began) for event in story.events[-_EVENTS_SHOWN:])
    why = Text(f"desired {snapshot.desired}, routable {snapshot.routable}: {snapshot.why}", style="magenta")
    return Panel(
        Group(why, _replica_table(snapshot), _requests(story, snapshot), Text(""), events),
        title=title,
        title_align="left",
        border_style="cyan",
    )


def _replica_table(snapshot: Snapshot) -> Table:
    table = Table(expand=True, box=None, header_style="bold")
    for column in ("replica", "phase", "since", "Slurm job", "endpoint", "health", "running", "waiting"):
        table.add_column(column, justify="right" if column in ("running", "waiting", "since") else "left")
    for replica in snapshot.replicas:
        table.add_row(*_replica_row(replica, snapshot))
    return table


def _replica_row(replica: Replica, snapshot: Snapshot) -> list[str]:
    endpoint, node = snapshot.endpoints.get(replica.name), snapshot.nodes.get(replica.name)
    colour = {Phase.RUNNING: "green", Phase.DRAINING: "yellow", Phase.STOPPING: "red"}.get(replica.phase, "white")
    health = "" if endpoint is None else endpoint.health.lower()
    if endpoint is not None and endpoint.health is Health.READY and replica.phase is Phase.RUNNING:
        health = "[green]routable[/]"
    return [
        replica.name,
        f"[{colour}]{replica.phase}[/]",
        f"{(snapshot.at - replica.phase_since).total_seconds():.0f} s",
        f"{replica.slurm_job_id or ''}{f' on {node}' if node else ''}",
        "" if endpoint is None else endpoint.url,
        health,
        "" if endpoint is None or endpoint.running is None else str(endpoint.running),
        "" if endpoint is None or endpoint.waiting is None else str(endpoint.waiting),
    ]


def _requests(story: Story, snapshot: Snapshot) -> Text:
    count = story.load.count
    style = "bold red" if count.failed or count.broken else "white"
    return Text(
        f"clients {story.load.wanted}   in flight {story.load.in_flight}   done {count.done}   failed {count.failed}   "
        f"broken {count.broken}   TTFT p50 {_seconds(snapshot.ttft_p50)}  p95 {_seconds(snapshot.ttft_p95)}",
        style=style,
    )


def event_line(event: Event, began: datetime) -> Text:
    return Text.assemble(
        (f"{_clock(event.at - began):>7} ", "dim"), (f"{event.kind:<9}", _STYLES[event.kind]), (event.words, "")
    )


def summary(
    console: Console,
    story: Story,
    latencies: list[tuple[str, timedelta, timedelta]],
    spans: list[tuple[str, str, timedelta]],
    faults: list[str],
) -> None:
    """The timeline, the numbers, and the verdict."""
    console.rule("timeline")
    for event in story.events:
        if not event.is_detail:
            console.print(event_line(event, story.began), soft_wrap=True)
    console.rule("summary")
    table = Table(show_header=False, box=None)
    for name, words in _numbers(story, story.load.count, latencies):
        table.add_row(name, words)
    for name, replica, span in spans:
        table.add_row(name, f"{replica}: {_milliseconds(span)}")
    console.print(table)
    for words in story.load.count.first_words:
        console.print(f"  [red]failed:[/] {words}", soft_wrap=True)
    for fault in faults:
        console.print(f"[bold red]not shown:[/] {fault}", soft_wrap=True)
    if not faults:
        console.print("[bold green]All of it was shown.[/]")


def _numbers(
    story: Story, count: Count, latencies: list[tuple[str, timedelta, timedelta]]
) -> Iterator[tuple[str, str]]:
    latest = story.latest
    yield "requests", f"{count.done} done, {count.failed} failed, {count.broken} broken"
    yield "replicas routable", f"{story.most_routable} at most, {latest.routable if latest else '?'} at the end"
    yield "TTFT p50, worst", _seconds(story.worst_ttft)
    for job, since_alert, since_decision in latencies:
        spans = f"{_milliseconds(since_alert)} after the alert came, {_milliseconds(since_decision)} after the decision"
        yield "alert to sbatch", f"{job}: {spans}"


def _clock(span: timedelta) -> str:
    total = span.total_seconds()
    return f"{total:.1f} s" if total < 1000 else f"{total:.0f} s"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


def _milliseconds(span: timedelta) -> str:
    total = span.total_seconds()
    return f"{total * 1000:.0f} ms" if total < 1 else f"{total:.1f} s"
