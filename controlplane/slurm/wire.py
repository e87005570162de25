"""slurmrestd's JSON and the core's nouns: the only file that knows field shapes and API versions.

Two dialects exist among the versions this client speaks; what differs between them is data (`Dialect`). Answers are
read tolerantly: unknown fields are ignored, a number may be plain or `{set, infinite, number}`, a state may be a word
or a list. Requests are written strictly: 22.05 refuses unknown keys, and later releases silently drop what has the
wrong shape. What cannot be read raises `SlurmProtocolError`; a state nobody has heard of is `JobState.UNKNOWN`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from controlplane.core.host_lists import expand
from controlplane.core.nodes import SlurmNode
from controlplane.core.reservations import Reservation
from controlplane.core.types import OVER_STATES, JobState, SlurmJob, SlurmResources
from controlplane.slurm.errors import SlurmProtocolError, foreign_text
from controlplane.slurm.transport import Answer

# --- versions -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dialect:
    """What differs between the API versions in the requests written here."""

    version: str
    is_tagged: bool  # numbers are `{set, infinite, number}`, the environment is a list, GPUs are asked for as TRES
    can_forbid_requeue: bool  # 22.05 reads `"requeue": false` as true
    can_warn_batch_shell: bool  # 22.05 can only signal job steps, and we start none
    excluded_nodes: str  # 22.05 refuses the name that it shows ("Disabled key"), and takes this one


DIALECTS: Final[Mapping[str, Dialect]] = {
    **{
        version: Dialect(
            version,
            is_tagged=True,
            can_forbid_requeue=True,
            can_warn_batch_shell=True,
            excluded_nodes="excluded_nodes",
        )
        for version in ("v0.0.45", "v0.0.44", "v0.0.43", "v0.0.42", "v0.0.41", "v0.0.40")
    },
    "v0.0.38": Dialect(
        "v0.0.38",
        is_tagged=False,
        can_forbid_requeue=False,
        can_warn_batch_shell=False,
        excluded_nodes="exclude_nodes",
    ),
}
"""Every version spoken, newest first."""


# --- requests -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class JobRequest:
    """A job to submit. It is always submitted held, and never to be requeued."""

    name: str
    comment: str
    script: str
    environment: Mapping[str, str]  # the whole environment; Slurm wants it not empty
    working_directory: str
    standard_output: str  # %j is the job id; standard error goes there as well
    resources: SlurmResources
    warning_seconds: int | None = None  # USR1 to the script that long before the time limit, where Slurm can
    excluded_nodes: frozenset[str] = frozenset()  # nodes that Slurm knows: it refuses the job otherwise


def write_submit(request: JobRequest, dialect: Dialect) -> dict[str, Any]:
    """The body of `POST job/submit`."""
    resources = request.resources
    gpus = resources.gpus_per_node or None
    job: dict[str, Any] = {
        "name": request.name,
        "comment": request.comment,
        "hold": True,
        "current_working_directory": request.working_directory,
        "standard_output": request.standard_output,
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "constraints": resources.constraint,
        "nodes": str(resources.nodes),  # 22.05 documents [least, most], takes it, and gives one node all the same
        "tasks": resources.nodes,
        "cpus_per_task": resources.cpus_per_task,
    }
    minutes = -(-resources.time_limit_seconds // 60)  # Slurm counts minutes: never less than was asked for
    if dialect.is_tagged:
        job |= {
            "environment": [f"{name}={value}" for name, value in request.environment.items()],
            "tres_per_node": f"gres/gpu:{gpus}" if gpus else None,
            "time_limit": _tagged(minutes),
            "memory_per_node": None if resources.memory_mb_per_node is None else _tagged(resources.memory_mb_per_node),
        }
    else:
        job |= {
            "environment": dict(request.environment),
            "gpus_per_node": str(gpus) if gpus else None,
            "time_limit": minutes,
            "memory_per_node": resources.memory_mb_per_node,
        }
    if request.excluded_nodes:
        job |= write_exclusion(request.excluded_nodes, dialect)
    if dialect.can_forbid_requeue:
        job["requeue"] = False  # a replica is never revived; on 22.05 the cluster's JobRequeue decides
    if dialect.can_warn_batch_shell and request.warning_seconds is not None:
        job |= {
            "kill_warning_signal": "USR1",
            "kill_warning_flags": ["BATCH_JOB"],
            "kill_warning_delay": _tagged(request.warning_seconds),
        }
    return {"script": request.script, "job": {name: value for name, value in job.items() if value is not None}}


def write_release() -> dict[str, Any]:
    """The body of `POST job/{id}` that ends our hold."""
    return {"hold": False}


def write_exclusion(nodes: Iterable[str], dialect: Dialect) -> dict[str, Any]:
    """What keeps a job off these nodes, in a submit or as the body of `POST job/{id}`; none at all takes it back.

    Tried on 22.05.8 and 24.11.5: 22.05 wants text and refuses a list; later ones want a list, but of a list without
    names they change nothing, and only the empty text (which they remark upon) takes an exclusion back.
    """
    names = sorted(nodes)
    return {dialect.excluded_nodes: names if names and dialect.is_tagged else ",".join(names)}


def _tagged(number: int) -> dict[str, Any]:
    return {"set": True, "infinite": False, "number": number}


# --- answers: what was complained about -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Complaint:
    """One entry of `errors` or `warnings`."""

    number: int | None
    text: str


def read_complaints(answer: Answer, key: str = "errors") -> tuple[Complaint, ...]:
    """The entries of `errors`, or of `warnings`. Slurm's number has three names, and some entries have none."""
    complaints = []
    for entry in _list((answer.body or {}).get(key)):
        if not isinstance(entry, dict):
            complaints.append(Complaint(None, foreign_text(str(entry))))
            continue
        numbers = (_number(entry.get(name)) for name in ("error_number", "error_code", "errno"))
        words = (str(entry[name]) for name in ("error", "description") if entry.get(name))
        complaints.append(
            Complaint(next((number for number in numbers if number is not None), None), foreign_text(": ".join(words)))
        )
    return tuple(complaints)


def read_release_name(answer: Answer) -> str:
    """Slurm's own version, such as `22.05.8`; empty if the answer does not tell."""
    meta = _mapping((answer.body or {}).get("meta"))
    return foreign_text(str(_mapping(meta.get("slurm") or meta.get("Slurm")).get("release") or ""))


def is_controller_up(answer: Answer) -> bool:
    """Whether the answer to a ping shows a controller that responds. 24.11 and later say 200 for a dead one as well."""
    pings = map(_mapping, _list((answer.body or {}).get("pings")))
    return answer.status == 200 and any(
        ping.get("responding") is True or "UP" in (ping.get("ping"), ping.get("pinged")) for ping in pings
    )


# --- answers: jobs --------------------------------------------------------------------------------------

_HELD: Final = 2042  # "Job is in held state": what every submit here asks for

_FLAGS: Final[Mapping[str, JobState]] = {  # the first that is present decides, whatever the base state
    "COMPLETING": JobState.COMPLETING,
    "STAGE_OUT": JobState.COMPLETING,
    "REQUEUED": JobState.PENDING,
    "REQUEUE_FED": JobState.PENDING,
    "REQUEUE_HOLD": JobState.PENDING,
    "SPECIAL_EXIT": JobState.PENDING,
    "CONFIGURING": JobState.PENDING,
    "POWER_UP_NODE": JobState.PENDING,
    "STOPPED": JobState.SUSPENDED,
    "RESIZING": JobState.RUNNING,
    "SIGNALING": JobState.RUNNING,
}
_SILENT_FLAGS: Final = frozenset({"LAUNCH_FAILED", "RECONFIG_FAIL", "UPDATE_DB"})  # say nothing about what runs
_BASE_STATES: Final[Mapping[str, JobState]] = {
    state.value: state for state in JobState if state not in (JobState.COMPLETING, JobState.UNKNOWN)
}


@dataclass(frozen=True, slots=True)
class Submitted:
    """A submit that succeeded. `warnings` is what Slurm had to say about it, cut: a dropped field shows up here."""

    job_id: int
    warnings: tuple[str, ...] = ()


def read_submitted(answer: Answer) -> Submitted | None:
    """The job that a submit made, or None: it succeeded if and only if the answer has a non-zero job id.

    22.05 puts into `errors`, with the job id, what keeps a job from starting yet; later releases into `warnings`.
    """
    body = answer.body or {}
    job_id = _number(body.get("job_id"))
    if not job_id or job_id < 0:
        return None
    remarks = [
        complaint.text
        for complaint in (*read_complaints(answer), *read_complaints(answer, "warnings"))
        if complaint.number != _HELD and "Job is in held state" not in complaint.text
    ]
    if message := body.get("job_submit_user_msg"):
        remarks.append(foreign_text(str(message)))
    return Submitted(job_id, tuple(remarks))


def read_jobs(answer: Answer, *, prefix: str, user_names: Mapping[int, str]) -> tuple[SlurmJob, ...]:
    """Every job whose name begins with `prefix`, whoever owns it.

    Raises `SlurmProtocolError` unless every entry can be told to be, or not to be, one of them: a list with a hole
    would make a live job look absent. `user_names` names user ids for a slurmrestd that knows no names.
    """
    entries = (answer.body or {}).get("jobs")
    if not isinstance(entries, list):
        raise SlurmProtocolError(f"HTTP {answer.status} without a list of jobs: {answer.text}")
    jobs = []
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise SlurmProtocolError("a job without a name in the list of jobs")
        if entry["name"].startswith(prefix):
            jobs.append(_job(entry, user_names))
    return tuple(jobs)


def read_job(answer: Answer, job_id: int, *, user_names: Mapping[int, str]) -> SlurmJob:
    """The one job asked for. Raises `SlurmProtocolError` if the answer does not hold it."""
    for job in read_jobs(answer, prefix="", user_names=user_names):
        if job.job_id == job_id:
            return job
    raise SlurmProtocolError(f"HTTP {answer.status} without job {job_id}: {answer.text}")


def _job(entry: Mapping[str, Any], user_names: Mapping[int, str]) -> SlurmJob:
    job_id = _number(entry.get("job_id"))
    user_name = entry.get("user_name") or user_names.get(_number(entry.get("user_id")) or 0)
    words = entry.get("job_state")
    words = [words] if isinstance(words, str) else words
    if not job_id or job_id < 0 or not isinstance(user_name, str) or not isinstance(words, list):
        raise SlurmProtocolError("a job without id, user or state in the list of jobs")
    state = _state(str(word) for word in words)
    state_reason = _text(entry.get("state_reason"))
    exit_code, signal = _exit(entry.get("exit_code")) if state in OVER_STATES else (None, None)
    return SlurmJob(
        job_id=job_id,
        name=entry["name"],
        user_name=user_name,
        state=state,
        comment=_text(entry.get("comment")),
        state_reason=state_reason,
        # a cancelled job keeps the reason for which it was pending, so the state is asked first
        is_held=state is JobState.PENDING
        and (
            entry.get("hold") is True
            or state_reason in ("JobHeldUser", "JobHeldAdmin")
            or _number(entry.get("priority")) == 0
        ),
        nodes=_text(entry.get("nodes")),
        batch_host=_text(entry.get("batch_host")),
        submitted_at=_time(entry.get("submit_time")),
        started_at=_time(entry.get("start_time")),
        ends_at=_time(entry.get("end_time")),
        exit_code=exit_code,
        signal=signal,
        restart_count=_number(entry.get("restart_cnt")) or 0,
        raw_state=foreign_text("+".join(str(word) for word in words)),
        excluded_nodes=_text(entry.get("excluded_nodes")),
    )


def _state(words: Iterable[str]) -> JobState:
    """22.05 shows one word, a flag in place of the base state; later releases the base state and its flags."""
    present = set(words)
    if not present or not present <= _FLAGS.keys() | _SILENT_FLAGS | _BASE_STATES.keys():
        return JobState.UNKNOWN
    for flag, state in _FLAGS.items():
        if flag in present:
            return state
    bases = present & _BASE_STATES.keys()
    return _BASE_STATES[bases.pop()] if len(bases) == 1 else JobState.UNKNOWN


def _exit(value: object) -> tuple[int | None, int | None]:
    """(exit code, signal), one of them None. 22.05 gives the status of wait(2), later releases an object."""
    if isinstance(value, dict):
        return _number(value.get("return_code")), _number(_mapping(value.get("signal")).get("id")) or None
    status = _number(value)
    if status is None:
        return None, None
    signal = status & 0x7F
    return (None, signal) if signal else (status >> 8, None)


# --- answers: nodes -------------------------------------------------------------------------------------


def read_node_address(answer: Answer, node: str) -> str:
    """Where the node is reached, as Slurm itself reaches it; the node's name if Slurm does not tell."""
    for entry in map(_mapping, _list((answer.body or {}).get("nodes"))):
        if entry.get("name") == node:
            return _text(entry.get("address")) or node
    return node


_UNUSABLE: Final = frozenset(
    {"DOWN", "DRAIN", "DRAINED", "DRAINING", "ERROR", "FAIL", "FUTURE", "INVAL", "INVALID", "NOT_RESPONDING", "UNKNOWN"}
)


def read_nodes(answer: Answer) -> tuple[SlurmNode, ...]:
    """Every node there is. Raises `SlurmProtocolError` for what is no list of them."""
    entries = (answer.body or {}).get("nodes")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and entry.get("name") for entry in entries):
        raise SlurmProtocolError(f"HTTP {answer.status} without a list of nodes: {answer.text}")
    return tuple(_node(entry) for entry in entries)


def _node(entry: Mapping[str, Any]) -> SlurmNode:
    states = {word.upper() for word in [*_words(entry.get("state")), *_words(entry.get("state_flags"))]}
    return SlurmNode(
        name=str(entry["name"]),
        partitions=frozenset(_words(entry.get("partitions"))),
        features=frozenset(_words(entry.get("active_features"))),
        is_usable=bool(states) and not states & _UNUSABLE,
    )


def _words(value: object) -> list[str]:
    """A list of words, or text with commas between them."""
    return [str(word) for word in value] if isinstance(value, list) else [*filter(None, _text(value).split(","))]


# --- answers: reservations ------------------------------------------------------------------------------


def read_reservations(answer: Answer, *, user_name: str) -> tuple[Reservation, ...]:
    """Those that close whole nodes to jobs that name no reservation. Raises `SlurmProtocolError`.

    22.05 does not tell which cores of a node are reserved: there a reservation of some of them counts as one of all.
    """
    return tuple(
        Reservation(
            name=_text(entry.get("name")),
            starts_at=_required_time(entry, "start_time"),
            ends_at=_required_time(entry, "end_time"),
            nodes=_nodes(entry.get("node_list")),
            is_maintenance="MAINT" in _list(entry.get("flags")),
        )
        for entry in _entries(answer, "reservations")
        if not _list(entry.get("core_specializations")) and not _draws_jobs_of(entry, user_name)
    )


def read_partitions(answer: Answer) -> tuple[Mapping[str, frozenset[str]], str | None]:
    """The nodes of every partition, and the default one where that is told. Raises `SlurmProtocolError`."""
    entries = _entries(answer, "partitions")
    nodes = {
        _text(entry.get("name")): _nodes(
            entry["nodes"].get("configured") if isinstance(entry.get("nodes"), dict) else entry.get("nodes")
        )
        for entry in entries
    }
    defaults = [
        _text(entry.get("name"))
        for entry in entries
        if "DEFAULT" in (str(flag).upper() for flag in _list(entry.get("flags")))
    ]
    return nodes, defaults[0] if defaults else None


def _draws_jobs_of(entry: Mapping[str, Any], user_name: str) -> bool:
    """A magnetic reservation takes the jobs of its users by itself."""
    return "MAGNETIC" in _list(entry.get("flags")) and user_name in _text(entry.get("users")).split(",")


def _entries(answer: Answer, key: str) -> list[Mapping[str, Any]]:
    entries = (answer.body or {}).get(key)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise SlurmProtocolError(f"HTTP {answer.status} without a list of {key}: {answer.text}")
    return entries


def _required_time(entry: Mapping[str, Any], key: str) -> datetime:
    time = _time(entry.get(key))
    if time is None:
        raise SlurmProtocolError(foreign_text(f"reservation {entry.get('name')} without {key}"))
    return time


def _nodes(value: object) -> frozenset[str]:
    try:
        return expand(_text(value))
    except ValueError as error:
        raise SlurmProtocolError(foreign_text(str(error))) from None


# --- scalars --------------------------------------------------------------------------------------------

_NO_VALUE: Final = frozenset({0xFFFF_FFFE, 0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFE, 0xFFFF_FFFF_FFFF_FFFF})


def _number(value: object) -> int | None:
    """An integer in any of its shapes: plain, as digits, or tagged. Unset, infinite and Slurm's NO_VAL are None."""
    if isinstance(value, dict):
        if value.get("set") is not True or value.get("infinite") is True:
            return None
        value = value.get("number")
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value in _NO_VALUE:
        return None
    return value


def _time(value: object) -> datetime | None:
    seconds = _number(value)
    if not seconds or seconds < 0:
        return None
    try:
        return datetime.fromtimestamp(seconds, tz=UTC)
    except (OverflowError, ValueError, OSError):
        return None


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
