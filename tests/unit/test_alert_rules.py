"""The shipped alert rules: what Grafana accepts, what Prometheus makes of them, and what they say in which case."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from controlplane.demo.alert_rules import Pace, RuleError, convert, main
from controlplane.demo.children import program

ALERTS = Path(__file__).parents[2] / "grafana" / "alerts"
QUEUE = "Requests wait for replicas"
FIRST_TOKEN = "First tokens are slow"
KV_CACHE = "KV cache is full while requests wait"
NO_REPLICA = "Requests find no replica"
LOW_LOAD = "Load fits on one replica fewer"
IDLE = "Model is idle"
UNREACHABLE = "Replica is unreachable"
FROZEN = "Replica is frozen"

Firing = Callable[[Mapping[str, str], Mapping[str, Sequence[str]]], None]


@pytest.fixture(scope="module")
def rule_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rules") / "rules.yml"
    path.write_text(convert(ALERTS))
    return path


def check_queries(rules: Path, series: Mapping[str, str], queries: Sequence[Mapping[str, Any]]) -> None:
    """Feed series, a sample every 10 s, to the rules and compare queries, in the form of promtool's unit tests."""
    test = {
        "interval": "10s",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": queries,
    }
    path = rules.with_name("tests.yml")
    path.write_text(yaml.safe_dump({"rule_files": [str(rules)], "evaluation_interval": "10s", "tests": [test]}))
    run = subprocess.run([program("promtool"), "test", "rules", path], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture
def firing(rule_file: Path) -> Firing:
    """Checks which alerts, and no others, fire at which times after the series began."""

    def check(series: Mapping[str, str], expected: Mapping[str, Sequence[str]]) -> None:
        queries = [
            {
                "expr": 'group by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": time,
                "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in names],
            }
            for time, names in expected.items()
        ]
        check_queries(rule_file, series, queries)

    return check


def target(metric: str, replica: int = 1, **more: str) -> str:
    """A series of the replica's engine; without more labels, as scraped from a replica that Slurm runs."""
    labels = {
        "job": "vllm",
        "instance": f"n{replica}:8000",
        "model": "m",
        "replica_set": "s",
        "replica": f"r{replica}",
        "slurm_job_id": str(replica),
        **({} if metric == "up" else {"model_name": "served", "engine": "0"}),
        **more,
    }
    return metric + "{" + ",".join(f'{name}="{value}"' for name, value in labels.items()) + "}"


def engine(replica: int = 1, *, up: str = "1x200", running: str = "20x200", waiting: str = "0x200") -> dict[str, str]:
    return {
        target("up", replica): up,
        target("vllm:num_requests_running", replica): running,
        target("vllm:num_requests_waiting", replica): waiting,
    }


UNSEEN = engine(3, up="0x200", running="_", waiting="_")


def test_a_queue_asks_for_a_replica_until_it_is_nearly_gone(firing: Firing) -> None:
    # 30 wait on one of two replicas for 3 min, then 5, between the thresholds, then none
    series = engine(1, waiting="0x12 30x18 5x30 0x100") | engine(2)
    firing(series, {"2m": [], "4m": [QUEUE], "9m": [QUEUE], "14m": []})


def test_a_queue_between_the_thresholds_starts_nothing(firing: Firing) -> None:
    firing(engine(1, waiting="3x200"), {"10m": []})


def test_alerts_carry_the_labels_that_the_control_plane_acts_on(rule_file: Path) -> None:
    series = engine(1, up="1x12 0x100", running="20x12 stale", waiting="0x12 stale") | engine(2)
    labels = {"owner": "controlplane", "action": "replace", "model": "m", "replica_set": "s", "replica": "r1"}
    exposed = {"alertname": UNREACHABLE, "alertstate": "firing", **labels}
    sample = {"labels": "ALERTS{" + ",".join(f'{key}="{value}"' for key, value in exposed.items()) + "}", "value": 1}
    query = {"expr": 'ALERTS{alertstate="firing"}', "eval_time": "6m", "exp_samples": [sample]}
    check_queries(rule_file, series, [query])


def first_tokens(within_objective: str, all_of_them: str) -> dict[str, str]:
    return {
        target("vllm:time_to_first_token_seconds_bucket", le="2.5"): within_objective,
        target("vllm:time_to_first_token_seconds_count"): all_of_them,
    }


def test_slow_first_tokens_ask_for_a_replica(firing: Firing) -> None:
    series = engine() | first_tokens("0+2x30 60+4x200", "0+4x30 120+4x200")
    firing(series, {"5m": [FIRST_TOKEN], "15m": []})


@pytest.mark.parametrize(
    ("within_objective", "all_of_them"),
    [
        pytest.param("0+38x200", "0+40x200", id="most first tokens are quick"),
        pytest.param("0x200", "0x200", id="no traffic"),
        pytest.param("0x60 0x140", "0x60 3x140", id="a few slow ones"),
    ],
)
def test_first_tokens_that_prove_nothing_ask_for_nothing(
    firing: Firing, within_objective: str, all_of_them: str
) -> None:
    firing(engine() | first_tokens(within_objective, all_of_them), {"5m": [], "11m": [], "20m": []})


@pytest.mark.parametrize(
    "metrics", [["kv_cache_usage_perc"], ["gpu_cache_usage_perc"], ["kv_cache_usage_perc", "gpu_cache_usage_perc"]]
)
def test_a_full_kv_cache_asks_for_a_replica_only_while_requests_wait(firing: Firing, metrics: list[str]) -> None:
    usage = {target(f"vllm:{metric}"): "0.97x200" for metric in metrics}
    firing(engine(waiting="0x30 2x60 0x110") | usage, {"4m": [], "8m": [KV_CACHE], "20m": []})


def test_both_names_of_the_kv_cache_metric_count_once(firing: Firing) -> None:
    usage = {target("vllm:kv_cache_usage_perc"): "0.97x200", target("vllm:gpu_cache_usage_perc"): "0x200"}
    firing(engine(waiting="2x200") | usage, {"8m": [KV_CACHE]})


def test_refused_requests_ask_for_a_first_replica_at_once(firing: Firing) -> None:
    refused = {'proxy_requests_total{job="proxy",model="m",tenant="t",code="503"}': "0x6 1+1x6 7x60"}
    firing(refused, {"50s": [], "80s": [NO_REPLICA], "8m": []})


def test_once_a_replica_is_routable_earlier_refusals_ask_for_no_second_one(firing: Firing) -> None:
    series = {
        'proxy_requests_total{job="proxy",model="m",tenant="t",code="503"}': "0x6 1+1x6 7x60",
        'controlplane_replicas_routable{replica_set="s",model="m"}': "0x9 1x60",
    }
    firing(series, {"80s": [NO_REPLICA], "100s": [], "2m": []})


def test_requests_for_models_that_nobody_knows_ask_for_nothing(firing: Firing) -> None:
    firing({'proxy_requests_total{job="proxy",model="",tenant="t",code="503"}': "0+1x30"}, {"2m": []})


def test_low_load_gives_replicas_back_down_to_the_last_one(firing: Firing) -> None:
    idle_later = "20x30 0x200"
    three = {**engine(1, running=idle_later), **engine(2, running=idle_later), **engine(3, running=idle_later)}
    firing(three, {"5m": [], "10m": [], "12m": [LOW_LOAD]})
    two = {**engine(1, running="2x200"), **engine(2, running="1x200")}
    firing(two, {"4m": [], "10m": [LOW_LOAD]})
    firing(engine(1, running="1x200"), {"10m": [], "20m": []})


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(engine(2, running="5x200"), id="five at a time on one replica fewer"),
        pytest.param(
            engine(2, running="1x200", waiting="0x15 1 0x15 1 0x15 1 0x150"), id="something waits now and then"
        ),
        pytest.param(engine(2, running="0x200") | UNSEEN, id="a replica starts or is out of sight"),
        pytest.param(
            engine(2, running="0x200") | {'controlplane_replicas_routable{replica_set="s",model="m"}': "1x200"},
            id="the other replica drains already",
        ),
    ],
)
def test_load_that_would_not_fit_keeps_all_replicas(firing: Firing, other: dict[str, str]) -> None:
    firing(engine(1, running="0x200") | other, {"6m": [], "8m": [], "9m": []})


def test_pressure_to_scale_down_ends_as_soon_as_load_returns(firing: Firing) -> None:
    series = engine(1, running="0x60 9x100") | engine(2, running="0x60 9x100")
    firing(series, {"9m": [LOW_LOAD], "10m10s": []})


def test_an_idle_model_gives_its_last_replica_back(firing: Firing) -> None:
    firing(engine(running="0x200"), {"14m": [], "17m": [IDLE]})
    firing(engine(running="0x50 1 0x150"), {"17m": []})
    firing(engine(running="0x200") | UNSEEN, {"17m": []})


def test_a_replica_that_went_silent_is_replaced_while_others_answer(firing: Firing) -> None:
    silent = engine(1, up="1x12 0x180", running="20x12 stale", waiting="0x12 stale")
    firing(silent | engine(2), {"3m": [], "5m": [UNREACHABLE]})


@pytest.mark.parametrize(
    "series",
    [
        pytest.param(engine(1, up="0x100", running="_", waiting="_") | engine(2), id="it never answered: it starts"),
        pytest.param(engine(1, up="1x12 0x180") | engine(2, up="1x12 0x180"), id="nobody answers: Prometheus is blind"),
        pytest.param({target("up", 1, slurm_job_id=""): "1x12 0x180"} | engine(2), id="Slurm does not run it"),
    ],
)
def test_silence_that_proves_nothing_replaces_nothing(firing: Firing, series: dict[str, str]) -> None:
    firing(series, {"5m": [], "10m": []})


def test_an_engine_that_makes_no_tokens_of_its_requests_is_replaced(firing: Firing) -> None:
    tokens = {target("vllm:generation_tokens_total"): "0+90x30 2700x100", target("up", 2): "1x200"}
    firing(engine() | tokens, {"6m": [], "10m": [FROZEN]})
    firing(engine(running="20x30 0x100") | tokens, {"10m": []})


def test_no_data_says_nothing(firing: Firing) -> None:
    firing({}, {"20m": []})
    firing(engine(up="0x200", running="_", waiting="_"), {"5m": [], "20m": []})


def test_scaled_rules_keep_thresholds_and_shorten_times(tmp_path: Path) -> None:
    rules = tmp_path / "rules.yml"
    rules.write_text(convert(ALERTS, Pace(scale=0.1, shortest_range_seconds=8)))
    subprocess.run([program("promtool"), "check", "rules", rules], capture_output=True, check=True)
    [queue] = [
        rule
        for group in yaml.safe_load(rules.read_text())["groups"]
        for rule in group["rules"]
        if rule["alert"] == QUEUE
    ]
    assert (queue["for"], queue["keep_firing_for"]) == ("3s", "6s")
    assert set(re.findall(r"\[(.*?)\]", queue["expr"])) == {"8s"}
    assert " > 4\n" in queue["expr"]
    assert {group["interval"] for group in yaml.safe_load(rules.read_text())["groups"]} == {"1s"}


# --- what Grafana needs, and does not say when it lacks it -------------------------------------------------


def provisioned_groups() -> list[dict[str, Any]]:
    contents = [yaml.safe_load(path.read_text()) for path in sorted(ALERTS.glob("*.yaml"))]
    return [group for content in contents for group in content.get("groups", [])]


def provisioned_rules() -> list[dict[str, Any]]:
    return [rule for group in provisioned_groups() for rule in group["rules"]]


def test_uids_and_titles_are_unique_and_short_enough_and_intervals_are_ticks() -> None:
    rules = provisioned_rules()
    assert len({rule["uid"] for rule in rules}) == len({rule["title"] for rule in rules}) == len(rules)
    assert all(len(rule["uid"]) <= 40 for rule in rules)
    assert {int(group["interval"].removesuffix("s")) % 10 for group in provisioned_groups()} == {0}


def test_not_knowing_never_scales() -> None:
    assert {(rule["noDataState"], rule["execErrState"]) for rule in provisioned_rules()} == {("OK", "KeepLast")}


def test_every_rule_names_a_contact_point_that_exists_and_one_group_per_subject() -> None:
    points = yaml.safe_load((ALERTS / "contact-points.yaml").read_text())["contactPoints"]
    for rule in provisioned_rules():
        settings = rule["notification_settings"]
        assert settings["receiver"] in {point["name"] for point in points}
        subject = {"replica"} if rule["labels"]["action"] == "replace" else set()
        assert set(settings["group_by"]) == {"grafana_folder", "alertname", "model"} | subject


def test_secrets_of_contact_points_come_from_the_environment_and_no_policies_are_replaced() -> None:
    assert not [path for path in ALERTS.glob("*.yaml") if "policies" in yaml.safe_load(path.read_text())]
    text = (ALERTS / "contact-points.yaml").read_text()
    secrets = re.findall(r"(?:secret|authorization_credentials|url): (.*)", text)
    assert secrets
    assert all(re.fullmatch(r"\$CONTROLPLANE_WEBHOOK_[A-Z_]+", secret) for secret in secrets)


# --- what the converter refuses ------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], None]


def changed(*path: str | int, to: object) -> Change:
    def change(rule: dict[str, Any]) -> None:
        inner: Any = rule
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (changed("fore", to="1m"), "has unknown keys: fore"),
        (changed("for", to="soon"), ".for: must be a duration"),
        (changed("condition", to="Z"), ".condition: there is no Z in data"),
        (changed("data", 0, "model", "instant", to=False), ".data[0].model.instant: must be True"),
        (changed("data", 0, "model", "expr", to="up[5 minutes]"), "[5 minutes]: must be a duration"),
        (changed("data", 1, "model", "settings", to={"mode": ""}), ".settings.mode: must be 'dropNN'"),
        (changed("data", 2, "model", "type", to="math"), ".type: must be 'threshold'"),
        (changed("data", 2, "model", "conditions", 0, "evaluator", "type", to="eq"), "must be one of gt, lt"),
        (changed("data", 2, "model", "conditions", 0, "unloadEvaluator", "type", to="gt"), "of the other type"),
        (changed("labels", "model", to="{{ $labels.model }}"), '.labels.model: a single "$"'),
        (changed("labels", "model", to="{{ $$values.B.Value }}"), "makes a new alert each time"),
        (changed("annotations", "summary", to="{{ $$labels.model }}"), ".annotations.summary: "),
        (changed("annotations", "summary", to="{{ $values.A.Value }}"), "only $values.B.Value"),
    ],
)
def test_what_prometheus_or_grafana_would_misread_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Change, complaint: str
) -> None:
    content = yaml.safe_load((ALERTS / "scale-up.yaml").read_text())
    change(content["groups"][0]["rules"][0])
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(RuleError) as caught:
        convert(tmp_path)
    assert str(caught.value).startswith("wrong.yaml: rule controlplane-queue")
    assert complaint in str(caught.value)
    assert main([str(tmp_path)]) == 2
    assert str(caught.value) in capsys.readouterr().err


def test_ranges_inside_strings_are_left_alone(tmp_path: Path) -> None:
    content = yaml.safe_load((ALERTS / "scale-up.yaml").read_text())
    content["groups"][0]["rules"][0]["data"][0]["model"]["expr"] = 'max_over_time(up{node=~"n[1m]\\"[5m]"}[10m:20s])'
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(content))
    converted = convert(tmp_path, Pace(scale=0.5))
    assert 'up{node=~"n[1m]\\"[5m]"}[300s:10s]' in converted


def test_the_command_line_writes_what_prometheus_reads(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(ALERTS), "--time-scale", "0.1"]) == 0
    assert capsys.readouterr().out == convert(ALERTS, Pace(scale=0.1))
