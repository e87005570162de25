"""Minutes of mixed load through our proxy, in which nothing may grow: memory, open files, requests in flight.

`make soak MINUTES=30`. All at once: streams and plain answers that must be whole, clients that leave at random moments
(in the middle of their request, too), readers that are slow, wrong keys, and, for a model of its own, upstreams that
fail in four ways. The exit code is 1 if one of the facts that are printed at the end does not hold.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.benchmarks.programs import (
    FAILURES,
    Load,
    Upstreams,
    allow_many_files,
    load,
    load_command,
    upstreams,
)
from tests.benchmarks.proxy import scratch
from tests.benchmarks.rig import HERE, MODEL, Proxy, make_keys, our_proxy

FAULTY = "faulty"
MOST_GROWTH = 0.03  # of memory, from the middle third to the last
MORE_FILES = 8  # than at the beginning: PostgreSQL's connections come and go
SETTLE_SECONDS = 30.0

GOOD = {
    "streams": ["--connections", "40", "--stream", "--include-usage", "--pace", "20:20:20"],
    "streams without usage": ["--connections", "20", "--stream", "--pace", "50:5:40"],
    "plain": ["--connections", "10", "--pace", "10:0:1"],
    "large requests": ["--connections", "2", "--pace", "10:0:1", "--padding", "500000", "--pause-ms", "50"],
    "new connections": ["--connections", "5", "--pace", "10:0:1", "--fresh", "--pause-ms", "20"],
    "slow readers": ["--connections", "5", "--stream", "--pace", "0:0:400", "--slowly", "1000:2"],
}
"""What must be answered whole, each time."""

LEAVING = {
    "leave streams": ["--connections", "20", "--stream", "--pace", "50:20:30", "--leave-ms", "700"],
    "leave plain": ["--connections", "5", "--pace", "30:0:1", "--leave-ms", "40"],
}

FAILING = {
    "errors 500": ["--connections", "2", "--pace", "5:5:8:e", "--pause-ms", "20"],
    "errors in streams": ["--connections", "2", "--stream", "--pace", "5:5:8:i", "--pause-ms", "20"],
    "broken streams": ["--connections", "2", "--stream", "--pace", "5:5:8:b", "--pause-ms", "20"],
    "broken answers": ["--connections", "2", "--pace", "5:5:8:b", "--pause-ms", "20"],
    "no answers": ["--connections", "2", "--stream", "--pace", "5:5:8:r", "--pause-ms", "20"],
}


@dataclass(frozen=True, slots=True)
class Sample:
    pss_bytes: int
    open_files: int
    in_flight: float


@dataclass(frozen=True, slots=True)
class Fact:
    words: str
    holds: bool

    def __str__(self) -> str:
        return f"{'holds ' if self.holds else 'BROKEN'} {self.words}"


def in_flight(url: str) -> float:
    """What the proxy says of itself, summed over models."""
    text = httpx.get(f"{url}/metrics", trust_env=False).text
    families = [one for one in text_string_to_metric_families(text) if one.name == "proxy_in_flight"]
    return sum(sample.value for family in families for sample in family.samples)


def sample(proxy: Proxy) -> Sample:
    return Sample(proxy.process.pss_bytes(), proxy.process.open_files(), in_flight(proxy.url))


def soak(proxy: Proxy, wrong_keys: Path, seconds: float) -> tuple[dict[str, Load], list[Sample]]:
    """Let all clients run; returns what each found, and the samples taken meanwhile."""
    right = ["--keys", str(proxy.keys)]
    lines = {name: [*words, *right] for name, words in {**GOOD, **LEAVING}.items()}
    lines |= {name: [*words, *right, "--model", FAULTY] for name, words in FAILING.items()}
    lines["wrong keys"] = ["--connections", "2", "--keys", str(wrong_keys), "--expect", "401", "--pause-ms", "20"]
    with ExitStack() as stack:
        running = {
            name: stack.enter_context(
                subprocess.Popen(
                    load_command([proxy.port], [*words, "--seconds", str(seconds)]), stdout=subprocess.PIPE, text=True
                )
            )
            for name, words in lines.items()
        }
        samples = []
        pause_seconds = max(0.2, seconds / 600)
        while any(child.poll() is None for child in running.values()):
            time.sleep(pause_seconds)
            samples.append(sample(proxy))
        return {name: json.loads(child.communicate()[0]) for name, child in running.items()}, samples


def settled(proxy: Proxy) -> Sample:
    """A sample in which nothing closes any more."""
    one = sample(proxy)
    while True:
        time.sleep(0.3)
        last, one = one, sample(proxy)
        if last.open_files == one.open_files:
            return one


def settle(proxy: Proxy, up: Upstreams, before: Sample) -> tuple[Sample, dict[str, int]]:
    """What is left when all clients have gone and idle connections had their time."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        left, stats = sample(proxy), up.stats()
        is_over = left.in_flight == 0 and stats["answering"] == 0
        if (is_over and left.open_files <= before.open_files + MORE_FILES) or time.monotonic() > deadline:
            return left, stats
        time.sleep(0.2)


def judge(
    found: dict[str, Load], samples: Sequence[Sample], before: Sample, left: Sample, stats: dict[str, int], log: str
) -> list[Fact]:
    third = max(1, len(samples) // 3)
    middle, last = (median(one.pss_bytes for one in part) for part in (samples[third : 2 * third], samples[-third:]))
    growth = last / middle - 1
    errors = sum(found[name]["errors"] for name in GOOD)
    refused = found["wrong keys"]
    leavers = sum(found[name]["left"] for name in LEAVING)
    most = max(one.open_files for one in samples)
    return [
        Fact(f"memory is flat: {middle / 1e6:.1f} MB, then {last / 1e6:.1f} MB ({growth:+.1%})", growth <= MOST_GROWTH),
        Fact(
            f"open files went back: {before.open_files} before, at most {most}, {left.open_files} after",
            left.open_files <= before.open_files + MORE_FILES,
        ),
        Fact(f"requests in flight went back to {left.in_flight:g}", left.in_flight == 0),
        Fact(f"answers under way at upstreams: {stats['answering']}", stats["answering"] == 0),
        Fact(f"{leavers} clients left, {stats['left']} of them while an upstream answered", stats["left"] > 0),
        Fact(f"{sum(found[name]['good'] for name in GOOD)} requests answered whole, {errors} not", errors == 0),
        Fact(f"{refused['good']} wrong keys refused, {refused['errors']} otherwise", refused["errors"] == 0),
        Fact("the proxy logged no traceback", "Traceback" not in log),
    ]


def run(options: argparse.Namespace, directory: Path) -> int:
    allow_many_files()
    wrong_keys = directory / "wrong.txt"
    wrong_keys.write_text("".join(f"{key}\n" for key in make_keys(20)))
    with (
        upstreams(directory, 4) as up,
        our_proxy(directory, {MODEL: up.ports[:2], FAULTY: up.ports[2:]}, make_keys(100), root=options.root) as proxy,
    ):
        load([proxy.port], ["--connections", "20", "--requests", "5", "--stream", "--keys", str(proxy.keys)])
        up.disconnect()
        before = settled(proxy)
        found, samples = soak(proxy, wrong_keys, 60 * options.minutes)
        left, stats = settle(proxy, up, before)
        log = proxy.process.log.read_text(errors="replace")
    for name, one in found.items():
        faults = f" {one['faults']} {one['first_fault']}" if one["errors"] else ""
        print(f"{name:22} {one['good']:8} good {one['errors']:7} errors {one['left']:7} left{faults}")
    facts = judge(found, samples, before, left, stats, log)
    for fact in facts:
        print(fact)
    return 0 if all(fact.holds for fact in facts) else 1


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--root", type=Path, default=HERE, help="checkout whose proxy is soaked, with its own .venv")
    options = parser.parse_args(words)
    try:
        with scratch() as directory:
            return run(options, directory)
    except FAILURES as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
