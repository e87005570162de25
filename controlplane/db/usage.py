"""What tenants used by day, and the GPU-seconds of jobs shared out by it.

The GPU-seconds of a replica's job on one day are its GPUs times the seconds of that day for which Slurm gave them to
it. They are shared out over the tenants whose tokens (prompt and completion) the replica served on that day, by those
tokens; those of a day on which it served none are idle. So shares and idle are the job's, whatever is grouped how. A
job without GPUs has no GPU-seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from enum import StrEnum

import msgspec

from controlplane.db.pool import Database


@dataclass(frozen=True, slots=True)
class Row:
    """What one tenant had of one endpoint on one day (UTC), since the batch before."""

    day: date
    tenant: str
    model: str
    endpoint_id: int  # 0: none was reached
    replica: str | None
    requests: int
    aborted: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class By(StrEnum):
    TENANT = "tenant"
    MODEL = "model"
    DAY = "day"
    REPLICA_SET = "replica-set"


@dataclass(frozen=True, slots=True)
class Line:
    """`name`: of the tenant, model or set, or the day as 2026-11-30; a set that is no longer known is ""."""

    name: str
    requests: int
    aborted: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    gpu_seconds: float


@dataclass(frozen=True, slots=True)
class Report:
    """`gpu_seconds`: of all jobs; those of the lines and the idle ones are as many, unless one tenant was asked for."""

    lines: tuple[Line, ...]
    idle_gpu_seconds: float
    gpu_seconds: float


_COLUMNS = {By.TENANT: "tenant", By.MODEL: "model", By.DAY: "day::text", By.REPLICA_SET: "replica_set"}

# %(first)s to %(end)s are days, %(now)s ends what runs still
_BURNT = """
burnt AS (
    SELECT r.replica, d.day::date AS day,
           sum(r.gpus * extract(epoch FROM least(coalesce(r.ended_at, greatest(r.started_at, %(now)s)),
                                                 (d.day + interval '1 day') AT TIME ZONE 'UTC')
                                           - greatest(r.started_at, d.day AT TIME ZONE 'UTC'))) AS gpu_seconds
      FROM job_runs r
     CROSS JOIN LATERAL generate_series(
               greatest(%(first)s::date, (r.started_at AT TIME ZONE 'UTC')::date)::timestamp,
               least(%(end)s::date - 1,
                     (coalesce(r.ended_at, greatest(r.started_at, %(now)s)) AT TIME ZONE 'UTC')::date)::timestamp,
               interval '1 day') AS d (day)
     WHERE r.started_at < (%(end)s::date)::timestamp AT TIME ZONE 'UTC'
       AND (r.ended_at IS NULL OR r.ended_at > (%(first)s::date)::timestamp AT TIME ZONE 'UTC')
     GROUP BY r.replica, d.day
), used AS (
    SELECT *, prompt_tokens + completion_tokens AS tokens,
           sum(prompt_tokens + completion_tokens) OVER (PARTITION BY replica, day) AS tokens_of_all
      FROM usage WHERE day >= %(first)s AND day < %(end)s
)
"""


async def store(db: Database, worker: str, batch: int, rows: Sequence[Row]) -> bool:
    """Count a batch. False: it was counted before. Batches of a worker are numbered upwards, and sent one by one.

    Raises DbUnavailable: it is not known whether it is counted; send the same batch again.
    """
    async with db.connection() as connection:
        cursor = await connection.execute(
            """
            WITH fresh AS (
                INSERT INTO usage_batches AS b (worker, batch, stored_at) VALUES (%(worker)s, %(batch)s, now())
                ON CONFLICT (worker) DO UPDATE SET batch = excluded.batch, stored_at = excluded.stored_at
                 WHERE b.batch < excluded.batch
                RETURNING worker
            ), counted AS (
                SELECT day, tenant, model, endpoint_id, coalesce(max(replica), '') AS replica,
                       sum(requests) AS requests, sum(aborted) AS aborted, sum(prompt_tokens) AS prompt_tokens,
                       sum(completion_tokens) AS completion_tokens, sum(cached_tokens) AS cached_tokens
                  FROM fresh, jsonb_to_recordset(%(rows)s::jsonb)
                       AS u (day date, tenant text, model text, endpoint_id bigint, replica text, requests bigint,
                             aborted bigint, prompt_tokens bigint, completion_tokens bigint, cached_tokens bigint)
                 GROUP BY day, tenant, model, endpoint_id
            ), by_day AS (
                INSERT INTO usage AS u (day, tenant, model, endpoint_id, replica_set, replica, requests, aborted,
                                        prompt_tokens, completion_tokens, cached_tokens)
                SELECT c.day, c.tenant, c.model, c.endpoint_id,
                       coalesce(e.replica_set, substring(c.replica FROM '^cp-(.*)-[0-9]+$'), ''), c.replica, c.requests,
                       c.aborted, c.prompt_tokens, c.completion_tokens, c.cached_tokens
                  FROM counted c LEFT JOIN endpoints e ON e.id = c.endpoint_id
                 ORDER BY day, tenant, model, endpoint_id -- all workers lock in one order
                ON CONFLICT (day, tenant, model, endpoint_id) DO UPDATE
                SET requests = u.requests + excluded.requests, aborted = u.aborted + excluded.aborted,
                    prompt_tokens = u.prompt_tokens + excluded.prompt_tokens,
                    completion_tokens = u.completion_tokens + excluded.completion_tokens,
                    cached_tokens = u.cached_tokens + excluded.cached_tokens
                RETURNING 1
            ), by_month AS (
                INSERT INTO tenant_months AS m (tenant, month, tokens)
                SELECT tenant, date_trunc('month', day)::date, sum(prompt_tokens + completion_tokens)
                  FROM counted WHERE (SELECT count(*) FROM by_day) > 0 -- after the days, in every worker
                 GROUP BY 1, 2 HAVING sum(prompt_tokens + completion_tokens) > 0 ORDER BY 1, 2
                ON CONFLICT (tenant, month) DO UPDATE SET tokens = m.tokens + excluded.tokens
            )
            SELECT count(*) AS fresh FROM fresh
            """,
            {"worker": worker, "batch": batch, "rows": msgspec.json.encode(rows).decode()},
        )
        row = await cursor.fetchone()
    return row is not None and row["fresh"] == 1


async def report(db: Database, by: By, first: date, end: date, now: datetime, *, tenant: str | None = None) -> Report:
    """From the first day up to, and without, `end`, by name; jobs that run are counted up to `now`.

    `tenant`: only what that one used, with its share of the jobs.
    """
    values = {"first": first, "end": end, "now": now, "tenant": tenant}
    async with db.transaction() as connection:
        await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        cursor = await connection.execute(
            f"""
            WITH {_BURNT}
            SELECT {_COLUMNS[by]} AS name, sum(requests)::bigint AS requests, sum(aborted)::bigint AS aborted,
                   sum(prompt_tokens)::bigint AS prompt_tokens, sum(completion_tokens)::bigint AS completion_tokens,
                   sum(cached_tokens)::bigint AS cached_tokens,
                   coalesce(sum(b.gpu_seconds * u.tokens / nullif(u.tokens_of_all, 0)), 0)::double precision
                       AS gpu_seconds
              FROM used u LEFT JOIN burnt b USING (replica, day)
             WHERE %(tenant)s::text IS NULL OR tenant = %(tenant)s
             GROUP BY 1 ORDER BY 1
            """,
            values,
        )
        lines = tuple(Line(**row) for row in await cursor.fetchall())
        cursor = await connection.execute(
            f"""
            WITH {_BURNT}, served AS (
                SELECT replica, day FROM used WHERE replica <> '' GROUP BY replica, day HAVING sum(tokens) > 0
            )
            SELECT coalesce(sum(b.gpu_seconds), 0)::double precision AS gpu_seconds,
                   coalesce(sum(b.gpu_seconds) FILTER (WHERE s.replica IS NULL), 0)::double precision
                       AS idle_gpu_seconds
              FROM burnt b LEFT JOIN served s USING (replica, day)
            """,
            values,
        )
        row = await cursor.fetchone()
    assert row is not None
    return Report(lines, row["idle_gpu_seconds"], row["gpu_seconds"])


async def load_gpus_held(db: Database) -> dict[tuple[str, str], int]:
    """GPUs of the jobs that run, by replica set and the model that their replicas were made to serve."""
    async with db.connection() as connection:
        cursor = await connection.execute(
            "SELECT replica_set, model, sum(gpus)::bigint AS gpus FROM job_runs WHERE ended_at IS NULL GROUP BY 1, 2"
        )
        return {(row["replica_set"], row["model"]): row["gpus"] for row in await cursor.fetchall()}


async def forget_batches(db: Database, *, older_than: timedelta, now: datetime) -> int:
    """Forget the batch numbers of workers that stored nothing for so long; returns how many went."""
    async with db.connection() as connection:
        cursor = await connection.execute("DELETE FROM usage_batches WHERE stored_at < %s", (now - older_than,))
        return cursor.rowcount
