"""`controlplane get`: what there is, as a table, as JSON, once or until interrupted.

JSON documents are those of the operators' API, so that a script may use either; tables are drawn from the same
documents. While watching, a terminal shows the table of the moment, and a pipe gets a table whenever something changed.
JSON gives one line for every document that is new or has changed, and for one that is gone its last line again with
`"is_gone": true`.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from controlplane.clock import utc_now
from controlplane.core.pending import explain, word_of
from controlplane.core.types import EXISTING_PHASES, Phase
from controlplane.db import (
    Database,
    DbUnavailable,
    alerts,
    audit,
    back_offs,
    decisions,
    endpoints,
    job_logs,
    nodes,
    replica_sets,
    replicas,
    slurm_jobs,
)
from controlplane.web import documents
from controlplane.web.documents import Document

_MOST_SHOWN = 100
_ALERTS_SHOWN_FOR = timedelta(days=30)
_WATCH_SECONDS = 1.0
_COLOURS = {
    **dict.fromkeys(("READY", "RUNNING", "yes", "serves"), "green"),
    **dict.fromkeys(("PENDING", "SUBMITTING", "QUEUED", "UNPROVEN", "DRAINING", "STOPPING", "paused"), "yellow"),
    "stale": "yellow",
    **dict.fromkeys(("FAILING", "firing", "backing off", "serves, backs off"), "red"),
    **dict.fromkeys(("ENDED", "resolved", "cleared"), "dim"),
}


@dataclass(frozen=True, slots=True)
class Column:
    """`value` is given a document and the time; only `-o wide` shows the columns that are wide."""

    title: str
    value: Callable[[Document, datetime], object]
    is_wide: bool = False


@dataclass(frozen=True, slots=True)
class View:
    """How one noun is read and shown. `key` names the fields by which a document is known again."""

    load: Callable[[Database, bool], Awaitable[list[Document]]]
    key: tuple[str, ...]
    columns: tuple[Column, ...]
    nothing: str  # what to say when there is none


async def show(db: Database, noun: str, output: str, console: Console, *, show_all: bool) -> None:
    """Once. `noun` is one of VIEWS; `output` is table, wide or json."""
    view = VIEWS[noun]
    found = await view.load(db, show_all)
    if output == "json":
        console.out(json.dumps(found, indent=2), highlight=False)
    else:
        console.print(_table(view, found, output, utc_now()))


async def watch(db: Database, noun: str, output: str, console: Console, *, show_all: bool) -> None:
    """Until cancelled. While the database is away, what was seen last stays and the title says so."""
    view = VIEWS[noun]
    if output == "json":
        await _watch_json(db, view, console, show_all)
    found, shown, problem = await view.load(db, show_all), None, None
    with ExitStack() as stack:
        live = None
        if console.is_terminal:
            live = stack.enter_context(Live(console=console, auto_refresh=False, screen=True))
        while True:
            table = _table(view, found, output, utc_now())
            if live is not None:
                table.caption = problem or f"{utc_now():%H:%M:%S} UTC, Ctrl-C ends"
                live.update(table, refresh=True)
            elif found != shown:
                console.print(table)
            shown = found
            await asyncio.sleep(_WATCH_SECONDS)
            try:
                found, problem = await view.load(db, show_all), None
            except DbUnavailable as error:
                problem = f"PostgreSQL does not answer; this is what was seen last. {error}"


async def _watch_json(db: Database, view: View, console: Console, show_all: bool) -> None:
    known: dict[tuple[object, ...], Document] = {}
    while True:
        try:
            found = {tuple(one[name] for name in view.key): one for one in await view.load(db, show_all)}
        except DbUnavailable:
            await asyncio.sleep(_WATCH_SECONDS)
            continue
        lines = [one for key, one in found.items() if known.get(key) != one]
        lines += [{**one, "is_gone": True} for key, one in known.items() if key not in found]
        for line in lines:
            console.out(json.dumps(line), highlight=False)
        known = found
        await asyncio.sleep(_WATCH_SECONDS)


def _table(view: View, found: list[Document], output: str, now: datetime) -> Table:
    columns = [column for column in view.columns if output == "wide" or not column.is_wide]
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column.title.upper(), overflow="fold", no_wrap=column.title == "name")
    for one in found:
        table.add_row(*(_cell(column.value(one, now)) for column in columns))
    if not found:
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_row(view.nothing)
    return table


def _cell(value: object) -> Text:
    text = "-" if value is None or value == "" else str(value)
    return Text(text, style=_COLOURS.get(text, ""))


# --- reading ---------------------------------------------------------------------------------------------


async def _replica_sets(db: Database, _show_all: bool) -> list[Document]:
    live = Counter(one.replica_set for one in await replicas.load_live(db) if one.phase in EXISTING_PHASES)
    routable = Counter(one.replica_set for one in await endpoints.load_routable(db))
    latest = await decisions.load_latest(db)
    pauses = await back_offs.load(db)
    return [
        {
            **documents.replica_set_document(one),
            "existing_replicas": live[one.name],
            "routable_endpoints": routable[one.name],
            "back_off": documents.back_off_document(pauses.get(one.name)),
            "latest_decision": documents.decision_document(latest[one.name]) if one.name in latest else None,
        }
        for one in await replica_sets.load_all(db)
    ]


async def _replicas(db: Database, show_all: bool) -> list[Document]:
    live = await replicas.load_live(db)
    ended = [one for one in await replicas.load_newest(db, limit=_MOST_SHOWN) if one.phase is Phase.ENDED]
    health = {one.replica: one.health for one in await endpoints.load_live(db)}
    waiting = {one.replica: _waiting(one) for one in await slurm_jobs.load_pending(db)}
    shown = sorted([*live, *(ended if show_all else ())], key=lambda one: one.id)
    logs = await job_logs.load(db, [one.name for one in shown])
    return [
        {
            **documents.replica_document(one),
            "endpoint_health": health.get(one.name),
            "pending": waiting.get(one.name) if one.phase is Phase.QUEUED else None,
            "log": documents.log_document(logs.get(one.name)),
        }
        for one in shown
    ]


def _waiting(job: slurm_jobs.PendingJob) -> Document:
    """What Slurm lets a job wait for, and what can be done about it."""
    waiting = explain(job.state_reason)
    return {
        "state_reason": job.state_reason or "None",
        "since": job.since.isoformat(),
        "meaning": waiting.meaning,
        "remedy": waiting.remedy_for(job.replica_set, job.job_id),
    }


async def _nodes(db: Database, show_all: bool) -> list[Document]:
    return [documents.node_document(one) for one in await nodes.load(db) if show_all or one.is_active]


async def _endpoints(db: Database, _show_all: bool) -> list[Document]:
    routable = {one.endpoint_id for one in await endpoints.load_routable(db)}
    return [documents.endpoint_document(one, is_routable=one.id in routable) for one in await endpoints.load_live(db)]


async def _alerts(db: Database, show_all: bool) -> list[Document]:
    known = await alerts.load_since(db, utc_now() - _ALERTS_SHOWN_FOR)
    return [documents.alert_document(one) for one in known if show_all or one.is_firing]


async def _decisions(db: Database, _show_all: bool) -> list[Document]:
    return [documents.decision_document(one) for one in await decisions.load_newest(db, limit=_MOST_SHOWN)]


async def _audit(db: Database, _show_all: bool) -> list[Document]:
    return [documents.said_document(one) for one in await audit.load_newest(db, limit=_MOST_SHOWN)]


# --- showing ---------------------------------------------------------------------------------------------


def _field(name: str) -> Callable[[Document, datetime], object]:
    return lambda one, _: one[name]


def _age(name: str) -> Callable[[Document, datetime], object]:
    """How long ago that was: one unit, rounded down."""

    def value(one: Document, now: datetime) -> str | None:
        if one[name] is None:
            return None
        seconds = max(0, int((now - datetime.fromisoformat(one[name])).total_seconds()))
        for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
            if seconds >= 2 * length:
                return f"{seconds // length}{unit}"
        return f"{seconds}s"

    return value


def _state(one: Document, _now: datetime) -> str:
    if one["is_paused"]:
        return "paused"
    if one["back_off"] is not None:
        return "serves, backs off" if one["routable_endpoints"] else "backing off"
    return "serves" if one["routable_endpoints"] else "serves nothing"


def _tried_again(one: Document, _now: datetime) -> str | None:
    """When, in UTC, and what came of the newest try."""
    pause = one["back_off"]
    if pause is None:
        return None
    at = datetime.fromisoformat(pause["next_try_at"])
    return f"{at:%H:%M:%S} after {pause['failures']}: {pause['message'] or pause['reason']}"


def _why_no_more(one: Document, _now: datetime) -> str | None:
    """Its message, and the last line of its log."""
    log = one["log"] or {}
    last = (log.get("tail") or "").rpartition("\n")[2] or log.get("problem")
    return "; log: ".join(part for part in (one["message"], last) if part) or None


def _unless_fixed(name: str) -> Callable[[Document, datetime], object]:
    """A set whose endpoints are fixed has no replicas to count."""
    return lambda one, _: None if one["spec"]["endpoints"] else one[name]


def _bounds(one: Document, _now: datetime) -> str:
    return "fixed" if one["spec"]["endpoints"] else f"{one['min_replicas']}..{one['max_replicas']}"


def _scaling(one: Document, _now: datetime) -> str | None:
    """Who has a say in the count, beside alerts and the spec."""
    if one["spec"]["endpoints"]:
        return None
    said = []
    if pin := one["pin"]:
        said.append(f"pinned at {pin['replicas']}{_end(pin)}")
    said += [f"frozen{' with all' if freeze['is_of_all'] else ''}{_end(freeze)}" for freeze in one["freezes"]]
    if one["spec"]["mode"] != "active":
        said.append(one["spec"]["mode"])
    if bounds := one["operator_bounds"]:
        said.append(f"operator's bounds{_end(bounds)}")
    said += [f"schedule {name}" for name in one["open_schedules"]]
    return ", ".join(said) or "automatic"


def _end(one: Document) -> str:
    return f" until {datetime.fromisoformat(one['until']):%Y-%m-%d %H:%M} UTC" if one["until"] else ""


def _target(one: Document, _now: datetime) -> str:
    labels: Mapping[str, str] = one["labels"]
    return " ".join(f"{name}={labels[name]}" for name in ("model", "replica_set", "replica", "node") if name in labels)


def _waits_for(name: str) -> Callable[[Document, datetime], object]:
    return lambda one, _: one["pending"] and one["pending"][name]


def _node_state(one: Document, _now: datetime) -> str:
    if not one["is_kept_out"]:
        return "cleared"
    return "drained" if one["is_drained"] else "kept out"


def _explanation(one: Document, _now: datetime) -> Any:
    return one["latest_decision"] and one["latest_decision"]["explanation"]


VIEWS: Mapping[str, View] = {
    "replica-sets": View(
        _replica_sets,
        ("name",),
        (
            Column("name", _field("name")),
            Column("model", _field("model")),
            Column("desired", _unless_fixed("desired_replicas")),
            Column("existing", _unless_fixed("existing_replicas")),
            Column("routable", _field("routable_endpoints")),
            Column("bounds", _bounds),
            Column("state", _state),
            Column("scaling", _scaling),
            Column("next try", _tried_again, is_wide=True),
            Column("template", lambda one, _: one["spec"]["template"], is_wide=True),
            Column("priority", lambda one, _: one["spec"]["priority"], is_wide=True),
            Column("newest decision", _explanation, is_wide=True),
        ),
        "There is no replica set; make one with `controlplane apply -f FILE`.",
    ),
    "replicas": View(
        _replicas,
        ("name",),
        (
            Column("name", _field("name")),
            Column("phase", _field("phase")),
            Column("since", _age("phase_since")),
            Column("reason", _field("reason")),
            Column("job", _field("slurm_job_id")),
            Column("waits for", lambda one, _: one["pending"] and word_of(one["pending"]["state_reason"])),
            Column("endpoint", _field("endpoint_health")),
            Column("age", _age("created_at")),
            Column("port", _field("port"), is_wide=True),
            Column("message", _why_no_more, is_wide=True),
            Column("it waits because", _waits_for("meaning"), is_wide=True),
            Column("what to do", _waits_for("remedy"), is_wide=True),
        ),
        "There is no live replica; `--all` shows those that ended.",
    ),
    "endpoints": View(
        _endpoints,
        ("replica_set", "url"),
        (
            Column("url", _field("url")),
            Column("replica set", _field("replica_set")),
            Column("replica", _field("replica")),
            Column("health", _field("health")),
            Column("routable", lambda one, _: "yes" if one["is_routable"] else "no"),
            Column("running", _field("running")),
            Column("waiting", _field("waiting")),
            Column("confirmed", _age("confirmed_at")),
            Column("model", _field("model"), is_wide=True),
            Column("message", _field("message"), is_wide=True),
        ),
        "There is no endpoint.",
    ),
    "alerts": View(
        _alerts,
        ("source", "org_id", "fingerprint"),
        (
            Column("alert", _field("alertname")),
            Column("status", lambda one, _: "stale" if one["stale_since"] else one["status"]),
            Column("action", _field("action")),
            Column("target", _target),
            Column("since", _age("starts_at")),
            Column("confirmed", _age("refreshed_at")),
            Column("ignored because", _field("ignored_reason")),
            Column("source", _field("source"), is_wide=True),
            Column("fingerprint", _field("fingerprint"), is_wide=True),
        ),
        "No alert fires; `--all` shows those that were resolved.",
    ),
    "nodes": View(
        _nodes,
        ("node", "cause"),
        (
            Column("node", _field("node")),
            Column("state", _node_state),
            Column("cause", _field("cause")),
            Column("since", _age("since")),
            Column("until", _field("until")),
            Column("reason", _field("reason")),
            Column("actor", _field("actor")),
            Column("strikes", _field("strikes"), is_wide=True),
            Column("cleared by", _field("cleared_by"), is_wide=True),
        ),
        "No node is kept out of new jobs.",
    ),
    "decisions": View(
        _decisions,
        ("id",),
        (
            Column("ago", _age("at")),
            Column("replica set", _field("replica_set")),
            Column("reason", _field("reason")),
            Column("desired", lambda one, _: f"{one['previous']} -> {one['desired']}"),
            Column("explanation", _field("explanation")),
            Column("actor", _field("actor"), is_wide=True),
            Column("alerts", lambda one, _: ", ".join(one["alerts"]), is_wide=True),
        ),
        "Nothing was decided yet.",
    ),
    "audit": View(
        _audit,
        ("at", "actor", "kind", "subject", "words"),
        (
            Column("ago", _age("at")),
            Column("actor", _field("actor")),
            Column("kind", _field("kind")),
            Column("subject", _field("subject")),
            Column("what", _field("words")),
        ),
        "Nobody said anything yet.",
    ),
}
