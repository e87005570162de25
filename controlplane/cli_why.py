"""`controlplane why`: the chain from an alert to a job and its end, drawn for people or as JSON.

JSON documents are those of the operators' API. Words of others (alerts' summaries, Slurm's reasons, probes' messages)
are printed without what could steer a terminal.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime, timedelta

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from controlplane.clock import utc_now
from controlplane.core.explaining import (
    Kind,
    alert_words,
    health_words,
    is_so_because,
    made_because,
    pending,
    stays_because,
    timeline,
    wanted_because,
)
from controlplane.core.stories import RecordedDecision, ReplicaStory, SetStory
from controlplane.core.types import Phase
from controlplane.db import Database, why
from controlplane.web.why import replica_story_document, set_story_document

_STYLES = {
    Kind.ALERT: "yellow",
    Kind.REFUSED: "red",
    Kind.DECISION: "magenta",
    Kind.REPLICA: "green",
    Kind.JOB: "cyan",
    Kind.ENDPOINT: "blue",
    Kind.DRAIN: "yellow",
    Kind.END: "dim",
}
_PHASE_STYLES = {Phase.RUNNING: "green", Phase.ENDED: "dim"}
_SAME_DAY = timedelta(hours=24)
_USUAL_ACTOR = "reconciler"  # not worth a word at every line


async def show(db: Database, subject: str, at: datetime | None, output: str, console: Console) -> None:
    """`output` is text or json. Raises NotFound."""
    story = await why.of(db, subject, at=at, now=utc_now())
    if output == "json":
        console.out(json.dumps(_document(story), indent=2), highlight=False)
        return
    if at is not None:
        console.print(Text(f"as it was at {at:%Y-%m-%d %H:%M:%S} UTC", "dim"))
    for one in (story,) if isinstance(story, SetStory) else story:
        console.print(_set(one) if isinstance(one, SetStory) else _replica(one))


def _document(story: SetStory | tuple[ReplicaStory, ...]) -> object:
    if isinstance(story, SetStory):
        return set_story_document(story)
    return {"replicas": [replica_story_document(one) for one in story]}


# --- one replica -----------------------------------------------------------------------------------------


def _replica(story: ReplicaStory) -> RenderableType:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for event in timeline(story):
        words = Text(_printable(event.words))
        if event.actor is not None and event.actor != _USUAL_ACTOR:
            words.append(f"  by {_printable(event.actor)}", "dim")
        table.add_row(_clock(event.at, story.at), Text(event.kind, _STYLES[event.kind]), words)
    parts: list[RenderableType] = [
        _head(story, f"of {story.replica_set}"),
        _said("made because", made_because(story)),
        _said("is so because", is_so_because(story)),
        *_advice(story),
    ]
    if story.replaced_by is not None:
        parts.append(_said("afterwards", f"{story.replaced_by} was made in its place"))
    return Group(*parts, Padding(table, (0, 0, 1, 2), expand=False))


def _head(story: ReplicaStory, more: str = "") -> Text:
    phase, job = story.newest.to_phase, story.job
    head = Text.assemble((story.name, "bold"), " ", more, " " if more else "")
    head.append(str(phase), _PHASE_STYLES.get(phase, "yellow"))
    head.append(f" since {_clock(story.newest.at, story.at)} UTC")
    if story.slurm_job_id is not None:
        head.append(f", job {story.slurm_job_id}")
    if job is not None:
        head.append(f" {job.raw_state}" + (f" on {job.nodes}" if job.nodes else ""))
    if story.health and phase is not Phase.ENDED:
        head.append(f", endpoint {story.health[-1].health}")
    return head


def _advice(story: ReplicaStory) -> Iterable[Text]:
    if (waits := pending(story)) is not None:
        yield _said("waits since", _clock(waits.since, story.at))
        yield _said("what to do", waits.remedy)


# --- one replica set -------------------------------------------------------------------------------------


def _set(story: SetStory) -> Tree:
    head = Text.assemble((story.name, "bold"), f" (model {_printable(story.model)})")
    if story.decision is not None:
        head.append(f": {story.decision.desired} wanted")
    if story.bounds is not None:
        head.append(f", bounds {story.bounds[0]} to {story.bounds[1]}")
    if story.is_paused:
        head.append(", paused", "yellow")
    tree = Tree(head, guide_style="dim")
    _decision(tree, "as many because", wanted_because(story), story.changed, story.at)
    if story.decision is not None and story.decision != story.changed:
        _decision(tree, "in force", stays_because(story), story.decision, story.at)
    earlier = [one for one in story.refused if one != story.decision]
    if earlier:
        branch = tree.add(Text("refused since then", "red"))
        for one in earlier:
            branch.add(Text(_printable(f"{_clock(one.at, story.at)}  because {one.reason}: {one.explanation}")))
    _alerts(tree, story)
    for endpoint in story.endpoints:
        line = Text(f"fixed endpoint {_printable(health_words(endpoint))}")
        tree.add(line.append(f"  since {_clock(endpoint.at, story.at)}", "dim"))
    if story.replicas or not story.endpoints:
        branch = tree.add(Text("replicas" if story.replicas else "no replicas", "bold"))
        for replica in story.replicas:
            _leaf(branch, replica)
    if story.ended:
        branch = tree.add(Text("ended last", "dim"))
        for replica in story.ended:
            _leaf(branch, replica)
    return tree


def _decision(tree: Tree, title: str, words: str, decision: RecordedDecision | None, now: datetime) -> None:
    line = _said(title, words)
    if decision is not None:
        line.append(f"  {_clock(decision.at, now)} by {_printable(decision.actor)}", "dim")
    branch = tree.add(line)
    for alert in decision.evidence if decision is not None else ():
        branch.add(Text(_printable(f"alert since {_clock(alert.starts_at, now)}: {alert_words(alert)}"), "yellow"))


def _alerts(tree: Tree, story: SetStory) -> None:
    if not story.alerts:
        tree.add(Text("no alert fires" if story.is_now else "no alert fired"))
        return
    branch = tree.add(Text("alerts that fire" if story.is_now else "alerts that fired", "yellow"))
    for alert in story.alerts:
        presses = "presses" if story.pressed(alert) else "does not press"
        branch.add(Text(_printable(f"{_clock(alert.starts_at, story.at)}  {presses}: {alert_words(alert)}")))


def _leaf(branch: Tree, replica: ReplicaStory) -> None:
    leaf = branch.add(_head(replica))
    leaf.add(_said("made because", made_because(replica)))
    leaf.add(_said("is so because", is_so_because(replica)))
    for advice in _advice(replica):
        leaf.add(advice)


# --- words and times -------------------------------------------------------------------------------------


def _said(title: str, words: str) -> Text:
    return Text.assemble((f"{title}: ", "bold"), _printable(words))


def _clock(at: datetime, now: datetime) -> str:
    """UTC; with its date when that is not clear."""
    return f"{at:%H:%M:%S}" if abs(now - at) < _SAME_DAY else f"{at:%Y-%m-%d %H:%M:%S}"


def _printable(words: str) -> str:
    return "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in words)
