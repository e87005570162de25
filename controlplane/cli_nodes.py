"""`controlplane nodes`: keep jobs off a node and let what runs there leave, and take that back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from controlplane.cli_session import actor, check_text, dry, time_of, with_db
from controlplane.clock import utc_now

if TYPE_CHECKING:
    from controlplane.db.nodes import Marked

cli = typer.Typer(
    help="Keep new jobs off a node, and drain what runs there; `controlplane get nodes` shows which.",
    no_args_is_help=True,
)

NodeName = Annotated[str, typer.Argument(help="Its name, as Slurm shows it.", show_default=False)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be; change nothing.")]


@cli.command(epilog="[bold]Example[/]\n\ncontrolplane nodes drain node17 --reason fan --until 4h")
def drain(
    node: NodeName,
    reason: Annotated[
        str | None, typer.Option(callback=check_text, help="Kept with the mark, for those who ask later.")
    ] = None,
    until: Annotated[
        str | None, typer.Option(help="A time with its zone, or how long: 90m, 2h, 3d. Without it: until undrained.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Start no new job on a node, and replace what runs there elsewhere, one by one, before it ends."""
    from controlplane.db import nodes

    now = utc_now()
    end = None if until is None else time_of(until, now)
    _say(
        with_db(lambda db: nodes.drain(db, node, actor=actor(), now=now, reason=reason, until=end, dry_run=dry_run)),
        dry_run,
    )


@cli.command()
def undrain(node: NodeName, dry_run: DryRun = False) -> None:
    """Let jobs use a node again, whoever or whatever kept them off.

    The alert that fires now, and failures until now, do not bring the mark back; later ones do.
    """
    from controlplane.db import nodes

    _say(with_db(lambda db: nodes.undrain(db, node, actor=actor(), now=utc_now(), dry_run=dry_run)), dry_run)


def _say(marked: Marked, dry_run: bool) -> None:
    state = "kept out of new jobs" if marked.marks else "used again"
    causes = "; ".join(
        f"{mark.reason}" + (f" until {mark.until:%Y-%m-%d %H:%M} UTC" if mark.until else "") for mark in marked.marks
    )
    words = f"{state}: {causes}" if causes else state
    typer.echo(f"{marked.node} is {words}{'' if marked.is_changed else ', as before'}{dry(dry_run)}")
