"""Drafts by a head: it is fed what the target found at each token, and the token that came next.

At a position it has the target's hidden state of that token and the token behind: so all positions
of a step can be fed once the step is sampled, and the last of them yields the first guess. What the
target finds at a guess that was right is fed over what the head had found there itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from streamserve.core.plan import ScheduledRequest, SchedulerOutput
from streamserve.runner.drafting import Drafter, Guesses
from streamserve.runner.head_steps import HeadSteps

_MOST_UNFED = 1024
"""Rows of a request that are kept while nobody wants guesses: who has more gets none any more."""


@dataclass(slots=True)
class _Rows:
    """Positions in turn: the tokens behind them, and the target's hidden states [n, C]."""

    next_ids: list[int]
    states: Tensor

    def cut(self, num_rows: int) -> _Rows:
        """The first of them, which these no longer have."""
        first = _Rows(self.next_ids[:num_rows], self.states[:num_rows])
        self.next_ids, self.states = self.next_ids[num_rows:], self.states[num_rows:]
        return first


@dataclass(slots=True)
class _Followed:
    """A live request, as the head has it."""

    token_ids: list[int]  # those that were known when it came
    num_fed: int = -1  # leading positions whose keys and values it has; negative: not yet seen
    unfed: list[_Rows] = field(default_factory=list)  # the positions behind these
    num_blocks: int = 0  # that the target has told of
    new_block_ids: list[int] = field(default_factory=list)  # of these, not yet in the books
    num_guessed: int = 0  # positions behind `num_fed` where guesses are
    is_lost: bool = False  # positions are missing that nobody kept

    @property
    def num_unfed(self) -> int:
        return sum(len(rows.next_ids) for rows in self.unfed)

    def lose(self) -> None:
        """Guesses behind a gap are not worth their time."""
        self.is_lost = True
        self.unfed.clear()

    def remember(self, start: int, rows: _Rows) -> None:
        """Takes what the target has computed at ``start``; nothing behind that counts any more."""
        if self.is_lost:
            return
        num_before = start - self.num_fed
        if num_before < 0:
            self.num_fed, num_before = start, 0
        kept: list[_Rows] = []
        for earlier in self.unfed:
            kept.append(earlier.cut(num_before))
            num_before -= len(kept[-1].next_ids)
        self.unfed = [part for part in kept if part.next_ids]
        if num_before:
            self.lose()
        else:
            self.unfed.append(rows)

    def take(self, num_rows: int) -> list[_Rows]:
        """The first of what was not fed."""
        taken: list[_Rows] = []
        while self.unfed and num_rows:
            rows = self.unfed[0].cut(num_rows)
            num_rows -= len(rows.next_ids)
            taken.append(rows)
            if not self.unfed[0].next_ids:
                del self.unfed[0]
        return taken

    def hold(self) -> None:
        """Keeps what was not fed beyond this step, whose memory the next one takes."""
        if self.num_unfed > _MOST_UNFED:
            self.lose()
        elif self.unfed:
            self.unfed[-1].states = self.unfed[-1].states.clone()


class HeadDrafter(Drafter):
    """Guesses of a head that ``steps`` runs, in blocks of ``block_size`` tokens as the target's.

    ``hidden_states`` are [T, C] of the target's step that ran last, in the plan's order.
    """

    def __init__(
        self,
        steps: HeadSteps,
        hidden_states: Callable[[], Tensor | None],
        *,
        block_size: int,
        max_num_batched_tokens: int,
    ) -> None:
        super().__init__()
        self._steps = steps
        self._hidden_states = hidden_states
        self._block_size = block_size
        self._max_num_tokens = max_num_batched_tokens
        self._requests: dict[str, _Followed] = {}
        self._found: dict[str, Tensor] = {}  # [1, H] of those who have just been guessed for

    def close(self) -> None:
        """See `Drafter`."""
        self._steps.close()
        self._requests.clear()
        self._found.clear()

    def book(self, plan: SchedulerOutput) -> None:
        """See `Drafter`."""
        requests = self._requests
        for request_id in plan.released_ids:
            del requests[request_id]
            self._left(request_id)
        for new in plan.new_requests:
            requests[new.request_id] = _Followed(new.token_ids)
            self._came(new)
        for scheduled in plan.scheduled:
            request = requests[scheduled.request_id]
            request.num_blocks += len(scheduled.new_block_ids)
            request.new_block_ids.extend(scheduled.new_block_ids)
            if request.num_fed < 0:
                request.num_fed = scheduled.start  # what the cache had

    def feed(self, plan: SchedulerOutput, sampled: list[list[int]], *, keeps_up: bool) -> Guesses:
        """See `Drafter`."""
        states = self._hidden_states()
        step = self._new_plan()
        step.block_copies.extend(plan.block_copies)
        parts: list[Tensor] = []
        num_left, row = self._max_num_tokens, 0
        for scheduled, ids in zip(plan.scheduled, sampled, strict=True):
            request = self._requests[scheduled.request_id]
            num_rows = len(scheduled.token_ids)
            assert states is not None
            _remember(request, scheduled, ids, states[row : row + num_rows])
            row += num_rows
            if keeps_up and not request.is_lost:
                rows = request.take(min(num_rows + self.most_late, num_left))
                next_ids = [next_id for part in rows for next_id in part.next_ids]
                parts.extend(part.states for part in rows)
                num_left -= len(next_ids)
                wants = plan.num_drafts.get(scheduled.request_id, 0) > 0 and bool(ids)
                if next_ids:
                    is_asked = wants and not request.unfed
                    self._add(step, scheduled.request_id, request.num_fed, next_ids, is_asked)
                    request.num_fed += len(next_ids)
                request.num_guessed = 0
            request.hold()
        return self._run(step, lambda: self._steps.take(_joined(parts)))

    def guess_on(self, guesses: Guesses) -> Guesses:
        """See `Drafter`."""
        step = self._new_plan()
        parts: list[Tensor] = []
        for request_id, guess in guesses.items():
            request = self._requests[request_id]
            position = request.num_fed + request.num_guessed
            if position < request.num_blocks * self._block_size:
                self._add(step, request_id, position, [guess], is_asked=True)
                request.num_guessed += 1
                parts.append(self._found[request_id])
        return self._run(step, lambda: _joined(parts))

    def _add(
        self,
        step: SchedulerOutput,
        request_id: str,
        start: int,
        next_ids: list[int],
        is_asked: bool,
    ) -> None:
        request = self._requests[request_id]
        block_ids, request.new_block_ids = request.new_block_ids, []
        step.scheduled.append(
            ScheduledRequest(request_id, start, next_ids, block_ids, int(is_asked), 0)
        )

    def _run(self, step: SchedulerOutput, hidden_states: Callable[[], Tensor]) -> Guesses:
        """The guess behind each request of a plan that asks for one; a row has a hidden state."""
        with torch.inference_mode():
            if step.block_copies:
                self._steps.copy_blocks(step.block_copies)
            if not step.scheduled:
                return {}
            self._tell(step)
            token_ids, found = self._steps.run(step, hidden_states())
        asked = [scheduled.request_id for scheduled in step.scheduled if scheduled.sample]
        self._found = {request_id: found[i : i + 1] for i, request_id in enumerate(asked)}
        return dict(zip(asked, token_ids, strict=True))


def _remember(
    request: _Followed, scheduled: ScheduledRequest, sampled: list[int], states: Tensor
) -> None:
    """Takes note of what a step has found for a request, but for wrong drafts."""
    token_ids = scheduled.token_ids
    num_wrong = scheduled.sample - len(sampled) if scheduled.sample > 1 else 0
    num_right = len(token_ids) - num_wrong
    end = scheduled.start + num_right
    if sampled:
        next_id = sampled[-1]
    elif not scheduled.sample and end < len(request.token_ids):
        next_id = request.token_ids[end]
    else:
        return request.lose()  # somebody else chooses its next token
    rows = _Rows([*token_ids[1:num_right], next_id], states[:num_right])
    return request.remember(scheduled.start, rows)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
