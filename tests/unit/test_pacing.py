"""The scheduler on machines with a known cost: what a reader, and who waits, may rely on."""

import random

import pytest

from streamserve.core.prefill import (
    FIRST_TOKEN_BASE_S,
    FIRST_TOKEN_BASE_STEPS,
    FIRST_TOKEN_FACTOR,
    MAX_ALLOWANCE_S,
    MAX_STRETCH,
    MIN_CHUNK_TOKENS,
    MIN_SHARE,
    first_token_base,
    share_needed,
)
from streamserve.core.request import Request
from streamserve.core.step_time import StepTimeModel
from tests.unit.machines import LADDER, Machine, TimedHarness, linear, plateau
from tests.unit.simulated import Harness

MACHINES = {
    "plateau": lambda seed: Machine(plateau, sizes=LADDER, seed=seed),
    "linear": lambda seed: Machine(linear, sizes=LADDER, seed=seed),
    "unpadded": lambda seed: Machine(linear, seed=seed),
    "noisy": lambda seed: Machine(linear, sizes=LADDER, noise=0.05, outliers=0.03, seed=seed),
    "noisy plateau": lambda seed: Machine(plateau, noise=0.05, outliers=0.03, seed=seed),
}


def random_mix(harness: TimedHarness, rng: random.Random, num_steps: int) -> None:
    """Prompts and answers of all lengths come and go."""
    for _ in range(num_steps):
        scheduler = harness.scheduler
        while scheduler.num_running + scheduler.num_waiting < 2 or rng.random() < 0.06:
            num_tokens = rng.choice([rng.randint(2, 64), rng.randint(64, 600), 2000])
            harness.add_now(num_tokens, max_tokens=rng.randint(1, 80))
        harness.timed_step()


def mixed(harness: TimedHarness) -> list:
    """Steps in which prompts met decodes."""
    return [s for s in harness.steps if s.chunks and s.decode_shape.num_tokens]


@pytest.mark.parametrize(("target_ms", "over"), [(None, 0.6), (60.0, 0.05), (120.0, 0.05)])
@pytest.mark.parametrize("kind", sorted(MACHINES))
def test_steps_stay_within_the_target(kind, target_ms, over):
    """Where nobody named one, it is what they take on average."""
    num_over = num_steps = 0
    for seed in range(3):
        machine = MACHINES[kind](seed)
        harness = TimedHarness(machine, itl_target_ms=target_ms, max_num_seqs=16)
        rng = random.Random(seed)
        random_mix(harness, rng, 300)  # to settle
        harness.steps.clear()
        random_mix(harness, rng, 700)
        for step in mixed(harness):
            num_steps += 1
            if sum(step.chunks.values()) <= MIN_CHUNK_TOKENS:
                continue
            decode_s = machine.undisturbed(step.decode_shape)
            limit = max(step.target_s, (1.0 + MIN_SHARE) * decode_s)
            num_over += step.undisturbed > limit * 1.02
            # What is over is over by no more than the model may be wrong.
            assert step.undisturbed < limit * 1.35
    assert num_steps > 500
    assert num_over < over * num_steps


@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_a_machine_that_changes_its_speed_is_followed(factor):
    machine = Machine(linear, sizes=LADDER, noise=0.02)
    harness = TimedHarness(machine, itl_target_ms=120.0, max_num_seqs=16)
    rng = random.Random(3)
    random_mix(harness, rng, 400)
    machine.slow_down = factor
    random_mix(harness, rng, 40)
    harness.steps.clear()
    random_mix(harness, rng, 600)
    steps = [s for s in mixed(harness) if sum(s.chunks.values()) > MIN_CHUNK_TOKENS]
    assert len(steps) > 100
    over = [s for s in steps if s.undisturbed > 1.05 * s.target_s]
    assert len(over) < 0.05 * len(steps)
    # And what there is is used: a long prompt's chunks are as large as the target allows.
    full = [
        s for s in steps if max(s.chunks.values()) > 1 and s.shape.num_sampled < s.shape.num_tokens
    ]
    used = sorted(s.undisturbed / s.target_s for s in full)
    assert used[len(used) // 2] > 0.6


def test_alone_a_prompt_gets_everything():
    harness = TimedHarness(Machine(), itl_target_ms=20.0)
    harness.add_now(1200, max_tokens=1)
    harness.add_now(1200, max_tokens=1)
    chunks = []
    while (step := harness.timed_step()) is not None:
        chunks.append(sum(step.chunks.values()))
    assert chunks == [512] * 4 + [352]


def test_prompts_make_progress_when_the_decodes_alone_exceed_the_target():
    harness = TimedHarness(Machine(), itl_target_ms=1.0)
    for _ in range(32):
        harness.add_now(20, max_tokens=1000)
    while harness.scheduler.num_waiting:
        harness.timed_step()
    for _ in range(20):
        harness.timed_step()
    request = harness.add_now(400, max_tokens=5)
    harness.steps.clear()
    while not request.num_output_tokens:
        step = harness.timed_step()
        assert step.decode_shape.num_tokens == 32  # nobody who decodes is left out
        assert sum(step.chunks.values()) >= MIN_CHUNK_TOKENS or request.num_output_tokens
    assert len(harness.steps) <= 400 // MIN_CHUNK_TOKENS


def steady_streams(harness: TimedHarness, count: int) -> None:
    for _ in range(count):
        harness.add_now(20, max_tokens=3000)
    for _ in range(40):
        harness.timed_step()


@pytest.mark.parametrize("rows", [plateau, linear])
def test_a_short_prompt_passes_a_long_one_in_the_middle_of_it(rows):
    harness = TimedHarness(Machine(rows, sizes=LADDER), max_num_seqs=16)
    steady_streams(harness, 8)
    long = harness.add_now(3000, max_tokens=1)
    for _ in range(5):
        harness.timed_step()
    assert 0 < long.num_computed_tokens < 3000
    short = harness.add_now(8, max_tokens=5)
    harness.timed_step()
    assert short.num_output_tokens == 1  # at once
    assert long.num_preemptions == 0
    while not long.num_output_tokens:
        harness.timed_step()
    assert long.num_preemptions == 0


def test_first_come_first_served_lets_nobody_pass():
    harness = TimedHarness(Machine(sizes=LADDER), max_num_seqs=16, policy="fcfs")
    steady_streams(harness, 8)
    long = harness.add_now(1000, max_tokens=1)
    harness.timed_step()
    short = harness.add_now(8, max_tokens=5)
    while not long.num_output_tokens:  # what is left of a step may still go to the other
        assert next(iter(harness.timed_step().chunks)) == long.request_id
    assert short.sort_key > long.sort_key


@pytest.mark.parametrize("seed", range(5))
def test_nobody_starves_behind_shorter_prompts(seed):
    """Short prompts without end, more than the machine can do: ageing bounds the wait in steps."""
    machine = Machine(linear, sizes=LADDER, noise=0.05, outliers=0.02, seed=seed)
    harness = TimedHarness(machine, max_num_seqs=16, max_num_waiting=10**6)
    rng = random.Random(seed)
    steady_streams(harness, 4)
    harness.steps.clear()
    long = harness.add_now(2000, max_tokens=1)
    # Whoever passes it arrives within 2000 × 5 ms; a step takes at least 16 ms.
    num_before = int(2000 * 0.005 / 0.016) + 1
    passing = []
    for _ in range(100_000):
        if long.num_output_tokens:
            break
        if harness.scheduler.num_waiting < 50:
            passing.append(harness.add_now(rng.randint(20, 60), max_tokens=1))
        harness.timed_step()
    late = [r for r in passing if r.arrival_time > long.arrival_time + 2000 * 0.005]
    first = long.arrival_time
    # From when it has aged, no newcomer is before it: only what was queued by then, and itself.
    queued = sum(r.num_prompt_tokens for r in passing if r.arrival_time <= first + 10.0)
    assert len(harness.steps) <= num_before + (queued + 2000) // MIN_CHUNK_TOKENS
    assert all(r.sort_key > long.sort_key for r in late)


def test_a_holder_that_is_overtaken_still_serves_those_who_wait_for_its_prefix():
    harness = TimedHarness(Machine(sizes=LADDER), max_num_seqs=16)
    steady_streams(harness, 4)
    prefix = [7] * 1500
    sharing = []
    for suffix in range(3):
        request = harness.request([*prefix, 8 + suffix], max_tokens=2)
        request.arrival_time = harness.now
        harness.scheduler.add(request)
        sharing.append(request)
    for _ in range(400):
        if all(r.num_output_tokens for r in sharing):
            break
        harness.add_now(30, max_tokens=1)
        harness.timed_step()
    assert all(r.num_output_tokens for r in sharing)
    assert [r.num_cached_tokens >= 1488 for r in sharing] == [False, True, True]


def test_without_a_model_the_token_budget_alone_counts():
    harness = TimedHarness(Machine())
    harness.scheduler.pacer._model = None
    steady_streams(harness, 4)
    harness.add_now(2000, max_tokens=1)
    assert sum(harness.timed_step().chunks.values()) == 512 - 4


def test_a_long_prompt_is_in_time_and_its_steps_are_even():
    """As much in every step as it takes: not little first and a rush in the end."""
    harness = TimedHarness(Machine(linear, sizes=LADDER), max_num_seqs=32)
    steady_streams(harness, 8)
    for _ in range(3):
        harness.steps.clear()
        long = harness.add_now(2000, max_tokens=1)
        while not long.num_output_tokens:
            harness.timed_step()
        alone_s = 2000 * 0.0007 + 4e-7 * 2000 * 1000
        waited = harness.now - long.arrival_time
        # Small chunks take longer than the least that is reckoned with.
        base_s = first_token_base(harness.scheduler.pacer._model)
        assert waited < 1.4 * (base_s + FIRST_TOKEN_FACTOR * alone_s)
        stretches = [
            s.target_s / harness.machine.undisturbed(s.decode_shape) for s in mixed(harness)
        ]
        assert min(stretches) >= 2.0
        assert max(stretches) < 1.3 * stretches[0]


def test_a_prompt_that_has_time_adds_what_the_decodes_take():
    harness = TimedHarness(Machine(linear, sizes=LADDER), max_num_seqs=32)
    steady_streams(harness, 8)
    harness.steps.clear()
    short = harness.add_now(150, max_tokens=1)
    while not short.num_output_tokens:
        harness.timed_step()
    for step in mixed(harness):
        decode_s = harness.machine.undisturbed(step.decode_shape)
        assert step.target_s == pytest.approx(2.0 * decode_s, rel=0.1)


def test_many_short_prompts_at_once_are_hurried():
    harness = TimedHarness(Machine(linear, sizes=LADDER), max_num_seqs=64)
    steady_streams(harness, 2)
    harness.steps.clear()
    burst = [harness.add_now(32, max_tokens=60) for _ in range(60)]
    while not all(r.num_output_tokens for r in burst):
        step = harness.timed_step()
        num_decodes = step.decode_shape.num_tokens
        decode_s = harness.machine.undisturbed(step.decode_shape)
        # Of the prompts that a step takes up, the last may end a little behind its limit.
        stretch = max(MAX_STRETCH, (62 - num_decodes) / num_decodes)
        assert step.seconds < 1.1 * (decode_s + min(stretch * decode_s, MAX_ALLOWANCE_S))
    alone_s = 60 * 32 * 0.0007
    assert harness.now - burst[0].arrival_time < 1.5 * alone_s


def test_more_than_the_machine_can_do_is_served_at_the_largest_stretch():
    harness = TimedHarness(Machine(linear, sizes=LADDER), max_num_seqs=32)
    steady_streams(harness, 8)
    for _ in range(4):
        harness.add_now(3000, max_tokens=1)
    harness.steps.clear()
    for _ in range(40):
        step = harness.timed_step()
        decode_s = harness.machine.undisturbed(step.decode_shape)
        assert step.target_s == pytest.approx((1.0 + MAX_STRETCH) * decode_s, rel=0.1)
        assert step.seconds < (1.2 + MAX_STRETCH) * decode_s


def test_the_share_that_prompts_need_counts_those_before_them():
    model = StepTimeModel(Machine(linear).profile())
    harness = Harness(num_blocks=1024)

    def prompt(num_tokens: int, place: float) -> Request:
        request = harness.request([1] * num_tokens)
        request.arrival_time, request.sort_key = 100.0, (place,)
        return request

    one, other = prompt(200, 1.0), prompt(200, 2.0)
    alone_s = model.prompt_seconds(0, 200)
    due_s = first_token_base(model) + FIRST_TOKEN_FACTOR * alone_s
    assert share_needed(model, [one], 100.0) == pytest.approx(alone_s / due_s)
    assert share_needed(model, [other, one], 100.0) == pytest.approx(2 * alone_s / due_s)
    half_s = model.prompt_seconds(100, 100)
    one.num_computed_tokens = 100  # its own work counts until it is done
    assert share_needed(model, [one], 100.2) == pytest.approx(alone_s / due_s)
    assert share_needed(model, [one, other], 100.2) == pytest.approx((half_s + alone_s) / due_s)
    late = 100.0 + 2.5 * due_s
    assert share_needed(model, [one], late) == pytest.approx(1.5 * alone_s / due_s)
    assert share_needed(model, [one], 200.0) == 1.0


@pytest.mark.parametrize("step_s", [0.005, 0.05])
def test_a_slow_model_has_longer_for_a_first_token(step_s):
    """As many steps as its readers wait for; a fast one has what nobody minds waiting."""
    model = StepTimeModel(Machine(lambda rows: step_s + 0.0001 * rows).profile())
    wanted = max(FIRST_TOKEN_BASE_S, FIRST_TOKEN_BASE_STEPS * step_s)
    assert first_token_base(model) == pytest.approx(wanted, rel=0.05)
