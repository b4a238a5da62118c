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

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"

import transformers

import streamserve_kernels
from streamserve.core.plan import ModelRunner
from streamserve.core.request import Request
from streamserve.core.sampling_params import SamplingParams
from streamserve.errors import OutOfMemoryError
from streamserve.models import kv_bytes_per_block, load_model, state_bytes
from streamserve.runner.build import build_runner
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


@pytest.fixture(scope="module", params=HYBRID)
def served(request, tmp_path_factory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("checkpoint")
    judge = random_model(HYBRID[request.param]())
    judge.save_pretrained(directory)
    model = load_model(
        directory,
        dtype=torch.float32,
        device=CPU,
        kernels=streamserve_kernels.load(CPU, "cpu"),
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
    runner, _ = build_runner(model, memory, max_num_batched_tokens=48)
    yield Served(judge, runner)
    runner.close()


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
