"""The simulation, as far as there is time for it in every test run; `make sim` lives many more seeds."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any

import psycopg
import pytest

from controlplane.demo.postgres import PrivatePostgres
from tests.sim import product
from tests.sim.database import TABLES
from tests.sim.dialects import DOWN, FORBIDDEN, FROZEN, Dialect, New, Old
from tests.sim.invariants import Broken
from tests.sim.lives import live, play, tell
from tests.sim.mutations import MUTATIONS
from tests.sim.regressions import SCENARIOS, tick
from tests.sim.slurm import Reservation, Slurm
from tests.sim.workers import SEEDS_TO_FIND
from tests.sim.world import BEGIN, World

SEEDS = 60
_RECORDED = Path(__file__).parents[1] / "fixtures" / "slurmrestd"


@pytest.fixture(scope="module")
def url(postgres: PrivatePostgres, template_database: str) -> Iterator[str]:
    """One database for all lives: each empties it first."""
    yield postgres.create_database("sim", template=template_database)
    postgres.drop_database("sim")


@pytest.mark.parametrize("first", range(0, SEEDS, 10))
def test_every_invariant_holds(url: str, first: int) -> None:
    failure = live(range(first, first + 10), url)
    assert failure is None, tell(failure, lines=60)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_planted_mistake_is_found(url: str, mutation: str) -> None:
    failure = live(range(SEEDS_TO_FIND), url, mutation=mutation)
    assert failure is not None
    assert failure.is_of_an_invariant, failure.error


def test_a_seed_lives_the_same_life_again(url: str) -> None:
    lives: list[list[str]] = [[], []]
    for told in lives:
        assert live([7], url, tells=told.append) is None
    assert lives[0] == lives[1]


def test_a_life_begins_with_every_table_empty(url: str) -> None:
    """A table that is added must be emptied as well, or a seed is not the same life again."""
    with psycopg.connect(url) as connection:
        found = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
    ours = {name for (name,) in found if "yoyo" not in name}
    assert ours - {name for name, _ in TABLES} == {"installation", "tenants", "api_keys"}


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_what_was_found_once_is_not_found_again(url: str, scenario: Callable[[World], Awaitable[None]]) -> None:
    play(scenario, url)


async def three_generations_of_walltimes_end(world: World) -> None:
    """Two replicas are wanted, and two can be given requests at any moment, with requests in flight all the time."""
    plane = await world.grown(2, slurm=product.resources(240))
    for _ in range(90):
        await tick(world, plane, 10)
        world.clients_are_answered()
        world.proxies_read()
        world.lagging_proxies_send(timedelta(seconds=5))
        [row] = world.watch.rows("SELECT count(*) AS routable FROM routable_endpoints")
        if row["routable"] < 2:
            raise Broken(f"{row['routable']} replicas can be given requests")
    [row] = world.watch.rows("SELECT count(*) AS handed_over FROM replicas WHERE reason = 'HANDED_OVER'")
    assert row["handed_over"] >= 6


def test_walltimes_end_and_nobody_notices(url: str) -> None:
    play(three_generations_of_walltimes_end, url)


# --- the fake Slurm says what a real one said ---------------------------------------------------------------


@pytest.fixture(params=[(Old(), "slurm-22.05.8_v0.0.38"), (New(), "slurm-24.11.5_v0.0.42")], ids=["old", "new"])
def recorded(request: pytest.FixtureRequest) -> tuple[Dialect, dict[str, Any]]:
    dialect, name = request.param
    return dialect, json.loads((_RECORDED / f"{name}.json").read_text())


def told(body: Any) -> Any:
    """What an answer says, without what only a real one can know."""
    numbers = [
        one.get("error_number", one.get("error_code", one.get("errno"))) for one in body.get("errors", []) if one
    ]
    return (
        numbers,
        bool(body.get("job_id")),
        sorted(body.keys() - {"meta", "warnings", "results", "status"} - _LIST_EXTRAS),
    )


_LIST_EXTRAS = {"last_backfill", "last_update"}


def test_the_fake_answers_as_a_real_one_did(recorded: tuple[Dialect, dict[str, Any]]) -> None:
    dialect, real = recorded
    pairs = {
        "ping": dialect.ping(None),
        "down_ping": dialect.ping(DOWN),
        "jobs": dialect.jobs([]),
        "down_jobs": dialect.no_jobs(DOWN, is_list=True),
        "frozen_ctld_jobs": dialect.no_jobs(FROZEN, is_list=True),
        "auth_jobs_expired_token": dialect.no_jobs(FORBIDDEN, is_list=True),
        "down_job": dialect.no_jobs(DOWN, is_list=False),
        "error_unknown_job": dialect.unknown_job(),
        "submit_held": dialect.submitted(1, is_held=True),
        "down_submit": dialect.not_submitted(DOWN),
        "frozen_ctld_submit": dialect.not_submitted(FROZEN),
        "auth_submit_bad_signature": dialect.not_submitted(FORBIDDEN),
        "release_held": dialect.done(),
        "release_unknown": dialect.no_such_job(cancels=False),
        "release_finished": dialect.already_over(cancels=False),
        "cancel_default": dialect.done(),
        "down_cancel": dialect.not_done(DOWN, cancels=True),
        "frozen_ctld_cancel": dialect.not_done(FROZEN, cancels=True),
        "error_cancel_unknown_job": dialect.no_such_job(cancels=True),
        "node_one": dialect.nodes({"n1": "127.0.0.1"}, "gpu"),
        "nodes_draining": dialect.nodes({"n1": "127.0.0.1", "n2": "127.0.0.1"}, "gpu"),
        "reservations": dialect.reservations([Reservation("r", BEGIN, BEGIN + timedelta(hours=1), frozenset({"n1"}))]),
        "partitions": dialect.partitions("gpu", "n[1-4]"),
        "down_reservations": dialect.no_list("reservations", DOWN),
    }
    pairs = {name: answer for name, answer in pairs.items() if name in real}
    fake = {name: (status, told(body)) for name, (status, body) in pairs.items()}
    assert fake == {name: (real[name]["status"], told(real[name]["body"])) for name in pairs}


@pytest.mark.parametrize("name", ["job_held", "job_running", "job_completing", "job_exit3", "job_node_fail"])
def test_the_fake_shows_a_job_as_a_real_one_did(recorded: tuple[Dialect, dict[str, Any]], name: str) -> None:
    dialect, real = recorded
    theirs = real[name]["body"]["jobs"][0]
    slurm = Slurm(dialect, Random(0), BEGIN)
    job = slurm.add("a", "www-data", is_held=name == "job_held")
    if name != "job_held":
        slurm.advance(BEGIN + timedelta(seconds=30))
        assert job.state == "RUNNING"
    match name:
        case "job_completing":
            slurm.end(job, "CANCELLED", "None", signal=15)
        case "job_exit3":
            slurm.end(job, "FAILED", "NonZeroExitCode", exit_code=3)
            slurm.advance(BEGIN + timedelta(seconds=60))
        case "job_node_fail":
            slurm.fail_node(job, lives_for=timedelta(seconds=9))
    _, body = dialect.jobs([job])
    assert isinstance(body, dict)
    [ours] = body["jobs"]
    alike = ("job_state", "state_reason")
    assert {key: ours[key] for key in alike} == {key: theirs[key] for key in alike}
    for key, value in ours.items():
        assert type(value) is type(theirs[key]), key
        if isinstance(value, dict):
            assert value.keys() == theirs[key].keys(), key
    if name in ("job_exit3", "job_held"):
        assert ours["exit_code"] == theirs["exit_code"]
    if name == "job_held":
        assert ours["priority"] == theirs["priority"]
