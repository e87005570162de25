"""A real Slurm cluster for the session, and real Prometheus and Alertmanager servers for single tests and modules."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from controlplane.demo.prometheus import Alertmanager, AlertmanagerOptions, Prometheus, PrometheusOptions
from controlplane.demo.slurm_cluster import SlurmCluster
from tests.e2e.slurm_matrix import release_under_test

# `make test-vllm` names a venv with vLLM; without one there is nothing to run these on, and `make test` has none
collect_ignore = [] if "VLLM_VENV" in os.environ else ["test_real_vllm.py", "test_real_vllm_nodes.py"]

PrometheusFactory = Callable[[PrometheusOptions], Prometheus]
AlertmanagerFactory = Callable[[AlertmanagerOptions], Alertmanager]


@pytest.fixture(scope="session")
def slurm(session_directory: Path) -> Iterator[SlurmCluster]:
    """A cluster of four nodes with eight GPUs each. Tests leave no job behind."""
    with SlurmCluster(session_directory / "slurm", root=release_under_test()) as cluster:
        yield cluster


_server_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def prometheus_factory(session_directory: Path) -> Iterator[PrometheusFactory]:
    """Starts Prometheus servers that end with the module."""
    with ExitStack() as servers:

        def start(options: PrometheusOptions) -> Prometheus:
            directory = session_directory / f"prometheus-{next(_server_numbers)}"
            return servers.enter_context(Prometheus(directory, options))

        yield start


@pytest.fixture(scope="module")
def alertmanager_factory(session_directory: Path) -> Iterator[AlertmanagerFactory]:
    """Starts Alertmanagers that end with the module."""
    with ExitStack() as servers:

        def start(options: AlertmanagerOptions) -> Alertmanager:
            directory = session_directory / f"alertmanager-{next(_server_numbers)}"
            return servers.enter_context(Alertmanager(directory, options))

        yield start
