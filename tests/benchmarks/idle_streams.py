"""Ten thousand idle streams on one worker: what one costs in memory, and that all of them end well.

`make bench-idle-streams`. Each stream gets its first chunk and then nothing for a while; memory is compared when all
have begun with before the first. The exit code is 1 if a stream fails, or if the machine allows fewer than were asked
for: the proxy needs two open files for each, and only root with the right to do so may raise the hard limit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.programs import FAILURES, allow_many_files, load, load_command, upstreams
from tests.benchmarks.proxy import scratch
from tests.benchmarks.rig import HERE, MODEL, make_keys, our_proxy

FILES_BESIDES = 200  # of the proxy: its own, and what it keeps to PostgreSQL and to upstreams
STREAMS_AN_ADDRESS = 4000  # an address has some 28,000 ports, some of them still closing


def run(options: argparse.Namespace, directory: Path) -> int:
    files = allow_many_files()
    streams = min(options.streams, (files - FILES_BESIDES) // 2)
    with (
        upstreams(directory) as up,
        our_proxy(directory, {MODEL: up.ports}, make_keys(100), root=options.root) as proxy,
    ):
        keys = ["--keys", str(proxy.keys)]
        load([proxy.port], [*keys, "--connections", "20", "--requests", "5", "--stream"])  # what is loaded lazily
        before = proxy.process.pss_bytes()
        idle_ms = 1000 * options.idle_seconds
        arguments = ["--connections", str(streams), "--requests", "1", "--stream", "--tell-began", *keys]
        arguments += ["--pace", f"1:{idle_ms:g}:2", "--timeout-seconds", str(options.idle_seconds + 120)]
        arguments += ["--ramp-ms", str(options.ramp_seconds * 1000)]
        arguments += ["--sources", str(1 + streams // STREAMS_AN_ADDRESS)]
        with subprocess.Popen(load_command([proxy.port], arguments), stdout=subprocess.PIPE, text=True) as clients:
            assert clients.stdout is not None
            began = clients.stdout.readline().strip()  # when every stream has had its first chunk, or all have ended
            during, answering = proxy.process.pss_bytes(), up.stats()["answering"]
            told = began if began.startswith("{") else clients.stdout.readline()
            all_began = began == "began" and answering == streams
        found = json.loads(told)
        after = proxy.process.pss_bytes()
    print(f"streams      {streams} of {options.streams} asked for, on one worker; {answering} idle at once")
    print(f"memory       {before / 1e6:.0f} MB before, {during / 1e6:.0f} MB with all, {after / 1e6:.0f} MB after")
    print(f"a stream     {(during - before) / streams / 1e3:.1f} kB of the proxy's memory (PSS)")
    print(f"ended well   {found['good']}; errors: {found['errors']} {found['first_fault']}".rstrip())
    if streams < options.streams:
        print(
            f"the limit of open files is {files} and cannot be raised: {options.streams} streams need more",
            file=sys.stderr,
        )
    is_good = all_began and found["errors"] == 0 and found["good"] == streams == options.streams
    return 0 if is_good else 1


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=10_000)
    parser.add_argument("--idle-seconds", type=float, default=30.0)
    parser.add_argument("--ramp-seconds", type=float, default=15.0, help="in which they begin")
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
