"""Who asks. Keys are looked up by their hash in the directory's memory; expiry is judged by this machine's clock."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256

from controlplane.clock import utc_now
from controlplane.core.types import ApiKey
from controlplane.proxy.errors import invalid_api_key


def credential_of(authorization: bytes | None, x_api_key: bytes | None) -> bytes | None:
    """The key that a request carries; `x-api-key` is what Anthropic's clients send."""
    if authorization is not None and authorization[:7].lower() == b"bearer ":
        return authorization[7:].strip() or x_api_key
    return x_api_key


def authenticate(credential: bytes | None, keys: Mapping[bytes, ApiKey]) -> ApiKey:
    """The key that was presented, if it is good now. Raises ApiError (401)."""
    key = good_key(sha256(credential).digest(), keys) if credential else None
    if key is None:
        raise invalid_api_key()
    return key


def good_key(credential_hash: bytes, keys: Mapping[bytes, ApiKey]) -> ApiKey | None:
    """The key of that hash, if it is good now.

    `keys` goes by SHA-256, as the database stores them. Looking a hash up in a dictionary takes a time that tells
    nothing of the key: whoever can vary the hash at will has the key already.
    """
    key = keys.get(credential_hash)
    if key is None or key.revoked_at is not None or (key.expires_at is not None and key.expires_at <= utc_now()):
        return None
    return key


def may_use(key: ApiKey, model: str) -> bool:
    return key.models is None or model in key.models
