"""The control plane's API as an OpenAPI 3.1 document, made from the routes themselves.

`python -m controlplane.web.openapi` prints it; `docs/openapi.json` is that, and a test compares the two. What a route
takes beyond its path stands in the tables here: a route that is in none of them takes what its kind takes.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

from prometheus_client import CollectorRegistry
from pydantic import TypeAdapter
from starlette.routing import Route

from controlplane.db import Database, DatabaseOptions, tenants, usage
from controlplane.metrics import ControlPlaneMetrics
from controlplane.specs.file_format import ReplicaSetDocument
from controlplane.web.app import WebOptions, create_app
from controlplane.web.operators import EmptyBody, LastingBody, LimitsBody, ReasonBody, ScaleBody

Document = dict[str, Any]

_API = "/api/v1/"
_WEBHOOKS = "/webhooks/"

_BODIES: dict[str, type] = {
    "replica-sets/{name}": ReplicaSetDocument,
    "replica-sets/{name}/scale": ScaleBody,
    "replica-sets/{name}/pause": LastingBody,
    "replica-sets/{name}/resume": EmptyBody,
    "replica-sets/{name}/freeze": LastingBody,
    "replica-sets/{name}/unfreeze": EmptyBody,
    "freeze": LastingBody,
    "unfreeze": EmptyBody,
    "replicas/{name}/drain": ReasonBody,
    "replicas/{name}/undrain": ReasonBody,
    "replicas/{name}/cancel": ReasonBody,
    "nodes/{name}/drain": LastingBody,
    "nodes/{name}/undrain": EmptyBody,
    "tenants/{name}/limits": LimitsBody,
}
"""What a verb reads from its body, by its path below `/api/v1/`."""

_LIMIT: Document = {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100}
_TIME: Document = {"type": "string", "format": "date-time"}
_NAME: Document = {"type": "string", "pattern": "^[a-z0-9-]{1,64}$"}
_BY: Document = {"enum": [one.value for one in usage.By], "default": usage.By.TENANT.value}
_MONTH: Document = {"type": "string", "pattern": "^20[0-9]{2}-(0[1-9]|1[0-2])$"}
_TENANT: Document = {"type": "string", "pattern": f"^{tenants.NAME}$"}
_QUERIES: dict[str, dict[str, Document]] = {
    "replicas": {"limit": _LIMIT},
    "alerts": {"since": _TIME},
    "decisions": {"limit": _LIMIT, "replica_set": _NAME},
    "audit": {"limit": _LIMIT},
    "usage": {"by": _BY, "month": _MONTH, "tenant": _TENANT},
    "replica-sets/{name}/why": {"at": _TIME},
    "replicas/{name}/why": {"at": _TIME},
    "slurm-jobs/{name}/why": {"at": _TIME},
}
_DRY_RUN: dict[str, Document] = {"dry_run": {"type": "boolean", "default": False}}

_VERSIONS = {"grafana": "1", "alertmanager": "4"}

_ERROR: Document = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message"],
            "properties": {
                "message": {"type": "string"},
                "field": {"type": "string"},
                "faults": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["field", "message"],
                        "properties": {"field": {"type": "string"}, "message": {"type": "string"}},
                    },
                },
            },
        }
    },
}


def document() -> Document:
    """The whole document: JSON values only."""
    nobodys = Database(DatabaseOptions("postgresql://"))  # never opened: routes are looked at, not asked
    app = create_app(nobodys, WebOptions(), ControlPlaneMetrics(CollectorRegistry()), slurm_status=lambda: None)
    components: Document = {"Error": _ERROR}
    paths: dict[str, Document] = {}
    for route in app.routes:
        assert isinstance(route, Route)
        for method in sorted((route.methods or set()) - {"HEAD"}):
            paths.setdefault(route.path, {})[method.lower()] = _operation(method, route.path, components)
    return {
        "openapi": "3.1.0",
        "info": {"title": "controlplane", "version": "1", "license": {"name": "Apache-2.0"}},
        "paths": dict(sorted(paths.items())),
        "components": {
            "schemas": components,
            "securitySchemes": {"operator": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(method: str, path: str, components: Document) -> Document:
    below = path.removeprefix(_API)
    is_verb = path.startswith(_API) and method != "GET"
    query = _DRY_RUN if is_verb else _QUERIES.get(below, {})
    named: Document = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    operation: Document = {
        "operationId": "-".join([method.lower(), *re.findall(r"[a-z0-9]+", path)]),
        "parameters": [
            *([named] if "{name}" in path else []),
            *({"name": name, "in": "query", "schema": schema} for name, schema in query.items()),
        ],
        "responses": {
            "202" if path.startswith(_WEBHOOKS) else "200": {"description": "done, or as it is"},
            "default": {
                "description": "refused; says why",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
            },
        },
    }
    if path.startswith(_API):
        operation["security"] = [{"operator": []}]
    body: Document | None = None
    if path.startswith(_WEBHOOKS):
        body = _webhook_body(_VERSIONS[path.removeprefix(_WEBHOOKS)])
    elif is_verb:
        body = _schema_of(_BODIES[below], components) if below in _BODIES else {"type": "object"}
    if body is not None:
        operation["requestBody"] = {"content": {"application/json": {"schema": body}}}
    return operation


def _schema_of(shape: type, components: Document) -> Document:
    schema = TypeAdapter(shape).json_schema(ref_template="#/components/schemas/{model}")
    components.update(schema.pop("$defs", {}))
    if shape is ReplicaSetDocument:  # its name may be left to the path
        schema["required"] = [name for name in schema["required"] if name != "name"]
    components[shape.__name__] = schema
    return {"$ref": f"#/components/schemas/{shape.__name__}"}


def _webhook_body(version: str) -> Document:
    texts: Document = {"type": "object", "additionalProperties": {"type": "string"}}
    alert: Document = {
        "type": "object",
        "required": ["status", "fingerprint", "startsAt", "endsAt", "labels"],
        "properties": {
            "status": {"enum": ["firing", "resolved"]},
            "fingerprint": {"type": "string", "minLength": 1, "maxLength": 128},
            "startsAt": _TIME,
            "endsAt": _TIME,
            "labels": texts,
            "annotations": texts,
            "values": {"type": ["object", "null"], "additionalProperties": {"type": ["number", "null"]}},
            "orgId": {"type": "integer", "minimum": 0, "maximum": 2**63 - 1},
        },
    }
    return {
        "type": "object",
        "required": ["version", "alerts"],
        "properties": {
            "version": {"const": version},
            "orgId": {"type": "integer", "minimum": 0, "maximum": 2**63 - 1},
            "alerts": {"type": "array", "items": alert},
            "truncatedAlerts": {"type": "integer", "minimum": 0},
        },
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(document(), indent=2) + "\n")
