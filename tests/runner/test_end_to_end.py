"""Scheduler, cache, runner and a real (tiny) model: what happens to a request never shows."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from streamserve.core.plan import ModelRunner
from streamserve.core.request import Request
from streamserve.core.sampling_params import SamplingParams
from streamserve.errors import OutOfMemoryError
from streamserve.runner.cuda.model_runner import CudaModelRunner
from tests.runner.loop import BLOCK_SIZE, NUM_BLOCKS, Loop, forget
from tests.runner.tiny_llama import CPU, MAX_LEN, VOCAB, memory_for, runner_of, tiny_llama

pytestmark = pytest.mark.usefixtures("forget_requests")

NUM_HOST_BLOCKS = 300
MAX_TOKENS = 48
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
SEEDED = SamplingParams(temperature=1.2, top_p=0.95, max_tokens=24, presence_penalty=0.3)


@pytest.fixture(scope="module", params=["naive", "cpu", "naive on a device"])
def build(request, tmp_path_factory):
    """Makes runners of one model: on the host, or as for a device (here the CPU too)."""
    backend, _, on_device = request.param.partition(" ")
    model = tiny_llama(tmp_path_factory.mktemp("model"), backend=backend)
    memory = memory_for(model, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)

    def build(max_num_batched_tokens: int = MAX_TOKENS) -> ModelRunner:
        return runner_of(
            model, memory, max_num_batched_tokens, NUM_HOST_BLOCKS, on_device=bool(on_device)
        )

    return build


@pytest.fixture(scope="module")
def runner(build) -> Iterator[ModelRunner]:
    runner = build()
    yield runner
    runner.close()


def model_of(runner: ModelRunner):
    return runner._executor.model if isinstance(runner, CudaModelRunner) else runner._model


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(rng.randrange(3, 60))] for _ in range(count)]


def requests(token_ids: list[list[int]], params=GREEDY, prefix="r") -> list[Request]:
    return [
        Request(f"{prefix}{i}", ids, params, arrival_time=0.0, seed=100 + i)
        for i, ids in enumerate(token_ids)
    ]


def alone(runner, token_ids, params=GREEDY) -> list[list[int]]:
    return [Loop(runner, prefix=False).run([request])[0] for request in requests(token_ids, params)]


@pytest.fixture(scope="module")
def expected(runner):
    token_ids = prompts(6)
    return {
        "prompts": token_ids,
        "greedy": alone(runner, token_ids),
        "seeded": alone(runner, token_ids, SEEDED),
    }


def test_solo_is_the_model_without_a_cache(build, expected):
    """The whole sequence in one forward, again for each token."""
    plain = build(MAX_LEN)
    try:
        for prompt, output in zip(expected["prompts"][:2], expected["greedy"], strict=False):
            for count in range(len(output)):
                params = SamplingParams(temperature=0.0, max_tokens=1)
                request = Request("x", prompt + output[:count], params, arrival_time=0, seed=0)
                loop = Loop(plain, prefix=False, max_num_batched_tokens=MAX_LEN)
                assert loop.run([request]) == [[output[count]]]
                forget(plain, ["x"])
    finally:
        plain.close()


@pytest.mark.parametrize("kind", ["greedy", "seeded"])
@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_batched_is_solo(runner, expected, kind, steps_in_flight):
    params = GREEDY if kind == "greedy" else SEEDED
    loop = Loop(runner, prefix=False, max_steps_in_flight=steps_in_flight)
    assert loop.run(requests(expected["prompts"], params)) == expected[kind]


@pytest.mark.parametrize("kind", ["greedy", "seeded"])
@pytest.mark.parametrize("max_num_batched_tokens", [8, 9, 17])
def test_chunked_is_solo(runner, expected, kind, max_num_batched_tokens):
    params = GREEDY if kind == "greedy" else SEEDED
    loop = Loop(runner, prefix=False, max_num_batched_tokens=max_num_batched_tokens)
    assert loop.run(requests(expected["prompts"], params)) == expected[kind]


@pytest.mark.parametrize("kind", ["greedy", "seeded"])
def test_a_prefix_hit_is_solo(runner, expected, kind):
    params = GREEDY if kind == "greedy" else SEEDED
    loop = Loop(runner)
    first = loop.run(requests(expected["prompts"], params))
    again = requests(expected["prompts"], params, prefix="again")
    assert first == expected[kind]
    assert loop.run(again) == expected[kind]
    assert sum(request.num_cached_tokens for request in again) > 100


@pytest.mark.parametrize(("kind", "steps_in_flight"), [("seeded", 1), ("greedy", 2)])
def test_a_shared_prefix_is_solo(runner, kind, steps_in_flight):
    params = GREEDY if kind == "greedy" else SEEDED
    system = prompts(1)[0] * 4
    token_ids = [system[:50] + prompt[:30] for prompt in prompts(7)]
    expected = alone(runner, token_ids, params)
    loop = Loop(runner, max_num_batched_tokens=20, max_steps_in_flight=steps_in_flight)
    assert loop.run(requests(token_ids, params)) == expected
    assert loop.scheduler.prefix_grouping.num_saved_tokens > 1000
    again = Loop(runner, enable_cascade_attention=False)
    assert again.run(requests(token_ids, params, prefix="again")) == expected
    assert again.scheduler.prefix_grouping.num_saved_tokens == 0


@pytest.mark.parametrize("kind", ["greedy", "seeded"])
@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_preempted_is_solo(runner, expected, kind, steps_in_flight):
    params = GREEDY if kind == "greedy" else SEEDED
    loop = Loop(runner, num_blocks=34, max_steps_in_flight=steps_in_flight)
    admitted = requests(expected["prompts"], params)
    assert loop.run(admitted) == expected[kind]
    assert sum(request.num_preemptions for request in admitted) > 0


@pytest.mark.parametrize(
    ("kind", "steps_in_flight", "num_host_blocks"),
    [
        ("greedy", 1, 20),
        ("seeded", 2, 20),
        ("seeded", 1, NUM_HOST_BLOCKS),
        ("greedy", 2, NUM_HOST_BLOCKS),
    ],
)
def test_offloaded_is_solo(runner, expected, kind, steps_in_flight, num_host_blocks):
    """A device that holds one or two of the six: they preempt and evict each other all the time."""
    params = GREEDY if kind == "greedy" else SEEDED
    loop = Loop(
        runner,
        num_blocks=34,
        num_host_blocks=num_host_blocks,
        max_steps_in_flight=steps_in_flight,
    )
    for turn in range(3):
        admitted = requests(expected["prompts"], params, prefix=f"{turn}-")
        assert loop.run(admitted) == expected[kind]
        assert sum(request.num_preemptions for request in admitted) > 0
    stats = loop.scheduler.kv_cache.stats
    assert stats.num_stored_tokens > 100
    if num_host_blocks == NUM_HOST_BLOCKS:
        assert stats.num_host_hit_tokens > 300


def test_parallel_choices_differ_and_each_is_its_own(runner, expected):
    prompt = expected["prompts"][0]
    loop = Loop(runner)
    choices = [
        Request(f"c{i}", prompt, SEEDED, arrival_time=0.0, seed=100, choice_index=i)
        for i in range(4)
    ]
    outputs = loop.run(choices)
    assert outputs[0] == expected["seeded"][0]
    assert len({tuple(output) for output in outputs}) == 4


def test_the_requests_of_a_step_that_fails_go_on_with_the_same_tokens(
    runner, expected, monkeypatch
):
    loop = Loop(runner)
    first, second = requests(expected["prompts"][:2])
    loop.scheduler.add(first)
    for _ in range(3):
        loop.turn()
    model = model_of(runner)
    forward = model.forward

    def broken(batch, caches, logits=None):
        raise torch.OutOfMemoryError("no memory for this step")

    monkeypatch.setattr(model, "forward", broken)
    plan = loop.scheduler.schedule()
    runner.launch(plan)
    with pytest.raises(OutOfMemoryError, match="no memory for this step"):
        runner.sample(plan.step_id).result(timeout=120)
    monkeypatch.setattr(model, "forward", forward)
    assert loop.scheduler.fail_step(plan.step_id) == []
    assert loop.run([second]) == [expected["greedy"][1]]
    assert first.output_token_ids == expected["greedy"][0]


def test_nothing_on_the_device_is_a_graph(runner, expected):
    assert not any(cache.requires_grad for cache in runner._block_caches)
    assert all(cache.device == CPU for cache in runner._block_caches)
