"""KV in host memory: what the device evicted comes back by copies, and never anything else."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import initialize

from streamserve.config import CacheConfig
from streamserve.core.kv_cache_manager import KVCacheManager
from streamserve.core.plan import BlockTransfer, SchedulerOutput
from streamserve.core.request import FinishReason, Request
from streamserve.core.sampling_params import SamplingParams
from streamserve.errors import ConfigError
from tests.unit.simulated import Harness, naive_output
from tests.unit.test_scheduler_machine import SchedulerMachine

BLOCK = 4
A, B, C = ([i] * 17 for i in (1, 2, 3))  # four full blocks and a token


def offloading(num_blocks=5, num_host_blocks=40, max_transfers_per_step=8, **config):
    return Harness(
        num_blocks=num_blocks,
        num_host_blocks=num_host_blocks,
        max_transfers_per_step=max_transfers_per_step,
        **config,
    )


def places(harness, prompt):
    """How many leading blocks of a prompt are on the device, and how many on the host."""
    nodes = harness.kv._cache.match(harness.request([*prompt, 9])).nodes
    on_device = [node.block is not None for node in nodes]
    on_host = [node.host_block_id is not None for node in nodes]
    return [[*flags, False].index(False) for flags in (on_device, on_host)]


def run(harness, prompt, *, max_tokens=3, **kwargs):
    """One request from its arrival to its end; returns it and its plans."""
    request = harness.add(prompt, max_tokens=max_tokens, **kwargs)
    return request, harness.run()


def test_without_host_blocks_plans_have_no_transfers():
    harness = Harness(num_blocks=6)
    for prompt in (A, B, A):
        request, plans = run(harness, prompt)
        assert not any(plan.stores or plan.loads for plan in plans)
    assert request.num_cached_tokens < 8
    assert harness.kv.host_usage == 0.0
    assert harness.kv.stats.num_host_hit_tokens == 0


def test_a_full_block_is_stored_by_the_step_after_the_one_that_wrote_it():
    harness = offloading()
    request, plans = run(harness, A[:14])
    assert [len(plan.stores) for plan in plans] == [0, 3, 0]
    assert plans[1].stores == [BlockTransfer(i, i) for i in range(3)]
    assert harness.kv.stats.num_stored_tokens == 12
    assert harness.kv.host_usage == 3 / 40
    assert request.output_token_ids == naive_output(request, 3)


def test_an_evicted_prefix_is_copied_back_and_not_computed():
    harness = offloading()
    first, _ = run(harness, A)
    run(harness, B)
    before = harness.runner.num_computed_tokens
    again, plans = run(harness, A)
    assert again.output_token_ids == first.output_token_ids
    assert again.num_cached_tokens == 16
    assert harness.runner.num_computed_tokens - before == 1 + 2  # the last of the prompt, and two
    assert [len(plan.loads) for plan in plans] == [4, 0, 0, 0]
    assert plans[0].scheduled == []
    stats = harness.kv.stats
    assert (stats.num_hit_tokens, stats.num_host_hit_tokens) == (16, 16)


def test_what_the_device_has_is_not_loaded():
    harness = offloading(num_blocks=8)
    run(harness, A)
    run(harness, [2] * 18)  # takes the three free blocks, A's tail and its deepest full block
    _, plans = run(harness, [*A, 5])
    assert [len(plan.loads) for plan in plans[:2]] == [1, 0]
    assert plans[1].scheduled[0].start == 16


def test_a_preempted_request_comes_back_by_copies():
    outcomes = []
    for num_host_blocks in (0, 40):
        harness = offloading(9, num_host_blocks)
        requests = [harness.add(prompt[:12], max_tokens=16) for prompt in (A, B)]
        harness.run()
        assert [r.num_preemptions for r in requests] == [0, 1]
        for request in requests:
            assert request.output_token_ids == naive_output(request, 16)
        outcomes.append(harness.runner.num_computed_tokens)
    assert harness.runner.num_loads > 0
    needed = 2 * (12 + 15)
    assert outcomes == [needed + 2 * BLOCK, needed]


@pytest.mark.parametrize("depth", [1, 2])
def test_copies_are_bounded_while_others_decode(depth):
    harness = offloading(
        20, max_transfers_per_step=2, max_steps_in_flight=depth, max_num_batched_tokens=100
    )
    run(harness, [1] * 49, max_tokens=10)
    run(harness, [2] * 70, max_tokens=8)
    harness.add([3], max_tokens=30)
    harness.step()
    again = harness.add([1] * 49, max_tokens=2)
    plans = harness.run()
    assert again.num_cached_tokens >= 40
    loads = [len(plan.loads) for plan in plans]
    assert max(loads) == 2
    assert sum(loads) >= 10
    assert max(len(plan.stores) for plan in plans) <= 2
    # one step of the other's after another, whatever is loaded
    assert all(plan.scheduled[0].request_id == "r3" for plan in plans if plan.loads)


def test_everything_comes_back_at_once_when_nothing_else_runs():
    harness = offloading(20, max_transfers_per_step=2)
    run(harness, [1] * 49, max_tokens=20)
    run(harness, [2] * 70, max_tokens=8)
    _, plans = run(harness, [1] * 49)
    assert [len(plan.loads) for plan in plans[:2]] == [12, 0]


def test_those_who_wait_for_the_same_prefix_load_it_once():
    harness = offloading(12)
    run(harness, A)
    run(harness, [2] * 45, max_tokens=2)
    requests = [harness.add([*A[:16], 5 + i], max_tokens=2) for i in range(3)]
    plans = harness.run()
    assert [r.num_cached_tokens for r in requests] == [16, 16, 16]
    assert harness.runner.num_loads == 4
    assert [s.request_id for s in plans[1].scheduled] == [r.request_id for r in requests]


def test_who_arrives_behind_does_not_take_the_room_of_who_loads():
    harness = offloading(10, max_steps_in_flight=2)
    run(harness, [1] * 25)
    run(harness, [2] * 37)
    harness.add([3], max_tokens=9)
    harness.step()
    loading = harness.add([1] * 25, max_tokens=2)
    harness.step()
    assert harness.runner.num_loads == 6
    late = harness.add([4] * 8, max_tokens=2)  # there would be room, and none for both
    harness.step()
    assert not late.block_table
    harness.step()
    assert loading.block_table
    assert loading.num_cached_tokens == 24
    harness.run()
    assert late.is_finished


def test_two_who_do_not_fit_together_do_not_both_load():
    harness = offloading(7)
    run(harness, A)
    run(harness, [4] * 9)
    run(harness, [2] * 25)
    requests = [harness.add(A, max_tokens=2), harness.add([4] * 9, max_tokens=2)]
    loads = [len(plan.loads) for plan in harness.run()]
    assert loads == [4, 0, 0, 2, 0, 0]
    assert [request.num_cached_tokens for request in requests] == [16, 8]


def test_who_is_loaded_in_parts_keeps_the_room_for_the_rest():
    """From others, and not from itself."""
    harness = offloading(11, max_steps_in_flight=2, max_transfers_per_step=2)
    run(harness, [1] * 25)
    run(harness, [4] * 9)
    run(harness, [2] * 41)
    harness.add([3], max_tokens=9)
    harness.step()
    requests = [harness.add([1] * 25, max_tokens=2), harness.add([4] * 9, max_tokens=2)]
    loads = [len(plan.loads) for plan in harness.run()]
    assert loads[:3] == [2, 2, 2]
    assert [request.num_cached_tokens for request in requests] == [24, 8]
    assert sum(loads) == 6 + 2


def test_each_running_request_keeps_a_block_in_reserve():
    harness = offloading(6)
    run(harness, A)
    run(harness, [2] * 21)
    harness.add([3], max_tokens=4)
    harness.step()
    waiting = harness.add(A, max_tokens=2)
    assert not harness.step().loads
    harness.run()
    assert waiting.num_cached_tokens == 16


def test_blocks_that_are_there_already_are_no_room():
    harness = offloading(6)
    run(harness, A)
    harness.add([3] * 10, max_tokens=2)  # takes the free block, A's tail and its deepest
    harness.step()
    assert places(harness, A[:16]) == [3, 4]
    waiting = harness.add([*A, 7], max_tokens=2)
    assert not harness.step().loads
    harness.run()
    assert waiting.num_cached_tokens == 16


def test_nobody_is_preempted_for_blocks_that_a_store_gives_back():
    harness = offloading(6, max_steps_in_flight=2)
    first = harness.add([3] * 2, max_tokens=6)
    harness.add([1] * 16, max_tokens=1)
    last = harness.add([5] * 3, max_tokens=6)
    plans = harness.run()
    assert [len(plan.stores) for plan in plans[:3]] == [0, 0, 4]
    assert (first.num_preemptions, last.num_preemptions) == (0, 0)


def test_without_room_nothing_is_loaded():
    harness = offloading(8)
    run(harness, A)
    run(harness, [2] * 29, max_tokens=2)
    harness.add([3] * 17, max_tokens=10)
    harness.step()
    waiting = harness.add(A, max_tokens=2)
    for _ in range(4):
        assert not harness.step().loads
    assert not waiting.block_table
    harness.run()
    assert waiting.num_cached_tokens == 16
    assert harness.runner.num_loads == 4


def test_the_prefix_that_is_found_is_held_while_the_rest_is_loaded():
    """Else a running request could take the blocks that were there already."""
    harness = offloading(8, max_steps_in_flight=2, max_transfers_per_step=1)
    run(harness, A)
    run(harness, [2] * 17)
    harness.add([3] * 3, max_tokens=8)
    harness.step()
    harness.add(A, max_tokens=2)
    harness.run()
    assert harness.runner.num_loads <= 4  # none twice


def test_who_leaves_while_its_prefix_is_loaded_leaves_it_to_the_next():
    harness = offloading()
    run(harness, A)
    run(harness, B)
    gone = harness.add(A, max_tokens=2)
    harness.launch()
    harness.scheduler.finish(gone, FinishReason.ABORT)
    harness.retire()
    harness.check_integrity()
    again, plans = run(harness, A)
    assert again.num_cached_tokens == 16
    assert not any(plan.loads for plan in plans)


def test_a_load_that_fails_is_computed_instead():
    harness = offloading()
    run(harness, A)
    run(harness, B)
    request = harness.add(A, max_tokens=2)
    harness.launch()
    assert harness.fail() == []
    harness.check_integrity()
    harness.run()
    assert harness.runner.num_loads == 4
    assert request.num_cached_tokens == 0
    assert request.output_token_ids == naive_output(request, 2)


def test_a_store_that_fails_is_not_found():
    harness = offloading()
    request = harness.add(A, max_tokens=3)
    harness.step()
    assert len(harness.launch().stores) == 4
    harness.fail()
    harness.check_integrity()
    assert harness.kv.host_usage == 0.0
    harness.scheduler.finish(request, FinishReason.ABORT)
    run(harness, B)
    again, _ = run(harness, A)
    assert again.num_cached_tokens == 0
    assert harness.runner.num_loads == 0


def test_tokens_behind_a_late_stop_leave_the_host_too():
    harness = offloading(12)
    request = harness.add([1] * 4, max_tokens=20)
    while request.num_output_tokens < 14:
        harness.step()
    assert harness.kv.host_usage == 4 / 40
    harness.scheduler.finish(request, FinishReason.STOP, num_output_tokens=5)
    harness.check_integrity()
    assert harness.kv.host_usage == 2 / 40


def test_what_was_loaded_leaves_the_device_deepest_first():
    harness = offloading()
    run(harness, A)
    run(harness, B)
    gone = harness.add(A, max_tokens=2)
    harness.launch()
    harness.scheduler.finish(gone, FinishReason.ABORT)
    harness.retire()
    run(harness, [3] * 5, max_tokens=2)  # takes the free block and one of A
    assert places(harness, A[:16]) == [3, 4]


def test_what_is_being_loaded_is_not_forgotten_before_its_turn():
    harness = offloading(9, num_host_blocks=10, max_transfers_per_step=1)
    run(harness, A, max_tokens=6)
    run(harness, B, max_tokens=6)
    run(harness, [4] * 33, max_tokens=1)
    assert places(harness, A[:16]) == [0, 4]
    harness.add([3] * 3, max_tokens=9)  # in each of its steps one block of the last is stored
    harness.step()
    waiting = harness.add(A, max_tokens=2)
    harness.run()
    assert waiting.num_cached_tokens == 16


def test_what_is_used_on_the_device_is_not_forgotten_by_the_host():
    harness = offloading(20, num_host_blocks=8)
    run(harness, A)
    run(harness, B)
    run(harness, A)
    run(harness, C[:9])
    assert [places(harness, prompt[:16]) for prompt in (A, B)] == [[4, 4], [4, 2]]


@pytest.mark.parametrize(("max_transfers", "max_tokens"), [(2, 4), (4, 1)])
def test_the_host_forgets_children_before_their_parents(max_transfers, max_tokens):
    """Stored a part at a time while it runs, or all at once when it has ended."""
    harness = offloading(20, num_host_blocks=4, max_transfers_per_step=max_transfers)
    run(harness, A[:16], max_tokens=max_tokens)
    run(harness, [3] * 5, max_tokens=2)
    assert places(harness, A[:16]) == [4, 3]


def test_the_host_forgets_what_was_used_least_recently_deepest_first():
    harness = offloading(num_host_blocks=8)
    run(harness, A)
    run(harness, B)
    run(harness, A)
    run(harness, C[:9])  # two blocks, in the place of B's deepest
    assert harness.kv.host_usage == 1.0
    cached = [harness.kv.estimate_cached(harness.request([*p[:16], 9]), 99) for p in (A, B)]
    assert cached == [16, 8]


def test_what_was_lost_on_the_host_is_stored_again_when_it_is_used():
    harness = offloading(12, num_host_blocks=2)
    run(harness, A[:9])
    run(harness, B[:9])
    before = harness.runner.num_stores
    run(harness, A[:9])
    assert harness.runner.num_stores == before + 2


def test_tenants_do_not_share_host_blocks():
    harness = offloading()
    run(harness, A, salt="one")
    run(harness, B)
    assert run(harness, A, salt="two")[0].num_cached_tokens == 0
    assert run(harness, A, salt="one")[0].num_cached_tokens == 16


def test_what_is_on_the_host_counts_as_cached_for_the_order_of_prompts():
    harness = offloading(policy="sjf")
    run(harness, A)
    run(harness, B)
    known = harness.request([*A[:16], 7])
    harness.scheduler.add(known)
    assert known.num_uncached_tokens == 1


def test_a_look_up_in_parts_goes_on_behind_what_is_on_the_host():
    harness = offloading(20)
    run(harness, [1] * 49)
    run(harness, [2] * 76)
    assert places(harness, [1] * 48) == [0, 12]
    request = harness.request([1] * 49)
    parts = [harness.kv._cache.match(request, 5) for _ in range(3)]
    assert parts[:2] == [None, None]
    assert parts[2].num_tokens == 48


def test_host_blocks_need_the_prefix_cache():
    with pytest.raises(ConfigError, match="num_host_blocks must be 0 without prefix caching"):
        CacheConfig(num_blocks=4, num_host_blocks=1, enable_prefix_caching=False)


class Steps:
    """Plans for a manager without a scheduler; every transfer succeeds."""

    def __init__(self, kv: KVCacheManager) -> None:
        self.kv = kv
        self.num_steps = 0

    def run(self) -> SchedulerOutput:
        plan = SchedulerOutput(self.num_steps)
        self.num_steps += 1
        self.kv.complete(plan, [])
        self.kv.check_integrity()
        self.kv.retire(plan)
        self.kv.check_integrity()
        return plan


@settings(max_examples=max(200, settings.default.max_examples))
@given(
    num_blocks=st.integers(4, 9),
    block_size=st.sampled_from([1, 2, 3]),
    max_transfers=st.integers(1, 5),
    prompts=st.lists(
        st.tuples(st.integers(0, 1), st.integers(1, 12), st.integers(0, 2)), max_size=30
    ),
)
def test_an_endless_host_loses_nothing(num_blocks, block_size, max_transfers, prompts):
    """Block by block, the cache is a set of all prefixes that were ever computed."""
    kv = KVCacheManager(
        CacheConfig(
            num_blocks=num_blocks,
            block_size=block_size,
            num_host_blocks=400,
            max_transfers_per_step=max_transfers,
        )
    )
    steps = Steps(kv)
    known: set[tuple[int, ...]] = set()
    for i, (family, max_length, last) in enumerate(prompts):
        length = min(max_length, num_blocks * block_size)
        token_ids = [*(family * k % 3 for k in range(length - 1)), last]
        request = Request(
            f"r{i}", token_ids, SamplingParams(max_tokens=1), arrival_time=0.0, seed=0
        )
        while (match := kv.find_prefix(request, 99)) is None:
            assert steps.run().loads
        ends = range(block_size, length, block_size)  # one token is always computed
        assert len(match.nodes) == sum(tuple(token_ids[:end]) in known for end in ends)
        if kv.allocate_slots(request, length - match.num_tokens, match) is None:
            match = match.without_partial()
            assert kv.allocate_slots(request, length - match.num_tokens, match) is not None
        request.num_computed_tokens = request.num_written_tokens = length
        steps.run()
        kv.free(request)
        while steps.run().stores:
            pass
        full = range(block_size, length + 1, block_size)
        known.update(tuple(token_ids[:end]) for end in full)
    assert kv.num_free_blocks == num_blocks


class OffloadMachine(SchedulerMachine):
    """The scheduler's machine with so small a device that prefixes come and go all the time."""

    @initialize(
        num_blocks=st.integers(4, 9),
        block_size=st.sampled_from([1, 2, 3]),
        budget=st.integers(4, 24),
        max_num_seqs=st.integers(1, 4),
        depth=st.sampled_from([1, 2]),
        policy=st.sampled_from(["sjf", "fcfs", "priority"]),
        weak_hash=st.sampled_from([False, False, True]),
        num_host_blocks=st.integers(1, 60),
        max_transfers=st.integers(1, 6),
        num_drafts=st.sampled_from([0, 0, 3]),
        accuracy=st.integers(0, 4),
    )
    def start(self, **drawn):
        super().start(caching=True, cascade_overhead=0, **drawn)


TestOffloadMachine = OffloadMachine.TestCase
TestOffloadMachine.settings = settings(
    max_examples=max(200, settings.default.max_examples),
    stateful_step_count=max(40, settings.default.stateful_step_count),
)
