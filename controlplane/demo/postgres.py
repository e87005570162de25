"""A PostgreSQL of our own in a directory: on 127.0.0.1 and on a socket in there, with one superuser and a password.

The newest installed release is used. As root it runs as the `postgres` user, because PostgreSQL refuses root. Each
start makes an empty server with a new port and password; `restart` keeps both, and the data.

Failure behaviour: see `children`; a database that cannot be made or dropped raises `DatabaseFailed`.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
from pathlib import Path

from controlplane.demo.children import SYSTEM_PATH, Account, Server, StartFailed, free_ports, is_listening, program

_SUPERUSER = "postgres"
_READY_SECONDS = 30.0
_UNSAFE_BUT_FAST = {"fsync": "off", "full_page_writes": "off"}


class DatabaseFailed(RuntimeError):
    """A database could not be made or dropped; the text is what PostgreSQL said."""


class PrivatePostgres(Server):
    """An empty PostgreSQL server. Not durable, it does not survive a power cut, but is fast: for tests only."""

    def __init__(self, directory: Path, *, is_durable: bool = True) -> None:
        super().__init__(directory)
        self._is_durable = is_durable
        self._account = Account.named("postgres") if os.geteuid() == 0 else Account.current()
        self._port = 0
        self._password = ""

    def url(self, database: str) -> str:
        """The libpq URI of a database, with the superuser's password in it."""
        return f"postgresql://{_SUPERUSER}:{self._password}@127.0.0.1:{self._port}/{database}"

    def create_database(self, name: str, *, template: str | None = None) -> str:
        """Make a database, a copy of `template` if given (nobody may be connected to that one), and return its URI."""
        self._client("createdb", *([f"--template={template}"] if template else []), name)
        return self.url(name)

    def drop_database(self, name: str) -> None:
        """End all connections to a database and remove it."""
        self._client("dropdb", "--force", name)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to the server."""
        self.children.kill("postgres", number)

    def restart(self) -> None:
        """Start the server again on the same data, ending it before if it still runs; returns when it is ready."""
        self.children.restart("postgres")
        self._wait_ready()

    def _bring_up(self) -> None:
        self._password = secrets.token_urlsafe(24)
        [self._port] = free_ports(1)
        for folder in (self._data, self._run):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(mode=0o700)
            os.chown(folder, self._account.uid, self._account.gid)
        self._initialise()
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self._port),
            "unix_socket_directories": str(self._run),
            "max_connections": "200",
            **({} if self._is_durable else _UNSAFE_BUT_FAST),
        }
        self.children.start(
            "postgres",
            [_program("postgres"), "-D", str(self._data), *(f"--{key}={value}" for key, value in settings.items())],
            account=self._account,
            stop_signal=signal.SIGINT,  # ends sessions; SIGTERM would wait for them
        )
        self._wait_ready()

    def _initialise(self) -> None:
        password_file = self._run / "password"
        password_file.touch(mode=0o600)
        password_file.write_text(self._password)
        os.chown(password_file, self._account.uid, self._account.gid)
        command = [_program("initdb"), f"--pgdata={self._data}", f"--username={_SUPERUSER}", "--auth=scram-sha-256"]
        command += [f"--pwfile={password_file}", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync"]
        done = subprocess.run(
            self._account.command(command),
            cwd="/",
            env={"PATH": SYSTEM_PATH},
            capture_output=True,
            text=True,
            check=False,
        )
        password_file.unlink()
        if done.returncode != 0:
            raise StartFailed(f"initdb: {done.stderr.strip()[-256:]}")

    def _wait_ready(self) -> None:
        self.children.wait_until(
            self._is_ready, "PostgreSQL takes connections", needs=["postgres"], timeout_seconds=_READY_SECONDS
        )

    def _is_ready(self) -> bool:
        if not is_listening(self._port):
            return False
        arguments = [_program("pg_isready"), "--host=127.0.0.1", f"--port={self._port}"]
        return subprocess.run(arguments, capture_output=True, check=False).returncode == 0

    def _client(self, name: str, *arguments: str) -> None:
        done = subprocess.run(
            [_program(name), "--host=127.0.0.1", f"--port={self._port}", f"--username={_SUPERUSER}", *arguments],
            env={"PATH": SYSTEM_PATH, "PGPASSWORD": self._password},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise DatabaseFailed(f"{name}: {done.stderr.strip()[:256]}")

    @property
    def _data(self) -> Path:
        return self.directory / "data"

    @property
    def _run(self) -> Path:
        return self.directory / "run"


def _program(name: str) -> str:
    releases = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name), reverse=True)
    return program(name, *map(str, releases))
