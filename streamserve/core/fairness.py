"""Fair shares: a virtual token counter for each tenant, and who is served next by them.

After Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024). A tenant's counter is
what it has been served, in tokens over its weight; whoever has the lowest is next. A tenant that
begins to wait is lifted to the lowest counter among those who wait, so that nobody saves up while
idle. Two tenants that always have requests waiting then differ by no more than `bound`, for ever.

What is different here, and why:

- What the prefix cache held is not counted, and what a preemption makes us compute again is not
  either: neither is the tenant's doing.
- A request that waits takes the seat of another tenant's that runs, if that one holds more than its
  share of the seats: it does not wait for long answers to end (`Account.may_take_seat_of`).
- A seat counts as ``SEAT_COST`` tokens that were served already, so that the next seat goes to who
  holds few while counters are near each other.
- Ageing: a tenant that waits without being served gains on the others, so that an endless row of
  new tenants, each lifted to the same counter, starves nobody.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from streamserve.core.clock import Clock
from streamserve.core.request import Request
from streamserve.core.shares import Account
from streamserve.core.step import Step

PROMPT_TOKEN_COST, OUTPUT_TOKEN_COST = 1, 2
"""As in the paper. A token that is generated takes a row of a step, and reads all its context."""
SEAT_COST = 32
AGEING_COST_PER_S = 10.0
REORDER_MARGIN = 16.0
"""Of counters that have crossed: below it everybody keeps the place, and nothing is sorted."""
MAX_ACCOUNTS = 4096


def bound(max_prompt_tokens: int, num_kv_tokens: int, min_weight: float = 1.0) -> float:
    """Theorem 4.4: what two tenants with requests waiting may differ by, in tokens over weight.

    ``num_kv_tokens`` is what all running requests together may hold.
    """
    largest = max(PROMPT_TOKEN_COST * max_prompt_tokens, OUTPUT_TOKEN_COST * num_kv_tokens)
    return 2 * largest / min_weight


class FairShare:
    """The accounts of all tenants with requests, and of those that had some lately."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._accounts: OrderedDict[str, Account] = OrderedDict()  # longest unused first
        self._order: list[Account] = []  # by their ranks: those with requests, and maybe others
        self._is_stale = False  # somebody came in who is not in there
        self._highest = 0.0

    def account_of(self, tenant: str) -> Account | None:
        """A tenant's account; ``None``: it has no requests, and had none lately."""
        return self._accounts.get(tenant)

    def enter(self, request: Request) -> None:
        """Open the account of a request that is about to be queued or seated."""
        account = self._accounts.get(request.tenant)
        if account is None:
            account = self._accounts[request.tenant] = Account(request.tenant)
            self._forget_idle()
        self._accounts.move_to_end(request.tenant)
        account.weight = request.weight
        request.account = account
        self.begin_waiting(account)
        if not account.is_listed:
            account.is_listed = self._is_stale = True
            account.rank = len(self._order)
            self._order.append(account)

    def begin_waiting(self, account: Account) -> None:
        """A request is about to be queued: nobody has saved up by being idle, or paused."""
        if not account.num_waiting:
            self._lift(account)
            if not account.num_running:
                account.last_served = self._clock()

    def _lift(self, account: Account) -> None:
        others = [a for a in self._order if a.num_waiting]
        others = others or [a for a in self._order if a is not account and a.num_running]
        floor = min([other.counter for other in others], default=self._highest)
        account.counter = max(account.counter, floor)

    def _value(self, account: Account) -> float:
        seats = SEAT_COST * account.num_running / account.weight
        return account.counter + seats + AGEING_COST_PER_S * account.last_served

    def reorder(self, requests: Iterable[Request]) -> bool:
        """Rank the tenants anew if their order has changed. Whether ``requests`` have new keys."""
        if len(self._order) < 2:
            return False
        highest = float("-inf")
        has_changed = self._is_stale
        for account in self._order:
            value = self._value(account)
            if value < highest - REORDER_MARGIN:
                has_changed = True
                break
            highest = max(highest, value)
        if not has_changed:
            return False
        for account in self._order:
            account.is_listed = not account.is_idle
        self._order = sorted([a for a in self._order if a.is_listed], key=self._value)
        for rank, account in enumerate(self._order):
            account.rank = rank
        self._is_stale = False
        for request in requests:
            assert request.account is not None
            request.sort_key = (request.account.rank, *request.sort_key[1:])
        return True

    def charge(self, step: Step) -> None:
        """Count what a step serves, when it is launched."""
        now = self._clock()
        for request, scheduled in zip(step.requests, step.plan.scheduled, strict=True):
            cost = 0
            num_charged = request.num_charged_tokens
            if num_charged < request.num_prompt_tokens:
                end = min(scheduled.start + len(scheduled.token_ids), request.num_prompt_tokens)
                first = max(scheduled.start, num_charged)
                if first < end:
                    request.num_charged_tokens = end
                    cost = PROMPT_TOKEN_COST * (end - first)
            if scheduled.sample:
                # The drafts of a step are charged with the next one, as far as they were right.
                num_outputs = scheduled.output_position + 1
                if num_outputs > request.num_charged_outputs:
                    cost += OUTPUT_TOKEN_COST * (num_outputs - request.num_charged_outputs)
                    request.num_charged_outputs = num_outputs
            account = request.account
            assert account is not None
            account.last_served = now
            if cost:
                account.counter += cost / account.weight
                self._highest = max(self._highest, account.counter)

    def _forget_idle(self) -> None:
        if len(self._accounts) > MAX_ACCOUNTS:
            idle = next((a for a in self._accounts.values() if not a.is_listed), None)
            if idle is not None:
                del self._accounts[idle.name]
