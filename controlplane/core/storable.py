"""What PostgreSQL can store of other people's JSON.

NUL, lone surrogates, NaN and the like are replaced, not refused: an alert is not to be lost over a summary's text.
"""

from __future__ import annotations

import math
from typing import Any


def storable(value: Any) -> Any:
    """The same JSON document, with what PostgreSQL's text and jsonb cannot hold replaced."""
    match value:
        case str() if value.isascii() and "\0" not in value:
            return value  # nearly every one
        case dict():
            return {storable(key): storable(inner) for key, inner in value.items()}
        case list():
            return [storable(inner) for inner in value]
        case str():
            return (
                value.replace("\0", "\N{REPLACEMENT CHARACTER}")
                .encode("utf-16", "surrogatepass")
                .decode("utf-16", "replace")
            )
        case float() if not math.isfinite(value):
            return None
        case int() if abs(value) >= 1e300:
            return None
        case _:
            return value
