"""What the demo writes for a Grafana, on a database where it may make roles, and on one where it may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml
from psycopg.conninfo import make_conninfo

from controlplane.db import migrate
from controlplane.demo.data_sources import ROLE, DataSources, Sources
from controlplane.demo.postgres import PrivatePostgres
from tests.e2e.grafana import provisioned

PROMETHEUS = "http://127.0.0.1:9090"


def written(directory: Path, url: str) -> DataSources:
    sources = DataSources(directory)
    sources.write(Sources(PROMETHEUS, 1, url, {"CONTROLPLANE_WEBHOOK_URL": "http://127.0.0.1:9100/webhooks/grafana"}))
    return sources


def kinds(sources: DataSources) -> list[str]:
    [file] = (sources.provisioning / "datasources").glob("*.yaml")
    found: list[dict[str, Any]] = yaml.safe_load(file.read_text())["datasources"]
    return [one["type"] for one in found]


def test_the_role_reads_while_the_site_is_up_and_is_gone_after_it(database_url: str, tmp_path: Path) -> None:
    sources = written(tmp_path, database_url)
    sources = written(tmp_path, database_url)  # an earlier demo was killed: its role is there, with another password
    assert sources.no_postgres is None
    found = provisioned(tmp_path)
    assert found.prometheus_url == PROMETHEUS
    with psycopg.connect(found.postgres) as connection:
        assert connection.execute("SELECT * FROM grafana.replicas").fetchall() == []
    sources.forget()
    sources.forget()
    with psycopg.connect(database_url) as owner:
        assert owner.execute("SELECT FROM pg_roles WHERE rolname = %s", (ROLE,)).fetchone() is None


def test_where_no_role_can_be_made_there_is_no_such_data_source_and_it_is_said(
    postgres: PrivatePostgres, tmp_path: Path
) -> None:
    url = postgres.create_database("somebodys")
    with psycopg.connect(url, autocommit=True) as superuser:
        superuser.execute("CREATE ROLE somebody LOGIN PASSWORD 'x'; ALTER DATABASE somebodys OWNER TO somebody")
    as_somebody = make_conninfo(url, user="somebody", password="x")
    migrate(as_somebody)
    sources = written(tmp_path, as_somebody)
    assert "PostgreSQL   none: permission denied to create role" in sources.told()
    assert kinds(sources) == ["prometheus"]
    sources.forget()
    postgres.drop_database("somebodys")
    with psycopg.connect(postgres.url("postgres"), autocommit=True) as superuser:
        superuser.execute("DROP ROLE somebody")


def test_a_database_that_is_away_is_said_and_does_not_end_the_demo(tmp_path: Path, free_port: int) -> None:
    sources = written(tmp_path, f"postgresql://me:secret@127.0.0.1:{free_port}/x")
    assert sources.no_postgres is not None
    assert "secret" not in sources.told()


@pytest.mark.parametrize("kind", ["dashboards", "datasources"])
def test_provisioning_is_readable_for_grafanas_user_and_passwords_are_not(
    database_url: str, tmp_path: Path, kind: str
) -> None:
    sources = written(tmp_path, database_url)
    [file] = (sources.provisioning / kind).glob("*.yaml")
    assert file.stat().st_mode & 0o044 == 0o044
    assert sources.environment_file.stat().st_mode & 0o077 == 0
    sources.forget()
