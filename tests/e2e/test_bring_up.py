"""The servers that the demo and the tests stand on: they come up, do their work, and leave nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import jwt
import psycopg
import pytest
import yaml

from controlplane.demo.alert_rules import Pace, convert
from controlplane.demo.children import Account, MissingProgram, StartFailed, program
from controlplane.demo.claims import DirectoryInUse, Pid, Record, claim
from controlplane.demo.postgres import DatabaseFailed, PrivatePostgres
from controlplane.demo.prometheus import AlertmanagerOptions, PrometheusOptions, QueryFailed
from controlplane.demo.slurm_cluster import CommandFailed, SlurmCluster
from tests.conftest import eventually_sync
from tests.e2e.conftest import AlertmanagerFactory, PrometheusFactory

ALERTS = Path(__file__).parents[2] / "grafana" / "alerts"
API = "/slurm/v0.0.38"
# ignores being asked to end, and leaves a child in a session of its own
STUBBORN_JOB = "#!/bin/sh\ntrap '' TERM\necho $$ >pids\nsetsid sh -c 'echo $$ >>pids; exec sleep 600' &\nwait\n"


def submit(cluster: SlurmCluster, client: httpx.Client, script: str, folder: Path, **more: Any) -> int:
    job = {"name": "t", "current_working_directory": str(folder), "environment": {"PATH": "/usr/bin:/bin"}, **more}
    answer = client.post(f"{API}/job/submit", json={"script": script, "job": job}).json()
    assert answer["job_id"], answer["errors"]
    return int(answer["job_id"])


def socket_client(cluster: SlurmCluster) -> httpx.Client:
    transport = httpx.HTTPTransport(uds=str(cluster.socket_path))
    return httpx.Client(transport=transport, base_url="http://slurm", timeout=30)


@pytest.fixture
def job_folder(slurm: SlurmCluster, request: pytest.FixtureRequest) -> Iterator[Path]:
    """Ends when the job has: one that loses its slurmd in its last moment holds its node for minutes."""
    yield make_job_folder(slurm, request.node.name)
    eventually_sync(lambda: not slurm.run("squeue", "--noheader", "--name", "t"), timeout_seconds=30)


def make_job_folder(cluster: SlurmCluster, name: str) -> Path:
    folder = cluster.jobs_directory / name
    folder.mkdir()
    user = Account.named(cluster.user_name)
    os.chown(folder, user.uid, user.gid)
    return folder


def listeners(numbers: set[int]) -> set[str]:
    """The addresses on which the processes listen for TCP connections."""
    sockets = {
        str(link.readlink()) for number in numbers for link in Path(f"/proc/{number}/fd").iterdir() if link.is_symlink()
    }
    rows = [
        line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets}


def recorded(directory: Path) -> dict[str, Pid]:
    records = [Record.read(path) for path in (directory / "children").iterdir()]
    return {record.path.name: record.pid for record in records if record is not None}


# --- Slurm -----------------------------------------------------------------------------------------------------


def test_jobs_run_as_the_job_user_with_gpus_of_their_own(slurm: SlurmCluster, job_folder: Path) -> None:
    script = '#!/bin/sh\necho "$(id -un) $CUDA_VISIBLE_DEVICES" >out.new && mv out.new out\n'
    with socket_client(slurm) as client:
        submit(slurm, client, script, job_folder, gpus_per_node="2")
    eventually_sync((job_folder / "out").exists, timeout_seconds=20)
    assert (job_folder / "out").read_text() == f"{slurm.user_name} 0,1\n"


def test_a_token_made_with_the_key_is_accepted_and_others_are_not(slurm: SlurmCluster) -> None:
    claims = {"iat": 0, "exp": 4_000_000_000, "sun": slurm.user_name}
    for key, accepted in ((slurm.jwt_key_file.read_bytes(), True), (b"x" * 32, False)):
        headers = {"X-SLURM-USER-NAME": slurm.user_name, "X-SLURM-USER-TOKEN": jwt.encode(claims, key, "HS256")}
        assert httpx.get(f"{slurm.url}{API}/nodes", headers=headers, timeout=30).is_success is accepted
    assert slurm.jwt_key_file.stat().st_mode & 0o077 == 0


def test_the_job_user_can_run_this_program(slurm: SlurmCluster, job_folder: Path) -> None:
    script = f"#!/bin/sh\n{sys.executable} -c 'import controlplane' && touch imported\n"
    with socket_client(slurm) as client:
        submit(slurm, client, script, job_folder)
    eventually_sync((job_folder / "imported").exists, timeout_seconds=20)


def test_daemons_survive_being_killed_or_frozen_and_restarted(slurm: SlurmCluster) -> None:
    slurm.kill("slurmctld", signal.SIGSTOP)
    slurm.restart("slurmctld")
    for name in ("slurmctld", "slurmrestd", "slurmrestd-local", "slurmd-n1", "munged"):
        slurm.kill(name)
        assert not slurm.children.is_alive(name)
        slurm.restart(name)
    eventually_sync(slurm.is_ready, timeout_seconds=30)
    with socket_client(slurm) as client:
        assert client.get(f"{API}/ping").is_success


def test_slurm_listens_on_the_loopback_address_only(slurm: SlurmCluster) -> None:
    assert listeners({pid.number for pid in recorded(slurm.directory).values()}) == {"0100007F"}


def test_a_failing_slurm_command_says_why(slurm: SlurmCluster) -> None:
    assert "n[1-4]" in slurm.run("sinfo")
    with pytest.raises(CommandFailed, match="Invalid job id"):
        slurm.run("scontrol", "show", "job", "999999")


def test_two_clusters_live_side_by_side_and_end_with_jobs_that_will_not(
    slurm: SlurmCluster, session_directory: Path
) -> None:
    other = SlurmCluster(session_directory / "other", nodes=2, gpus=1, extra_conf=["MinJobAge=10"])
    with other:
        assert "MinJobAge               = 10 sec" in other.run("scontrol", "show", "config")
        folder = make_job_folder(other, "stubborn")
        with socket_client(other) as client:
            submit(other, client, STUBBORN_JOB, folder)
        pids = eventually_sync(lambda: two_pids(folder / "pids"), timeout_seconds=20)
        daemons = recorded(other.directory)
        other.kill("slurmd-n1")  # its slurmstepd and job are nobody's children now
    assert not [pid for pid in [*pids, *daemons.values()] if pid.is_alive()]
    assert slurm.is_ready()


def two_pids(path: Path) -> list[Pid]:
    numbers = path.read_text().split() if path.exists() else []
    return [live_pid(int(number)) for number in numbers] if len(numbers) == 2 else []


def live_pid(number: int) -> Pid:
    stat = Path(f"/proc/{number}/stat").read_text()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return Pid(number, boot, int(stat.rpartition(")")[2].split()[19]))


def test_a_later_run_ends_what_a_killed_run_left(session_directory: Path) -> None:
    directory = session_directory / "left"
    program_text = f"""
        import pathlib, signal
        from controlplane.demo.slurm_cluster import SlurmCluster
        cluster = SlurmCluster(pathlib.Path({str(directory)!r}), nodes=1).start()
        print(cluster.jobs_directory, flush=True)
        signal.pause()
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program_text)], stdout=subprocess.PIPE, text=True
    ) as earlier:
        assert earlier.stdout is not None
        assert earlier.stdout.readline().strip() == str(directory / "jobs")
        with pytest.raises(DirectoryInUse):
            SlurmCluster(directory).start()
        (directory / "jobs" / "script").write_text(STUBBORN_JOB)
        earlier_cluster = SlurmCluster(directory)
        earlier_cluster.run("sbatch", "--chdir", str(directory / "jobs"), str(directory / "jobs" / "script"))
        pids = eventually_sync(lambda: two_pids(directory / "jobs" / "pids"), timeout_seconds=20)
        daemons = recorded(directory)
        earlier.kill()
        earlier.wait()
    assert all(pid.is_alive() for pid in [*pids, *daemons.values()])
    with claim(directory):
        assert not [pid for pid in [*pids, *daemons.values()] if pid.is_alive()]


def test_a_start_that_fails_says_why_and_leaves_nothing(session_directory: Path) -> None:
    directory = session_directory / "failing"
    cluster = SlurmCluster(directory, nodes=1, extra_conf=["NoSuchKey=1"])
    with pytest.raises(StartFailed, match="NoSuchKey"):
        cluster.start()
    with claim(directory):
        assert not recorded(directory)


def test_a_missing_program_names_the_command_that_installs_it() -> None:
    with pytest.raises(MissingProgram, match="no-such-program is not installed; `make setup`"):
        program("no-such-program")


def test_a_reused_process_id_is_not_taken_for_ours() -> None:
    with subprocess.Popen(["/bin/sleep", "600"]) as bystander:
        own = live_pid(bystander.pid)
        Pid(own.number, own.boot, own.started_ticks - 1).signal(signal.SIGKILL)
        Pid(own.number, "another boot", own.started_ticks).signal(signal.SIGKILL)
        assert own.is_alive()
        own.signal(signal.SIGKILL)
        assert bystander.wait() == -signal.SIGKILL


# --- PostgreSQL ------------------------------------------------------------------------------------------------


def test_databases_are_copies_of_a_template_and_survive_a_crash(postgres: PrivatePostgres) -> None:
    with psycopg.connect(postgres.create_database("original")) as connection:
        connection.execute("CREATE TABLE facts (fact text)")
    copy = postgres.create_database("copied", template="original")
    with psycopg.connect(copy) as connection:
        connection.execute("INSERT INTO facts VALUES ('committed')")
    postgres.kill()
    postgres.restart()
    connection = psycopg.connect(copy)
    assert connection.execute("SELECT fact FROM facts").fetchall() == [("committed",)]
    postgres.drop_database("copied")  # an open connection does not keep it
    connection.close()
    postgres.drop_database("original")
    with pytest.raises(DatabaseFailed, match="does not exist"):
        postgres.drop_database("original")


def test_postgresql_wants_the_password_and_listens_on_the_loopback_address_only(postgres: PrivatePostgres) -> None:
    url = postgres.url("postgres")
    user, _, rest = url.partition("@")
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(f"{user}x@{rest}")
    assert listeners({recorded(postgres.directory)["postgres"].number}) == {"0100007F"}


# --- Prometheus and Alertmanager -------------------------------------------------------------------------------


class Webhook:
    """Takes alerts, and offers the service discovery and the metrics that lead to them."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.authorizations: set[str | None] = set()
        self.waiting = 0
        self.address = ""

    def answer(self, path: str) -> tuple[str, str]:
        if path == "/sd":
            labels = {"model": "m", "replica_set": "s", "replica": "r1", "node": "n1", "slurm_job_id": "1"}
            group = {"targets": [self.address], "labels": {**labels, "__metrics_path__": "/vllm"}}
            return "application/json", json.dumps([group])
        metrics = {
            "/vllm": f"vllm:num_requests_running 4\nvllm:num_requests_waiting {self.waiting}\n",
            "/metrics": 'DCGM_FI_DEV_GPU_UTIL{gpu="0",Hostname="n1.site",hpc_job="1"} 95\n',
        }
        return "text/plain", metrics[path]


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    received = Webhook()

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            kind, text = received.answer(self.path)
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(text.encode())

        def do_POST(self) -> None:
            received.authorizations.add(self.headers["Authorization"])
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.bodies.append(yaml.safe_load(body))
            self.send_response(202)
            self.end_headers()

        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        received.address = f"127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield received
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_a_queue_at_an_engine_becomes_a_webhook_and_its_end_another(
    webhook: Webhook, prometheus_factory: PrometheusFactory, alertmanager_factory: AlertmanagerFactory, tmp_path: Path
) -> None:
    rules = tmp_path / "rules.yml"
    rules.write_text(convert(ALERTS, Pace(scale=0.05)))
    alertmanager = alertmanager_factory(
        AlertmanagerOptions(webhook_url=f"http://{webhook.address}/webhooks/alertmanager", bearer_token="a-token")
    )
    prometheus = prometheus_factory(
        PrometheusOptions(
            sd_url=f"http://{webhook.address}/sd",
            dcgm_targets=[webhook.address],
            rule_files=[rules],
            alertmanager=alertmanager.address,
        )
    )
    eventually_sync(lambda: prometheus.query('up{job="vllm"} == 1'), timeout_seconds=20)
    [gpu] = eventually_sync(lambda: prometheus.query("DCGM_FI_DEV_GPU_UTIL"), timeout_seconds=20)
    assert (gpu.value, gpu.labels["node"], gpu.labels["slurm_job_id"]) == (95, "n1", "1")
    assert not webhook.bodies

    webhook.waiting = 30
    eventually_sync(lambda: webhook.bodies, timeout_seconds=20)
    [alert] = webhook.bodies[0]["alerts"]
    assert alert["status"] == "firing"
    assert {"action": "scale_up", "owner": "controlplane", "model": "m"}.items() <= alert["labels"].items()
    eventually_sync(lambda: len(webhook.bodies) >= 2, timeout_seconds=20)  # it comes again while it fires

    webhook.waiting = 0
    eventually_sync(lambda: webhook.bodies[-1]["status"] == "resolved", timeout_seconds=30)
    assert webhook.authorizations == {"Bearer a-token"}
    for server in (prometheus, alertmanager):
        assert listeners({pid.number for pid in recorded(server.directory).values()}) == {"0100007F"}


def test_prometheus_tells_why_it_refuses_a_query(prometheus_factory: PrometheusFactory) -> None:
    prometheus = prometheus_factory(PrometheusOptions(static_targets={"proxy": ["127.0.0.1:1"]}))
    [one] = prometheus.query("scalar(vector(1))")
    assert one.value == 1
    with pytest.raises(QueryFailed, match="parse error"):
        prometheus.query("sum by (")
    prometheus.stop()
    with pytest.raises(QueryFailed, match="ConnectError"):
        prometheus.query("up")


def test_configurations_please_the_checkers_of_their_servers(
    prometheus_factory: PrometheusFactory, alertmanager_factory: AlertmanagerFactory, tmp_path: Path
) -> None:
    rules = tmp_path / "rules.yml"
    rules.write_text(convert(ALERTS))
    prometheus = prometheus_factory(
        PrometheusOptions(
            sd_url="http://127.0.0.1:1/sd",
            static_targets={"controlplane": ["127.0.0.1:1"], "proxy": ["127.0.0.1:2", "127.0.0.1:3"]},
            scrape_interval_seconds=15,
            rule_files=[rules],
            alertmanager="127.0.0.1:4",
        )
    )
    alertmanager = alertmanager_factory(AlertmanagerOptions(webhook_url="http://127.0.0.1:1/webhooks/alertmanager"))
    for command in (
        [program("promtool"), "check", "config", str(prometheus.directory / "prometheus.yml")],
        [program("amtool"), "check-config", str(alertmanager.directory / "alertmanager.yml")],
    ):
        checked = subprocess.run(command, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout + checked.stderr
