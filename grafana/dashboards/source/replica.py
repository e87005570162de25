"""Replica and job: one replica's life from the decision that made it to the end of its job, its load, and its log."""

from __future__ import annotations

from grafana.dashboards.source.board import (
    GPU_NODES,
    MODEL,
    REPLICA,
    Board,
    cell,
    of_sql,
    to_board,
    typed,
)
from grafana.dashboards.source.panels import (
    JOB_STATES,
    PHASES,
    Answer,
    Column,
    State,
    coloured,
    curves,
    log_lines,
    over,
    prose,
    rows_of,
    single,
    states_over_time,
    under,
    word,
)
from grafana.dashboards.source.queries import chosen, lines, now, series, sql

THIS = 'replica="$replica"'
THIS_ROW = chosen("replica", "replica")
THIS_NAME = chosen("name", "replica")
HEALTH = {
    "UNPROVEN": State("light-blue"),
    "READY": State("green"),
    "FAILING": State("red"),
    "none": State("text", "none yet"),
}
WORDS = {**JOB_STATES, **PHASES, **HEALTH}
MODEL_OF_REPLICA = to_board(MODEL, "Its model", model="${model:percentencode}")
NODE_OF_REPLICA = to_board(GPU_NODES, "Its node", node="${node:percentencode}")
COMMANDS = """
Why it is as it is, by name or by job:

```
controlplane why $replica
controlplane why $slurm_job_id
```

Let its requests finish, then end its job; and take that back:

```
controlplane drain $replica --reason "..."
controlplane undrain $replica
```

End its job now (requests in flight break off):

```
controlplane cancel $replica --reason "..."
```

Start no job on its node any more, and replace what runs there:

```
controlplane nodes drain $node --reason "..." --until 4h
```

The same over HTTP, with an operator's own token in the environment:

```
curl -H "Authorization: Bearer $CONTROLPLANE_TOKEN" $api/api/v1/replicas/$replica/why
curl -H "Authorization: Bearer $CONTROLPLANE_TOKEN" -X POST -d '{"reason": "..."}' $api/api/v1/replicas/$replica/drain
```
"""


def board() -> Board:
    made = Board(
        REPLICA,
        "What happened to this replica, what does it do now, and what does its job write?",
        variables=[
            of_sql(
                "replica_set",
                "Replica set",
                "SELECT name FROM grafana.replica_sets WHERE NOT external ORDER BY name",
                description="Whose replicas can be chosen.",
                many=True,
            ),
            of_sql(
                "replica",
                "Replica",
                f"""
                SELECT name FROM grafana.replicas WHERE {chosen("replica_set", "replica_set")}
                ORDER BY created_at DESC LIMIT 500
                """,
                description="The newest first, those that ended included.",
            ),
            of_sql(
                "slurm_job_id",
                "Slurm job",
                f"""
                SELECT slurm_job_id::text FROM grafana.slurm_jobs WHERE {chosen("replica", "replica")}
                ORDER BY slurm_job_id DESC
                """,
                description="The replica's job.",
            ),
            of_sql(
                "node",
                "Node",
                f"SELECT node FROM grafana.replicas WHERE {THIS_NAME} AND node IS NOT NULL",
                description="Where the job runs.",
                is_hidden=True,
            ),
            of_sql(
                "model",
                "Model",
                f"SELECT model FROM grafana.replicas WHERE {THIS_NAME}",
                description="What the replica serves.",
                is_hidden=True,
            ),
            typed(
                "api",
                "Control plane",
                "http://controlplane:9100",
                description="The address of the operators' API, for the commands.",
            ),
        ],
        marks=chosen("model", "model"),
    )
    _state(made)
    _life(made)
    _load(made)
    _log(made)
    made.section("More of its load, and its GPUs")
    _more(made)
    return made


def _state(made: Board) -> None:
    made.line(
        4,
        word(
            Answer(
                "Phase",
                "Where the replica is in its life: PENDING, SUBMITTING, QUEUED, RUNNING, DRAINING, STOPPING, ENDED.",
                unit="string",
                empty="no such replica",
                states=PHASES,
            ),
            sql(f"SELECT phase FROM grafana.replicas WHERE {THIS_NAME}"),
        ),
        word(
            Answer(
                "Slurm's state",
                "What Slurm said of the job last.",
                unit="string",
                empty="no job yet",
                states=JOB_STATES,
            ),
            sql(f"SELECT state FROM grafana.slurm_jobs WHERE {THIS_ROW} ORDER BY slurm_job_id DESC LIMIT 1"),
        ),
        word(
            Answer(
                "Endpoint",
                "UNPROVEN loads, READY gets requests, FAILING got them once.",
                unit="string",
                empty="no endpoint yet",
                states=HEALTH,
            ),
            sql(f"SELECT state FROM grafana.endpoints WHERE {THIS_ROW}"),
        ),
        single(
            Answer(
                "Walltime left",
                "Seconds until Slurm ends the job. The control plane starts a successor in time, and drains this one.",
                unit="dtdurations",
                empty="the job does not run",
                limits=under(1800, 300),
                decimals=0,
            ),
            now(f"min(controlplane_replica_walltime_left_seconds{{{THIS}}})"),
        ),
        word(
            Answer(
                "Node",
                "Where the job runs. Click for its GPUs.",
                unit="string",
                empty="the job has no node",
                links=(NODE_OF_REPLICA,),
            ),
            sql(f"SELECT node FROM grafana.replicas WHERE {THIS_NAME} AND node IS NOT NULL"),
        ),
        word(
            Answer(
                "Model served",
                "Click to compare it with the other replicas of its model.",
                unit="string",
                empty="no such replica",
                links=(MODEL_OF_REPLICA,),
            ),
            sql(f"SELECT model FROM grafana.replicas WHERE {THIS_NAME}"),
        ),
        single(
            Answer(
                "Running now",
                "Requests that the engine works on.",
                unit="short",
                empty="the engine is not scraped",
            ),
            series(f"sum(replica:requests_running{{{THIS}}})", "running"),
            trend=True,
        ),
        single(
            Answer(
                "Waiting now",
                "Requests that the engine has taken and not begun.",
                unit="short",
                empty="the engine is not scraped",
                limits=over(5, 20),
            ),
            series(f"sum(replica:requests_waiting{{{THIS}}})", "waiting"),
            trend=True,
        ),
    )
    made.line(
        3,
        rows_of(
            Answer(
                "In words",
                "What the replica does, and which decision made it.",
                unit="string",
                empty="no such replica",
            ),
            [
                Column("sentence", "It", wraps=True),
                Column("made_because", "Made because", wraps=True),
                Column("created_at", "Made", unit="dateTimeFromNow", width=120),
                Column("ready_at", "Ready", unit="dateTimeFromNow", width=120),
                Column("ended_at", "Ended", unit="dateTimeFromNow", width=120),
                Column("cut_requests", "Requests cut", unit="short", width=110, limits=over(1)),
            ],
            sql(f"""
                SELECT sentence, made_because, created_at, ready_at, ended_at, cut_requests
                  FROM grafana.replicas
                 WHERE {THIS_NAME}
            """),
        ),
    )


def _life(made: Board) -> None:
    def states(name: str, view: str, column: str, *, ends: bool = False) -> str:
        """`ends`: nothing is shown after the replica's end; its last state would go on for ever."""
        end = f"""
             UNION ALL
            SELECT ended_at, NULL
              FROM grafana.replicas
             WHERE {THIS_NAME} AND $__timeFilter(ended_at)
        """
        return f"""
            SELECT greatest(began_at, $__timeFrom()) AS time, {column} AS "{name}"
              FROM grafana.{view}
             WHERE {THIS_ROW} AND began_at <= $__timeTo() AND coalesce(ended_at, 'infinity') >= $__timeFrom()
            {end.strip() if ends else ""}
             ORDER BY time
        """

    made.line(
        6,
        states_over_time(
            Answer(
                "Life",
                "The replica's phases, what Slurm said of its job, and its endpoint's health, one below the other: a "
                "long PENDING in Slurm is a full cluster, a long UNPROVEN is a model that loads or hangs.",
                unit="string",
                empty="it did not live in this time",
                states=WORDS,
            ),
            sql(states("replica", "replica_phases", "phase")),
            sql(states("Slurm job", "slurm_job_states", "state")),
            sql(states("endpoint", "endpoint_states", "state", ends=True)),
        ),
    )


def _load(made: Board) -> None:
    made.line(
        6,
        curves(
            Answer(
                "Requests in the engine",
                "Running, and waiting to be begun.",
                unit="short",
                empty="the engine was not scraped in this time",
                lowest=0,
                overrides=(coloured("running", "green"), coloured("waiting", "yellow")),
            ),
            series(f"sum(replica:requests_running{{{THIS}}})", "running"),
            series(f"sum(replica:requests_waiting{{{THIS}}})", "waiting"),
            is_stacked=True,
        ),
        curves(
            Answer(
                "KV cache and prefix hits",
                "Share of the cache in use, and of prompts' tokens that were found in it.",
                unit="percentunit",
                empty="the engine was not scraped in this time",
                limits=over(0.9),
                lowest=0,
                highest=1,
            ),
            series(f"max(replica:kv_cache_usage:ratio{{{THIS}}})", "in use"),
            series(f"max(replica:prefix_cache_hits:ratio5m{{{THIS}}})", "prefix hits"),
        ),
        curves(
            Answer(
                "Tokens in a second",
                "Generated, and read from prompts. None while requests run: the engine hangs.",
                unit="suffix: tok/s",
                empty="the engine was not scraped in this time",
                lowest=0,
                overrides=(coloured("generated", "green"), coloured("of prompts", "blue")),
            ),
            series(f"sum(replica:generation_tokens:rate1m{{{THIS}}})", "generated"),
            series(f"sum(replica:prompt_tokens:rate1m{{{THIS}}})", "of prompts"),
        ),
        curves(
            Answer(
                "Latencies, p95",
                "To the first token, between tokens, and in the engine's queue.",
                unit="s",
                empty="no requests in this time",
                lowest=0,
            ),
            *(
                series(f"histogram_quantile(0.95, sum by (le) (replica:{name}_bucket:rate5m{{{THIS}}})) >= 0", legend)
                for name, legend in (
                    ("time_to_first_token_seconds", "first token"),
                    ("inter_token_latency_seconds", "between tokens"),
                    ("request_queue_time_seconds", "in the queue"),
                )
            ),
        ),
    )


def _log(made: Board) -> None:
    made.line(
        12,
        log_lines(
            Answer(
                "The job's log",
                "What the job wrote, the newest first, found by its id. Nothing here while the job runs: does Alloy "
                "read the job directory?",
                unit="string",
                empty="Loki has no line of this job in this time",
            ),
            lines('{app="vllm"} | slurm_job_id="$slurm_job_id" | slurm_job_id!=""'),
            width=15,
        ),
        prose(
            "Commands for this replica",
            "To be copied into a shell that has the control plane's settings; `--dry-run` says what would be.",
            COMMANDS.strip(),
            width=9,
        ),
    )
    made.line(
        7,
        rows_of(
            Answer(
                "Steps",
                "Every step of its life, with its reason and who took it.",
                unit="string",
                empty="no such replica",
            ),
            [
                Column("time", "When", unit="dateTimeAsLocal", width=170),
                Column("phase", "Phase", width=110, states=PHASES),
                Column("reason", "Reason", width=170),
                Column("message", "Message", wraps=True),
                Column("slurm_job_id", "Job", width=80),
                Column("actor", "Who", width=100),
            ],
            sql(f"""
                SELECT began_at AS time, phase, reason, message, slurm_job_id::text AS slurm_job_id, actor
                  FROM grafana.replica_phases
                 WHERE {THIS_ROW}
                 ORDER BY began_at DESC
                 LIMIT 100
            """),
            width=15,
        ),
        rows_of(
            Answer(
                "What Slurm said",
                "Each thing that Slurm said of the job, and the reason it gave for letting it wait.",
                unit="string",
                empty="Slurm was not asked yet",
            ),
            [
                Column("time", "When", unit="dateTimeAsLocal", width=170),
                Column("raw_state", "State", width=130),
                Column("reason", "Reason"),
                Column("node", "Node", width=100),
            ],
            sql(f"""
                SELECT began_at AS time, raw_state, reason, node
                  FROM grafana.slurm_job_states
                 WHERE {THIS_ROW}
                 ORDER BY began_at DESC
                 LIMIT 100
            """),
            width=9,
        ),
    )


def _more(made: Board) -> None:
    made.line(
        7,
        curves(
            Answer(
                "Walltime left, over time",
                "It jumps where a job is extended or started anew.",
                unit="dtdurations",
                empty="the job did not run in this time",
                limits=under(1800, 300),
                lowest=0,
            ),
            series(f"min(controlplane_replica_walltime_left_seconds{{{THIS}}})", "left"),
        ),
        curves(
            Answer(
                "Why its answers ended",
                "`stop` is a whole answer, `length` one that met its limit, `abort` one whose client left.",
                unit="reqps",
                empty="no request finished in this time",
                lowest=0,
            ),
            series(f"sum by (finished_reason) (replica:requests_finished:rate5m{{{THIS}}}) > 0", "{{finished_reason}}"),
            is_stacked=True,
        ),
        curves(
            Answer(
                "Preemptions",
                "Requests that the engine had to begin anew, in a second, because its cache was full.",
                unit="cps",
                empty="the engine was not scraped in this time",
                lowest=0,
            ),
            series(f"sum(replica:preemptions:rate5m{{{THIS}}})", "preempted"),
        ),
        curves(
            Answer(
                "Since it was confirmed",
                "Seconds since the endpoint last passed a probe. It climbs while the engine is frozen.",
                unit="s",
                empty="it has not been ready in this time",
                limits=over(30),
                lowest=0,
            ),
            series(f"min(controlplane_endpoint_last_confirmed_age_seconds{{{THIS}}})", "age"),
        ),
    )
    made.line(
        7,
        curves(
            Answer(
                "Its GPUs' use",
                "Share of the time in which something ran on the GPU. Near 100 % says little about load; near 0 while "
                "requests run says that the engine hangs.",
                unit="percent",
                empty="no exporter maps GPUs to this job",
                links=(NODE_OF_REPLICA,),
                lowest=0,
                highest=100,
            ),
            series('max by (node, gpu) (DCGM_FI_DEV_GPU_UTIL{slurm_job_id="$slurm_job_id"})', "{{node}} GPU {{gpu}}"),
        ),
        curves(
            Answer(
                "Its GPUs' memory",
                "In use. vLLM takes its share at once, and keeps it.",
                unit="mbytes",
                empty="no exporter maps GPUs to this job",
                lowest=0,
            ),
            series('max by (node, gpu) (DCGM_FI_DEV_FB_USED{slurm_job_id="$slurm_job_id"})', "{{node}} GPU {{gpu}}"),
        ),
        curves(
            Answer(
                "Its GPUs' power",
                "A GPU that draws little while the others draw much waits for them, or is throttled.",
                unit="watt",
                empty="no exporter maps GPUs to this job",
                lowest=0,
            ),
            series(
                'max by (node, gpu) (DCGM_FI_DEV_POWER_USAGE{slurm_job_id="$slurm_job_id"})', "{{node}} GPU {{gpu}}"
            ),
        ),
    )
    made.line(
        7,
        rows_of(
            Answer(
                "Others of its set",
                "Replicas of the same set that live or ended in the shown time. Click one to see it here.",
                unit="string",
                empty="there is no other",
            ),
            [
                Column(
                    "replica",
                    "Replica",
                    width=200,
                    links=(
                        to_board(REPLICA, "${__data.fields.replica}", replica_set="$__all", replica=cell("replica")),
                    ),
                ),
                Column("phase", "Phase", width=110, states=PHASES),
                Column("node", "Node", width=110),
                Column("replaces", "In the place of", width=200),
                Column("sentence", "What it does", wraps=True),
            ],
            sql(f"""
                SELECT others.name AS replica, others.phase, others.node, others.replaces, others.sentence
                  FROM grafana.replicas AS others
                  JOIN grafana.replicas AS this ON this.replica_set = others.replica_set AND this.name <> others.name
                 WHERE {chosen("this.name", "replica")}
                   AND coalesce(others.ended_at, 'infinity') >= $__timeFrom() AND others.created_at <= $__timeTo()
                 ORDER BY others.created_at DESC
                 LIMIT 100
            """),
        ),
    )
