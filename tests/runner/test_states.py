"""Models whose layers keep a state of constant size, behind the real scheduler and runner.

The judge is transformers, over prompt and answer: if every token is the likeliest after what stands
before it, the judge's own greedy answer is the same. Whatever happens to a request, its state must
be that of just its own tokens.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"

import transformers

import streamserve_kernels
from streamserve.config import SpeculativeConfig
from streamserve.core.plan import ModelRunner
from streamserve.core.request import Request
from streamserve.core.sampling_params import SamplingParams
from streamserve.core.speculation import Propose
from streamserve.errors import OutOfMemoryError
from streamserve.models import kv_bytes_per_block, load_model, state_bytes
from streamserve.runner.build import build_runner, new_kv_cache
from streamserve.runner.cuda.build import build_cuda_runner
from streamserve.runner.cuda.step_key import StepLadder
from streamserve.runner.memory import AvailableMemory, plan_memory
from tests.models.native import HYBRID
from tests.models.random_model import random_model
from tests.runner.loop import BLOCK_SIZE, Loop, forget
from tests.runner.tiny_llama import CPU

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCAB = 97
NUM_SLOTS = 16
MAX_LEN = 120
NUM_GREEDY = 20
NUM_DRAFTS = 3
LOOKUP = SpeculativeConfig(num_speculative_tokens=NUM_DRAFTS, prompt_lookup_max=2)
SEEDED = {"temperature": 1.2, "top_p": 0.95, "presence_penalty": 0.3}


@dataclass
class Served:
    judge: torch.nn.Module
    runner: ModelRunner

    def drawn(self, request: Request) -> list[int]:
        """What the judge finds likeliest at each place of an answer."""
        with torch.inference_mode():
            logits = self.judge(torch.tensor([request.token_ids])).logits[0]
        drawn: list[int] = logits[request.num_prompt_tokens - 1 : -1].argmax(-1).tolist()
        return drawn

    def check(self, requests: list[Request]) -> None:
        for request in requests:
            assert request.output_token_ids == self.drawn(request), request.request_id

    def loop(self, **options: object) -> Loop:
        forget(self.runner)
        defaults = {"num_state_slots": NUM_SLOTS, "max_num_batched_tokens": 24}
        return Loop(self.runner, max_model_len=MAX_LEN, **{**defaults, **options})


def serve(name: str, directory: Path, *, on_device: bool = False) -> Served:
    """The runner of a host, or that of a device on a host, with naive kernels."""
    judge = random_model(HYBRID[name]())
    judge.save_pretrained(directory)
    model = load_model(
        directory,
        dtype=torch.float32,
        device=CPU,
        kernels=streamserve_kernels.load(CPU, "naive" if on_device else "cpu"),
        max_model_len=MAX_LEN,
    )
    per_block = kv_bytes_per_block(model.spec, BLOCK_SIZE, model.dtype)
    per_state = state_bytes(model.spec, model.dtype)
    memory = plan_memory(
        available=AvailableMemory(2**40, "a test"),
        weight_bytes=model.nbytes,
        step_buffer_bytes=0,
        kv_bytes_per_block=per_block,
        block_size=BLOCK_SIZE,
        max_model_len=MAX_LEN,
        max_num_seqs=8,
        kv_cache_memory=2 * NUM_SLOTS * per_state + 240 * per_block,
        state_bytes=per_state,
    )
    assert memory.num_state_slots == NUM_SLOTS
    num_sampled = 8 * (1 + NUM_DRAFTS)
    sizes = {"max_num_batched_tokens": 48}
    if not on_device:
        return Served(judge, build_runner(model, memory, **sizes, max_num_sampled=num_sampled)[0])
    ladder = StepLadder(48, 8, num_drafts=NUM_DRAFTS, max_num_sampled=num_sampled)
    caches = new_kv_cache(model.spec, memory, model.dtype, CPU, model.kernels)
    return Served(judge, build_cuda_runner(model, memory, ladder, **sizes, kv_caches=caches)[0])


# Each kind of state, alone and beside others; families' other settings have no states of their own.
KEPT = (
    "qwen3-next",
    "qwen3.5-last",
    "granite-4",
    "lfm2-biases",
    "lfm3",
    "falcon-h1",
    "nemotron-h",
    "nemotron-h-biases",
)


@pytest.fixture(scope="module", params=KEPT)
def served(request, tmp_path_factory) -> Iterator[Served]:
    served = serve(request.param, tmp_path_factory.mktemp("checkpoint"))
    yield served
    served.runner.close()


def tokens(count: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, VOCAB) for _ in range(count)]


def requests_of(prompts: list[list[int]], name: str = "r", **params: object) -> list[Request]:
    options = SamplingParams(**{"temperature": 0.0, "max_tokens": NUM_GREEDY, **params})
    return [
        Request(f"{name}{i}", prompt, options, arrival_time=0.0, seed=100 + i)
        for i, prompt in enumerate(prompts)
    ]


PROMPTS = [tokens(length, length) for length in (31, 1, 50, 13, 44, 7)]


def num_computed(loop: Loop) -> int:
    return sum(plan.num_tokens for plan in loop.plans)


@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_a_crowd_in_chunks_gets_the_judges_tokens(served, steps_in_flight):
    loop = served.loop(prefix=False, max_steps_in_flight=steps_in_flight, max_num_batched_tokens=9)
    requests = requests_of(PROMPTS)
    loop.run(requests)
    served.check(requests)


@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_prefixes_go_on_from_states_that_were_kept(served, steps_in_flight):
    loop = served.loop(max_steps_in_flight=steps_in_flight)
    system = tokens(40, 7)
    prompts = [system + tokens(9, i) for i in range(3)]
    first = requests_of(prompts)
    loop.run(first)
    again = requests_of(prompts, "again")
    loop.run(again)
    turns = requests_of([request.token_ids + tokens(5, 5) for request in again], "turn")
    loop.run(turns)
    served.check([*first, *again, *turns])
    assert sum(len(plan.state_copies) for plan in loop.plans) >= 2 + 3 + 3
    assert all(request.num_cached_tokens >= 40 for request in [*again, *turns])
    # The last token of an answer is computed where somebody goes on behind it.
    cached = [request.num_cached_tokens for request in turns]
    assert cached == [request.num_tokens - 1 for request in again]


def test_who_is_preempted_goes_on_with_the_same_tokens(served):
    loop = served.loop(num_blocks=34, max_steps_in_flight=2)
    requests = requests_of(PROMPTS)
    loop.run(requests)
    assert sum(request.num_preemptions for request in requests) > 0
    served.check(requests)


def test_few_slots_serve_many_requests(served):
    loop = served.loop(num_state_slots=2)
    requests = requests_of(PROMPTS)
    loop.run(requests)
    assert max(len(plan.scheduled) for plan in loop.plans) == 2
    served.check(requests)


def test_seeded_answers_do_not_depend_on_the_batch(served):
    alone = [
        served.loop(prefix=False).run([request])[0] for request in requests_of(PROMPTS, **SEEDED)
    ]
    assert served.loop(max_steps_in_flight=2).run(requests_of(PROMPTS, **SEEDED)) == alone


def test_several_answers_share_the_prompt(served):
    loop = served.loop()
    source, *others = requests_of([PROMPTS[2]] * 4)
    loop.scheduler.add(source)
    loop.scheduler.add_choices(source, others)
    while loop.scheduler.has_unfinished:
        loop.turn()
    assert num_computed(loop) == 50 + 3 * 2 + 4 * (NUM_GREEDY - 1)
    served.check([source, *others])


def often_right(answers: dict[tuple[int, ...], list[int]]) -> Propose:
    """Guesses from what was answered to a prompt; two of five in a row are other tokens."""

    def propose(request: Request, max_tokens: int) -> list[int]:
        answer = answers[tuple(request.token_ids[: request.num_prompt_tokens])]
        first = request.num_output_tokens
        guesses = answer[first : first + max_tokens]
        return [(token + (i % 5 > 2)) % VOCAB for i, token in enumerate(guesses, first)]

    return propose


DRAFTING = {
    "alone": {"max_num_seqs": 1},
    "in a crowd, chunked": {"max_num_batched_tokens": 9, "max_steps_in_flight": 2},
    "preempted": {"num_blocks": 34, "max_steps_in_flight": 2},
}


@pytest.mark.parametrize("options", DRAFTING.values(), ids=DRAFTING)
def test_answers_with_drafts_are_the_judges(served, answers, options):
    loop = served.loop(speculative=LOOKUP, propose=often_right(answers), **options)
    requests = requests_of(PROMPTS)
    loop.run(requests)
    served.check(requests)
    stats = loop.scheduler.speculation_stats
    assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens
    assert sum(len(plan.state_moves) for plan in loop.plans) > 10
    is_preempted = sum(request.num_preemptions for request in requests) > 0
    assert is_preempted == (options.get("num_blocks") == 34)


@pytest.fixture(scope="module")
def answers(served) -> dict[tuple[int, ...], list[int]]:
    """What is answered to the prompts without drafts."""
    return dict(zip(map(tuple, PROMPTS), served.loop().run(requests_of(PROMPTS)), strict=True))


def test_turns_go_on_behind_answers_with_drafts(served, answers):
    loop = served.loop(speculative=LOOKUP, propose=often_right(answers), max_steps_in_flight=2)
    first = requests_of(PROMPTS)
    loop.run(first)
    loop.scheduler._speculator._propose = lambda request, max_tokens: []
    turns = requests_of([request.token_ids + tokens(5, 5) for request in first], "turn")
    loop.run(turns)
    served.check([*first, *turns])
    for request, turn in zip(first, turns, strict=True):
        assert turn.num_cached_tokens == request.num_tokens - 1


def test_what_is_looked_up_is_right_at_times(served):
    """Of three tokens that take turns, of which one ends the answer."""
    bias = dict.fromkeys((5, 6, 7), 100.0)
    params = {"logit_bias": bias, "frequency_penalty": 0.9, "stop_token_ids": (7,)}
    plain, drafted = (requests_of(PROMPTS, **params, min_tokens=15) for _ in range(2))
    expected = served.loop().run(plain)
    loop = served.loop(speculative=LOOKUP)
    assert loop.run(drafted) == expected
    assert loop.scheduler.speculation_stats.num_accepted_tokens > 10
    turns = requests_of([request.token_ids + tokens(5, 5) for request in drafted], "turn")
    loop.run(turns)
    served.check(turns)
    found = [turn for turn in turns if turn.num_cached_tokens > turn.num_prompt_tokens - 8]
    # The slot of one that ended early may have gone to others' drafts.
    assert len(found) >= len(turns) - 1


def test_the_runner_of_a_device_moves_states_too(tmp_path):
    served = serve("lfm2", tmp_path, on_device=True)
    plain, drafted = requests_of(PROMPTS, "plain"), requests_of(PROMPTS)
    served.loop().run(plain)
    answers = {tuple(prompt): r.output_token_ids for prompt, r in zip(PROMPTS, plain, strict=True)}
    options = DRAFTING["in a crowd, chunked"]
    loop = served.loop(speculative=LOOKUP, propose=often_right(answers), **options)
    loop.run(drafted)
    served.check([*plain, *drafted])
    assert sum(len(plan.state_moves) for plan in loop.plans) > 10
    served.runner.close()


@pytest.mark.parametrize("is_before", [True, False])
def test_a_step_that_fails_leaves_no_state(served, monkeypatch, is_before):
    """Also where the states have gone on when it fails: it goes on from what was kept before."""
    loop = served.loop()
    first, second = requests_of(PROMPTS[:2])
    loop.scheduler.add(first)
    for _ in range(4):
        loop.turn()
    model = served.runner._model
    broken = breaking(model.forward, is_before=is_before)
    monkeypatch.setattr(model, "forward", broken)
    monkeypatch.setattr(model, "greedy", lambda batch, caches: None)
    plan = loop.scheduler.schedule()
    served.runner.launch(plan)
    with pytest.raises(OutOfMemoryError, match="no memory for this step"):
        served.runner.sample(plan.step_id).result(timeout=120)
    monkeypatch.undo()
    assert loop.scheduler.fail_step(plan.step_id) == []
    loop.run([second])
    served.check([first, second])


def breaking(forward: Callable[..., torch.Tensor], *, is_before: bool) -> Callable[..., None]:
    def broken(batch, caches, logits=None):
        if not is_before:
            forward(batch, caches, logits)
        raise torch.OutOfMemoryError("no memory for this step")

    return broken
