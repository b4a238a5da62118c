"""Promise: a request whose reader takes nothing gives its seat away and later goes on as it was."""

import pytest

from streamserve.core.request import FinishReason
from tests.unit.simulated import Harness, drafting, guesses, naive_output

PROMPT = [1, 2, 3, 4, 5, 6, 7]


def run_until(harness, condition, max_steps=100):
    for _ in range(max_steps):
        if condition():
            return
        harness.step()
    raise AssertionError("it never happens")


@pytest.mark.parametrize("depth", [1, 2])
def test_promise_a_paused_request_leaves_its_seat_and_continues_with_the_same_tokens(depth):
    harness = Harness(max_num_seqs=1, max_steps_in_flight=depth)
    slow = harness.add(PROMPT, max_tokens=20)
    other = harness.add([9, 9, 9], max_tokens=20)
    run_until(harness, lambda: slow.num_output_tokens == 5)
    harness.scheduler.pause(slow)
    run_until(harness, lambda: other.is_finished)
    assert slow.num_output_tokens <= 5 + depth  # what was in flight
    harness.scheduler.pause(slow)  # again, which counts for nothing
    assert harness.scheduler.num_paused == harness.scheduler.num_pauses == 1
    assert harness.launch() is None
    num_known = slow.num_tokens
    harness.scheduler.resume(slow)
    plan = harness.launch()
    [scheduled] = plan.scheduled
    assert scheduled.start == num_known - 1, "its KV was there, and is computed again"
    harness.run()
    assert slow.output_token_ids == naive_output(slow, 20)
    assert slow.num_preemptions == 0


def test_promise_who_is_paused_before_it_has_a_seat_waits_for_none():
    harness = Harness(max_num_seqs=1)
    other, slow = (harness.add(PROMPT, max_tokens=5) for _ in range(2))
    harness.step()
    harness.scheduler.pause(slow)
    harness.check_integrity()
    assert harness.scheduler.num_waiting == 0
    run_until(harness, lambda: other.is_finished)
    assert harness.launch() is None
    harness.scheduler.resume(slow)
    harness.run()
    assert slow.output_token_ids == naive_output(slow, 5)


def test_promise_who_is_resumed_before_it_has_left_its_seat_leaves_it_first():
    harness = Harness()
    request = harness.add(PROMPT, max_tokens=5)
    harness.launch()
    harness.scheduler.pause(request)
    harness.scheduler.resume(request)
    harness.check_integrity()
    assert harness.scheduler.num_waiting == 0, "a step has it"
    harness.run()
    assert request.output_token_ids == naive_output(request, 5)


def test_promise_paused_requests_lose_their_blocks_first():
    harness = Harness(num_blocks=16, block_size=4)
    paused = harness.add(PROMPT * 2, max_tokens=20)
    run_until(harness, lambda: paused.num_output_tokens == 6)
    harness.scheduler.pause(paused)
    others = [harness.add([8 - i] * 8, max_tokens=12) for i in range(3)]  # 15 blocks
    run_until(harness, lambda: all(r.is_finished for r in others))
    assert [r.num_preemptions for r in others] == [0, 0, 0]
    harness.scheduler.resume(paused)
    harness.run()
    assert paused.output_token_ids == naive_output(paused, 20)


def test_promise_drafts_survive_a_pause():
    harness = Harness(speculative=drafting(3), propose=guesses(2))
    request = harness.add(PROMPT, max_tokens=40)
    while not request.is_finished:
        harness.launch()
        harness.scheduler.pause(request)  # while the step with its drafts is in flight
        if harness.runner.in_flight:
            harness.retire()
        harness.check_integrity()
        harness.scheduler.resume(request)
    harness.run()
    assert request.output_token_ids == naive_output(request, 40)


def test_promise_the_others_of_several_answers_do_not_wait_for_a_paused_first():
    harness = Harness(max_num_seqs=1)
    first = harness.request(PROMPT, max_tokens=8)
    others = [harness.request(PROMPT, max_tokens=8) for _ in range(2)]
    harness.scheduler.add(first)
    harness.scheduler.add_choices(first, others)
    run_until(harness, lambda: first.num_output_tokens == 2)
    harness.scheduler.pause(first)
    run_until(harness, lambda: all(r.is_finished for r in others))
    harness.scheduler.resume(first)
    harness.run()
    for request in (first, *others):
        assert request.output_token_ids == naive_output(request, 8)


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_promise_a_paused_request_may_end_and_frees_everything(num_steps):
    harness = Harness(max_steps_in_flight=2)
    request = harness.add(PROMPT, max_tokens=20)
    for _ in range(num_steps):
        harness.launch()
    harness.scheduler.pause(request)
    assert harness.scheduler.finish(request, FinishReason.ABORT)
    harness.scheduler.resume(request)
    harness.run()
    assert not harness.scheduler.has_unfinished
