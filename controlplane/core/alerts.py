"""Which alerts may press, whoever sent them: the labels decide, and everything else is stored, shown and ignored.

An alert that only says "I cannot see" (no data, a failed query, a paused rule) never presses: acting on blindness is
how healthy jobs get cancelled. The verdict is taken again with every delivery and every pull, so that an alert which
names a replica set of tomorrow begins to press tomorrow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from controlplane.core.types import AlertAction

OWNER = "controlplane"
MAX_STEP = 10_000
STATE_REASON = "grafana_state_reason"
"""Grafana's annotation on alerts that came about by something else than their threshold (NoData, Error, Paused ...)."""


class Ignored(StrEnum):
    """Why an alert is not acted upon."""

    TEST_ALERT = "test_alert"
    DATASOURCE_NO_DATA = "datasource_no_data"
    DATASOURCE_ERROR = "datasource_error"
    STATE_REASON = "state_reason"
    NOT_OURS = "not_ours"
    NO_ACTION = "no_action"
    UNKNOWN_ACTION = "unknown_action"
    NO_TARGET = "no_target"
    UNKNOWN_MODEL = "unknown_model"
    UNKNOWN_REPLICA_SET = "unknown_replica_set"
    UNKNOWN_REPLICA = "unknown_replica"
    CONTRADICTORY_TARGET = "contradictory_target"  # the set does not serve the model, or the replica is not of the set
    NOT_RUN_BY_SLURM = "not_run_by_slurm"  # there is nothing to scale
    BAD_STEP = "bad_step"


_SPECIAL_NAMES = {
    "TestAlert": Ignored.TEST_ALERT,
    "DatasourceNoData": Ignored.DATASOURCE_NO_DATA,
    "DatasourceError": Ignored.DATASOURCE_ERROR,
}


@dataclass(frozen=True, slots=True)
class Target:
    """What an alert may name of a replica set."""

    name: str
    model: str
    is_external: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """Either an action, or the reason why there is none."""

    action: AlertAction | None = None
    ignored_reason: Ignored | None = None
    step: int | None = None  # None: the replica set's own


def judge(labels: Mapping[str, str], annotations: Mapping[str, str], known: Mapping[str, Target]) -> Verdict:
    """What this alert asks for, given the replica sets there are, by name.

    An empty label is an absent one, as in Prometheus.
    """
    if (special := _SPECIAL_NAMES.get(labels.get("alertname", ""))) is not None:
        return Verdict(ignored_reason=special)  # these carry the labels of the rule that could not be evaluated
    if STATE_REASON in annotations:
        return Verdict(ignored_reason=Ignored.STATE_REASON)
    if labels.get("owner") != OWNER:
        return Verdict(ignored_reason=Ignored.NOT_OURS)
    if not labels.get("action"):
        return Verdict(ignored_reason=Ignored.NO_ACTION)
    try:
        action = AlertAction(labels["action"])
    except ValueError:
        return Verdict(ignored_reason=Ignored.UNKNOWN_ACTION)
    fault = _fault_of_target(action, labels, known)
    if fault is not None:
        return Verdict(ignored_reason=fault)
    step = labels.get("step") or None
    if step is None or action not in _SCALING:
        return Verdict(action=action)
    if not (step.isascii() and step.isdecimal() and len(step) <= len(str(MAX_STEP)) and 1 <= int(step) <= MAX_STEP):
        return Verdict(ignored_reason=Ignored.BAD_STEP)
    return Verdict(action=action, step=int(step))


_SCALING = frozenset({AlertAction.SCALE_UP, AlertAction.SCALE_DOWN})


def _fault_of_target(action: AlertAction, labels: Mapping[str, str], known: Mapping[str, Target]) -> Ignored | None:
    model, set_name = labels.get("model") or None, labels.get("replica_set") or None
    if set_name is not None and set_name not in known:
        return Ignored.UNKNOWN_REPLICA_SET
    serving = [one for one in known.values() if model is None or one.model == model]
    if not serving and model is not None:
        return Ignored.UNKNOWN_MODEL
    meant = [one for one in serving if set_name is None or one.name == set_name]
    if not meant and set_name is not None:
        return Ignored.CONTRADICTORY_TARGET
    if action is AlertAction.DRAIN_NODE:
        return None if labels.get("node") else Ignored.NO_TARGET
    if action is AlertAction.REPLACE:
        return _fault_of_replica(labels.get("replica") or None, meant, known)
    if model is None and set_name is None:
        return Ignored.NO_TARGET
    return Ignored.NOT_RUN_BY_SLURM if all(one.is_external for one in meant) else None


def _fault_of_replica(name: str | None, meant: list[Target], known: Mapping[str, Target]) -> Ignored | None:
    if name is None:
        return Ignored.NO_TARGET
    stem, _, number = name.rpartition("-")  # `cp-<replica set>-<id>`
    set_name = stem.removeprefix("cp-")
    if not (stem.startswith("cp-") and number.isascii() and number.isdecimal() and set_name in known):
        return Ignored.UNKNOWN_REPLICA
    return None if set_name in {one.name for one in meant} else Ignored.CONTRADICTORY_TARGET
