"""Who asks. Keys are looked up by their hash in the directory's memory; expiry is judged by this machine's clock."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import datetime

from controlplane.core.types import ApiKey
from controlplane.proxy.errors import invalid_api_key
from controlplane.proxy.request import RawHeaders, header


def authenticate(headers: RawHeaders, keys: Mapping[bytes, ApiKey], now: datetime) -> ApiKey:
    """The key that the request carries, if it is good at `now`. Raises ApiError (401).

    `keys` goes by SHA-256, as the database stores them. Looking a hash up in a dictionary takes a time that tells
    nothing of the key: whoever can vary the hash at will has the key already.
    """
    credential = _bearer(headers) or header(headers, b"x-api-key")  # the latter is what Anthropic's clients send
    key = keys.get(hashlib.sha256(credential).digest()) if credential else None
    if key is None or key.revoked_at is not None or (key.expires_at is not None and key.expires_at <= now):
        raise invalid_api_key()
    return key


def may_use(key: ApiKey, model: str) -> bool:
    return key.models is None or model in key.models


def _bearer(headers: RawHeaders) -> bytes | None:
    scheme, _, credential = (header(headers, b"authorization") or b"").partition(b" ")
    return credential.strip() if scheme.lower() == b"bearer" else None
