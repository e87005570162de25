"""What dcgm-exporter would say about this job's GPUs: its names, labels and units, with values that follow the load.

Memory is full from the start, because vLLM takes its share when it loads. Energy is integrated between scrapes, so it
is as exact as the scrapes are frequent. Exported on a route of its own, since no exporter runs on a demo node.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

_MODEL_NAME = "NVIDIA H100 80GB HBM3"
_DRIVER_VERSION = "570.86.15"
_MEMORY_MIB = 81559
_MEMORY_SHARE = 0.92  # vLLM's default of --gpu-memory-utilization
_IDLE_WATTS, _BUSY_WATTS = 70.0, 700.0
_IDLE_CELSIUS, _BUSY_CELSIUS = 32.0, 78.0
_LEAST_BUSY_SHARE = 0.5  # a GPU that decodes one sequence is already half busy


@dataclass(frozen=True, slots=True)
class GpuOptions:
    """The GPUs of this job on one node; `job_id` is "" outside Slurm."""

    node: str
    indices: tuple[int, ...]
    job_id: str = ""


def visible_gpus(cuda_visible_devices: str | None, count: int) -> tuple[int, ...]:
    """The GPU indices in CUDA_VISIBLE_DEVICES, else 0 to `count` - 1 when it is unset or names no indices."""
    names = [name.strip() for name in (cuda_visible_devices or "").split(",")]
    if all(name.isdecimal() for name in names):
        return tuple(int(name) for name in names)
    return tuple(range(count))


class GpuMeter:
    """Reads the GPUs; `render` gives the text that Prometheus scrapes."""

    def __init__(self, options: GpuOptions, now: float) -> None:
        self._labels = [_labels(options, index) for index in options.indices]
        self._energy_millijoules = 0.0
        self._read_at = now
        self._watts = _IDLE_WATTS

    def render(self, slots_in_use: float, now: float) -> str:
        """The exposition at `now` (seconds), for a share of slots in use from 0 to 1."""
        busy = _LEAST_BUSY_SHARE + (1 - _LEAST_BUSY_SHARE) * slots_in_use if slots_in_use > 0 else 0.0
        watts = _IDLE_WATTS + (_BUSY_WATTS - _IDLE_WATTS) * busy
        self._energy_millijoules += (now - self._read_at) * (watts + self._watts) / 2 * 1000
        self._read_at, self._watts = now, watts
        celsius = _IDLE_CELSIUS + (_BUSY_CELSIUS - _IDLE_CELSIUS) * busy
        used_mib = int(_MEMORY_MIB * _MEMORY_SHARE)
        return "".join(
            (
                _family("GPU_UTIL", "gauge", "GPU utilization (in %).", self._labels, round(busy * 100)),
                _family("FB_USED", "gauge", "Framebuffer memory used (in MiB).", self._labels, used_mib),
                _family("FB_FREE", "gauge", "Framebuffer memory free (in MiB).", self._labels, _MEMORY_MIB - used_mib),
                _family("POWER_USAGE", "gauge", "Power draw (in W).", self._labels, round(watts, 3)),
                _family("GPU_TEMP", "gauge", "GPU temperature (in C).", self._labels, round(celsius)),
                _family("XID_ERRORS", "gauge", "Value of the last XID error encountered.", self._labels, 0),
                _family(
                    "TOTAL_ENERGY_CONSUMPTION",
                    "counter",
                    "Total energy consumption since boot (in mJ).",
                    self._labels,
                    round(self._energy_millijoules),
                ),
            )
        )


def _labels(options: GpuOptions, index: int) -> str:
    pairs = {
        "gpu": str(index),
        "UUID": f"GPU-{uuid.uuid5(uuid.NAMESPACE_DNS, f'gpu{index}.{options.node}')}",
        "pci_bus_id": f"00000000:{index + 1:02X}:00.0",
        "device": f"nvidia{index}",
        "modelName": _MODEL_NAME,
        "Hostname": options.node,
        "DCGM_FI_DRIVER_VERSION": _DRIVER_VERSION,
        "hpc_job": options.job_id,
    }
    return ",".join(f'{name}="{value}"' for name, value in pairs.items())


def _family(name: str, kind: str, documentation: str, labels: Sequence[str], value: float) -> str:
    full_name = f"DCGM_FI_DEV_{name}"
    lines = [f"# HELP {full_name} {documentation}", f"# TYPE {full_name} {kind}"]
    lines.extend(f"{full_name}{{{pairs}}} {value}" for pairs in labels)
    return "\n".join(lines) + "\n"
