"""The pretended GPUs of one node, and what dcgm-exporter would say of them.

A GPU with a job has its memory taken, as vLLM takes its share when it starts; power, clocks and temperature follow how
busy it is. Energy is integrated between two readings, so it is as exact as they are frequent. An XID stays the last one
until the process ends, as DCGM's does, and is counted by `DCGM_EXP_XID_ERRORS_COUNT` for five minutes.
"""

from __future__ import annotations

import math
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

MODEL_NAME = "NVIDIA H100 80GB HBM3"
DRIVER_VERSION = "570.86.15"
XID_WINDOW_SECONDS = 300.0
"""dcgm-exporter's default."""

_MEMORY_MIB = 81559
_RESERVED_MIB = 584
_MEMORY_SHARE = 0.92  # vLLM's default of --gpu-memory-utilization
_IDLE_WATTS, _BUSY_WATTS = 70.0, 690.0
_IDLE_CELSIUS, _BUSY_CELSIUS = 32.0, 76.0
_MEMORY_IS_WARMER_CELSIUS = 9.0
_THERMAL_SECONDS = 30.0  # how fast a temperature follows
_IDLE_SM_MHZ, _BUSY_SM_MHZ, _MEMORY_MHZ = 345, 1980, 2619
_THROTTLES_ABOVE_WATTS, _THROTTLED_SHARE = 660.0, 0.02

_WORN_INDEX = 5  # it has had errors that were corrected, as some GPU of any fleet has

_DOUBLE_BIT_ERROR, _ROW_REMAPPED, _ROW_REMAP_FAILED = 48, 63, 64
_XID_WORDS = {
    13: "Graphics Engine Exception",
    31: "GPU memory page fault",
    43: "GPU stopped processing",
    45: "Preemptive cleanup, due to previous errors",
    48: "Double Bit ECC Error",
    63: "ECC page retirement or row remapping recording event",
    64: "ECC page retirement or row remapper recording failure",
    74: "NVLINK Error",
    79: "GPU has fallen off the bus",
    94: "Contained ECC error",
    95: "Uncontained ECC error",
}


@dataclass(slots=True)
class Gpu:
    """One GPU. `busy` is from 0 to 1; times are seconds of a clock that only goes forward."""

    index: int
    read_at: float
    busy: float = 0.0
    is_held: bool = False
    celsius: float = _IDLE_CELSIUS
    millijoules: float = 0.0
    throttled_nanoseconds: float = 0.0
    xids: list[tuple[float, int]] = field(default_factory=list)

    @property
    def watts(self) -> float:
        """The power draw."""
        return _IDLE_WATTS + (_BUSY_WATTS - _IDLE_WATTS) * self.busy

    @property
    def used_mib(self) -> int:
        """The memory that its job has taken."""
        return round(_MEMORY_MIB * _MEMORY_SHARE) if self.is_held else 0

    def advance(self, busy: float, *, is_held: bool, now: float) -> None:
        """It was as it was until `now`, and is so from now on."""
        seconds, watts = now - self.read_at, self.watts
        self.busy, self.is_held, self.read_at = busy, is_held, now
        self.millijoules += seconds * (watts + self.watts) / 2 * 1000
        if watts > _THROTTLES_ABOVE_WATTS:
            self.throttled_nanoseconds += seconds * 1e9 * _THROTTLED_SHARE
        target = _IDLE_CELSIUS + (_BUSY_CELSIUS - _IDLE_CELSIUS) * busy
        self.celsius += (target - self.celsius) * (1 - math.exp(-seconds / _THERMAL_SECONDS))

    def fail(self, xid: int, now: float) -> None:
        """The driver reports an XID."""
        self.xids.append((now, xid))

    def had(self, xid: int) -> int:
        """How often it had this XID."""
        return sum(1 for _, one in self.xids if one == xid)


_Read = Callable[[Gpu], float]
# name without its prefix, type, help, value: in the order and the words of dcgm-exporter's default-counters.csv
_FIELDS: Sequence[tuple[str, str, str, _Read]] = (
    (
        "SM_CLOCK",
        "gauge",
        "SM clock frequency (in MHz).",
        lambda gpu: round(_IDLE_SM_MHZ + (_BUSY_SM_MHZ - _IDLE_SM_MHZ) * min(1.0, 2 * gpu.busy)),
    ),
    ("MEM_CLOCK", "gauge", "Memory clock frequency (in MHz).", lambda _: _MEMORY_MHZ),
    (
        "MEMORY_TEMP",
        "gauge",
        "Memory temperature (in C).",
        lambda gpu: round(gpu.celsius + _MEMORY_IS_WARMER_CELSIUS),
    ),
    ("GPU_TEMP", "gauge", "GPU temperature (in C).", lambda gpu: round(gpu.celsius)),
    ("POWER_USAGE", "gauge", "Power draw (in W).", lambda gpu: round(gpu.watts, 3)),
    (
        "TOTAL_ENERGY_CONSUMPTION",
        "counter",
        "Total energy consumption since boot (in mJ).",
        lambda gpu: round(gpu.millijoules),
    ),
    ("PCIE_REPLAY_COUNTER", "counter", "Total number of PCIe retries.", lambda _: 0),
    ("GPU_UTIL", "gauge", "GPU utilization (in %).", lambda gpu: round(gpu.busy * 100)),
    ("MEM_COPY_UTIL", "gauge", "Memory utilization (in %).", lambda gpu: round(gpu.busy * 62)),
    ("ENC_UTIL", "gauge", "Encoder utilization (in %).", lambda _: 0),
    ("DEC_UTIL", "gauge", "Decoder utilization (in %).", lambda _: 0),
    (
        "POWER_VIOLATION",
        "counter",
        "Throttling duration due to power constraints (in ns).",
        lambda gpu: round(gpu.throttled_nanoseconds),
    ),
    ("THERMAL_VIOLATION", "counter", "Throttling duration due to thermal constraints (in ns).", lambda _: 0),
    (
        "FB_FREE",
        "gauge",
        "Framebuffer memory free (in MiB).",
        lambda gpu: _MEMORY_MIB - _RESERVED_MIB - gpu.used_mib,
    ),
    ("FB_USED", "gauge", "Framebuffer memory used (in MiB).", lambda gpu: gpu.used_mib),
    ("FB_RESERVED", "gauge", "Framebuffer memory reserved (in MiB).", lambda _: _RESERVED_MIB),
    (
        "ECC_SBE_VOL_TOTAL",
        "counter",
        "Total number of single-bit volatile ECC errors.",
        lambda gpu: 3 * int(gpu.index == _WORN_INDEX),
    ),
    (
        "ECC_DBE_VOL_TOTAL",
        "counter",
        "Total number of double-bit volatile ECC errors.",
        lambda gpu: gpu.had(_DOUBLE_BIT_ERROR),
    ),
    (
        "UNCORRECTABLE_REMAPPED_ROWS",
        "counter",
        "Number of remapped rows for uncorrectable errors",
        lambda gpu: gpu.had(_ROW_REMAPPED),
    ),
    (
        "CORRECTABLE_REMAPPED_ROWS",
        "counter",
        "Number of remapped rows for correctable errors",
        lambda gpu: int(gpu.index == _WORN_INDEX),
    ),
    (
        "ROW_REMAP_FAILURE",
        "gauge",
        "Whether remapping of rows has failed",
        lambda gpu: min(1, gpu.had(_ROW_REMAP_FAILED)),
    ),
)


class NodeGpus:
    """The GPUs of one node; `render` reads them and gives the text that Prometheus scrapes."""

    def __init__(self, node: str, count: int, now: float) -> None:
        self.node = node
        self.gpus = tuple(Gpu(index, now) for index in range(count))

    def render(self, jobs: Mapping[int, Sequence[str]], busy: Mapping[str, float], now: float) -> str:
        """The exposition at `now`: `jobs` are those of each index, `busy` says of a job how busy its GPUs are, 0 to 1.

        Two jobs on one GPU make two copies of each of its series, as with dcgm-exporter.
        """
        for gpu in self.gpus:
            held_by = jobs.get(gpu.index, ())
            gpu.advance(max((busy.get(job, 0.0) for job in held_by), default=0.0), is_held=bool(held_by), now=now)
        lines = []
        for name, kind, words, read in _FIELDS:
            lines += _head(f"DCGM_FI_DEV_{name}", kind, words)
            lines += [self._line(f"DCGM_FI_DEV_{name}", gpu, job, read(gpu)) for gpu, job in self._series(jobs)]
        lines += self._xids(jobs, now)
        return "\n".join(lines) + "\n"

    def _xids(self, jobs: Mapping[int, Sequence[str]], now: float) -> list[str]:
        lines = _head("DCGM_FI_DEV_XID_ERRORS", "gauge", "Value of the last XID error encountered.")
        for gpu, job in self._series(jobs):
            xid = gpu.xids[-1][1] if gpu.xids else 0
            error = {"err_code": str(xid), "err_msg": _XID_WORDS.get(xid, "No Error" if xid == 0 else "Unknown Error")}
            lines.append(self._line("DCGM_FI_DEV_XID_ERRORS", gpu, job, xid, error))
        name, window = "DCGM_EXP_XID_ERRORS_COUNT", {"window_size_in_ms": f"{XID_WINDOW_SECONDS * 1000:.0f}"}
        lines += _head(name, "gauge", "Count of XID Errors within user-specified time window.")
        for gpu, job in self._series(jobs):
            counts = Counter(xid for at, xid in gpu.xids if at > now - XID_WINDOW_SECONDS)
            lines += [self._line(name, gpu, job, count, window | {"xid": str(xid)}) for xid, count in counts.items()]
            if not counts:
                lines.append(self._line(name, gpu, job, 0, window))
        return lines

    def _series(self, jobs: Mapping[int, Sequence[str]]) -> list[tuple[Gpu, str | None]]:
        return [(gpu, job) for gpu in self.gpus for job in jobs.get(gpu.index) or (None,)]

    def _line(self, name: str, gpu: Gpu, job: str | None, value: float, more: Mapping[str, str] | None = None) -> str:
        labels = {
            "gpu": str(gpu.index),
            "UUID": f"GPU-{uuid.uuid5(uuid.NAMESPACE_DNS, f'gpu{gpu.index}.{self.node}')}",
            "pci_bus_id": f"00000000:{gpu.index + 1:02X}:00.0",
            "device": f"nvidia{gpu.index}",
            "modelName": MODEL_NAME,
            "Hostname": self.node,
            "DCGM_FI_DRIVER_VERSION": DRIVER_VERSION,
            **(more or {}),
        }
        if job is not None:
            labels["hpc_job"] = job
        pairs = ",".join(f'{key}="{text}"' for key, text in labels.items())
        return f"{name}{{{pairs}}} {value}"


def _head(name: str, kind: str, words: str) -> list[str]:
    return [f"# HELP {name} {words}", f"# TYPE {name} {kind}"]
