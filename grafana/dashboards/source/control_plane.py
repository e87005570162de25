"""The board *Control plane*: does it hear alerts, does it decide, does Slurm answer it, and what keeps jobs waiting.

What is read from the database tells the same in every control plane, so the greatest is taken; what a process counts is
added up. The job names of Prometheus are not asked for, because a site may have proxies in a job of their own.
"""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Panel

from grafana.dashboards.source.board import (
    CONTROL_PLANE,
    FLEET,
    GPU_NODES,
    REPLICA,
    Board,
    cell,
    label,
    of_prometheus,
    to_board,
)
from grafana.dashboards.source.panels import (
    ANY_IS_BAD,
    Answer,
    Column,
    Limits,
    State,
    bars,
    curves,
    log_lines,
    over,
    prose,
    rows_of,
    single,
    under,
)
from grafana.dashboards.source.queries import chosen, lines, now, rows, series, sql

_SET = 'replica_set=~"$replica_set"'
_CHOSEN = chosen("replica_set", "replica_set")
_RATE = "[$__rate_interval]"
_NO_METRICS = "no metrics: does Prometheus scrape the control plane?"
_THIS_SET = to_board(CONTROL_PLANE, "Only this replica set", replica_set=label("replica_set"))
_STATUS = {"firing": State("red"), "resolved": State("green")}


def board() -> Board:
    """From the webhook to the job id: each step's pace, its errors, and what waits."""
    made = Board(
        uid=CONTROL_PLANE,
        description="Are alerts heard, is there a decision, does Slurm answer, and who runs the loops?",
        variables=[
            of_prometheus(
                "replica_set",
                "Replica set",
                "label_values(controlplane_replicas_desired, replica_set)",
                description="For decisions, waiting jobs and back-off.",
            )
        ],
        marks=_CHOSEN,
    )
    _at_a_glance(made)
    made.line(8, _alerts(), _slurm_latency(), _slurm_errors())
    made.line(7, _decisions(), _pending(), _rounds())
    made.line(8, _alert_rows(), _decision_rows())
    _loops(made)
    _processes(made)
    _words(made)
    return made


def _at_a_glance(board: Board) -> None:
    board.line(
        4,
        single(
            Answer(
                "Lease",
                "How many control planes hold the lease and run the loops: exactly one should. None: no process is up, "
                "or PostgreSQL is away; nothing is scaled meanwhile, and replicas go on.",
                unit="short",
                empty=_NO_METRICS,
                limits=Limits(((1, "green"), (2, "orange")), base="red"),
                decimals=0,
            ),
            now("sum(controlplane_lease_held)"),
            is_alarm=True,
        ),
        single(
            Answer(
                "Database",
                "Whether PostgreSQL answered the newest scrape, of every control plane. `controlplane check` says why "
                "not.",
                unit="short",
                empty=_NO_METRICS,
                limits=under(1, 0.5),
                states={"1": State("green", "answers"), "0": State("red", "away")},
            ),
            now("min(controlplane_database_up)"),
            is_alarm=True,
        ),
        single(
            Answer(
                "Slurm token",
                "How long the token was good for when Slurm was asked last. Tokens made from the key live 45 s and "
                "are always new; one from a file has to be renewed by whoever wrote it.",
                unit="s",
                empty="it does not say, or Slurm cannot be used: see slurmrestd's errors",
                limits=under(20, 5),
                decimals=0,
            ),
            now("min(controlplane_slurm_token_expiry_seconds >= 0)"),
        ),
        single(
            Answer(
                "Slurm calls that failed",
                "Calls of slurmrestd that were not answered well, of all, within 5 minutes. See by operation below, "
                "and `controlplane check`.",
                unit="percentunit",
                empty="no call within 5 minutes: no control plane runs the loops, or no set wants Slurm",
                limits=over(0.01, 0.1),
                decimals=1,
            ),
            now(
                '(sum(rate(controlplane_slurm_request_seconds_count{outcome!="ok"}[5m]))'
                " or 0 * sum(rate(controlplane_slurm_request_seconds_count[5m])))"
                " / (sum(rate(controlplane_slurm_request_seconds_count[5m])) > 0)"
            ),
        ),
        single(
            Answer(
                "Last pull of alerts",
                "How long ago the list of active alerts was last read whole, which heals what webhooks lost. Old: "
                "Grafana or Alertmanager does not answer, or refuses the token.",
                unit="s",
                empty="nothing is pulled: no URL of Grafana or Alertmanager is set",
                limits=over(60, 300),
                decimals=0,
            ),
            now('time() - max(controlplane_round_succeeded_timestamp_seconds{loop="alerts"})'),
        ),
        single(
            Answer(
                "Stale alerts",
                "Firing alerts that nobody confirms any more: they press nothing. Their source is down, or was moved.",
                unit="short",
                empty=_NO_METRICS,
                limits=over(1),
                decimals=0,
            ),
            now("sum(max by (source) (controlplane_alerts_stale)) or 0 * max(controlplane_database_up)"),
        ),
        single(
            Answer(
                "Oldest waiting job",
                "How long Slurm has let the oldest job wait that it has not started. Why: see the panel of reasons.",
                unit="s",
                empty="no job waits: fine",
                limits=over(600, 3600),
                decimals=0,
                links=(to_board(FLEET, "Fleet"),),
            ),
            now(f"max(controlplane_slurm_job_pending_seconds{{{_SET}}})"),
        ),
        single(
            Answer(
                "Sets that back off",
                "Replica sets whose starts fail, or whose jobs are lost soon, again and again: see the table below.",
                unit="short",
                empty=_NO_METRICS,
                limits=ANY_IS_BAD,
                decimals=0,
            ),
            now(
                f"count(max by (replica_set) (controlplane_back_off{{{_SET}}}) > 0)"
                " or 0 * max(controlplane_database_up)"
            ),
        ),
        single(
            Answer(
                "Alert to submit, 95 %",
                "From an alert's start to Slurm's answer to the submit that it caused, within the shown time. Starts "
                "that wait for room, or that back off, count with their wait.",
                unit="s",
                empty="no alert led to a submit in this time",
                limits=over(30, 120),
                decimals=1,
            ),
            now(
                "histogram_quantile(0.95,"
                " sum by (le) (increase(controlplane_alert_to_submit_seconds_bucket[$__range])) > 0)"
            ),
        ),
    )


def _alerts() -> Panel:
    return curves(
        Answer(
            "Alerts that arrived",
            "Alerts by source, and what became of them. Ignored ones are not ours, or have no action; malformed, "
            "unauthorized, overloaded, unavailable and failed deliveries were refused, and nothing was stored.",
            unit="suffix: /min",
            empty="no alert has arrived since the control plane started: send a test from Grafana's contact point",
            lowest=0,
        ),
        series(f"60 * sum by (source, outcome) (rate(controlplane_alerts_total{_RATE}))", "{{source}}, {{outcome}}"),
    )


def _slurm_latency() -> Panel:
    return curves(
        Answer(
            "slurmrestd: time of calls, 95 %",
            "By operation. Lists grow slow with the cluster's queue; above a few seconds rounds are late, and above "
            "the timeout a list is no answer, and nothing is submitted or cancelled.",
            unit="s",
            empty="no call: no control plane runs the loops, or no set wants Slurm",
            limits=over(2.5, 10),
            lowest=0,
        ),
        series(
            "histogram_quantile(0.95, sum by (operation, le)"
            f" (rate(controlplane_slurm_request_seconds_bucket{_RATE})) > 0)",
            "{{operation}}",
        ),
    )


def _slurm_errors() -> Panel:
    return curves(
        Answer(
            "slurmrestd: calls that failed",
            "By operation and how. unreachable: it is away; ambiguous: the answer to a submit was lost, and a list "
            "will tell; rejected: Slurm said no; forbidden: the token; protocol_error: a version that is not known.",
            unit="suffix: /min",
            empty="no call has failed: fine",
            limits=over(1),
            lowest=0,
        ),
        series(
            "60 * sum by (operation, outcome)"
            f' (rate(controlplane_slurm_request_seconds_count{{outcome!="ok"}}{_RATE})) > 0',
            "{{operation}}, {{outcome}}",
        ),
    )


def _decisions() -> Panel:
    return curves(
        Answer(
            "Decisions by reason",
            "Decisions that were recorded, a minute. SCALED_UP and SCALED_DOWN change the count; the others say why it "
            "was not changed though something pressed.",
            unit="suffix: /min",
            empty="no decision since the control plane started: nothing pressed",
            lowest=0,
            links=(_THIS_SET,),
        ),
        series(
            f"60 * sum by (replica_set, reason) (rate(controlplane_decisions_total{{{_SET}}}{_RATE})) > 0",
            "{{replica_set}}, {{reason}}",
        ),
    )


def _pending() -> Panel:
    return curves(
        Answer(
            "Why jobs wait",
            "How long the oldest job of each set has waited, by the first word of Slurm's reason. Priority and "
            "Resources: the cluster is full; others want somebody to do something, see docs/pending.md.",
            unit="s",
            empty="no job waits: fine",
            limits=over(600, 3600),
            lowest=0,
            links=(_THIS_SET,),
        ),
        series(
            f"max by (replica_set, reason) (controlplane_slurm_job_pending_seconds{{{_SET}}})",
            "{{replica_set}}, {{reason}}",
        ),
    )


def _rounds() -> Panel:
    return curves(
        Answer(
            "Rounds that failed",
            "Rounds of a loop that ended with an error, a minute; the next one tries again. The log below says which "
            "error, once for as long as it stays the same.",
            unit="suffix: /min",
            empty="no round has failed: fine",
            limits=over(1),
            lowest=0,
        ),
        series(f"60 * sum by (loop) (rate(controlplane_round_failures_total{_RATE})) > 0", "{{loop}}"),
    )


def _alert_rows() -> Panel:
    return rows_of(
        Answer(
            "Alerts and what became of them",
            "The newest alerts with an action, or that were ignored, within the shown time. `presses`: it is counted "
            "in the next decision; ignored: the words say what its labels lack.",
            unit="string",
            empty="no alert in this time",
        ),
        [
            Column("starts_at", "Since", unit="dateTimeAsIso", width=165),
            Column("name", "Alert", width=180),
            Column("action", "Action", width=95),
            Column("subject", "About", width=120),
            Column("status", "Status", width=80, states=_STATUS),
            Column("outcome", "What became of it", wraps=True),
            Column("source", "Source", width=105),
        ],
        sql("""
            SELECT starts_at, name, action, coalesce(replica, node, replica_set, model) AS subject, status, outcome,
                   source
              FROM grafana.alerts
             WHERE starts_at <= $__timeTo() AND (ends_at IS NULL OR ends_at >= $__timeFrom())
             ORDER BY starts_at DESC
             LIMIT 100
        """),
    )


def _decision_rows() -> Panel:
    return rows_of(
        Answer(
            "Newest decisions",
            "What was decided within the shown time, and why in words. `controlplane why SET` tells it whole, with the "
            "alerts and their values.",
            unit="string",
            empty="nothing was decided in this time",
        ),
        [
            Column("decided_at", "When", unit="dateTimeAsIso", width=165),
            Column("kind", "Kind", width=75, states=_KINDS),
            Column("sentence", "Decision", wraps=True),
            Column("actor", "By", width=110),
        ],
        sql(f"""
            SELECT decided_at, kind, sentence, actor
              FROM grafana.decisions
             WHERE $__timeFilter(decided_at) AND {_CHOSEN}
             ORDER BY decided_at DESC
             LIMIT 100
        """),
    )


def _loops(board: Board) -> None:
    board.section("Loops, lease and starts")
    board.line(
        7,
        curves(
            Answer(
                "Time of rounds, 95 %",
                "How long one round of each loop takes. A round of replicas that takes longer than its interval makes "
                "everything late: look at slurmrestd and the database.",
                unit="s",
                empty="no round: no control plane holds the lease",
                limits=over(5, 30),
                lowest=0,
            ),
            series(
                f"histogram_quantile(0.95, sum by (loop, le) (rate(controlplane_round_seconds_bucket{_RATE})) > 0)",
                "{{loop}}",
            ),
            width=5,
        ),
        bars(
            Answer(
                "Since the last good round",
                "How long ago each loop last ended a round without an error. `alerts` is the pull; `staleness`, "
                "`pauses` and `janitor` have long intervals.",
                unit="s",
                empty="no round has succeeded since the control plane started",
                limits=over(120, 600),
                lowest=0,
            ),
            now("sort_desc(time() - max by (loop) (controlplane_round_succeeded_timestamp_seconds))", "{{loop}}"),
            width=5,
        ),
        rows_of(
            Answer(
                "Who holds the lease",
                "The process that runs the loops, and until when it does unless it renews. The term grows by one with "
                "each new holder: one that grows all the time tells of processes that cannot renew in time.",
                unit="string",
                empty="no process has ever held it",
            ),
            [
                Column("name", "Lease", width=85),
                Column("holder", "Holder"),
                Column("term", "Term", unit="short", width=60),
                Column("expires_at", "Good until", unit="dateTimeFromNow", width=105),
                Column("held", "Held", width=55, states=_HELD),
            ],
            sql("SELECT name, holder, term, expires_at, held::text AS held FROM grafana.leases ORDER BY name"),
            width=6,
        ),
        rows_of(
            Answer(
                "Sets that back off, and why",
                "Sets whose starts failed in a row, when they are tried again, and what the newest failure said. "
                "`controlplane resume SET` tries at once, when the cause is gone.",
                unit="string",
                empty="no set backs off: fine",
            ),
            [
                Column("replica_set", "Set", width=110),
                Column("failures", "Failures", unit="short", width=80),
                Column("next_try_at", "Next try", unit="dateTimeFromNow", width=105),
                Column("replica", "Replica", links=(to_board(REPLICA, "The replica", replica=cell("replica")),)),
                Column("message", "Why", wraps=True),
            ],
            sql("""
                SELECT replica_set, failures, next_try_at, replica, coalesce(reason || ': ', '') || message AS message
                  FROM grafana.back_offs
                 ORDER BY failures DESC
                 LIMIT 50
            """),
            width=8,
        ),
    )
    board.line(
        7,
        curves(
            Answer(
                "Starts that failed",
                "Replicas that ended without ever having been ready, by why: CRASHED, START_TIMEOUT or REJECTED.",
                unit="short",
                empty="no start has failed: fine",
                decimals=0,
                limits=over(1),
                lowest=0,
                links=(_THIS_SET,),
            ),
            series(
                "sum by (replica_set, reason)"
                f" (increase(controlplane_start_failures_total{{{_SET}}}[$__rate_interval])) > 0",
                "{{replica_set}}, {{reason}}",
            ),
        ),
        curves(
            Answer(
                "Slurm token's life",
                "How long the token was good for, each time Slurm was asked. A saw's teeth are renewals; a line that "
                "falls to 0 is a token that nobody renews.",
                unit="s",
                empty="it does not say, or Slurm cannot be used",
                lowest=0,
                limits=under(20, 5),
            ),
            series("min by (instance) (controlplane_slurm_token_expiry_seconds >= 0)", "{{instance}}"),
        ),
        curves(
            Answer(
                "Alert to submit",
                "From an alert's start to Slurm's answer to the submit that it caused: the half, and the slowest "
                "twentieth. Each point tells of as long a time before it as is shown.",
                unit="s",
                empty="no alert led to a submit in this time",
                limits=over(30, 120),
                lowest=0,
            ),
            *(
                series(
                    f"histogram_quantile({share},"
                    " sum by (le) (increase(controlplane_alert_to_submit_seconds_bucket[$__range])) > 0)",
                    words,
                )
                for share, words in ((0.5, "half"), (0.95, "95 %"))
            ),
        ),
        curves(
            Answer(
                "Nodes kept out, by cause",
                "Marks that keep jobs off a node: by an operator, an alert, or failures. Many at once after a change "
                "of the image or the driver is one fault, and not many broken nodes.",
                unit="short",
                empty=_NO_METRICS,
                decimals=0,
                limits=over(1),
                lowest=0,
                links=(to_board(GPU_NODES, "GPU nodes"),),
            ),
            series("max by (cause) (controlplane_nodes_excluded)", "{{cause}}"),
            steps=True,
        ),
    )


def _processes(board: Board) -> None:
    board.section("Processes")
    board.line(
        7,
        curves(
            Answer(
                "Workers and connections",
                "Processes that serve the proxies' ports, and connections of clients and to endpoints, over all "
                "proxies. Workers that jump are being replaced: see the log.",
                unit="short",
                empty="no metrics: does Prometheus scrape the proxies?",
                decimals=0,
                lowest=0,
            ),
            series("sum(proxy_workers)", "workers"),
            series("sum(proxy_open_connections)", "clients"),
            series("sum by (state) (proxy_upstream_connections)", "to endpoints, {{state}}"),
        ),
        curves(
            Answer(
                "Age of the proxies' directory",
                "Since the list of endpoints and keys was last read, of the worker that is furthest behind. It grows "
                "while PostgreSQL is away; the last list stays in use.",
                unit="s",
                empty="no metrics: does Prometheus scrape the proxies?",
                limits=over(30, 300),
                lowest=0,
            ),
            series("max by (instance) (proxy_directory_age_seconds)", "{{instance}}"),
        ),
        curves(
            Answer(
                "The proxies' own time",
                "From a request's last byte to the answer's first that was not spent waiting for an upstream. Some "
                "milliseconds are usual; more wants more workers.",
                unit="s",
                empty="no request was answered in this time",
                limits=over(0.05, 0.25),
                lowest=0,
            ),
            *(
                series(
                    f"histogram_quantile({share}, sum by (le) (rate(proxy_overhead_seconds_bucket{_RATE})) > 0)", words
                )
                for share, words in ((0.5, "half"), (0.99, "99 %"))
            ),
        ),
        curves(
            Answer(
                "Scrapes that succeed",
                "Whether Prometheus gets the metrics of each control plane and proxy: 1 yes, 0 no. The other panels "
                "know nothing of one that is 0.",
                unit="short",
                empty="no such target: is there a scrape job controlplane?",
                decimals=0,
                limits=under(1, 0.5),
                lowest=0,
                highest=1,
            ),
            series('min by (job, instance) (up{job=~"controlplane|proxy"})', "{{job}} {{instance}}"),
            steps=True,
        ),
        rows_of(
            Answer(
                "Who is up",
                "Every control plane and proxy that is scraped. One control plane leads; a process that is both "
                "stands in it twice. A scrape that takes long tells of a busy process or database.",
                unit="short",
                empty="no such target: is there a scrape job controlplane?",
            ),
            [
                Column("instance", "Address"),
                Column("Value #A", "Up", width=50, states={"1": State("green", "yes"), "0": State("red", "no")}),
                Column("Value #B", "Leads", width=60, states={"1": State("green", "yes"), "0": State("text", "no")}),
                Column("Value #C", "Workers", width=75),
                Column("Value #D", "Clients", width=70),
                Column("Value #E", "Scrape", unit="s", width=80, limits=over(1, 5)),
            ],
            rows('min by (instance) (up{job=~"controlplane|proxy"})'),
            rows("max by (instance) (controlplane_lease_held)"),
            rows("sum by (instance) (proxy_workers)"),
            rows("sum by (instance) (proxy_open_connections)"),
            rows('max by (instance) (scrape_duration_seconds{job=~"controlplane|proxy"})'),
            width=8,
        ),
    )


def _words(board: Board) -> None:
    board.section("What was said")
    board.line(
        9,
        log_lines(
            Answer(
                "Warnings and errors",
                "The lines that the control plane and the proxies logged as warning or worse; docs/events.md tells "
                "what each means.",
                unit="string",
                empty="nothing was warned of, or no logs are collected",
            ),
            lines('{app="control-plane"} | json | level=~"(?i)warning|error|critical"'),
            width=10,
        ),
        rows_of(
            Answer(
                "What operators said",
                "Verbs of people and tools, on sets, replicas, nodes, tenants and keys, within the shown time.",
                unit="string",
                empty="no operator said anything in this time",
            ),
            [
                Column("at", "When", unit="dateTimeAsIso", width=165),
                Column("actor", "Who", width=110),
                Column("verb", "Verb", width=100),
                Column("subject", "Of what", width=120),
                Column("reason", "Why", wraps=True),
            ],
            sql("""
                SELECT at, actor, verb, subject, reason
                  FROM grafana.operator_actions
                 WHERE $__timeFilter(at)
                 ORDER BY at DESC
                 LIMIT 200
            """),
            width=8,
        ),
        prose(
            "What to look at, and to do",
            "Commands for a host from which the control plane's database can be reached.",
            """\
```sh
controlplane check                  # settings, database, slurmrestd, token
controlplane get replica-sets -o wide
controlplane why SET                # alerts, decision, jobs, endpoints
controlplane get alerts --all
controlplane get audit
```

Stop all scaling, and let it go on:

```sh
controlplane freeze --all --reason "maintenance" --until 2h
controlplane unfreeze --all
```

Over HTTP: `GET /ready` of the private port names each part and its remedy.
""",
            width=6,
        ),
    )


_KINDS = {"up": State("green"), "down": State("blue"), "refused": State("orange"), "kept": State("text")}
_HELD = {"true": State("green", "yes"), "false": State("red", "no")}
