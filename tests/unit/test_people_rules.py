"""The rules for people: what each fires on, that it does not flap, and that it says nothing where nothing is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from tests.unit.rules_rig import Series, check_firing, check_queries, control_plane, engine, selector

REPLICAS_MISSING = "Replicas are missing"
SUBMIT_FAILING = "Jobs cannot be submitted"
TOKEN_EXPIRING = "Slurm token is about to expire"
PENDING_LONG = "Job waits long in Slurm"
CRASH_LOOP = "Replicas fail again and again"
METRICS_MISSING = "Metrics are missing"
NOBODY_RECONCILES = "Nobody reconciles"
NODE_EXCLUDED = "Nodes are kept out"
BUDGET = "Token budget is nearly spent"
HAND_OVER_LATE = "Hand-over is late"

EACH = "30s"
SET = {"replica_set": "s"}
SERVED = {"replica_set": "s", "model": "m"}
PROXY = selector("proxy_workers", {"job": "controlplane", "instance": "proxy:8080"})


def site(instance: str = "cp1:9100", **changed: str) -> dict[str, str]:
    """A control plane and a proxy that are well, but for these."""
    values = {
        "database_up": "1x500",
        "lease_held": "1x500",
        "desired": "2x500",
        "routable": "2x500",
        "paused": "0x500",
        "back_off": "0x500",
        "late": "0x500",
        "excluded": "0x500",
        "token": "86400-10x500",
        **changed,
    }
    series = {
        control_plane("controlplane_database_up", instance): "database_up",
        control_plane("controlplane_lease_held", instance): "lease_held",
        control_plane("controlplane_replicas_desired", instance, **SERVED): "desired",
        control_plane("controlplane_replicas_routable", instance, **SERVED): "routable",
        control_plane("controlplane_paused", instance, **SET): "paused",
        control_plane("controlplane_back_off", instance, **SET): "back_off",
        control_plane("controlplane_hand_over_late", instance, **SET): "late",
        control_plane("controlplane_nodes_excluded", instance, cause="alert"): "excluded",
        control_plane("controlplane_slurm_token_expiry_seconds", instance): "token",
    }
    return {PROXY: "1x500"} | {name: values[key] for name, key in series.items()}


VLLM = engine(1, up="1x500", running="2x500", waiting="0x500") | engine(2, up="1x500", running="2x500", waiting="0x500")


def told(series: Series, expected: Mapping[str, Sequence[str]]) -> None:
    """All rules are looked at, those that act included: nothing else fires."""
    check_firing({**VLLM, **series}, expected, evaluated_each=EACH)


def test_a_site_that_is_well_tells_people_nothing() -> None:
    told(site(), {"1m": [], "10m": [], "40m": []})


def test_two_control_planes_that_tell_the_same_are_one() -> None:
    told(site() | site("cp2:9100", lease_held="0x500"), {"10m": [], "40m": []})
    late = {"late": "0x30 1x100 0x200", "desired": "2x500"}
    told(site(**late) | site("cp2:9100", lease_held="0x500", **late), {"10m": [HAND_OVER_LATE], "40m": []})


# --- replicas are missing


def test_replicas_that_are_missing_for_long_are_told() -> None:
    told(site(routable="2x30 1x200 2x200"), {"20m": [], "30m": [REPLICAS_MISSING], "45m": []})


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"routable": "2x30 1x100 2x10 1x100 2x300"}, id="each start takes its time"),
        pytest.param({"routable": "2x30 0x400", "paused": "0x30 1x400"}, id="it is paused"),
        pytest.param({"desired": "0x500", "routable": "3x500"}, id="more than wanted: fixed endpoints"),
        pytest.param({"routable": "2x30 NaNx400"}, id="not a number"),
        pytest.param({"routable": "2x30 stale", "desired": "2x30 stale"}, id="the control plane is not seen"),
    ],
)
def test_replicas_that_are_not_missing_are_not_told(changed: dict[str, str]) -> None:
    check_firing(VLLM | site(**changed), {"25m": [], "50m": []}, among=[REPLICAS_MISSING], evaluated_each=EACH)


# --- Slurm


def calls(values: str, operation: str = "submit", outcome: str = "unreachable") -> dict[str, str]:
    name = "controlplane_slurm_request_seconds_count"
    return {control_plane(name, operation=operation, outcome=outcome): values}


def test_submits_that_fail_are_told_until_they_have_worked_for_a_while() -> None:
    told(site() | calls("0x30 1+1x60 61x400"), {"4m": [], "10m": [SUBMIT_FAILING], "20m": [SUBMIT_FAILING], "45m": []})


def test_submits_that_fail_are_told_however_many_other_calls_work() -> None:
    series = site() | calls("0+0.1x500", outcome="rejected") | calls("0+5x500", "list", "ok")
    told(series, {"20m": [SUBMIT_FAILING], "60m": [SUBMIT_FAILING]})


def test_failures_that_come_slowly_do_not_flap() -> None:
    """Four in 15 minutes, then three, then two, then four."""
    steps = "0x30 0+0.05x90 4.5+0.035x90 7.65+0.025x90 9.9+0.05x90"
    told(site() | calls(steps), {time: [SUBMIT_FAILING] for time in ("19m", "30m", "40m", "50m", "60m")})


@pytest.mark.parametrize(
    "series",
    [
        pytest.param(calls("0+5x500", outcome="ok"), id="all work"),
        pytest.param(calls("0+1x500", outcome="abandoned"), id="nobody waited for the answer"),
        pytest.param(calls("0x100 1x400"), id="one failed"),
        pytest.param(calls("0+1x500", operation="diag"), id="nothing needs it"),
        pytest.param(
            calls("0x60 0+1x6 6x434", "list") | calls("0+2x500", "list", "ok"), id="slurmctld was started anew"
        ),
        pytest.param(calls("NaNx500"), id="not a number"),
        pytest.param(calls("900x30 _x100 900x300"), id="old failures that are seen again"),
    ],
)
def test_calls_that_do_not_keep_jobs_from_being_submitted_are_not_told(series: dict[str, str]) -> None:
    told(site() | series, {"10m": [], "20m": [], "40m": []})


def test_a_token_that_nobody_renews_is_told_before_it_ends() -> None:
    told(site(token="3600-10x350 3600-10x100"), {"50m": [], "57m": [TOKEN_EXPIRING], "62m": []})


@pytest.mark.parametrize(
    "token",
    [
        pytest.param("45 44 45 43 45x490", id="tokens of a minute, always new"),
        pytest.param("1800-10x150 1800-10x150 1800-10x150", id="renewed when a sixth is left"),
        pytest.param("NaNx450", id="a token that does not say"),
        pytest.param("3600-10x300 NaNx200", id="Slurm is away"),
        pytest.param("_x450", id="nothing is known"),
    ],
)
def test_tokens_that_are_renewed_or_do_not_say_are_not_told(token: str) -> None:
    told(site(token=token), {"24m": [], "49m": [], "53m": [], "70m": []})


def pending(values: str, reason: str = "Resources") -> dict[str, str]:
    return {control_plane("controlplane_slurm_job_pending_seconds", **SET, reason=reason): values}


def test_a_job_that_waits_long_is_told_whatever_slurm_says_why() -> None:
    series = pending("0+10x240 stale") | pending("_x240 2410+10x60 stale", "Priority")
    told(site() | series, {"25m": [], "33m": [PENDING_LONG], "45m": [PENDING_LONG], "55m": []})


@pytest.mark.parametrize("values", ["0+10x170 0+10x170", "NaNx400", "0x400"])
def test_jobs_that_start_in_time_are_not_told(values: str) -> None:
    told(site() | pending(values), {"20m": [], "29m": [], "50m": []})


# --- failing and late


def test_failures_in_a_row_are_told_until_a_replica_starts() -> None:
    steps = "0x30 1x30 2x30 3x30 2x30 5x60 0x100"
    told(site(back_off=steps), {"8m": [], "14m": [], "18m": [CRASH_LOOP], "23m": [CRASH_LOOP], "40m": []})


@pytest.mark.parametrize("back_off", ["1x400", "2x400", "NaNx400", "_x400"])
def test_a_failure_or_two_are_not_told(back_off: str) -> None:
    told(site(back_off=back_off), {"20m": [], "40m": []})


def test_a_hand_over_that_is_late_is_told() -> None:
    told(site(late="0x30 1x30 0x200"), {"6m": [], "9m": [HAND_OVER_LATE], "15m": []})
    told(site(late="0x30 1x6 0x30 NaNx100"), {"7m": [], "12m": [], "25m": []})


# --- nodes and tenants


def test_nodes_that_are_kept_out_are_told_and_by_what() -> None:
    told(site(excluded="0x30 2x60 0x200"), {"4m": [], "8m": [NODE_EXCLUDED], "20m": []})
    told(site(excluded="NaNx100"), {"10m": []})
    labels = {"alertname": NODE_EXCLUDED, "alertstate": "firing", "cause": "alert"}
    labels |= {"service": "controlplane", "severity": "info"}
    query = {"expr": "ALERTS", "eval_time": "10m", "exp_samples": [{"labels": selector("ALERTS", labels), "value": 1}]}
    check_queries(VLLM | site(excluded="0x30 2x60"), [query])


def tokens(used: str, budget: str | None) -> dict[str, str]:
    kinds = {"used": used} | ({} if budget is None else {"budget": budget})
    return {
        control_plane("controlplane_tenant_tokens", tenant="lab", kind=kind): values for kind, values in kinds.items()
    }


def test_a_budget_that_is_nearly_spent_is_told_until_the_month_is_over_or_it_is_raised() -> None:
    used = tokens("80x30 91x30 89x30 100x30 0x100", "100x300")
    told(site() | used, {"4m": [], "8m": [BUDGET], "13m": [BUDGET], "18m": [BUDGET], "25m": []})
    told(site() | tokens("91x300", "100x60 500x200"), {"8m": [BUDGET], "20m": []})


@pytest.mark.parametrize(
    "series",
    [tokens("91x300", None), tokens("80x300", "100x300"), tokens("NaNx300", "100x300"), tokens("0x300", "0x300")],
)
def test_tenants_with_tokens_left_or_without_a_budget_are_not_told(series: dict[str, str]) -> None:
    told(site() | series, {"10m": [], "30m": []})


# --- blindness


def what_is_missing(series: Series, time: str, expected: str) -> None:
    labels = {"alertname": METRICS_MISSING, "alertstate": "firing", "what": expected}
    labels |= {"service": "controlplane", "severity": "critical"}
    sample = {"labels": selector("ALERTS", labels), "value": 1}
    query = {"expr": f'ALERTS{{alertname="{METRICS_MISSING}", alertstate="firing"}}', "eval_time": time}
    check_queries(series, [{**query, "exp_samples": [sample]}], evaluated_each=EACH)


@pytest.mark.parametrize("database_up", ["1x30 stale", "1x30 0x300", "1x30 NaNx300", "_x300"])
def test_a_control_plane_that_is_not_seen_or_sees_no_database_is_told(database_up: str) -> None:
    what_is_missing(VLLM | site(database_up=database_up), "20m", "the control plane or its database")


def test_a_proxy_that_is_not_seen_is_told() -> None:
    what_is_missing(VLLM | site() | {PROXY: "1x30 stale"}, "20m", "the proxy")


def test_a_model_that_is_served_unseen_is_told() -> None:
    what_is_missing(site(), "20m", "vLLM of m")


def test_a_prometheus_that_sees_nothing_at_all_says_so_and_asks_for_nothing() -> None:
    check_firing({}, {"4m": [], "10m": [METRICS_MISSING], "60m": [METRICS_MISSING]})


def test_moments_without_metrics_are_not_told() -> None:
    told(site(database_up="1x30 _x20 1x30 0x20 1x300"), {"8m": [], "12m": [], "15m": [], "20m": []})
    external = site(desired="0x500", routable="1x500")
    check_firing(external, {"20m": []})  # servers that Slurm does not run may not be vLLM


def test_a_lease_that_nobody_holds_is_told() -> None:
    told(site(lease_held="1x30 0x60 1x100"), {"5m": [], "9m": [NOBODY_RECONCILES], "20m": []})
    other = site("cp2:9100", lease_held="0x32 1x400")
    told(site(lease_held="1x30 0x400") | other, {"5m": [], "10m": [], "30m": []})  # handed over
    told(site(lease_held="NaNx400"), {"10m": []})
