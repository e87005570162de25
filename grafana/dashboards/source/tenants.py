"""The board *Tenants*: who asks how much, how well it is answered, and who comes to a limit.

Rates are the proxies' own counters; what is of a month is read from the database, where it is kept exactly once. A
month is of UTC, as budgets are. First tokens are told by model: the proxies keep no such times by tenant.
"""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Panel

from grafana.dashboards.source.board import MODEL, TENANTS, Board, cell, label, of_prometheus, of_sql, to_board
from grafana.dashboards.source.panels import (
    Answer,
    Column,
    Limits,
    curves,
    over,
    prose,
    rows_of,
    single,
)
from grafana.dashboards.source.queries import chosen, now, rows, series, sql, sql_series

_TENANT = 'tenant=~"$tenant"'
_ASKED = 'tenant=~"$tenant", model=~"$model"'
_RATE = "[$__rate_interval]"
_RANGE = "[$__range]"
_NO_METRICS = "no requests since the proxies started, or Prometheus does not scrape them"
_THIS_TENANT = to_board(TENANTS, "Only this tenant", tenant=label("tenant"))
_THIS_MODEL = to_board(MODEL, "The model", model=label("model"))
_CHOSEN = chosen("tenant", "tenant")
_MONTH = "date_trunc('month', now() AT TIME ZONE 'UTC')::date"
_BUDGET = over(0.8, 0.95)


def board() -> Board:
    """Requests, tokens, GPU-hours, limits and budgets, by tenant and by model."""
    made = Board(
        uid=TENANTS,
        description="Who uses how much of what, how well is it answered, and who comes to a limit?",
        variables=[
            of_sql(
                "tenant",
                "Tenant",
                "SELECT tenant FROM grafana.tenants ORDER BY tenant",
                description="Whom API keys belong to.",
                many=True,
            ),
            of_prometheus(
                "model",
                "Model",
                'label_values(proxy_requests_total{model!=""}, model)',
                description="Models that were asked for.",
            ),
        ],
        marks="",
        shows_last="6h",
    )
    _at_a_glance(made)
    made.line(8, _requests(), _tokens(), _limits_hit())
    made.line(9, _month(), _top_models())
    _quality(made)
    _days(made)
    return made


def _at_a_glance(board: Board) -> None:
    board.line(
        4,
        single(
            Answer(
                "Requests",
                "Requests that ended, a second, of the chosen tenants and models, whatever became of them.",
                unit="reqps",
                empty=_NO_METRICS,
                decimals=2,
            ),
            series(f"sum(rate(proxy_requests_total{{{_ASKED}}}{_RATE}))", "requests"),
            trend=True,
        ),
        single(
            Answer(
                "Tokens generated",
                "Tokens of answers, a second, as the engines counted them.",
                unit="short",
                empty="no token was generated since the proxies started",
                decimals=0,
            ),
            series(f'sum(rate(proxy_tokens_total{{{_ASKED}, kind="completion"}}{_RATE}))', "tokens"),
            trend=True,
        ),
        single(
            Answer(
                "Failed requests",
                "The share of requests that were answered with 500 or more within the shown time. What clients got "
                "wrong (4xx), and who left before an answer (499), is not in it.",
                unit="percentunit",
                empty="no request in this time",
                limits=over(0.001, 0.01),
                decimals=2,
            ),
            now(
                f'(sum(increase(proxy_requests_total{{{_ASKED}, code=~"5.."}}{_RANGE}))'
                f" or 0 * sum(increase(proxy_requests_total{{{_ASKED}}}{_RANGE})))"
                f" / (sum(increase(proxy_requests_total{{{_ASKED}}}{_RANGE})) > 0)"
            ),
        ),
        single(
            Answer(
                "Refused by limits",
                "Requests that a tenant's limit refused with 429 within the shown time. See which limit, and whose, "
                "below; clients are told when to try again.",
                unit="short",
                empty="no request was refused by a limit: fine",
                limits=over(1, 1000),
                decimals=0,
            ),
            now(f"sum(increase(proxy_limited_requests_total{{{_TENANT}}}{_RANGE}))"),
        ),
        single(
            Answer(
                "First byte, 95 %",
                "From a request to its answer's first byte, waiting for a replica or a turn included, over all tenants "
                "of the chosen models, within the shown time.",
                unit="s",
                empty="no answer in this time",
                limits=over(2.5, 10),
                decimals=2,
            ),
            now(
                "histogram_quantile(0.95, sum by (le)"
                f' (increase(proxy_first_byte_seconds_bucket{{model=~"$model"}}{_RANGE})) > 0)'
            ),
        ),
        single(
            Answer(
                "GPU-hours this month",
                "Of the jobs that served the chosen tenants, shared out by tokens; days on which a replica served "
                "nobody are nobody's. `controlplane usage` tells the same.",
                unit="short",
                empty="nothing was used this month",
                decimals=1,
            ),
            sql(f"""
                SELECT sum(gpu_seconds) / 3600 AS gpu_hours
                  FROM grafana.usage
                 WHERE day >= {_MONTH} AND {_CHOSEN}
            """),
        ),
        single(
            Answer(
                "Fullest budget",
                "The share that is used of the month's token budget, of the tenant that has used most of its own. At "
                "1 its requests are refused until the month ends, or the budget is raised.",
                unit="percentunit",
                empty="no tenant that has a budget has used any of it",
                limits=_BUDGET,
                decimals=0,
            ),
            sql(f"SELECT max(budget_used) AS used FROM grafana.tenants WHERE {_CHOSEN}"),
        ),
        single(
            Answer(
                "Usage lost",
                "Requests whose usage could not be kept while PostgreSQL was away, since the proxies started: they are "
                "in no report.",
                unit="short",
                empty=_NO_METRICS,
                limits=over(1),
                decimals=0,
            ),
            now('sum(proxy_usage_lost_total{kind="requests"})'),
        ),
    )


def _requests() -> Panel:
    return curves(
        Answer(
            "Requests by tenant",
            "Requests that ended, a second. A tenant that fills the replicas only delays others by its share: see its "
            "weight in the table.",
            unit="reqps",
            empty=_NO_METRICS,
            lowest=0,
            links=(_THIS_TENANT,),
        ),
        series(f"sum by (tenant) (rate(proxy_requests_total{{{_ASKED}}}{_RATE}))", "{{tenant}}"),
        is_stacked=True,
    )


def _tokens() -> Panel:
    return curves(
        Answer(
            "Tokens by tenant and kind",
            "As the engines counted them, a second. Cached ones are some of the prompt's that needed no work.",
            unit="short",
            empty="no token was counted since the proxies started",
            lowest=0,
            links=(_THIS_TENANT,),
        ),
        series(f"sum by (tenant, kind) (rate(proxy_tokens_total{{{_ASKED}}}{_RATE}))", "{{tenant}}, {{kind}}"),
    )


def _limits_hit() -> Panel:
    return curves(
        Answer(
            "Limits hit, by kind",
            "Requests a minute that a tenant's limit refused: requests or tokens of a minute, concurrent requests, or "
            "the month's budget.",
            unit="suffix: /min",
            empty="no request was refused by a limit: fine",
            lowest=0,
            limits=over(1),
            links=(_THIS_TENANT,),
        ),
        series(
            f"60 * sum by (tenant, limit) (rate(proxy_limited_requests_total{{{_TENANT}}}{_RATE}))",
            "{{tenant}}, {{limit}}",
        ),
    )


def _month() -> Panel:
    return rows_of(
        Answer(
            "This month by tenant",
            "What each tenant used since the month began (UTC), and what it may use. PROMPT includes CACHED. GPU-hours "
            "are those of the jobs, shared out by tokens.",
            unit="short",
            empty="there is no tenant: controlplane keys create --tenant NAME",
        ),
        [
            Column("tenant", "Tenant", links=(to_board(TENANTS, "Only this tenant", tenant=cell("tenant")),)),
            Column("requests", "Requests", width=85),
            Column("aborted", "Aborted", width=75),
            Column("prompt_tokens", "Prompt", width=80),
            Column("cached_tokens", "Cached", width=80),
            Column("completion_tokens", "Completion", width=95),
            Column("gpu_hours", "GPU-hours", width=90, decimals=1),
            Column("monthly_tokens", "Budget", width=80),
            Column("budget_used", "Used of it", unit="percentunit", width=130, is_bar=True),
            Column("per_minute", "A minute", unit="string", width=150),
            Column("max_concurrent", "At once", width=70),
            Column("weight", "Weight", width=70, decimals=1),
            Column("keys", "Keys", width=55),
            Column("next_key_expires_at", "A key expires", unit="dateTimeFromNow", width=110),
        ],
        sql(f"""
            SELECT t.tenant, u.requests, u.aborted, u.prompt_tokens, u.cached_tokens, u.completion_tokens, u.gpu_hours,
                   t.monthly_tokens, t.budget_used,
                   nullif(concat_ws(', ', t.requests_per_minute || ' requests', t.tokens_per_minute || ' tokens'), '')
                       AS per_minute,
                   t.max_concurrent, t.weight, t.keys, t.next_key_expires_at
              FROM grafana.tenants t
              LEFT JOIN (
                   SELECT tenant, sum(requests) AS requests, sum(aborted) AS aborted,
                          sum(prompt_tokens) AS prompt_tokens, sum(cached_tokens) AS cached_tokens,
                          sum(completion_tokens) AS completion_tokens, sum(gpu_seconds) / 3600 AS gpu_hours
                     FROM grafana.usage
                    WHERE day >= {_MONTH}
                    GROUP BY tenant) u ON u.tenant = t.tenant
             WHERE {chosen("t.tenant", "tenant")}
             ORDER BY u.completion_tokens DESC NULLS LAST
             LIMIT 200
        """),
        width=17,
    )


def _top_models() -> Panel:
    return rows_of(
        Answer(
            "This month by model",
            "What the chosen tenants used of each model since the month began (UTC).",
            unit="short",
            empty="nothing was used this month",
        ),
        [
            Column("model", "Model", links=(to_board(MODEL, "The model", model=cell("model")),)),
            Column("requests", "Requests", width=85),
            Column("tokens", "Tokens", width=80),
            Column("gpu_hours", "GPU-hours", width=90, decimals=1),
            Column("tenants", "Tenants", width=75),
        ],
        sql(f"""
            SELECT model, sum(requests) AS requests, sum(prompt_tokens + completion_tokens) AS tokens,
                   sum(gpu_seconds) / 3600 AS gpu_hours, count(DISTINCT tenant) AS tenants
              FROM grafana.usage
             WHERE day >= {_MONTH} AND {_CHOSEN}
             GROUP BY model
             ORDER BY tokens DESC
             LIMIT 50
        """),
    )


def _quality(board: Board) -> None:
    board.section("How well they are answered")
    board.line(
        8,
        curves(
            Answer(
                "Not answered well, by tenant and status",
                "Requests a minute that were answered with 400 or more. 401: a wrong key; 404: no such model; 429: a "
                "limit; 499: the client left; 503: no replica in time; other 5xx: see the board Fleet.",
                unit="suffix: /min",
                empty="every request was answered well: fine",
                lowest=0,
                limits=over(1),
                links=(_THIS_TENANT,),
            ),
            series(
                f'60 * sum by (tenant, code) (rate(proxy_requests_total{{{_TENANT}, code!~"2.."}}{_RATE})) > 0',
                "{{tenant}}, {{code}}",
            ),
        ),
        curves(
            Answer(
                "First byte by model, 95 %",
                "From a request to its answer's first byte, waiting included, of all tenants: the proxies keep no such "
                "times by tenant.",
                unit="s",
                empty="no answer in this time",
                limits=over(2.5, 10),
                lowest=0,
                links=(_THIS_MODEL,),
            ),
            series(
                "histogram_quantile(0.95, sum by (model, le)"
                f' (rate(proxy_first_byte_seconds_bucket{{model=~"$model"}}{_RATE})) > 0)',
                "{{model}}",
            ),
        ),
        curves(
            Answer(
                "Requests that wait, by model",
                "For a replica to start, or for their turn at full ones. Turns are given by the tenants' weights.",
                unit="short",
                empty="nothing waits: fine",
                decimals=0,
                limits=over(1, 50),
                lowest=0,
                links=(_THIS_MODEL,),
            ),
            series('sum by (model) (proxy_held_requests{model=~"$model"})', "{{model}}"),
            steps=True,
        ),
        rows_of(
            Answer(
                "Who asks for which model",
                "Requests and tokens within the shown time, by tenant and model. No model: one that does not exist.",
                unit="short",
                empty="no request in this time",
                decimals=0,
            ),
            [
                Column("tenant", "Tenant"),
                Column("model", "Model"),
                Column("Value #A", "Requests", width=85),
                Column("Value #B", "Tokens", width=80),
            ],
            rows(f"sum by (tenant, model) (increase(proxy_requests_total{{{_TENANT}}}{_RANGE})) > 0"),
            rows(f'sum by (tenant, model) (increase(proxy_tokens_total{{{_TENANT}, kind!="cached"}}{_RANGE})) > 0'),
            sort_by="Value #B",
            is_descending=True,
        ),
    )


def _days(board: Board) -> None:
    board.section("Day by day, and what to do")
    board.line(
        8,
        curves(
            Answer(
                "Tokens by day and tenant",
                "Tokens of prompts and answers on each day (UTC) of this month.",
                unit="short",
                empty="nothing was used this month",
                lowest=0,
            ),
            sql_series(f"""
                SELECT day::timestamp AT TIME ZONE 'UTC' AS time, tenant AS metric,
                       sum(prompt_tokens + completion_tokens)::double precision AS tokens
                  FROM grafana.usage
                 WHERE day >= {_MONTH} AND {_CHOSEN}
                 GROUP BY day, tenant
                 ORDER BY day
            """),
            is_stacked=True,
            shows_last="31d",
        ),
        curves(
            Answer(
                "Budgets used",
                "The share of its month's token budget that each tenant has used, of those that have one. A line that "
                "will be at 1 before the month ends: raise the budget, or tell the tenant in time.",
                unit="percentunit",
                empty="no tenant has a budget",
                lowest=0,
                limits=_BUDGET,
                links=(_THIS_TENANT,),
            ),
            series(
                f'max by (tenant) (controlplane_tenant_tokens{{{_TENANT}, kind="used"}})'
                f' / (max by (tenant) (controlplane_tenant_tokens{{{_TENANT}, kind="budget"}}) > 0)',
                "{{tenant}}",
            ),
        ),
        rows_of(
            Answer(
                "Months before",
                "Tokens of each month by tenant, as budgets count them.",
                unit="short",
                empty="no month has been counted yet",
            ),
            [
                Column("month", "Month", unit="string", width=90),
                Column("tenant", "Tenant"),
                Column("tokens", "Tokens", width=100, limits=Limits(base="text")),
            ],
            sql(f"""
                SELECT to_char(month, 'YYYY-MM') AS month, tenant, tokens
                  FROM grafana.tenant_months
                 WHERE {_CHOSEN}
                 ORDER BY month DESC, tokens DESC
                 LIMIT 200
            """),
        ),
        prose(
            "What to do about a tenant",
            "Commands for a host from which the control plane's database can be reached.",
            """\
Reports, as tables or for a spreadsheet:

```sh
controlplane usage --by model --tenant TENANT
controlplane usage --by tenant --month 2026-01 --csv
```

Limits; `none` takes one away, and every proxy hears of it within a second:

```sh
controlplane tenants get
controlplane tenants set TENANT --monthly-tokens 2000000000
controlplane tenants set TENANT --requests-per-minute 600 --weight 2
```

Keys: `controlplane keys list`, `controlplane keys create --tenant TENANT`. A new key is shown there once, and nowhere
again.
""",
        ),
    )
