"""A real Prometheus and a real Alertmanager on 127.0.0.1, quick enough to watch: seconds where a site has minutes.

Prometheus finds the replicas over the control plane's service discovery, scrapes vLLM's metrics, and GPU metrics (job
`dcgm`) of exporters or at the same targets, and evaluates rule files; Alertmanager posts alerts
to the webhook. Both are started anew, without old data. Configurations are made here and nowhere else.

Failure behaviour: see `children`; a query that Prometheus refuses or cannot be asked raises `QueryFailed`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from controlplane.demo.children import Server, free_ports, is_listening, program

DCGM_RELABELLING: Sequence[Mapping[str, Any]] = (
    # dcgm-exporter is about to rename the label; rules and dashboards know neither name
    {"source_labels": ["Hostname"], "regex": "(.+)", "target_label": "hostname"},
    {"regex": "Hostname", "action": "labeldrop"},
    {"source_labels": ["hostname"], "regex": r"([^.]+)(\..*)?", "replacement": "$1", "target_label": "node"},
    {"source_labels": ["hpc_job"], "regex": "(.+)", "target_label": "slurm_job_id"},
    {"regex": "hpc_job", "action": "labeldrop"},
)
"""As in prometheus/prometheus.yaml, for sites."""

_READY_SECONDS = 30.0


class QueryFailed(RuntimeError):
    """Prometheus refused a query, or did not answer."""


@dataclass(frozen=True, slots=True)
class PrometheusOptions:
    """What Prometheus scrapes and evaluates. `static_targets` maps a job to its `host:port`s."""

    sd_url: str | None = None
    sd_refresh_seconds: int = 1
    dcgm_targets: Sequence[str] = ()  # `host:port`s of GPU exporters
    static_targets: Mapping[str, Sequence[str]] = field(default_factory=dict)
    scrape_interval_seconds: int = 1
    evaluation_interval_seconds: int = 1
    rule_files: Sequence[Path] = ()
    alertmanager: str | None = None  # host:port


@dataclass(frozen=True, slots=True)
class AlertmanagerOptions:
    """Where alerts go, and how soon. A firing group is posted again every `repeat_interval_seconds`."""

    webhook_url: str
    bearer_token: str | None = field(default=None, repr=False)
    group_by: Sequence[str] = ("alertname", "model")
    group_wait_seconds: int = 0
    group_interval_seconds: int = 2
    repeat_interval_seconds: int = 6


@dataclass(frozen=True, slots=True)
class Sample:
    """One series of a query's answer."""

    labels: Mapping[str, str]
    value: float


class Prometheus(Server):
    """A Prometheus with an empty store."""

    def __init__(self, directory: Path, options: PrometheusOptions) -> None:
        super().__init__(directory)
        self._options = options
        self._port = 0

    @property
    def url(self) -> str:
        """Its API and its pages."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def scrape_interval_seconds(self) -> int:
        """How often it scrapes."""
        return self._options.scrape_interval_seconds

    def query(self, expression: str, *, timeout_seconds: float = 10) -> list[Sample]:
        """The instant vector (or scalar) of a PromQL expression, now. Raises `QueryFailed`."""
        try:
            response = httpx.get(
                f"{self.url}/api/v1/query",
                params={"query": expression},
                timeout=timeout_seconds,
                trust_env=False,
            )
            answer = response.json()
        except (httpx.HTTPError, ValueError) as error:
            raise QueryFailed(f"Prometheus does not answer: {type(error).__name__}") from None
        if answer.get("status") != "success":
            raise QueryFailed(f"Prometheus refuses {expression!r}: {str(answer.get('error'))[:256]}")
        data = answer["data"]
        if data["resultType"] == "scalar":
            return [Sample({}, float(data["result"][1]))]
        return [Sample(series["metric"], float(series["value"][1])) for series in data["result"]]

    def _bring_up(self) -> None:
        [self._port] = free_ports(1)
        config = _write_config(self.directory / "prometheus.yml", _prometheus_config(self._options))
        store = self.directory / "store"
        shutil.rmtree(store, ignore_errors=True)
        resend_seconds = max(5, self._options.evaluation_interval_seconds)
        arguments = [
            f"--config.file={config}",
            f"--storage.tsdb.path={store}",
            f"--web.listen-address=127.0.0.1:{self._port}",
            f"--web.external-url={self.url}",
            # an alert that Alertmanager missed comes again so soon; unrefreshed for four times that long, it resolves
            f"--rules.alert.resend-delay={resend_seconds}s",
            "--log.level=warn",
        ]
        self.children.start("prometheus", [program("prometheus"), *arguments])
        _wait_ready(self, "prometheus", self._port)


class Alertmanager(Server):
    """An Alertmanager that posts every alert to one webhook. It talks to no other Alertmanager."""

    def __init__(self, directory: Path, options: AlertmanagerOptions) -> None:
        super().__init__(directory)
        self._options = options
        self._port = 0

    @property
    def address(self) -> str:
        """Its `host:port`, for `PrometheusOptions.alertmanager`."""
        return f"127.0.0.1:{self._port}"

    @property
    def url(self) -> str:
        """Its API and its pages."""
        return f"http://{self.address}"

    def restart(self) -> None:
        """Start it again, ending it before if it still runs; it knows no alerts then. Returns when it is ready."""
        self.children.restart("alertmanager")
        _wait_ready(self, "alertmanager", self._port)

    def _bring_up(self) -> None:
        [self._port] = free_ports(1)
        config = _write_config(self.directory / "alertmanager.yml", _alertmanager_config(self._options))
        store = self.directory / "store"
        shutil.rmtree(store, ignore_errors=True)
        arguments = [
            f"--config.file={config}",
            f"--storage.path={store}",
            f"--web.listen-address={self.address}",
            f"--web.external-url={self.url}",
            "--cluster.listen-address=",
            "--log.level=warn",
        ]
        # Debian's package has a name of its own for it
        self.children.start("alertmanager", [program("prometheus-alertmanager"), *arguments])
        _wait_ready(self, "alertmanager", self._port)


def _wait_ready(server: Prometheus | Alertmanager, name: str, port: int) -> None:
    def is_ready() -> bool:
        if not is_listening(port):
            return False
        try:
            return httpx.get(f"{server.url}/-/ready", timeout=2, trust_env=False).is_success
        except httpx.HTTPError:
            return False

    server.children.wait_until(is_ready, f"{name} is ready", needs=[name], timeout_seconds=_READY_SECONDS)


def _write_config(path: Path, config: Mapping[str, Any]) -> Path:
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def _prometheus_config(options: PrometheusOptions) -> dict[str, Any]:
    jobs: list[dict[str, Any]] = [
        {"job_name": job, "static_configs": [{"targets": list(targets)}]}
        for job, targets in options.static_targets.items()
    ]
    if options.sd_url is not None:
        discovery = {"url": options.sd_url, "refresh_interval": f"{options.sd_refresh_seconds}s"}
        jobs.append({"job_name": "vllm", "http_sd_configs": [discovery]})
    if options.dcgm_targets:
        exporters = [{"targets": list(options.dcgm_targets)}]
        jobs.append({"job_name": "dcgm", "static_configs": exporters, "metric_relabel_configs": list(DCGM_RELABELLING)})
    config: dict[str, Any] = {
        "global": {
            "scrape_interval": f"{options.scrape_interval_seconds}s",
            "scrape_timeout": f"{min(options.scrape_interval_seconds, 10) * 900}ms",
            "evaluation_interval": f"{options.evaluation_interval_seconds}s",
        },
        "rule_files": [str(path.resolve()) for path in options.rule_files],
        "scrape_configs": jobs,
    }
    if options.alertmanager is not None:
        config["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": [options.alertmanager]}]}]}
    return config


def _alertmanager_config(options: AlertmanagerOptions) -> dict[str, Any]:
    webhook: dict[str, Any] = {"url": options.webhook_url, "send_resolved": True}
    if options.bearer_token is not None:
        webhook["http_config"] = {"authorization": {"type": "Bearer", "credentials": options.bearer_token}}
    return {
        "route": {
            "receiver": "controlplane",
            "group_by": list(options.group_by),
            "group_wait": f"{options.group_wait_seconds}s",
            "group_interval": f"{options.group_interval_seconds}s",
            "repeat_interval": f"{options.repeat_interval_seconds}s",
        },
        "receivers": [{"name": "controlplane", "webhook_configs": [webhook]}],
    }
