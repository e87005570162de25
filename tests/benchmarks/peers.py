"""Measures our proxy beside the proxies that are made for language models, in the same way and with the same table.

`make bench-proxy-peers`. Each is installed into a virtual environment of its own below `build/peers`, at a fixed
version; one that cannot be installed, or does not start, is named with the reason, and the others are measured. They
run with one worker on the proxy's core. LiteLLM looks for its one master key, the others for none; ours looks for one
of many, and counts limits. The exit code is 1 if one of them uses less CPU per request than we do.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from controlplane.demo.children import free_ports
from tests.benchmarks.programs import BUILD, FAILURES, BenchmarkFailed, Cores, Process, allow_many_files, running
from tests.benchmarks.proxy import (
    Subject,
    all_rounds,
    chosen,
    options_of,
    report,
    results_file,
    scratch,
    the_usual,
    warm_up,
)
from tests.benchmarks.rig import MODEL, make_keys
from tests.benchmarks.tables import cheaper_than_each

VENVS = BUILD.parent / "peers"

_START_SECONDS = 120.0  # LiteLLM imports for half a minute


class CannotInstall(Exception):
    """A peer is not there and cannot be had; the text is what pip said."""


Command = Callable[[Path, Path, int, Sequence[str]], list[str]]
"""The command line, from the venv's programs, a directory for files, the port, and the upstreams' URLs."""


@dataclass(frozen=True, slots=True)
class Peer:
    name: str
    requirement: str
    command: Command
    python: str = "python3"
    environment: Mapping[str, str] = field(default_factory=dict)
    master_key: str = ""  # the variable in which it wants one
    overrides: tuple[
        str, ...
    ] = ()  # of pins in its own requirements that an index may not have; loopback needs neither

    def install(self) -> Path:
        """The directory of its programs, installed at most once. Raises `CannotInstall`."""
        venv = VENVS / self.name
        mark = venv / "installed"
        if mark.exists() and mark.read_text() == self.requirement:
            return venv / "bin"
        python = shutil.which(self.python)
        if python is None or subprocess.run([python, "--version"], capture_output=True, check=False).returncode != 0:
            raise CannotInstall(f"it needs {self.python}, which is not there, or does not run")
        shutil.rmtree(venv, ignore_errors=True)
        VENVS.mkdir(parents=True, exist_ok=True)
        print(f"installing {self.requirement} ...", file=sys.stderr)
        _must(python, "-m", "venv", str(venv))
        _must(str(venv / "bin" / "pip"), "install", "-q", "uv")
        overrides = VENVS / f"{self.name}.overrides"
        overrides.write_text("".join(f"{one}\n" for one in self.overrides))
        uv = [str(venv / "bin" / "uv"), "pip", "install", "-q", "--python", str(venv / "bin" / "python")]
        _must(*uv, "--override", str(overrides), self.requirement)
        mark.write_text(self.requirement)
        return venv / "bin"


def _must(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CannotInstall(done.stderr.strip()[-600:])


def _litellm(programs: Path, directory: Path, port: int, urls: Sequence[str]) -> list[str]:
    models = [
        {
            "model_name": MODEL,
            "litellm_params": {"model": f"hosted_vllm/{MODEL}", "api_base": f"{url}/v1", "api_key": "x"},
        }
        for url in urls
    ]
    configuration = {
        "model_list": models,
        "router_settings": {"routing_strategy": "least-busy"},
        "litellm_settings": {"telemetry": False, "request_timeout": 600},
    }
    file = directory / "litellm.yaml"
    file.write_text(json.dumps(configuration))  # JSON is YAML
    listen = ["--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
    return [str(programs / "litellm"), "--config", str(file), *listen]


def _vllm_router(programs: Path, _: Path, port: int, urls: Sequence[str]) -> list[str]:
    return [str(programs / "vllm-router"), *_rust_arguments(port, urls)]


def _sglang_router(programs: Path, _: Path, port: int, urls: Sequence[str]) -> list[str]:
    return [str(programs / "sglang-router"), "launch", *_rust_arguments(port, urls)]


def _rust_arguments(port: int, urls: Sequence[str]) -> list[str]:
    [metrics] = free_ports(1)
    listen = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics), "--log-level", "error"]
    return [*listen, "--policy", "power_of_two", "--worker-urls", *urls]


def _production_stack(programs: Path, _: Path, port: int, urls: Sequence[str]) -> list[str]:
    found = ["--service-discovery", "static", "--static-backends", ",".join(urls)]
    found += ["--static-models", ",".join(MODEL for _ in urls), "--routing-logic", "roundrobin"]
    return [
        *[str(programs / "vllm-router"), "--host", "127.0.0.1", "--port", str(port)],
        *["--log-level", "error", *found],
    ]


PRODUCTION_STACK = "git+https://github.com/vllm-project/production-stack@a6c01db05f65f556235413ba8dbcfb0c01132fff"

PEERS = (
    Peer(
        "litellm",
        "litellm[proxy]==1.109.1",
        _litellm,
        environment={"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"},
        master_key="LITELLM_MASTER_KEY",
        overrides=("certifi>=2024", "litellm-proxy-extras>=0.1"),
    ),
    Peer("vllm-router", "vllm-router==0.1.17", _vllm_router),
    Peer("sglang-router", "sglang-router==0.3.2", _sglang_router),
    Peer("production-stack", PRODUCTION_STACK, _production_stack, python="python3.12"),
)


def start(peer: Peer, stack: ExitStack, directory: Path, upstream_ports: Sequence[int], core: int) -> Subject | None:
    """The running peer, or None with a sentence on stderr."""
    try:
        programs = peer.install()
        [port] = free_ports(1)
        urls = [f"http://127.0.0.1:{one}" for one in upstream_ports]
        command = peer.command(programs, directory, port, urls)
        environment = {**peer.environment, "HOME": str(directory)}
        arguments = ["--loose"]  # they may add events of their own
        if peer.master_key:
            [environment[peer.master_key]] = make_keys(1)
            key_file = directory / f"{peer.name}-key.txt"
            key_file.write_text(environment[peer.master_key] + "\n")
            arguments += ["--keys", str(key_file)]
        process = stack.enter_context(
            running(Process(command, directory / f"{peer.name}.log", core=core, environment=environment))
        )
        process.wait_listening(port, seconds=_START_SECONDS)
        subject = Subject(peer.name, (port,), process, tuple(arguments))
        warm_up(subject)
    except CannotInstall as error:
        print(f"{peer.name} is not measured, it cannot be installed: {error}", file=sys.stderr)
    except BenchmarkFailed as error:
        print(f"{peer.name} is not measured: {error}", file=sys.stderr)
    else:
        return subject
    return None


def main(words: Sequence[str] | None = None) -> int:
    parser = options_of(__doc__)
    parser.add_argument("--peers", default=",".join(peer.name for peer in PEERS), help="which, with commas")
    parser.add_argument("--production-stack", default=PRODUCTION_STACK, help="what it is installed from")
    options = parser.parse_args(words)
    scenarios, names, sizes = chosen(options)
    wanted = options.peers.split(",")
    all_peers = [
        replace(peer, requirement=options.production_stack) if peer.requirement == PRODUCTION_STACK else peer
        for peer in PEERS
    ]
    allow_many_files()
    cores = Cores.shared_out()
    try:
        with ExitStack() as stack:
            directory = stack.enter_context(scratch())
            usual, up = stack.enter_context(the_usual(directory, names, options.root, options.keys, cores))
            found = [start(peer, stack, directory, up.ports, cores.proxy) for peer in all_peers if peer.name in wanted]
            peers = [subject for subject in found if subject is not None]
            rng = random.Random(options.seed)
            results = all_rounds([*usual, *peers], scenarios, up, sizes, options.rounds, rng)
    except FAILURES as error:
        print(error, file=sys.stderr)
        return 2
    judged = cheaper_than_each(results, [peer.name for peer in peers])
    code = report(results, judged, results_file("peers"))
    missing = sorted(set(wanted) - {peer.name for peer in peers})
    if missing:
        print(f"not measured: {', '.join(missing)}")
    return code


if __name__ == "__main__":
    sys.exit(main())
