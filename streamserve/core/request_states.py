"""The states of the requests that run: where each has its own, and what steps keep beside it.

A step that passes a place of a prompt keeps the state there, in a slot that is the prefix tree's
once the step has retired. A step that verifies drafts keeps the state behind each of its tokens
but the last, since a state cannot go back::

    tokens             known      draft      draft        of the drafts one is right
    slot 4, its own      ────────── │ ────────── │ ──────▶ start + 3     given back
    slot 7            start + 1 ◀───┘            │                       given back
    slot 2                       start + 2 ◀─────┘        the request goes on in it

Nothing is copied: the next plan says where a request has its state from then on.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence

from streamserve.core.block_pool import PrefixNode
from streamserve.core.plan import SchedulerOutput, StateMove, StateSave
from streamserve.core.request import Request
from streamserve.core.state_slots import MOST_PLACES, StateSlots


class _Held:
    """What a request has of slots besides ``Request.state_slot``.

    ``places`` are those of its prompt, rising, behind which its state is to be kept, and ``saves``
    those (with a slot) where a step in flight does that. ``drafted`` are the slots in which a step
    in flight keeps what is after ``first_draft`` tokens, and after one, two, … more.
    """

    __slots__ = ("drafted", "first_draft", "places", "request", "saves")

    def __init__(self, request: Request, places: list[int]) -> None:
        self.request = request
        self.places = places
        self.saves: list[tuple[int, int]] = []
        self.drafted: list[int] = []
        self.first_draft = 0

    def slots(self) -> list[int]:
        """All of them."""
        assert self.request.state_slot is not None
        return [self.request.state_slot, *self.drafted, *(slot for _, slot in self.saves)]


class RequestStates:
    """Slots for those who run. A request has one from `begin` to `leave`. Integers only."""

    def __init__(self, num_slots: int, block_size: int) -> None:
        self.slots = StateSlots(num_slots)
        self._block_size = block_size
        self._held: dict[str, _Held] = {}
        self._num_drafted = 0  # slots that drafts have now
        self._moves: dict[str, int] = {}  # for the next plan

    @property
    def num_spare(self) -> int:
        """Slots that nobody runs in, or will when the steps in flight have retired."""
        return self.slots.num_spare + self._num_drafted

    def begin(self, request: Request, source: PrefixNode | None, places: list[int]) -> None:
        """A request starts from ``source``, or from nothing. There must be room."""
        request.state_slot = self.slots.begin(source)
        self._held[request.request_id] = _Held(request, places)

    def want(self, request: Request, place: int) -> None:
        """Keep the state of a request behind ``place`` tokens, whole blocks, as it passes them."""
        places = self._held[request.request_id].places
        if place > request.num_computed_tokens and place not in places:
            if len(places) < MOST_PLACES:
                insort(places, place)

    def room_for_drafts(self, request: Request) -> int:
        """How many drafts a request may have in the plan being made."""
        if self._held[request.request_id].places:
            return 0  # a step keeps one state behind a token: the prefix tree's comes first
        return self.slots.num_spare

    def keep_drafted(self, request: Request, num_drafts: int) -> None:
        """The plan being made has a token of a request and drafts. There must be room for them."""
        held = self._held[request.request_id]
        assert not held.drafted
        held.first_draft = request.num_computed_tokens + 1
        for _ in range(num_drafts):
            slot = self.slots.take()
            assert slot is not None
            held.drafted.append(slot)
        self._num_drafted += num_drafts

    def settle(self, request: Request) -> None:
        """A request goes on behind the drafts that were right: ``num_computed_tokens``."""
        held = self._held[request.request_id]
        slot = self._take(held, request.num_computed_tokens)
        assert slot is not None
        if slot != request.state_slot:
            request.state_slot = self._moves[request.request_id] = slot

    def cached(self, request: Request, nodes: Sequence[PrefixNode]) -> None:
        """``nodes[i]`` of the prefix tree is what ends with block ``i`` of a request's."""
        saves = self._held[request.request_id].saves
        while saves and saves[0][0] < len(nodes) * self._block_size:
            position, slot = saves.pop(0)
            self.slots.keep(nodes[position // self._block_size], slot)

    def leave(self, request: Request, last: PrefixNode | None) -> None:
        """A request loses its seat. ``last`` is behind all that is written and known of it.

        Its state is kept for that, if a slot has it: not where a step has failed, and not where
        tokens went into it that count no more.
        """
        held = self._held.pop(request.request_id)
        self._moves.pop(request.request_id, None)
        for _, slot in held.saves:
            self.slots.give_back(slot)  # the steps have failed
        kept = self._take(held, min(request.num_written_tokens, request.num_tokens))
        if kept is not None and last is not None:
            self.slots.keep(last, kept)
        elif kept is not None:
            self.slots.give_back(kept)
        request.state_slot = None

    def _take(self, held: _Held, num_tokens: int) -> int | None:
        """The slot with what is after so many tokens, if there is one; others are given back."""
        own = held.request.state_slot
        assert own is not None
        first = held.first_draft if held.drafted else held.request.num_computed_tokens
        slots = [*held.drafted, own]
        self._num_drafted -= len(held.drafted)
        held.drafted.clear()
        index = num_tokens - first
        taken = slots.pop(index) if 0 <= index < len(slots) else None
        for slot in slots:
            self.slots.give_back(slot)
        return taken

    def complete(self, plan: SchedulerOutput, requests: Sequence[Request]) -> None:
        """Write copies, moves and what is to be kept into a plan that will be launched.

        ``requests`` are those of ``plan.scheduled``.
        """
        plan.state_copies.extend(self.slots.take_copies())
        if self._moves:
            plan.state_moves.extend(StateMove(*move) for move in self._moves.items())
            self._moves.clear()
        saves = plan.state_saves
        for index, request in enumerate(requests):
            held = self._held[request.request_id]
            if held.drafted:
                drafted = enumerate(held.drafted, held.first_draft)
                saves.extend([StateSave(index, position, slot) for position, slot in drafted])
            while held.places and held.places[0] <= request.num_computed_tokens:
                place = held.places.pop(0)
                free = self.slots.take()
                if free is not None:
                    held.saves.append((place, free))
                    saves.append(StateSave(index, place, free))

    def check_integrity(self, nodes: list[PrefixNode]) -> None:
        """Assert that each slot is in one place, and who may have drafts or a move does run."""
        held = self._held.values()
        self.slots.check_integrity([slot for one in held for slot in one.slots()], nodes)
        assert self._num_drafted == sum(len(one.drafted) for one in held), "drafts miscounted"
        assert self._moves.keys() <= self._held.keys(), "a move of somebody who has left"
        for one in held:
            request = one.request
            assert len(one.drafted) in (0, request.num_draft_tokens) or request.is_finished
            assert not one.drafted or request.num_steps_in_flight, "kept for drafts of no step"
            slot = self._moves.get(request.request_id, request.state_slot)
            assert slot == request.state_slot, "moved to another's slot"
