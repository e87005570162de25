"""The client of slurmrestd: list, get, submit, release, cancel, ping, reservations, and where a node is reached.

Rules that the callers rely on:

- A list is complete and readable, or an error is raised: an empty list really means "no such jobs".
- A submit is always held, and succeeded if and only if Slurm gave a job id. It is never sent twice.
- Job ids are given again after a crash of slurmctld, and cancelling somebody else's job deadlocks slurmctld on some
  releases. So `cancel` and `release` first look, and act only on a live job that bears our name and our user.
- What a DELETE answers is not believed: the caller's next list tells.

States: the API version is found at the first call (newest first) and found again when slurmrestd no longer knows it.
Nothing else is remembered but node addresses, for some minutes. Every failure is one of `errors.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final, Protocol, Self, TypeVar
from urllib.parse import quote

import httpx

from controlplane.core.nodes import SlurmNode
from controlplane.core.reservations import Calendar, Reservation
from controlplane.core.types import JobList, JobState, SlurmJob
from controlplane.slurm import wire
from controlplane.slurm.errors import (
    SlurmError,
    SlurmForbidden,
    SlurmProtocolError,
    SlurmRejected,
    SlurmUnreachable,
)
from controlplane.slurm.faults import ALREADY_DONE, INVALID_JOB_ID, JOB_FINISHED, NOT_PENDING, judge
from controlplane.slurm.script import SECRET_VARIABLE
from controlplane.slurm.tokens import TokenSource, expires_at
from controlplane.slurm.transport import Answer, Transport
from controlplane.slurm.wire import DIALECTS, Dialect, JobRequest, Submitted

JOB_NAME_PREFIX: Final = "cp-"
_GONE: Final = frozenset({INVALID_JOB_ID, ALREADY_DONE, JOB_FINISHED, NOT_PENDING})
_CLOCK_SKEW: Final = timedelta(seconds=30)

T = TypeVar("T")
_TOKEN_HEADER: Final = "X-SLURM-USER-TOKEN"  # noqa: S105 -- a name


@dataclass(frozen=True, slots=True)
class SlurmOptions:
    """Where slurmrestd is and who we are there.

    A unix socket with `rest_auth/local` needs no token; jobs then run as slurmrestd's own user, which `user_name` must
    name. `user_id` is only needed where slurmrestd cannot resolve user names.
    """

    url: str
    user_name: str
    token_source: TokenSource | None = field(default=None, repr=False)
    user_id: int | None = None
    api_version: str = "auto"
    timeout_seconds: float = 30.0  # slurmrestd itself retries for up to 20 s
    connect_timeout_seconds: float = 5.0
    submit_grace_seconds: float = 120.0  # used where the life of our tokens is not known
    node_address_seconds: float = 300.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://", "unix:/")):
            raise ValueError("url: must be http://host:port, https://host:port or unix:/path")
        if not self.user_name:
            raise ValueError("user_name: must be the user whose jobs these are")
        if self.timeout_seconds < 25:
            raise ValueError("timeout_seconds: must be at least 25, slurmrestd itself retries for up to 20 s")
        if self.api_version != "auto" and self.api_version not in DIALECTS:
            raise ValueError(f"api_version: must be auto or one of {', '.join(DIALECTS)}")


@dataclass(frozen=True, slots=True)
class Ping:
    """A controller that answers."""

    release: str  # Slurm's version
    api_version: str
    token_expires_at: datetime | None  # None: no token, or one that does not say


class OnCall(Protocol):
    """Told about every call: the operation, its outcome (`ok`, `abandoned`, or the error's `outcome`), its duration."""

    def __call__(self, operation: str, outcome: str, seconds: float) -> None: ...


class SlurmClient:
    """One slurmrestd, seen as one user. Safe for concurrent use; close it when done. `network` as in `Transport`."""

    def __init__(
        self,
        options: SlurmOptions,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        on_call: OnCall | None = None,
        network: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._options = options
        self._clock = clock
        self._on_call = on_call
        self._transport = Transport(
            options.url,
            timeout_seconds=options.timeout_seconds,
            connect_timeout_seconds=options.connect_timeout_seconds,
            network=network,
        )
        self._dialect = DIALECTS.get(options.api_version)
        self._user_names = {} if options.user_id is None else {options.user_id: options.user_name}
        self._node_addresses: dict[str, tuple[str, float]] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._transport.aclose()

    @property
    def submit_grace(self) -> timedelta:
        """How long after `submit` was called its request may still act. A list asked for later than that is final.

        An expired token fences a late submit. With tokens made here, whose life is counted from the intent, this is
        that life plus clock skew. Otherwise it is the site's estimate; a twin that appears even later is held, and
        harmless.
        """
        source = self._options.token_source
        if source is None or source.lifetime is None:
            return timedelta(seconds=self._options.submit_grace_seconds)
        return source.lifetime + _CLOCK_SKEW

    async def token_expires_at(self) -> datetime | None:
        """When the token in use expires; None: no token, or one that does not say. Raises `SlurmForbidden`."""
        token = await self._token(self._clock())
        return expires_at(token) if token else None

    async def list_jobs(self, now: datetime) -> JobList:
        """Every job of our user whose name begins with `cp-`, asked for at `now`."""

        def read(answer: Answer) -> tuple[SlurmJob, ...]:
            _refuse_complaints(answer)
            return wire.read_jobs(answer, prefix=JOB_NAME_PREFIX, user_names=self._user_names)

        jobs = await self._exchange("list", "GET", "jobs", read)
        return JobList(tuple(job for job in jobs if job.user_name == self._options.user_name), asked_at=now)

    async def get_job(self, job_id: int) -> SlurmJob | None:
        """The job with this id, whoever owns it; None only if slurmctld said that there is none."""

        def read(answer: Answer) -> SlurmJob | None:
            complaints = wire.read_complaints(answer)
            if any(complaint.number == INVALID_JOB_ID for complaint in complaints):
                return None
            if answer.status != 200 or complaints:
                raise judge(answer, changes=False)
            return wire.read_job(answer, job_id, user_names=self._user_names)

        return await self._exchange("get", "GET", f"job/{job_id}", read)

    async def submit(self, request: JobRequest, *, intended_at: datetime | None = None) -> Submitted:
        """Submit a held job.

        `intended_at` (now, if left out): when the intent was written down, from which everybody counts `submit_grace`.
        A process that was stopped since, and wakes when others have given its request up, must not send it: it is
        refused here (`SlurmForbidden`, `SlurmUnreachable`), or by Slurm because of its token's age.

        After `SlurmAmbiguous` or `SlurmProtocolError` the job may exist: look for its name, and trust its absence only
        in a list asked for `submit_grace` later. After any other error it does not exist.
        """

        def read(answer: Answer) -> Submitted:
            submitted = wire.read_submitted(answer)
            if submitted is None:
                raise judge(answer, changes=True)
            return submitted

        def write(dialect: Dialect) -> dict[str, Any]:
            return wire.write_submit(request, dialect)

        intended_at = intended_at or self._clock()
        secret = request.environment.get(SECRET_VARIABLE, "")
        return await self._exchange(
            "submit", "POST", "job/submit", read, write=write, changes=True, intended_at=intended_at, secret=secret
        )

    async def release(self, job_id: int, *, name: str) -> bool:
        """End our hold on job `job_id`. False: there is no live job `name` of ours with this id. May be repeated."""
        job = await self._ours(job_id, name)
        if job is None or not job.is_held:
            return job is not None

        def write(_: Dialect) -> dict[str, Any]:
            return wire.write_release()

        return await self._exchange("release", "POST", f"job/{job_id}", _read_acceptance, write=write, changes=True)

    async def exclude(self, job_id: int, nodes: frozenset[str], *, name: str) -> bool:
        """Keep job `job_id`, which waits, off these nodes. False: no live job `name` of ours with this id, or it runs.

        May be repeated. Raises `SlurmRejected` if Slurm does not know one of the nodes.
        """
        job = await self._ours(job_id, name)
        if job is None or job.state is not JobState.PENDING:
            return False

        def write(dialect: Dialect) -> dict[str, Any]:
            return wire.write_exclusion(nodes, dialect)

        return await self._exchange("exclude", "POST", f"job/{job_id}", _read_acceptance, write=write, changes=True)

    async def cancel(self, job_id: int, *, name: str) -> bool:
        """Ask Slurm to end job `job_id`. False: there is no live job `name` of ours with this id. May be repeated.

        True means that Slurm was asked, not that the job ended.
        """
        if await self._ours(job_id, name) is None:
            return False
        return await self._exchange("cancel", "DELETE", f"job/{job_id}", _read_acceptance, changes=True)

    async def node_address(self, node: str) -> str:
        """The address at which Slurm reaches a node; the node's name where Slurm knows no better."""
        address, known_until = self._node_addresses.get(node, ("", 0.0))
        if time.monotonic() < known_until:
            return address

        def read(answer: Answer) -> str:
            if answer.status != 200 and not isinstance(error := judge(answer, changes=False), SlurmRejected):
                raise error
            if answer.body is None:  # not to be remembered as "Slurm knows no better"
                raise SlurmProtocolError(f"HTTP {answer.status} without a node: {answer.text}")
            return wire.read_node_address(answer, node)

        address = await self._exchange("node", "GET", f"node/{quote(node, safe='')}", read)
        self._node_addresses[node] = (address, time.monotonic() + self._options.node_address_seconds)
        return address

    async def list_nodes(self) -> tuple[SlurmNode, ...]:
        """Every node there is, in whatever state."""

        def read(answer: Answer) -> tuple[SlurmNode, ...]:
            if answer.status != 200 or wire.read_complaints(answer):
                raise judge(answer, changes=False)
            return wire.read_nodes(answer)

        return await self._exchange("nodes", "GET", "nodes", read)

    async def calendar(self) -> Calendar:
        """Which nodes are reserved, from when to when."""

        def read(answer: Answer) -> tuple[Reservation, ...]:
            _refuse_complaints(answer)
            return wire.read_reservations(answer, user_name=self._options.user_name)

        def read_partitions(answer: Answer) -> tuple[Mapping[str, frozenset[str]], str | None]:
            _refuse_complaints(answer)
            return wire.read_partitions(answer)

        reservations = await self._exchange("reservations", "GET", "reservations", read)
        if not reservations:
            return Calendar()
        partitions, default = await self._exchange("partitions", "GET", "partitions", read_partitions)
        return Calendar(reservations, partitions, default)

    async def ping(self) -> Ping:
        """Which Slurm answers, provided its controller does and accepts our token."""

        def read(answer: Answer) -> Ping | None:
            if answer.status != 200:
                raise judge(answer, changes=False)
            if not wire.is_controller_up(answer):
                return None
            return Ping(wire.read_release_name(answer), "", None)

        ping = await self._exchange("ping", "GET", "ping", read)
        if ping is None:  # from 24.11 on a refused token looks like a dead controller here, and only here
            await self._exchange("diag", "GET", "diag", _refuse_complaints)
            raise SlurmUnreachable("slurmrestd answers, but its slurmctld does not")
        dialect = await self._dialect_in_use()
        return replace(ping, api_version=dialect.version, token_expires_at=await self.token_expires_at())

    # --- how a request is made -------------------------------------------------------------------------

    async def _ours(self, job_id: int, name: str) -> SlurmJob | None:
        """The job, if a fresh answer shows that it bears our name and our user, and is not over."""
        job = await self.get_job(job_id)
        is_ours = job is not None and (job.name, job.user_name) == (name, self._options.user_name) and not job.is_over
        return job if is_ours else None

    async def _exchange(
        self,
        operation: str,
        method: str,
        path: str,
        read: Callable[[Answer], T],
        *,
        write: Callable[[Dialect], dict[str, Any]] | None = None,
        changes: bool = False,
        intended_at: datetime | None = None,
        secret: str = "",
    ) -> T:
        """Send one request in the dialect in use and read its answer; tell `on_call` how that went."""
        send = partial(self._send, method, path, changes=changes, intended_at=intended_at, secret=secret)
        started = time.monotonic()
        outcome = "abandoned"  # unless it is known better: the caller was cancelled
        try:
            dialect = await self._dialect_in_use()
            answer = await send(dialect, write)
            if _is_unknown_path(answer) and self._options.api_version == "auto":
                self._dialect = None  # slurmrestd was exchanged for another release; it did nothing with the request
                dialect = await self._dialect_in_use()
                answer = await send(dialect, write)
            if _is_unknown_path(answer):
                raise SlurmProtocolError(f"slurmrestd does not serve {dialect.version}: {answer.text}")
            result = read(answer)
            outcome = "ok"
            return result
        except SlurmError as error:
            outcome = error.outcome
            raise
        finally:
            if self._on_call is not None:
                self._on_call(operation, outcome, time.monotonic() - started)

    async def _dialect_in_use(self) -> Dialect:
        """The dialect pinned or found before, else the newest that slurmrestd serves."""
        if self._dialect is not None:
            return self._dialect
        for dialect in DIALECTS.values():
            answer = await self._send("GET", "ping", dialect, None, changes=False)
            if answer.status == 401:
                raise judge(answer, changes=False)
            if not _is_unknown_path(answer):  # even a ping that failed shows that the version is served
                self._dialect = dialect
                return dialect
        raise SlurmProtocolError(f"nothing here serves one of {', '.join(DIALECTS)}")

    async def _send(
        self,
        method: str,
        path: str,
        dialect: Dialect,
        write: Callable[[Dialect], dict[str, Any]] | None,
        *,
        changes: bool,
        intended_at: datetime | None = None,
        secret: str = "",
    ) -> Answer:
        headers = await self._headers(intended_at)
        return await self._transport.exchange(
            method,
            f"/slurm/{dialect.version}/{path}",
            headers=headers,
            body=None if write is None else write(dialect),
            changes=changes,
            secrets=(headers.get(_TOKEN_HEADER, ""), secret),
        )

    async def _headers(self, intended_at: datetime | None) -> Mapping[str, str]:
        token = await self._token(intended_at or self._clock())
        if intended_at is not None and self._clock() >= intended_at + self.submit_grace / 2:
            # its own way there takes a while, too, and whoever counts must not be overtaken
            raise SlurmUnreachable("not sent: too long after it was intended")
        return {} if token is None else {"X-SLURM-USER-NAME": self._options.user_name, _TOKEN_HEADER: token}

    async def _token(self, issued_at: datetime) -> str | None:
        """The token to send. An expired one is not sent: 22.05 answers it as if the controller were dead."""
        if self._options.token_source is None:
            return None
        token = await self._options.token_source.read(issued_at)
        expiry = expires_at(token)
        if expiry is not None and expiry <= self._clock():
            raise SlurmForbidden(f"the Slurm token expired at {expiry:%Y-%m-%d %H:%M:%S} UTC")
        return token


def _read_acceptance(answer: Answer) -> bool:
    """Whether Slurm took what was asked of a job; False if it says that the job is over, or runs, or never was."""
    complaints = wire.read_complaints(answer)
    if any(complaint.number in _GONE for complaint in complaints):
        return False
    if answer.status != 200 or complaints:
        raise judge(answer, changes=True)
    return True


def _refuse_complaints(answer: Answer) -> None:
    """Of an answer to a read that must be whole."""
    if answer.status != 200 or wire.read_complaints(answer):
        raise judge(answer, changes=False)


def _is_unknown_path(answer: Answer) -> bool:
    """slurmrestd's 404 is plain text for a path or version that it does not have, and JSON for an unknown job."""
    return answer.status == 404 and answer.body is None
