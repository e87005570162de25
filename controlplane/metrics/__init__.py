"""Every Prometheus metric this project exposes, by name. Two classes, because two ports expose them.

`control_plane` measures with prometheus-client's own objects. `proxy` counts in plain numbers, because it counts
thousands of times a second; `numbers` says how those are added up over several processes and made into text.
"""

from controlplane.metrics.control_plane import ControlPlaneMetrics
from controlplane.metrics.numbers import Numbers, decoded, encoded, lasting, total
from controlplane.metrics.proxy import ProxyMetrics, exposition

__all__ = [
    "ControlPlaneMetrics",
    "Numbers",
    "ProxyMetrics",
    "decoded",
    "encoded",
    "exposition",
    "lasting",
    "total",
]
