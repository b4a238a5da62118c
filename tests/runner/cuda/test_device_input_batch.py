from __future__ import annotations

import pytest
import torch

from streamserve.core.plan import (
    PENDING_TOKEN,
    NewRequest,
    PrefixGroup,
    SchedulerOutput,
    StateMove,
    StateSave,
)
from streamserve.core.plan import ScheduledRequest as Scheduled
from streamserve.core.sampling_params import SamplingParams
from streamserve.runner.cuda.input_batch import DeviceInputBatch
from streamserve.runner.cuda.step_key import StepLadder
from streamserve.runner.cuda.timeline import HostTimeline
from streamserve.runner.philox import uniforms
from tests.runner.test_input_batch import BLOCK_SIZE, MAX_LEN, MAX_SEQS, MAX_TOKENS, Script

GREEDY = SamplingParams(temperature=0.0)


def device_batch(
    num_adapters: int = 0, keeps_states: bool = False, **drafting: int
) -> DeviceInputBatch:
    return DeviceInputBatch(
        StepLadder(MAX_TOKENS, MAX_SEQS, num_adapters=num_adapters, **drafting),
        max_num_seqs=MAX_SEQS,
        max_model_len=MAX_LEN,
        block_size=BLOCK_SIZE,
        vocab_size=100,
        device=torch.device("cpu"),
        timeline=HostTimeline(),
        keeps_states=keeps_states,
    )


@pytest.mark.parametrize("seed", range(6))
def test_random_plans_against_a_naive_builder(seed):
    """The device's side: `last` plays the tensor of ids that rows drew last."""
    script, batch = Script(seed), device_batch()
    last = torch.full((batch.unused_row + 1,), -1)
    for _ in range(60):
        plan, expected_ids = script.plan()
        batch.apply(plan)
        assert sorted(batch.rows.request_ids) == sorted(script.live)
        if not plan.scheduled:
            continue
        step = batch.build(plan, {})
        inputs = step.inputs
        ids = inputs.batch.input_ids
        resolved = torch.where(ids < 0, last[(-1 - ids).clamp(min=0)], ids)
        check(inputs.batch, resolved, plan, expected_ids, script)
        drawn = script.sampled(plan)
        assert inputs.sampled_rows[step.logits_rows].tolist() == step.rows.rows.tolist()
        others = torch.ones(step.key.num_seqs, dtype=torch.bool)
        others[step.logits_rows] = False
        assert (inputs.sampled_rows[others] == batch.unused_row).all()
        last[step.rows.rows] = torch.tensor(drawn, dtype=torch.int64)
        ends = inputs.batch.query_start_loc[1:] - 1
        indices = inputs.batch.logits_indices[step.logits_rows].tolist()
        assert indices == [int(ends[place]) for place in step.rows.places]


def check(batch, resolved, plan, expected_ids, script) -> None:
    count, num_seqs = plan.num_tokens, len(plan.scheduled)
    positions = [s.start + i for s in plan.scheduled for i in range(len(s.token_ids))]
    assert resolved[:count].tolist() == [token for ids in expected_ids for token in ids]
    assert batch.positions[:count].tolist() == positions
    tables = [script.live[s.request_id].blocks for s in plan.scheduled for _ in s.token_ids]
    slots = [
        table[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE
        for table, at in zip(tables, positions, strict=True)
    ]
    assert batch.slot_mapping[:count].tolist() == slots
    assert (batch.slot_mapping[count:] == -1).all()
    assert (resolved[count:] == 0).all()
    lengths = [len(s.token_ids) for s in plan.scheduled]
    assert batch.query_start_loc[: num_seqs + 1].diff().tolist() == lengths
    assert (batch.query_start_loc[num_seqs:] == count).all()
    ends = [s.start + len(s.token_ids) for s in plan.scheduled]
    assert batch.seq_lens.tolist() == ends + [0] * (len(batch.seq_lens) - num_seqs)
    assert batch.max_query_len >= max(lengths)
    for row, scheduled, end in zip(batch.block_table, plan.scheduled, ends, strict=False):
        used = -(-end // BLOCK_SIZE)
        assert row[:used].tolist() == script.live[scheduled.request_id].blocks[:used]


def enter(batch: DeviceInputBatch, params=GREEDY, *request_ids: str) -> None:
    new = [NewRequest(name, [1, 2], 2, params, 7 + i, i) for i, name in enumerate(request_ids)]
    batch.apply(SchedulerOutput(0, new_requests=new))


def decode(request_id: str, token: int = 5, output_position: int = 3, sample: bool = True):
    return Scheduled(request_id, 0, [token], [], sample, output_position)


def build(batch: DeviceInputBatch, *scheduled, groups=()):
    for s in scheduled:
        if not batch.rows.blocks(s.request_id):
            batch.rows.append_blocks(s.request_id, [3, 4])
    plan = SchedulerOutput(1, scheduled=list(scheduled), prefix_groups=list(groups))
    return batch.build(plan, {})


def test_a_decode_gives_every_row_logits_and_samples_some():
    batch = device_batch()
    enter(batch, GREEDY, "a", "b", "c")
    step = build(batch, decode("a"), decode("b", sample=False), decode("c"))
    assert (step.key.is_decode, step.key.num_seqs) == (True, 4)
    assert step.inputs.batch.logits_indices.tolist() == [0, 1, 2, 3]
    assert step.logits_rows.tolist() == [0, 2]
    assert step.is_greedy


def test_what_rows_ask_for_travels_with_the_step():
    batch = device_batch()
    warm = SamplingParams(temperature=0.5, top_k=7, top_p=0.8, min_p=0.1)
    enter(batch, warm, "a", "b")
    enter(batch, GREEDY, "c")
    step = build(batch, decode("c"), decode("b"), decode("a"))
    inputs = step.inputs
    assert not step.is_greedy
    assert inputs.temperature.tolist() == [0.0, 0.5, 0.5, 0.0]
    assert inputs.top_k.tolist() == [0, 7, 7, 0]
    assert inputs.top_p.tolist() == pytest.approx([1.0, 0.8, 0.8, 1.0])
    assert inputs.min_p.tolist() == pytest.approx([0.0, 0.1, 0.1, 0.0])
    for name, neutral in (("repetition", 1.0), ("presence", 0.0), ("frequency", 0.0)):
        assert getattr(inputs, f"{name}_penalty").tolist() == [neutral] * 4
    seeds, choices, positions = (torch.tensor(x).numpy() for x in ([8, 7], [1, 0], [3, 3]))
    assert inputs.uniforms[1:3].tolist() == uniforms(seeds, choices, positions).tolist()


def test_a_pending_token_must_have_been_drawn():
    batch = device_batch()
    enter(batch, GREEDY, "a")
    with pytest.raises(ValueError, match="sampled none"):
        build(batch, decode("a", PENDING_TOKEN))
    build(batch, decode("a"))
    step = build(batch, decode("a", PENDING_TOKEN))
    assert step.inputs.batch.input_ids[0] == -1 - step.rows.rows[0]
    # A row that is given to somebody else has drawn nothing yet.
    batch.apply(SchedulerOutput(0, released_ids=["a"]))
    enter(batch, GREEDY, "b")
    with pytest.raises(ValueError, match="sampled none"):
        build(batch, decode("b", PENDING_TOKEN))


def drafting(request_id: str, *drafts: int) -> Scheduled:
    return Scheduled(request_id, 0, [5, *drafts], [], 1 + len(drafts), 3)


def test_samples_with_drafts_know_what_they_stand_behind():
    batch = device_batch(num_drafts=3, max_num_sampled=24)
    enter(batch, SamplingParams(), "a", "b", "c")
    step = build(batch, decode("a"), drafting("b", 8, 9), decode("c"))
    inputs, none = step.inputs, batch.unused_row
    row_a, row_c = (batch.rows.row(name) for name in "ac")
    assert step.key.has_all_logits
    assert (inputs.batch.max_query_len, step.key.num_tokens) == (4, 8)
    assert inputs.batch.logits_indices.tolist() == list(range(8))
    assert step.logits_rows.tolist() == [0, 1, 2, 3, 4]
    assert inputs.drafts.tolist() == [-1, 8, 9, -1, -1, -1, -1, -1]
    assert inputs.num_before.tolist() == [0, 0, 1, 2, 0, 0, 0, 0]
    assert inputs.sampled_rows.tolist() == [row_a, none, none, none, row_c, none, none, none]
    seeds, choices, positions = (torch.tensor(x).numpy() for x in ([8] * 3, [1] * 3, [3, 4, 5]))
    assert inputs.uniforms[1:4].tolist() == uniforms(seeds, choices, positions).tolist()


def test_drafts_beside_a_prompt():
    batch = device_batch(num_drafts=3, max_num_sampled=24)
    enter(batch, GREEDY, "a", "b")
    step = build(batch, Scheduled("a", 0, [1, 2, 3], [], 0, 0), drafting("b", 8, 9, 7))
    assert (step.key.num_seqs, step.key.max_query_len) == (16, step.key.num_tokens)
    assert step.inputs.batch.logits_indices.tolist() == [3, 4, 5, 6, *[0] * 12]
    assert step.inputs.drafts.tolist() == [8, 9, 7, -1, *[-1] * 12]
    assert step.inputs.num_before.tolist() == [0, 1, 2, 3, *[0] * 12]


def test_what_drafts_led_to_is_no_pending_token():
    """Which of the samples is the last one, the device does not know."""
    batch = device_batch(num_drafts=3, max_num_sampled=24)
    enter(batch, GREEDY, "a", "b")
    build(batch, decode("a"), drafting("b", 8))
    build(batch, decode("a", PENDING_TOKEN), decode("b", 8))
    build(batch, decode("a", PENDING_TOKEN), drafting("b", 8))
    with pytest.raises(ValueError, match="sampled none"):
        build(batch, decode("b", PENDING_TOKEN))


def test_more_drafts_than_the_kernels_expect_are_refused():
    batch = device_batch(num_drafts=1, max_num_sampled=24)
    enter(batch, GREEDY, "a")
    with pytest.raises(ValueError, match="a request has 3 drafts, of 1"):
        build(batch, drafting("a", 7, 8, 9))


def test_groups_are_padded_with_empty_ones():
    batch = device_batch()
    names = [f"r{i}" for i in range(5)]
    enter(batch, GREEDY, *names)
    groups = [PrefixGroup((0, 2), 1), PrefixGroup((1, 3), 1)]
    step = build(batch, *map(decode, names), groups=groups)
    found = step.inputs.batch.prefix_groups
    assert step.key.has_groups
    assert found.members[:4].tolist() == [0, 2, 1, 3]
    assert found.starts.tolist() == [0, 2, 4, *[4] * (len(found.starts) - 3)]
    assert found.num_blocks.tolist() == [1, 1, *[0] * (len(found.num_blocks) - 2)]
    again = build(batch, *map(decode, names[:2]))
    assert again.inputs.batch.prefix_groups is None


def test_adapters_travel_with_a_step_that_has_some():
    batch = device_batch(num_adapters=3)
    new = [
        NewRequest(name, [1, 2], 2, GREEDY, 7, 0, adapter=adapter)
        for name, adapter in (("a", 2), ("b", None), ("c", 0), ("d", 2))
    ]
    batch.apply(SchedulerOutput(0, new_requests=new))
    assert build(batch, decode("b")).inputs.batch.adapters is None
    decodes = build(batch, *map(decode, "abcd")).inputs.batch.adapters
    assert decodes.logits is decodes.tokens
    assert [part.tolist() for part in decodes.tokens] == [
        [2, -1, 0, 2],
        [2, 0, 3, 1],
        [0, 1, 1, 3],
    ]
    prompt = Scheduled("a", 0, [1, 2, 3], [], True, 0)
    mixed = build(batch, decode("b"), prompt).inputs.batch
    tokens, logits = mixed.adapters
    assert tokens.slots.tolist() == [-1, 2, 2, 2, *[-1] * (len(mixed.input_ids) - 4)]
    assert tokens.order[:3].tolist() == [1, 2, 3]
    assert tokens.starts.tolist() == [0, 0, 0, 3]
    assert logits.slots[:2].tolist() == [-1, 2]
    assert (logits.order[0], logits.starts.tolist()) == (1, [0, 0, 0, 1])


def test_where_states_are_travels_with_a_step_of_a_model_that_keeps_some():
    batch = device_batch(keeps_states=True)
    new = [
        NewRequest(name, [1, 2], 2, GREEDY, 7, 0, state_slot=slot)
        for name, slot in (("a", 5), ("b", None), ("c", 0))
    ]
    batch.apply(SchedulerOutput(0, new_requests=new))
    for request in new:
        batch.rows.append_blocks(request.request_id, [3, 4])
    prompt = Scheduled("a", 1, [1, 2, 3], [], 1, 0)
    saves = [StateSave(1, 3, 7), StateSave(1, 4, 2), StateSave(2, 1, 9)]
    scheduled = [decode("b"), prompt, decode("c")]
    plan = SchedulerOutput(1, scheduled=scheduled, state_saves=saves)
    states = batch.build(plan, {}).inputs.batch.states
    assert states.slots.tolist() == [-1, 5, 0, *[-1] * (len(states.slots) - 3)]
    assert states.saves.tolist() == [-1, -1, 7, 2, 9, *[-1] * (len(states.saves) - 5)]
    for _ in range(3):  # each of the host's buffers, with what was in them
        step = batch.build(SchedulerOutput(2, scheduled=scheduled), {})
        assert (step.inputs.batch.states.saves == -1).all()
    batch.apply(SchedulerOutput(3, released_ids=["a"], state_moves=[StateMove("c", 8)]))
    moved = batch.build(SchedulerOutput(4, scheduled=[decode("c"), decode("b")]), {})
    assert moved.inputs.batch.states.slots[:2].tolist() == [8, -1]
    others = device_batch()
    enter(others, GREEDY, "a")
    assert build(others, decode("a")).inputs.batch.states is None


def test_more_requests_than_two_steps_can_have_are_refused():
    batch = device_batch()
    enter(batch, GREEDY, *(f"r{i}" for i in range(2 * MAX_SEQS)))
    with pytest.raises(RuntimeError, match="more than 12 requests are live"):
        enter(batch, GREEDY, "one more")


def test_views_of_a_shape_stay_and_one_copy_brings_them():
    batch = device_batch()
    enter(batch, GREEDY, "a", "b")
    first = build(batch, decode("a"), decode("b")).inputs
    second = build(batch, decode("a", 9), decode("b", 8)).inputs
    assert first is second
    assert second.batch.input_ids.tolist() == [9, 8]
    memory = first.batch.input_ids.untyped_storage().data_ptr()
    assert first.batch.block_table.untyped_storage().data_ptr() == memory
    assert all(t.data_ptr() % 16 == 0 for t in (first.uniforms, first.top_k, first.batch.seq_lens))
