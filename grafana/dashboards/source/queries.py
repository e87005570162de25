"""What a panel asks, of which of the three data sources. Which Prometheus, PostgreSQL and Loki that is, says a variable
of the board, so that no file knows a site's data sources.

PromQL: rates over `[$__rate_interval]`, and every result aggregated `by` the labels that its legend or table shows.
SQL: only views of the schema `grafana`, values of variables by `chosen`, times by `$__timeFilter(column)`,
`$__timeFrom()` and `$__timeTo()`.
"""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import dedent
from typing import Literal

from grafana_foundation_sdk.cog import variants
from grafana_foundation_sdk.models import loki, prometheus
from grafana_foundation_sdk.models.common import DataSourceRef

PROMETHEUS = DataSourceRef("prometheus", "${prometheus}")
POSTGRES = DataSourceRef("grafana-postgresql-datasource", "${postgres}")
LOKI = DataSourceRef("loki", "${loki}")
MIXED = DataSourceRef("datasource", "-- Mixed --")


@dataclass
class SqlQuery(variants.Dataquery):
    """A query in PostgreSQL's words; the SDK has models for Prometheus and Loki only."""

    raw_sql: str
    format_val: Literal["table", "time_series"]
    ref_id: str | None = None
    datasource: DataSourceRef | None = None

    def to_json(self) -> dict[str, object]:
        return {
            "datasource": self.datasource,
            "editorMode": "code",
            "format": self.format_val,
            "rawQuery": True,
            "rawSql": self.raw_sql,
            "refId": self.ref_id,
        }


Query = prometheus.Dataquery | loki.Dataquery | SqlQuery


def series(expr: str, legend: str) -> Query:
    """PromQL over the shown time; `legend` with labels as `{{model}}`."""
    return prometheus.Dataquery(
        datasource=PROMETHEUS,
        editor_mode=prometheus.QueryEditorMode.CODE,
        expr=_one_line(expr),
        legend_format=legend,
        range_val=True,
        instant=False,
    )


def now(expr: str, legend: str = "") -> Query:
    """PromQL at the end of the shown time: one value for each series."""
    return prometheus.Dataquery(
        datasource=PROMETHEUS,
        editor_mode=prometheus.QueryEditorMode.CODE,
        expr=_one_line(expr),
        legend_format=legend,
        range_val=False,
        instant=True,
    )


def rows(expr: str) -> Query:
    """PromQL for a table: a row for each series, a column for each label, and the value in `Value`.

    Of several such queries in one table the values are in `Value #A`, `Value #B` and so on, and rows with the same
    labels become one.
    """
    return prometheus.Dataquery(
        datasource=PROMETHEUS,
        editor_mode=prometheus.QueryEditorMode.CODE,
        expr=_one_line(expr),
        format_val=prometheus.PromQueryFormat.TABLE,
        range_val=False,
        instant=True,
    )


def sql(text: str) -> Query:
    """Rows of a table, or states of a time line: the column `time`, and one for each line."""
    return SqlQuery(raw_sql=dedent(text).strip(), format_val="table", datasource=POSTGRES)


def sql_series(text: str) -> Query:
    """A column `time`, ascending, a column of text `metric`, and one of numbers."""
    return SqlQuery(raw_sql=dedent(text).strip(), format_val="time_series", datasource=POSTGRES)


def chosen(column: str, variable: str) -> str:
    """The condition in SQL that the column has a value that the variable has. Where nothing is chosen, none."""
    return f"{column} = ANY(ARRAY[${{{variable}:sqlstring}}]::text[])"


def lines(expr: str, *, most: int = 500) -> Query:
    """Lines of logs, in LogQL."""
    return loki.Dataquery(
        datasource=LOKI,
        editor_mode=loki.QueryEditorMode.CODE,
        expr=_one_line(expr),
        max_lines=most,
        query_type="range",
    )


def _one_line(expr: str) -> str:
    return " ".join(expr.split())
