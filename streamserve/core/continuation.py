"""The running requests' part of a step: each goes on by a token, a chunk, or a token and drafts."""

from __future__ import annotations

from streamserve.core.kv_cache_manager import KVCacheManager
from streamserve.core.request import Request
from streamserve.core.seats import Seats
from streamserve.core.step import Step


class Continuation:
    """Puts requests that have a seat into a step, and makes room for them at the others' cost."""

    def __init__(self, seats: Seats, kv_cache: KVCacheManager) -> None:
        self._seats = seats
        self._kv_cache = kv_cache

    def put(self, request: Request, step: Step) -> None:
        """Put a running request's next tokens into the step, unless there is no room now."""
        num_known = len(request.token_ids)
        num_pending = request.num_pending_tokens
        if num_pending and (
            num_known + num_pending >= request.max_num_tokens  # its last token is in flight
            or request.chooses_on_host
            or request.last_step_id != step.plan.step_id - 1  # not the previous step's sample
            or request.num_draft_tokens  # nobody knows yet where it stands
        ):
            return
        yielding = self._seats.yielding
        if yielding and request.request_id in yielding:
            return
        start = request.num_computed_tokens
        num_left = num_new = num_known + num_pending - start
        if num_left > 1:
            num_new = 0 if step.prefill.is_spent else step.prefill.grant(start, num_left)
            if not num_new:
                return
        elif step.drafts and self._put_drafts(request, step):
            return
        num_slots = len(request.block_table) * self._kv_cache.block_size
        new_block_ids: list[int] = []
        if start + num_new > num_slots or not request.is_in_runner:
            allocated = None if step.is_blocked else self._allocate(request, num_new, step)
            if allocated is None:
                return
            new_block_ids = allocated
        if num_left > 1:
            step.prefill.take(start, num_new, samples=num_new == num_left)
        step.add(request, num_new, new_block_ids)

    def _put_drafts(self, request: Request, step: Step) -> bool:
        """As `put` for a request with drafts. ``False``: it has none, or no room for any.

        Drafts take blocks, and slots for states, that nobody is about to need; nobody makes room
        for them.
        """
        drafts = None if step.drafts is None else step.drafts.get(request.request_id)
        if not drafts or not request.is_in_runner:
            return False
        drafts = drafts[: self._kv_cache.room_for_drafts(request)]
        if not drafts:
            return False
        num_slots = len(request.block_table) * self._kv_cache.block_size
        room = num_slots - request.num_computed_tokens - 1
        new_block_ids: list[int] = []
        if len(drafts) > room:
            num_spare = self._kv_cache.num_free_blocks - len(self._seats.running)
            num_missing = -(-(len(drafts) - room) // self._kv_cache.block_size)
            if step.is_blocked or num_missing > num_spare:
                drafts = drafts[: max(room, 0)]
            else:
                allocated = self._kv_cache.allocate_slots(request, 1 + len(drafts))
                assert allocated is not None
                new_block_ids = allocated
        if drafts:
            self._kv_cache.keep_drafted(request, len(drafts))
            step.add_drafts(request, drafts, new_block_ids)
        return bool(drafts)

    def _allocate(self, request: Request, num_new: int, step: Step) -> list[int] | None:
        """Blocks for a running request, at the cost of those behind it; ``None``: not now."""
        while (block_ids := self._kv_cache.allocate_slots(request, num_new)) is None:
            if not self._make_room(request, step):
                return None
        return block_ids

    def _make_room(self, request: Request, step: Step) -> bool:
        """Preempt the last of the running. ``False``: ``request`` cannot run in this step."""
        if self._seats.awaits_blocks:
            step.is_blocked = True
            return False
        victim = self._seats.running[-1]
        step.is_blocked = not self._seats.take(victim, step)
        return not step.is_blocked and victim is not request
