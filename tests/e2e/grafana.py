"""The demo's data sources, read from the files that it writes for Grafana, and asked as Grafana asks them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import httpx
import psycopg
import yaml
from psycopg.conninfo import make_conninfo

from tests.e2e.filling import Query, Window
from tests.e2e.logql import logql_faults
from tests.e2e.panels import Refused, Rig

_LABEL_VALUES = re.compile(r"label_values\((?:(?P<series>.+?)\s*,\s*)?(?P<label>\w+)\s*\)")
_QUERY_RESULT = re.compile(r"query_result\((?P<query>.+)\)\s*")


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the data sources are, as provisioned."""

    prometheus_url: str
    postgres: str  # libpq's conninfo
    scrape_interval_seconds: int


def environment(directory: Path) -> dict[str, str]:
    """The variables for Grafana's process."""
    lines = (directory / "environment").read_text().splitlines()
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def provisioned(directory: Path) -> Sources:
    """The data sources of the provisioning files below a demo's `grafana`, with `$NAME`s from its environment."""
    variables = environment(directory)
    files = sorted((Path(variables["GF_PATHS_PROVISIONING"]) / "datasources").glob("*.yaml"))
    found: dict[str, Any] = {}
    for file in files:
        for one in yaml.safe_load(_expanded(file.read_text(), variables))["datasources"]:
            found[one["type"]] = one
    prometheus, postgres = found["prometheus"], found["grafana-postgresql-datasource"]
    host, _, port = postgres["url"].rpartition(":")
    return Sources(
        prometheus_url=prometheus["url"],
        postgres=make_conninfo(
            host=host,
            port=port,
            user=postgres["user"],
            dbname=postgres["jsonData"]["database"],
            sslmode=postgres["jsonData"]["sslmode"],
            password=postgres["secureJsonData"]["password"],
        ),
        scrape_interval_seconds=int(prometheus["jsonData"]["timeInterval"].removesuffix("s")),
    )


def _expanded(text: str, variables: Mapping[str, str]) -> str:
    return Template(text).substitute(variables)


@contextmanager
def asked(sources: Sources, window: Window) -> Iterator[Rig]:
    """What the data sources answer for the shown time. Of LogQL only the looks are judged."""
    with (
        httpx.Client(base_url=f"{sources.prometheus_url}/api/v1", trust_env=False, timeout=30) as http,
        psycopg.connect(sources.postgres, autocommit=True) as connection,
    ):
        prometheus, postgres = _Prometheus(http, window), _Postgres(connection)
        yield Rig(
            ask={"prometheus": prometheus.ask, "postgres": postgres.ask, "loki": _look},
            options={"prometheus": prometheus.options, "postgres": postgres.options, "loki": lambda _: ["?"]},
        )


def _look(_query: Query, text: str) -> bool:
    if faults := logql_faults(text):
        raise Refused("; ".join(faults))
    return True


class _Prometheus:
    def __init__(self, http: httpx.Client, window: Window) -> None:
        self._http = http
        self._now = {"time": window.end.timestamp()}
        self._span = {"start": window.start.timestamp(), "end": window.end.timestamp()}
        self._step = {"step": window.interval.total_seconds()}

    def ask(self, query: Query, text: str) -> bool:
        if query.is_instant:
            return any(map(_is_seen, self._values("/query", {"query": text, **self._now})))
        return any(map(_is_seen, self._values("/query_range", {"query": text, **self._span, **self._step})))

    def options(self, text: str) -> list[str]:
        if of_labels := _LABEL_VALUES.fullmatch(text.strip()):
            matched = {"match[]": of_labels["series"]} if of_labels["series"] else {}
            return list(self._get(f"/label/{of_labels['label']}/values", {**matched, **self._span}))
        if of_query := _QUERY_RESULT.fullmatch(text.strip()):
            answer = self._get("/query", {"query": of_query["query"], **self._now})
            return [f"{one['metric']} {one['value'][1]}" for one in answer["result"]]
        raise Refused(f"a variable cannot ask {text!r}")

    def _values(self, path: str, parameters: Mapping[str, Any]) -> Iterator[float]:
        answer = self._get(path, parameters)
        if answer["resultType"] in ("scalar", "string"):
            yield float(answer["result"][1])
            return
        for series in answer["result"]:
            yield from (float(value) for _, value in series.get("values") or [series["value"]])

    def _get(self, path: str, parameters: Mapping[str, Any]) -> Any:
        answer = self._http.get(path, params=parameters).json()
        if answer["status"] != "success":
            raise Refused(f"{answer['error']}: {parameters.get('query', path)}")
        return answer["data"]


def _is_seen(value: float) -> bool:
    return not math.isnan(value)


class _Postgres:
    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection

    def ask(self, query: Query, text: str) -> bool:
        columns, rows = self._rows(text)
        if query.is_time_series or query.place.startswith("annotation "):
            if "time" not in columns:
                raise Refused(f"no column is called time: {', '.join(columns)}")
            times = [row[columns.index("time")] for row in rows]
            if query.is_time_series and times != sorted(times):
                raise Refused("the rows are not in the order of their times")
        return any(
            value is not None for row in rows for name, value in zip(columns, row, strict=True) if name != "time"
        )

    def options(self, text: str) -> list[str]:
        columns, rows = self._rows(text)
        shown = columns.index("__value") if "__value" in columns else 0
        return [str(row[shown]) for row in rows if row[shown] is not None]

    def _rows(self, text: str) -> tuple[list[str], list[tuple[Any, ...]]]:
        try:
            cursor = self._connection.execute(text.encode())
        except psycopg.Error as error:
            raise Refused(f"{' '.join(str(error).split())}: {' '.join(text.split())}") from error
        columns = [column.name for column in cursor.description or ()]
        twice = {name for name in columns if columns.count(name) > 1}
        if twice:
            raise Refused(f"two columns are called {', '.join(sorted(twice))}")
        return columns, cursor.fetchall()
