"""A database for all tests of one file, where they are many and keep out of each other's way."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from controlplane.demo.postgres import PrivatePostgres


@pytest.fixture(scope="module")
def shared_url(request: pytest.FixtureRequest, postgres: PrivatePostgres, template_database: str) -> Iterator[str]:
    """The URI of a migrated database that the module's tests share; each test says how it leaves it usable."""
    name = request.module.__name__.rpartition(".")[2]
    yield postgres.create_database(name, template=template_database)
    postgres.drop_database(name)
