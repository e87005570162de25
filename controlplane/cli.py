"""The command line: `controlplane VERB`. Operators' verbs talk to the database that `DATABASE_URL` names.

What an operator can be told is one sentence on stderr, never a traceback. Exit codes: 0 done, 1 failed, 2 the command
line or the settings are wrong, 130 interrupted. What a verb needs is imported when it runs, so that `--help` is quick.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from controlplane import cli_keys, cli_nodes, cli_tenants
from controlplane.cli_session import (
    FAILED,
    actor,
    check_count,
    check_text,
    fail,
    load_settings,
    one_line,
    quiet_libraries,
    table_console,
    with_db,
)
from controlplane.cli_session import dry as _dry
from controlplane.cli_session import time_of as _time
from controlplane.clock import utc_now
from controlplane.core.verbs import Verb

if TYPE_CHECKING:
    from datetime import datetime

    from controlplane.core.types import ReplicaSet
    from controlplane.db import Database

_RUN, _SETS, _REPLICAS, _ACCESS = "Run it", "Look, and steer replica sets", "Single replicas", "Clients"
_NODES = "Nodes"

cli = typer.Typer(
    name="controlplane",
    help="Alert-driven control plane and OpenAI-compatible proxy for vLLM replicas that run as Slurm jobs.",
    epilog="Settings are environment variables; docs/configuration.md lists them, `controlplane check` tries them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
cli.add_typer(cli_keys.cli, name="keys", rich_help_panel=_ACCESS)
cli.add_typer(cli_tenants.cli, name="tenants", rich_help_panel=_ACCESS)
cli.command(
    rich_help_panel=_ACCESS,
    epilog="[bold]Examples[/]\n\ncontrolplane usage --month 2026-11\n\n"
    "controlplane usage --by model --tenant physics\n\ncontrolplane usage --by day --csv > usage.csv",
)(cli_tenants.usage)
cli.add_typer(cli_nodes.cli, name="nodes", rich_help_panel=_NODES)

Role = Literal["all", "control", "proxy"]
Noun = Literal["replica-sets", "replicas", "endpoints", "alerts", "decisions", "audit", "nodes"]
Output = Literal["table", "wide", "json"]


def main() -> None:
    cli()


SetName = Annotated[str, typer.Argument(help="Its name.", show_default=False)]
ReplicaName = Annotated[str, typer.Argument(help="Its name, cp-<set>-<number>.", show_default=False)]
Reason = Annotated[str | None, typer.Option(callback=check_text, help="Kept, for those who ask why later.")]
Until = Annotated[
    str | None, typer.Option(help="A time with its zone, or how long: 90m, 2h, 3d. Without it: until it is undone.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and say what would be; change nothing.")]


# --- run it ----------------------------------------------------------------------------------------------


@cli.command(
    rich_help_panel=_RUN,
    epilog="[bold]Example[/]\n\nCONTROLPLANE_LOG__FORMAT=text controlplane serve --role proxy",
)
def serve(
    role: Annotated[Role, typer.Option(help="The control plane, the proxy, or both.")] = "all",
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=128,  # as the setting's
            help="Processes that serve the proxy's port; else CONTROLPLANE_PROXY__WORKERS says how many.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Serve until stopped.

    Starts even while PostgreSQL or slurmrestd is away: the log and /ready say so, and it goes on when they are back.
    SIGTERM or Ctrl-C lets answers under way finish; a second one ends them. With more workers than one the proxy is
    served by processes of its own, which are replaced when they end.
    """
    if workers is not None and role == "control":
        raise typer.BadParameter("the control plane is one process", param_hint="--workers")
    settings = load_settings()
    from controlplane import app, logs, servers

    one_app: dict[str, logs.App] = {"control": "control-plane", "proxy": "proxy"}
    logs.configure(level=settings.log.level, form=settings.log.format, app=one_app.get(role))
    try:
        code = app.serve(settings, app.Role(role), workers=workers or settings.proxy.workers)
    except servers.CannotListen as error:
        fail(f"{error}; free it, or choose another with CONTROLPLANE_WEB__PORT or CONTROLPLANE_PROXY__PORT")
    raise typer.Exit(code)


@cli.command(
    rich_help_panel=_RUN,
    epilog="[bold]Examples[/]\n\ncontrolplane migrate --grant-dashboards-to grafana\n\n"
    "controlplane migrate --grant-dashboards-to grafana --print | psql controlplane",
)
def migrate(
    grant_dashboards_to: Annotated[
        str | None,
        typer.Option(
            metavar="ROLE", help="Let this role read the views for dashboards, and see that it can read nothing else."
        ),
    ] = None,
    only_print: Annotated[
        bool, typer.Option("--print", help="Print the SQL that would grant it, for somebody else to run; do nothing.")
    ] = False,
) -> None:
    """Bring the database's schema to this version's. Harmless to repeat, and from several hosts at once."""
    from controlplane.db import DatabaseError, dashboards
    from controlplane.db import migrate as apply_migrations

    if only_print:
        if grant_dashboards_to is None:
            raise typer.BadParameter("it prints what --grant-dashboards-to would do", param_hint="--print")
        typer.echo("".join(f"{one};\n" for one in dashboards.statements(grant_dashboards_to)), nl=False)
        return
    url = load_settings().database_url.get_secret_value()
    try:
        applied = apply_migrations(url)
        typer.echo(f"applied {', '.join(applied)}" if applied else "nothing to do: the schema is current")
    except DatabaseError as error:
        fail(f"PostgreSQL: {one_line(error)}; see that it runs and that DATABASE_URL is right")
    if grant_dashboards_to is None:
        return
    try:
        granted = dashboards.grant(url, grant_dashboards_to)
    except DatabaseError as error:
        fail(f"nothing was granted: {one_line(error)}")
    typer.echo(f"{grant_dashboards_to} may read the views of schema {dashboards.SCHEMA}, and no table")
    for warning in granted.warnings:
        typer.echo(f"warning: {warning}", err=True)


@cli.command(rich_help_panel=_RUN)
def check() -> None:
    """Try what the settings point at: database, migrations, slurmrestd, token, templates, directory.

    Each line says how it is and what to do. Exits 1 if something failed.
    """
    from rich.console import Console
    from rich.text import Text

    from controlplane.cli_check import Verdict, findings

    console = Console(soft_wrap=True, highlight=False)
    colours = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.FAILED: "red"}

    async def print_all() -> bool:
        is_fine = True
        async for one in findings(os.environ):
            remedy = f"; {one.remedy}" if one.remedy else ""
            console.print(
                Text(f"{one.verdict:<8}", colours[one.verdict]), Text(f"{one.subject}: {one.sentence}{remedy}")
            )
            is_fine = is_fine and one.verdict is not Verdict.FAILED
        return is_fine

    quiet_libraries()
    if not asyncio.run(print_all()):
        raise typer.Exit(FAILED)


@cli.command(rich_help_panel=_RUN)
def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Stay up at the end; print every URL, key and a curl.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="One line an event instead of a live view.")] = False,
    directory: Annotated[
        Path, typer.Option(help="Where everything lives; other users must be able to look in.")
    ] = Path("/var/tmp/controlplane-demo"),  # noqa: S108 - claimed while in use; a lasting path lets a later run clean up
    vllm: Annotated[
        Path | None,
        typer.Option(
            metavar="VENV",
            help="Real vLLM for the CPU from this venv, which `make demo-vllm` makes, instead of stand-ins.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """A whole cluster on this machine: load, alert, Slurm jobs, requests, and back to one replica.

    Needs root and the packages that `make setup` installs; a PostgreSQL of its own unless DATABASE_URL is set.
    """
    from controlplane.demo import real_vllm, scenario

    url = os.environ.get("DATABASE_URL") or None
    try:
        play = scenario.STAND_IN if vllm is None else real_vllm.play(vllm, directory)
    except real_vllm.NoVllm as error:
        fail(str(error))
    raise typer.Exit(scenario.run(directory, play, keep=keep, plain=plain, database_url=url))


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"controlplane {version('controlplane')}")
        raise typer.Exit


@cli.callback()
def options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Say which version this is.")
    ] = False,
) -> None:
    pass


# --- look, and steer replica sets ------------------------------------------------------------------------


@cli.command(
    rich_help_panel=_SETS,
    epilog="[bold]Examples[/]\n\ncontrolplane get replicas --watch\n\ncontrolplane get alerts --all -o json",
)
def get(
    noun: Annotated[Noun, typer.Argument(help="What to show.", show_default=False)],
    output: Annotated[Output, typer.Option("--output", "-o", help="json is the operators' API's.")] = "table",
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Until Ctrl-C; with -o json one line for every change.")
    ] = False,
    show_all: Annotated[
        bool, typer.Option("--all", help="Also what is over: ended replicas, resolved alerts, cleared nodes.")
    ] = False,
) -> None:
    """Show replica sets, replicas, endpoints, alerts, decisions, what operators said, or nodes kept out of new jobs."""
    from controlplane import cli_get

    look = cli_get.watch if watch else cli_get.show
    with_db(lambda db: look(db, noun, output, table_console(), show_all=show_all))


@cli.command(
    rich_help_panel=_SETS,
    epilog="[bold]Examples[/]\n\ncontrolplane why qwen3-8b\n\ncontrolplane why cp-qwen3-8b-12 --at -10m\n\n"
    "controlplane why 4711 -o json",
)
def why(
    subject: Annotated[
        str,
        typer.Argument(metavar="SET|REPLICA|JOBID", help="Of what: its name, or a Slurm job's id.", show_default=False),
    ],
    at: Annotated[
        str | None, typer.Option(help="As it was then: a time with its zone, or how long ago: -90s, -10m, -2h, -3d.")
    ] = None,
    output: Annotated[Literal["text", "json"], typer.Option("--output", "-o", help="json is the operators' API's.")] = (
        "text"
    ),
) -> None:
    """Say why it is as it is: alert, rule, values, decision, refusals, replica, job, endpoint, drain, end; in UTC."""
    from controlplane import cli_why
    from controlplane.core.times import parse_moment

    try:
        moment = None if at is None else parse_moment(at, utc_now())
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--at") from None
    with_db(lambda db: cli_why.show(db, subject, moment, output, table_console()))


@cli.command(
    rich_help_panel=_SETS,
    epilog="[bold]Examples[/]\n\ncontrolplane apply -f sets.yaml --dry-run\n\ngenerate-sets | controlplane apply -f -",
)
def apply(
    file: Annotated[
        Path,
        typer.Option(
            "--file", "-f", help="YAML, as in docs/replica-sets.schema.json; - is standard input.", show_default=False
        ),
    ],
    dry_run: DryRun = False,
) -> None:
    """Make the replica sets of a file the ones in force; sets that it does not name stay as they are.

    The whole file is checked before anything is changed. A changed job rolls its replicas one by one.
    """
    settings = load_settings()
    from controlplane.app import script_options
    from controlplane.db import replica_sets
    from controlplane.slurm import script
    from controlplane.specs import SpecError, parse_file

    try:
        is_stdin = str(file) == "-"
        text = sys.stdin.read() if is_stdin else file.read_text(encoding="utf-8")
        specs = parse_file(text, directory=Path() if is_stdin else file.parent)
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{file}: {error.strerror if isinstance(error, OSError) else 'is not text'}")
    except SpecError as error:
        fail(*(f"{file}: {fault}" for fault in error.faults))
    refused = []
    for spec in specs:
        try:
            script.check(spec, script_options(settings))
        except script.ScriptError as error:
            refused.append(f"{file}: {spec.name}: {error}")
    if refused:
        fail(*refused)

    async def apply_all(db: Database) -> None:
        outcomes = await replica_sets.apply_all(db, specs, actor=actor(), now=utc_now(), dry_run=dry_run)
        for spec, outcome in zip(specs, outcomes, strict=True):
            typer.echo(f"{spec.name} {outcome}{_dry(dry_run)}")

    with_db(apply_all, settings)


@cli.command(
    rich_help_panel=_SETS,
    epilog="[bold]Examples[/]\n\ncontrolplane scale qwen3-8b --replicas 3\n\n"
    "controlplane scale qwen3-8b 3 --until 2h --reason demo\n\n"
    "controlplane scale qwen3-8b --min 1 --max 8 --reason launch",
)
def scale(
    replica_set: SetName,
    count: Annotated[
        int | None, typer.Argument(min=0, callback=check_count, help="The same as --replicas.", show_default=False)
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option(
            min=0,
            callback=check_count,
            help="How many are wanted. With --until they are pinned; else alerts go on from there.",
        ),
    ] = None,
    low: Annotated[
        int | None, typer.Option("--min", min=0, callback=check_count, help="The least there may be.")
    ] = None,
    high: Annotated[
        int | None, typer.Option("--max", min=0, callback=check_count, help="The most there may be.")
    ] = None,
    until: Annotated[
        str | None, typer.Option(help="When it ends: a time with its zone, or how long: 90m, 2h, 3d.")
    ] = None,
    reason: Reason = None,
    dry_run: DryRun = False,
) -> None:
    """Say how many replicas are wanted, or between which bounds.

    With --until a count is pinned, whatever alerts and schedules say, and bounds end then.
    Without it alerts go on from the count, a pin ends, and bounds last until the next apply.
    """
    if count is not None and replicas is not None:
        raise typer.BadParameter("give the count once")
    replicas = count if replicas is None else replicas
    if replicas is None and low is None and high is None:
        raise typer.BadParameter("give --replicas, --min or --max")
    from controlplane.db import replica_sets

    now = utc_now()
    end = None if until is None else _time(until, now)
    after = with_db(
        lambda db: replica_sets.scale(
            db,
            replica_set,
            actor=actor(),
            now=now,
            replicas=replicas,
            min_replicas=low,
            max_replicas=high,
            until=end,
            reason=reason,
            dry_run=dry_run,
        )
    )
    typer.echo(f"{_in_words(after)}{_dry(dry_run)}")


@cli.command(
    rich_help_panel=_SETS,
    epilog="[bold]Examples[/]\n\ncontrolplane pause qwen3-8b --until 2h --reason maintenance\n\n"
    "controlplane pause qwen3-8b --until 2027-01-31T18:00+01:00",
)
def pause(
    replica_set: SetName,
    reason: Reason = None,
    until: Until = None,
    dry_run: DryRun = False,
) -> None:
    """Take a set out of service: no new requests, its replicas drain, none is started."""
    from controlplane.db import replica_sets

    now = utc_now()
    end = None if until is None else _time(until, now)
    after = with_db(
        lambda db: replica_sets.pause(
            db, replica_set, actor=actor(), now=now, reason=reason, until=end, dry_run=dry_run
        )
    )
    typer.echo(f"{_in_words(after)}{_dry(dry_run)}")


@cli.command(rich_help_panel=_SETS)
def resume(replica_set: SetName, dry_run: DryRun = False) -> None:
    """Put a paused set back into service."""
    from controlplane.db import replica_sets

    after = with_db(lambda db: replica_sets.resume(db, replica_set, actor=actor(), now=utc_now(), dry_run=dry_run))
    typer.echo(f"{_in_words(after)}{_dry(dry_run)}")


MaybeSetName = Annotated[str | None, typer.Argument(help="Its name; or give --all.", show_default=False)]
All = Annotated[bool, typer.Option("--all", help="Every set, those included that are made later.")]


@cli.command(
    rich_help_panel=_SETS,
    epilog="[bold]Examples[/]\n\ncontrolplane freeze qwen3-8b --until 2h --reason benchmark\n\n"
    "controlplane freeze --all --reason incident",
)
def freeze(
    replica_set: MaybeSetName = None,
    every: All = False,
    reason: Reason = None,
    until: Until = None,
    dry_run: DryRun = False,
) -> None:
    """Keep a set, or all, from being scaled by alerts and schedules; their replicas serve on.

    What ends is replaced, unhealthy replicas too, and `scale` is obeyed.
    What would have been done is recorded as FROZEN: see `controlplane get decisions`.
    """
    _check_whom(replica_set, every)
    from controlplane.db import freezes

    now = utc_now()
    end = None if until is None else _time(until, now)

    async def work(db: Database) -> str:
        if replica_set is None:
            await freezes.freeze_all(db, actor=actor(), now=now, reason=reason, until=end, dry_run=dry_run)
            return f"all sets: frozen {_until(end, 'unfrozen')}"
        return _in_words(
            await freezes.freeze(db, replica_set, actor=actor(), now=now, reason=reason, until=end, dry_run=dry_run)
        )

    typer.echo(f"{with_db(work)}{_dry(dry_run)}")


@cli.command(rich_help_panel=_SETS)
def unfreeze(replica_set: MaybeSetName = None, every: All = False, dry_run: DryRun = False) -> None:
    """Let alerts and schedules scale a set again, or all.

    A freeze of all sets and a set's own are two: lifting the one leaves the other.
    """
    _check_whom(replica_set, every)
    from controlplane.db import freezes, replica_sets

    async def work(db: Database) -> str:
        if replica_set is not None:
            return _in_words(await freezes.unfreeze(db, replica_set, actor=actor(), now=utc_now(), dry_run=dry_run))
        await freezes.unfreeze_all(db, actor=actor(), now=utc_now(), dry_run=dry_run)
        own = [one.name for one in await replica_sets.load_all(db) if any(not it.is_of_all for it in one.freezes)]
        return "all sets: not frozen" + (f", but for {', '.join(own)}, by a freeze of its own" if own else "")

    typer.echo(f"{with_db(work)}{_dry(dry_run)}")


def _check_whom(replica_set: str | None, every: bool) -> None:
    if (replica_set is not None) is every:
        raise typer.BadParameter("give one set's name, or --all")


def _in_words(after: ReplicaSet) -> str:
    if after.is_paused:
        return f"{after.name}: paused {_until(after.paused_until, 'resumed')}"
    if after.spec.is_external:
        return f"{after.name}: in service"
    words = f"{after.name}: {after.desired_replicas} wanted, bounds {after.min_replicas} to {after.max_replicas}"
    if after.pin is not None:
        words += f"; pinned {_until(after.pin.until, '')}"
    for one in after.freezes:
        words += f"; {'all sets are ' if one.is_of_all else ''}frozen {_until(one.until, 'unfrozen')}"
    return words


def _until(end: datetime | None, undone: str) -> str:
    return f"until {end:%Y-%m-%d %H:%M} UTC" if end is not None else f"until {undone}"


# --- single replicas -------------------------------------------------------------------------------------


@cli.command(rich_help_panel=_REPLICAS)
def drain(replica: ReplicaName, reason: Reason = None, dry_run: DryRun = False) -> None:
    """Give a replica no new requests, let those in flight finish, then end its job."""
    _obey(replica, Verb.DRAIN, reason, dry_run)


@cli.command(rich_help_panel=_REPLICAS)
def undrain(replica: ReplicaName, reason: Reason = None, dry_run: DryRun = False) -> None:
    """Undo a drain, as long as the job was not asked to end."""
    _obey(replica, Verb.UNDRAIN, reason, dry_run)


@cli.command(rich_help_panel=_REPLICAS)
def cancel(replica: ReplicaName, reason: Reason = None, dry_run: DryRun = False) -> None:
    """End a replica's job now; its requests in flight break off. Prefer drain."""
    _obey(replica, Verb.CANCEL, reason, dry_run)


def _obey(name: str, verb: Verb, reason: str | None, dry_run: bool) -> None:
    from controlplane.db import replicas

    obeyed = with_db(
        lambda db: replicas.obey(db, name, verb, actor=actor(), now=utc_now(), reason=reason, dry_run=dry_run)
    )
    nothing = "" if obeyed.is_changed else ", as before"
    typer.echo(f"{obeyed.replica.name} is {obeyed.replica.phase}{nothing}{_dry(dry_run)}")


if __name__ == "__main__":
    main()
