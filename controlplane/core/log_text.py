"""What may be shown of text that others wrote: the end of a job's log, and answers that may quote what we sent."""

from __future__ import annotations

import re
from collections.abc import Iterable

MOST_CHARACTERS = 2048

_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|.)?", re.DOTALL)
_LIKE_SECRETS = re.compile(
    r"eyJ[\w-]+(?:\.[\w-]*)*"  # a JSON web token
    r"|\b(?:hf|sk|ghp|glpat|xox[abp])[-_][\w-]{8,}"  # keys that say whose they are
    r"|(?<=[Bb]earer )[^\s\"']{6,}"
)
_ASSIGNED = re.compile(
    r"(?i)(\b[\w.-]*(?:api[_-]?key|token|secret|password)\b[\"']?\s*[=:]\s*[\"']?)[^\s\"',;&)\]}]{4,}"
)
_SHORTEST_SECRET = 6  # a shorter value stands in too many innocent words


def without(text: str, *secrets: str | None) -> str:
    """`text` without these secrets. To be called before anything is cut off: half of a secret is not found."""
    for secret in secrets:
        if secret and len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, "<secret>")
    return text


def shown_tail(raw: bytes, secrets: Iterable[str], *, is_cut: bool) -> str:
    """The end of a log as text. `is_cut`: `raw` does not begin where the log does, and may begin inside a secret."""
    text = raw.decode("utf-8", "replace")
    if is_cut:
        line, _, rest = text.partition("\n")
        text = rest or line.partition(" ")[2]
    text = _ESCAPE.sub("", text)
    text = without(text, *sorted(set(secrets), key=len, reverse=True))
    text = _ASSIGNED.sub(r"\1<secret>", _LIKE_SECRETS.sub("<secret>", text))
    # what a progress bar wrote last is what a person saw
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    lines = ["".join(one if one.isprintable() else " " for one in line.expandtabs(4)).rstrip() for line in lines]
    text = "\n".join(lines).strip("\n")
    if len(text) <= MOST_CHARACTERS:
        return text
    text = text[-MOST_CHARACTERS:]
    return text.partition("\n")[2] or text
