"""Reading a request's body, within a limit that the sender cannot talk its way around."""

from __future__ import annotations

from starlette.requests import Request

from controlplane.web.errors import Refused


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """The whole body. Raises Refused (413) as soon as it is known to be larger, announced or in chunks."""
    too_large = Refused(413, f"the body is larger than {limit_bytes} bytes")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > limit_bytes:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit_bytes:
            raise too_large
    return bytes(body)
