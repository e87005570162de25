"""Requests that proxies hold, told to a real PostgreSQL: one alert a model, and what the rounds make of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from controlplane.clock import utc_now
from controlplane.core.held_requests import GOOD_FOR, HELD, QUEUED, SOURCE
from controlplane.core.types import (
    Alert,
    DecisionReason,
    ExternalEndpoint,
    JobState,
    Mode,
    Phase,
    RoutableEndpoint,
    ScaleUp,
    SelectPolicy,
    ServedModel,
    VllmOptions,
)
from controlplane.db import (
    ENDPOINTS_CHANNEL,
    WAKE_CHANNEL,
    Database,
    DbUnavailable,
    alerts,
    directory,
    endpoints,
    freezes,
    held_requests,
    replica_sets,
    replicas,
    why,
)
from controlplane.proxy.directory import Snapshot
from controlplane.proxy.errors import ApiError
from controlplane.proxy.pressure import HeldPressure
from controlplane.proxy.waiting import WaitingOptions, WaitingRooms, max_in_flight_of
from controlplane.slurm.client import SlurmClient, SlurmOptions
from tests.conftest import eventually
from tests.integration.db_rows import NOW, make_ready, make_replica, make_set, observe, opened, slurm_spec
from tests.integration.test_steering_rounds import Rounds
from tests.integration.web_rig import WebRig


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    async with opened(database_url) as opened_db:
        yield opened_db


def after(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


async def told(db: Database) -> dict[str, Alert]:
    """By model."""
    found = await alerts.load_since(db, datetime(2020, 1, 1, tzinfo=UTC))
    return {one.labels["model"]: one for one in found if one.source == SOURCE}


@asynccontextmanager
async def hearing(db: Database, channel: str) -> AsyncIterator[list[str]]:
    """What is announced meanwhile."""
    heard: list[str] = []

    async def listen() -> None:
        async for name in db.listen(channel):
            heard.append(name)  # noqa: PERF401 - it never ends

    task = asyncio.create_task(listen())
    await eventually(lambda: heard == [""])
    heard.clear()
    yield heard
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


# --- one alert, whoever tells ------------------------------------------------------------------------------


async def test_two_workers_tell_of_one_alert_that_ends_with_the_last_of_them(db: Database) -> None:
    await make_set(db)
    assert (await held_requests.tell(db, "host1/1", {"m": (150, 0)}, now=NOW)).raised == ("m",)
    assert await held_requests.tell(db, "host2/1", {"m": (50, 0)}, now=after(1)) == held_requests.Told()
    (alert,) = (await told(db)).values()
    assert (alert.is_firing, alert.starts_at, alert.refreshed_at) == (True, NOW, after(1))
    assert alert.values == {"held": 200, "queued": 0, "workers": 2}
    await held_requests.tell(db, "host1/1", {}, now=after(2))
    assert (await told(db))["m"].is_firing
    assert (await held_requests.tell(db, "host2/1", {}, now=after(3))).resolved == ("m",)
    ended = (await told(db))["m"]
    assert (ended.is_firing, ended.starts_at, ended.ends_at) == (False, NOW, after(3))


async def test_many_workers_at_once_write_one_alert(db: Database) -> None:
    await make_set(db)
    tellings = [held_requests.tell(db, f"w{n}", {"m": (1, 0), "other": (1, 0)}, now=NOW) for n in range(20)]
    raised = [one.raised for one in await asyncio.gather(*tellings)]
    assert sorted(raised) == [()] * 19 + [("m", "other")]
    assert (await told(db))["m"].values["workers"] == 20
    ends = [held_requests.tell(db, f"w{n}", {}, now=after(1)) for n in range(20)]
    assert [one.resolved for one in await asyncio.gather(*ends)].count(("m", "other")) == 1


async def test_each_time_is_an_episode_of_its_own_though_clocks_differ(db: Database) -> None:
    await make_set(db)
    await held_requests.tell(db, "w1", {"m": (1, 0)}, now=after(2))
    await held_requests.tell(db, "w2", {}, now=after(1))
    await held_requests.tell(db, "w1", {}, now=after(1))  # a clock that runs late
    alert = (await told(db))["m"]
    assert (alert.is_firing, alert.ends_at) == (False, after(2))
    assert (await held_requests.tell(db, "w2", {"m": (1, 0)}, now=after(1))).raised == ("m",)
    alert = (await told(db))["m"]
    assert (alert.is_firing, alert.starts_at, alert.ends_at) == (True, after(2.000001), None)


async def test_a_hold_that_becomes_a_queue_stays_the_same_episode(db: Database) -> None:
    await make_set(db)
    await held_requests.tell(db, "w1", {"m": (9, 0)}, now=NOW)
    assert (await told(db))["m"].alertname == HELD
    await held_requests.tell(db, "w1", {"m": (0, 5)}, now=after(60))
    alert = (await told(db))["m"]
    assert (alert.alertname, alert.starts_at) == (QUEUED, NOW)


async def test_the_reconciler_is_woken_when_an_alert_begins_or_ends_and_not_by_each_word(db: Database) -> None:
    await make_set(db)
    async with hearing(db, WAKE_CHANNEL) as heard:
        for worker, held in (("w1", 1), ("w2", 1), ("w1", 2)):
            await held_requests.tell(db, worker, {"m": (held, 0)}, now=NOW)
        await held_requests.tell(db, "w1", {}, now=after(1))
        await held_requests.tell(db, "w2", {}, now=after(1))
        await db.wake()  # the last one
        await eventually(lambda: len(heard) >= 3)
        assert len(heard) == 3


# --- workers that are gone ---------------------------------------------------------------------------------


async def test_what_a_killed_worker_held_is_forgotten_by_the_next_that_tells(db: Database) -> None:
    await make_set(db)
    await held_requests.tell(db, "killed", {"m": (9, 0)}, now=NOW)
    assert (await held_requests.tell(db, "w2", {}, now=NOW + GOOD_FOR)).resolved == ()
    assert (await held_requests.tell(db, "w2", {}, now=NOW + GOOD_FOR + timedelta(seconds=1))).resolved == ("m",)


async def test_an_alert_that_no_worker_refreshes_is_stale_much_earlier_than_one_of_grafana(db: Database) -> None:
    await make_set(db)
    await held_requests.tell(db, "killed", {"m": (9, 0)}, now=NOW)
    grafana = replace((await told(db))["m"], source="grafana")
    await alerts.store(db, [(grafana, {})], now=NOW)
    stale_after = timedelta(minutes=15)
    assert await alerts.note_stale(db, stale_after=stale_after, now=NOW + GOOD_FOR) == []
    (stale,) = await alerts.note_stale(db, stale_after=stale_after, now=after(31))
    assert stale.startswith("proxy/0/")
    assert await alerts.count_stale(db) == {"proxy": 1}
    await held_requests.tell(db, "w2", {"m": (1, 0)}, now=after(40))
    assert await alerts.count_stale(db) == {}


async def test_it_is_shown_with_all_other_alerts_and_counted_when_it_is_stale(db: Database) -> None:
    await make_set(db)
    await held_requests.tell(db, "w1", {"m": (9, 0)}, now=NOW)
    await alerts.note_stale(db, stale_after=timedelta(minutes=15), now=after(31))
    rig = WebRig(db, now=after(31))
    (shown,) = (await rig.ask("GET", "/api/v1/alerts")).json()["alerts"]
    assert (shown["source"], shown["alertname"], shown["action"]) == ("proxy", HELD, "scale_up")
    assert 'controlplane_alerts_stale{source="proxy"} 1.0' in (await rig.ask("GET", "/metrics")).text


# --- the loop of a worker ----------------------------------------------------------------------------------


def nothing_routable() -> Snapshot:
    return Snapshot({"m": ServedModel("m", NOW, False, None, 0, None, None)}, {}, {})


@asynccontextmanager
async def telling(db: Database, rooms: WaitingRooms) -> AsyncIterator[HeldPressure]:
    pressure = HeldPressure(db, rooms)
    task = asyncio.create_task(pressure.run())
    yield pressure
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def ignore(_: ApiError) -> None:
    pass


async def test_a_hold_is_told_within_a_moment_and_its_end_too(db: Database) -> None:
    await make_set(db)
    rooms = WaitingRooms()
    rooms.follow(nothing_routable(), time.monotonic())
    async with telling(db, rooms):
        waiting = [rooms.wait("m", "t", lambda: None, ignore, time.monotonic(), is_stream=True) for _ in range(200)]
        alert = await eventually(lambda: _firing(db), timeout_seconds=2)
        assert alert.values["held"] == 200
        for one in waiting:
            one.leave()
        await eventually(lambda: _resolved(db), timeout_seconds=2)


async def test_a_queue_is_told_when_it_has_lasted(db: Database) -> None:
    await make_set(db)
    rooms = WaitingRooms(WaitingOptions(queue_pressure_seconds=0.5), max_in_flight_of=lambda _: 1)
    endpoint = RoutableEndpoint(1, "m", "a", 100, "http://n1:1", None, None, NOW, None)
    rooms.follow(replace(nothing_routable(), endpoints={"m": (endpoint,)}), time.monotonic())
    async with telling(db, rooms):
        await asyncio.sleep(0)  # it has looked, and found nothing
        assert rooms.enter("m", "t")
        rooms.wait("m", "t", lambda: None, ignore, time.monotonic(), is_stream=True)
        alert = await eventually(lambda: _firing(db), timeout_seconds=3)
        assert (alert.alertname, alert.values["queued"]) == (QUEUED, 1)


async def test_a_worker_that_ends_tells_that_nothing_waits_there(db: Database) -> None:
    await make_set(db)
    rooms = WaitingRooms()
    rooms.follow(nothing_routable(), time.monotonic())
    async with telling(db, rooms) as pressure:
        rooms.wait("m", "t", lambda: None, ignore, time.monotonic(), is_stream=True)
        await eventually(lambda: _firing(db))
    await pressure.close()
    assert await _resolved(db)


async def test_while_the_database_is_away_nothing_is_raised_and_it_is_tried_again(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await make_set(db)
    right, tries = held_requests.tell, 0

    async def wrong(*arguments: Any, **named: Any) -> held_requests.Told:
        nonlocal tries
        tries += 1
        if tries <= 2:
            raise DbUnavailable("away")
        return await right(*arguments, **named)

    monkeypatch.setattr(held_requests, "tell", wrong)
    rooms = WaitingRooms()
    rooms.follow(nothing_routable(), time.monotonic())
    async with telling(db, rooms):
        rooms.wait("m", "t", lambda: None, ignore, time.monotonic(), is_stream=True)
        await eventually(lambda: _firing(db))
    assert tries == 3


async def _firing(db: Database) -> Alert | None:
    alert = (await told(db)).get("m")
    return alert if alert is not None and alert.is_firing else None


async def _resolved(db: Database) -> Alert | None:
    alert = (await told(db)).get("m")
    return None if alert is None or alert.is_firing else alert


# --- what the rounds make of it ----------------------------------------------------------------------------


@pytest.fixture
async def rounds(database_url: str, free_port: int) -> AsyncIterator[Rounds]:
    options = SlurmOptions(f"http://127.0.0.1:{free_port}", "nobody", None, user_id=1, api_version="v0.0.40")
    async with opened(database_url) as opened_db, SlurmClient(options) as slurm:
        yield Rounds(opened_db, slurm)


async def test_requests_held_by_two_workers_make_one_replica_however_many_rounds_are_taken(rounds: Rounds) -> None:
    eager = ScaleUp(step=2, cooldown_seconds=0)
    await make_set(rounds.db, scale_up=eager, priority=1)
    await make_set(rounds.db, "b", scale_up=eager, priority=2)
    for seconds in range(0, 60, 5):
        for worker in ("w1", "w2"):
            await held_requests.tell(rounds.db, worker, {"m": (100, 0)}, now=after(seconds))
        assert await rounds.run(after(seconds)) == 1
        assert await rounds.run(after(seconds + 1)) == 1
    (replica,) = await replicas.load_live(rounds.db)
    assert replica.replica_set == "a"
    assert [one.reason for one in await rounds.said() if one.replica_set == "a"][:2] == [
        DecisionReason.SCALED_UP,
        DecisionReason.STARTING,
    ]
    # why tells the replica's cause, with the numbers of the moment
    story = await why.of_replica(rounds.db, replica.name, at=None, now=rounds.now)
    assert story.decision is not None
    (evidence,) = story.decision.evidence
    assert (evidence.alertname, evidence.values["held"], evidence.summary) == (
        HELD,
        200,
        "requests wait for a replica: none is routable",
    )


async def test_a_word_about_a_hold_that_comes_too_late_makes_no_second_replica(rounds: Rounds) -> None:
    one = await make_set(rounds.db, scale_up=ScaleUp(cooldown_seconds=0), max_replicas=3)
    replica = await make_replica(rounds.db, one, Phase.RUNNING)
    await replica_sets.scale(rounds.db, "a", replicas=1, actor="test", now=NOW)
    await make_ready(rounds.db, replica, "http://n1:1")
    await held_requests.tell(rounds.db, "w1", {"m": (100, 0)}, now=after(1))
    assert await rounds.run(after(2)) == 1
    await held_requests.tell(rounds.db, "w1", {"m": (0, 100)}, now=after(3))
    assert await rounds.run(after(4)) == 2


# --- what the proxies are told of a start ------------------------------------------------------------------


async def served(db: Database) -> ServedModel:
    (model,) = (await directory.read(db, utc_now())).models
    return model


async def test_the_measured_load_and_slurms_estimate_are_told_of_a_model(db: Database) -> None:
    one = await make_set(db)
    assert await served(db) == ServedModel("m", (await served(db)).created_at, False, None, 0, None, None)
    queued = await make_replica(db, one, Phase.QUEUED)
    await observe(db, queued, JobState.PENDING, started_at=after(600))
    model = await served(db)
    assert (model.expected_start_at, model.loading_since, model.starting_since) == (after(600), None, NOW)
    running = await make_replica(db, one, Phase.RUNNING)
    assert (await served(db)).loading_since == NOW
    await make_ready(db, running, "http://n1:1", at=after(90))
    model = await served(db)
    assert (model.loading_since, model.load_seconds_p95, model.start_seconds_p95) == (None, 90.0, 90.0)


async def test_how_many_requests_a_replica_runs_is_told_by_the_arguments_it_was_started_with(db: Database) -> None:
    one = await make_set(db, vllm=VllmOptions(args=("--max-num-seqs", "12")))
    await make_ready(db, await make_replica(db, one, Phase.RUNNING), "http://n1:1")
    await make_set(db, vllm=VllmOptions(args=("--max-num-seqs", "99")))  # its replicas are rolled, one by one
    (endpoint,) = await endpoints.load_routable(db)
    assert (endpoint.runs_at_once, max_in_flight_of(endpoint)) == (12, 12)


@pytest.mark.parametrize(
    ("changes", "can_start"),
    [
        ({}, True),
        ({"max_replicas": 0}, False),
        ({"mode": Mode.ADVISORY}, False),
        ({"scale_up": ScaleUp(select_policy=SelectPolicy.DISABLED)}, False),
        ({"mode": Mode.ADVISORY, "min_replicas": 1}, True),
    ],
)
async def test_it_is_told_whether_a_replica_can_come(db: Database, changes: dict[str, Any], can_start: bool) -> None:
    await make_set(db, **changes)
    assert (await served(db)).can_start is can_start


async def test_what_freezes_pins_or_pauses_a_set_at_zero_keeps_replicas_from_coming(db: Database) -> None:
    await make_set(db)
    async with hearing(db, ENDPOINTS_CHANNEL) as heard:
        await freezes.freeze(db, "a", actor="ann", now=NOW)
        assert not (await served(db)).can_start
        await eventually(lambda: heard)
    await freezes.unfreeze(db, "a", actor="ann", now=NOW)
    assert (await served(db)).can_start
    async with hearing(db, ENDPOINTS_CHANNEL) as heard:
        await replica_sets.scale(db, "a", replicas=0, until=after(60), actor="ann", now=NOW)
        assert not (await served(db)).can_start
        await eventually(lambda: heard)


async def test_servers_that_slurm_does_not_run_are_started_by_nobody(db: Database) -> None:
    spec = slurm_spec(slurm=None, template=None, max_replicas=0, endpoints=(ExternalEndpoint("http://x:1"),))
    await replica_sets.apply(db, spec, actor="test", now=NOW)
    assert not (await served(db)).can_start
