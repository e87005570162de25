"""The shipped alert rules: what Grafana accepts, what Prometheus makes of them, and what they say in which case."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from controlplane.demo.alert_rules import Pace, RuleError, convert, main, quickened
from controlplane.demo.children import program
from tests.unit.rules_rig import (
    ALERTS,
    RULES,
    Series,
    check_firing,
    check_queries,
    control_plane,
    engine,
    selector,
    target,
)

QUEUE = "Requests wait for replicas"
FIRST_TOKEN = "First tokens are slow"
KV_CACHE = "KV cache is full while requests wait"
NO_REPLICA = "Requests find no replica"
LOW_LOAD = "Load fits on one replica fewer"
IDLE = "Model is idle"
UNREACHABLE = "Replica is unreachable"
FROZEN = "Replica is frozen"
FAILING = "Replica fails its requests"
XID = "GPU reports a fatal XID"
GPU_MEMORY = "GPU memory fails"
ACTING = (QUEUE, FIRST_TOKEN, KV_CACHE, NO_REPLICA, LOW_LOAD, IDLE, UNREACHABLE, FROZEN, FAILING, XID, GPU_MEMORY)


def firing(series: Series, expected: Mapping[str, Sequence[str]], *, evaluated_each: str = "10s") -> None:
    """Which of the rules that act, and no others of them, fire at which times."""
    check_firing(series, expected, among=ACTING, evaluated_each=evaluated_each)


ONE_SET = {"replica_set": "s", "model": "m"}
UNSEEN = engine(3, up="0x200", running="_", waiting="_")


def test_a_queue_asks_for_a_replica_until_it_is_nearly_gone() -> None:
    # 30 wait on one of two replicas for 3 min, then 5, between the thresholds, then none
    series = engine(1, waiting="0x12 30x18 5x30 0x100") | engine(2)
    firing(series, {"2m": [], "4m": [QUEUE], "9m": [QUEUE], "14m": []})


def test_a_queue_between_the_thresholds_starts_nothing() -> None:
    firing(engine(1, waiting="3x200"), {"10m": []})


def test_alerts_carry_the_labels_that_the_control_plane_acts_on() -> None:
    series = engine(1, up="1x12 0x100", running="20x12 stale", waiting="0x12 stale") | engine(2)
    labels = {"owner": "controlplane", "action": "replace", "model": "m", "replica_set": "s", "replica": "r1"}
    exposed = {"alertname": UNREACHABLE, "alertstate": "firing", **labels}
    sample = {"labels": selector("ALERTS", exposed), "value": 1}
    query = {"expr": 'ALERTS{alertstate="firing", action!=""}', "eval_time": "6m", "exp_samples": [sample]}
    check_queries(series, [query])


def first_tokens(within_objective: str, all_of_them: str) -> dict[str, str]:
    """In steps of 10 s: how many came within 2.5 s, and how many there were."""
    return {
        target("vllm:time_to_first_token_seconds_bucket", le="2.5"): within_objective,
        target("vllm:time_to_first_token_seconds_bucket", le="+Inf"): all_of_them,
        target("vllm:time_to_first_token_seconds_count"): all_of_them,
    }


BUSY = {**engine(running="20x3000", up="1x3000", waiting="0x3000"), target("vllm:generation_tokens_total"): "0+90x3000"}


def test_slow_first_tokens_ask_for_a_replica_until_they_are_quick_again() -> None:
    # 90 min of quick ones, 30 min in which half of them are slow, and quick ones again
    series = BUSY | first_tokens("0+4x540 2160+2x180 2524+4x1000", "0+4x2000")
    firing(
        series,
        {"90m": [], "100m": [], "118m": [FIRST_TOKEN], "121m": [FIRST_TOKEN], "128m": [], "160m": []},
        evaluated_each="30s",
    )


def test_first_tokens_that_are_a_little_too_slow_for_hours_ask_for_a_replica() -> None:
    series = BUSY | first_tokens("0+17x2000", "0+20x2000")
    firing(series, {"5h": [FIRST_TOKEN]}, evaluated_each="60s")


def test_share_of_slow_first_tokens_near_the_limit_does_not_flap() -> None:
    # 30 % are slow, then 7 %, below the limit and not half of it, then 25 %, for a quarter of an hour each
    series = BUSY | first_tokens("0+7x540 3781+9.3x90 4619+7.5x90 5295+9.3x90 6133+7.5x90", "0+10x1000")
    times = ("85m", "99m", "104m", "115m", "129m", "134m", "145m")
    firing(series, {time: [FIRST_TOKEN] for time in times}, evaluated_each="30s")


@pytest.mark.parametrize(
    ("within_objective", "all_of_them"),
    [
        pytest.param("0+38x2000", "0+40x2000", id="most first tokens are quick"),
        pytest.param("0x2000", "0x2000", id="no traffic"),
        pytest.param("0x600 0x600", "0x600 3x600", id="a few slow ones"),
        pytest.param("0+4x600 2400+0x30 2404+4x600", "0+4x1300", id="all are slow for five minutes of two hours"),
        pytest.param("0+1x200 NaNx600", "0+4x200 NaNx600", id="not a number"),
    ],
)
def test_first_tokens_that_prove_nothing_ask_for_nothing(within_objective: str, all_of_them: str) -> None:
    series = BUSY | first_tokens(within_objective, all_of_them)
    firing(series, {"60m": [], "105m": [], "110m": [], "130m": []}, evaluated_each="30s")


@pytest.mark.parametrize(
    "metrics", [["kv_cache_usage_perc"], ["gpu_cache_usage_perc"], ["kv_cache_usage_perc", "gpu_cache_usage_perc"]]
)
def test_a_full_kv_cache_asks_for_a_replica_only_while_requests_wait(metrics: list[str]) -> None:
    usage = {target(f"vllm:{metric}"): "0.97x200" for metric in metrics}
    firing(engine(waiting="0x30 2x60 0x110") | usage, {"4m": [], "8m": [KV_CACHE], "20m": []})


def test_both_names_of_the_kv_cache_metric_count_once() -> None:
    usage = {target("vllm:kv_cache_usage_perc"): "0.97x200", target("vllm:gpu_cache_usage_perc"): "0x200"}
    firing(engine(waiting="2x200") | usage, {"8m": [KV_CACHE]})


@pytest.mark.parametrize("usage", ["0.5x200", "NaNx200", "_x200"])
def test_a_queue_at_an_engine_with_room_or_of_unknown_room_is_no_shortage_of_cache(usage: str) -> None:
    firing(engine(waiting="2x200") | {target("vllm:kv_cache_usage_perc"): usage}, {"8m": []})


def test_a_kv_cache_between_the_thresholds_starts_nothing_and_ends_nothing() -> None:
    usage = {target("vllm:kv_cache_usage_perc"): "0.8x30 0.95x30 0.8x60 0.6x80"}
    firing(engine(waiting="2x200") | usage, {"4m": [], "8m": [KV_CACHE], "18m": [KV_CACHE], "25m": []})


def test_refused_requests_ask_for_a_first_replica_at_once() -> None:
    refused = {'proxy_requests_total{job="proxy",model="m",tenant="t",code="503"}': "0x6 1+1x6 7x60"}
    firing(refused, {"50s": [], "80s": [NO_REPLICA], "8m": []})


def test_once_a_replica_is_routable_earlier_refusals_ask_for_no_second_one() -> None:
    series = {
        'proxy_requests_total{job="proxy",model="m",tenant="t",code="503"}': "0x6 1+1x6 7x60",
        'controlplane_replicas_routable{replica_set="s",model="m"}': "0x9 1x60",
    }
    firing(series, {"80s": [NO_REPLICA], "100s": [], "2m": []})


def test_requests_for_models_that_nobody_knows_ask_for_nothing() -> None:
    firing({'proxy_requests_total{job="proxy",model="",tenant="t",code="503"}': "0+1x30"}, {"2m": []})


def test_two_control_planes_tell_of_the_same_replicas_once() -> None:
    routable = {selector("controlplane_replicas_routable", {"instance": one, **ONE_SET}): "1x200" for one in "ab"}
    firing(engine(running="1x200") | routable, {"8m": [], "14m": []})


def test_low_load_gives_replicas_back_down_to_the_last_one() -> None:
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
def test_load_that_would_not_fit_keeps_all_replicas(other: dict[str, str]) -> None:
    firing(engine(1, running="0x200") | other, {"6m": [], "8m": [], "9m": []})


def test_pressure_to_scale_down_ends_as_soon_as_load_returns() -> None:
    series = engine(1, running="0x60 9x100") | engine(2, running="0x60 9x100")
    firing(series, {"9m": [LOW_LOAD], "10m10s": []})


def test_an_idle_model_gives_its_last_replica_back() -> None:
    firing(engine(running="0x200"), {"14m": [], "17m": [IDLE]})
    firing(engine(running="0x50 1 0x150"), {"17m": []})
    firing(engine(running="0x200") | UNSEEN, {"17m": []})


@pytest.mark.parametrize("held", ["0x100 1x100", "0x60 1 0 1x138"])
def test_requests_that_wait_in_a_proxy_keep_replicas_though_engines_have_little_to_do(held: str) -> None:
    def proxy(values: str) -> dict[str, str]:
        return {control_plane("proxy_held_requests", "proxy:8080", model="m"): values}

    few = engine(1, running="1x200") | engine(2, running="1x200") | engine(3, running="1x200")
    firing(few | proxy("0x200"), {"8m": [LOW_LOAD], "20m": [LOW_LOAD]})
    firing(few | proxy(held), {"20m": []})
    firing(engine(running="0x200") | proxy("0x200"), {"17m": [IDLE]})
    firing(engine(running="0x200") | proxy(held), {"17m": []})


def test_a_replica_that_went_silent_is_replaced_while_others_answer() -> None:
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
def test_silence_that_proves_nothing_replaces_nothing(series: dict[str, str]) -> None:
    firing(series, {"5m": [], "10m": []})


def test_an_engine_that_makes_no_tokens_of_its_requests_is_replaced() -> None:
    tokens = {
        target("vllm:generation_tokens_total"): "0+90x30 2700x100",
        target("vllm:prompt_tokens_total"): "0+900x30 27000x100",
        target("up", 2): "1x200",
    }
    firing(engine() | tokens, {"6m": [], "10m": [FROZEN]})
    firing(engine(running="20x30 0x100") | tokens, {"10m": []})


def test_an_engine_that_embeds_and_makes_no_tokens_is_not_frozen_while_it_reads() -> None:
    reads = {target("vllm:generation_tokens_total"): "0x200", target("up", 2): "1x200"}
    firing(engine() | reads | {target("vllm:prompt_tokens_total"): "0+900x200"}, {"6m": [], "20m": []})
    firing(engine() | reads | {target("vllm:prompt_tokens_total"): "0+900x30 27000x170"}, {"6m": [], "10m": [FROZEN]})


def ended(**by_reason: str) -> dict[str, str]:
    return {target("vllm:request_success_total", finished_reason=reason): count for reason, count in by_reason.items()}


def test_an_engine_whose_requests_end_with_errors_is_replaced() -> None:
    series = BUSY | ended(stop="0+1x60 60x200", error="0x60 0+1x60 60+0.2x100", length="0x300")
    firing(series, {"10m": [], "18m": [FAILING]})


def test_between_the_thresholds_a_failing_replica_stays_failing_and_others_stay_well() -> None:
    firing(
        BUSY | ended(stop="0+4x60 240+1x60 300+3x100", error="0+1x60 60+9x60 600+1x100"), {"9m": [], "26m": [FAILING]}
    )
    firing(BUSY | ended(stop="0+3x200", error="0+1x200"), {"10m": [], "30m": []})


@pytest.mark.parametrize(
    "finished",
    [
        pytest.param(ended(stop="0+1x200", abort="0+9x200"), id="clients gave up"),
        pytest.param(ended(stop="0x200", error="0x60 3x140"), id="three errors"),
        pytest.param(ended(stop="0x200", error="NaNx200"), id="not a number"),
        pytest.param({}, id="no metrics"),
    ],
)
def test_ends_that_prove_nothing_replace_nothing(finished: dict[str, str]) -> None:
    firing(BUSY | finished, {"12m": [], "20m": []})


# --- nodes -------------------------------------------------------------------------------------------------


def gpu(metric: str, gpu: int = 0, node: str = "n1", **more: str) -> str:
    labels = {"job": "dcgm", "instance": f"{node}:9400", "node": node, "gpu": str(gpu), "UUID": f"GPU-{node}-{gpu}"}
    return selector(metric, {**labels, **more})


def xids(code: int, *, count: bool) -> dict[str, str]:
    """One XID after ten minutes: told as the last one, for ever, and by sites that enabled it as a count of 5 min."""
    last = {
        gpu("DCGM_FI_DEV_XID_ERRORS"): "0x60 stale",
        gpu("DCGM_FI_DEV_XID_ERRORS", err_code=str(code)): f"_x60 {code}x3000",
    }
    counted = {gpu("DCGM_EXP_XID_ERRORS_COUNT", xid=str(code), window_size_in_ms="300000"): "_x60 1x30 stale"}
    return last | (counted if count else {})


RAN = {target("up"): "1x62 stale", target("up", 2): "1x3000"}
"""A job of ours that a fault of its node n1 has ended, and one on n2."""


@pytest.mark.parametrize("count", [True, False])
def test_a_fatal_xid_drains_its_node_for_hours_though_the_job_is_gone(count: bool) -> None:
    series = RAN | xids(79, count=count)
    expected = {"9m": [], "12m": [XID], "40m": [XID], "5h": [XID], "7h": []}
    firing(series, expected, evaluated_each="2m")
    labels = {"owner": "controlplane", "action": "drain_node", "node": "n1", "gpu": "0", "xid": "79"}
    exposed = {"alertname": XID, "alertstate": "firing", **labels}
    sample = {"labels": selector("ALERTS", exposed), "value": 1}
    check_queries(series, [{"expr": 'ALERTS{action="drain_node"}', "eval_time": "15m", "exp_samples": [sample]}])


@pytest.mark.parametrize("code", [13, 31, 43, 45])
@pytest.mark.parametrize("count", [True, False])
def test_an_xid_that_a_program_can_cause_drains_nothing(code: int, count: bool) -> None:
    firing(RAN | xids(code, count=count), {"12m": [], "20m": []})


@pytest.mark.parametrize(
    "series",
    [
        pytest.param({target("up", 2): "1x200"} | xids(79, count=True), id="no job of ours was there"),
        pytest.param(RAN | {gpu("DCGM_FI_DEV_XID_ERRORS"): "79x200"}, id="it was there before anybody looked"),
        pytest.param(RAN | {gpu("DCGM_FI_DEV_XID_ERRORS"): "79x30 _x60 79x100"}, id="it is seen again after a gap"),
        pytest.param(RAN | {gpu("DCGM_FI_DEV_XID_ERRORS"): "0x30 NaNx100"}, id="not a number"),
        pytest.param(RAN | {gpu("DCGM_FI_DEV_XID_ERRORS"): "0x30 stale"}, id="the exporter is gone"),
        pytest.param(
            RAN
            | {
                gpu("DCGM_FI_DEV_XID_ERRORS", err_code="79", slurm_job_id="7"): "79x60 stale",
                gpu("DCGM_FI_DEV_XID_ERRORS", err_code="79", slurm_job_id="8"): "_x60 79x100",
            },
            id="an old one that the next job inherits",
        ),
    ],
)
def test_xids_that_prove_nothing_drain_nothing(series: dict[str, str]) -> None:
    firing(series, {"8m": [], "16m": [], "30m": []})


def test_a_follower_s_node_is_ours_by_the_job_that_its_gpus_are_mapped_to() -> None:
    mapped = {gpu("DCGM_FI_DEV_GPU_UTIL", node="n9", slurm_job_id="2"): "90x200"}
    fault = {gpu("DCGM_FI_DEV_ROW_REMAP_FAILURE", node="n9"): "0x30 1x200"}
    firing(RAN | mapped | fault, {"4m": [], "10m": [GPU_MEMORY]})
    firing(RAN | fault, {"10m": []})


@pytest.mark.parametrize("metric", ["DCGM_FI_DEV_ROW_REMAP_FAILURE", "DCGM_FI_DEV_ECC_DBE_VOL_TOTAL"])
def test_memory_that_fails_drains_its_node_until_it_is_repaired(metric: str) -> None:
    well = {gpu("DCGM_FI_DEV_ROW_REMAP_FAILURE"): "0x400", gpu("DCGM_FI_DEV_ECC_DBE_VOL_TOTAL"): "0x400"}
    firing(RAN | well, {"10m": []})
    firing(RAN | well | {gpu(metric): "0x30 1x200 0x100"}, {"4m": [], "8m": [GPU_MEMORY], "45m": []})
    firing({target("up", 2): "1x400"} | well | {gpu(metric): "0x30 1x200"}, {"8m": []})
    firing(RAN | well | {gpu(metric): "NaNx200"}, {"8m": []})


def test_a_count_of_memory_errors_that_comes_and_goes_for_moments_drains_nothing() -> None:
    firing(RAN | {gpu("DCGM_FI_DEV_ECC_DBE_VOL_TOTAL"): "0x30 1x2 0x100"}, {"6m": [], "10m": []})


def test_no_data_says_nothing() -> None:
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
    assert {group["interval"] for group in yaml.safe_load(rules.read_text())["groups"]} == {"1s", "3s"}


def test_recording_rules_are_quickened_by_range_offset_and_interval_and_keep_their_names(tmp_path: Path) -> None:
    rules = tmp_path / "rules.yml"
    rules.write_text(quickened(RULES, Pace(scale=0.1)))
    subprocess.run([program("promtool"), "check", "rules", rules], capture_output=True, check=True)
    before, after = (yaml.safe_load(path.read_text())["groups"] for path in (RULES, rules))
    assert {group["interval"] for group in after} == {"1s"}
    names = [[rule["record"] for group in groups for rule in group["rules"]] for groups in (before, after)]
    assert names[0] == names[1]
    expressions = {rule["record"]: rule["expr"] for group in after for rule in group["rules"]}
    assert "[360s]" in expressions["model:ttft_objective_missed:ratio1h"]
    assert expressions["gpu:xid_errors:increase5m"].count("offset 30s") == 2
    assert "[90s:6s]" in expressions["gpu:idle"]


def test_what_is_for_people_can_be_left_out() -> None:
    titles = {
        rule["alert"]
        for group in yaml.safe_load(convert(ALERTS, acting_only=True))["groups"]
        for rule in group["rules"]
    }
    assert titles == set(ACTING)


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
