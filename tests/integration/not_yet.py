"""What the contract promises and the data plane does not do yet: the one list of expected failures.

Each entry is a reason by a short name. A test that needs one is marked `@not_yet("name")`, and may fail while the entry
is here. Delete an entry and its tests count.
"""

from __future__ import annotations

import pytest

NOT_YET: dict[str, str] = {}


def not_yet(name: str) -> pytest.MarkDecorator:
    """Expected to fail while the name is listed; no mark at all once it is not."""
    return pytest.mark.xfail(name in NOT_YET, reason=NOT_YET.get(name, ""), strict=False)
