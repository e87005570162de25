"""What `/v1/models` tells, and how long a start is said to take."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest

from controlplane.core.types import ApiKey
from controlplane.proxy.directory import ModelState, Snapshot, seconds_to_ready
from controlplane.proxy.errors import ApiError
from controlplane.proxy.models import model_list, one_model
from tests.unit.waiting_rig import BEGIN, MODEL, a_model, a_snapshot, an_endpoint

KEY = ApiKey(1, "t", "sk-", b"", None, BEGIN, None)
OTHERS = ApiKey(2, "t", "sk-", b"", frozenset({"other"}), BEGIN, None)


def after(seconds: float) -> Any:
    return BEGIN + timedelta(seconds=seconds)


@pytest.mark.parametrize(
    ("changes", "seconds"),
    [
        ({}, None),
        ({"start_seconds_p95": 90.0}, 90.0),  # if one were started now
        ({"start_seconds_p95": 90.0, "starting_since": after(-30)}, 60.0),
        ({"start_seconds_p95": 90.0, "starting_since": after(-91)}, None),
        ({"start_seconds_p95": 90.0, "load_seconds_p95": 40.0, "starting_since": after(-30)}, 60.0),
        # Slurm says when: the queue of earlier starts tells nothing
        ({"start_seconds_p95": 90.0, "load_seconds_p95": 40.0, "expected_start_at": after(600)}, 640.0),
        ({"start_seconds_p95": 90.0, "load_seconds_p95": 40.0, "expected_start_at": after(-9)}, 40.0),
        ({"expected_start_at": after(600)}, None),
        # it loads: neither does the queue of this one
        ({"start_seconds_p95": 900.0, "load_seconds_p95": 40.0, "loading_since": after(-30)}, 10.0),
        ({"load_seconds_p95": 40.0, "loading_since": after(-30), "expected_start_at": after(600)}, 10.0),
        ({"load_seconds_p95": 40.0, "loading_since": after(-50), "expected_start_at": after(6)}, 46.0),
    ],
)
def test_how_long_a_start_takes_is_said_by_the_best_that_is_known(
    changes: dict[str, Any], seconds: float | None
) -> None:
    assert seconds_to_ready(a_model(**changes), BEGIN) == seconds


@pytest.mark.parametrize(
    ("snapshot", "state", "estimate"),
    [
        (a_snapshot(an_endpoint(), start_seconds_p95=90.0), ModelState.ROUTABLE, None),
        (a_snapshot(start_seconds_p95=90.0), ModelState.SCALED_TO_ZERO, 90),
        (a_snapshot(start_seconds_p95=90.0, starting_since=after(-30)), ModelState.STARTING, 60),
        (a_snapshot(starting_since=after(-30)), ModelState.STARTING, None),
        (a_snapshot(is_paused=True, start_seconds_p95=90.0), ModelState.PAUSED, None),
    ],
)
def test_a_model_is_listed_with_its_state_and_the_estimate_of_its_start(
    snapshot: Snapshot, state: ModelState, estimate: int | None
) -> None:
    shown = json.loads(one_model(MODEL, snapshot, KEY, BEGIN))
    assert shown.pop("start_estimate_seconds", None) == estimate
    created = int(BEGIN.timestamp())
    expected = {"id": MODEL, "object": "model", "created": created, "owned_by": "controlplane", "state": state}
    assert shown == expected
    assert json.loads(model_list(snapshot, KEY, BEGIN))["data"][0]["state"] == state


def test_a_key_is_shown_only_what_it_may_use() -> None:
    assert json.loads(model_list(a_snapshot(), OTHERS, BEGIN)) == {"object": "list", "data": []}
    for name, key in ((MODEL, OTHERS), ("nothing", KEY)):
        with pytest.raises(ApiError) as refused:
            one_model(name, a_snapshot(), key, BEGIN)
        assert refused.value.code == "model_not_found"
