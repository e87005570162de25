"""Pins, bounds for a time, schedules and freezes in a real PostgreSQL: what is stored, what ends, and what refuses."""

from __future__ import annotations

import asyncio
import importlib
import shutil
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from controlplane.core.types import (
    Change,
    Decision,
    DecisionReason,
    ExternalEndpoint,
    Freeze,
    Mode,
    OperatorBounds,
    Pin,
    PolicyType,
    ReplicaSet,
    ReplicaSetSpec,
    ScaleUp,
    ScalingPolicy,
    Schedule,
    ScheduledBounds,
    SelectPolicy,
)
from controlplane.db import Database, NotFound, Stale, decisions, freezes, migrate, replica_sets
from controlplane.db.replica_sets import Applied
from controlplane.demo.postgres import PrivatePostgres
from tests.integration.db_rows import NOW, make_set, opened, slurm_spec

LATER = NOW + timedelta(hours=1)
NIGHT = ScheduledBounds(("night",), None, 1)


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    async with opened(database_url) as opened_db:
        yield opened_db


async def scale(db: Database, **wanted: Any) -> ReplicaSet:
    after = await replica_sets.scale(db, "a", actor="ann", now=NOW, **wanted)
    if not wanted.get("dry_run"):
        assert after == await replica_sets.load(db, "a")
    return after


async def explanations(db: Database) -> list[str]:
    return [one.explanation for one in await decisions.load_newest(db)]


def a_decision(desired: int, previous: int, **more: Any) -> Decision:
    return Decision("a", desired, previous, DecisionReason.SCALED_UP, "x", **more)


async def decide(db: Database, decision: Decision) -> ReplicaSet:
    await replica_sets.decide(db, decision, actor="scaler", now=NOW)
    return await replica_sets.load(db, "a")


def numbers(one: ReplicaSet) -> tuple[int, int, int]:
    return one.min_replicas, one.max_replicas, one.desired_replicas


async def test_everything_that_a_spec_says_of_scaling_comes_back_as_it_was(db: Database) -> None:
    policy = ScalingPolicy(PolicyType.PERCENT, 50, 60)
    spec = slurm_spec(
        scale_up=ScaleUp(3, 10, 20, (policy, replace(policy, type=PolicyType.REPLICAS)), SelectPolicy.MIN),
        mode=Mode.ADVISORY,
        schedules=(Schedule("night", "0 22 * * *", 3600, "Europe/Berlin", 0, 1),),
    )
    assert await replica_sets.apply(db, spec, actor="ann", now=NOW) is Applied.CREATED
    assert (await replica_sets.load(db, "a")).spec == spec
    assert await replica_sets.apply(db, spec, actor="ann", now=NOW) is Applied.UNCHANGED


# --- pins and bounds for a time ---------------------------------------------------------------------------


async def test_a_pin_is_stored_once_with_its_actor_and_ends_at_its_time(db: Database) -> None:
    await make_set(db)
    for dry_run in (True, False, False):
        after = await scale(db, replicas=3, until=LATER, reason="demo", dry_run=dry_run)
        assert (after.pin, after.desired_replicas) == (Pin(3, LATER, "ann", "demo"), 3)
    assert len(await decisions.load_newest(db)) == 2
    assert (await explanations(db))[0] == f"scaled by ann: 3 wanted, bounds 0 to 4, until {LATER.isoformat()} (demo)"
    assert await replica_sets.end_due(db, LATER - timedelta(seconds=1)) == []
    assert await replica_sets.end_due(db, LATER) == ["a: the operator's pin ended"]
    assert await replica_sets.end_due(db, LATER) == []
    freed = await replica_sets.load(db, "a")
    assert (freed.pin, freed.desired_replicas) == (None, 3)
    [newest, *_] = await decisions.load_newest(db)
    assert (newest.reason, newest.actor) == (DecisionReason.OPERATOR, "term-end")


async def test_a_count_without_an_end_ends_a_pin(db: Database) -> None:
    await make_set(db)
    await scale(db, replicas=3, until=LATER)
    assert (await scale(db, max_replicas=5)).pin is not None
    assert (await scale(db, replicas=3)).pin is None


async def test_bounds_for_a_time_give_way_to_the_specs_and_take_desired_along(db: Database) -> None:
    await make_set(db, min_replicas=1)
    await scale(db, max_replicas=8, replicas=8)
    assert numbers(await scale(db, max_replicas=9, until=LATER)) == (1, 9, 8)
    assert await replica_sets.end_due(db, LATER) == ["a: the operator's bounds ended"]
    after = await replica_sets.load(db, "a")
    assert numbers(after) == (1, 4, 4)
    assert after.scaled_down_at == LATER


async def test_a_pin_and_bounds_of_one_word_end_together(db: Database) -> None:
    await make_set(db)
    assert numbers(await scale(db, replicas=7, max_replicas=8, until=LATER)) == (0, 8, 7)
    assert await replica_sets.end_due(db, LATER) == ["a: the operator's pin and bounds ended"]
    assert numbers(await replica_sets.load(db, "a")) == (0, 4, 4)


async def test_an_end_that_an_operator_moves_meanwhile_is_kept(db: Database) -> None:
    await make_set(db)
    await scale(db, replicas=3, until=LATER)
    async with asyncio.TaskGroup() as group:
        group.create_task(scale(db, replicas=3, until=LATER + timedelta(hours=1)))
        for _ in range(3):
            group.create_task(replica_sets.end_due(db, LATER))
    assert (await replica_sets.load(db, "a")).pin == Pin(3, LATER + timedelta(hours=1), "ann")


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"replicas": 2, "until": NOW}, "until: must be in the future"),
        ({"replicas": 5, "until": LATER}, "replicas: 5 is not between 0 and 4"),
    ],
)
async def test_a_pin_that_makes_no_sense_is_refused(db: Database, wanted: dict[str, Any], message: str) -> None:
    before = await make_set(db)
    with pytest.raises(ValueError, match=message):
        await scale(db, **wanted)
    assert await replica_sets.load(db, "a") == before


async def test_applying_ends_an_operators_bounds_and_leaves_pins_freezes_and_open_schedules(db: Database) -> None:
    await make_set(db)
    await scale(db, min_replicas=2, until=LATER)
    assert await replica_sets.apply(db, slurm_spec(), actor="ann", now=NOW) is Applied.CHANGED
    assert numbers(await replica_sets.load(db, "a")) == (0, 4, 2)
    await decide(db, Decision("a", 2, 2, DecisionReason.SCHEDULED, "x", scheduled=ScheduledBounds(("day",), 2, 9)))
    await scale(db, replicas=8, until=LATER)
    await freezes.freeze(db, "a", actor="ann", now=NOW)
    before = await replica_sets.load(db, "a")
    assert await replica_sets.apply(db, slurm_spec(), actor="ann", now=NOW) is Applied.UNCHANGED
    assert await replica_sets.apply(db, slurm_spec(max_replicas=5), actor="ann", now=NOW) is Applied.CHANGED
    after = await replica_sets.load(db, "a")
    assert numbers(after) == numbers(before) == (2, 9, 8)
    assert (after.pin, after.freezes, after.scheduled) == (before.pin, before.freezes, before.scheduled)


# --- schedules --------------------------------------------------------------------------------------------


async def test_a_schedules_bounds_come_into_force_with_their_decision_and_go(db: Database) -> None:
    await make_set(db)
    await scale(db, replicas=3)
    closed = await decide(db, Decision("a", 1, 3, DecisionReason.SCHEDULED, "night opens", scheduled=NIGHT))
    assert (numbers(closed), closed.scheduled, closed.scaled_down_at) == ((0, 1, 1), NIGHT, NOW)
    reopened = await decide(db, Decision("a", 1, 1, DecisionReason.SCHEDULED, "ends", scheduled=ScheduledBounds()))
    assert numbers(reopened) == (0, 4, 1)
    assert (await explanations(db))[:2] == ["ends", "night opens"]


async def test_an_operators_bounds_go_before_a_schedules(db: Database) -> None:
    await make_set(db)
    await decide(db, Decision("a", 0, 0, DecisionReason.SCHEDULED, "x", scheduled=NIGHT))
    assert numbers(await scale(db, max_replicas=6, replicas=5)) == (0, 6, 5)
    after = await decide(db, Decision("a", 5, 5, DecisionReason.SCHEDULED, "x", scheduled=ScheduledBounds()))
    assert (numbers(after), after.operator_bounds) == ((0, 6, 5), OperatorBounds(None, 6))


# --- freezes ----------------------------------------------------------------------------------------------


async def test_a_freeze_is_stored_once_with_its_actor_and_lifted_once(db: Database) -> None:
    await make_set(db)
    wanted: Any = {"actor": "ann", "reason": "r", "until": LATER}
    after = await freezes.freeze(db, "a", now=NOW, dry_run=True, **wanted)
    assert after.freezes == (Freeze(False, "ann", NOW, "r", LATER),)
    assert await freezes.freeze(db, "a", now=NOW, **wanted) == after
    again = await freezes.freeze(db, "a", now=NOW + timedelta(minutes=1), **wanted)
    assert again == await replica_sets.load(db, "a") == after  # since when it was said first
    bob = await freezes.freeze(db, "a", actor="bob", now=NOW)
    assert bob.freezes == (Freeze(False, "bob", NOW),)
    assert (await freezes.unfreeze(db, "a", actor="ann", now=NOW, dry_run=True)).freezes == ()
    for _ in range(2):
        assert (await freezes.unfreeze(db, "a", actor="ann", now=NOW)).freezes == ()
    said = await explanations(db)
    assert said[:3] == ["unfrozen by ann", "frozen by bob", f"frozen by ann until {LATER.isoformat()} (r)"]
    assert len(said) == 4


async def test_a_freeze_of_all_holds_sets_that_are_made_later_and_is_lifted_apart(db: Database) -> None:
    await make_set(db)
    external = ReplicaSetSpec("box", "m", endpoints=(ExternalEndpoint("http://h:1"),))
    await replica_sets.apply(db, external, actor="ann", now=NOW)
    of_all = await freezes.freeze_all(db, actor="ann", now=NOW, reason="incident")
    assert of_all == await freezes.load_of_all(db) == Freeze(True, "ann", NOW, "incident")
    assert await freezes.freeze_all(db, actor="ann", now=LATER, reason="incident") == of_all
    await make_set(db, "b")
    await freezes.freeze(db, "b", actor="bob", now=NOW)
    own = Freeze(False, "bob", NOW)
    assert [one.freezes for one in await replica_sets.load_all(db)] == [(of_all,), (own, of_all), ()]
    assert (await freezes.unfreeze(db, "a", actor="ann", now=NOW)).freezes == (of_all,)
    assert await freezes.unfreeze_all(db, actor="ann", now=NOW) is None
    assert [one.freezes for one in await replica_sets.load_all(db)] == [(), (own,), ()]
    assert [one.explanation for one in await decisions.load_newest(db, replica_set="a")][:2] == [
        "all sets unfrozen by ann",
        "all sets frozen by ann (incident)",
    ]
    assert not [one for one in await decisions.load_newest(db, replica_set="box") if "frozen" in one.explanation]


async def test_freezes_end_at_their_time(db: Database) -> None:
    await make_set(db)
    await freezes.freeze(db, "a", actor="ann", now=NOW, until=LATER)
    await freezes.freeze_all(db, actor="ann", now=NOW, until=LATER)
    assert await freezes.lift_due(db, LATER - timedelta(seconds=1)) == []
    assert sorted(await freezes.lift_due(db, LATER)) == ["a", "all sets"]
    assert await freezes.lift_due(db, LATER) == []
    assert (await replica_sets.load(db, "a")).freezes == ()
    assert (await decisions.load_newest(db))[0].actor == "freeze-end"


async def test_everybody_freezes_at_once_and_one_row_is_left(db: Database) -> None:
    await asyncio.gather(*(freezes.freeze_all(db, actor=f"ann{i}", now=NOW) for i in range(6)))
    await make_set(db)
    await asyncio.gather(*(freezes.freeze(db, "a", actor=f"ann{i}", now=NOW) for i in range(6)))
    assert [one.is_of_all for one in (await replica_sets.load(db, "a")).freezes] == [False, True]


async def test_what_cannot_be_scaled_cannot_be_frozen(db: Database) -> None:
    external = ReplicaSetSpec("box", "m", endpoints=(ExternalEndpoint("http://h:1"),))
    await replica_sets.apply(db, external, actor="ann", now=NOW)
    with pytest.raises(ValueError, match="replica_set: its endpoints are not run by Slurm"):
        await freezes.freeze(db, "box", actor="ann", now=NOW)
    with pytest.raises(ValueError, match="until: must be in the future"):
        await freezes.freeze_all(db, actor="ann", now=NOW, until=NOW)
    for verb in (freezes.freeze, freezes.unfreeze):
        with pytest.raises(NotFound, match="there is no replica set 'b'"):
            await verb(db, "b", actor="ann", now=NOW)


# --- decisions that come too late -------------------------------------------------------------------------


async def test_a_decision_taken_before_a_freeze_or_a_pin_is_dropped_after_it(db: Database) -> None:
    await make_set(db)
    await scale(db, replicas=1)
    await freezes.freeze_all(db, actor="ann", now=NOW)
    for late in (a_decision(2, 1), Decision("a", 1, 1, DecisionReason.SCHEDULED, "x", scheduled=NIGHT)):
        with pytest.raises(Stale):
            await decide(db, late)
    await freezes.unfreeze_all(db, actor="ann", now=NOW)
    await scale(db, replicas=1, until=LATER)
    with pytest.raises(Stale):
        await decide(db, a_decision(2, 1))
    assert (await decide(db, Decision("a", 1, 1, DecisionReason.PINNED, "x"))).desired_replicas == 1
    await scale(db, replicas=1)
    assert (await decide(db, a_decision(2, 1))).desired_replicas == 2


async def test_the_changes_of_a_period_are_all_that_changed_desired_in_it(db: Database) -> None:
    await make_set(db)
    await scale(db, replicas=3)
    await replica_sets.decide(db, a_decision(4, 3), actor="scaler", now=LATER)
    await replica_sets.decide(db, Decision("a", 4, 4, DecisionReason.AT_MAX, "x"), actor="scaler", now=LATER)
    both = [Change(NOW, 0, 3), Change(LATER, 3, 4)]
    assert await decisions.load_changes(db, NOW - timedelta(seconds=1)) == {"a": both}
    assert await decisions.load_changes(db, NOW) == {"a": both[1:]}


# --- databases of before ----------------------------------------------------------------------------------


async def test_an_operators_bounds_of_before_the_migration_are_kept_as_theirs(
    postgres: PrivatePostgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    migrating = importlib.import_module("controlplane.db.migrate")
    url = postgres.create_database("of_before")
    shutil.copy(migrating.DIRECTORY / "0001.initial.sql", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(migrating, "DIRECTORY", tmp_path)
        assert migrate(url) == ["0001.initial"]
    old = {"model": "m", "template": "fake-vllm", "slurm": {"time_limit_seconds": 60}, "scale_up": {"step": 2}}
    rows = [("plain", 1, 4, 2), ("wider", 1, 9, 7), ("narrow", 2, 3, 2)]
    with psycopg.connect(url) as connection:
        for name, low, high, desired in rows:
            spec = {"name": name, "min_replicas": 1, "max_replicas": 4, **old}
            connection.execute(
                "INSERT INTO replica_sets (name, model, priority, is_external, spec, spec_hash, min_replicas, "
                "max_replicas, desired_replicas) VALUES (%s, 'm', 100, false, %s, 'h', %s, %s, %s)",
                (name, Jsonb(spec), low, high, desired),
            )
        box = {"name": "box", "model": "m", "endpoints": [{"url": "http://h:1"}]}
        connection.execute(
            "INSERT INTO replica_sets (name, model, priority, is_external, spec, spec_hash, min_replicas, max_replicas,"
            " desired_replicas) VALUES ('box', 'm', 100, true, %s, 'h', 0, 0, 0)",
            (Jsonb(box),),
        )
    assert migrate(url)[0].startswith("0002")
    async with opened(url) as db:
        sets = {one.name: one for one in await replica_sets.load_all(db)}
        assert {name: one.operator_bounds for name, one in sets.items()} == {
            "box": None,
            "plain": None,
            "wider": OperatorBounds(None, 9),
            "narrow": OperatorBounds(2, 3),
        }
        assert [numbers(sets[name]) for name, *_ in rows] == [tuple(row[1:]) for row in rows]
        assert sets["plain"].spec.scale_up == ScaleUp(step=2)
    postgres.drop_database("of_before")
