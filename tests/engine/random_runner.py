"""A runner that draws any id its mask allows: the worst model that there is."""

from __future__ import annotations

import random
from concurrent.futures import Future

from streamserve.core.death import Death
from streamserve.core.plan import (
    Masks,
    ModelRunnerOutput,
    ScheduledRequest,
    SchedulerOutput,
    mask_of,
)

_LIKED = frozenset(b'"]}:,0123456789 eE') | {257}


class RandomRunner:
    """Draws from ``vocab_size`` ids; under a mask half of the time what ends strings and lists.

    A row is drawn by (request, output position) alone, so that steps and preemption do not matter.
    """

    num_compilations = 0

    def __init__(self, vocab_size: int, liked: frozenset[int] = _LIKED, seed: int = 0) -> None:
        self.vocab_size = vocab_size
        self.liked = liked
        self.seed = seed
        self.is_closed = False
        self.on_death = Death().on_death
        self.num_masks: list[int] = []  # of each step
        self._plans: list[SchedulerOutput] = []

    def launch(self, plan: SchedulerOutput) -> None:
        self._plans.append(plan)

    def sample(self, step_id, masks=None) -> Future[ModelRunnerOutput]:
        plan = self._plans.pop(0)
        assert plan.step_id == step_id
        self.num_masks.append(len(masks or ()))
        future: Future[ModelRunnerOutput] = Future()
        sampled = [self._samples(s, masks or {}) for s in plan.scheduled]
        future.set_result(ModelRunnerOutput(step_id, sampled))
        return future

    def _samples(self, scheduled: ScheduledRequest, masks: Masks) -> list[int]:
        """With drafts the samples that count."""
        request_id, position = scheduled.request_id, scheduled.output_position
        drawn = [
            self._draw(
                scheduled._replace(output_position=position + i), mask_of(masks, request_id, i)
            )
            for i in range(scheduled.sample)
        ]
        return drawn[: scheduled.num_kept(drawn)]

    def close(self) -> None:
        self.is_closed = True

    def _draw(self, scheduled, mask: bytes | None) -> int:
        key = f"{self.seed}/{scheduled.request_id}/{scheduled.output_position}"
        rng = random.Random(key)
        if mask is None:
            return rng.randrange(97, 123)
        assert len(mask) * 8 >= self.vocab_size
        allowed = [i for i in range(self.vocab_size) if mask[i >> 3] >> (i & 7) & 1]
        assert allowed, "the mask forbids everything"
        liked = [i for i in allowed if i in self.liked]
        return rng.choice(liked if liked and rng.random() < 0.5 else allowed)
