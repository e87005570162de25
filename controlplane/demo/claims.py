"""A directory that one run owns, and the end of everything that runs because of it.

A run claims its directory (an `flock`, gone with the process that holds it) and writes down there what it starts:
process id, boot and start time, so that a process id given to somebody else later is never taken for ours. Whoever
claims the directory next ends what an earlier run left, a run that was ended by `kill -9` included.

What belongs to a directory: the recorded children; whatever holds a unix socket below it (a slurmstepd outlives its
slurmd, and has no environment to know it by); jobs of a Slurm cluster configured there; and all descendants of these.
Children end first, newest first, each asked by its own signal before it is killed; then the rest is killed. Signals
go to single process ids only.

Failure behaviour: a directory that a living run owns raises `DirectoryInUse`; a process that survives SIGKILL raises
`EndFailed`.
"""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

GRACE_SECONDS = 10.0
"""How long a child may take to end itself before it is killed."""

CHILDREN_FOLDER = "children"
"""Below a claimed directory, or up to two folders deeper: one record per child."""

_POLL_SECONDS = 0.02


class DirectoryInUse(RuntimeError):
    """Another run that is still alive owns the directory."""


class EndFailed(RuntimeError):
    """Some process does not die; the text names it."""


@dataclass(frozen=True, slots=True)
class Pid:
    """A process id together with what tells its bearer from later ones."""

    number: int
    boot: str
    started_ticks: int

    def is_alive(self) -> bool:
        """Whether this very process still runs; a zombie does not."""
        stat = _stat_of(self.number)
        return stat is not None and stat.started_ticks == self.started_ticks and self.boot == _boot()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to this very process; nothing happens if it is gone."""
        if self.is_alive():
            with suppress(ProcessLookupError):
                os.kill(self.number, number)


@dataclass(frozen=True, slots=True)
class Record:
    """What is written down of a child: `<stop signal> <boot id> <its line of /proc/<pid>/stat>`."""

    path: Path
    pid: Pid
    stop_signal: signal.Signals

    @classmethod
    def read(cls, path: Path) -> Record | None:
        """The record, or None while it is not there or not whole."""
        try:
            text = path.read_text(errors="replace")
        except FileNotFoundError:
            return None
        if not text.endswith("\n"):
            return None
        stop_signal, boot, stat = text.split(maxsplit=2)
        pid = Pid(int(stat.split(maxsplit=1)[0]), boot, _parse_stat(stat)[1].started_ticks)
        return cls(path, pid, signal.Signals(int(stop_signal)))


@contextmanager
def claim(directory: Path) -> Iterator[None]:
    """Own the directory, made if need be, until the block ends.

    What an earlier run left running ends before the block, what is left after it ends then. Raises `DirectoryInUse`
    while another process, or another block of this one, owns the directory.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o755)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DirectoryInUse(f"{directory} is in use by another run that is still alive") from None
        _end_all(directory.resolve())
        try:
            yield
        finally:
            _end_all(directory.resolve())
    finally:
        os.close(descriptor)


def end(pid: Pid, stop_signal: signal.Signals) -> None:
    """Ask a process, also a stopped one, to end; kill it when it has not within `GRACE_SECONDS`."""
    pid.signal(stop_signal)
    pid.signal(signal.SIGCONT)
    if not _wait_gone([pid]):
        pid.signal(signal.SIGKILL)
        if not _wait_gone([pid]):
            raise EndFailed(f"process {pid.number} does not die")


def _end_all(directory: Path) -> None:
    records = sorted(_records_below(directory), key=lambda record: record.pid.started_ticks, reverse=True)
    # gathered first: what hangs below a child cannot be found any more once the child is gone
    left = _belonging(directory, [record.pid for record in records])
    for record in records:
        end(record.pid, record.stop_signal)
        record.path.unlink()
    while left := [pid for pid in left if pid.is_alive()]:
        for pid in left:
            pid.signal(signal.SIGKILL)
        if not _wait_gone(left):
            raise EndFailed(f"processes of {directory} do not die: {', '.join(str(pid.number) for pid in left)}")
        left = _belonging(directory, [])


def _records_below(directory: Path) -> list[Record]:
    depths = (f"{CHILDREN_FOLDER}/*", f"*/{CHILDREN_FOLDER}/*", f"*/*/{CHILDREN_FOLDER}/*")
    records = (Record.read(path) for depth in depths for path in directory.glob(depth))
    return [record for record in records if record is not None]


def _belonging(directory: Path, roots: Collection[Pid]) -> list[Pid]:
    table = {number: stat for number in _process_numbers() if (stat := _stat_of(number)) is not None}
    sockets = _sockets_below(directory)
    slurm_conf = f"SLURM_CONF={directory}/".encode()
    members = {pid.number for pid in roots if pid.is_alive()}
    members |= {number for number in table if sockets and not sockets.isdisjoint(_open_files(number))}
    members |= {number for number in table if _is_job_of(slurm_conf, number)}
    members.discard(os.getpid())
    found = members
    while found:
        found = {number for number, stat in table.items() if stat.parent in found} - members
        members |= found
    return [Pid(number, _boot(), table[number].started_ticks) for number in members if number in table]


def _is_job_of(slurm_conf: bytes, number: int) -> bool:
    try:
        variables = Path(f"/proc/{number}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    # a shell in which somebody exported SLURM_CONF by hand is no job
    return any(variable.startswith(slurm_conf) for variable in variables) and any(
        variable.startswith(b"SLURM_JOB_ID=") for variable in variables
    )


def _sockets_below(directory: Path) -> frozenset[str]:
    prefix = f"{directory}/"
    rows = (line.split(maxsplit=7) for line in Path("/proc/net/unix").read_text(errors="replace").splitlines())
    return frozenset(f"socket:[{row[6]}]" for row in rows if len(row) == 8 and row[7].startswith(prefix))


def _open_files(number: int) -> Iterator[str]:
    try:
        descriptors = list(Path(f"/proc/{number}/fd").iterdir())
    except OSError:
        return
    for descriptor in descriptors:
        with suppress(OSError):
            yield str(descriptor.readlink())


@dataclass(frozen=True, slots=True)
class _Stat:
    parent: int
    started_ticks: int


def _process_numbers() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _stat_of(number: int) -> _Stat | None:
    try:
        state, stat = _parse_stat(Path(f"/proc/{number}/stat").read_text(errors="replace"))
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else stat


def _parse_stat(text: str) -> tuple[str, _Stat]:
    # the program's name stands in brackets and may hold spaces and brackets
    fields = text.rpartition(")")[2].split()
    return fields[0], _Stat(parent=int(fields[1]), started_ticks=int(fields[19]))


@cache
def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _wait_gone(pids: Collection[Pid]) -> bool:
    deadline = time.monotonic() + GRACE_SECONDS
    while any(pid.is_alive() for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True
