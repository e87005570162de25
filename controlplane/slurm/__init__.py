"""Everything that speaks to Slurm: the client of slurmrestd, its tokens, and the job scripts."""
