"""What a client sends, as far as it must be understood to be routed.

The body is kept as the bytes that came. A few fields are read out of it: the model, whether it streams, how many tokens
it may cost. msgspec reads them and skips the rest without building it, which takes a tenth of what `json` takes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from random import getrandbits

import msgspec

from controlplane.proxy.errors import invalid_request

RawHeaders = Iterable[tuple[bytes, bytes]]

_SANE_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
_ABSENT = msgspec.Raw()
_ASKS_FOR_USAGE = b'"stream_options":{"include_usage":true}'


class RequestHead:
    """What the head of a request says; the same one may be of many requests."""

    __slots__ = ("fields", "headers", "path", "query")

    def __init__(self, path: bytes, query: bytes, fields: list[tuple[bytes, bytes]]) -> None:
        self.path = path
        self.query = query  # with its question mark, or empty
        self.fields = fields  # all that came; names in lower case
        self.headers = b""  # those that may be sent on, as lines


class Request:
    """One request, as it was read."""

    __slots__ = ("body", "head", "is_http_10", "received_at", "request_id", "started_at")

    def __init__(self, head: RequestHead, request_id: bytes, body: bytes, started_at: float) -> None:
        self.head = head
        self.request_id = request_id
        self.body = body
        self.is_http_10 = False
        self.started_at = self.received_at = started_at  # received: with its whole body


class Asked(msgspec.Struct, gc=False):
    """The fields of a JSON body that concern the proxy; all others are the upstream's business."""

    model: str
    stream: bool = False
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    stream_options: msgspec.Raw = _ABSENT

    @property
    def most_tokens(self) -> int | None:
        """How many tokens the answer may have; None: the client leaves it to the model."""
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens
        return self.max_output_tokens if self.max_tokens is None else self.max_tokens


_decode: Callable[[bytes], Asked] = msgspec.json.Decoder(Asked).decode


def read_asked(body: bytes) -> Asked:
    """Raises ApiError that says what is wrong with the body, and with which parameter."""
    try:
        asked = _decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        asked = _read_leniently(body)
    if not asked.model:
        raise invalid_request("The model parameter must be a string that is not empty.", param="model")
    return asked


def _read_leniently(body: bytes) -> Asked:
    """For bodies that are odd and yet the upstream's to judge: `NaN`, a `max_tokens` of 1e3, `stream: "yes"`."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise invalid_request("The request body is not valid JSON.", param="body") from error
    if not isinstance(fields, dict):
        raise invalid_request("The request body must be a JSON object.", param="body")
    model = fields.get("model")
    if model is None:
        raise invalid_request("You must provide a model parameter.", param="model")
    if not isinstance(model, str):
        raise invalid_request("The model parameter must be a string that is not empty.", param="model")
    options = fields.get("stream_options")
    return Asked(
        model=model,
        stream=fields.get("stream") is True,
        stream_options=_ABSENT if options is None else msgspec.Raw(json.dumps(options).encode()),
    )


def asks_for_usage(asked: Asked) -> bool:
    """Whether the client itself wants to be told in its stream how many tokens were used."""
    options = _stream_options(asked)
    return isinstance(options, dict) and options.get("include_usage") is True


def with_usage_asked_for(body: bytes, asked: Asked) -> bytes:
    """The body, asking for the usage of a stream as well. All other bytes stay as they are."""
    if b'"stream_options"' not in body:
        at = body.index(b"{") + 1
        return b"%b%b,%b" % (body[:at], _ASKS_FOR_USAGE, body[at:])
    # Of two equal keys the last one counts (RFC 8259 leaves it open; Python's parser, hence vLLM, does it so).
    given = _stream_options(asked)
    if given is not None and not isinstance(given, dict):
        return body  # nonsense, which is the upstream's to refuse
    options = json.dumps({**(given or {}), "include_usage": True}, separators=(",", ":")).encode()
    at = body.rindex(b"}")
    return b'%b,"stream_options":%b%b' % (body[:at], options, body[at:])


def _stream_options(asked: Asked) -> object:
    try:
        return json.loads(bytes(asked.stream_options) or b"null")
    except (ValueError, RecursionError):  # msgspec has only skipped it: no UTF-8, or too deep
        return False


def request_id_of(given: bytes | None) -> bytes:
    """The client's own id if it is fit for a log line and a header, else a new one."""
    return given if given is not None and _SANE_ID.fullmatch(given) else b"%032x" % getrandbits(128)


def header(headers: RawHeaders, name: bytes) -> bytes | None:
    """The first header of that name; names are lower-case."""
    return next((value for key, value in headers if key == name), None)
