"""The table of the proxy's benchmark: ratios within a round, medians of rounds, and bounds that can be missed."""

from __future__ import annotations

import math
from dataclasses import replace

from tests.benchmarks.tables import (
    DIRECT,
    NGINX,
    ONE_STREAM,
    OURS,
    Measurement,
    Results,
    cheaper_than_each,
    table,
    verdicts,
)

ONE = Measurement(
    round=1,
    scenario="paced-1000",
    proxy=NGINX,
    good=100,
    errors=0,
    seconds=10.0,
    cpu_seconds=1.0,
    ttft_p50_ms=100.0,
    ttft_p99_ms=101.0,
    e2e_p50_ms=3200.0,
    e2e_p99_ms=3201.0,
    pss_bytes=10_000_000,
)
DIRECTLY = replace(ONE, proxy=DIRECT, cpu_seconds=0.0, pss_bytes=0)
OUR_OWN = replace(ONE, proxy=OURS, cpu_seconds=1.2, ttft_p50_ms=100.3, ttft_p99_ms=103.0, pss_bytes=50_000_000)


def missed(*measurements: Measurement) -> list[str]:
    return [verdict.words for verdict in verdicts(Results(measurements)) if not verdict.is_kept]


def test_ratios_are_taken_within_a_round_and_the_median_of_rounds_is_told() -> None:
    slow_machine = [replace(one, round=2, cpu_seconds=10 * one.cpu_seconds) for one in (ONE, OUR_OWN)]
    busy_round = [replace(ONE, round=3), replace(OUR_OWN, round=3, cpu_seconds=9.0)]
    results = Results([ONE, OUR_OWN, *slow_machine, *busy_round])
    assert math.isclose(results.cpu_ratio("paced-1000", OURS, NGINX), 1.2)


def test_what_keeps_every_bound_is_judged_so() -> None:
    assert len(verdicts(Results([DIRECTLY, ONE, OUR_OWN]))) == 4
    assert missed(DIRECTLY, ONE, OUR_OWN) == []


def test_each_bound_can_be_missed() -> None:
    assert missed(DIRECTLY, ONE, replace(OUR_OWN, cpu_seconds=1.51)) == ["paced-1000, CPU/request x nginx"]
    assert missed(DIRECTLY, ONE, replace(OUR_OWN, ttft_p50_ms=100.6)) == ["paced-1000, added TTFT p50 ms"]
    assert missed(DIRECTLY, ONE, replace(OUR_OWN, ttft_p99_ms=106.1)) == ["paced-1000, added TTFT p99 ms"]
    assert missed(DIRECTLY, ONE, replace(OUR_OWN, errors=1)) == ["errors"]


def test_bursts_are_judged_against_direct_and_unpaced_requests_against_nginx() -> None:
    burst = [replace(one, scenario="burst-1000") for one in (DIRECTLY, ONE)]
    ours = replace(OUR_OWN, scenario="burst-1000", e2e_p50_ms=3700.0, e2e_p99_ms=4400.0)
    assert missed(*burst, ours) == ["burst of 1000, E2E p50 x direct"]
    plain = [replace(one, scenario="plain") for one in (ONE, replace(OUR_OWN, cpu_seconds=1.9))]
    assert missed(*plain) == []
    assert missed(plain[0], replace(plain[1], cpu_seconds=2.1)) == ["plain, CPU/request x nginx"]


def test_without_a_single_answer_no_bound_is_kept() -> None:
    nothing = replace(OUR_OWN, good=0, errors=100, ttft_p50_ms=math.nan, ttft_p99_ms=math.nan)
    assert len(missed(DIRECTLY, ONE, nothing)) == 4


def test_of_a_single_stream_only_what_it_adds_to_a_resting_proxy_counts() -> None:
    assert (ONE.cpu_seconds, OUR_OWN.cpu_seconds) == (1.0, 1.2)
    nginx = replace(ONE, scenario=ONE_STREAM)
    ours = replace(OUR_OWN, scenario=ONE_STREAM, cpu_window_seconds=9.0, resting_cpu_share=0.05)
    assert math.isclose(Results([nginx, ours]).cpu_ratio(ONE_STREAM, OURS, NGINX), 0.75)
    nothing = replace(ours, resting_cpu_share=0.2)
    assert math.isnan(Results([nginx, nothing]).cpu_ratio(ONE_STREAM, OURS, NGINX)), "less than nothing is no result"


def test_the_table_has_a_column_for_each_proxy_and_direct_first() -> None:
    lines = table(Results([ONE, OUR_OWN, DIRECTLY])).splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == ["", DIRECT, NGINX, OURS]
    assert [cell.strip() for cell in lines[2].strip("|").split("|")][2:] == ["1.00", "1.20"]
    assert len({len(line) for line in lines}) == 1


def test_a_peer_that_is_cheaper_is_told() -> None:
    peer = replace(ONE, proxy="peer", cpu_seconds=1.1)
    [verdict] = cheaper_than_each(Results([ONE, OUR_OWN, peer]), ["peer"])
    assert not verdict.is_kept
    assert str(verdict).startswith("MISSED paced-1000, CPU/request x peer: 1.09")
