"""Loops that make observed meet desired: load the world, decide purely, act, write with guards.

Every loop has one shape, `Loop`: a name, an interval and `run_once(now)`, which says one sentence if it did something.
The `Runner` runs them while this process holds the lease. A loop's retry is its next round.
"""
