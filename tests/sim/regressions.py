"""What the simulation has found in the product, each as a short life of its own: a seed would change with the world.

A scenario is a coroutine that is given a world in which all is well, with one plane and the replica set `a`; whatever
invariant the mistake broke is looked for as always.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta

from tests.sim.invariants import Broken
from tests.sim.steps import Fate, Process
from tests.sim.world import World


async def tick(world: World, plane: Process, seconds: float = 1) -> None:
    world.pass_time(timedelta(seconds=seconds))
    await world.run(*world.rounds(plane, pulls=False))


async def _drains_under_lagging_proxies(world: World, plane: Process) -> None:
    """For some seconds a request comes after every look, of a proxy that has not heard of the drain."""
    for _ in range(4):
        world.pass_time(timedelta(seconds=1))
        await world.run(world.probes(plane))
        world.lagging_proxies_send(timedelta(0))
        await world.run(world.follows(plane))
        world.clients_are_answered()


async def a_list_that_comes_late_does_not_shorten_a_drain(world: World) -> None:
    """A drain bore the time at which its round began, and Slurm's list had taken longer than proxies may lag."""
    plane = await world.grown(1)
    await world.run((world.web, world.order("replica-sets/a/scale", {"replicas": 0})))
    world.site.slow_seconds = (25,)
    world.script = [("GET jobs", Fate.SLOW)]
    await world.run(world.follows(plane))
    await _drains_under_lagging_proxies(world, plane)


async def a_drain_written_late_is_not_shortened(world: World) -> None:
    """A plane that was stopped just before it wrote the drain wrote a time long past."""
    plane = await world.grown(1)
    other = world.new_plane()
    await world.run((world.web, world.order("replica-sets/a/scale", {"replicas": 0})))
    plane.sleeps_at = "replicas.move"
    await world.run(world.follows(plane))
    world.pass_time(timedelta(seconds=30))
    world.wake(plane)
    await world.run()
    await _drains_under_lagging_proxies(world, other)


async def a_node_that_could_not_be_read_is_asked_for_again(world: World) -> None:
    """An answer that broke off was remembered for minutes as "Slurm knows no better address than the node's name"."""
    world.script = [("GET node/", Fate.TRUNCATED)]
    plane = await world.grown(1, ticks=0)
    for _ in range(12):
        await tick(world, plane, 5)
    if (why := world.watch.unsettled()) is not None:
        raise Broken(why)


async def _held_while_a_node_is_drained(world: World) -> Process:
    """A job is there whose release got lost; then an operator drains a node, of which it has not been told."""
    world.script = [("POST job/1", Fate.TIMEOUT_BEFORE)]
    plane = await world.grown(1, ticks=1)
    await world.run((world.web, world.order("nodes/n1/drain", {})))
    return plane


async def a_job_that_could_not_be_told_of_a_drained_node_is_not_released(world: World) -> None:
    """The update that excludes the node failed, and the release that followed it did not."""
    plane = await _held_while_a_node_is_drained(world)
    world.script = [("POST job/1", Fate.TIMEOUT_BEFORE)]
    await tick(world, plane)


async def a_job_is_not_released_while_nodes_are_not_known(world: World) -> None:
    """Nothing was submitted then, and what had been was released all the same."""
    plane = await _held_while_a_node_is_drained(world)
    world.script = [("GET nodes", Fate.TIMEOUT_BEFORE)]
    await tick(world, plane)


async def a_successor_that_is_made_late_is_none_beside_who_may_stay(world: World) -> None:
    """A plane was stopped before it made one beside a replica on a drained node; woken after the undrain, it did."""
    plane = await world.grown(1, max_replicas=1)
    [job] = world.slurm.ours_alive()
    await world.run((world.web, world.order(f"nodes/{job.node}/drain", {})))
    plane.sleeps_at = "replicas.create"
    await world.run(world.follows(plane))
    await world.run((world.web, world.order(f"nodes/{job.node}/undrain", {})))
    world.wake(plane)
    await world.run()


SCENARIOS: Mapping[str, Callable[[World], Awaitable[None]]] = {
    one.__name__: one
    for one in (
        a_list_that_comes_late_does_not_shorten_a_drain,
        a_drain_written_late_is_not_shortened,
        a_node_that_could_not_be_read_is_asked_for_again,
        a_job_that_could_not_be_told_of_a_drained_node_is_not_released,
        a_job_is_not_released_while_nodes_are_not_known,
        a_successor_that_is_made_late_is_none_beside_who_may_stay,
    )
}
