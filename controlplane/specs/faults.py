"""What is wrong with a spec, in words that say what to do. Values are never repeated: some are secrets."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from controlplane.specs import file_format


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing to correct. `path` as in `replica_sets[0].slurm.partition`; "" is the whole file."""

    path: str
    message: str
    line: int | None = None

    def __str__(self) -> str:
        where = f"line {self.line}: " if self.line else ""
        return f"{where}{self.path}: {self.message}" if self.path else f"{where}{self.message}"


class SpecError(Exception):
    """The text is no valid spec; `faults` has at least one."""

    def __init__(self, *faults: Fault) -> None:
        super().__init__("\n".join(str(fault) for fault in faults))
        self.faults = faults


def faults_of(error: ValidationError) -> tuple[Fault, ...]:
    """Every fault that pydantic found, in plain words."""
    return tuple(
        Fault(_path(one["loc"]), _remedy(one["type"], one["msg"], one.get("ctx", {}), one["loc"]))
        for one in error.errors(include_url=False, include_input=False)
    )


_REMEDIES = {
    "missing": "is missing",
    "string_type": "must be text; put it in quotes",
    "string_unicode": "must be valid Unicode text",
    "int_type": "must be a whole number",
    "bool_type": "must be true or false",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be {ge} or more",
    "less_than_equal": "must be {le} or less",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    "too_short": "must have at least {min_length}",
    "literal_error": "must be one of {expected}",
    "list_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
    "model_attributes_type": "must be a mapping",
}
_PATTERNS = {
    "name": "must be lower-case letters, digits and dashes, at most 40, not beginning or ending with a dash",
    "template": "must be lower-case letters, digits and dashes, such as vllm-apptainer",
    "api_key": "must be printable ASCII without spaces",
    "session_header": "must be the name of one header, such as x-session-id",
    "environment": "is no name of an environment variable",
}


def _remedy(kind: str, message: str, context: Mapping[str, Any], loc: tuple[int | str, ...]) -> str:
    names = [part for part in loc if isinstance(part, str)]
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(names[-1], _KNOWN_KEYS, n=1)
        return f"is not known here; did you mean {near[0]}?" if near else "is not known here; remove it"
    if kind == "string_pattern_mismatch":
        return next((words for key, words in _PATTERNS.items() if key in names), message)
    return _REMEDIES[kind].format(**context) if kind in _REMEDIES else message


_MODELS: tuple[type[BaseModel], ...] = (
    file_format.ReplicaSetsFile,
    file_format.ReplicaSetDocument,
    file_format.SlurmDocument,
    file_format.VllmDocument,
    file_format.EndpointDocument,
    file_format.ScaleUpDocument,
    file_format.ScaleDownDocument,
    file_format.PolicyDocument,
    file_format.ScheduleDocument,
    file_format.HandOverDocument,
    file_format.RoutingDocument,
)
_KNOWN_KEYS = sorted({key for model in _MODELS for key in model.model_fields})


def _path(loc: tuple[int | str, ...]) -> str:
    path = ""
    for part in loc:
        if part == "[key]":  # pydantic's word for "the key, not the value"
            continue
        path += f"[{part}]" if isinstance(part, int) else f".{part[:64]}"
    return path.lstrip(".")
