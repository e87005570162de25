"""Secrets and prompts that cannot be mistaken for anything else, and servers that say them back.

What is made up here goes into the product wherever a secret goes, and into requests; a test then looks for it in all
that comes out. `Echo` is the worst neighbour: whatever refuses us may quote what we sent, credentials included.
"""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from secrets import token_hex
from typing import Any
from urllib.parse import quote

import psycopg
from psycopg.rows import dict_row


class Canaries(dict[str, str]):
    """A value for each name that is asked for: made once, and the same ever after."""

    def __missing__(self, name: str) -> str:
        self[name] = f"canary{name.replace('_', '')}{token_hex(8)}"
        return self[name]

    def json_web_token(self, name: str) -> str:
        self[name] = f"eyJhbGciOiJIUzI1NiJ9.eyJ{token_hex(16)}.{token_hex(16)}"
        return self[name]

    def found_in(self, text: str, *, allowed: Iterable[str] = ()) -> list[str]:
        """The names of those that stand in the text, plainly or in a dress; no more than half of one is too much."""
        return [
            name for name, value in self.items() if name not in set(allowed) and any(w in text for w in worn(value))
        ]


def worn(value: str) -> Iterator[str]:
    yield value[: max(len(value) // 2, 16)]  # what is cut is cut behind
    yield value[-16:]
    yield quote(value, safe="")
    for pad in ("", "x", "xx"):  # base64 of something that ends with it, wherever it begins
        encoded = base64.b64encode(f"{pad}{value}".encode()).decode().rstrip("=")
        yield encoded[4 if pad else 0 : -4]


def columns_with(database_url: str, value: str) -> set[str]:
    """Where in the database the text stands, as `table.column`."""
    with psycopg.connect(database_url, row_factory=dict_row) as connection:
        names = connection.execute(
            "SELECT format('%I.%I', schemaname, tablename) AS name FROM pg_tables "
            "WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"
        ).fetchall()
        found = set()
        for name in (row["name"] for row in names):
            for row in connection.execute(f"SELECT to_jsonb(t) AS row FROM {name} t").fetchall():
                found |= {f"{name}.{column}" for column, cell in row["row"].items() if value in json.dumps(cell)}
        return {name.removeprefix("public.") for name in found}


def command_lines() -> dict[str, str]:
    """What everybody on this host sees of each process with `ps`."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            found[process.name] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue
    return found


class Echo(ThreadingHTTPServer):
    """One port that is everybody the product asks, and quotes what it was sent whenever it refuses.

    As an engine it serves `MODELS`, which say by their names what becomes of a request that is none of a probe's:
    `answers`, `refuses` (500 with a quotation), `breaks` (the connection, after the first piece), and `mute`, whose
    probes are refused as well. As slurmrestd and as Grafana it refuses everything.
    """

    daemon_threads = True
    MODELS = ("answers", "breaks", "refuses", "mute")

    def __init__(self, engine_key: str, answer: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.engine_key, self.answer = engine_key, answer
        self.quoted: list[str] = []  # by path: so that a test knows that there was something to leak

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that leaves is no news."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Echo
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 -- the base class names it
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models" and self._has_key():
            return self._say(200, {"data": [{"id": name} for name in Echo.MODELS]})
        if self.path == "/metrics":
            return self._say(404, {})
        return self._quote(401 if self.path == "/v1/models" else 500)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0))).decode("utf-8", "replace")
        try:
            asked: Mapping[str, Any] = json.loads(body)
        except ValueError:
            asked = {}
        model, is_probe = asked.get("model"), asked.get("max_tokens") == 1
        if not self._has_key() or model in (None, "mute") or (model == "refuses" and not is_probe):
            return self._quote(500, body)
        if model == "breaks" and not is_probe:
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("content-length", "10000")
            self.end_headers()
            self.wfile.write(f'data: {{"choices": [{{"delta": {{"content": "{self.server.answer}"}}}}]}}\n\n'.encode())
            self.close_connection = True
            return None
        return self._say(200, {"choices": [{"message": {"role": "assistant", "content": self.server.answer}}]})

    do_PUT = do_DELETE = do_POST  # noqa: N815 -- the base class looks for them

    def _has_key(self) -> bool:
        return self.headers.get("authorization") == f"Bearer {self.server.engine_key}"

    def _quote(self, status: int, body: str = "") -> None:
        self.server.quoted.append(self.path)
        # what is shown of it is cut: so credentials come first
        headers = sorted(self.headers.items(), key=lambda item: not re.search("auth|token", item[0], re.IGNORECASE))
        said = "; ".join(f"{name}: {value}" for name, value in headers) + f" | {body}"
        self._say(status, {"error": said, "errors": [{"error_number": 1, "error": said, "description": said}]})

    def _say(self, status: int, body: Any) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def echo(engine_key: str, answer: str) -> Iterator[Echo]:
    with Echo(engine_key, answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
