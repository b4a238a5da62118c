"""One behaviour of the scheduler at a time, with exact counts; the simulated device checks KV."""

import pickle

import pytest

from streamserve.core import admission
from streamserve.core.plan import PENDING_TOKEN, ModelRunnerOutput, NewRequest
from streamserve.core.request import FinishReason, Request, RequestStatus
from streamserve.core.sampling_params import SamplingParams
from streamserve.core.stopping import append_tokens
from streamserve.errors import ContextLengthError, QueueFullError
from tests.unit.simulated import Harness, naive_output, shares


def test_one_request_runs_to_its_end():
    harness = Harness()
    request = harness.add([1, 2, 3], max_tokens=3)
    plans = harness.run()
    assert [shares(plan) for plan in plans] == [{"r1": 3}, {"r1": 1}, {"r1": 1}]
    assert [plan.scheduled[0].output_position for plan in plans] == [0, 1, 2]
    assert [plan.scheduled[0].start for plan in plans] == [0, 3, 4]
    assert [len(plan.new_requests) for plan in plans] == [1, 0, 0]
    assert request.output_token_ids == naive_output(request, 3)
    assert request.finish_reason is FinishReason.LENGTH
    assert [u.finish_reason for u in harness.updates] == [None, None, FinishReason.LENGTH]
    assert not harness.scheduler.has_unfinished
    assert harness.scheduler.get("r1") is None


def test_a_long_prompt_is_chunked_between_the_decodes():
    harness = Harness(max_num_batched_tokens=10)
    harness.add([1], max_tokens=8)
    harness.step()
    harness.add([2] * 25, max_tokens=2)
    plans = harness.run()
    assert [shares(plan) for plan in plans[:4]] == [
        {"r1": 1, "r2": 9},
        {"r1": 1, "r2": 9},
        {"r1": 1, "r2": 7},
        {"r1": 1, "r2": 1},
    ]
    assert [plan.scheduled[1].sample for plan in plans[:4]] == [False, False, True, True]
    assert not plans[0].scheduled[0].new_block_ids
    assert len(plans[0].scheduled[1].new_block_ids) == 3  # 9 tokens, 4 to a block


def test_decodes_never_wait_for_budget():
    harness = Harness(max_num_batched_tokens=4, max_num_seqs=16)
    for _ in range(8):
        harness.add([1, 2, 3, 4, 5], max_tokens=20)
    decoding = 0
    for plan in harness.run():
        starts = [s for s in plan.scheduled if s.output_position]
        assert len(starts) >= decoding - len(plan.released_ids)
        decoding = len(starts)
        assert harness.scheduler.num_running <= 4  # a seat is worth a token


def test_seats_are_limited():
    harness = Harness(max_num_seqs=2)
    for _ in range(3):
        harness.add([1, 2], max_tokens=2)
    plan = harness.step()
    assert list(shares(plan)) == ["r1", "r2"]
    assert (harness.scheduler.num_running, harness.scheduler.num_waiting) == (2, 1)
    harness.run()


@pytest.mark.parametrize("depth", [1, 2])
def test_a_prefix_that_arrives_sixteen_times_is_computed_once(depth):
    harness = Harness(
        num_blocks=256,
        block_size=16,
        max_model_len=1024,
        max_num_batched_tokens=128,
        max_steps_in_flight=depth,
    )
    prefix = [i % 7 for i in range(512)]
    requests = [harness.add([*prefix, 1, i % 7, i // 7], max_tokens=1) for i in range(16)]
    harness.run()
    # the first computes everything; the others share 512 tokens at least
    assert harness.runner.num_computed_tokens <= 515 + 15 * 3
    assert requests[0].num_cached_tokens == 0
    assert min(r.num_cached_tokens for r in requests[1:]) >= 512


def test_identical_prompts_compute_one_token_each():
    harness = Harness(num_blocks=256, block_size=16, max_model_len=1024)
    prompt = [i % 7 for i in range(512)]
    requests = [harness.add(prompt, max_tokens=1) for _ in range(16)]
    plans = harness.run()
    assert len(plans) == 512 // 64 + 1  # all the others at once, as soon as they can
    assert harness.runner.num_computed_tokens == 512 + 15
    assert harness.runner.num_copies == 15
    assert [r.num_cached_tokens for r in requests] == [0] + [511] * 15


def test_others_do_not_wait_behind_those_that_await_a_prefix():
    harness = Harness(max_num_batched_tokens=8)
    harness.add([1] * 20, max_tokens=1)
    harness.step()
    harness.add([1] * 20, max_tokens=1)
    harness.add([2] * 3, max_tokens=1)
    assert shares(harness.step()) == {"r1": 8}
    plan = harness.step()
    assert shares(plan) == {"r1": 4, "r3": 3}  # r2 waits for r1's last block
    harness.run()


def test_when_the_one_that_computes_ends_early_the_next_takes_over():
    harness = Harness(max_num_batched_tokens=8)
    requests = [harness.add([1] * 20, max_tokens=2) for _ in range(3)]
    harness.step()
    assert harness.scheduler.num_running == 1
    harness.scheduler.finish(requests[0], FinishReason.ABORT)
    plan = harness.step()
    assert shares(plan) == {"r2": 8}
    assert plan.scheduled[0].start == 8  # what had retired is reused
    harness.run()
    assert harness.runner.num_computed_tokens <= 8 + 8 + 12 + 1 + 2


def test_a_second_turn_reuses_the_first_to_the_token():
    harness = Harness(block_size=16)
    first = harness.add(list(range(1, 11)) * 2, max_tokens=9)
    harness.run()
    # the last sampled token was never an input: 20 + 8 tokens have KV, 12 of them in the tail
    second = harness.add([*first.token_ids, 3, 1, 4], max_tokens=2)
    plan = harness.step()
    assert second.num_cached_tokens == 28
    assert shares(plan) == {second.request_id: 1 + 3}
    assert len(plan.block_copies) == 1
    harness.run()
    third = harness.add([*second.token_ids, 5], max_tokens=1)
    harness.run()
    assert third.num_cached_tokens == 20 + 9 + 3 + 1


def test_preemption_takes_the_newest_and_its_work_stays_cached():
    harness = Harness(num_blocks=8, block_size=4)
    old = harness.add([1] * 12, max_tokens=12)
    new = harness.add([2] * 8, max_tokens=8)
    harness.run()
    assert (old.num_preemptions, new.num_preemptions) == (0, 1)
    for request in (old, new):
        assert request.output_token_ids == naive_output(request, request.num_output_tokens)
    assert new.num_cached_tokens == 0  # of the first admission: a resume does not count


def test_a_preempted_request_resumes_from_what_is_still_cached():
    harness = Harness(num_blocks=8, block_size=4)
    old = harness.add([1] * 4, max_tokens=20)
    new = harness.add([2] * 13, max_tokens=12)
    plans = harness.run()
    entered = [p for p in plans if new.request_id in [n.request_id for n in p.new_requests]]
    assert len(entered) == 2
    assert (old.num_preemptions, new.num_preemptions) == (0, 1)
    assert sum(plan.released_ids.count(new.request_id) for plan in plans) == 1
    resumed = next(s for s in entered[1].scheduled if s.request_id == new.request_id)
    # 20 tokens in 5 blocks were computed; the other took the 3 deepest meanwhile
    assert resumed.start == 8
    assert resumed.output_position == 8
    assert entered[1].new_requests[0].token_ids == new.token_ids[:21]


def test_a_released_id_is_reported_once_and_only_if_the_runner_knew_it():
    harness = Harness(max_num_seqs=1)
    first = harness.add([1], max_tokens=1)
    second = harness.add([2], max_tokens=1)
    harness.add([3], max_tokens=1)
    harness.step()
    harness.scheduler.finish(second, FinishReason.ABORT)
    plans = harness.run()
    assert [plan.released_ids for plan in plans] == [[first.request_id]]
    assert harness.scheduler.schedule() is None  # r3's release waits for work
    harness.add([4], max_tokens=1)
    assert harness.step().released_ids == ["r3"]


def test_priority_decides_who_is_next():
    harness = Harness(max_num_seqs=1, policy="priority")
    harness.add([1], max_tokens=2, priority=0)
    harness.step()
    harness.add([2], max_tokens=1, priority=2)
    harness.add([3], max_tokens=1, priority=1)
    harness.add([4], max_tokens=1, priority=1)
    order = [u.request.request_id for u in _updates_of(harness)]
    assert order == ["r1", "r1", "r3", "r4", "r2"]


def test_the_tail_yields_its_seat_to_a_more_urgent_class():
    harness = Harness(max_num_seqs=2, policy="priority")
    a = harness.add([1] * 6, max_tokens=6, priority=1)
    b = harness.add([2] * 6, max_tokens=6, priority=1)
    harness.step()
    harness.step()
    urgent = harness.add([3] * 4, max_tokens=2, priority=0)
    plan = harness.step()
    assert plan.released_ids == [b.request_id]
    assert set(shares(plan)) == {a.request_id, urgent.request_id}
    assert b.status is RequestStatus.PREEMPTED
    harness.run()
    assert b.output_token_ids == naive_output(b, 6)
    # it computed 7 tokens before it yielded, and never again
    assert harness.runner.num_computed_tokens == (6 + 5) + (6 + 5) + (4 + 1)


def test_the_token_that_was_set_aside_for_who_yields_is_the_urgent_ones():
    harness = Harness(max_num_seqs=2, max_num_batched_tokens=8, policy="priority")
    a = harness.add([1] * 3, max_tokens=6, priority=1)
    harness.add([2] * 3, max_tokens=6, priority=1)
    harness.step()
    harness.step()
    urgent = harness.add([3] * 12, max_tokens=1, priority=0)
    assert shares(harness.step()) == {a.request_id: 1, urgent.request_id: 7}
    harness.run()


def test_equals_do_not_yield():
    harness = Harness(max_num_seqs=1, policy="priority")
    harness.add([1], max_tokens=5, priority=1)
    harness.step()
    harness.add([2], max_tokens=1, priority=1)
    harness.run()
    assert all(u.request.num_preemptions == 0 for u in harness.updates)


def test_an_urgent_prompt_gets_the_tokens_before_a_running_one():
    harness = Harness(max_num_batched_tokens=8, policy="priority")
    harness.add([1] * 24, max_tokens=1, priority=1)
    harness.step()
    harness.add([2] * 5, max_tokens=1, priority=0)
    assert shares(harness.step()) == {"r2": 5, "r1": 3}
    harness.run()


def test_an_urgent_request_does_not_wait_for_what_a_lesser_one_computes():
    harness = Harness(max_num_batched_tokens=8, policy="priority")
    harness.add([1] * 24, max_tokens=1, priority=1)
    harness.step()
    harness.add([1] * 24, max_tokens=1, priority=0)
    plan = harness.step()
    assert shares(plan) == {"r2": 8}
    assert plan.scheduled[0].start == 8
    harness.run()


def test_the_tail_yields_blocks_to_a_more_urgent_class():
    harness = Harness(num_blocks=8, policy="priority")
    low = harness.add([1] * 20, max_tokens=4, priority=5)
    harness.step()
    urgent = harness.add([2] * 16, max_tokens=4, priority=0)
    plan = harness.step()
    assert set(shares(plan)) == {urgent.request_id}
    assert low.status is RequestStatus.PREEMPTED
    harness.run()


def test_nobody_yields_when_it_would_not_help():
    harness = Harness(num_blocks=8, policy="priority")
    harness.add([1] * 20, max_tokens=4, priority=0)
    low = harness.add([2] * 4, max_tokens=4, priority=5)
    harness.step()
    harness.add([3] * 20, max_tokens=2, priority=1)
    harness.step()
    assert low.num_preemptions == 0
    harness.run()


def test_a_full_queue_refuses_with_a_time_to_retry():
    harness = Harness(max_num_waiting=2)
    harness.add([1])
    harness.add([2])
    with pytest.raises(QueueFullError, match="at most 2 requests may wait, 2 do already") as info:
        harness.add([3])
    assert info.value.retry_after_s > 0
    assert info.value.status == 429
    harness.run()


def test_an_id_is_unique_until_its_last_step_has_retired():
    harness = Harness()
    request = harness.add([1, 2])
    with pytest.raises(ValueError, match="request_id must be unique, got 'r1' again"):
        harness.scheduler.add(request)
    harness.launch()
    harness.scheduler.finish(request, FinishReason.ABORT)
    again = harness.request([5])
    again.request_id = "r1"
    with pytest.raises(ValueError, match="r1"):
        harness.scheduler.add(again)
    harness.retire()
    harness.scheduler.add(again)
    harness.run()


@pytest.mark.parametrize(
    ("num_prompt_tokens", "max_tokens", "words"),
    [
        (0, 1, ["at least 1 token", "got 0"]),
        (20, 1, ["max_model_len (20)", "got 21", "a prompt of 20"]),
        (10, 11, ["max_model_len (20)", "got 21", "max_tokens 11"]),
        (20, None, ["max_model_len (20)", "at least 1 more"]),
        (8, 10, ["at most 17 tokens", "KV cache of 16 tokens", "got 18"]),
        (17, None, ["KV cache of 16 tokens", "got 18"]),
        (17, 0, ["1 to 16 tokens", "KV cache holds", "got 17"]),
    ],
)
def test_what_can_never_fit_is_refused(num_prompt_tokens, max_tokens, words):
    harness = Harness(num_blocks=4, block_size=4, max_model_len=20)
    params = SamplingParams(max_tokens=max_tokens)
    with pytest.raises(ContextLengthError) as info:
        harness.scheduler.check_fits(num_prompt_tokens, params)
    assert all(word in info.value.message for word in words), info.value.message
    assert info.value.param == ("max_tokens" if num_prompt_tokens == 8 else "messages")
    with pytest.raises(ContextLengthError):
        harness.add([1] * num_prompt_tokens, max_tokens=max_tokens)
    assert not harness.scheduler.has_unfinished


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("num_prompt_tokens", [1, 5, 12, 16])
def test_a_lone_request_runs_to_the_last_slot(num_prompt_tokens, depth):
    harness = Harness(num_blocks=4, block_size=4, max_model_len=100, max_steps_in_flight=depth)
    assert harness.scheduler.max_model_len == 17
    for _ in range(3):  # the second time with everything cached, and a copy that finds no room
        request = harness.add([1] * num_prompt_tokens, max_tokens=None)
        harness.run()
        assert request.num_tokens == 17
        assert request.finish_reason is FinishReason.LENGTH


STOP_TABLE = [
    # params, sampled, kept, reason, stop_reason
    ({"max_tokens": 3}, [5, 6, 7], [5, 6, 7], "length", None),
    ({"max_tokens": 9, "ignore_eos": False}, [5, 0], [5, 0], "stop", None),
    ({"max_tokens": 3, "ignore_eos": True}, [0, 0, 0], [0, 0, 0], "length", None),
    ({"max_tokens": 9, "stop_token_ids": (6,)}, [5, 6], [5, 6], "stop", 6),
    ({"max_tokens": 3, "min_tokens": 1, "stop_token_ids": (6,)}, [6, 6], [6, 6], "stop", 6),
    ({"max_tokens": 3, "min_tokens": 3, "stop_token_ids": (6,)}, [6] * 3, [6] * 3, "length", None),
    ({"max_tokens": 9, "min_tokens": 2, "ignore_eos": False}, [0, 0, 0], [0] * 3, "stop", None),
    ({"max_tokens": 2, "stop_token_ids": (6,)}, [5, 6], [5, 6], "stop", 6),
    ({"max_tokens": None}, [5] * 18, [5] * 18, "length", None),
]


@pytest.mark.parametrize(("params", "sampled", "kept", "reason", "stop_reason"), STOP_TABLE)
def test_where_an_answer_ends(params, sampled, kept, reason, stop_reason):
    harness = Harness(max_model_len=20)
    request = harness.add([1, 2], **params)
    for i, token in enumerate(sampled):
        plan = harness.scheduler.schedule()
        (update,) = harness.scheduler.update(ModelRunnerOutput(plan.step_id, [[token]]))
        assert update.new_token_ids == [token]
        assert (update.finish_reason is not None) == (i == len(sampled) - 1)
    assert request.output_token_ids == kept
    assert request.finish_reason == reason
    assert request.stop_reason == stop_reason
    harness.scheduler.check_integrity()


def test_an_end_of_sequence_that_is_ignored_is_a_stop_id_like_others():
    params = SamplingParams(max_tokens=9, ignore_eos=True, stop_token_ids=(0,))
    eos = frozenset({0})
    request = Request("x", [1, 2], params, arrival_time=0.0, seed=0, eos_token_ids=eos)
    request.max_num_tokens = 11
    assert append_tokens(request, [0]) == ([0], FinishReason.STOP, 0)


def test_the_token_that_comes_of_an_answer_of_none_is_not_the_requests():
    params = SamplingParams(max_tokens=0)
    request = Request("x", [1, 2], params, arrival_time=0.0, seed=0)
    request.max_num_tokens = 3
    assert append_tokens(request, [7]) == ([], FinishReason.LENGTH, None)
    assert request.token_ids == [1, 2]


def test_several_tokens_of_one_step_end_at_the_first_stop():
    harness = Harness()
    request = harness.add([1, 2], max_tokens=9, stop_token_ids=(6,), logprobs=0)
    plan = harness.scheduler.schedule()
    output = ModelRunnerOutput(plan.step_id, [[5, 6, 7]], [["five", "six", "seven"]])
    (update,) = harness.scheduler.update(output)
    assert update.new_token_ids == request.output_token_ids == [5, 6]
    assert update.logprobs == ["five", "six"]


def test_a_block_is_found_as_soon_as_an_answer_fills_it():
    harness = Harness(block_size=4)
    first = harness.add([1] * 6, max_tokens=20)
    for _ in range(8):
        harness.step()
    second = harness.add([*first.token_ids[:12], 5], max_tokens=1)
    harness.step()
    assert first.status is RequestStatus.RUNNING
    assert second.num_cached_tokens == 12
    harness.run()


def test_a_runner_is_told_all_that_it_must_know_of_a_request():
    harness = Harness()
    params = SamplingParams(max_tokens=9)
    request = Request(
        "x",
        [1, 2, 3],
        params,
        arrival_time=0.0,
        seed=5,
        eos_token_ids=frozenset({7}),
        choice_index=4,
        adapter=2,
    )
    harness.scheduler.add(request)
    plan = harness.scheduler.schedule()
    assert plan.new_requests == [NewRequest("x", [1, 2, 3], 3, params, 5, 4, frozenset({7}), 2)]
    request.token_ids.append(9)
    assert plan.new_requests[0].token_ids == [1, 2, 3], "a list of its own"


def test_an_adapter_is_in_use_until_the_last_step_with_it_has_retired():
    harness = Harness()
    request = harness.request([1] * 4, max_tokens=9)
    request.adapter = 2
    harness.scheduler.add(request)
    harness.launch()
    harness.scheduler.finish(request, FinishReason.ABORT)
    assert harness.scheduler.uses_adapter(2)
    harness.retire()
    assert not harness.scheduler.uses_adapter(2)


def test_finish_works_exactly_once():
    harness = Harness()
    waiting, running = harness.add([1]), harness.add([2])
    for request in (waiting, running):
        assert harness.scheduler.finish(request, FinishReason.ABORT)
        assert not harness.scheduler.finish(request, FinishReason.STOP)
        assert request.finish_reason is FinishReason.ABORT
    assert harness.scheduler.schedule() is None


def test_a_stop_found_late_discards_what_came_after():
    harness = Harness(max_steps_in_flight=2)
    request = harness.add([1, 2, 3], max_tokens=30)
    for _ in range(14):
        harness.step()
    num_before = request.num_output_tokens
    assert num_before >= 12
    assert harness.scheduler.finish(
        request, FinishReason.STOP, num_output_tokens=4, stop_reason="end"
    )
    assert request.num_output_tokens == 4
    assert len(request.block_hashes) <= request.num_tokens // 4
    harness.run()
    again = harness.add([1, 2, 3, *naive_output(request, 12)], max_tokens=1)
    harness.run()
    assert again.num_cached_tokens == 7


def test_two_steps_in_flight_overlap_decodes_with_a_pending_token():
    harness = Harness(max_steps_in_flight=2)
    request = harness.add([1, 2, 3], max_tokens=3)
    first, second = harness.launch(), harness.launch()
    assert second.scheduled[0].token_ids == [PENDING_TOKEN]
    assert (second.scheduled[0].start, second.scheduled[0].output_position) == (3, 1)
    assert (request.num_pending_tokens, request.num_computed_tokens) == (2, 4)
    assert harness.scheduler.schedule() is None
    harness.retire()
    assert (request.num_pending_tokens, request.num_tokens) == (1, 4)
    third = harness.launch()
    assert third.scheduled[0].token_ids == [PENDING_TOKEN]
    harness.retire()
    assert harness.launch() is None  # its last token is in flight: nothing to add
    (update,) = harness.retire()
    assert update.finish_reason is FinishReason.LENGTH
    assert [p.step_id for p in (first, second, third)] == [0, 1, 2]
    harness.run()


def test_blocks_in_flight_return_only_when_their_step_retires():
    harness = Harness(num_blocks=4, max_steps_in_flight=2)
    request = harness.add([1] * 6, max_tokens=8)
    harness.launch()
    harness.launch()
    harness.scheduler.finish(request, FinishReason.ABORT)
    assert harness.kv.num_free_blocks == 2
    harness.add([2] * 10, max_tokens=2)
    harness.retire()
    assert harness.kv.num_free_blocks == 2  # the second step may still write
    assert harness.launch() is None  # no room for three blocks yet
    assert harness.retire() == []  # the aborted request's result is ignored
    assert harness.kv.num_free_blocks == 4
    assert request.num_output_tokens == 0
    assert harness.launch() is not None
    harness.run()


def test_who_waits_for_blocks_in_flight_is_not_preempted_for_them():
    harness = Harness(num_blocks=3, max_steps_in_flight=2)
    leaving = harness.add([1] * 4, max_tokens=5)
    request = harness.add([2] * 3, max_tokens=6)
    harness.launch()
    harness.launch()
    assert harness.kv.num_free_blocks == 0
    harness.retire()
    harness.scheduler.finish(leaving, FinishReason.ABORT)
    assert harness.launch() is None  # two blocks return with the step in flight
    harness.retire()
    assert shares(harness.launch()) == {request.request_id: 1}
    harness.run()
    assert request.num_preemptions == 0


def test_an_admission_leaves_a_block_for_each_that_runs():
    harness = Harness(num_blocks=3)
    first = harness.add([1] * 4, max_tokens=5)
    harness.add([2] * 8, max_tokens=1)
    plans = harness.run()
    assert [list(shares(plan)) for plan in plans] == [["r1"]] * 5 + [["r2"]]
    assert first.num_preemptions == 0


def test_nobody_behind_a_request_that_waits_for_blocks_takes_one():
    harness = Harness(max_num_batched_tokens=16, max_steps_in_flight=2)
    leaving = harness.add([1] * 2, max_tokens=9)
    long = harness.add([2] * 40, max_tokens=9)
    behind = harness.request([3] * 4, max_tokens=9)
    harness.launch()
    harness.scheduler.finish(leaving, FinishReason.ABORT)
    harness.scheduler.fork(long, behind)  # a seat without the look-ahead of an admission
    pool = harness.kv._pool
    held = [pool.allocate() for _ in range(pool.num_free_blocks - 2)]
    assert harness.launch() is None  # the long one needs 4 blocks, the one behind it 1
    assert pool.num_free_blocks == 2
    for block in held:
        pool.release(block)
    harness.run()


def test_one_that_must_yield_in_flight_keeps_its_seat_until_its_token_is_known():
    harness = Harness(max_num_seqs=1, policy="priority", max_steps_in_flight=2)
    low = harness.add([1, 1], max_tokens=9, priority=1)
    harness.launch()
    urgent = harness.add([2, 2], max_tokens=1, priority=0)
    assert harness.launch() is None
    assert low.status is RequestStatus.RUNNING
    harness.retire()
    assert low.status is RequestStatus.PREEMPTED
    assert low.num_output_tokens == 1
    assert shares(harness.launch()) == {urgent.request_id: 2}
    harness.run()
    assert low.output_token_ids == naive_output(low, 9)


def test_forked_children_share_and_write_their_own():
    harness = Harness(block_size=16)
    parent = harness.add([1] * 20, max_tokens=6)
    harness.step()
    children = [harness.request([1] * 20, max_tokens=6) for _ in range(3)]
    for child in children:
        harness.scheduler.fork(parent, child)
    assert [child.num_cached_tokens for child in children] == [19] * 3
    plan = harness.step()
    assert len(plan.block_copies) == 3
    assert shares(plan) == {r.request_id: 1 for r in (parent, *children)}
    harness.run()
    assert harness.runner.num_computed_tokens == 20 + 5 + 3 * 6
    assert all(child.output_token_ids == parent.output_token_ids for child in children)


def test_the_turn_after_a_fork_continues_in_the_childs_tail():
    harness = Harness(block_size=16)
    parent = harness.add([1] * 20, max_tokens=4)
    harness.step()
    child = harness.request([*[1] * 19, 2], max_tokens=4)
    harness.scheduler.fork(parent, child)
    harness.run()
    again = harness.add([*child.token_ids, 3], max_tokens=1)
    harness.run()
    assert again.num_cached_tokens == 23


def test_a_fork_without_a_seat_waits():
    harness = Harness(max_num_seqs=1)
    parent = harness.add([1] * 6, max_tokens=3)
    harness.step()
    child = harness.request([1] * 6, max_tokens=3)
    harness.scheduler.fork(parent, child)
    assert child.status is RequestStatus.WAITING
    harness.run()
    assert child.num_cached_tokens == 5


def test_a_fork_must_leave_room_for_a_token():
    harness = Harness()
    parent = harness.add([1] * 6, max_tokens=3)
    child = harness.request([1] * 6, max_tokens=1)
    child.token_ids.append(2)
    with pytest.raises(ValueError, match="leave room for one more of 7, got 7"):
        harness.scheduler.fork(parent, child)


def test_plans_are_plain_data():
    harness = Harness()
    harness.add([1] * 10, max_tokens=2)
    harness.run()
    harness.add([1] * 10, max_tokens=2)
    plan = harness.launch()
    assert plan.block_copies
    assert plan.new_requests
    assert plan.released_ids
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_the_same_requests_give_the_same_plans():
    def plans():
        harness = Harness(num_blocks=12, policy="priority", max_steps_in_flight=2)
        for i in range(12):
            harness.add([i % 3] * (5 + i % 4), max_tokens=9, priority=i % 2)
        return harness.run()

    assert plans() == plans()


def test_a_long_prompt_that_finds_no_room_is_looked_up_once(monkeypatch):
    harness = Harness(num_blocks=16)
    harness.add([1] * 40, max_tokens=5)
    harness.step()
    harness.add([2] * 40, max_tokens=5)
    look_ups = []
    find_prefix = harness.kv.find_prefix
    monkeypatch.setattr(
        harness.kv, "find_prefix", lambda r, *_: look_ups.append(r.request_id) or find_prefix(r)
    )
    for _ in range(3):
        harness.step()
    assert look_ups == ["r2"]
    harness.run()


def test_a_long_look_up_takes_several_steps_while_others_decode(monkeypatch):
    monkeypatch.setattr(admission, "MAX_NUM_HASHED", 3)
    harness = Harness()
    harness.add(list(range(33)), max_tokens=1)
    harness.run()
    harness.add([99], max_tokens=8)
    harness.step()
    late = harness.add(list(range(33)), max_tokens=1)
    plans = [shares(harness.step()) for _ in range(4)]
    assert plans == [{"r2": 1}, {"r2": 1}, {"r2": 1, "r3": 1}, {"r2": 1}]  # 8 blocks
    assert late.num_cached_tokens == 32
    harness.run()
    alone = harness.add(list(range(33)), max_tokens=1)
    assert shares(harness.step()) == {"r4": 1}
    assert alone.num_cached_tokens == 32


def _updates_of(harness):
    harness.run()
    return harness.updates
