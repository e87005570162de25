"""Whatever arrives, in whatever order, and whatever does not: where the alerts settle, and that nothing breaks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.core.scaling import decide, presses, pressures
from controlplane.core.types import Alert, AlertAction
from controlplane.db import Database, replica_sets
from controlplane.demo.postgres import PrivatePostgres
from controlplane.reconcile.alerts import AlertPullLoop, AlertPullOptions, AlertSource
from tests.integration.db_rows import NOW, make_set, opened
from tests.integration.webhook_rig import Rig, forget_everything
from tests.unit.alert_bodies import (
    BEGAN,
    MODEL,
    History,
    Told,
    alertmanager_body,
    deliveries,
    grafana_body,
    histories,
    listed,
    mutated,
)

BODIES: dict[str, Callable[[Sequence[Told]], dict[str, Any]]] = {
    "grafana": grafana_body,
    "alertmanager": alertmanager_body,
}
STALE_AFTER = timedelta(minutes=15)
SETTLED = BEGAN + timedelta(hours=1)
sources = st.sampled_from(sorted(BODIES))
some = settings(max_examples=60, deadline=None, database=None)


@pytest.fixture(scope="session")
def generated_url(postgres: PrivatePostgres, template_database: str) -> str:
    """One database for all examples: hypothesis does not run fixtures anew for each."""
    return postgres.create_database("generated_webhooks", template=template_database)


async def deliver(rig: Rig, source: str, groups: Sequence[Sequence[Told]]) -> None:
    """One after the other in pairs of two at a time: the two of a pair may be stored in either order, or at once."""
    for number in range(0, len(groups), 2):
        rig.now = SETTLED - timedelta(minutes=5) + timedelta(seconds=number)
        answers = await asyncio.gather(
            *(rig.post(BODIES[source](group), source=source) for group in groups[number : number + 2])
        )
        assert [answer.status_code for answer in answers] == [202] * len(answers)


async def pull(db: Database, source: str, truth: Sequence[History]) -> None:
    """A pull that trusts the first list: how long it waits is another test's business."""
    active = [listed(history) for history in truth if history.is_firing]
    answer = httpx.MockTransport(lambda _: httpx.Response(200, text=json.dumps(active)))
    options = AlertPullOptions(
        [AlertSource(source, "http://source", org_id=int(source == "grafana"))], absence_seconds=0
    )
    async with httpx.AsyncClient(transport=answer) as http:
        await AlertPullLoop(db, options, http).run_once(SETTLED)


async def levels(rig: Rig) -> dict[str, tuple[AlertAction | None, str | None, dict[str, str]]]:
    """What fires, and what is thought of it."""
    found = (await rig.stored()).values()
    return {one.fingerprint: (one.action, one.ignored_reason, dict(one.labels)) for one in found if one.is_firing}


def firing(truth: Sequence[History]) -> set[str]:
    return {history.fingerprint for history in truth if history.is_firing}


@some
@given(data=st.data(), source=sources, truth=histories())
def test_any_order_with_repeats_ends_in_what_truly_is(
    data: st.DataObject, source: str, truth: list[History], generated_url: str
) -> None:
    groups = data.draw(deliveries(truth, may_lose=False))

    async def run() -> None:
        async with opened(generated_url) as db:
            await forget_everything(db)
            rig = Rig(db)
            await deliver(rig, source, groups)
            assert set(await levels(rig)) == firing(truth)

    asyncio.run(run())


@some
@given(data=st.data(), source=sources, truth=histories())
def test_any_order_with_repeats_and_losses_and_then_a_pull_ends_in_the_same_levels(
    data: st.DataObject, source: str, truth: list[History], generated_url: str
) -> None:
    groups = data.draw(deliveries(truth, may_lose=True))
    in_order = [[word] for history in truth for word, _ in history.words()]

    async def settled(arrives: Sequence[Sequence[Told]]) -> object:
        async with opened(generated_url) as db:
            await forget_everything(db)
            await make_set(db, model=MODEL)
            rig = Rig(db)
            await deliver(rig, source, arrives)
            await pull(db, source, truth)
            return await levels(rig)

    after_losses = asyncio.run(settled(groups))
    assert after_losses == asyncio.run(settled(in_order))
    assert isinstance(after_losses, dict)
    assert set(after_losses) == firing(truth)


def is_blind(alert: Alert) -> bool:
    return "grafana_state_reason" in alert.annotations or alert.alertname in BLIND_NAMES


BLIND_NAMES = ("DatasourceNoData", "DatasourceError", "TestAlert")


@some
@given(data=st.data(), source=sources, truth=histories(st.sampled_from(["scale_up", "scale_down", "replace"])))
def test_blind_alerts_never_press_and_nothing_but_a_firing_scale_down_ever_asks_for_fewer(
    data: st.DataObject, source: str, truth: list[History], generated_url: str
) -> None:
    reasons = st.sampled_from(
        [{}, {"grafana_state_reason": data.draw(st.sampled_from(["Error", "NoData", "Paused", ""]))}]
    )
    names = st.sampled_from(["queue", *BLIND_NAMES])
    groups = [
        [
            Told(
                word.fingerprint,
                word.starts_at,
                word.ends_at,
                {**word.labels, "alertname": data.draw(names)},
                data.draw(reasons),
                data.draw(st.sampled_from([None, {}, {"A": -1.0}])),
            )
            for word in group
        ]
        for group in data.draw(deliveries(truth, may_lose=True))
    ]

    async def run() -> None:
        async with opened(generated_url) as db:
            await forget_everything(db)
            await make_set(db, "a", model=MODEL, max_replicas=4)
            rig = Rig(db)
            await deliver(rig, source, groups)
            stored = tuple((await rig.stored()).values())
            await replica_sets.scale(db, "a", replicas=2, actor="test", now=NOW)
            [replica_set] = await replica_sets.load_all(db)
            pressing = [one for one in stored if presses(one, now=SETTLED, stale_after=STALE_AFTER)]
            assert not [one for one in pressing if is_blind(one)]
            pressure = pressures([replica_set], stored, now=SETTLED, stale_after=STALE_AFTER)["a"]
            decision = decide(replica_set, pressure, [], {}, now=SETTLED)
            if decision.desired < 2:
                assert any(one.action is AlertAction.SCALE_DOWN and one.is_firing for one in pressing)

    asyncio.run(run())


@settings(max_examples=80, deadline=None, database=None)
@given(data=st.data(), source=sources, truth=histories())
def test_no_body_is_ever_answered_with_a_fault_of_ours(
    data: st.DataObject, source: str, truth: list[History], generated_url: str
) -> None:
    whole = BODIES[source]([word for history in truth for word, _ in history.words()])
    bodies = data.draw(st.lists(mutated(whole), min_size=1, max_size=8))
    kind = data.draw(st.sampled_from(["application/json", "text/html", ""]))

    async def run() -> None:
        async with opened(generated_url) as db:
            await forget_everything(db)
            rig = Rig(db)
            headers = {"Authorization": "Bearer test-token", "Content-Type": kind}
            for answer in await asyncio.gather(*(rig.post(body, headers, source=source) for body in bodies)):
                told = answer.json()
                if answer.status_code == 202:
                    counts = [told[name] for name in ("accepted", "duplicates", "ignored")]
                    assert min(counts) >= 0
                    assert told["ignored"] == sum(told["ignored_reasons"].values())
                else:
                    assert answer.status_code == 400
                    assert told["error"]["message"]
                    assert told["error"].get("field", "") in told["error"]["message"]

    asyncio.run(run())
