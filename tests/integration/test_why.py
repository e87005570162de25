"""Why: the chain from an alert to a job's end, as it is and as it was, from a real database."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import psycopg
import pytest

from controlplane.core.explaining import Kind, is_so_because, made_because, pending, timeline
from controlplane.core.stories import ReplicaStory, SetStory
from controlplane.core.types import (
    AlertAction,
    DecisionReason,
    ExternalEndpoint,
    Health,
    JobState,
    Move,
    Phase,
    Reason,
    Replica,
    ReplicaSetSpec,
)
from controlplane.core.verbs import Verb
from controlplane.db import (
    Database,
    NotFound,
    alerts,
    audit,
    decisions,
    endpoints,
    freezes,
    keys,
    migrate,
    nodes,
    replica_sets,
    replicas,
    slurm_jobs,
    why,
)
from controlplane.db import migrate as migrating
from controlplane.demo.postgres import PrivatePostgres
from tests.integration.db_rows import NOW, make_replica, make_set, opened, slurm_spec
from tests.integration.lives import PAYLOAD, SECRET, after, crashed, decided, fires, job, made, walked, whole_life
from tests.integration.web_rig import WebRig


@pytest.fixture
async def db(shared_url: str) -> AsyncIterator[Database]:
    async with opened(shared_url) as db:
        async with db.connection() as connection:
            await connection.execute("TRUNCATE alerts, alert_deliveries, replica_sets, audit, api_keys CASCADE")
        yield db


async def story_of(db: Database, replica: Replica, at: datetime | None = None) -> ReplicaStory:
    return await why.of_replica(db, replica.name, at=at, now=after(3600))


# --- one replica -----------------------------------------------------------------------------------------


async def test_the_chain_leads_from_the_alert_to_the_end(db: Database) -> None:
    story = await story_of(db, await whole_life(db))
    told = timeline(story)
    kinds = [event.kind for event in told if event.kind is not Kind.ENDPOINT]
    assert kinds == [
        *(Kind.ALERT, Kind.REFUSED, Kind.DECISION),
        *[Kind.REPLICA] * 3,
        *[Kind.JOB] * 2,
        *(Kind.REPLICA, Kind.JOB),
        *(Kind.DRAIN, Kind.DRAIN, Kind.END),
    ]
    words = [event.words for event in told]
    assert words[0] == "Requests queue (scale_up): m: 22 requests wait; A = 22; rule queue-rule"
    assert words[1] == "because COOLDOWN: COOLDOWN for a test"
    assert words[2] == "SCALED_UP, 0 -> 1: SCALED_UP for a test"
    assert [word for word in words if word.startswith("job")] == [
        f"job {story.slurm_job_id} PENDING, held",
        f"job {story.slurm_job_id} PENDING: Priority",
        f"job {story.slurm_job_id} RUNNING on n1",
    ]
    assert [one.health for one in story.health] == ["UNPROVEN", "READY"]
    assert (story.health[1].at, story.health[1].url) == (after(30), "http://n1:20001")
    assert made_because(story) == "SCALED_UP, 0 -> 1: SCALED_UP for a test"
    assert is_so_because(story) == "ended SCALED_DOWN"
    assert {event.actor for event in told if event.actor} == {"reconciler"}


async def test_the_evidence_is_of_the_moment_of_the_decision(db: Database) -> None:
    replica = await whole_life(db)
    await fires(db, after(100), starts_at=after(99), values={"A": 1.0}, annotations={"summary": "m: 1 request waits"})
    story = await story_of(db, replica)
    assert story.decision is not None
    [alert] = story.decision.evidence
    assert (alert.summary, alert.values, alert.starts_at) == ("m: 22 requests wait", {"A": 22}, NOW)
    assert (alert.rule_uid, alert.generator_url) == ("queue-rule", PAYLOAD["generatorURL"])


async def test_an_alert_that_was_pulled_has_the_values_of_the_delivery_that_told_of_it(db: Database) -> None:
    await make_set(db)
    alert = await fires(db, after(1))
    await alerts.refresh(db, "grafana", 1, [replace(alert, values={}, refreshed_at=after(2))], now=after(2))
    await decided(db, after(3), DecisionReason.SCALED_UP, 0, 1, alert)
    [decision, *_] = await decisions.load_newest(db)
    assert decision.evidence[0].values == {"A": 22}


@pytest.mark.parametrize(
    ("seconds", "phase", "so"),
    [
        (5, "PENDING", "nothing was asked of Slurm yet"),
        (6, "SUBMITTING", "the answer to its submit is not known yet"),
        (7, "QUEUED", "job {job} has not started yet"),
        (12, "QUEUED", "Slurm lets job {job} wait, Priority: Jobs with a higher priority come first."),
        (25, "RUNNING", "job {job} runs on n1; no endpoint is known yet"),
        (31, "RUNNING", "job {job} runs on n1; its endpoint is ready"),
        (50, "DRAINING", "leaves, SCALED_DOWN"),
        (60, "ENDED", "ended SCALED_DOWN"),
    ],
)
async def test_a_replica_is_told_of_as_it_was(db: Database, seconds: int, phase: str, so: str) -> None:
    replica = await whole_life(db)
    story = await story_of(db, replica, after(seconds))
    assert story.newest.to_phase == phase
    assert is_so_because(story) == so.format(job=replica.slurm_job_id)
    assert all(event.at <= after(seconds) for event in timeline(story))


async def test_a_moment_before_the_replica_is_refused(db: Database) -> None:
    replica = await whole_life(db)
    with pytest.raises(NotFound, match=r"at: the replica .* was made at 2026-01-01T12:00:05"):
        await story_of(db, replica, after(4))
    with pytest.raises(NotFound, match="there is no replica 'cp-a-0'"):
        await why.of_replica(db, "cp-a-0", at=None, now=NOW)


async def test_an_alert_that_asks_to_replace_it_is_in_its_chain(db: Database) -> None:
    replica = await make_replica(db, await make_set(db), Phase.RUNNING)
    labels = {"alertname": "Frozen", "action": "replace", "replica": replica.name}
    for fingerprint, name in (("f2", replica.name), ("f3", "cp-a-999")):
        changes = {"labels": {**labels, "replica": name}, "alertname": "Frozen", "action": AlertAction.REPLACE}
        await fires(db, after(10), fingerprint=fingerprint, starts_at=after(9), **changes)
    await walked(db, replica, Move(replica, Phase.STOPPING, Reason.REPLACED), at=after(11))
    told = timeline(await story_of(db, replica))
    assert [(event.kind, event.words) for event in told][-2:] == [
        (Kind.ALERT, "Frozen (replace): m: 22 requests wait; A = 22; rule queue-rule"),
        (Kind.DRAIN, "STOPPING, REPLACED"),
    ]
    assert (await story_of(db, replica, after(5))).named_by == ()


async def test_only_what_is_new_becomes_history(db: Database) -> None:
    replica = await make_replica(db, await make_set(db), Phase.QUEUED)
    observed = [
        ("ReqNodeNotAvail, UnavailableNodes:n1", ""),
        ("ReqNodeNotAvail, UnavailableNodes:n1,n2", ""),
        ("Resources", ""),
        ("Resources", "n1"),
    ]
    for number, (reason, places) in enumerate(observed):
        seen = job(replica, JobState.PENDING, state_reason=reason, nodes=places, started_at=after(number))
        await slurm_jobs.record(db, [(replica.id, seen)], after(number))
    story = await story_of(db, replica)
    assert [(one.at, one.state_reason) for one in story.jobs] == [
        (after(0), "ReqNodeNotAvail, UnavailableNodes:n1"),
        (after(2), "Resources"),
        (after(3), "Resources"),
    ]
    waits = pending(story)
    assert waits is not None
    assert waits.since == after(0)
    older = job(replica, JobState.RUNNING)
    await slurm_jobs.record(db, [(replica.id, older)], after(1))
    assert len((await story_of(db, replica)).jobs) == 3, "an older observation is not news"


# --- what a replica was made for -------------------------------------------------------------------------


async def origin(db: Database, replica: Replica) -> tuple[str | None, str | None]:
    story = await story_of(db, replica)
    assert story.decision is not None
    return str(story.decision.reason), story.replaces


async def test_a_replica_knows_the_decision_that_wanted_it(db: Database) -> None:
    await make_set(db, min_replicas=1)
    first = await made(db, after(1), 1025)
    assert await origin(db, first) == ("OPERATOR", None)
    alert = await fires(db, after(2))
    await decided(db, after(2), DecisionReason.SCALED_UP, 1, 2, alert)
    await decided(db, after(3), DecisionReason.STARTING, 2, 2, alert)
    assert await origin(db, await made(db, after(4), 1026)) == ("SCALED_UP", None)


async def test_what_crashed_is_replaced_and_inherits_its_cause(db: Database) -> None:
    await make_set(db, min_replicas=1)
    first = await made(db, after(1), 1025)
    alert = await fires(db, after(2))
    await decided(db, after(2), DecisionReason.SCALED_UP, 1, 2, alert)
    second = await made(db, after(3), 1026)
    await walked(db, first, crashed(first), at=after(4))
    third = await made(db, after(5), 1027)
    assert await origin(db, third) == ("OPERATOR", first.name)
    assert made_because(await story_of(db, third)) == f"it takes the place of {first.name}, which left CRASHED"
    assert (await story_of(db, first)).replaced_by == third.name
    assert (await story_of(db, first, after(4))).replaced_by is None
    await walked(db, third, crashed(third), at=after(6))
    await walked(db, second, crashed(second), at=after(7))
    replaced = [await origin(db, await made(db, after(8 + n), 1028 + n)) for n in range(2)]
    assert replaced == [("SCALED_UP", second.name), ("OPERATOR", third.name)], "each place is taken once"


async def test_who_takes_the_place_on_a_drained_node_is_told_so_and_nobody_later(db: Database) -> None:
    await make_set(db, min_replicas=1)
    first = await walked(db, await made(db, after(1), 1025), Phase.SUBMITTING, Phase.QUEUED, Phase.RUNNING, at=after(1))
    await slurm_jobs.record(db, [(first.id, job(first, JobState.RUNNING, nodes="n1"))], after(3))
    await nodes.drain(db, "n1", actor="ann", now=after(99))
    second = await made(db, after(100), 1026, beside=[first.name])
    leaves = [Move(first, phase, Reason.NODE_DRAINED) for phase in (Phase.STOPPING, Phase.ENDED)]
    await walked(db, first, *leaves, at=after(200))
    alert = await fires(db, after(300))
    await decided(db, after(300), DecisionReason.SCALED_UP, 1, 2, alert)
    third = await made(db, after(301), 1027)
    assert await origin(db, second) == ("OPERATOR", first.name)
    assert await origin(db, third) == ("SCALED_UP", None)
    assert (await story_of(db, first)).replaced_by == second.name
    await walked(db, second, crashed(second), at=after(400))
    assert await origin(db, await made(db, after(401), 1028)) == ("OPERATOR", second.name)


async def test_who_comes_after_a_hand_over_without_room_takes_that_place(db: Database) -> None:
    await make_set(db, min_replicas=1, max_replicas=1, surge=0)
    first = await walked(db, await made(db, after(1), 1025), Phase.SUBMITTING, Phase.QUEUED, Phase.RUNNING, at=after(1))
    leaves = [Move(first, phase, Reason.HANDED_OVER) for phase in (Phase.STOPPING, Phase.ENDED)]
    await walked(db, first, *leaves, at=after(200))
    assert await origin(db, await made(db, after(300), 1026)) == ("OPERATOR", first.name)


async def test_a_successor_is_told_that_its_predecessor_left_only_once_it_did(db: Database) -> None:
    await make_set(db, min_replicas=1)
    first = await walked(db, await made(db, after(1), 1025), Phase.SUBMITTING, Phase.QUEUED, Phase.RUNNING, at=after(1))
    second = await made(db, after(100), 1026, succeeds=first.id)
    left = Move(first, Phase.DRAINING, Reason.HANDED_OVER, drain_deadline=after(500))
    await walked(db, first, left, at=after(200))
    place = f"it takes the place of {first.name}"
    assert made_because(await story_of(db, second, after(150))) == place
    assert made_because(await story_of(db, second, after(200))) == f"{place}, which left HANDED_OVER"
    assert made_because(await story_of(db, second)) == f"{place}, which left HANDED_OVER"


async def test_each_raise_gets_its_replicas_and_an_operators_word_the_others(db: Database) -> None:
    await make_set(db)
    alert = await fires(db, after(1))
    await decided(db, after(1), DecisionReason.SCALED_UP, 0, 2, alert)
    await replica_sets.scale(db, "a", replicas=3, actor="ann", now=after(2))
    await replica_sets.apply(db, slurm_spec(priority=7), actor="ann", now=after(3))
    origins = [await origin(db, await made(db, after(4 + n), 1025 + n)) for n in range(3)]
    assert origins == [("SCALED_UP", None), ("SCALED_UP", None), ("OPERATOR", None)]
    changed = slurm_spec(priority=7, model="n")
    await replica_sets.apply(db, changed, actor="ann", now=after(9))
    rolled = (await story_of(db, await made(db, after(10), 1030))).decision
    assert rolled is not None
    assert rolled.explanation == "spec changed by ann: between 0 and 4 replicas"


async def test_what_left_as_planned_is_replaced_by_nobody(db: Database) -> None:
    replica_set = await make_set(db, min_replicas=1)
    first = await made(db, after(1), 1025)
    rolled = Move(first, Phase.ENDED, Reason.ROLLED)
    await walked(db, first, rolled, at=after(2))
    assert await origin(db, await made(db, after(3), 1026)) == ("OPERATOR", None)
    assert replica_set.min_replicas == 1


async def test_a_place_that_was_given_up_is_not_taken_later(db: Database) -> None:
    await make_set(db)
    await decided(db, after(1), DecisionReason.SCALED_UP, 0, 1)
    first = await made(db, after(1), 1025)
    await walked(db, first, crashed(first), at=after(2))
    await decided(db, after(3), DecisionReason.SCALED_DOWN, 1, 0)
    await replica_sets.scale(db, "a", replicas=1, actor="ann", now=after(4))
    assert await origin(db, await made(db, after(5), 1026)) == ("OPERATOR", None)


async def test_what_an_operator_drains_is_replaced(db: Database) -> None:
    await make_set(db, min_replicas=1)
    first = await walked(db, await made(db, after(1), 1025), Phase.SUBMITTING, Phase.QUEUED, Phase.RUNNING, at=after(1))
    await replicas.obey(db, first.name, Verb.DRAIN, actor="ann", now=after(9))
    assert (await origin(db, await made(db, after(10), 1026)))[1] == first.name


# --- a replica set ---------------------------------------------------------------------------------------


async def set_story(db: Database, at: datetime | None = None) -> SetStory:
    return await why.of_set(db, "a", at=at, now=after(3600))


async def test_a_set_is_told_of_as_it_was(db: Database) -> None:
    replica = await whole_life(db)
    then = {seconds: await set_story(db, after(seconds)) for seconds in (0, 3, 12, 45, 60)}
    assert {seconds: story.decision and str(story.decision.reason) for seconds, story in then.items()} == {
        0: "OPERATOR",
        3: "COOLDOWN",
        12: "SCALED_UP",
        45: "SCALED_UP",
        60: "SCALED_DOWN",
    }
    assert {seconds: [one.alertname for one in story.alerts] for seconds, story in then.items()} == {
        0: [],
        3: ["Requests queue"],
        12: ["Requests queue"],
        45: [],
        60: [],
    }
    assert then[12].pressed(then[12].alerts[0])
    assert {seconds: [one.newest.to_phase for one in story.replicas] for seconds, story in then.items()} == {
        0: [],
        3: [],
        12: ["QUEUED"],
        45: ["RUNNING"],
        60: [],
    }
    assert [str(one.reason) for one in then[3].refused] == ["COOLDOWN"]
    assert [one.name for one in then[60].ended] == [replica.name]
    assert then[12].bounds is None, "the bounds of then are not known"
    assert (await set_story(db)).bounds == (0, 4)
    with pytest.raises(NotFound, match="the replica set a was made at"):
        await set_story(db, after(-1))


async def test_an_alert_that_fired_twice_is_known_of_both_times(db: Database) -> None:
    await make_set(db)
    await fires(db, after(10), starts_at=after(9))
    await fires(db, after(20), starts_at=after(9), is_firing=False, ends_at=after(19))
    await fires(db, after(30), starts_at=after(29))
    await alerts.refresh(db, "grafana", 1, [], now=after(40))  # its resolution was lost
    firing = [bool((await set_story(db, after(seconds))).alerts) for seconds in (5, 9, 15, 25, 35, 45)]
    assert firing == [False, False, True, False, True, False]
    assert (await set_story(db)).alerts == ()


async def test_one_alert_that_two_senders_began_apart_is_told_once(db: Database) -> None:
    await make_set(db)
    for begun in (8, 9):
        await fires(db, after(10), starts_at=after(begun))
    [alert] = (await set_story(db, after(12))).alerts
    assert alert.starts_at == after(9)
    assert alert.rule_uid == "queue-rule"


@pytest.mark.parametrize(
    ("labels", "is_told"),
    [
        ({"model": "m"}, True),
        ({"model": "other"}, False),
        ({"replica_set": "a"}, True),
        ({"replica_set": "b", "model": "m"}, False),
        ({"replica": "cp-a-12", "action": "replace"}, True),
        ({"replica": "cp-a-b-12", "action": "replace"}, False),
    ],
)
async def test_alerts_of_others_are_not_told(db: Database, labels: dict[str, str], is_told: bool) -> None:
    await make_set(db)
    await fires(db, after(1), labels=labels, action=None, ignored_reason="no_action")
    story = await set_story(db)
    assert [one.ignored_reason for one in story.alerts] == ["no_action"] * is_told
    assert not any(story.pressed(one) for one in story.alerts)


# --- a job -----------------------------------------------------------------------------------------------


async def test_a_job_id_that_was_given_again_shows_every_replica_that_had_it(db: Database) -> None:
    await make_set(db, min_replicas=1)
    names = []
    for number in range(2):
        replica = await made(db, after(number * 100), 20001)
        with_id = Move(replica, Phase.QUEUED, slurm_job_id=4711)
        replica = await walked(db, replica, Phase.SUBMITTING, with_id, at=after(number * 100))
        names.append(replica.name)
        await walked(db, replica, crashed(replica), at=after(number * 100 + 50))
    assert [one.name for one in await why.of_job(db, 4711, at=None, now=NOW)] == names[::-1]
    assert [one.name for one in await why.of_job(db, 4711, at=after(99), now=NOW)] == names[:1]
    for number in (4712, 10**30):
        with pytest.raises(NotFound, match="no replica that is remembered had the Slurm job"):
            await why.of_job(db, number, at=None, now=NOW)


async def test_a_subject_is_a_set_before_a_replica_before_a_job(db: Database) -> None:
    await make_set(db, "1001")
    replica = await make_replica(db, await make_set(db), Phase.QUEUED)
    assert isinstance(await why.of(db, "1001", at=None, now=NOW), SetStory)
    for subject in (replica.name, str(replica.slurm_job_id)):
        found = await why.of(db, subject, at=None, now=NOW)
        assert isinstance(found, tuple)
        assert [one.name for one in found] == [replica.name]
    with pytest.raises(NotFound, match="no replica set and no replica 'nothing'"):
        await why.of(db, "nothing", at=None, now=NOW)


# --- what is kept ----------------------------------------------------------------------------------------


async def count(db: Database, table: str) -> int:
    async with db.connection() as connection:
        row = await (await connection.execute(f"SELECT count(*) AS n FROM {table}")).fetchone()
    assert row is not None
    return int(row["n"])


async def test_histories_are_forgotten_with_their_replicas_and_decisions_after_them(db: Database) -> None:
    replica = await whole_life(db)
    day = timedelta(days=1)
    await decided(db, after(100), DecisionReason.STEADY, 0, 0)
    assert await decisions.forget(db, older_than=day, now=after(70) + day) == 3, "all but what the replica was made for"
    assert (await story_of(db, replica)).decision is not None
    assert await count(db, "slurm_job_history") == 3
    assert await replicas.forget(db, older_than=day, now=after(70) + day) == 1
    assert await count(db, "slurm_job_history") == await count(db, "endpoint_history") == 0
    assert await decisions.forget(db, older_than=day, now=after(70) + day) == 1
    await keys.create(db, "lab", models=None, expires_at=None, actor="ann", now=NOW)
    assert await why.forget(db, older_than=day, now=NOW + day) == 0
    assert await why.forget(db, older_than=day, now=after(1) + day) == 1


async def test_what_a_fixed_endpoint_still_is_outlives_the_histories(db: Database) -> None:
    spec = ReplicaSetSpec("box", "m", endpoints=(ExternalEndpoint("http://127.0.0.1:9"),))
    await replica_sets.apply(db, spec, actor="ann", now=NOW)
    [seen] = await endpoints.load_live(db)
    for seconds, health in ((10, Health.READY), (20, Health.FAILING)):
        then = after(seconds)
        found = replace(seen, health=health, probed_at=then, confirmed_at=then, first_ready_at=then, failing_since=then)
        await endpoints.save(db, found, seen=seen)
        [seen] = await endpoints.load_live(db)
    async with db.connection() as connection:  # it was found when the database's clock said so
        await connection.execute("UPDATE endpoint_history SET at = %s WHERE health = 'UNPROVEN'", (NOW,))

    async def told(seconds: float) -> list[str]:
        return [one.health for one in (await why.of_set(db, "box", at=after(seconds), now=NOW)).endpoints]

    day = timedelta(days=1)
    assert await why.forget(db, older_than=day, now=after(15) + day) == 1
    assert [await told(seconds) for seconds in (15, 25)] == [["READY"], ["FAILING"]]
    assert await why.forget(db, older_than=day, now=after(1000) + day) == 1
    assert await told(2000) == ["FAILING"]


async def test_whoever_says_anything_is_in_the_audit(db: Database) -> None:
    replica = await make_replica(db, await make_set(db), Phase.RUNNING)
    await whole_audit(db, replica)
    said = [one for one in await audit.load_newest(db) if one.actor == "ann"]
    assert [(one.kind, one.subject) for one in reversed(said)] == [
        *[("replica set", "a")] * 4,
        *[("replica", replica.name)] * 3,
        *[("API key", said[2].subject)] * 2,
        *[("node", "n1")] * 2,
    ]
    words = [one.words for one in reversed(said)]
    assert words[0] == "spec changed by ann: between 0 and 3 replicas"
    assert words[1] == "scaled by ann: 2 wanted, bounds 0 to 3 (exam week)"
    assert words[2] == "paused by ann (repair)"
    assert words[4:7] == [
        "drain by ann (a noise): RUNNING -> DRAINING",
        "undrain by ann (a noise): DRAINING -> RUNNING",
        "cancel by ann (a noise): RUNNING -> STOPPING",
    ]
    assert words[7].endswith("... made for lab: m")
    assert words[8].endswith("... of lab revoked")
    assert words[9:] == ["drained by ann until 2026-01-01T13:00:00+00:00 (fan)", "undrained by ann"]
    assert all(one.actor != "reconciler" for one in await audit.load_newest(db))


async def whole_audit(db: Database, replica: Replica) -> None:
    """Every verb there is, by ann; said twice, it is written once."""
    for _ in range(2):
        await replica_sets.apply(db, slurm_spec(max_replicas=3), actor="ann", now=after(1))
    for _ in range(2):
        await replica_sets.scale(db, "a", replicas=2, reason="exam week", actor="ann", now=after(2))
    for _ in range(2):
        await replica_sets.pause(db, "a", reason="repair", actor="ann", now=after(3))
    for _ in range(2):
        await replica_sets.resume(db, "a", actor="ann", now=after(4))
    for number, verb in enumerate((Verb.DRAIN, Verb.UNDRAIN, Verb.CANCEL)):
        for _ in range(2):
            await replicas.obey(db, replica.name, verb, actor="ann", now=after(5 + number), reason="a noise")
    _, key = await keys.create(db, "lab", models=["m"], expires_at=None, actor="ann", now=after(9))
    for _ in range(2):
        await keys.revoke(db, key.prefix, after(10), actor="ann")
    for _ in range(2):
        await nodes.drain(db, "n1", actor="ann", now=after(11), reason="fan", until=after(3600))
    for _ in range(2):
        await nodes.undrain(db, "n1", actor="ann", now=after(12))


async def test_a_freeze_of_all_sets_is_in_the_audit_where_there_is_no_set(db: Database) -> None:
    await freezes.freeze_all(db, actor="ann", now=after(1), reason="incident", dry_run=True)
    assert await audit.load_newest(db) == []
    for _ in range(2):
        await freezes.freeze_all(db, actor="ann", now=after(1), reason="incident")
    for _ in range(2):
        await freezes.unfreeze_all(db, actor="ann", now=after(2))
    said = [(one.at, one.actor, one.words) for one in await audit.load_newest(db)]
    assert said == [
        (after(2), "ann", "all sets unfrozen by ann"),
        (after(1), "ann", "all sets frozen by ann (incident)"),
    ]


async def test_the_schema_before_becomes_this_one_with_its_data(
    postgres: PrivatePostgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = postgres.create_database("before_why")
    directory = migrating.__globals__["DIRECTORY"]
    for file in directory.glob("*.sql"):
        if file.name < "0004":
            (tmp_path / file.name).write_text(file.read_text())
    monkeypatch.setitem(migrating.__globals__, "DIRECTORY", tmp_path)
    migrate(url)
    with psycopg.connect(url) as connection:
        connection.execute(OLD_DATA)
    monkeypatch.setitem(migrating.__globals__, "DIRECTORY", directory)
    assert "0004.why" in migrate(url)
    async with opened(url) as db:
        story = await why.of_replica(db, "cp-a-7", at=None, now=NOW)
        assert [(one.job_id, one.raw_state, one.at) for one in story.jobs] == [(1007, "RUNNING", after(20))]
        assert [(one.health, one.at) for one in story.health] == [("READY", after(30))]
        assert made_because(story) == "what it was made for was not kept"
        [decision] = await decisions.load_newest(db)
        assert decision.evidence == ()
        assert (await why.of_set(db, "a", at=None, now=NOW)).replicas == (story,)
    postgres.drop_database("before_why")


OLD_DATA = """
INSERT INTO replica_sets (name, model, priority, is_external, spec, spec_hash, min_replicas, max_replicas,
                          desired_replicas, created_at)
VALUES ('a', 'm', 100, false, '{}', 'h', 0, 4, 1, '2026-01-01T12:00Z');
INSERT INTO replicas (id, name, replica_set, phase, spec, spec_hash, port, secret, slurm_job_id, created_at,
                      phase_since, running_since)
OVERRIDING SYSTEM VALUE
VALUES (7, 'cp-a-7', 'a', 'RUNNING', '{}', 'h', 20001, repeat('x', 32), 1007, '2026-01-01T12:00Z', '2026-01-01T12:00Z',
        '2026-01-01T12:00Z');
INSERT INTO replica_history (replica_id, version, at, to_phase, slurm_job_id, actor)
VALUES (7, 1, '2026-01-01T12:00Z', 'RUNNING', 1007, 'reconciler');
INSERT INTO slurm_jobs (replica_id, job_id, state, raw_state, observed_at)
VALUES (7, 1007, 'RUNNING', 'RUNNING', '2026-01-01T12:00:20Z');
INSERT INTO endpoints (replica_set, replica_id, url, api_key, health, first_ready_at, confirmed_at)
VALUES ('a', 7, 'http://n1:20001', 'k', 'READY', '2026-01-01T12:00:30Z', '2026-01-01T12:00:40Z');
INSERT INTO decisions (at, replica_set, reason, previous, desired, explanation, alerts, actor)
VALUES ('2026-01-01T12:00Z', 'a', 'SCALED_UP', 0, 1, 'an alert', '{grafana/1/f}', 'reconciler');
"""


# --- over HTTP -------------------------------------------------------------------------------------------


@pytest.fixture
def rig(db: Database) -> WebRig:
    return WebRig(db, now=after(3600))


async def test_the_api_answers_why_of_sets_replicas_and_jobs_without_secrets(rig: WebRig) -> None:
    replica = await whole_life(rig.db)
    of_set = await rig.ask("GET", "/api/v1/replica-sets/a/why?at=2026-01-01T12:00:12Z")
    of_replica = await rig.ask("GET", f"/api/v1/replicas/{replica.name}/why")
    of_job = await rig.ask("GET", f"/api/v1/slurm-jobs/{replica.slurm_job_id}/why?at=-10m")
    for answer in (of_set, of_replica, of_job):
        assert answer.status_code == 200, answer.text
        assert SECRET not in answer.text
    told = of_set.json()
    assert (told["desired_replicas"], told["decision"]["reason"]) == (1, "SCALED_UP")
    assert told["decision"]["evidence"][0]["values"] == {"A": 22}
    assert [(one["alertname"], one["pressed"]) for one in told["alerts"]] == [("Requests queue", True)]
    [queued] = told["replicas"]
    assert queued["pending"]["state_reason"] == "Priority"
    assert set(queued) == set(of_replica.json())
    assert of_replica.json()["timeline"][0]["kind"] == "alert"
    assert [one["name"] for one in of_job.json()["replicas"]] == [replica.name]


@pytest.mark.parametrize(
    ("path", "status", "field"),
    [
        ("replica-sets/a/why?at=yesterday", 400, "at"),
        ("replica-sets/a/why?at=2026-01-01T12:00:00", 400, "at"),
        ("replica-sets/a/why?at=2030-01-01T12:00:00Z", 400, "at"),
        ("replica-sets/a/why?when=-1m", 400, "when"),
        ("replica-sets/a/why?at=-9d", 404, None),
        ("replica-sets/b/why", 404, None),
        ("replicas/cp-a-0/why", 404, None),
        ("slurm-jobs/1/why", 404, None),
        ("slurm-jobs/cp-a-0/why", 400, "id"),
    ],
)
async def test_what_cannot_be_told_is_refused_with_its_field(
    rig: WebRig, path: str, status: int, field: str | None
) -> None:
    await make_set(rig.db)
    answer = await rig.ask("GET", f"/api/v1/{path}")
    assert (answer.status_code, answer.json()["error"].get("field")) == (status, field)
    assert answer.json()["error"]["message"]


async def test_the_audit_can_be_read(rig: WebRig) -> None:
    await whole_audit(rig.db, await make_replica(rig.db, await make_set(rig.db), Phase.RUNNING))
    [newest, *_] = (await rig.ask("GET", "/api/v1/audit?limit=3")).json()["audit"]
    assert (newest["actor"], newest["kind"]) == ("ann", "node")
