"""Measures our proxy beside nginx, haproxy and no proxy at all, interleaved in one run, and judges the bounds.

`make bench-proxy`, or `python -m tests.benchmarks.proxy --help`; docs/benchmarks.md says how to read it. Every proxy is
started once and runs on one core of its own, idle while another is measured. A round goes through the scenarios in
shuffled order, and in each through the proxies in shuffled order. The exit code is 1 if a bound is missed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from controlplane.demo.children import free_ports
from tests.benchmarks import rivals
from tests.benchmarks.programs import (
    BUILD,
    FAILURES,
    BenchmarkFailed,
    Cores,
    Load,
    Process,
    Upstreams,
    allow_many_files,
    load,
    running,
    upstreams,
)
from tests.benchmarks.rig import HERE, MODEL, make_keys, our_proxy
from tests.benchmarks.tables import (
    DIRECT,
    IDLE,
    NGINX,
    ONE_STREAM,
    OURS,
    Measurement,
    Results,
    Verdict,
    table,
    verdicts,
)

HAPROXY = "haproxy"
QUICK = ("paced-100", "paced-1000", "plain")
FULL = (
    IDLE,
    ONE_STREAM,
    "paced-100",
    "paced-500",
    "paced-1000",
    "burst-100",
    "burst-500",
    "burst-1000",
    "plain",
    "streaming",
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured; the smallest proves that the tool works, and no more."""

    # by each connection; a single one's cost is small beside what else happens, and must be measured for longer
    streams: Callable[[int], int] = lambda connections: 8 if connections == 1 else 3 if connections < 500 else 2
    interval_ms: float = 100
    burst_interval_ms: float = 20
    chunks: int = 32
    unpaced_seconds: float = 4.0
    idle_seconds: float = 11.0  # so that what is done every ten seconds is in it
    settle_seconds: float = 6.0  # what a single stream costs after its end, usage that is stored for one, is its own
    divisor: int = 1  # of the connections


QUICK_SIZES = Sizes(streams=lambda connections: 2 if connections < 500 else 1, unpaced_seconds=3.0)
TINY_SIZES = Sizes(
    streams=lambda _: 1,
    interval_ms=2,
    burst_interval_ms=2,
    chunks=4,
    unpaced_seconds=0.2,
    idle_seconds=0.2,
    settle_seconds=0.2,
    divisor=20,
)


@dataclass(frozen=True, slots=True)
class Subject:
    """A proxy that is measured, or none."""

    name: str
    ports: tuple[int, ...]
    process: Process | None = None
    arguments: tuple[str, ...] = ()  # for the load


def load_arguments(scenario: str, sizes: Sizes) -> list[str]:
    """What the load is told in a scenario."""
    kind, _, size = scenario.partition("-")
    if kind in ("plain", "streaming"):
        arguments = ["--connections", "64", "--seconds", str(sizes.unpaced_seconds)]
        arguments += ["--pace", f"0:0:{sizes.chunks}"]
        return arguments + (["--stream"] if kind == "streaming" else [])
    connections = max(1, int(size) // sizes.divisor)
    arguments = ["--connections", str(connections), "--stream"]
    if kind == "burst":
        interval = sizes.burst_interval_ms
        return [*arguments, "--fresh", "--requests", "1", "--pace", f"{interval:g}:{interval:g}:{sizes.chunks}"]
    interval = sizes.interval_ms
    arguments += ["--requests", str(sizes.streams(int(size))), "--ramp-ms", str(interval * sizes.chunks)]
    return [*arguments, "--pace", f"{interval:g}:{interval:g}:{sizes.chunks}"]


def measure(round_number: int, scenario: str, subject: Subject, up: Upstreams, sizes: Sizes) -> Measurement:
    if scenario.startswith("burst"):
        up.disconnect()  # every proxy has to connect anew
    process = subject.process
    began, before = time.monotonic(), process.cpu_seconds() if process else 0.0
    found = load(subject.ports, [*load_arguments(scenario, sizes), *subject.arguments])
    if scenario == ONE_STREAM:
        time.sleep(sizes.settle_seconds)
    cpu_seconds = process.cpu_seconds() - before if process else 0.0
    return Measurement(
        round=round_number,
        scenario=scenario,
        proxy=subject.name,
        good=found["good"],
        errors=found["errors"],
        seconds=found["seconds"],
        cpu_seconds=cpu_seconds,
        cpu_window_seconds=time.monotonic() - began,
        ttft_p50_ms=_percentile(found, "ttft_ms", "p50"),
        ttft_p99_ms=_percentile(found, "ttft_ms", "p99"),
        e2e_p50_ms=_percentile(found, "e2e_ms", "p50"),
        e2e_p99_ms=_percentile(found, "e2e_ms", "p99"),
        pss_bytes=process.pss_bytes() if process else 0,
        first_fault=found["first_fault"],
    )


def measure_all(
    round_number: int, scenario: str, subjects: Sequence[Subject], up: Upstreams, sizes: Sizes
) -> Iterator[Measurement]:
    """One after another, and of each what it uses meanwhile, while others are measured."""
    resting = {subject.name: (0.0, 0.0) for subject in subjects}  # CPU seconds, in how many seconds
    found = []
    for subject in subjects:
        others = [(other.name, other.process) for other in subjects if other is not subject and other.process]
        began, before = time.monotonic(), [process.cpu_seconds() for _, process in others]
        one = measure(round_number, scenario, subject, up, sizes)
        for (name, process), had in zip(others, before, strict=True):
            used, seconds = resting[name]
            resting[name] = used + process.cpu_seconds() - had, seconds + time.monotonic() - began
        found.append(one)
        _say(one)
    for one in found:
        used, seconds = resting[one.proxy]
        yield replace(one, resting_cpu_share=used / seconds if seconds else 0.0)


def measure_idle(round_number: int, subjects: Sequence[Subject], sizes: Sizes) -> list[Measurement]:
    """What each proxy uses while nobody asks, all at the same time."""
    processes = [(subject.name, subject.process) for subject in subjects if subject.process]
    began = time.monotonic()
    before = [process.cpu_seconds() for _, process in processes]
    time.sleep(sizes.idle_seconds)
    after = [process.cpu_seconds() for _, process in processes]
    seconds = time.monotonic() - began
    nothing: dict[str, Any] = dict.fromkeys(("ttft_p50_ms", "ttft_p99_ms", "e2e_p50_ms", "e2e_p99_ms"), math.nan)
    return [
        Measurement(round_number, IDLE, name, 0, 0, seconds, used - had, pss_bytes=process.pss_bytes(), **nothing)
        for (name, process), had, used in zip(processes, before, after, strict=True)
    ]


def _percentile(found: Load, what: str, which: str) -> float:
    return float(found[what].get(which, "nan"))  # nothing was answered


def warm_up(subject: Subject) -> None:
    """What is loaded and connected with the first requests is not measured."""
    for arguments in (["--stream", "--pace", "1:1:8"], ["--pace", "1:1:8"]):
        found = load(subject.ports, [*arguments, "--connections", "32", "--requests", "10", *subject.arguments])
        if not found["good"]:
            said = subject.process.tail() if subject.process else ""
            raise BenchmarkFailed(f"{subject.name} answers nothing: {found['first_fault']}\n{said}")


def all_rounds(
    subjects: Sequence[Subject], scenarios: Sequence[str], up: Upstreams, sizes: Sizes, rounds: int, rng: random.Random
) -> Results:
    for subject in subjects:
        warm_up(subject)
    found = []
    for number in range(1, rounds + 1):
        for scenario in rng.sample(scenarios, len(scenarios)):
            if scenario == IDLE:
                found += measure_idle(number, subjects, sizes)
                continue
            found += measure_all(number, scenario, rng.sample(subjects, len(subjects)), up, sizes)
    order = {subject.name: place for place, subject in enumerate(subjects)}
    return Results(sorted(found, key=lambda one: (one.round, scenarios.index(one.scenario), order[one.proxy])))


def _say(one: Measurement) -> None:
    faults = f", {one.errors} errors: {one.first_fault}" if one.errors else ""
    cpu = f"{1e6 * one.cpu_per_request:8.1f} us CPU/request" if one.cpu_seconds else " " * 20
    words = f"round {one.round} {one.scenario:11} {one.proxy:14} {one.good:6} good {cpu}"
    print(f"{words}, TTFT {one.ttft_p50_ms:.2f} / {one.ttft_p99_ms:.2f} ms{faults}", file=sys.stderr, flush=True)


@contextmanager
def the_usual(
    directory: Path, names: Sequence[str], root: Path, key_count: int, cores: Cores
) -> Iterator[tuple[list[Subject], Upstreams]]:
    """No proxy, nginx, haproxy and ours, as far as they are asked for, before two upstreams."""
    keys = make_keys(key_count)
    with ExitStack() as stack:
        up = stack.enter_context(upstreams(directory))
        ours = stack.enter_context(our_proxy(directory, {MODEL: up.ports}, keys, core=cores.proxy, root=root))
        limits = ", ".join(ours.limits) or "not in this version"
        print(
            f"{key_count} keys; limits: {limits}; proxy on core {cores.proxy}, all else on {cores.others}",
            file=sys.stderr,
        )
        subjects = []
        for name in names:
            if name == DIRECT:
                subjects.append(Subject(DIRECT, up.ports))
                continue
            arguments = ("--keys", str(ours.keys))
            if name == OURS:
                subjects.append(Subject(OURS, (ours.port,), ours.process, arguments))
                continue
            start = {NGINX: rivals.nginx, HAPROXY: rivals.haproxy}[name]
            [port] = free_ports(1)
            process = stack.enter_context(running(start(directory, port, up.ports, keys, cores.proxy)))
            subjects.append(Subject(name, (port,), process, arguments))
        yield subjects, up


def report(results: Results, judged: Sequence[Verdict], kept_as: Path) -> int:
    """Print the table and what became of the bounds; returns the exit code."""
    kept_as.parent.mkdir(parents=True, exist_ok=True)
    kept_as.write_text(json.dumps([asdict(one) for one in results.measurements], indent=1))
    print(table(results))
    print()
    for verdict in judged:
        print(verdict)
    print(f"\nraw results: {kept_as}")
    return 0 if all(verdict.is_kept for verdict in judged) else 1


@contextmanager
def scratch() -> Iterator[Path]:
    """A directory that the servers' users may look into."""
    with tempfile.TemporaryDirectory(prefix="controlplane-benchmark-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        yield directory


def results_file(name: str) -> Path:
    return BUILD / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.json"


def options_of(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--quick", action="store_true", help="three scenarios, shorter, without haproxy: about a minute"
    )
    parser.add_argument("--tiny", action="store_true", help="everything, so small that it says nothing")
    parser.add_argument("--only", help="scenarios, with commas: " + ",".join(FULL))
    parser.add_argument("--proxies", help="with commas: direct,nginx,haproxy,controlplane")
    parser.add_argument("--root", type=Path, default=HERE, help="checkout whose proxy is measured, with its own .venv")
    parser.add_argument("--keys", type=int, default=1000, help="how many there are")
    parser.add_argument("--seed", type=int, default=1)
    return parser


def chosen(options: argparse.Namespace) -> tuple[list[str], list[str], Sizes]:
    """Scenarios, proxies and sizes."""
    scenarios = options.only.split(",") if options.only else list(QUICK if options.quick else FULL)
    usual = [DIRECT, NGINX, OURS] if options.quick else [DIRECT, NGINX, HAPROXY, OURS]
    names = options.proxies.split(",") if options.proxies else usual
    return scenarios, names, TINY_SIZES if options.tiny else QUICK_SIZES if options.quick else Sizes()


def main(words: Sequence[str] | None = None) -> int:
    options = options_of(__doc__).parse_args(words)
    scenarios, names, sizes = chosen(options)
    allow_many_files()
    try:
        cores = Cores.shared_out()
        with scratch() as directory, the_usual(directory, names, options.root, options.keys, cores) as (subjects, up):
            results = all_rounds(subjects, scenarios, up, sizes, options.rounds, random.Random(options.seed))
    except FAILURES as error:
        print(error, file=sys.stderr)
        return 2
    return report(results, verdicts(results), results_file("proxy"))


if __name__ == "__main__":
    sys.exit(main())
