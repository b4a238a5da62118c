"""A step that fails: what is undone, who runs alone, and that the tokens stay what they were."""

import pytest

from streamserve.core.memory_backoff import GOOD_STEPS_TO_DOUBLE, MemoryBackoff
from streamserve.core.plan import (
    ModelRunnerOutput,
    PromptLogprobs,
    TokenLogprobs,
)
from streamserve.core.request import FinishReason, RequestStatus
from streamserve.errors import QueueFullError
from tests.unit.simulated import Harness, drafting, guesses, naive_output, shares

DEPTHS = pytest.mark.parametrize("depth", [1, 2])


@DEPTHS
def test_after_a_failed_step_its_requests_run_alone_once_and_go_on(depth):
    harness = Harness(max_steps_in_flight=depth)
    requests = [harness.add([i] * 9, max_tokens=6) for i in (1, 2, 3)]
    harness.launch()
    harness.retire()
    for _ in range(depth):
        harness.launch()
    assert harness.fail() == []
    alone = []
    while len(alone) < 3:
        alone += [shares(plan)] if (plan := harness.launch()) is not None else []
        harness.retire()
    assert alone == [{r.request_id: 1} for r in requests]  # what was written before is cached
    harness.run()
    assert all(r.output_token_ids == naive_output(r, 6) for r in requests)
    assert harness.scheduler.recovery.num_rolled_back == 3
    assert not any(r.num_preemptions for r in requests)


def test_who_fails_alone_ends_and_the_others_go_on():
    harness = Harness()
    requests = [harness.add([i] * 9, max_tokens=6) for i in (1, 2, 3)]
    harness.launch()
    assert harness.fail() == []
    harness.step()
    harness.launch()
    assert harness.fail() == [requests[1]]
    assert requests[1].finish_reason is FinishReason.ERROR
    harness.run()
    for request in (requests[0], requests[2]):
        assert request.output_token_ids == naive_output(request, 6)


@pytest.mark.parametrize("caching", [True, False])
def test_a_long_prompt_runs_alone_until_it_is_past_where_it_failed(caching):
    harness = Harness(max_num_batched_tokens=8, enable_prefix_caching=caching)
    long = harness.add(list(range(10)) * 3, max_tokens=2)
    harness.step()
    harness.step()
    short = harness.add([1] * 3, max_tokens=2)
    harness.launch()  # 16 to 24
    assert harness.fail() == []
    plans = [harness.step() for _ in range(1 if caching else 2)]
    assert harness.scheduler.recovery.is_active is not caching
    plans += [] if caching else [harness.step()]
    assert not harness.scheduler.recovery.is_active
    assert [p.scheduled[0].start for p in plans] == ([16] if caching else [0, 8, 16])
    assert all(shares(p) == {long.request_id: 8} for p in plans)
    harness.run()
    for request in (long, short):
        assert request.output_token_ids == naive_output(request, 2)


def test_nobody_new_starts_while_requests_run_alone():
    harness = Harness()
    failing = harness.add([1] * 9, max_tokens=3)
    harness.launch()
    harness.fail()
    new = harness.add([2] * 9, max_tokens=3)
    assert shares(harness.step()) == {failing.request_id: 9}
    assert shares(harness.step()) == {failing.request_id: 1, new.request_id: 9}
    harness.run()


def test_who_runs_alone_takes_the_blocks_of_others_and_they_go_on_later():
    harness = Harness(num_blocks=6, block_size=4, max_num_batched_tokens=8)
    first = harness.add([1] * 8, max_tokens=5)
    harness.step()
    second = harness.add([2] * 11, max_tokens=2)
    harness.step()  # of the second 7: they hold 5 of 6 blocks
    harness.launch()
    harness.fail()
    harness.run()
    assert first.output_token_ids == naive_output(first, 5)
    assert second.output_token_ids == naive_output(second, 2)


def test_of_the_step_behind_only_the_others_rows_count():
    harness = Harness(max_steps_in_flight=2)
    failing = harness.add([1] * 9, max_tokens=6)
    harness.launch()
    other = harness.add([2] * 9, max_tokens=6)
    assert shares(harness.launch()) == {failing.request_id: 1, other.request_id: 9}
    assert harness.fail(0) == []
    assert failing.status is RequestStatus.RUNNING  # a step still has it
    assert harness.launch() is None
    assert [u.request for u in harness.retire()] == [other]
    assert failing.status is RequestStatus.PREEMPTED
    harness.run()
    for request in (failing, other):
        assert request.output_token_ids == naive_output(request, 6)


def test_what_came_before_a_failed_launch_counts():
    harness = Harness(max_steps_in_flight=2)
    request = harness.add([1] * 6, max_tokens=5)
    harness.launch()
    harness.launch()
    assert harness.fail(1) == []
    [update] = harness.retire()
    assert update.new_token_ids == naive_output(request, 1)
    harness.check_integrity()
    with pytest.raises(ValueError, match="step 1 is not in flight"):
        harness.scheduler.fail_step(1)
    with pytest.raises(ValueError, match="step 0 is not the oldest step in flight"):
        harness.scheduler.update(ModelRunnerOutput(0, [[]]))
    harness.run()
    assert request.output_token_ids == naive_output(request, 5)


@pytest.mark.parametrize("order", [(0, 0), (1, 0)])
def test_two_steps_that_fail_are_undone_once(order):
    harness = Harness(max_steps_in_flight=2)
    requests = [harness.add([i] * 9, max_tokens=6) for i in (1, 2)]
    harness.launch()
    harness.launch()
    for index in order:
        assert harness.fail(index) == []
    alone = []
    while harness.scheduler.recovery.is_active:
        alone += [shares(plan)] if (plan := harness.launch()) is not None else []
        harness.retire()
    assert alone[0] == {requests[0].request_id: 9}
    assert [sum(plan.values()) for plan in alone] == ([9, 9] if order == (0, 0) else [9, 1, 9, 1])
    harness.run()
    assert all(r.output_token_ids == naive_output(r, 6) for r in requests)
    assert harness.scheduler.recovery.num_rolled_back == 2


def test_who_is_paused_between_two_steps_of_which_the_second_fails_goes_on_when_it_is_resumed():
    harness = Harness(max_steps_in_flight=2)
    request = harness.add([1] * 9, max_tokens=6)
    harness.launch()
    harness.launch()
    harness.scheduler.pause(request)
    assert harness.fail(1) == []
    [update] = harness.retire()
    assert update.new_token_ids == naive_output(request, 1)
    harness.check_integrity()
    harness.run()
    assert request.output_token_ids == naive_output(request, 6)


@pytest.mark.parametrize("when", ["before", "after"])
def test_who_leaves_after_a_failure_leaves_nothing_behind(when):
    harness = Harness(max_steps_in_flight=2)
    leaving, other = (harness.add([i] * 9, max_tokens=6) for i in (1, 2))
    harness.launch()
    harness.launch()
    if when == "before":
        harness.scheduler.finish(leaving, FinishReason.ABORT)
    harness.fail(0)
    if when == "after":
        harness.scheduler.finish(leaving, FinishReason.ABORT)
    harness.run()
    assert other.output_token_ids == naive_output(other, 6)


def test_drafts_of_a_failed_step_are_forgotten():
    harness = Harness(speculative=drafting(3), propose=guesses(2))
    requests = [harness.add([i] * 9, max_tokens=12) for i in (1, 2)]
    harness.step()
    plan = harness.launch()
    assert any(s.sample > 1 for s in plan.scheduled)
    harness.fail()
    assert [r.num_draft_tokens for r in requests] == [0, 0]
    alone = [harness.step() for _ in requests]
    assert [s.sample for plan in alone for s in plan.scheduled] == [1, 1]
    assert not harness.scheduler.recovery.is_active
    harness.run()
    assert all(r.output_token_ids == naive_output(r, 12) for r in requests)


def test_logprobs_of_a_prompt_are_those_of_steps_that_count():
    harness = Harness(max_steps_in_flight=2, max_num_batched_tokens=4)
    request = harness.add(list(range(10)), max_tokens=1, prompt_logprobs=0)
    scheduler, runner = harness.scheduler, harness.runner

    def result(first):
        plan = runner.in_flight[0].plan
        entries = [TokenLogprobs(i, -1.0, ()) for i in range(first, min(first + 4, 10))]
        found = {request.request_id: PromptLogprobs(first, entries)}
        output = runner.retire()
        assert output.step_id == plan.step_id
        return ModelRunnerOutput(output.step_id, output.sampled_token_ids, prompt_logprobs=found)

    harness.launch()
    scheduler.update(result(1))
    harness.launch()
    harness.launch()
    harness.fail(0)
    scheduler.update(result(9))
    assert [e.token_id for e in request.prompt_logprobs] == [1, 2, 3, 4]
    for first in (1, 5, 9):  # every row of the prompt is computed again
        assert harness.launch() is not None
        scheduler.update(result(first))
    assert [e.token_id for e in request.prompt_logprobs] == list(range(1, 10))
    assert request.output_token_ids == naive_output(request, 1)


# What a failed step wrote


def test_a_failed_step_caches_nothing_it_wrote():
    harness = Harness(max_num_batched_tokens=8)
    request = harness.add([1] * 20, max_tokens=2)
    harness.step()
    harness.launch()
    harness.fail()
    harness.launch()
    assert harness.fail() == [request]
    again = harness.add([1] * 20, max_tokens=2)
    harness.run()
    assert again.num_cached_tokens == 8


def test_what_a_failed_step_copied_is_not_cached():
    harness = Harness(block_size=16)
    harness.add([1] * 20, max_tokens=6)
    harness.run()
    request = harness.add([1] * 20, max_tokens=2)
    plan = harness.launch()
    assert harness.fail() == []
    assert harness.kv._pool.blocks[plan.block_copies[0].dst].node is None
    assert harness.launch().block_copies
    assert harness.fail() == [request]
    harness.add([1] * 21, max_tokens=2)
    harness.run()


def test_what_a_failed_step_copied_for_a_fork_is_not_cached():
    harness = Harness(block_size=16, max_steps_in_flight=2)
    parent = harness.add([1] * 20, max_tokens=2)
    harness.launch()
    harness.retire()
    harness.launch()  # the parent's last step
    child = harness.request([1] * 20, max_tokens=2)
    harness.scheduler.fork(parent, child)
    plan = harness.launch()
    assert shares(plan) == {child.request_id: 1}
    assert harness.fail(1) == []
    assert harness.kv._pool.blocks[plan.block_copies[0].dst].node is None
    harness.run()
    assert child.output_token_ids == naive_output(child, 2)


def test_what_a_later_step_wrote_upon_a_failed_one_is_not_cached():
    harness = Harness(max_steps_in_flight=2, max_num_batched_tokens=8)
    request = harness.add([1] * 16, max_tokens=2)
    harness.launch()
    harness.launch()
    assert harness.fail(0) == []
    assert harness.kv.num_free_blocks < harness.kv.num_blocks
    assert harness.retire() == []
    assert harness.kv.num_free_blocks == harness.kv.num_blocks
    harness.launch()
    assert harness.fail() == [request]
    again = harness.add([1] * 16, max_tokens=2)
    harness.run()
    assert again.num_cached_tokens == 0


# Out of memory


def test_a_step_that_found_no_memory_is_made_again_with_half_of_its_chunk():
    harness = Harness(max_num_batched_tokens=16)
    decoding = harness.add([1] * 3, max_tokens=90)
    harness.step()
    prompt = harness.add([2] * 40, max_tokens=40)
    assert shares(harness.launch()) == {decoding.request_id: 1, prompt.request_id: 15}
    assert harness.fail(out_of_memory=True) == []
    assert shares(harness.launch()) == {decoding.request_id: 1, prompt.request_id: 6}  # 15 // 2
    assert harness.fail(out_of_memory=True) == []
    assert shares(harness.step()) == {decoding.request_id: 1, prompt.request_id: 2}
    chunks = [shares(harness.step())[prompt.request_id] for _ in range(GOOD_STEPS_TO_DOUBLE)]
    assert max(chunks) == 3
    later = harness.add([3] * 30, max_tokens=1)
    assert shares(harness.step())[later.request_id] == 6
    harness.run()
    assert decoding.output_token_ids == naive_output(decoding, 90)
    assert prompt.output_token_ids == naive_output(prompt, 40)


@pytest.mark.parametrize("depth", [1, 2])
def test_without_a_chunk_to_halve_the_seats_are_halved(depth):
    """As long as there is no memory for more, and nobody runs alone who need not."""
    harness = Harness(max_num_seqs=8, max_steps_in_flight=depth)
    requests = [harness.add([i] * 3, max_tokens=80) for i in range(8)]
    sizes = []

    def step():
        plan = harness.launch()
        if plan is not None:
            sizes.append(len(plan.scheduled))
            if len(plan.scheduled) > 3 and len(plan.scheduled) == sum(shares(plan).values()):
                assert harness.fail(len(harness.runner.in_flight) - 1, out_of_memory=True) == []
        if harness.runner.in_flight and (plan is None or len(harness.runner.in_flight) == depth):
            harness.retire()
        harness.check_integrity()

    while max(sizes[-2:], default=8) > 2:
        step()
    assert sizes.count(8) <= 2, "with its prompts, and without"
    num_steps = len(sizes)
    while harness.scheduler.has_unfinished or harness.runner.in_flight:
        step()
    assert max(sizes[num_steps : num_steps + GOOD_STEPS_TO_DOUBLE - 2]) == 2
    assert 4 in sizes[num_steps:], "once in a while it is tried with more"
    assert 1 not in sizes[num_steps : num_steps + 100]
    for request in requests:
        assert request.output_token_ids == naive_output(request, 80)
        assert request.num_preemptions == 0


def test_what_was_halved_is_doubled_again_as_long_as_all_goes_well():
    backoff = MemoryBackoff(10)
    assert [backoff.halve(n) for n in (1, 7, 9)] == [False, True, True]
    assert backoff.limit == 3, "never more than there was"

    def limit_after(num_steps):
        for _ in range(num_steps):
            backoff.went_well()
        return backoff.limit

    assert limit_after(GOOD_STEPS_TO_DOUBLE - 1) == 3
    assert backoff.halve(3)
    assert limit_after(GOOD_STEPS_TO_DOUBLE - 1) == 1, "it begins anew"
    assert limit_after(1) == 2
    assert [limit_after(GOOD_STEPS_TO_DOUBLE) for _ in range(3)] == [4, 8, 10]
    assert not backoff.is_reduced


def test_who_finds_no_memory_alone_ends():
    harness = Harness()
    requests = [harness.add([i] * 3, max_tokens=5) for i in (1, 2)]
    harness.step()
    harness.launch()
    assert harness.fail(out_of_memory=True) == []
    for _ in range(2):  # with one seat, then alone
        assert shares(harness.launch()) == {requests[0].request_id: 1}
        failed = harness.fail(out_of_memory=True)
    assert failed == [requests[0]]
    harness.run()
    assert requests[1].output_token_ids == naive_output(requests[1], 5)


def test_who_runs_alone_has_its_chunk_halved_down_to_one_token():
    harness = Harness()
    request = harness.add([1] * 9, max_tokens=5)
    harness.launch()
    harness.fail()
    chunks = []
    while not request.is_finished:
        chunks.append(shares(harness.launch())[request.request_id])
        harness.fail(out_of_memory=True)
    assert chunks == [9, 4, 2, 1]


# The engine's own request


def test_a_probe_runs_alone_and_first():
    harness = Harness(max_num_seqs=1, max_num_waiting=1)
    first = harness.add([1] * 9, max_tokens=3)
    harness.launch()
    harness.fail()
    with pytest.raises(QueueFullError):
        harness.add([2] * 9, max_tokens=3)
    probe = harness.request([0], max_tokens=1)
    harness.scheduler.add_probe(probe)
    assert shares(harness.step()) == {probe.request_id: 1}
    assert shares(harness.step()) == {first.request_id: 9}
    harness.run()
    assert probe.finish_reason is FinishReason.LENGTH
    assert first.output_token_ids == naive_output(first, 3)
