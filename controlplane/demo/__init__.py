"""A whole cluster on one machine: real Slurm, PostgreSQL, Prometheus and Alertmanager, a fake vLLM, and load."""
