"""The grouping against trying them all, and what is (not) done again from step to step."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from streamserve.config import SchedulerConfig
from streamserve.core.plan import PrefixGroup, ScheduledRequest
from streamserve.core.prefix_groups import PrefixGrouping, check_groups, find_groups
from streamserve.core.request import FinishReason, Request
from streamserve.core.sampling_params import SamplingParams
from streamserve.core.step import Step
from tests.unit.naive_groups import best_gain, gain_of
from tests.unit.simulated import Harness

PATHS = st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=7)


def tables_of(paths):
    """Block tables that share a block wherever two paths agree up to there."""
    ids = {}
    return [
        [ids.setdefault(tuple(path[: i + 1]), len(ids)) for i in range(len(path))] for path in paths
    ]


@given(paths=PATHS, block_size=st.integers(1, 16), overhead=st.integers(0, 40))
def test_no_grouping_gains_more(paths, block_size, overhead):
    tables = tables_of(paths)
    groups = find_groups(tables, block_size, overhead)
    assert gain_of(groups, block_size, overhead) == best_gain(tables, block_size, overhead)
    members = [i for group in groups for i in group.members]
    assert len(set(members)) == len(members)
    for indices, num_blocks in groups:
        assert len(indices) > 1
        assert num_blocks > 0
        assert list(indices) == sorted(indices)
        prefixes = [tables[i][:num_blocks] for i in indices]
        assert all(len(p) == num_blocks and p == prefixes[0] for p in prefixes)
    assert groups == sorted(groups)


def test_equal_ids_behind_different_ones_are_not_shared():
    """A block that has the same content may have been cached in the other's place."""
    assert find_groups([[1, 3, 4, 5], [2, 3, 4, 6]], 16, 0) == []


def test_a_deep_group_and_the_rest_above_it():
    trunk = [0, 1, 2, 3]
    deep = [*trunk, *range(20, 26)]
    tables = [[*trunk, 7], [*deep, 90], [*deep, 91], [*trunk, 8], [*deep, 92]]
    assert find_groups(tables, 16, 32) == [PrefixGroup((1, 2, 4), 10)]
    assert find_groups(tables, 16, 16) == [PrefixGroup((0, 3), 4), PrefixGroup((1, 2, 4), 10)]


@pytest.mark.parametrize(("num_requests", "num_blocks"), [(2, 5), (9, 3)])
def test_what_does_not_pay_is_left_alone(num_requests, num_blocks):
    def groups(shared):
        return find_groups([[*range(shared), 100 + i] for i in range(num_requests)], 16, 32)

    assert groups(num_blocks - 1) == []
    assert groups(num_blocks) == [PrefixGroup(tuple(range(num_requests)), num_blocks)]


def test_forks_of_forks_of_forks():
    """A tree as high as it has leaves: no recursion, and no choice is tried twice."""
    tables = [[*range(i), 1_000 + i] for i in range(300)]
    groups = find_groups(tables, 1, 0)
    # Two neighbours share as many blocks as the shallower one has of its parent's.
    assert gain_of(groups, 1, 0) >= sum(range(299)) / 2
    few = tables[::30]
    assert gain_of(find_groups(few, 1, 0), 1, 0) == best_gain(few, 1, 0)


def request(name, block_table):
    made = Request(name, [1], SamplingParams(), arrival_time=0.0, seed=0)
    made.block_table = block_table
    return made


def step_of(requests, start):
    step = Step(0, 0)
    for one in requests:
        step.requests.append(one)
        step.plan.scheduled.append(ScheduledRequest(one.request_id, start, [1], [], True, 0))
    return step


def test_only_full_blocks_that_were_there_before_the_step():
    requests = [request("a", [1, 2, 3, 4]), request("b", [1, 2, 3, 5])]
    config = SchedulerConfig(max_model_len=99, cascade_overhead_tokens=0)
    for start, num_blocks in ((12, 3), (11, 2), (8, 2), (5, 1)):
        groups = PrefixGrouping(config, 4).update(step_of(requests, start))
        assert groups == [PrefixGroup((0, 1), num_blocks)]


def test_check_groups_finds_what_is_wrong():
    def check(*groups, start=8):
        step = step_of([request("a", [1, 2, 3, 4]), request("b", [1, 2, 3, 5])], start)
        step.plan.prefix_groups.extend(groups)
        check_groups(step, 4)

    check(PrefixGroup((0, 1), 2))
    with pytest.raises(AssertionError, match="not computed before"):
        check(PrefixGroup((0, 1), 3))
    with pytest.raises(AssertionError, match="not shared"):
        check(PrefixGroup((0, 1), 4), start=16)
    with pytest.raises(AssertionError, match="two groups"):
        check(PrefixGroup((0, 1), 1), PrefixGroup((0, 1), 1))
    with pytest.raises(AssertionError, match="group of one"):
        check(PrefixGroup((0,), 1))


SYSTEM = [1, 2, 3, 4, 5, 6, 7, 8] * 2  # four blocks


def test_a_shared_system_prompt_is_one_group_until_its_members_leave():
    harness = Harness()
    for i in range(3):
        harness.add([*SYSTEM, i, i], max_tokens=20)
    harness.step()  # the first one computes the prompt, the others wait for it
    assert harness.step().prefix_groups == [PrefixGroup((0, 1, 2), 4)]
    first = harness.step().prefix_groups
    num_new_blocks = 0
    for _ in range(6):
        plan = harness.step()
        num_new_blocks += sum(len(s.new_block_ids) for s in plan.scheduled)
        assert plan.prefix_groups[0] is first[0], "found anew although nobody came or went"
    assert num_new_blocks >= 3
    harness.scheduler.finish(harness.scheduler.get("r2"), FinishReason.ABORT)
    assert harness.step().prefix_groups == [PrefixGroup((0, 1), 4)]
    harness.scheduler.finish(harness.scheduler.get("r1"), FinishReason.ABORT)
    assert harness.step().prefix_groups == []


def test_the_saved_tokens_are_counted():
    harness = Harness()
    for i in range(3):
        harness.add([*SYSTEM, i, i], max_tokens=5)
    plans = harness.run()
    saved = [sum((len(m) - 1) * n * 4 for m, n in plan.prefix_groups) for plan in plans]
    assert saved == [0, 32, 32, 32, 32, 16]
    assert harness.scheduler.prefix_grouping.num_saved_tokens == sum(saved)


def test_a_chunk_of_a_prompt_is_a_member():
    harness = Harness(max_num_batched_tokens=8)
    harness.add([*SYSTEM, 9], max_tokens=30)
    for _ in range(4):
        harness.step()
    harness.add(SYSTEM + list(range(20)), max_tokens=2)
    plan = harness.step()
    assert [len(s.token_ids) for s in plan.scheduled] == [1, 7]
    assert plan.prefix_groups == [PrefixGroup((0, 1), 4)]
    assert harness.step().prefix_groups[0] is plan.prefix_groups[0]


def test_a_fork_shares_its_parents_full_blocks():
    harness = Harness()
    parent = harness.add([*SYSTEM, 9, 9], max_tokens=30)
    harness.step()
    child = harness.request([*SYSTEM, 9, 9], max_tokens=30)
    harness.scheduler.fork(parent, child)
    plan = harness.step()
    assert len(plan.block_copies) == 1
    assert plan.prefix_groups == [PrefixGroup((0, 1), 4)]


def test_a_preempted_request_that_comes_back_is_grouped_anew():
    harness = Harness(num_blocks=16, max_num_seqs=4)
    requests = [harness.add([*SYSTEM, i], max_tokens=24) for i in range(4)]
    plans = harness.run()
    assert sum(r.num_preemptions for r in requests) > 0
    assert any(plan.prefix_groups for plan in plans)


def test_off_means_no_groups():
    harness = Harness(enable_cascade_attention=False)
    for i in range(3):
        harness.add([*SYSTEM, i], max_tokens=5)
    assert not any(plan.prefix_groups for plan in harness.run())
    assert harness.scheduler.prefix_grouping.num_saved_tokens == 0
