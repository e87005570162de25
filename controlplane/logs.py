"""Log lines: one event a line, for people (`text`) or for Loki (`json`: one flat object).

Code logs with loguru, fields as keyword arguments: `logger.info("job submitted", replica=name, job_id=4711)`; the
sentence comes first, the fields are the event's. What libraries write through `logging` passes through here as well.

Each line of JSON says which program it is of, `app`, because one process may be both and Loki's streams are told apart
by it.
"""

from __future__ import annotations

import inspect
import json
import logging
import sys
from typing import TYPE_CHECKING, Literal, TextIO

from loguru import logger

if TYPE_CHECKING:
    from loguru import Message, Record

App = Literal["control-plane", "proxy"]

_OF_THE_PROXY = ("controlplane.proxy", "controlplane.workers")


def configure(
    *,
    level: str = "info",
    form: Literal["json", "text"] = "json",
    app: App | None = None,
    stream: TextIO = sys.stderr,
) -> None:
    """Set up the one sink of this process. May be called again; the last call counts.

    `app`: the program that this process is; None: it is both, and each line tells by its module.
    """
    logger.remove()
    if form == "json":
        logger.add(
            lambda message: _write_json(message, app, stream),
            level=level.upper(),
            format="{message}",
            backtrace=False,
            diagnose=False,
        )
    else:
        logger.add(stream, level=level.upper(), format=_text_format, backtrace=False, diagnose=False)
    logging.basicConfig(handlers=[_ToLoguru()], level=logging.INFO, force=True)
    for name in ("httpx", "httpcore", "yoyo", "uvicorn.access"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("psycopg").setLevel(logging.CRITICAL)  # its every try to reconnect; who waits for it says so once
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # it warns of clients' faults, which they are told


def _write_json(message: Message, app: App | None, stream: TextIO) -> None:
    record = message.record
    line: dict[str, object] = {
        "time": record["time"].isoformat(),
        "level": record["level"].name.lower(),
        "app": app or _app_of(record["name"] or ""),
        "event": record["message"],
        "source": record["name"],
        **record["extra"],
    }
    if (exception := record["exception"]) is not None:
        line["exception"] = f"{getattr(exception.type, '__name__', exception.type)}: {exception.value}"
        line["traceback"] = str(message).split("\n", 1)[-1]
    stream.write(json.dumps(line, default=str) + "\n")
    stream.flush()


def _app_of(module: str) -> App:
    return "proxy" if module.startswith(_OF_THE_PROXY) else "control-plane"


def _text_format(record: Record) -> str:
    fields = " ".join(f"{key}={{extra[{key}]}}" for key in record["extra"])
    return (
        "<green>{time:HH:mm:ss.SSS}</green> <level>{level: <7}</level> {message} <dim>" + fields + "</dim>\n{exception}"
    )


class _ToLoguru(logging.Handler):
    """Hands a library's record to loguru, as if it had been logged where it was."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            level: str | int = logger.level(record.levelname).name
        except ValueError:
            level = record.levelno
        frame, depth = inspect.currentframe(), 0
        while frame and (depth == 0 or frame.f_code.co_filename == logging.__file__):
            frame, depth = frame.f_back, depth + 1
        logger.opt(depth=depth, exception=record.exc_info).log(level, record.getMessage())
