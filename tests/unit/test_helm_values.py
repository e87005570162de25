"""The schema of the chart's values: strict, described, in step with the code, and refusing what it should."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from controlplane.settings import variables
from tests.unit.helm_chart import CHART, helm, merged, render, values_of
from tests.unit.values_schema import FILE, OWNED, renewed, settable, text_of

SCHEMA: dict[str, Any] = json.loads(FILE.read_text())
KUBERNETES_OWN = {"resources", "extraEnv", "extraVolumes", "extraVolumeMounts"}


def test_the_schema_says_of_settings_and_replica_sets_what_the_code_says() -> None:
    assert FILE.read_text() == text_of(renewed(SCHEMA)), "run python -m tests.unit.values_schema"


def test_every_setting_can_be_set_in_one_place() -> None:
    secret = {name for name, variable in variables().items() if variable.is_secret}
    assert settable().keys() | secret | OWNED == variables().keys()
    table = (CHART / "templates" / "_secrets.tpl").read_text()
    named = set(re.findall(r"variable: (\w+)_FILE\}", table))
    keys = {"CONTROLPLANE_SLURM__JWT_KEY", "CONTROLPLANE_SLURM__TOKEN"}  # these files are settings of their own
    assert named - keys == secret - keys


def test_every_value_has_a_default_and_is_described() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    described = {path for path, _ in _properties(SCHEMA, "") if path != "global"}
    assert described - _paths(values, "", described) == set()
    for path, one in _properties(SCHEMA, ""):
        assert len(one.get("description", "")) > 3 or "$ref" in one, path


def test_no_object_of_the_charts_own_takes_what_it_does_not_know() -> None:
    for path, one in _properties(SCHEMA, ""):
        if one.get("type") == "object" and "properties" in one:
            assert one["additionalProperties"] is False, path
    for name, one in SCHEMA["definitions"].items():
        if one.get("type") == "object":
            assert one["additionalProperties"] is False, name


REFUSED: list[dict[str, Any]] = [
    {"contolPlane": {}},
    {"controlPlane": {"replica": 2}},
    {"controlPlane": {"replicas": "2"}},
    {"controlPlane": {"replicas": -1}},
    {"proxy": {"service": {"type": "ExternalName"}}},
    {"proxy": {"service": {"port": 70000}}},
    {"proxy": {"paths": []}},
    {"proxy": {"paths": ["v1"]}},
    {"proxy": {"podDisruptionBudget": {"maxUnavailable": 0}}},
    {"proxy": {"podDisruptionBudget": {"maxUnavailable": "a third"}}},
    {"proxy": {"autoscaling": {"targetCPUUtilizationPercentage": 101}}},
    {"proxy": {"ingress": {"hosts": [{"host": "llm.example.org"}]}}},
    {"proxy": {"httpRoute": {"parentRefs": [{"namespace": "gateways"}]}}},
    {"proxy": {"httpRoute": {"requestTimeout": "long"}}},
    {"image": {"digest": "0123"}},
    {"image": {"digest": "sha256:0123"}},
    {"image": {"pullPolicy": "Sometimes"}},
    {"settings": {"CONTROLPLANE_LOG__LEVEL": "loud"}},
    {"settings": {"CONTROLPLANE_LOG_LEVEL": "info"}},
    {"settings": {"CONTROLPLANE_PROXY__DRAIN_TIMEOUT_SECONDS": 0}},
    {"settings": {"CONTROLPLANE_PROXY__DRAIN_TIMEOUT_SECONDS": "300"}},
    {"settings": {"CONTROLPLANE_PROXY__PORT": 8081}},
    {"settings": {"CONTROLPLANE_SLURM__URL": "http://slurm:6820"}},
    {"settings": {"CONTROLPLANE_SLURM__TOKEN": "a-secret"}},
    {"settings": {"CONTROLPLANE_OPERATOR__TOKENS": "ann:a-secret"}},
    {"settings": {"DATABASE_URL": "postgresql://u:p@db/c"}},
    {"secrets": {"databaseUrl": "postgresql://u:p@db/c"}},
    {"secrets": {"databaseUrl": {"existingSecret": "Not_A_Name"}}},
    {"secrets": {"databaseUrl": {"existingSecret": "a", "value": "b"}}},
    {"secrets": {"slurmJwtKey": {"value": "b"}}},
    {"secrets": {"password": {"value": "b"}}},
    {"controlPlane": {"extraEnv": [{"name": "CONTROLPLANE_SLURM__TOKEN", "value": "a-secret"}]}},
    {"proxy": {"extraEnv": [{"name": "DATABASE_URL", "value": "postgresql://u:p@db/c"}]}},
    {"proxy": {"extraVolumes": [{"name": "secrets", "emptyDir": {}}]}},
    {"jobTemplates": {"vllm.sh": "#!/bin/bash"}},
    {"jobTemplates": {"../x.sbatch": "#!/bin/bash"}},
    {"replicaSets": [{"name": "a"}]},
    {"replicaSets": [{"name": "a", "model": "a", "endpoints": [{"url": "http://a", "api_key": "a-secret"}]}]},
    {
        "replicaSets": [
            {
                "name": "a",
                "model": "a",
                "slurm": {"partition": "gpu", "gpus_per_node": 1, "time_limit_seconds": 43200},
                "vllm": {"image": "/a.sif", "model_path": "/a", "environment": {"HF_TOKEN": "a-secret"}},
            }
        ]
    },
    {"networkPolicy": {"computeNodes": {"cidrs": ["node[1-9]"]}}},
    {"networkPolicy": {"proxy": {"from": [{}]}}},
    {"podSecurityContext": {"runAsUser": 0}},
    {"podSecurityContext": {"runAsNonRoot": False}},
    {"grafana": {"dashboards": {"labels": {"grafana_dashboard": 1}}}},
    {"prometheus": {"serviceMonitor": {"interval": "15"}}},
    {"cloudnativepg": {"instances": 0}},
    {"cloudnativepg": {"storage": {"size": "much"}}},
]


@pytest.mark.parametrize("values", REFUSED, ids=json.dumps)
def test_wrong_values_are_refused_by_the_schema(values: dict[str, Any]) -> None:
    (room,) = values
    with helm.Chart.load(CHART) as chart, pytest.raises(helm.HelmValuesError, match=rf"^controlplane:\n- at '.*{room}"):
        chart.validate_schema(values)


def test_a_refusal_names_the_value_at_fault() -> None:
    with pytest.raises(helm.HelmError, match=r"controlPlane.*replica"):
        render({"controlPlane": {"replica": 2}})


def test_a_key_may_be_taken_back_with_null() -> None:
    values = merged(values_of("site"), settings={"CONTROLPLANE_PROXY__DRAIN_TIMEOUT_SECONDS": None})
    settings = render(values).one("ConfigMap", "controlplane-settings")["data"]
    assert "CONTROLPLANE_PROXY__DRAIN_TIMEOUT_SECONDS" not in settings


def _properties(schema: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, one in schema.get("properties", {}).items():
        here = f"{path}.{name}".lstrip(".")
        yield here, one
        if here not in ("settings", "replicaSets"):  # those are of the code, and looked at there
            yield from _properties(one, here)


def _paths(values: Any, path: str, described: set[str]) -> set[str]:
    found = {path}
    for name, one in values.items() if isinstance(values, dict) else ():
        here = f"{path}.{name}".lstrip(".")
        if here in described:
            found |= _paths(one, here, described)
    return found
