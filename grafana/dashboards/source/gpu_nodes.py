"""The board *GPU nodes*: who holds which GPU, whether it is used, and whether it is well. From dcgm-exporter, by
Slurm's job ids, and from the nodes that the control plane keeps out.

A GPU's series come once for each of its jobs (`slurm_job_id`), and have other labels when the job changes: every query
takes the greatest of a GPU's copies before it adds GPUs up.
"""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Panel

from grafana.dashboards.source.board import GPU_NODES, MODEL, REPLICA, Board, cell, label, of_prometheus, to_board
from grafana.dashboards.source.panels import (
    ANY_IS_BAD,
    Answer,
    Column,
    Limits,
    State,
    bars,
    curves,
    over,
    prose,
    rows_of,
    single,
    under,
)
from grafana.dashboards.source.queries import now, rows, series, sql

_NODE = 'node=~"$node"'
_GPUS = f"max by (node, gpu, UUID) (DCGM_FI_DEV_GPU_UTIL{{{_NODE}}})"
_HELD = f'max by (node, gpu, UUID) (DCGM_FI_DEV_GPU_UTIL{{{_NODE}, slurm_job_id!=""}})'
_NO_DCGM = "no GPU metrics: does Prometheus scrape dcgm-exporter as job dcgm?"
_THIS_NODE = to_board(GPU_NODES, "Only this node", node=label("node"))

# whose job it is: of a job of somebody else there is no target, and it has no replica
_REPLICAS = 'group by (slurm_job_id, replica, model) (up{job="vllm", slurm_job_id!=""})'
FATAL_XIDS = "48|63|64|74|79|94|95|119|120"  # as in grafana/alerts/drain-node.yaml
_CAUSES = {"operator": State("blue"), "alert": State("red"), "failures": State("orange")}
_BY_GPU = "node, gpu, modelName, slurm_job_id"


def _of_jobs(expr: str) -> str:
    """A value of each GPU that a job holds, with the replica and the model where it is one of ours."""
    value = f"max by ({_BY_GPU}) ({expr})"
    return (
        f"{value} * on (slurm_job_id) group_left (replica, model) {_REPLICAS}"
        f" or on ({_BY_GPU}) {value}"
    )  # fmt: skip


def board() -> Board:
    """GPUs by node and job, their health, and the nodes that new jobs are kept off."""
    made = Board(
        uid=GPU_NODES,
        description="Who holds which GPU, is it used, is it well, and which nodes are jobs kept off?",
        variables=[
            of_prometheus(
                "node",
                "Node",
                "label_values(DCGM_FI_DEV_GPU_UTIL, node)",
                description="Slurm's names of the nodes whose GPUs are seen.",
            )
        ],
        marks="",
        shows_last="3h",
    )
    _at_a_glance(made)
    made.line(9, _who_holds_what(), _kept_out())
    _load(made)
    _health(made)
    return made


def _at_a_glance(board: Board) -> None:
    board.line(
        4,
        single(
            Answer(
                "GPUs seen",
                "GPUs that dcgm-exporter tells of on the chosen nodes. Fewer than there are: an exporter is down.",
                unit="short",
                empty=_NO_DCGM,
                decimals=0,
            ),
            now(f"count({_GPUS})"),
        ),
        single(
            Answer(
                "Held by jobs",
                "GPUs that a Slurm job holds, ours or others', by the job mapping files of prolog and epilog. 0 with "
                "jobs that run: the prolog does not write them.",
                unit="short",
                empty=_NO_DCGM,
                decimals=0,
            ),
            now(f"count({_HELD}) or 0 * count({_GPUS})"),
        ),
        single(
            Answer(
                "Held and idle",
                "GPUs that a job has held for 15 minutes without using them. Each costs as much as a busy one: see "
                "which in the table, and lower min_replicas, or ask the job's owner.",
                unit="short",
                empty="no GPU is held by a job",
                limits=over(1, 8),
                decimals=0,
            ),
            now(f"sum(max by (node, gpu, UUID) (gpu:idle{{{_NODE}}}))"),
        ),
        single(
            Answer(
                "Fatal XIDs in 5 minutes",
                "Errors of the driver that mean a broken GPU (48, 63, 64, 74, 79, 94, 95, 119, 120): its node is "
                "drained by the alert. Those that mostly come from programs (13, 31, 43, 45) are among all XIDs below.",
                unit="short",
                empty=_NO_DCGM,
                limits=ANY_IS_BAD,
                decimals=0,
            ),
            now(f'sum(gpu:xid_errors:increase5m{{{_NODE}, xid=~"{FATAL_XIDS}"}}) or 0 * count({_GPUS})'),
            is_alarm=True,
        ),
        single(
            Answer(
                "GPUs with broken memory",
                "GPUs that could not remap a row, or had an uncorrectable ECC error since the driver was loaded "
                "(counted only where the exporter's list of counters has it). Drain the node and reset or replace.",
                unit="short",
                empty=_NO_DCGM,
                limits=ANY_IS_BAD,
                decimals=0,
            ),
            now(
                f"count(max by (node, gpu, UUID) (DCGM_FI_DEV_ROW_REMAP_FAILURE{{{_NODE}}}) > 0"
                f" or max by (node, gpu, UUID) (DCGM_FI_DEV_ECC_DBE_VOL_TOTAL{{{_NODE}}}) > 0)"
                f" or 0 * count({_GPUS})"
            ),
            is_alarm=True,
        ),
        single(
            Answer(
                "Nodes kept out",
                "Nodes that the control plane starts no job on, for whatever cause: see the table.",
                unit="short",
                empty="nothing is known of nodes: can Grafana read the database?",
                limits=over(1),
                decimals=0,
            ),
            sql("SELECT count(DISTINCT node) AS nodes FROM grafana.nodes WHERE active"),
        ),
        single(
            Answer(
                "Hottest GPU",
                "The greatest GPU temperature. Above 85 °C clocks are lowered, and it gets slow: look at its cooling.",
                unit="celsius",
                empty=_NO_DCGM,
                limits=over(80, 87),
                decimals=0,
            ),
            now(f"max(DCGM_FI_DEV_GPU_TEMP{{{_NODE}}})"),
        ),
        single(
            Answer(
                "Power",
                "What all GPUs of the chosen nodes draw now, held or not.",
                unit="watt",
                empty=_NO_DCGM,
                decimals=1,
            ),
            series(f"sum(node:gpu_power_watts:sum{{{_NODE}}})", "power"),
            trend=True,
        ),
    )


def _who_holds_what() -> Panel:
    held = f'{_NODE}, slurm_job_id!=""'
    return rows_of(
        Answer(
            "Who holds which GPU",
            "Every GPU that a job holds, with the replica it belongs to; no replica: the job is not ours. Used at most "
            "5 % for 15 minutes, with memory taken, is an engine that nobody asks, or one that hangs.",
            unit="short",
            empty="no job holds a GPU, or the prolog does not write the job mapping files",
        ),
        [
            Column("node", "Node", width=90, links=(to_board(GPU_NODES, "Only this node", node=cell("node")),)),
            Column("gpu", "GPU", width=55),
            Column("replica", "Replica", links=(to_board(REPLICA, "The replica", replica=cell("replica")),)),
            Column("model", "Model", width=130, links=(to_board(MODEL, "The model", model=cell("model")),)),
            Column("slurm_job_id", "Job", width=75),
            Column("Value #A", "Used", unit="percent", width=75, decimals=0),
            Column("Value #B", "Most in 15 min", unit="percent", width=120, decimals=0, limits=under(5, 1)),
            Column("Value #C", "Memory", unit="percentunit", width=110, is_bar=True),
            Column("Value #D", "Temperature", unit="celsius", width=100, decimals=0, limits=over(80, 87)),
            Column("Value #E", "Power", unit="watt", width=85, decimals=0),
            Column("modelName", "Kind", is_hidden=True),
            Column("Time", is_hidden=True),
        ],
        rows(_of_jobs(f"DCGM_FI_DEV_GPU_UTIL{{{held}}}")),
        # and: not those of jobs that have ended meanwhile
        rows(_of_jobs(f"max_over_time(DCGM_FI_DEV_GPU_UTIL{{{held}}}[15m]) and DCGM_FI_DEV_GPU_UTIL{{{held}}}")),
        rows(
            _of_jobs(
                f"DCGM_FI_DEV_FB_USED{{{held}}} / (DCGM_FI_DEV_FB_USED{{{held}}} + DCGM_FI_DEV_FB_FREE{{{held}}} > 0)"
            )
        ),
        rows(_of_jobs(f"DCGM_FI_DEV_GPU_TEMP{{{held}}}")),
        rows(_of_jobs(f"DCGM_FI_DEV_POWER_USAGE{{{held}}}")),
        width=15,
        sort_by="node",
    )


def _kept_out() -> Panel:
    return rows_of(
        Answer(
            "Nodes kept out of new jobs",
            "Nodes that no job is started on, and until when. By an operator, by an alert (until it ends, unless it "
            "says otherwise), or because replicas failed there. `controlplane nodes undrain NODE` lets jobs in again.",
            unit="string",
            empty="no node is kept out: fine",
        ),
        [
            Column("node", "Node", width=80, links=(to_board(GPU_NODES, "Only this node", node=cell("node")),)),
            Column("cause", "Cause", width=80, states=_CAUSES),
            Column("reason", "Reason", wraps=True),
            Column("since", "Since", unit="dateTimeFromNow", width=105),
            Column("until", "Until", unit="dateTimeFromNow", width=105),
            Column("replicas", "Replicas on it", unit="short", width=110, limits=over(1)),
        ],
        sql("""
            SELECT node, cause, reason, since, until, replicas
              FROM grafana.nodes
             WHERE active
             ORDER BY since DESC
             LIMIT 100
        """),
    )


def _load(board: Board) -> None:
    board.line(
        8,
        curves(
            Answer(
                "Utilisation by node",
                "How much of the time a kernel ran, on average over a node's GPUs. One request keeps it high: it tells "
                "idle from busy, and not how full. Never scale by it; see the queue on the board Model.",
                unit="percentunit",
                empty=_NO_DCGM,
                lowest=0,
                highest=1,
                links=(_THIS_NODE,),
            ),
            series(f"max by (node) (node:gpu_utilisation:ratio{{{_NODE}}})", "{{node}}"),
        ),
        curves(
            Answer(
                "Memory in use by node",
                "The share of a node's GPU memory that is taken. vLLM takes its share when it starts, and keeps it: a "
                "job without memory loads still, or is no vLLM.",
                unit="percentunit",
                empty=_NO_DCGM,
                lowest=0,
                highest=1,
                links=(_THIS_NODE,),
            ),
            series(
                f"sum by (node) (max by (node, gpu, UUID) (DCGM_FI_DEV_FB_USED{{{_NODE}}}))"
                f" / sum by (node) (max by (node, gpu, UUID)"
                f" (DCGM_FI_DEV_FB_USED{{{_NODE}}} + DCGM_FI_DEV_FB_FREE{{{_NODE}}}))",
                "{{node}}",
            ),
        ),
        curves(
            Answer(
                "Hottest GPU by node",
                "The greatest GPU temperature of each node. Above 85 °C clocks are lowered.",
                unit="celsius",
                empty=_NO_DCGM,
                limits=over(80, 87),
                links=(_THIS_NODE,),
            ),
            series(f"max by (node) (DCGM_FI_DEV_GPU_TEMP{{{_NODE}}})", "{{node}}"),
        ),
        curves(
            Answer(
                "Power by node",
                "What the GPUs of each node draw. A node whose GPUs idle draws a tenth of a busy one.",
                unit="watt",
                empty=_NO_DCGM,
                lowest=0,
                links=(_THIS_NODE,),
            ),
            series(f"max by (node) (node:gpu_power_watts:sum{{{_NODE}}})", "{{node}}"),
            is_stacked=True,
        ),
    )


def _health(board: Board) -> None:
    board.section("Errors, throttling and energy")
    board.line(
        7,
        curves(
            Answer(
                "XIDs by GPU",
                "Errors that the driver reported within 5 minutes, by their number. Without DCGM_EXP_XID_ERRORS_COUNT, "
                "which dcgm-exporter's list of counters has to name, a second one like the last is not seen.",
                unit="short",
                empty="no XID within 5 minutes: fine, where GPUs are seen",
                decimals=0,
                limits=over(1),
                links=(_THIS_NODE,),
            ),
            series(
                f"sum by (node, gpu, xid) (gpu:xid_errors:increase5m{{{_NODE}}})", "{{node}} GPU {{gpu}}, XID {{xid}}"
            ),
            steps=True,
        ),
        curves(
            Answer(
                "Remapped rows and ECC errors",
                "Since the driver was loaded. Rows remapped for uncorrectable errors want a reset of the GPU; an "
                "uncorrectable ECC error has ended its job; correctable ones that grow fast come before others.",
                unit="short",
                empty="none: fine, where GPUs are seen (ECC counters have to be turned on in dcgm-exporter)",
                decimals=0,
                limits=over(1),
                links=(_THIS_NODE,),
            ),
            series(
                f"max by (node, gpu) (DCGM_FI_DEV_UNCORRECTABLE_REMAPPED_ROWS{{{_NODE}}}) > 0",
                "{{node}} GPU {{gpu}}, uncorrectable rows",
            ),
            series(
                f"max by (node, gpu) (DCGM_FI_DEV_CORRECTABLE_REMAPPED_ROWS{{{_NODE}}}) > 0",
                "{{node}} GPU {{gpu}}, correctable rows",
            ),
            series(
                f"max by (node, gpu) (DCGM_FI_DEV_ECC_DBE_VOL_TOTAL{{{_NODE}}}) > 0",
                "{{node}} GPU {{gpu}}, uncorrectable ECC",
            ),
            series(
                f"max by (node, gpu) (DCGM_FI_DEV_ECC_SBE_VOL_TOTAL{{{_NODE}}}) > 0",
                "{{node}} GPU {{gpu}}, correctable ECC",
            ),
            steps=True,
        ),
        curves(
            Answer(
                "Time throttled",
                "The share of the time that clocks were held down, by power or by heat, of each node's worst GPU. Heat "
                "is a fault of cooling; some throttling by power under full load is usual.",
                unit="percentunit",
                empty="nothing: throttling counters have to be turned on in dcgm-exporter",
                limits=over(0.1, 0.3),
                lowest=0,
                links=(_THIS_NODE,),
            ),
            # nanoseconds, although dcgm-exporter long said that they were microseconds
            series(
                f"max by (node) (rate(DCGM_FI_DEV_THERMAL_VIOLATION{{{_NODE}}}[$__rate_interval])) / 1e9",
                "{{node}}, heat",
            ),
            series(
                f"max by (node) (rate(DCGM_FI_DEV_POWER_VIOLATION{{{_NODE}}}[$__rate_interval])) / 1e9",
                "{{node}}, power",
            ),
        ),
        bars(
            Answer(
                "Energy by node",
                "Energy that GPUs took within the shown time, held by a job or not. GPUs that two jobs share are "
                "counted twice.",
                unit="kwatth",
                empty=_NO_DCGM,
                lowest=0,
                limits=Limits(base="blue"),
            ),
            now(
                f"sort_desc(sum by (node)"
                f" (increase(DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{{{_NODE}}}[$__range])) / 3.6e9)",
                "{{node}}",
            ),
        ),
    )
    board.line(
        7,
        bars(
            Answer(
                "Energy by replica",
                "Energy that the GPUs of each replica took within the shown time, the least and the load included.",
                unit="kwatth",
                empty="no GPU was held by a replica that is discovered now",
                lowest=0,
                limits=Limits(base="blue"),
            ),
            now(
                "sort_desc(sum by (replica) (sum by (slurm_job_id) (increase("
                f'DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{{{_NODE}, slurm_job_id!=""}}[$__range]))'
                f" * on (slurm_job_id) group_left (replica) {_REPLICAS}) / 3.6e9)",
                "{{replica}}",
            ),
            width=6,
        ),
        rows_of(
            Answer(
                "What happened to nodes",
                "Nodes that were kept out, and let in again, within the shown time: when, for which cause, by whom.",
                unit="string",
                empty="nothing happened to a node",
            ),
            [
                Column("at", "When", unit="dateTimeAsIso", width=170),
                Column("node", "Node", width=90),
                Column("event", "What", width=90),
                Column("cause", "Cause", width=90, states=_CAUSES),
                Column("reason", "Reason", wraps=True),
                Column("actor", "Who", width=140),
            ],
            sql("""
                SELECT at, node, event, cause, reason, actor
                  FROM grafana.node_events
                 WHERE $__timeFilter(at)
                 ORDER BY at DESC
                 LIMIT 200
            """),
            width=11,
        ),
        prose(
            "What to do about a node",
            "Commands for a host from which the control plane's database can be reached.",
            """\
Keep new jobs off a node, and replace what runs there, one by one; then let jobs in again:

```sh
controlplane nodes drain NODE --reason "XID 79" --until 4h
controlplane nodes undrain NODE
controlplane get nodes
controlplane why JOBID      # of a job in the table above
```

Over HTTP: `POST /api/v1/nodes/$NODE/drain` and `POST /api/v1/nodes/$NODE/undrain`, with an operator's token.
Slurm's own view: `scontrol show node NODE`, `sinfo -R`; the driver's: `dmesg | grep NVRM`, `nvidia-smi -q`.
""",
            width=7,
        ),
    )
