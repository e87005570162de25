"""Consecutive passes and fails: when an endpoint is in, when it is out, and since when it has been failing."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from controlplane.core.health import HealthRules, observe
from controlplane.core.types import Endpoint, Health, Phase, ProbeResult
from tests.unit.worlds import NOW, a_replica, ago, an_endpoint

RULES = HealthRules(passes_to_recover=2, fails_to_fail=3)
UNPROVEN, READY, FAILING = Health.UNPROVEN, Health.READY, Health.FAILING

PASS = ProbeResult(passed=True, running=2, waiting=1, generated_tokens=30.0)
FAIL = ProbeResult(passed=False, message="connection refused")
FOREIGN = ProbeResult(passed=False, message="another model answered", is_foreign=True)
RESULTS = {"+": PASS, "-": FAIL, "!": FOREIGN}


def untouched() -> Endpoint:
    fresh = an_endpoint(a_replica(1, Phase.RUNNING), UNPROVEN)
    return replace(fresh, fails=0, failing_since=None)


def looked_at(looks: str, endpoint: Endpoint | None = None) -> Endpoint:
    """The endpoint after these looks, one a second, the last of them at NOW."""
    endpoint = endpoint or untouched()
    for second, look in enumerate(looks):
        endpoint = observe(endpoint, RESULTS[look], now=ago(len(looks) - 1 - second), rules=RULES)
    return endpoint


@pytest.mark.parametrize(
    ("looks", "health"),
    [
        ("+", READY),
        ("-", UNPROVEN),
        ("------", UNPROVEN),  # never was in: cannot fall out
        ("!!!!", UNPROVEN),
        ("-+", READY),
        ("+--", READY),
        ("+---", FAILING),
        ("+--+--", READY),  # three in a row, not three
        ("+!", FAILING),  # somebody else answers there: at once
        ("+---+", FAILING),
        ("+---++", READY),
        ("+---+-+", FAILING),  # two in a row, not two
        ("+---+-++", READY),
        ("+!++", READY),
        ("+---++--", READY),
    ],
)
def test_an_endpoint_is_in_or_out_by_its_looks_in_a_row(looks: str, health: Health) -> None:
    assert looked_at(looks).health is health


@pytest.mark.parametrize(
    ("looks", "failing_since"),
    [
        ("+", None),
        ("+-", NOW),
        ("+--", ago(1)),
        ("+--+", None),
        ("+---+", ago(3)),  # one pass does not end it
        ("+---+-", ago(4)),
        ("+---++", None),
        ("--", ago(1)),  # the start budget is counted from the first look
        ("---+", None),
    ],
)
def test_an_endpoint_fails_since_the_first_fail_after_it_served(looks: str, failing_since: datetime | None) -> None:
    assert looked_at(looks).failing_since == failing_since


@pytest.mark.parametrize(("looks", "passes", "fails"), [("++", 2, 0), ("++-", 0, 1), ("+--+", 1, 0), ("", 0, 0)])
def test_passes_and_fails_are_counted_in_a_row(looks: str, passes: int, fails: int) -> None:
    after = looked_at(looks)
    assert (after.passes, after.fails) == (passes, fails)


def test_the_first_pass_is_remembered_for_ever_and_the_newest_confirms() -> None:
    after = looked_at("-+---++")
    assert (after.first_ready_at, after.confirmed_at) == (ago(5), NOW)


def test_a_failed_look_confirms_nothing() -> None:
    assert looked_at("+-").confirmed_at == ago(1)


def test_a_look_replaces_what_the_look_before_it_knew_of_the_requests() -> None:
    ready = looked_at("+")
    assert (ready.running, ready.waiting, ready.generated_tokens, ready.message) == (2, 1, 30.0, None)
    failed = looked_at("-", ready)
    assert (failed.running, failed.waiting, failed.generated_tokens) == (None, None, None)
    assert failed.message == "connection refused"


def test_an_endpoint_that_must_prove_itself_again_gets_a_new_start_budget() -> None:
    """A requeued job's endpoint was ready once, and is UNPROVEN again."""
    again = replace(looked_at("+"), health=UNPROVEN, passes=0, fails=0, failing_since=None)
    after = observe(again, FAIL, now=NOW + timedelta(seconds=9), rules=RULES)
    assert (after.health, after.failing_since) == (UNPROVEN, NOW + timedelta(seconds=9))
