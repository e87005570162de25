"""Which endpoint a conversation, or a session, belongs to: consistent hashing, bounded by load.

An engine keeps the attention state of the prompts it has seen. The next turn of a conversation repeats all turns
before it: at the same replica they cost nothing, at another one they are computed anew.

Each endpoint has many points on a ring; a key belongs to the first point after its own hash. One endpoint more, or
less, of n moves one n-th of the keys and no other. Where an endpoint is at its bound the walk goes on along the ring,
so that the overflow of a key always goes to the same next home (Mirrokni, Thorup, Zadimoghaddam: Consistent Hashing
with Bounded Loads, 2018). Hashes are the same in every process: several proxies agree without having talked.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from hashlib import blake2b

POINTS = 128
"""Of one endpoint: the parts of the ring then differ by about a tenth. A multiple of what one digest gives."""

BOUND_FACTOR = 1.25
"""How far above its share of all requests in flight an endpoint may be filled before its keys go elsewhere."""

FREE_IN_FLIGHT = 4
"""So few requests are no load to an engine that batches, and never a reason to leave a warm cache."""

_POINTS_OF_A_DIGEST = struct.Struct("<8Q")


def key_of(*parts: bytes | memoryview) -> bytes:
    """One key, of 8 bytes, for what is told apart by these parts."""
    digest = blake2b(digest_size=8)
    for part in parts:
        digest.update(b"%d:" % len(part))
        digest.update(part)
    return digest.digest()


def bound(in_flight: int, share: float, shares: float) -> float:
    """Below how many requests in flight an endpoint with this share of all `shares` takes one more.

    `in_flight`: of all endpoints together. Since the factor is above 1, there always is one below its bound.
    """
    return max(FREE_IN_FLIGHT, BOUND_FACTOR * (in_flight + 1) * share / shares)


class Ring:
    """Immutable. `members`: how many points each has, by names that outlive restarts."""

    __slots__ = ("_hashes", "_owners", "members")

    def __init__(self, members: Mapping[str, int]) -> None:
        self.members = dict(members)
        points = sorted(
            (point, owner) for owner, (name, count) in enumerate(members.items()) for point in _points(name, count)
        )
        self._hashes = [point for point, _ in points]
        self._owners = [owner for _, owner in points]

    def walk(self, key: bytes) -> Iterator[int]:
        """Every member once, by its place in `members`: the key's own first, then where its overflow goes."""
        owners = self._owners
        if not owners:
            return
        start = bisect_left(self._hashes, int.from_bytes(key, "little"))
        if start == len(owners):
            start = 0
        owner = owners[start]
        yield owner
        seen = {owner}
        left = len(self.members) - 1
        at = start
        while left:
            at = at + 1 if at + 1 < len(owners) else 0
            owner = owners[at]
            if owner not in seen:
                seen.add(owner)
                left -= 1
                yield owner


def points_of(weight: int, heaviest: int) -> int:
    """How many points an endpoint has beside one that weighs most."""
    return max(_POINTS_OF_A_DIGEST.size // 8, round(POINTS * weight / heaviest))


def _points(name: str, count: int) -> Iterator[int]:
    per_digest = _POINTS_OF_A_DIGEST.size // 8
    for number in range(-(-count // per_digest)):
        digest = blake2b(b"%d#%b" % (number, name.encode())).digest()
        yield from _POINTS_OF_A_DIGEST.unpack(digest)[: count - number * per_digest]
