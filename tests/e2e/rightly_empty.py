"""Queries of the dashboards that have nothing to show of the demo, and why. Everything else must return something.

A name is `board / panel / reference`, or `board / panel` for all of a panel's; variables are `variable x`, annotations
`annotation x`. A name that no board has is a fault. So is one of `NEVER` that returns data: then it is to be struck.
"""

from __future__ import annotations

from collections.abc import Mapping

NEVER: Mapping[str, str] = {}
"""What does not happen in the demo."""

SOMETIMES: Mapping[str, str] = {}
"""What is over, or has not begun, whenever the queries happen to be run."""
