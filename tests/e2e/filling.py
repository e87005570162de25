"""A query of a dashboard, filled in as Grafana does it: variables and macros, for one shown time.

What Grafana does in the browser (variables, by the rules of the data source that is asked) and in its PostgreSQL plugin
(macros) is done here in the same order and with the same faults: a macro ends at the first bracket, a variable that is
not there stays as it is written. Sources: `public/app/features/templating` and `macros.go` of the plugin, Grafana 12.4.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Literal
from urllib.parse import quote

Kind = Literal["prometheus", "postgres", "loki"]
Chosen = str | tuple[str, ...]
"""What a variable has: one text, or of a variable of which several may be chosen, those that are."""

_ALL = "$__all"


class BoardFault(Exception):
    """A board that Grafana would load, and that asks nobody or the wrong one."""


@dataclass(frozen=True, slots=True)
class Query:
    """One thing that a board asks, as it is written. `place` is a panel's title, `variable x`, or `annotation x`."""

    board: str
    place: str
    ref: str
    kind: Kind
    text: str
    is_instant: bool = False
    is_time_series: bool = False  # of SQL

    @property
    def name(self) -> str:
        return f"{self.board} / {self.place} / {self.ref}"


@dataclass(frozen=True, slots=True)
class Variable:
    name: str
    type: str
    kind: Kind | None  # of what asks for its options
    query: str
    is_multi: bool
    includes_all: bool
    all_value: str | None
    current: Chosen | None
    options: tuple[str, ...]
    regex: str

    @property
    def is_escaped(self) -> bool:
        """Whether data sources put its value in as a literal by themselves."""
        return self.is_multi or self.includes_all


@dataclass(frozen=True, slots=True)
class Window:
    """The shown time, and how often it is looked at. Grafana's own rule makes the rest of it."""

    start: datetime
    end: datetime
    scrape_interval: timedelta
    points: int = 1000

    @property
    def interval(self) -> timedelta:
        step = math.ceil((self.end - self.start).total_seconds() / self.points)
        return max(timedelta(seconds=step), self.scrape_interval)

    @property
    def rate_interval(self) -> timedelta:
        return max(self.interval + self.scrape_interval, 4 * self.scrape_interval)

    def built_in(self) -> dict[str, str]:
        """The variables that every board has."""
        span = round((self.end - self.start).total_seconds())
        return {
            "__interval": _duration(self.interval),
            "__interval_ms": str(round(self.interval.total_seconds() * 1000)),
            "__rate_interval": _duration(self.rate_interval),
            "__rate_interval_ms": str(round(self.rate_interval.total_seconds() * 1000)),
            "__range": f"{span}s",
            "__range_s": str(span),
            "__range_ms": str(span * 1000),
            "__from": str(round(self.start.timestamp() * 1000)),
            "__to": str(round(self.end.timestamp() * 1000)),
        }


def _duration(span: timedelta) -> str:
    return f"{round(span.total_seconds())}s"


@dataclass(frozen=True, slots=True)
class Values:
    """What is chosen of each variable, and how each is written into a query."""

    window: Window
    variables: Mapping[str, Variable] = field(default_factory=dict)
    chosen: Mapping[str, Chosen] = field(default_factory=dict)
    raw: frozenset[str] = frozenset()  # those that have their own word for All: it is put in as it is

    def opened(self, variable: Variable, options: Sequence[str]) -> Values:
        """With what the variable has when the board is opened: its own choice, or the first of its options."""
        if variable.regex:
            options = _filtered(variable.regex, options)
        current = variable.current
        if variable.type in ("textbox", "constant"):
            return self._with(variable, variable.query if current is None else current)
        wants_all = current in (_ALL, (_ALL,)) or (current is None and variable.includes_all)
        if wants_all and variable.all_value is not None:
            with_all = self._with(variable, variable.all_value)
            return replace(with_all, raw=with_all.raw | {variable.name})
        if wants_all:
            return self._with(variable, tuple(options))
        if current is not None and set([current] if isinstance(current, str) else current) <= set(options):
            return self._with(variable, current)
        first = options[0] if options else ""
        return self._with(variable, (first,) if variable.is_multi and first else first)

    def choosing(self, variable: Variable, value: str) -> Values:
        """With this one value of it."""
        return self._with(variable, (value,) if variable.is_multi else value)

    def _with(self, variable: Variable, chosen: Chosen) -> Values:
        return replace(
            self,
            variables={**self.variables, variable.name: variable},
            chosen={**self.chosen, variable.name: chosen},
            raw=self.raw - {variable.name},
        )


def _filtered(regex: str, options: Sequence[str]) -> list[str]:
    pattern = re.compile(regex.removeprefix("/").removesuffix("/"))
    matches = [pattern.search(option) for option in options]
    return [(match[1] if match.re.groups else match[0]) for match in matches if match]


# $name, [[name:form]], ${name.field:form}: Grafana's own pattern
_PLACE = re.compile(r"\$(\w+)|\[\[(\w+?)(?::(\w+))?\]\]|\$\{(\w+)(?:\.([^:^}]+))?(?::([^}]+))?\}")
_MACRO = re.compile(r"\$([_a-zA-Z0-9]+)\(([^)]*)\)")


def filled(query: Query, values: Values) -> str:
    """The text that the server is sent. Raises `BoardFault` for what it would not understand."""
    built_in = values.window.built_in()

    def put(match: re.Match[str]) -> str:
        name = match[1] or match[2] or match[4]
        form = match[3] or match[6]
        if name in built_in:
            return built_in[name]
        if name not in values.variables:
            return match[0]
        chosen = values.chosen[name]
        if name in values.raw:
            return str(chosen)
        if form is not None:
            return _formatted(chosen, form)
        as_source = _in_sql if query.kind == "postgres" else _in_promql
        return as_source(chosen, values.variables[name])

    text = _PLACE.sub(put, query.text)
    if query.kind == "postgres":
        text = _MACRO.sub(lambda match: _macro(match, values.window), text)
    left = re.search(r"\$\{\w+[^}]*\}|\$__\w+|\[\[\w+\]\]" if query.kind == "postgres" else r"\$\{?[a-z_]\w+", text)
    if left:
        raise BoardFault(f"{query.name}: {left[0]} is no variable and no macro")
    return text


def _formatted(chosen: Chosen, form: str) -> str:
    many = (chosen,) if isinstance(chosen, str) else chosen
    match form:
        case "raw":
            return chosen if isinstance(chosen, str) else ",".join(many)
        case "csv" | "text":
            return ",".join(many)
        case "pipe":
            return "|".join(many)
        case "regex":
            escaped = [re.sub(r"[\\^$*+?.()|\[\]{}/]", r"\\\g<0>", one) for one in many]
            return escaped[0] if len(escaped) == 1 else f"({'|'.join(escaped)})"
        case "sqlstring":
            return ",".join(_literal(one) for one in many)
        case "singlequote":
            return ",".join("'" + one.replace("'", "\\'") + "'" for one in many)
        case "doublequote":
            return ",".join(json.dumps(one) for one in many)
        case "json":
            return json.dumps(chosen)
        case "percentencode":
            return quote(chosen if isinstance(chosen, str) else "{" + ",".join(many) + "}", safe="")
        case "glob":
            return chosen if isinstance(chosen, str) else many[0] if len(many) == 1 else "{" + ",".join(many) + "}"
    raise BoardFault(f"no form of variables is called {form}")


def _in_promql(chosen: Chosen, variable: Variable) -> str:
    if not variable.is_escaped and isinstance(chosen, str):
        return chosen.replace("\\", "\\\\").replace("'", "\\\\'")
    many = (chosen,) if isinstance(chosen, str) else chosen
    escaped = [
        re.sub(r"[$^*{}\[\]'+?.()|]", lambda match: "\\\\" + match[0], one.replace("\\", "\\\\\\\\")) for one in many
    ]
    return escaped[0] if len(escaped) == 1 else f"({'|'.join(escaped)})"


def _in_sql(chosen: Chosen, variable: Variable) -> str:
    if isinstance(chosen, str):
        return _literal(chosen) if variable.is_escaped else chosen.replace("'", "''")
    return ",".join(_literal(one) for one in chosen)


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _macro(match: re.Match[str], window: Window) -> str:
    name, arguments = match[1], [one.strip() for one in match[2].split(",")]
    column = arguments[0]
    start, end = (f"'{at.astimezone(UTC).isoformat().replace('+00:00', 'Z')}'" for at in (window.start, window.end))
    seconds = [str(round(at.timestamp())) for at in (window.start, window.end)]
    match name:
        case "__time":
            return f'{column} AS "time"'
        case "__timeEpoch":
            return f'extract(epoch from {column}) as "time"'
        case "__timeFilter":
            return f"{column} BETWEEN {start} AND {end}"
        case "__timeFrom":
            return start
        case "__timeTo":
            return end
        case "__timeGroup" | "__timeGroupAlias" | "__unixEpochGroup" | "__unixEpochGroupAlias":
            if len(arguments) < 2:
                raise BoardFault(f"macro {name} needs a column and an interval")
            every = _seconds(arguments[1])
            value = column if name.startswith("__unix") else f"extract(epoch from {column})"
            group = f"floor(({value})/{every})*{every}"
            return f'{group} AS "time"' if name.endswith("Alias") else group
        case "__unixEpochFilter":
            return f"{column} >= {seconds[0]} AND {column} <= {seconds[1]}"
        case "__unixEpochFrom":
            return seconds[0]
        case "__unixEpochTo":
            return seconds[1]
    raise BoardFault(f"unknown macro {name}")


def _seconds(text: str) -> int:
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
    found = re.fullmatch(r"(\d+)([smhdw])", text.strip("'\""))
    if found is None:
        raise BoardFault(f"{text} is no interval")
    return int(found[1]) * units[found[2]]


def named(text: str) -> list[str]:
    """The variables that a query names, and what looks like one."""
    return [match[1] or match[2] or match[4] for match in _PLACE.finditer(text)]
