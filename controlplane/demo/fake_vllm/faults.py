"""Trouble on demand, from flags at the start or from `POST /fault` while the server runs.

| kind | field | what happens |
|---|---|---|
| freeze | | the engine makes no progress; /health, /v1/models and /metrics still answer 200 |
| crash | | every request inside fails as after the death of EngineCore, and the process ends with exit code 0 |
| errors | rate | this share (0 to 1) of the requests for the engine gets a 500, evenly spread |
| slow | factor | decode speed is divided by it |
| heal | | ends freeze, errors and slow |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from controlplane.demo.fake_vllm.engine import Engine

_SLOW_START_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """Faults known at the start. `crash_after_seconds` counts from readiness."""

    slow_start_seconds: float = 0.0
    crash_after_seconds: float | None = None
    error_rate: float = 0.0


def parse_fault_flags(flags: list[str]) -> FaultPlan:
    """The plan in `slow-start[=SECONDS]`, `crash-after=SECONDS` and `error-rate=SHARE`. Raises ValueError."""
    plan = FaultPlan()
    for flag in flags:
        name, _, given = flag.partition("=")
        if name == "slow-start":
            plan = replace(plan, slow_start_seconds=_at_least(0.0, float(given)) if given else _SLOW_START_SECONDS)
        elif name == "crash-after":
            plan = replace(plan, crash_after_seconds=_at_least(0.0, float(given)))
        elif name == "error-rate":
            plan = replace(plan, error_rate=_share(float(given)))
        else:
            raise ValueError(f"unknown fault {name[:64]!r}")
    return plan


class Faults:
    """Switches faults on and off. `crash` ends the process; it is called after the engine has died."""

    def __init__(self, engine: Engine, crash: Callable[[], None], error_rate: float = 0.0) -> None:
        self._engine = engine
        self._crash = crash
        self._error_rate = error_rate
        self._error_debt = 0.0

    def apply(self, fault: dict[str, Any]) -> None:
        """Do what a `/fault` body says. Raises ValueError."""
        kind = fault.get("kind")
        if kind == "freeze":
            self._engine.freeze()
        elif kind == "crash":
            self.crash()
        elif kind == "errors":
            self._error_rate = _share(_number(fault, "rate"))
        elif kind == "slow":
            self._engine.slow_down(_at_least(1.0, _number(fault, "factor")))
        elif kind == "heal":
            self._engine.thaw()
            self._engine.slow_down(1.0)
            self._error_rate = 0.0
        else:
            raise ValueError("kind must be freeze, crash, errors, slow or heal")

    def crash(self) -> None:
        self._engine.die()
        self._crash()

    def takes_this_request(self) -> bool:
        """Whether the request that asks is one of those that shall fail."""
        self._error_debt += self._error_rate
        if self._error_debt < 1:
            return False
        self._error_debt -= 1
        return True


def _number(fault: dict[str, Any], field: str) -> float:
    value = fault.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{field} must be a number")
    return float(value)


def _share(value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError("the share must be from 0 to 1")
    return value


def _at_least(least: float, value: float) -> float:
    if not value >= least:
        raise ValueError(f"the number must be {least:g} or more")
    return value
