"""Who waits, who runs, and who has left while a step still has it."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import chain
from operator import attrgetter

from streamserve.core.kv_cache_manager import KVCacheManager
from streamserve.core.memory_backoff import MemoryBackoff
from streamserve.core.policy import Policy
from streamserve.core.prefix_claims import PrefixClaims
from streamserve.core.request import Request, RequestStatus
from streamserve.core.step import Step

_by_key = attrgetter("sort_key")


class Seats:
    """The live requests, and the seats of those that run. A seat holds blocks and a runner's row.

    Two rules keep memory right while the host does not know yet what the device did:

    - A request that ends while a step has it keeps its blocks until that step retires.
    - A request is preempted only when no step has it. One that must yield while a step has it keeps
      its seat, is put into no further step, and leaves when its token is known.

    A paused request holds neither seat nor row. Its blocks are given back too, which keeps them
    cached until somebody needs them: so under pressure they go before those of anyone who runs.
    """

    def __init__(self, num_seats: int, kv_cache: KVCacheManager, policy: Policy) -> None:
        self.backoff = MemoryBackoff(num_seats)
        self._most = num_seats
        self.requests: dict[str, Request] = {}  # waiting, running and paused
        self.paused: dict[str, Request] = {}
        self.num_waiting_tokens = 0  # of prompts
        self.num_pauses = 0  # since the start
        self.waiting: list[Request] = []  # sorted by key, as is the next
        self.running: list[Request] = []
        self.yielding: dict[str, Request] = {}  # running, to be preempted when its step retires
        self.claims = PrefixClaims(kv_cache.block_size, policy.outranks)
        self.released_ids: list[str] = []  # for the next plan
        self._leaving: dict[str, Request] = {}  # finished, a step still has it
        self._kv_cache = kv_cache

    def everyone(self) -> Iterator[Request]:
        """The live requests, and those that a step still has."""
        return chain(self.requests.values(), self._leaving.values())

    @property
    def awaits_blocks(self) -> bool:
        """Whether blocks come back when a step in flight retires: then waiting beats preempting."""
        return bool(self._leaving or self.yielding or self._kv_cache.has_returning_blocks)

    @property
    def num_seats(self) -> int:
        """Seats to be given. Who has one keeps it when there are fewer, while memory is short."""
        return self.backoff.limit

    def is_taken(self, request_id: str) -> bool:
        """Whether a live request has this id, or one that a step still has."""
        return request_id in self.requests or request_id in self._leaving

    def enter(self, request: Request) -> None:
        """A new request, to be queued or seated next.

        Raises ``ValueError`` if its id is in use; a finished one's is, until its last step retires.
        """
        request_id = request.request_id
        if self.is_taken(request_id):
            raise ValueError(f"request_id must be unique, got {request_id!r} again")
        self.requests[request_id] = request

    def queue(self, request: Request) -> None:
        """A request without a seat waits at its place."""
        # One that shares another's prompt computes a token of it.
        request.num_queued_tokens = 1 if request.fork_source else request.num_prompt_tokens
        self.num_waiting_tokens += request.num_queued_tokens
        if request.account is not None:
            request.account.num_waiting += 1
            request.account.num_waiting_tokens += request.num_queued_tokens
        insort(self.waiting, request, key=_by_key)

    def seat(self, request: Request) -> None:
        """Give a seat to a request whose blocks are there and that is not queued."""
        request.status = RequestStatus.RUNNING
        if request.account is not None:
            request.account.num_running += 1
        insort(self.running, request, key=_by_key)

    def admit(self, request: Request) -> None:
        """Give a seat to a request that waits; its blocks are there."""
        self._leave(self.waiting, request)
        self.seat(request)
        self.claims.update(request)

    def take_idle(self) -> bool:
        """Take the last seat of a request that waits for its token to be chosen, if one does."""
        idle = next((r for r in reversed(self.running) if r.num_pending_tokens), None)
        if idle is None:
            return False
        self.preempt(idle)
        return True

    def take(self, victim: Request, step: Step) -> bool:
        """Take a running request's seat: now, or (``False``) when the step that has it retires."""
        step.preempted = True
        if victim.num_steps_in_flight:
            self.yielding[victim.request_id] = victim
            return False
        if victim.num_tokens - victim.num_computed_tokens == 1 and not step.is_alone:
            step.prefill.num_tokens += 1  # was set aside for it
        self.preempt(victim)
        return True

    def step_retired(self, request: Request) -> None:
        """A step that had a running request has retired: it leaves now if it was to yield."""
        if request.num_steps_in_flight:
            return
        if self.yielding.pop(request.request_id, None) is not None:
            (self.unseat if request.is_paused else self.preempt)(request)

    def pause(self, request: Request) -> None:
        """Take the request out of all steps until it is resumed. Idempotent."""
        if request.is_paused:
            return
        request.is_paused = True
        self.num_pauses += 1
        if request.status is not RequestStatus.RUNNING:
            self._leave(self.waiting, request)
            self._park(request)
        elif request.num_steps_in_flight:
            self.yielding[request.request_id] = request
        else:
            self.unseat(request)

    def resume(self, request: Request) -> None:
        """Let it wait for a seat, where its arrival puts it. Idempotent."""
        if not request.is_paused:
            return
        request.is_paused = False
        if self._unpark(request):  # else it yields first
            self.queue(request)

    def finish(self, request: Request) -> None:
        """The request has ended: it neither waits nor runs. It still holds what it held."""
        assert self.requests.get(request.request_id) is request
        del self.requests[request.request_id]
        if not self._unpark(request):
            was_running = request.status is RequestStatus.RUNNING
            self._leave(self.running if was_running else self.waiting, request)
        self.yielding.pop(request.request_id, None)
        self.claims.drop(request)
        request.status = RequestStatus.FINISHED

    def release(self, request: Request) -> None:
        """Give back what a request that finished while it ran holds, unless a step has it."""
        if request.num_steps_in_flight:
            self._leaving[request.request_id] = request
            return
        self._leaving.pop(request.request_id, None)
        self._give_back(request)

    def preempt(self, request: Request) -> None:
        """Take the seat of a running request that no step has, for the sake of another."""
        request.num_preemptions += 1
        self.unseat(request)

    def unseat(self, request: Request) -> None:
        """Back to waiting, or paused; the blocks are free, but cached until somebody needs them."""
        assert not request.num_pending_tokens or request.chooses_on_host
        self._leave(self.running, request)
        self.claims.drop(request)
        self._give_back(request)
        request.status = RequestStatus.PREEMPTED
        if request.is_paused:
            self._park(request)
            return
        self.queue(request)

    def _park(self, request: Request) -> None:
        self.paused[request.request_id] = request
        if request.account is not None:
            request.account.num_paused += 1

    def _unpark(self, request: Request) -> bool:
        """Whether it was paused and had no seat any more."""
        if self.paused.pop(request.request_id, None) is None:
            return False
        if request.account is not None:
            request.account.num_paused -= 1
        return True

    def sort(self) -> None:
        """Put everybody in the order of keys that have changed."""
        self.waiting.sort(key=_by_key)
        self.running.sort(key=_by_key)

    def _leave(self, requests: list[Request], request: Request) -> None:
        """Out of ``waiting`` or ``running``."""
        account = request.account
        if requests is self.waiting:
            self.num_waiting_tokens -= request.num_queued_tokens
            if account is not None:
                account.num_waiting -= 1
                account.num_waiting_tokens -= request.num_queued_tokens
        elif account is not None:
            account.num_running -= 1
        _remove(requests, request)

    def _give_back(self, request: Request) -> None:
        """Return what a request that left its seat held: blocks, and its row in the runner."""
        assert not request.num_steps_in_flight
        self._kv_cache.free(request)
        if request.is_in_runner:
            request.is_in_runner = False
            self.released_ids.append(request.request_id)

    def check_integrity(self) -> None:
        """Assert that every request is where its status says. O(requests)."""
        self.claims.check_integrity()
        for requests in (self.waiting, self.running):
            keys = [request.sort_key for request in requests]
            assert keys == sorted(keys), "requests out of order"
        assert len(self.running) <= self._most
        assert len(self.requests) == len(self.waiting) + len(self.running) + len(self.paused)
        assert self.num_waiting_tokens == sum(r.num_queued_tokens for r in self.waiting)
        for request in self.requests.values():
            if (account := request.account) is not None:
                waiting = [r for r in self.waiting if r.account is account]
                assert account.num_waiting == len(waiting)
                assert account.num_waiting_tokens == sum(r.num_queued_tokens for r in waiting)
                assert account.num_running == sum(r.account is account for r in self.running)
                num_paused = sum(r.account is account for r in self.paused.values())
                assert account.num_paused == num_paused
        for request in (*self.waiting, *self.paused.values()):
            assert request.is_paused == (request.request_id in self.paused)
            assert request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)
            assert not request.block_table
            assert not request.num_steps_in_flight
            assert not request.is_in_runner
            assert request.computing_hash is None
        for request in self.running:
            assert request.status is RequestStatus.RUNNING
            limit = request.num_tokens + request.num_pending_tokens + request.num_draft_tokens
            assert 0 <= request.num_computed_tokens <= limit
            assert request.num_steps_in_flight or not request.num_draft_tokens, "drafts of no step"
        for request in self.yielding.values():
            assert request.status is RequestStatus.RUNNING, f"{request}: yields no seat"
            assert request.num_steps_in_flight
        for request in self._leaving.values():
            assert request.is_finished
            assert request.num_steps_in_flight


def _remove(requests: list[Request], request: Request) -> None:
    """Remove from a list sorted by key; keys are unique."""
    index = bisect_left(requests, request.sort_key, key=_by_key)
    assert requests[index] is request
    del requests[index]
