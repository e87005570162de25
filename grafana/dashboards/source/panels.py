"""The kinds of panels that the boards have. What every panel must say is demanded by each of them: a title, what it
answers, its unit, what it shows when there is nothing, and from which value on a number is bad.

A panel's id comes of its title, so that a link to it outlives its place on the board.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast
from zlib import crc32

from grafana_foundation_sdk.models import bargauge, common, logs, stat, statetimeline, table, text, timeseries
from grafana_foundation_sdk.models.dashboard import (
    DashboardFieldConfigSourceOverrides,
    DashboardLink,
    DataTransformerConfig,
    DynamicConfigValue,
    FieldColor,
    FieldColorModeId,
    FieldConfig,
    FieldConfigSource,
    GridPos,
    MatcherConfig,
    Panel,
    Threshold,
    ThresholdsConfig,
    ThresholdsMode,
    ValueMap,
    ValueMapping,
    ValueMappingResult,
)

from grafana.dashboards.source.queries import MIXED, Query

NOTHING = "-"
"""An empty cell of a table."""

Override = DashboardFieldConfigSourceOverrides


@dataclass(frozen=True, slots=True)
class Limits:
    """Colours from a value on: `steps` ascend, and `base` is what is below the first of them."""

    steps: tuple[tuple[float, str], ...] = ()
    base: str = "green"

    def config(self) -> ThresholdsConfig:
        steps = [Threshold(None, self.base), *(Threshold(value, colour) for value, colour in self.steps)]
        return ThresholdsConfig(ThresholdsMode.ABSOLUTE, steps)


NEUTRAL = Limits(base="text")
"""For numbers that are neither good nor bad."""
ANY_IS_BAD = Limits(((1, "red"),))
"""For counts that should be 0."""


def over(yellow: float, red: float | None = None) -> Limits:
    """Bad are great values."""
    return Limits(((yellow, "yellow"), *([] if red is None else [(red, "red")])))


def under(yellow: float, red: float) -> Limits:
    """Bad are small values: at least `yellow` is good, below `red` is the worst. `red` is less than `yellow`."""
    return Limits(((red, "yellow"), (yellow, "green")), base="red")


@dataclass(frozen=True, slots=True)
class Link:
    """Where a click on a value leads; see `board.to_board`."""

    title: str
    url: str
    opens_new_tab: bool = False

    def to_json(self) -> dict[str, object]:
        return {"title": self.title, "url": self.url, "targetBlank": self.opens_new_tab}


@dataclass(frozen=True, slots=True)
class State:
    """How a value that is a word, or a number that stands for one, is shown."""

    colour: str
    text: str | None = None


PHASES: Mapping[str, State] = {
    "PENDING": State("super-light-blue"),
    "SUBMITTING": State("light-blue"),
    "QUEUED": State("yellow"),
    "RUNNING": State("green"),
    "DRAINING": State("orange"),
    "STOPPING": State("dark-orange"),
    "ENDED": State("#808080"),
}
JOB_STATES: Mapping[str, State] = {
    "PENDING": State("yellow"),
    "RUNNING": State("green"),
    "SUSPENDED": State("purple"),
    "COMPLETING": State("orange"),
    "COMPLETED": State("#808080"),
    "CANCELLED": State("#808080"),
    "TIMEOUT": State("dark-orange"),
    "DEADLINE": State("dark-orange"),
    "PREEMPTED": State("purple"),
    "FAILED": State("red"),
    "OUT_OF_MEMORY": State("red"),
    "NODE_FAIL": State("dark-red"),
    "BOOT_FAIL": State("dark-red"),
    "UNKNOWN": State("text"),
}
YES_NO: Mapping[str, State] = {"true": State("orange", "yes"), "false": State("text", "no")}


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table, by the name that the query gives it: shown under `title`, `width` pixels wide (0: the rest).

    `states` colour words, `limits` numbers. `is_bar` shows a number of 0 to 1 as a bar.
    """

    name: str
    title: str = ""
    unit: str = ""
    width: int = 0
    decimals: int | None = None
    limits: Limits | None = None
    states: Mapping[str, State] | None = None
    links: tuple[Link, ...] = ()
    is_bar: bool = False
    is_hidden: bool = False
    wraps: bool = False

    def override(self) -> Override:
        values: dict[str, object] = {}
        if self.title:
            values["displayName"] = self.title
        if self.unit:
            values["unit"] = self.unit
        if self.decimals is not None:
            values["decimals"] = self.decimals
        if self.width:
            values["custom.width"] = self.width
        if self.limits is not None:
            values["thresholds"] = self.limits.config()
            values["custom.cellOptions"] = {"type": "color-text"}
        if self.states is not None:
            values["mappings"] = _mappings(self.states)
            values["custom.cellOptions"] = {"type": "color-text"}
        if self.wraps:
            # 12.0 and 12.1 read the one, later releases the other; an unknown property is skipped
            values |= {"custom.cellOptions": {"type": "auto", "wrapText": True}, "custom.wrapText": True}
        if self.is_bar:
            values |= {"min": 0, "max": 1, "custom.cellOptions": {"type": "gauge", "mode": "basic"}}
        if self.links:
            values["links"] = list(self.links)
        return override(self.name, values)


def override(name: str, properties: Mapping[str, object]) -> Override:
    """What is different for the field of this name."""
    return Override(
        matcher=MatcherConfig("byName", name),
        properties=[DynamicConfigValue(key, value) for key, value in properties.items()],
    )


def coloured(name: str, colour: str) -> Override:
    """A series that has the same colour wherever it is shown."""
    return override(name, {"color": {"mode": "fixed", "fixedColor": colour}})


@dataclass(frozen=True, slots=True)
class Answer:
    """What every panel says of itself.

    `description`: which question it answers, and what to do when it looks bad. `unit`: of Grafana's units, `short` for
    counts, `string` for words. `empty`: shown where there is nothing, in words that tell whether that is fine.
    """

    title: str
    description: str
    unit: str
    empty: str
    limits: Limits = NEUTRAL
    links: tuple[Link, ...] = ()
    overrides: tuple[Override, ...] = ()
    decimals: int | None = None
    lowest: float | None = None
    highest: float | None = None
    states: Mapping[str, State] = field(default_factory=dict)


def single(
    answer: Answer, *queries: Query, width: int = 0, is_alarm: bool = False, names: bool = False, trend: bool = False
) -> Panel:
    """One number, or a few: the last of each query. `is_alarm` fills the panel with the limits' colour; `names` shows
    legends beside numbers; `trend` draws a line behind, and needs `series` instead of `now`."""
    options = stat.Options(
        graph_mode=common.BigValueGraphMode.AREA if trend else common.BigValueGraphMode.NONE,
        color_mode=common.BigValueColorMode.BACKGROUND_SOLID if is_alarm else common.BigValueColorMode.VALUE,
        text_mode=common.BigValueTextMode.VALUE_AND_NAME if names else common.BigValueTextMode.VALUE,
        reduce_options=common.ReduceDataOptions(values=False, calcs=["lastNotNull"], fields=""),
    )
    return _panel("stat", answer, queries, width, options=options, colour=FieldColorModeId.THRESHOLDS)


def word(answer: Answer, query: Query, *, width: int = 0) -> Panel:
    """The text or time of the first row of a query in SQL."""
    options = stat.Options(
        graph_mode=common.BigValueGraphMode.NONE,
        text_mode=common.BigValueTextMode.VALUE,
        reduce_options=common.ReduceDataOptions(values=True, limit=1, calcs=["lastNotNull"], fields="/.*/"),
    )
    return _panel("stat", answer, [query], width, options=options, colour=FieldColorModeId.THRESHOLDS)


def curves(
    answer: Answer,
    *queries: Query,
    width: int = 0,
    is_stacked: bool = False,
    steps: bool = False,
    names_right: bool = False,
    shows_last: str = "",
) -> Panel:
    """Numbers over time. Limits are dashed lines. `steps` for counts, which jump; `names_right` for many series.

    `shows_last`: as many days as `31d`, whatever time the board shows, as bars, for numbers that there are once a day.
    """
    custom = timeseries.FieldConfig(
        draw_style=common.GraphDrawStyle.BARS if shows_last else common.GraphDrawStyle.LINE,
        line_width=1,
        fill_opacity=80 if shows_last else 40 if is_stacked else 8,
        line_interpolation=common.LineInterpolation.STEP_AFTER if steps else common.LineInterpolation.LINEAR,
        show_points=common.VisibilityMode.NEVER,
        stacking=common.StackingConfig(
            common.StackingMode.NORMAL if is_stacked else common.StackingMode.NONE, group="A"
        ),
        thresholds_style=common.GraphThresholdsStyleConfig(
            common.GraphThresholdsStyleMode.DASHED if answer.limits.steps else common.GraphThresholdsStyleMode.OFF
        ),
    )
    legend = common.VizLegendOptions(
        display_mode=common.LegendDisplayMode.TABLE if names_right else common.LegendDisplayMode.LIST,
        placement=common.LegendPlacement.RIGHT if names_right else common.LegendPlacement.BOTTOM,
        show_legend=True,
        calcs=["lastNotNull", "max"] if names_right else [],
    )
    tooltip = common.VizTooltipOptions(common.TooltipDisplayMode.MULTI, common.SortOrder.DESCENDING)
    options = timeseries.Options(legend=legend, tooltip=tooltip)
    panel = _panel(
        "timeseries",
        answer,
        queries,
        width,
        options=options,
        custom=custom,
        colour=FieldColorModeId.PALETTE_CLASSIC,
    )
    panel.time_from = shows_last or None
    return panel


def rows_of(
    answer: Answer,
    columns: Sequence[Column],
    *queries: Query,
    width: int = 0,
    sort_by: str = "",
    is_descending: bool = False,
) -> Panel:
    """A table. Of queries in PromQL it shows the columns that are named, in that order; of several, rows with the same
    labels are one. `answer.unit` holds for columns that name none."""
    is_sql = not any(hasattr(query, "expr") for query in queries)
    shown: list[DataTransformerConfig] = []
    if len(queries) > 1:
        shown.append(DataTransformerConfig("merge", options={}))
    if not is_sql:
        order = {column.name: place for place, column in enumerate(columns)}
        organize = {"excludeByName": {"Time": True}, "indexByName": order, "renameByName": {}}
        shown.append(DataTransformerConfig("organize", options=organize))
    # as for wrapping: the old property and the new one
    hiding = {"custom.hidden": True, "custom.hideFrom": {"viz": True, "legend": False, "tooltip": False}}
    hidden = [override(column.name, hiding) for column in columns if column.is_hidden]
    cells = Override(matcher=MatcherConfig("byRegexp", ".*"), properties=[DynamicConfigValue("noValue", NOTHING)])
    columns_shown = [column.override() for column in columns if not column.is_hidden]
    titles = {column.name: column.title or column.name for column in columns}
    options = table.Options(
        cell_height=common.TableCellHeight.SM,
        sort_by=[common.TableSortByFieldState(titles.get(sort_by, sort_by), is_descending)] if sort_by else [],
        footer=common.TableFooterOptions(show=False, reducer=[], count_rows=False, enable_pagination=False),
    )
    custom = common.TableFieldOptions(
        width=None, align=common.FieldTextAlignment.AUTO, cell_options=common.TableAutoCellOptions(), inspect=False
    )
    panel = _panel("table", answer, queries, width, options=options, custom=custom, colour=FieldColorModeId.THRESHOLDS)
    panel.transformations = shown
    assert panel.field_config is not None
    panel.field_config.overrides = [cells, *columns_shown, *hidden, *answer.overrides]
    return panel


def states_over_time(answer: Answer, *queries: Query, width: int = 0, one_line_for: str = "") -> Panel:
    """Words over time, coloured by `answer.states`. With `one_line_for` each value of that column gets a line."""
    options = statetimeline.Options(
        show_value=common.VisibilityMode.AUTO,
        row_height=0.85,
        merge_values=True,
        legend=common.VizLegendOptions(
            common.LegendDisplayMode.LIST, common.LegendPlacement.BOTTOM, show_legend=True, calcs=[]
        ),
        tooltip=common.VizTooltipOptions(common.TooltipDisplayMode.SINGLE),
    )
    custom = statetimeline.FieldConfig(line_width=0, fill_opacity=80)
    panel = _panel(
        "state-timeline",
        answer,
        queries,
        width,
        options=options,
        custom=custom,
        colour=FieldColorModeId.THRESHOLDS,
    )
    if one_line_for:
        split = {"fields": [one_line_for], "keepFields": False, "naming": {"asLabels": True}}
        panel.transformations = [DataTransformerConfig("partitionByValues", options=split)]
        assert panel.field_config is not None
        panel.field_config.defaults.display_name = "${__field.labels." + one_line_for + "}"
    return panel


def bars(answer: Answer, *queries: Query, width: int = 0) -> Panel:
    """Numbers side by side, a bar for each; `answer.lowest` and `highest` are the ends of the bars."""
    options = bargauge.Options(
        display_mode=common.BarGaugeDisplayMode.BASIC,
        name_placement=common.BarGaugeNamePlacement.LEFT,
        orientation=common.VizOrientation.HORIZONTAL,
        show_unfilled=True,
        sizing=common.BarGaugeSizing.AUTO,
        legend=common.VizLegendOptions(
            common.LegendDisplayMode.LIST, common.LegendPlacement.BOTTOM, show_legend=False, calcs=[]
        ),
        reduce_options=common.ReduceDataOptions(values=False, calcs=["lastNotNull"], fields=""),
    )
    return _panel("bargauge", answer, queries, width, options=options, colour=FieldColorModeId.THRESHOLDS)


def log_lines(answer: Answer, query: Query, *, width: int = 0) -> Panel:
    """Lines of logs, the newest first."""
    options = logs.Options(
        show_time=True,
        wrap_log_message=True,
        enable_log_details=True,
        sort_order=common.LogsSortOrder.DESCENDING,
        dedup_strategy=common.LogsDedupStrategy.NONE,
    )
    return _panel("logs", answer, [query], width, options=options)


def prose(title: str, description: str, content: str, *, width: int = 0) -> Panel:
    """Text in Markdown; variables of the board are filled in."""
    answer = Answer(title, description, unit="string", empty="nothing to say")
    options = text.Options(mode=text.TextMode.MARKDOWN, content=content)
    return _panel("text", answer, [], width, options=options)


def _panel(
    kind: str,
    answer: Answer,
    queries: Sequence[Query],
    width: int,
    *,
    options: object,
    custom: object = None,
    colour: FieldColorModeId | None = None,
) -> Panel:
    for number, query in enumerate(queries):
        query.ref_id = chr(ord("A") + number)
    sources = {(one.datasource.type_val, one.datasource.uid): one.datasource for one in queries if one.datasource}
    defaults = FieldConfig(
        unit=answer.unit,
        no_value=answer.empty,
        decimals=answer.decimals,
        min_val=answer.lowest,
        max_val=answer.highest,
        thresholds=answer.limits.config(),
        mappings=_mappings(answer.states),
        color=None if colour is None else FieldColor(colour),
        links=cast("list[DashboardLink]", list(answer.links)),  # the SDK has no model of a data link
        custom=custom,
    )
    return Panel(
        type_val=kind,
        id_val=crc32(answer.title.encode()) % 1_000_000 + 1,
        title=answer.title,
        description=answer.description,
        targets=list(queries),
        datasource=next(iter(sources.values())) if len(sources) == 1 else (MIXED if sources else None),
        grid_pos=GridPos(w=width),
        options=options,
        field_config=FieldConfigSource(defaults, list(answer.overrides)),
        repeat_direction=None,
    )


def _mappings(states: Mapping[str, State]) -> list[ValueMapping]:
    if not states:
        return []
    shown: dict[str, Any] = {
        value: ValueMappingResult(text=state.text, color=state.colour, index=place)
        for place, (value, state) in enumerate(states.items())
    }
    return [ValueMap(shown)]
