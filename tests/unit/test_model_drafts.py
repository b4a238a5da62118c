"""A draft model beside a runner: what it is fed, what it guesses, and when it is asked to."""

import random
from collections import deque
from concurrent.futures import Future
from dataclasses import replace
from itertools import count

import pytest

from streamserve.config import CacheConfig, SchedulerConfig, SpeculativeConfig
from streamserve.core.kv_cache_manager import KVCacheManager
from streamserve.core.model_drafts import ModelDrafts
from streamserve.core.plan import ModelRunnerOutput
from streamserve.core.prefill import PrefillBudget
from streamserve.core.request import FinishReason, Request
from streamserve.core.sampling_params import SamplingParams
from streamserve.core.step import Step
from streamserve.core.step_time import StepShape, StepTimeModel
from streamserve.runner.drafting import DraftingRunner
from streamserve.runner.model_drafter import ModelDrafter
from tests.unit.machines import Machine, linear, plateau
from tests.unit.simulated import (
    VOCAB_SIZE,
    Harness,
    SimulatedRunner,
    guesses,
    naive_output,
)


class Stepper:
    """A ``ModelRunner`` whose steps a test ends."""

    def __init__(self, simulated: SimulatedRunner) -> None:
        self.simulated = simulated
        self.waiting: deque[Future] = deque()
        self.num_steps = 0
        self.duration_s: float | None = None

    def launch(self, plan) -> None:
        self.simulated.launch(plan)
        self.num_steps += 1

    def sample(self, step_id, masks=None, *, hear=None) -> Future:
        self.waiting.append(Future())
        if hear is not None:
            self.waiting[-1].add_done_callback(hear)
        return self.waiting[-1]

    def retire(self) -> None:
        output = replace(self.simulated.retire(), duration_s=self.duration_s)
        self.waiting.popleft().set_result(output)


class DraftModel(Stepper):
    """A step is over when it is sampled. It knows the target's next token, if its cache is right.

    ``accuracy`` of its guesses are right, whatever it has read.
    """

    def __init__(self, simulated: SimulatedRunner, accuracy: float = 1.0) -> None:
        super().__init__(simulated)
        self.rng = random.Random(1)
        self.accuracy = accuracy
        self.num_guesses: list[int] = []  # in each step
        self.fed: list[list[int]] = []
        self.num_tokens: list[int] = []  # of each step

    def launch(self, plan) -> None:
        for request in self.simulated.requests.values():
            request.end = None  # it goes back behind guesses that were wrong
        self.is_empty = not plan.scheduled
        if self.is_empty:
            for src, dst in plan.block_copies:
                self.simulated.memory[dst] = list(self.simulated.memory[src])
                self.simulated.salt_of_block[dst] = set(self.simulated.salt_of_block[src])
            return
        super().launch(plan)
        self.num_guesses.append(sum(s.sample for s in plan.scheduled))
        self.fed += [s.token_ids for s in plan.scheduled]
        self.num_tokens.append(plan.num_tokens)

    def sample(self, step_id, masks=None) -> Future:
        future = super().sample(step_id)
        if self.is_empty:
            self.waiting.pop().set_result(ModelRunnerOutput(step_id, []))
            return future
        self.retire()
        for sampled in future.result().sampled_token_ids:
            if sampled and self.rng.random() >= self.accuracy:
                sampled[0] = (sampled[0] + 1) % VOCAB_SIZE
        return future


class DraftedRunner:
    """What a `Harness` steps: a simulated target with a simulated draft model."""

    def __init__(self, target: SimulatedRunner, draft: SimulatedRunner, accuracy: float) -> None:
        draft.has_cascade = False
        draft.max_tokens += 16  # what is sampled, of 16 seats at most
        draft.salts, draft.num_public = target.salts, target.num_public
        self.target, self.draft = Stepper(target), DraftModel(draft, accuracy)
        drafter = ModelDrafter(
            self.draft,
            block_size=target.block_size,
            vocab_size=VOCAB_SIZE,
            max_num_batched_tokens=draft.max_tokens,
        )
        self.runner = DraftingRunner(self.target, drafter)
        self.results: deque[Future] = deque()

    def __getattr__(self, name: str):
        return getattr(self.target.simulated, name)

    def launch(self, plan) -> None:
        self.runner.launch(plan)
        self.results.append(self.runner.sample(plan.step_id))

    def retire(self):
        self.target.retire()
        return self.results.popleft().result()

    def fail(self, index: int) -> int:
        step_id = self.target.simulated.fail(index)
        future, result = self.target.waiting[index], self.results[index]
        del self.target.waiting[index], self.results[index]
        future.set_exception(RuntimeError("out of luck"))
        assert isinstance(result.exception(), RuntimeError)
        return step_id


def drafting(num_tokens: int) -> SpeculativeConfig:
    return SpeculativeConfig(num_speculative_tokens=num_tokens, method="draft_model", model="small")


def drafted(num_drafts: int = 4, accuracy: float = 1.0, **options) -> Harness:
    some = Harness(speculative=drafting(num_drafts), **options)
    cache = CacheConfig(num_blocks=some.kv.num_blocks, block_size=some.kv.block_size)
    some.runner = DraftedRunner(some.runner, SimulatedRunner(cache, some.config), accuracy)
    return some


@pytest.mark.parametrize("depth", [1, 2])
def test_right_guesses_save_steps(depth):
    """Not behind the prompt: a first token waits for none. And they find room in a new block."""
    some = drafted(4, max_steps_in_flight=depth)
    request = some.add([1, 2, 3], max_tokens=18)
    plans = some.run()
    assert request.output_token_ids == naive_output(request, 18)
    assert [[s.sample for s in plan.scheduled] for plan in plans] == [[1], [1], [5], [5], [5], [1]]
    assert some.runner.draft.num_guesses == [0, *[1] * 4, *[1] * 4, *[1] * 4, 0, 0]
    stats = some.scheduler.speculation_stats
    assert stats.num_accepted_tokens == stats.num_draft_tokens == 12


def test_no_guess_goes_past_the_end():
    some = drafted(8)
    request = some.add([1, 2, 3], max_tokens=6)
    assert [[s.sample for s in plan.scheduled] for plan in some.run()] == [[1], [1], [4]]
    assert request.num_output_tokens == 6


def test_memory_that_others_need_is_not_taken_for_guesses():
    """Two requests fill the memory at their ends. Guesses stop where a block does."""
    some = drafted(5, num_blocks=6, block_size=4)
    both = [some.add([i, i + 1, 5], max_tokens=9) for i in range(2)]
    some.run()
    assert [r.num_preemptions for r in both] == [0, 0]
    assert some.scheduler.speculation_stats.num_accepted_tokens > 0
    for request in both:
        assert request.output_token_ids == naive_output(request, 9)


def test_who_may_not_draft_is_not_guessed_for():
    some = drafted(3)
    free, held = some.request([1, 2], max_tokens=9), some.request([3, 4], max_tokens=9)
    held.may_draft = False
    for request in (free, held):
        some.scheduler.add(request)
    for plan in some.run():
        assert set(plan.num_drafts) <= {free.request_id}
    assert held.output_token_ids == naive_output(held, 9)


def run_world(seed: int) -> DraftedRunner:
    """Prefixes that are shared, too little memory, aborts, steps that fail."""
    rng = random.Random(seed)
    some = drafted(
        rng.choice([1, 3, 6]),
        rng.choice([0.0, 0.6, 1.0, 1.0]),
        num_blocks=rng.choice([30, 64]),
        block_size=rng.choice([2, 4, 8]),
        max_num_seqs=rng.choice([2, 6]),
        max_num_batched_tokens=rng.choice([8, 32]),
        max_steps_in_flight=rng.choice([1, 2]),
        max_model_len=60,
        policy=rng.choice(["fcfs", "sjf"]),
    )
    fails = rng.random() < 0.3
    shared = [rng.randrange(VOCAB_SIZE) for _ in range(rng.choice([0, 7, 12]))]
    requests = []
    for _ in range(rng.randint(1, 7)):
        prompt = shared + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 15))]
        requests.append(some.add(prompt, max_tokens=rng.randint(1, 20)))
        for _ in range(rng.randint(0, 3)):
            some.step()
            if fails and rng.random() < 0.3 and some.launch() is not None:
                some.fail()  # results come in order
                while some.runner.target.waiting:
                    some.retire()
    if rng.random() < 0.3 and some.scheduler.has_unfinished:
        some.scheduler.finish(rng.choice(requests), FinishReason.ABORT)
    some.run()
    for request in requests:
        if request.finish_reason is FinishReason.LENGTH:
            expected = naive_output(request, request.sampling_params.max_tokens)
            assert request.output_token_ids == expected, seed
    stats = some.scheduler.speculation_stats
    if some.runner.draft.accuracy == 1.0 and not fails:
        assert stats.num_accepted_tokens == stats.num_draft_tokens, seed
    # Nothing is copied for it in a step that fails, and simulated memory forgives no such read.
    assert fails or not some.runner.runner._has_failed, seed
    some.runner.num_accepted_tokens = stats.num_accepted_tokens
    return some.runner


def test_random_worlds():
    """Whatever the draft model says, the answers are right; and what it reads is what it should."""
    assert sum(run_world(seed).num_accepted_tokens for seed in range(100)) > 1000


@pytest.mark.parametrize("depth", [1, 2])
def test_forced_tokens_come_first_and_guesses_go_on_behind_them(depth):
    """While they come, all guesses are wrong; what was read of these does not stay."""
    some = drafted(3, 0.0, max_steps_in_flight=depth)
    request = some.add([1, 2, 3], max_tokens=60)
    right = guesses(3)

    def find(limit: int) -> list[int]:
        return right(request, min(limit, 4)) if request.num_output_tokens < 20 else []

    some.scheduler.guide(request, find)
    stats = some.scheduler.speculation_stats
    while request.num_output_tokens < 20:
        some.step()
    assert stats.num_forced_tokens == stats.num_accepted_tokens == stats.num_draft_tokens == 16
    some.runner.draft.accuracy = 1.0
    for _ in range(2):
        some.step()
    before = replace(stats)
    some.run()
    assert request.output_token_ids == naive_output(request, 60)
    num_drafted = stats.num_draft_tokens - before.num_draft_tokens
    assert num_drafted == stats.num_accepted_tokens - before.num_accepted_tokens > 15
    assert stats.num_forced_tokens == 16


def test_what_was_not_fed_while_guesses_did_not_pay_is_fed_later():
    """Whenever there are guesses they are right; prefixes of others have no part in it."""
    num_accepted = 0
    for seed in range(60):
        rng = random.Random(seed)
        most = rng.choice([1, 4])
        some = drafted(
            most,
            enable_prefix_caching=False,
            num_blocks=rng.choice([40, 100]),
            max_num_batched_tokens=rng.choice([16, 64]),
            max_steps_in_flight=rng.choice([1, 2]),
        )
        pays = {"now": True}

        def best_count(requests, *_, rng=rng, most=most, pays=pays) -> int:
            if rng.random() < 0.2:
                pays["now"] = not pays["now"]
            return most if pays["now"] else 0

        some.scheduler._speculator._best_count = best_count
        requests = []
        for _ in range(rng.randint(1, 4)):
            prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.choice([3, 20, 120]))]
            requests.append(some.add(prompt, max_tokens=rng.randint(1, 30)))
            some.step()
            if rng.random() < 0.3 and some.launch() is not None:
                some.fail()
                while some.runner.target.waiting:
                    some.retire()
        some.run()
        assert not some.runner.runner._has_failed, seed
        for request in requests:
            if request.finish_reason is FinishReason.LENGTH:  # or it failed twice, once alone
                expected = naive_output(request, request.sampling_params.max_tokens)
                assert request.output_token_ids == expected, seed
        stats = some.scheduler.speculation_stats
        assert stats.num_accepted_tokens == stats.num_draft_tokens, seed
        num_accepted += stats.num_accepted_tokens
    assert num_accepted > 300


def test_while_guesses_do_not_pay_the_draft_model_rests():
    some = drafted(4)
    some.scheduler._speculator._best_count = lambda *_: 0
    some.add([1, 2, 3], max_tokens=90)
    plans = some.run()
    assert len(plans) == 90
    assert some.runner.draft.num_steps == 1  # of the prompt, when nobody had been asked
    some.scheduler._speculator._best_count = lambda *_: 4
    some.add([3, 2, 1] * 50, max_tokens=20)
    some.run()
    late = [len(token_ids) for token_ids in some.runner.draft.fed[1:] if len(token_ids) > 2]
    assert late == [65, 65, 24], "in parts: of 150 tokens, four steps' and the one that is sampled"
    many = [some.add([i, 2, 1] * 20, max_tokens=20) for i in range(5)]
    some.scheduler._speculator._best_count = lambda *_: 0
    while any(request.num_output_tokens < 2 for request in many):
        some.step()
    some.scheduler._speculator._best_count = lambda *_: 4
    some.run()
    assert max(some.runner.draft.num_tokens) == 64 + 16
    assert not some.runner.runner._has_failed
    stats = some.scheduler.speculation_stats
    assert stats.num_accepted_tokens == stats.num_draft_tokens > 8


class Broken(DraftModel):
    def launch(self, plan) -> None:
        if self.num_steps == 4:
            raise RuntimeError("the draft model is broken")
        super().launch(plan)


def test_a_draft_model_that_fails_costs_its_guesses(caplog):
    some = drafted(4)
    some.runner.draft.__class__ = Broken
    request = some.add([1, 2, 3], max_tokens=30)
    plans = some.run()
    assert request.output_token_ids == naive_output(request, 30)
    assert [record.message for record in caplog.records] == [
        "the drafter has failed: nothing is drafted any more"
    ]
    assert sum(any(plan.num_drafts.values()) for plan in plans) == 1  # it was told by then
    assert plans[-1].scheduled[0].sample == 1


def test_what_the_draft_model_takes_is_told():
    """Feeding it is part of the step, guessing is not, and neither is the host's time."""
    some = drafted(3)
    some.runner.target.duration_s = 1.0
    ticks = count()
    some.runner.runner._clock = lambda: float(next(ticks))
    outputs, told = [], []
    update, host_time = some.scheduler.update, some.scheduler._speculator.host_time
    some.scheduler.update = lambda output: outputs.append(output) or update(output)
    host_time.observe = lambda now, num, device_s, *, overlaps: told.append(device_s)
    some.add([1, 2, 3], max_tokens=8)
    some.run()
    assert [(output.duration_s, output.drafting_s) for output in outputs] == [
        (2.0, None),  # it is fed the prompt
        (2.0, 1.0),
        (2.0, 1.0),
        (2.0, None),
    ]
    assert told == [2.0, 3.0, 3.0, 2.0]


def test_ids_that_one_model_lacks():
    """A token past the draft model's vocabulary is fed as another; a guess past ours is none."""
    some = drafted(3)
    some.runner.runner._drafter._vocab_size = 6
    request = some.add([1, 2, 3], max_tokens=40)
    some.run()
    assert request.output_token_ids == naive_output(request, 40)
    assert max(request.output_token_ids) >= 6
    fed = [token for ids in some.runner.draft.fed for token in ids]
    assert max(fed) == 5


def speculator(machine: Machine, num_tokens: int = 5, **config) -> ModelDrafts:
    whole = SchedulerConfig(max_model_len=4096, speculative=drafting(num_tokens), **config)
    return ModelDrafts(whole, whole.speculative, StepTimeModel(machine.profile()))


def ask(
    one: ModelDrafts,
    num_streams: int,
    rate: float = -1.0,
    block_size: int = 64,
    num_running: int = 1,
    num_state_slots: int = 0,
) -> Step:
    """A step of decodes behind 41 tokens, with what is wanted behind it."""
    cache = CacheConfig(num_blocks=3, block_size=block_size, num_state_slots=num_state_slots)
    kv = KVCacheManager(cache)
    step = Step(0, PrefillBudget(0, None, StepShape(), 0.0))
    for i in range(num_streams):
        params = SamplingParams(temperature=0.0, max_tokens=200)
        request = Request(f"r{i}", [1] * 40, params, arrival_time=0.0, seed=0)
        request.max_num_tokens = 240
        request.token_ids.append(2)
        request.num_computed_tokens = 40
        request.block_table = [0]
        request.is_in_runner = True
        request.draft_rate = rate
        step.add(request, 1, [])
    one.ask(step.requests, step.plan, kv, num_running)
    return step


def counts(one: ModelDrafts, num_streams: int, rate: float) -> set[int]:
    return set(ask(one, num_streams, rate).plan.num_drafts.values())


def test_as_many_are_wanted_as_pay():
    assert counts(speculator(Machine(plateau)), 1, 0.95) == {5}
    assert counts(speculator(Machine(plateau)), 1, 0.5) <= {1, 2}
    assert counts(speculator(Machine(plateau)), 1, 0.1) == {0}
    assert counts(speculator(Machine(plateau)), 8, 0.9) == {5}
    assert counts(speculator(Machine(linear)), 16, 0.9) == {0}
    assert counts(speculator(Machine(plateau)), 64, 1.0) == {0}, "no rows are left"
    assert counts(speculator(Machine(plateau), itl_target_ms=21.0), 1, 0.95) == {0}


@pytest.mark.parametrize(("num_running", "num_blocks"), [(2, 2), (3, 1)])
def test_guesses_take_no_block_that_somebody_is_about_to_need(num_running, num_blocks):
    step = ask(speculator(Machine(plateau)), 1, 0.95, block_size=41, num_running=num_running)
    (request,) = step.requests
    assert len(request.block_table) == num_blocks
    assert step.plan.scheduled[0].new_block_ids == request.block_table[1:]


@pytest.mark.parametrize(("num_slots", "wanted"), [(5, {1}), (16, {2}), (40, {5}), (3, {0})])
def test_more_guesses_than_find_a_slot_for_a_state_are_not_made(num_slots, wanted):
    step = ask(speculator(Machine(plateau)), 4, 0.95, num_state_slots=num_slots)
    assert set(step.plan.num_drafts.values()) == wanted


def test_what_a_guess_takes_is_learnt():
    one = speculator(Machine(plateau))
    for _ in range(60):
        plan = ask(one, 1, 0.95).plan
        drafts = {request_id: [1] * count for request_id, count in plan.num_drafts.items()}
        one.drafted(plan, ModelRunnerOutput(0, [[1]], drafts=drafts, drafting_s=0.03 * 4))
    assert not any(plan.num_drafts.values()), "each takes longer than a step"
    assert any(ask(one, 8, 0.95).plan.num_drafts.values()), "of eight streams nothing is known"


def test_how_often_guesses_are_right_is_learnt():
    one = speculator(Machine(plateau))
    request = Request("r", [1], SamplingParams(), arrival_time=0.0, seed=0)
    for _ in range(40):
        one.verified(request, 5, 0)
    assert request.draft_rate < 0.1
    new = ask(one, 1)
    assert not any(new.plan.num_drafts.values()), "a new text is as hard to guess as others"
    rate, num_steps = new.requests[0].draft_rate, 0
    while not any((step := ask(one, 1, rate)).plan.num_drafts.values()):
        assert step.requests[0].draft_rate > rate
        rate = step.requests[0].draft_rate
        num_steps += 1
    assert 50 < num_steps < 500, "and now and then it is tried again"
    for _ in range(40):
        one.verified(request, 5, 5)
    assert request.draft_rate > 0.95
    stats = one.stats
    assert (stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens) == (80, 400, 200)
