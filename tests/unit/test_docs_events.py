"""docs/events.md names every sentence that is logged and every metric that is exposed, and no other.

Read from the source by `ast`: what a call logs is its sentence, level and fields. The demo says what it likes.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.unit.documents import PACKAGE, section

LEVELS = frozenset({"debug", "info", "warning", "error", "critical", "exception", "log"})

ELSEWHERE: dict[tuple[str, str], tuple[str, ...]] = {
    ("dependencies.py", "sentence"): (
        "PostgreSQL answers and its schema is current",
        "PostgreSQL does not answer: <>",
        "PostgreSQL refuses: <>",
        "the database lacks the migrations <>",
    ),
    ("dependencies.py", "self.part.message"): ("Slurm <> answers, API <>", "Slurm cannot be used: <>"),
    ("reconcile/loop.py", "sentence"): ("<what the round did>",),
    ("reconcile/replicas.py", "message"): (
        "<> failed starts in a row; next try at <>: <>",
        "<> jobs in a row lost soon; next try at <>: <>",
        "an alert asks to drain it, and that is no node's name",
        "it is marked, and Slurm knows no node of that name",
        "Slurm's nodes are not known, so marks cannot be kept: <>",
        "not kept out, or too few would be left for <>: <>",
        "every node is kept out, so nothing is submitted for <>",
        "<> is an orphan: no replica stands for it",
        "no usable answer, so nothing is submitted or cancelled: <>",
        "schedule <> is not followed: <>, <>: <>",
        "nothing is submitted before <>: <>",
        "reservations cannot be read, so jobs may have to wait for one to end: <>",
        "a walltime of <> is too short to be handed over in time: it takes <>",
        "no successor before its walltime ends: <>",
        "no room for a successor beside it: it leaves first, its walltime ends at <>",
        "hand-over is late: <>, and the walltime ends at <>",
    ),
    ("reconcile/endpoints.py", "sentence"): ("endpoint is ready", "endpoint fails"),
    ("reconcile/actions.py", "f'{_words(call)} failed; trying again'"): (
        "submit of <> failed; trying again",
        "release of <> failed; trying again",
        "cancel of job <> failed; trying again",
        "exclusion of nodes for <> failed; trying again",
    ),
}
"""Sentences that a variable holds where they are logged: by file and expression."""


@dataclass(frozen=True)
class Logged:
    """One sentence that the code logs; `<>` stands for what varies."""

    place: str
    sentence: str
    level: str  # "log" where the call decides
    fields: frozenset[str]
    is_held: bool  # by a variable: one of the calls that could log it does
    takes_more: bool  # fields that a mapping holds


def sources() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE).as_posix()
        if not file.startswith("demo/"):
            yield file, ast.parse(path.read_text())


def logged() -> Iterator[Logged]:
    for file, tree in sources():
        if file == "logs.py":
            continue
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if isinstance(call.func, ast.Attribute) and _is_logger(call.func) and call.func.attr in LEVELS:
                level, argument = call.func.attr, call.args[1 if call.func.attr == "log" else 0]
                fields = frozenset(one.arg for one in call.keywords if one.arg is not None)
                takes_more = len(fields) < len(call.keywords)
                is_held = (file, ast.unparse(argument)) in ELSEWHERE
                for sentence in sentences(file, argument):
                    yield Logged(f"{file}:{call.lineno}", sentence, level, fields, is_held, takes_more)


def _is_logger(called: ast.Attribute) -> bool:
    """`logger.info`, and `logger.opt(...).info`."""
    inner = called.value
    while isinstance(inner, ast.Call | ast.Attribute):
        inner = inner.func if isinstance(inner, ast.Call) else inner.value
    return isinstance(inner, ast.Name) and inner.id == "logger"


def sentences(file: str, argument: ast.expr) -> list[str]:
    if isinstance(argument, ast.Constant):
        return [str(argument.value)]
    if isinstance(argument, ast.IfExp):
        return sentences(file, argument.body) + sentences(file, argument.orelse)
    if (file, ast.unparse(argument)) in ELSEWHERE:
        return list(ELSEWHERE[file, ast.unparse(argument)])
    if isinstance(argument, ast.JoinedStr):
        parts = (str(part.value) if isinstance(part, ast.Constant) else "<>" for part in argument.values)
        return ["".join(parts)]
    pytest.fail(f"{file}: {ast.unparse(argument)} is logged; name its sentences in ELSEWHERE")


def entries(*titles: str) -> dict[str, tuple[str, frozenset[str]]]:
    """The list items of docs/events.md below headings: name -> (kind, fields or labels)."""
    found = {}
    for title in titles:
        items = re.split(r"^- ", section("docs/events.md", title), flags=re.MULTILINE)[1:]
        for item in (re.split(r"\n\n|\n#", one)[0] for one in items):
            flat = " ".join(item.split())
            head = flat.split(". ")[0].removesuffix(".")
            parts = head.split(" · ")
            name = re.fullmatch(r"`(.+)`", parts[0])
            assert name, f"docs/events.md: {flat[:60]}"
            assert name[1] not in found, f"docs/events.md: {name[1]} is there twice"
            fields = frozenset(re.findall(r"`(\w+)`", parts[2])) if len(parts) > 2 else frozenset()
            found[name[1]] = (parts[1], fields)
    return found


def _shape(sentence: str) -> str:
    return sentence if sentence == "<what the round did>" else re.sub(r"<[^>]*>", "<>", sentence)


def test_every_event_is_listed_with_its_level_and_fields_and_no_other() -> None:
    described = {_shape(name): entry for name, entry in entries("The log").items()}
    agreed, differing = set(), {}
    for one in logged():
        assert one.sentence in described, f"{one.place}: {one.sentence!r} is not in docs/events.md"
        levels, fields = described[one.sentence]
        is_level_right = one.level in ("log", *levels.split(", "))
        if is_level_right and (one.fields == fields or (one.takes_more and one.fields < fields)):
            agreed.add(one.sentence)
        else:
            differing[one.sentence] = one
            assert one.is_held, f"docs/events.md tells otherwise: {one}"
    assert not differing.keys() - agreed, f"docs/events.md tells otherwise: {differing.values()}"
    assert len(agreed) > 25
    assert described.keys() == agreed, f"nobody logs {described.keys() - agreed}"


def test_sentences_that_a_variable_holds_are_still_made_in_their_file() -> None:
    plans = ("core/planning.py", "core/back_off.py", "core/hand_over.py", "core/reservations.py")
    seen = ("reconcile/nodes.py", "reconcile/reservations.py", "reconcile/schedules.py")
    rooms = {"reconcile/replicas.py": ("reconcile/replicas.py", *seen, *plans)}
    for (file, _), held in ELSEWHERE.items():
        source = "".join((PACKAGE / one).read_text() for one in rooms.get(file, (file,)))
        for sentence in held:
            fragments = [] if sentence == "<what the round did>" else re.split(r"<>", sentence)
            words = max(fragments, key=len, default="").strip(" :,")
            assert words.split(" of ")[-1] in source, f"{file} no longer says {sentence!r}"


def metrics() -> dict[str, tuple[str, frozenset[str]]]:
    """Name -> (type, labels) of everything that is exposed."""
    kinds = {"Counter": "counter", "Gauge": "gauge", "Histogram": "histogram", "GaugeMetricFamily": "gauge"}
    kinds |= {kind: kind for kind in kinds.values()}  # as the proxy's are declared, in plain numbers
    found = {}
    for _, tree in sources():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call) and len(node.args) > 1):
            kind = kinds.get(call.func.id) if isinstance(call.func, ast.Name) else None
            if kind is not None:
                keywords = {one.arg: one.value for one in call.keywords}
                given = call.args[2] if len(call.args) > 2 else keywords.get("labels", ast.List([]))
                name = str(ast.literal_eval(call.args[0])) + ("_total" if kind == "counter" else "")
                found[name] = (kind, frozenset(ast.literal_eval(given)))
    return found


def test_every_metric_is_listed_with_its_type_and_labels_and_no_other() -> None:
    exposed = metrics()
    described = entries("Metrics of the control plane", "Metrics of the proxy")
    assert len(exposed) > 20
    assert described == exposed
