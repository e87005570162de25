"""Replicas in a real PostgreSQL: guarded moves, bounds and ports under concurrency, and operators' verbs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta

import pytest

from controlplane.core.types import Health, Move, Phase, Reason
from controlplane.core.verbs import Verb, VerbRefused
from controlplane.db import (
    Database,
    DatabaseError,
    Duplicate,
    NotFound,
    Stale,
    decisions,
    endpoints,
    replica_sets,
    replicas,
)
from tests.integration.db_rows import NOW, make_replica, make_set, opened, to


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    async with opened(database_url) as opened_db:
        yield opened_db


async def test_a_name_is_the_sets_and_a_number_that_never_comes_again(db: Database) -> None:
    replica_set = await make_set(db)
    first = await make_replica(db, replica_set, Phase.ENDED)
    second = await make_replica(db, replica_set)
    assert first.name == f"cp-a-{first.id}"
    assert second.id > first.id
    assert "x" * 32 not in repr(first)


async def test_what_a_drains_deadline_cut_is_kept_to_the_end(db: Database) -> None:
    replica = await make_replica(db, await make_set(db), Phase.DRAINING)
    cut = await replicas.move(db, replace(to(replica, Phase.STOPPING), cut_requests=3), actor="one", now=NOW)
    ended = await replicas.move(db, to(cut, Phase.ENDED), actor="one", now=NOW)
    assert [one.cut_requests for one in (replica, cut, ended)] == [None, 3, 3]


@pytest.mark.parametrize("overtaking", ["another look", "a requeue"])
async def test_a_look_that_was_overtaken_is_not_kept(db: Database, overtaking: str) -> None:
    replica = await make_replica(db, await make_set(db), Phase.RUNNING)
    await endpoints.ensure(db, replica, "http://n1:20000")
    [before] = await endpoints.load_live(db)
    ready = replace(before, health=Health.READY, passes=1, first_ready_at=NOW, confirmed_at=NOW, probed_at=NOW)
    await endpoints.save(db, ready, seen=before)
    later = replace(ready, passes=2, running=7, probed_at=NOW + timedelta(seconds=5))
    if overtaking == "another look":
        await endpoints.save(db, later, seen=ready)
    else:
        await endpoints.distrust(db, replica)
    [now] = await endpoints.load_live(db)
    late = replace(ready, passes=2, running=0, probed_at=NOW + timedelta(seconds=60))
    await endpoints.save(db, late, seen=ready)
    assert await endpoints.load_live(db) == (now,)


async def test_a_move_decided_from_an_older_version_is_refused_and_leaves_no_trace(db: Database) -> None:
    replica = await make_replica(db, await make_set(db), Phase.RUNNING)
    draining = await replicas.move(db, to(replica, Phase.DRAINING), actor="one", now=NOW)
    with pytest.raises(Stale):
        await replicas.move(db, to(replica, Phase.DRAINING), actor="two", now=NOW)
    with pytest.raises(Stale):  # the right version with another phase
        await replicas.move(
            db, Move(replace(draining, phase=Phase.RUNNING), Phase.STOPPING, Reason.CRASHED), actor="two", now=NOW
        )
    assert await replicas.load(db, replica.name) == draining
    assert [step.actor for step in await replicas.load_history(db, name=replica.name)][-1] == "one"


async def test_every_move_is_in_the_history_with_what_it_was_and_became(db: Database) -> None:
    replica = await make_replica(db, await make_set(db), Phase.ENDED)
    history = await replicas.load_history(db, name=replica.name)
    phases = [step.to_phase for step in history]
    assert phases == list(Phase)
    assert [step.from_phase for step in history] == [None, *phases[:-1]]
    assert [step.slurm_job_id for step in history] == [None, None, *[replica.slurm_job_id] * 5]
    assert history[-1].reason is Reason.SCALED_DOWN
    assert replica.version == len(history)


async def test_of_many_who_take_the_same_step_exactly_one_succeeds(db: Database) -> None:
    replica = await make_replica(db, await make_set(db))
    results = await asyncio.gather(
        *(replicas.move(db, to(replica, Phase.SUBMITTING), actor=str(i), now=NOW) for i in range(8)),
        return_exceptions=True,
    )
    assert sorted(type(result).__name__ for result in results) == ["Replica", *["Stale"] * 7]
    assert len(await replicas.load_history(db, name=replica.name)) == 2


async def test_ended_is_final_even_for_somebody_who_writes_past_the_guard(db: Database) -> None:
    replica = await make_replica(db, await make_set(db), Phase.ENDED)
    with pytest.raises(DatabaseError, match="never changed again"):
        await replicas.move(db, Move(replica, Phase.PENDING), actor="test", now=NOW)
    with pytest.raises(DatabaseError, match="never changed again"):
        async with db.connection() as connection:
            await connection.execute("UPDATE replicas SET message = 'x'")


async def test_the_schema_refuses_a_phase_without_what_it_needs(db: Database) -> None:
    replica = await make_replica(db, await make_set(db), Phase.SUBMITTING)
    with pytest.raises(DatabaseError, match="a_known_job_has_an_id"):
        await replicas.move(db, Move(replica, Phase.QUEUED), actor="test", now=NOW)
    with pytest.raises(DatabaseError, match="leaving_has_a_reason"):
        await replicas.move(db, Move(replica, Phase.ENDED), actor="test", now=NOW)


async def test_a_port_belongs_to_one_live_replica_and_is_free_when_that_ended(db: Database) -> None:
    replica_set = await make_set(db, min_replicas=2)
    first = await replicas.create(db, replica_set, port=30000, secret="x" * 32, actor="test", now=NOW)
    with pytest.raises(Duplicate, match="one_live_replica_per_port"):
        await replicas.create(db, replica_set, port=30000, secret="x" * 32, actor="test", now=NOW)
    await replicas.move(db, to(first, Phase.ENDED), actor="test", now=NOW)
    await replicas.create(db, replica_set, port=30000, secret="x" * 32, actor="test", now=NOW)


async def test_a_job_belongs_to_one_live_replica(db: Database) -> None:
    replica_set = await make_set(db)
    queued = await make_replica(db, replica_set, Phase.QUEUED)
    other = await make_replica(db, replica_set, Phase.SUBMITTING)
    with pytest.raises(Duplicate, match="one_live_replica_per_job"):
        await replicas.move(db, Move(other, Phase.QUEUED, slurm_job_id=queued.slurm_job_id), actor="test", now=NOW)


async def test_many_who_create_at_once_never_exceed_the_maximum(db: Database) -> None:
    replica_set = await make_set(db, max_replicas=3, surge=2)
    results = await asyncio.gather(*(make_replica(db, replica_set) for _ in range(10)), return_exceptions=True)
    assert sum(isinstance(result, Stale) for result in results) == 7
    assert len(await replicas.load_live(db)) == 3


async def test_no_more_are_created_than_are_desired_by_whoever_looked_before(db: Database) -> None:
    """A control plane that was stopped in a round, and wakes when another one has done its work."""
    replica_set = await make_set(db, min_replicas=2, max_replicas=8)
    for port in (30000, 30001):
        await replicas.create(db, replica_set, port=port, secret="x" * 32, actor="taken over", now=NOW)
    with pytest.raises(Stale):
        await replicas.create(db, replica_set, port=30002, secret="x" * 32, actor="woken", now=NOW)


async def test_what_drains_makes_room_up_to_the_surge_and_no_further(db: Database) -> None:
    replica_set = await make_set(db, max_replicas=2, surge=1)
    for _ in range(2):
        await make_replica(db, replica_set, Phase.DRAINING)
    await make_replica(db, replica_set)
    with pytest.raises(Stale):
        await make_replica(db, replica_set)


async def test_nothing_is_created_for_a_paused_or_changed_set(db: Database) -> None:
    replica_set = await make_set(db)
    with pytest.raises(Stale):
        await make_replica(db, replace(replica_set, spec_hash="older"))
    await replica_sets.pause(db, "a", actor="test", now=NOW)
    with pytest.raises(Stale):
        await make_replica(db, replica_set)


async def test_back_to_pending_forgets_the_job(db: Database) -> None:
    replica = await make_replica(db, await make_set(db), Phase.SUBMITTING)
    pending = await replicas.move(db, Move(replica, Phase.PENDING), actor="test", now=NOW)
    assert (pending.slurm_job_id, pending.reason) == (None, None)


@pytest.mark.parametrize(
    ("verb", "phase", "after", "reason"),
    [
        (Verb.DRAIN, Phase.PENDING, Phase.ENDED, Reason.DRAINED_BY_OPERATOR),
        (Verb.DRAIN, Phase.QUEUED, Phase.STOPPING, Reason.DRAINED_BY_OPERATOR),
        (Verb.DRAIN, Phase.RUNNING, Phase.DRAINING, Reason.DRAINED_BY_OPERATOR),
        (Verb.UNDRAIN, Phase.DRAINING, Phase.RUNNING, None),
        (Verb.CANCEL, Phase.PENDING, Phase.ENDED, Reason.CANCELLED_BY_OPERATOR),
        (Verb.CANCEL, Phase.DRAINING, Phase.STOPPING, Reason.CANCELLED_BY_OPERATOR),
    ],
)
async def test_a_verb_is_obeyed_once_audited_and_wakes_the_reconciler(
    db: Database, verb: Verb, phase: Phase, after: Phase, reason: Reason | None
) -> None:
    replica = await make_replica(db, await make_set(db), phase)
    heard = db.listen("controlplane_wake")
    assert await anext(heard) == ""
    planned = await replicas.obey(db, replica.name, verb, actor="ann", now=NOW, dry_run=True)
    assert (planned.replica.phase, planned.is_changed) == (after, True)
    assert await replicas.load(db, replica.name) == replica
    obeyed = await replicas.obey(db, replica.name, verb, actor="ann", now=NOW)
    assert (obeyed.replica.phase, obeyed.replica.reason) == (after, reason)
    assert await asyncio.wait_for(anext(heard), 10) == "controlplane_wake"
    await heard.aclose()  # type: ignore[attr-defined]
    assert (await replicas.load_history(db, name=replica.name))[-1].actor == "ann"
    again = await replicas.obey(db, replica.name, verb, actor="ann", now=NOW)
    assert (again.replica, again.is_changed) == (obeyed.replica, False)


async def test_a_verb_that_loses_a_race_looks_again_and_is_obeyed_from_there(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    queued = await make_replica(db, await make_set(db), Phase.QUEUED)
    running = await replicas.move(db, to(queued, Phase.RUNNING), actor="reconciler", now=NOW)
    seen = iter([queued, running])  # what was loaded first is older than the row

    async def load(_db: Database, _name: str) -> object:
        return next(seen)

    monkeypatch.setattr(replicas, "load", load)
    obeyed = await replicas.obey(db, queued.name, Verb.DRAIN, actor="ann", now=NOW)
    assert obeyed.replica.phase is Phase.DRAINING


async def test_a_verb_that_cannot_be_obeyed_says_why(db: Database) -> None:
    replica = await make_replica(db, await make_set(db), Phase.SUBMITTING)
    with pytest.raises(VerbRefused, match="try again shortly"):
        await replicas.obey(db, replica.name, Verb.CANCEL, actor="ann", now=NOW)
    with pytest.raises(NotFound):
        await replicas.obey(db, "cp-a-999", Verb.CANCEL, actor="ann", now=NOW)


async def test_what_ended_long_ago_is_forgotten_with_its_history(db: Database) -> None:
    replica_set = await make_set(db)
    ended = await make_replica(db, replica_set, Phase.ENDED)
    live = await make_replica(db, replica_set)
    assert await replicas.forget(db, older_than=timedelta(days=1), now=NOW + timedelta(hours=1)) == 0
    assert await replicas.forget(db, older_than=timedelta(days=1), now=NOW + timedelta(days=2)) == 1
    assert [one.name for one in await replicas.load_newest(db)] == [live.name]
    assert await replicas.load_history(db, name=ended.name) == []


async def test_each_sets_newest_decision_is_kept_however_old(db: Database) -> None:
    await make_set(db)
    await replica_sets.scale(db, "a", replicas=2, actor="test", now=NOW)
    assert await decisions.forget(db, older_than=timedelta(days=1), now=NOW + timedelta(days=9)) >= 1
    [kept] = await decisions.load_newest(db)
    assert kept.desired == 2
