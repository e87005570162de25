"""Queries of the dashboards that have nothing to show of the demo, and why. Everything else must return something.

A name is `board / panel / reference`, or `board / panel` for all of a panel's; variables are `variable x`, annotations
`annotation x`. A name that no board has is a fault. So is one of `NEVER` that returns data: then it is to be struck.
"""

from __future__ import annotations

from collections.abc import Mapping

_FINE = "nothing goes wrong in the demo"
_HEALTHY = "no GPU and no node fails in the demo"

NEVER: Mapping[str, str] = {
    "controlplane-control-plane / Sets that back off, and why": _FINE,
    "controlplane-control-plane / Starts that failed": _FINE,
    "controlplane-fleet / Starts that failed": _FINE,
    "controlplane-gpu-nodes / Nodes kept out of new jobs": _HEALTHY,
    "controlplane-gpu-nodes / Remapped rows and ECC errors / A": _HEALTHY,
    "controlplane-gpu-nodes / Remapped rows and ECC errors / C": _HEALTHY,
    "controlplane-gpu-nodes / What happened to nodes": _HEALTHY,
    "controlplane-gpu-nodes / XIDs by GPU": _HEALTHY,
    "controlplane-model / What went wrong / A": _FINE,  # broken streams: the demo fails if there are any
    "controlplane-tenants / Limits hit, by kind": "the demo's one tenant stays within its limits",
    "controlplane-tenants / Refused by limits": "the demo's one tenant stays within its limits",
}
"""What does not happen in the demo."""

_NOW_AND_THEN = "nothing has to go wrong, but on a busy machine it may"

SOMETIMES: Mapping[str, str] = {
    "controlplane-control-plane / Oldest waiting job": "jobs wait for seconds, while their start is held",
    "controlplane-control-plane / Rounds that failed": _NOW_AND_THEN,
    "controlplane-control-plane / slurmrestd: calls that failed": _NOW_AND_THEN,
    "controlplane-fleet / Alerts that fire": "the story ends when its last alert is about to be resolved",
    "controlplane-fleet / Errors by code": _NOW_AND_THEN,
    "controlplane-model / What went wrong / B": "clients of the demo leave when they have their answer",
    "controlplane-model / What went wrong / C": _NOW_AND_THEN,
    "controlplane-tenants / Not answered well, by tenant and status": _NOW_AND_THEN,
}
"""What is over, or has not begun, whenever the queries happen to be run."""
