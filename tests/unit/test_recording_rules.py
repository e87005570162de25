"""What prometheus/rules.yaml makes of the metrics of vLLM 0.6.6 to 0.33 and of dcgm-exporter, as files tell them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from controlplane.demo.children import program
from controlplane.demo.prometheus import DCGM_RELABELLING
from tests.unit.rules_rig import ROOT, RULES, Series, check_queries, selector, target

FIXTURES = ROOT / "tests" / "fixtures"
BY_VERSION = sorted((FIXTURES / "vllm" / "by-version").glob("*.txt"))
REPLICA = {"model": "m", "replica_set": "s", "replica": "r1", "node": "n1", "slurm_job_id": "4711"}
ITS_TARGET = {"job": "vllm", "instance": "n1:20000", **REPLICA}
OURS = re.compile(r"(replica|model|node|gpu):\w+(:\w+)?")
NAMES = {
    "replica:requests_running",
    "replica:requests_waiting",
    "replica:kv_cache_usage:ratio",
    "replica:generation_tokens:rate1m",
    "replica:prompt_tokens:rate1m",
    "replica:preemptions:rate5m",
    "replica:requests_finished:rate5m",
    "replica:prefix_cache_hits:ratio5m",
    "replica:time_to_first_token_seconds_bucket:rate5m",
    "replica:inter_token_latency_seconds_bucket:rate5m",
    "replica:e2e_request_latency_seconds_bucket:rate5m",
    "replica:request_queue_time_seconds_bucket:rate5m",
    "model:requests_running:sum",
    "model:requests_waiting:sum",
    "model:replicas_ready:count",
    "model:kv_cache_usage:p90",
    "model:generation_tokens:rate1m",
    "model:time_to_first_token_seconds_bucket:rate5m",
    "model:ttft_objective_missed:ratio5m",
    "model:ttft_objective_missed:ratio30m",
    "model:ttft_objective_missed:ratio1h",
    "model:ttft_objective_missed:ratio6h",
    "node:gpu_utilisation:ratio",
    "node:gpu_power_watts:sum",
    "gpu:xid_errors:increase5m",
    "gpu:idle",
}
"""What dashboards and alert rules, and sites with boards of their own, go by."""


def scraped(path: Path, labels: Mapping[str, str], *, steps: int = 60) -> dict[str, str]:
    """The file as a target with these labels that is scraped every 10 s; counters rise each time by what they say."""
    series = {}
    for family in text_string_to_metric_families(path.read_text()):
        for sample in family.samples:
            rises = family.type in ("counter", "histogram") and not sample.name.endswith("_created")
            value = f"{sample.value:f}"
            series[selector(sample.name, {**labels, **sample.labels})] = (
                f"{value}{f'+{value}' if rises else ''}x{steps}"
            )
    return series


def recorded(series: Series, expected: Mapping[str, float | None], *, time: str = "8m") -> None:
    """Compare recorded series at a time; None: there is none."""
    queries = []
    for name, value in expected.items():
        metric, _, labels = name.partition("{")
        samples = [] if value is None else [{"labels": name, "value": value}]
        queries.append({"expr": name if labels else metric, "eval_time": time, "exp_samples": samples})
    check_queries(series, queries)


def of_replica(name: str, **more: str) -> str:
    return selector(name, {**REPLICA, **more})


def of_model(name: str, **more: str) -> str:
    return selector(name, {"model": "m", **more})


LOAD: Mapping[str, float | None] = {
    of_replica("replica:requests_running"): 3,
    of_replica("replica:requests_waiting"): 2,
    of_replica("replica:kv_cache_usage:ratio"): 0.5,
    of_replica("replica:generation_tokens:rate1m"): 100,
    of_replica("replica:prompt_tokens:rate1m"): 50,
    of_replica("replica:preemptions:rate5m"): 0.1,
    of_replica("replica:requests_finished:rate5m", finished_reason="stop"): 0.6,
    of_replica("replica:requests_finished:rate5m", finished_reason="length"): 0.4,
    of_replica("replica:prefix_cache_hits:ratio5m"): 0.25,
    of_replica("replica:time_to_first_token_seconds_bucket:rate5m", le="2.5"): 0.8,
    of_replica("replica:inter_token_latency_seconds_bucket:rate5m", le="0.05"): 90,
    of_replica("replica:e2e_request_latency_seconds_bucket:rate5m", le="2.5"): 0.5,
    of_replica("replica:request_queue_time_seconds_bucket:rate5m", le="+Inf"): 1,
    of_model("model:requests_running:sum"): 3,
    of_model("model:requests_waiting:sum"): 2,
    of_model("model:replicas_ready:count"): 1,
    of_model("model:kv_cache_usage:p90"): 0.5,
    of_model("model:generation_tokens:rate1m"): 100,
    of_model("model:time_to_first_token_seconds_bucket:rate5m", le="+Inf"): 1,
    of_model("model:ttft_objective_missed:ratio5m"): 0.2,
    of_model("model:ttft_objective_missed:ratio30m"): 0.2,
    of_model("model:ttft_objective_missed:ratio1h"): 0.2,
    of_model("model:ttft_objective_missed:ratio6h"): 0.2,
}


def rounded(expected: Mapping[str, float | None]) -> Iterator[Mapping[str, object]]:
    """Queries that forgive the last digits of a division."""
    for name, value in expected.items():
        labels = "{" + name.partition("{")[2]
        yield {"expr": f"round({name}, 1e-6)", "eval_time": "8m", "exp_samples": [{"labels": labels, "value": value}]}


@pytest.mark.parametrize("path", BY_VERSION, ids=lambda path: path.stem)
def test_releases_with_other_names_for_the_same_load_are_recorded_alike(path: Path) -> None:
    check_queries(scraped(path, ITS_TARGET), list(rounded(LOAD)))


def test_every_name_that_is_promised_is_recorded_and_no_other() -> None:
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    assert [rule for rule in rules if rule.keys() != {"record", "expr"}] == []
    assert {rule["record"] for rule in rules} == NAMES
    assert len(rules) == len(NAMES)


def test_alert_rules_and_recording_rules_read_no_recorded_name_that_nobody_records() -> None:
    for path in (RULES, *(ROOT / "grafana" / "alerts").glob("*.yaml")):
        text = re.sub(r"#.*", "", path.read_text()).replace("(5m|1h)", "5m").replace("(5m|30m|6h)", "5m")
        used = {match[0] for match in OURS.finditer(text) if not match[0].startswith("node: ")}
        assert used <= NAMES, path.name


def test_engines_of_one_replica_as_recorded_of_two_ranks_are_added_up() -> None:
    path = FIXTURES / "vllm" / "metrics-dp2-after-load.txt"
    expected = {
        of_replica("replica:requests_running"): 0,
        of_replica("replica:kv_cache_usage:ratio"): 0,
        of_replica("replica:generation_tokens:rate1m"): 3600,
        of_replica("replica:prefix_cache_hits:ratio5m"): 0,
        of_replica("replica:requests_finished:rate5m", finished_reason="length"): 0.6,
        of_replica("replica:inter_token_latency_seconds_bucket:rate5m", le="2.5"): 3599.4,
        of_model("model:replicas_ready:count"): 1,
        of_model("model:ttft_objective_missed:ratio5m"): 0.666667,
    }
    check_queries(scraped(path, ITS_TARGET), list(rounded(expected)))


def test_a_recorded_shortage_of_kv_cache_is_seen() -> None:
    path = FIXTURES / "vllm" / "metrics-kv-pressure-95pct.txt"
    expected = {
        of_replica("replica:requests_running"): 4.0,
        of_replica("replica:requests_waiting"): 8.0,
        of_model("model:kv_cache_usage:p90"): 0.952381,
    }
    check_queries(scraped(path, ITS_TARGET), list(rounded(expected)))


def test_replicas_of_a_model_are_added_up_and_servers_that_slurm_does_not_run_are_among_them() -> None:
    box = {"job": "vllm", "model": "m", "replica_set": "box"}
    path = FIXTURES / "vllm" / "by-version" / "0.33.0.txt"
    series = scraped(path, ITS_TARGET)
    for instance in ("h1:8000", "h2:8000"):
        series |= scraped(path, {**box, "instance": instance})
    recorded(
        series,
        {
            of_model("model:requests_running:sum"): 9,
            of_model("model:replicas_ready:count"): 3,
            of_model("model:generation_tokens:rate1m"): 300,
        },
    )


def test_nothing_is_recorded_of_what_is_not_known() -> None:
    gone = {target("vllm:num_requests_running"): "3x20 stale", target("vllm:kv_cache_usage_perc"): "0.5x20 stale"}
    recorded(gone, dict.fromkeys(NAMES, None))


@pytest.mark.parametrize("hits", ["0x60", "NaNx60"])
def test_no_ratio_is_made_where_nothing_happened_or_of_what_is_no_number(hits: str) -> None:
    series = {
        target("vllm:prefix_cache_queries_total"): "0x60",
        target("vllm:prefix_cache_hits_total"): hits,
        target("vllm:time_to_first_token_seconds_bucket", le="2.5"): hits,
        target("vllm:time_to_first_token_seconds_count"): "0x60",
        target("vllm:num_requests_running"): "NaNx60",
        target("vllm:kv_cache_usage_perc"): "NaNx60",
        target("vllm:gpu_prefix_cache_hit_rate"): "-1x60",
    }
    names = ["replica:prefix_cache_hits:ratio5m", "model:ttft_objective_missed:ratio5m", "replica:kv_cache_usage:ratio"]
    recorded(series, dict.fromkeys([*names, "replica:requests_running", "model:requests_running:sum"], None))


def test_the_old_and_the_new_histogram_of_one_replica_are_not_mixed() -> None:
    series = {
        target("vllm:inter_token_latency_seconds_bucket", le="0.05"): "0+10x60",
        target("vllm:time_per_output_token_seconds_bucket", le="0.05"): "0+10x60",
        target("vllm:time_per_output_token_seconds_bucket", le="0.07"): "0+10x60",
    }
    query = {"expr": "count(replica:inter_token_latency_seconds_bucket:rate5m)", "eval_time": "8m"}
    check_queries(series, [{**query, "exp_samples": [{"labels": "{}", "value": 1}]}])


# --- GPUs --------------------------------------------------------------------------------------------------


def gpu_series(metric: str, values: str, **more: str) -> dict[str, str]:
    labels = {"instance": "n1:9400", "node": "n1", "gpu": "0", "UUID": "GPU-0", **more}
    return {selector(metric, labels): values}


def relabelled(path: Path) -> dict[str, str]:
    """As dcgm-exporter's series arrive, with the labels that relabelling makes."""
    text = re.sub(r'[Hh]ostname="(\w+)\.site"', r'hostname="\1.site",node="\1"', path.read_text())
    series = {}
    for family in text_string_to_metric_families(text.replace("hpc_job=", "slurm_job_id=")):
        for sample in family.samples:
            values = f"{sample.value:f}x150"
            series[selector(sample.name, {"job": "dcgm", "instance": "n1:9400", **sample.labels})] = values
    return series


@pytest.mark.parametrize("name", ["metrics-4.5.3.txt", "metrics-next.txt"])
def test_a_gpu_that_two_jobs_are_mapped_to_counts_once(name: str) -> None:
    recorded(
        relabelled(FIXTURES / "dcgm" / name),
        {
            'node:gpu_utilisation:ratio{node="n1"}': 0.45,
            'node:gpu_power_watts:sum{node="n1"}': 670.75,
            'gpu:xid_errors:increase5m{node="n1", gpu="1", UUID="GPU-1", xid="79"}': 1,
            'gpu:idle{node="n1", gpu="0", UUID="GPU-0", slurm_job_id="4711"}': 0,
            'gpu:idle{node="n1", gpu="1"}': None,
        },
        time="20m",
    )


def test_a_gpu_that_a_job_holds_and_does_not_use_is_idle_after_a_quarter_of_an_hour() -> None:
    name = 'gpu:idle{node="n1", gpu="0", UUID="GPU-0", slurm_job_id="7"}'
    series = gpu_series("DCGM_FI_DEV_GPU_UTIL", "0x100 60x6 0x200", slurm_job_id="7")
    for time, value in {"5m": 0, "13m": 0, "16m": 1, "18m": 0, "30m": 0, "36m": 1}.items():
        recorded(series, {name: value}, time=time)


def test_a_new_xid_is_seen_for_five_minutes_where_only_the_last_one_is_told() -> None:
    name = 'gpu:xid_errors:increase5m{node="n1", gpu="0", UUID="GPU-0", xid="31"}'
    series = gpu_series("DCGM_FI_DEV_XID_ERRORS", "0x60 _x200") | gpu_series(
        "DCGM_FI_DEV_XID_ERRORS", "_x60 31x200", err_code="31"
    )
    for time, value in {"9m": None, "12m": 1, "14m": 1, "17m": None, "30m": None}.items():
        recorded(series, {name: value}, time=time)


# --- Prometheus' configuration -----------------------------------------------------------------------------


def test_prometheus_takes_the_configuration_and_the_rules() -> None:
    for what, path in (("config", ROOT / "prometheus" / "prometheus.yaml"), ("rules", RULES)):
        run = subprocess.run([program("promtool"), "check", what, path], capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr


def test_the_demo_relabels_gpus_as_sites_do() -> None:
    jobs = {
        job["job_name"]: job
        for job in yaml.safe_load((ROOT / "prometheus" / "prometheus.yaml").read_text())["scrape_configs"]
    }
    assert jobs.keys() == {"vllm", "controlplane", "dcgm"}
    assert jobs["dcgm"]["metric_relabel_configs"] == list(DCGM_RELABELLING)
