"""Another Debian release's Slurm: a folder that holds that release, and how programs are run in it.

`made` makes the folder with debootstrap when it is missing, from the mirror that this machine's own apt uses, and
keeps it for the next time. A program in it sees that release's files, with some folders of this machine in their
places: the mounts are of the program's own mount namespace, so that nothing has to be undone when it ends, however it
ends. Needs root, or at least CAP_SYS_ADMIN and CAP_SYS_CHROOT.

Failure behaviour: whatever cannot be had raises `NoSuchRoot` with the end of what was said. A folder that was not
finished is made anew.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from controlplane.demo.children import SYSTEM_PATH, Account, MissingProgram, program

CACHE_VARIABLE = "CONTROLPLANE_SLURM_ROOTS"

_PACKAGES = (
    "slurmctld",
    "slurmd",
    "slurmrestd",
    "munge",
    "slurm-client",
    "slurm-wlm-jwt-plugin",
    "slurm-wlm-basic-plugins",
    # the libraries that this machine's Python needs, which jobs in there run
    "libpython3-stdlib",
    "libexpat1",
)
_NO_DAEMONS = "#!/bin/sh\nexit 101\n"  # policy-rc.d: the packages' own daemons are not started
# InRelease files expire; one of a mirror that stands still is as good as it was. Signatures are checked all the same.
_APT = ("apt-get", "-o", "Acquire::Check-Valid-Until=false")
_ENTER = """\
root=$1
shift
while [ "$1" != -- ]; do
  if [ -d "$1" ]; then mkdir -p "$root$1"; else mkdir -p "$root${1%/*}"; [ -e "$root$1" ] || : >"$root$1"; fi
  mount --rbind "$1" "$root$1"
  shift
done
shift
exec chroot "$root" "$@"
"""


class NoSuchRoot(RuntimeError):
    """The release cannot be had here; the text says why."""


@dataclass(frozen=True, slots=True)
class SlurmRoot:
    """A folder that holds a Debian release with Slurm."""

    path: Path

    def command(self, argv: Sequence[str], seen: Iterable[Path]) -> list[str]:
        """The command line that runs `argv` in there, with these files and folders of this machine in their places.

        The process that it starts becomes the program: its id stays.
        """
        places = [Path("/proc"), Path("/dev"), Path("/sys"), *seen]
        unshare = [program("unshare"), "--mount", "--propagation", "private", "/bin/sh", "-e", "-c", _ENTER, "sh"]
        return [*unshare, str(self.path), *map(str, places), "--", *argv]

    def program(self, name: str) -> str:
        """Where a program is in there. Raises `MissingProgram`."""
        for folder in SYSTEM_PATH.split(":"):
            if (self.path / folder.lstrip("/") / name).exists():
                return f"{folder}/{name}"
        raise MissingProgram(f"{name} is not installed in {self.path}; remove that folder to have it made anew")

    def account(self, name: str) -> Account:
        """The account in the release's own user database. Raises `KeyError` if there is none."""
        for line in (self.path / "etc" / "passwd").read_text().splitlines():
            found, _, uid, gid, *_ = line.split(":")
            if found == name:
                return Account(name, int(uid), int(gid))
        raise KeyError(f"no user {name} in {self.path}")


def this_python() -> list[Path]:
    """What must be seen to run this interpreter and this package: programs, standard library, venv, checkout."""
    files = [Path(sys.executable)]
    while files[-1].is_symlink():
        files.append(files[-1].parent / files[-1].readlink())
    folders = [Path(sys.prefix), Path(sysconfig.get_path("stdlib")), Path(__file__).resolve().parents[2]]
    outside = [file for file in files if not any(file.is_relative_to(folder) for folder in folders)]
    return [*folders, *outside]


def made(suite: str) -> SlurmRoot:
    """The root of a Debian suite (`trixie`, `sid`), made if it is missing. Raises `NoSuchRoot`."""
    if os.geteuid() != 0:
        raise NoSuchRoot(f"Slurm of Debian {suite} needs root: debootstrap and chroot do")
    cache = Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "controlplane" / "slurm-roots").resolve()
    root = SlurmRoot(cache / suite)
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{suite}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two that want it, one makes it
        mark = root.path / "made"
        if not mark.exists() or mark.read_text().split() != list(_PACKAGES):
            _make(suite, root.path, cache / f"{suite}.log")
            mark.write_text("\n".join(_PACKAGES))
    return root


def _make(suite: str, path: Path, log: Path) -> None:
    mirror = _mirror(suite, log)
    print(f"Fetching Debian {suite} with its Slurm from {mirror} into {path} ...", file=sys.stderr, flush=True)
    if path.exists():
        _run("rm", "-rf", "--one-file-system", str(path), suite=suite, log=log)
    if shutil.which("debootstrap", path=SYSTEM_PATH) is None:
        _run("apt-get", "install", "-y", "--no-install-recommends", "debootstrap", suite=suite, log=log)
    _run("debootstrap", "--variant=minbase", suite, str(path), mirror, suite=suite, log=log)
    policy = path / "usr" / "sbin" / "policy-rc.d"
    policy.write_text(_NO_DAEMONS)
    policy.chmod(0o755)
    for name in ("resolv.conf", "hosts"):
        shutil.copyfile(f"/etc/{name}", path / "etc" / name)
    inside = ("chroot", str(path), *_APT)
    _run(*inside, "update", suite=suite, log=log)
    _run(*inside, "install", "-y", "--no-install-recommends", *_PACKAGES, suite=suite, log=log)
    _run(*inside, "clean", suite=suite, log=log)


def _mirror(suite: str, log: Path) -> str:
    """Where this machine's own apt has Debian's main archive from."""
    if (uri := _mirror_known_to_apt()) is None:
        _run("apt-get", "update", suite=suite, log=log)  # it has not looked yet
        uri = _mirror_known_to_apt()
    if uri is None:
        raise NoSuchRoot(f"Debian {suite} cannot be had: this machine's apt names no mirror of Debian's main archive")
    return uri


def _mirror_known_to_apt() -> str | None:
    command = [program("apt-get"), "indextargets", "--format", "$(REPO_URI) $(LABEL) $(COMPONENT)"]
    listed = subprocess.run([*command, "Created-By: Packages"], capture_output=True, text=True, check=False).stdout
    named = (line.partition(" ") for line in listed.splitlines())
    return next((uri for uri, _, label_and_component in named if label_and_component == "Debian main"), None)


def _run(*command: str, suite: str, log: Path) -> None:
    environment = {"PATH": SYSTEM_PATH, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
    proxies = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    with log.open("a") as said:
        ended = subprocess.run(
            [program(command[0]), *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            env=environment | proxies,
            check=False,
        )
    if ended.returncode != 0:
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-3:]
        words = "\n".join(last)
        raise NoSuchRoot(f"Debian {suite} cannot be had: {command[0]} failed; {log} ends:\n{words}")
