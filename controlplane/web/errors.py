"""Answers that say no: one JSON shape, `{"error": {"message", "field"?, "faults"?}}`, and never a stack or a secret."""

from __future__ import annotations

from collections.abc import Mapping

from loguru import logger
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from controlplane.core.verbs import VerbRefused
from controlplane.db import DatabaseError, DbUnavailable, NotFound, Stale
from controlplane.specs import Fault, SpecError


class Refused(Exception):
    """The request cannot be granted as it is. `field`: the part of it that is at fault."""

    def __init__(
        self, status_code: int, message: str, *, field: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.message = message
        self.field = field
        self.headers = headers


def error_response(
    status_code: int,
    message: str,
    *,
    field: str | None = None,
    faults: tuple[Fault, ...] = (),
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    error: dict[str, object] = {"message": message}
    if field:
        error["field"] = field
    if faults:
        error["faults"] = [{"field": fault.path, "message": fault.message} for fault in faults]
    return JSONResponse({"error": error}, status_code=status_code, headers=headers)


async def answer_error(_request: Request, error: Exception) -> Response:
    """The answer to each exception that a route of this room lets through."""
    match error:
        case Refused():
            return error_response(error.status_code, error.message, field=error.field, headers=error.headers)
        case SpecError():
            return error_response(400, str(error), field=error.faults[0].path, faults=error.faults)
        case NotFound():
            return error_response(404, str(error))
        case Stale() | VerbRefused():
            return error_response(409, str(error))
        case DbUnavailable():
            return error_response(503, "PostgreSQL does not answer; try again later", headers={"Retry-After": "5"})
        case HTTPException():
            return error_response(error.status_code, error.detail, headers=error.headers)
        case ClientDisconnect():
            return Response(status_code=400)  # nobody is left to read it
        case _:
            logger.error("the database refused", error=f"{type(error).__name__}: {error}")
            return error_response(500, "the database refused; see the log")


HANDLED = (Refused, SpecError, VerbRefused, DatabaseError, HTTPException, ClientDisconnect)
"""What `answer_error` is registered for; anything else is a bug, and is logged as one by the server."""
