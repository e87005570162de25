"""Reads the end of the logs of jobs that ended unasked, where this host sees the job directory, and keeps it.

A shared file system may hang, and may show a file late: so this is a loop of its own, one file is read at a time, on a
thread that nobody has to wait for, and a file that is missing is looked for again for a while before that is said.
"""

from __future__ import annotations

import asyncio
import os
import re
import stat
import threading
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from controlplane.core.log_text import shown_tail
from controlplane.db import Database, job_logs

_READ_BYTES = 16_384  # more than is shown: colours, and a first line that is cut, fall away
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9=.,:@+~_-]")
_LONGEST_MODEL = 128  # a file's name has at most 255 bytes


@dataclass(frozen=True, slots=True)
class JobLogOptions:
    job_directory: Path
    interval_seconds: float = 2.0
    patience: timedelta = timedelta(seconds=30)  # a file may be seen this late after its job's end
    keep_looking: timedelta = timedelta(hours=1)  # of what ended longer ago no log is read any more
    timeout_seconds: float = 5.0


def log_path(directory: Path | str, replica: str, job_id: int | str, model: str) -> str:
    """Where a job's output goes; `%j` stands for the job's id before it is known.

    The name tells a collector of logs whose they are: `<replica>-<job id>.<model>.out`, with `=` for each `/` of the
    model's name, and `_` for what is nothing to Slurm's patterns or to globs.
    """
    told = _NOT_IN_NAMES.sub("_", model.replace("/", "="))[:_LONGEST_MODEL]
    return f"{directory}/{replica}-{job_id}.{told}.out"


class JobLogLoop:
    name = "job-logs"

    def __init__(self, db: Database, options: JobLogOptions) -> None:
        self._db = db
        self._options = options
        self._reading: asyncio.Future[tuple[bytes, bool]] | None = None  # one that hangs: no further thread is begun
        self.interval_seconds = options.interval_seconds

    async def run_once(self, now: datetime) -> str | None:
        read = []
        for unread in await job_logs.load_unread(self._db, now - self._options.keep_looking):
            path = log_path(self._options.job_directory, unread.replica, unread.slurm_job_id, unread.model)
            try:
                raw, is_cut = await self._read(path)
                log = job_logs.JobLog(now, shown_tail(raw, unread.secrets, is_cut=is_cut), None)
            except OSError as error:
                if now < unread.ended_at + self._options.patience:
                    continue
                log = job_logs.JobLog(now, None, f"{path}: {_words(error)}"[:256])
            await job_logs.save(self._db, unread.replica_id, log)
            read.append(unread.replica)
        return f"kept the end of the logs of {', '.join(read)}" if read else None

    async def _read(self, path: str) -> tuple[bytes, bool]:
        if self._reading is not None and not self._reading.done():
            raise TimeoutError("the file system does not answer")
        self._reading = _aside(path)
        try:
            async with asyncio.timeout(self._options.timeout_seconds):
                return await asyncio.shield(self._reading)
        except TimeoutError:
            raise TimeoutError("the file system does not answer") from None


def _aside(path: str) -> asyncio.Future[tuple[bytes, bool]]:
    """`_last_bytes` on a thread that the process does not wait for when it ends."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[tuple[bytes, bool]] = loop.create_future()
    future.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be left to ask

    def settle(found: tuple[bytes, bool] | None, error: OSError | None) -> None:
        if not future.done():
            future.set_exception(error) if error is not None else future.set_result(found or (b"", False))

    def work() -> None:
        found, failure = None, None
        try:
            found = _last_bytes(path)
        except OSError as error:
            failure = error
        with suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(settle, found, failure)

    threading.Thread(target=work, name="job-log", daemon=True).start()
    return future


def _last_bytes(path: str) -> tuple[bytes, bool]:
    """The end of a plain file, and whether something stands before it.

    The job's own user could put a link or a pipe there: neither is followed, nor waited for.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError("it is no plain file")
        start = max(0, found.st_size - _READ_BYTES)
        file.seek(start)
        return file.read(_READ_BYTES), start > 0


def _words(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file on this host; is the job directory shared?"
    return error.strerror or str(error)
