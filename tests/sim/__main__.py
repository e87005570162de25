"""`make sim`: many seeds on all cores, or one of them again with its whole trace, or the mutations.

python -m tests.sim --seeds 1000            the first so many seeds
python -m tests.sim --seed 4711             one of them, told step by step
python -m tests.sim --mutations             does each planted mistake make a seed fail?

The exit code is 1 if an invariant was broken, or if a planted mistake was not found.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

from controlplane.db import migrate
from controlplane.demo.postgres import PrivatePostgres
from tests.sim.lives import live, tell
from tests.sim.mutations import MUTATIONS
from tests.sim.workers import SEEDS_TO_FIND, find_mutation, live_chunk, server, workers

_CHUNK = 10
_TRACE_LINES = 60


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim")
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="live this one, and tell all of it")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="worker processes")
    parser.add_argument("--mutations", action="store_true", help="plant each known mistake, and look for it")
    parser.add_argument("--mutation", choices=sorted(MUTATIONS), help="with --seed: plant this one")
    chosen = parser.parse_args()
    with server() as postgres:
        if chosen.seed is not None:
            return _tell_one(postgres, chosen.seed, chosen.mutation)
        if chosen.mutations:
            return _find_mutations(postgres, chosen.jobs)
        return _live_many(postgres, range(chosen.first, chosen.first + chosen.seeds), chosen.jobs)


def _live_many(postgres: PrivatePostgres, seeds: range, jobs: int) -> int:
    started = time.monotonic()
    chunks = [seeds[at : at + _CHUNK] for at in range(0, len(seeds), _CHUNK)]
    with workers(postgres, jobs) as pool:
        for done, failure in enumerate(pool.map(live_chunk, chunks), start=1):
            took = time.monotonic() - started
            if failure is not None:
                pool.shutdown(cancel_futures=True)
                print(f"after {took:.0f} s: " + tell(failure, lines=_TRACE_LINES))
                return 1
            if done % 10 == 0 or done == len(chunks):
                lived = chunks[done - 1].stop - seeds.start
                print(f"{lived} seeds in {took:.0f} s, {lived / took:.1f} seeds per second", flush=True)
    print(f"all invariants hold over seeds {seeds.start} to {seeds.stop - 1}")
    return 0


def _find_mutations(postgres: PrivatePostgres, jobs: int) -> int:
    missed = 0
    with workers(postgres, jobs) as pool:
        for name, failure in zip(MUTATIONS, pool.map(find_mutation, MUTATIONS), strict=True):
            missed += failure is None or not failure.is_of_an_invariant
            found = f"seed {failure.seed}: {failure.error}" if failure else f"NOT FOUND in {SEEDS_TO_FIND} seeds"
            print(f"{name}: {found}", flush=True)
    return 1 if missed else 0


def _tell_one(postgres: PrivatePostgres, seed: int, mutation: str | None) -> int:
    url = postgres.create_database("sim")
    migrate(url)
    failure = live([seed], url, mutation=mutation, tells=print)
    print(f"seed {seed}: {failure.error if failure else 'all invariants hold'}")
    return 1 if failure else 0


if __name__ == "__main__":
    sys.exit(main())
