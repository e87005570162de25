"""Makes Prometheus rules of Grafana's alert rules, so that thresholds have one source: `grafana/alerts/*.yaml`.

    python -m controlplane.demo.alert_rules grafana/alerts --time-scale 0.1 > rules.yml

`quickened` does the same to the durations of recording rules, which are Prometheus' own already.

Each rule must be the chain that Prometheus can express too: an instant query, reduced to its last value without NaN,
compared by a threshold (gt or lt) with or without a recovery threshold. A recovery threshold becomes a second
condition that counts only while the alert fires already (its own `ALERTS` series). What Prometheus has no word for is
left out: it has no state for errors and missing data, so both end an alert, and who is notified how often is
Alertmanager's business.

Failure behaviour: `RuleError` names file, rule and key at fault, unknown keys included, which Grafana ignores silently.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_FILE_KEYS = frozenset({"apiVersion", "groups"})
_GROUP_KEYS = frozenset({"orgId", "name", "folder", "interval", "rules"})
_RULE_KEYS = frozenset(
    {"uid", "title", "condition", "data", "noDataState", "execErrState", "for", "keepFiringFor"}
    | {"missing_series_evals_to_resolve", "isPaused", "annotations", "labels", "notification_settings"}
)
_NODE_KEYS = frozenset({"refId", "datasourceUid", "relativeTimeRange", "model"})
_QUERY_KEYS = frozenset({"refId", "datasource", "expr", "instant", "range", "intervalMs", "maxDataPoints"})
_REDUCE_KEYS = frozenset({"refId", "type", "datasource", "expression", "reducer", "settings"})
_THRESHOLD_KEYS = frozenset({"refId", "type", "datasource", "expression", "conditions"})
_CONDITION_KEYS = frozenset({"evaluator", "unloadEvaluator"})

_EXPRESSION = "__expr__"
_OPERATORS = {"gt": ">", "lt": "<"}
_STILL = {"gt": "<=", "lt": ">="}
"""What holds while an alert has not recovered, by its recovery threshold's type."""

_UNIT_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_DURATION = re.compile(r"(\d+)(ms|[smhdw])")
# strings come first, so that nothing inside them is taken for a range
_STRING_OR_RANGE = re.compile(
    r"""(?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|`[^`]*`)|\[(?P<range>[^\]]*)\]|\boffset\s+(?P<offset>\w+)"""
)
_STATES = {
    "noDataState": ("OK", "KeepLast", "NoData", "Alerting"),
    "execErrState": ("OK", "KeepLast", "Error", "Alerting"),
}
_SINGLE_DOLLAR = re.compile(r"(?<!\$)\$(?!\$)")


class RuleError(ValueError):
    """An alert rule that cannot be made a Prometheus rule; the text names file, rule and key."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How time is told: every duration times `scale`, at least a second, and ranges at least `shortest_range_seconds`,
    which must hold a few scrapes."""

    scale: float = 1.0
    shortest_range_seconds: int = 4

    def wait(self, seconds: float) -> str:
        """How long something must last."""
        return f"{max(1, round(seconds * self.scale)) if seconds else 0}s"

    def range(self, seconds: float) -> str:
        """How much of the past a range holds."""
        return f"{max(self.shortest_range_seconds, round(seconds * self.scale))}s"


def convert(folder: Path, pace: Pace = Pace(), *, acting_only: bool = False) -> str:
    """The Prometheus rule file of all alert rules in a provisioning folder. Raises `RuleError`.

    `acting_only`: only of those with an `action`, without those that are for people.
    """
    groups = [group for path in sorted(folder.glob("*.yaml")) for group in _groups(path, pace)]
    if acting_only:
        for group in groups:
            group["rules"] = [rule for rule in group["rules"] if "action" in rule["labels"]]
        groups = [group for group in groups if group["rules"]]
    if not groups:
        raise RuleError(f"{folder}: no alert rules")
    header = f"# Made from Grafana's alert rules, with durations times {pace.scale:g}. Change those instead.\n"
    return header + yaml.dump({"groups": groups}, Dumper=_Dumper, sort_keys=False, width=1000)


def quickened(path: Path, pace: Pace) -> str:
    """A file of recording rules with other durations. Names stay, whatever time they tell. Raises `RuleError`."""
    content = yaml.safe_load(path.read_text())
    for group in _Place(path.name, content).at("groups").items():
        group.value["interval"] = pace.wait(_seconds(group.at("interval")))
        for rule in group.at("rules").items():
            named = _Place(f"{path.name}: rule {rule.at('record').text()}", rule.value)
            rule.value["expr"] = _scaled(named.at("expr"), pace)
    header = (
        f"# Made from {path.name}, with durations times {pace.scale:g}, whatever the names say. Change that instead.\n"
    )
    return header + yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=1000)


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as such."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


@dataclass(frozen=True, slots=True)
class _Place:
    """A part of a file, and the words for it in an error."""

    path: str
    value: Any

    def error(self, text: str) -> RuleError:
        return RuleError(f"{self.path}: {text}")

    def at(self, key: str) -> _Place:
        if not isinstance(self.value, Mapping):
            raise self.error("must be a mapping")
        if key not in self.value:
            raise self.error(f"lacks the key {key}")
        return _Place(f"{self.path}.{key}", self.value[key])

    def get(self, key: str) -> _Place | None:
        return self.at(key) if key in self.value else None

    def items(self) -> list[_Place]:
        if not isinstance(self.value, list) or not self.value:
            raise self.error("must be a list with something in it")
        return [_Place(f"{self.path}[{index}]", value) for index, value in enumerate(self.value)]

    def text(self) -> str:
        if not isinstance(self.value, str) or not self.value.strip():
            raise self.error("must be a text")
        return self.value

    def number(self) -> float:
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            raise self.error("must be a number")
        return self.value

    def must_be(self, wanted: object) -> None:
        if self.value != wanted:
            raise self.error(f"must be {wanted!r}, not {self.value!r}")

    def one_of(self, choices: Iterable[str]) -> str:
        if self.value not in choices:
            raise self.error(f"must be one of {', '.join(choices)}, not {self.value!r}")
        return str(self.value)

    def knows_only(self, keys: frozenset[str]) -> None:
        if not isinstance(self.value, Mapping):
            raise self.error("must be a mapping")
        if unknown := sorted(set(map(str, self.value)) - keys):
            raise self.error(f"has unknown keys: {', '.join(unknown)}")


def _groups(path: Path, pace: Pace) -> Iterable[dict[str, Any]]:
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise RuleError(f"{path.name}: is not YAML: {str(error)[:256]}") from None
    if not isinstance(content, dict):
        raise RuleError(f"{path.name}: must be a mapping")
    if "groups" not in content:
        return  # contact points and the like
    place = _Place(path.name, content)
    place.knows_only(_FILE_KEYS)
    for group in place.at("groups").items():
        group.knows_only(_GROUP_KEYS)
        name = group.at("name").text()
        yield {
            "name": name,
            "interval": pace.wait(_seconds(group.at("interval"))),
            "rules": [_rule(_named(path, rule), pace) for rule in group.at("rules").items()],
        }


def _named(path: Path, rule: _Place) -> _Place:
    return _Place(f"{path.name}: rule {rule.at('uid').text()}", rule.value)


def _rule(rule: _Place, pace: Pace) -> dict[str, Any]:
    rule.knows_only(_RULE_KEYS)
    title = rule.at("title").text()
    for key, states in _STATES.items():
        rule.at(key).one_of(states)
    query, reduced, threshold = _chain(rule)
    labels = {name: _label(rule.at("labels").at(name)) for name in rule.at("labels").value}
    annotations = {name: _annotation(rule.at("annotations").at(name), reduced) for name in rule.at("annotations").value}
    keep_firing_for = rule.get("keepFiringFor")
    converted = {
        "alert": title,
        "expr": _expression(title, _scaled(query.at("expr"), pace), threshold, labels),
        "for": pace.wait(_seconds(rule.at("for"))),
    }
    if keep_firing_for is not None:
        converted["keep_firing_for"] = pace.wait(_seconds(keep_firing_for))
    return {**converted, "labels": labels, "annotations": annotations}


def _chain(rule: _Place) -> tuple[_Place, str, _Place]:
    """The query, the name of its reduced value, and the threshold's condition."""
    nodes = {node.at("refId").text(): node for node in rule.at("data").items()}

    def model(reference: _Place, keys: frozenset[str], kind: str | None) -> _Place:
        node = nodes.get(reference.text())
        if node is None:
            raise reference.error(f"there is no {reference.value} in data")
        node.knows_only(_NODE_KEYS)
        found = node.at("model")
        if kind is None:
            if node.at("datasourceUid").value == _EXPRESSION:
                raise reference.error("must lead to a query, over one reduce")
        else:
            node.at("datasourceUid").must_be(_EXPRESSION)
            found.at("type").must_be(kind)
        found.at("refId").must_be(reference.value)
        found.knows_only(keys)
        return found

    threshold = model(rule.at("condition"), _THRESHOLD_KEYS, "threshold")
    reduce = model(threshold.at("expression"), _REDUCE_KEYS, "reduce")
    query = model(reduce.at("expression"), _QUERY_KEYS, None)
    if len(nodes) != 3:
        raise rule.at("data").error("must be one query, one reduce and one threshold")
    reduce.at("reducer").must_be("last")
    reduce.at("settings").at("mode").must_be("dropNN")  # Grafana takes NaN for an alert
    query.at("instant").must_be(True)
    query.at("range").must_be(False)
    conditions = threshold.at("conditions").items()
    if len(conditions) != 1:
        raise threshold.at("conditions").error("must be one condition")
    return query, str(threshold.at("expression").value), conditions[0]


def _expression(title: str, expression: str, condition: _Place, labels: Mapping[str, str]) -> str:
    condition.knows_only(_CONDITION_KEYS)
    kind, limit = _evaluator(condition.at("evaluator"))
    fires = f"({expression}) {_OPERATORS[kind]} {limit:g}"
    recovery = condition.get("unloadEvaluator")
    if recovery is None:
        return fires
    recovery_kind, recovery_limit = _evaluator(recovery)
    if recovery_kind == kind:
        raise recovery.error(f"must be of the other type than the evaluator, {kind}")
    # all labels of the alert that its series does not have
    added = sorted(name for name, value in labels.items() if value != f"{{{{ $labels.{name} }}}}")
    firing = f'ALERTS{{alertname={json.dumps(title)}, alertstate="firing"}}'
    ignored = ", ".join(["alertname", "alertstate", *added])
    still = f"({expression}) {_STILL[recovery_kind]} {recovery_limit:g}"
    return f"{fires}\nor\n({still} and ignoring ({ignored}) {firing})"


def _evaluator(evaluator: _Place) -> tuple[str, float]:
    kind = evaluator.at("type").one_of(_OPERATORS)
    parameters = evaluator.at("params").items()
    if len(parameters) != 1:
        raise evaluator.at("params").error("must be one number")
    return kind, parameters[0].number()


def _label(place: _Place) -> str:
    text = place.text()
    if _SINGLE_DOLLAR.search(text):
        raise place.error('a single "$" in a label is expanded from the environment; write "$$"')
    text = text.replace("$$", "$")
    if "$values" in text:
        raise place.error("a label that changes with the value makes a new alert each time")
    return text


def _annotation(place: _Place, reduced: str) -> str:
    text = place.text()
    if "$$" in text:
        raise place.error('annotations are not expanded from the environment; write a single "$"')
    text = text.replace(f"$values.{reduced}.Value", "$value")
    if "$values" in text:
        raise place.error(f"only $values.{reduced}.Value, the value compared, can be shown")
    return text


def _scaled(expression: _Place, pace: Pace) -> str:
    def scaled(match: re.Match[str]) -> str:
        if (offset := match["offset"]) is not None:
            return f"offset {pace.range(_seconds(_Place(f'{expression.path}: offset {offset}', offset)))}"
        text = match["range"]
        if text is None:
            return match[0]
        parts = [
            pace.range(_seconds(_Place(f"{expression.path}[{text}]", part))) if part else "" for part in text.split(":")
        ]
        return f"[{':'.join(parts)}]"

    return _STRING_OR_RANGE.sub(scaled, expression.text().strip())


def _seconds(place: _Place) -> float:
    text = place.text().strip()
    parts = _DURATION.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise place.error(f"must be a duration such as 30s or 1m, not {text!r}")
    return float(sum(int(number) * _UNIT_SECONDS[unit] for number, unit in parts))


def main(arguments: list[str] | None = None) -> int:
    """Convert the folder named on the command line to standard output; 2 and a sentence when a rule is wrong."""
    parser = argparse.ArgumentParser(description="Make Prometheus rules of Grafana's alert rules.")
    parser.add_argument("folder", type=Path, help="with the provisioning files, as grafana/alerts")
    parser.add_argument("--time-scale", type=float, default=1.0, help="durations are multiplied by this (default 1)")
    parser.add_argument("--shortest-range", type=int, default=4, metavar="SECONDS", help="of ranges (default 4)")
    options = parser.parse_args(arguments)
    try:
        rules = convert(options.folder, Pace(options.time_scale, options.shortest_range))
    except RuleError as error:
        print(error, file=sys.stderr)
        return 2
    sys.stdout.write(rules)
    return 0


if __name__ == "__main__":
    sys.exit(main())
