"""promtool's unit tests of the shipped rules: series go in, and what is recorded and what fires comes out.

All rules are loaded together, as at a site: those of prometheus/rules.yaml, and Grafana's as Prometheus' own.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from controlplane.demo.alert_rules import convert
from controlplane.demo.children import program

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "grafana" / "alerts"
RULES = ROOT / "prometheus" / "rules.yaml"

Series = Mapping[str, str]
"""promtool's notation of values by series: a sample every 10 s. `NaNx5` is understood too, as six of them."""

_REPEATED_NAN = re.compile(r"NaNx(\d+)")


@cache
def _alerts() -> str:
    return convert(ALERTS)


def _values(text: str) -> str:
    return _REPEATED_NAN.sub(lambda match: " ".join(["NaN"] * (int(match[1]) + 1)), text)


def check_queries(series: Series, queries: Sequence[Mapping[str, Any]], *, evaluated_each: str = "10s") -> None:
    """Compare queries, in the form of promtool's unit tests, after these series were fed to all rules."""
    test = {
        "interval": "10s",
        "input_series": [{"series": name, "values": _values(values)} for name, values in series.items()],
        "promql_expr_test": list(queries),
    }
    with TemporaryDirectory() as folder:
        alerts, tests = Path(folder) / "alerts.yml", Path(folder) / "tests.yml"
        alerts.write_text(_alerts())
        content = {"rule_files": [str(RULES), str(alerts)], "evaluation_interval": evaluated_each, "tests": [test]}
        tests.write_text(yaml.safe_dump(content))
        run = subprocess.run([program("promtool"), "test", "rules", tests], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def check_firing(
    series: Series, expected: Mapping[str, Sequence[str]], *, evaluated_each: str = "10s", among: Sequence[str] = ()
) -> None:
    """Check which alerts, and no others, fire at which times after the series began; `among`: of these titles only."""
    selected = f', alertname=~"{"|".join(among)}"' if among else ""
    queries = [
        {
            "expr": f'group by (alertname) (ALERTS{{alertstate="firing"{selected}}})',
            "eval_time": time,
            "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in names],
        }
        for time, names in expected.items()
    ]
    check_queries(series, queries, evaluated_each=evaluated_each)


def selector(metric: str, labels: Mapping[str, str]) -> str:
    return metric + "{" + ", ".join(f'{name}="{value}"' for name, value in labels.items()) + "}"


def target(metric: str, replica: int = 1, **more: str) -> str:
    """A series of the replica's engine; without more labels, as scraped from a replica that Slurm runs."""
    labels = {
        "job": "vllm",
        "instance": f"n{replica}:8000",
        "model": "m",
        "replica_set": "s",
        "replica": f"r{replica}",
        "node": f"n{replica}",
        "slurm_job_id": str(replica),
        **({} if metric == "up" else {"model_name": "served", "engine": "0"}),
        **more,
    }
    return selector(metric, labels)


def engine(replica: int = 1, *, up: str = "1x200", running: str = "20x200", waiting: str = "0x200") -> dict[str, str]:
    return {
        target("up", replica): up,
        target("vllm:num_requests_running", replica): running,
        target("vllm:num_requests_waiting", replica): waiting,
    }


def control_plane(metric: str, instance: str = "cp1:9100", **labels: str) -> str:
    """A series of a control plane."""
    return selector(metric, {"job": "controlplane", "instance": instance, **labels})
