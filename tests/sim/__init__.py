"""The real reconciler on a real PostgreSQL, against a Slurm, engines, alerts and operators that a seed makes up.

Time is virtual and every call of the product is a step that the seed orders, so that a seed lives the same life again:
see `docs/simulation.md`.
"""
