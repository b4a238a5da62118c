"""Drafts by a small model: a runner of its own, which is fed the text that the target has."""

from __future__ import annotations

from dataclasses import dataclass, field

from streamserve.core.plan import (
    PENDING_TOKEN,
    ModelRunner,
    NewRequest,
    ScheduledRequest,
    SchedulerOutput,
)
from streamserve.runner.drafting import Drafter, Followed, Guesses


@dataclass(slots=True, kw_only=True)
class _Drafted(Followed):
    num_prompt_tokens: int
    unfed: list[int] = field(default_factory=list)  # the known tokens behind what was fed
    last_token_id: int = PENDING_TOKEN  # what the target sampled last
    guesses: list[int] = field(default_factory=list)  # fed behind that one


def _num_same(some: list[int], others: list[int]) -> int:
    """How many leading tokens are the same in both."""
    num_same = 0
    while num_same < min(len(some), len(others)) and some[num_same] == others[num_same]:
        num_same += 1
    return num_same


class ModelDrafter(Drafter[_Drafted]):
    """Guesses of ``draft``, a model that knows the text only.

    Behind a step it is fed the tokens that are known; where a guess is wanted the token that was
    just sampled is among them, whose successor is the first guess.

    Its cache has as many blocks as the target's, of ``block_size`` tokens; ids below ``vocab_size``
    are known to both models; ``max_num_batched_tokens`` are the draft model's.
    """

    def __init__(
        self,
        draft: ModelRunner,
        *,
        block_size: int,
        vocab_size: int,
        max_num_batched_tokens: int,
    ) -> None:
        super().__init__()
        self._draft = draft
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._max_num_tokens = max_num_batched_tokens

    def close(self) -> None:
        """See `Drafter`."""
        self._draft.close()

    def _follow(self, new: NewRequest) -> _Drafted:
        return _Drafted(num_prompt_tokens=new.num_prompt_tokens)

    def feed(self, plan: SchedulerOutput, sampled: list[list[int]], *, keeps_up: bool) -> Guesses:
        """See `Drafter`."""
        wanted = plan.num_drafts
        feed = self._new_plan()
        feed.block_copies.extend(plan.block_copies)
        num_left = self._max_num_tokens
        for scheduled, ids in zip(plan.scheduled, sampled, strict=True):
            self._remember(scheduled, ids)
            if keeps_up:
                is_asked = wanted.get(scheduled.request_id, 0) > 0 and bool(ids)
                num_left -= self._feed(feed, scheduled, is_asked, num_left)
        return self._run(feed)

    def guess_on(self, guesses: Guesses) -> Guesses:
        """See `Drafter`."""
        step = self._new_plan()
        for request_id, guess in guesses.items():
            request = self._requests[request_id]
            request.guesses.append(guess)
            self._add(step, request_id, request.num_fed, [guess], is_asked=True)
        return self._run(step)

    def _remember(self, scheduled: ScheduledRequest, sampled: list[int]) -> None:
        """Takes note of a request's tokens that the step has computed, but for wrong drafts."""
        request = self._requests[scheduled.request_id]
        start, token_ids = scheduled.start, scheduled.token_ids
        if token_ids[0] == PENDING_TOKEN:
            token_ids = [request.last_token_id]
        num_wrong = scheduled.sample - len(sampled) if scheduled.sample > 1 else 0
        known = token_ids[: len(token_ids) - num_wrong]
        if sampled:
            request.last_token_id = sampled[-1]
        request.num_fed = min(request.num_fed, start + len(known))
        if scheduled.sample > 1:  # the drafts may be somebody else's
            num_same = _num_same(request.guesses, known[1:])
            request.num_fed = min(request.num_fed, start + 1 + num_same)
        num_before = start - request.num_fed  # tokens of before this step that were not fed
        if num_before > 0:
            request.unfed[num_before:] = known
        else:
            request.unfed = known[-num_before:]

    def _feed(
        self, feed: SchedulerOutput, scheduled: ScheduledRequest, is_asked: bool, num_left: int
    ) -> int:
        """Adds what the draft model has not seen of a request, or of much that is late some.

        At most ``num_left`` tokens; returns how many.
        """
        request = self._requests[scheduled.request_id]
        request.guesses.clear()
        new = request.unfed[: min(len(scheduled.token_ids) + self.most_late, num_left)]
        del request.unfed[: len(new)]
        end = request.num_fed + len(new)
        is_asked = is_asked and not request.unfed and len(new) < num_left
        if is_asked and end < request.num_blocks * self._block_size:
            new.append(request.last_token_id)
        else:
            is_asked = False
        if new:
            new = [token_id if token_id < self._vocab_size else 0 for token_id in new]
            self._add(feed, scheduled.request_id, request.num_fed, new, is_asked=is_asked)
        return len(new)

    def _add(
        self,
        step: SchedulerOutput,
        request_id: str,
        start: int,
        token_ids: list[int],
        *,
        is_asked: bool,
    ) -> None:
        """Adds a request's tokens to a plan of the draft model, if its blocks have room."""
        request = self._requests[request_id]
        end = start + len(token_ids)
        if end > request.num_blocks * self._block_size:
            return
        step.scheduled.append(
            ScheduledRequest(
                request_id,
                start,
                token_ids,
                request.new_block_ids,
                int(is_asked),
                max(end - request.num_prompt_tokens, 0),
            )
        )
        request.new_block_ids = []
        request.num_fed = end

    def _run(self, plan: SchedulerOutput) -> Guesses:
        """The likeliest token behind each request of a plan that asks for it."""
        if not plan.scheduled and not plan.block_copies:
            return {}
        self._tell(plan)
        self._draft.launch(plan)
        output = self._draft.sample(plan.step_id).result()
        return {
            scheduled.request_id: sampled[0]
            for scheduled, sampled in zip(plan.scheduled, output.sampled_token_ids, strict=True)
            if sampled and sampled[0] < self._vocab_size
        }
