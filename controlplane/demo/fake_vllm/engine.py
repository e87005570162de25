"""The engine behind the routes: a FIFO queue, a bounded number of slots, a KV cache and one decode ticker for all.

A generation is WAITING until a slot and enough KV blocks are free, then RUNNING until its last token. Time advances in
steps as in vLLM: a step admits what fits, lasts one token's time, and gives every running generation its next token.
When the KV cache is full the youngest running generation is preempted back to the head of the queue.

States: SERVING; DRAINING (what is inside finishes, nothing new enters); HALTED (nothing moves any more and nobody is
told, which is what vLLM does when its shutdown timeout has passed); DEAD (everything inside has failed). Orthogonal to
those, a frozen engine makes no step and reports its last load, as a stuck GPU process would.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import Literal, Protocol

BLOCK_TOKENS = 16
"""Tokens in one block of the KV cache."""

_SHORTEST_STEP_SECONDS = 0.02  # a faster engine gives several tokens in one step instead of waking more often
_EARLY_WAKE_TOKENS = 0.05  # a timer may fire this much of a token too soon

FinishReason = Literal["stop", "length"]


class QueueFull(Exception):
    """As many requests wait or run as the queue limit allows; the same request may be sent again later."""


class EngineStopping(Exception):
    """The engine drains and takes nothing new."""


class EngineDead(Exception):
    """The engine is gone; the generation will never make another token."""


class GenerationAborted(Exception):
    """The client left, and its generation was taken out."""


class EngineState(Enum):
    SERVING = "serving"
    DRAINING = "draining"
    HALTED = "halted"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """`tokens_per_second` is the decode speed of each running generation, however many run."""

    max_num_seqs: int
    tokens_per_second: float
    kv_cache_tokens: int
    max_num_queued_reqs: int | None = None


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What the engine last reported: requests running and waiting, and the used share (0 to 1) of the KV cache."""

    running: int = 0
    waiting: int = 0
    kv_cache_usage: float = 0.0


class Generation:
    """One prompt and its growing output. Times are seconds of the event loop's clock, `None` until they happen.

    An `output_tokens` of 0 is a pooling request: it ends with its first step and makes no token.
    """

    __slots__ = (
        "_failure",
        "_waiter",
        "_wanted_tokens",
        "arrived_at",
        "finish_reason",
        "finished_at",
        "first_output_at",
        "generated",
        "last_output_at",
        "max_tokens",
        "output_tokens",
        "preemptions",
        "prompt_tokens",
        "scheduled_at",
    )

    def __init__(self, prompt_tokens: int, output_tokens: int, max_tokens: int, finish_reason: FinishReason) -> None:
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.max_tokens = max_tokens
        self.finish_reason = finish_reason
        self.generated = 0
        self.preemptions = 0
        self.arrived_at = 0.0
        self.scheduled_at: float | None = None
        self.first_output_at: float | None = None
        self.last_output_at: float | None = None
        self.finished_at: float | None = None
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._wanted_tokens = 0

    async def reach(self, tokens: int) -> int:
        """Wait until `tokens` are generated or the generation is over; return how many are. For one reader at a time.

        Raises EngineDead or GenerationAborted as soon as no further token can come.
        """
        while self._failure is None and self.finished_at is None and self.generated < tokens:
            self._wanted_tokens = tokens
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self._failure is not None:
            raise self._failure
        return self.generated

    def blocks(self) -> int:
        """KV blocks that hold the prompt and the output so far, with room for one more token."""
        return (self.prompt_tokens + self.generated) // BLOCK_TOKENS + 1

    def extend(self, tokens: int, now: float) -> None:
        """Add output, and finish with the last token of it."""
        self.generated += tokens
        if self.first_output_at is None:
            self.first_output_at = now
        self.last_output_at = now
        if self.generated == self.output_tokens:
            self.finished_at = now
        if self.finished_at is not None or self.generated >= self._wanted_tokens:
            self._wake()

    def fail(self, failure: Exception) -> None:
        """End without further output: the reader gets `failure`."""
        self._failure = failure
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Observer(Protocol):
    """Told what the engine does, when it does it; the metrics implement it."""

    def saw_first_output(self, generation: Generation) -> None: ...
    def saw_next_output(self, seconds_since_last: float) -> None: ...
    def saw_step(self, prompt_tokens: int, generated_tokens: int) -> None: ...
    def saw_finish(self, generation: Generation) -> None: ...
    def saw_preemption(self) -> None: ...
    def saw_rejection(self) -> None: ...


class Engine:
    """Queue, slots and KV cache. `run` is the ticker; everything else returns at once."""

    def __init__(self, options: EngineOptions, observer: Observer) -> None:
        self.options = options
        self.state = EngineState.SERVING
        self.load = EngineLoad()
        self._observer = observer
        self._total_blocks = max(1, options.kv_cache_tokens // BLOCK_TOKENS)
        self._waiting: deque[Generation] = deque()
        self._running: dict[Generation, None] = {}  # ordered by admission
        self._is_frozen = False
        self._slowdown = 1.0
        self._token_credit = 0.0
        self._can_step = asyncio.Event()
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    # --- what requests do ---

    def check_admission(self) -> None:
        """Raise what `submit` would raise now: QueueFull, EngineStopping or EngineDead."""
        if self.state is EngineState.DRAINING:
            raise EngineStopping
        if self.state is not EngineState.SERVING:
            raise EngineDead
        limit = self.options.max_num_queued_reqs
        if limit is not None and len(self._running) + len(self._waiting) >= limit:
            self._observer.saw_rejection()
            raise QueueFull

    def submit(self, generation: Generation, now: float) -> None:
        """Put a new generation at the end of the queue, or raise as `check_admission` does."""
        self.check_admission()
        generation.arrived_at = now
        self._waiting.append(generation)
        self._schedule()

    def abort(self, generation: Generation) -> None:
        """Take a generation out wherever it is and free its slot. Nothing happens if it is over already."""
        if generation in self._running:
            del self._running[generation]
        elif generation in self._waiting:
            self._waiting.remove(generation)
        else:
            return
        generation.fail(GenerationAborted())
        self._schedule()
        self._report()

    # --- what operators and faults do ---

    def drain(self) -> None:
        """Finish what is inside, refuse what is new."""
        self.state = EngineState.DRAINING

    def halt(self) -> None:
        """Stop for good in the middle of everything, without a word to anybody."""
        self.state = EngineState.HALTED
        self._schedule()

    def die(self) -> None:
        """Fail everything inside and refuse everything new."""
        self.state = EngineState.DEAD
        inside = [*self._running, *self._waiting]
        self._running.clear()
        self._waiting.clear()
        self._schedule()
        for generation in inside:
            generation.fail(EngineDead())

    def freeze(self) -> None:
        """Make no progress until `thaw`."""
        self._is_frozen = True
        self._schedule()

    def thaw(self) -> None:
        self._is_frozen = False
        self._schedule()

    def slow_down(self, factor: float) -> None:
        """Divide the decode speed by `factor`; 1 is full speed."""
        self._slowdown = factor

    async def wait_until_idle(self) -> None:
        """Return when nothing runs or waits."""
        await self._is_idle.wait()

    # --- steps ---

    async def run(self) -> None:
        """Step while there is work, for ever; costs nothing while there is none."""
        loop = asyncio.get_running_loop()
        while True:
            await self._can_step.wait()
            self._token_credit = 0.0
            stepped_at = loop.time()
            while self._can_step.is_set():
                self.admit(loop.time())
                seconds_per_token = self._slowdown / self.options.tokens_per_second
                step_seconds = max(_SHORTEST_STEP_SECONDS, (1 - self._token_credit) * seconds_per_token)
                await asyncio.sleep(stepped_at + step_seconds - loop.time())
                if self._can_step.is_set():
                    now = loop.time()
                    self.decode(now, now - stepped_at)
                    stepped_at = now

    def admit(self, now: float) -> None:
        """Begin a step: move waiting generations into free slots, oldest first, while their KV blocks fit."""
        free_blocks = self._total_blocks - self._used_blocks()
        while self._waiting and len(self._running) < self.options.max_num_seqs:
            blocks = self._waiting[0].blocks()
            if blocks > free_blocks and self._running:
                break
            generation = self._waiting.popleft()
            generation.scheduled_at = generation.scheduled_at if generation.scheduled_at is not None else now
            self._running[generation] = None
            free_blocks -= blocks
        self._report()

    def decode(self, now: float, step_seconds: float) -> None:
        """End a step that took `step_seconds`: every running generation gets the tokens due in that time."""
        self._token_credit += step_seconds * self.options.tokens_per_second / self._slowdown
        due = int(self._token_credit + _EARLY_WAKE_TOKENS)
        if due < 1:
            return
        self._token_credit -= due
        prompt_tokens = generated_tokens = 0
        for generation in list(self._running):
            tokens = min(due, generation.output_tokens - generation.generated)
            previous_output_at = generation.last_output_at
            generation.extend(tokens, now)
            generated_tokens += tokens
            if previous_output_at is None:
                prompt_tokens += generation.prompt_tokens
                self._observer.saw_first_output(generation)
            else:
                self._observer.saw_next_output(now - previous_output_at)
            if generation.finished_at is not None:
                del self._running[generation]
                self._observer.saw_finish(generation)
        self._observer.saw_step(prompt_tokens, generated_tokens)
        self._preempt()
        self._schedule()
        self._report()

    def _preempt(self) -> None:
        while len(self._running) > 1 and self._used_blocks() > self._total_blocks:
            generation, _ = self._running.popitem()
            generation.preemptions += 1
            self._waiting.appendleft(generation)
            self._observer.saw_preemption()

    def _used_blocks(self) -> int:
        return sum(generation.blocks() for generation in self._running)

    def _is_moving(self) -> bool:
        return not self._is_frozen and self.state in {EngineState.SERVING, EngineState.DRAINING}

    def _schedule(self) -> None:
        """Start or stop the ticker according to what there is to do."""
        has_work = bool(self._running or self._waiting)
        if has_work:
            self._is_idle.clear()
        else:
            self._is_idle.set()
        if has_work and self._is_moving():
            self._can_step.set()
        else:
            self._can_step.clear()

    def _report(self) -> None:
        if self._is_moving():
            usage = min(1.0, self._used_blocks() / self._total_blocks)
            self.load = EngineLoad(len(self._running), len(self._waiting), usage)
