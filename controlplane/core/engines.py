"""What vLLM's arguments say of how much one replica does at once."""

from __future__ import annotations

from collections.abc import Sequence

DEFAULT_MAX_NUM_SEQS = 256
"""vLLM's own where it knows nothing better; on large GPUs it takes more, so whoever wants those says so."""
_MOST_DIGITS = 7


def runs_at_once(args: Sequence[str]) -> int:
    """How many requests a replica that is started with these runs at once; what comes beyond waits in its queue.

    vLLM takes `--name value` and `--name=value`, dashes and underscores alike, and the last of several. Each rank of
    data parallelism is an engine of its own. What cannot be read is left to vLLM to refuse.
    """
    return _number(args, "--max-num-seqs", DEFAULT_MAX_NUM_SEQS) * _number(args, "--data-parallel-size", 1, "-dp")


def _number(args: Sequence[str], name: str, default: int, short: str | None = None) -> int:
    found = default
    for at, arg in enumerate(args):
        given, sign, value = arg.partition("=")
        if given.replace("_", "-") != name and given != short:
            continue
        text = value if sign else args[at + 1] if at + 1 < len(args) else ""
        if text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS and int(text) >= 1:
            found = int(text)
    return found
