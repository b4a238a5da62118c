"""Many answers from one prompt: it is computed once, its blocks are shared, tails are copied."""

from __future__ import annotations

import pytest

from streamserve.api.choices import Choices
from streamserve.core.request import FinishReason, Request, RequestStatus
from streamserve.errors import InvalidParameterError
from tests.unit.simulated import Harness, naive_next_token, naive_output


def add_choices(harness: Harness, prompt: list[int], n: int, **params) -> list[Request]:
    source = harness.add(prompt, **params)
    others = [harness.request(prompt, **params) for _ in range(n - 1)]
    harness.scheduler.add_choices(source, others)
    return [source, *others]


def num_held(harness: Harness) -> int:
    return harness.kv.num_blocks - harness.kv.num_free_blocks


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("depth", [1, 2])
def test_eight_answers_to_a_thousand_tokens(caching, depth):
    """62 blocks that all share, and 8 tails: the first one's own, and 7 copies of it."""
    harness = Harness(
        num_blocks=128,
        block_size=16,
        enable_prefix_caching=caching,
        max_model_len=2048,
        max_num_batched_tokens=256,
        max_steps_in_flight=depth,
    )
    prompt = [i * i % 7 for i in range(1000)]
    choices = add_choices(harness, prompt, 8, max_tokens=8)
    copies = []
    held = 0
    while harness.scheduler.has_unfinished or harness.runner.in_flight:
        plan = harness.step()
        if plan is not None:
            copies += plan.block_copies
        running = [r for r in choices if r.status is RequestStatus.RUNNING]
        if len(running) == 8 and not held:
            held = num_held(harness)
            assert len({tuple(r.block_table[:62]) for r in choices}) == 1
            assert len({r.block_table[62] for r in choices}) == 8
    assert held == 62 + 8
    assert len(copies) == 7
    assert harness.kv.stats.num_block_copies == 7
    assert harness.runner.num_computed_tokens == 1000 + 7 + 7 * 8  # the others' last of the prompt
    assert [r.num_cached_tokens for r in choices] == [0] + [999] * 7
    assert all(r.output_token_ids == naive_output(r, 8) for r in choices)


def test_a_prompt_of_whole_blocks_has_its_last_block_copied():
    harness = Harness(block_size=4)
    choices = add_choices(harness, [1, 2] * 6, 3, max_tokens=5)
    harness.run()
    assert harness.kv.stats.num_block_copies == 2
    assert all(r.output_token_ids == naive_output(r, 5) for r in choices)


def test_answers_of_one_token_share_what_the_first_left_in_the_cache():
    harness = Harness(block_size=4)
    choices = add_choices(harness, [1] * 18, 4, max_tokens=1)
    harness.run()
    assert harness.runner.num_computed_tokens == 18 + 3
    assert all(r.finish_reason is FinishReason.LENGTH for r in choices)


@pytest.mark.parametrize("num_steps", [0, 1, 3])
@pytest.mark.parametrize("caching", [True, False])
def test_when_the_first_leaves_the_others_go_on(num_steps, caching):
    harness = Harness(max_num_batched_tokens=8, enable_prefix_caching=caching)
    choices = add_choices(harness, [1] * 20, 3, max_tokens=4)
    for _ in range(num_steps):
        harness.step()
    harness.scheduler.finish(choices[0], FinishReason.ABORT)
    harness.run()
    for request in choices[1:]:
        assert request.output_token_ids == naive_output(request, 4)


def test_when_the_first_fails_the_others_go_on():
    harness = Harness()
    choices = add_choices(harness, [1] * 20, 3, max_tokens=4)
    harness.launch()
    assert harness.fail() == []
    harness.launch()
    assert harness.fail() == choices[:1]
    harness.run()
    for request in choices[1:]:
        assert request.output_token_ids == naive_output(request, 4)


def test_with_few_seats_the_others_wait_for_one():
    harness = Harness(max_num_seqs=2)
    choices = add_choices(harness, [1] * 10, 5, max_tokens=3)
    harness.run()
    assert all(r.output_token_ids == naive_output(r, 3) for r in choices)
    assert harness.runner.num_computed_tokens < 10 + 5 * 5


def test_with_few_blocks_choices_are_preempted_and_resumed():
    harness = Harness(num_blocks=12, block_size=4)
    choices = add_choices(harness, [1] * 20, 6, max_tokens=20)
    harness.run()
    assert all(r.output_token_ids == naive_output(r, 20) for r in choices)
    assert sum(r.num_preemptions for r in choices) > 0


def test_a_queue_that_is_full_takes_the_choices_of_who_was_let_in():
    harness = Harness(max_num_waiting=1)
    choices = add_choices(harness, [1] * 4, 5, max_tokens=2)
    harness.run()
    assert all(r.finish_reason is FinishReason.LENGTH for r in choices)


def test_an_id_in_use_queues_none_of_the_choices():
    harness = Harness()
    source = harness.add([1] * 4)
    fresh = harness.request([1] * 4)
    with pytest.raises(ValueError, match="unique"):
        harness.scheduler.add_choices(source, [fresh, source])
    assert harness.scheduler.get(fresh.request_id) is None
    assert harness.scheduler.get(source.request_id) is source
    harness.run()


def add_beam(harness: Harness, prompt: list[int], **params) -> Request:
    beam = harness.request(prompt, **params)
    beam.chooses_on_host = True
    harness.scheduler.add(beam)
    return beam


def test_a_chosen_token_is_computed_next_and_forks_share_what_was_written():
    harness = Harness(block_size=4, max_steps_in_flight=2)
    beam = add_beam(harness, [1] * 6, max_tokens=4)
    harness.launch()
    assert harness.launch() is None  # what it sampled is not its next token
    [update] = harness.retire()
    assert (update.request, update.new_token_ids) == (beam, [])
    assert harness.launch() is None  # the host has not chosen
    child = harness.request([1] * 6, max_tokens=4)
    child.token_ids = [1] * 6 + [8]
    child.chooses_on_host = True
    harness.scheduler.fork(beam, child)
    harness.scheduler.choose(beam, 7)
    plan = harness.launch()
    tokens = {s.request_id: (s.start, s.token_ids, s.output_position) for s in plan.scheduled}
    assert tokens == {beam.request_id: (6, [7], 1), child.request_id: (6, [8], 1)}
    assert len(plan.block_copies) == 1
    harness.retire()
    for request in (beam, child):
        assert harness.sampled[request.request_id] == [naive_next_token(request.token_ids)]
        assert harness.scheduler.finish(request, FinishReason.STOP)
    harness.run()


def test_who_waits_for_a_choice_gives_way_to_who_must_run_for_it():
    harness = Harness(num_blocks=6, block_size=4, enable_prefix_caching=False)
    idle = add_beam(harness, [1] * 12, max_tokens=4)
    harness.step()
    late = add_beam(harness, [2] * 18, max_tokens=4)
    assert harness.launch() is not None
    assert idle.status is RequestStatus.PREEMPTED
    assert late.status is RequestStatus.RUNNING
    harness.retire()
    harness.scheduler.choose(idle, 3)
    assert harness.scheduler.finish(late, FinishReason.STOP)
    harness.step()
    assert harness.sampled[idle.request_id] == [naive_next_token([1] * 12 + [3])]
    assert harness.scheduler.finish(idle, FinishReason.STOP)
    harness.run()


def test_so_many_requests_of_one_body():
    Choices(n=128, num_candidates=128).check_size(2)
    with pytest.raises(InvalidParameterError, match="at most 256, got 384") as refused:
        Choices(n=1, num_candidates=128).check_size(3)
    assert refused.value.param == "best_of"
    Choices().check_size(1000)
