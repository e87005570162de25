"""How the end-to-end tests fill in a dashboard's queries: as Grafana does, or they would prove nothing."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.e2e.filling import BoardFault, Query, Values, Window, filled
from tests.e2e.logql import logql_faults
from tests.e2e.panels import Answers, Refused, Rig, answers, queries, unexpected, variables

END = datetime(2026, 1, 1, 12, tzinfo=UTC)
WINDOW = Window(END - timedelta(hours=1), END, timedelta(seconds=1))
PROMETHEUS = {"type": "prometheus", "uid": "${prometheus}"}
POSTGRES = {"type": "grafana-postgresql-datasource", "uid": "${postgres}"}


def source(name: str, plugin: str) -> dict[str, Any]:
    return {"type": "datasource", "name": name, "query": plugin}


def asked(name: str, query: str, **more: Any) -> dict[str, Any]:
    return {"type": "query", "name": name, "query": query, "datasource": PROMETHEUS, **more}


def panel(title: str, *targets: dict[str, Any]) -> dict[str, Any]:
    return {"title": title, "type": "timeseries", "targets": [{"refId": "A", **one} for one in targets]}


def prom(expr: str, **more: Any) -> dict[str, Any]:
    return {"datasource": PROMETHEUS, "expr": expr, **more}


def board(*panels: dict[str, Any], given: tuple[dict[str, Any], ...] = (), **more: Any) -> dict[str, Any]:
    sources = [source("prometheus", "prometheus"), source("postgres", "grafana-postgresql-datasource")]
    return {"uid": "b", "panels": list(panels), "templating": {"list": [*sources, *given]}, **more}


def fill(
    text: str, given: dict[str, Any] | None = None, options: tuple[str, ...] = (), kind: Any = "prometheus"
) -> str:
    values = Values(WINDOW)
    if given is not None:
        [variable] = variables(board(given=(given,)))
        values = values.opened(variable, options)
    return filled(Query("b", "p", "A", kind, text), values)


MANY = asked("model", "label_values(model)", multi=True, includeAll=True, current={"value": ["$__all"]})
ONE = asked("model", "label_values(model)")


@pytest.mark.parametrize(
    ("text", "given", "options", "expected"),
    [
        ('x{m=~"$model"}', MANY, ("a", "b.c"), r'x{m=~"(a|b\\.c)"}'),
        ('x{m=~"$model"}', MANY, ("b.c",), r'x{m=~"b\\.c"}'),
        ('x{m="$model"}', ONE, ("b.c", "a"), 'x{m="b.c"}'),
        ('x{m=~"${model:regex}"}', MANY, ("a", "b/c"), r'x{m=~"(a|b\/c)"}'),
        ('x{m=~"${model:pipe}"}', MANY, ("a", "b.c"), 'x{m=~"a|b.c"}'),
        ('x{m=~"[[model]]"}', ONE, ("a",), 'x{m=~"a"}'),
        ('x{m=~"$model|"}', MANY, (), 'x{m=~"()|"}'),
        ('x{m=~"$model"}', {**MANY, "allValue": ".*"}, ("a.b",), 'x{m=~".*"}'),
        ("rate(x[$__rate_interval])", None, (), "rate(x[5s])"),
        ("x[$__range]", None, (), "x[3600s]"),
        ("x[${__interval}]", None, (), "x[4s]"),
    ],
)
def test_promql_is_filled_in_as_by_the_prometheus_data_source(
    text: str, given: dict[str, Any] | None, options: tuple[str, ...], expected: str
) -> None:
    assert fill(text, given, options) == expected


FROM, TO = "'2026-01-01T11:00:00Z'", "'2026-01-01T12:00:00Z'"


@pytest.mark.parametrize(
    ("text", "given", "options", "expected"),
    [
        ("m = ANY(ARRAY[${model:sqlstring}]::text[])", MANY, ("a", "o'b"), "m = ANY(ARRAY['a','o''b']::text[])"),
        ("m IN ($model)", MANY, ("a", "b"), "m IN ('a','b')"),
        ("m = '$model'", ONE, ("o'b",), "m = 'o''b'"),
        ("m IN (${model:singlequote})", MANY, ("a",), "m IN ('a')"),
        ("$__timeFilter(at)", None, (), f"at BETWEEN {FROM} AND {TO}"),
        ("at >= $__timeFrom() AND at < $__timeTo()", None, (), f"at >= {FROM} AND at < {TO}"),
        ("$__timeGroup(at, '5m')", None, (), "floor((extract(epoch from at))/300)*300"),
        ("$__timeGroupAlias(at, $__interval)", None, (), 'floor((extract(epoch from at))/4)*4 AS "time"'),
        ("$__unixEpochFilter(t)", None, (), "t >= 1767265200 AND t <= 1767268800"),
        ("$__time(at)", None, (), 'at AS "time"'),
    ],
)
def test_sql_is_filled_in_as_by_the_postgresql_data_source(
    text: str, given: dict[str, Any] | None, options: tuple[str, ...], expected: str
) -> None:
    assert fill(text, given, options, "postgres") == expected


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('x{m="$modle"}', "prometheus"),
        ("rate(x[$__rate_intervall])", "prometheus"),
        ("${model:nonsense}", "postgres"),
        ("$__timeFilters(at)", "postgres"),
        ("$__timeGroup(at)", "postgres"),
        ("$__timeFilter", "postgres"),
        ("${other}", "postgres"),
    ],
)
def test_what_grafana_would_send_as_it_is_written_is_a_fault(text: str, kind: str) -> None:
    with pytest.raises(BoardFault):
        fill(text, MANY, ("a",), kind)


def test_a_macro_ends_at_the_first_bracket_as_in_the_plugin() -> None:
    assert fill("$__timeFilter(f(at))", kind="postgres") == f"f(at BETWEEN {FROM} AND {TO})"


def test_every_query_is_found_those_of_rows_and_annotations_too() -> None:
    row = {"title": "row", "type": "row", "panels": [panel("inner", prom("up", instant=True))]}
    sql = {"datasource": POSTGRES, "rawSql": "SELECT 1", "format": "time_series", "refId": "B", "hide": True}
    mark = {"name": "Decisions", "datasource": POSTGRES, "target": {"rawSql": "SELECT 2", "refId": "Anno"}}
    found = queries(
        board(
            panel("outer", prom("x", range=True), sql),
            row,
            panel("math", {"datasource": {"type": "__expr__", "uid": "__expr__"}, "expression": "$A"}),
            annotations={"list": [{"name": "built in", "datasource": {"type": "grafana"}, "enable": True}, mark]},
        )
    )
    assert [(one.name, one.is_instant, one.is_time_series) for one in found] == [
        ("b / outer / A", False, False),
        ("b / outer / B", False, True),
        ("b / inner / A", True, False),
        ("b / annotation Decisions / Anno", False, False),
    ]


def test_a_data_source_that_no_variable_names_is_a_fault() -> None:
    with pytest.raises(BoardFault, match="data source variables"):
        queries(board(panel("p", {"datasource": {"type": "prometheus", "uid": "mine"}, "expr": "up"})))
    with pytest.raises(BoardFault, match="data source variables"):
        queries(board(panel("p", {"datasource": {"type": "loki", "uid": "${prometheus}"}, "expr": "up"})))


def test_variables_are_asked_for_in_the_order_in_which_they_need_each_other() -> None:
    given = (asked("replica", 'label_values(up{model="$model"}, replica)'), asked("model", "label_values(model)"))
    assert [one.name for one in variables(board(given=given))] == ["model", "replica"]
    with pytest.raises(BoardFault, match="wait for each other"):
        variables(board(given=(asked("a", "$b"), asked("b", "$a"))))


class Server:
    """Answers with what it was told to, and remembers what it was asked."""

    def __init__(self, has_data: tuple[str, ...] = (), options: tuple[str, ...] = ("a", "b")) -> None:
        self.asked: list[str] = []
        self._has_data = has_data
        self._options = options

    def rig(self) -> Rig:
        return Rig({"prometheus": self._ask}, {"prometheus": lambda _: list(self._options)})

    def _ask(self, query: Query, text: str) -> bool:
        self.asked.append(text)
        if "wrong" in text:
            raise Refused("parse error")
        return text in self._has_data


def test_a_board_is_asked_as_opened_and_with_one_value_of_each_variable() -> None:
    server = Server(has_data=("x(a|b)",))
    answered = answers(board(panel("p", prom("x$model")), given=(MANY,)), server.rig(), WINDOW)
    assert server.asked == ["x(a|b)", "xa"]
    assert answered == Answers({"b / variable model / options": True, "b / p / A": True}, [])


def test_of_a_variable_that_shows_one_thing_any_may_have_the_data() -> None:
    server = Server(has_data=("xb",))
    answered = answers(board(panel("p", prom("x$model")), given=(ONE,)), server.rig(), WINDOW)
    assert answered.has_data["b / p / A"]
    assert answered.faults == []


def test_what_is_empty_refused_or_wrongly_listed_is_told() -> None:
    server = Server(has_data=("full", "listed"), options=())
    shown = board(
        panel("one", prom("full")),
        panel("two", prom("empty")),
        panel("three", prom("wrong")),
        panel("four", prom("listed")),
        panel("five", prom("nothing here")),
        panel("six", prom("perhaps")),
        given=(ONE,),
    )
    answered = answers(shown, server.rig(), WINDOW)
    assert unexpected(
        answered, {"b / four": "x", "b / five / A": "x"}, {"b / six": "x", "b / seven": "x", "c / p": "x"}
    ) == [
        "b / three / A: parse error",
        "b / variable model / options: is empty",
        "b / two / A: is empty",
        "b / four / A: is listed as rightly empty, and has data",
        "b / seven: is listed as rightly empty, and nothing is called so",
    ]


@pytest.mark.parametrize(
    "text",
    [
        '{app="vllm", model=~"a|b"} | slurm_job_id="4711" |= "error" | json | line_format "{{.message}}"',
        'sum by (model) (count_over_time({app="vllm"} |~ "CUDA out of memory" [5m])) > 0',
        '{job="controlplane"} | json level="level" | level=`ERROR` or level="CRITICAL"',
    ],
)
def test_logql_that_loki_would_take_has_no_faults(text: str) -> None:
    assert logql_faults(text) == []


@pytest.mark.parametrize(
    "text",
    [
        '|= "error"',
        '{app="vllm" |= "x"',
        '{app="vllm} |= "x"',
        '{app=vllm} |= "x"',
        '{app=~"", model=""}',
        '{app="vllm"} | jsn',
        'count_over_time({app="vllm"}[5m)',
    ],
)
def test_logql_that_loki_would_refuse_is_told(text: str) -> None:
    assert logql_faults(text)
