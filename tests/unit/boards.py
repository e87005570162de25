"""What the shipped boards hold, taken apart for the tests: panels, queries, the metrics in them, and what there is."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.unit.test_docs_events import entries

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "grafana" / "dashboards"
DOCUMENTS: dict[str, dict[str, Any]] = {path.stem: json.loads(path.read_text()) for path in FOLDER.glob("*.json")}
SOURCES = {"prometheus": "prometheus", "postgres": "grafana-postgresql-datasource", "loki": "loki"}
"""Each data source's variable, and its type."""

_UNITS = """
short string none s ms m h d dtdurations percentunit percent reqps ops cps bytes decbytes mbytes watt joule kwatth
celsius hertz rothz dateTimeAsIso dateTimeAsLocal dateTimeAsLocalNoDateIfToday dateTimeFromNow locale bool
"""
UNITS = frozenset(_UNITS.split())
"""Those of Grafana's units that boards use; a misspelt one is shown as a suffix."""

REPLICA_LABELS = frozenset({"model", "replica_set", "replica", "node", "slurm_job_id"})
GPU_LABELS = frozenset({"node", "gpu", "UUID"})
RECORDED: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(
        [
            "replica:requests_running",
            "replica:requests_waiting",
            "replica:kv_cache_usage:ratio",
            "replica:generation_tokens:rate1m",
            "replica:prompt_tokens:rate1m",
            "replica:preemptions:rate5m",
            "replica:prefix_cache_hits:ratio5m",
        ],
        REPLICA_LABELS,
    ),
    "replica:requests_finished:rate5m": REPLICA_LABELS | {"finished_reason"},
    **dict.fromkeys(
        [
            "replica:time_to_first_token_seconds_bucket:rate5m",
            "replica:inter_token_latency_seconds_bucket:rate5m",
            "replica:e2e_request_latency_seconds_bucket:rate5m",
            "replica:request_queue_time_seconds_bucket:rate5m",
        ],
        REPLICA_LABELS | {"le"},
    ),
    **dict.fromkeys(
        [
            "model:requests_running:sum",
            "model:requests_waiting:sum",
            "model:replicas_ready:count",
            "model:kv_cache_usage:p90",
            "model:generation_tokens:rate1m",
            *(f"model:ttft_objective_missed:ratio{window}" for window in ("5m", "30m", "1h", "6h")),
        ],
        frozenset({"model"}),
    ),
    "model:time_to_first_token_seconds_bucket:rate5m": frozenset({"model", "le"}),
    "node:gpu_utilisation:ratio": frozenset({"node"}),
    "node:gpu_power_watts:sum": frozenset({"node"}),
    "gpu:xid_errors:increase5m": GPU_LABELS | {"xid"},
    "gpu:idle": GPU_LABELS | {"slurm_job_id"},
}
"""What the recording rules make, and the labels of it: boards, rules and alerts agree on these names."""
_DCGM_DEVICE = """
SM_CLOCK MEM_CLOCK MEMORY_TEMP GPU_TEMP POWER_USAGE TOTAL_ENERGY_CONSUMPTION PCIE_REPLAY_COUNTER GPU_UTIL MEM_COPY_UTIL
XID_ERRORS FB_FREE FB_USED FB_RESERVED NVLINK_BANDWIDTH_TOTAL UNCORRECTABLE_REMAPPED_ROWS CORRECTABLE_REMAPPED_ROWS
ROW_REMAP_FAILURE ECC_SBE_VOL_TOTAL ECC_DBE_VOL_TOTAL ECC_SBE_AGG_TOTAL ECC_DBE_AGG_TOTAL THERMAL_VIOLATION
POWER_VIOLATION
"""
SCRAPED: Mapping[str, frozenset[str]] = {
    "up": REPLICA_LABELS | {"job", "instance"},
    "scrape_duration_seconds": REPLICA_LABELS | {"job", "instance"},
    **dict.fromkeys(
        [
            *(f"DCGM_FI_DEV_{name}" for name in _DCGM_DEVICE.split()),
            *(f"DCGM_FI_PROF_{name}" for name in ("GR_ENGINE_ACTIVE", "PIPE_TENSOR_ACTIVE", "DRAM_ACTIVE")),
        ],
        GPU_LABELS | {"slurm_job_id", "hpc_job", "modelName", "device", "pci_bus_id", "job", "instance"},
    ),
    "DCGM_EXP_XID_ERRORS_COUNT": GPU_LABELS | {"slurm_job_id", "xid", "job", "instance"},
}
"""What others' exporters say, by dcgm-exporter's default and recommended counters; vLLM's is asked for as recorded."""
_OF_PROMQL = """
by without on ignoring group_left group_right bool offset and or unless sum min max avg count group topk bottomk
quantile count_values stddev rate irate increase delta deriv histogram_quantile clamp_min clamp_max clamp vector
scalar time absent changes resets abs ceil floor round sort sort_desc label_replace label_join max_over_time
min_over_time avg_over_time sum_over_time count_over_time last_over_time quantile_over_time present_over_time
timestamp inf nan
"""
OF_PROMQL = frozenset(_OF_PROMQL.split())
"""Names in expressions that are no metrics."""


@dataclass(frozen=True)
class Asked:
    """A query of a panel, an annotation or a variable; `place` tells where."""

    place: str
    kind: str  # the data source's type
    text: str
    legend: str = ""
    is_instant: bool = False


def panels(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every panel that shows something, those in folded rows included."""
    found: list[dict[str, Any]] = []
    for panel in document["panels"]:
        found += panel["panels"] if panel["type"] == "row" else [panel]
    return found


def every_panel() -> Iterator[tuple[str, dict[str, Any]]]:
    for uid, document in DOCUMENTS.items():
        for panel in panels(document):
            yield f"{uid}: {panel['title']}", panel


def asked() -> Iterator[Asked]:
    for place, panel in every_panel():
        for target in panel["targets"]:
            text = target.get("expr", target.get("rawSql"))
            kind, legend = target["datasource"]["type"], target.get("legendFormat", "")
            yield Asked(f"{place} {target['refId']}", kind, text, legend, target.get("instant", False))
    for uid, document in DOCUMENTS.items():
        for mark in document["annotations"]["list"]:
            yield Asked(f"{uid}: {mark['name']}", mark["datasource"]["type"], mark["target"]["rawSql"])
        for variable in document["templating"]["list"]:
            if variable["type"] == "query":
                yield Asked(f"{uid}: ${variable['name']}", variable["datasource"]["type"], variable["definition"])


def promql() -> list[Asked]:
    """Every expression; of `label_values(metric, label)` the metric."""
    found = []
    for one in asked():
        if one.kind == "prometheus":
            values = re.fullmatch(r"label_values\((.*),\s*\w+\)", one.text)
            found.append(Asked(one.place, one.kind, values[1]) if values else one)
    return found


def metrics_of(expression: str) -> dict[str, set[str]]:
    """The names of the metrics, and of each the labels that it is selected by."""
    found: dict[str, set[str]] = {}
    bare = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", expression)
    bare = re.sub(r"\[[^\]]*\]", " ", bare)
    bare = re.sub(r'"[^"]*"', '""', bare)
    for name, matchers in re.findall(r"(?<![\w:])([a-zA-Z_:][\w:]*)\s*(\{[^}]*\})?", bare):
        if name not in OF_PROMQL:
            found.setdefault(name, set()).update(re.findall(r"(\w+)\s*[=!]", matchers))
    return found


def known_metrics() -> dict[str, frozenset[str]]:
    """Every metric that boards may ask for, with its labels; of histograms the series."""
    found = {**RECORDED, **SCRAPED}
    for name, (kind, labels) in entries("Metrics of the control plane", "Metrics of the proxy").items():
        if kind == "histogram":
            found |= {f"{name}_bucket": labels | {"le"}, f"{name}_sum": labels, f"{name}_count": labels}
        else:
            found[name] = labels
    return found


def commands() -> Iterator[tuple[str, str]]:
    """Each line on a board that is to be copied into a shell and calls `controlplane`."""
    for place, panel in every_panel():
        text = (
            str(panel["options"].get("content", "")) + "\n" + "\n".join(t.get("rawSql", "") for t in panel["targets"])
        )
        for line in re.findall(r"(?:^|'|`)(controlplane [a-z][^\n`]*)", text, re.MULTILINE):
            yield place, line


NAMES = {
    "model": "m",
    "replica_set": "s",
    "replica": "cp-s-1",
    "node": "n1",
    "slurm_job_id": "7",
    "gpu": "0",
    "UUID": "GPU-1",
    "tenant": "t",
}
"""What variables of the boards are, and labels of `exposed`."""
_SEVERAL = {"le": ("0.1", "1", "10", "+Inf"), "code": ("200", "404", "429", "503"), "job": ("vllm",)}


def without_variables(expression: str) -> str:
    """The expression as Prometheus would get it."""
    plain = re.sub(r"\$__(rate_interval|range|interval)", "5m", expression)
    return re.sub(r"\$\{?(\w+)(:\w+)?\}?", lambda found: NAMES.get(found[1], "x"), plain)


def exposed() -> dict[str, str]:
    """Every metric in promtool's notation, with each value of its labels that some query selects by; all grow."""
    wanted: dict[tuple[str, str], set[str]] = {}
    for one in promql():
        for name, matchers in re.findall(r"([a-zA-Z_:][\w:]*)\{([^}]*)\}", without_variables(one.text)):
            for label, value in re.findall(r'(\w+)=~?"([\w|]+)"', matchers):
                wanted.setdefault((name, label), set()).update(filter(None, value.split("|")))
    found = {}
    for name, labels in known_metrics().items():
        choices = []
        for label in sorted(labels):
            values = wanted.get((name, label), set()) | set(_SEVERAL.get(label, (NAMES.get(label, "x"),)))
            choices.append([(label, value) for value in sorted(values)])
        for chosen in itertools.product(*choices):
            text = ",".join(f'{label}="{value}"' for label, value in chosen)
            slope = 1 + _SEVERAL["le"].index(dict(chosen).get("le", "0.1"))
            found[f"{name}{{{text}}}"] = f"{slope}+{slope}x60"
    return found
