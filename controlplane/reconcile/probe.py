"""One look at one endpoint: is it ours, does its engine live, and how much has it to do?

In this order: the model list must be answered with the endpoint's key and name the model; a replica's must be refused
without it (another server that landed on the port cannot know the key, and no prompt is ever sent to it); the metrics
are read; one token is generated within a time limit, because vLLM's `/health` stays 200 while its engine is frozen.
An engine that was seen to move since the last look needs no token, and a token that came too late is forgiven while
the engine moves: a full engine is slow, not dead.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, replace
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from controlplane.core.log_text import without
from controlplane.core.types import Endpoint, Health, ProbeResult

_RUNNING = "vllm:num_requests_running"
_WAITING = "vllm:num_requests_waiting"
_GENERATED = "vllm:generation_tokens_total"

_TOKEN_REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "completion": ("/v1/completions", {"prompt": "a", "max_tokens": 1}),
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}),
    "embedding": ("/v1/embeddings", {"input": "a"}),
}


@dataclass(frozen=True, slots=True)
class ProbeLimits:
    timeout_seconds: float = 3.0  # for the model list and for the metrics
    token_timeout_seconds: float = 10.0  # for the one token

    @property
    def whole_seconds(self) -> float:
        """For everything: a server that sends a byte now and then keeps every single limit, and never ends."""
        return 4 * self.timeout_seconds + self.token_timeout_seconds


class _Failed(Exception):
    def __init__(self, message: str, *, is_foreign: bool = False) -> None:
        super().__init__(message)
        self.is_foreign = is_foreign


async def probe(http: httpx.AsyncClient, endpoint: Endpoint, kind: str, limits: ProbeLimits) -> ProbeResult:
    """Look once. `kind` as in `ReplicaSetSpec.probe`. Raises nothing: what went wrong is the result."""
    load = ProbeResult(passed=False)
    try:
        async with asyncio.timeout(limits.whole_seconds):
            await _check_identity(http, endpoint, limits)
            load = await _read_load(http, endpoint, limits)
            if _must_generate(endpoint, load, kind):
                load = await _generate(http, endpoint, kind, load, limits)
    except _Failed as failure:
        return replace(load, passed=False, message=_printable(str(failure)), is_foreign=failure.is_foreign)
    except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
        message = str(error) or "no answer in time"
        return replace(load, passed=False, message=_printable(f"{type(error).__name__}: {message}"))
    return replace(load, passed=True, message=None)


def _must_generate(endpoint: Endpoint, load: ProbeResult, kind: str) -> bool:
    if kind not in _TOKEN_REQUESTS:
        return False
    if endpoint.is_draining and endpoint.first_ready_at is not None:
        return False  # its last requests are not kept waiting for ours
    return endpoint.health is not Health.READY or not _has_moved(endpoint.generated_tokens, load.generated_tokens)


def _has_moved(before: float | None, after: float | None) -> bool:
    return before is not None and after is not None and after > before


async def _check_identity(http: httpx.AsyncClient, endpoint: Endpoint, limits: ProbeLimits) -> None:
    url = f"{endpoint.url}/v1/models"
    answer = await http.get(url, headers=_authorization(endpoint), timeout=limits.timeout_seconds)
    if answer.status_code in (401, 403):
        raise _Failed(f"it refuses our key ({answer.status_code}): another server's port?", is_foreign=True)
    if answer.status_code != 200:
        raise _Failed(f"/v1/models answered {answer.status_code}")
    names = _model_names(answer)
    if endpoint.model not in names:
        served = without(", ".join(sorted(names)), endpoint.api_key)[:100] or "nothing"
        raise _Failed(f"it serves {served}, not {endpoint.model}", is_foreign=True)
    if endpoint.replica is not None:
        answer = await http.get(url, timeout=limits.timeout_seconds)
        if answer.status_code not in (401, 403):
            raise _Failed(f"it answers {answer.status_code} without our key: not our server", is_foreign=True)


def _model_names(answer: httpx.Response) -> set[str]:
    try:
        return {str(model["id"]) for model in answer.json()["data"]}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _Failed("/v1/models is not a list of models", is_foreign=True) from error


async def _read_load(http: httpx.AsyncClient, endpoint: Endpoint, limits: ProbeLimits) -> ProbeResult:
    """Requests running and waiting, and tokens generated so far, over all engines; None where it does not say."""
    unknown = ProbeResult(passed=False)
    answer = await http.get(f"{endpoint.url}/metrics", headers=_authorization(endpoint), timeout=limits.timeout_seconds)
    if answer.status_code != 200:
        return unknown  # an external server need not have metrics
    wanted = (_RUNNING, _WAITING, _GENERATED)
    lines = [line for line in answer.text.splitlines() if line.startswith(wanted)]
    sums: dict[str, float] = {}
    try:
        for family in text_string_to_metric_families("\n".join(lines) + "\n"):
            for sample in family.samples:
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    except ValueError:
        return unknown
    finite = {name: value for name, value in sums.items() if math.isfinite(value)}
    running, waiting = finite.get(_RUNNING), finite.get(_WAITING)
    return replace(
        unknown,
        running=None if running is None else int(running),
        waiting=None if waiting is None else int(waiting),
        generated_tokens=finite.get(_GENERATED),
    )


async def _generate(
    http: httpx.AsyncClient, endpoint: Endpoint, kind: str, load: ProbeResult, limits: ProbeLimits
) -> ProbeResult:
    path, body = _TOKEN_REQUESTS[kind]
    try:
        answer = await http.post(
            endpoint.url + path,
            json={"model": endpoint.model, **body},
            headers=_authorization(endpoint),
            timeout=limits.token_timeout_seconds,
        )
    except httpx.ReadTimeout as error:
        after = await _read_load(http, endpoint, limits)
        if endpoint.health is Health.READY and _has_moved(load.generated_tokens, after.generated_tokens):
            return after
        raise _Failed(f"no token within {limits.token_timeout_seconds:g} s: the engine does not move") from error
    if answer.status_code != 200:
        said = without(answer.text, endpoint.api_key)  # it may quote our request
        raise _Failed(f"{path} answered {answer.status_code}: {said[:120]}")
    return load


def _printable(text: str) -> str:
    """Cut, and fit for a log and for PostgreSQL: a NUL in it would keep the whole result from being stored."""
    return "".join(character if character.isprintable() else " " for character in text)[:256]


def _authorization(endpoint: Endpoint) -> dict[str, str]:
    return {} if endpoint.api_key is None else {"Authorization": f"Bearer {endpoint.api_key}"}
