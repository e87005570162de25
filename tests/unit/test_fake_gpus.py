"""The pretended GPUs' exposition, read by the parser of Prometheus' own client."""

from __future__ import annotations

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from controlplane.demo.fake_dcgm.__main__ import busy_with
from controlplane.demo.fake_dcgm.gpus import NodeGpus

LABELS = {"gpu", "UUID", "pci_bus_id", "device", "modelName", "Hostname", "DCGM_FI_DRIVER_VERSION"}
DEFAULT_COUNTERS = (
    *("SM_CLOCK", "MEM_CLOCK", "MEMORY_TEMP", "GPU_TEMP", "POWER_USAGE", "TOTAL_ENERGY_CONSUMPTION"),
    *("PCIE_REPLAY_COUNTER", "GPU_UTIL", "MEM_COPY_UTIL", "ENC_UTIL", "DEC_UTIL", "XID_ERRORS", "FB_FREE", "FB_USED"),
    *("FB_RESERVED", "UNCORRECTABLE_REMAPPED_ROWS", "CORRECTABLE_REMAPPED_ROWS", "ROW_REMAP_FAILURE"),
)


def families(text: str) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def test_every_default_counter_is_exposed_for_every_gpu_with_the_exporters_labels() -> None:
    seen = families(NodeGpus("n1", 8, 0.0).render({}, {}, 1.0))
    for name in DEFAULT_COUNTERS:
        samples = seen[f"DCGM_FI_DEV_{name}"].samples
        assert len({sample.labels["UUID"] for sample in samples}) == 8, name
        assert all(sample.labels.keys() >= LABELS for sample in samples), name
        assert all("hpc_job" not in sample.labels for sample in samples), name
    assert seen["DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION"].type == "counter"
    assert {sample.labels["Hostname"] for sample in seen["DCGM_FI_DEV_GPU_UTIL"].samples} == {"n1"}


def test_a_job_takes_memory_at_once_and_power_when_it_is_busy() -> None:
    node = NodeGpus("n1", 2, 0.0)

    def read(name: str, busy: dict[str, float], now: float) -> list[float]:
        samples = families(node.render({1: ["7"]}, busy, now))[f"DCGM_FI_DEV_{name}"].samples
        return [sample.value for sample in samples]

    assert [mib > 0 for mib in read("FB_USED", {}, 0.0)] == [False, True]
    assert read("GPU_UTIL", {}, 0.0) == [0, 0]
    assert read("GPU_UTIL", {"7": 0.75, "8": 1.0}, 0.0) == [0, 75]
    idle, busy = read("TOTAL_ENERGY_CONSUMPTION", {"7": 0.75}, 10.0)
    assert idle == 700_000  # 70 W for 10 s, in mJ
    assert busy == pytest.approx(10_000 * (70 + 0.75 * 620))


def test_two_jobs_on_a_gpu_make_two_copies_of_its_series() -> None:
    samples = families(NodeGpus("n1", 1, 0.0).render({0: ["7", "8"]}, {}, 0.0))["DCGM_FI_DEV_GPU_UTIL"].samples
    assert [sample.labels["hpc_job"] for sample in samples] == ["7", "8"]


def test_an_xid_stays_the_last_one_and_is_counted_for_five_minutes() -> None:
    node = NodeGpus("n1", 1, 0.0)

    def counts(now: float) -> dict[str, float]:
        seen = families(node.render({}, {}, now))
        [last] = seen["DCGM_FI_DEV_XID_ERRORS"].samples
        samples = seen["DCGM_EXP_XID_ERRORS_COUNT"].samples
        assert {sample.labels["window_size_in_ms"] for sample in samples} == {"300000"}
        return {sample.labels.get("xid", ""): sample.value for sample in samples} | {"last": last.value}

    assert counts(0.0) == {"": 0, "last": 0}
    node.gpus[0].fail(79, 10.0)
    node.gpus[0].fail(79, 20.0)
    node.gpus[0].fail(48, 30.0)
    assert counts(31.0) == {"79": 2, "48": 1, "last": 48}
    assert counts(331.0) == {"": 0, "last": 48}
    [double_bit] = families(node.render({}, {}, 340.0))["DCGM_FI_DEV_ECC_DBE_VOL_TOTAL"].samples
    assert double_bit.value == 1


def test_more_requests_make_gpus_busier_and_never_more_than_fully() -> None:
    steps = [busy_with(running, 10) for running in (0, 1, 5, 10, 50)]
    assert steps == [0, 0.55, 0.75, 1, 1]
