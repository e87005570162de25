"""The proxy in several processes: one supervisor, and workers that share a port.

Reading order: `supervisor` (starts workers, replaces those that end, adds up what they measure), `link` (a worker's end
of the wire), `channel` (what the two say to each other). `python -m controlplane.workers` is a worker; nobody but the
supervisor starts one.
"""

from controlplane.workers.link import Link
from controlplane.workers.supervisor import Supervisor

__all__ = ["Link", "Supervisor"]
