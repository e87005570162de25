"""Who may read the views for dashboards (schema `grafana`), and that such a role can read nothing else of ours.

The role is made by whoever may make roles; the tables' owner grants. A role that could get at more than the views is
refused before anything is granted: it would make a promise of "read only" that the database does not keep.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psycopg
from psycopg import sql

from controlplane.db.errors import DatabaseError, DbUnavailable, NotFound

SCHEMA = "grafana"

_POWERS = """
    SELECT m.rolname,
           CASE WHEN m.rolsuper THEN 'SUPERUSER' WHEN m.rolcreaterole THEN 'CREATEROLE'
                WHEN m.rolreplication THEN 'REPLICATION' WHEN m.rolcreatedb THEN 'CREATEDB' END AS power,
           m.rolname IN ('pg_read_all_data', 'pg_write_all_data', 'pg_read_server_files', 'pg_write_server_files',
                         'pg_execute_server_program') AS reaches_everything,
           EXISTS (SELECT FROM pg_class c WHERE c.relowner = m.oid AND c.relnamespace = ANY (%(ours)s::regnamespace[]))
               AS is_owner,
           (SELECT min(c.relname) FROM pg_class c JOIN pg_class o ON o.oid = 'replica_sets'::regclass
             WHERE c.relnamespace = o.relnamespace AND c.relowner = o.relowner
               AND CASE WHEN c.relkind = 'S' THEN has_sequence_privilege(m.oid, c.oid, 'USAGE, SELECT, UPDATE')
                        WHEN c.relkind IN ('r', 'p', 'v', 'm', 'f')
                        THEN has_table_privilege(m.oid, c.oid, 'SELECT, INSERT, UPDATE, DELETE, TRUNCATE, TRIGGER')
                             OR has_any_column_privilege(m.oid, c.oid, 'SELECT, INSERT, UPDATE') END
               AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = c.oid AND d.deptype = 'e')) AS may_use
      FROM pg_roles m
     WHERE pg_has_role(%(role)s, m.oid, 'MEMBER')
     ORDER BY NOT (m.rolname = %(role)s AND m.rolsuper), m.rolname = %(role)s, m.rolname"""
"""What the role is and may do, a row for each role that it may become, and the last for itself."""


@dataclass(frozen=True, slots=True)
class Granted:
    """`warnings`: what the role may do besides that no grant of ours is at fault for, each with its remedy."""

    warnings: tuple[str, ...]


def statements(role: str) -> list[str]:
    """The SQL that lets a role read the views, those included that later migrations bring. May be repeated.

    To be run by the owner of the tables, or by a superuser who is that owner for the moment (`SET ROLE`).
    """
    return [one.as_string() for one in _grants(role)]


def how_to_make(role: str) -> str:
    """The SQL by which somebody who may make roles makes this one."""
    name = sql.Identifier(role).as_string()
    return f"CREATE ROLE {name} LOGIN PASSWORD '...'; ALTER ROLE {name} SET default_transaction_read_only = on"


def make_role(url: str, role: str, password: str) -> None:
    """Make the role, to log in with this password and to read only; one that is there gets the password.

    For servers of our own, and those where we may. Raises DbUnavailable, DatabaseError: this user may not make roles.
    """
    with _connected(url) as connection:
        is_there = connection.execute("SELECT FROM pg_roles WHERE rolname = %s", (role,)).fetchone() is not None
        for text in (
            "ALTER ROLE {role} LOGIN PASSWORD {password}"
            if is_there
            else "CREATE ROLE {role} LOGIN PASSWORD {password}",
            "ALTER ROLE {role} SET default_transaction_read_only = on",
        ):
            connection.execute(sql.SQL(text).format(role=sql.Identifier(role), password=password))


def drop_role(url: str, role: str) -> None:
    """Take back what the role was granted here, and remove it. Raises as `make_role` does."""
    with _connected(url) as connection:
        connection.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(role)))
        connection.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


def grant(url: str, role: str) -> Granted:
    """Let a role read the views. May be repeated. Raises DbUnavailable, NotFound: there is no such role, DatabaseError.

    DatabaseError also says which power keeps the role from being given access: then nothing was granted.
    """
    with _connected(url) as connection:
        _refuse_more_than_reading(connection, role)
        for statement in _grants(role):
            connection.execute(statement)
        return Granted(tuple(_warnings(connection, role)))


@contextmanager
def _connected(url: str) -> Iterator[psycopg.Connection]:
    """One connection and one transaction."""
    try:
        connection = psycopg.connect(url, connect_timeout=10)
    except psycopg.Error as error:
        raise DbUnavailable(str(error)) from error
    try:
        with connection:
            yield connection
    except psycopg.Error as error:
        raise DatabaseError(str(error)) from error


def _grants(role: str) -> list[sql.Composed]:
    names = {"schema": sql.Identifier(SCHEMA), "role": sql.Identifier(role)}
    return [
        sql.SQL(text).format(**names)
        for text in (
            "GRANT USAGE ON SCHEMA {schema} TO {role}",
            "GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO {role}",
            "ALTER DEFAULT PRIVILEGES IN SCHEMA {schema} GRANT SELECT ON TABLES TO {role}",
        )
    ]


def _refuse_more_than_reading(connection: psycopg.Connection, role: str) -> None:
    if connection.execute("SELECT FROM pg_roles WHERE rolname = %s", (role,)).fetchone() is None:
        raise NotFound(f"there is no role {role!r}; somebody who may make roles says: {how_to_make(role)}")
    if connection.execute("SELECT to_regnamespace(%s)", (SCHEMA,)).fetchone() == (None,):
        raise DatabaseError("the schema is not there yet: run `controlplane migrate`")
    ours = ["public", SCHEMA]
    [of_tables] = connection.execute(
        "SELECT relnamespace::regnamespace::text FROM pg_class WHERE oid = 'replica_sets'::regclass"
    ).fetchone() or ["public"]
    rows = connection.execute(_POWERS, {"role": role, "ours": [of_tables, *ours]}).fetchall()
    for name, power, reaches_everything, is_owner, may_use in rows:
        who = f"role {role}" if name == role else f"role {role} may become {name}, which"
        if power is not None:
            raise DatabaseError(f"{who} is {power}: choose one that is not")
        if reaches_everything:
            raise DatabaseError(f"{who} reaches everything: choose one that does not")
        if is_owner:
            raise DatabaseError(f"{who} owns tables or views here: choose one that owns nothing")
        if may_use is not None:
            raise DatabaseError(f"{who} may use {may_use}, which is not for dashboards: revoke that, or choose another")


def _warnings(connection: psycopg.Connection, role: str) -> list[str]:
    [database, may_connect, may_make_schemas] = connection.execute(
        "SELECT current_database(), has_database_privilege(%(role)s, current_database(), 'CONNECT'), "
        "has_database_privilege(%(role)s, current_database(), 'CREATE')",
        {"role": role},
    ).fetchone() or (None, True, False)
    name, its = sql.Identifier(role).as_string(), sql.Identifier(str(database)).as_string()
    found = []
    if not may_connect:
        found.append(f"it may not connect: GRANT CONNECT ON DATABASE {its} TO {name}")
    if may_make_schemas:
        found.append(f"it may make schemas of its own: REVOKE CREATE ON DATABASE {its} FROM PUBLIC, {name}")
    rows = connection.execute(
        "SELECT nspname FROM pg_namespace "
        "WHERE nspname !~ '^pg_' AND has_schema_privilege(%s, oid, 'CREATE') ORDER BY 1",
        (role,),
    ).fetchall()
    for (schema,) in rows:
        quoted = sql.Identifier(schema).as_string()
        found.append(f"it may make tables in schema {schema}: REVOKE CREATE ON SCHEMA {quoted} FROM PUBLIC, {name}")
    return found
