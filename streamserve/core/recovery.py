"""After a step has failed: what it began is undone, then its requests run alone, once.

    step 7 [a b c]  fails            a, b and c give their seats back, as if preempted: what was
    step 8 [a b c d] behind it       written before is cached, what step 7 began is forgotten
    step 9 [a], 10 [b], 11 [c]       each alone, nothing else in flight: 10 fails, and b ends
    step 12 [a c d]                  everybody else goes on with the tokens they would have had

Of step 8, which was in flight behind it, only d's row counts: the others were computed on top of
what failed. Since sampling has no state, what is computed again comes out the same.

A step that found no memory is made again with half of its chunk, or with half of its requests,
before anybody is suspected.
"""

from __future__ import annotations

from streamserve.core.request import NEVER, Request
from streamserve.core.seats import Seats


class Recovery:
    """Who must be undone, and who must run alone. Idle but after a step that failed."""

    def __init__(self, seats: Seats) -> None:
        self.num_rolled_back = 0
        self._seats = seats
        self._undone: dict[str, Request] = {}  # they keep their seats while a step has them
        self._suspects: dict[str, tuple[Request, int]] = {}  # and what they must have computed

    @property
    def is_active(self) -> bool:
        """Whether the next step is not an ordinary one."""
        return bool(self._suspects or self._undone)

    @property
    def suspect(self) -> Request:
        """Who runs next, alone. Only with no step in flight."""
        assert not self._undone
        return next(iter(self._suspects.values()))[0]

    def suspect_first(self, request: Request) -> None:
        """Let a waiting request run alone, before all others."""
        others, self._suspects = self._suspects, {request.request_id: (request, 1)}
        self._suspects.update(others)

    def undo(self, request: Request, step_id: int, end: int | None) -> None:
        """A step that failed had the request: it starts again from what was written before.

        With ``end`` it runs alone until it has computed so many tokens.
        """
        request.failed_step_id = min(request.failed_step_id, step_id)
        self._seats.yielding.pop(request.request_id, None)
        if end is not None:
            self._suspects.setdefault(request.request_id, (request, end))
        self._undone[request.request_id] = request
        self.step_retired(request)

    def step_retired(self, request: Request) -> None:
        """One more step that had an undone request has retired."""
        if request.is_finished:
            self._seats.release(request)
        elif not request.num_steps_in_flight:
            del self._undone[request.request_id]
            request.failed_step_id = NEVER
            request.num_pending_tokens = request.num_draft_tokens = 0
            self.num_rolled_back += 1
            self._seats.unseat(request)

    def went_well(self, request: Request) -> None:
        """A row that counts has come: of one that runs alone, or from before what failed."""
        if request.request_id in self._undone:
            self.step_retired(request)
            return
        _, end = self._suspects.get(request.request_id, (request, 0))
        if request.num_computed_tokens >= end:
            self._suspects.pop(request.request_id, None)

    def forget(self, request: Request) -> None:
        """The request has ended."""
        self._undone.pop(request.request_id, None)
        self._suspects.pop(request.request_id, None)
