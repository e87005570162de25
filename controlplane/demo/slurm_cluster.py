"""A real Slurm cluster on one machine: slurmctld, several slurmd, slurmrestd and munge, on 127.0.0.1.

Every node is a slurmd of its own on this host, with fake GPUs (links to /dev/null: jobs get CUDA_VISIBLE_DEVICES,
nothing is isolated). Debian 12's release 22.05 and later ones; those of other Debian releases run in a folder that
holds one (`slurm_root`), and so do their jobs. Each start makes an empty cluster; `restart` of a daemon keeps its
state. slurmrestd listens twice: on TCP for JSON web tokens, and on a unix socket where jobs run as the job user without
any token.

Failure behaviour: see `children`. Slurm switches users, so root is needed: anybody else gets `StartFailed`.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from controlplane.demo.children import SYSTEM_PATH, Account, Server, StartFailed, free_ports, is_listening, program
from controlplane.demo.slurm_root import SlurmRoot, this_python

PARTITION = "gpu"
"""The only partition; it holds all nodes."""

_READY_SECONDS = 30.0
_LONGEST_DIRECTORY = 80  # a unix socket's path holds 107 characters

_CONF = """\
ClusterName=demo
SlurmctldHost=localhost(127.0.0.1)
SlurmUser={slurm}
SlurmctldPort={slurmctld_port}
# without this, slurmctld and slurmd listen on 0.0.0.0
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
AuthInfo=socket={directory}/run/munge.socket
AuthAltTypes=auth/jwt
AuthAltParameters=jwt_key={directory}/etc/jwt_hs256.key
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool/%n
SlurmctldPidFile={directory}/run/slurmctld.pid
SlurmdPidFile={directory}/run/slurmd-%n.pid
SlurmctldDebug=verbose
SlurmdDebug=info
# no cgroups
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# jobs start within a second of their submission
SchedulerParameters=batch_sched_delay=0,sched_interval=1
# the hardware is what is written here, not what slurmd finds
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=30
KillWait=10
MinJobAge=300
JobRequeue=0
GresTypes=gpu
NodeName={nodes} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports} \\
  CPUs={cpus} RealMemory={memory} {gres} State=UNKNOWN
PartitionName={partition} Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class CommandFailed(RuntimeError):
    """A Slurm command ended with an error, which is the text, or not in time."""


class SlurmCluster(Server):
    """A cluster of `nodes` nodes (n1, n2, ...) with `gpus` GPUs each, empty at each start.

    Children are named munged, slurmctld, slurmd-n1 ..., slurmrestd and slurmrestd-local. `user` is whom jobs run as;
    left out, it is the first of www-data and the current user who can run this program. `root`: whose Slurm it is; left
    out, this machine's own.
    """

    def __init__(
        self,
        directory: Path,
        *,
        nodes: int = 4,
        gpus: int = 8,
        cpus: int = 16,
        memory_mib: int = 64_000,
        user: str | None = None,
        extra_conf: Sequence[str] = (),
        root: SlurmRoot | None = None,
    ) -> None:
        super().__init__(directory)
        self._root = root
        self.node_names = tuple(f"n{number}" for number in range(1, nodes + 1))
        self._gpus = gpus
        self._cpus = cpus
        self._memory_mib = memory_mib
        self._extra_conf = tuple(extra_conf)
        self._wanted_user = user
        self._job_account: Account | None = None
        self._listens_at: dict[str, int | Path] = {}

    @property
    def url(self) -> str:
        """Where slurmrestd takes JSON web tokens."""
        return f"http://127.0.0.1:{self._listens_at['slurmrestd']}"

    @property
    def socket_path(self) -> Path:
        """The unix socket on which slurmrestd needs no token; requests act as the job user."""
        return self.directory / "sock" / "slurmrestd.sock"

    def port(self, name: str) -> int:
        """The port of 127.0.0.1 on which a daemon listens."""
        port = self._listens_at[name]
        assert isinstance(port, int), f"{name} listens on a socket"
        return port

    @property
    def jwt_key_file(self) -> Path:
        """The HS256 key of the cluster's tokens: power over every user's jobs. Only root and Slurm can read it."""
        return self.directory / "etc" / "jwt_hs256.key"

    @property
    def conf_file(self) -> Path:
        """What Slurm's own commands want as SLURM_CONF."""
        return self.directory / "etc" / "slurm.conf"

    @property
    def jobs_directory(self) -> Path:
        """A folder in which everybody's jobs may write."""
        return self.directory / "jobs"

    @property
    def user_name(self) -> str:
        """Whom jobs run as. Known from the start on."""
        if self._job_account is None:
            raise StartFailed("the Slurm cluster was not started yet")
        return self._job_account.name

    def run(self, name: str, *arguments: str, timeout_seconds: float = 20) -> str:
        """What a Slurm command (`squeue`, `sinfo`, `scontrol` ...) prints. Raises `CommandFailed`."""
        try:
            done = subprocess.run(
                self._inside([self._program(name), *arguments]),
                env={"PATH": SYSTEM_PATH, "LC_ALL": "C.UTF-8", "SLURM_CONF": str(self.conf_file)},
                capture_output=True,
                text=True,
                timeout=timeout_seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise CommandFailed(f"{name}: no answer within {timeout_seconds:g} s") from None
        if done.returncode != 0:
            raise CommandFailed(f"{name}: {(done.stderr or done.stdout).strip()[:256]}")
        return done.stdout

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to a daemon. Jobs go on, whatever becomes of their slurmd."""
        self.children.kill(name, number)

    def restart(self, name: str) -> None:
        """Start a daemon again, ending it before if it still runs; returns once it listens, see also `is_ready`."""
        if name == "slurmrestd-local":  # it does not bind to a socket that is there
            self.socket_path.unlink(missing_ok=True)
        self.children.restart(name)
        self._wait_until_listening(name)

    def is_ready(self) -> bool:
        """Whether all daemons listen, slurmctld answers and every node responds to it."""
        if not all(map(self._is_listening, self._listens_at)):
            return False
        try:
            is_up = " is UP" in self.run("scontrol", "ping", timeout_seconds=5)
            states = self.run("sinfo", "--noheader", "--Node", "--format", "%N %T", timeout_seconds=5).splitlines()
        except CommandFailed:
            return False
        responding = {state.split()[0] for state in states if re.search(r" (idle|mixed|alloc|compl|drain)\w*$", state)}
        return is_up and responding == set(self.node_names)

    def _bring_up(self) -> None:
        if os.geteuid() != 0:
            raise StartFailed("a Slurm cluster that runs jobs as another user must be started by root")
        if len(str(self.directory)) > _LONGEST_DIRECTORY:
            raise StartFailed(f"the path is too long for unix sockets: {self.directory}")
        for name in ("slurmctld", "slurmd", "slurmrestd", "munged", "munge", "scontrol", "sinfo"):
            self._program(name)
        self._job_account = self._find_job_account()
        slurmds = [f"slurmd-{node}" for node in self.node_names]
        self._listens_at = {
            "munged": self.directory / "run" / "munge.socket",
            "slurmrestd-local": self.socket_path,
            **dict(zip(["slurmrestd", "slurmctld", *slurmds], free_ports(2 + len(slurmds)), strict=True)),
        }
        slurm = self._account("slurm")
        self._write_files(slurm, self._job_account)
        self._start_daemons(slurm, self._job_account)
        self.children.wait_until(
            self.is_ready, "the Slurm cluster is ready", needs=self._listens_at, timeout_seconds=_READY_SECONDS
        )

    def _write_files(self, slurm: Account, user: Account) -> None:
        for folder in ("etc", "run", "state", "spool", "dev", "jobs", "sock"):
            path = self.directory / folder
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(mode=0o755)
        for folder in ("run", "state"):
            os.chown(self.directory / folder, slurm.uid, slurm.gid)
        os.chown(self.directory / "sock", user.uid, user.gid)
        self.jobs_directory.chmod(0o1777)
        for node in self.node_names:
            (self.directory / "spool" / node).mkdir()
        for key, size_bytes in ((self.jwt_key_file, 32), (self._munge_key_file, 128)):
            key.touch(mode=0o600)
            key.write_bytes(secrets.token_bytes(size_bytes))
            os.chown(key, slurm.uid, slurm.gid)
        gpu_files = [self.directory / "dev" / f"gpu{number}" for number in range(self._gpus)]
        for gpu_file in gpu_files:
            gpu_file.symlink_to("/dev/null")
        (self.directory / "etc" / "gres.conf").write_text("".join(f"Name=gpu File={path}\n" for path in gpu_files))
        # later releases want a cgroup plugin unless told that there is none; 22.05 does not know the key
        if self._major_version() >= 23:
            (self.directory / "etc" / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        conf = _CONF.format(
            slurm=slurm.name,
            slurmctld_port=self._listens_at["slurmctld"],
            directory=self.directory,
            nodes=",".join(self.node_names),
            ports=",".join(str(self._listens_at[f"slurmd-{node}"]) for node in self.node_names),
            cpus=self._cpus,
            memory=self._memory_mib,
            gres=f"Gres=gpu:{self._gpus}" if self._gpus else "",
            partition=PARTITION,
        )
        self.conf_file.write_text(conf + "".join(f"{line}\n" for line in self._extra_conf))

    def _start_daemons(self, slurm: Account, user: Account) -> None:
        environment = {"SLURM_CONF": str(self.conf_file)}
        munged = ["munged", "--foreground", "--force", f"--socket={self._listens_at['munged']}"]
        munged += [f"--key-file={self._munge_key_file}"]
        munged += [f"--{kind}-file={self.directory}/run/munged.{kind}" for kind in ("pid", "seed")]
        self._start("munged", munged, account=slurm)
        self._wait_until_listening("munged")
        self._start("slurmctld", ["slurmctld", "-D"], account=slurm, environment=environment)
        for node in self.node_names:
            self._start(f"slurmd-{node}", ["slurmd", "-D", "-N", node], environment=environment)
        slurmrestd = ["slurmrestd", "-s", self._openapi_plugins()]
        self._start(
            "slurmrestd",
            [*slurmrestd, "-a", "rest_auth/jwt", self.url.removeprefix("http://")],
            account=self._account("nobody"),
            environment={**environment, "SLURM_JWT": "daemon"},  # without it every token is refused
        )
        if user.uid == 0:  # slurmrestd refuses root, unless told otherwise
            environment["SLURMRESTD_SECURITY"] = "disable_user_check"
        self._start(
            "slurmrestd-local",
            [*slurmrestd, "-a", "rest_auth/local", f"unix:{self.socket_path}"],
            account=user,
            environment=environment,
        )

    def _start(
        self,
        name: str,
        argv: Sequence[str],
        *,
        account: Account | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start a program of the cluster's release; it changes to the account there, where entering needs root."""
        line = (account or Account.current()).command([self._program(argv[0]), *argv[1:]])
        self.children.start(name, self._inside(line), environment=environment)

    def _inside(self, line: list[str]) -> list[str]:
        return line if self._root is None else self._root.command(line, [self.directory, *this_python()])

    def _program(self, name: str) -> str:
        return program(name) if self._root is None else self._root.program(name)

    def _account(self, name: str) -> Account:
        return Account.named(name) if self._root is None else self._root.account(name)

    def _is_listening(self, name: str) -> bool:
        return is_listening(self._listens_at[name])

    def _wait_until_listening(self, name: str) -> None:
        self.children.wait_until(
            lambda: self._is_listening(name), f"{name} listens", needs=[name], timeout_seconds=_READY_SECONDS
        )

    @property
    def _munge_key_file(self) -> Path:
        return self.directory / "etc" / "munge.key"

    def _find_job_account(self) -> Account:
        """Who can run this interpreter and this package: checkouts may lie where only their owner may look."""
        if self._wanted_user is not None:
            return self._account(self._wanted_user)
        www_data = self._account("www-data")
        imports = subprocess.run(
            self._inside(www_data.command([sys.executable, "-c", "import controlplane"])),
            cwd="/",
            env={"PATH": SYSTEM_PATH},
            capture_output=True,
            check=False,
        )
        return www_data if imports.returncode == 0 else Account.current()

    def _major_version(self) -> int:
        version = self._inside([self._program("slurmctld"), "-V"])
        return int(subprocess.run(version, capture_output=True, text=True, check=True).stdout.split()[1].split(".")[0])

    def _openapi_plugins(self) -> str:
        if self._major_version() >= 23:
            return "slurmctld"
        # 22.05 dies at its start when it loads the plugins of slurmdbd and there is none
        installed = (self._root.path if self._root else Path("/")) / "usr" / "lib"
        names = sorted(path.name for path in installed.glob("*/slurm-wlm/openapi_v*.so"))
        return ",".join(re.sub(r"openapi_v(\d+)_(\d+)_(\d+)\.so", r"openapi/v\1.\2.\3", name) for name in names)
