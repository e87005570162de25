"""No secret, no prompt and no answer turns up where it must not, whatever goes right or wrong.

One life of all programs, as processes: requests that are answered and refused in every way, neighbours that quote what
we send them, a database that is away or does not know us, and each command. All that they say is kept by place, and
searched at the end. What is allowed is said where it is.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx
import psycopg
import pytest
from psycopg import sql

from controlplane.demo.children import program
from controlplane.demo.postgres import PrivatePostgres
from tests.conftest import eventually_sync
from tests.integration.canaries import Canaries, Echo, columns_with, command_lines, echo
from tests.integration.test_serve import CONTROLPLANE, Serve, serving, until_ready
from tests.integration.webhook_rig import ours

SECONDS = 60.0
CONTENT = ("prompt", "answer")
MODELS = {"answers", "breaks", "refuses", "mute"}


@dataclass
class Life:
    """What was said in one life, by place, and what to search it for."""

    canaries: Canaries
    database_url: str
    client_keys: list[str] = field(default_factory=list)
    said: dict[str, str] = field(default_factory=dict)

    def keep(self, place: str, text: str) -> None:
        self.said[place] = self.said.get(place, "") + text + "\n"

    def keep_answer(self, place: str, answer: httpx.Response) -> httpx.Response:
        self.keep(place, f"{answer.status_code} {dict(answer.headers)} {answer.text}")
        return answer


def with_password(url: str, user: str, password: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=f"{user}:{password}@{parts.hostname}:{parts.port}"))


def environment(life: Life, neighbour: Echo, directory: Path, form: str, slurm_token: str) -> dict[str, str]:
    secret = life.canaries
    return {
        "CONTROLPLANE_LOG__LEVEL": "debug",
        "CONTROLPLANE_DATABASE__TIMEOUT_SECONDS": "1",
        "CONTROLPLANE_LOG__FORMAT": form,
        "CONTROLPLANE_PROXY__ACCESS_LOG_SAMPLE": "1",
        "CONTROLPLANE_PROXY__MAX_BODY_BYTES": "100000",
        "CONTROLPLANE_PROXY__HOLD_SECONDS": "0.2",
        "CONTROLPLANE_PROXY__HOLD_SECONDS_WITHOUT_STREAM": "0.2",
        "CONTROLPLANE_PROXY__WORKERS": "2",
        "CONTROLPLANE_WEBHOOK__BEARER_TOKENS": secret["webhook_bearer"],
        "CONTROLPLANE_WEBHOOK__BASIC_CREDENTIALS": f"grafana:{secret['webhook_password']}",
        "CONTROLPLANE_WEBHOOK__HMAC_SECRETS": secret["webhook_hmac"],
        "CONTROLPLANE_WEBHOOK__MAX_BODY_BYTES": "100000",
        "CONTROLPLANE_OPERATOR__TOKENS": f"ann:{secret['operator_token']}",
        "CONTROLPLANE_SLURM__URL": neighbour.url,
        "CONTROLPLANE_SLURM__USER_NAME": "llm",
        "CONTROLPLANE_SLURM__TOKEN": slurm_token,
        "CONTROLPLANE_SLURM__JOB_DIRECTORY": str(directory),
        "CONTROLPLANE_SLURM__API_VERSION": "v0.0.42",
        "CONTROLPLANE_RECONCILE__INTERVAL_SECONDS": "0.5",
        "CONTROLPLANE_GRAFANA__URL": neighbour.url,
        "CONTROLPLANE_GRAFANA__TOKEN": secret["grafana_token"],
        "CONTROLPLANE_ALERTS__PULL_INTERVAL_SECONDS": "0.5",
        "CONTROLPLANE_PROBE__INTERVAL_SECONDS": "0.5",
    }


def sets(neighbour: Echo, key_file: Path) -> dict[str, Any]:
    fixed = [
        {"name": model, "model": model, "endpoints": [{"url": neighbour.url, "api_key_file": str(key_file)}]}
        for model in sorted(MODELS)
    ]
    slurm = {
        "name": "jobs",
        "model": "jobs",
        "template": "fake-vllm",
        "min_replicas": 1,
        "max_replicas": 1,
        "slurm": {"time_limit_seconds": 3600},
    }
    return {"replica_sets": [*fixed, slurm]}


# --- a life ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["json", "text"])
def life(
    request: pytest.FixtureRequest,
    postgres: PrivatePostgres,
    template_database: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Life]:
    directory = tmp_path_factory.mktemp("canaries")
    url = postgres.create_database(f"canaries_{request.param}", template=template_database)
    secret = Canaries()
    with psycopg.connect(url, autocommit=True) as connection:
        role = sql.Identifier(f"canary_{request.param}")
        password = sql.Literal(secret["database_password"])
        connection.execute(sql.SQL("CREATE ROLE {} SUPERUSER LOGIN PASSWORD {}").format(role, password))
    made = Life(secret, with_password(url, f"canary_{request.param}", secret["database_password"]))
    token = secret.json_web_token("slurm_token") if request.param == "json" else secret["slurm_token"]
    with echo(secret["engine_key"], secret["answer"]) as neighbour:
        settings = environment(made, neighbour, directory, request.param, token)
        with serving(directory, made.database_url, **settings) as serve:
            until_ready(serve, serve.proxy)
            apply_sets(made, serve, neighbour, directory)
            ask_the_proxy(made, serve)
            ask_the_control_plane(made, serve, neighbour)
            until_everybody_refused(serve, neighbour)
            if request.param == "json":  # commands say the same in both
                run_commands(made, serve, directory)
            look_around(made, serve)
            serve.process.terminate()
            serve.wait()
            made.keep("log", serve.log())
        run_without_a_database(made, serve, directory)
    if request.param == "json":
        run_commands_in_trouble(made, serve)
    yield made
    postgres.drop_database(f"canaries_{request.param}")


def apply_sets(life: Life, serve: Serve, neighbour: Echo, directory: Path) -> None:
    key_file = directory / "engine-key"
    key_file.write_text(life.canaries["engine_key"] + "\n")
    life.keep("command apply", command(serve, "apply", "-f", "-", stdin=json.dumps(sets(neighbour, key_file))))
    for options in ([], ["--model", "answers"]):
        life.client_keys.append(serve.command("keys", "create", "--tenant", "physics", *options).strip())
    for number, key in enumerate(life.client_keys):
        assert key.startswith("sk-")
        life.canaries[f"client_key_{number}"] = key

    def are_routable() -> bool:
        found = json.loads(command(serve, "get", "endpoints", "-o", "json"))
        return {one["model"] for one in found if one["is_routable"]} == MODELS - {"mute"}

    eventually_sync(are_routable, timeout_seconds=SECONDS)


def command(serve: Serve, *arguments: str, stdin: str | None = None, **environment: str) -> str:
    """All that a command says, whether it succeeds or not."""
    done = subprocess.run(
        [*CONTROLPLANE, *arguments],
        env={**serve.environment, "COLUMNS": "400", **environment},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    return done.stdout + done.stderr


def ask_the_proxy(life: Life, serve: Serve) -> None:
    secret, good = life.canaries, {"authorization": f"Bearer {life.client_keys[0]}"}
    secret["foreign_key"] = f"sk-{secret['foreign_key']}"
    messages = [{"role": "user", "content": secret["prompt"]}]
    chat = "/v1/chat/completions"
    with httpx.Client(base_url=serve.proxy, timeout=SECONDS, trust_env=False) as client:

        def refused(path: str = chat, headers: Mapping[str, str] = good, **more: Any) -> None:
            answer = life.keep_answer("errors of the proxy", client.post(path, headers=dict(headers), **more))
            assert answer.status_code >= 400, answer.text

        for stream in (False, True):
            body = {"model": "answers", "messages": messages, "stream": stream, "max_tokens": 5}
            answer = client.post(chat, headers=good, json=body)
            assert answer.status_code == 200, answer.text
            assert secret["answer"] in answer.text
            client.post(chat, headers=good, json={**body, "model": "refuses"})  # the engine's words are its own
            with suppress(httpx.RemoteProtocolError):  # after it the proxy closes the connection: none is used again
                client.post(chat, headers={**good, "connection": "close"}, json={**body, "model": "breaks"})
            for model in ("jobs", "mute", "no-such-model", None, 5):
                refused(json={**body, "model": model})
            refused(headers={"authorization": f"Bearer {life.client_keys[1]}"}, json={**body, "model": "refuses"})
            for wrong in (
                {"authorization": f"Bearer {secret['foreign_key']}"},
                {"x-api-key": secret["foreign_key"]},
                {"authorization": f"Basic {secret['foreign_key']}"},
                {"authorization": secret["foreign_key"]},
                {},
            ):
                refused(headers=wrong, json=body)
        refused(content=b'{"model": "answers", "messages": ["' + secret["prompt"].encode())
        refused(content=secret["prompt"])
        refused(json={"model": "answers", "messages": messages, "more": "x" * 200_000})
        refused("/v1/nothing", json={"messages": messages})
        refused(f"{chat}/x?prompt={secret['prompt']}&api_key={secret['foreign_key']}", headers={}, json={})
        for fields in ({}, {"model": "no-such-model"}):
            form = {"prompt": secret["prompt"], **fields}
            refused("/v1/audio/transcriptions", data=form, files={"file": ("a.wav", secret["prompt"].encode())})
    for bad in (b"content-length: x", b"content-length: 5\r\ncontent-length: 6", b"transfer-encoding: x", b"\0"):
        head = f"POST {chat} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {life.client_keys[0]}\r\n".encode()
        life.keep("errors of the proxy", raw(serve.proxy_port, head + bad + b"\r\n\r\n" + secret["prompt"].encode()))
    life.keep("errors of the proxy", raw(serve.proxy_port, secret["prompt"].encode() + b"\r\n\r\n"))


def raw(port: int, data: bytes) -> str:
    """What is answered to these bytes until the connection is closed."""
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        said = b""
        while piece := connection.recv(65536):
            said += piece
    return said.decode("utf-8", "replace")


def ask_the_control_plane(life: Life, serve: Serve, neighbour: Echo) -> None:
    secret = life.canaries
    ann = {"authorization": f"Bearer {secret['operator_token']}"}
    body = json.dumps(ours(model="answers")).encode()
    with httpx.Client(base_url=serve.web, timeout=SECONDS, trust_env=False) as client:

        def post(status: int, content: bytes = body, *, source: str = "grafana", **more: Any) -> None:
            answer = client.post(f"/webhooks/{source}", content=content, **more)
            assert life.keep_answer("webhooks", answer).status_code == status, answer.text

        def signed(key: str) -> dict[str, str]:
            return {"X-Grafana-Alerting-Signature": hmac.new(key.encode(), body, hashlib.sha256).hexdigest()}

        bearer = {"authorization": f"Bearer {secret['webhook_bearer']}"}
        post(202, headers=bearer)
        post(202, auth=("grafana", secret["webhook_password"]))
        post(202, headers=signed(secret["webhook_hmac"]))
        post(401, headers={"authorization": f"Bearer {secret['foreign_token']}"})
        post(401, auth=("grafana", secret["foreign_token"]))
        post(401, headers=signed(secret["foreign_token"]))
        post(401, headers={"X-Grafana-Alerting-Signature": secret["foreign_token"]})
        post(400, b"{" + secret["foreign_token"].encode(), headers=bearer)
        post(400, b"[]", source="alertmanager", headers=bearer)
        post(413, b"x" * 200_000, headers=bearer)

        for path in (
            "replica-sets",
            "replicas",
            "endpoints",
            "alerts",
            "decisions",
            "audit",
            "nodes",
            "tenants",
            "usage",
        ):
            answer = life.keep_answer("answers of the API", client.get(f"/api/v1/{path}", headers=ann))
            assert answer.status_code == 200, answer.text
            client.get(f"/api/v1/{path}", headers={"authorization": f"Bearer {secret['foreign_token']}"})
        life.keep_answer("answers of the API", client.get("/api/v1/replica-sets/answers/why", headers=ann))
        fixed = {
            "name": "answers",
            "model": "answers",
            "endpoints": [{"url": neighbour.url, "api_key": secret["engine_key"]}],
        }
        for dry in ("?dry_run=true", ""):
            answer = client.put(f"/api/v1/replica-sets/answers{dry}", headers=ann, json=fixed)
            assert life.keep_answer("answers of the API", answer).status_code in (200, 201), answer.text
        key = secret["engine_key"]
        for endpoint in (
            {"url": neighbour.url, "api_key": [key]},
            {"url": neighbour.url, "api_key": f"{key} é"},
            {"url": f"http://user:{key}@127.0.0.1:1"},
            {"url": neighbour.url, "api_key": key, "api_key_file": "/x"},
            {"url": neighbour.url, "apikey": key},
            {"url": neighbour.url, "api_key": key, "weight": key},
        ):
            answer = client.put("/api/v1/replica-sets/answers", headers=ann, json={**fixed, "endpoints": [endpoint]})
            assert life.keep_answer("errors of the API", answer).status_code == 400, answer.text
        wrong = {**fixed, "endpoints": [{"url": neighbour.url, "api_key": key}], "max_replicas": "many"}
        life.keep_answer("errors of the API", client.put("/api/v1/replica-sets/answers", headers=ann, json=wrong))
        cut = json.dumps(fixed)[:-3].encode()
        life.keep_answer("errors of the API", client.put("/api/v1/replica-sets/answers", headers=ann, content=cut))
        for authorization in (f"Bearer {secret['foreign_token']}", f"Basic {secret['foreign_token']}"):
            answer = client.post("/api/v1/replica-sets/answers/pause", headers={"authorization": authorization})
            assert life.keep_answer("errors of the API", answer).status_code == 401


def until_everybody_refused(serve: Serve, neighbour: Echo) -> None:
    """Slurm, Grafana and an engine have each quoted a secret at us, and what became of it has been said."""

    def is_so() -> bool:
        quoted = " ".join(neighbour.quoted)
        endpoints = json.loads(command(serve, "get", "endpoints", "-o", "json"))
        [mute] = [one for one in endpoints if one["model"] == "mute"]
        return "/slurm/" in quoted and "/api/alertmanager/" in quoted and bool(mute["message"])

    eventually_sync(is_so, timeout_seconds=SECONDS)
    eventually_sync(lambda: "Slurm cannot be used" in serve.log(), timeout_seconds=SECONDS)


def run_commands(life: Life, serve: Serve, directory: Path) -> None:
    secret = life.canaries
    for line in (
        *(["get", noun, "-o", "json"] for noun in ("replica-sets", "replicas", "endpoints", "alerts", "audit")),
        *(["get", noun, "-o", "wide"] for noun in ("replica-sets", "endpoints")),
        ["check"],
        ["migrate"],
        ["why", "answers"],
        ["keys", "list"],
        ["tenants", "list"],
        ["usage"],
        ["pause", "answers", "--reason", "a look"],
        ["resume", "answers"],
        ["serve", "--role", "control"],  # the port is taken
    ):
        said = command(serve, *line)
        assert said.strip(), line
        life.keep(f"command {' '.join(line[:2])}", said)
    endpoint = {"url": "y", "api_key": [secret["engine_key"]]}
    one = json.dumps({"replica_sets": [{"name": "x", "model": "x", "endpoints": [endpoint]}]})
    for text in (
        one,
        one.replace("]", ""),
        f"replica_sets: [{{endpoints: [{{api_key: '{secret['engine_key']}'}}]",
        one + "}",
    ):
        life.keep("command apply", command(serve, "apply", "-f", "-", stdin=text))
    binary = directory / "not-a-key"
    binary.write_text(f"{secret['engine_key']}\n{secret['engine_key']} é\n")
    spec = {"name": "x", "model": "x", "endpoints": [{"url": "http://127.0.0.1:1", "api_key_file": str(binary)}]}
    life.keep("command apply", command(serve, "apply", "-f", "-", stdin=json.dumps({"replica_sets": [spec]})))


def troubled_urls(life: Life) -> Iterator[tuple[str, str]]:
    """Databases that are away, and that do not know us."""
    password = life.canaries["database_password"]
    yield "away", urlunsplit(urlsplit(life.database_url)._replace(netloc=f"u:{password}@127.0.0.1:1"))
    yield "unknown", with_password(life.database_url, "nobody", password)


def run_without_a_database(life: Life, serve: Serve, directory: Path) -> None:
    bearer = {"authorization": f"Bearer {life.canaries['webhook_bearer']}"}
    for _, url in troubled_urls(life):
        with serving(directory, url, **{**serve.environment, "DATABASE_URL": url}) as other:
            ask = partial(_posted, f"http://127.0.0.1:{serve.web_port}/webhooks/grafana", bearer)
            answer = eventually_sync(ask, timeout_seconds=SECONDS)
            eventually_sync(lambda log=other.log: "PostgreSQL" in log(), timeout_seconds=SECONDS)  # type: ignore[misc]
            assert life.keep_answer("webhooks", answer).status_code == 503
            other.process.terminate()
            other.wait()
            life.keep("log", other.log())


def run_commands_in_trouble(life: Life, serve: Serve) -> None:
    """Commands without a database, and with settings that are wrong."""
    secret = life.canaries
    for name, url in troubled_urls(life):
        for line in (["check"], ["migrate"], ["get", "replicas"]):
            life.keep(f"command {line[0]}, database {name}", command(serve, *line, DATABASE_URL=url))
    operator, token = secret["operator_token"], secret["slurm_token"]
    for wrong in (
        {"CONTROLPLANE_OPERATOR__TOKENS": operator},
        {"CONTROLPLANE_OPERATOR__TOKENS": f"{operator},ann:{operator}"},
        {"CONTROLPLANE_WEBHOOK__BASIC_CREDENTIALS": secret["webhook_password"]},
        {"DATABASE_URL": f"postgres//x:{secret['database_password']}@h/d"},
        {"DATABASE_URL": f"postgresql://x:{secret['database_password']}@h:port/d?nonsense=1"},
        {"CONTROLPLANE_GRAFANA__URL": f"http://u:{secret['grafana_token']}@h"},
        {"CONTROLPLANE_SLURM__TOKEN_FILE": "/x"},
        {"CONTROLPLANE_SLURM__TOKENN": token},
    ):
        life.keep("command check, wrong settings", command(serve, "check", **wrong))


def _posted(url: str, headers: Mapping[str, str]) -> httpx.Response:
    try:
        return httpx.post(url, content=json.dumps(ours()), headers=dict(headers), timeout=SECONDS, trust_env=False)
    except httpx.TransportError:
        raise AssertionError("does not listen yet") from None


def look_around(life: Life, serve: Serve) -> None:
    for name, url in (("control plane", serve.web), ("proxy", serve.proxy)):
        for path in ("/metrics", "/health", "/ready", "/sd/prometheus"):
            life.keep(f"{path} of the {name}", httpx.get(url + path, timeout=SECONDS, trust_env=False).text)
    life.keep("command lines", "\n".join(command_lines().values()))
    pg_dump = program("pg_dump", *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"))))
    dumped = subprocess.run([pg_dump, life.database_url], capture_output=True, text=True, check=True)
    life.keep("dump of the database", dumped.stdout)


# --- what came out of it -------------------------------------------------------------------------------------------

IN_THE_DATABASE = {"engine_key": {"endpoints.api_key"}}
"""What must be known in clear text because it is sent to somebody, and where it is kept."""


def test_nothing_secret_was_said_anywhere(life: Life) -> None:
    assert {"log", "webhooks", "errors of the proxy", "errors of the API", "answers of the API"} < set(life.said)
    leaks = {
        place: found
        for place, text in life.said.items()
        if place != "dump of the database" and (found := life.canaries.found_in(text))
    }
    assert leaks == {}


def test_the_database_holds_the_keys_of_engines_and_nothing_else_that_is_secret(life: Life) -> None:
    assert life.canaries.found_in(life.said["dump of the database"], allowed=IN_THE_DATABASE) == []
    for name, columns in IN_THE_DATABASE.items():
        assert columns_with(life.database_url, life.canaries[name]) == columns


def test_there_was_something_to_be_found(life: Life) -> None:
    """The search finds what is there: the hash of a key in the database, and names of tenants and sets everywhere."""
    found = Canaries(hash=hashlib.sha256(life.client_keys[0].encode()).hexdigest())
    assert found.found_in(life.said["dump of the database"]) == ["hash"]
    for sentence in ("request failed", "request ended", "webhook refused", "Slurm cannot be used", "PostgreSQL"):
        assert sentence in life.said["log"], sentence
    assert "physics" in life.said["log"]
    assert "serve" in life.said["command lines"]
    assert set(CONTENT) < set(life.canaries)
    assert len(life.canaries) >= 12


@pytest.mark.parametrize("dress", [str, lambda text: text[:-9], lambda text: text.replace("canary", "")])
def test_a_canary_that_is_cut_is_found(dress: Any) -> None:
    canaries = Canaries()
    assert canaries["some_key"] in canaries.values()
    assert canaries.found_in(f"error: {dress(canaries['some_key'])}") == ["some_key"]
    assert canaries.found_in("error: canary") == []
