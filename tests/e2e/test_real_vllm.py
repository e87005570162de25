"""What is believed of vLLM, on a real one: vLLM 0.32.0 on the CPU, as jobs of a real Slurm, from the real template.

Run by `make test-vllm`, and not by `make test`: an engine takes half a minute of two cores to start. `VLLM_VENV` names
the venv. The tests share a replica, and those that lose it stand at the end.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from controlplane.clock import utc_now
from controlplane.core.types import Endpoint, Health, Phase, Reason, ReplicaSetSpec
from controlplane.db import Database, DatabaseOptions, endpoints, replica_sets, replicas
from controlplane.db.usage import By, report
from controlplane.demo import real_vllm
from controlplane.demo.postgres import PrivatePostgres
from controlplane.demo.slurm_cluster import SlurmCluster
from controlplane.reconcile.probe import ProbeLimits, probe
from tests.conftest import eventually
from tests.e2e.plant import Plant
from tests.e2e.streams import WHOLE, Streams

START_SECONDS = 200  # of a machine that has other things to do; alone it takes twenty
AT_ONCE, AND_WAITING = 4, 8
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def spec(session_directory: Path) -> ReplicaSetSpec:
    venv, model = Path(os.environ["VLLM_VENV"]).resolve(), session_directory / "model"
    real_vllm.make_model(venv, model)
    one = real_vllm.spec(venv, model, name="real")
    limit = ("--max-num-queued-reqs", str(AT_ONCE + AND_WAITING))
    # a replica that is lost is made anew at once, so that the tests that lose one need not wait
    return replace(one, min_replicas=1, max_replicas=1, vllm=replace(one.vllm, args=(*one.vllm.args, *limit)))


@pytest.fixture(scope="module")
def up(session_directory: Path, postgres: PrivatePostgres, template_database: str) -> Iterator[Plant]:
    """One control plane and one proxy."""
    url = postgres.create_database("vllm", template=template_database)
    directory = session_directory / "vllm"
    directory.mkdir()
    with SlurmCluster(directory / "slurm", nodes=2) as slurm, Plant(directory / "plant", slurm, url) as plant:
        plant.serve("control", "control")
        plant.serve("proxy", "proxy")
        yield plant


@pytest.fixture
async def db(up: Plant) -> AsyncIterator[Database]:
    async with Database(DatabaseOptions(up.database_url)) as db:
        yield db


@pytest.fixture
async def served(db: Database, spec: ReplicaSetSpec) -> Endpoint:
    """The endpoint of a replica that serves."""
    await replica_sets.apply(db, spec, actor="test", now=utc_now())
    return await until_served(db)


async def until_served(db: Database, *, not_by: str | None = None) -> Endpoint:
    async def serving() -> Endpoint | None:
        routable = {one.replica for one in await endpoints.load_routable(db)} - {not_by}
        return next((one for one in await endpoints.load_live(db) if one.replica in routable), None)

    return await eventually(serving, timeout_seconds=START_SECONDS)


@pytest.fixture
async def engine(served: Endpoint) -> AsyncIterator[httpx.AsyncClient]:
    """Asks vLLM itself, as the proxy does."""
    headers = {"Authorization": f"Bearer {served.api_key}"}
    async with httpx.AsyncClient(base_url=served.url, headers=headers, timeout=60, trust_env=False) as http:
        yield http


@pytest.fixture
async def client(up: Plant, served: Endpoint) -> AsyncIterator[httpx.AsyncClient]:
    """Asks the proxy."""
    headers = {"Authorization": f"Bearer {up.api_key}"}
    async with httpx.AsyncClient(base_url=up.url("proxy"), headers=headers, timeout=60, trust_env=False) as http:
        await eventually(lambda: is_known(http, served.model), timeout_seconds=30)
        yield http


async def is_known(client: httpx.AsyncClient, model: str) -> bool:
    """Does the proxy know a replica? It hears of it a moment after the database does."""
    return bool((await client.get(f"/v1/models/{model}")).json().get("state") == "routable")


def body(spec: ReplicaSetSpec, tokens: int = 40, **more: Any) -> dict[str, Any]:
    asked = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": tokens, "ignore_eos": True}
    return {"model": spec.model, "temperature": 0, **asked, **more}


def timeless(answer: bytes) -> bytes:
    return re.sub(rb'"created":\d+', b'"created":0', answer)


async def both(
    engine: httpx.AsyncClient, client: httpx.AsyncClient, asked: dict[str, Any], path: str = CHAT
) -> tuple[httpx.Response, httpx.Response]:
    """What the engine answers, and what the proxy answers to the same."""
    headers = {"x-request-id": "the-same"}  # vLLM makes the answer's id of it
    direct = await engine.post(path, json=asked, headers=headers)
    return direct, await client.post(path, json=asked, headers=headers)


def process_of_engine(served: Endpoint) -> int:
    """The process id of the engine behind an endpoint: the child of that name of the server with its port."""
    parents, servers, engines = {}, set(), set()
    port = served.url.rpartition(":")[2].encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue  # it has ended meanwhile
            if words[0].startswith(b"VLLM::EngineCore"):
                engines.add(int(entry.name))
            elif port in words and b"serve" in words:
                servers.add(int(entry.name))
    [found] = [one for one in engines if parents[one] in servers]
    return found


def lives(number: int) -> bool:
    return Path(f"/proc/{number}").exists()


# --- the probe ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["completion", "chat", "models"])
async def test_every_way_to_prove_a_replica_that_generates_passes_and_reads_its_load(
    served: Endpoint, kind: str
) -> None:
    unproven = replace(served, health=Health.UNPROVEN)
    async with httpx.AsyncClient(trust_env=False) as http:
        first = await probe(http, unproven, kind, ProbeLimits())
        second = await probe(http, unproven, kind, ProbeLimits())
    assert first.passed, first.message
    assert (first.running, first.waiting) == (0, 0)
    assert first.generated_tokens is not None
    assert second.generated_tokens is not None
    made = second.generated_tokens - first.generated_tokens
    assert made == (0 if kind == "models" else 1), "one token, and it is counted"


async def test_a_server_with_another_key_or_another_model_is_found_to_be_foreign(served: Endpoint) -> None:
    async with httpx.AsyncClient(trust_env=False) as http:
        for other in (replace(served, api_key="another"), replace(served, model="another")):
            seen = await probe(http, other, "completion", ProbeLimits())
            assert (seen.passed, seen.is_foreign) == (False, True), seen.message
        seen = await probe(http, replace(served, health=Health.UNPROVEN), "embedding", ProbeLimits())
    assert not seen.passed
    assert "/v1/embeddings answered 404" in (seen.message or "")


async def test_an_engine_that_stands_still_while_its_server_says_200_is_taken_out_and_comes_back(
    up: Plant, db: Database, served: Endpoint, engine: httpx.AsyncClient
) -> None:
    number = process_of_engine(served)
    os.kill(number, signal.SIGSTOP)
    try:

        async def is_out() -> bool:
            assert (await engine.get("/health")).status_code == 200
            return not await endpoints.load_routable(db)

        await eventually(is_out, timeout_seconds=90)
        [seen] = await endpoints.load_live(db)
        assert "the engine does not move" in (seen.message or "")
    finally:
        os.kill(number, signal.SIGCONT)
    assert (await until_served(db)).replica == served.replica


# --- what the proxy passes on ------------------------------------------------------------------------------


async def test_answers_pass_byte_for_byte_streamed_and_whole(
    spec: ReplicaSetSpec, engine: httpx.AsyncClient, client: httpx.AsyncClient
) -> None:
    for path, asked in (
        (CHAT, body(spec)),
        (CHAT, body(spec, stream=True, stream_options={"include_usage": True})),
        ("/v1/completions", {"model": spec.model, "prompt": "Hello", "max_tokens": 20, "temperature": 0}),
    ):

        async def are_the_same(asked: dict[str, Any] = asked, path: str = path) -> bool:
            direct, passed = await both(engine, client, asked, path)
            assert direct.status_code == passed.status_code == 200, passed.text
            assert passed.headers["content-type"] == direct.headers["content-type"]
            return timeless(passed.content) == timeless(direct.content)

        # not at the first try: how many tokens are in a piece is chance
        await eventually(are_the_same, timeout_seconds=30)


async def test_usage_that_the_client_did_not_ask_for_is_counted_and_not_shown(
    spec: ReplicaSetSpec, db: Database, engine: httpx.AsyncClient, client: httpx.AsyncClient
) -> None:
    async def counted() -> int:
        today = utc_now().date()
        days = (today - timedelta(days=1), today + timedelta(days=1))
        told = await report(db, By.MODEL, *days, utc_now())
        return sum(line.completion_tokens for line in told.lines)

    before = await counted()
    with_usage = body(spec, 37, stream=True, stream_options={"include_usage": True})
    headers = {"x-request-id": "the-same"}

    async def is_the_same_without_usage() -> bool:
        asked = await engine.post(CHAT, json=with_usage, headers=headers)
        hidden = await client.post(CHAT, json=body(spec, 37, stream=True), headers=headers)
        events = timeless(asked.content).split(b"\n\n")
        shown = [event for event in events if b'"usage":{' not in event]
        assert len(shown) == len(events) - 1
        assert b"usage" not in hidden.content
        return timeless(hidden.content).split(b"\n\n") == shown

    await eventually(is_the_same_without_usage, timeout_seconds=30)

    async def is_counted() -> bool:
        return await counted() - before >= 37

    await eventually(is_counted, timeout_seconds=60)


async def test_the_engines_own_refusals_come_through_as_it_wrote_them(
    spec: ReplicaSetSpec, engine: httpx.AsyncClient, client: httpx.AsyncClient
) -> None:
    for asked, param in (
        (body(spec, messages="no list"), "body.messages"),
        (body(spec, 9000, stream=True), "max_tokens"),
        ({**body(spec), "temperature": -1}, "temperature"),
    ):
        direct, passed = await both(engine, client, asked)
        assert (passed.status_code, passed.content) == (direct.status_code, direct.content)
        assert passed.status_code == 400
        assert passed.json()["error"]["param"] == param
    direct, passed = await both(engine, client, body(spec, model="another"))
    assert (direct.status_code, passed.status_code) == (404, 404)
    assert passed.json()["error"]["code"] == "model_not_found", "the proxy's own, in OpenAI's shape"


async def test_of_a_burst_that_the_engine_does_not_take_each_stream_is_whole_or_an_honest_status(
    spec: ReplicaSetSpec, client: httpx.AsyncClient
) -> None:
    async def outcome() -> str:
        answer = await client.post(CHAT, json=body(spec, 200, stream=True))
        if answer.status_code != 200:
            return str(answer.status_code)
        return (
            WHOLE if answer.text.endswith("data: [DONE]\n\n") and '"error"' not in answer.text else answer.text[-300:]
        )

    ended = Counter(await asyncio.gather(*(outcome() for _ in range(3 * (AT_ONCE + AND_WAITING)))))
    assert set(ended) == {WHOLE, "503"}, ended
    assert ended[WHOLE] >= AT_ONCE + AND_WAITING


# --- ends --------------------------------------------------------------------------------------------------


async def test_what_is_told_before_the_walltime_ends_lets_streams_finish_and_a_successor_comes(
    up: Plant, spec: ReplicaSetSpec, db: Database, served: Endpoint, client: httpx.AsyncClient
) -> None:
    assert served.replica is not None
    streams = Streams([up.url("proxy")], up.api_key, spec.model)
    await streams.open(AT_ONCE, tokens=2500)
    old = await replicas.load(db, served.replica)
    # as Slurm does some time before the limit: to the shell, which tells the server alone
    up.slurm.run("scancel", "--batch", "--signal=USR1", str(old.slurm_job_id))
    assert await streams.all_ended() == {WHOLE: AT_ONCE}

    async def has_ended() -> bool:
        return (await replicas.load(db, old.name)).phase is Phase.ENDED

    await eventually(has_ended, timeout_seconds=60)
    said = up.slurm.jobs_directory.rglob("*")
    assert any("replica: stopped as asked" in path.read_text(errors="replace") for path in said if path.is_file())
    await until_served(db, not_by=old.name)


async def test_an_engine_that_is_killed_is_out_at_once_and_replaced_though_its_server_ends_with_0(
    up: Plant, spec: ReplicaSetSpec, db: Database, served: Endpoint, client: httpx.AsyncClient
) -> None:
    assert served.replica is not None
    streams = Streams([up.url("proxy")], up.api_key, spec.model)
    await streams.open(AT_ONCE, tokens=6000)
    os.kill(process_of_engine(served), signal.SIGKILL)
    async with asyncio.timeout(30):
        ended = await streams.all_ended()
    assert ended[WHOLE] == 0, ended
    assert sum(ended.values()) == AT_ONCE, "none hangs"

    async def is_out() -> bool:
        return served.replica not in {one.replica for one in await endpoints.load_routable(db)}

    await eventually(is_out, timeout_seconds=30)

    async def ended_replica() -> bool:
        return (await replicas.load(db, served.replica or "")).phase is Phase.ENDED

    await eventually(ended_replica, timeout_seconds=60)
    assert (await replicas.load(db, served.replica)).reason is not Reason.SCALED_DOWN
    await until_served(db, not_by=served.replica)


async def test_scaled_to_zero_it_drains_under_its_streams_and_leaves_no_process(
    up: Plant, spec: ReplicaSetSpec, db: Database, served: Endpoint, client: httpx.AsyncClient
) -> None:
    number = process_of_engine(served)
    streams = Streams([up.url("proxy")], up.api_key, spec.model)
    await streams.open(AT_ONCE, tokens=2500)
    await replica_sets.apply(db, replace(spec, min_replicas=0), actor="test", now=utc_now())
    await replica_sets.scale(db, spec.name, replicas=0, actor="test", now=utc_now())
    assert await streams.all_ended() == {WHOLE: AT_ONCE}

    async def is_gone() -> bool:
        return not await replicas.load_live(db) and not lives(number)

    await eventually(is_gone, timeout_seconds=90)
