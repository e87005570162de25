"""What the proxy's benchmarks found, as a table of ratios, and which bounds were kept.

All is pure: a `Measurement` is one load at one proxy in one round. Ratios are taken within a round, because the machine
is another one in the next; of the rounds' ratios the median is told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

DIRECT, NGINX, OURS = "direct", "nginx", "controlplane"
IDLE = "idle"  # the scenario in which nobody asks
ONE_STREAM = "paced-1"


@dataclass(frozen=True, slots=True)
class Measurement:
    """One load at one proxy; times in milliseconds, CPU in seconds of the proxy's whole tree of processes."""

    round: int
    scenario: str
    proxy: str
    good: int
    errors: int
    seconds: float
    cpu_seconds: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    e2e_p50_ms: float
    e2e_p99_ms: float
    pss_bytes: int
    first_fault: str = ""
    cpu_window_seconds: float = 0.0  # in which `cpu_seconds` were used: the load's, and what came after it
    resting_cpu_share: float = 0.0  # what it used while others were measured in this scenario and round

    @property
    def cpu_per_request(self) -> float:
        return self.cpu_seconds / self.good if self.good else math.nan

    @property
    def cpu_per_request_added(self) -> float:
        """Without what the proxy uses by itself all the time, which beside one stream is much; NaN if that is all."""
        added = self.cpu_seconds - self.resting_cpu_share * self.cpu_window_seconds
        return added / self.good if self.good and added > 0.0 else math.nan

    @property
    def requests_per_second(self) -> float:
        return self.good / self.seconds


Of = Callable[[Measurement], float]


@dataclass(frozen=True, slots=True)
class Results:
    measurements: Sequence[Measurement]

    def proxies(self) -> list[str]:
        """Each once, no proxy at all first."""
        return sorted(dict.fromkeys(one.proxy for one in self.measurements), key=lambda name: name != DIRECT)

    def scenarios(self) -> list[str]:
        return list(dict.fromkeys(one.scenario for one in self.measurements))

    def of(self, scenario: str, proxy: str) -> list[Measurement]:
        return [one for one in self.measurements if (one.scenario, one.proxy) == (scenario, proxy)]

    def errors(self, proxy: str) -> int:
        return sum(one.errors for one in self.measurements if one.proxy == proxy)

    def value(self, scenario: str, proxy: str, of: Of) -> float:
        """The median of the rounds; NaN if there is none."""
        return _median(of(one) for one in self.of(scenario, proxy))

    def compared(self, scenario: str, proxy: str, to: str, of: Of, how: Callable[[float, float], float]) -> float:
        """The median of the comparisons within each round; NaN if there is none."""
        bases = {one.round: of(one) for one in self.of(scenario, to)}
        return _median(how(of(one), bases[one.round]) for one in self.of(scenario, proxy) if one.round in bases)

    def cpu_ratio(self, scenario: str, proxy: str, to: str) -> float:
        """CPU per request against another proxy's, and of a single stream what it adds to the resting proxy's."""

        def of(one: Measurement) -> float:
            return one.cpu_per_request_added if scenario == ONE_STREAM else one.cpu_per_request

        return self.compared(scenario, proxy, to, of, ratio)


def ratio(value: float, base: float) -> float:
    return value / base if base else math.nan


def difference(value: float, base: float) -> float:
    return value - base


def _median(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return median(known) if known else math.nan


# --- the table -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    cell: Callable[[Results, str], str]


def rows(results: Results) -> list[Row]:
    """What is told of each proxy, in the order of the scenarios."""
    told: list[Row] = []
    for scenario in results.scenarios():
        kind, _, size = scenario.partition("-")
        match kind:
            case "paced":
                told.append(_cpu_row(f"{size} paced streams: CPU/request x nginx", scenario))
                told.append(_added_row(f"{size} paced streams: added TTFT p50 / p99 ms", scenario))
            case "burst":
                told.append(_burst_row(f"burst of {size}: E2E p50 / p99 x direct", scenario))
            case "idle":
                told.append(Row("idle: CPU ms a second", _idle))
            case _:
                words = "unpaced, streaming" if kind == "streaming" else "unpaced, not streaming"
                told.append(_cpu_row(f"{words}: CPU/request x nginx", scenario))
                told.append(_speed_row(f"{words}: requests/s x nginx", scenario))
    told.append(Row("memory MB", _memory))
    told.append(Row("errors", lambda results, proxy: str(results.errors(proxy))))
    return told


def _cpu_row(title: str, scenario: str) -> Row:
    def cell(results: Results, proxy: str) -> str:
        if proxy == DIRECT:
            return ""
        return _number(results.cpu_ratio(scenario, proxy, NGINX))

    return Row(title, cell)


def _speed_row(title: str, scenario: str) -> Row:
    def cell(results: Results, proxy: str) -> str:
        return _number(results.compared(scenario, proxy, NGINX, lambda one: one.requests_per_second, ratio))

    return Row(title, cell)


def _added_row(title: str, scenario: str) -> Row:
    def cell(results: Results, proxy: str) -> str:
        if proxy == DIRECT:
            p50, p99 = (
                results.value(scenario, proxy, of) for of in (lambda one: one.ttft_p50_ms, lambda one: one.ttft_p99_ms)
            )
            return f"({_number(p50)} / {_number(p99)})"
        return " / ".join(_number(added_ttft_ms(results, scenario, proxy, is_p99=is_p99)) for is_p99 in (False, True))

    return Row(title, cell)


def _burst_row(title: str, scenario: str) -> Row:
    def cell(results: Results, proxy: str) -> str:
        if proxy == DIRECT:
            p50, p99 = (
                results.value(scenario, proxy, of) for of in (lambda one: one.e2e_p50_ms, lambda one: one.e2e_p99_ms)
            )
            return f"({p50:.0f} / {p99:.0f} ms)"
        return " / ".join(_number(burst_ratio(results, scenario, proxy, is_p99=is_p99)) for is_p99 in (False, True))

    return Row(title, cell)


def _idle(results: Results, proxy: str) -> str:
    used = results.value(IDLE, proxy, lambda one: 1e3 * one.cpu_seconds / one.seconds)
    return "" if proxy == DIRECT or math.isnan(used) else f"{used:.2f}"


def _memory(results: Results, proxy: str) -> str:
    found = [one.pss_bytes for one in results.measurements if one.proxy == proxy]
    return f"{max(found) / 1e6:.0f}" if any(found) else ""


def added_ttft_ms(results: Results, scenario: str, proxy: str, *, is_p99: bool) -> float:
    """What the proxy adds to the time to the first byte, over direct."""
    return results.compared(
        scenario, proxy, DIRECT, lambda one: one.ttft_p99_ms if is_p99 else one.ttft_p50_ms, difference
    )


def burst_ratio(results: Results, scenario: str, proxy: str, *, is_p99: bool) -> float:
    return results.compared(scenario, proxy, DIRECT, lambda one: one.e2e_p99_ms if is_p99 else one.e2e_p50_ms, ratio)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def table(results: Results) -> str:
    """As Markdown: a row a measure, a column a proxy."""
    proxies = results.proxies()
    cells = [["", *proxies], *([row.title, *(row.cell(results, proxy) for proxy in proxies)] for row in rows(results))]
    widths = [max(len(line[column]) for line in cells) for column in range(len(proxies) + 1)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


# --- bounds ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Verdict:
    words: str
    value: float
    bound: float

    @property
    def is_kept(self) -> bool:
        return self.value <= self.bound

    def __str__(self) -> str:
        return f"{'kept  ' if self.is_kept else 'MISSED'} {self.words}: {self.value:.2f} (at most {self.bound:g})"


MOST_CPU_PACED = 1.5
MOST_CPU_UNPACED = 2.0


def verdicts(results: Results, proxy: str = OURS) -> list[Verdict]:
    """The bounds that can be judged by the scenarios that were run."""
    found: list[Verdict] = []
    for scenario in results.scenarios():
        kind, _, size = scenario.partition("-")
        if kind == IDLE:
            continue
        if kind == "burst":
            if size == "1000":
                for is_p99, bound in ((False, 1.15), (True, 1.4)):
                    words = f"burst of 1000, E2E {'p99' if is_p99 else 'p50'} x direct"
                    found.append(Verdict(words, burst_ratio(results, scenario, proxy, is_p99=is_p99), bound))
            continue
        bound = MOST_CPU_PACED if kind == "paced" else MOST_CPU_UNPACED
        cpu = results.cpu_ratio(scenario, proxy, NGINX)
        found.append(Verdict(f"{scenario}, CPU/request x nginx", cpu, bound))
        if scenario == "paced-1000":
            for is_p99, most_ms in ((False, 0.5), (True, 5.0)):
                words = f"{scenario}, added TTFT {'p99' if is_p99 else 'p50'} ms"
                found.append(Verdict(words, added_ttft_ms(results, scenario, proxy, is_p99=is_p99), most_ms))
    found.append(Verdict("errors", results.errors(proxy), 0))
    return found


def cheaper_than_each(results: Results, peers: Iterable[str], proxy: str = OURS) -> list[Verdict]:
    """Less CPU per request than each of these proxies, on every scenario in which CPU is told."""
    return [
        Verdict(f"{scenario}, CPU/request x {peer}", compared, 1.0)
        for scenario in results.scenarios()
        if not scenario.startswith(("burst", IDLE))
        for peer in peers
        for compared in [results.cpu_ratio(scenario, proxy, peer)]
        if not math.isnan(compared)
    ]
