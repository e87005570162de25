"""From a file of replica sets to core's types: every fault of the file is reported at once, with its path and line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from controlplane.core.types import (
    ChooseBy,
    ExternalEndpoint,
    HandOver,
    Mode,
    PolicyType,
    ReplicaSetSpec,
    RoutingPolicy,
    ScaleDown,
    ScaleUp,
    ScalingPolicy,
    Schedule,
    SelectPolicy,
    SlurmResources,
    VllmOptions,
)
from controlplane.specs.faults import Fault, SpecError, faults_of
from controlplane.specs.file_format import (
    EndpointDocument,
    ReplicaSetDocument,
    ReplicaSetsFile,
    ScaleDownDocument,
    ScaleUpDocument,
)

DEFAULT_TEMPLATE = "vllm-apptainer"


def parse_file(text: str, *, directory: Path = Path()) -> list[ReplicaSetSpec]:
    """The replica sets of one YAML file, in its order. Raises SpecError with every fault.

    `directory`: where a relative `api_key_file` is looked for; key files are read now.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        document = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise SpecError(Fault("", f"not YAML: {error.problem}", mark.line + 1 if mark else None)) from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise SpecError(Fault("", f"not YAML: {str(error).splitlines()[0][:256]}")) from None
    if not isinstance(document, dict):
        raise SpecError(Fault("", "the file must be a mapping with the key replica_sets"))
    try:
        sets = ReplicaSetsFile.model_validate(document).replica_sets
        return _specs({f"replica_sets[{i}]": one for i, one in enumerate(sets)}, directory)
    except (ValidationError, SpecError) as error:
        faults = error.faults if isinstance(error, SpecError) else faults_of(error)
        placed = [replace(fault, line=_line_of(root, fault.path)) for fault in faults]
        raise SpecError(*sorted(placed, key=lambda fault: fault.line or 0)) from None


def parse_one(document: Mapping[str, Any], *, directory: Path | None = None) -> ReplicaSetSpec:
    """One replica set as in the file. Raises SpecError with every fault.

    Without a directory `api_key_file` is refused: whoever sends a document must not choose which files are read here.
    """
    try:
        return _specs({"": ReplicaSetDocument.model_validate(document)}, directory)[0]
    except ValidationError as error:
        raise SpecError(*faults_of(error)) from None


def json_schema() -> dict[str, Any]:
    """The JSON Schema of the file."""
    schema = ReplicaSetsFile.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _specs(documents: Mapping[str, ReplicaSetDocument], directory: Path | None) -> list[ReplicaSetSpec]:
    """By their paths. Raises SpecError with every key file that cannot be read."""
    faults: list[Fault] = []
    specs = [_spec(document, path, directory, faults) for path, document in documents.items()]
    if faults:
        raise SpecError(*faults)
    return specs


def _spec(document: ReplicaSetDocument, path: str, directory: Path | None, faults: list[Fault]) -> ReplicaSetSpec:
    endpoints = []
    for i, endpoint in enumerate(document.endpoints):
        try:
            endpoints.append(ExternalEndpoint(endpoint.url, _api_key(endpoint, directory)))
        except _KeyFileUnreadable as error:
            faults.append(Fault(f"{path}.endpoints[{i}].api_key_file".lstrip("."), str(error)))
    fields = {
        **dict(document),
        "template": (document.template or DEFAULT_TEMPLATE) if document.slurm else None,
        "slurm": SlurmResources(**dict(document.slurm)) if document.slurm else None,
        "vllm": VllmOptions(**{**dict(document.vllm), "args": tuple(document.vllm.args)}),
        "scale_up": ScaleUp(**_rules(document.scale_up)),
        "scale_down": ScaleDown(**_rules(document.scale_down)),
        "hand_over": HandOver(**dict(document.hand_over)),
        "routing": RoutingPolicy(**{**dict(document.routing), "policy": ChooseBy(document.routing.policy)}),
        "endpoints": tuple(endpoints),
        "mode": Mode(document.mode),
        "schedules": tuple(Schedule(**dict(schedule)) for schedule in document.schedules),
    }
    return ReplicaSetSpec(**fields)


def _rules(document: ScaleUpDocument | ScaleDownDocument) -> dict[str, Any]:
    policies = ({**dict(policy), "type": PolicyType(policy.type)} for policy in document.policies)
    return {
        **dict(document),
        "policies": tuple(ScalingPolicy(**policy) for policy in policies),
        "select_policy": SelectPolicy(document.select_policy),
    }


class _KeyFileUnreadable(Exception):
    pass


def _api_key(endpoint: EndpointDocument, directory: Path | None) -> str | None:
    if endpoint.api_key_file is None:
        return endpoint.api_key
    if directory is None:
        raise _KeyFileUnreadable("files are read by `controlplane apply` only; send api_key")
    file = directory / endpoint.api_key_file
    try:
        key = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise _KeyFileUnreadable(f"{file} cannot be read: {why}") from None
    if not re.fullmatch(r"[!-~]{1,4096}", key):
        raise _KeyFileUnreadable(f"{file} must hold one line: the key, in printable ASCII without spaces")
    return key


def _line_of(root: yaml.Node | None, path: str) -> int | None:
    """The line of the nearest thing on the path that the text has."""
    node = root
    for part in _parts(path):
        inner: yaml.Node | None = None
        if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            inner = node.value[part]
        elif isinstance(node, yaml.MappingNode):
            inner = next((value for key, value in node.value if key.value == part), None)
        if inner is None:
            break
        node = inner
    return node.start_mark.line + 1 if node is not None else None


def _parts(path: str) -> Iterator[str | int]:
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
        yield name or int(index)


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key given twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)
