"""Drafts of a model that keeps states: each token has one, and what counts is gone on from.

The simulated device asserts at every step that a request goes on from the state of just the tokens
before it, and that what is kept is what it is kept as; here it is counted what is kept, and that
every slot comes back.
"""

from __future__ import annotations

from itertools import pairwise

import pytest

from streamserve.core.plan import StateMove
from streamserve.core.request import FinishReason, Request
from tests.unit.simulated import Harness, drafting, guesses, naive_output

NUM_DRAFTS = 3
PROMPT = [i * i % 11 for i in range(13)]


def harness_of(accuracy: int = 2, *, num_state_slots: int = 20, **options: object) -> Harness:
    """``accuracy`` in three drafts are right."""
    config = {"speculative": drafting(NUM_DRAFTS), "propose": guesses(accuracy), **options}
    return Harness(num_state_slots=num_state_slots, **config)


def step_until_drafted(harness: Harness) -> None:
    """Steps until one with drafts is in flight."""
    for _ in range(10):
        plan = harness.launch()
        if plan is not None and any(s.sample > 1 for s in plan.scheduled):
            return
        harness.retire()
    raise AssertionError("nobody drafts")


def computed_behind(harness: Harness, request: Request) -> int:
    """Tokens that the next turn computes, of three that it says itself."""
    before = harness.runner.num_computed_tokens
    turn = harness.add([*request.token_ids, 1, 2, 3], max_tokens=1)
    harness.run()
    assert turn.output_token_ids == naive_output(turn, 1)
    return harness.runner.num_computed_tokens - before


def check(harness: Harness, *requests: Request) -> None:
    """Answers are those of the requests alone, and every slot is free or kept."""
    for request in requests:
        assert request.output_token_ids == naive_output(request, request.num_output_tokens)
    slots = harness.kv._states.slots
    assert slots.num_spare == slots.num_slots == harness.kv.num_spare_states


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("accuracy", [0, 1, 2, 3])
def test_each_draft_is_kept_and_only_wrong_ones_move_a_state(accuracy, caching):
    harness = harness_of(accuracy, enable_prefix_caching=caching)
    request = harness.add(PROMPT, max_tokens=20)
    plans = harness.run()
    check(harness, request)
    num_drafted = 0
    for plan, behind in pairwise(plans[1:]):
        (part,), (following,) = plan.scheduled, behind.scheduled
        positions = [save.position for save in plan.state_saves]
        assert positions == list(range(part.start + 1, part.start + part.sample))
        is_wrong = following.start < part.start + len(part.token_ids)
        assert len(behind.state_moves) == is_wrong
        num_drafted += part.sample > 1
    assert num_drafted >= 3


def test_the_next_plan_says_where_the_state_is():
    harness = harness_of(0)
    request = harness.add(PROMPT, max_tokens=20)
    step_until_drafted(harness)
    own = request.state_slot
    (first, *_) = harness.runner.in_flight[0].plan.state_saves
    assert harness.kv.num_spare_states == 20 - 1  # of the next step's drafts
    harness.retire()
    assert request.state_slot == first.slot != own
    assert harness.launch().state_moves == [StateMove(request.request_id, first.slot)]


@pytest.mark.parametrize("accuracy", [2, 3])
def test_the_next_turn_goes_on_behind_an_answer_with_drafts(accuracy):
    harness = harness_of(accuracy)
    request = harness.add(PROMPT, max_tokens=14)
    harness.run()
    check(harness, request)
    assert computed_behind(harness, request) == 1 + 3  # the last token was not computed


def test_an_end_among_right_drafts_leaves_the_state_of_what_counts():
    """What was right behind the end went into the request's own slot, and into others not."""
    output = naive_output(Harness().request(PROMPT), 6)
    stop = next(token for token in output[1:3] if output.index(token) in (1, 2))
    harness = harness_of(3)
    request = harness.add(PROMPT, max_tokens=20, stop_token_ids=(stop,))
    harness.run()
    check(harness, request)
    assert request.num_output_tokens == output.index(stop) + 1
    assert computed_behind(harness, request) == 3  # the end, a draft, was computed too


@pytest.mark.parametrize("accuracy", [0, 3])
def test_who_is_cancelled_in_flight_leaves_the_state_of_what_was_known(accuracy):
    harness = harness_of(accuracy)
    request = harness.add(PROMPT, max_tokens=20)
    step_until_drafted(harness)
    harness.scheduler.finish(request, FinishReason.ABORT)
    harness.check_integrity()
    harness.run()
    check(harness, request)
    assert request.num_output_tokens > 0
    assert computed_behind(harness, request) == 3


@pytest.mark.parametrize("in_flight", [True, False])
def test_a_stop_string_found_late_leaves_no_state_of_what_is_discarded(in_flight):
    harness = harness_of(3)
    request = harness.add(PROMPT, max_tokens=20)
    step_until_drafted(harness)
    harness.retire()
    if in_flight:
        step_until_drafted(harness)
    harness.scheduler.finish(request, FinishReason.STOP, num_output_tokens=2)
    harness.run()
    check(harness, request)
    assert computed_behind(harness, request) == len(PROMPT) + 2 + 3 - 4  # from near its end


@pytest.mark.parametrize("accuracy", [1, 3])
def test_who_is_paused_with_drafts_in_flight_goes_on_from_its_state(accuracy):
    harness = harness_of(accuracy)
    request = harness.add(PROMPT, max_tokens=20)
    step_until_drafted(harness)
    harness.scheduler.pause(request)
    harness.retire()
    check(harness, request)
    before = harness.runner.num_computed_tokens
    harness.scheduler.resume(request)
    harness.launch()
    assert harness.runner.num_computed_tokens - before == 1
    harness.run()
    check(harness, request)


@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_who_loses_the_seat_goes_on_with_the_same_tokens(steps_in_flight):
    harness = harness_of(1, policy="priority", max_num_seqs=2, max_steps_in_flight=steps_in_flight)
    slow = [harness.add([i, *PROMPT], max_tokens=20, priority=1) for i in range(2)]
    step_until_drafted(harness)
    urgent = harness.add([5, *PROMPT], max_tokens=6)
    harness.run()
    assert sum(request.num_preemptions for request in slow) > 0
    check(harness, urgent, *slow)


def test_a_step_with_drafts_that_fails_keeps_nothing():
    harness = harness_of(3, num_state_slots=8)
    requests = [harness.add([i, *PROMPT], max_tokens=20) for i in range(2)]
    step_until_drafted(harness)
    num_kept = harness.kv.num_kept_states
    assert harness.fail() == []
    check(harness, *requests)
    assert harness.kv.num_kept_states == num_kept
    harness.run()
    check(harness, *requests)
    assert harness.scheduler.recovery.num_rolled_back == 2


@pytest.mark.parametrize("num_state_slots", [1, 2, 3, 6])
def test_as_many_drafts_as_there_are_slots(num_state_slots):
    harness = harness_of(3, num_state_slots=num_state_slots)
    request = harness.add(PROMPT, max_tokens=20)
    plans = harness.run()
    check(harness, request)
    most = max(part.sample for plan in plans for part in plan.scheduled) - 1
    assert most == min(num_state_slots - 1, NUM_DRAFTS)


def test_drafts_leave_a_slot_to_each_who_waits_for_a_seat():
    harness = harness_of(3, num_state_slots=4, max_num_seqs=3)
    first = harness.add(PROMPT, max_tokens=20)
    step_until_drafted(harness)
    harness.retire()
    others = [harness.add([i, *PROMPT], max_tokens=20) for i in range(2)]
    plan = harness.launch()
    assert len(plan.scheduled) == 3
    assert [part.sample for part in plan.scheduled] == [2, 1, 1]
    harness.run()
    check(harness, first, *others)


def test_a_crowds_drafts_take_half_of_the_slots_that_keep_prefixes():
    harness = harness_of(3, num_state_slots=16)
    crowd = [harness.add([i, *PROMPT], max_tokens=20) for i in range(4)]
    plans = harness.run()
    check(harness, *crowd)
    assert max(len(plan.state_saves) for plan in plans[1:]) == (16 - 4) // 2


def test_who_is_admitted_first_takes_slots_that_drafts_were_made_for():
    """Its own, and the one that it starts from, which this step reads."""
    harness = harness_of(3, num_state_slots=5, max_num_seqs=2, policy="priority")
    slow = harness.add(PROMPT, max_tokens=30, priority=1)
    before = harness.add([9, *PROMPT], max_tokens=1)
    harness.step()
    assert before.is_finished
    urgent = harness.add([*before.token_ids, 1, 2], max_tokens=5)
    plan = harness.launch()
    assert len(plan.state_copies) == 1
    assert [(len(part.token_ids), part.sample) for part in plan.scheduled] == [(3, 1), (3, 3)]
    harness.run()
    check(harness, before, slow, urgent)


@pytest.mark.parametrize("block_size", [1, 4])
def test_where_a_prefix_is_to_be_kept_nothing_is_drafted(block_size):
    """A token's state is kept once: for others, who have the prompt and more of it."""
    harness = harness_of(3, max_num_batched_tokens=11, block_size=block_size)
    first = harness.add(PROMPT[:12], max_tokens=8)
    harness.step()
    longer = harness.add([*PROMPT[:12], 3, 4, 5, 6], max_tokens=8)
    plan = harness.launch()
    assert (0, 12) in [(save.place, save.position) for save in plan.state_saves]
    assert plan.scheduled[0].sample == 1
    harness.run()
    check(harness, first, longer)
    assert longer.num_cached_tokens == 12
