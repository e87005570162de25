"""Lives one seed after another on one database, and tells which one broke what, and how to see it again."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from loguru import logger

from tests.sim.database import open_database
from tests.sim.invariants import Broken
from tests.sim.mutations import mutated
from tests.sim.steps import Killed
from tests.sim.world import World


@dataclass(frozen=True, slots=True)
class Failure:
    """`trace`: everything that led there."""

    seed: int
    error: str
    trace: tuple[str, ...]

    @property
    def is_of_an_invariant(self) -> bool:
        """And not of a mistake that was planted where it does not fit any more."""
        return self.error.startswith(f"{Broken.__name__}: ")


class _PatientLoop(asyncio.SelectorEventLoop):
    """What takes long is for the world to say: on a slow machine no time limit of the product's may end by itself."""

    def time(self) -> float:
        return super().time() / 1000


def tell(failure: Failure, *, lines: int) -> str:
    """For people: the seed, its last steps, the error, and how to live it again."""
    shown = "\n".join(failure.trace[-lines:])
    return (
        f"seed {failure.seed} failed. Its last {lines} steps:\n{shown}\n\n{failure.error}\n"
        f"See all of it: make sim SEED={failure.seed}"
    )


def live(
    seeds: Iterable[int], url: str, *, mutation: str | None = None, tells: Callable[[str], None] | None = None
) -> Failure | None:
    """The first of these seeds that breaks an invariant, or raises anything.

    `url`: of a migrated database. `mutation`: the mistake to plant. `tells` is given the trace as it grows.
    """
    logger.disable("controlplane")
    try:
        with mutated(mutation), asyncio.Runner(loop_factory=_PatientLoop) as runner:
            return runner.run(_live(seeds, url, tells))
    finally:
        logger.enable("controlplane")


def play(scenario: Callable[[World], Awaitable[None]], url: str) -> None:
    """One scenario, without chance. Raises `Broken`, with what led there."""
    with asyncio.Runner(loop_factory=_PatientLoop) as runner:
        runner.run(_play(scenario, url))


async def _play(scenario: Callable[[World], Awaitable[None]], url: str) -> None:
    async with open_database(url) as db:
        world = World(0, db, url)
        await world.begin()
        try:
            await scenario(world)
        except Exception as error:
            error.add_note("\n".join(world.trace))
            raise
        finally:
            await world.end()


async def _live(seeds: Iterable[int], url: str, tells: Callable[[str], None] | None) -> Failure | None:
    unseen: list[str] = []

    def note(_: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        """An error that nobody waited for, such as a probe's."""
        if not isinstance(context.get("exception"), Killed):
            unseen.append(f"{context.get('message')}: {context.get('exception')!r}")

    asyncio.get_running_loop().set_exception_handler(note)
    async with open_database(url) as db:
        for seed in seeds:
            world = World(seed, db, url, tells=tells)
            try:
                await world.live()
                if seed % 10 == 9:
                    gc.collect()  # then such errors are noticed
                if unseen:
                    raise AssertionError(unseen[0])
            except Exception as error:  # noqa: BLE001 -- whatever it is, the seed and the trace are what helps
                return Failure(seed, f"{type(error).__name__}: {error}", tuple(world.trace))
    return None
