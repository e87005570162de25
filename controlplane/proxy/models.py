"""`/v1/models`, answered from memory: OpenAI's objects, and what a client may want to know before it waits.

`state` and `start_estimate_seconds` are ours: OpenAI's clients pass over what they do not know.
"""

from __future__ import annotations

import json
from datetime import datetime

from controlplane.core.types import ApiKey, ServedModel
from controlplane.proxy.auth import may_use
from controlplane.proxy.directory import ModelState, Snapshot, seconds_to_ready
from controlplane.proxy.errors import model_not_found


def model_list(snapshot: Snapshot, key: ApiKey, now: datetime) -> bytes:
    """The body of the list: all that the key may use, those that are scaled to zero included."""
    shown = [_shown(one, snapshot, now) for one in snapshot.models.values() if may_use(key, one.model)]
    return _json({"object": "list", "data": shown})


def one_model(name: str, snapshot: Snapshot, key: ApiKey, now: datetime) -> bytes:
    """The body of one. Raises ApiError if it is unknown, or not allowed for the key."""
    model = snapshot.models.get(name)
    if model is None or not may_use(key, name):
        raise model_not_found(name)
    return _json(_shown(model, snapshot, now))


def _shown(model: ServedModel, snapshot: Snapshot, now: datetime) -> dict[str, object]:
    state = snapshot.state_of(model)
    shown: dict[str, object] = {
        "id": model.model,
        "object": "model",
        "created": int(model.created_at.timestamp()),
        "owned_by": "controlplane",
        "state": state.value,
    }
    if state in (ModelState.STARTING, ModelState.SCALED_TO_ZERO):
        estimate = seconds_to_ready(model, now)
        if estimate is not None:
            shown["start_estimate_seconds"] = round(estimate)
    return shown


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
