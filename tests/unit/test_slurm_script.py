"""Job scripts, run by a real bash: values arrive verbatim, nothing is injected, and the life of the server is kept."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controlplane.core.types import ExternalEndpoint, ReplicaSetSpec, SlurmResources, VllmOptions
from controlplane.slurm.script import Script, ScriptError, ScriptOptions, render
from tests.conftest import eventually_sync

SECRET = "the-replicas-key"
SPEC = ReplicaSetSpec(
    name="qwen",
    model="qwen",
    template="vllm-apptainer",
    slurm=SlurmResources(time_limit_seconds=600, gpus_per_node=2),
    vllm=VllmOptions(image="/images/vllm.sif", model_path="/models/qwen", args=("--max-model-len", "8192")),
)
HOSTILE = [
    "two words",
    "it's",
    'say "no"',
    "$(touch marker)",
    "`touch marker`",
    "; touch marker;",
    "'; touch marker; '",
    '"; touch marker; "',
    "' $(touch marker) '",
    "\\",
    "\\$(touch marker)",
    "${PATH}",
    "a*?[b]{c,d}",
    "~root",
    "# no comment",
    "&& touch marker",
    "> marker",
    "-rf",
    "A=b",
    "!!",
    "q\u00fcen/\u6a21\u578b",
    "\u00a0\u2003",
    "{{ secret }}",
    "{% raw %}",
    "",
]

CHILD = """
import os, pathlib, signal
signal.signal(signal.SIGTERM, lambda *_: pathlib.Path(os.environ["RECORD"] + ".child").touch())
print("ready", flush=True)
while True:
    signal.pause()
"""

SERVER = f"""#!{sys.executable}
# Stands for apptainer and for python: records how it was started, then does what MODE says.
import json, os, pathlib, signal, subprocess, sys

def stop(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child.kill()
    child.wait()
    sys.exit(int(os.environ.get("STOP_CODE", "0")))

serves = os.environ.get("MODE") == "serve"
record = {{"argv": sys.argv, "environment": dict(os.environ), "cwd": os.getcwd(), "files": os.listdir()}}
record["pid"] = os.getpid()
with open(os.environ["RECORD"], "w") as file:
    json.dump(record, file)
if serves:
    command = [sys.executable, "-c", {CHILD!r}]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    child.stdout.readline()
    pathlib.Path(os.environ["RECORD"] + ".child-pid").write_text(str(child.pid))
    signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
while serves:
    signal.pause()
sys.exit(int(os.environ["MODE"]))
"""


SRUN = f"""#!{sys.executable}
# Stands for srun: starts every task here, each with a record of its own, and ends them all with the first that fails.
import json, os, subprocess, sys

options = [word for word in sys.argv[1:] if word.startswith("--")]
command = sys.argv[1 + len(options) :]
with open(os.environ["RECORD"] + ".srun", "w") as file:
    json.dump(options, file)
count = int(next(word for word in options if word.startswith("--ntasks=")).partition("=")[2])
own = [{{"SLURM_PROCID": str(task), "RECORD": f"{{os.environ['RECORD']}}.{{task + 1}}"}} for task in range(count)]
tasks = [subprocess.Popen(command, env={{**os.environ, **variables}}) for variables in own]
os.wait()
for task in tasks:
    task.kill()
sys.exit(1)
"""


def rendered(spec: ReplicaSetSpec, *directories: Path, **options: Any) -> Script:
    return render(
        spec,
        name="cp-qwen-1",
        port=8123,
        secret=SECRET,
        options=ScriptOptions(template_directories=directories, **options),
    )


def with_vllm(**changes: Any) -> ReplicaSetSpec:
    return replace(SPEC, vllm=replace(SPEC.vllm, **changes))


def run_bash(text: str, directory: Path) -> bytes:
    path = directory / "script"
    path.write_text(text)
    return subprocess.run(["bash", path], cwd=directory, stdout=subprocess.PIPE, check=True).stdout


# --- quoting --------------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site's own directory of templates."""
    directory = tmp_path / "templates"
    directory.mkdir()
    (directory / "argv.sbatch").write_text("#!/bin/bash\nprintf '%s\\0' {{ args }} {{ model }}\n")
    return directory


def arrived(text: str, directory: Path) -> list[str]:
    return run_bash(text, directory).decode().split("\0")[:-1]


@pytest.mark.parametrize("value", HOSTILE)
def test_a_hostile_value_is_one_literal_word(site: Path, value: str) -> None:
    spec = replace(with_vllm(args=(value, "end")), template="argv", model=value)
    assert arrived(rendered(spec, site).text, site) == [value, "end", value]
    assert not (site / "marker").exists()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cc", "Cs"])).filter(lambda s: not s.startswith("--")), max_size=9
    )
)
def test_arguments_arrive_verbatim(site: Path, args: list[str]) -> None:
    spec = replace(with_vllm(args=tuple(args)), template="argv")
    assert arrived(rendered(spec, site).text, site) == [*args, "qwen"]


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize(
    "line", ['echo "{{ model }}"', "echo '{{ model }}'", 'echo "$(echo {{ model }})"', "# {{ model }}"]
)
def test_an_author_who_quotes_an_expression_runs_nothing(site: Path, value: str, line: str) -> None:
    (site / "quoted.sbatch").write_text(f"#!/bin/bash\n{line}\n:\n")
    text = rendered(replace(SPEC, template="quoted", model=value), site).text
    (site / "script").write_text(text)
    subprocess.run(["bash", site / "script"], cwd=site, capture_output=True, check=False)
    assert not (site / "marker").exists()


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["a\nb", "a\0b", "a\tb", "\x1b[31m", "a\x7f", "\r", "\ud800"])
def test_control_characters_are_refused_with_the_field_named(bad: str) -> None:
    for field, spec in {
        "model": replace(SPEC, model=bad),
        "vllm.image": with_vllm(image=bad),
        "vllm.model_path": with_vllm(model_path=f"/m/{bad}"),
        "vllm.args[1]": with_vllm(args=("ok", bad)),
        "vllm.environment.HF_HOME": with_vllm(environment={"HF_HOME": bad}),
    }.items():
        with pytest.raises(ScriptError) as caught:
            rendered(spec)
        assert caught.value.field == field
    with pytest.raises(ScriptError) as caught:
        render(SPEC, name="n", port=1, secret=f"key{bad}", options=ScriptOptions())
    assert caught.value.field == "secret"
    assert "key" not in str(caught.value)


@pytest.mark.parametrize(
    "argument",
    ["--port", "--port=1", "--host", "--api-key", "--api_key=x", "--served-model-name", "--served_model", "--model",
     "--uds", "--shutdown-timeout=0", "--ssl-keyfile", "--root-path", "--nnodes=2", "--node-rank", "--master-p",
     "--headless", "-n", "-r1", "-n=2", "--"],
)  # fmt: skip
def test_options_that_are_ours_are_refused_in_every_spelling(argument: str) -> None:
    with pytest.raises(ScriptError, match=r"vllm\.args\[2\]: .* set by the control plane"):
        rendered(with_vllm(args=("--max-model-len", "1", argument)))


@pytest.mark.parametrize(
    "argument", ["--max-model-len", "--tensor-parallel-size=2", "--api-server-count", "-tp", "8192"]
)
def test_other_options_are_passed_on(argument: str) -> None:
    assert f"  {argument}\n".replace("=", "\\=") in rendered(with_vllm(args=(argument,))).text


@pytest.mark.parametrize(
    "variable", ["VLLM_API_KEY", "APPTAINERENV_VLLM_API_KEY", "SLURM_JOB_ID", "A-B", "", "A=B", "1A"]
)
def test_variables_that_are_ours_or_none_are_refused(variable: str) -> None:
    with pytest.raises(ScriptError, match=r"vllm\.environment"):
        rendered(with_vllm(environment={variable: "x"}))


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        (with_vllm(image=None), "vllm.image"),
        (with_vllm(image="vllm.sif"), "vllm.image"),
        (with_vllm(model_path=None), "vllm.model_path"),
        (with_vllm(model_path="Qwen/Qwen3-8B"), "vllm.model_path"),
        (with_vllm(model_path="/models/a:b"), "vllm.model_path"),
        (with_vllm(model_path='/models/"a"'), "vllm.model_path"),
        (replace(with_vllm(image="venv"), template="vllm-venv"), "vllm.image"),
        (replace(with_vllm(model_path="Qwen/Qwen3-8B"), template="vllm-venv"), "vllm.model_path"),
        (replace(SPEC, slurm=None, endpoints=(ExternalEndpoint("http://h"),)), "slurm"),
        (replace(SPEC, template=None), "template"),
        (replace(SPEC, template="../secrets"), "template"),
        (replace(SPEC, template="_replica"), "template"),
    ],
)
def test_a_spec_the_template_cannot_run_is_refused_with_the_field_named(spec: ReplicaSetSpec, field: str) -> None:
    with pytest.raises(ScriptError) as caught:
        rendered(spec)
    assert caught.value.field == field


def test_an_unknown_template_is_refused_with_the_known_ones_named(site: Path) -> None:
    with pytest.raises(
        ScriptError,
        match=r"no template nope\.sbatch .*there are: argv, fake-vllm, vllm-apptainer, vllm-apptainer-ray, "
        r"vllm-embedding, vllm-venv, vllm-venv-ray$",
    ):
        rendered(replace(SPEC, template="nope"), site)


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("#!/bin/bash\n{{ modle }}", "'modle' is undefined"),
        ("#!/bin/bash\n{% if %}", "is not right"),
        ("#!/bin/bash\n{{ image }}", "a NoneType cannot stand in a script"),
        ("#!/bin/bash\n{{ model == 'x' }}", "a bool cannot stand in a script"),
        ("echo {{ model }}", "does not begin with #!"),
    ],
)
def test_a_template_that_is_not_right_is_said_to_be(site: Path, text: str, remedy: str) -> None:
    (site / "broken.sbatch").write_text(text)
    with pytest.raises(ScriptError) as caught:
        rendered(replace(with_vllm(image=None), template="broken"), site)
    assert caught.value.field == "template"
    assert remedy in caught.value.remedy


def test_a_sites_template_goes_before_the_shipped_one_and_can_extend_it(site: Path) -> None:
    block = '{% extends "_replica.sbatch" %}{% block server %}command=(ours {{ model }}){% endblock %}'
    (site / "vllm-apptainer.sbatch").write_text(block)
    text = rendered(SPEC, site).text
    assert "command=(ours qwen)" in text
    assert text.startswith("#!/bin/bash\n")


# --- the secret and the environment ---------------------------------------------------------------------


def test_the_secret_is_in_the_environment_only() -> None:
    script = rendered(with_vllm(environment={"HF_HOME": "/cache", "PATH": "/opt/bin:/usr/bin"}))
    assert script.environment == {"PATH": "/opt/bin:/usr/bin", "HF_HOME": "/cache", "VLLM_API_KEY": SECRET}
    assert SECRET not in script.text
    assert SECRET not in repr(script)
    assert rendered(SPEC).environment["PATH"] == "/usr/local/bin:/usr/bin:/bin"


# --- the life of a server -------------------------------------------------------------------------------


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def signal_all(job: Job, number: signal.Signals) -> None:
    """What Slurm's cancel does: every process of the job gets it, whatever its group."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            session = (folder / "stat").read_text().rpartition(")")[2].split()[3]
            if session == str(job.process.pid):
                os.kill(int(folder.name), number)


class Job:
    """A script as Slurm would start it: in its own session, with its environment and nothing else."""

    def __init__(self, script: Script, directory: Path) -> None:
        path = directory / "slurm_script"
        path.write_text(script.text)
        path.chmod(0o755)
        self.record_path = Path(script.environment["RECORD"])
        self.process = subprocess.Popen(
            [path],
            cwd="/",
            env={
                **script.environment,
                "SLURMD_NODENAME": "n 1",
                "SLURM_JOB_ID": str(os.getpid()),
                "TMPDIR": str(directory),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )

    def wait_until_it_serves(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def end(self) -> tuple[int, str]:
        """Exit code and what was said on standard error."""
        said = self.process.communicate(timeout=30)[1]
        return self.process.returncode, said

    def record(self, rank: int = 0) -> dict[str, Any]:
        path = Path(f"{self.record_path}.{rank}") if rank else self.record_path
        return dict(json.loads(path.read_text()))


@pytest.fixture
def server(tmp_path: Path) -> Path:
    """A program that stands for apptainer, in a directory with a hostile name."""
    directory = tmp_path / "bin $(touch marker) 'x'"
    directory.mkdir()
    for name, program in {"srun": SRUN, "apptainer": SERVER}.items():
        (directory / name).write_text(program)
        (directory / name).chmod(0o755)
    return directory / "apptainer"


@pytest.fixture
def jobs(tmp_path: Path, server: Path) -> Iterator[Any]:
    started: list[Job] = []

    def start(
        spec: ReplicaSetSpec = SPEC, *, mode: str, programs: Mapping[str, str] | None = None, **variables: str
    ) -> Job:
        for name, body in (programs or {}).items():
            (server.parent / name).write_text(f"#!/bin/sh\n{body}\n")
            (server.parent / name).chmod(0o755)
        environment = {"PATH": f"{server.parent}:/usr/bin:/bin", "RECORD": f"{tmp_path}/record", "MODE": mode}
        vllm = replace(spec.vllm, environment={**spec.vllm.environment, **environment, **variables})
        started.append(Job(rendered(replace(spec, vllm=vllm), python=str(server)), tmp_path))
        return started[-1]

    yield start
    for job in started:
        signal_all(job, signal.SIGKILL)
        job.process.communicate()


def test_vllm_is_started_in_its_container_with_every_value_verbatim(jobs: Any, tmp_path: Path) -> None:
    args = tuple(value for value in HOSTILE if value)
    spec = replace(
        with_vllm(model_path="/models/it's $(x) `y`", image="/my images/v;m.sif", args=args), model='a "b" $c'
    )
    job = jobs(spec, mode="0")
    job.end()
    work = job.record()["cwd"]
    assert job.record()["argv"][1:] == [
        "exec", "--nv", "--home", work, "--bind", "/models/it's $(x) `y`:/models/it's $(x) `y`:ro",
        "/my images/v;m.sif", "vllm", "serve", "/models/it's $(x) `y`", "--served-model-name", 'a "b" $c',
        "--host", "0.0.0.0", "--port", "8123", "--shutdown-timeout", "30", *args,
    ]  # fmt: skip
    assert not list(tmp_path.rglob("marker"))


def test_the_container_is_given_the_key_and_the_sites_variables(jobs: Any) -> None:
    job = jobs(with_vllm(environment={"HF_HUB_OFFLINE": "0", "NOTE": "two 'words' $(x)"}), mode="0")
    job.end()
    seen = job.record()["environment"]
    assert SECRET not in " ".join(job.record()["argv"])
    assert seen["APPTAINERENV_VLLM_API_KEY"] == SECRET
    assert seen["APPTAINERENV_NOTE"] == seen["NOTE"] == "two 'words' $(x)"
    assert seen["APPTAINERENV_HF_HUB_OFFLINE"] == "0"
    assert seen["APPTAINERENV_VLLM_NO_USAGE_STATS"] == "1"
    assert "APPTAINERENV_PATH" not in seen


def test_vllm_is_started_from_a_virtual_environment_with_every_value_verbatim(jobs: Any, server: Path) -> None:
    venv = server.parent / "ven v"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "vllm").symlink_to(server)
    args = tuple(value for value in HOSTILE if value)
    spec = replace(with_vllm(image=str(venv), model_path="/models/it's $(x)", args=args), template="vllm-venv")
    job = jobs(spec, mode="0", REPLICA_HOST="127.0.0.1")
    job.end()
    assert job.record()["argv"] == [
        f"{venv}/bin/vllm", "serve", "/models/it's $(x)", "--served-model-name", "qwen",
        "--host", "127.0.0.1", "--port", "8123", "--shutdown-timeout", "30", *args,
    ]  # fmt: skip
    seen = job.record()["environment"]
    assert seen["VLLM_API_KEY"] == SECRET
    assert seen["HOME"] == job.record()["cwd"], "nothing of the user's own gets in"
    assert (seen["PYTHONNOUSERSITE"], seen["HF_HUB_OFFLINE"]) == ("1", "1")


def test_the_fake_is_started_with_every_value_verbatim(jobs: Any, server: Path) -> None:
    spec = replace(with_vllm(load_seconds=7, args=("--max-num-seqs", "4")), template="fake-vllm", model="a 'b'")
    job = jobs(spec, mode="0")
    job.end()
    assert job.record()["argv"] == [
        str(server), "-m", "controlplane.demo.fake_vllm", "--model", "a 'b'", "--host", "127.0.0.1", "--port", "8123",
        "--load-seconds", "7", "--shutdown-timeout", "30", "--max-num-seqs", "4",
    ]  # fmt: skip
    assert job.record()["environment"]["VLLM_API_KEY"] == SECRET


def test_the_working_directory_is_empty_and_gone_afterwards(jobs: Any, tmp_path: Path) -> None:
    job = jobs(mode="0")
    job.end()
    assert job.record()["files"] == []
    assert Path(job.record()["cwd"]).parent == tmp_path
    assert not Path(job.record()["cwd"]).exists()


@pytest.mark.parametrize(("mode", "code"), [("0", 1), ("3", 3)])
def test_an_end_nobody_asked_for_is_a_failure_whatever_the_exit_code(jobs: Any, mode: str, code: int) -> None:
    ended_with, said = jobs(mode=mode).end()
    assert ended_with == code
    assert f"ended unasked, with exit code {mode}" in said


@pytest.mark.parametrize("asked_by", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("stop_code", ["0", "143"])
def test_a_stop_reaches_the_servers_main_process_alone_and_is_a_success(
    jobs: Any, asked_by: signal.Signals, stop_code: str
) -> None:
    job = jobs(mode="serve", STOP_CODE=stop_code)
    job.wait_until_it_serves()
    job.process.send_signal(asked_by)
    assert job.end() == (0, "replica: stopped as asked\n")
    assert not Path(f"{job.record_path}.child").exists()
    assert not Path(job.record()["cwd"]).exists()


def test_slurms_cancel_which_signals_every_process_is_a_stop_as_well(jobs: Any) -> None:
    job = jobs(mode="serve")
    job.wait_until_it_serves()
    signal_all(job, signal.SIGTERM)
    assert job.end() == (0, "replica: stopped as asked\n")


def test_a_stop_is_a_success_even_if_something_cannot_be_removed(jobs: Any) -> None:
    job = jobs(mode="serve", programs={"rm": "exit 1"})
    job.wait_until_it_serves()
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == (0, "replica: stopped as asked\n")


def test_a_server_killed_from_outside_is_a_failure(jobs: Any) -> None:
    job = jobs(mode="serve")
    job.wait_until_it_serves()
    children = Path(f"/proc/{job.process.pid}/task/{job.process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    code, said = job.end()
    assert code == 128 + signal.SIGKILL
    assert "ended unasked" in said
    orphan = int(Path(f"{job.record_path}.child-pid").read_text())
    eventually_sync(lambda: not is_alive(orphan))  # it would hold its GPU, where Slurm does not find it


# --- several nodes --------------------------------------------------------------------------------------

THREE = replace(SPEC, slurm=SlurmResources(time_limit_seconds=600, nodes=3, gpus_per_node=2))


def on_three_nodes(jobs: Any, spec: ReplicaSetSpec = THREE) -> Job:
    """All ranks serve."""
    job: Job = jobs(spec, mode="serve", REPLICA_INTERFACE="lo")
    for _ in range(3):
        job.wait_until_it_serves()
    return job


def test_every_rank_is_given_the_same_words_and_its_number(jobs: Any, tmp_path: Path) -> None:
    args = tuple(value for value in HOSTILE if value)
    spec = replace(THREE, vllm=replace(THREE.vllm, args=args, model_path="/models/it's $(x) `y`"))
    job = on_three_nodes(jobs, spec)
    works = [job.record(rank)["cwd"] for rank in range(3)]
    assert len(set(works)) == 3
    for rank in range(3):
        assert job.record(rank)["argv"][1:] == [
            "exec", "--nv", "--home", works[rank], "--bind", "/models/it's $(x) `y`:/models/it's $(x) `y`:ro",
            "/images/vllm.sif", "vllm", "serve", "/models/it's $(x) `y`", "--served-model-name", "qwen",
            "--host", "0.0.0.0", "--port", "8123", "--shutdown-timeout", "30", *args,
            "--nnodes", "3", "--node-rank", str(rank), "--master-addr", "127.0.0.1", "--master-port", "18123",
            *(["--headless"] if rank else []),
        ]  # fmt: skip
        seen = job.record(rank)["environment"]
        assert seen["APPTAINERENV_VLLM_API_KEY"] == SECRET
        assert (seen["VLLM_HOST_IP"], seen["NCCL_SOCKET_IFNAME"]) == ("127.0.0.1", "lo")
    assert SECRET not in Path(f"/proc/{job.process.pid}/cmdline").read_text()
    options = json.loads(Path(f"{job.record_path}.srun").read_text())
    assert {"--nodes=2", "--ntasks=2", "--relative=1", "--kill-on-bad-exit=1"} <= set(options)
    assert not list(tmp_path.rglob("marker"))


@pytest.mark.parametrize("asked_by", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_reaches_the_leader_alone(jobs: Any, asked_by: signal.Signals) -> None:
    job = on_three_nodes(jobs)
    job.process.send_signal(asked_by)
    assert job.process.wait(30) == 0
    for rank in (1, 2):
        state = Path(f"/proc/{job.record(rank)['pid']}/stat").read_text().rpartition(")")[2].split()[0]
        assert state == "S", "it waits; Slurm ends it with the job"


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_that_ends_ends_the_job_as_a_failure(jobs: Any, rank: int) -> None:
    """Also where the leader would not have noticed."""
    job = on_three_nodes(jobs)
    os.kill(job.record(rank)["pid"], signal.SIGKILL)
    assert job.process.wait(30) == 128 + signal.SIGKILL
    orphan = int(Path(f"{job.record_path}{f'.{rank}' if rank else ''}.child-pid").read_text())
    eventually_sync(lambda: not is_alive(orphan))


def test_no_rank_dies_of_a_warning_that_reaches_every_process(jobs: Any) -> None:
    job = on_three_nodes(jobs)
    for rank in (1, 2):
        os.kill(job.record(rank)["pid"], signal.SIGUSR1)
        os.kill(job.record(rank)["pid"], signal.SIGTERM)  # in this order: it has survived the first one
    assert job.process.wait(30) != 0
    said = job.process.communicate()[1]
    assert "rank 1 of 3 ended, with exit code 0" in said or "rank 2 of 3 ended, with exit code 0" in said


def test_a_name_that_is_the_loopback_address_as_well_is_told_by_its_other_one(jobs: Any) -> None:
    """As on Debian, where a host's own name is 127.0.1.1 to itself."""
    said = "echo '127.0.1.1 STREAM n1'; echo '10.1.2.3 STREAM n1'"
    job = jobs(THREE, mode="serve", programs={"getent": said})
    job.wait_until_it_serves()
    assert job.record()["environment"]["VLLM_HOST_IP"] == "10.1.2.3"


@pytest.mark.parametrize("said", ["echo '127.0.1.1 STREAM n1'", "exit 2"])
def test_a_node_without_an_address_for_others_ends_the_job_with_the_remedy(jobs: Any, said: str) -> None:
    code, words = jobs(THREE, mode="serve", programs={"getent": said}).end()
    assert code == 1
    assert words == (
        "replica: n 1 has no address at its name that other nodes reach; set REPLICA_INTERFACE in vllm.environment\n"
    )


RAY = replace(THREE, template="vllm-apptainer-ray")


def test_a_ray_that_does_not_start_ends_the_job(jobs: Any) -> None:
    code, said = jobs(RAY, mode="3", REPLICA_INTERFACE="lo").end()
    assert code == 1
    assert "replica: Ray ended before anybody reached it" in said


def test_a_stop_is_heard_while_ray_starts_and_leaves_nothing(jobs: Any) -> None:
    job = jobs(RAY, mode="serve", REPLICA_INTERFACE="lo")
    job.wait_until_it_serves()
    head = job.record()["pid"]
    assert Path(f"/tmp/ray.{os.getpid()}").stat().st_mode & 0o777 == 0o700
    job.process.send_signal(signal.SIGTERM)
    assert job.end()[0] == 0
    assert not is_alive(head)
    assert not Path(f"/tmp/ray.{os.getpid()}").exists()


def test_rays_ports_are_none_of_its_own_workers(jobs: Any) -> None:
    """The replica's master port lies where Ray's workers are by default, which Ray refuses to start with."""
    job = jobs(RAY, mode="serve", REPLICA_INTERFACE="lo")
    job.wait_until_it_serves()
    words = job.record()["argv"]
    given = {word: words[words.index(word) + 1] for word in words if word.endswith("-port")}
    assert (given["--port"], given["--min-worker-port"], given["--max-worker-port"]) == ("18123", "0", "0")
    assert 61_000 <= int(given["--ray-client-server-port"]) < 65_536


@pytest.mark.parametrize("kind", ["vllm-apptainer", "vllm-venv"])
def test_with_ray_the_leader_alone_is_a_server(kind: str) -> None:
    spec = replace(THREE, template=f"{kind}-ray", vllm=replace(THREE.vllm, image="/software/vllm"))
    text = rendered(spec).text
    assert "--distributed-executor-backend ray" in text
    assert "--headless" not in text
    alone = rendered(replace(spec, slurm=SPEC.slurm)).text
    assert "ray" not in alone.replace("array", "")


def test_an_embedding_model_must_be_probed_as_one() -> None:
    spec = replace(SPEC, template="vllm-embedding")
    with pytest.raises(ScriptError, match=r"probe: must be embedding"):
        rendered(spec)
    assert "  --runner pooling\n" in rendered(replace(spec, probe="embedding")).text
