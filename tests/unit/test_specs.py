"""The file format of replica sets: what it takes, what it refuses and how it says so."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from controlplane.core import types
from controlplane.specs import SpecError, file_format, json_schema, parse_file, parse_one
from controlplane.specs.parsing import DEFAULT_TEMPLATE

PUBLISHED = Path(__file__).parents[2] / "docs" / "replica-sets.schema.json"

CONTRACT = """
replica_sets:
  - name: qwen3-8b
    model: qwen3-8b
    template: vllm-apptainer
    min_replicas: 0
    max_replicas: 4
    slurm: {partition: gpu, gpus_per_node: 1, time_limit_seconds: 43200}
    vllm: {image: /software/vllm.sif, model_path: /models/Qwen3-8B, args: ["--max-model-len", "8192"]}
  - name: office-box
    model: gemma-small
    endpoints: [{url: "http://10.0.0.7:8000", api_key_file: office}]
"""

SLURM: dict[str, Any] = {"name": "a", "model": "m", "slurm": {"time_limit_seconds": 60}}
EXTERNAL: dict[str, Any] = {"name": "a", "model": "m", "endpoints": [{"url": "http://h:1"}]}


def faults(document: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(SpecError) as refused:
        parse_one(document)
    return {fault.path: fault.message for fault in refused.value.faults}


def faults_of_file(text: str) -> list[str]:
    with pytest.raises(SpecError) as refused:
        parse_file(text)
    return str(refused.value).splitlines()


def test_the_example_of_the_contract_is_read(tmp_path: Path) -> None:
    (tmp_path / "office").write_text("sk-office\n")
    qwen, office = parse_file(CONTRACT, directory=tmp_path)
    assert qwen == types.ReplicaSetSpec(
        name="qwen3-8b",
        model="qwen3-8b",
        template="vllm-apptainer",
        max_replicas=4,
        slurm=types.SlurmResources(time_limit_seconds=43200, partition="gpu", gpus_per_node=1),
        vllm=types.VllmOptions("/software/vllm.sif", "/models/Qwen3-8B", ("--max-model-len", "8192")),
    )
    assert office.is_external
    assert office.template is None
    assert office.endpoints == (types.ExternalEndpoint("http://10.0.0.7:8000", "sk-office"),)


def test_what_is_left_out_has_the_defaults_of_the_core_types() -> None:
    resources = types.SlurmResources(time_limit_seconds=60)
    assert parse_one(SLURM) == types.ReplicaSetSpec("a", "m", template=DEFAULT_TEMPLATE, slurm=resources)
    assert parse_one(EXTERNAL) == types.ReplicaSetSpec("a", "m", endpoints=(types.ExternalEndpoint("http://h:1"),))


@pytest.mark.parametrize(
    ("document", "noun", "only_in_the_file"),
    [
        (file_format.ReplicaSetDocument, types.ReplicaSetSpec, set()),
        (file_format.SlurmDocument, types.SlurmResources, set()),
        (file_format.VllmDocument, types.VllmOptions, set()),
        (file_format.EndpointDocument, types.ExternalEndpoint, {"api_key_file"}),
        (file_format.ScaleUpDocument, types.ScaleUp, set()),
        (file_format.ScaleDownDocument, types.ScaleDown, set()),
        (file_format.RoutingDocument, types.RoutingPolicy, set()),
    ],
)
def test_the_file_has_exactly_the_fields_of_the_core_types(
    document: type[BaseModel], noun: Any, only_in_the_file: set[str]
) -> None:
    assert set(document.model_fields) - only_in_the_file == {field.name for field in dataclasses.fields(noun)}


def test_the_published_schema_is_the_one_that_is_checked() -> None:
    assert json.loads(PUBLISHED.read_text()) == json_schema(), "run python -m controlplane.specs > " + PUBLISHED.name


def test_every_pattern_of_the_schema_means_the_same_in_other_languages() -> None:
    patterns = re.findall(r'"pattern": "(.*)"', PUBLISHED.read_text())
    assert patterns
    assert all(pattern.startswith("^") and pattern.endswith("$") for pattern in patterns)


def test_a_spec_as_json_reads_back_as_itself() -> None:
    for document in (SLURM, EXTERNAL):
        spec = parse_one(document)
        assert parse_one(json.loads(json.dumps(dataclasses.asdict(spec)))) == spec


@pytest.mark.parametrize(
    ("change", "path", "message"),
    [
        ({"name": "Qwen"}, "name", "lower-case"),
        ({"name": "a" * 41}, "name", "at most 40"),
        ({"name": "a-"}, "name", "dash"),
        ({"name": "a\n"}, "name", "lower-case"),
        ({"name": 7}, "name", "put it in quotes"),
        ({"model": ""}, "model", "empty"),
        ({"model": "a\nb"}, "model", "control characters"),
        ({"model": "a\u2028b"}, "model", "control characters"),
        ({"model": "\ud800"}, "model", "Unicode"),
        ({"model": "--trust-remote-code"}, "model", "dash"),
        ({"template": "../x"}, "template", "lower-case"),
        ({"min_replicas": -1}, "min_replicas", "0 or more"),
        ({"min_replicas": "1"}, "min_replicas", "whole number"),
        ({"min_replicas": True}, "min_replicas", "whole number"),
        ({"max_replicas": 10**9}, "max_replicas", "10000 or less"),
        ({"min_replicas": 3, "max_replicas": 2}, "", "min_replicas must not be greater"),
        ({"slurm": {}}, "slurm.time_limit_seconds", "is missing"),
        ({"slurm": {"time_limit_seconds": 0}}, "slurm.time_limit_seconds", "more than 0"),
        ({"slurm": {"time_limit_seconds": 1, "nodes": 0}}, "slurm.nodes", "1 or more"),
        ({"slurm": {"time_limit_seconds": 1, "gpus_per_node": -1}}, "slurm.gpus_per_node", "0 or more"),
        ({"slurm": {"time_limit_seconds": 1, "partion": "x"}}, "slurm.partion", "did you mean partition"),
        ({"slurm": 5}, "slurm", "mapping"),
        ({"vllm": {"args": "--x"}}, "vllm.args", "must be a list"),
        ({"vllm": {"args": ["a\x00b"]}}, "vllm.args[0]", "control characters"),
        ({"vllm": {"environment": {"A B": "x"}}}, "vllm.environment.A B", "no name of an environment variable"),
        ({"vllm": {"environment": {"A": 1}}}, "vllm.environment.A", "put it in quotes"),
        ({"probe": "ping"}, "probe", "must be one of"),
        ({"routing": {"policy": "round_robin"}}, "routing.policy", "must be one of"),
        ({"routing": {"polcy": "prefix"}}, "routing.polcy", "did you mean policy"),
        ({"routing": {"weight": 0}}, "routing.weight", "1 or more"),
        ({"routing": {"weight": 0.5}}, "routing.weight", "whole number"),
        ({"routing": {"slow_start_seconds": 3601}}, "routing.slow_start_seconds", "3600 or less"),
        ({"routing": {"max_in_flight": 0}}, "routing.max_in_flight", "1 or more"),
        ({"routing": {"session_header": "x-chat: 7"}}, "routing.session_header", "the name of one header"),
        ({"routing": "prefix"}, "routing", "mapping"),
        ({"start_timeout_seconds": 0}, "start_timeout_seconds", "more than 0"),
        ({"endpoints": [{"url": "http://h:1"}]}, "", "exactly one of slurm and endpoints"),
        ({"slurm": None}, "", "exactly one of slurm and endpoints"),
    ],
)
def test_a_fault_is_named_with_its_path_and_a_remedy(change: dict[str, Any], path: str, message: str) -> None:
    found = faults({**SLURM, **change})
    assert list(found) == [path]
    assert message in found[path]


@pytest.mark.parametrize(
    "url",
    [
        "",
        "h:1",
        "ftp://h:1",
        "http://",
        "http://u@h:1",
        "http://u:p@h:1",
        "http://h:1/v1",
        "http://h:1?x=1",
        "http://h:1#x",
        "http://h:99999",
        "http://h:0",
        "http://h h:1",
        "http://h:1\n",
        "http://[::1",
        "http://h:1/?",
    ],
)
def test_an_endpoint_is_a_scheme_a_host_and_a_port_and_nothing_else(url: str) -> None:
    assert list(faults({**EXTERNAL, "endpoints": [{"url": url}]})) == ["endpoints[0].url"]


@pytest.mark.parametrize("url", ["http://10.0.0.7:8000", "https://vllm.example", "http://[::1]:8000", "http://h:1/"])
def test_an_endpoint_may_be_a_name_or_an_address(url: str) -> None:
    (endpoint,) = parse_one({**EXTERNAL, "endpoints": [{"url": url}]}).endpoints
    assert endpoint.url == url.rstrip("/")


@pytest.mark.parametrize(
    "change",
    [{"template": "vllm-apptainer"}, {"max_replicas": 3}, {"vllm": {"image": "/x"}}, {"scale_up": {"step": 2}}],
)
def test_what_only_slurm_can_do_is_refused_beside_endpoints(change: dict[str, Any]) -> None:
    assert f"{next(iter(change))} is only for sets that Slurm runs" in faults({**EXTERNAL, **change})[""]


@pytest.mark.parametrize("kind", [SLURM, EXTERNAL])
def test_every_kind_of_set_says_how_it_is_routed(kind: dict[str, Any]) -> None:
    routing = {"policy": "session", "session_header": "X-Chat-Id", "weight": 300, "max_in_flight": 64}
    assert parse_one({**kind, "routing": routing}).routing == types.RoutingPolicy(
        types.ChooseBy.SESSION, session_header="x-chat-id", weight=300, max_in_flight=64
    )


def test_a_key_that_is_no_unicode_is_refused_in_words_that_can_be_sent() -> None:
    for change in ({"\ud800": 1}, {"vllm": {"environment": {"\ud800": "x"}}}):
        for path, message in faults({**SLURM, **change}).items():
            assert f"{path}{message}".encode()


def test_a_url_or_a_name_may_be_given_once() -> None:
    assert "once" in faults({**EXTERNAL, "endpoints": [{"url": "http://h:1"}, {"url": "http://h:1/"}]})[""]
    twice = json.dumps({"replica_sets": [SLURM, SLURM]})
    assert faults_of_file(twice) == ["line 1: replica_sets: two are named a"]


def test_all_faults_of_a_file_are_reported_at_once_in_the_order_of_its_lines() -> None:
    text = """
replica_sets:
  - name: A
    model: m
    max_replica: 4
    slurm: {partition: 7}
  - name: b
    endpoints: [{url: "ftp://h"}]
"""
    assert [line.split(": ")[:2] for line in faults_of_file(text)] == [
        ["line 3", "replica_sets[0].name"],
        ["line 5", "replica_sets[0].max_replica"],
        ["line 6", "replica_sets[0].slurm.time_limit_seconds"],
        ["line 6", "replica_sets[0].slurm.partition"],
        ["line 7", "replica_sets[1].model"],
        ["line 8", "replica_sets[1].endpoints[0].url"],
    ]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a: [", "line 1: not YAML"),
        ("replica_sets:\n- name: a\n  name: b", "line 3: not YAML: 'name' is given twice"),
        ("", "the file must be a mapping with the key replica_sets"),
        ("- 1", "the file must be a mapping with the key replica_sets"),
        ("replica_sets: []", "line 1: replica_sets: must have at least 1"),
        ("replica_sets: {}", "line 1: replica_sets: must be a list"),
        ("replica_sets: 2026-13-99", "not YAML: month must be in 1..12"),
        ("replica_sets: &a [*a]", "line 1: replica_sets[0]: must be a mapping"),
        ("replica_sets: !!python/object:os.system {}", "line 1: not YAML: could not determine a constructor"),
        ("\x00", "not YAML"),
        ("[" * 5000, "not YAML"),
    ],
)
def test_what_is_no_such_file_is_refused_in_one_sentence(text: str, fault: str) -> None:
    (found,) = faults_of_file(text)
    assert found.startswith(fault)


def test_every_key_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "two-lines").write_text("a\nb\n")
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    names = ["missing", "two-lines", "empty", "binary", "."]
    endpoints = [{"url": f"http://h:{i}", "api_key_file": name} for i, name in enumerate(names, 1)]
    with pytest.raises(SpecError) as refused:
        parse_file(json.dumps({"replica_sets": [{**EXTERNAL, "endpoints": endpoints}]}), directory=tmp_path)
    assert [fault.path for fault in refused.value.faults] == [
        f"replica_sets[0].endpoints[{i}].api_key_file" for i in range(len(names))
    ]
    assert all(name in str(refused.value) for name in names)


def test_whoever_sends_a_document_does_not_choose_which_files_are_read(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("sk-secret")
    document = {**EXTERNAL, "endpoints": [{"url": "http://h:1", "api_key_file": str(file)}]}
    assert "send api_key" in faults(document)["endpoints[0].api_key_file"]


def test_a_key_is_given_once_and_never_repeated_in_a_fault() -> None:
    secret = "sk-very secret"
    both = {"url": "http://h:1", "api_key": "sk-x", "api_key_file": "f"}
    assert "not both" in faults({**EXTERNAL, "endpoints": [both]})["endpoints[0]"]
    for key in (secret, 7):
        with pytest.raises(SpecError) as refused:
            parse_one({**EXTERNAL, "endpoints": [{"url": "http://h:1", "api_key": key}]})
        assert str(key) not in str(refused.value)
        assert refused.value.__cause__ is None
    assert "sk-x" not in repr(parse_one({**EXTERNAL, "endpoints": [{"url": "http://h:1", "api_key": "sk-x"}]}))
