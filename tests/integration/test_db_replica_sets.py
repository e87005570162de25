"""Replica sets in a real PostgreSQL: apply, scale, pause and the decisions that explain them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import Any

import pytest

from controlplane.core.types import Decision, DecisionReason, ExternalEndpoint, ReplicaSet, ReplicaSetSpec, VllmOptions
from controlplane.db import Database, NotFound, Stale, decisions, endpoints, replica_sets
from controlplane.db.replica_sets import Applied
from tests.conftest import eventually
from tests.integration.db_rows import NOW, make_set, opened, slurm_spec


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    async with opened(database_url) as opened_db:
        yield opened_db


def external(*pairs: tuple[str, str | None]) -> ReplicaSetSpec:
    return ReplicaSetSpec("box", "m", endpoints=tuple(ExternalEndpoint(url, key) for url, key in pairs))


async def apply(db: Database, spec: ReplicaSetSpec, *, dry_run: bool = False) -> Applied:
    return await replica_sets.apply(db, spec, actor="ann", now=NOW, dry_run=dry_run)


async def test_applying_again_changes_nothing_and_decides_nothing(db: Database) -> None:
    spec = slurm_spec(vllm=VllmOptions(args=("--x",), environment={"A": "b"}))
    assert await apply(db, spec, dry_run=True) is Applied.CREATED
    assert await replica_sets.load_all(db) == ()
    assert await apply(db, spec) is Applied.CREATED
    assert await apply(db, spec) is Applied.UNCHANGED
    assert (await replica_sets.load(db, "a")).spec == spec
    assert len(await decisions.load_newest(db)) == 1


async def test_a_new_spec_moves_desired_inside_its_bounds(db: Database) -> None:
    await make_set(db, max_replicas=8)
    await replica_sets.scale(db, "a", actor="ann", now=NOW, replicas=6)
    assert await apply(db, slurm_spec(max_replicas=4)) is Applied.CHANGED
    assert (await replica_sets.load(db, "a")).desired_replicas == 4
    (newest, *_) = await decisions.load_newest(db, replica_set="a")
    assert (newest.previous, newest.desired, newest.actor) == (6, 4, "ann")


async def test_only_what_a_running_job_cannot_change_has_a_new_hash(db: Database) -> None:
    before = await make_set(db)
    assert (await make_set(db, max_replicas=9)).spec_hash == before.spec_hash
    assert (await make_set(db, vllm=VllmOptions(args=("--x",)))).spec_hash != before.spec_hash


async def test_external_endpoints_follow_the_spec_and_their_keys_stay_out_of_it(db: Database) -> None:
    await apply(db, external(("http://one:1", "k1"), ("http://two:2", None)))
    assert [(one.url, one.api_key) for one in await endpoints.load_live(db)] == [
        ("http://one:1", "k1"),
        ("http://two:2", None),
    ]
    assert all(one.api_key is None for one in (await replica_sets.load(db, "box")).spec.endpoints)
    assert await apply(db, external(("http://one:1", "k1"), ("http://two:2", None))) is Applied.UNCHANGED
    assert await apply(db, external(("http://one:1", "k2"))) is Applied.CHANGED
    assert [(one.url, one.api_key) for one in await endpoints.load_live(db)] == [("http://one:1", "k2")]


async def test_a_set_keeps_its_kind(db: Database) -> None:
    await make_set(db, "box")
    with pytest.raises(ValueError, match="a set cannot change between"):
        await apply(db, external(("http://one:1", None)))


async def test_two_who_apply_at_once_both_succeed(db: Database) -> None:
    outcomes = await asyncio.gather(*(apply(db, slurm_spec(max_replicas=i)) for i in range(1, 7)))
    assert len(outcomes) == 6
    assert 1 <= (await replica_sets.load(db, "a")).max_replicas <= 6


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"replicas": 5}, "replicas: 5 is not between 0 and 4"),
        ({"min_replicas": -1}, "min_replicas: must be 0 or more"),
        ({"min_replicas": 5}, "max_replicas: 4 is less than min_replicas, 5"),
        ({"replicas": 0, "min_replicas": 1}, "replicas: 0 is not between 1 and 4"),
    ],
)
async def test_what_is_out_of_bounds_is_refused_with_its_field(
    db: Database, wanted: dict[str, Any], message: str
) -> None:
    before = await make_set(db)
    with pytest.raises(ValueError, match=message):
        await replica_sets.scale(db, "a", actor="ann", now=NOW, **wanted)
    assert await replica_sets.load(db, "a") == before


async def test_scaling_sets_count_and_bounds_together_and_explains_itself(db: Database) -> None:
    await make_set(db)
    planned = await replica_sets.scale(db, "a", actor="ann", now=NOW, replicas=6, max_replicas=8, dry_run=True)
    assert (await replica_sets.load(db, "a")).desired_replicas == 0
    for _ in range(2):
        after = await replica_sets.scale(db, "a", actor="ann", now=NOW, replicas=6, max_replicas=8, reason="demo")
        assert after == planned == await replica_sets.load(db, "a")
    newest, created = await decisions.load_newest(db)
    assert (newest.reason, newest.previous, newest.desired) == (DecisionReason.OPERATOR, 0, 6)
    assert "(demo)" in newest.explanation
    assert created.explanation.startswith("spec created by ann") or created.actor == "test"


async def test_narrower_bounds_take_desired_with_them(db: Database) -> None:
    await make_set(db)
    assert (await replica_sets.scale(db, "a", actor="ann", now=NOW, min_replicas=2)).desired_replicas == 2
    assert (
        await replica_sets.scale(db, "a", actor="ann", now=NOW, min_replicas=0, max_replicas=1)
    ).desired_replicas == 1


async def test_fixed_endpoints_cannot_be_scaled(db: Database) -> None:
    await apply(db, external(("http://one:1", None)))
    with pytest.raises(ValueError, match="replica_set: its endpoints are not run by Slurm"):
        await replica_sets.scale(db, "box", actor="ann", now=NOW, replicas=1)


async def test_a_pause_ends_when_it_is_resumed_or_when_its_time_comes(db: Database) -> None:
    await make_set(db)
    until = NOW + timedelta(hours=1)
    paused = await replica_sets.pause(db, "a", actor="ann", now=NOW, reason="repair", until=until)
    assert (paused.is_paused, paused.paused_reason, paused.paused_until) == (True, "repair", until)
    assert await replica_sets.pause(db, "a", actor="ann", now=NOW, reason="repair", until=until) == paused
    assert await replica_sets.resume_due(db, until - timedelta(seconds=1)) == []
    assert await replica_sets.resume_due(db, until) == ["a"]
    resumed = await replica_sets.load(db, "a")
    assert (resumed.is_paused, resumed.paused_reason, resumed.paused_until) == (False, None, None)
    assert await replica_sets.resume(db, "a", actor="ann", now=NOW) == resumed
    assert [one.actor for one in await decisions.load_newest(db)] == ["pause-end", "ann", "test"]
    with pytest.raises(ValueError, match="until: must be in the future"):
        await replica_sets.pause(db, "a", actor="ann", now=NOW, until=NOW)


async def test_an_unknown_set_is_not_found(db: Database) -> None:
    for verb in (replica_sets.scale, replica_sets.pause, replica_sets.resume):
        with pytest.raises(NotFound, match="there is no replica set 'b'"):
            await verb(db, "b", actor="ann", now=NOW)


async def test_a_decision_made_from_an_older_count_is_dropped(db: Database) -> None:
    await make_set(db)
    decision = Decision("a", desired=1, previous=0, reason=DecisionReason.SCALED_UP, explanation="x", alerts=("k",))
    outcomes = await asyncio.gather(
        *(replica_sets.decide(db, decision, actor="scaler", now=NOW) for _ in range(4)), return_exceptions=True
    )
    assert sum(isinstance(outcome, Stale) for outcome in outcomes) == 3
    after = await replica_sets.load(db, "a")
    assert (after.desired_replicas, after.scaled_up_at, after.scaled_down_at) == (1, NOW, None)
    assert (await decisions.load_latest(db))["a"].alerts == ("k",)
    assert len(await decisions.load_newest(db)) == 2


async def test_a_decision_cannot_leave_the_bounds_in_force(db: Database) -> None:
    await make_set(db, max_replicas=1)
    decision = Decision("a", desired=2, previous=0, reason=DecisionReason.SCALED_UP, explanation="x")
    with pytest.raises(Stale):
        await replica_sets.decide(db, decision, actor="scaler", now=NOW)


async def test_a_pause_that_an_operator_makes_longer_at_its_end_stays(db: Database) -> None:
    await make_set(db)
    end, later = NOW + timedelta(hours=1), NOW + timedelta(hours=2)
    await replica_sets.pause(db, "a", actor="ann", now=NOW, until=end)
    async with db.transaction() as connection:
        await connection.execute("UPDATE replica_sets SET paused_until = %s", (later,))
        ending = asyncio.create_task(replica_sets.resume_due(db, end))
        await eventually(lambda: is_waiting(db))
    assert await ending == []
    assert (await replica_sets.load(db, "a")).paused_until == later


async def is_waiting(db: Database) -> bool:
    """Does anybody wait for another's lock?"""
    async with db.connection() as connection:
        cursor = await connection.execute("SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
        return cursor.rowcount > 0


async def test_an_operators_count_begins_the_windows_that_a_decision_begins(db: Database) -> None:
    await make_set(db)
    up = await scaled(db, replicas=3, now=NOW)
    assert (up.scaled_up_at, up.scaled_down_at) == (NOW, None)
    later = NOW + timedelta(minutes=1)
    down = await scaled(db, replicas=2, now=later)
    assert (down.scaled_up_at, down.scaled_down_at) == (NOW, later)


async def scaled(db: Database, *, replicas: int, now: datetime) -> ReplicaSet:
    await replica_sets.scale(db, "a", replicas=replicas, actor="test", now=now)
    return await replica_sets.load(db, "a")
