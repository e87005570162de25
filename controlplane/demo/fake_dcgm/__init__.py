"""A stand-in for dcgm-exporter, for nodes without GPUs: its exposition, its labels, its way of knowing jobs.

Nothing here looks at a GPU. What is shown is pretended, and follows what really runs: which job holds which GPU is read
from job mapping files, as dcgm-exporter reads them with `--hpc-job-mapping-dir`, and how busy a job's GPUs are is what
its vLLM says in `vllm:num_requests_running`. Reading order: `gpus` (a node's GPUs and their text), `jobs` (the mapping
files, and the scripts by which Slurm writes them), `__main__` (the process).

The names are those of dcgm-exporter 4.5 with its default counters, without those of NVLink, vGPU and profiling, and
with these more, which a site has to turn on: double and single bit ECC errors, throttling by power and heat, and
`DCGM_EXP_XID_ERRORS_COUNT`.
"""
