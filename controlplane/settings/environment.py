"""Reads the settings from environment variables, and names everything that is wrong with them at once.

A secret may come from a file: `<variable>_FILE` names it, and it is read once, at start. A variable that is set to
nothing counts as not set. No fault shows a secret.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from controlplane.settings.forms import Form, PostgresqlUri
from controlplane.settings.sections import (
    AlertmanagerSettings,
    AlertsSettings,
    DatabaseSettings,
    GrafanaSettings,
    LogSettings,
    NodesSettings,
    OperatorSettings,
    ProbeSettings,
    ProxySettings,
    ReconcileSettings,
    Section,
    SlurmSettings,
    WebhookSettings,
    WebSettings,
)

PREFIX = "CONTROLPLANE_"
_SLURM = f"{PREFIX}SLURM__"
_TOKEN_WAYS = tuple(_SLURM + way for way in ("TOKEN", "TOKEN_FILE", "TOKEN_COMMAND", "JWT_KEY_FILE"))
_SHOWN_CHARACTERS = 64


@dataclass(frozen=True, slots=True)
class Fault:
    """One wrong key: which, what is wrong with it, and what to do."""

    variable: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.variable}: {self.problem}; {self.remedy}"


class SettingsError(Exception):
    """The settings are wrong; `faults` has an entry for every wrong key."""

    def __init__(self, faults: list[Fault]) -> None:
        self.faults = sorted(faults, key=lambda fault: fault.variable)
        super().__init__("\n".join(map(str, self.faults)))


class Settings(BaseSettings):
    """All of it. Immutable; made by `load` only."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        enable_decoding=False,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
    )

    database_url: PostgresqlUri = Field(
        validation_alias="DATABASE_URL", description="PostgreSQL 14 or newer, as a libpq URI"
    )
    database: DatabaseSettings = DatabaseSettings()
    web: WebSettings = WebSettings()
    proxy: ProxySettings = ProxySettings()
    webhook: WebhookSettings = WebhookSettings()
    operator: OperatorSettings = OperatorSettings()
    slurm: SlurmSettings = SlurmSettings()
    reconcile: ReconcileSettings = ReconcileSettings()
    nodes: NodesSettings = NodesSettings()
    probe: ProbeSettings = ProbeSettings()
    alerts: AlertsSettings = AlertsSettings()
    grafana: GrafanaSettings = GrafanaSettings()
    alertmanager: AlertmanagerSettings = AlertmanagerSettings()
    log: LogSettings = LogSettings()

    @classmethod
    def load(cls, environ: Mapping[str, str]) -> Self:
        """The settings that these environment variables make. Raises SettingsError, with every fault there is."""
        faults: list[Fault] = []
        given = dict(_resolved(environ, faults))
        faults += _contradictions(given)
        try:
            settings = cls(**_Given(cls, given)())
        except ValidationError as error:
            faults += _faults_of(error, environ)
        else:
            if not faults:
                return settings
        raise SettingsError(faults)

    @classmethod
    def settings_customise_sources(cls, *_: object, **sources: Any) -> tuple[PydanticBaseSettingsSource, ...]:
        return (sources["init_settings"],)  # `load` was given the variables; the process's own do not count


class _Given(EnvSettingsSource):
    """pydantic's own reading of environment variables, from a mapping."""

    def __init__(self, settings_class: type[BaseSettings], given: Mapping[str, str]) -> None:
        self._given = given
        super().__init__(settings_class)

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return {name.lower(): value for name, value in self._given.items()}


# --- one by one ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Variable:
    """One setting, as an operator knows it."""

    name: str
    info: FieldInfo

    @property
    def form(self) -> str:
        return next(part.text for part in _metadata(self.info) if isinstance(part, Form))

    @property
    def is_secret(self) -> bool:
        return "Secret" in repr(self.info.annotation)

    @property
    def default(self) -> str | None:
        """As it would be written; None: there is none."""
        default = self.info.default
        if self.info.is_required() or default in (None, ()):
            return None
        return "-".join(map(str, default)) if isinstance(default, tuple) else f"{default}".removesuffix(".0")


def variables() -> dict[str, Variable]:
    """Every setting by its variable's name; `_FILE` twins are not named."""
    found = {}
    for section, info in Settings.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            for name, field in info.annotation.model_fields.items():
                variable = Variable(f"{PREFIX}{section}__{name}".upper(), field)
                found[variable.name] = variable
        else:
            variable = Variable(str(info.validation_alias), info)
            found[variable.name] = variable
    return found


def _metadata(info: FieldInfo) -> Iterator[Any]:
    """What is annotated, also inside `... | None`."""
    yield from info.metadata
    for part in getattr(info.annotation, "__args__", ()):
        yield from getattr(part, "__metadata__", ())


# --- what can be wrong -----------------------------------------------------------------------------------


def _resolved(environ: Mapping[str, str], faults: list[Fault]) -> Iterator[tuple[str, str]]:
    """What is set, by variable, with `_FILE` twins read; what makes no sense is added to the faults."""
    known = variables()
    twins = {f"{name}_FILE": name for name, variable in known.items() if variable.is_secret}
    for name, value in environ.items():
        if not value:
            continue
        if name in known:  # this first: a file that is read again for every request is a setting of its own
            yield name, value
        elif name in twins and environ.get(twins[name]):
            faults.append(Fault(name, f"{twins[name]} is set as well", "keep one of the two"))
        elif name in twins:
            try:
                yield twins[name], Path(value).read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                problem = error.strerror if isinstance(error, OSError) else "it is not text"
                faults.append(Fault(name, f"cannot read {_shown(value)}: {problem}", "name a file that can be read"))
        elif name.startswith(PREFIX) and not _is_service_link(name, value):
            near = difflib.get_close_matches(name, [*known, *twins], n=1, cutoff=0.8)
            remedy = f"did you mean {near[0]}?" if near else "remove it; docs/configuration.md lists what there is"
            faults.append(Fault(name, "there is no such setting", remedy))


def _is_service_link(name: str, value: str) -> bool:
    """Kubernetes tells every pod of every service: one named `controlplane` makes no wrong keys."""
    return "__" not in name and (
        re.match(r"(tcp|udp|sctp)://", value) is not None
        or re.fullmatch(r"\w+_(SERVICE_(HOST|PORT)(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)_(PROTO|PORT|ADDR))", name) is not None
    )


def _contradictions(given: Mapping[str, str]) -> Iterator[Fault]:
    """What is wrong with variables together, though each may be right."""
    url = given.get(f"{_SLURM}URL")
    ways = [way for way in _TOKEN_WAYS if way in given]
    if len(ways) > 1:
        yield Fault(ways[0], f"is set together with {' and '.join(ways[1:])}", "keep one way to a Slurm token")
    if url is None:
        for way in ways[:1]:
            yield Fault(f"{_SLURM}URL", f"is not set, but {way} is", "set both, or neither to run without Slurm")
        return
    if not ways and not url.startswith("unix:"):
        yield Fault(f"{_SLURM}URL", "slurmrestd wants a token over HTTP", f"set one of {', '.join(_TOKEN_WAYS)}")
    if f"{_SLURM}USER_NAME" not in given:
        yield Fault(f"{_SLURM}USER_NAME", "is not set", "name the Slurm user whom the jobs shall belong to")
    if f"{_SLURM}JOB_DIRECTORY" not in given:
        remedy = "name a directory on the compute nodes that this Slurm user may write to"
        yield Fault(f"{_SLURM}JOB_DIRECTORY", "is not set", remedy)


def _faults_of(error: ValidationError, environ: Mapping[str, str]) -> list[Fault]:
    known = variables()
    faults: dict[str, Fault] = {}  # a list has one fault, however many of its parts are wrong
    for detail in error.errors(include_input=False, include_url=False):
        where = [str(part) for part in detail["loc"]]
        variable = known[where[0] if where[0] in known else f"{PREFIX}{where[0]}__{where[1]}".upper()]
        name = variable.name
        if detail["type"] == "missing":
            if not environ.get(f"{name}_FILE"):  # else it was said that the file cannot be read
                faults[name] = Fault(name, "is not set", f"give {variable.form}")
            continue
        value = environ.get(name, "")
        shown = "its value" if variable.is_secret else _shown(value)
        remedy = "correct it" + (f", or remove it for the default, {variable.default}" if variable.default else "")
        faults[name] = Fault(name if value else f"{name}_FILE", f"{shown} is not {variable.form}", remedy)
    return list(faults.values())


def _shown(value: str) -> str:
    value = re.sub(r"(?<=//)[^/@]*(?=@)", "***", value)  # a URL's user and password
    return repr(value if len(value) <= _SHOWN_CHARACTERS else value[:_SHOWN_CHARACTERS] + "...")
