"""What shall be done for one replica set, given what it desires and what there is: actions, decided purely.

A plan may be cut short after any action, or carried out twice: planning again from what came of it converges, and
never makes more than `max_replicas` that are to stay exist, nor more than `max_replicas + surge` jobs live. To stay
are those of the spec in force, except on a node that is being drained: their successors start beside them.

Whom to let go: PENDING, SUBMITTING (which has to be waited for), QUEUED, RUNNING but not ready, then those whose
walltime ends soon, then the fewest requests in flight, then the least walltime left, then the newest. What runs always
drains first: it may have become ready, and been given requests, since it was looked at. The drain of one that never
was ready ends at once. Replicas whose walltime ends (`hand_over`) are counted no more once their successor is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from controlplane.core.back_off import BackOff, BackOffRules, backing_off
from controlplane.core.hand_over import CANCEL_LEAD, HandOvers, look, start_lead
from controlplane.core.reservations import Closing, fit
from controlplane.core.types import (
    LIVE_PHASES,
    Action,
    Create,
    Endpoint,
    Health,
    Move,
    PastReplica,
    Phase,
    Reason,
    Replica,
    ReplicaSet,
    Report,
    Submit,
    TimeLimit,
    seconds,
)

_LEAVING_ORDER = (Phase.PENDING, Phase.SUBMITTING, Phase.QUEUED, Phase.RUNNING)
_NO_KNOWN_END = datetime.max.replace(tzinfo=UTC)
_QUIET = timedelta(seconds=1)  # between two looks that say idle: what has just come does not show at once


@dataclass(frozen=True, slots=True)
class PlanRules(BackOffRules):
    drain_settle: timedelta = timedelta(seconds=14)  # proxies notice a drain within this, even one that is not told


@dataclass(frozen=True, slots=True)
class Scene:
    """All that a plan for one set depends on. `endpoints` and `ends_at` (walltime's end) by replica name."""

    replica_set: ReplicaSet
    replicas: tuple[Replica, ...]
    endpoints: Mapping[str, Endpoint]
    past: tuple[PastReplica, ...]  # newest first
    ends_at: Mapping[str, datetime]
    to_replace: frozenset[str]  # names that an alert asks to replace
    to_vacate: Mapping[str, datetime] = field(default_factory=dict)  # names on nodes being drained, since when
    forgiven_at: datetime | None = None  # an operator said to try again: what ended before does not count
    closing: Closing | None = None  # reservations leave its jobs no node from then on

    @property
    def target(self) -> int:
        return 0 if self.replica_set.is_paused else self.replica_set.desired_replicas

    def endpoint(self, replica: Replica) -> Endpoint | None:
        return self.endpoints.get(replica.name)

    def is_serving(self, replica: Replica) -> bool:
        endpoint = self.endpoint(replica)
        return replica.phase is Phase.RUNNING and endpoint is not None and endpoint.health is Health.READY


def plan(scene: Scene, *, now: datetime, rules: PlanRules) -> list[Action]:
    """Every action that this moment asks for. Moves name the phase and version they were decided from."""
    actions: list[Action] = []
    staying: list[Replica] = []
    returnable: list[Replica] = []
    may_condemn = _sees_or_has_not_condemned(scene)
    for replica in scene.replicas:
        step = _own_step(scene, replica, now)
        if step is not None and step.reason is Reason.UNHEALTHY and replica.exists:
            step, may_condemn = (step if may_condemn else None), _sees_any(scene)
        if step is not None:
            actions.append(step)
        elif replica.exists:
            staying.append(replica)
        elif _could_return(scene, replica):
            returnable.append(replica)

    walltimes = look(
        scene.replica_set, scene.replicas, scene.endpoints, scene.ends_at, scene.closing, target=scene.target, now=now
    )
    outdated = [replica for replica in staying if not _is_to_stay(scene, replica)]
    going = [replica for replica in walltimes.going if replica in staying and replica not in outdated]
    current = [replica for replica in staying if replica not in outdated and replica not in going]
    may_start = _hindrance(scene, now, rules) is None
    superseded = _superseded(scene, current, outdated, going, walltimes, may_start=may_start)
    leaving = _too_many(scene, current, walltimes) + superseded
    is_one_too_many = len(current) + len(going) > scene.target
    for replica in leaving:
        reason = Reason.SCALED_DOWN
        if scene.target > 0 and replica in outdated:
            reason = _reason_to_leave(scene, replica)
        elif scene.target > 0 and replica in going and (replica.id in walltimes.successors or not is_one_too_many):
            reason = Reason.HANDED_OVER
        if (step := let_go(replica, reason, now=now, ends_at=scene.ends_at.get(replica.name))) is not None:
            actions.append(step)
    called = [one for one in staying if one not in leaving and one.name in walltimes.last_call]
    actions.extend(_last_call(scene, replica, now) for replica in called)
    pending = [replica for replica in staying if replica.phase is Phase.PENDING and replica not in leaving]
    actions.extend(_submit(scene, replica, now) for replica in pending)
    missing = _missing(scene, current, outdated, going, walltimes)
    back = [replica for replica in returnable if replica.name not in walltimes.soon][: max(0, missing)]
    actions.extend(Move(replica, Phase.RUNNING, message="wanted again before it was drained") for replica in back)
    followable = [one for one in going if one not in leaving and one not in called]
    unfollowed = [one.id for one in followable if one.id not in walltimes.successors]
    wanted = max(0, scene.target - len(current) - len(unfollowed)) - len(back)  # what no predecessor makes room for
    places: list[int | None] = [*[None] * wanted, *unfollowed]
    beside = tuple(replica.name for replica in outdated if replica.name in scene.to_vacate)
    actions.extend(_additions(scene, current, places[: max(0, missing - len(back))], now, rules, beside))
    actions.extend(walltimes.reports)
    return actions


def let_go(replica: Replica, reason: Reason, *, now: datetime, ends_at: datetime | None = None) -> Move | None:
    """How this replica leaves: drained if its job runs. None: it must be waited for (SUBMITTING), or leaves already.

    `ends_at`: its walltime's end, before which a drain has to be over.
    """
    match replica.phase:
        case Phase.PENDING:
            return Move(replica, Phase.ENDED, reason=reason, message="nothing had been asked of Slurm")
        case Phase.QUEUED:
            return Move(replica, Phase.STOPPING, reason=reason)
        case Phase.RUNNING:
            return _drain(replica, reason, now=now, ends_at=ends_at)
        case _:
            return None


def _drain(
    replica: Replica, reason: Reason, message: str | None = None, *, now: datetime, ends_at: datetime | None
) -> Move:
    deadline = now + seconds(replica.spec.drain_timeout_seconds)
    if ends_at is not None:
        deadline = max(now, min(deadline, ends_at - CANCEL_LEAD))
    return Move(replica, Phase.DRAINING, reason=reason, message=message, drain_deadline=deadline)


# --- what one replica asks for by itself -----------------------------------------------------------------


def _own_step(scene: Scene, replica: Replica, now: datetime) -> Move | None:
    endpoint, ends_at = scene.endpoint(replica), scene.ends_at.get(replica.name)
    if replica.phase is Phase.DRAINING:
        return _drained(replica, endpoint, now)
    if replica.name in scene.to_replace and (not scene.is_serving(replica) or _is_turn_to_be_replaced(scene, replica)):
        return let_go(replica, Reason.REPLACED, now=now, ends_at=ends_at)
    if _must_vacate_now(scene, replica, now):
        return let_go(replica, Reason.NODE_DRAINED, now=now, ends_at=ends_at)
    if replica.phase is not Phase.RUNNING:
        return None
    if endpoint is None or endpoint.failing_since is None or endpoint.probed_at is None or not endpoint.fails:
        return None  # the newest look did not fail, or there was none yet: that is not its fault
    fails_for = endpoint.probed_at - endpoint.failing_since  # as far as it was looked at
    if endpoint.health is Health.UNPROVEN and fails_for > seconds(replica.spec.start_timeout_seconds):
        said = f": {endpoint.message}" if endpoint.message else ""
        message = f"not ready {replica.spec.start_timeout_seconds} s after it was first looked at{said}"
        return _drain(replica, Reason.START_TIMEOUT, message, now=now, ends_at=ends_at)
    if endpoint.health is Health.FAILING and fails_for > seconds(replica.spec.unhealthy_timeout_seconds):
        return _drain(replica, Reason.UNHEALTHY, endpoint.message, now=now, ends_at=ends_at)
    return None


def _must_vacate_now(scene: Scene, replica: Replica, now: datetime) -> bool:
    """On a node being drained: what serves nobody, at once; what serves, when a successor had time to start in vain.

    Successors start one at a time, so that of those that serve only one is let go for each that started in vain.
    """
    if replica.name not in scene.to_vacate or replica.phase is not Phase.RUNNING:
        return False
    if not _may_serve(scene, replica):
        return True
    vacating = [one for one in scene.replicas if one.name in scene.to_vacate and one.phase is Phase.RUNNING]
    first = next(one for one in vacating if _may_serve(scene, one))
    return replica is first and now - _waits_since(scene, replica) > seconds(replica.spec.start_timeout_seconds)


def _waits_since(scene: Scene, replica: Replica) -> datetime:
    """Since when nothing came of the drain of its node: no successor was made, and no other left such a node."""
    made = [one.created_at for one in scene.replicas if one.exists and _is_to_stay(scene, one)]
    leaving = [one.phase_since for one in scene.replicas if not one.exists and one.reason is Reason.NODE_DRAINED]
    left = [one.ended_at for one in scene.past if one.reason is Reason.NODE_DRAINED]
    return max([scene.to_vacate[replica.name], *made, *leaving, *left])


def _is_turn_to_be_replaced(scene: Scene, replica: Replica) -> bool:
    """Of those that still serve, one at a time, and the next only when all the others serve: an alert may be wrong."""
    serving = [one for one in scene.replicas if one.name in scene.to_replace and scene.is_serving(one)]
    others = [one for one in scene.replicas if one is not replica and one.exists and one.name not in scene.to_replace]
    is_one_leaving = any(one.reason is Reason.REPLACED and not one.exists for one in scene.replicas)
    return serving[0] is replica and not is_one_leaving and all(scene.is_serving(one) for one in others)


def _sees_any(scene: Scene) -> bool:
    return any(scene.is_serving(replica) for replica in scene.replicas)


def _sees_or_has_not_condemned(scene: Scene) -> bool:
    """May an unhealthy replica be let go? While none of the set can be seen to serve, only one at a time.

    A control plane that lost its network finds all of them failing, and must not empty the site.
    """
    return _sees_any(scene) or not any(
        replica.reason is Reason.UNHEALTHY and replica.phase is not Phase.ENDED for replica in scene.replicas
    )


def _may_serve(scene: Scene, replica: Replica) -> bool:
    """Seen to serve; or it did, and now none of the set can be seen: the same blindness, while rolling."""
    if scene.is_serving(replica) or _sees_any(scene):
        return scene.is_serving(replica)
    endpoint = scene.endpoint(replica)
    return replica.phase is Phase.RUNNING and endpoint is not None and endpoint.first_ready_at is not None


def is_idle(endpoint: Endpoint | None) -> bool:
    """Do the endpoint's own metrics say that nothing runs and nothing waits? Not knowing is not idle."""
    return endpoint is not None and endpoint.running == 0 and endpoint.waiting == 0


def idle_since(replica: Replica, endpoint: Endpoint | None, rules: PlanRules) -> datetime | None:
    """Since when a draining replica is known to be idle: the first probe that said so after the proxies noticed."""
    if endpoint is None or endpoint.confirmed_at is None or not is_idle(endpoint):
        return None
    if endpoint.confirmed_at < replica.phase_since + rules.drain_settle:
        return None
    return replica.idle_since or endpoint.confirmed_at


def _drained(replica: Replica, endpoint: Endpoint | None, now: datetime) -> Move | None:
    assert replica.drain_deadline is not None  # the schema says so
    if endpoint is None or endpoint.first_ready_at is None:
        return Move(replica, Phase.STOPPING)  # it had never been given a request
    if now >= replica.drain_deadline:
        left = None if endpoint.running is None else endpoint.running + (endpoint.waiting or 0)
        message = f"drain deadline reached; requests cut: {'unknown' if left is None else left}"
        return Move(replica, Phase.STOPPING, message=message, cut_requests=left)
    is_said_twice = (
        replica.idle_since is not None
        and is_idle(endpoint)
        and endpoint.confirmed_at is not None
        and endpoint.confirmed_at >= replica.idle_since + _QUIET
    )
    return Move(replica, Phase.STOPPING, message="drained: no request was left") if is_said_twice else None


# --- what the count asks for -----------------------------------------------------------------------------


def _too_many(scene: Scene, current: list[Replica], walltimes: HandOvers) -> list[Replica]:
    excess = len(current) - scene.target
    return _in_leaving_order(scene, current, walltimes)[:excess] if excess > 0 else []


def _is_to_stay(scene: Scene, replica: Replica) -> bool:
    return replica.spec_hash == scene.replica_set.spec_hash and replica.name not in scene.to_vacate


def _reason_to_leave(scene: Scene, replica: Replica) -> Reason:
    return Reason.ROLLED if replica.spec_hash != scene.replica_set.spec_hash else Reason.NODE_DRAINED


def _superseded(
    scene: Scene,
    current: list[Replica],
    outdated: list[Replica],
    going: list[Replica],
    walltimes: HandOvers,
    *,
    may_start: bool,
) -> list[Replica]:
    """Of an older spec, or on a node being drained: what serves nothing leaves at once, the rest one by one.

    One leaves for each successor that is ready.

    So do those whose walltime is about to end, but for what serves nothing, unless fewer are wanted: it may serve again
    before its successor.
    Where no surge lets a successor start beside them, they make room one by one: only while every live replica serves,
    and one that is made then may start.
    """
    both = outdated + going
    serving = [replica for replica in _in_leaving_order(scene, both, walltimes) if _may_serve(scene, replica)]
    ready = sum(scene.is_serving(replica) for replica in current)
    unfollowed = [replica for replica in going if replica.id not in walltimes.successors]
    excess = max(0, len(current) + len(unfollowed) - scene.target)
    wanted_less = [replica for replica in unfollowed if replica not in serving][:excess]
    useless = [
        one for one in both if one not in serving and (one in outdated or one in wanted_less or ready >= scene.target)
    ]
    spare = max(0, ready + len(serving) - scene.target)
    if may_start and _live(scene) == ready + len(serving) == scene.target and _room(scene) <= 0:
        spare = 1
    return useless + serving[:spare]


def _missing(
    scene: Scene, current: list[Replica], outdated: list[Replica], going: list[Replica], walltimes: HandOvers
) -> int:
    """How many more may be made. Walltimes that end do not wait for the care that is due to a new spec or a drain."""
    missing = min(scene.target, scene.replica_set.max_replicas) - len(current)
    if not outdated:
        return missing
    due = len(going) + sum(replica.name in walltimes.due for replica in outdated)
    starting = sum(not scene.is_serving(replica) for replica in current)
    return min(missing, max(_at_once(scene, current), due - starting))


def _at_once(scene: Scene, current: list[Replica]) -> int:
    """Where care is due, the next one starts when the one before it serves."""
    return 1 if all(scene.is_serving(replica) for replica in current) else 0


def _could_return(scene: Scene, replica: Replica) -> bool:
    """It drains only because it was one too many, or its node was, and still is as good as any."""
    endpoint = scene.endpoint(replica)
    return (
        replica.phase is Phase.DRAINING
        and replica.reason in (Reason.SCALED_DOWN, Reason.NODE_DRAINED)
        and _is_to_stay(scene, replica)
        and endpoint is not None
        and endpoint.health is Health.READY
    )


def _last_call(scene: Scene, replica: Replica, now: datetime) -> Action:
    """Its walltime ends before a successor serves: better no new requests than broken ones."""
    message = "its walltime ends before a successor serves"
    return _drain(replica, Reason.TIME_LIMIT, message, now=now, ends_at=scene.ends_at.get(replica.name))


def _submit(scene: Scene, replica: Replica, now: datetime) -> Action:
    limit = _limit(scene, replica, now)
    return Report(replica.name, limit.waiting) if isinstance(limit, Closing) else Submit(replica, limit)


def _limit(scene: Scene, replica: Replica | None, now: datetime) -> TimeLimit | Closing | None:
    resources = (replica or scene.replica_set).spec.slurm
    assert resources is not None  # only sets that Slurm runs are planned
    return fit(resources, scene.closing, lead=start_lead(scene.replica_set), now=now)


def _additions(
    scene: Scene,
    current: list[Replica],
    places: list[int | None],
    now: datetime,
    rules: PlanRules,
    beside: tuple[str, ...],
) -> list[Action]:
    """Further replicas; `places` holds the id of the predecessor each of them succeeds, if any."""
    missing = min(len(places), _room(scene))
    if missing <= 0:
        return []
    if (hindrance := _hindrance(scene, now, rules)) is not None:
        return [Report(scene.replica_set.name, hindrance)]
    if back_off(scene, rules) is not None:
        missing = min(missing, _at_once(scene, current))  # one is enough to see whether it starts now
    limit = _limit(scene, None, now)
    assert not isinstance(limit, Closing)  # that is a hindrance
    return [Create(scene.replica_set.name, beside, place, limit) for place in places[:missing]]


def _hindrance(scene: Scene, now: datetime, rules: PlanRules) -> str | None:
    """Why no further replica would be made now, whatever room there is."""
    if isinstance(limit := _limit(scene, None, now), Closing):
        return limit.waiting
    pause = back_off(scene, rules)
    return pause.sentence if pause is not None and now < pause.next_try_at else None


def _live(scene: Scene) -> int:
    return sum(replica.phase in LIVE_PHASES for replica in scene.replicas)


def _room(scene: Scene) -> int:
    return scene.replica_set.max_replicas + scene.replica_set.spec.surge - _live(scene)


def back_off(scene: Scene, rules: PlanRules) -> BackOff | None:
    """Whether this set's starts failed of late, or its jobs were lost, and until when no further one is tried.

    What has started since, and still is there, shows that it can be done.
    """
    of_spec = [one for one in scene.replicas if one.spec_hash == scene.replica_set.spec_hash]
    firsts = [endpoint.first_ready_at for one in of_spec if (endpoint := scene.endpoint(one)) is not None]
    since = max((at for at in (*firsts, scene.forgiven_at) if at is not None), default=None)
    return backing_off(scene.past, spec_hash=scene.replica_set.spec_hash, since=since, rules=rules)


def _in_leaving_order(scene: Scene, replicas: Iterable[Replica], walltimes: HandOvers) -> list[Replica]:
    def order(replica: Replica) -> tuple[int, bool, datetime, int, datetime, int]:
        endpoint = scene.endpoint(replica)
        in_flight = (endpoint.running or 0) + (endpoint.waiting or 0) if endpoint is not None else 0
        ends_at = scene.ends_at.get(replica.name, _NO_KNOWN_END)
        ends_soon = ends_at if replica.name in walltimes.soon else _NO_KNOWN_END
        phase = _LEAVING_ORDER.index(replica.phase)
        return (phase, scene.is_serving(replica), ends_soon, in_flight, ends_at, -replica.id)

    return sorted(replicas, key=order)
