"""`controlplane check`: whether what the settings point at works, one line each, with what to do where it does not.

Nothing is changed anywhere. A warning is something that works and that an operator should know; only a failure counts.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum

from prometheus_client import CollectorRegistry

from controlplane import app
from controlplane.clock import utc_now
from controlplane.db import Database, DatabaseError, missing_migrations, replica_sets
from controlplane.dependencies import remedy_for
from controlplane.metrics import ControlPlaneMetrics
from controlplane.settings import Settings, SettingsError
from controlplane.slurm import script
from controlplane.slurm.errors import SlurmError

_SHORT_LIFE = timedelta(hours=1)


class Verdict(StrEnum):
    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, how it is, and what to do."""

    subject: str
    verdict: Verdict
    sentence: str
    remedy: str | None = None


async def findings(environ: Mapping[str, str]) -> AsyncIterator[Finding]:
    """Each as soon as it is known. With wrong settings, those are all there is."""
    try:
        settings = Settings.load(environ)
    except SettingsError as error:
        for fault in error.faults:
            yield Finding("settings", Verdict.FAILED, f"{fault.variable}: {fault.problem}", fault.remedy)
        return
    yield Finding("settings", Verdict.OK, "every variable is understood")
    yield _credentials(settings)
    async with Database(app.database_options(settings)) as db:
        async for finding in _database(db):
            yield finding
        scripts = app.script_options(settings)
        if scripts is None:
            yield Finding("slurm", Verdict.OK, "not set: only replica sets with fixed endpoints are served")
            return
        async for finding in _slurm(settings):
            yield finding
        yield await _templates(db, scripts)
    yield _job_directory(settings)


def _credentials(settings: Settings) -> Finding:
    webhook = settings.webhook
    if webhook.bearer_tokens or webhook.basic_credentials or webhook.hmac_secrets:
        return Finding("webhooks", Verdict.OK, "senders of alerts have a credential")
    remedy = "set CONTROLPLANE_WEBHOOK__BEARER_TOKENS, __BASIC_CREDENTIALS or __HMAC_SECRETS"
    return Finding("webhooks", Verdict.WARNING, "no credential is set, so that every delivery is refused", remedy)


async def _database(db: Database) -> AsyncIterator[Finding]:
    try:
        await db.ping()
        yield Finding("database", Verdict.OK, "PostgreSQL answers")
        missing = await missing_migrations(db)
    except DatabaseError as error:
        yield Finding("database", Verdict.FAILED, str(error), "see that PostgreSQL runs and DATABASE_URL is right")
        return
    if missing:
        yield Finding("migrations", Verdict.FAILED, f"missing: {', '.join(missing)}", "run `controlplane migrate`")
    else:
        yield Finding("migrations", Verdict.OK, "the schema is this version's")


async def _slurm(settings: Settings) -> AsyncIterator[Finding]:
    slurm = app.slurm_client(settings, ControlPlaneMetrics(CollectorRegistry()))
    assert slurm is not None  # asked for only where one is set
    async with slurm:
        try:
            ping = await slurm.ping()
        except SlurmError as error:
            yield Finding("slurm", Verdict.FAILED, str(error), remedy_for(error))
            return
    yield Finding("slurm", Verdict.OK, f"Slurm {ping.release} answers, API {ping.api_version}")
    if ping.token_expires_at is None:
        yield Finding("token", Verdict.OK, "accepted; it does not say when it expires")
        return
    left = ping.token_expires_at - utc_now()
    words = f"accepted; good for {timedelta(seconds=int(left.total_seconds()))} h"
    if settings.slurm.jwt_key_file is not None:
        yield Finding("token", Verdict.OK, "accepted; a short-lived one is made for each request")
    elif left >= _SHORT_LIFE:
        yield Finding("token", Verdict.OK, words)
    else:
        remedy = "see that it is renewed in time, or use CONTROLPLANE_SLURM__TOKEN_COMMAND or __JWT_KEY_FILE"
        yield Finding("token", Verdict.WARNING, words, remedy)


async def _templates(db: Database, scripts: script.ScriptOptions) -> Finding:
    """Whether a script can be made for every replica set that there is."""
    for directory in scripts.template_directories:
        if not directory.is_dir():
            remedy = "correct CONTROLPLANE_SLURM__TEMPLATE_DIRECTORY"
            return Finding("templates", Verdict.FAILED, f"{directory} is no directory", remedy)
    try:
        known = await replica_sets.load_all(db)
    except DatabaseError:
        return Finding("templates", Verdict.WARNING, "not tried: the replica sets cannot be read", "see database above")
    run_by_slurm = [one.spec for one in known if not one.spec.is_external]
    for spec in run_by_slurm:
        try:
            script.check(spec, scripts)
        except script.ScriptError as error:
            return Finding("templates", Verdict.FAILED, f"{spec.name}: {error}", "correct the template, or the spec")
    return Finding("templates", Verdict.OK, f"make a script for each of {len(run_by_slurm)} replica sets of Slurm's")


def _job_directory(settings: Settings) -> Finding:
    directory = settings.slurm.job_directory
    assert directory is not None  # settings insist on it where there is a Slurm
    if directory.is_dir():
        return Finding("job directory", Verdict.OK, f"{directory} is here")
    sentence = f"{directory} is not on this host, so that it could not be looked at"
    return Finding("job directory", Verdict.WARNING, sentence, "see that the compute nodes have it and jobs may write")
