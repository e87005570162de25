"""Alert-driven control plane and OpenAI-compatible proxy for vLLM replicas that run as Slurm jobs."""
