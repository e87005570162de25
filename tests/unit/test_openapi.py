"""The OpenAPI document says what the routes say, and the file in docs/ is that document."""

from __future__ import annotations

import json
from pathlib import Path

from controlplane.web import openapi

FILE = Path(__file__).parents[2] / "docs" / "openapi.json"


def test_the_published_document_is_the_one_that_the_routes_make() -> None:
    assert json.loads(FILE.read_text()) == openapi.document(), "python -m controlplane.web.openapi > docs/openapi.json"


def test_the_tables_name_only_routes_that_there_are() -> None:
    paths = {path.removeprefix("/api/v1/") for path in openapi.document()["paths"]}
    assert {*openapi._BODIES, *openapi._QUERIES} <= paths


def test_every_operation_has_an_id_of_its_own() -> None:
    ids = [one["operationId"] for verbs in openapi.document()["paths"].values() for one in verbs.values()]
    assert len(ids) == len(set(ids)) > 20
