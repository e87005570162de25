"""One way to a Slurm token: a given value, a file, a command, or the cluster's own key.

A source is read before every request, so a token that another program renews is picked up without a restart. Only
`MintedToken` knows beforehand how long its tokens live, which is what bounds how late a lost submit can still act.
A source that yields nothing usable raises `SlurmForbidden`. Nothing here ever shows a token: not in an error, not in a
repr.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from base64 import urlsafe_b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

import jwt

from controlplane.slurm.errors import SlurmForbidden, foreign_text


class TokenSource(Protocol):
    """Where tokens come from."""

    @property
    def lifetime(self) -> timedelta | None:
        """How long a token lives that is read now; None where somebody else decides."""

    async def read(self, now: datetime) -> str:
        """The token to use now. Raises `SlurmForbidden` if there is none."""


@dataclass(frozen=True, slots=True)
class StaticToken:
    """A token given once."""

    value: str = field(repr=False)
    lifetime: None = field(default=None, init=False)

    async def read(self, now: datetime) -> str:  # noqa: ARG002 -- the other sources need it
        return _usable(self.value, "the given token")


@dataclass(frozen=True, slots=True)
class TokenFile:
    """A file that somebody keeps up to date: the bare token, or the line `scontrol token` prints."""

    path: Path
    lifetime: None = field(default=None, init=False)

    async def read(self, now: datetime) -> str:  # noqa: ARG002 -- the other sources need it
        try:
            content = await asyncio.to_thread(self.path.read_text, encoding="ascii", errors="replace")
        except OSError as error:
            raise SlurmForbidden(f"token file {self.path}: {error.strerror}") from None
        return _usable(content, f"token file {self.path}")


@dataclass(frozen=True, slots=True)
class TokenCommand:
    """A program that prints a token, such as `scontrol token`. It is run without a shell."""

    argv: Sequence[str]
    timeout_seconds: float = 10.0
    lifetime: None = field(default=None, init=False)

    async def read(self, now: datetime) -> str:  # noqa: ARG002 -- the other sources need it
        what = f"token command {self.argv[0]}"
        try:
            process = await asyncio.create_subprocess_exec(
                *self.argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
        except OSError as error:
            raise SlurmForbidden(f"{what}: {error.strerror}") from None
        try:
            async with asyncio.timeout(self.timeout_seconds):
                output, complaint = await process.communicate()
        except TimeoutError:
            raise SlurmForbidden(f"{what}: no answer within {self.timeout_seconds:g} s") from None
        finally:
            if process.returncode is None:  # too slow, or the caller gave up: leave nothing running
                process.kill()
                await process.wait()
        if process.returncode != 0:
            said = foreign_text(complaint.decode("utf-8", "replace"))
            raise SlurmForbidden(f"{what}: exit code {process.returncode}: {said}")
        return _usable(output.decode("ascii", "replace"), what)


@dataclass(frozen=True, slots=True)
class MintedToken:
    """Tokens made here with the cluster's HS256 key: short-lived, so that a lost submit soon cannot act any more.

    The key is power over every user of the cluster. `scontrol token` writes the same three claims (slurm.conf,
    `AuthAltParameters=jwt_key=`).
    """

    key_path: Path
    user_name: str
    lifetime: timedelta = timedelta(
        seconds=45
    )  # above slurmrestd's own retries (20 s), far below an operator's patience

    async def read(self, now: datetime) -> str:
        try:
            key = await asyncio.to_thread(self.key_path.read_bytes)
        except OSError as error:
            raise SlurmForbidden(f"token key file {self.key_path}: {error.strerror}") from None
        if not key:
            raise SlurmForbidden(f"token key file {self.key_path}: it is empty")
        issued_at = int(now.timestamp())
        claims = {"iat": issued_at, "exp": issued_at + int(self.lifetime.total_seconds()), "sun": self.user_name}
        return _signed(claims, key)


def _signed(claims: Mapping[str, object], key: bytes) -> str:
    """A JSON web token, HS256. Slurm takes any file as the key, such as the PEM file of `openssl genrsa` that its older
    manuals made; PyJWT refuses to sign with one.
    """
    parts = [json.dumps(part, separators=(",", ":")).encode() for part in ({"alg": "HS256", "typ": "JWT"}, claims)]
    message = b".".join(map(_base64url, parts))
    return b".".join((message, _base64url(hmac.digest(key, message, "sha256")))).decode()


def _base64url(content: bytes) -> bytes:
    return urlsafe_b64encode(content).rstrip(b"=")


def expires_at(token: str) -> datetime | None:
    """When `token` says that it expires; None if it does not say. Its signature is not checked."""
    try:
        claims = jwt.decode(token, options={"verify_signature": False})
        return datetime.fromtimestamp(float(claims["exp"]), tz=UTC)
    except (jwt.InvalidTokenError, KeyError, TypeError, ValueError, OverflowError, OSError):
        return None


def _usable(content: str, what: str) -> str:
    """The token in `content`; a stray blank or line break would otherwise break the request's headers."""
    token = content.strip().removeprefix("SLURM_JWT=")
    if not token:
        raise SlurmForbidden(f"{what}: it is empty")
    if not token.isascii() or not token.isprintable() or " " in token:
        raise SlurmForbidden(f"{what}: it holds something else than one token")
    return token
