"""Drafts by a head: it is fed what the target found at each token, and the token that came next.

At a position it has the target's hidden state of that token and the token behind: so all positions
of a step can be fed once the step is sampled, and the last of them yields the first guess. What the
target finds at a guess that was right is fed over what the head had found there itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from streamserve.core.plan import NewRequest, ScheduledRequest, SchedulerOutput
from streamserve.runner.drafting import Drafter, DraftingRunner, Followed, Guesses, Target
from streamserve.runner.head_steps import HeadSteps
from streamserve.runner.memory import MemoryPlan
from streamserve.runner.warm_up import WarmUp

_UNFED_BYTES = 64 * 2**20
"""Hidden states of all requests that are kept while nobody wants guesses.

Who has more than there is room for gets no guesses any more.
"""


@dataclass(slots=True)
class _Rows:
    """Positions in turn: the tokens behind them, and the target's hidden states [n, C]."""

    next_ids: list[int]
    states: Tensor

    def __len__(self) -> int:
        return len(self.next_ids)

    def first(self, num_rows: int) -> _Rows:
        return _Rows(self.next_ids[:num_rows], self.states[:num_rows])

    def behind(self, num_rows: int) -> _Rows:
        """Those that are not among the `first`."""
        return _Rows(self.next_ids[num_rows:], self.states[num_rows:])


@dataclass(slots=True, kw_only=True)
class _Fed(Followed):
    token_ids: list[int]  # those that were known when it came
    unfed: deque[_Rows] = field(default_factory=deque)  # the positions behind what was fed
    num_unfed: int = 0
    num_guessed: int = 0  # positions behind `num_fed` where guesses are
    is_lost: bool = False  # positions are missing that nobody kept

    def lose(self) -> None:
        """Guesses behind a gap are not worth their time."""
        self.is_lost = True
        self.unfed.clear()
        self.num_unfed = 0

    def remember(self, start: int, rows: _Rows) -> None:
        """Takes what the target has computed at ``start``; nothing behind that counts any more."""
        self.num_fed = min(self.num_fed, start)
        num_before = start - self.num_fed
        while self.num_unfed > num_before:
            last = self.unfed.pop()
            self.num_unfed -= len(last)
            if self.num_unfed < num_before:
                self._append(last.first(num_before - self.num_unfed))
        if self.num_unfed < num_before:
            self.lose()
        else:
            self._append(rows)

    def take(self, num_rows: int) -> list[_Rows]:
        """The first of what was not fed."""
        taken: list[_Rows] = []
        while self.unfed and num_rows:
            rows = self.unfed.popleft()
            if len(rows) > num_rows:
                self.unfed.appendleft(rows.behind(num_rows))
                rows = rows.first(num_rows)
            num_rows -= len(rows)
            self.num_unfed -= len(rows)
            taken.append(rows)
        return taken

    def _append(self, rows: _Rows) -> None:
        self.unfed.append(rows)
        self.num_unfed += len(rows)


class HeadDrafter(Drafter[_Fed]):
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
        self._num_unfed = 0  # of all requests, behind the last step
        self._found: dict[str, Tensor] = {}  # [1, H] of those who have just been guessed for

    def close(self) -> None:
        """See `Drafter`."""
        self._steps.close()
        self._requests.clear()
        self._found.clear()

    def _follow(self, new: NewRequest) -> _Fed:
        return _Fed(token_ids=new.token_ids)

    def _forget(self, request: _Fed) -> None:
        self._num_unfed -= request.num_unfed

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
            row += num_rows
            if request.is_lost:
                continue
            assert states is not None
            self._num_unfed -= request.num_unfed
            _remember(request, scheduled, ids, states[row - num_rows : row])
            if keeps_up and request.unfed:
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
            if request.unfed:
                self._hold(request)
            self._num_unfed += request.num_unfed
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

    def _hold(self, request: _Fed) -> None:
        """Keeps what was not fed beyond this step, whose memory the next one takes."""
        last = request.unfed[-1]
        row_bytes = last.states.shape[1] * last.states.itemsize
        if (self._num_unfed + request.num_unfed) * row_bytes > _UNFED_BYTES:
            request.lose()
        else:
            last.states = last.states.clone()

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
    request: _Fed, scheduled: ScheduledRequest, sampled: list[int], states: Tensor
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


class TargetOfHead(Target, Protocol):
    """A runner that keeps hidden states."""

    hidden_states: Tensor | None


def draft_with_head(
    target: TargetOfHead, steps: HeadSteps, memory: MemoryPlan, max_num_batched_tokens: int
) -> DraftingRunner:
    """A warm runner with a head that guesses behind its steps."""
    drafter = HeadDrafter(
        steps,
        lambda: target.hidden_states,
        block_size=memory.block_size,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    drafting = DraftingRunner(target, drafter)
    WarmUp(drafting, memory, max_num_batched_tokens).run_guesses()
    return drafting
