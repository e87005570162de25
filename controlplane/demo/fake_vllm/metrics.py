"""The metrics of vLLM 0.32 that follow from the load, under its names, labels and bucket edges.

Histograms of whole requests (queue time, prefill, decode, end to end) are observed when a request finishes, time to
first token with the first token, and gauges are what the engine last reported: all as vLLM does. An aborted request
moves no histogram and is not counted in `request_success_total`.
"""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from controlplane.demo.fake_vllm.engine import EngineLoad, Generation

CONTENT_TYPE = CONTENT_TYPE_LATEST

_LABELS = ("model_name", "engine")
_ENGINE = "0"

_TTFT_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_TOKEN_SECONDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_SECONDS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_PARAMS_N = (1, 2, 5, 10, 20)
_PREEMPTIONS = (1, 2, 3, 4, 5, 10, 20)

_UNCOUNTED_HANDLERS = frozenset({"/health", "/metrics", "/ping", "/version", "/load"})


def one_two_five(limit: int) -> list[int]:
    """Bucket edges 1, 2, 5, 10, 20, 50 ... up to `limit`: vLLM's edges for token counts."""
    edges: list[int] = []
    decade = 1
    while decade <= limit:
        edges.extend(edge for edge in (decade, 2 * decade, 5 * decade) if edge <= limit)
        decade *= 10
    return edges


class VllmMetrics:
    """Observes an engine and the HTTP routes; `render` gives the text that Prometheus scrapes."""

    def __init__(self, model_name: str, max_model_len: int) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        GCCollector(registry=self._registry)
        self._model_name = model_name
        token_edges = one_two_five(max_model_len)

        self._running = self._gauge("num_requests_running", "Number of requests in model execution batches.")
        self._waiting = self._gauge("num_requests_waiting", "Number of requests waiting to be processed.")
        by_reason = Gauge(
            "vllm:num_requests_waiting_by_reason",
            "Number of waiting requests by reason.",
            (*_LABELS, "reason"),
            registry=self._registry,
        )
        self._waiting_for_capacity = by_reason.labels(model_name, _ENGINE, "capacity")
        by_reason.labels(model_name, _ENGINE, "deferred")
        sleep_state = Gauge(
            "vllm:engine_sleep_state", "Engine sleep state.", (*_LABELS, "sleep_state"), registry=self._registry
        )
        sleep_state.labels(model_name, _ENGINE, "awake").set(1)
        sleep_state.labels(model_name, _ENGINE, "weights_offloaded")
        sleep_state.labels(model_name, _ENGINE, "discard_all")
        self._kv_usage = self._gauge("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.")

        self._prefix_queries = self._counter("prefix_cache_queries", "Prefix cache queries, in queried tokens.")
        self._counter("prefix_cache_hits", "Prefix cache hits, in cached tokens.")
        self._preemptions = self._counter("num_preemptions", "Cumulative number of preemption from the engine.")
        self._prompt_tokens = self._counter("prompt_tokens", "Number of prefill tokens processed.")
        self._generation_tokens = self._counter("generation_tokens", "Number of generation tokens processed.")
        success = Counter(
            "vllm:request_success",
            "Count of successfully processed requests.",
            (*_LABELS, "finished_reason"),
            registry=self._registry,
        )
        self._success = {
            reason: success.labels(model_name, _ENGINE, reason)
            for reason in ("stop", "length", "abort", "error", "repetition")
        }
        rejections = Counter(
            "vllm:admission_rejections",
            "Number of admission attempts rejected by a queue limit, by reason.",
            ("model_name", "reason"),
            registry=self._registry,
        )
        self._rejections = rejections.labels(model_name, "max_num_queued_reqs")
        rejections.labels(model_name, "max_num_queued_tokens")

        self._ttft = self._histogram("time_to_first_token_seconds", "Time to first token.", _TTFT_SECONDS)
        self._itl = self._histogram("inter_token_latency_seconds", "Inter-token latency.", _TOKEN_SECONDS)
        self._tpot = self._histogram(
            "request_time_per_output_token_seconds", "Time per output token, per request.", _TOKEN_SECONDS
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "E2e request latency.", _REQUEST_SECONDS)
        self._queue_time = self._histogram("request_queue_time_seconds", "Time in WAITING phase.", _REQUEST_SECONDS)
        self._inference_time = self._histogram(
            "request_inference_time_seconds", "Time in RUNNING phase.", _REQUEST_SECONDS
        )
        self._prefill_time = self._histogram("request_prefill_time_seconds", "Time in PREFILL phase.", _REQUEST_SECONDS)
        self._decode_time = self._histogram("request_decode_time_seconds", "Time in DECODE phase.", _REQUEST_SECONDS)
        self._step_tokens = self._histogram("iteration_tokens_total", "Tokens per engine_step.", _STEP_TOKENS)
        self._request_prompt_tokens = self._histogram("request_prompt_tokens", "Prefill tokens.", token_edges)
        self._request_generation_tokens = self._histogram(
            "request_generation_tokens", "Generation tokens.", token_edges
        )
        self._request_max_generation_tokens = self._histogram(
            "request_max_num_generation_tokens", "Maximum number of requested generation tokens.", token_edges
        )
        self._params_n = self._histogram("request_params_n", "The n request parameter.", _PARAMS_N)
        self._params_max_tokens = self._histogram(
            "request_params_max_tokens", "The max_tokens request parameter.", token_edges
        )
        self._request_preemptions = self._histogram(
            "request_num_preemptions", "Times a request was preempted.", _PREEMPTIONS
        )
        self._prefill_kv_tokens = self._histogram(
            "request_prefill_kv_computed_tokens", "New KV tokens computed during prefill.", token_edges
        )
        self._http_requests = Counter(
            "http_requests",
            "Total number of requests by method, status and handler.",
            ("handler", "method", "status"),
            registry=self._registry,
        )

    # --- the engine's observer ---

    def saw_first_output(self, generation: Generation) -> None:
        self._prompt_tokens.inc(generation.prompt_tokens)
        self._prefix_queries.inc(generation.prompt_tokens)
        if generation.first_output_at is not None and generation.generated > 0:
            self._ttft.observe(generation.first_output_at - generation.arrived_at)

    def saw_next_output(self, seconds_since_last: float) -> None:
        self._itl.observe(seconds_since_last)

    def saw_step(self, prompt_tokens: int, generated_tokens: int) -> None:
        self._generation_tokens.inc(generated_tokens)
        self._step_tokens.observe(prompt_tokens + generated_tokens)

    def saw_finish(self, generation: Generation) -> None:
        scheduled_at, first_at, finished_at = (
            generation.scheduled_at,
            generation.first_output_at,
            generation.finished_at,
        )
        if scheduled_at is None or first_at is None or finished_at is None:
            raise ValueError("the generation has not finished")
        decode_seconds = finished_at - first_at
        self._success[generation.finish_reason].inc()
        self._e2e.observe(finished_at - generation.arrived_at)
        self._queue_time.observe(scheduled_at - generation.arrived_at)
        self._inference_time.observe(finished_at - scheduled_at)
        self._prefill_time.observe(first_at - scheduled_at)
        self._decode_time.observe(decode_seconds)
        self._request_prompt_tokens.observe(generation.prompt_tokens)
        self._prefill_kv_tokens.observe(generation.prompt_tokens)
        self._request_preemptions.observe(generation.preemptions)
        if generation.generated > 0:
            self._tpot.observe(decode_seconds / (generation.generated - 1) if generation.generated > 1 else 0.0)
            self._request_generation_tokens.observe(generation.generated)
            self._request_max_generation_tokens.observe(generation.generated)
            self._params_n.observe(1)
            self._params_max_tokens.observe(generation.max_tokens)

    def saw_preemption(self) -> None:
        self._preemptions.inc()

    def saw_rejection(self) -> None:
        self._rejections.inc()

    # --- the routes ---

    def saw_http_request(self, handler: str, method: str, status: int) -> None:
        """Count an answered request; `handler` is the route, or "none" for an unknown path."""
        if handler not in _UNCOUNTED_HANDLERS:
            self._http_requests.labels(handler, method, f"{status // 100}xx").inc()

    def render(self, load: EngineLoad) -> bytes:
        """The whole exposition, with the gauges set from `load`."""
        self._running.set(load.running)
        self._waiting.set(load.waiting)
        self._waiting_for_capacity.set(load.waiting)
        self._kv_usage.set(load.kv_cache_usage)
        return generate_latest(self._registry)

    def _gauge(self, name: str, documentation: str) -> Gauge:
        return Gauge(f"vllm:{name}", documentation, _LABELS, registry=self._registry).labels(self._model_name, _ENGINE)

    def _counter(self, name: str, documentation: str) -> Counter:
        family = Counter(f"vllm:{name}", documentation, _LABELS, registry=self._registry)
        return family.labels(self._model_name, _ENGINE)

    def _histogram(self, name: str, documentation: str, edges: Sequence[float]) -> Histogram:
        family = Histogram(f"vllm:{name}", documentation, _LABELS, registry=self._registry, buckets=edges)
        return family.labels(self._model_name, _ENGINE)
