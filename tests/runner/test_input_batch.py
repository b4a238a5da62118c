from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch

from streamserve.core.plan import (
    PENDING_TOKEN,
    NewRequest,
    PrefixGroup,
    ScheduledRequest,
    SchedulerOutput,
)
from streamserve.core.sampling_params import SamplingParams
from streamserve.runner.input_batch import InputBatch
from streamserve.runner.step_buffers import step_sizes

BLOCK_SIZE = 4
MAX_LEN = 64
MAX_SEQS = 6
MAX_TOKENS = 40


def input_batch(padded_sizes=(), **changes) -> InputBatch:
    options = {
        "max_num_seqs": MAX_SEQS,
        "max_num_batched_tokens": MAX_TOKENS,
        "max_model_len": MAX_LEN,
        "block_size": BLOCK_SIZE,
        "vocab_size": 100,
        "device": torch.device("cpu"),
        "padded_sizes": padded_sizes,
    }
    return InputBatch(**{**options, **changes})


@dataclass
class Live:
    """A request as the test keeps it."""

    token_ids: list[int]
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)


class Script:
    """Random but legal plans: requests come, compute chunks, decode, are preempted, leave."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.live: dict[str, Live] = {}
        self.unknown: dict[str, int] = {}  # sampled ids that the host has not heard of
        self.count = 0
        self.next_block = 1

    def plan(self) -> tuple[SchedulerOutput, list[list[int]]]:
        """A plan, and its token ids as the device must see them."""
        rng = self.rng
        plan = SchedulerOutput(self.count)
        self.count += 1
        for request_id in list(self.live):
            if rng.random() < 0.1 or len(self.live[request_id].token_ids) >= MAX_LEN - 2:
                plan.released_ids.append(request_id)
                live = self.live.pop(request_id)
                self.unknown.pop(request_id, None)
                if rng.random() < 0.5:  # preempted: it comes back at once, with what is known
                    self._enter(plan, request_id, live.token_ids)
        while len(self.live) < MAX_SEQS and rng.random() < 0.6:
            prompt = [rng.randrange(100) for _ in range(rng.randrange(1, 30))]
            self._enter(plan, f"r{self.count}-{len(self.live)}", prompt)
        expected = []
        budget = MAX_TOKENS
        order = list(self.live.items())
        rng.shuffle(order)
        for request_id, live in order:
            todo = len(live.token_ids) - live.num_computed
            length = min(todo, budget, rng.randrange(1, 20))
            if length == 0 or rng.random() < 0.1:
                continue
            budget -= length
            expected.append(self._schedule(plan, request_id, live, length))
        return plan, expected

    def _enter(self, plan: SchedulerOutput, request_id: str, token_ids: list[int]) -> None:
        self.live[request_id] = Live(list(token_ids))
        params = SamplingParams(temperature=0.0)
        plan.new_requests.append(NewRequest(request_id, list(token_ids), 1, params, 0, 0))

    def _schedule(self, plan, request_id, live, length) -> list[int]:
        start, end = live.num_computed, live.num_computed + length
        new_blocks = []
        while (len(live.blocks) + len(new_blocks)) * BLOCK_SIZE < end:
            new_blocks.append(self.next_block)
            self.next_block = self.next_block * 7 % 1009
        live.blocks += new_blocks
        ids = live.token_ids[start:end]
        told = list(ids)
        if request_id in self.unknown and end == len(live.token_ids):
            told[-1] = PENDING_TOKEN
        sample = end == len(live.token_ids)
        plan.scheduled.append(
            ScheduledRequest(request_id, start, told, new_blocks, sample, max(0, end - 1))
        )
        live.num_computed = end
        return ids

    def sampled(self, plan: SchedulerOutput) -> list[int]:
        """Tokens that the device draws; half of them the host learns only later."""
        ids = []
        for scheduled in plan.scheduled:
            if scheduled.sample:
                token = self.rng.randrange(100)
                ids.append(token)
                self.live[scheduled.request_id].token_ids.append(token)
                self.unknown.pop(scheduled.request_id, None)
                if self.rng.random() < 0.5:
                    self.unknown[scheduled.request_id] = token
        return ids


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_random_plans_against_a_naive_builder(seed, padded):
    script = Script(seed)
    ladder = step_sizes(MAX_TOKENS, MAX_SEQS) if padded else ()
    batch = input_batch(ladder)
    for _ in range(60):
        plan, expected_ids = script.plan()
        batch.apply(plan)
        assert sorted(batch.request_ids) == sorted(script.live)
        for request_id, live in script.live.items():
            assert batch.block_table(request_id) == live.blocks
        if not plan.scheduled:
            continue
        tensors, rows = batch.build(plan)
        check(tensors, plan, expected_ids, script, ladder)
        assert rows.places == [i for i, s in enumerate(plan.scheduled) if s.sample]
        assert rows.request_ids == [s.request_id for s in plan.scheduled if s.sample]
        assert rows.output_positions.tolist() == [
            s.output_position for s in plan.scheduled if s.sample
        ]
        ids = script.sampled(plan)
        batch.record(rows, torch.tensor(ids, dtype=torch.int64).numpy())


def check(tensors, plan, expected_ids, script, ladder) -> None:
    ids, positions, slots, starts, lengths, logits = [], [], [], [0], [], []
    for scheduled, token_ids in zip(plan.scheduled, expected_ids, strict=True):
        blocks = script.live[scheduled.request_id].blocks
        for i, token in enumerate(token_ids):
            position = scheduled.start + i
            ids.append(token)
            positions.append(position)
            slots.append(blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
        starts.append(len(ids))
        lengths.append(scheduled.start + len(token_ids))
        if scheduled.sample:
            logits.append(len(ids) - 1)
    count = len(ids)
    assert tensors.input_ids[:count].tolist() == ids
    assert tensors.positions[:count].tolist() == positions
    assert tensors.slot_mapping[:count].tolist() == slots
    assert (tensors.slot_mapping[count:] == -1).all()
    assert tensors.query_start_loc.tolist() == starts
    assert tensors.seq_lens.tolist() == lengths
    assert tensors.logits_indices[: len(logits)].tolist() == logits
    # What is padded in the logits is padding in the forward, so that it ends at a known place.
    padding = tensors.logits_indices[len(logits) :].tolist()
    assert padding == list(range(count, count + len(padding)))
    assert len(tensors.input_ids) == len(tensors.positions) == len(tensors.slot_mapping)
    assert count + len(padding) <= len(tensors.input_ids)
    if ladder:
        assert len(tensors.input_ids) in ladder
        assert len(tensors.logits_indices) in (0, *ladder)
    else:
        assert len(tensors.input_ids) == count
    for row, scheduled, length in zip(tensors.block_table, plan.scheduled, lengths, strict=True):
        used = -(-length // BLOCK_SIZE)
        assert row[:used].tolist() == script.live[scheduled.request_id].blocks[:used]
    for name, dtype in (
        ("input_ids", torch.int64),
        ("positions", torch.int64),
        ("slot_mapping", torch.int64),
        ("query_start_loc", torch.int32),
        ("seq_lens", torch.int32),
        ("block_table", torch.int32),
        ("logits_indices", torch.int64),
    ):
        assert getattr(tensors, name).dtype == dtype
        assert getattr(tensors, name).is_contiguous()


def enter(batch: InputBatch, request_id: str, token_ids: list[int], params=None) -> None:
    params = params or SamplingParams()
    batch.apply(
        SchedulerOutput(0, new_requests=[NewRequest(request_id, token_ids, 1, params, 5, 0)])
    )


def step(*scheduled: ScheduledRequest) -> SchedulerOutput:
    return SchedulerOutput(1, scheduled=list(scheduled))


@pytest.mark.parametrize("padded", [False, True])
def test_prefix_groups_are_tensors_of_their_own(padded):
    batch = input_batch(step_sizes(MAX_TOKENS, MAX_SEQS) if padded else ())
    for i in range(MAX_SEQS):
        enter(batch, f"r{i}", [1, 2, 3, 4, 5, 6, 7, 8, 9])

    def build(*groups: PrefixGroup):
        scheduled = [
            ScheduledRequest(f"r{i}", 8, [9], [1, 2, 10 + i], True, 0) for i in range(MAX_SEQS)
        ]
        plan = SchedulerOutput(1, scheduled=scheduled, prefix_groups=list(groups))
        for row in range(MAX_SEQS):
            batch._rows.num_blocks[row] = 0
        batch.apply(plan)
        return batch.build(plan)[0].prefix_groups

    assert build() is None
    for _ in range(2):
        groups = build(PrefixGroup((0, 2, 5), 2), PrefixGroup((1, 3), 1))
        assert [t.tolist() for t in groups] == [[0, 2, 5, 1, 3], [0, 3, 5], [2, 1]]
        assert all(t.dtype == torch.int32 and t.is_contiguous() for t in groups)
    groups = build(PrefixGroup((0, 1), 1), PrefixGroup((2, 3), 2), PrefixGroup((4, 5), 1))
    assert [t.tolist() for t in groups] == [[0, 1, 2, 3, 4, 5], [0, 2, 4, 6], [1, 2, 1]]
    assert build() is None


def test_tokens_without_a_block_are_refused():
    batch = input_batch()
    enter(batch, "a", [1] * 9)
    plan = step(ScheduledRequest("a", 0, [1] * 9, [3, 4], True, 0))
    batch.apply(plan)
    with pytest.raises(ValueError, match="'a' computes 9 tokens up to 9 and has 2 blocks of 4"):
        batch.build(plan)


def test_more_blocks_than_the_longest_sequence_needs_are_refused():
    batch = input_batch()
    enter(batch, "a", [1])
    with pytest.raises(ValueError, match="18 blocks"):
        batch.apply(step(ScheduledRequest("a", 0, [1], list(range(18)), True, 0)))


def test_an_unsampled_pending_token_is_refused():
    batch = input_batch()
    enter(batch, "a", [1])
    plan = step(ScheduledRequest("a", 1, [PENDING_TOKEN], [3], True, 1))
    batch.apply(plan)
    with pytest.raises(ValueError, match="sampled none"):
        batch.build(plan)


def test_after_a_failed_step_a_pending_token_is_any_token():
    batch = input_batch()
    enter(batch, "a", [1])
    failed = step(ScheduledRequest("a", 0, [1], [3], True, 0))
    batch.apply(failed)
    batch.record_failure(failed)
    plan = step(ScheduledRequest("a", 1, [PENDING_TOKEN], [], True, 1))
    batch.apply(plan)
    assert batch.build(plan)[0].input_ids.tolist() == [0]


def test_releasing_a_stranger_is_nothing():
    batch = input_batch()
    batch.apply(SchedulerOutput(0, released_ids=["never", "seen"]))
    assert len(batch) == 0


def test_rows_grow_with_more_requests_than_seats():
    batch = input_batch()
    for i in range(5 * MAX_SEQS):
        enter(batch, f"r{i}", [i, i], SamplingParams(temperature=0.5, top_p=0.25))
        batch.apply(step(ScheduledRequest(f"r{i}", 0, [i], [i + 1], False, 0)))
    assert len(batch) == 5 * MAX_SEQS
    assert [batch.block_table(f"r{i}") for i in range(5 * MAX_SEQS)] == [
        [i + 1] for i in range(5 * MAX_SEQS)
    ]
    plan = step(*(ScheduledRequest(f"r{i}", 1, [i], [], True, 0) for i in (0, 29)))
    batch.apply(plan)
    _, rows = batch.build(plan)
    wanted = batch.sampling_batch(rows, None)
    assert wanted.top_p.tolist() == [0.25, 0.25]
    assert wanted.temperature.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63), 2**64 - 1])
def test_any_64_bit_seed(seed):
    batch = input_batch()
    request = NewRequest("a", [1], 1, SamplingParams(), seed, 0)
    plan = SchedulerOutput(
        0, new_requests=[request], scheduled=[ScheduledRequest("a", 0, [1], [2], True, 0)]
    )
    batch.apply(plan)
    _, rows = batch.build(plan)
    assert 0 <= batch.sampling_batch(rows, None).uniforms[0] < 1


def test_plain_greedy_rows_ask_for_no_sampling():
    batch = input_batch()
    enter(batch, "a", [1], SamplingParams(temperature=0.0))
    enter(batch, "b", [1], SamplingParams(temperature=0.0, logprobs=2))
    plan = step(ScheduledRequest("a", 0, [1], [2], True, 0))
    batch.apply(plan)
    _, rows = batch.build(plan)
    assert batch.sampling_batch(rows, None) is None
    assert batch.sampling_batch(rows, {"a": b"\xff" * 13}) is not None
    plan = step(ScheduledRequest("b", 0, [1], [2], True, 0))
    batch.apply(plan)
    _, rows = batch.build(plan)
    assert batch.sampling_batch(rows, None).num_logprobs.tolist() == [2]


@pytest.mark.parametrize(
    ("max_tokens", "max_seqs"), [(1, 1), (8, 64), (16, 4), (100, 3), (512, 64), (2048, 256)]
)
def test_every_step_fits_under_the_ladder(max_tokens, max_seqs):
    ladder = step_sizes(max_tokens, max_seqs)
    assert list(ladder) == sorted(set(ladder))
    assert max_tokens in ladder

    def up(count: int) -> int:
        return next(size for size in ladder if size >= count)

    for logits in range(1, min(max_seqs, max_tokens) + 1):
        assert up(max_tokens + up(logits) - logits) in ladder
    # No more than a quarter is wasted once steps are large enough to be worth counting.
    assert all(up(count) <= 1.25 * count + 8 for count in range(1, max_tokens + 1))
