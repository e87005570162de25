"""A real Prometheus scrapes what vLLM 0.6.6 to 0.33 and dcgm-exporter expose, and records one name for all of it."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from controlplane.demo.alert_rules import Pace, quickened
from controlplane.demo.prometheus import PrometheusOptions
from tests.conftest import eventually_sync
from tests.e2e.conftest import PrometheusFactory

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
VERSIONS = {path.stem: path.read_text() for path in (FIXTURES / "vllm" / "by-version").glob("*.txt")}
DCGM = [path.read_text() for path in sorted((FIXTURES / "dcgm").glob("*.txt"))]
_COUNTER = re.compile(r"^(vllm:\w+_(?:total|bucket|count|sum)\{.*\}) (\S+)$", re.MULTILINE)


class Exporters(ThreadingHTTPServer):
    """One target for each release, whose counters rise with every scrape; a node's GPUs are told at /metrics."""

    scrapes = 0

    def answer(self, path: str) -> tuple[str, str]:
        if path == "/sd":
            return "application/json", json.dumps([self._group(version) for version in VERSIONS])
        if path == "/metrics":
            self.scrapes += 1
            return "text/plain", DCGM[self.scrapes % 2]  # one release and the next, as when a node is renewed
        self.scrapes += path.startswith("/vllm/")
        times = self.scrapes
        text = VERSIONS.get(path.removeprefix("/vllm/"), "")
        return "text/plain", _COUNTER.sub(lambda match: f"{match[1]} {float(match[2]) * times}", text)

    def _group(self, version: str) -> dict[str, object]:
        labels = {"model": f"m-{version}", "replica_set": "s", "replica": version, "node": "n1", "slurm_job_id": "4711"}
        return {
            "targets": [f"127.0.0.1:{self.server_port}"],
            "labels": {**labels, "__metrics_path__": f"/vllm/{version}"},
        }


@pytest.fixture
def exporters() -> Iterator[Exporters]:
    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert isinstance(self.server, Exporters)
            kind, text = self.server.answer(self.path)
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            """Say nothing."""

    with Exporters(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_a_real_prometheus_records_all_releases_alike(
    exporters: Exporters, prometheus_factory: PrometheusFactory, tmp_path: Path
) -> None:
    rules = tmp_path / "rules.yml"
    rules.write_text(quickened(ROOT / "prometheus" / "rules.yaml", Pace(scale=0.1)))
    sd_url = f"http://127.0.0.1:{exporters.server_port}/sd"
    prometheus = prometheus_factory(PrometheusOptions(sd_url=sd_url, rule_files=[rules]))

    def is_recorded(expression: str) -> bool:
        found = {sample.labels.get("model", ""): sample.value for sample in prometheus.query(expression)}
        return found.keys() == {f"m-{version}" for version in VERSIONS}

    for expression in (
        "replica:requests_running == 3",
        "replica:requests_waiting == 2",
        "replica:kv_cache_usage:ratio == 0.5",
        "model:replicas_ready:count == 1",
        "replica:generation_tokens:rate1m > 0",
        "abs(replica:prefix_cache_hits:ratio5m - 0.25) < 1e-6",
        "abs(model:ttft_objective_missed:ratio5m - 0.2) < 1e-6",
        "abs(histogram_quantile(0.9, replica:inter_token_latency_seconds_bucket:rate5m) - 0.0496) < 0.01",
    ):
        eventually_sync(partial(is_recorded, expression), timeout_seconds=40)


@pytest.mark.slow
def test_a_real_prometheus_gives_gpus_the_labels_of_their_node_and_job(
    exporters: Exporters, prometheus_factory: PrometheusFactory, tmp_path: Path
) -> None:
    rules = tmp_path / "rules.yml"
    rules.write_text(quickened(ROOT / "prometheus" / "rules.yaml", Pace(scale=0.1)))
    target = f"127.0.0.1:{exporters.server_port}"
    prometheus = prometheus_factory(PrometheusOptions(dcgm_targets=[target], rule_files=[rules]))
    [power] = eventually_sync(lambda: prometheus.query("node:gpu_power_watts:sum"), timeout_seconds=40)
    assert (power.labels["node"], power.value) == ("n1", 670.75)
    jobs = eventually_sync(lambda: prometheus.query("sum by (slurm_job_id) (gpu:idle)"), timeout_seconds=40)
    assert {sample.labels["slurm_job_id"] for sample in jobs} == {"4711", "4712"}
    assert not prometheus.query('{hpc_job!=""}') + prometheus.query('{Hostname!=""}')
