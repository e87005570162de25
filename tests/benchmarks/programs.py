"""The processes of the proxy's benchmarks: the two C programs, what is measured around them, and what they cost.

`upstream.c` and `load.c` are compiled into `build/benchmarks`, anew when a source is newer. A process is started under
`setpriv --pdeathsig`, so that none outlives the benchmark, and ended by SIGTERM. What is measured runs alone on one
core; the upstream, the load and all else share the others (`Cores`).

Failure behaviour: `MissingProgram` names what installs it; a process that does not get ready, or a load that ends with
an error of its own, raises `BenchmarkFailed` with the end of what it said.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from controlplane.demo.children import SYSTEM_PATH, MissingProgram, StartFailed, free_ports, is_listening

SOURCES = Path(__file__).parent
BUILD = SOURCES.parents[1] / "build" / "benchmarks"
INSTALL = "`controlplane/demo/debian-packages.sh benchmarks` installs what the benchmarks need"

_READY_SECONDS = 60.0
_STOP_SECONDS = 20.0
_POLL_SECONDS = 0.02


class BenchmarkFailed(RuntimeError):
    """Something around the measurement did not work; there is no result."""


FAILURES = (BenchmarkFailed, MissingProgram, StartFailed)
"""What a benchmark may end with instead of a result; the text is for whoever runs it."""


def program(name: str) -> str:
    """The path of an installed program. Raises `MissingProgram`."""
    path = shutil.which(name, path=os.pathsep.join([SYSTEM_PATH, os.environ.get("PATH", "")]))
    if path is None:
        raise MissingProgram(f"{name} is not installed; {INSTALL}")
    return path


def compiled(name: str) -> Path:
    """The program of `name`.c, compiled if there is no newer one. Raises `MissingProgram` without a compiler."""
    source, made = SOURCES / f"{name}.c", BUILD / name
    if made.exists() and made.stat().st_mtime > max(source.stat().st_mtime, (SOURCES / "loop.h").stat().st_mtime):
        return made
    if shutil.which("cc") is None or not Path("/usr/include/stdio.h").exists():
        raise MissingProgram(f"there is no C compiler (gcc and libc6-dev); {INSTALL}")
    BUILD.mkdir(parents=True, exist_ok=True)
    fresh = BUILD / f"{name}.{os.getpid()}"
    command = ["cc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-o", str(fresh), str(source), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchmarkFailed(f"{source.name} cannot be compiled:\n{done.stderr}")
    fresh.rename(made)
    return made


def allow_many_files() -> int:
    """Raise the limit of open files as far as we may, for the processes that are started too; returns it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else hard
    if hard < 65_536:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (65_536, 65_536))
        except (ValueError, OSError):  # only some roots may
            pass
        else:
            return 65_536
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


@dataclass(frozen=True, slots=True)
class Cores:
    """Which cores the proxy under test has for itself, and which all else runs on."""

    proxy: int
    others: tuple[int, ...]

    @classmethod
    def shared_out(cls) -> Cores:
        """One core for the proxy; this process, and what it starts otherwise, is put on the rest."""
        usable = sorted(os.sched_getaffinity(0))
        if len(usable) < 2:
            print("there is one core only: the proxy shares it with its clients, and times say little", file=sys.stderr)
            return cls(usable[0], (usable[0],))
        cores = cls(usable[-1], tuple(usable[:-1]))
        os.sched_setaffinity(0, cores.others)
        return cores


# --- processes -------------------------------------------------------------------------------------------


class Process:
    """A child with a log, and what it and its own children cost."""

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        core: int | None = None,
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
    ) -> None:
        self.log = log
        line = [program("setpriv"), "--pdeathsig", "TERM"]
        line += [] if core is None else [program("taskset"), "-c", str(core)]
        with log.open("wb") as said:
            self._child = subprocess.Popen(
                [*line, *command],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                env={"PATH": SYSTEM_PATH, "LC_ALL": "C.UTF-8", **(environment or {})},
                cwd=directory,
            )

    @property
    def pid(self) -> int:
        return self._child.pid

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-2000:].strip()

    def wait_listening(self, *ports: int, seconds: float = _READY_SECONDS) -> None:
        """Raises `BenchmarkFailed` if it ends first, or takes too long."""
        self.wait_until(lambda: all(map(is_listening, ports)), "listens", seconds)

    def wait_until(self, fact: Any, what: str, seconds: float = _READY_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not fact():
            if self._child.poll() is not None or time.monotonic() > deadline:
                raise BenchmarkFailed(
                    f"{self.log.stem} does not come so far that it {what}; its log ends:\n{self.tail()}"
                )
            time.sleep(_POLL_SECONDS)

    def stop(self) -> None:
        self._child.send_signal(signal.SIGTERM)
        try:
            self._child.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            for pid in reversed(self.tree()):
                os.kill(pid, signal.SIGKILL)
            self._child.wait()

    def tree(self) -> list[int]:
        """The process ids of the child and all below it."""
        children: dict[int, list[int]] = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
        found = [self.pid]
        for pid in found:
            found += children.get(pid, [])
        return found

    def cpu_seconds(self) -> float:
        """Processor time of the whole tree, user and system; exact, where /proc/PID/stat counts hundredths."""
        return sum(time.clock_gettime((~pid << 3) | 2) for pid in self.tree())  # clock_getcpuclockid(3) makes it so

    def pss_bytes(self) -> int:
        """Memory of the whole tree; what several share is counted once."""
        return sum(_pss_bytes(pid) for pid in self.tree())

    def open_files(self) -> int:
        return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in self.tree())


def _pss_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


@contextmanager
def running(process: Process) -> Iterator[Process]:
    try:
        yield process
    finally:
        process.stop()


# --- the two programs ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Upstreams:
    """One process that is several upstreams, one a port."""

    process: Process
    ports: tuple[int, ...]

    def stats(self) -> dict[str, int]:
        """What it counts; the connection of this question is not among the open ones."""
        stats = self._ask("/stats")
        return {**stats, "open": stats["open"] - 1}

    def disconnect(self) -> None:
        """Close every connection that is idle, and return when nobody is connected."""
        self._ask("/close-idle")
        self.process.wait_until(lambda: self.stats()["open"] == 0, "has no connections")

    def _ask(self, path: str) -> dict[str, int]:
        counts: dict[str, int] = httpx.get(f"http://127.0.0.1:{self.ports[0]}{path}", trust_env=False).json()
        return counts


@contextmanager
def upstreams(directory: Path, count: int = 2) -> Iterator[Upstreams]:
    ports = tuple(free_ports(count))
    command = [str(compiled("upstream")), *map(str, ports)]
    with running(Process(command, directory / "upstream.log")) as process:
        process.wait_listening(*ports)
        yield Upstreams(process, ports)


Load = dict[str, Any]
"""What `load` printed; see the head of load.c."""


def load(ports: Sequence[int], arguments: Sequence[str], timeout_seconds: float = 600) -> Load:
    """Run the clients to their end, and return what they found."""
    line = load_command(ports, arguments)
    done = subprocess.run(line, capture_output=True, text=True, timeout=timeout_seconds, check=False)
    if done.returncode != 0:
        raise BenchmarkFailed(f"the load failed: {done.stderr.strip()}")
    found: Load = json.loads(done.stdout.splitlines()[-1])
    return found


def load_command(ports: Sequence[int], arguments: Sequence[str]) -> list[str]:
    return [str(compiled("load")), "--ports", ",".join(map(str, ports)), *arguments]
