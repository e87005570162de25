"""The GPU exporters of all nodes: one process that is none of them really, with a port for each node.

Failure behaviour: see `children`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from controlplane.demo.children import Server, free_ports, is_listening

_READY_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class GpuExporterOptions:
    """`jobs` is where job mapping files are; `replicas_url` lists the replicas, as for Prometheus."""

    nodes: Sequence[str]
    gpus_per_node: int
    jobs: Path
    replicas_url: str


class GpuExporters(Server):
    """Stand-ins for dcgm-exporter; see `fake_dcgm`."""

    def __init__(self, directory: Path, options: GpuExporterOptions) -> None:
        super().__init__(directory)
        self._options = options
        self._ports: dict[str, int] = {}

    @property
    def addresses(self) -> list[str]:
        """Every node's `host:port`, for `PrometheusOptions.dcgm_targets`."""
        return [f"127.0.0.1:{port}" for port in self._ports.values()]

    def url(self, node: str) -> str:
        """The root of a node's exporter; `POST /fault` there pretends an XID."""
        return f"http://127.0.0.1:{self._ports[node]}"

    def _bring_up(self) -> None:
        options = self._options
        self._ports = dict(zip(options.nodes, free_ports(len(options.nodes)), strict=True))
        command = [sys.executable, "-m", "controlplane.demo.fake_dcgm", "--gpus", str(options.gpus_per_node)]
        command += ["--jobs", str(options.jobs), "--replicas", options.replicas_url]
        command += [f"--node={node}={port}" for node, port in self._ports.items()]
        self.children.start("exporters", command)
        self.children.wait_until(
            lambda: all(is_listening(port) for port in self._ports.values()),
            "the GPU exporters listen",
            needs=["exporters"],
            timeout_seconds=_READY_SECONDS,
        )
