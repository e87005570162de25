"""Demand: what runs, what waits in engines and what is held in proxies, in the same colours on every board."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Panel

from grafana.dashboards.source.panels import Answer, coloured, curves
from grafana.dashboards.source.queries import series


def demand(title: str, text: str, *, running: str, waiting: str, held: str) -> Panel:
    """The three expressions, each of one series, stacked."""
    return curves(
        Answer(
            title,
            text,
            unit="short",
            empty="nothing is scraped",
            lowest=0,
            overrides=(
                coloured("running", "green"),
                coloured("waiting in engines", "yellow"),
                coloured("held in proxies", "red"),
            ),
        ),
        series(running, "running"),
        series(waiting, "waiting in engines"),
        series(held, "held in proxies"),
        is_stacked=True,
    )
