"""Fleet: is everybody served, by how much hardware, and what is being decided about it. Each row leads to its model."""

from __future__ import annotations

from grafana.dashboards.source.board import FLEET, MODEL, REPLICA, Board, cell, label, of_prometheus, to_board
from grafana.dashboards.source.demand import demand
from grafana.dashboards.source.panels import (
    ANY_IS_BAD,
    NEUTRAL,
    PHASES,
    YES_NO,
    Answer,
    Column,
    Limits,
    State,
    coloured,
    curves,
    over,
    rows_of,
    single,
)
from grafana.dashboards.source.queries import chosen, now, rows, series, sql

MODELS = 'model=~"$model"'
FIRST_TOKEN_OBJECTIVE_SECONDS = 2.5  # as in the recording rules' objective
MODEL_OF_ROW = to_board(MODEL, "Model ${__data.fields.model}", model=cell("model"))
MODEL_OF_SERIES = to_board(MODEL, "Model ${__field.labels.model}", model=label("model"))
DESIRED = f"max by (replica_set, model) (controlplane_replicas_desired{{{MODELS}}})"
ROUTABLE = f"max by (replica_set, model) (controlplane_replicas_routable{{{MODELS}}})"
FAILURES: dict[str, str] = {
    "asked": f"sum by (model) (rate(proxy_requests_total{{{MODELS}}}[5m]))",
    "failed": f'sum by (model) (rate(proxy_requests_total{{code=~"5..", {MODELS}}}[5m]))',
    "broken": f"sum by (model) (rate(proxy_broken_streams_total{{{MODELS}}}[5m]))",
}
FIRING: dict[str, State] = {
    "scale_up": State("blue"),
    "scale_down": State("light-blue"),
    "replace": State("orange"),
    "drain_node": State("orange"),
}


def board() -> Board:
    made = Board(
        FLEET,
        "Is everybody served, by how much hardware, and what is being decided about it?",
        variables=[
            of_prometheus(
                "model",
                "Model",
                "label_values(controlplane_replicas_desired, model)",
                description="Only these models, on every panel that knows models.",
            )
        ],
        marks=chosen("model", "model"),
    )
    _numbers(made)
    _tables(made)
    _demand(made)
    _replicas(made)
    made.section("Every set and every replica")
    _details(made)
    return made


def _numbers(made: Board) -> None:
    broken = f"(sum({FAILURES['failed']}) or vector(0)) + (sum({FAILURES['broken']}) or vector(0))"
    made.line(
        4,
        single(
            Answer(
                "Running",
                "Requests that engines work on now, of all replicas.",
                unit="short",
                empty="no engine is scraped",
                links=(to_board(MODEL, "Model"),),
            ),
            series(f"sum(model:requests_running:sum{{{MODELS}}})", "running"),
            trend=True,
        ),
        single(
            Answer(
                "Waiting in engines",
                "Requests that engines have taken and not begun. A few are normal under load; many for long mean that "
                "replicas are missing, and an alert should be asking for them.",
                unit="short",
                empty="no engine is scraped",
                limits=over(10, 50),
            ),
            series(f"sum(model:requests_waiting:sum{{{MODELS}}})", "waiting"),
            trend=True,
        ),
        single(
            Answer(
                "Held in proxies",
                "Requests that wait in the proxies for a replica or for their turn. They ask for replicas themselves; "
                "above 0 for longer than a start takes, look at the sets' decisions below.",
                unit="short",
                empty="no proxy is scraped",
                limits=over(1, 20),
            ),
            series(f"sum(proxy_held_requests{{{MODELS}}})", "held"),
            trend=True,
        ),
        single(
            Answer(
                "Replicas missing",
                "Wanted and not routable: they wait in Slurm, load, fail, or cannot be had. Red for longer than a "
                "start takes: see which set below, and why.",
                unit="short",
                empty="no control plane is scraped",
                limits=over(1, 3),
            ),
            now(f"sum(clamp_min({DESIRED} - {ROUTABLE}, 0))"),
            is_alarm=True,
        ),
        single(
            Answer(
                "First token, p95",
                "Seconds until the first token that 95 of 100 requests beat, in engines, over the last 5 minutes. "
                f"The objective is {FIRST_TOKEN_OBJECTIVE_SECONDS} s.",
                unit="s",
                empty="no requests in 5 min",
                limits=over(1, FIRST_TOKEN_OBJECTIVE_SECONDS),
                decimals=2,
            ),
            now(
                "histogram_quantile(0.95, sum by (le) "
                f"(model:time_to_first_token_seconds_bucket:rate5m{{{MODELS}}})) >= 0"
            ),
        ),
        single(
            Answer(
                "Failed requests",
                "Share of requests over the last 5 minutes that clients saw fail: a status of 500 or more, or an "
                "answer that broke off.",
                unit="percentunit",
                empty="no requests in 5 min",
                limits=over(0.001, 0.01),
                decimals=2,
            ),
            now(f"({broken}) / (sum({FAILURES['asked']}) > 0)"),
            is_alarm=True,
        ),
        single(
            Answer(
                "GPUs held",
                "GPUs of the jobs that run for these models.",
                unit="short",
                empty="no job runs",
            ),
            now(f"sum(max by (replica_set, model) (controlplane_gpus_held{{{MODELS}}}))"),
        ),
        single(
            Answer(
                "GPUs idle",
                "GPUs that one of our jobs has held for a quarter of an hour and not used, of all models. They cost as "
                "much as busy ones: is min_replicas too high, or does a job hang?",
                unit="short",
                empty="no job's GPU is measured",
                limits=over(1, 8),
            ),
            now('sum(gpu:idle and on (slurm_job_id) up{job="vllm"})'),
        ),
    )


def _tables(made: Board) -> None:
    asked, failed, broken = FAILURES["asked"], FAILURES["failed"], FAILURES["broken"]
    made.line(
        8,
        rows_of(
            Answer(
                "Models",
                "Each model's demand, what serves it, and how well. Click a model to see why it is slow.",
                unit="short",
                empty="no replica set is applied",
            ),
            [
                Column("model", "Model", links=(MODEL_OF_ROW,)),
                Column("Value #A", "Running", width=78),
                Column("Value #B", "Waiting", width=78, limits=over(10, 50)),
                Column("Value #C", "Held", width=62, limits=over(1, 20)),
                Column("Value #D", "Desired", width=78),
                Column("Value #E", "Routable", width=84),
                Column("Value #F", "GPUs", width=62),
                Column("Value #G", "KV p90", unit="percentunit", width=76, decimals=0, limits=over(0.8, 0.95)),
                Column("Value #H", "TTFT p95", unit="s", width=84, decimals=2, limits=over(1, 2.5)),
                Column("Value #I", "Failed", unit="percentunit", width=76, decimals=2, limits=over(0.001, 0.01)),
            ],
            rows(f"sum by (model) (model:requests_running:sum{{{MODELS}}})"),
            rows(f"sum by (model) (model:requests_waiting:sum{{{MODELS}}})"),
            rows(f"sum by (model) (proxy_held_requests{{{MODELS}}})"),
            rows(f"sum by (model) ({DESIRED})"),
            rows(f"sum by (model) ({ROUTABLE})"),
            rows(f"sum by (model) (max by (replica_set, model) (controlplane_gpus_held{{{MODELS}}}))"),
            rows(f"max by (model) (model:kv_cache_usage:p90{{{MODELS}}})"),
            rows(
                "histogram_quantile(0.95, sum by (model, le) "
                f"(model:time_to_first_token_seconds_bucket:rate5m{{{MODELS}}})) >= 0"
            ),
            rows(f"(({failed} or {asked} * 0) + ({broken} or {asked} * 0)) / ({asked} > 0)"),
            width=13,
        ),
        rows_of(
            Answer(
                "What is being decided, and why",
                "The newest decision of each set, in force now: how many replicas, and the reason. A decision that "
                "alerts asked for and that was refused says so.",
                unit="string",
                empty="no replica set is applied",
            ),
            [
                Column("since", "Since", unit="dateTimeFromNow", width=110),
                Column("replica_set", "Set", width=120),
                Column("sentence", "Why", wraps=True),
                Column("model", is_hidden=True),
            ],
            sql(f"""
                SELECT decided_at AS since, name AS replica_set, sentence, model
                  FROM grafana.replica_sets
                 WHERE {chosen("model", "model")}
                 ORDER BY decided_at DESC NULLS LAST
            """),
            width=11,
        ),
    )


def _demand(made: Board) -> None:
    made.line(
        7,
        demand(
            "Demand",
            "Requests that run in engines, wait in engines, and are held in proxies. A growing share that waits is "
            "what scaling up is for.",
            running=f"sum(model:requests_running:sum{{{MODELS}}})",
            waiting=f"sum(model:requests_waiting:sum{{{MODELS}}})",
            held=f"sum(proxy_held_requests{{{MODELS}}})",
        ),
        curves(
            Answer(
                "Desired and routable",
                "Replicas that are wanted, and endpoints that requests are sent to. The distance between them is what "
                "is starting, or failing. Endpoints that Slurm does not run are routable and never desired.",
                unit="short",
                empty="no control plane is scraped",
                lowest=0,
                decimals=0,
                overrides=(coloured("desired", "blue"), coloured("routable", "green")),
            ),
            series(f"sum({DESIRED})", "desired"),
            series(f"sum({ROUTABLE})", "routable"),
            steps=True,
        ),
        curves(
            Answer(
                "First token by model, p95",
                "Seconds until the first token that 95 of 100 requests beat, in engines. Purple marks are decisions.",
                unit="s",
                empty="no requests in this time",
                limits=over(FIRST_TOKEN_OBJECTIVE_SECONDS),
                links=(MODEL_OF_SERIES,),
                lowest=0,
            ),
            series(
                "histogram_quantile(0.95, sum by (model, le) "
                f"(model:time_to_first_token_seconds_bucket:rate5m{{{MODELS}}})) >= 0",
                "{{model}}",
            ),
        ),
        curves(
            Answer(
                "Errors by code",
                "Answers with a status of 400 or more, a second. 429 is a tenant's limit or a full waiting room, 499 "
                "a client that left, 502 to 504 a replica that failed or none at all. Unknown models count, too.",
                unit="reqps",
                empty="no errors in this time",
                lowest=0,
            ),
            series(
                'sum by (code) (rate(proxy_requests_total{code=~"[45]..", model=~"$model|"}[$__rate_interval])) > 0',
                "{{code}}",
            ),
            is_stacked=True,
        ),
    )


def _replicas(made: Board) -> None:
    made.line(
        7,
        curves(
            Answer(
                "Replicas by phase",
                "QUEUED waits in Slurm, RUNNING has its job (and may still load), DRAINING finishes what it has. A "
                "band that does not pass is a start that hangs.",
                unit="short",
                empty="no replica lives",
                lowest=0,
                decimals=0,
                overrides=tuple(coloured(phase, state.colour) for phase, state in PHASES.items()),
            ),
            series(
                "sum by (phase) (max by (replica_set, phase) (controlplane_replicas) "
                f"* on (replica_set) group_left () group by (replica_set) (controlplane_replicas_desired{{{MODELS}}}))",
                "{{phase}}",
            ),
            is_stacked=True,
            steps=True,
        ),
        curves(
            Answer(
                "GPUs held and idle",
                "GPUs of jobs that run, and those of them that were not used for a quarter of an hour.",
                unit="short",
                empty="no job runs",
                lowest=0,
                decimals=0,
                overrides=(coloured("held", "blue"), coloured("idle", "orange")),
            ),
            series(f"sum(max by (replica_set, model) (controlplane_gpus_held{{{MODELS}}}))", "held"),
            series('sum(gpu:idle and on (slurm_job_id) up{job="vllm"})', "idle"),
            steps=True,
        ),
        rows_of(
            Answer(
                "Alerts that fire",
                "As the control plane has heard of them, and what became of each. One that is ignored says why; one "
                "that is stale is confirmed by nobody and does nothing.",
                unit="string",
                empty="no alert fires",
            ),
            [
                Column("since", "Since", unit="dateTimeFromNow", width=110),
                Column("name", "Alert", width=180),
                Column("action", "Action", width=94, states=FIRING),
                Column("subject", "Of", width=120),
                Column("outcome", "Outcome", wraps=True),
                Column("model", is_hidden=True),
            ],
            sql(f"""
                SELECT starts_at AS since, name, action, coalesce(replica, node, replica_set, model) AS subject,
                       outcome, model
                  FROM grafana.alerts
                 WHERE status = 'firing' AND (model IS NULL OR {chosen("model", "model")})
                 ORDER BY starts_at DESC
                 LIMIT 50
            """),
            width=12,
        ),
    )


def _details(made: Board) -> None:
    made.line(
        8,
        rows_of(
            Answer(
                "Sets",
                "Bounds, counts and who has a say: paused takes a set out of service, frozen keeps alerts from scaling "
                "it, pinned holds a count. Failures in a row: it backs off until the next try.",
                unit="short",
                empty="no replica set is applied",
            ),
            [
                Column("replica_set", "Set"),
                Column("model", "Model", links=(MODEL_OF_ROW,)),
                Column("desired", "Desired", width=78),
                Column("routable", "Routable", width=84),
                Column("existing", "Existing", width=80),
                Column("min", "Min", width=56),
                Column("max", "Max", width=56),
                Column("pinned", "Pinned", width=72),
                Column("paused", "Paused", width=76, states=YES_NO),
                Column("frozen", "Frozen", width=76, states=YES_NO),
                Column("mode", "Mode", unit="string", width=84),
                Column("failures", "Failures", width=80, limits=over(1, 3)),
                Column("next_try_at", "Next try", unit="dateTimeFromNow", width=110),
            ],
            sql(f"""
                SELECT name AS replica_set, model, desired, routable, existing, min, max, pinned,
                       paused::text AS paused, frozen::text AS frozen, mode, failures, next_try_at
                  FROM grafana.replica_sets
                 WHERE {chosen("model", "model")}
                 ORDER BY model, priority, name
            """),
        ),
    )
    made.line(
        9,
        rows_of(
            Answer(
                "Replicas",
                "Every replica that has not ended, the newest first, and what it does. Click one for its life.",
                unit="string",
                empty="no replica lives",
            ),
            [
                Column(
                    "replica",
                    "Replica",
                    width=180,
                    links=(
                        to_board(
                            REPLICA, "Replica ${__data.fields.replica}", replica_set="$__all", replica=cell("replica")
                        ),
                    ),
                ),
                Column("model", "Model", width=140, links=(MODEL_OF_ROW,)),
                Column("phase", "Phase", width=110, states=PHASES),
                Column("phase_since", "Since", unit="dateTimeFromNow", width=110),
                Column("slurm_job_id", "Job", width=76),
                Column("node", "Node", width=100),
                Column("gpus", "GPUs", unit="short", width=62),
                Column("ends_at", "Walltime ends", unit="dateTimeFromNow", width=120),
                Column("sentence", "What it does", wraps=True),
            ],
            sql(f"""
                SELECT name AS replica, model, phase, phase_since, slurm_job_id::text AS slurm_job_id, node, gpus,
                       ends_at, sentence
                  FROM grafana.replicas
                 WHERE phase <> 'ENDED' AND {chosen("model", "model")}
                 ORDER BY created_at DESC
                 LIMIT 200
            """),
            width=14,
        ),
        rows_of(
            Answer(
                "Decisions",
                "In the shown time, the newest first. They are the purple marks on the curves.",
                unit="string",
                empty="nothing was decided in this time",
            ),
            [
                Column("time", "When", unit="dateTimeAsLocalNoDateIfToday", width=150),
                Column("sentence", "What and why", wraps=True),
                Column("actor", "Who", width=90),
            ],
            sql(f"""
                SELECT decided_at AS time, sentence, actor
                  FROM grafana.decisions
                 WHERE $__timeFilter(decided_at) AND {chosen("model", "model")}
                 ORDER BY decided_at DESC
                 LIMIT 100
            """),
            width=10,
        ),
    )
    made.line(
        8,
        rows_of(
            Answer(
                "What operators said",
                "Verbs of people and of the command line, in the shown time. Everything that nobody asked for is a "
                "decision instead.",
                unit="string",
                empty="nobody said anything in this time",
            ),
            [
                Column("time", "When", unit="dateTimeAsLocalNoDateIfToday", width=150),
                Column("actor", "Who", width=120),
                Column("verb", "Verb", width=110),
                Column("subject", "Of", width=160),
                Column("reason", "Reason", wraps=True),
            ],
            sql("""
                SELECT at AS time, actor, verb, subject, reason
                  FROM grafana.operator_actions
                 WHERE $__timeFilter(at)
                 ORDER BY at DESC
                 LIMIT 100
            """),
        ),
        single(
            Answer(
                "Starts that failed",
                "Replicas, over the shown time, that ended without ever having been ready: their image, arguments, "
                "memory or node is wrong. The replica's log says which.",
                unit="short",
                empty="no start failed in this time",
                limits=ANY_IS_BAD,
                decimals=0,
            ),
            now(
                "sum by (replica_set, reason) (increase(controlplane_start_failures_total[$__range])) > 0",
                "{{replica_set}} {{reason}}",
            ),
            width=4,
            names=True,
        ),
        single(
            Answer(
                "Hand-overs that are late",
                "Endpoints whose walltime is about to end, and whose successor does not serve yet.",
                unit="short",
                empty="no control plane is scraped",
                limits=Limits(((1, "red"),)),
            ),
            now("sum(max by (replica_set) (controlplane_hand_over_late))"),
            width=4,
            is_alarm=True,
        ),
        single(
            Answer(
                "Nodes kept out",
                "Nodes that no job starts on, by cause. See the board GPU nodes.",
                unit="short",
                empty="no control plane is scraped",
                limits=NEUTRAL,
            ),
            now("max by (cause) (controlplane_nodes_excluded)", "{{cause}}"),
            width=4,
            names=True,
        ),
    )
