"""What must hold whatever is interrupted, repeated, lost, late, asleep or blind: random lives of a small world."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from random import Random
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from controlplane.core.scaling import decide, pressures
from controlplane.core.types import (
    OVER_STATES,
    Alert,
    AlertAction,
    Decision,
    HandOver,
    JobState,
    SlurmJob,
    SlurmResources,
)
from controlplane.core.verbs import Verb
from tests.unit.small_world import Answer, SmallWorld
from tests.unit.worlds import NOW, a_set, a_spec, ago, an_alert

ROUNDS_TO_SETTLE = 300  # of five seconds: two of the longest back-offs and a drain's deadline, and then some
SEEDS = st.integers(0, 2**16)
PICKS = st.integers(0, 9)
SMALL = st.integers(0, 3)
SHORT: dict[str, Any] = {
    "slurm": SlurmResources(time_limit_seconds=600),
    "hand_over": HandOver(margin_seconds=120, default_lead_seconds=60),
}
TICKS_OF_THREE_WALLTIMES = 3 * 600 // 5
ANSWERS = st.lists(st.sampled_from([Answer.LATE, Answer.LOST, *Answer]), max_size=3)
ALIKE = settings(deadline=None, print_blob=True, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


class Lives(RuleBasedStateMachine):
    """Rounds of the reconciler, whole and torn, among everything that Slurm, engines, clients and operators may do."""

    world: SmallWorld

    @initialize(desired=SMALL, more=SMALL, surge=st.integers(0, 2), has_walltimes=st.booleans())
    def begins(self, desired: int, more: int, surge: int, has_walltimes: bool) -> None:
        spec = a_spec(max_replicas=max(1, desired + more), surge=surge, unhealthy_timeout_seconds=60, **SHORT)
        self.world = SmallWorld(a_set(desired, spec=spec), has_walltimes=has_walltimes)

    # --- the reconciler

    @rule(seed=SEEDS, answers=ANSWERS)
    def a_whole_round(self, seed: int, answers: list[Answer]) -> None:
        self.world.round(Random(seed), answers=answers)

    @rule(seed=SEEDS, effects=st.integers(0, 6), answers=ANSWERS)
    def a_round_cut_short(self, seed: int, effects: int, answers: list[Answer]) -> None:
        self.world.round(Random(seed), cut_after=effects, answers=answers)

    @rule(seed=SEEDS)
    def a_round_falls_asleep(self, seed: int) -> None:
        self.world.round(Random(seed), falls_asleep=True)

    @precondition(lambda self: self.world.asleep)
    @rule(seed=SEEDS)
    def a_sleeper_wakes(self, seed: int) -> None:
        self.world.wake(Random(seed))

    @rule(seconds=st.sampled_from([1, 2, 5, 30, 130, 700]))
    def time_passes(self, seconds: int) -> None:
        self.world.pass_seconds(seconds)

    @rule(seed=SEEDS, ticks=st.integers(1, 12))
    def all_goes_well_for_a_while(self, seed: int, ticks: int) -> None:
        rng = Random(seed)
        for _ in range(ticks):
            self.world.calm_tick(rng)

    @rule()
    def slurm_goes_blind_or_sees_again(self) -> None:
        self.world.is_blind = not self.world.is_blind

    # --- Slurm

    def job(self, pick: int, *states: JobState) -> SlurmJob | None:
        jobs = [job for job in self.world.some_jobs(*states) if not job.is_held]
        return jobs[pick % len(jobs)] if jobs else None

    @rule(pick=PICKS)
    def a_job_starts(self, pick: int) -> None:
        if (job := self.job(pick, JobState.PENDING)) is not None:
            self.world.start(job)

    @rule(pick=PICKS, state=st.sampled_from(sorted(OVER_STATES)))
    def a_job_ends(self, pick: int, state: JobState) -> None:
        if (job := self.job(pick, JobState.RUNNING, JobState.PENDING, JobState.COMPLETING)) is not None:
            self.world.end(job, state)

    @rule(pick=PICKS)
    def a_job_is_requeued(self, pick: int) -> None:
        """Also one that was shown as failed with its node: NODE_FAIL is no proof of death."""
        if (job := self.job(pick, JobState.RUNNING, JobState.NODE_FAIL)) is not None:
            self.world.requeue(job)

    @rule(pick=PICKS)
    def a_job_is_started_a_second_time_unseen(self, pick: int) -> None:
        if (job := self.job(pick, JobState.RUNNING)) is not None:
            self.world.pass_seconds(1)
            self.world.requeue(job)
            self.world.start(self.world.jobs[job.job_id])

    @rule(pick=PICKS)
    def slurm_forgets_a_job(self, pick: int) -> None:
        if jobs := self.world.some_jobs(JobState.PENDING, *OVER_STATES):
            self.world.forget(jobs[pick % len(jobs)])

    @rule(pick=PICKS)
    def a_job_is_in_a_state_of_which_nobody_has_heard(self, pick: int) -> None:
        if (job := self.job(pick, JobState.RUNNING, JobState.PENDING)) is not None:
            self.world.strange ^= {job.job_id}

    @precondition(lambda self: self.world.late)
    @rule(pick=PICKS)
    def a_late_request_makes_its_job(self, pick: int) -> None:
        self.world.arrive(self.world.late[pick % len(self.world.late)])

    # --- engines and clients

    @rule()
    def probes_look(self) -> None:
        self.world.probe()

    @rule(pick=PICKS)
    def an_engine_freezes_or_thaws(self, pick: int) -> None:
        if (job := self.job(pick, JobState.RUNNING)) is not None:
            self.world.frozen ^= {job.job_id}

    @rule()
    def clients_send(self) -> None:
        self.world.clients_send()

    @rule()
    def clients_are_answered(self) -> None:
        self.world.in_flight.clear()

    # --- operators

    @rule(desired=SMALL, more=st.integers(0, 2))
    def an_operator_scales(self, desired: int, more: int) -> None:
        self.world.scale(desired, desired + more)

    @rule(image=st.sampled_from(["one.sif", "two.sif"]), surge=st.integers(0, 2))
    def an_operator_applies_a_spec(self, image: str, surge: int) -> None:
        spec = self.world.replica_set.spec
        self.world.apply(replace(spec, surge=surge, vllm=replace(spec.vllm, image=image)))

    @rule()
    def an_operator_pauses_or_resumes(self) -> None:
        self.world.replica_set = replace(self.world.replica_set, is_paused=not self.world.replica_set.is_paused)

    @rule(node=st.sampled_from(["n0", "m", None]))
    def an_operator_drains_a_node_or_none(self, node: str | None) -> None:
        self.world.drain_node(node)

    @rule(pick=PICKS, verb=st.sampled_from(Verb))
    def an_operator_speaks_to_a_replica(self, pick: int, verb: Verb) -> None:
        if live := self.world.live():
            self.world.say(verb, live[pick % len(live)])

    # --- and then

    @rule(seed=SEEDS)
    def quiet_settles_it(self, seed: int) -> None:
        settles(self.world, Random(seed))


def settles(world: SmallWorld, rng: Random) -> None:
    """Given quiet, the world comes to what is desired within a bounded number of rounds, and stays there."""
    world.becomes_quiet()
    for _ in range(ROUNDS_TO_SETTLE):
        if world.is_settled():
            break
        world.calm_tick(rng)
    assert world.is_settled(), world.described()
    if world.has_walltimes:
        return  # the next hand-over is never far
    rows, jobs = dict(world.replicas), dict(world.jobs)
    for _ in range(3):
        world.calm_tick(rng)
    assert (rows, jobs) == (world.replicas, world.jobs), "a settled world moved"


TestLives = Lives.TestCase
TestLives.settings = settings(ALIKE, max_examples=250, stateful_step_count=50)


# --- rolling -----------------------------------------------------------------------------------------------

A_FULL_HOUSE_OR_NOT = given(
    target=st.integers(1, 4),
    surge=st.integers(0, 2),
    is_full=st.booleans(),
    seed=SEEDS,
    cuts=st.lists(st.none() | st.integers(0, 3), max_size=20),
)


def goes_over(world: SmallWorld, rng: Random, fewest: int, cuts: list[int | None]) -> None:
    """However often it is interrupted, the world settles anew, and never do fewer serve meanwhile."""
    for _ in range(ROUNDS_TO_SETTLE):
        world.calm_tick(rng, cut_after=cuts.pop() if cuts else None)
        assert world.serving() >= fewest, world.described()
        if world.is_settled():
            break
    assert world.is_settled(), world.described()


@ALIKE
@A_FULL_HOUSE_OR_NOT
def test_a_roll_never_costs_more_than_the_surge_lacks(
    target: int, surge: int, is_full: bool, seed: int, cuts: list[int | None]
) -> None:
    """However often it is interrupted, as many serve as are desired; one fewer only where there is no room beside."""
    rng = Random(seed)
    spec = a_spec(max_replicas=target if is_full else target + 1, surge=surge)
    world = SmallWorld(a_set(target, spec=spec))
    settles(world, rng)
    world.apply(replace(spec, vllm=replace(spec.vllm, image="two.sif")))
    goes_over(world, rng, target - (0 if surge > 0 or not is_full else 1), cuts)


@ALIKE
@A_FULL_HOUSE_OR_NOT
def test_a_drained_node_is_left_and_costs_no_more_than_the_surge_lacks(
    target: int, surge: int, is_full: bool, seed: int, cuts: list[int | None]
) -> None:
    rng = Random(seed)
    world = SmallWorld(a_set(target, spec=a_spec(max_replicas=target if is_full else target + 1, surge=surge)))
    settles(world, rng)
    world.drain_node("n0")
    goes_over(world, rng, target - (0 if surge > 0 or not is_full else 1), cuts)
    assert {job.nodes for job in world.some_jobs(JobState.RUNNING)} == {"m"}


# --- walltimes ---------------------------------------------------------------------------------------------


@ALIKE
@given(
    target=st.integers(1, 4),
    surge=st.integers(0, 2),
    more=st.integers(0, 1),
    seed=SEEDS,
    cuts=st.lists(st.none() | st.integers(0, 3), max_size=40),
)
def test_walltimes_end_and_nobody_notices_where_there_is_room_for_a_successor(
    target: int, surge: int, more: int, seed: int, cuts: list[int | None]
) -> None:
    """However often it is interrupted; and no stream is cut even where there is no room."""
    rng = Random(seed)
    spec = a_spec(max_replicas=target + more, surge=surge, **SHORT)
    world = SmallWorld(a_set(target, spec=spec), has_walltimes=True)
    settles(world, rng)
    for tick in range(TICKS_OF_THREE_WALLTIMES):
        world.clients_send()
        world.calm_tick(rng, cut_after=cuts.pop() if cuts else None)
        if tick % 4 == 0:
            world.in_flight.clear()
        if 2 * (surge + more) >= target:  # else half of a walltime is not enough for all, one after the other
            assert world.serving() >= target, world.described()
    assert world.cut_by_walltimes == 0
    starts = len(world.replicas)
    assert 3 * target <= starts <= 8 * target, f"{starts} starts for {target} replicas in three walltimes"


@ALIKE
@given(
    target=st.integers(2, 4),
    more=st.integers(0, 1),
    at=st.integers(60, 110),
    is_roll=st.booleans(),
    seed=SEEDS,
)
def test_a_roll_or_a_drained_node_costs_nothing_while_walltimes_end_where_there_is_room_for_all(
    target: int, more: int, at: int, is_roll: bool, seed: int
) -> None:
    rng = Random(seed)
    spec = a_spec(max_replicas=target + more, surge=target, **SHORT)
    world = SmallWorld(a_set(target, spec=spec), has_walltimes=True)
    settles(world, rng)
    for tick in range(at + TICKS_OF_THREE_WALLTIMES // 2):
        if tick == at and is_roll:
            world.apply(replace(spec, vllm=replace(spec.vllm, image="two.sif")))
        elif tick == at:
            world.drain_node("n0")
        world.calm_tick(rng)
        assert world.serving() >= target, world.described()
    assert world.cut_by_walltimes == 0


@ALIKE
@given(seed=SEEDS, ticks=st.integers(0, 12), blind=st.integers(1, 3))
def test_blindness_lets_nobody_go_while_a_node_is_drained(seed: int, ticks: int, blind: int) -> None:
    """However far the successor is."""
    rng = Random(seed)
    world = SmallWorld(a_set(1, spec=a_spec(max_replicas=2, surge=1)))
    settles(world, rng)
    world.drain_node("n0")
    for _ in range(1 + ticks):
        world.calm_tick(rng)
    world.is_blind = True
    for _ in range(blind):
        world.pass_seconds(700)
        world.probe()
        world.round(rng)
        assert world.serving() == 1, world.described()
    world.becomes_quiet()
    settles(world, rng)
    assert len(world.replicas) == 2, "one successor is enough"


# --- alerts ------------------------------------------------------------------------------------------------

STALE_AFTER = timedelta(minutes=15)
SIBLINGS = [a_set(2, spec=a_spec(name, priority=number, min_replicas=1)) for number, name in enumerate(("a", "b", "c"))]
ALERTS = st.lists(
    st.builds(
        lambda action, number, is_firing, age, replica_set, step: an_alert(
            action,
            f"f{number}",
            is_firing=is_firing,
            refreshed_at=ago(age),
            ends_at=None if is_firing else ago(age),
            labels={"model": "m"} | ({"replica_set": replica_set} if replica_set else {}),
            step=step,
        ),
        st.sampled_from([AlertAction.SCALE_UP, AlertAction.SCALE_DOWN]),
        st.integers(0, 99),
        st.booleans(),
        st.integers(0, 2000),
        st.sampled_from(["", "a", "b", "c"]),
        st.none() | st.integers(1, 3),
    ),
    max_size=6,
)


def decided(alerts: list[Alert]) -> list[Decision]:
    pressing = pressures(SIBLINGS, alerts, now=NOW, stale_after=STALE_AFTER)
    return [decide(one, pressing[one.name], [], {}, now=NOW) for one in SIBLINGS]


@ALIKE
@given(alerts=ALERTS, seed=SEEDS)
def test_the_order_of_alerts_decides_nothing(alerts: list[Alert], seed: int) -> None:
    shuffled = list(alerts)
    Random(seed).shuffle(shuffled)
    assert decided(shuffled) == decided(alerts)


@ALIKE
@given(alerts=ALERTS)
def test_nothing_shrinks_unless_a_fresh_alert_asks_for_it_and_none_asks_for_more(alerts: list[Alert]) -> None:
    fresh = {one.action for one in alerts if one.is_firing and NOW - one.refreshed_at <= STALE_AFTER}
    of_the_model = {
        one.action
        for one in alerts
        if one.is_firing and NOW - one.refreshed_at <= STALE_AFTER and "replica_set" not in one.labels
    }
    for decision in decided(alerts):
        assert 1 <= decision.desired <= 4
        if decision.desired < decision.previous:
            assert AlertAction.SCALE_DOWN in fresh
            assert AlertAction.SCALE_UP not in of_the_model
        if decision.desired > decision.previous:
            assert AlertAction.SCALE_UP in fresh
