"""Many seeds at once: worker processes, each with a database of its own on one PostgreSQL."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from queue import Queue

from controlplane.db import migrate
from controlplane.demo.postgres import PrivatePostgres
from tests.sim.lives import Failure, live

SEEDS_TO_FIND = 200  # within so many seeds a planted mistake must show

_url = ""  # of this worker's database


@contextmanager
def server() -> Iterator[PrivatePostgres]:
    """A PostgreSQL for as long as it is needed."""
    with tempfile.TemporaryDirectory(prefix="controlplane-sim-") as directory:
        Path(directory).chmod(0o755)  # PostgreSQL may run as another user
        with PrivatePostgres(Path(directory) / "postgres", is_durable=False) as postgres:
            yield postgres


@contextmanager
def workers(postgres: PrivatePostgres, jobs: int) -> Iterator[ProcessPoolExecutor]:
    context = get_context("spawn")
    migrate(postgres.create_database("template"))
    with context.Manager() as manager:
        urls: Queue[str] = manager.Queue()
        for number in range(jobs):
            urls.put(postgres.create_database(f"sim_{number}", template="template"))
        with ProcessPoolExecutor(jobs, context, _take_database, (urls,)) as pool:
            yield pool


def _take_database(urls: Queue[str]) -> None:
    global _url
    _url = urls.get()


def live_chunk(seeds: range) -> Failure | None:
    return live(seeds, _url)


def find_mutation(name: str) -> Failure | None:
    """The first seed in which this planted mistake shows."""
    return live(range(SEEDS_TO_FIND), _url, mutation=name)
