"""Tokens and words without a model: four bytes of UTF-8 are one token, and output is a walk through stock words.

The same prompt always gets the same output. `token_ids` and `text_of` undo each other, except that NUL is lost.
"""

from __future__ import annotations

import zlib

_BYTES_PER_TOKEN = 4
_SHORTEST_ANSWER_TOKENS = 16
_ANSWER_SPREAD = 113  # answers of 16 to 128 tokens when the request does not decide
_STORY = (
    "the queue grows, a replica is asked for, Slurm finds a node, the weights load, the probe passes, requests flow"
    " again, latency falls, the night is quiet, one replica is drained, its job ends, nobody has noticed, and"
)
_WORDS = _STORY.split()


def token_ids(text: str) -> list[int]:
    """The tokens of `text`; lone surrogates count as one byte."""
    data = text.encode("utf-8", "replace")
    return [
        int.from_bytes(data[start : start + _BYTES_PER_TOKEN], "little")
        for start in range(0, len(data), _BYTES_PER_TOKEN)
    ]


def text_of(tokens: list[int]) -> str:
    """The text of `tokens`. Raises OverflowError for a number that is no token."""
    data = b"".join(token.to_bytes(_BYTES_PER_TOKEN, "little").rstrip(b"\0") for token in tokens)
    return data.decode("utf-8", "replace")


def count_tokens(text: str) -> int:
    return -(-len(text.encode("utf-8", "replace")) // _BYTES_PER_TOKEN)


def seed_of(text: str) -> int:
    """A number that chooses the answer to this prompt."""
    return zlib.crc32(text.encode("utf-8", "replace"))


def natural_length(seed: int) -> int:
    """Tokens after which the answer would end by itself."""
    return _SHORTEST_ANSWER_TOKENS + seed % _ANSWER_SPREAD


def generated_text(seed: int, first: int, end: int) -> str:
    """Tokens `first` up to, not including, `end` of the answer: one word each."""
    return "".join(f" {_WORDS[(seed + position) % len(_WORDS)]}" for position in range(first, end))
