"""The files in loki/: what Alloy makes of the lines of jobs and of our own, what Loki is told, and which lines alert.

Alloy and Loki cannot be run here. So the configuration is parsed, its components and arguments are compared with those
that Alloy documents, and its expressions are tried on paths that the product builds and on lines that vLLM, Slurm and
the product have written.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from loguru import logger

from controlplane import logs
from controlplane.reconcile.job_logs import log_path
from tests.unit.alloy import AlloyError, Block, Call, Reference, Sum, parse
from tests.unit.documents import ROOT
from tests.unit.test_docs_events import entries

LOKI = ROOT / "loki"
FIXTURES = ROOT / "tests" / "fixtures" / "logs"
ALLOY = (LOKI / "config.alloy").read_text()

COMPONENTS: Mapping[str, tuple[frozenset[str], frozenset[str], frozenset[str]]] = {
    "local.file_match": (
        frozenset({"path_targets"}),
        frozenset({"sync_period", "ignore_older_than"}),
        frozenset({"targets"}),
    ),
    "loki.source.file": (
        frozenset({"targets", "forward_to"}),
        frozenset({"encoding", "legacy_positions_file", "tail_from_end"}),
        frozenset(),
    ),
    "loki.source.journal": (
        frozenset({"forward_to"}),
        frozenset({"format_as_json", "labels", "matches", "max_age", "path", "relabel_rules"}),
        frozenset(),
    ),
    "loki.relabel": (frozenset({"forward_to"}), frozenset({"max_cache_size"}), frozenset({"receiver", "rules"})),
    "loki.process": (frozenset({"forward_to"}), frozenset(), frozenset({"receiver"})),
    "loki.write": (frozenset(), frozenset({"max_streams", "external_labels"}), frozenset({"receiver"})),
}
"""What Alloy documents of each component: the arguments that must be given, those that may be, and what it exports."""

BLOCKS: Mapping[tuple[str, str], tuple[frozenset[str], frozenset[str]]] = {
    ("loki.source.file", "file_watch"): (frozenset(), frozenset({"min_poll_frequency", "max_poll_frequency"})),
    ("loki.relabel", "rule"): (
        frozenset(),
        frozenset({"action", "modulus", "regex", "replacement", "separator", "source_labels", "target_label"}),
    ),
    ("loki.write", "endpoint"): (
        frozenset({"url"}),
        frozenset({"name", "headers", "proxy_url", "remote_timeout", "tenant_id", "batch_size", "batch_wait"})
        | frozenset({"bearer_token_file", "max_backoff_period", "min_backoff_period", "max_backoff_retries"}),
    ),
    ("loki.process", "stage.decolorize"): (frozenset(), frozenset()),
    ("loki.process", "stage.multiline"): (frozenset({"firstline"}), frozenset({"max_lines", "max_wait_time"})),
    ("loki.process", "stage.truncate"): (frozenset(), frozenset()),
    ("stage.truncate", "rule"): (frozenset({"limit"}), frozenset({"source", "source_type", "suffix"})),
    ("loki.process", "stage.regex"): (frozenset({"expression"}), frozenset({"source"})),
    ("loki.process", "stage.template"): (frozenset({"source", "template"}), frozenset()),
    ("loki.process", "stage.json"): (frozenset({"expressions"}), frozenset({"drop_malformed", "source"})),
    ("loki.process", "stage.timestamp"): (
        frozenset({"source", "format"}),
        frozenset({"action_on_failure", "fallback_formats", "location"}),
    ),
    ("loki.process", "stage.labels"): (frozenset(), frozenset({"values"})),
    ("loki.process", "stage.label_keep"): (frozenset(), frozenset({"values"})),
    ("loki.process", "stage.structured_metadata"): (frozenset(), frozenset({"values"})),
}
"""The same of the blocks in them, by where they may stand: what must be given, and what may be."""

FEW = {"cluster", "app", "level", "model"}
"""All labels that a line may end up with."""


def faults(text: str) -> list[str]:
    """What is wrong with an Alloy file, as far as the tables above know."""
    whole = parse(text)
    found = [f"{name}: an argument outside of a component" for name in whole.arguments]
    exported = {(one.name, one.label): COMPONENTS[one.name][2] for one in whole.blocks if one.name in COMPONENTS}
    if len(exported) < sum(one.name in COMPONENTS for one in whole.blocks):
        found.append("two components of one name")
    for component in whole.blocks:
        if component.name not in COMPONENTS or component.label is None:
            found.append(f"{component.name}: no component, or one without a name")
            continue
        must, may, _ = COMPONENTS[component.name]
        found += _argument_faults(component, must, may)
        found += _block_faults(component)
        for reference in _references(component):
            *name, label, export = reference.path
            if export not in exported.get((".".join(name), label), ()):
                found.append(f"{'.'.join(reference.path)}: nobody exports that")
    return found


def _argument_faults(block: Block, must: frozenset[str], may: frozenset[str]) -> list[str]:
    given = set(block.arguments)
    return [f"{block.name}.{name}: is missing" for name in must - given] + [
        f"{block.name}.{name}: is unknown" for name in given - must - may
    ]


def _block_faults(parent: Block) -> Iterator[str]:
    for block in parent.blocks:
        if (parent.name, block.name) not in BLOCKS:
            yield f"{parent.name} has no block {block.name}"
        else:
            yield from _argument_faults(block, *BLOCKS[parent.name, block.name])
            yield from _block_faults(block)


def _values(block: Block) -> Iterator[Any]:
    pending = [*block.arguments.values(), *(value for one in block.walk() for value in one.arguments.values())]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list):
            pending += value
        elif isinstance(value, Sum):
            pending += value.parts
        elif isinstance(value, Call):
            pending += value.arguments
        yield value


def _references(block: Block) -> Iterator[Reference]:
    return (value for value in _values(block) if isinstance(value, Reference))


# --- the file is right ---------------------------------------------------------------------------------------


def test_alloys_file_names_only_what_alloy_has() -> None:
    assert faults(ALLOY) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("firstline ", "first_line ", "stage.multiline.first_line: is unknown"),
        ("loki.write.loki.receiver", "loki.write.lokki.receiver", "loki.write.lokki.receiver: nobody exports that"),
        ("local.file_match.jobs.targets", "local.file_match.jobs.receiver", "nobody exports that"),
        ("stage.decolorize", "stage.decolourise", "loki.process has no block stage.decolourise"),
        ('    url = sys.env("LOKI_URL")', '    uri = sys.env("LOKI_URL")', "endpoint.url: is missing"),
        ('loki.process "controlplane"', 'loki.process "jobs"', "two components of one name"),
    ],
)
def test_what_is_wrong_is_found(old: str, new: str, fault: str) -> None:
    assert old in ALLOY
    assert any(fault in one for one in faults(ALLOY.replace(old, new)))


@pytest.mark.parametrize("text", ["a {", "a }", 'a = "x', "a = {b = 1 c = 2}", 'a = ["x"\n]', "a = 1 b = 2", "a = '1'"])
def test_what_does_not_parse_is_refused(text: str) -> None:
    with pytest.raises(AlloyError):
        parse(text)


def test_the_tailer_of_the_shared_file_system_polls_slowly_and_never_forgets_a_job() -> None:
    [source] = [one for one in parse(ALLOY).blocks if (one.name, one.label) == ("loki.source.file", "jobs")]
    [watch] = source.all("file_watch")
    assert watch.arguments == {"min_poll_frequency": "1s", "max_poll_frequency": "5s"}
    [match] = [one for one in parse(ALLOY).blocks if (one.name, one.label) == ("local.file_match", "jobs")]
    assert match.arguments["ignore_older_than"] == "168h"


def test_labels_are_few_and_everything_else_is_structured_metadata() -> None:
    for name in ("jobs", "controlplane"):
        kept = pipeline(name).blocks[-1]
        assert kept.name == "stage.label_keep", "last, so that no label of a source gets past it"
        assert set(kept.arguments["values"]) <= FEW
        [labels] = pipeline(name).all("stage.labels")
        assert set(labels.arguments["values"]) <= set(kept.arguments["values"])


# --- what becomes of a line --------------------------------------------------------------------------------------


def pipeline(name: str) -> Block:
    [found] = [one for one in parse(ALLOY).blocks if (one.name, one.label) == ("loki.process", name)]
    return found


def regexes(name: str) -> Iterator[tuple[str | None, re.Pattern[str]]]:
    for stage in pipeline(name).all("stage.regex"):
        yield stage.arguments.get("source"), re2(stage.arguments["expression"])


def re2(expression: str) -> re.Pattern[str]:
    """Compiled by Python, after making sure that it holds nothing that RE2 lacks."""
    assert not re.search(r"\(\?(?:[=!>]|<[=!]|P=|\()|\\[1-9]|[+*?}]\+", expression), expression
    return re.compile(expression)


def extracted(path: str, line: str) -> dict[str, str]:
    """What the stages for jobs take out of a line of this file."""
    found: dict[str, str] = {"filename": path}
    for source, pattern in regexes("jobs"):
        if match := pattern.search(found[source] if source else line):
            found |= {name: value for name, value in match.groupdict().items() if value is not None}
    if "model" in found:
        found["model"] = found["model"].replace("=", "/")
    if "level" in found:
        found["level"] = found["level"].lower()
    return found


@pytest.mark.parametrize(
    ("model", "label"),
    [
        ("qwen3-8b", "qwen3-8b"),
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("gpt-oss:20b", "gpt-oss:20b"),
        ("a.b.out", "a.b.out"),
        ("100 % \\n*[x]é", "100____n__x__"),
        ("x" * 256, "x" * 128),
    ],
)
@pytest.mark.parametrize("replica_set", ["a", "qwen3-8b", "x-1-2", "9"])
def test_the_path_of_a_jobs_log_tells_whose_it_is(model: str, label: str, replica_set: str) -> None:
    path = log_path(Path("/scratch/llm-2.out/x"), f"cp-{replica_set}-17", 4711, model)
    assert len(Path(path).name) <= 255
    assert set(Path(path).name).isdisjoint("%\\*?[]{} /"), "nothing to Slurm's patterns, to globs and to shells"
    assert log_path("/d", "cp-a-1", "%j", model).count("%") == 1
    found = extracted(path, "x")
    assert (found["model"], found["replica_set"]) == (label, replica_set)
    assert (found["replica"], found["slurm_job_id"]) == (f"cp-{replica_set}-17", "4711")


def test_the_files_that_are_read_are_the_ones_that_jobs_write() -> None:
    [match] = [one for one in parse(ALLOY).blocks if (one.name, one.label) == ("local.file_match", "jobs")]
    [target] = match.arguments["path_targets"]
    assert target["__path__"] == Sum((Call("sys.env", ("CONTROLPLANE_JOB_DIRECTORY",)), "/cp-*.out"))
    assert Path(log_path("/d", "cp-a-1", 2, "m")).match("/d/cp-*.out")


def lines(name: str) -> list[str]:
    return (FIXTURES / name).read_text().splitlines()


@pytest.mark.parametrize(
    ("line", "level", "node"),
    [
        ("(EngineCore pid=16991) ERROR 11-24 13:25:52 [core.py:1510] EngineCore failed to start.", "error", None),
        ("INFO 10-02 08:00:00 api_server.py:12] started", "info", None),
        ("INFO:     127.0.0.1:37056 - \"POST /v1/chat/completions HTTP/1.1\" 404 Not Found", "info", None),
        ("WARNING 11-24 13:25:13 [interface.py:1457] careful", "warning", None),
        ("slurmstepd: error: *** JOB 7 ON gpu-03 CANCELLED AT 2026-11-24 DUE TO TIME LIMIT", "error", "gpu-03"),
        ("slurmstepd-n1: error: *** JOB 1 ON n1 CANCELLED AT 2026-11-24T13:31:39 DUE TO PREEMPTION ***", "error", "n1"),
        ("slurmstepd: error: *** STEP 7.0 ON n1.cluster CANCELLED AT 2026-11-24T13:31:01 ***", "error", "n1.cluster"),
        ("2026-11-24 14:42:39,564\tWARNING authentication_token_setup.py:73 -- Token", "warning", None),
        ("INFORMATION without a level", None, None),
        ("Loading weights:  50%", None, None),
    ],
)  # fmt: skip
def test_levels_and_nodes_are_read_where_a_line_tells_them(line: str, level: str | None, node: str | None) -> None:
    found = extracted("/d/cp-a-1-7.m.out", line)
    assert (found.get("level"), found.get("node")) == (level, node)


def blocks(name: str) -> list[str]:
    """The entries that the multiline stage makes of a file."""
    first = re2(pipeline("jobs").all("stage.multiline")[0].arguments["firstline"])
    made: list[str] = []
    for line in lines(name):
        if first.search(line) or not made:
            made.append(line)
        else:
            made[-1] += "\n" + line
    return made


def test_a_traceback_is_one_entry_with_its_error() -> None:
    made = blocks("vllm-0.32.0-no-memory.log")
    raw = [one for one in made if re.match(r"(\(\w+ pid=\d+\) )?Traceback", one)]
    assert len(raw) == 2, "of the engine, and of the server"
    assert raw[0].splitlines()[-1].startswith("ValueError: No available memory for the cache blocks")
    assert raw[1].splitlines()[-1].startswith("RuntimeError: Engine core initialization failed.")
    logged = [one for one in made if "] Traceback (most recent call last):" in one]
    assert len(logged) == 1, "vLLM logs it as well, each line with a head of its own"
    assert len(logged[0].splitlines()) > 20


def test_ordinary_lines_are_entries_of_their_own() -> None:
    made = blocks("vllm-0.32.0-engine-killed.log")
    longest = max(one.count("\n") for one in made if "Traceback" not in one)
    assert longest <= 6, "vLLM's banner"
    for sentence in ("Starting to load model", "Application startup complete.", '"POST /v1/chat/completions', "NUMA"):
        assert any(sentence in one.splitlines()[0] for one in made), sentence


def test_rays_lines_are_entries_of_their_own() -> None:
    made = blocks("ray-2.60.0.log")
    assert all("\n" not in one for one in made)
    assert made[-1] == "replica: stopped as asked"


def test_no_block_is_cut_before_its_error() -> None:
    [stage] = pipeline("jobs").all("stage.multiline")
    longest = max(one.count("\n") + 1 for name in FIXTURES.glob("vllm-*.log") for one in blocks(name.name))
    assert longest < stage.arguments["max_lines"]


# --- our own lines -----------------------------------------------------------------------------------------------


def written(module: str, **options: Any) -> dict[str, Any]:
    stream = io.StringIO()

    def of_the_module(record: Any) -> None:
        record["name"] = module

    logs.configure(stream=stream, **options)
    try:
        logger.patch(of_the_module).info("job submitted", replica="cp-a-1", slurm_job_id=7)
    finally:
        logger.remove()
    [line] = stream.getvalue().splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


@pytest.mark.parametrize(
    ("module", "options", "app"),
    [
        ("controlplane.reconcile.actions", {}, "control-plane"),
        ("controlplane.proxy.access_log", {}, "proxy"),
        ("controlplane.workers.supervisor", {}, "proxy"),
        ("uvicorn.error", {}, "control-plane"),
        ("controlplane.dependencies", {"app": "proxy"}, "proxy"),
        ("uvicorn.error", {"app": "proxy"}, "proxy"),
        ("controlplane.servers", {"app": "control-plane"}, "control-plane"),
    ],
)
def test_each_line_says_which_program_it_is_of(module: str, options: dict[str, Any], app: str) -> None:
    line = written(module, **options)
    assert line["app"] == app
    assert all(not isinstance(value, dict | list) for value in line.values()), "flat"


def test_what_alloy_takes_out_of_our_lines_is_there() -> None:
    [stage] = pipeline("controlplane").all("stage.json")
    fields = {field for _, fields in entries("The log").values() for field in fields}
    taken = set(stage.arguments["expressions"])
    assert taken <= fields | {"time", "level", "app", "event", "source", "worker"}
    assert {"replica", "replica_set", "slurm_job_id", "endpoint", "request_id", "tenant", "subject"} <= taken
    [metadata] = pipeline("controlplane").all("stage.structured_metadata")
    assert set(metadata.arguments["values"]) == taken - {"time", "level", "app"}


def test_the_time_of_our_lines_is_of_the_form_that_alloy_is_told() -> None:
    [stage] = pipeline("controlplane").all("stage.timestamp")
    assert stage.arguments == {"source": "time", "format": "RFC3339Nano"}
    time = written("controlplane.app")["time"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)", time)


# --- Loki --------------------------------------------------------------------------------------------------------

LOKI_KEYS = {
    "auth_enabled": None,
    "server": {"http_listen_address", "http_listen_port", "grpc_listen_address", "grpc_listen_port", "log_level"},
    "common": {"instance_addr", "path_prefix", "replication_factor", "ring", "storage"},
    "schema_config": {"configs"},
    "limits_config": {"allow_structured_metadata", "retention_period", "reject_old_samples", "max_line_size"}
    | {"reject_old_samples_max_age", "ingestion_rate_mb", "ingestion_burst_size_mb"},
    "compactor": {"working_directory", "retention_enabled", "delete_request_store"},
    "analytics": {"reporting_enabled"},
}
"""The documented keys of Loki 3 that the file uses, by section."""


def test_lokis_file_has_documented_keys_listens_on_this_host_and_reports_to_nobody() -> None:
    content = yaml.safe_load((LOKI / "loki.yaml").read_text())
    for name, section in content.items():
        keys = LOKI_KEYS[name]
        assert (set(section) if isinstance(section, dict) else None) == keys, name
    assert content["server"]["http_listen_address"] == content["server"]["grpc_listen_address"] == "127.0.0.1"
    assert content["common"]["instance_addr"] == "127.0.0.1"
    assert content["common"]["ring"] == {"kvstore": {"store": "inmemory"}}, "no gossip port"
    assert content["analytics"] == {"reporting_enabled": False}
    assert content["limits_config"]["allow_structured_metadata"] is True
    [schema] = content["schema_config"]["configs"]
    assert (schema["store"], schema["schema"]) == ("tsdb", "v13")
    assert content["compactor"]["retention_enabled"] is True
    assert "/tmp" not in (LOKI / "loki.yaml").read_text(), "gone after a restart"


# --- alerts ------------------------------------------------------------------------------------------------------

RULE_KEYS = {"uid", "title", "condition", "data", "noDataState", "execErrState", "for", "isPaused"} | {
    "annotations",
    "labels",
}
QUERY_KEYS = {"refId", "datasourceUid", "queryType", "relativeTimeRange", "model"}
MEMORY, NCCL, CUT = "controlplane-out-of-memory", "controlplane-nccl", "controlplane-cut-by-slurm"


def rules() -> dict[str, dict[str, Any]]:
    content = yaml.safe_load((LOKI / "alerts" / "logs.yaml").read_text())
    assert set(content) == {"apiVersion", "groups"}
    [group] = content["groups"]
    assert set(group) == {"orgId", "name", "folder", "interval", "rules"}
    return {rule["uid"]: rule for rule in group["rules"]}


def test_log_rules_have_the_keys_that_grafana_knows() -> None:
    for uid, rule in rules().items():
        assert set(rule) == RULE_KEYS, uid
        assert len(uid) <= 40
        query, reduce, threshold = rule["data"]
        assert set(query) == QUERY_KEYS
        assert query["datasourceUid"] == query["model"]["datasource"]["uid"] == "loki"
        assert query["queryType"] == query["model"]["queryType"] == "instant"
        assert (reduce["datasourceUid"], threshold["datasourceUid"]) == ("__expr__", "__expr__")
        assert reduce["model"]["settings"] == {"mode": "dropNN"}
        assert rule["condition"] == threshold["refId"] == "C"
        assert (rule["noDataState"], rule["execErrState"]) == ("OK", "KeepLast"), "a Loki that is away alerts nobody"


def test_log_rules_ask_the_control_plane_for_nothing() -> None:
    for rule in rules().values():
        assert set(rule["labels"]).isdisjoint({"action", "owner"})
        assert "notification_settings" not in rule, "the site's own policies send them"
        assert rule["labels"]["service"] == "controlplane", "the label by which a site sends all that is for people"
        for text in rule["labels"].values():  # labels pass through the expansion of variables, where "$" is "$$"
            assert not re.search(r"(?<!\$)\$(?!\$)", text)


def test_log_rules_stand_where_neither_grafana_nor_the_demo_takes_them_unasked() -> None:
    assert not list((ROOT / "grafana" / "alerts").glob("**/logs.yaml"))
    assert all(path.is_file() for path in (ROOT / "grafana" / "alerts").iterdir()), "Grafana takes files only"


def alerts_on(line: str) -> set[str]:
    """Whose queries count this line, by their line filters."""
    found = set()
    for uid, rule in rules().items():
        query = rule["data"][0]["model"]["expr"]
        assert query.startswith("sum by (model, replica, slurm_job_id")
        assert '{app="vllm"}' in query
        filters = re.findall(r"(\|=|\|~|\| regexp) `([^`]*)`", query)
        assert filters
        matches = [text in line if sign == "|=" else bool(re2(text).search(line)) for sign, text in filters]
        if all(matches):
            found.add(uid)
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vllm-0.32.0-engine-killed.log", set()),
        ("vllm-0.32.0-no-memory.log", {MEMORY}),
        ("memory.log", {MEMORY}),
        ("nccl.log", {NCCL}),
        ("slurm-cut.log", {CUT}),
        ("harmless.log", set()),
    ],
)
def test_lines_that_were_written_alert_as_they_should(name: str, expected: set[str]) -> None:
    found = [alerts_on(line) for line in lines(name)]
    assert set().union(*found) == expected
    if not name.startswith("vllm-"):
        assert [line for line, one in zip(lines(name), found, strict=True) if one != expected] == []


def test_the_cause_of_a_cut_is_told() -> None:
    query = rules()[CUT]["data"][0]["model"]["expr"]
    [expression] = re.findall(r"\| regexp `([^`]*)`", query)
    causes = {match["cause"] for line in lines("slurm-cut.log") if (match := re2(expression).search(line))}
    assert causes == {"TIME LIMIT", "PREEMPTION", "NODE FAILURE"}
