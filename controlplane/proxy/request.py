"""What a client sends, as far as it must be understood to be routed: its id, its body, the model that it names.

The body is kept as the bytes that came; `model` is read out of it and nothing else.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

from starlette.types import Receive

from controlplane.proxy.errors import invalid_request, request_too_large

RawHeaders = Iterable[tuple[bytes, bytes]]

_SANE_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")


class ClientLeft(Exception):
    """Nobody waits for an answer any more."""


@dataclass(frozen=True, slots=True)
class ClientRequest:
    """A request that is to be passed on. Path and query are as the client wrote them."""

    path: bytes
    query: bytes
    headers: RawHeaders
    body: bytes
    request_id: bytes


def header(headers: RawHeaders, name: bytes) -> bytes | None:
    """The first header of that name; names are lower-case, as ASGI has them."""
    return next((value for key, value in headers if key == name), None)


def request_id_of(headers: RawHeaders) -> bytes:
    """The client's own id if it is fit for a log line and a header, else a new one."""
    given = header(headers, b"x-request-id")
    return given if given is not None and _SANE_ID.fullmatch(given) else os.urandom(16).hex().encode()


async def read_body(receive: Receive, headers: RawHeaders, limit: int) -> bytes:
    """The whole body. Raises ApiError when it is larger than `limit`, announced or not, and ClientLeft."""
    announced = header(headers, b"content-length")
    if announced is not None and int(announced) > limit:
        raise request_too_large(limit)
    pieces: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        piece = message.get("body", b"")
        size += len(piece)
        if size > limit:
            raise request_too_large(limit)
        pieces.append(piece)
        if not message.get("more_body", False):
            return b"".join(pieces) if len(pieces) > 1 else piece


def model_of(body: bytes) -> str:
    """The model that a JSON body names. Raises ApiError that says what is wrong, and with which parameter."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise invalid_request("The request body is not valid JSON.", param="body") from error
    if not isinstance(fields, dict):
        raise invalid_request("The request body must be a JSON object.", param="body")
    model = fields.get("model")
    if model is None:
        raise invalid_request("You must provide a model parameter.", param="model")
    if not isinstance(model, str) or not model:
        raise invalid_request("The model parameter must be a string that is not empty.", param="model")
    return model
