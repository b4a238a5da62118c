"""Requests for a bench, and what their readers see."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from streamserve.core.clock import monotonic
from streamserve.core.request import FinishReason
from streamserve.core.sampling_params import SamplingParams
from streamserve.engine.async_engine import AsyncEngine
from streamserve.errors import EngineError


@dataclass(slots=True)
class Answer:
    """What a reader got, and when: ``(moment, tokens)`` of each output."""

    arrival: float
    outputs: list[tuple[float, int]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(count for _, count in self.outputs)

    @property
    def first_token_s(self) -> float:
        """From the request to its first token."""
        return self.outputs[0][0] - self.arrival


class Load:
    """Sends prompts of random ids to an engine. Of a bench's event loop only."""

    def __init__(
        self, engine: AsyncEngine, *, vocab_size: int, temperature: float, seed: int
    ) -> None:
        self._engine = engine
        self._vocab_size = vocab_size
        self._temperature = temperature
        self._rng = random.Random(seed)
        self._num_sent = 0

    def prompt(self, length: int) -> list[int]:
        """Ids that no other prompt begins with, as good as certainly."""
        return self._rng.choices(range(self._vocab_size), k=length)

    def length_near(self, length: int, spread: float) -> int:
        """A length of at least 1, drawn from within a share of it."""
        return max(1, round(length * (1.0 + self._rng.uniform(-spread, spread))))

    async def answers(self, prompts: Sequence[list[int]], num_tokens: int) -> list[Answer]:
        """Send all prompts at once and read every answer to its end, at exactly that length."""
        return await asyncio.gather(*(self.answer(prompt, num_tokens) for prompt in prompts))

    async def answer(self, prompt: list[int], num_tokens: int) -> Answer:
        """Send one prompt now. Raises ``EngineError`` if the answer breaks off."""
        self._num_sent += 1
        params = SamplingParams(
            max_tokens=num_tokens, temperature=self._temperature, ignore_eos=True, seed=0
        )
        answer = Answer(monotonic())
        stream = self._engine.submit(prompt, params, request_id=f"bench-{self._num_sent}")
        async with stream:
            async for output in stream:
                if output.token_ids:
                    answer.outputs.append((monotonic(), len(output.token_ids)))
                if output.finish_reason is FinishReason.ABORT:
                    raise EngineError("an answer was cut off")
        return answer


@dataclass(frozen=True, slots=True)
class Gaps:
    """Between the outputs of a stream while all streams went on; in seconds."""

    times: list[float]
    num_merged: int  # outputs of more than one token: the reader was late


def gaps_between(answers: Sequence[Answer]) -> Gaps:
    """From the last stream's first output to the first stream's last."""
    begin = max(answer.outputs[0][0] for answer in answers)
    end = min(answer.outputs[-1][0] for answer in answers)
    times: list[float] = []
    num_merged = 0
    for answer in answers:
        for (before, _), (moment, count) in zip(answer.outputs, answer.outputs[1:], strict=False):
            if before >= begin and moment <= end:
                times.append(moment - before)
                num_merged += count > 1
    return Gaps(times, num_merged)
