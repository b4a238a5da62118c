"""Fair shares per tenant: who is served next, and that nobody gets more than is due."""

import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from streamserve.core import fairness
from streamserve.core.fairness import (
    OUTPUT_TOKEN_COST,
    PROMPT_TOKEN_COST,
    bound,
)
from streamserve.core.request import FinishReason
from streamserve.errors import QueueFullError
from tests.unit.simulated import Harness, drafting, guesses


def full_of_one_tenant(depth, *, num_blocks=4096, block_size=16, max_num_seqs=16, count=100):
    """Every seat and the queue hold one tenant's long requests, and all of them decode."""
    harness = Harness(
        num_blocks=num_blocks,
        block_size=block_size,
        policy="fair",
        max_steps_in_flight=depth,
        max_num_seqs=max_num_seqs,
    )
    for i in range(count):
        harness.add([i, 1, 2, 3, 4, 5], tenant="many", max_tokens=200)
    for _ in range(40):
        harness.step()
    while num_blocks < 100 and num_spare_blocks(harness) > 1:  # until there is no room left
        harness.step()
    return harness


def num_spare_blocks(harness):
    """Beside one for each that runs."""
    return harness.kv.num_free_blocks - harness.scheduler.num_running


def plans_until(harness, request, limit):
    """The number of the plan, from now on, that has the request's first tokens."""
    for number in range(1, limit + 1):
        plan = None
        while plan is None:
            plan = harness.step()
        if any(s.request_id == request.request_id for s in plan.scheduled):
            return number
    return None


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    "memory",
    [
        {},  # seats are what is short
        {"num_blocks": 64, "block_size": 4, "max_num_seqs": 64},  # blocks are
    ],
)
@pytest.mark.parametrize("weight", [0.01, 1.0, 10.0])
def test_promise_fair_first_chunk_within_two_steps(depth, memory, weight):
    """Of one tenant's request, while another's 100 long ones hold and want everything."""
    harness = full_of_one_tenant(depth, **memory)
    assert harness.scheduler.num_waiting > 30
    prompt = [7] * (24 if memory else 5)
    request = harness.add(prompt, tenant="one", weight=weight, max_tokens=4)
    assert not memory or num_spare_blocks(harness) < 2
    assert plans_until(harness, request, 2) is not None
    while not request.is_finished:
        harness.step()
    if not memory:
        others = harness.scheduler._seats.requests.values()
        assert sum(r.num_preemptions for r in others) == 1, "one seat was all it needed"


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("policy", ["sjf", "fcfs", "priority"])
def test_without_shares_it_waits_for_an_answer_to_end(depth, policy):
    harness = Harness(policy=policy, max_steps_in_flight=depth, num_blocks=4096, block_size=16)
    for i in range(100):
        harness.add([i, 1], tenant="many", max_tokens=50)
    for _ in range(10):
        harness.step()
    assert plans_until(harness, harness.add([7, 7], tenant="one"), 20) is None


def test_promise_fair_nobody_fills_the_queue_before_the_others():
    """A tenant that takes all it gets leaves as much free, in requests and in tokens."""
    for limits in ({"max_num_waiting": 8}, {"max_num_waiting_tokens": 8}):
        harness = Harness(policy="fair", max_num_seqs=1, **limits)
        harness.add([1], tenant="many", max_tokens=50)
        harness.step()
        for tenant, taken in (("many", 4), ("one", 2), ("many", 0), ("another", 1), ("one", 0)):
            for _ in range(taken):
                harness.add([1], tenant=tenant)
            with pytest.raises(QueueFullError, match=r"of this key or user wait already, and of 8"):
                harness.add([1], tenant=tenant)
        alone = Harness(policy="fcfs", max_num_seqs=1, **limits)
        for _ in range(8):
            alone.add([1], tenant="many")


class Served:
    """What each tenant was served, seen from outside: prompts first computed, tokens received."""

    def __init__(self, harness):
        self.harness = harness
        self.tokens = {}
        self._computed = {}
        self._num_updates = 0

    def observe(self, plan):
        for s in plan.scheduled if plan is not None else ():
            request = self.harness.requests[s.request_id]
            end = min(s.start + len(s.token_ids), request.num_prompt_tokens)
            first = max(s.start, self._computed.get(s.request_id, 0))
            self._computed[s.request_id] = max(end, self._computed.get(s.request_id, 0))
            self._add(request, PROMPT_TOKEN_COST * max(end - first, 0))
        for update in self.harness.updates[self._num_updates :]:
            self._add(update.request, OUTPUT_TOKEN_COST * len(update.new_token_ids))
        self._num_updates = len(self.harness.updates)

    def _add(self, request, tokens):
        name = request.tenant
        self.tokens[name] = self.tokens.get(name, 0.0) + tokens / request.weight


class BusyHarness(Harness):
    """Tenants of whom each always has requests waiting, enough for all seats."""

    def __init__(self, shapes, weights, **config):
        super().__init__(**({"policy": "fair"} | config))
        self.shapes = shapes  # of each tenant: lengths of prompts and of answers, in turn
        self.weights = weights
        self.requests = {}
        self.num_distinct = 0
        self.served = Served(self)

    def fill(self):
        waiting = [r.tenant for r in self.scheduler._seats.waiting]
        for tenant, (shapes, weight) in enumerate(zip(self.shapes, self.weights, strict=True)):
            for _ in range(self.config.max_num_seqs + 1 - waiting.count(str(tenant))):
                self.num_distinct += 1
                prompt, answer = shapes[self.num_distinct % len(shapes)]
                request = self.add(
                    [1000 + self.num_distinct, *range(prompt - 1)],
                    tenant=str(tenant),
                    weight=weight,
                    max_tokens=answer,
                )
                self.requests[request.request_id] = request

    def request(self, *args, **kwargs):
        now = self.now
        request = super().request(*args, **kwargs)
        self.now = request.arrival_time = now
        return request

    def run_steps(self, num_steps):
        """Steps of 20 ms; the history of what each tenant was served."""
        history = []
        for _ in range(num_steps):
            self.fill()
            self.served.observe(self.step())
            self.now += 0.02
            history.append(dict(self.served.tokens))
        return history


SHAPES = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=4)
WEIGHTS = st.sampled_from([0.5, 1.0, 1.0, 2.0, 5.0])
MAX_PROMPT = 30


def largest_difference(history, first, second):
    """Of what two tenants were served, over any stretch of time."""
    gaps = [served.get(first, 0.0) - served.get(second, 0.0) for served in history]
    return max(gaps) - min(gaps)


@given(
    tenants=st.lists(st.tuples(SHAPES, WEIGHTS), min_size=2, max_size=4),
    max_num_seqs=st.integers(1, 8),
    num_blocks=st.integers(30, 120),
    budget=st.integers(8, 64),
    depth=st.sampled_from([1, 2]),
)
@settings(max_examples=15)
def test_promise_fair_served_tokens_differ_by_no_more_than_the_bound(
    tenants, max_num_seqs, num_blocks, budget, depth
):
    """Theorem 4.4 of the paper, with weights: over any stretch of time, for any two tenants."""
    shapes, weights = zip(*tenants, strict=True)
    harness = BusyHarness(
        shapes,
        weights,
        max_num_seqs=max_num_seqs,
        num_blocks=num_blocks,
        max_num_batched_tokens=budget,
        max_steps_in_flight=depth,
    )
    history = harness.run_steps(200)
    num_held = min(num_blocks * 4, max_num_seqs * 60)  # tokens that may run at once
    limit = bound(MAX_PROMPT, num_held, min(weights))
    for first, second in itertools.combinations(map(str, range(len(tenants))), 2):
        assert largest_difference(history, first, second) <= limit


LONG_AND_SHORT = ([(30, 30)], [(3, 5)])


@pytest.mark.parametrize(
    ("policy", "weights", "keeps"),
    [
        ("fair", (1, 1), True),
        ("fair", (1, 3), True),
        ("fair", (4, 1), True),
        ("sjf", (1, 1), False),
        ("fcfs", (1, 1), False),
    ],
)
def test_shares_follow_the_weights_whatever_the_requests_are_like(policy, weights, keeps):
    harness = BusyHarness(LONG_AND_SHORT, weights, policy=policy, max_num_seqs=4)
    history = harness.run_steps(1500)
    limit = bound(MAX_PROMPT, 4 * 60, min(weights))
    assert (largest_difference(history, "0", "1") <= limit) is keeps
    served = history[-1]["0"] / history[-1]["1"]
    assert (0.85 < served < 1.15) is keeps


def test_seats_are_taken_one_by_one_from_the_last_down_to_the_share():
    harness = Harness(policy="fair", max_num_seqs=8)
    many = [harness.add([i], tenant="many", max_tokens=50) for i in range(6)]
    few = [harness.add([10 + i], tenant="few", max_tokens=50) for i in range(2)]
    for _ in range(3):
        harness.step()
    third = harness.add([20], tenant="few")
    seats = harness.scheduler._seats
    third.account.counter -= 1000
    harness.scheduler._shares.reorder(seats.requests.values())
    seats.sort()
    victims = list(harness.scheduler._policy.victims(third, seats.running))
    assert victims == [r for r in reversed(seats.running) if r in many][:3], "3 seats for each"
    assert {r.account.num_running for r in (many[0], few[0])} == {6, 2}, "nothing has changed"


def test_nobody_yields_in_vain():
    """Not for what finds no room all the same, nor while room is on its way."""
    for prompt, num_blocks, finishes in ((200, 60, False), (60, 48, True)):
        harness = Harness(
            policy="fair", num_blocks=num_blocks, max_num_seqs=4, max_steps_in_flight=2
        )
        many = [harness.add([i] * 30, tenant="many", max_tokens=30) for i in range(4)]
        for _ in range(8):
            harness.step()
        assert harness.scheduler.num_running == 4
        harness.launch()
        if finishes:
            for request in many[:2]:
                harness.scheduler.finish(request, FinishReason.ABORT)
        big = harness.add([9] * prompt, tenant="one", max_tokens=2)
        for _ in range(6):
            harness.step()
        assert sum(r.num_preemptions for r in many) == 0
        assert (big.last_step_id >= 0) is finishes


def test_nobody_yields_a_seat_where_it_is_the_steps_tokens_that_are_short():
    harness = Harness(policy="fair", num_blocks=512, max_num_seqs=8, max_num_batched_tokens=12)
    many = [harness.add([i], tenant="many", max_tokens=50) for i in range(6)]
    for _ in range(3):
        harness.step()
    harness.add([7] * 60, tenant="long", max_tokens=2)
    harness.step()
    late = harness.add([8] * 60, tenant="late", max_tokens=2)
    late.account.counter += 40  # behind the long one, before those who decode
    while not late.is_finished:
        harness.step()
    assert sum(r.num_preemptions for r in many) == 0


def test_seats_do_not_go_to_and_fro():
    harness = BusyHarness(
        [[(5, 100)]] * 3, (1, 1, 2), max_num_seqs=12, num_blocks=1024, max_num_batched_tokens=32
    )
    harness.run_steps(300)
    seats = harness.scheduler._seats.running
    num_seats = [sum(r.tenant == str(t) for r in seats) for t in range(3)]
    assert all(abs(num - due) <= 1 for num, due in zip(num_seats, (3, 3, 6), strict=True))
    assert sum(r.num_preemptions for r in harness.requests.values()) <= 12


def test_within_a_tenant_the_shortest_uncached_goes_first_and_ages():
    harness = Harness(policy="fair", max_num_seqs=1)
    first = harness.add([1] * 10, tenant="a", max_tokens=20)
    harness.step()
    long = harness.add([2] * 60, tenant="a")
    short = harness.add([3] * 20, tenant="a")
    urgent = harness.add([4] * 60, tenant="a", priority=-2)
    harness.now += 1000
    late = harness.add([5], tenant="a", priority=-2)
    assert harness.scheduler._seats.running == [first]
    waiting = harness.scheduler._seats.waiting
    assert waiting == [urgent, long, short, late], "1 s apart: more than 40 tokens are worth"
    short.arrival_time = long.arrival_time + 0.1
    key = harness.scheduler._policy.key
    assert key(short, 0) < key(long, 1)
    long.num_uncached_tokens = 1
    assert key(long, 1) < key(short, 0)


def test_a_seat_is_taken_by_who_comes_first_and_of_another_tenant_only():
    harness = Harness(policy="fair", max_num_seqs=2, num_blocks=1024, block_size=16)
    mine = [harness.add([i] * 90, tenant="a", max_tokens=100) for i in (2, 3)]
    for _ in range(4):
        harness.step()
    harness.now -= 0.9
    short = harness.add([4], tenant="a")
    assert short.sort_key < mine[1].sort_key
    harness.step()
    assert not short.num_computed_tokens, "it is no more urgent than the tenant's own"
    late = harness.add([5], tenant="b")
    late.account.counter = mine[0].account.counter + 200
    harness.scheduler._shares.reorder(harness.scheduler._seats.requests.values())
    outranks = harness.scheduler._policy.outranks
    assert not any(outranks(late, request) for request in mine), "others have had less"
    assert outranks(short, late) is False
    assert sum(request.num_preemptions for request in mine) == 0


def test_an_urgent_request_takes_a_seat_of_its_own_tenant_only():
    harness = Harness(policy="fair", max_num_seqs=2)
    mine = [harness.add([i, 1], tenant="a", max_tokens=50) for i in (1, 2)]
    harness.step()
    urgent = harness.add([3, 1], tenant="a", priority=-1, max_tokens=2)
    harness.step()
    harness.step()
    assert urgent.num_computed_tokens or urgent.is_finished
    assert sum(r.num_preemptions for r in mine) == 1
    other = harness.add([4, 1], tenant="b", max_tokens=50)
    for _ in range(4):
        harness.step()
    assert other.num_computed_tokens, "its share"
    harness.add([5, 1], tenant="b", priority=-100, max_tokens=50)
    for _ in range(4):
        harness.step()
    running = [r.tenant for r in harness.scheduler._seats.running]
    assert sorted(running) == ["a", "b"], "no urgency takes more than that"


def test_nobody_saves_up_while_idle():
    harness = Harness(policy="fair", max_num_seqs=2, num_blocks=1024, block_size=16)
    early = harness.add([1], tenant="idle", max_tokens=1)
    for i in range(6):
        harness.add([2, i], tenant="busy", max_tokens=100)
    while not early.is_finished or harness.scheduler.num_waiting > 3:
        harness.step()
    accounts = harness.scheduler._shares._accounts
    assert accounts["busy"].counter > accounts["idle"].counter + 100
    harness.add([3], tenant="idle")
    assert accounts["idle"].counter == accounts["busy"].counter


def test_promise_fair_who_comes_begins_where_the_others_are():
    """With the lowest who wait; else with the lowest who run; else where the last one ended."""
    harness = Harness(policy="fair", max_num_seqs=3, num_blocks=1024, block_size=16)
    few = harness.add([1], tenant="few", max_tokens=100)
    dear = harness.add([2], tenant="dear", weight=0.1, max_tokens=50)
    while not dear.is_finished:
        harness.step()
    accounts = harness.scheduler._shares._accounts
    newcomer = harness.add([3], tenant="new", max_tokens=200).account
    assert newcomer.counter == accounts["few"].counter < accounts["dear"].counter
    for i in range(8):
        harness.add([4, i], tenant="many", weight=0.1, max_tokens=50)
    for _ in range(40):
        harness.step()
    assert accounts["few"].num_running == 1
    lowest = min(accounts["many"].counter, accounts["dear"].counter)
    assert accounts["few"].counter < lowest
    harness.scheduler.resume(few)
    assert accounts["few"].counter < lowest, "it was not paused"
    harness.add([5], tenant="few", max_tokens=1)
    assert accounts["few"].counter == accounts["many"].counter, "nor by running little"
    harness.run()
    highest = max(account.counter for account in accounts.values())
    assert harness.add([6], tenant="last").account.counter == highest


def test_promise_fair_nobody_saves_up_by_running_little():
    harness = Harness(policy="fair", max_num_seqs=3, num_blocks=1024, block_size=16)
    few = harness.add([1], tenant="few", max_tokens=100).account
    dear = harness.add([2], tenant="dear", weight=0.1, max_tokens=100).account
    for _ in range(5):
        harness.step()
    assert few.counter < dear.counter
    harness.add([3], tenant="few")
    assert few.counter == dear.counter


@pytest.mark.parametrize(
    ("counters", "ranks"),
    [
        ((10.0, 0.0, 0.0), [0, 1, 2]),
        ((20.0, 10.0, 0.0), [2, 1, 0]),
        ((10.0, 20.0, 0.0), [1, 2, 0]),
    ],
)
def test_tenants_are_ranked_anew_once_two_have_crossed_by_the_margin(counters, ranks):
    harness = Harness(policy="fair")
    requests = [harness.add([1, i], tenant=tenant) for i, tenant in enumerate("abc")]
    shares, accounts = harness.scheduler._shares, [request.account for request in requests]
    shares.reorder(requests)
    for account, counter in zip(accounts, counters, strict=True):
        account.counter, account.last_served = counter, 0.0
    assert shares.reorder(requests) is (ranks != [0, 1, 2])
    assert [account.rank for account in accounts] == ranks
    assert [request.sort_key[0] for request in requests] == ranks


def test_a_seat_counts_by_weight_and_who_runs_keeps_the_age_of_its_waiting():
    harness = Harness(policy="fair")
    account = harness.add([1], tenant="a", weight=4.0).account
    shares, before = harness.scheduler._shares, account.last_served
    account.num_waiting, account.num_running = 0, 2
    harness.now += 50.0
    shares.begin_waiting(account)
    assert account.last_served == before
    age = fairness.AGEING_COST_PER_S * before
    assert shares._value(account) == account.counter + fairness.SEAT_COST * 2 / 4.0 + age


@pytest.mark.parametrize("is_resumed_first", [True, False])
def test_promise_fair_nobody_saves_up_while_paused(is_resumed_first):
    """Neither tokens nor age: a reader that takes nothing asks for nothing."""
    harness = Harness(policy="fair", max_num_seqs=1, num_blocks=1024, block_size=16)
    paused = harness.add([1], tenant="slow", max_tokens=10)
    while not paused.num_output_tokens:
        harness.step()
    harness.scheduler.pause(paused)
    for i in range(40):
        harness.add([2, i], tenant="busy", max_tokens=10)
    for _ in range(200):
        harness.now += 10.0
        harness.step()
    assert harness.scheduler.num_waiting == 20
    if is_resumed_first:
        harness.scheduler.resume(paused)
    for i in range(20):
        harness.add([3, i], tenant="slow", max_tokens=10)
    served = [harness.step().scheduled[0].request_id for _ in range(200)]
    num_slow = sum(int(request_id[1:]) > 41 or request_id == "r1" for request_id in served)
    assert 80 <= num_slow <= 120


@pytest.mark.parametrize("is_resumed", [True, False])
def test_promise_fair_who_waits_comes_before_who_was_paused(is_resumed):
    harness = Harness(policy="fair", max_num_seqs=1)
    paused = harness.add([1], tenant="slow", max_tokens=10)
    while not paused.num_output_tokens:
        harness.step()
    harness.scheduler.pause(paused)
    harness.add([2], tenant="busy", max_tokens=20)
    for _ in range(10):
        harness.step()
    patient = harness.add([3], tenant="patient", max_tokens=1)
    harness.now += 50.0
    if is_resumed:
        harness.scheduler.resume(paused)
    else:
        paused = harness.add([1, 2], tenant="slow", max_tokens=1)
    num_tokens = paused.num_output_tokens
    while not patient.is_finished:
        harness.step()
    assert paused.num_output_tokens == num_tokens


def test_promise_fair_nobody_starves_in_an_endless_row_of_new_tenants():
    """Each new one is lifted to the lowest counter there is: below who was served before."""
    harness = Harness(policy="fair", max_num_seqs=1)
    old = harness.add([1] * 40, tenant="old", max_tokens=30)
    harness.add([2], tenant="new", max_tokens=1)
    while not old.is_finished:
        harness.step()
    waiting = harness.add([3], tenant="old", max_tokens=1)
    for i in range(200):
        if waiting.is_finished:
            break
        while harness.scheduler.num_waiting < 3:
            harness.add([4], tenant=f"new {i} {harness.num_requests}", max_tokens=1)
        harness.step()
    assert waiting.is_finished
    assert i > 5, "it was not its turn at first"


def test_accounts_of_those_who_left_are_forgotten(monkeypatch):
    monkeypatch.setattr(fairness, "MAX_ACCOUNTS", 10)
    harness = Harness(policy="fair", max_num_seqs=4)
    for i in range(20):
        harness.add([1, i], tenant=f"alone {i}", max_tokens=2)
        harness.run()
    assert len(harness.scheduler._shares._accounts) <= 11
    stays = harness.add([1], tenant="stays", max_tokens=250).account
    often = None
    for i in range(40):
        left = harness.add([1, i % 7], tenant=f"user {i}", max_tokens=2)
        if i % 4 == 0:
            account = harness.add([2], tenant="often", max_tokens=1).account
            assert often in (None, account), "those go first whom nobody has seen for long"
            often = account
        while not left.is_finished:
            harness.step()
    accounts = harness.scheduler._shares._accounts
    assert len(accounts) <= 11
    assert accounts["stays"] is stays
    harness.run()


def test_what_was_computed_before_is_not_charged_again():
    harness = Harness(policy="fair", num_blocks=16, max_num_seqs=3)
    harness.add([1] * 9, tenant="a", max_tokens=30)
    harness.add([1] * 9, tenant="b", max_tokens=30)
    account = harness.add([2] * 5, tenant="c", max_tokens=30).account
    harness.run()
    assert harness.scheduler._shares._accounts["a"].counter == 9 + 60
    assert harness.scheduler._shares._accounts["b"].counter == 1 + 60, "the rest was cached"
    assert account.counter == 5 + 60
    harness = Harness(policy="fair", enable_prefix_caching=False, max_num_batched_tokens=8)
    account = harness.add(list(range(20)), max_tokens=1).account
    harness.step()
    assert account.counter == 8, "no more than there was"
    harness.launch()
    harness.fail()
    harness.run()
    assert account.counter == 20 + OUTPUT_TOKEN_COST
    harness.add([9] * 3, tenant="before", max_tokens=1)
    request = harness.add(list(range(20)), tenant="paused", max_tokens=1)
    harness.step()
    assert request.num_computed_tokens == 5
    before = request.account.counter - 5
    harness.scheduler.pause(request)
    harness.scheduler.resume(request)
    plans = harness.run()
    assert len(plans[0].scheduled[0].token_ids) == 8, "three of them are new"
    assert request.account.counter == before + 20 + OUTPUT_TOKEN_COST


def test_what_a_fork_shares_is_charged_once():
    harness = Harness(policy="fair", block_size=16)
    parent = harness.add([1] * 9, max_tokens=20)
    while parent.num_output_tokens < 5:
        harness.step()
    child = harness.request([1] * 9, max_tokens=8)
    child.token_ids += parent.output_token_ids
    harness.scheduler.fork(parent, child)
    harness.run()
    assert parent.account.counter == 9 + OUTPUT_TOKEN_COST * (20 + 3)


def test_drafts_that_were_right_are_charged_with_the_next_step():
    harness = Harness(policy="fair", speculative=drafting(3), propose=guesses(3))
    account = harness.add([1] * 9, max_tokens=40).account
    plans = harness.run()
    assert len(plans) < 20
    assert 9 + 2 * (40 - 4) <= account.counter <= 9 + 2 * 40
