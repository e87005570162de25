"""What an answer says of the tokens it cost, read in passing.

Three shapes are understood: OpenAI's `usage` (chat, completions, embeddings, rerank), the one of `/v1/responses`, and
Anthropic's of `/v1/messages`. An answer that says nothing, or says it in another shape, leaves the count unknown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress

import msgspec

_TAIL_BYTES = 8192  # of an answer that came in pieces: its usage is near the end
_LARGEST_READ_WHOLE = 65536
_LONGEST_EVENT = 65536  # a longer one is passed on unread
_ABSENT = msgspec.Raw()
_UNREADABLE = (msgspec.MsgspecError, ValueError, RecursionError)  # the last one: nested too deeply
USAGE = b'"usage"'
_END_OF_EVENT = re.compile(rb"\r\n\r\n|\n\n|\r\r")


class _Details(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    input_tokens_details: _Details | None = None
    cache_read_input_tokens: int | None = None


class _Part(msgspec.Struct, gc=False):
    usage: _Usage | None = None


class _Answer(msgspec.Struct, gc=False):
    usage: _Usage | None = None
    response: _Part | None = None  # the last event of /v1/responses
    message: _Part | None = None  # the first event of /v1/messages
    choices: msgspec.Raw = _ABSENT


class _Refusal(msgspec.Struct, gc=False):
    error: msgspec.Raw = _ABSENT


class _RefusalCode(msgspec.Struct, gc=False):
    code: int | None = None


_decode_answer: Callable[[bytes], _Answer] = msgspec.json.Decoder(_Answer).decode
_decode_usage: Callable[[str], _Usage] = msgspec.json.Decoder(_Usage).decode
_decode_refusal: Callable[[bytes], _Refusal] = msgspec.json.Decoder(_Refusal).decode
_decode_refusal_code: Callable[[bytes], _RefusalCode] = msgspec.json.Decoder(_RefusalCode).decode


class TokenCount:
    """Tokens of one answer, as far as it has said."""

    __slots__ = ("cached", "completion", "is_known", "prompt")

    def __init__(self) -> None:
        self.prompt = self.completion = self.cached = 0
        self.is_known = False

    def _add(self, usage: _Usage | None) -> None:
        if usage is None:
            return
        prompt = usage.prompt_tokens if usage.prompt_tokens is not None else usage.input_tokens
        completion = usage.completion_tokens if usage.completion_tokens is not None else usage.output_tokens
        if prompt is None and completion is None and usage.total_tokens is not None:
            prompt = usage.total_tokens  # embeddings and rerank of some servers
        if prompt is None and completion is None:
            return
        details = usage.prompt_tokens_details or usage.input_tokens_details
        cached = details.cached_tokens if details is not None else usage.cache_read_input_tokens
        self.is_known = True
        # a stream may say it in parts, and more than once: the largest of each is what it came to
        if prompt and prompt > self.prompt:
            self.prompt = prompt
        if completion and completion > self.completion:
            self.completion = completion
        if cached and cached > self.cached:
            self.cached = cached

    def _add_answer(self, answer: _Answer) -> None:
        if answer.usage is not None:
            self._add(answer.usage)
        if answer.response is not None:
            self._add(answer.response.usage)
        if answer.message is not None:
            self._add(answer.message.usage)


def tokens_of(body: bytes) -> TokenCount:
    """Of an answer that is one JSON document, and here whole."""
    tokens = TokenCount()
    try:
        answer = _decode_answer(body)
    except _UNREADABLE:
        return tokens
    tokens._add_answer(answer)
    return tokens


class BodyReader:
    """Reads the usage of an answer that is one JSON document."""

    __slots__ = ("_size", "_tail", "tokens")

    def __init__(self) -> None:
        self.tokens = TokenCount()
        self._tail = b""
        self._size = 0

    def feed(self, piece: bytes) -> None:
        if not self._size and len(piece) <= _LARGEST_READ_WHOLE:
            self._tail = piece
        else:
            self._tail = (self._tail + piece)[-_TAIL_BYTES:]
        self._size += len(piece)

    def end(self) -> None:
        """The body is complete."""
        if len(self._tail) == self._size:
            self.tokens = tokens_of(self._tail)
            return
        at = self._tail.rfind(USAGE)
        start = self._tail.find(b"{", at)
        if at < 0 or start < 0:
            return
        text = self._tail[start:].decode("utf-8", "replace")
        with suppress(*_UNREADABLE):
            _, end = json.JSONDecoder().raw_decode(text)
            self.tokens._add(_decode_usage(text[:end]))


class EventReader:
    """Reads the usage of an event stream, and hides the event that tells it from a client that did not ask for it.

    Whole events are passed on only, so that one can still be taken out when its end comes in another piece; and so that
    a comment may be put in at any time.
    """

    __slots__ = ("_hides_usage", "is_inside", "tail", "tokens")

    def __init__(self, *, hides_usage: bool) -> None:
        self.tokens = TokenCount()
        self.tail = b""  # of an event whose end has not come yet
        self.is_inside = False  # an event that was too long to wait for has been passed on in part
        self._hides_usage = hides_usage

    def feed(self, piece: bytes) -> bytes:
        """What of the stream may be passed on now."""
        if not self.tail and piece.endswith(b"\n\n"):
            self.is_inside = False
            return self._read(piece) if USAGE in piece else piece
        piece = self.tail + piece
        cut = _end_of_last_event(piece)
        if cut:
            self.is_inside = False
        if len(piece) - cut > _LONGEST_EVENT:
            cut = len(piece)
            self.is_inside = True
        self.tail = piece[cut:]
        piece = piece[:cut]
        return self._read(piece) if USAGE in piece else piece

    def _read(self, events: bytes) -> bytes:
        """Look at the events that speak of usage, which are few, and leave out what is hidden."""
        at = events.find(USAGE)
        while at >= 0:
            start = _end_of_last_event(events[:at])
            match = _END_OF_EVENT.search(events, at)
            end = len(events) if match is None else match.end()
            if self._is_to_hide(events[start:end]):
                events = events[:start] + events[end:]
                end = start
            at = events.find(USAGE, end)
        return events

    def _is_to_hide(self, event: bytes) -> bool:
        try:
            answer = _decode_answer(data_of(event))
        except _UNREADABLE:
            return False
        self.tokens._add_answer(answer)
        return self._hides_usage and answer.usage is not None and bytes(answer.choices).replace(b" ", b"") == b"[]"


def first_event(piece: bytes) -> bytes | None:
    """The first event of a stream that is not a comment, or None if it is not whole yet."""
    if piece.startswith(b"data:") and (end := piece.find(b"\n\n")) >= 0:
        return piece[: end + 2]
    start = 0
    for match in _END_OF_EVENT.finditer(piece):
        event = piece[start : match.end()]
        if data_of(event):
            return event
        start = match.end()
    return None


def data_of(event: bytes) -> bytes:
    """What an event carries; empty if it is a comment."""
    if event.startswith(b"data:") and event.find(b"\n", 0, -2) < 0 and event.endswith(b"\n\n"):
        return event[5:-2].strip()
    lines = event.splitlines()
    return b"\n".join(line[5:].strip() for line in lines if line.startswith(b"data:"))


def error_in(event: bytes) -> tuple[int, bytes] | None:
    """The status and the error object, as JSON, of an event that is an error; None if it is not one.

    vLLM answers 200 and then `data: {"error": {..., "code": 503}}` where the engine refuses or dies after the headers
    were sent.
    """
    data = data_of(event)
    if b'"error"' not in data[:256]:
        return None
    try:
        error = bytes(_decode_refusal(data).error)
    except _UNREADABLE:
        return None
    if error in (b"", b"null"):
        return None
    try:
        code = _decode_refusal_code(error).code
    except _UNREADABLE:
        code = None  # OpenAI's is a word, if there is one
    return (code if code is not None and 400 <= code <= 599 else 502), data


def _end_of_last_event(piece: bytes) -> int:
    return max(
        (at + len(end) for end in (b"\n\n", b"\r\n\r\n", b"\r\r") if (at := piece.rfind(end)) >= 0),
        default=0,
    )
