"""`controlplane tenants` and `controlplane usage`: what tenants may use, and what they used.

JSON documents are those of the operators' API.
"""

from __future__ import annotations

import json
import sys
from datetime import date
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from controlplane.cli_session import actor, dry, fail, table_console, with_db
from controlplane.clock import utc_now

if TYPE_CHECKING:
    from controlplane.db.tenants import Tenant
    from controlplane.db.usage import Report

IDLE = "(idle)"  # no tenant, model or set may be named so
_LIMITS = ("requests_per_minute", "tokens_per_minute", "max_concurrent", "monthly_tokens")

cli = typer.Typer(help="Show and set what tenants may use; a tenant is made with its first key.", no_args_is_help=True)

Output = Annotated[Literal["table", "json"], typer.Option("--output", "-o", help="json is the operators' API's.")]


@cli.command()
def get(
    name: Annotated[str | None, typer.Argument(help="Only this one.", show_default=False)] = None,
    output: Output = "table",
) -> None:
    """Show the limits of tenants, and how many tokens they have used this month (UTC)."""
    from controlplane.db import tenants
    from controlplane.web import documents

    found = [one for one in with_db(lambda db: tenants.load_all(db, utc_now())) if name in (None, one.name)]
    if name is not None and not found:
        fail(f"there is no tenant {name!r}; it is made with its first key")
    if output == "json":
        typer.echo(json.dumps([documents.tenant_document(one) for one in found], indent=2))
    elif found:
        _print_tenants(found)
    else:
        typer.echo("There is no tenant; `controlplane keys create --tenant NAME` makes one.")


def _limit(text: str | None) -> int | Literal["as before"] | None:
    """What an option says of a limit."""
    if text is None:
        return "as before"
    if text == "none":
        return None
    if not text.isdecimal() or not text.isascii() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is neither a whole number from 1 on, nor none")
    return int(text)


def _option(help_text: str) -> Any:
    return typer.Option(metavar="N|none", callback=lambda value: _checked(value), help=help_text)


def _checked(value: str | None) -> str | None:
    _limit(value)
    return value


@cli.command(
    "set",
    epilog="[bold]Examples[/]\n\ncontrolplane tenants set physics --requests-per-minute 600 --max-concurrent 50\n\n"
    "controlplane tenants set physics --monthly-tokens none",
)
def set_limits(
    name: Annotated[str, typer.Argument(help="Its name.", show_default=False)],
    requests_per_minute: Annotated[str | None, _option("Requests within 60 s.")] = None,
    tokens_per_minute: Annotated[str | None, _option("Tokens within 60 s, of prompts and completions.")] = None,
    max_concurrent: Annotated[str | None, _option("Requests at a time.")] = None,
    monthly_tokens: Annotated[str | None, _option("Tokens of a month (UTC).")] = None,
    weight: Annotated[
        float | None, typer.Option(help="Its share against other tenants that wait for the same model; 1 is usual.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be; change nothing.")] = False,
) -> None:
    """Set limits of a tenant; `none` removes one, and those that are not given stay.

    Every proxy hears of it within a second.
    """
    given = dict(zip(_LIMITS, (requests_per_minute, tokens_per_minute, max_concurrent, monthly_tokens), strict=True))
    changes: dict[str, Any] = {field: _limit(text) for field, text in given.items() if text is not None}
    if weight is not None:
        changes["weight"] = weight
    if not changes:
        raise typer.BadParameter("give at least one limit, or --weight")
    from controlplane.db import tenants

    limits, is_changed = with_db(
        lambda db: tenants.set_limits(db, name, changes, actor=actor(), now=utc_now(), dry_run=dry_run)
    )
    words = ", ".join(
        f"{field.replace('_', ' ')} {getattr(limits, field)}" for field in _LIMITS if getattr(limits, field) is not None
    )
    before = "" if is_changed else ", as before"
    typer.echo(f"{name}: {words or 'no limits'}, weight {limits.weight:g}{before}{dry(dry_run)}")


def usage(
    by: Annotated[
        Literal["tenant", "model", "day", "replica-set"], typer.Option(help="One line for each of these.")
    ] = "tenant",
    month: Annotated[str | None, typer.Option(help="UTC, as 2026-11. Without it: the current one.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Only what this one used.")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Comma-separated, with a line of titles.")] = False,
    output: Output = "table",
) -> None:
    """Say what was used in a month: requests, tokens, and the GPU hours of the jobs, shared out by tokens.

    PROMPT tokens include CACHED ones. GPU hours of days on which a replica served no token are idle.
    """
    from controlplane.core.times import parse_month

    now = utc_now()
    if as_csv and output == "json":
        raise typer.BadParameter("give one of --csv and -o json")
    try:
        first, end = parse_month(f"{now:%Y-%m}" if month is None else month)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--month") from None
    from controlplane.db import usage as used
    from controlplane.web import documents

    report = with_db(lambda db: used.report(db, used.By(by), first, end, now, tenant=tenant))
    if output == "json":
        typer.echo(json.dumps(documents.usage_document(report, by=by, first=first, tenant=tenant), indent=2))
    elif as_csv:
        _print_csv(report, by, is_whole=tenant is None)
    else:
        _print_usage(report, by, first, is_whole=tenant is None)


def _print_tenants(found: list[Tenant]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("TENANT", "REQUESTS/MIN", "TOKENS/MIN", "CONCURRENT", "TOKENS/MONTH", "USED THIS MONTH", "WEIGHT"):
        table.add_column(title, overflow="fold", justify="left" if title == "TENANT" else "right")
    for one in found:
        bounds = (getattr(one.limits, field) for field in _LIMITS)
        table.add_row(
            one.name,
            *("-" if bound is None else str(bound) for bound in bounds),
            str(one.month_tokens),
            f"{one.limits.weight:g}",
        )
    table_console().print(table)


def _print_csv(report: Report, by: str, *, is_whole: bool) -> None:
    import csv

    writer = csv.writer(sys.stdout, lineterminator="\n")
    counts = ("requests", "aborted", "prompt_tokens", "completion_tokens", "cached_tokens")
    writer.writerow((by.replace("-", "_"), *counts, "gpu_hours"))
    for line in report.lines:
        writer.writerow((line.name, *(getattr(line, count) for count in counts), f"{line.gpu_seconds / 3600:.6f}"))
    if is_whole:
        writer.writerow((IDLE, 0, 0, 0, 0, 0, f"{report.idle_gpu_seconds / 3600:.6f}"))


def _print_usage(report: Report, by: str, first: date, *, is_whole: bool) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    titles = (by.upper().replace("-", " "), "REQUESTS", "ABORTED", "PROMPT", "CACHED", "COMPLETION", "GPU HOURS")
    for title in titles:
        table.add_column(title, overflow="fold", justify="left" if title == titles[0] else "right")
    for line in report.lines:
        counts = (line.requests, line.aborted, line.prompt_tokens, line.cached_tokens, line.completion_tokens)
        table.add_row(line.name or "-", *map(str, counts), f"{line.gpu_seconds / 3600:.2f}")
    if is_whole and (report.lines or report.gpu_seconds):
        table.add_row(IDLE, *["-"] * 5, f"{report.idle_gpu_seconds / 3600:.2f}")
    if table.row_count:
        table_console().print(table)
    else:
        typer.echo(f"Nothing was used in {first:%Y-%m}.")
