"""A board: its panels in lines on Grafana's grid, its variables, its links to the others, and the decisions as marks.

At 1920 x 1080 about the first 26 rows of the grid are seen without scrolling: what an operator has to see stands there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from zlib import crc32

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import (
    AnnotationContainer,
    AnnotationQuery,
    Dashboard,
    DashboardCursorSync,
    DashboardDashboardTemplating,
    DashboardDashboardTime,
    DashboardLink,
    DashboardLinkType,
    GridPos,
    Panel,
    RowPanel,
    TimePickerConfig,
    VariableHide,
    VariableModel,
    VariableOption,
    VariableRefresh,
    VariableSort,
    VariableType,
)

from grafana.dashboards.source.panels import Link
from grafana.dashboards.source.queries import POSTGRES, PROMETHEUS, sql

COLUMNS = 24

FLEET = "controlplane-fleet"
MODEL = "controlplane-model"
REPLICA = "controlplane-replica"
GPU_NODES = "controlplane-gpu-nodes"
CONTROL_PLANE = "controlplane-control-plane"
TENANTS = "controlplane-tenants"
TITLES = {
    FLEET: "Fleet",
    MODEL: "Model",
    REPLICA: "Replica and job",
    GPU_NODES: "GPU nodes",
    CONTROL_PLANE: "Control plane",
    TENANTS: "Tenants",
}
"""Every board's uid and title, in the order of the links."""


def to_board(uid: str, title: str, **variables: str) -> Link:
    """A click leads to that board, with these of its variables set, the same data sources and the same time.

    Values of the clicked row are `${__data.fields.model:percentencode}`, labels of the clicked series
    `${__field.labels.model:percentencode}`; see `cell` and `label`.
    """
    given = "".join(f"var-{name}={value}&" for name, value in variables.items())
    sources = "&".join(f"${{{name}:queryparam}}" for name in ("prometheus", "postgres", "loki"))
    return Link(title, f"/d/{uid}?{given}{sources}&${{__url_time_range}}")


def cell(name: str) -> str:
    """The clicked row's value of that column, for `to_board`."""
    return f"${{__data.fields.{name}:percentencode}}"


def label(name: str) -> str:
    """The clicked series' label, for `to_board`."""
    return f"${{__field.labels.{name}:percentencode}}"


def of_prometheus(
    name: str, title: str, query: str, *, description: str, many: bool = True, is_hidden: bool = False
) -> VariableModel:
    """A variable with what `label_values(...)` gives. `many`: several, or all, may be chosen."""
    asked: dict[str, object] = {
        "qryType": 1,
        "query": query,
        "refId": "PrometheusVariableQueryEditor-VariableQuery",
    }
    variable = _asked(name, title, description, many, is_hidden)
    variable.datasource, variable.query, variable.definition = PROMETHEUS, asked, query
    return variable


def of_sql(
    name: str, title: str, query: str, *, description: str, many: bool = False, is_hidden: bool = False
) -> VariableModel:
    """A variable with the first column of a query on the views for Grafana."""
    variable = _asked(name, title, description, many, is_hidden)
    text = " ".join(query.split())
    variable.datasource, variable.query, variable.definition = POSTGRES, text, text
    variable.sort = VariableSort.DISABLED  # the query's own order
    return variable


def typed(name: str, title: str, value: str, *, description: str) -> VariableModel:
    """A variable that people type."""
    option = VariableOption(text=value, value=value)
    return VariableModel(
        VariableType.TEXTBOX,
        name,
        title,
        VariableHide.DONT_HIDE,
        False,
        description,
        value,
        None,
        option,
        options=[option],
    )


@dataclass
class Board:
    """`marks`: which decisions are marked on every panel, as a condition on `grafana.decisions`; empty: none."""

    uid: str
    description: str
    variables: Sequence[VariableModel] = ()
    marks: str = "true"
    shows_last: str = "1h"
    refreshes_every: str = "30s"
    _panels: list[Panel | RowPanel] = field(default_factory=list)
    _next_row: int = 0

    def line(self, height: int, *panels: Panel) -> None:
        """Panels side by side, `height` rows of 38 pixels high. Those without a width share what the others leave."""
        widths = [panel.grid_pos.w if panel.grid_pos else 0 for panel in panels]
        open_ones = widths.count(0)
        left = COLUMNS - sum(widths)
        if (open_ones and left < open_ones) or (not open_ones and left):
            raise ValueError(f"the widths of {[panel.title for panel in panels]} do not fill {COLUMNS} columns")
        x = 0
        for panel, given in zip(panels, widths, strict=True):
            width = given
            if not given:
                width = left // open_ones
                left, open_ones = left - width, open_ones - 1
            panel.grid_pos = GridPos(height, width, x, self._next_row)
            x += width
            self._panels.append(panel)
        self._next_row += height

    def section(self, title: str) -> None:
        """A heading above the lines that follow."""
        number = crc32(f"section {title}".encode()) % 1_000_000 + 1
        self._panels.append(RowPanel(title=title, grid_pos=GridPos(1, COLUMNS, 0, self._next_row), id_val=number))
        self._next_row += 1

    def document(self) -> Dashboard:
        """The board in Grafana's model."""
        ids = [panel.id_val for panel in self._panels]
        if len(set(ids)) != len(ids):
            raise ValueError(f"two panels of {self.uid} have one id: give one of them another title")
        return Dashboard(
            uid=self.uid,
            title=TITLES[self.uid],
            description=self.description,
            tags=["controlplane"],
            timezone="browser",
            editable=True,
            graph_tooltip=DashboardCursorSync.CROSSHAIR,
            time=DashboardDashboardTime(f"now-{self.shows_last}", "now"),
            timepicker=TimePickerConfig(),
            refresh=self.refreshes_every,
            version=1,
            panels=self._panels,
            templating=DashboardDashboardTemplating([*_sources(), *self.variables]),
            annotations=AnnotationContainer([_decisions(self.marks)] if self.marks else []),
            links=[_link(uid, title) for uid, title in TITLES.items() if uid != self.uid],
        )

    def to_json(self) -> str:
        """The file's content."""
        return json.dumps(self.document(), cls=JSONEncoder, indent=2, ensure_ascii=False) + "\n"


def _sources() -> list[VariableModel]:
    kinds = {
        "prometheus": ("Prometheus", "prometheus", "prometheus", "That scrapes replicas, control plane and proxies."),
        "postgres": (
            "PostgreSQL",
            "grafana-postgresql-datasource",
            "controlplane-postgres",
            "The control plane's database, by a role that reads the views for Grafana only.",
        ),
        "loki": ("Loki", "loki", "loki", "That has the logs of jobs and of the control plane."),
    }
    return [
        VariableModel(
            VariableType.DATASOURCE,
            name,
            title,
            VariableHide.DONT_HIDE,
            False,
            description,
            plugin,
            current=VariableOption(text=uid, value=uid),
            options=[],
            refresh=VariableRefresh.ON_DASHBOARD_LOAD,
            regex="",
        )
        for name, (title, plugin, uid, description) in kinds.items()
    ]


def _asked(name: str, title: str, description: str, many: bool, is_hidden: bool) -> VariableModel:
    return VariableModel(
        VariableType.QUERY,
        name,
        title,
        VariableHide.HIDE_VARIABLE if is_hidden else VariableHide.DONT_HIDE,
        False,
        description,
        current=VariableOption(text=["All"], value=["$__all"]) if many else None,
        multi=many,
        include_all=many,
        options=[],
        refresh=VariableRefresh.ON_TIME_RANGE_CHANGED,
        sort=VariableSort.ALPHABETICAL_ASC,
        regex="",
    )


def _decisions(condition: str) -> AnnotationQuery:
    asked = sql(f"""
        SELECT decided_at AS time, sentence AS text, reason AS tags
          FROM grafana.decisions
         WHERE $__timeFilter(decided_at) AND {condition}
         ORDER BY decided_at
         LIMIT 200
    """)
    asked.ref_id = "Anno"
    return AnnotationQuery(
        name="Decisions", datasource=POSTGRES, enable=True, hide=False, icon_color="purple", target=asked
    )


def _link(uid: str, title: str) -> DashboardLink:
    return DashboardLink(
        title, DashboardLinkType.LINK, "dashboard", f"The board {title}", f"/d/{uid}", include_vars=True, keep_time=True
    )
