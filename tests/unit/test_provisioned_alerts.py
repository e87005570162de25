"""The files for Grafana's alerting, by its documented keys: it ignores what it does not know, and says nothing of it.

Documented in Grafana's manual under "Use configuration files to provision alerting resources", 12.x. A file that it
cannot use keeps Grafana from starting.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import pytest
import yaml

from tests.unit.rules_rig import ALERTS

RULE_KEYS = frozenset(
    {"uid", "title", "condition", "data", "dashboardUid", "panelId", "noDataState", "execErrState", "for", "labels"}
    | {"keepFiringFor", "missing_series_evals_to_resolve", "annotations", "isPaused", "notification_settings", "record"}
)
NOTIFICATION_KEYS = frozenset(
    {"receiver", "group_by", "group_wait", "group_interval", "repeat_interval"}
    | {"mute_time_intervals", "active_time_intervals"}
)
WEBHOOK_KEYS = frozenset(
    {"url", "httpMethod", "maxAlerts", "username", "password", "authorization_scheme", "authorization_credentials"}
    | {"headers", "title", "message", "payload", "tlsConfig", "hmacConfig", "http_config"}
)
KEYS: Mapping[tuple[str, ...], frozenset[str]] = {
    (): frozenset({"apiVersion", "groups", "contactPoints"}),
    ("groups",): frozenset({"orgId", "name", "folder", "interval", "rules"}),
    ("groups", "rules"): RULE_KEYS,
    ("groups", "rules", "data"): frozenset({"refId", "queryType", "relativeTimeRange", "datasourceUid", "model"}),
    ("groups", "rules", "data", "relativeTimeRange"): frozenset({"from", "to"}),
    ("groups", "rules", "notification_settings"): NOTIFICATION_KEYS,
    ("contactPoints",): frozenset({"orgId", "name", "receivers"}),
    ("contactPoints", "receivers"): frozenset({"uid", "type", "settings", "disableResolveMessage"}),
    ("contactPoints", "receivers", "settings"): WEBHOOK_KEYS,
    ("contactPoints", "receivers", "settings", "hmacConfig"): frozenset({"secret", "header", "timestampHeader"}),
}
"""Documented keys by where they stand; what is not here holds names of our own, or a query (see the converter)."""

SEVERITIES = frozenset({"critical", "warning", "info"})


def contents() -> dict[str, dict[str, Any]]:
    return {path.name: yaml.safe_load(path.read_text()) for path in sorted(ALERTS.iterdir())}


def groups() -> list[dict[str, Any]]:
    return [group for content in contents().values() for group in content.get("groups", [])]


def rules() -> list[dict[str, Any]]:
    return [rule for group in groups() for rule in group["rules"]]


def acting() -> list[dict[str, Any]]:
    return [rule for rule in rules() if "action" in rule["labels"]]


def points() -> list[dict[str, Any]]:
    return [point for content in contents().values() for point in content.get("contactPoints", [])]


def unknown_keys(value: object, place: tuple[str, ...] = ()) -> Iterator[str]:
    if isinstance(value, list):
        for one in value:
            yield from unknown_keys(one, place)
    elif isinstance(value, Mapping):
        known = KEYS.get(place)
        for key, inner in value.items():
            if known is not None and key not in known:
                yield ".".join((*place, str(key)))
            if (*place, key) in KEYS:
                yield from unknown_keys(inner, (*place, key))


@pytest.mark.parametrize("name", contents())
def test_a_file_has_documented_keys_only(name: str) -> None:
    content = contents()[name]
    assert content["apiVersion"] == 1
    assert list(unknown_keys(content)) == []


def test_a_key_that_is_not_documented_is_found_wherever_it_stands() -> None:
    content = contents()["scale-up.yaml"]
    rule = content["groups"][0]["rules"][0]
    rule["keep_firing_for"] = "1m"
    rule["data"][0]["query"] = "x"
    rule["notification_settings"]["groupWait"] = "0s"
    found = {"groups.rules.keep_firing_for", "groups.rules.data.query", "groups.rules.notification_settings.groupWait"}
    assert set(unknown_keys(content)) == found


def test_a_rule_has_what_grafana_requires_and_what_its_defaults_would_do_wrong() -> None:
    needed = {"uid", "title", "condition", "data", "for", "noDataState", "execErrState", "labels", "annotations"}
    for rule in rules():
        assert needed <= rule.keys(), rule["uid"]
        assert {"summary", "description"} == rule["annotations"].keys()
        assert rule["isPaused"] is False


def test_uids_and_titles_are_unique_and_short_enough_and_intervals_are_ticks() -> None:
    uids = [rule["uid"] for rule in rules()] + [one["uid"] for point in points() for one in point["receivers"]]
    assert len(set(uids)) == len(uids)
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,40}", uid) for uid in uids)
    assert len({rule["title"] for rule in rules()}) == len(rules())  # within a folder, and there is one folder
    assert len({group["name"] for group in groups()}) == len(groups())
    assert {int(group["interval"].removesuffix("s")) % 10 for group in groups()} == {0}
    assert {(group["folder"], group["orgId"]) for group in groups()} == {("controlplane", 1)}


def test_queries_go_to_the_data_source_that_the_readme_names_and_see_as_far_back_as_they_ask() -> None:
    for node in chain.from_iterable(rule["data"] for rule in rules()):
        assert node["datasourceUid"] in ("prometheus", "__expr__")
        assert node["model"]["datasource"]["uid"] == node["datasourceUid"]
        assert node["model"]["refId"] == node["refId"]
        assert ("relativeTimeRange" in node) is (node["datasourceUid"] == "prometheus")


def test_a_label_is_not_expanded_from_the_environment_and_an_annotation_never_is() -> None:
    for rule in rules():
        for text in map(str, rule["labels"].values()):
            assert "$" not in text.replace("$$", ""), rule["uid"]
        for text in rule["annotations"].values():
            assert "$$" not in text, rule["uid"]
            assert "${" not in text, rule["uid"]


def test_not_knowing_never_scales() -> None:
    assert {(rule["noDataState"], rule["execErrState"]) for rule in acting()} == {("OK", "KeepLast")}


def test_not_knowing_is_told_to_people_by_one_rule() -> None:
    states = {rule["uid"]: (rule["noDataState"], rule["execErrState"]) for rule in rules() if rule not in acting()}
    assert states.pop("controlplane-metrics-missing") == ("Alerting", "Alerting")
    assert set(states.values()) == {("OK", "KeepLast")}


def test_a_rule_that_acts_names_a_contact_point_that_exists_and_one_group_per_subject() -> None:
    subjects = {"replace": {"model", "replica"}, "drain_node": {"node"}}
    assert {rule["labels"]["action"] for rule in acting()} == {"scale_up", "scale_down", "replace", "drain_node"}
    for rule in acting():
        settings = rule["notification_settings"]
        assert rule["labels"]["owner"] == "controlplane"
        assert settings["receiver"] in {point["name"] for point in points()}
        subject = subjects.get(rule["labels"]["action"], {"model"})
        assert set(settings["group_by"]) == {"grafana_folder", "alertname"} | subject
        assert subject <= rule["labels"].keys()
        assert settings["group_interval"] == "10s"  # Grafana tries a delivery that failed again with the next one


def test_a_rule_for_people_asks_the_control_plane_for_nothing_and_goes_a_sites_own_way() -> None:
    for rule in rules():
        if rule not in acting():
            assert "owner" not in rule["labels"], rule["uid"]
            assert rule["labels"]["service"] == "controlplane"
            assert rule["labels"]["severity"] in SEVERITIES
            assert "notification_settings" not in rule  # a name that a site does not have keeps Grafana from starting


def test_secrets_of_contact_points_come_from_the_environment_and_no_policies_are_replaced() -> None:
    assert {key for content in contents().values() for key in content} == {"apiVersion", "groups", "contactPoints"}
    text = (ALERTS / "contact-points.yaml").read_text()
    secrets = re.findall(r"(?:secret|authorization_credentials|url): (.*)", text)
    assert secrets
    assert all(re.fullmatch(r"\$CONTROLPLANE_WEBHOOK_[A-Z_]+", secret) for secret in secrets)


def test_contact_points_prove_who_sends_by_a_signed_time_or_a_bearer_token() -> None:
    settings = {point["name"]: point["receivers"][0]["settings"] for point in points()}
    assert settings["controlplane"]["hmacConfig"].keys() == {"secret", "header", "timestampHeader"}
    assert settings["controlplane-bearer"]["authorization_scheme"] == "Bearer"
    for one in settings.values():
        assert one["maxAlerts"] == "0"  # all of them
        assert not ("authorization_scheme" in one and "username" in one)  # which Grafana refuses
