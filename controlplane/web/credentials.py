"""Who may tell us of alerts, and who may give orders.

A webhook may present a bearer token, a basic user and password, or an HMAC-SHA256 signature. The rule is one sentence:
every credential presented, of a kind that is configured, must be right, and there must be one. So a kind that is not
configured is not looked at (it could be meant for somebody in between), a wrong signature is refused beside a right
token, and with nothing configured everybody is refused. Several secrets of a kind are valid at once, for rotation.

A signature protects from replay only when the sender signs a timestamp: without one, a repeated notification is byte
for byte what it was before, and so is its signature.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from controlplane.web.errors import Refused

TOLERANCE = timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class WebhookCredentials:
    """What is accepted from senders of alerts. `basic_credentials` are `user:password`."""

    bearer_tokens: tuple[str, ...] = field(default=(), repr=False)
    basic_credentials: tuple[str, ...] = field(default=(), repr=False)
    hmac_secrets: tuple[str, ...] = field(default=(), repr=False)
    hmac_header: str = "X-Grafana-Alerting-Signature"
    hmac_timestamp_header: str | None = None  # the header's name as set in Grafana; None: nothing signs the time

    def __post_init__(self) -> None:
        if not all((*self.bearer_tokens, *self.basic_credentials, *self.hmac_secrets)):
            raise ValueError("an empty secret would let everybody in")


@dataclass(frozen=True, slots=True)
class OperatorToken:
    """`name` is the actor in the audit."""

    name: str
    token: str = field(repr=False)

    def __post_init__(self) -> None:
        if not self.name or not self.token:
            raise ValueError("an operator's token needs a name and a value")


@dataclass(frozen=True, slots=True)
class UsedSignature:
    """A signature that was right, and when it stops being accepted: until then it must not come again."""

    digest: bytes
    expires_at: datetime


def check_webhook(
    credentials: WebhookCredentials, headers: Mapping[str, str], body: bytes, *, now: datetime
) -> UsedSignature | None:
    """Raises Refused (401). Returns the signature whose replay must be refused, if the sender signs the time."""
    scheme, _, presented = headers.get("authorization", "").partition(" ")
    was_proven = False
    if credentials.bearer_tokens and scheme.lower() == "bearer":
        if not _is_among(_latin(presented.strip()), credentials.bearer_tokens):
            raise _unauthorized("the bearer token is wrong")
        was_proven = True
    if credentials.basic_credentials and scheme.lower() == "basic":
        if not _is_among(_decoded(presented), credentials.basic_credentials):
            raise _unauthorized("the user or the password is wrong")
        was_proven = True
    signature = headers.get(credentials.hmac_header)
    if credentials.hmac_secrets and signature is not None:
        return _check_signature(credentials, signature, headers, body, now)
    if not was_proven:
        raise _unauthorized("a credential is needed, of a kind that is configured here")
    return None


def actor_of(operators: Iterable[OperatorToken], headers: Mapping[str, str]) -> str:
    """The name of the operator whose bearer token this is. Raises Refused (401)."""
    scheme, _, presented = headers.get("authorization", "").partition(" ")
    token = _latin(presented.strip())
    names = [one.name for one in operators if hmac.compare_digest(one.token.encode(), token)]
    if scheme.lower() != "bearer" or not names:
        raise _unauthorized("an operator's bearer token is needed")
    return names[0]


def _check_signature(
    credentials: WebhookCredentials, signature: str, headers: Mapping[str, str], body: bytes, now: datetime
) -> UsedSignature | None:
    signed, signed_at = body, None
    if credentials.hmac_timestamp_header is not None:
        timestamp = headers.get(credentials.hmac_timestamp_header, "")
        signed_at = _time_of(timestamp)
        if signed_at is None:
            raise _unauthorized(f"the signature needs a Unix time in {credentials.hmac_timestamp_header}")
        signed = timestamp.encode() + b":" + body
    digests = [hmac.new(secret.encode(), signed, hashlib.sha256) for secret in credentials.hmac_secrets]
    if not _is_among(_latin(signature), [digest.hexdigest() for digest in digests]):
        raise _unauthorized("the signature does not match the body")
    if signed_at is None:
        return None
    if abs(now - signed_at) > TOLERANCE:
        raise _unauthorized("the signature's time is more than 5 minutes away from ours; compare the clocks")
    return UsedSignature(bytes.fromhex(signature), signed_at + TOLERANCE)


def _time_of(text: str) -> datetime | None:
    if not (text.isascii() and text.isdecimal() and len(text) <= 11):
        return None
    return datetime.fromtimestamp(int(text), UTC)


def _is_among(presented: bytes, valid: Iterable[str]) -> bool:
    matches = [hmac.compare_digest(one.encode(), presented) for one in valid]  # every one is compared
    return any(matches)


def _latin(header: str) -> bytes:
    return header.encode("latin-1", "replace")  # as it was on the wire


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text.strip(), validate=True)
    except (binascii.Error, ValueError):
        return b""


def _unauthorized(message: str) -> Refused:
    return Refused(401, message, headers={"WWW-Authenticate": "Bearer"})
