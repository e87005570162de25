"""Rounds of the reconciler over policies, schedules, freezes and advice, in a time that the test moves.

Slurm is away: decisions need none. What a round decides is what it has written down.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from controlplane.core.stories import RecordedDecision
from controlplane.core.types import (
    Alert,
    AlertAction,
    DecisionReason,
    Mode,
    PolicyType,
    ScaleUp,
    ScalingPolicy,
    Schedule,
)
from controlplane.db import Database, alerts, decisions, freezes, replica_sets, replicas
from controlplane.metrics import ControlPlaneMetrics
from controlplane.reconcile.actions import ActionOptions, Actor
from controlplane.reconcile.pauses import PauseLoop, PauseOptions
from controlplane.reconcile.replicas import ReplicaLoop, ReplicaOptions
from controlplane.slurm.client import SlurmClient, SlurmOptions
from controlplane.slurm.script import ScriptOptions
from tests.integration.db_rows import NOW, make_set, opened
from tests.integration.lives import crashed, made

FIVE_SECONDS, HOUR = timedelta(seconds=5), timedelta(hours=1)
FOUR_A_MINUTE = ScalingPolicy(PolicyType.REPLICAS, 4, 60)
EAGER = ScaleUp(step=3, cooldown_seconds=0, policies=(FOUR_A_MINUTE,))


class Rounds:
    """A reconciler in the test's hand."""

    def __init__(self, db: Database, slurm: SlurmClient) -> None:
        self.db = db
        self.now = NOW
        actor = Actor(db, slurm, ActionOptions(Path("/"), ScriptOptions(), "i"), lambda: self.now, random.Random(1))
        metrics = ControlPlaneMetrics(CollectorRegistry())
        self._loop = ReplicaLoop(db, slurm, actor, ReplicaOptions("i"), metrics, lambda: self.now)
        self._terms = PauseLoop(db, PauseOptions())

    async def run(self, at: datetime | None = None) -> int:
        """One round, at another time if one is given; returns how many are desired after it."""
        self.now = at or self.now
        await self._terms.run_once(self.now)
        await self._loop.run_once(self.now)
        return (await replica_sets.load(self.db, "a")).desired_replicas

    async def said(self) -> list[RecordedDecision]:
        """What was decided since the set was made, oldest first."""
        return [one for one in reversed(await decisions.load_newest(self.db)) if one.actor != "test"]

    async def fires(self, action: AlertAction = AlertAction.SCALE_UP, **labels: str) -> None:
        """An alert that its sender goes on confirming."""
        alert = Alert(
            source="grafana",
            org_id=1,
            fingerprint=f"f{action}",
            alertname="QueueGrows",
            is_firing=True,
            starts_at=self.now,
            ends_at=None,
            refreshed_at=self.now + timedelta(days=1),
            labels={"model": "m", **labels},
            action=action,
        )
        await alerts.refresh(self.db, "grafana", 1, [alert], now=self.now)


@pytest.fixture
async def rounds(database_url: str, free_port: int) -> AsyncIterator[Rounds]:
    options = SlurmOptions(f"http://127.0.0.1:{free_port}", "nobody", None, user_id=1, api_version="v0.0.40")
    async with opened(database_url) as db, SlurmClient(options) as slurm:
        yield Rounds(db, slurm)


async def make_growing_set(rounds: Rounds, **changes: Any) -> None:
    """One whose replicas never are in the way: none is made, for it is paced by its policies alone."""
    await make_set(rounds.db, max_replicas=20, surge=0, **{"scale_up": EAGER, **changes})


async def forget_replicas(rounds: Rounds) -> None:
    """As if they had started at once: no replica is starting."""
    async with rounds.db.connection() as connection:
        await connection.execute("DELETE FROM replicas")


async def test_a_policy_paces_growth_by_what_was_decided_before(rounds: Rounds) -> None:
    await make_growing_set(rounds)
    await rounds.fires()
    counts = []
    for seconds in (0, 5, 10, 55, 60, 65, 70):
        counts.append(await rounds.run(NOW + timedelta(seconds=seconds)))
        await forget_replicas(rounds)
    assert counts == [3, 4, 4, 4, 7, 8, 8]
    reasons = [one.reason for one in await rounds.said()]
    assert reasons == [
        DecisionReason.SCALED_UP,
        DecisionReason.SCALED_UP,
        DecisionReason.LIMITED,
        DecisionReason.SCALED_UP,
        DecisionReason.SCALED_UP,
        DecisionReason.LIMITED,
    ]
    cut, limited = (await rounds.said())[1:3]
    assert cut.explanation == "QueueGrows is firing; the policy 4 replicas in 60 s allows 4 until 12:01:00"
    assert limited.explanation == cut.explanation


async def test_a_schedule_opens_and_ends_with_one_decision_each(rounds: Rounds) -> None:
    evening = Schedule("evening", "0 14 * * *", 3600, "Europe/Berlin", min_replicas=3, max_replicas=5)
    await make_set(rounds.db, max_replicas=2, schedules=(evening,))  # 13:00 in UTC, an hour from now
    assert await rounds.run() == 0
    assert await rounds.run(NOW + HOUR - FIVE_SECONDS) == 0
    assert await rounds.run(NOW + HOUR) == 3
    assert await rounds.run(NOW + 2 * HOUR - FIVE_SECONDS) == 3
    assert await rounds.run(NOW + 2 * HOUR) == 2
    told = [(one.reason, one.previous, one.desired, one.explanation) for one in await rounds.said()]
    assert told == [
        (DecisionReason.STEADY, 0, 0, "no alert presses"),
        (DecisionReason.SCHEDULED, 0, 3, "schedule evening opens: bounds 3 to 5"),
        (DecisionReason.STEADY, 3, 3, "no alert presses"),
        (DecisionReason.SCHEDULED, 3, 2, "schedule evening ends: bounds 0 to 2"),
    ]


async def test_a_frozen_set_waits_with_its_schedules_and_follows_them_when_it_is_lifted(rounds: Rounds) -> None:
    always = Schedule("always", "* * * * *", 3600, min_replicas=2)
    await make_growing_set(rounds, schedules=(always,))
    await freezes.freeze_all(rounds.db, actor="test", now=NOW, until=NOW + HOUR)
    await rounds.fires()
    assert await rounds.run() == 0
    assert await rounds.run(NOW + HOUR - FIVE_SECONDS) == 0
    [waiting] = await rounds.said()
    assert (waiting.reason, waiting.desired) == (DecisionReason.FROZEN, 0)
    assert "would go 0 -> 2: schedule always opens" in waiting.explanation
    assert await rounds.run(NOW + HOUR) == 2
    assert [one.reason for one in await rounds.said()][-1] is DecisionReason.SCHEDULED


async def test_a_frozen_set_still_replaces_what_it_lacks(rounds: Rounds) -> None:
    await make_set(rounds.db)
    await replica_sets.scale(rounds.db, "a", actor="test", now=NOW, replicas=2)
    await freezes.freeze(rounds.db, "a", actor="test", now=NOW)
    await rounds.run()
    async with rounds.db.connection() as connection:
        cursor = await connection.execute("SELECT count(*) AS made FROM replicas WHERE phase = 'PENDING'")
        assert (await cursor.fetchone() or {})["made"] == 2


async def test_a_pin_holds_against_an_alert_until_its_end(rounds: Rounds) -> None:
    await make_growing_set(rounds)
    await rounds.fires()
    await replica_sets.scale(rounds.db, "a", actor="test", now=NOW, replicas=1, until=NOW + HOUR)
    assert await rounds.run() == 1
    assert await rounds.run(NOW + HOUR - FIVE_SECONDS) == 1
    assert [one.reason for one in await rounds.said()] == [DecisionReason.PINNED]
    await forget_replicas(rounds)
    assert await rounds.run(NOW + HOUR) == 4
    assert [one.reason for one in await rounds.said()][1:] == [DecisionReason.OPERATOR, DecisionReason.SCALED_UP]


async def test_advice_is_recorded_once_and_never_taken(rounds: Rounds) -> None:
    await make_growing_set(rounds, mode=Mode.ADVISORY)
    await rounds.fires()
    assert await rounds.run() == 0
    assert await rounds.run(NOW + HOUR) == 0
    [advice] = await rounds.said()
    assert (advice.reason, advice.previous, advice.desired) == (DecisionReason.SCALED_UP, 0, 0)
    assert advice.explanation == "advisory: would go 0 -> 3: QueueGrows is firing"


async def test_an_alert_that_did_not_press_for_the_window_grows_nothing(rounds: Rounds) -> None:
    await make_growing_set(rounds, scale_up=replace(EAGER, stabilization_window_seconds=60))
    await rounds.fires()
    assert await rounds.run() == 0
    assert await rounds.run(NOW + timedelta(seconds=55)) == 0
    assert await rounds.run(NOW + timedelta(seconds=60)) == 3
    assert [one.reason for one in await rounds.said()] == [DecisionReason.STABILIZING, DecisionReason.SCALED_UP]


async def test_a_set_whose_starts_fail_passes_the_pressure_to_the_next(rounds: Rounds) -> None:
    await make_growing_set(rounds, priority=10)
    await make_set(rounds.db, "b", max_replicas=20, surge=0, priority=20, scale_up=EAGER)
    await rounds.fires()
    assert await rounds.run() == 3
    async with rounds.db.connection() as connection:
        await connection.execute(
            "UPDATE replicas SET phase = 'ENDED', reason = 'CRASHED', ended_at = %s, version = version + 1",
            (NOW + FIVE_SECONDS,),
        )
    assert await rounds.run(NOW + 2 * FIVE_SECONDS) == 3
    assert (await replica_sets.load(rounds.db, "b")).desired_replicas == 3


async def test_each_failed_start_of_a_set_that_backs_off_is_told_once_with_its_next_try(rounds: Rounds) -> None:
    await make_growing_set(rounds, min_replicas=1)
    for at in (NOW + timedelta(minutes=1), NOW + timedelta(minutes=2)):
        replica = await made(rounds.db, at, 20000 + at.minute)
        failed = replace(crashed(replica), message=f"failed at {at:%H:%M}")
        await replicas.move(rounds.db, failed, actor="test", now=at)
        for _ in range(2):
            await rounds.run(at)
    told = [one.explanation for one in await rounds.said() if one.reason is DecisionReason.BACKING_OFF]
    assert told == [
        "1 failed starts in a row; next try at 12:01:10: failed at 12:01",
        "2 failed starts in a row; next try at 12:02:20: failed at 12:02",
    ]


async def test_a_schedule_that_this_host_cannot_read_changes_nothing_and_stops_no_round(rounds: Rounds) -> None:
    stranger = Schedule("stranger", "0 8 * * *", 60, "Europe/Atlantis", min_replicas=2)
    await make_growing_set(rounds, schedules=(stranger,))
    await rounds.fires()
    assert await rounds.run() == 3
