"""What the command line's verbs share: settings, a database that answers, and one way to fail.

What an operator can be told is one sentence on stderr, never a traceback. Exit codes: 1 failed, 2 the command line or
the settings are wrong.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from controlplane.db import Database
    from controlplane.settings import Settings

T = TypeVar("T")

FAILED, WRONG = 1, 2
_WIDTH_IN_PIPES = 1000


def load_settings() -> Settings:
    from controlplane.settings import Settings, SettingsError

    try:
        return Settings.load(os.environ)
    except SettingsError as error:
        fail(*map(str, error.faults), code=WRONG)


def with_db(work: Callable[[Database], Awaitable[T]], settings: Settings | None = None) -> T:
    """What `work` returns, given the database; or one sentence and the end."""
    settings = settings or load_settings()
    from controlplane.core.verbs import VerbRefused
    from controlplane.db import Database, DatabaseError, DatabaseOptions, DbUnavailable, missing_migrations

    options = DatabaseOptions(
        url=settings.database_url.get_secret_value(),
        max_connections=1,
        timeout_seconds=settings.database.timeout_seconds,
        statement_timeout_seconds=settings.database.statement_timeout_seconds,
        application_name="controlplane-cli",
    )

    async def connected() -> T:
        async with Database(options) as db:
            await db.ping()
            if missing := await missing_migrations(db):
                fail(f"the database lacks the migrations {', '.join(missing)}; run `controlplane migrate`")
            return await work(db)

    quiet_libraries()
    try:
        return asyncio.run(connected())
    except DbUnavailable as error:
        fail(f"PostgreSQL: {one_line(error)}; see that it runs and that DATABASE_URL is right")
    except (DatabaseError, VerbRefused, ValueError) as error:  # the last: a field's name, and what is wrong with it
        fail(one_line(error))


def quiet_libraries() -> None:
    """What goes wrong is said once, in our words."""
    import logging

    logging.getLogger("psycopg").setLevel(logging.CRITICAL)


def table_console() -> Console:
    """Where tables are printed: on a terminal as wide as that is, in a pipe as wide as they need."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=_WIDTH_IN_PIPES)


def actor() -> str:
    """Who says so, for the audit."""
    import getpass

    try:
        return f"cli:{getpass.getuser()}"
    except (KeyError, OSError):  # a container's user may have no name
        return f"cli:{os.getuid()}"


def time_of(text: str, now: datetime) -> datetime:
    """A time with its zone, or how long from now; typer's BadParameter says what it must be."""
    units = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
    if match := re.fullmatch(r"(\d{1,6})([smhd])", text):
        return now + timedelta(**{units[match[2]]: int(match[1])})
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        time = None
    if time is None or time.tzinfo is None:
        raise typer.BadParameter(
            f"{text!r} is neither a time with its zone, as 2027-01-31T18:00+01:00, nor how long, as 90m, 2h or 3d",
            param_hint="--until",
        )
    return time.astimezone(UTC)


def check_text(value: str | None) -> str | None:
    """An option's callback: the operators' API takes the same texts."""
    from controlplane.specs.file_format import Text

    return _checked(value, Text)


def check_count(value: int | None) -> int | None:
    """An option's callback: the operators' API takes the same counts of replicas."""
    from controlplane.specs.file_format import CountOrNone

    return _checked(value, CountOrNone)


def _checked(value: T, kind: Any) -> T:
    from pydantic import TypeAdapter, ValidationError

    if value is not None:
        try:
            TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            raise typer.BadParameter(error.errors()[0]["msg"]) from None
    return value


def dry(dry_run: bool) -> str:
    return " (dry run: nothing was changed)" if dry_run else ""


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def fail(*sentences: str, code: int = FAILED) -> NoReturn:
    for sentence in sentences:
        typer.secho(f"error: {sentence}", err=True, fg=typer.colors.RED)
    raise typer.Exit(code)
