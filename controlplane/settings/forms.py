"""The forms that settings have, and the words in which a value of another form is refused."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import psycopg
from psycopg.conninfo import conninfo_to_dict
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr


@dataclass(frozen=True, slots=True)
class Form:
    """What a value has to look like, in words that complete the sentence "this is not ..."."""

    text: str


def _split(value: object) -> object:
    return [part for part in map(str.strip, value.split(",")) if part] if isinstance(value, str) else value


def _pair(value: object) -> object:
    if not isinstance(value, str):
        return value
    name, _, secret = value.partition(":")
    if not (name and secret):
        raise ValueError("not a pair")
    return {"name": name, "secret": secret}


def _words(value: object) -> object:
    return shlex.split(value) if isinstance(value, str) else value


def _port_range(value: object) -> object:
    if not isinstance(value, str):
        return value
    first, _, last = value.partition("-")
    if not 1024 <= int(first) <= int(last) <= 65535:
        raise ValueError("not a range of ports")
    return int(first), int(last)


def _absolute(value: Path) -> Path:
    if not value.is_absolute():
        raise ValueError("relative")
    return value


def _http_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0 or parts.username is not None:
        raise ValueError("not such a URL")
    return value.rstrip("/")


def _slurm_url(value: str) -> str:
    return value if re.fullmatch(r"unix:/[^\0]+", value) else _http_url(value)


def _postgresql_uri(value: SecretStr) -> SecretStr:
    uri = value.get_secret_value()
    try:
        conninfo_to_dict(uri)  # else libpq would quote what it cannot read, with the password, at every attempt
    except psycopg.Error:
        raise ValueError("not such a URI") from None
    if urlsplit(uri).scheme not in ("postgresql", "postgres"):
        raise ValueError("not such a URI")
    return value


Port = Annotated[int, Field(ge=1, le=65535), Form("a port from 1 to 65535")]
PortRange = Annotated[
    tuple[int, int], BeforeValidator(_port_range), Form("a range of ports such as 20000-29999, from 1024 to 65535")
]
Count = Annotated[int, Field(ge=1), Form("a whole number above 0")]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False), Form("a number of seconds above 0")]
Word = Annotated[str, Field(pattern=r"^\S+$"), Form("one word")]
Command = Annotated[
    tuple[str, ...], BeforeValidator(_words), Field(min_length=1), Form("a command, quoted as for a shell")
]
FilePath = Annotated[Path, Form("a path")]
AbsolutePath = Annotated[Path, AfterValidator(_absolute), Form("an absolute path")]
HeaderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9-]+$"), Form("the name of an HTTP header")]
HttpUrl = Annotated[str, AfterValidator(_http_url), Form("a URL such as http://host:port, without user and password")]
SlurmUrl = Annotated[
    str,
    AfterValidator(_slurm_url),
    Form("an address such as http://host:6820, https://host or unix:/path/to/socket"),
]
PostgresqlUri = Annotated[
    SecretStr,
    AfterValidator(_postgresql_uri),
    Form("a libpq URI such as postgresql://user:password@host:5432/controlplane"),
]
Secret = Annotated[SecretStr, Form("a secret")]
Secrets = Annotated[tuple[SecretStr, ...], BeforeValidator(_split), Form("a comma-separated list of secrets")]


class NamedSecret(BaseModel):
    """`name:secret`."""

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)

    name: str
    secret: SecretStr


NamedSecrets = Annotated[
    tuple[Annotated[NamedSecret, BeforeValidator(_pair)], ...],
    BeforeValidator(_split),
    Form("a comma-separated list of name:secret pairs"),
]
