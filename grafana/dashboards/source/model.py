"""Model: is this model slow, and where: in the queue, in the engines, or in one replica of it?"""

from __future__ import annotations

from grafana.dashboards.source.board import MODEL, REPLICA, Board, cell, label, of_prometheus, to_board
from grafana.dashboards.source.demand import demand
from grafana.dashboards.source.panels import (
    PHASES,
    Answer,
    Column,
    Limits,
    coloured,
    curves,
    over,
    rows_of,
    single,
    states_over_time,
)
from grafana.dashboards.source.queries import Query, chosen, now, rows, series, sql

OF_MODEL = 'model="$model"'
OF_SETS = 'model="$model", replica_set=~"$replica_set"'
FIRST_TOKEN_OBJECTIVE_SECONDS = 2.5  # as in the recording rules' objective
OBJECTIVE_MISSED = 0.1  # the objective allows one of ten
BY_REPLICA = "model, replica_set, replica, node, slurm_job_id"
DESIRED = f"max by (replica_set, model) (controlplane_replicas_desired{{{OF_SETS}}})"
ROUTABLE = f"max by (replica_set, model) (controlplane_replicas_routable{{{OF_SETS}}})"
QUANTILES = (0.5, 0.95, 0.99)
REPLICA_OF_ROW = to_board(REPLICA, "Replica ${__data.fields.replica}", replica_set="$__all", replica=cell("replica"))
REPLICA_OF_SERIES = to_board(
    REPLICA, "Replica ${__field.labels.replica}", replica_set="$__all", replica=label("replica")
)


def board() -> Board:
    made = Board(
        MODEL,
        "Is this model slow, and where: in the queue, in the engines, or in one replica of it?",
        variables=[
            of_prometheus(
                "model",
                "Model",
                "label_values(controlplane_replicas_desired, model)",
                description="The model, as clients name it.",
                many=False,
            ),
            of_prometheus(
                "replica_set",
                "Replica set",
                'label_values(controlplane_replicas_desired{model="$model"}, replica_set)',
                description="Only replicas of these sets, where a panel knows replicas.",
            ),
        ],
        marks=f"{chosen('model', 'model')} AND {chosen('replica_set', 'replica_set')}",
    )
    _numbers(made)
    _latencies(made)
    _engines(made)
    _replicas(made)
    made.section("What clients get")
    _answers(made)
    made.section("How many there are, and why")
    _counts(made)
    return made


def _at(share: float, buckets: str, *, by: str = "") -> str:
    """The quantile of rates of buckets; nothing where nothing was observed."""
    labels = f"{by}, le" if by else "le"
    return f"histogram_quantile({share}, sum by ({labels}) ({buckets}{{{OF_SETS}}})) >= 0"


def _quantiles(buckets: str) -> list[Query]:
    return [series(_at(share, buckets), f"p{share * 100:g}") for share in QUANTILES]


def _numbers(made: Board) -> None:
    made.line(
        4,
        single(
            Answer(
                "Running",
                "Requests that the engines work on now.",
                unit="short",
                empty="no engine is scraped",
            ),
            series(f"sum(replica:requests_running{{{OF_SETS}}})", "running"),
            trend=True,
        ),
        single(
            Answer(
                "Waiting",
                "Requests that engines have taken and not begun, and those that the proxies hold. Much for long: "
                "replicas are missing.",
                unit="short",
                empty="nothing is scraped",
                limits=over(10, 50),
            ),
            series(
                f"(sum(replica:requests_waiting{{{OF_SETS}}}) or vector(0)) "
                f"+ (sum(proxy_held_requests{{{OF_MODEL}}}) or vector(0))",
                "waiting",
            ),
            trend=True,
        ),
        single(
            Answer(
                "Routable replicas",
                "Endpoints that requests are sent to. Red: nobody is served.",
                unit="short",
                empty="no control plane is scraped",
                limits=Limits(((1, "green"),), base="red"),
            ),
            now(f"sum({ROUTABLE})"),
        ),
        single(
            Answer(
                "Missing replicas",
                "Wanted and not routable: waiting in Slurm, loading, or failing. The table of replicas says which.",
                unit="short",
                empty="no control plane is scraped",
                limits=over(1, 3),
            ),
            now(f"sum(clamp_min({DESIRED} - {ROUTABLE}, 0))"),
            is_alarm=True,
        ),
        single(
            Answer(
                "First token p95",
                "Seconds to the first token that 95 of 100 requests beat, over the last 5 minutes; the objective is "
                f"{FIRST_TOKEN_OBJECTIVE_SECONDS} s.",
                unit="s",
                empty="no requests in 5 min",
                limits=over(1, FIRST_TOKEN_OBJECTIVE_SECONDS),
                decimals=2,
            ),
            now(_at(0.95, "replica:time_to_first_token_seconds_bucket:rate5m")),
        ),
        single(
            Answer(
                "Between tokens p95",
                "Seconds from one token to the next that 95 of 100 tokens beat. A person reads about ten tokens a "
                "second.",
                unit="s",
                empty="no tokens in 5 min",
                limits=over(0.1, 0.25),
                decimals=3,
            ),
            now(_at(0.95, "replica:inter_token_latency_seconds_bucket:rate5m")),
        ),
        single(
            Answer(
                "Objective missed, 1 h",
                f"Share of requests in the last hour that waited longer than {FIRST_TOKEN_OBJECTIVE_SECONDS} s for "
                "their first token. The objective allows a tenth.",
                unit="percentunit",
                empty="no requests in an hour",
                limits=over(OBJECTIVE_MISSED / 2, OBJECTIVE_MISSED),
                decimals=1,
            ),
            now(f"max(model:ttft_objective_missed:ratio1h{{{OF_MODEL}}})"),
            is_alarm=True,
        ),
        single(
            Answer(
                "Tokens generated",
                "By all replicas of the chosen sets, in a second.",
                unit="suffix: tok/s",
                empty="no engine is scraped",
                decimals=0,
            ),
            series(f"sum(replica:generation_tokens:rate1m{{{OF_SETS}}})", "generated"),
            trend=True,
        ),
    )


def _latencies(made: Board) -> None:
    made.line(
        7,
        curves(
            Answer(
                "Time to first token",
                "In engines, from a request's arrival to its first token. It is current: a queue shows here first.",
                unit="s",
                empty="no requests in this time",
                limits=over(FIRST_TOKEN_OBJECTIVE_SECONDS),
                lowest=0,
            ),
            *_quantiles("replica:time_to_first_token_seconds_bucket:rate5m"),
        ),
        curves(
            Answer(
                "Time between tokens",
                "From one token to the next. It grows with the batch, and with preemptions.",
                unit="s",
                empty="no tokens in this time",
                lowest=0,
            ),
            *_quantiles("replica:inter_token_latency_seconds_bucket:rate5m"),
        ),
        curves(
            Answer(
                "Whole requests",
                "From arrival to the last token. Told when a request finishes, so under load it is late by its length.",
                unit="s",
                empty="no request finished in this time",
                lowest=0,
            ),
            *_quantiles("replica:e2e_request_latency_seconds_bucket:rate5m"),
        ),
        curves(
            Answer(
                "Time in the engine's queue",
                "From arrival to the begin of work. Told when a request finishes: now look at what waits.",
                unit="s",
                empty="no request finished in this time",
                lowest=0,
            ),
            *_quantiles("replica:request_queue_time_seconds_bucket:rate5m"),
        ),
    )


def _engines(made: Board) -> None:
    made.line(
        7,
        demand(
            "Running and waiting",
            "Requests that run in engines, wait in engines, and are held in proxies.",
            running=f"sum(replica:requests_running{{{OF_SETS}}})",
            waiting=f"sum(replica:requests_waiting{{{OF_SETS}}})",
            held=f"sum(proxy_held_requests{{{OF_MODEL}}})",
        ),
        curves(
            Answer(
                "KV cache by replica",
                "Share of the cache in use. Full is normal with prefix caching; full while requests wait is pressure, "
                "and preemptions follow.",
                unit="percentunit",
                empty="no engine is scraped",
                limits=over(0.9),
                links=(REPLICA_OF_SERIES,),
                lowest=0,
                highest=1,
            ),
            series(f"max by (replica) (replica:kv_cache_usage:ratio{{{OF_SETS}}})", "{{replica}}"),
        ),
        curves(
            Answer(
                "Tokens",
                "Generated, and read from prompts, in a second.",
                unit="suffix: tok/s",
                empty="no engine is scraped",
                lowest=0,
                overrides=(coloured("generated", "green"), coloured("of prompts", "blue")),
            ),
            series(f"sum(replica:generation_tokens:rate1m{{{OF_SETS}}})", "generated"),
            series(f"sum(replica:prompt_tokens:rate1m{{{OF_SETS}}})", "of prompts"),
        ),
        curves(
            Answer(
                "Prefix cache hits by replica",
                "Share of prompts' tokens that were found in the cache. Low where conversations go on: is the set's "
                "routing by affinity?",
                unit="percentunit",
                empty="no prompts in this time",
                links=(REPLICA_OF_SERIES,),
                lowest=0,
                highest=1,
            ),
            series(f"max by (replica) (replica:prefix_cache_hits:ratio5m{{{OF_SETS}}})", "{{replica}}"),
        ),
    )


def _replicas(made: Board) -> None:
    made.line(
        8,
        rows_of(
            Answer(
                "Replicas that serve",
                "Each engine's load and speed side by side: one that is slower than the others, or has less to do, is "
                "worth a click.",
                unit="short",
                empty="no engine is scraped",
            ),
            [
                Column("replica", "Replica", links=(REPLICA_OF_ROW,)),
                Column("node", "Node", width=110),
                Column("slurm_job_id", "Job", width=80),
                Column("Value #A", "Running", width=80),
                Column("Value #B", "Waiting", width=80, limits=over(5, 20)),
                Column("Value #C", "KV cache", unit="percentunit", width=130, decimals=0, is_bar=True),
                Column("Value #D", "tok/s", width=76, decimals=0),
                Column("Value #E", "TTFT p95", unit="s", width=86, decimals=2, limits=over(1, 2.5)),
                Column("Value #F", "ITL p95", unit="s", width=80, decimals=3, limits=over(0.1, 0.25)),
                Column("Value #G", "Preempted", unit="cps", width=96, decimals=2, limits=over(0.01, 1)),
                Column("model", is_hidden=True),
                Column("replica_set", is_hidden=True),
            ],
            rows(f"sum by ({BY_REPLICA}) (replica:requests_running{{{OF_SETS}}})"),
            rows(f"sum by ({BY_REPLICA}) (replica:requests_waiting{{{OF_SETS}}})"),
            rows(f"max by ({BY_REPLICA}) (replica:kv_cache_usage:ratio{{{OF_SETS}}})"),
            rows(f"sum by ({BY_REPLICA}) (replica:generation_tokens:rate1m{{{OF_SETS}}})"),
            rows(_at(0.95, "replica:time_to_first_token_seconds_bucket:rate5m", by=BY_REPLICA)),
            rows(_at(0.95, "replica:inter_token_latency_seconds_bucket:rate5m", by=BY_REPLICA)),
            rows(f"sum by ({BY_REPLICA}) (replica:preemptions:rate5m{{{OF_SETS}}})"),
            width=15,
        ),
        rows_of(
            Answer(
                "Decisions",
                "In the shown time, the newest first: how many were wanted, and why. They are the purple marks.",
                unit="string",
                empty="nothing was decided in this time",
            ),
            [
                Column("time", "When", unit="dateTimeAsLocalNoDateIfToday", width=150),
                Column("sentence", "What and why", wraps=True),
            ],
            sql(f"""
                SELECT decided_at AS time, sentence
                  FROM grafana.decisions
                 WHERE $__timeFilter(decided_at)
                   AND {chosen("model", "model")} AND {chosen("replica_set", "replica_set")}
                 ORDER BY decided_at DESC
                 LIMIT 100
            """),
            width=9,
        ),
    )


def _answers(made: Board) -> None:
    made.line(
        7,
        curves(
            Answer(
                "Answers by code",
                "What the proxies answered, in a second. 429: a limit, or a full waiting room. 499: the client left.",
                unit="reqps",
                empty="no requests in this time",
                lowest=0,
            ),
            series(f"sum by (code) (rate(proxy_requests_total{{{OF_MODEL}}}[$__rate_interval])) > 0", "{{code}}"),
            is_stacked=True,
        ),
        curves(
            Answer(
                "Why answers ended",
                "As engines count them: `stop` is a whole answer, `length` one that met its limit, `abort` one whose "
                "client left or whose engine gave up.",
                unit="reqps",
                empty="no request finished in this time",
                lowest=0,
            ),
            series(
                f"sum by (finished_reason) (replica:requests_finished:rate5m{{{OF_SETS}}}) > 0", "{{finished_reason}}"
            ),
            is_stacked=True,
        ),
        curves(
            Answer(
                "What went wrong",
                "Requests tried again at another endpoint by reason, answers that broke off after they had begun, and "
                "clients that left, in a second. Retries are not seen by clients; broken answers are.",
                unit="reqps",
                empty="nothing went wrong in this time",
                lowest=0,
                overrides=(coloured("answers that broke", "red"), coloured("clients that left", "blue")),
            ),
            series(f"sum(rate(proxy_broken_streams_total{{{OF_MODEL}}}[$__rate_interval])) > 0", "answers that broke"),
            series(
                f"sum(rate(proxy_client_disconnects_total{{{OF_MODEL}}}[$__rate_interval])) > 0", "clients that left"
            ),
            series(
                f"sum by (reason) (rate(proxy_upstream_retries_total{{{OF_MODEL}}}[$__rate_interval])) > 0",
                "tried again: {{reason}}",
            ),
        ),
        curves(
            Answer(
                "First byte at the proxy",
                "From a request to the first byte of its answer, waiting in the proxy included: what clients feel, "
                "for streams. Where it is far above the time to first token, requests wait for a replica.",
                unit="s",
                empty="no requests in this time",
                lowest=0,
            ),
            *(
                series(
                    f"histogram_quantile({share}, sum by (le) "
                    f"(rate(proxy_first_byte_seconds_bucket{{{OF_MODEL}}}[$__rate_interval]))) >= 0",
                    f"p{share * 100:g}",
                )
                for share in QUANTILES
            ),
        ),
    )


def _counts(made: Board) -> None:
    made.line(
        8,
        states_over_time(
            Answer(
                "Lives of the replicas",
                "Phases of every replica that lived in the shown time. Long yellow: Slurm has no room.",
                unit="string",
                empty="no replica lived in this time",
                states=PHASES,
            ),
            sql(f"""
                SELECT greatest(began_at, $__timeFrom()) AS time, replica, phase
                  FROM grafana.replica_phases
                 WHERE {chosen("model", "model")} AND {chosen("replica_set", "replica_set")}
                   AND began_at <= $__timeTo() AND coalesce(ended_at, 'infinity') >= $__timeFrom()
                 ORDER BY time
            """),
            width=12,
            one_line_for="replica",
        ),
        curves(
            Answer(
                "Desired and routable replicas",
                "What is wanted, and what requests are sent to, of the chosen sets.",
                unit="short",
                empty="no control plane is scraped",
                lowest=0,
                decimals=0,
                overrides=(coloured("desired", "blue"), coloured("routable", "green")),
            ),
            series(f"sum({DESIRED})", "desired"),
            series(f"sum({ROUTABLE})", "routable"),
            width=6,
            steps=True,
        ),
        curves(
            Answer(
                "Objective missed, by window",
                "Share of requests that waited too long for their first token. An alert looks at a short window and a "
                "long one together.",
                unit="percentunit",
                empty="no requests in this time",
                limits=over(OBJECTIVE_MISSED),
                lowest=0,
            ),
            *(
                series(f"max(model:ttft_objective_missed:ratio{window}{{{OF_MODEL}}})", window)
                for window in ("5m", "30m", "1h", "6h")
            ),
            width=6,
        ),
    )
    made.line(
        8,
        rows_of(
            Answer(
                "Sets of this model",
                "Counts, bounds, and the newest decision of each set, with its reason.",
                unit="short",
                empty="no set serves this model",
            ),
            [
                Column("replica_set", "Set", width=140),
                Column("desired", "Desired", width=80),
                Column("routable", "Routable", width=84),
                Column("bounds", "Bounds", unit="string", width=80),
                Column("state", "State", unit="string", width=170),
                Column("sentence", "Why", unit="string", wraps=True),
            ],
            sql(f"""
                SELECT name AS replica_set, desired, routable, min || ' to ' || max AS bounds,
                       concat_ws(', ', CASE WHEN paused THEN 'paused' END, CASE WHEN frozen THEN 'frozen' END,
                                 'pinned to ' || pinned, CASE WHEN mode <> 'active' THEN mode END,
                                 CASE WHEN failures > 0 THEN failures || ' failures' END) AS state, sentence
                  FROM grafana.replica_sets
                 WHERE {chosen("model", "model")} AND {chosen("name", "replica_set")}
                 ORDER BY priority, name
            """),
            width=14,
        ),
        rows_of(
            Answer(
                "Commands for operators",
                "To be copied into a shell that has the control plane's settings. `--reason` is kept for those who ask "
                "later, and `--dry-run` says what would be.",
                unit="string",
                empty="no set serves this model",
            ),
            [Column("what", "To", width=210), Column("command", "Command", wraps=True)],
            sql(f"""
                SELECT what, command
                  FROM grafana.replica_sets
                 CROSS JOIN LATERAL (VALUES
                       ('tell why it is as it is', 'controlplane why ' || name),
                       ('want one more', 'controlplane scale ' || name || ' --replicas ' || desired + 1),
                       ('hold this count for 2 h', 'controlplane scale ' || name || ' ' || desired || ' --until 2h'),
                       ('keep alerts from scaling it', 'controlplane freeze ' || name || ' --until 2h'),
                       ('let them again', 'controlplane unfreeze ' || name),
                       ('take it out of service', 'controlplane pause ' || name || ' --until 2h'),
                       ('put it back', 'controlplane resume ' || name)) AS verbs (what, command)
                 WHERE {chosen("model", "model")} AND {chosen("name", "replica_set")}
                 ORDER BY priority, name
            """),
            width=10,
        ),
    )
