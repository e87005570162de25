"""What dashboards read: each view as a role that may read nothing else, no secret in any, and who is given access."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo
from typer.testing import CliRunner

from controlplane.cli import cli
from controlplane.core.host_lists import expand, in_order
from controlplane.core.types import DecisionReason, ExternalEndpoint, JobState, Phase, SlurmResources, VllmOptions
from controlplane.db import Database, dashboards, job_logs, keys, migrate, nodes, replica_sets, tenants, usage
from controlplane.db.errors import DatabaseError, NotFound
from controlplane.db.usage import By
from controlplane.demo.postgres import PrivatePostgres
from tests.integration.db_rows import NOW, make_ready, make_replica, make_set, observe, opened, slurm_spec
from tests.integration.lives import SECRET, after, decided, fires, whole_life
from tests.unit.documents import section

VIEWS = {
    "alert_deliveries",
    "alerts",
    "back_offs",
    "decisions",
    "endpoint_states",
    "endpoints",
    "held_requests",
    "job_runs",
    "leases",
    "node_events",
    "nodes",
    "operator_actions",
    "replica_phases",
    "replica_sets",
    "replicas",
    "slurm_job_states",
    "slurm_jobs",
    "tenant_months",
    "tenants",
    "usage",
}
PASSWORD = "reader-password"
_numbers = itertools.count(1)


def admin(url: str) -> psycopg.Connection[Any]:
    return psycopg.connect(url, autocommit=True)


@pytest.fixture
def role(database_url: str) -> Iterator[str]:
    """A role that may log in, and nothing more."""
    name = f"reader_{next(_numbers)}"
    with admin(database_url) as connection:
        connection.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(name), PASSWORD))
        yield name
        connection.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(name)))


@pytest.fixture
def reader(database_url: str, role: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection of the role, which was granted the views."""
    assert dashboards.grant(database_url, role).warnings == ()
    as_role = make_conninfo(database_url, user=role, password=PASSWORD)
    with psycopg.connect(as_role, autocommit=True) as connection:
        yield connection


def rows(connection: psycopg.Connection[Any], query: str, *values: Any) -> list[dict[str, Any]]:
    with connection.cursor(row_factory=psycopg.rows.dict_row) as cursor:
        return cursor.execute(query, values or None).fetchall()


def relations(connection: psycopg.Connection[Any], *, of_dashboards: bool) -> list[str]:
    found = rows(
        connection,
        "SELECT quote_ident(nspname) || '.' || quote_ident(relname) AS name, relname "
        "FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
        "WHERE c.relkind IN ('r', 'v', 'm', 'p') AND nspname !~ '^(pg_|information_schema)' "
        "AND (nspname = 'grafana') = %s ORDER BY 1",
        of_dashboards,
    )
    return [row["name"] for row in found]


# --- the role --------------------------------------------------------------------------------------------


async def test_the_role_reads_every_view_and_no_table(
    database_url: str, reader: psycopg.Connection[Any], role: str
) -> None:
    async with opened(database_url) as db:
        await whole_life(db)
    views = relations(reader, of_dashboards=True)
    assert {view.removeprefix("grafana.") for view in views} == VIEWS
    for view in views:
        rows(reader, f"SELECT * FROM {view}")
    tables = relations(reader, of_dashboards=False)
    assert len(tables) > 25
    assert {"public.api_keys", "public.routable_endpoints", "public.said"} <= set(tables)
    for table in tables:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            rows(reader, f"SELECT * FROM {table}")


def test_the_role_writes_nothing(reader: psycopg.Connection[Any]) -> None:
    for view in relations(reader, of_dashboards=True):
        [column] = rows(reader, "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum = 1", view)
        name = column["attname"]
        for statement in (
            f"DELETE FROM {view}",
            f"UPDATE {view} SET {name} = {name}",
            f"INSERT INTO {view} ({name}) VALUES (NULL)",
        ):
            with pytest.raises((psycopg.errors.InsufficientPrivilege, psycopg.errors.ObjectNotInPrerequisiteState)):
                rows(reader, statement)
    for statement in (
        "CREATE TABLE grafana.mine ()",
        "CREATE TABLE public.mine ()",
        "CREATE SCHEMA mine",
        "DELETE FROM public.replicas",
        "TRUNCATE public.decisions",
        "SELECT measure_start_lead('a')",
        "SELECT nextval('public.decisions_id_seq')",
        "SET ROLE postgres",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            rows(reader, statement)


async def test_no_secret_is_in_any_view_nor_in_what_the_catalogue_shows(
    database_url: str, reader: psycopg.Connection[Any]
) -> None:
    async with opened(database_url) as db:
        canaries = await _plant_canaries(db)
    everything = ""
    for view in relations(reader, of_dashboards=True):
        told = rows(reader, f"SELECT * FROM {view}")
        if view not in ("grafana.leases", "grafana.back_offs", "grafana.held_requests", "grafana.node_events"):
            assert told, f"{view} is empty: nothing was looked for in it"
        everything += repr(told)
    everything += repr(rows(reader, "SELECT prosrc FROM pg_proc WHERE pronamespace <> 'pg_catalog'::regnamespace"))
    everything += repr(rows(reader, "SELECT definition FROM pg_views WHERE schemaname <> 'pg_catalog'"))
    everything += repr(rows(reader, "SELECT * FROM pg_stats"))
    everything += repr(rows(reader, "SELECT query FROM pg_stat_activity"))
    with admin(database_url) as owner:
        stored = "".join(
            repr(rows(owner, f"SELECT t::text FROM {table} t")) for table in relations(owner, of_dashboards=False)
        )
    for name, canary in canaries.items():
        assert canary in stored or name == "the key", f"{name} is stored nowhere: it could not have been found"
        assert canary not in everything, f"{name} is shown"
    assert "http://office:8000" in everything
    assert "key made for physics" in everything


async def _plant_canaries(db: Database) -> dict[str, str]:
    await whole_life(db)
    for number in range(1, 3):
        await make_set(
            db,
            f"set-{number}",
            vllm=VllmOptions(args=("--api-key", "canary-argument"), environment={"HF_TOKEN": "canary-environment"}),
            slurm=SlurmResources(time_limit_seconds=3600, gpus_per_node=2),
        )
    one = await make_replica(db, await replica_sets.load(db, "set-1"), Phase.RUNNING)
    await make_ready(db, one, "http://n1:20000", ends_at=NOW + timedelta(hours=1))
    office = replace(
        slurm_spec("office"),
        slurm=None,
        max_replicas=0,
        template=None,
        endpoints=(ExternalEndpoint("http://office:8000", "canary-api-key-file"),),
    )
    await replica_sets.apply(db, office, actor="ann", now=NOW)
    key, made = await keys.create(db, "physics", models=None, expires_at=None, actor="ann", now=NOW)
    await tenants.set_limits(db, "physics", {"monthly_tokens": 1000}, actor="ann", now=NOW)
    await nodes.drain(db, "n7", actor="ann", now=NOW, reason="smells")
    await fires(db, after(60), starts_at=after(60), labels={**_LABELS, "token": "canary-label"})
    month = NOW.date()
    await usage.store(db, "w", 1, [usage.Row(month, "physics", "m", 0, one.name, 1, 0, 10, 10, 0)])
    await job_logs.save(db, one.id, job_logs.JobLog(NOW, "canary-prompt in a log", None))
    async with db.connection() as connection:
        await connection.execute(
            "UPDATE endpoints SET url = 'http://user:canary-password@office:8000/canary-path?canary-query' "
            "WHERE replica_id IS NULL"
        )
        await connection.execute(
            """UPDATE alert_deliveries SET payload = payload || '{"message": "canary-payload"}'::jsonb"""
        )
        await connection.execute(
            "INSERT INTO webhook_signatures (signature, expires_at) VALUES ('canary-signature', now())"
        )
    return {
        "the key": key,
        "its hash": keys.hash_key(key).hex(),
        "its prefix": made.prefix,
        "a replica's secret": SECRET,
        "the content of an api_key_file": "canary-api-key-file",
        "an environment": "canary-environment",
        "an argument": "canary-argument",
        "a label": "canary-label",
        "a log": "canary-prompt",
        "a payload": "canary-payload",
        "a password in a URL": "canary-password",
        "a path in a URL": "canary-path",
        "a query in a URL": "canary-query",
        "a signature": b"canary-signature".hex(),
    }


_LABELS = {"alertname": "Requests queue", "action": "scale_up", "model": "m"}


# --- who is given access ---------------------------------------------------------------------------------


def test_granting_may_be_repeated_and_reaches_views_that_come_later(database_url: str, role: str) -> None:
    for _ in range(2):
        assert dashboards.grant(database_url, role) == dashboards.Granted(())
    with admin(database_url) as owner:
        owner.execute("CREATE VIEW grafana.later AS SELECT 1 AS one")
    with psycopg.connect(make_conninfo(database_url, user=role, password=PASSWORD)) as connection:
        assert rows(connection, "SELECT * FROM grafana.later") == [{"one": 1}]


@pytest.mark.parametrize(
    ("power", "words"),
    [
        ("ALTER ROLE {role} SUPERUSER", "is SUPERUSER"),
        ("ALTER ROLE {role} CREATEROLE CREATEDB", "is CREATEROLE"),
        ("ALTER ROLE {role} REPLICATION", "is REPLICATION"),
        ("GRANT pg_read_all_data TO {role}", "may become pg_read_all_data, which reaches everything"),
        ("GRANT postgres TO {role}", "may become postgres, which is SUPERUSER"),
        ("CREATE TABLE mine (); ALTER TABLE mine OWNER TO {role}", "owns tables or views here"),
        ("GRANT SELECT ON tenants TO {role}", "may use tenants"),
        ("GRANT SELECT (secret) ON replicas TO {role}", "may use replicas"),
        ("GRANT UPDATE ON decisions TO {role}", "may use decisions"),
        ("GRANT SELECT ON routable_endpoints TO PUBLIC", "may use routable_endpoints"),
        ("ALTER ROLE {role} NOINHERIT; GRANT pg_write_all_data TO {role}", "may become pg_write_all_data"),
    ],
)
def test_a_role_that_could_do_more_is_refused_and_given_nothing(
    database_url: str, role: str, power: str, words: str
) -> None:
    with admin(database_url) as owner:
        owner.execute(power.format(role=role))
        with pytest.raises(DatabaseError, match=words):
            dashboards.grant(database_url, role)
        [given] = rows(owner, "SELECT coalesce(nspacl::text, '') AS acl FROM pg_namespace WHERE nspname = 'grafana'")
        assert role not in given["acl"]
        owner.execute(f"ALTER ROLE {role} NOSUPERUSER")


def test_what_every_role_may_do_is_told_with_its_remedy(database_url: str, role: str) -> None:
    with admin(database_url) as owner:
        owner.execute("GRANT CREATE ON SCHEMA public TO PUBLIC")  # as PostgreSQL 14 has it
        [warning] = dashboards.grant(database_url, role).warnings
        assert warning.startswith("it may make tables in schema public: ")
        owner.execute(warning.partition(": ")[2])
    assert dashboards.grant(database_url, role).warnings == ()


def test_an_owner_who_is_no_superuser_migrates_and_grants(postgres: PrivatePostgres, role: str) -> None:
    url = postgres.create_database("owned")
    with admin(url) as superuser:
        superuser.execute("CREATE ROLE site LOGIN PASSWORD 'site'; ALTER DATABASE owned OWNER TO site")
    as_site = make_conninfo(url, user="site", password="site")
    migrate(as_site)
    dashboards.grant(as_site, role)
    with psycopg.connect(make_conninfo(url, user=role, password=PASSWORD)) as connection:
        assert rows(connection, "SELECT * FROM grafana.replicas") == []
    with pytest.raises(DatabaseError, match="owns tables or views here"):
        dashboards.grant(as_site, "site")
    postgres.drop_database("owned")
    with admin(postgres.url("postgres")) as superuser:
        superuser.execute("DROP ROLE site")


def test_where_schemas_may_not_be_made_one_that_is_there_is_used(postgres: PrivatePostgres) -> None:
    url = postgres.create_database("strict")
    with admin(url) as superuser:
        superuser.execute("CREATE ROLE guest LOGIN PASSWORD 'guest'; GRANT CREATE ON SCHEMA public TO guest")
        as_guest = make_conninfo(url, user="guest", password="guest")
        with pytest.raises(DatabaseError, match="permission denied for database strict"):
            migrate(as_guest)
        superuser.execute("CREATE SCHEMA grafana AUTHORIZATION guest")
    assert "0011.grafana_views" in migrate(as_guest)
    postgres.drop_database("strict")
    with admin(postgres.url("postgres")) as superuser:
        superuser.execute("DROP ROLE guest")


def test_a_role_that_is_not_there_is_named_with_the_sql_that_makes_it(database_url: str) -> None:
    with pytest.raises(NotFound, match=r"CREATE ROLE \"some one\" LOGIN PASSWORD"):
        dashboards.grant(database_url, "some one")


def test_the_command_migrates_and_grants_or_prints_what_it_would_grant(
    postgres: PrivatePostgres, database_url: str, role: str
) -> None:
    runner = CliRunner(env={"DATABASE_URL": database_url})
    granted = runner.invoke(cli, ["migrate", "--grant-dashboards-to", role])
    assert granted.exit_code == 0
    assert granted.stdout.endswith(f"{role} may read the views of schema grafana, and no table\n")
    refused = runner.invoke(cli, ["migrate", "--grant-dashboards-to", "postgres"])
    assert refused.exit_code == 1
    assert refused.stderr == "error: nothing was granted: role postgres is SUPERUSER: choose one that is not\n"
    assert runner.invoke(cli, ["migrate", "--print"]).exit_code == 2

    printed = CliRunner(env={"DATABASE_URL": ""}).invoke(cli, ["migrate", "--grant-dashboards-to", role, "--print"])
    other = postgres.create_database("printed", template="template")
    with admin(other) as owner:
        owner.execute(printed.stdout)
    with psycopg.connect(make_conninfo(other, user=role, password=PASSWORD)) as connection:
        assert rows(connection, "SELECT * FROM grafana.usage") == []
    postgres.drop_database("printed")


async def test_the_document_names_every_view_and_its_columns_in_their_order(reader: psycopg.Connection[Any]) -> None:
    found = rows(
        reader,
        "SELECT relname AS view, array_agg(attname::text ORDER BY attnum) AS columns FROM pg_attribute "
        "JOIN pg_class c ON c.oid = attrelid WHERE relnamespace = 'grafana'::regnamespace AND attnum > 0 GROUP BY 1",
    )
    told = re.findall(
        r"^- \*\*(\w+)\*\* .*?Columns: (.*?)\.$", section("docs/views.md", "What there is"), re.MULTILINE | re.DOTALL
    )
    assert {view: re.findall(r"`(\w+)`", columns) for view, columns in told} == {
        row["view"]: row["columns"] for row in found
    }


# --- what they say ---------------------------------------------------------------------------------------


async def test_a_life_is_told_in_sentences(database_url: str, reader: psycopg.Connection[Any]) -> None:
    async with opened(database_url) as db:
        replica = await whole_life(db)
        alert = await fires(db, after(60), starts_at=after(60))
        await decided(db, after(61), DecisionReason.AT_MAX, 0, 0, alert)
    told = rows(reader, "SELECT kind, sentence, alert_names, model FROM grafana.decisions ORDER BY id")
    assert [tuple(row.values()) for row in told[1:]] == [
        ("refused", "a stays at 0, COOLDOWN: COOLDOWN for a test", "Requests queue", "m"),
        ("up", "a 0 -> 1, SCALED_UP: SCALED_UP for a test", "Requests queue", "m"),
        ("down", "a 1 -> 0, SCALED_DOWN: SCALED_DOWN for a test", None, "m"),
        ("refused", "a stays at 0, AT_MAX: AT_MAX for a test", "Requests queue", "m"),
    ]
    [row] = rows(reader, "SELECT * FROM grafana.replicas")
    assert (row["name"], row["node"], row["gpus"]) == (replica.name, "n1", 0)
    assert row["sentence"].startswith("ended, SCALED_DOWN")
    assert row["made_because"] == "SCALED_UP: SCALED_UP for a test"
    assert row["ready_at"] == after(30)
    [one] = rows(reader, "SELECT outcome, status, summary FROM grafana.alerts")
    assert one == {"outcome": "a stays at 0, AT_MAX", "status": "firing", "summary": "m: 22 requests wait"}
    [newest] = rows(reader, "SELECT sentence, desired, existing, live, routable FROM grafana.replica_sets")
    assert newest["sentence"] == "refused because AT_MAX: AT_MAX for a test"


async def test_phases_and_states_end_where_the_next_begin(database_url: str, reader: psycopg.Connection[Any]) -> None:
    async with opened(database_url) as db:
        await whole_life(db)
    phases = rows(reader, "SELECT phase, began_at, ended_at FROM grafana.replica_phases ORDER BY began_at, phase")
    assert {row["phase"] for row in phases} == {str(phase) for phase in Phase}
    assert all(row["ended_at"] is not None for row in phases)
    begun = {row["phase"]: row["began_at"] for row in phases}
    [running] = [row for row in phases if row["phase"] == "RUNNING"]
    assert (running["began_at"], running["ended_at"]) == (after(20), begun["DRAINING"])
    states = rows(reader, "SELECT state, held, reason, ended_at FROM grafana.slurm_job_states ORDER BY began_at")
    assert [(row["state"], row["held"], row["reason"], row["ended_at"]) for row in states] == [
        ("PENDING", True, None, after(10)),
        ("PENDING", False, "Priority", after(20)),
        ("RUNNING", False, None, None),
    ]
    health = rows(reader, "SELECT state FROM grafana.endpoint_states")
    assert {row["state"] for row in health} == {"UNPROVEN", "READY"}


async def test_who_said_what_is_told_as_verbs(database_url: str, reader: psycopg.Connection[Any]) -> None:
    async with opened(database_url) as db:
        await make_set(db, "a")
        await replica_sets.scale(db, "a", replicas=2, actor="ann", now=after(1), reason="a talk (tomorrow)")
        await replica_sets.pause(db, "a", actor="ann", now=after(2), reason="moved")
        await nodes.drain(db, "n1", actor="bob", now=after(3), reason="smells")
        await nodes.undrain(db, "n1", actor="bob", now=after(4))
        _, key = await keys.create(db, "lab", models=None, expires_at=None, actor="ann", now=after(5))
        await keys.revoke(db, key.prefix, after(6), actor="ann")
        await tenants.set_limits(db, "lab", {"weight": 2.0}, actor="ann", now=after(7))
    said = rows(reader, "SELECT actor, verb, kind, subject, reason FROM grafana.operator_actions ORDER BY at")
    assert [tuple(row.values()) for row in said] == [
        ("test", "spec created", "replica set", "a", None),
        ("ann", "scaled", "replica set", "a", "a talk (tomorrow)"),
        ("ann", "paused", "replica set", "a", "moved"),
        ("bob", "drained", "node", "n1", "smells"),
        ("bob", "undrained", "node", "n1", None),
        ("ann", "key made", "tenant", "lab", None),
        ("ann", "key revoked", "tenant", "lab", None),
        ("ann", "limits changed", "tenant", "lab", None),
    ]


async def test_gpu_seconds_are_those_of_the_usage_report(database_url: str, reader: psycopg.Connection[Any]) -> None:
    began = NOW + timedelta(hours=11)  # one hour before midnight: the job runs on two days
    async with opened(database_url) as db:
        made = await make_set(db, slurm=SlurmResources(time_limit_seconds=3600, gpus_per_node=4, nodes=2))
        one = await make_replica(db, made, Phase.RUNNING)
        await observe(db, one, JobState.RUNNING, started_at=began)
        await observe(db, one, JobState.COMPLETED, started_at=began, ends_at=began + timedelta(hours=3))
        days = [NOW.date(), NOW.date() + timedelta(days=1)]
        used = [(days[0], "lab", 300), (days[0], "other", 100), (days[1], "lab", 10)]
        lines = [usage.Row(day, who, "m", 1, one.name, 1, 0, tokens, 0, 0) for day, who, tokens in used]
        await usage.store(db, "w", 1, [*lines, usage.Row(days[0], "lab", "m", 0, None, 1, 1, 0, 0, 0)])
        report = await usage.report(db, By.TENANT, date(2026, 1, 1), date(2026, 2, 1), datetime.now(UTC))
    told = rows(reader, "SELECT tenant, sum(gpu_seconds) AS s FROM grafana.usage GROUP BY 1 ORDER BY 1")
    assert {row["tenant"]: row["s"] for row in told} == {line.name: line.gpu_seconds for line in report.lines}
    assert {line.name: line.gpu_seconds for line in report.lines} == {"lab": 8 * (2700 + 7200), "other": 8 * 900}
    assert rows(reader, "SELECT gpus, gpu_seconds FROM grafana.job_runs") == [{"gpus": 8, "gpu_seconds": 8 * 10800.0}]


@pytest.mark.parametrize("nodes_of_job", ["n[1-2]", "login,n[1,007-010]", "r[1-2]c[01-16],n1", "n1"])
async def test_a_node_knows_the_replicas_that_have_several_nodes(
    database_url: str, reader: psycopg.Connection[Any], nodes_of_job: str
) -> None:
    candidates = ("n1", "n2", "n3", "n07", "n008", "n010", "n10", "r2c01", "r2c1", "r3c01", "login")
    async with opened(database_url) as db:
        made = await make_set(db, slurm=SlurmResources(time_limit_seconds=3600, gpus_per_node=4, nodes=2))
        one = await make_replica(db, made, Phase.RUNNING)
        await observe(db, one, JobState.RUNNING, nodes=nodes_of_job)
        async with db.connection() as connection:
            for name in candidates:
                await connection.execute(
                    "INSERT INTO nodes (node, cause, reason, actor, since) VALUES (%s, 'operator', 'x', 'ann', %s)",
                    [name, NOW],
                )
    for view in ("replicas", "slurm_jobs", "slurm_job_states"):
        [row] = rows(reader, f"SELECT node, nodes FROM grafana.{view} WHERE nodes IS NOT NULL")
        assert (row["node"], row["nodes"]) == (in_order(nodes_of_job)[0], nodes_of_job), view
    told = {row["node"]: row["replicas"] for row in rows(reader, "SELECT node, replicas FROM grafana.nodes")}
    has = expand(nodes_of_job)
    assert told == {name: int(name in has) for name in candidates}


# --- how long they take ----------------------------------------------------------------------------------

_PLANNED = {
    "SELECT * FROM grafana.decisions WHERE decided_at BETWEEN %(from)s AND %(to)s": "decisions_by_time",
    "SELECT * FROM grafana.decisions WHERE replica_set = 'a' ORDER BY id DESC LIMIT 20": "decisions",
    "SELECT * FROM grafana.operator_actions WHERE at BETWEEN %(from)s AND %(to)s": "decisions_by_time",
    "SELECT * FROM grafana.replica_phases WHERE replica = 'cp-a-1'": "replica_history_pkey",
    "SELECT * FROM grafana.replica_phases WHERE began_at BETWEEN %(from)s AND %(to)s": "replica_history_by_time",
    "SELECT * FROM grafana.usage WHERE day BETWEEN %(from)s AND %(to)s AND tenant = 'lab'": "usage_pkey",
}


def test_conditions_of_panels_reach_the_indexes_of_a_long_history(database_url: str) -> None:
    with admin(database_url) as owner:
        owner.execute(
            """
            INSERT INTO replica_sets (name, model, priority, is_external, spec, spec_hash, min_replicas, max_replicas,
                                      desired_replicas)
            VALUES ('a', 'm', 1, false, '{}', 'h', 0, 9, 0);
            INSERT INTO decisions (at, replica_set, reason, previous, desired, explanation, actor)
            SELECT now() - n * interval '1 minute', 'a', 'STEADY', 1, 1, repeat('x', 80), 'reconciler'
              FROM generate_series(1, 20000) n;
            INSERT INTO replicas (name, replica_set, spec, spec_hash, port, secret, created_at, phase_since, phase,
                                  reason, ended_at)
            SELECT 'cp-a-' || n, 'a', '{}', 'h', 20000, repeat('x', 32), now(), now(), 'ENDED', 'LOST', now()
              FROM generate_series(1, 4000) n;
            INSERT INTO replica_history (replica_id, version, at, to_phase, actor)
            SELECT 1 + n / 5, n % 5, now() - n * interval '1 minute', 'RUNNING', 'reconciler'
              FROM generate_series(0, 19999) n;
            INSERT INTO usage
            SELECT current_date - n % 700, 'lab', 'm', n, 'a', 'cp-a-' || n, 1, 0, 10, 10, 0
              FROM generate_series(1, 20000) n;
            ANALYZE"""
        )
        now = datetime.now(UTC)
        for query, index in _PLANNED.items():
            asked = query % {"from": f"'{now - timedelta(hours=1)}'", "to": f"'{now}'"}
            plan = "\n".join(row["QUERY PLAN"] for row in rows(owner, f"EXPLAIN {asked}"))
            assert index in plan, f"{query}\n{plan}"
            for table in ("decisions", "replica_history", "usage"):
                assert f"Seq Scan on {table}" not in plan, f"{query}\n{plan}"
