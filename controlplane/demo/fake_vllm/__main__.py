"""`python -m controlplane.demo.fake_vllm --model NAME --port P ...`: the fake as a process.

The socket is bound before the model "loads" and listens only after that, so probes are refused until everything
answers. A port that somebody listens on ends the process with exit code 1. The API key is best given by VLLM_API_KEY,
which keeps it out of the process list.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import uvloop

from controlplane.demo.fake_vllm.api import ApiOptions
from controlplane.demo.fake_vllm.engine import EngineOptions
from controlplane.demo.fake_vllm.faults import parse_fault_flags
from controlplane.demo.fake_vllm.prompts import ServedModel
from controlplane.demo.fake_vllm.ranks import Ranks, follow, gather
from controlplane.demo.fake_vllm.server import ServerOptions, serve

_Number = TypeVar("_Number", int, float)


def main(arguments: list[str]) -> int:
    """Serve until told to stop; return the exit code."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.max_model_len > given.kv_cache_tokens:
        parser.error("--max-model-len must not be larger than --kv-cache-tokens: one request must fit")
    try:
        plan = parse_fault_flags(given.fault)
    except ValueError as error:
        parser.error(f"--fault: {error}")
    ranks = Ranks(given.nnodes, given.node_rank, (given.master_addr, given.master_port))
    if not given.node_rank < given.nnodes or given.headless is not (given.node_rank > 0):
        parser.error("--node-rank must be less than --nnodes, and --headless be given for all ranks but 0")
    if given.headless:
        follow(ranks)
    keys = given.api_key or [key for key in (os.environ.get("VLLM_API_KEY"),) if key]
    options = ServerOptions(
        api=ApiOptions(
            model=ServedModel(tuple(given.served_model_name or [given.model]), given.model, given.max_model_len),
            task=given.task,
            api_keys=tuple(keys),
        ),
        engine=EngineOptions(
            max_num_seqs=given.max_num_seqs,
            tokens_per_second=given.tokens_per_second,
            kv_cache_tokens=given.kv_cache_tokens,
            max_num_queued_reqs=given.max_num_queued_reqs,
        ),
        shutdown_timeout_seconds=given.shutdown_timeout,
        fault_plan=plan,
    )
    try:
        bound = _bind(given.host, given.port)
        followers = gather(ranks)
        time.sleep(given.load_seconds + plan.slow_start_seconds)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(options, bound, followers))
    except OSError as error:
        print(f"OSError: {error}", file=sys.stderr)
        return 1
    return 0


def _bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: as with vLLM, two such may share a port until one listens."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind((host, port))
    return bound


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m controlplane.demo.fake_vllm", description="A stand-in for vLLM.")
    add = parser.add_argument
    add("--model", required=True, help="what is served; reported as the root of the model list")
    add("--served-model-name", nargs="+", help="names that clients use, the first one in metrics; default: --model")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000)
    add("--api-key", nargs="+", help="keys that open /v1 and /fault; default: VLLM_API_KEY, else no key is needed")
    add("--task", choices=("generate", "embed"), default="generate")
    add("--max-model-len", type=_more_than_zero(int), default=8192, help="tokens of prompt and output together")
    add("--max-num-seqs", type=_more_than_zero(int), default=16, help="requests that run at the same time")
    add("--max-num-queued-reqs", type=_more_than_zero(int), help="running and waiting requests; default: no limit")
    add("--tokens-per-second", type=_more_than_zero(float), default=30.0, help="decode speed of each request")
    add("--kv-cache-tokens", type=_more_than_zero(int), default=131072)
    add("--load-seconds", type=_zero_or_more, default=0.0, help="time until the port listens")
    add("--shutdown-timeout", type=_zero_or_more, default=0.0, help="seconds that requests may go on after SIGTERM")
    add("--nnodes", type=_more_than_zero(int), default=1, help="how many ranks there are, one on each node")
    add("--node-rank", type=int, default=0, help="which one this is; 0 is the leader, which serves")
    add("--master-addr", default="127.0.0.1", help="where the leader waits for the others")
    add("--master-port", type=int, default=29501)
    add("--headless", action="store_true", help="be a follower: serve nothing")
    add("--fault", action="append", default=[], help="slow-start[=SECONDS], crash-after=SECONDS or error-rate=SHARE")
    return parser


def _more_than_zero(kind: Callable[[str], _Number]) -> Callable[[str], _Number]:
    def parse(text: str) -> _Number:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError("must be more than 0")
        return value

    return parse


def _zero_or_more(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
