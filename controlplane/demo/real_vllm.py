"""The demo with real engines: vLLM on the CPU, with a tiny model of random weights, as the jobs of a real Slurm.

An engine takes a core and 1.1 GB, and some twenty seconds to start, so there are two at most, and limits of time are
generous. Each runs four requests at once; a dozen and a half clients make the others wait in its queue, as vLLM's own
metrics then tell.

Failure behaviour: `NoVllm` if the venv has no vLLM, or the model cannot be made.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from controlplane.core.types import ReplicaSetSpec, RoutingPolicy, ScaleDown, ScaleUp, SlurmResources, VllmOptions
from controlplane.demo.scenario import Chapter, Play
from controlplane.demo.site import SiteOptions

BUSY_CLIENTS = 20
_RUN_AT_ONCE = 4
_START_SECONDS = 240.0  # of a machine that has other things to do; alone it takes twenty
_MODEL_MAKER = Path(__file__).with_name("tiny_model.py")

ARGUMENTS = (
    *("--load-format", "dummy", "--dtype", "bfloat16", "--enforce-eager"),
    *("--max-model-len", "8192", "--kv-cache-memory-bytes", "64M"),  # the least that is taken otherwise is a whole GiB
    *("--distributed-executor-backend", "uni", "--max-num-seqs", str(_RUN_AT_ONCE)),
    *("--stream-interval", "8"),  # tokens in a piece: with one in each, passing them on takes as much as making them
)
"""Of `vllm serve` on the CPU, for a model of `tiny_model`."""

ENVIRONMENT = {
    # two processes instead of three, and one core for the engine: what is left serves the rest of the site
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "REPLICA_HOST": "127.0.0.1",  # read by the template
}
"""Of a job that runs it."""


class NoVllm(RuntimeError):
    """There is no vLLM to show; the text says what to do."""


def make_model(venv: Path, folder: Path) -> None:
    """Make the model, which other users may read. Raises `NoVllm`."""
    python = venv / "bin" / "python"
    if not (venv / "bin" / "vllm").exists() or not python.exists():
        raise NoVllm(f"{venv} is no venv with vLLM in it; `make demo-vllm` makes one")
    made = subprocess.run([python, _MODEL_MAKER, folder], capture_output=True, text=True, umask=0o022, check=False)
    if made.returncode != 0:
        raise NoVllm(f"the model could not be made: {made.stderr.strip()[-500:]}")


def spec(venv: Path, model: Path, *, name: str = "demo") -> ReplicaSetSpec:
    """One engine a replica, two at most."""
    return ReplicaSetSpec(
        name=name,
        model="tiny-llama",
        template="vllm-venv",
        min_replicas=0,
        max_replicas=2,
        slurm=SlurmResources(partition="gpu", gpus_per_node=1, cpus_per_task=4, time_limit_seconds=3600),
        vllm=VllmOptions(image=str(venv), model_path=str(model), args=ARGUMENTS, environment=ENVIRONMENT),
        scale_up=ScaleUp(cooldown_seconds=10),
        scale_down=ScaleDown(cooldown_seconds=20, stabilization_window_seconds=15),
        start_timeout_seconds=600,
        drain_timeout_seconds=120,
        # as in the demo with stand-ins: more than an engine runs at once, so that its own queue grows
        routing=RoutingPolicy(max_in_flight=64, slow_start_seconds=5),
    )


def play(venv: Path, directory: Path) -> Play:
    """What is shown with the vLLM of this venv; the model is made below the demo's directory. Raises `NoVllm`."""
    venv, model = venv.resolve(), directory.resolve() / "model"
    make_model(venv, model)
    site = SiteOptions(
        spec(venv, model),
        nodes=2,
        settings={
            # the first request waits for an engine that starts, streamed or not
            "CONTROLPLANE_PROXY__HOLD_SECONDS_WITHOUT_STREAM": str(_START_SECONDS),
            "CONTROLPLANE_PROBE__INTERVAL_SECONDS": "2",
        },
        scrape_interval_seconds=2,  # busy engines answer late, and a scrape has nine tenths of its interval
    )
    return Play(site, CHAPTERS, tokens=300, request_timeout_seconds=2 * _START_SECONDS)


CHAPTERS = (
    Chapter(
        "nothing runs; one request comes, is held while vLLM starts, and is answered by it",
        1,
        lambda seen, story: seen.routable == 1 and story.load.count.done >= 1,
        _START_SECONDS,
    ),
    Chapter(
        f"{BUSY_CLIENTS} clients ask; vLLM runs {_RUN_AT_ONCE} at once, the others wait in its queue",
        BUSY_CLIENTS,
        lambda seen, _: seen.routable == 2,
        2 * _START_SECONDS,
    ),
    Chapter(
        "two engines share the load",
        BUSY_CLIENTS,
        lambda seen, _: len([one for one in seen.endpoints.values() if one.running]) == 2,
        60,
    ),
    Chapter(
        "the load ends but for two clients; one engine drains under its streams",
        2,
        lambda seen, _: seen.routable == 1 and len(seen.replicas) == 1,
        240,
    ),
)
