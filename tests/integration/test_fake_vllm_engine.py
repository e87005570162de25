"""The fake's engine alone: who runs, who waits, what the KV cache does, on a clock that the test moves."""

from __future__ import annotations

import pytest

from controlplane.demo.fake_vllm.engine import (
    BLOCK_TOKENS,
    Engine,
    EngineDead,
    EngineOptions,
    EngineStopping,
    Generation,
    GenerationAborted,
    QueueFull,
)


class Ledger:
    """An observer that writes down what it saw."""

    def __init__(self) -> None:
        self.finished: list[Generation] = []
        self.preemptions = 0
        self.rejections = 0
        self.tokens = 0

    def saw_first_output(self, generation: Generation) -> None: ...

    def saw_next_output(self, seconds_since_last: float) -> None: ...

    def saw_step(self, prompt_tokens: int, generated_tokens: int) -> None:
        self.tokens += generated_tokens

    def saw_finish(self, generation: Generation) -> None:
        self.finished.append(generation)

    def saw_preemption(self) -> None:
        self.preemptions += 1

    def saw_rejection(self) -> None:
        self.rejections += 1


def make_engine(ledger: Ledger, *, slots: int = 2, kv_tokens: int = 10_000, queue_limit: int | None = None) -> Engine:
    return Engine(EngineOptions(slots, 10.0, kv_tokens, queue_limit), ledger)


def generation_of(output_tokens: int, prompt_tokens: int = 10) -> Generation:
    return Generation(prompt_tokens, output_tokens, output_tokens, "length")


def step(engine: Engine, now: float, seconds: float = 0.1) -> None:
    """One engine step that begins at `now`."""
    engine.admit(now)
    engine.decode(now + seconds, seconds)


async def test_slots_bound_what_runs_and_the_queue_is_first_in_first_out() -> None:
    ledger = Ledger()
    engine = make_engine(ledger, slots=2)
    generations = [generation_of(3) for _ in range(5)]
    for generation in generations:
        engine.submit(generation, 0.0)
    engine.admit(0.0)
    assert (engine.load.running, engine.load.waiting) == (2, 3)
    for number in range(9):
        step(engine, number * 0.1)
    assert ledger.finished == generations
    assert [generation.scheduled_at for generation in generations] == pytest.approx([0.0, 0.0, 0.3, 0.3, 0.6])
    assert ledger.tokens == 15
    assert engine.load.running == 0
    assert engine.load.kv_cache_usage == 0


async def test_long_step_gives_all_tokens_due_and_none_is_lost_to_rounding() -> None:
    engine = make_engine(Ledger())
    generation = generation_of(100)
    engine.submit(generation, 0.0)
    for number in range(30):
        step(engine, number * 0.13, 0.13)  # 1.3 tokens a step at 10 tokens a second
    assert generation.generated == pytest.approx(39, abs=1)
    engine.slow_down(4)
    before = generation.generated
    step(engine, 10.0, 4.0)
    assert generation.generated - before == pytest.approx(10, abs=1)


async def test_full_kv_cache_keeps_requests_waiting_although_slots_are_free() -> None:
    engine = make_engine(Ledger(), slots=8, kv_tokens=4 * BLOCK_TOKENS)
    for _ in range(3):
        engine.submit(generation_of(4, prompt_tokens=2 * BLOCK_TOKENS - 5), 0.0)
    engine.admit(0.0)
    assert (engine.load.running, engine.load.waiting) == (2, 1)
    assert engine.load.kv_cache_usage == 1.0


async def test_growing_output_preempts_the_youngest_which_later_goes_on_where_it_was() -> None:
    ledger = Ledger()
    engine = make_engine(ledger, slots=8, kv_tokens=4 * BLOCK_TOKENS)
    old, young = (generation_of(BLOCK_TOKENS, prompt_tokens=2 * BLOCK_TOKENS - 5) for _ in range(2))
    engine.submit(old, 0.0)
    engine.submit(young, 0.0)
    for number in range(5):
        step(engine, number * 0.1)
    assert (ledger.preemptions, young.preemptions, young.generated) == (1, 1, 5)
    assert (engine.load.running, engine.load.waiting) == (1, 1)
    for number in range(5, 40):
        step(engine, number * 0.1)
    assert ledger.finished == [old, young]
    assert young.scheduled_at == 0.0


async def test_abort_frees_the_slot_and_tells_the_reader() -> None:
    ledger = Ledger()
    engine = make_engine(ledger, slots=1)
    first, second = generation_of(5), generation_of(5)
    engine.submit(first, 0.0)
    engine.submit(second, 0.0)
    step(engine, 0.0)
    engine.abort(first)
    assert (engine.load.running, engine.load.waiting) == (0, 1)
    with pytest.raises(GenerationAborted):
        await first.reach(5)
    step(engine, 0.1)
    assert second.generated == 1
    assert ledger.finished == []


async def test_queue_limit_counts_running_and_waiting() -> None:
    ledger = Ledger()
    engine = make_engine(ledger, slots=1, queue_limit=2)
    engine.submit(generation_of(5), 0.0)
    engine.submit(generation_of(5), 0.0)
    with pytest.raises(QueueFull):
        engine.submit(generation_of(5), 0.0)
    assert ledger.rejections == 1


async def test_frozen_engine_reports_its_last_load() -> None:
    engine = make_engine(Ledger(), slots=1)
    engine.submit(generation_of(5), 0.0)
    step(engine, 0.0)
    engine.freeze()
    engine.submit(generation_of(5), 0.1)
    engine.admit(0.1)
    assert (engine.load.running, engine.load.waiting) == (1, 0)
    engine.thaw()
    engine.admit(0.2)
    assert (engine.load.running, engine.load.waiting) == (1, 1)


async def test_draining_refuses_what_is_new_and_dying_fails_what_is_inside() -> None:
    engine = make_engine(Ledger())
    inside = generation_of(5)
    engine.submit(inside, 0.0)
    engine.drain()
    with pytest.raises(EngineStopping):
        engine.submit(generation_of(5), 0.0)
    step(engine, 0.0)
    assert inside.generated == 1
    engine.die()
    with pytest.raises(EngineDead):
        await inside.reach(5)
    with pytest.raises(EngineDead):
        engine.check_admission()
