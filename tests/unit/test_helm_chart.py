"""The chart's renderings by Helm's own library: what Kubernetes takes, what pods may do, who is given which secret."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml

from controlplane.cli import cli
from controlplane.settings import Settings
from controlplane.specs import parse_file
from tests.unit.documents import ROOT
from tests.unit.helm_chart import (
    CASES,
    CHART,
    Document,
    Release,
    containers,
    helm,
    merged,
    render,
    rendered,
    values_of,
)

OLDEST, NEWEST = "1.27", "1.37"  # of Kubernetes: Chart.yaml's kubeVersion, and the newest that schemas are to be had of
FOREIGN = {  # custom resources: what their operators insist on, by the versions of their APIs that are named here
    "postgresql.cnpg.io/v1": {"Cluster": ["spec.instances", "spec.storage.size", "spec.bootstrap.initdb.owner"]},
    "gateway.networking.k8s.io/v1": {"HTTPRoute": ["spec.parentRefs.0.name", "spec.rules.0.backendRefs.0.port"]},
    "monitoring.coreos.com/v1": {
        "ServiceMonitor": ["spec.selector.matchLabels", "spec.endpoints.0.port"],
        "PrometheusRule": ["spec.groups.0.name", "spec.groups.0.rules.0.expr"],
    },
    "monitoring.coreos.com/v1alpha1": {
        "ScrapeConfig": ["spec.jobName", "spec.scrapeInterval", "spec.metricRelabelings"]
    },
}
LONG = "a-release-whose-name-is-as-long-as-helm-lets-it-be-53"
SLURM = {
    "CONTROLPLANE_SLURM__URL": "http://slurm.example.org:6820",
    "CONTROLPLANE_SLURM__USER_NAME": "llm",
    "CONTROLPLANE_SLURM__JOB_DIRECTORY": "/scratch/llm",
}


@pytest.fixture(params=CASES)
def release(request: pytest.FixtureRequest) -> Release:
    return rendered(request.param)


# --- what Helm and Kubernetes take -----------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_helm_has_nothing_to_say_against_the_chart(case: str) -> None:
    report = helm.lint(CHART, dict(values_of(case)), strict=True, kube_version=f"v{OLDEST}.0")
    said = [one for one in report["messages"] if "icon is recommended" not in one["error"]]
    assert (said, report["errors"], report["total_charts_linted"]) == ([], [], 1)


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_every_object_is_what_kubernetes_takes(release: Release, version: str) -> None:
    judged = 0
    for one in release.documents:
        if one["apiVersion"] not in FOREIGN:
            kubernetes_validate.validate(one, version, strict=True)
            judged += 1
    assert judged > 5


VARIANTS: list[dict[str, Any]] = [
    {"migrate": {"enabled": False}, "serviceAccount": {"create": False, "name": "site"}},
    {"cloudnativepg": {"enabled": True}, "networkPolicy": {"enabled": True}},
    {"secrets": {"databaseUrl": {"value": "postgresql://u:p@db/c"}}, "controlPlane": {"replicas": 2}},
    {"settings": SLURM, "secrets": {"slurmToken": {"existingSecret": "llm"}}, "replicaSetsSecret": "llm-sets"},
    {"settings": {**SLURM, "CONTROLPLANE_SLURM__URL": "unix:/run/slurmrestd.sock"}},
    {"proxy": {"replicas": 1, "podDisruptionBudget": {"enabled": False}}, "fullnameOverride": "llm"},
]


@pytest.mark.parametrize("values", VARIANTS, ids=lambda values: "-".join(values))
def test_other_ways_to_install_it_are_what_kubernetes_takes(values: dict[str, Any]) -> None:
    for one in render(values, name="x").documents:
        if one["apiVersion"] not in FOREIGN:
            kubernetes_validate.validate(one, NEWEST, strict=True)


def test_the_validator_refuses_what_kubernetes_refuses() -> None:
    one = json.loads(json.dumps(rendered("default").one("Deployment", "proxy")))
    one["spec"]["template"]["spec"]["containers"][0]["readOnly"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(one, NEWEST, strict=True)


def test_custom_resources_have_what_their_operators_insist_on(release: Release) -> None:
    for one in release.documents:
        for path in FOREIGN.get(one["apiVersion"], {}).get(one["kind"], []):
            assert _at(one, path), f"{one['kind']}: {path}"


def test_everything_that_the_chart_has_is_rendered_with_everything_on() -> None:
    kinds = {one["kind"] for one in rendered("everything").documents}
    assert kinds >= {kind for kinds in FOREIGN.values() for kind in kinds}
    assert kinds >= {"Deployment", "HorizontalPodAutoscaler", "PodDisruptionBudget", "Service", "Ingress", "Job"}
    assert kinds >= {"ConfigMap", "Secret", "ServiceAccount", "NetworkPolicy", "Pod"}


def test_a_cluster_begins_in_one_way() -> None:
    """CloudNativePG refuses two: who restores a backup says so, and gets no empty database beside it."""
    for spec, bootstrap in (
        ({}, {"initdb": {"database": "controlplane", "owner": "controlplane"}}),
        ({"bootstrap": {"recovery": {"source": "old"}}}, {"recovery": {"source": "old"}}),
        (
            {"bootstrap": {"initdb": {"dataChecksums": True}}},
            {"initdb": {"database": "controlplane", "owner": "controlplane", "dataChecksums": True}},
        ),
    ):
        values = merged(values_of("everything"), cloudnativepg={"spec": spec})
        assert render(values).one("Cluster", "database")["spec"]["bootstrap"] == bootstrap


def test_by_default_there_is_nothing_that_needs_an_operator_or_a_secret_of_the_charts_making() -> None:
    release = rendered("default")
    assert not [one for one in release.documents if one["apiVersion"] in FOREIGN]
    assert not release.of_kind("Secret")
    assert "controlplane-database, key database-url" in release.notes


def test_the_chart_is_of_the_version_that_it_installs() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert chart["appVersion"] == project["version"]
    assert chart["description"] == project["description"]
    assert chart["kubeVersion"] == f">={OLDEST}.0-0"


# --- names and labels ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["controlplane", "a", "1a", "a.b", LONG])
def test_every_name_is_one_that_services_and_labels_may_have(name: str) -> None:
    assert len(LONG) == 53
    release = render(values_of("everything"), name=name)
    for one in release.documents:
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", one["metadata"]["name"])
        assert all(len(value) <= 63 for value in one["metadata"]["labels"].values())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a", "b"),
        ("a", "controlplane"),
        ("a", "a-controlplane"),
        (LONG, f"{LONG[:-1]}4"),
        ("a", "a-proxy"),
        ("a.b", "a-b"),
        ("1", "r1"),
    ],
)
def test_two_releases_in_one_namespace_share_nothing(one: str, other: str) -> None:
    first, second = (render(values_of("everything"), name=name) for name in (one, other))
    assert not _identities(first) & _identities(second)
    selectors = [json.dumps(_selected(found), sort_keys=True) for found in (*_pairs(first), *_pairs(second))]
    assert len(set(selectors)) == 4  # two Deployments of each


@pytest.mark.parametrize("word", ["123", "true", "null", "1e3"])
def test_a_name_that_yaml_takes_for_something_else_stays_a_name(word: str) -> None:
    named = merged(
        values_of("everything"),
        serviceAccount={"name": word},
        controlPlane={"priorityClassName": word},
        proxy={"priorityClassName": word, "ingress": {"className": word}},
        secrets={"databaseUrl": {"existingSecret": word, "key": word}, "grafanaToken": {"existingSecret": word}},
        cloudnativepg={"enabled": False},
        networkPolicy={"database": {"cidrs": ["::1/128"]}},
        grafana={"dashboards": {"namespace": word}},
        replicaSetsSecret=word,
        replicaSets=[],
    )
    for one in render(named, name=word, namespace=word).documents:
        if one["apiVersion"] not in FOREIGN:
            kubernetes_validate.validate(one, NEWEST, strict=True)
        assert one["metadata"]["labels"]["app.kubernetes.io/instance"] == word


def test_no_two_objects_of_a_release_have_one_name(release: Release) -> None:
    assert len(_identities(release)) == len(release.documents)


def test_whatever_selects_pods_selects_those_it_is_for(release: Release) -> None:
    pods = {name: pod["metadata"]["labels"] for name, pod in release.pods()}
    for one in release.of_kind("Service", "PodDisruptionBudget", "Deployment"):
        wanted = _selected(one)
        found = [name for name, labels in pods.items() if wanted.items() <= labels.items()]
        assert found == [one["metadata"]["name"]]
    for one in release.of_kind("HorizontalPodAutoscaler"):
        assert one["spec"]["scaleTargetRef"]["name"] in pods


def test_services_point_at_ports_that_containers_have(release: Release) -> None:
    for service in release.of_kind("Service"):
        deployment = release.one("Deployment", service["metadata"]["name"])
        names = [port["name"] for one in containers(deployment["spec"]["template"]) for port in one["ports"]]
        assert [port["targetPort"] for port in service["spec"]["ports"]] == names == ["http"]


def test_prometheus_selects_both_services_and_names_the_job_as_rules_expect() -> None:
    release = rendered("everything")
    monitor = release.one("ServiceMonitor", "controlplane")
    wanted = monitor["spec"]["selector"]["matchLabels"]
    components = monitor["spec"]["selector"]["matchExpressions"][0]["values"]
    for service in release.of_kind("Service"):
        labels = service["metadata"]["labels"]
        assert wanted.items() <= labels.items()
        assert labels["app.kubernetes.io/component"] in components
        assert labels[monitor["spec"]["jobLabel"]] == "controlplane"
    scrape = release.one("ScrapeConfig", "vllm")
    service = release.one("Service", "control-plane")["metadata"]["name"]
    assert scrape["spec"]["jobName"] == "vllm"
    assert scrape["spec"]["httpSDConfigs"][0]["url"] == f"http://{service}.llm.svc:9100/sd/prometheus"
    assert monitor["metadata"]["labels"]["release"] == "kube-prometheus-stack"


# --- what pods may do ------------------------------------------------------------------------------------


def test_no_container_is_root_writes_its_root_or_gets_a_right(release: Release) -> None:
    for name, pod in release.pods():
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        for one in containers(pod):
            rights = one["securityContext"]
            assert rights["readOnlyRootFilesystem"] is True
            assert rights["allowPrivilegeEscalation"] is False
            assert rights["capabilities"] == {"drop": ["ALL"]}
            assert one["resources"]["limits"]["memory"]
            assert name.endswith("-test") or {"name": "tmp", "mountPath": "/tmp"} in one["volumeMounts"]
    assert release.one("ServiceAccount", "controlplane")["automountServiceAccountToken"] is False


def test_a_platform_may_choose_the_user() -> None:
    nobody = {"runAsUser": None, "runAsGroup": None, "fsGroup": None}
    for _, pod in render({"podSecurityContext": nobody}).pods():
        assert pod["spec"]["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}


def test_a_pod_that_leaves_has_time_for_its_drain(release: Release) -> None:
    settings = _data(release)
    drains = {
        "proxy": float(settings.get("CONTROLPLANE_PROXY__DRAIN_TIMEOUT_SECONDS", 60)),
        "control-plane": float(settings.get("CONTROLPLANE_DATABASE__STATEMENT_TIMEOUT_SECONDS", 30)),
    }
    for part, drain in drains.items():
        spec = release.one("Deployment", part)["spec"]["template"]["spec"]
        command = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert command[0] == "sleep"
        assert spec["terminationGracePeriodSeconds"] >= int(command[1]) + math.ceil(drain) + 10


def test_every_command_is_one_that_there_is(release: Release) -> None:
    for _, pod in release.pods():
        for one in containers(pod):
            if "command" in one:
                continue
            command: Any = typer.main.get_command(cli).commands[one["args"][0]]  # type: ignore[attr-defined]
            command.make_context(one["args"][0], list(one["args"][1:])).close()


def test_probes_ask_what_the_processes_answer() -> None:
    answered = "".join((ROOT / "controlplane" / path).read_text() for path in ("proxy/api.py", "web/health.py"))
    for part in ("proxy", "control-plane"):
        container = rendered("default").one("Deployment", part)["spec"]["template"]["spec"]["containers"][0]
        paths = {kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")}
        assert paths == {"startup": "/health", "liveness": "/health", "readiness": "/ready"}
        assert all(answered.count(f'"{path}"') == 2 for path in paths.values())


def test_the_image_is_by_digest_where_there_is_one() -> None:
    by_digest = {one["image"] for _, pod in rendered("site").pods() for one in containers(pod)}
    assert by_digest == {f"registry.example.org/llm/controlplane@sha256:{'0123456789abcdef' * 4}"}
    assert {one["image"] for _, pod in rendered("default").pods() for one in containers(pod)} == {"controlplane:0.1.0"}


def test_one_pod_has_no_disruption_budget_and_two_have() -> None:
    assert [one["metadata"]["name"] for one in rendered("default").of_kind("PodDisruptionBudget")] == [
        "controlplane-proxy"
    ]
    assert len(rendered("everything").of_kind("PodDisruptionBudget")) == 2
    assert "replicas" not in rendered("everything").one("Deployment", "proxy")["spec"]  # the autoscaler's


# --- settings and secrets --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_every_process_understands_the_settings_that_it_is_given(case: str, tmp_path: Path) -> None:
    release, files = rendered(case), tmp_path / "run/secrets/controlplane"
    files.mkdir(parents=True)
    loaded = 0
    for name, pod in release.pods():
        for file in _secret_files(pod):
            (files / file).write_text("postgresql://u:p@db/c" if file == "database-url" else "name:secret")
        for one in containers(pod):
            if one.get("command", [""])[0] != "python":  # which is the test's
                environ = dict(_environment(release, one))
                assert environ, name
                Settings.load(
                    {key: value.replace("/run/secrets", f"{tmp_path}/run/secrets") for key, value in environ.items()}
                )
                loaded += 1
        for path in files.iterdir():
            path.unlink()
    assert loaded >= 3


def test_each_process_is_given_the_secrets_that_it_needs_and_no_other() -> None:
    given = {}
    for name, pod in rendered("everything").pods():
        given[re.sub("-[0-9a-f]{10}$", "", name)] = set(_secret_files(pod))
    everything = given.pop("controlplane-control-plane")
    assert len(everything) == 7
    assert given.pop("controlplane-test") == set()
    assert given == {f"controlplane-{part}": {"database-url"} for part in ("proxy", "migrate", "apply")}


CANARIES = {
    name: {"value": f"canary-{number}-of-a-secret"}
    for number, name in enumerate(
        (
            "databaseUrl",
            "webhookHmacSecrets",
            "webhookBearerTokens",
            "webhookBasicCredentials",
            "operatorTokens",
            "slurmToken",
            "grafanaToken",
        )
    )
}


def test_a_secret_stands_in_a_secret_and_nowhere_else() -> None:
    values = merged(values_of("everything"), secrets=CANARIES, cloudnativepg={"enabled": False})
    values = merged(values, networkPolicy={"database": {"cidrs": ["10.20.0.10/32"]}})
    values["secrets"]["grafanaToken"] = CANARIES["grafanaToken"]
    release = render(values)
    inside = yaml.safe_dump(release.of_kind("Secret"))
    outside = yaml.safe_dump([one for one in release.documents if one["kind"] != "Secret"]) + release.notes
    for canary in CANARIES.values():
        assert inside.count(canary["value"]) == 1
    assert "canary" not in outside
    assert "for-trying-out" not in yaml.safe_dump(
        [one for one in rendered("everything").documents if one["kind"] != "Secret"]
    )


@pytest.mark.parametrize("case", ["default", "site"])
def test_a_site_that_has_its_own_secrets_gets_none_from_the_chart(case: str) -> None:
    assert not rendered(case).of_kind("Secret")
    for name, pod in rendered(case).pods():
        assert set(_secret_files(pod).values()) <= {"controlplane-database", "llm-secrets", "slurm-jwt"}, name


def test_a_literal_in_the_environment_is_a_file_or_the_sites_own(release: Release) -> None:
    for _, pod in release.pods():
        for one in containers(pod):
            for variable in one.get("env", []):
                assert variable["name"].endswith("_FILE") or variable["name"] in ("SSL_CERT_FILE", "TZ")


@pytest.mark.parametrize(
    ("change", "restarted"),
    [
        ({"settings": {"CONTROLPLANE_LOG__LEVEL": "warning"}}, {"control-plane", "proxy"}),
        ({"settings": {"CONTROLPLANE_PROBE__INTERVAL_SECONDS": 7}}, {"control-plane"}),
        ({"settings": {"CONTROLPLANE_SLURM__TIMEOUT_SECONDS": 40}}, {"control-plane", "apply"}),
        ({"settings": {"CONTROLPLANE_PROXY__HOLD_SECONDS": 7}}, {"control-plane", "proxy"}),
        ({"secrets": {"operatorTokens": {"value": "ann:another"}}}, {"control-plane"}),
        ({"jobTemplates": {"site-venv.sbatch": "#!/bin/sh\n"}}, {"control-plane", "apply"}),
        ({"replicaSets": []}, {"apply"}),
        ({"image": {"tag": "0.1.1"}}, {"control-plane", "proxy", "migrate", "apply"}),
        ({"grafana": {"alerts": {"enabled": False}}}, set()),
        ({"proxy": {"service": {"port": 8001}}}, set()),
    ],
    ids=lambda one: json.dumps(one) if isinstance(one, dict) else "-".join(sorted(one)) or "nobody",
)
def test_what_a_pod_has_read_restarts_it_when_it_changes(change: dict[str, Any], restarted: set[str]) -> None:
    before = _rolled(rendered("everything"))
    after = _rolled(render(merged(values_of("everything"), **change)))
    assert {part for part in before if before[part] != after.get(part)} == restarted


def test_a_chart_of_another_version_restarts_nobody(tmp_path: Path) -> None:
    for part in ("helm", "grafana", "loki", "prometheus"):
        shutil.copytree(ROOT / part, tmp_path / part, symlinks=True)
    about = tmp_path / "helm" / "controlplane" / "Chart.yaml"
    about.write_text(re.sub(r"(?m)^version: .*", "version: 0.1.1", about.read_text()))
    after = render(values_of("everything"), chart=about.parent)
    assert after != rendered("everything")
    assert _rolled(after) == _rolled(rendered("everything"))


def test_a_job_that_changes_is_another_job() -> None:
    """Kubernetes refuses to change a Job: Helm and Argo CD would fail on one name with two contents."""
    values = values_of("everything")
    seen: dict[str, str] = {}
    changes: list[dict[str, Any]] = [
        {},
        {"image": {"tag": "2"}},
        {"jobs": {"nodeSelector": {"a": "b"}}},
        {"replicaSets": []},
    ]
    for change in changes:
        for job in render(merged(values, **change)).of_kind("Job"):
            content = json.dumps(job["spec"], sort_keys=True)
            assert seen.setdefault(job["metadata"]["name"], content) == content
    assert len(seen) == 6


def test_the_sets_that_are_applied_are_those_of_the_values() -> None:
    text = rendered("site").one("ConfigMap", "replica-sets")["data"]["sets.yaml"]
    assert [spec.name for spec in parse_file(text, directory=Path())] == ["qwen3-8b"]
    assert yaml.safe_load(text) == {"replica_sets": values_of("site")["replicaSets"]}


def test_sets_may_come_from_a_secret() -> None:
    release = render({"replicaSetsSecret": "llm-sets"})
    volumes = release.one("Job", "apply")["spec"]["template"]["spec"]["volumes"]
    assert {"name": "sets", "secret": {"secretName": "llm-sets", "defaultMode": 0o440}} in volumes


def test_large_numbers_are_written_as_the_settings_read_them() -> None:
    assert _data(rendered("everything"))["CONTROLPLANE_PROXY__MAX_BODY_BYTES"] == "134217728"


# --- networks --------------------------------------------------------------------------------------------


def test_the_compute_nodes_ports_that_are_let_through_are_those_that_replicas_are_given() -> None:
    for case, first, last in (("everything", 31000, 31999), ("site", 20000, 29999)):
        for part in ("proxy", "control-plane"):
            rules = rendered(case).one("NetworkPolicy", part)["spec"]["egress"]
            assert [rule["ports"] for rule in rules if "endPort" in rule["ports"][0]] == [
                [{"port": first, "endPort": last, "protocol": "TCP"}]
            ]


def test_only_the_control_plane_reaches_slurmrestd_and_jobs_reach_only_the_database() -> None:
    release = rendered("site")
    reached = {
        part: {port["port"] for rule in release.one("NetworkPolicy", part)["spec"]["egress"] for port in rule["ports"]}
        for part in ("control-plane", "proxy", "jobs")
    }
    dns = {53, 5353}
    assert reached == {
        "control-plane": dns | {5432, 6820, 20000},
        "proxy": dns | {5432, 20000},
        "jobs": dns | {5432},
    }


def test_every_pod_is_under_a_policy_and_every_policy_lets_in_only_its_own(release: Release) -> None:
    policies = release.of_kind("NetworkPolicy")
    if not policies:
        return
    for policy in policies:
        assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
        assert all(rule["from"] for rule in policy["spec"]["ingress"])
    for part in ("control-plane", "proxy"):
        allowed = release.one("NetworkPolicy", part)["spec"]["ingress"][0]["from"]
        assert any(
            peer.get("podSelector", {}).get("matchLabels", {}).get("app.kubernetes.io/component") == "test"
            for peer in allowed
        )


def test_only_paths_for_clients_are_let_through_to_the_proxy() -> None:
    release = rendered("everything")
    route = release.one("HTTPRoute", "proxy")["spec"]["rules"][0]
    ingress = release.one("Ingress", "proxy")["spec"]["rules"][0]["http"]["paths"]
    assert [one["path"]["value"] for one in route["matches"]] == ["/v1", "/tokenize", "/detokenize"]
    assert [one["path"] for one in ingress] == ["/v1", "/tokenize", "/detokenize"]
    assert route["timeouts"] == {"request": "0s"}


# --- dashboards, alerts, rules ---------------------------------------------------------------------------


def test_dashboards_and_alerts_are_the_repositorys_own() -> None:
    release = rendered("everything")
    for kind, files in (("dashboard", "grafana/dashboards/*.json"), ("alert", "*/alerts/*.yaml")):
        maps = [one for one in release.of_kind("ConfigMap") if f"grafana_{kind}" in one["metadata"]["labels"]]
        carried = {name: text for one in maps for name, text in one["data"].items()}
        expected = {
            f"controlplane-{path.name.removeprefix('controlplane-')}": path.read_text() for path in ROOT.glob(files)
        }
        assert carried == expected
        # Argo CD and `kubectl apply` keep a copy in an annotation, of which there are 256 KiB
        assert all(len(text.encode()) < 250_000 for text in carried.values())


def test_notes_say_what_grafana_itself_must_be_given_and_agree_with_its_contact_point() -> None:
    notes = rendered("everything").notes
    contact_points = (ROOT / "grafana" / "alerts" / "contact-points.yaml").read_text()
    variables = set(re.findall(r"\$(CONTROLPLANE_\w+)", contact_points))
    assert len(variables) == 3
    assert all(f"  {name} " in notes for name in variables)
    assert not any(name in rendered("site").notes for name in variables)
    header = yaml.safe_load(contact_points)["contactPoints"][0]["receivers"][0]["settings"]["hmacConfig"]
    assert _data(rendered("everything"))["CONTROLPLANE_WEBHOOK__HMAC_TIMESTAMP_HEADER"] == header["timestampHeader"]


def test_rules_on_logs_are_not_given_to_a_grafana_that_may_have_no_loki() -> None:
    release = render({"grafana": {"alerts": {"enabled": True}}})
    text = yaml.safe_dump(release.of_kind("ConfigMap"))
    assert "controlplane-people.yaml" in text
    assert "controlplane-logs.yaml" not in text
    alone = render({"grafana": {"logAlerts": {"enabled": True}}})
    (logs,) = [one for one in alone.of_kind("ConfigMap") if "grafana_alert" in one["metadata"]["labels"]]
    assert list(logs["data"]) == ["controlplane-logs.yaml"]


def test_the_recording_rules_are_the_repositorys_own() -> None:
    rules = yaml.safe_load((ROOT / "prometheus" / "rules.yaml").read_text())
    assert rendered("everything").one("PrometheusRule", "controlplane")["spec"] == rules


def test_series_are_relabelled_as_the_repositorys_prometheus_does() -> None:
    config = yaml.safe_load((ROOT / "prometheus" / "prometheus.yaml").read_text())
    for job in ("vllm", "dcgm"):
        steps = next(one for one in config["scrape_configs"] if one["job_name"] == job)["metric_relabel_configs"]
        spec = rendered("everything").one("ScrapeConfig", job)["spec"]
        assert spec["jobName"] == job
        spelled = {"source_labels": "sourceLabels", "target_label": "targetLabel"}
        assert spec["metricRelabelings"] == [
            {spelled.get(key, key): value for key, value in step.items()} for step in steps
        ]
        assert {key for step in steps for key in step} <= {*spelled, "regex", "replacement", "action"}


def test_what_is_added_to_the_repositorys_dashboards_and_rules_is_in_the_chart(tmp_path: Path) -> None:
    for part in ("helm", "grafana", "loki", "prometheus"):
        shutil.copytree(ROOT / part, tmp_path / part, symlinks=True)
    board = json.dumps({"uid": "made-up", "title": "{{ .Values }}", "legend": "{{model}} \u00e9"}, indent=2) + "\n"
    (tmp_path / "grafana" / "dashboards").mkdir(exist_ok=True)
    (tmp_path / "grafana" / "dashboards" / "a-board-with-quite-a-long-name.json").write_text(board)
    rules = "# why\ngroups:\n  - name: made-up\n    rules: [{record: 'a:b', expr: 'sum by (x) (y) * 1e9'}]\n"
    (tmp_path / "prometheus" / "rules.yaml").write_text(rules)
    release = render(values_of("everything"), chart=tmp_path / "helm" / "controlplane")
    assert release.one("ConfigMap", "dashboard-a-board-with")["data"] == {
        "controlplane-a-board-with-quite-a-long-name.json": board
    }
    assert release.one("PrometheusRule", "controlplane")["spec"] == yaml.safe_load(rules)


def test_a_package_renders_as_the_checkout_does(tmp_path: Path) -> None:
    archive = Path(helm.package(CHART, destination=tmp_path))
    assert archive.name == "controlplane-0.1.0.tgz"
    assert render(values_of("everything"), chart=archive) == rendered("everything")
    with helm.Chart.load(archive) as packed:
        names = {one["name"] for one in packed.files}
    assert any(name.startswith("files/grafana/alerts/") for name in names)
    assert not [name for name in names if name.endswith((".py", ".md")) or "/ci/" in name]


# --- contradictions --------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"settings": SLURM}, "slurmrestd wants a token over HTTP"),
    ({"secrets": {"slurmToken": {"existingSecret": "x"}}}, "settings.CONTROLPLANE_SLURM__URL is not"),
    (
        {
            "settings": SLURM,
            "secrets": {"slurmToken": {"existingSecret": "x"}, "slurmJwtKey": {"existingSecret": "y"}},
        },
        "keep one way to a Slurm token",
    ),
    ({"secrets": {"databaseUrl": {"existingSecret": "x"}}, "cloudnativepg": {"enabled": True}}, "keep one of the two"),
    (
        {"replicaSets": [{"name": "a", "model": "a", "endpoints": [{"url": "http://a"}]}], "replicaSetsSecret": "x"},
        "keep one of the two",
    ),
    ({"proxy": {"ingress": {"enabled": True}}}, "name at least one host"),
    ({"proxy": {"httpRoute": {"enabled": True}}}, "name the gateway"),
    ({"proxy": {"autoscaling": {"minReplicas": 11}}}, "above maxReplicas"),
    ({"prometheus": {"dcgm": {"enabled": True}}}, "name the compute nodes' exporters"),
    ({"networkPolicy": {"enabled": True}}, "say where PostgreSQL is"),
    (
        {"grafana": {"alerts": {"enabled": True}}, "secrets": {"webhookHmacSecrets": {"existingSecret": "x"}}},
        "CONTROLPLANE_WEBHOOK__HMAC_TIMESTAMP_HEADER: set X-Grafana-Alerting-Timestamp",
    ),
]


@pytest.mark.parametrize(("values", "sentence"), REFUSED, ids=[sentence for _, sentence in REFUSED])
def test_values_that_contradict_each_other_are_refused_in_words(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(helm.HelmError, match=re.escape(sentence)):
        render(values)


@pytest.mark.parametrize(
    "values",
    [
        {"settings": {"CONTROLPLANE_GRAFANA__URL": "http://grafana.monitoring.svc"}},
        {"settings": {"CONTROLPLANE_ALERTMANAGER__URL": "http://alertmanager.monitoring.svc:9093"}},
        {"replicaSets": [{"name": "a", "model": "a", "endpoints": [{"url": "http://10.0.0.7:8000"}]}]},
    ],
    ids=["grafana", "alertmanager", "endpoints"],
)
def test_a_policy_that_would_cut_off_what_the_values_name_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(helm.HelmError, match=r"networkPolicy\.extraEgress: let"):
        render(merged(values_of("site"), **values))
    out = {"networkPolicy": {"extraEgress": [{"to": [{"ipBlock": {"cidr": "10.0.0.7/32"}}]}]}}
    assert render(merged(merged(values_of("site"), **values), **out)).of_kind("NetworkPolicy")


@pytest.mark.parametrize("room", ["slurmrestd", "computeNodes"])
def test_a_policy_that_would_cut_off_slurm_is_refused(room: str) -> None:
    with pytest.raises(helm.HelmError, match=rf"networkPolicy\.{room}\.cidrs: say where"):
        render(merged(values_of("site"), networkPolicy={room: {"cidrs": []}}))


# --- reading ---------------------------------------------------------------------------------------------


def _at(document: Document, path: str) -> Any:
    found: Any = document
    for part in path.split("."):
        found = found[int(part)] if isinstance(found, list) else found[part]
    return found


def _identities(release: Release) -> set[tuple[str, str, str]]:
    return {(one["kind"], one["metadata"]["namespace"], one["metadata"]["name"]) for one in release.documents}


def _pairs(release: Release) -> list[Document]:
    return release.of_kind("Deployment")


def _selected(one: Document) -> dict[str, str]:
    selector = one["spec"]["selector"]
    found: dict[str, str] = selector.get("matchLabels", selector)
    return found


def _secret_files(pod: Document) -> dict[str, str]:
    """The name of each secret file that a pod is given, and of the Secret that has it."""
    volumes = [one for one in pod["spec"].get("volumes", []) if one["name"] == "secrets"]
    sources = [source["secret"] for one in volumes for source in one["projected"]["sources"]]
    return {item["path"]: source["name"] for source in sources for item in source["items"]}


def _data(release: Release) -> dict[str, str]:
    maps = [one["data"] for one in release.of_kind("ConfigMap") if one["metadata"]["name"].endswith("settings")]
    return dict(itertools.chain.from_iterable(one.items() for one in maps))


def _environment(release: Release, container: Document) -> Iterator[tuple[str, str]]:
    for source in container.get("envFrom", []):
        name = source["configMapRef"]["name"]
        yield from next(one for one in release.of_kind("ConfigMap") if one["metadata"]["name"] == name)["data"].items()
    yield from ((one["name"], one["value"]) for one in container.get("env", []))


def _rolled(release: Release) -> dict[str, str]:
    """What makes Kubernetes replace pods, by part; a Job that changes has another name."""
    return {
        one["metadata"]["labels"]["app.kubernetes.io/component"]: one["metadata"]["name"]
        + json.dumps(one["spec"]["template"], sort_keys=True)
        for one in release.of_kind("Deployment", "Job")
    }
