"""How many requests a replica runs at once, by its arguments."""

from __future__ import annotations

import pytest

from controlplane.core.engines import runs_at_once


@pytest.mark.parametrize(
    ("args", "count"),
    [
        ((), 256),
        (("--max-num-seqs", "12", "--tokens-per-second", "30"), 12),
        (("--max-model-len", "8192", "--max-num-seqs=64"), 64),
        (("--max_num_seqs", "64"), 64),
        (("--max-num-seqs", "64", "--max-num-seqs", "32"), 32),
        (("--max-num-seqs", "64", "--data-parallel-size", "4"), 256),
        (("--max-num-seqs", "64", "-dp", "2"), 128),
        (("--max-num-seqs",), 256),
        (("--max-num-seqs", "many"), 256),
        (("--max-num-seqs", "0"), 256),
        (("--max-num-seqs", "9" * 5000), 256),
    ],
)
def test_the_arguments_say_how_many_requests_run_at_once(args: tuple[str, ...], count: int) -> None:
    assert runs_at_once(args) == count
