"""`controlplane keys`: the API keys of the proxy's clients. A key is printed once, when made, and kept nowhere."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from controlplane.cli_session import actor, table_console, with_db
from controlplane.clock import utc_now

if TYPE_CHECKING:
    from controlplane.core.types import ApiKey

_TENANT = r"[A-Za-z0-9]([A-Za-z0-9_.@-]{0,62}[A-Za-z0-9])?"

cli = typer.Typer(help="Make, list and revoke the API keys of the proxy's clients.", no_args_is_help=True)

Output = Annotated[Literal["table", "json"], typer.Option("--output", "-o", help="How to print it.")]


@cli.command(epilog="[bold]Example[/]\n\nKEY=$(controlplane keys create --tenant physics --expires-in-days 90)")
def create(
    tenant: Annotated[str, typer.Option(help="Whose key it is; made if it is new.", show_default=False)],
    model: Annotated[
        list[str] | None, typer.Option(help="A model that it may use; may be repeated. Without it: every model.")
    ] = None,
    expires_in_days: Annotated[int | None, typer.Option(min=1, max=36500, help="Without it: never.")] = None,
    output: Output = "table",
) -> None:
    """Make a key and print it, this one time, on standard output."""
    if not re.fullmatch(_TENANT, tenant):
        words = "letters and digits, with _ . @ - between them, at most 64 in all"
        raise typer.BadParameter(words, param_hint="--tenant")
    from controlplane.db import keys

    now = utc_now()
    expires_at = now + timedelta(days=expires_in_days) if expires_in_days else None
    key, made = with_db(lambda db: keys.create(db, tenant, models=model, expires_at=expires_at, actor=actor(), now=now))
    if output == "json":
        typer.echo(json.dumps({"key": key, **_document(made)}, indent=2))
    else:
        typer.echo(key)
        ending = f"`controlplane keys revoke {made.prefix}` ends it"
        typer.echo(f"a key of {tenant}; it is not shown again. {ending}", err=True)


@cli.command("list")
def list_all(output: Output = "table") -> None:
    """Show every key by its first characters."""
    from controlplane.db import keys

    found = with_db(keys.load_all)
    if output == "json":
        typer.echo(json.dumps([_document(one) for one in found], indent=2))
    else:
        _print_table(found, utc_now())


@cli.command()
def revoke(
    prefix: Annotated[str, typer.Argument(help="Its first characters, as listed.", show_default=False)],
) -> None:
    """Make a key worthless, for good."""
    from controlplane.db import keys

    revoked = with_db(lambda db: keys.revoke(db, prefix, utc_now(), actor=actor()))
    typer.echo(f"{revoked.prefix} of {revoked.tenant} is revoked")


def _document(key: ApiKey) -> dict[str, Any]:
    return {
        "prefix": key.prefix,
        "tenant": key.tenant,
        "models": None if key.models is None else sorted(key.models),
        "created_at": key.created_at.isoformat(),
        "expires_at": key.expires_at.isoformat() if key.expires_at else None,
        "revoked_at": key.revoked_at.isoformat() if key.revoked_at else None,
    }


def _print_table(keys: Iterable[ApiKey], now: datetime) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("PREFIX", "TENANT", "STATE", "MODELS", "CREATED", "EXPIRES"):
        table.add_column(title, overflow="fold")
    for key in keys:
        table.add_row(
            key.prefix,
            key.tenant,
            _state(key, now),
            "every model" if key.models is None else ", ".join(sorted(key.models)),
            f"{key.created_at:%Y-%m-%d}",
            f"{key.expires_at:%Y-%m-%d}" if key.expires_at else "never",
        )
    table_console().print(table)


def _state(key: ApiKey, now: datetime) -> str:
    if key.revoked_at is not None:
        return "revoked"
    return "expired" if key.expires_at is not None and key.expires_at <= now else "good"
