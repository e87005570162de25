"""Which alerts press and which are only kept, by their labels and annotations alone."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.core.alerts import MAX_STEP, Ignored, Target, Verdict, judge
from controlplane.core.types import AlertAction

KNOWN = {
    one.name: one
    for one in (
        Target("cheap", "qwen", is_external=False),
        Target("dear-2", "qwen", is_external=False),
        Target("tiny", "gemma", is_external=False),
        Target("office", "phi", is_external=True),
    )
}
OURS = {"alertname": "queue is long", "owner": "controlplane"}
UP = {**OURS, "action": "scale_up", "model": "qwen"}


def verdict(labels: Mapping[str, str], annotations: Mapping[str, str] | None = None) -> Verdict:
    return judge(labels, annotations or {}, KNOWN)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (UP, Verdict(AlertAction.SCALE_UP)),
        ({**UP, "step": "2"}, Verdict(AlertAction.SCALE_UP, step=2)),
        ({**UP, "step": ""}, Verdict(AlertAction.SCALE_UP)),
        ({**UP, "action": "scale_down"}, Verdict(AlertAction.SCALE_DOWN)),
        ({**OURS, "action": "scale_up", "replica_set": "dear-2"}, Verdict(AlertAction.SCALE_UP)),
        ({**UP, "replica_set": "cheap"}, Verdict(AlertAction.SCALE_UP)),
        ({**OURS, "action": "replace", "replica": "cp-dear-2-17"}, Verdict(AlertAction.REPLACE)),
        ({**UP, "action": "replace", "replica": "cp-dear-2-17"}, Verdict(AlertAction.REPLACE)),
        ({**OURS, "action": "drain_node", "node": "gpu01"}, Verdict(AlertAction.DRAIN_NODE)),
        ({**OURS, "action": "drain_node", "node": "gpu01", "step": "many"}, Verdict(AlertAction.DRAIN_NODE)),
    ],
)
def test_an_alert_whose_labels_say_so_presses(labels: Mapping[str, str], expected: Verdict) -> None:
    assert verdict(labels) == expected


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ({**UP, "alertname": "TestAlert"}, Ignored.TEST_ALERT),
        ({**UP, "alertname": "DatasourceNoData"}, Ignored.DATASOURCE_NO_DATA),
        ({**UP, "alertname": "DatasourceError"}, Ignored.DATASOURCE_ERROR),
        ({}, Ignored.NOT_OURS),
        ({**UP, "owner": "somebody"}, Ignored.NOT_OURS),
        ({**UP, "owner": "Controlplane"}, Ignored.NOT_OURS),
        ({**OURS, "model": "qwen"}, Ignored.NO_ACTION),
        ({**UP, "action": "explode"}, Ignored.UNKNOWN_ACTION),
        ({**UP, "action": "SCALE_UP"}, Ignored.UNKNOWN_ACTION),
        ({**OURS, "action": "scale_up"}, Ignored.NO_TARGET),
        ({**UP, "model": ""}, Ignored.NO_TARGET),
        ({**UP, "model": "unheard-of"}, Ignored.UNKNOWN_MODEL),
        ({**UP, "replica_set": "unheard-of"}, Ignored.UNKNOWN_REPLICA_SET),
        ({**UP, "replica_set": "tiny"}, Ignored.CONTRADICTORY_TARGET),
        ({**UP, "model": "phi"}, Ignored.NOT_RUN_BY_SLURM),
        ({**OURS, "action": "scale_down", "replica_set": "office"}, Ignored.NOT_RUN_BY_SLURM),
        ({**UP, "action": "replace"}, Ignored.NO_TARGET),
        ({**OURS, "action": "replace", "replica": "vllm-1"}, Ignored.UNKNOWN_REPLICA),
        ({**OURS, "action": "replace", "replica": "cp-dear-2"}, Ignored.UNKNOWN_REPLICA),
        ({**OURS, "action": "replace", "replica": "cp-gone-1"}, Ignored.UNKNOWN_REPLICA),
        ({**UP, "action": "replace", "replica": "cp-tiny-1"}, Ignored.CONTRADICTORY_TARGET),
        ({**UP, "action": "drain_node"}, Ignored.NO_TARGET),
        ({**OURS, "action": "drain_node", "node": "gpu01", "model": "unheard-of"}, Ignored.UNKNOWN_MODEL),
        *(({**UP, "step": bad}, Ignored.BAD_STEP) for bad in ("0", "-1", "1.5", "two", "²", "٣", "99999", "1" * 5000)),
    ],
)
def test_an_alert_that_must_not_press_says_why(labels: Mapping[str, str], reason: Ignored) -> None:
    assert verdict(labels) == Verdict(ignored_reason=reason)


@pytest.mark.parametrize("state", ["NoData", "Error", "MissingSeries", "Paused", "RuleDeleted", "Updated", ""])
def test_an_alert_that_came_about_by_blindness_never_presses(state: str) -> None:
    assert verdict(UP, {"grafana_state_reason": state}) == Verdict(ignored_reason=Ignored.STATE_REASON)


def test_a_set_that_is_applied_later_makes_the_same_alert_press() -> None:
    later = {**KNOWN, "new": Target("new", "unheard-of", is_external=False)}
    assert judge({**UP, "model": "unheard-of"}, {}, later) == Verdict(AlertAction.SCALE_UP)


_WORDS = st.sampled_from(
    ["", "controlplane", "scale_up", "replace", "drain_node", "qwen", "tiny", "office", "cp-tiny-1", "1", "TestAlert"]
)
_NAMES = st.sampled_from(
    ["alertname", "owner", "action", "model", "replica_set", "replica", "node", "step", "severity"]
)


@given(st.dictionaries(_NAMES, _WORDS | st.text(max_size=8)), st.dictionaries(st.text(max_size=8), st.text(max_size=8)))
def test_every_alert_has_either_an_action_or_a_reason_and_only_ours_have_an_action(
    labels: dict[str, str], annotations: dict[str, str]
) -> None:
    found = verdict(labels, annotations)
    assert (found.action is None) == (found.ignored_reason is not None)
    assert found.step is None or 1 <= found.step <= MAX_STEP
    if found.action is not None:
        assert labels["owner"] == "controlplane"
        assert labels["action"] == found.action
