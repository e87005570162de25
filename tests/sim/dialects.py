"""What differs between a slurmrestd of Slurm 22.05 (v0.0.38) and one of 24.11 (v0.0.42), as recorded from real ones.

The shapes and numbers are those of `tests/fixtures/slurmrestd/`; `test_the_fake_answers_as_a_real_one_did` compares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.sim.slurm import Job, Reservation

Reply = tuple[int, dict[str, Any] | str]
UNKNOWN_PATH: Reply = (404, "Unable find requested URL. Please view /openapi/v3 for API reference.")
NO_CREDENTIALS: Reply = (401, "Authentication failure")

_INVALID_ID = "Invalid job id specified"
_NO_CONTROLLER = "Unable to contact slurm controller (connect failure)"
_TIMED_OUT = "Socket timed out on send/recv operation"
_ZERO_BYTES = "Zero Bytes were transmitted or received"
_FINISHED = "Job has already finished"
_HELD = "Job is in held state, pending scheduler release"
_NOT_PENDING = "Job is no longer pending execution"
_INVALID_NODE = "Invalid node name specified"


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why slurmctld did not answer: `number` is Slurm's."""

    number: int
    error: str


DOWN = Trouble(1800, _NO_CONTROLLER)
FROZEN = Trouble(5004, _TIMED_OUT)
FORBIDDEN = Trouble(1007, "Protocol authentication error")


class Old:
    """v0.0.38 of Slurm 22.05: plain numbers, one word for a state, 500 for nearly everything."""

    version = "v0.0.38"
    can_forbid_requeue = False
    excluded_nodes = "exclude_nodes"  # to be asked with; the name it shows is refused

    def ping(self, trouble: Trouble | None) -> Reply:
        if trouble is not None:
            return 500, self._errors("slurm_load_ctl_conf", -1, "Unspecified error")
        return 200, {"meta": self._meta, "errors": [], "pings": [{"hostname": "c", "ping": "UP", "mode": "primary"}]}

    def jobs(self, jobs: list[Job]) -> Reply:
        return 200, {"meta": self._meta, "errors": [], "jobs": [self._job(job) for job in jobs]}

    def no_jobs(self, trouble: Trouble, *, is_list: bool) -> Reply:
        where = "slurm_load_jobs" if is_list else "slurm_load_job"
        return 500, {**self._errors(where, -1, "Unspecified error"), "jobs": []}

    def unknown_job(self) -> Reply:
        return 500, {**self._errors("slurm_load_job", 2017, _INVALID_ID), "jobs": []}

    def submitted(self, job_id: int, *, is_held: bool) -> Reply:
        errors = [{"error_code": 2042, "error": _HELD}] if is_held else []
        body = {"meta": self._meta, "errors": errors, "job_id": job_id, "step_id": "BATCH", "job_submit_user_msg": ""}
        return 200, body

    def not_submitted(self, trouble: Trouble) -> Reply:
        if trouble is FORBIDDEN:  # it looks like a dead controller
            trouble = Trouble(5005, _ZERO_BYTES)
        return 500, {"meta": self._meta, "errors": [{"error_code": trouble.number, "error": trouble.error}]}

    def done(self) -> Reply:
        return 200, {"meta": self._meta, "errors": []}

    def not_done(self, trouble: Trouble, *, cancels: bool) -> Reply:
        if trouble is FORBIDDEN:
            trouble = Trouble(5005, _ZERO_BYTES)
        return 500, self._errors("slurm_kill_job" if cancels else "_parse_job_list", trouble.number, trouble.error)

    def no_such_job(self, *, cancels: bool) -> Reply:
        return self.not_done(Trouble(2017, _INVALID_ID), cancels=cancels)

    def already_over(self, *, cancels: bool) -> Reply:
        return self.done() if cancels else self.not_done(Trouble(2084, _FINISHED), cancels=False)

    def not_pending(self) -> Reply:
        return self.not_done(Trouble(2073, _NOT_PENDING), cancels=False)

    def unknown_nodes(self) -> Reply:
        return self.not_submitted(Trouble(2018, _INVALID_NODE))

    def asked_to_exclude(self, told: Any) -> set[str]:
        """Text with commas."""
        assert isinstance(told, str)
        return set(filter(None, told.split(",")))

    def nodes(self, addresses: Mapping[str, str], partition: str) -> Reply:
        shown = [
            {"name": name, "address": address, "state": "idle", "state_flags": [], "partitions": [partition]}
            | {"active_features": ""}
            for name, address in addresses.items()
        ]
        return 200, {"meta": self._meta, "errors": [], "nodes": shown}

    def partitions(self, name: str, nodes: str) -> Reply:
        shown = [{"flags": ["default"], "name": name, "nodes": nodes, "total_nodes": 3}]
        return 200, {"meta": self._meta, "errors": [], "partitions": shown}

    def reservations(self, reservations: list[Reservation]) -> Reply:
        shown = [
            {**_common_reservation(one), "start_time": _seconds(one.starts_at), "end_time": _seconds(one.ends_at)}
            for one in reservations
        ]
        return 200, {"meta": self._meta, "errors": [], "reservations": shown}

    def no_list(self, key: str, trouble: Trouble) -> Reply:
        """Of anything but jobs."""
        number, error = (trouble.number, trouble.error) if key == "nodes" else (-1, "Unspecified error")
        return 500, {"meta": self._meta, "errors": [{"errno": number, "error": error}], key: []}

    _meta: Mapping[str, Any] = {"Slurm": {"version": {"major": 22, "micro": 8, "minor": 5}, "release": "22.05.8"}}

    def _errors(self, source: str, number: int, error: str) -> dict[str, Any]:
        entry = {"description": error, "error_number": number, "error": error, "source": source}
        return {"meta": self._meta, "errors": [entry]}

    def _job(self, job: Job) -> dict[str, Any]:
        status = job.signal or (job.exit_code or 0) << 8
        return {
            **_common(job),
            "job_state": job.odd_state or ("COMPLETING" if job.is_completing else job.state),
            "priority": 0 if job.is_held else 4294901700,
            "exit_code": status,
            **{name: _seconds(at) for name, at in _times(job).items()},
        }


class New:
    """v0.0.42 of Slurm 24.11: numbers as objects, states as lists, HTTP statuses that mean something."""

    version = "v0.0.42"
    can_forbid_requeue = True
    excluded_nodes = "excluded_nodes"

    def ping(self, trouble: Trouble | None) -> Reply:
        is_up = trouble is None
        ping = {"hostname": "c", "pinged": "UP" if is_up else "DOWN", "responding": is_up, "mode": "primary"}
        return 200, {"pings": [ping], **self._quiet()}

    def jobs(self, jobs: list[Job]) -> Reply:
        return 200, {"jobs": [self._job(job) for job in jobs], **self._quiet()}

    def no_jobs(self, trouble: Trouble, *, is_list: bool) -> Reply:
        if not is_list and trouble is not FORBIDDEN:
            return 500, {"jobs": [], **self._errors("_handle_job_get", -1, "Unspecified error")}
        return self._status(trouble), {"jobs": [], **self._errors("slurm_load_jobs", trouble.number, trouble.error)}

    def unknown_job(self) -> Reply:
        return 404, {"jobs": [], **self._errors("_handle_job_get", 2017, _INVALID_ID)}

    def submitted(self, job_id: int, *, is_held: bool) -> Reply:
        quiet = self._quiet()
        if is_held:
            quiet["warnings"] = [{"description": _HELD, "source": "slurm_submit_batch_job()"}]
        return 200, {"job_id": job_id, "step_id": "batch", "job_submit_user_msg": "", **quiet}

    def not_submitted(self, trouble: Trouble) -> Reply:
        return self._status(trouble), self._errors("slurm_submit_batch_job()", trouble.number, trouble.error)

    def done(self) -> Reply:
        return 200, {"status": [], "results": None, **self._quiet()}

    def not_done(self, trouble: Trouble, *, cancels: bool) -> Reply:
        if cancels and trouble is not FORBIDDEN:
            return 500, {"status": [], **self._errors("slurm_kill_jobs()", 1, "Operation not permitted")}
        return self._status(trouble), self._errors("slurm_update_job2()", trouble.number, trouble.error)

    def no_such_job(self, *, cancels: bool) -> Reply:
        if not cancels:
            return 404, {"results": None, **self._errors("slurm_update_job2()", 2017, _INVALID_ID)}
        entry = {"error": {"string": _INVALID_ID, "code": 2017, "message": _INVALID_ID}, "step_id": ""}
        return 200, {"status": [entry], **self._quiet()}

    def already_over(self, *, cancels: bool) -> Reply:
        if not cancels:
            return 500, {"results": None, **self._errors("slurm_update_job2()", 2084, _FINISHED)}
        return 200, {"status": [{"error": {"code": 2021}, "step_id": ""}], **self._quiet()}

    def not_pending(self) -> Reply:
        return 500, {"results": None, **self._errors("slurm_update_job2()", 2073, _NOT_PENDING)}

    def unknown_nodes(self) -> Reply:
        return 500, self._errors("slurm_submit_batch_job()", 2018, _INVALID_NODE)

    def asked_to_exclude(self, told: Any) -> set[str] | None:
        """A list of names; one without names changes nothing, and empty text takes it back."""
        assert told == "" or isinstance(told, list)
        return set() if told == "" else set(told) or None

    def nodes(self, addresses: Mapping[str, str], partition: str) -> Reply:
        shown = [
            {"name": name, "address": address, "state": ["IDLE"], "partitions": [partition], "active_features": []}
            for name, address in addresses.items()
        ]
        return 200, {"nodes": shown, **self._quiet()}

    def partitions(self, name: str, nodes: str) -> Reply:
        return 200, {"partitions": [{"name": name, "nodes": {"configured": nodes, "total": 3}}], **self._quiet()}

    def reservations(self, reservations: list[Reservation]) -> Reply:
        shown = [
            {
                **_common_reservation(one),
                "core_specializations": [],
                "start_time": _number(_seconds(one.starts_at)),
                "end_time": _number(_seconds(one.ends_at)),
            }
            for one in reservations
        ]
        return 200, {"reservations": shown, **self._quiet()}

    def no_list(self, key: str, trouble: Trouble) -> Reply:
        return self._status(trouble), {key: [], **self._errors(f"slurm_load_{key}", trouble.number, trouble.error)}

    _meta: Mapping[str, Any] = {
        "slurm": {"version": {"major": "24", "micro": "5", "minor": "11"}, "release": "24.11.5"}
    }

    def _quiet(self) -> dict[str, Any]:
        return {"meta": self._meta, "errors": [], "warnings": []}

    def _errors(self, source: str, number: int, error: str) -> dict[str, Any]:
        entry = {"description": error, "error_number": number, "error": error, "source": source}
        return {"meta": self._meta, "errors": [entry], "warnings": []}

    @staticmethod
    def _status(trouble: Trouble) -> int:
        return {1800: 502, 5004: 504, 1007: 511}[trouble.number]

    def _job(self, job: Job) -> dict[str, Any]:
        status = "SIGNALED" if job.signal else "ERROR" if job.exit_code else "SUCCESS"
        code = _number(None if job.signal else job.exit_code or 0)
        signal = {"id": _number(job.signal), "name": ""}
        return {
            **_common(job),
            "job_state": [job.odd_state or job.state, *(["COMPLETING"] if job.is_completing else [])],
            "hold": job.is_held,
            "priority": _number(0 if job.is_held else 1),
            "exit_code": {"status": [status], "return_code": code, "signal": signal},
            **{name: _number(_seconds(at)) for name, at in _times(job).items()},
        }


Dialect = Old | New


def _common(job: Job) -> dict[str, Any]:
    return {
        "job_id": job.job_id,
        "name": job.name,
        "user_name": job.user,
        "comment": job.comment,
        "state_reason": job.state_reason,
        "nodes": job.node,
        "batch_host": job.node,
        "restart_cnt": job.restarts,
        "excluded_nodes": ",".join(sorted(job.excluded)),
    }


def _common_reservation(reservation: Reservation) -> dict[str, Any]:
    return {
        "name": reservation.name,
        "node_list": ",".join(sorted(reservation.nodes)),
        "flags": ["MAINT", "SPEC_NODES"],
        "users": "root",
        "partition": "",
    }


def _times(job: Job) -> dict[str, datetime | None]:
    return {"submit_time": job.submitted_at, "start_time": job.started_at, "end_time": job.ends_at}


def _seconds(at: datetime | None) -> int:
    return 0 if at is None else int(at.timestamp())


def _number(value: int | None) -> dict[str, Any]:
    return {"set": value is not None, "infinite": False, "number": value or 0}
