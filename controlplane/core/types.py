"""The nouns of the system: what is wanted, what was seen, and what shall be done about it.

Three small machines describe one replica: `Replica` (what we intend), `SlurmJob` (what Slurm says) and `Endpoint`
(what probes say). Whether a replica may be given requests is derived from the three and is stored nowhere.
Every value is immutable; every time is an aware UTC datetime; every duration says its unit or is a `timedelta`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum


class Phase(StrEnum):
    """Where a replica stands. Few phases, many reasons: see `Reason`."""

    PENDING = "PENDING"  # wanted; nothing was asked of Slurm yet
    SUBMITTING = "SUBMITTING"  # a POST may have happened; its outcome is not known
    QUEUED = "QUEUED"  # the job id is known; the job waits or is being configured
    RUNNING = "RUNNING"  # the job runs; whether it is ready is the endpoint's business
    DRAINING = "DRAINING"  # gets no new requests; those in flight finish
    STOPPING = "STOPPING"  # Slurm was, or is about to be, asked to cancel the job
    ENDED = "ENDED"  # final; the reason is kept


EXISTING_PHASES = frozenset({Phase.PENDING, Phase.SUBMITTING, Phase.QUEUED, Phase.RUNNING})
"""Phases that count against `max_replicas`: what is on its way out does not."""

LIVE_PHASES = frozenset(set(Phase) - {Phase.ENDED})
"""Phases that can hold a Slurm job, or are about to: bounded by `max_replicas + surge`."""


class Reason(StrEnum):
    """Why a replica is in its phase: while it leaves, why it leaves; once it has ENDED, why it ended."""

    SCALED_DOWN = "SCALED_DOWN"
    ROLLED = "ROLLED"  # replaced by a replica of a newer spec
    REPLACED = "REPLACED"  # an alert or an operator asked for another one in its place
    DRAINED_BY_OPERATOR = "DRAINED_BY_OPERATOR"
    CANCELLED_BY_OPERATOR = "CANCELLED_BY_OPERATOR"
    NODE_DRAINED = "NODE_DRAINED"  # jobs are kept off its node, on an operator's or an alert's word
    HANDED_OVER = "HANDED_OVER"
    START_TIMEOUT = "START_TIMEOUT"
    UNHEALTHY = "UNHEALTHY"
    REJECTED = "REJECTED"  # Slurm refused the submit for good
    LOST = "LOST"  # a complete list does not know the job any more
    CRASHED = "CRASHED"  # the job ended unasked, whatever its exit code
    TIME_LIMIT = "TIME_LIMIT"
    NODE_FAIL = "NODE_FAIL"
    PREEMPTED = "PREEMPTED"
    CANCELLED_OUTSIDE = "CANCELLED_OUTSIDE"


# --- specs: what operators write ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SlurmResources:
    """What one replica asks of Slurm. `None` leaves the choice to the cluster's defaults."""

    time_limit_seconds: int
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    nodes: int = 1
    gpus_per_node: int = 0
    cpus_per_task: int | None = None
    memory_mb_per_node: int | None = None
    min_time_limit_seconds: int = 1800  # a reservation that leaves less than this is waited for


@dataclass(frozen=True, slots=True)
class VllmOptions:
    """What is served, and with what: the image, the weights, and arguments passed to `vllm serve` as they are."""

    image: str | None = None
    model_path: str | None = None
    args: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    load_seconds: int = 0  # fake vLLM only: how long the pretended model load takes


@dataclass(frozen=True, slots=True)
class ExternalEndpoint:
    """A server that Slurm does not run: probed and routed like any other."""

    url: str
    api_key: str | None = field(default=None, repr=False)


class PolicyType(StrEnum):
    """Kubernetes' words, but for Pods."""

    REPLICAS = "Replicas"
    PERCENT = "Percent"  # of the count at the period's beginning


class SelectPolicy(StrEnum):
    """Which of several policies holds. Kubernetes' words."""

    MAX = "Max"  # the one that allows the largest change
    MIN = "Min"
    DISABLED = "Disabled"  # no alert changes anything in this direction


@dataclass(frozen=True, slots=True)
class ScalingPolicy:
    """How much may change within a period that ends now."""

    type: PolicyType
    value: int
    period_seconds: int


@dataclass(frozen=True, slots=True)
class ScaleUp:
    step: int = 1
    cooldown_seconds: int = 60
    stabilization_window_seconds: int = 0
    policies: tuple[ScalingPolicy, ...] = ()
    select_policy: SelectPolicy = SelectPolicy.MAX


@dataclass(frozen=True, slots=True)
class ScaleDown:
    step: int = 1
    cooldown_seconds: int = 120
    stabilization_window_seconds: int = 300
    policies: tuple[ScalingPolicy, ...] = ()
    select_policy: SelectPolicy = SelectPolicy.MAX


@dataclass(frozen=True, slots=True)
class Schedule:
    """Other bounds for a time: its window opens when the cron expression says so, in the zone's local time."""

    name: str
    cron: str  # five fields
    duration_seconds: int  # elapsed, whatever clocks are put back or forward meanwhile
    time_zone: str = "UTC"  # IANA's name
    min_replicas: int | None = None  # None: as without it
    max_replicas: int | None = None


class Mode(StrEnum):
    ACTIVE = "active"
    ADVISORY = "advisory"  # decides and records, and leaves desired to operators


@dataclass(frozen=True, slots=True)
class HandOver:
    """How a replica whose walltime ends is followed by another one; see `hand_over`."""

    margin_seconds: int = 600  # before the walltime's end: what its last requests may need to finish
    default_lead_seconds: int = 600  # from a successor's creation to its readiness, until a start was measured


class ChooseBy(StrEnum):
    """By what one of a model's endpoints is chosen for a request."""

    LEAST_IN_FLIGHT = "least_in_flight"  # of two that chance names, the one with less to do
    PREFIX = "prefix"  # the conversation's beginning: its next turn finds the engine's cache warm
    SESSION = "session"  # a header's value


@dataclass(frozen=True, slots=True)
class RoutingPolicy:
    """How proxies share out requests; no running job knows of it."""

    policy: ChooseBy = ChooseBy.LEAST_IN_FLIGHT
    session_header: str = "x-session-id"  # in lower case; read by SESSION only
    weight: int = 100  # how much one replica takes, compared with one of another set of the model
    slow_start_seconds: int = 30  # from its first readiness a replica's share grows for so long; 0: whole at once
    max_in_flight: int | None = None  # of one replica; None: what its engine runs at once


@dataclass(frozen=True, slots=True)
class ReplicaSetSpec:
    """One template, its resources and its bounds. Exactly one of `slurm` and `endpoints` is given."""

    name: str
    model: str
    template: str | None = None
    priority: int = 100  # of several sets serving one model, the lowest number grows first and shrinks last
    min_replicas: int = 0
    max_replicas: int = 1
    surge: int = 1  # how many live jobs may exist above max_replicas while others drain
    slurm: SlurmResources | None = None
    vllm: VllmOptions = field(default_factory=VllmOptions)
    endpoints: tuple[ExternalEndpoint, ...] = ()
    scale_up: ScaleUp = field(default_factory=ScaleUp)
    scale_down: ScaleDown = field(default_factory=ScaleDown)
    hand_over: HandOver = field(default_factory=HandOver)
    routing: RoutingPolicy = field(default_factory=RoutingPolicy)
    probe: str = "completion"  # completion | chat | embedding | models: what proves that the engine lives
    start_timeout_seconds: int = 1800  # from the first failed probe to the first passed one
    drain_timeout_seconds: int = 600
    unhealthy_timeout_seconds: int = 120
    mode: Mode = Mode.ACTIVE
    schedules: tuple[Schedule, ...] = ()

    @property
    def is_external(self) -> bool:
        return self.slurm is None


@dataclass(frozen=True, slots=True)
class OperatorBounds:
    """Bounds that an operator gave, above the spec's and its schedules'. None: not this one."""

    min_replicas: int | None
    max_replicas: int | None
    until: datetime | None = None  # None: until the spec is applied anew


@dataclass(frozen=True, slots=True)
class ScheduledBounds:
    """What the schedules whose windows are open ask for, taken together."""

    schedules: tuple[str, ...] = ()  # their names, sorted
    min_replicas: int | None = None
    max_replicas: int | None = None


@dataclass(frozen=True, slots=True)
class Pin:
    """An operator's count that holds until its end, whatever alerts and schedules say."""

    replicas: int
    until: datetime
    actor: str
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Freeze:
    """No automatic scaling, in neither direction."""

    is_of_all: bool  # of every set, those included that are made later
    actor: str
    since: datetime
    reason: str | None = None
    until: datetime | None = None  # None: until it is lifted


@dataclass(frozen=True, slots=True)
class ReplicaSet:
    """A spec and what the control plane has made of it."""

    spec: ReplicaSetSpec
    desired_replicas: int
    spec_hash: str  # of the parts that a running job cannot change; a new hash rolls the replicas
    min_replicas: int  # bounds in force: `core.bounds` makes them
    max_replicas: int
    is_paused: bool = False
    paused_reason: str | None = None
    paused_until: datetime | None = None
    scaled_up_at: datetime | None = None
    scaled_down_at: datetime | None = None
    operator_bounds: OperatorBounds | None = None
    scheduled: ScheduledBounds = field(default_factory=ScheduledBounds)  # in force; a freeze keeps them from changing
    pin: Pin | None = None
    freezes: tuple[Freeze, ...] = ()  # its own, and that of all sets
    start_lead_seconds: float | None = None  # measured, p95, creation to ready; None: never measured

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def is_advisory(self) -> bool:
        return self.spec.mode is Mode.ADVISORY


# --- what is intended and what was seen -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Replica:
    """One desired instance: at most one live Slurm job, never revived."""

    id: int
    name: str  # `cp-<replica set>-<id>`: unique for ever, it is also the Slurm job's name
    replica_set: str
    phase: Phase
    version: int  # every guarded write of the phase adds one
    spec: ReplicaSetSpec  # as it was when the replica was created
    spec_hash: str
    port: int
    secret: str = field(repr=False)
    created_at: datetime
    phase_since: datetime
    reason: Reason | None = None
    message: str | None = None
    slurm_job_id: int | None = None
    submitted_at: datetime | None = None  # when the newest POST was about to leave
    running_since: datetime | None = None
    drain_deadline: datetime | None = None
    idle_since: datetime | None = None  # DRAINING only: since when the endpoint's metrics say idle
    cut_requests: int | None = None  # in flight when its drain's deadline passed; None: it did not, or nobody knows
    succeeds: int | None = None  # id of the replica whose walltime was about to end when this one was made

    @property
    def exists(self) -> bool:
        return self.phase in EXISTING_PHASES

    @property
    def predecessor(self) -> str | None:
        """The name of the replica whose place this one takes."""
        return None if self.succeeds is None else f"cp-{self.replica_set}-{self.succeeds}"


class JobState(StrEnum):
    """Slurm's base states, folded to what a decision may depend on."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    SUSPENDED = "SUSPENDED"
    COMPLETING = "COMPLETING"  # processes may still live
    COMPLETED = "COMPLETED"
    CANCELLED = "CANCELLED"
    FAILED = "FAILED"
    TIMEOUT = "TIMEOUT"
    NODE_FAIL = "NODE_FAIL"
    PREEMPTED = "PREEMPTED"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    BOOT_FAIL = "BOOT_FAIL"
    DEADLINE = "DEADLINE"
    UNKNOWN = "UNKNOWN"  # a state this version has never heard of: never acted upon


OVER_STATES = frozenset(
    {
        JobState.COMPLETED,
        JobState.CANCELLED,
        JobState.FAILED,
        JobState.TIMEOUT,
        JobState.NODE_FAIL,
        JobState.PREEMPTED,
        JobState.OUT_OF_MEMORY,
        JobState.BOOT_FAIL,
        JobState.DEADLINE,
    }
)


@dataclass(frozen=True, slots=True)
class SlurmJob:
    """One job as slurmrestd showed it."""

    job_id: int
    name: str
    user_name: str
    state: JobState
    comment: str = ""
    state_reason: str = ""
    is_held: bool = False
    nodes: str = ""  # Slurm's node list expression, as given
    batch_host: str = ""
    submitted_at: datetime | None = None
    started_at: datetime | None = None  # for a pending job: Slurm's estimate, if it has one
    ends_at: datetime | None = None  # while running: the walltime's end
    exit_code: int | None = None
    signal: int | None = None
    restart_count: int = 0
    raw_state: str = ""  # the words Slurm used, for people
    excluded_nodes: str = ""  # a node list expression: where it was asked not to run

    @property
    def is_over(self) -> bool:
        return self.state in OVER_STATES


@dataclass(frozen=True, slots=True)
class JobList:
    """A complete answer to "which jobs are there": what it does not name was Absent at `asked_at`.

    No answer, or a partial one, is never a JobList: adapters raise instead, and the round knows nothing.
    """

    jobs: tuple[SlurmJob, ...]
    asked_at: datetime  # when the request left: later facts cannot be denied by this list


@dataclass(frozen=True, slots=True)
class Unknown:
    """No answer, a partial one, or one that cannot be read. Never a permission to submit or to cancel."""

    message: str


class Health(StrEnum):
    UNPROVEN = "UNPROVEN"  # has not passed yet
    READY = "READY"
    FAILING = "FAILING"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`http://host:port` where a replica serves, and what probes have found there."""

    id: int
    replica_set: str
    model: str
    url: str
    api_key: str | None = field(repr=False)
    replica: str | None = None  # None: Slurm does not run it
    probe: str = "completion"  # as in the spec it was made for
    is_draining: bool = False  # its replica is
    health: Health = Health.UNPROVEN
    passes: int = 0  # consecutive
    fails: int = 0  # consecutive
    first_ready_at: datetime | None = None
    failing_since: datetime | None = None
    probed_at: datetime | None = None  # newest look, passed or failed
    confirmed_at: datetime | None = None  # newest passed probe
    running: int | None = None  # requests, from the endpoint's own metrics; None: not known
    waiting: int | None = None
    generated_tokens: float | None = None  # counter, to see an engine move that is too busy to answer
    message: str | None = None  # what the newest failed probe said


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """One look at an endpoint. `is_foreign`: something answered, and it is not ours."""

    passed: bool
    message: str | None = None
    is_foreign: bool = False
    running: int | None = None
    waiting: int | None = None
    generated_tokens: float | None = None


class AlertAction(StrEnum):
    SCALE_UP = "scale_up"
    SCALE_DOWN = "scale_down"
    REPLACE = "replace"
    DRAIN_NODE = "drain_node"


@dataclass(frozen=True, slots=True)
class Alert:
    """One alert instance as a level: while it is firing and fresh, it presses."""

    source: str  # grafana | alertmanager | proxy
    org_id: int
    fingerprint: str
    alertname: str
    is_firing: bool
    starts_at: datetime
    ends_at: datetime | None
    refreshed_at: datetime  # newest delivery or pull that confirmed it
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)
    action: AlertAction | None = None  # None: stored and shown, never acted upon
    ignored_reason: str | None = None
    step: int | None = None
    stale_since: datetime | None = None  # when it was noted that nobody confirms it any more

    @property
    def key(self) -> str:
        return f"{self.source}/{self.org_id}/{self.fingerprint}"


# --- what was decided and what shall be done ------------------------------------------------------------


class DecisionReason(StrEnum):
    STEADY = "STEADY"
    PAUSED = "PAUSED"
    BELOW_MIN = "BELOW_MIN"
    ABOVE_MAX = "ABOVE_MAX"
    SCALED_UP = "SCALED_UP"
    SCALED_DOWN = "SCALED_DOWN"
    AT_MAX = "AT_MAX"  # wanted more; the bound refused
    AT_MIN = "AT_MIN"
    STARTING = "STARTING"  # wanted more; one is still starting
    COOLDOWN = "COOLDOWN"
    STABILIZING = "STABILIZING"  # wanted more for too short a time; or fewer, and up-pressure was felt too recently
    LIMITED = "LIMITED"  # wanted more or fewer; the policies allow no further change yet
    DISABLED = "DISABLED"  # wanted more or fewer; the spec allows no change in this direction
    SCHEDULED = "SCHEDULED"  # a schedule's window opened or ended
    PINNED = "PINNED"
    FROZEN = "FROZEN"
    OPERATOR = "OPERATOR"
    BACKING_OFF = "BACKING_OFF"  # wanted more, or no alert presses; what failed is not tried again before its time


@dataclass(frozen=True, slots=True)
class Decision:
    """How many replicas a set shall have, and why: one sentence a person can read."""

    replica_set: str
    desired: int
    previous: int
    reason: DecisionReason
    explanation: str
    alerts: tuple[str, ...] = ()  # keys of the alerts that pressed
    scheduled: ScheduledBounds | None = None  # put in force with it; None: they stay

    @property
    def changes_desired(self) -> bool:
        return self.desired != self.previous


@dataclass(frozen=True, slots=True)
class Change:
    """A past decision that changed desired."""

    at: datetime
    previous: int
    desired: int


@dataclass(frozen=True, slots=True)
class PastReplica:
    """What is worth remembering of a replica that has ended."""

    name: str
    replica_set: str
    spec_hash: str
    reason: Reason
    message: str | None
    ended_at: datetime
    was_ready: bool
    created_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class TimeLimit:
    """A shorter walltime than the spec's, and why."""

    seconds: int
    why: str


@dataclass(frozen=True, slots=True)
class Create:
    replica_set: str
    beside: tuple[str, ...] = ()  # names of those that it shall succeed: they do not count against the desired ones
    succeeds: int | None = None  # a replica's id: it is counted no more, for this one takes its place
    limit: TimeLimit | None = None  # None: as the spec says


@dataclass(frozen=True, slots=True)
class Submit:
    replica: Replica
    limit: TimeLimit | None = None  # None: as the spec says


@dataclass(frozen=True, slots=True)
class Release:
    replica: Replica


@dataclass(frozen=True, slots=True)
class Exclude:
    """Tell Slurm which nodes a job that waits shall not be given. None at all: any node will do."""

    replica: Replica
    nodes: frozenset[str]


@dataclass(frozen=True, slots=True)
class CancelJob:
    """Ask Slurm to end this job, after a fresh answer has shown our name and user on it."""

    job_id: int
    job_name: str


@dataclass(frozen=True, slots=True)
class Move:
    """A guarded write: only if the replica still is in `replica.phase` at `replica.version`."""

    replica: Replica
    to: Phase
    reason: Reason | None = None
    message: str | None = None
    slurm_job_id: int | None = None  # set: recorded with the move
    drain_deadline: datetime | None = None
    running_since: datetime | None = None
    cut_requests: int | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """Nothing may be done about it yet, but an operator should know."""

    subject: str
    message: str


Action = Create | Submit | Release | Exclude | CancelJob | Move | Report


def seconds(value: int) -> timedelta:
    """Spec fields end in `_seconds` and are integers; arithmetic is done on `timedelta`."""
    return timedelta(seconds=value)


# --- what the proxy is told -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RoutableEndpoint:
    """A row of the view `routable_endpoints`: may be given requests now."""

    endpoint_id: int
    model: str
    replica_set: str
    priority: int
    url: str
    api_key: str | None = field(repr=False)
    replica: str | None
    first_ready_at: datetime
    ends_at: datetime | None  # the walltime's end; None: none is known
    yields_at: datetime | None = None  # from then on it gets new requests only if no other can take them
    routing: RoutingPolicy = field(default_factory=RoutingPolicy)  # its set's
    runs_at_once: int = 256  # requests, by its engine's arguments; what comes beyond waits in the engine's own queue

    @property
    def weight(self) -> int:
        return self.routing.weight

    @property
    def max_in_flight(self) -> int | None:
        return self.routing.max_in_flight


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A row of the view `served_models`: a model that some replica set serves, now or when asked to."""

    model: str
    created_at: datetime
    is_paused: bool  # by every set that serves it
    paused_until: datetime | None
    routable: int
    starting_since: datetime | None  # the oldest replica that is not ready yet
    start_seconds_p95: float | None  # the longest start lead of its replica sets; None: never measured
    can_start: bool = True  # some set has, or may be given, a replica
    load_seconds_p95: float | None = None  # of a start, from its job's begin; None: never measured
    loading_since: datetime | None = None  # since when the oldest job runs whose replica is not ready yet
    expected_start_at: datetime | None = None  # Slurm's estimate of when the first job that waits will run


@dataclass(frozen=True, slots=True)
class ApiKey:
    """Who may ask, and for what. The key itself is known to its owner only."""

    id: int
    tenant: str
    prefix: str
    key_hash: bytes = field(repr=False)
    models: frozenset[str] | None  # None: every model
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """What one tenant may use; None: as much as there is."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # prompt and completion
    max_concurrent: int | None = None  # requests in flight or waiting
    monthly_tokens: int | None = None  # of the UTC month
    weight: float = 1.0  # against other tenants that wait for the same model

    @property
    def is_limited(self) -> bool:
        bounds = (self.requests_per_minute, self.tokens_per_minute, self.max_concurrent, self.monthly_tokens)
        return any(bound is not None for bound in bounds)
