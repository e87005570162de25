"""Ten thousand idle streams on one worker: what one costs in memory, and that all of them end well.

`make bench-idle-streams`. Each stream gets its first chunk and then nothing for a while; memory is compared when all
have begun with before the first. A stream that is passed on needs two open files, and only root with the right to do
so may raise the hard limit of them. Where that allows too few, the last of the streams wait for their turn at a model
whose one place is taken, which needs one file each: they are as idle, and are served in the end. How many of each there
were is told. The exit code is 1 if a stream fails, or if there were fewer than were asked for.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.benchmarks.programs import FAILURES, Load, allow_many_files, load, load_command, upstreams
from tests.benchmarks.proxy import scratch
from tests.benchmarks.rig import HERE, MODEL, Proxy, make_keys, our_proxy

FILES_BESIDES = 200  # of the proxy: its own, and what it keeps to PostgreSQL and to upstreams
MOST_WAITING = 400  # the proxy lets one tenant have 500
NARROW = "narrow"  # a model of one place
STREAMS_AN_ADDRESS = 4000  # an address has some 28,000 ports, some of them still closing


@dataclass(frozen=True, slots=True)
class Split:
    """How many streams are passed on, and how many wait."""

    passed_on: int
    waiting: int

    @property
    def streams(self) -> int:
        return self.passed_on + self.waiting


def split(asked: int, files: int) -> Split:
    """As many as so many open files allow."""
    usable = files - FILES_BESIDES
    if 2 * asked <= usable:
        return Split(asked, 0)
    waiting = min(MOST_WAITING, max(0, 2 * asked - usable))
    return Split(min(asked - waiting, (usable - waiting) // 2), waiting)


def run(options: argparse.Namespace, directory: Path) -> int:
    files = min(allow_many_files(), options.open_files)
    parts = split(options.streams, files)
    with (
        upstreams(directory) as up,
        our_proxy(
            directory,
            {MODEL: up.ports, NARROW: up.ports[:1]},
            make_keys(100),
            root=options.root,
            max_in_flight={NARROW: 1},
        ) as proxy,
    ):
        each = ["--keys", str(proxy.keys), "--stream"]
        load([proxy.port], [*each, "--connections", "20", "--requests", "5"])  # what is loaded lazily
        before = proxy.process.pss_bytes()
        once = [*each, "--requests", "1", "--timeout-seconds", str(options.idle_seconds + 120)]
        slow = [*once, "--tell-began", "--pace", f"1:{1000 * options.idle_seconds:g}:2"]
        many = ["--connections", str(parts.passed_on), "--ramp-ms", str(options.ramp_seconds * 1000)]
        many += ["--sources", str(1 + parts.passed_on // STREAMS_AN_ADDRESS)]
        with ExitStack() as stack:
            clients = [Clients(stack, proxy, [*slow, *many])]
            if parts.waiting:  # one takes the place until all have begun, and the rest lines up behind it
                clients.append(Clients(stack, proxy, [*slow, "--connections", "1", "--model", NARROW]))
                clients[-1].wait_begun()
                line = [*once, "--connections", str(parts.waiting), "--model", NARROW]
                clients.append(Clients(stack, proxy, line))
            clients[0].wait_begun()
            during, answering = proxy.process.pss_bytes(), up.stats()["answering"]
            waiting = _waiting(proxy)
            found = [one.found() for one in clients]
        after = proxy.process.pss_bytes()
    good, errors = sum(one["good"] for one in found), sum(one["errors"] for one in found)
    faults = " ".join(one["first_fault"] for one in found)
    holders = int(parts.waiting > 0)  # of the one place; beside those that were asked for
    print(f"streams      {parts.streams} of {options.streams} asked for, on one worker, idle at once")
    print(f"             {answering - holders} passed on, {waiting} waiting for a place")
    print(f"memory       {before / 1e6:.0f} MB before, {during / 1e6:.0f} MB with all, {after / 1e6:.0f} MB after")
    print(f"a stream     {(during - before) / parts.streams / 1e3:.1f} kB of the proxy's memory (PSS)")
    print(f"ended well   {good - holders}; errors: {errors} {faults}".rstrip())
    if parts.streams < options.streams:
        print(
            f"the limit of open files is {files} and cannot be raised: {options.streams} streams need more",
            file=sys.stderr,
        )
    all_began = answering == parts.passed_on + holders and waiting == parts.waiting
    is_good = all_began and errors == 0 and good - holders == parts.streams == options.streams
    return 0 if is_good else 1


class Clients:
    """A load that runs beside others."""

    def __init__(self, stack: ExitStack, proxy: Proxy, arguments: Sequence[str]) -> None:
        command = load_command([proxy.port], arguments)
        self._process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        self._told = ""

    def wait_begun(self) -> None:
        """Until every stream has had its first chunk, or all have ended."""
        word = self._line()
        if word != "began":
            self._told = word

    def found(self) -> Load:
        """Once all have ended."""
        found: Load = json.loads(self._told or self._line())
        return found

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def _waiting(proxy: Proxy) -> int:
    """How many wait for a place, as the proxy counts them."""
    text = httpx.get(f"{proxy.url}/metrics", trust_env=False).text
    found = re.search(rf'^proxy_held_requests{{model="{NARROW}"}} (\S+)', text, re.MULTILINE)
    return 0 if found is None else int(float(found[1]))


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=10_000)
    parser.add_argument("--idle-seconds", type=float, default=30.0)
    parser.add_argument("--ramp-seconds", type=float, default=15.0, help="in which they begin")
    parser.add_argument("--open-files", type=int, default=1_000_000, help="use no more than these, though more may be")
    parser.add_argument("--root", type=Path, default=HERE, help="checkout whose proxy is measured, with its own .venv")
    options = parser.parse_args(words)
    try:
        with scratch() as directory:
            return run(options, directory)
    except FAILURES as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
