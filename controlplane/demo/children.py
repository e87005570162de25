"""Child processes of a demo or a test run, none of which may outlive it.

A `Server` is a group of children in a directory of its own, claimed while it is up (see `claims`). A child's record
is written by the child itself before it becomes the program: there is no moment at which a `kill -9` of the parent
leaves a process that nobody knows. Children run in a session of their own, so that Ctrl-C reaches only us, with a
nearly empty environment, and listen on 127.0.0.1 only; what they say goes to `<directory>/log/<name>.log`.

Failure behaviour: a child that dies or does not get ready raises `StartFailed` with the end of its log, and what was
already started is ended; a program that is not installed raises `MissingProgram`, which names `make setup`.
"""

from __future__ import annotations

import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from controlplane.demo.claims import CHILDREN_FOLDER, Record, claim, end

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""The PATH that children see."""

_FIRST_PORT_OF_REPLICAS = 20_000  # unless the settings say otherwise
_LOG_TAIL_CHARACTERS = 2000
_POLL_SECONDS = 0.02
# process id, boot and start time of the shell stay those of the program that it becomes
_RECORD_THEN_BECOME = """\
read -r boot </proc/sys/kernel/random/boot_id && read -r stat </proc/$$/stat && echo "$1 $boot $stat" >"$0" || exit 1
shift
exec "$@"
"""


class MissingProgram(RuntimeError):
    """A program that the machine lacks; the text says how to get it."""


class StartFailed(RuntimeError):
    """A child died or did not get ready; the text holds the end of its log."""


@dataclass(frozen=True, slots=True)
class Account:
    """A user that a child runs as."""

    name: str
    uid: int
    gid: int

    @classmethod
    def named(cls, name: str) -> Account:
        """The account in the user database. Raises `KeyError` if there is none."""
        entry = pwd.getpwnam(name)
        return cls(entry.pw_name, entry.pw_uid, entry.pw_gid)

    @classmethod
    def current(cls) -> Account:
        """The account this process runs as."""
        return cls.named(pwd.getpwuid(os.geteuid()).pw_name)

    def command(self, argv: Sequence[str]) -> list[str]:
        """The command line that runs `argv` as this account, without supplementary groups."""
        if self.uid == os.geteuid():
            return list(argv)
        return [program("setpriv"), f"--reuid={self.uid}", f"--regid={self.gid}", "--clear-groups", *argv]


class Children:
    """The children of one claimed directory. Not for use by several threads at once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._claimed = ExitStack()
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._commands: dict[str, _Command] = {}

    def open(self) -> None:
        """Claim the directory; an earlier run's logs go. Raises `DirectoryInUse`."""
        self._claimed.enter_context(claim(self._directory))
        shutil.rmtree(self._directory / "log", ignore_errors=True)
        for folder in (CHILDREN_FOLDER, "log"):
            (self._directory / folder).mkdir(exist_ok=True)

    def close(self) -> None:
        """End all children and give the directory back. May be called again."""
        self._claimed.close()
        for child in self._running.values():
            child.wait()
        self._running.clear()

    def start(
        self,
        name: str,
        argv: Sequence[str],
        *,
        account: Account | None = None,
        environment: Mapping[str, str] | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
    ) -> None:
        """Start a program in the background; it sees only the given environment, a PATH and a locale.

        `stop_signal` is what will ask it to end.
        """
        line = (account or Account.current()).command(argv)
        self._commands[name] = _Command(tuple(line), dict(environment or {}), stop_signal)
        self._launch(name)

    def restart(self, name: str) -> None:
        """Start a child again as it was started first, ending it before if it still runs."""
        record = Record.read(self._record_path(name))
        if record is not None:
            end(record.pid, record.stop_signal)
        self._running[name].wait()
        self._launch(name)

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to one child. After SIGKILL it is gone when this returns."""
        child = self._running[name]
        child.send_signal(number)
        if number == signal.SIGKILL:
            child.wait()

    def is_alive(self, name: str) -> bool:
        """Whether the child has not ended; one stopped by SIGSTOP has not."""
        return self._running[name].poll() is None

    def log_file(self, name: str) -> Path:
        """Where the child writes what it says."""
        return self._directory / "log" / f"{name}.log"

    def wait_until(
        self, fact: Callable[[], bool], what: str, *, needs: Collection[str], timeout_seconds: float
    ) -> None:
        """Return once the fact holds. Raises `StartFailed` if a child in `needs` ends first, or the time is up."""
        deadline = time.monotonic() + timeout_seconds
        while not fact():
            ended = [name for name in needs if not self.is_alive(name)]
            if ended:
                raise StartFailed(f"{ended[0]} ended instead of: {what}; its log ends:\n{self._log_tail(ended[0])}")
            if time.monotonic() > deadline:
                tails = "\n".join(f"--- {name}\n{self._log_tail(name)}" for name in needs)
                raise StartFailed(f"not within {timeout_seconds:g} s: {what}; the logs end:\n{tails}")
            time.sleep(_POLL_SECONDS)

    def _launch(self, name: str) -> None:
        command = self._commands[name]
        path = self._record_path(name)
        path.unlink(missing_ok=True)
        with self.log_file(name).open("ab") as log:
            child = subprocess.Popen(
                ["/bin/sh", "-c", _RECORD_THEN_BECOME, path, str(int(command.stop_signal)), *command.line],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd="/",
                env={"PATH": SYSTEM_PATH, "LC_ALL": "C.UTF-8", **command.environment},
                start_new_session=True,
                umask=0o022,
            )
        self._running[name] = child
        while Record.read(path) is None and child.poll() is None:
            time.sleep(0.001)

    def _record_path(self, name: str) -> Path:
        return self._directory / CHILDREN_FOLDER / name

    def _log_tail(self, name: str) -> str:
        return self.log_file(name).read_text(errors="replace")[-_LOG_TAIL_CHARACTERS:].strip() or "(empty)"


class Server(ABC):
    """Something made of children in a directory of its own; also a context manager.

    `start` may follow `stop`: it makes the thing anew.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory.resolve()
        self.children = Children(self.directory)

    def start(self) -> Self:
        """Bring it up, ready for use. Raises `StartFailed`, `MissingProgram` or `DirectoryInUse`; then nothing runs.

        The directory must lie where other users may look in: some servers run as another user.
        """
        umask = os.umask(0o022)
        try:
            self.children.open()
            self._bring_up()
        except BaseException:
            self.children.close()
            raise
        finally:
            os.umask(umask)
        return self

    def stop(self) -> None:
        """End all its processes. May be called again, and when it was never started."""
        self.children.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    @abstractmethod
    def _bring_up(self) -> None: ...


def program(name: str, *folders: str) -> str:
    """The path of an installed program: from the folders, else the system's, else PATH. Raises `MissingProgram`."""
    path = shutil.which(name, path=os.pathsep.join([*folders, SYSTEM_PATH, os.environ.get("PATH", "")]))
    if path is None:
        raise MissingProgram(f"{name} is not installed; `make setup` installs what the demo and the tests need")
    return path


def free_ports(count: int) -> list[int]:
    """Consecutive TCP ports that are free on 127.0.0.1.

    They lie below those of replicas, which draw theirs without looking, and below the range the kernel gives to
    outgoing connections, so that a server that is ended and started again finds its port still free. Raises
    `StartFailed` if there are none.
    """
    first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    end_of_range = min(first_ephemeral, _FIRST_PORT_OF_REPLICAS) if first_ephemeral > 12_000 else 65_536
    for _ in range(100):
        first = random.randrange(10_000, end_of_range - count)
        if all(_is_free(port) for port in range(first, first + count)):
            return list(range(first, first + count))
    raise StartFailed(f"found no {count} consecutive free ports on 127.0.0.1")


def is_listening(where: int | Path) -> bool:
    """Whether something accepts connections on a port of 127.0.0.1, or on a unix socket."""
    with socket.socket(socket.AF_INET if isinstance(where, int) else socket.AF_UNIX) as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", where) if isinstance(where, int) else str(where)) == 0


@dataclass(frozen=True, slots=True)
class _Command:
    line: tuple[str, ...]
    environment: dict[str, str]
    stop_signal: signal.Signals


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
