"""What a Grafana needs to show the demo's site: provisioning files and an environment, written below a directory.

    provisioning/datasources/  Prometheus and PostgreSQL; there is no Loki here, and panels with logs say so
    provisioning/dashboards/   where the boards are
    environment                for Grafana's process: where these are, and the passwords, which stand nowhere else

PostgreSQL is read by a role of its own, which may read the views for dashboards and nothing else. It is made at the
start with a password of its own, and goes with the site. Where roles cannot be made, because the database is
somebody's, there is no such data source, and `no_postgres` says why.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from psycopg.conninfo import conninfo_to_dict

from controlplane.db import DatabaseError, dashboards

ROLE = "controlplane_demo_grafana"
PASSWORD_VARIABLE = "GRAFANA_POSTGRES_PASSWORD"  # noqa: S105 - its name
_ROOTS = (
    Path(__file__).resolve().parents[2],  # a checkout
    Path(sys.prefix) / "share" / "controlplane",  # an installed package
)
GRAFANA_PORT = 3000


@dataclass(frozen=True, slots=True)
class Sources:
    """`environment`: further variables of Grafana's, such as those that contact points name."""

    prometheus_url: str
    scrape_interval_seconds: int
    database_url: str
    environment: Mapping[str, str]


class DataSources:
    """The files of one site, below `directory`. `write` them once the database has its schema."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.no_postgres: str | None = "nothing was written yet"
        self.postgres_address = ""
        self._made_in: str | None = None

    @property
    def environment_file(self) -> Path:
        """`NAME=value` lines, for a shell as well as for docker; only its owner may read it."""
        return self.directory / "environment"

    @property
    def provisioning(self) -> Path:
        """Grafana's GF_PATHS_PROVISIONING."""
        return self.directory / "provisioning"

    def write(self, sources: Sources) -> None:
        """Make the role, and all files anew."""
        password = secrets.token_urlsafe(24)
        database = conninfo_to_dict(sources.database_url)
        self.postgres_address = f"{database.get('host', 'localhost')}:{database.get('port', 5432)}"
        try:
            dashboards.make_role(sources.database_url, ROLE, password)
            self._made_in = sources.database_url
            dashboards.grant(sources.database_url, ROLE)
            self.no_postgres = None
        except DatabaseError as error:
            self.no_postgres = " ".join(str(error).split())
        found = [_prometheus(sources)]
        if self.no_postgres is None:
            found.append(_postgres(self.postgres_address, str(database.get("dbname", ROLE))))
        _write(self.provisioning / "datasources" / "controlplane.yaml", {"apiVersion": 1, "datasources": found})
        _write(self.provisioning / "dashboards" / "controlplane.yaml", {"apiVersion": 1, "providers": [_provider()]})
        variables = {**self._variables(), **sources.environment, PASSWORD_VARIABLE: password}
        self.environment_file.unlink(missing_ok=True)
        self.environment_file.touch(mode=0o600)
        self.environment_file.write_text("".join(f"{name}={value}\n" for name, value in variables.items()))

    def forget(self) -> None:
        """Remove the role from a database that lives on, if that can be had. May be repeated."""
        if self._made_in is not None:
            with suppress(DatabaseError):
                dashboards.drop_role(self._made_in, ROLE)
            self._made_in = None

    def told(self) -> str:
        """For a person: what there is, and the commands that start a Grafana on it."""
        postgres = f"{self.postgres_address}, role {ROLE}, reads the views of schema {dashboards.SCHEMA} only"
        if self.no_postgres is not None:
            postgres = f"none: {self.no_postgres}"
        mounts = " ".join(f"-v {folder}:{folder}:ro" for folder in (self.directory, folder_of("dashboards").parent))
        return (
            f"PostgreSQL   {postgres}\n"
            "Loki         none: the demo has no logs in Loki, and panels that want some stay empty\n"
            f"files        {self.provisioning}\n"
            f"boards       {folder_of('dashboards')}\n"
            f"alert rules  {folder_of('alerts')}; to let Grafana's act too: ln -s {folder_of('alerts')} "
            f"{self.provisioning / 'alerting'}\n"
            f"then         http://127.0.0.1:{GRAFANA_PORT}, without logging in, from either of\n\n"
            f"set -a; . {self.environment_file}; grafana server --homepath /usr/share/grafana\n"
            f"docker run --rm --network host --env-file {self.environment_file} {mounts} grafana/grafana:12.4.0"
        )

    def _variables(self) -> dict[str, str]:
        return {
            "GF_PATHS_PROVISIONING": str(self.provisioning),
            "GF_SERVER_HTTP_ADDR": "127.0.0.1",
            "GF_SERVER_HTTP_PORT": str(GRAFANA_PORT),
            "GF_AUTH_ANONYMOUS_ENABLED": "true",
            "GF_SECURITY_ADMIN_PASSWORD": secrets.token_urlsafe(24),
            "GF_ANALYTICS_REPORTING_ENABLED": "false",
            "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
            "GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH": str(folder_of("dashboards") / "controlplane-fleet.json"),
            "GF_DASHBOARDS_MIN_REFRESH_INTERVAL": "1s",  # as quick as the demo is
        }


def folder_of(kind: str) -> Path:
    """Where `grafana/<kind>` is, in a checkout or of an installed package."""
    folders = [root / "grafana" / kind for root in _ROOTS]
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def _prometheus(sources: Sources) -> dict[str, Any]:
    return {
        "name": "Prometheus",
        "uid": "prometheus",
        "type": "prometheus",
        "access": "proxy",
        "url": sources.prometheus_url,
        "isDefault": True,
        "jsonData": {"httpMethod": "POST", "timeInterval": f"{sources.scrape_interval_seconds}s"},
    }


def _postgres(address: str, database: str) -> dict[str, Any]:
    return {
        "name": "Control plane's database",
        "uid": "controlplane-postgres",
        "type": "grafana-postgresql-datasource",
        "access": "proxy",
        "url": address,
        "user": ROLE,
        "jsonData": {"database": database, "sslmode": "disable", "postgresVersion": 1400, "maxOpenConns": 5},
        "secureJsonData": {"password": f"${PASSWORD_VARIABLE}"},
    }


def _provider() -> dict[str, Any]:
    return {
        "name": "controlplane",
        "orgId": 1,
        "folder": "controlplane",
        "type": "file",
        "disableDeletion": True,
        "allowUiUpdates": True,
        "options": {"path": str(folder_of("dashboards"))},
    }


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False))
