"""States of constant size beside the KV: where they are kept, and who goes on from them.

The simulated device asserts at every step that a request goes on from the state of just the tokens
before it; here it is counted how much is computed.
"""

from __future__ import annotations

import pytest

from streamserve.config import CacheConfig
from streamserve.core.block_pool import KVCacheBlock, PrefixNode
from streamserve.core.plan import StateCopy
from streamserve.core.request import FinishReason, Request
from streamserve.core.state_slots import StateSlots, place_to_keep
from streamserve.errors import ConfigError
from tests.unit.simulated import Harness, naive_output, shares


def distinct(start: int, length: int) -> list[int]:
    return [(start * 31 + i * i) % 11 for i in range(length)]


def harness_of(num_state_slots: int = 20, **options: object) -> Harness:
    return Harness(num_state_slots=num_state_slots, **options)


def computed_by(harness: Harness, prompt: list[int], **params: object) -> int:
    """Tokens that a device computes for a request alone, checked token by token."""
    before = harness.runner.num_computed_tokens
    request = harness.add(prompt, **params)
    harness.run()
    assert request.output_token_ids == naive_output(request, request.num_output_tokens)
    return harness.runner.num_computed_tokens - before


@pytest.mark.parametrize(
    ("num_tokens", "place"), [(1, 0), (8, 0), (11, 0), (12, 4), (15, 4), (16, 8), (100, 92)]
)
def test_a_prompts_state_is_kept_at_a_block_before_its_last_tokens(num_tokens, place):
    assert place_to_keep(num_tokens, 4) == place


def test_the_next_turn_goes_on_behind_the_answer():
    harness = harness_of()
    first = harness.add(distinct(1, 30), max_tokens=7)
    harness.run()
    # The last token of an answer is not computed before somebody goes on with it.
    assert computed_by(harness, [*first.token_ids, 1, 2, 3], max_tokens=1) == 1 + 3
    assert harness.runner.num_state_copies == 1


def test_a_turn_whose_thoughts_are_left_out_goes_on_near_the_prompts_end():
    harness = harness_of()
    prompt = distinct(1, 30)
    harness.add(prompt, max_tokens=7)
    harness.run()
    # 28 tokens in common; the state is kept behind 20.
    assert computed_by(harness, [*prompt[:28], 5, 5, 5, 5], max_tokens=1) == 32 - 20


def test_a_prompt_again_is_computed_from_the_kept_state():
    harness = harness_of()
    prompt = distinct(1, 41)
    assert computed_by(harness, prompt, max_tokens=1) == 41
    assert computed_by(harness, prompt, max_tokens=1) == 41 - 32


def test_long_prompts_are_saved_in_the_chunk_that_passes_the_place():
    harness = harness_of(max_num_batched_tokens=10)
    harness.add(distinct(1, 45), max_tokens=1)
    plans = harness.run()
    saves = [(shares(plan), plan.state_saves) for plan in plans if plan.state_saves]
    assert [(save.place, save.position) for _, (save,) in saves] == [(0, 36)]
    assert [sum(share.values()) for share, _ in saves] == [10]  # the chunk from 30 to 40


def test_of_three_that_come_after_each_other_the_third_shares_the_system_prompt():
    """The second has the KV of what they share and no state: it keeps one where they part."""
    harness = harness_of()
    system = distinct(1, 40)
    assert computed_by(harness, system + [1] * 20, max_tokens=1) == 60
    assert computed_by(harness, system + [2] * 20, max_tokens=1) == 60
    assert computed_by(harness, system + [3] * 20, max_tokens=1) == 20
    assert computed_by(harness, system + [4] * 20, max_tokens=1) == 20


def test_of_many_that_come_together_one_computes_the_system_prompt():
    harness = harness_of(max_num_batched_tokens=16)
    system = distinct(1, 40)
    requests = [harness.add(system + [i] * 20, max_tokens=2) for i in range(5)]
    harness.run()
    assert harness.runner.num_computed_tokens == 40 + 5 * (20 + 1)
    for request in requests:
        assert request.output_token_ids == naive_output(request, 2)
    assert [r.num_cached_tokens for r in requests] == [0, 40, 40, 40, 40]


@pytest.mark.parametrize("caching", [True, False])
def test_several_answers_start_where_the_prompt_is_the_same(caching):
    harness = harness_of(enable_prefix_caching=caching)
    prompt = distinct(1, 30)
    source = harness.add(prompt, max_tokens=3)
    others = [harness.request(prompt, max_tokens=3) for _ in range(3)]
    harness.scheduler.add_choices(source, others)
    harness.run()
    each = 2 if caching else 30  # they have 28 in common, in whole blocks
    assert harness.runner.num_computed_tokens == 30 + 3 * each + 4 * 2
    for request in (source, *others):
        assert request.output_token_ids == naive_output(request, 3)


def test_a_tenants_states_are_its_own():
    harness = harness_of()
    prompt = distinct(1, 30)
    assert computed_by(harness, prompt, salt="one", max_tokens=1) == 30
    assert computed_by(harness, prompt, salt="two", max_tokens=1) == 30
    assert computed_by(harness, prompt, salt="two", max_tokens=1) == 10


def test_a_late_stop_leaves_no_state_of_discarded_tokens():
    harness = harness_of(max_steps_in_flight=2)
    prompt = distinct(1, 13)
    request = harness.add(prompt, max_tokens=20)
    for _ in range(8):
        harness.step()
    harness.scheduler.finish(request, FinishReason.STOP, num_output_tokens=2)
    harness.run()
    assert computed_by(harness, [*request.token_ids, 1, 2], max_tokens=1) == 15 + 2 - 4


def test_an_end_that_was_computed_is_part_of_the_state():
    """With two steps in flight the end itself is computed before the host knows it."""
    harness = harness_of(max_steps_in_flight=2)
    request = harness.add(distinct(3, 13), max_tokens=20, stop_token_ids=tuple(range(11)))
    harness.run()
    assert request.num_output_tokens == 1
    assert computed_by(harness, [*request.token_ids, 1, 2], max_tokens=1) == 2


def test_what_failed_leaves_no_state():
    harness = harness_of(max_num_batched_tokens=20)
    request = harness.add(distinct(1, 40), max_tokens=3)
    other = harness.add(distinct(2, 5), max_tokens=3)
    harness.step()
    harness.launch()
    harness.fail()
    harness.run()
    for each in (request, other):
        assert each.output_token_ids == naive_output(each, 3)


def test_who_was_preempted_goes_on_from_its_own_state():
    harness = harness_of(policy="priority", max_num_seqs=1)
    slow = harness.add(distinct(1, 30), max_tokens=12, priority=1)
    for _ in range(5):
        harness.step()
    urgent = harness.add(distinct(2, 30), max_tokens=3)
    harness.run()
    assert slow.num_preemptions == 1
    assert harness.runner.num_computed_tokens == 30 + 11 + 30 + 2
    for request in (slow, urgent):
        assert request.output_token_ids == naive_output(request, request.num_output_tokens)


def test_who_finds_no_slot_waits_for_one():
    harness = harness_of(3)
    requests = [harness.add(distinct(i, 20), max_tokens=5) for i in range(6)]
    harness.launch()
    assert harness.scheduler.num_running == 3
    harness.retire()
    harness.run()
    assert [r.output_token_ids for r in requests] == [naive_output(r, 5) for r in requests]


def test_the_only_slot_is_taken_over_by_who_goes_on_from_it():
    harness = harness_of(1)
    first = harness.add(distinct(1, 20), max_tokens=2)
    harness.run()
    assert harness.kv.num_kept_states == 1
    assert computed_by(harness, [*first.token_ids, 1, 2], max_tokens=1) == 3
    assert harness.runner.num_state_copies == 0


def test_the_states_that_were_not_used_for_longest_go_first():
    harness = harness_of(3)
    prompts = [distinct(i, 25) for i in range(2)]
    for prompt in prompts:  # each keeps two: near its end, and behind its answer
        computed_by(harness, prompt, max_tokens=1)
    assert harness.kv.stats.num_state_evictions == 1
    assert computed_by(harness, prompts[1], max_tokens=1) == 25 - 16
    assert computed_by(harness, prompts[0], max_tokens=1) == 25


def test_a_state_goes_with_the_block_that_it_is_kept_behind():
    harness = harness_of(num_blocks=10)
    computed_by(harness, distinct(1, 30), max_tokens=1)
    assert harness.kv.num_kept_states == 2
    computed_by(harness, distinct(2, 39), max_tokens=1)  # takes every block
    assert harness.kv.num_kept_states == 2
    assert computed_by(harness, distinct(1, 30), max_tokens=1) == 30


def test_a_prefix_is_worth_nothing_without_its_state():
    harness = harness_of()
    prompt = distinct(1, 30)
    computed_by(harness, prompt, max_tokens=1)
    for node in harness.kv._cache.nodes():
        harness.kv._states.slots.forget(node)
    request = harness.request(prompt)
    assert harness.kv.estimate_cached(request, 100) == 0
    assert harness.kv.find_prefix(request).num_tokens == 0


def test_without_states_nobody_has_a_slot():
    harness = Harness()
    request = harness.add(distinct(1, 30))
    plans = harness.run()
    assert request.state_slot is None
    assert not any(plan.state_saves or plan.state_copies for plan in plans)


def test_a_state_that_the_plan_reads_is_given_to_nobody_before_the_next():
    slots, kept = StateSlots(3), []
    for i in range(3):
        node = PrefixNode(None, [i], None)
        node.block = KVCacheBlock(i)
        slot = slots.take()
        slots.keep(node, slot)
        kept.append(node)
    source = kept[1].state_slot
    first = slots.begin(kept[1])
    assert first == 0  # the oldest that nobody reads
    second = slots.begin(kept[1])
    assert slots.take() is None
    assert slots.take_copies() == [StateCopy(source, first), StateCopy(source, second)]
    assert slots.take() == source
    assert [node.state_slot for node in kept] == [None, None, None]


def test_a_block_that_is_taken_while_the_plan_reads_its_state_frees_the_slot_behind_it():
    slots, node = StateSlots(2), PrefixNode(None, [1], None)
    node.block = KVCacheBlock(0)
    slots.keep(node, slots.take())
    own = slots.begin(node)
    slots.forget(node)
    assert not slots.has_room
    slots.check_integrity([own], [])
    slots.take_copies()
    assert slots.has_room
    slots.check_integrity([own], [])


def test_host_blocks_are_refused_beside_states():
    with pytest.raises(ConfigError, match="num_host_blocks must be 0"):
        CacheConfig(num_blocks=4, num_host_blocks=4, num_state_slots=4)


def test_a_state_is_never_shared_by_fork():
    harness = harness_of()
    parent = harness.add(distinct(1, 9))
    harness.step()
    child: Request = harness.request(distinct(1, 9))
    with pytest.raises(AssertionError, match="cannot be shared"):
        harness.kv.fork(parent, child)
