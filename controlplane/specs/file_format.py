"""What may be written in a file of replica sets: keys, types, bounds and defaults, which are those of `core.types`.

Unknown keys are refused and nothing is converted: a number in quotes is text. The docstrings below the fields are the
descriptions in the published JSON Schema.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError

from controlplane.specs.schedules import check_cron, zone_of

MAX_REPLICAS = 10_000
_YEAR = 366 * 86400
_HEADER_NAME = r"^[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}$"  # RFC 9110, 5.6.2


def _printable(text: str) -> str:
    if any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in text):
        raise PydanticCustomError("text", "must not contain line breaks or other control characters")
    return text


def _argument(text: str) -> str:
    if text.startswith("-") or text != text.strip():
        raise PydanticCustomError("text", "must not begin with a dash, nor begin or end with a space")
    return text


def _endpoint_url(text: str) -> str:
    wrong = PydanticCustomError("url", "must be http://host:port or https://host:port")
    try:
        url = urlsplit(text)
        is_whole = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:
        raise wrong from None
    if not is_whole or not re.fullmatch(r"[!-~]+", text):
        raise wrong
    if "@" in url.netloc:
        raise PydanticCustomError("url", "must not contain a user or a password; use api_key or api_key_file")
    if url.path not in ("", "/") or url.query or url.fragment or text[-1] in "?#":
        raise PydanticCustomError("url", "must end after the port: the paths below it are OpenAI's")
    return text.rstrip("/")


def _read_by(read: Callable[[str], object]) -> AfterValidator:
    """A validator of a function that says with a ValueError what is wrong."""

    def validate(text: str) -> str:
        try:
            read(text)
        except ValueError as error:
            raise PydanticCustomError("schedule", "{why}", {"why": str(error)}) from None
        return text

    return AfterValidator(validate)


Text = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_printable)]
LongText = Annotated[str, Field(max_length=4096), AfterValidator(_printable)]
Value = Annotated[Text, AfterValidator(_argument)]
PathText = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_printable), AfterValidator(_argument)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$")]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")]
ApiKeyText = Annotated[str, Field(pattern=r"^[!-~]{1,4096}$")]
Seconds = Annotated[int, Field(ge=0, le=_YEAR)]
Period = Annotated[int, Field(gt=0, le=86400)]
PositiveSeconds = Annotated[int, Field(gt=0, le=_YEAR)]
Count = Annotated[int, Field(ge=1, le=MAX_REPLICAS)]
CountOrNone = Annotated[int, Field(ge=0, le=MAX_REPLICAS)]


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class SlurmDocument(_Document):
    """What one replica asks of Slurm. What is left out is the cluster's default."""

    time_limit_seconds: PositiveSeconds
    """The job's walltime; before it ends, another replica takes its place."""
    partition: Value | None = None
    account: Value | None = None
    qos: Value | None = None
    constraint: Value | None = None
    nodes: Count = 1
    gpus_per_node: CountOrNone = 0
    cpus_per_task: Count | None = None
    memory_mb_per_node: Annotated[int, Field(ge=1, le=2**40)] | None = None
    min_time_limit_seconds: PositiveSeconds = 1800
    """The least walltime worth a start, where a reservation of the nodes leaves less than time_limit_seconds."""


class VllmDocument(_Document):
    """What is served, and with what."""

    image: PathText | None = None
    """The container image, as the template's runtime understands it."""
    model_path: PathText | None = None
    """The weights: a directory, or a name that vLLM can resolve."""
    args: list[LongText] = []
    """Further arguments of `vllm serve`, passed on as they are."""
    environment: dict[VariableName, LongText] = {}
    """Environment variables of the server."""
    load_seconds: Seconds = 0
    """For the fake vLLM only: how long loading the model takes."""


class EndpointDocument(_Document):
    """A server that Slurm does not run."""

    url: Annotated[str, Field(max_length=512), AfterValidator(_endpoint_url)]
    """`http://host:port`, without a path."""
    api_key: ApiKeyText | None = Field(default=None, repr=False)
    """The key that the server asks for."""
    api_key_file: PathText | None = None
    """A file that holds it; read when the file is applied."""

    @model_validator(mode="after")
    def _one_key(self) -> Self:
        if self.api_key is not None and self.api_key_file is not None:
            raise PydanticCustomError("both", "give api_key or api_key_file, not both")
        return self


class PolicyDocument(_Document):
    """How much may change within a period that ends now, whoever changes it. It bounds `step` and adds nothing."""

    type: Literal["Replicas", "Percent"]
    """`Percent` is of the count at the period's beginning, rounded up."""
    value: Count
    period_seconds: Period


SelectPolicyWord = Literal["Max", "Min", "Disabled"]


class ScaleUpDocument(_Document):
    """How the set grows while an alert asks for it."""

    step: Count = 1
    """How many at a time, unless the alert's label `step` says so."""
    cooldown_seconds: Seconds = 60
    stabilization_window_seconds: Seconds = 0
    """How long an alert must have pressed, since it began or since the last step up, before the next one."""
    policies: list[PolicyDocument] = []
    select_policy: SelectPolicyWord = "Max"
    """Of several policies, the one that allows the largest change, or the smallest; `Disabled`: no alert grows it."""


class ScaleDownDocument(_Document):
    """How the set shrinks while an alert asks for it."""

    step: Count = 1
    """How many at a time, unless the alert's label `step` says so."""
    cooldown_seconds: Seconds = 120
    stabilization_window_seconds: Seconds = 300
    """How long no alert may have asked for more."""
    policies: list[PolicyDocument] = []
    select_policy: SelectPolicyWord = "Max"
    """Of several policies, the one that allows the largest change, or the smallest; `Disabled`: no alert shrinks it."""


class ScheduleDocument(_Document):
    """Other bounds for a time. While several are open hold the highest min and the lowest max; min wins."""

    name: Name
    """Decisions name it."""
    cron: Annotated[Text, _read_by(check_cron)]
    """When it opens: minute, hour, day of month, month, day of week, as in `0 8 * * MON-FRI`."""
    time_zone: Annotated[Text, _read_by(zone_of)] = "UTC"
    """IANA's name, as Europe/Berlin: cron is read in its local time."""
    duration_seconds: Annotated[int, Field(ge=60, le=_YEAR)]
    """How long it stays open, in elapsed time."""
    min_replicas: CountOrNone | None = None
    max_replicas: CountOrNone | None = None

    @model_validator(mode="after")
    def _gives_bounds(self) -> Self:
        low, high = self.min_replicas, self.max_replicas
        if low is None and high is None:
            raise PydanticCustomError("bounds", "give min_replicas, max_replicas or both")
        if low is not None and high is not None and low > high:
            raise PydanticCustomError("bounds", "min_replicas must not be greater than max_replicas")
        return self


class HandOverDocument(_Document):
    """How a replica whose walltime ends is followed by another one."""

    margin_seconds: Seconds = 600
    """The successor shall serve so long before the end; so long may the predecessor's requests take to finish."""
    default_lead_seconds: Seconds = 600
    """How long a start is expected to take, from creation to ready, until one of this set was measured."""


class RoutingDocument(_Document):
    """How proxies share out requests among the model's replicas. A change touches no replica."""

    policy: Literal["least_in_flight", "prefix", "session"] = "least_in_flight"
    """`least_in_flight`: of two at random, the one with less to do. `prefix`: turns of one conversation go to one
    replica, whose prefix cache knows it; none gets more than 1.25 times its share. `session`: the same by a header's
    value, and by the conversation where it is missing. Of several sets of one model, the one with the lowest `priority`
    that serves says so for all."""
    session_header: Annotated[str, Field(pattern=_HEADER_NAME), AfterValidator(str.lower)] = "x-session-id"
    """Whose value `session` goes by; upper and lower case do not differ."""
    weight: Annotated[int, Field(ge=1, le=10_000)] = 100
    """How much one replica takes, compared with a replica of another set of the same model."""
    slow_start_seconds: Annotated[int, Field(ge=0, le=3600)] = 30
    """For so long after it is ready for the first time a replica's share grows to the whole; 0: whole at once."""
    max_in_flight: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Requests that one replica is given at once; by default `--max-num-seqs` of vllm.args, else 256."""


_ONE_KIND: JsonDict = {
    "oneOf": [
        {"required": ["slurm"], "properties": {"slurm": {"type": "object"}}},
        {"required": ["endpoints"], "properties": {"endpoints": {"minItems": 1}}},
    ]
}


class ReplicaSetDocument(_Document):
    """One model served by equal replicas: either Slurm jobs of one template, or fixed endpoints."""

    model_config = ConfigDict(json_schema_extra=_ONE_KIND)

    name: Name
    """Lower-case letters, digits and dashes, at most 40; for ever this set's."""
    model: Value
    """What clients put into `model`. Several sets may serve one model."""
    template: Name | None = None
    """The job script, without `.sbatch`; `vllm-apptainer` unless given."""
    priority: Annotated[int, Field(ge=0, le=1_000_000)] = 100
    """Of several sets serving one model, the lowest number grows first and shrinks last."""
    min_replicas: CountOrNone = 0
    max_replicas: CountOrNone = 1
    surge: CountOrNone = 1
    """How many live jobs may exist above max_replicas while others drain."""
    slurm: SlurmDocument | None = None
    vllm: VllmDocument = VllmDocument()
    endpoints: list[EndpointDocument] = []
    scale_up: ScaleUpDocument = ScaleUpDocument()
    scale_down: ScaleDownDocument = ScaleDownDocument()
    mode: Literal["active", "advisory"] = "active"
    """`advisory`: alerts and schedules are decided upon and recorded, and change nothing; operators still do."""
    schedules: list[ScheduleDocument] = []
    """Other bounds at certain times."""
    hand_over: HandOverDocument = HandOverDocument()
    routing: RoutingDocument = RoutingDocument()
    probe: Literal["completion", "chat", "embedding", "models"] = "completion"
    """What proves that the engine lives: one token of an answer, an embedding, or only its list of models."""
    start_timeout_seconds: PositiveSeconds = 1800
    """From the first look at the running server that fails to the first that passes."""
    drain_timeout_seconds: Seconds = 600
    """How long requests in flight may take to finish before the job is cancelled."""
    unhealthy_timeout_seconds: PositiveSeconds = 120
    """How long a replica may fail its probes before it is replaced."""

    @model_validator(mode="after")
    def _is_one_kind(self) -> Self:
        if (self.slurm is None) == (not self.endpoints):
            raise PydanticCustomError("kind", "give exactly one of slurm and endpoints")
        if self.min_replicas > self.max_replicas:
            raise PydanticCustomError("bounds", "min_replicas must not be greater than max_replicas")
        self._check_schedules()
        if self.slurm is None:
            for name in _ONLY_WITH_SLURM:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise PydanticCustomError("kind", "{name} is only for sets that Slurm runs", {"name": name})
            urls = [endpoint.url for endpoint in self.endpoints]
            if len(set(urls)) != len(urls):
                raise PydanticCustomError("twice", "endpoints: each url may be given once")
        return self

    def _check_schedules(self) -> None:
        names = [schedule.name for schedule in self.schedules]
        if len(set(names)) != len(names):
            raise PydanticCustomError("twice", "schedules: each name may be given once")
        for one in self.schedules:
            low = self.min_replicas if one.min_replicas is None else one.min_replicas
            high = self.max_replicas if one.max_replicas is None else one.max_replicas
            if low > high:
                raise PydanticCustomError(
                    "bounds",
                    "schedules: {name} would have min_replicas {low} and max_replicas {high}; give it both",
                    {"name": one.name, "low": low, "high": high},
                )


_ONLY_WITH_SLURM = (
    "template",
    "min_replicas",
    "max_replicas",
    "surge",
    "vllm",
    "scale_up",
    "scale_down",
    "mode",
    "schedules",
    "hand_over",
)


class ReplicaSetsFile(_Document):
    """Replica sets of the control plane; apply with `controlplane apply -f FILE`."""

    replica_sets: list[ReplicaSetDocument] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [one.name for one in self.replica_sets]
        for name in names:
            if names.count(name) > 1:
                raise PydanticCustomError("twice", "replica_sets: two are named {name}", {"name": name})
        return self
