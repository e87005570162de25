"""What a spec says about the jobs that are already running."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

from controlplane.core.types import ReplicaSetSpec

_NEEDS_A_NEW_JOB = ("model", "template", "slurm", "vllm", "probe")


def spec_hash(spec: ReplicaSetSpec) -> str:
    """Equal for two specs exactly when a job of the one serves as well for the other. 16 hex digits."""
    whole = asdict(spec)
    parts = {name: whole[name] for name in _NEEDS_A_NEW_JOB}
    if parts["slurm"] is not None:
        del parts["slurm"]["min_time_limit_seconds"]  # says when to submit, not what
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
