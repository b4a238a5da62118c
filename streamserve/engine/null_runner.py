"""Tokens without a model: what everything but the model costs."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace

from streamserve.core.plan import (
    Masks,
    ModelRunnerOutput,
    NewRequest,
    PromptLogprobs,
    ScheduledRequest,
    SchedulerOutput,
    TokenLogprobs,
    mask_of,
)
from streamserve.errors import DeviceDeadError

Pace = Callable[[Callable[[], None]], None]
"""Called with ``resolve`` for every step, on the event loop; calls it when the step may end."""

_FREE: Masks = {}


class NullRunner:
    """A ``ModelRunner`` that samples ``token_ids[(key + output position) % n]``.

    ``key`` is a hash of the request's id with ``per_request``, else 0: every request then answers
    the same. Without a ``pace`` a step's future is done when ``sample`` returns. A ``pace`` decides
    when it resolves: a benchmark starts the next step when every reader has read this one.

    Under a mask it samples the next higher id that is allowed, or else the lowest.

    Keeps no tensors but counts as a runner would: ``num_computed_tokens`` by request id.
    """

    num_compilations = 0

    def __init__(
        self,
        token_ids: Sequence[int] = (0,),
        *,
        per_request: bool = False,
        pace: Pace | None = None,
    ) -> None:
        if not token_ids:
            raise ValueError("token_ids must hold at least one id, got none")
        self._token_ids = tuple(token_ids)
        self._per_request = per_request
        self._pace = pace
        self._keys: dict[str, int] = {}
        self._num_logprobs: dict[str, int] = {}
        self._prompts: dict[str, NewRequest] = {}  # whose logprobs are wanted
        self._pools: dict[str, NewRequest] = {}  # that want a vector
        self._plan: SchedulerOutput | None = None
        self.num_computed_tokens: dict[str, int] = {}
        self.num_steps = 0
        self.is_closed = False

    def launch(self, plan: SchedulerOutput) -> None:
        """Book the plan. Raises nothing, computes nothing."""
        for request_id in plan.released_ids:
            self._keys.pop(request_id, None)
            self._num_logprobs.pop(request_id, None)
            self._prompts.pop(request_id, None)
            self._pools.pop(request_id, None)
            self.num_computed_tokens.pop(request_id, None)
        for new in plan.new_requests:
            self._keys[new.request_id] = self._key_of(new.request_id)
            if new.sampling_params.logprobs is not None:
                self._num_logprobs[new.request_id] = new.sampling_params.logprobs
            if new.sampling_params.prompt_logprobs is not None:
                self._prompts[new.request_id] = new
            if new.sampling_params.pooling is not None:
                self._pools[new.request_id] = new
        computed = self.num_computed_tokens
        for scheduled in plan.scheduled:
            computed[scheduled.request_id] = scheduled.start + len(scheduled.token_ids)
        self._plan = plan
        self.num_steps += 1

    def sample(self, step_id: int, masks: Masks | None = None) -> Future[ModelRunnerOutput]:
        """Return a future that is done, or that ``pace`` resolves."""
        plan = self._plan
        assert plan is not None, f"step {step_id} is sampled before it was launched"
        assert plan.step_id == step_id, f"step {plan.step_id} was launched, {step_id} is sampled"
        future: Future[ModelRunnerOutput] = Future()
        output = self._output_of(plan, masks or {})
        if self._pace is None:
            future.set_result(output)
        else:
            self._pace(lambda: future.set_result(output))
        return future

    def on_death(self, hear: Callable[[DeviceDeadError], None]) -> None:
        """It has nothing that could die."""

    def close(self) -> None:
        """There is nothing to free. Idempotent."""
        self.is_closed = True

    def _output_of(self, plan: SchedulerOutput, masks: Masks) -> ModelRunnerOutput:
        keys, ids, size = self._keys, self._token_ids, len(self._token_ids)
        sampled = [
            [ids[(keys[s.request_id] + s.output_position) % size]]
            if s.sample == 1
            else self._verified(s)
            for s in plan.scheduled
        ]
        for i, scheduled in enumerate(plan.scheduled) if masks else ():
            if scheduled.sample and scheduled.request_id in masks:
                sampled[i] = self._verified(scheduled, masks)
        logprobs = None
        if self._num_logprobs:
            logprobs = [
                self._logprobs_of(token_ids, self._num_logprobs.get(s.request_id))
                for s, token_ids in zip(plan.scheduled, sampled, strict=True)
            ]
        prompt_logprobs = self._prompt_logprobs_of(plan) if self._prompts else None
        pooled = self._pool(plan, sampled) if self._pools else None
        return ModelRunnerOutput(
            plan.step_id, sampled, logprobs, prompt_logprobs=prompt_logprobs, pooled=pooled
        )

    def _pool(self, plan: SchedulerOutput, sampled: list[list[int]]) -> dict[str, array[float]]:
        """Vectors of the prompts that are complete, which sample nothing."""
        found: dict[str, array[float]] = {}
        for i, scheduled in enumerate(plan.scheduled):
            new = self._pools.get(scheduled.request_id)
            if new is not None and scheduled.sample:
                sampled[i] = []
                found[new.request_id] = _vector(new)
        return found

    def _prompt_logprobs_of(self, plan: SchedulerOutput) -> dict[str, PromptLogprobs]:
        """Every token of a prompt was certain, too."""
        found: dict[str, PromptLogprobs] = {}
        for request_id, start, token_ids, *_ in plan.scheduled:
            new = self._prompts.get(request_id)
            if new is None or start + 1 >= new.num_prompt_tokens:
                continue
            end = min(start + len(token_ids) + 1, new.num_prompt_tokens)
            count = new.sampling_params.prompt_logprobs
            entries = self._logprobs_of(new.token_ids[start + 1 : end], count)
            found[request_id] = PromptLogprobs(
                start + 1, [replace(entry, rank=1) for entry in entries]
            )
        return found

    def _verified(self, scheduled: ScheduledRequest, masks: Masks = _FREE) -> list[int]:
        """The samples that count of a request without any, or with drafts."""
        ids, first = self._token_ids, self._keys[scheduled.request_id] + scheduled.output_position
        samples = [ids[(first + i) % len(ids)] for i in range(scheduled.sample)]
        for i, token_id in enumerate(samples):
            if (mask := mask_of(masks, scheduled.request_id, i)) is not None:
                samples[i] = _next_allowed(token_id, mask)
        return samples[: scheduled.num_kept(samples)]

    def _logprobs_of(self, token_ids: list[int], num_top: int | None) -> list[TokenLogprobs]:
        """The sampled token is certain; the others listed are the lowest ids, as good as never."""
        if num_top is None:
            return []
        entries = []
        for token_id in token_ids:
            others = [(other, -100.0) for other in range(num_top) if other != token_id]
            top = ((token_id, 0.0), *others)[:num_top]
            entries.append(TokenLogprobs(token_id, 0.0, top))
        return entries

    def _key_of(self, request_id: str) -> int:
        if not self._per_request:
            return 0
        # Not ``hash``: it differs from process to process.
        key = 0
        for character in request_id:
            key = (key * 31 + ord(character)) & 0xFFFFFFFF
        return key


def _vector(new: NewRequest) -> array[float]:
    """The prompt's length, its last token, and 1: enough to tell prompts apart."""
    pooling = new.sampling_params.pooling
    assert pooling is not None
    values = [float(len(new.token_ids)), float(new.token_ids[-1]), 1.0, 0.0][: pooling.dimensions]
    length = math.hypot(*values) if pooling.normalize else 1.0
    return array("f", [value / length for value in values])


def _next_allowed(token_id: int, mask: bytes) -> int:
    bits = int.from_bytes(mask, "little")
    higher = bits >> token_id
    if higher:
        return token_id + (higher & -higher).bit_length() - 1
    return (bits & -bits).bit_length() - 1
