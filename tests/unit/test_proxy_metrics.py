"""The proxy's plain numbers: what they cost nothing to be right about is compared with prometheus-client's own."""

from __future__ import annotations

import json
import re

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from controlplane.metrics import Numbers, ProxyMetrics, decoded, encoded, exposition, lasting, total
from controlplane.metrics.numbers import FAST_BUCKETS, SLOW_BUCKETS
from controlplane.metrics.proxy import FAMILIES

SECONDS = st.one_of(st.floats(0, 1000), st.sampled_from(SLOW_BUCKETS), st.sampled_from(FAST_BUCKETS))


def lines(text: bytes, name: str) -> list[str]:
    """The lines about one metric, without the times of creation, which a sum over processes has not."""
    return [line for line in text.decode().splitlines() if re.search(rf"\b{name}", line) and "_created" not in line]


@given(st.lists(st.tuples(st.sampled_from(["a", 'b"\\\n']), SECONDS, SECONDS)))
def test_histograms_and_counters_are_the_text_that_prometheus_client_makes_of_the_same(
    observed: list[tuple[str, float, float]],
) -> None:
    theirs = CollectorRegistry()
    requests = Counter(
        "proxy_requests", "Requests answered, by HTTP status", ["model", "tenant", "code"], registry=theirs
    )
    slow = Histogram(
        "proxy_request_seconds", "From the request to the last byte", ["model"], buckets=SLOW_BUCKETS, registry=theirs
    )
    fast = Histogram(
        "proxy_overhead_seconds",
        "Time before the first byte that was not spent waiting for an upstream",
        buckets=FAST_BUCKETS,
        registry=theirs,
    )
    ours = ProxyMetrics()
    for model, seconds, overhead_seconds in observed:
        ours.ended(model, "t", 200, seconds, first_byte_seconds=seconds, overhead_seconds=overhead_seconds)
        requests.labels(model, "t", 200).inc()
        slow.labels(model).observe(seconds)
        fast.observe(overhead_seconds)
    text, expected = exposition(ours.snapshot()), generate_latest(theirs)
    for name in ("proxy_requests", "proxy_request_seconds", "proxy_overhead_seconds"):
        assert lines(text, name) == lines(expected, name)


def test_a_registry_tells_the_same_as_the_exposition() -> None:
    registry = CollectorRegistry()
    metrics = ProxyMetrics(registry)
    metrics.ended("m", "t", 200, 0.2, prompt=7)
    metrics.in_flight["m"] += 2
    metrics.held_requests = lambda: {"m": 3}
    metrics.limited_requests = lambda: {("t", "requests"): 4}
    metrics.usage_lost = lambda: {"requests": 5}
    metrics.upstream_connections = lambda: {"idle": 6}
    assert generate_latest(registry) == exposition(metrics.snapshot())
    value = registry.get_sample_value
    assert value("proxy_tokens_total", {"model": "m", "tenant": "t", "kind": "prompt"}) == 7
    assert value("proxy_in_flight", {"model": "m"}) == 2
    assert value("proxy_held_requests", {"model": "m"}) == 3
    assert value("proxy_limited_requests_total", {"tenant": "t", "limit": "requests"}) == 4
    assert value("proxy_usage_lost_total", {"kind": "requests"}) == 5
    assert value("proxy_upstream_connections", {"state": "idle"}) == 6
    assert value("proxy_workers") == 1


def test_a_model_that_does_not_exist_counts_among_requests_and_makes_no_histogram() -> None:
    metrics = ProxyMetrics()
    metrics.ended("", "t", 404, 0.1)
    numbers = metrics.snapshot()
    assert numbers["proxy_requests"] == {("", "t", "404"): 1}
    assert numbers["proxy_request_seconds"] == {}


def a_worker(requests: int, age_seconds: float = 0) -> ProxyMetrics:
    metrics = ProxyMetrics()
    for _ in range(requests):
        metrics.ended("m", "t", 200, 0.2)
        metrics.in_flight["m"] += 1
    metrics.directory_age_seconds = lambda: age_seconds
    return metrics


def test_a_total_adds_counters_histograms_and_gauges_and_tells_the_oldest_directory() -> None:
    both = total(FAMILIES, [a_worker(2, 5).snapshot(), a_worker(3, 1).snapshot()])
    assert both["proxy_requests"] == {("m", "t", "200"): 5}
    [series] = both["proxy_request_seconds"].values()
    assert isinstance(series, list)
    assert sum(series[:-1]) == 5
    assert both["proxy_in_flight"] == {("m",): 5}
    assert both["proxy_workers"] == {(): 2}
    assert both["proxy_directory_age_seconds"] == {(): 5}


def test_who_is_gone_stays_in_the_counters_and_leaves_the_gauges() -> None:
    gone, left = a_worker(2, 100).snapshot(), a_worker(3, 1).snapshot()
    before, after = total(FAMILIES, [gone, left]), total(FAMILIES, [lasting(FAMILIES, gone), left])
    assert after["proxy_requests"] == before["proxy_requests"]
    assert after["proxy_request_seconds"] == before["proxy_request_seconds"]
    assert after["proxy_in_flight"] == {("m",): 3}
    assert after["proxy_workers"] == {(): 1}
    assert after["proxy_directory_age_seconds"] == {(): 1}


def test_a_total_changes_nothing_of_what_it_adds_up() -> None:
    one, other = a_worker(1).snapshot(), a_worker(2).snapshot()
    before = json.dumps([encoded(one), encoded(other)])
    total(FAMILIES, [one, other])
    assert json.dumps([encoded(one), encoded(other)]) == before


def test_a_snapshot_is_a_copy() -> None:
    metrics = a_worker(1)
    before = metrics.snapshot()
    metrics.ended("m", "t", 200, 0.2)
    metrics.in_flight["m"] += 1
    assert before == a_worker(1).snapshot()


def test_numbers_survive_the_wire() -> None:
    numbers: Numbers = a_worker(3, 2.5).snapshot()
    assert decoded(json.loads(json.dumps(encoded(numbers)))) == numbers
