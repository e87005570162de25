"""The parts of the chart's `values.schema.json` that the code already says: settings, and replica sets.

`python -m tests.unit.values_schema` writes them anew; the rest of the file is written by hand. JSON Schema's draft 7,
because releases of Helm 3 know no later one. What is secret is left out: values end in ConfigMaps.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from controlplane.settings import Settings, Variable, variables
from controlplane.settings.sections import Section
from controlplane.specs import json_schema

FILE = Path(__file__).parents[2] / "helm" / "controlplane" / "values.schema.json"

OWNED = frozenset(  # the chart's own: ports that objects name, and files that it mounts
    {
        "CONTROLPLANE_WEB__PORT",
        "CONTROLPLANE_PROXY__PORT",
        "CONTROLPLANE_SLURM__TOKEN_FILE",
        "CONTROLPLANE_SLURM__JWT_KEY_FILE",
    }
)
_KEPT = frozenset(
    {"default", "description", "enum", "exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum", "pattern", "type"}
)
_WORDS: dict[str, dict[str, Any]] = {  # what is read from text by a program of its own has another type inside
    "CONTROLPLANE_SLURM__PORT_RANGE": {"pattern": "^[0-9]+-[0-9]+$", "default": "20000-29999"},
    "CONTROLPLANE_SLURM__TOKEN_COMMAND": {"minLength": 1},
}


def settable() -> dict[str, Variable]:
    """The settings that may stand in a ConfigMap."""
    return {
        name: variable
        for name, variable in variables().items()
        if name.startswith("CONTROLPLANE_") and not variable.is_secret and name not in OWNED
    }


def renewed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with what the code says today."""
    by_hand = {name: one for name, one in schema["definitions"].items() if not name.endswith("Document")}
    settings = {**schema["properties"]["settings"], "properties": _settings()}
    return {
        **schema,
        "properties": {**schema["properties"], "settings": settings},
        "definitions": {**by_hand, **_replica_sets()},
    }


def text_of(schema: dict[str, Any]) -> str:
    return json.dumps(schema, indent=2) + "\n"


def _settings() -> dict[str, Any]:
    return {name: _setting(name, variable) for name, variable in settable().items()}


def _setting(name: str, variable: Variable) -> dict[str, Any]:
    section, _, field = name.removeprefix("CONTROLPLANE_").lower().partition("__")
    room = Settings.model_fields[section].annotation
    assert isinstance(room, type)
    assert issubclass(room, Section)
    described = room.model_json_schema()["properties"][field]
    if name in _WORDS:
        return {"description": described["description"], "type": "string"} | _WORDS[name]
    either = described.get("anyOf", [{}])
    kept = {key: value for key, value in {**either[0], **described}.items() if key in _KEPT}
    if kept.get("default", 0) is None:
        del kept["default"]
    assert "type" in kept, f"{name}: no type is known; give it one in _WORDS"
    return kept


def _replica_sets() -> dict[str, Any]:
    published = json.dumps(json_schema()).replace("#/$defs/", "#/definitions/")
    documents: dict[str, Any] = json.loads(published)["$defs"]
    del documents["EndpointDocument"]["properties"]["api_key"]
    environment = documents["VllmDocument"]["properties"]["environment"]
    environment["patternProperties"]["(TOKEN|SECRET|PASSWORD|KEY)$"] = False
    return documents


if __name__ == "__main__":
    FILE.write_text(text_of(renewed(json.loads(FILE.read_text()))))
