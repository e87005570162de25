"""A dashboard's queries: what its panels, annotations and variables ask, and what comes back of each.

Nothing here asks a server: who calls brings a `Rig`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.e2e.filling import BoardFault, Kind, Query, Values, Variable, Window, filled, named

_KINDS: Mapping[str, Kind] = {"prometheus": "prometheus", "grafana-postgresql-datasource": "postgres", "loki": "loki"}
_ASKS_NOBODY = {"__expr__", "datasource", "grafana"}


# --- what is in a board ----------------------------------------------------------------------------------


def queries(board: Mapping[str, Any]) -> list[Query]:
    """Everything that the panels and the annotations ask, hidden queries too. Raises `BoardFault`."""
    sources = {one["name"]: one["query"] for one in _variables(board) if one["type"] == "datasource"}
    found = []
    for panel in _panels(board.get("panels", [])):
        for target in panel.get("targets", []):
            kind = _kind(target.get("datasource") or panel.get("datasource"), sources, panel["title"])
            if kind is not None:
                found.append(_query(board["uid"], panel["title"], kind, target))
    for annotation in board.get("annotations", {}).get("list", []):
        place = f"annotation {annotation['name']}"
        kind = _kind(annotation.get("datasource"), sources, place)
        if kind is not None and annotation.get("enable", True):
            target = {"refId": "Anno", **annotation, **annotation.get("target", {})}
            found.append(_query(board["uid"], place, kind, target))
    twice = {one.name for one in found if [other.name for other in found].count(one.name) > 1}
    if twice:
        raise BoardFault(f"cannot be told apart: {', '.join(sorted(twice))}")
    return found


def variables(board: Mapping[str, Any]) -> list[Variable]:
    """Those that have values, not the data sources', in the order in which Grafana asks for their options."""
    sources = {one["name"]: one["query"] for one in _variables(board) if one["type"] == "datasource"}
    found = [_variable(one, sources) for one in _variables(board) if one["type"] != "datasource"]
    ordered: list[Variable] = []
    while found:
        names = {one.name for one in found}
        free = [one for one in found if not names & (set(named(one.query)) - {one.name})]
        if not free:
            raise BoardFault(f"{board['uid']}: variables wait for each other: {', '.join(sorted(names))}")
        ordered += free
        found = [one for one in found if one not in free]
    return ordered


def _variables(board: Mapping[str, Any]) -> list[dict[str, Any]]:
    return list(board.get("templating", {}).get("list", []))


def _panels(panels: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    for panel in panels:
        yield panel
        yield from _panels(panel.get("panels", []))


def _kind(source: Mapping[str, str] | None, sources: Mapping[str, str], place: str) -> Kind | None:
    """Raises `BoardFault` unless the data source is one that a variable of the board names."""
    if source is None:
        raise BoardFault(f"{place}: no data source")
    if source["type"] in _ASKS_NOBODY:
        return None
    named = re.fullmatch(r"\$\{(\w+)\}", source.get("uid", ""))
    if named is None or sources.get(named[1]) != source["type"]:
        raise BoardFault(f"{place}: {source} is not what one of the board's data source variables says")
    return _KINDS[source["type"]]


def _query(board: str, place: str, kind: Kind, target: Mapping[str, Any]) -> Query:
    return Query(
        board=board,
        place=place,
        ref=target["refId"],
        kind=kind,
        text=target["rawSql"] if kind == "postgres" else target["expr"],
        is_instant=kind == "prometheus" and bool(target.get("instant")) and not target.get("range"),
        is_time_series=target.get("format") == "time_series",
    )


def _variable(found: Mapping[str, Any], sources: Mapping[str, str]) -> Variable:
    asked = found.get("query", "")
    text = asked.get("query", asked.get("rawSql", "")) if isinstance(asked, Mapping) else str(asked)
    is_query = found["type"] == "query"
    current = (found.get("current") or {}).get("value")
    if isinstance(current, list):
        current = tuple(current)
    return Variable(
        name=found["name"],
        type=found["type"],
        kind=_kind(found.get("datasource"), sources, f"variable {found['name']}") if is_query else None,
        query=text,
        is_multi=bool(found.get("multi")),
        includes_all=bool(found.get("includeAll")),
        all_value=found.get("allValue") or None,
        current=current or None,
        options=() if is_query else tuple(option["value"] for option in found.get("options", [])) or (text,),
        regex=found.get("regex") or "",
    )


def of_variable(board: Mapping[str, Any], variable: Variable) -> Query:
    """What a variable of type `query` asks for."""
    assert variable.kind is not None
    return Query(board["uid"], f"variable {variable.name}", "options", variable.kind, variable.query)


# --- what comes back -------------------------------------------------------------------------------------

Asker = Callable[[Query, str], bool]
"""Ask what was filled in; says whether anything is to be seen of the answer. Raises `Refused`."""


class Refused(Exception):
    """The server does not understand the query, or Grafana would not its answer."""


@dataclass(frozen=True, slots=True)
class Answers:
    """Of every query of a board, by name: whether anything came, and of those that were refused, why."""

    has_data: Mapping[str, bool]
    faults: Sequence[str]


@dataclass(frozen=True, slots=True)
class Rig:
    """What can be asked. `options` gives those of a variable; raises `Refused`."""

    ask: Mapping[Kind, Asker]
    options: Mapping[Kind, Callable[[str], list[str]]]
    tried_options: int = 5  # of a variable of which one is shown at a time


def answers(board: Mapping[str, Any], rig: Rig, window: Window) -> Answers:
    """Ask everything that the board asks when it is opened.

    Where a variable shows one thing at a time, a query has data if it has some for any of the first. Then each variable
    is given a single value, which is written in another way: this must be understood, and may be empty.
    """
    faults: list[str] = []
    has_data: dict[str, bool] = {}
    values = Values(window)
    offered: dict[str, tuple[str, ...]] = {}
    for variable in variables(board):
        options: Sequence[str] = variable.options
        if variable.kind is not None:
            asked = of_variable(board, variable)
            try:
                options = rig.options[variable.kind](filled(asked, values))
            except (Refused, BoardFault) as refused:
                faults.append(f"{asked.name}: {refused}")
                options = ()
            has_data[asked.name] = bool(options)
        offered[variable.name] = tuple(options)
        values = values.opened(variable, options)
    shown = list(_shown(values, offered, rig.tried_options))
    for query in queries(board):
        has_data[query.name] = False
        used = set(named(query.text))
        for number, one in enumerate(shown):
            if number and not used & {name for name in one.chosen if one.chosen[name] != values.chosen[name]}:
                continue
            try:
                has_data[query.name] |= rig.ask[query.kind](query, filled(query, one))
            except (Refused, BoardFault) as refused:
                faults.append(f"{query.name}: {refused}")
                break
            if has_data[query.name]:
                break
        for name in used & set(offered):
            if values.variables[name].is_multi and offered[name]:
                single = values.choosing(values.variables[name], offered[name][0])
                try:
                    rig.ask[query.kind](query, filled(query, single))
                except (Refused, BoardFault) as refused:
                    faults.append(f"{query.name}, with one {name}: {refused}")
    return Answers(has_data, faults)


def _shown(values: Values, offered: Mapping[str, Sequence[str]], most: int) -> Iterator[Values]:
    yield values
    for name, variable in values.variables.items():
        if variable.kind is not None and not variable.is_multi and not isinstance(values.chosen[name], tuple):
            for option in offered[name][:most]:
                yield values.choosing(variable, option)


def unexpected(answered: Answers, never: Mapping[str, str], sometimes: Mapping[str, str]) -> list[str]:
    """What is empty and not listed, or listed and not empty. A name without its last part is of a whole panel."""
    found = list(answered.faults)
    refused = {fault.partition(": ")[0].partition(", with")[0] for fault in answered.faults}
    for name, has_data in answered.has_data.items():
        names = (name, name.rpartition(" / ")[0])
        is_never = any(one in never for one in names)
        if not has_data and not is_never and not any(one in sometimes for one in names) and name not in refused:
            found.append(f"{name}: is empty")
        if has_data and is_never:
            found.append(f"{name}: is listed as rightly empty, and has data")
    known = {one for name in answered.has_data for one in (name, name.rpartition(" / ")[0])}
    boards = {name.partition(" / ")[0] for name in known}
    stale = [one for one in (*never, *sometimes) if one.partition(" / ")[0] in boards and one not in known]
    return found + [f"{name}: is listed as rightly empty, and nothing is called so" for name in stale]
