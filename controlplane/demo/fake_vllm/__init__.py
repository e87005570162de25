"""A stand-in for vLLM 0.32 on the wire: its routes, answers, errors, metrics, queue and shutdown, without a model.

A Slurm job of the demo runs it where a site runs vLLM. Reading order: `engine` (queue, slots, decode steps), `prompts`
(what a request asks for, or which error it earns), `answers` (bodies), `api` (routes), `server` (listening, signals),
`ranks` (several nodes), `metrics` (what Prometheus scrapes), `faults` (trouble on demand). `text` and
`exchange` serve those.

Known differences from the real server, each on purpose:
- text is made of stock words, chosen by the prompt; `n`, `stop`, `logprobs`, tools, images, batched prompts and
  `continuous_usage_stats` are not offered (`n` above 1 and batched prompts are refused, the others ignored);
- `/v1/responses`, `/v1/messages` and `/invocations` do not exist;
- SIGTERM while loading ends the process at once, where vLLM may hang;
- when a drain is over the process leaves at once, where vLLM lingers for some seconds;
- constant metrics of features that it lacks (flops estimates, multi-modal and external caches, `cache_config_info`)
  are not exposed.
"""
