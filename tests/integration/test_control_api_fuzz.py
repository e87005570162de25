"""The control plane's API asked with what its own description allows, and with what it does not.

Schemathesis makes requests up from the OpenAPI document. Whatever comes, the answer comes soon, is no fault of ours,
and a refusal has the API's shape. Nothing here probes or starts anything: only the HTTP app runs, on real PostgreSQL.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from schemathesis import GenerationMode
from schemathesis.core.result import Ok

from controlplane.db import Database, DatabaseOptions
from controlplane.metrics import ControlPlaneMetrics
from controlplane.slurm.script import ScriptOptions
from controlplane.web import WebOptions, create_app, openapi
from controlplane.web.credentials import OperatorToken, WebhookCredentials

EXAMPLES = 40
ANSWER_SECONDS = 20.0
OPERATOR, SENDER = "an-operators-token", "a-senders-token"

SCHEMA = schemathesis.openapi.from_dict(openapi.document())
OPERATIONS = {made.ok().label: made.ok() for made in SCHEMA.get_all_operations() if isinstance(made, Ok)}
GOOD, BAD = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
ASKED = [
    *((label, GOOD) for label in OPERATIONS),
    *((label, BAD) for label, one in OPERATIONS.items() if one.body or one.query),
]
BODIES = {"deep": b"[" * 100_000, "NUL": b'{"reason":"\\u0000"}', "surrogate": b'{"reason":"\\ud800"}'}
SET = {
    "model": "m",
    "slurm": {"partition": "gpu", "gpus_per_node": 1, "time_limit_seconds": 3600},
    "vllm": {"image": "/software/vllm.sif", "model_path": "/models/m"},
}


@pytest.fixture(scope="module")
def url(shared_url: str) -> Iterator[str]:
    with serving(shared_url) as address:
        headers = {"Authorization": f"Bearer {OPERATOR}"}
        httpx.put(f"{address}/api/v1/replica-sets/box", json=SET, headers=headers).raise_for_status()
        yield address


@contextmanager
def serving(database_url: str) -> Iterator[str]:
    """The app under uvicorn, in a thread with a loop of its own, because what asks here does not await."""
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    options = WebOptions(
        webhook=WebhookCredentials(bearer_tokens=(SENDER,)),
        operators=(OperatorToken("ann", OPERATOR),),
        script=ScriptOptions(),
    )
    servers: list[uvicorn.Server] = []
    is_up = threading.Event()

    async def run() -> None:
        async with Database(DatabaseOptions(database_url)) as db:
            app = create_app(db, options, ControlPlaneMetrics(CollectorRegistry()), slurm_status=lambda: None)
            servers.append(uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", ws="none")))
            is_up.set()
            await servers[0].serve(sockets=[bound])

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    try:
        assert is_up.wait(ANSWER_SECONDS)
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        servers[0].should_exit = True
        thread.join(ANSWER_SECONDS)
        assert not thread.is_alive()


@pytest.mark.parametrize(("label", "mode"), ASKED, ids=lambda one: getattr(one, "value", one))
def test_an_operation_answers_whatever_it_is_asked(url: str, label: str, mode: GenerationMode) -> None:
    token = SENDER if "/webhooks/" in label else OPERATOR
    statuses: set[int] = set()

    @given(case=OPERATIONS[label].as_strategy(generation_mode=mode), is_known=st.booleans())
    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    def ask(case: schemathesis.Case[Any], is_known: bool) -> None:
        if is_known and "replica-sets/{name}" in label:
            case.path_parameters["name"] = "box"
            if mode is GOOD and isinstance(case.body, dict):
                case.body.pop("name", None)
        response = case.call(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=ANSWER_SECONDS)
        statuses.add(response.status_code)
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
            error = response.json()["error"]
            assert error["message"]
            assert set(error) <= {"message", "field", "faults"}

    ask()
    hard_to_hit = label.startswith("PUT ") or label.endswith("/scale")  # what counts there are bounds between fields
    if mode is GOOD and not hard_to_hit and ("{name}" not in label or "replica-sets" in label):
        assert min(statuses) < 300, "what the description allows was never granted"


@given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH"]),
    path=st.sampled_from(list(openapi.document()["paths"])),
    name=st.text(max_size=80),
    query=st.dictionaries(
        st.sampled_from(["dry_run", "limit", "at", "since", "replica_set", "x"]), st.text(max_size=40)
    ),
    body=st.one_of(st.binary(max_size=60), st.sampled_from(list(BODIES))),
    token=st.sampled_from([OPERATOR, SENDER, "nobodys", "ä"]),
)
@settings(max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_any_text_anywhere_is_answered(
    url: str, method: str, path: str, name: str, query: dict[str, str], body: bytes | str, token: str
) -> None:
    content = BODIES[body] if isinstance(body, str) else body
    with httpx.Client(base_url=url, timeout=ANSWER_SECONDS, trust_env=False) as client:
        target = path.replace("{name}", quote(name, safe="/"))
        headers = {b"authorization": f"Bearer {token}".encode()}
        response = client.request(method, target, params=query, content=content, headers=headers)
    assert response.status_code < 500, response.text
    if response.status_code >= 400 and path.startswith(("/api/", "/webhooks/")):
        assert response.json()["error"]["message"]
