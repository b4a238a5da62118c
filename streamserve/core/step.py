"""One step while it is made and while it is in flight: a plan and the requests behind it."""

from __future__ import annotations

from collections.abc import Mapping

from streamserve.core.plan import PENDING_TOKEN, NewRequest, ScheduledRequest, SchedulerOutput
from streamserve.core.prefill import PrefillBudget
from streamserve.core.request import Request


class Step:
    """A plan and the requests of its ``scheduled``, in the same order."""

    __slots__ = (
        "drafts",
        "is_alone",
        "is_blocked",
        "overlaps",
        "plan",
        "preempted",
        "prefill",
        "refused",
        "requests",
    )

    def __init__(
        self,
        step_id: int,
        prefill: PrefillBudget,
        drafts: Mapping[str, list[int]] | None = None,
        *,
        is_alone: bool = False,
    ) -> None:
        self.plan = SchedulerOutput(step_id)
        self.requests: list[Request] = []
        self.prefill = prefill  # what is left for prompts
        self.drafts = drafts  # by request id, where there is room for them
        self.is_alone = is_alone  # made for one request, which was in a step that failed
        self.overlaps = False  # another step was in flight when it was launched
        self.is_blocked = False  # somebody waits for blocks: nobody behind may take any
        self.refused: Request | None = None  # nobody yields a seat to it in this step
        self.preempted = False  # somebody lost the seat: nobody waiting takes one in this step

    def add(self, request: Request, num_new_tokens: int, new_block_ids: list[int]) -> None:
        """Write a request's share into the plan and move its counters past it."""
        start = request.num_computed_tokens
        end = start + num_new_tokens
        token_ids = request.token_ids
        num_known = len(token_ids)
        num_total = num_known + request.num_pending_tokens
        plan = self.plan
        if not request.is_in_runner:
            request.is_in_runner = True
            new_block_ids = list(request.block_table)
            plan.new_requests.append(_new_request(request))
        # tuple's own constructor: a quarter of the time of the named one, for every token there is
        scheduled = tuple.__new__(
            ScheduledRequest,
            (
                request.request_id,
                start,
                # A pending token is always alone: nothing before it is left to compute.
                token_ids[start:end] if start < num_known else [PENDING_TOKEN],
                new_block_ids,
                end == num_total,
                num_total - request.num_prompt_tokens,
            ),
        )
        plan.scheduled.append(scheduled)
        self.requests.append(request)
        request.num_computed_tokens = end
        request.last_step_id = plan.step_id
        request.num_steps_in_flight += 1
        if end == num_total:
            request.num_pending_tokens += 1

    def add_drafts(self, request: Request, drafts: list[int], new_block_ids: list[int]) -> None:
        """As `add` for a request's last known token, with guesses at those that follow it."""
        start = request.num_computed_tokens
        token_ids = request.token_ids
        num_known = len(token_ids)
        assert start == num_known - 1
        assert not request.num_pending_tokens
        num_sampled = 1 + len(drafts)
        self.plan.scheduled.append(
            ScheduledRequest(
                request.request_id,
                start,
                [token_ids[start], *drafts],
                new_block_ids,
                num_sampled,
                num_known - request.num_prompt_tokens,
            )
        )
        self.requests.append(request)
        request.num_computed_tokens = start + num_sampled
        request.num_draft_tokens = len(drafts)
        request.num_pending_tokens = 1
        request.last_step_id = self.plan.step_id
        request.num_steps_in_flight += 1


def _new_request(request: Request) -> NewRequest:
    return NewRequest(
        request_id=request.request_id,
        token_ids=list(request.token_ids),
        num_prompt_tokens=request.num_prompt_tokens,
        sampling_params=request.sampling_params,
        seed=request.seed,
        choice_index=request.choice_index,
        eos_token_ids=request.eos_token_ids,
        adapter=request.adapter,
        state_slot=request.state_slot,
    )
