"""All that can happen to requests, through the real scheduler, on an engine's runner."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import count
from typing import Any

import torch

from streamserve.core.pooling import Pooling
from streamserve.core.request import FinishReason, Request
from streamserve.core.sampling_params import SamplingParams
from streamserve.errors import OutOfMemoryError
from tests.fake_cuda.closing import held
from tests.fake_cuda.engine import Engine

_numbers = count()


def prompts(number: int, seed: int = 0, longest: int = 60) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 90) for _ in range(rng.randrange(3, longest))] for _ in range(number)]


def requests(token_ids: list[list[int]], **params: Any) -> list[Request]:
    options = {"temperature": 0.0, "max_tokens": 6, **params}
    return [
        Request(
            f"r{next(_numbers)}", ids, SamplingParams(**options), arrival_time=0.0, seed=100 + i
        )
        for i, ids in enumerate(token_ids)
    ]


def plain(engine: Engine) -> None:
    engine.loop().run(requests(prompts(6)))


def chunks(engine: Engine) -> None:
    engine.loop(max_num_batched_tokens=17).run(requests(prompts(5)))


def alone(engine: Engine) -> None:
    loop = engine.loop(max_steps_in_flight=1)
    for ids in prompts(2):
        loop.run(requests([ids]))


def prefixes(engine: Engine) -> None:
    """Hits up to the middle of a block, or up to a state (copies), and members of a group."""
    loop = engine.loop()
    shared = prompts(1, seed=5)[0] * 4
    token_ids = [shared[:50] + prompt[:20] for prompt in prompts(6, seed=6)]
    loop.run(requests(token_ids))
    loop.run(requests([ids[:-3] for ids in token_ids]))
    assert any(plan.prefix_groups for plan in loop.plans), "no groups"
    assert any(plan.block_copies or plan.state_copies for plan in loop.plans), "no copies"


def seeded(engine: Engine) -> None:
    engine.loop().run(requests(prompts(5), temperature=1.2, top_p=0.95))


def truncated(engine: Engine) -> None:
    engine.loop().run(requests(prompts(5), temperature=0.8, top_k=20, min_p=0.02))


def logprobs(engine: Engine) -> None:
    for number in (0, 3, 20):
        engine.loop().run(requests(prompts(3), logprobs=number))


def penalties(engine: Engine) -> None:
    options = {"presence_penalty": 0.3, "frequency_penalty": 0.2, "repetition_penalty": 1.1}
    engine.loop().run(requests(prompts(5), temperature=0.9, **options))


def many_penalties(engine: Engine) -> None:
    """More than the first table holds."""
    loop = engine.loop()
    for seed in range(3):
        loop.run(requests(prompts(8, seed=seed), frequency_penalty=0.5, max_tokens=2))


def biases(engine: Engine) -> None:
    engine.loop().run(requests(prompts(3), logit_bias={5: 4.0, 7: -3.0}, min_tokens=3))
    engine.loop().run(requests(prompts(3), allowed_token_ids=(4, 5, 6, 7)))


def bad_words(engine: Engine) -> None:
    words = ((5,), (6, 7), (8, 9, 10))
    engine.loop().run(requests(prompts(4), bad_word_ids=words, bad_words=("a", "b", "c")))


def masks(engine: Engine) -> None:
    loop = engine.loop()
    asked = requests(prompts(4))
    loop.masks = {request.request_id: b"\xff\x0f" * 4 for request in asked[::2]}
    loop.run(asked)


def prompt_logprobs(engine: Engine) -> None:
    loop = engine.loop(max_num_batched_tokens=40, **engine.prefix_options)
    loop.run(requests(prompts(3, seed=11), prompt_logprobs=2))


def embeddings(engine: Engine) -> None:
    for seed, kind in enumerate(("last", "mean")):
        pooling = Pooling(kind=kind)  # type: ignore[arg-type]
        asked = requests(prompts(4, seed=seed), max_tokens=1, pooling=pooling)
        loop = engine.loop(max_num_batched_tokens=40, **engine.prefix_options)
        loop.run(asked + requests(prompts(2)))


def adapters(engine: Engine) -> None:
    asked = requests(prompts(5))
    for request, adapter in zip(asked, (0, None, 1, 0, None), strict=True):
        request.adapter, request.cache_salt = adapter, str(adapter)
    engine.loop().run(asked)


def drafts(engine: Engine) -> None:
    """Of each request's first drafts one is right, then none, then all; beside others' prompts.

    (The device that is not there draws nothing but the token 0.)
    """

    def propose(request: Request, max_tokens: int) -> list[int]:
        right = (1, 0, max_tokens)[request.num_output_tokens % 3]
        return [0] * min(right, max_tokens) + [5] * max(max_tokens - right, 0)

    speculative = engine.scheduler.speculative
    config = {"speculative": speculative, "propose": propose}
    for kind, params in DRAWS.items():
        loop = engine.loop(max_num_batched_tokens=40, **config)
        loop.run(requests(prompts(6, seed=3), max_tokens=12, **params))
        rows = [[part.sample for part in plan.scheduled] for plan in loop.plans]
        assert any(max(step) > 1 and 0 in step for step in rows), f"{kind}: beside no prompt"
        stats = loop.scheduler.speculation_stats
        assert 0 < stats.num_accepted_tokens <= stats.num_draft_tokens, kind
        # A head that is not there either guesses nothing but 0.
        is_right = speculative.method != "ngram"
        assert (stats.num_accepted_tokens == stats.num_draft_tokens) == is_right, kind
    loop = engine.loop(num_blocks=6, **config)
    rng = random.Random(7)
    asked = requests([[rng.randrange(3, 90) for _ in range(30)] for _ in range(6)], max_tokens=40)
    loop.run(asked)
    assert sum(request.num_preemptions for request in asked) > 0
    if engine.built.num_host_blocks:
        assert any(plan.loads for plan in loop.plans), "nothing came back"
        assert any(plan.stores for plan in loop.plans), "nothing left"


DRAWS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.2, "top_p": 0.95},
    "penalised": {"temperature": 0.9, "frequency_penalty": 0.2, "repetition_penalty": 1.1},
    "logprobs": {"logprobs": 3, "logit_bias": {5: 4.0}, "min_tokens": 3},
}


def preempted(engine: Engine) -> None:
    """A device that holds two of the six, with a host tier where the engine has one."""
    loop = engine.loop(num_blocks=8)
    rng = random.Random(7)
    token_ids = [[rng.randrange(3, 90) for _ in range(30)] for _ in range(6)]
    for _ in range(2):
        asked = requests(token_ids, max_tokens=24)
        loop.run(asked)
        assert sum(request.num_preemptions for request in asked) > 0
    if engine.built.num_host_blocks:
        assert any(plan.loads for plan in loop.plans), "nothing came back"
        assert any(plan.stores for plan in loop.plans), "nothing left"


def everything(engine: Engine) -> None:
    """As much as the engine takes at once: all seats, and prompts of all lengths."""
    limits, rng = engine.scheduler, random.Random(8)
    loop = engine.loop(
        num_blocks=engine.built.memory.num_blocks,
        max_num_seqs=limits.max_num_seqs,
        max_model_len=limits.max_model_len,
        max_num_batched_tokens=limits.max_num_batched_tokens,
    )
    for turn in range(2):
        asked = []
        for i in range(3 * limits.max_num_seqs):
            length = min(int(rng.paretovariate(0.6)) + 2, limits.max_model_len - 12)
            ids = [rng.randrange(3, 90) for _ in range(length)]
            asked += requests([ids], temperature=i % 2, max_tokens=rng.randrange(1, 12))
        asked += requests([list(range(3, 90))], prompt_logprobs=1, logprobs=turn)
        loop.run(asked)


def cancelled(engine: Engine) -> None:
    loop = engine.loop()
    asked = requests(prompts(5), max_tokens=20)
    for request in asked:
        loop.scheduler.add(request)
    for turn in range(12):
        loop.turn()
        if turn % 3 == 2:
            loop.scheduler.finish(asked[turn // 3], FinishReason.ABORT)
    loop.run(requests(prompts(2)))


def out_of_memory(engine: Engine) -> None:
    """In its forward, in its sampling, and before its inputs are on their way.

    The step behind it has been launched by then: it finds what it refers to, and is well.
    """
    token_ids = prompts(4, longest=40)
    forward = "graph" if engine.target._executor.num_graphs else "chunk_maximum_kernel"
    for name in (forward, "edit_kernel", "_copy_kernel"):
        loop = engine.loop()
        loop.run(requests([[*ids, 5, 6, 7] for ids in token_ids], max_tokens=2))
        for request in requests(prompts(2, seed=3), temperature=1.0, max_tokens=20):
            loop.scheduler.add(request)
        for _ in range(3):
            loop.turn()
        asked = requests(token_ids, temperature=1.0)
        error = torch.OutOfMemoryError("CUDA out of memory")
        with engine.failing(name, error) as left:
            loop.run(asked)
        assert not left, f"no {name} failed"
        assert [type(error) for error in loop.errors] == [OutOfMemoryError], loop.errors
        assert all(request.num_output_tokens == 6 for request in asked)


def failed_capture(engine: Engine) -> None:
    """One shape cannot be captured; the next one can, and the thread is on its stream again."""
    executor, runner = engine.target._executor, engine.target
    if not executor.num_graphs:
        return
    bad, good = list(executor._graphs)[:2]
    removed = [executor._graphs.pop(key) for key in (bad, good)]
    run_eagerly = executor.run_eagerly

    def spoiled(key: Any) -> Any:
        if key == bad and torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        return run_eagerly(key)

    executor.run_eagerly = spoiled  # type: ignore[method-assign]
    executor.want_graphs([bad, good])
    runner.capture_graphs()
    del executor.run_eagerly
    stream = runner.on_device_thread(lambda: torch.cuda.current_stream().cuda_stream)
    found = good in executor._graphs, bad in executor._graphs, stream
    executor._graphs[bad] = removed[0]
    executor._graphs.setdefault(good, removed[1])
    engine.device.findings.clear()  # it was asked for
    assert found == (True, False, 0), found


def asked_before_captured(engine: Engine) -> None:
    """Requests come before anybody had time for the graphs: a step has its own captured."""
    executor, runner = engine.target._executor, engine.target
    removed = dict(executor._graphs)
    executor._graphs.clear()
    runner.on_device_thread(lambda: executor.want_graphs(removed))
    num_replays = executor.num_replays
    loop = engine.loop()
    loop.run(requests(prompts(6)))
    steps = [plan for plan in loop.plans if plan.scheduled]
    assert executor.num_replays - num_replays == (len(steps) if removed else 0)
    runner.capture_graphs()
    assert executor._graphs.keys() == removed.keys()


def closed(engine: Engine) -> dict[str, Any]:
    """Steps are in flight, one was launched and nobody has asked for its sample.

    What was found, and what is held when the runner is closed, by somebody who holds it on.
    """
    loop = engine.loop()
    for request in requests(prompts(3)):
        loop.scheduler.add(request)
    loop.turn()
    plan = loop.scheduler.schedule()
    assert plan is not None
    engine.runner.launch(plan)
    engine.device.findings.clear()
    engine.runner.close()
    if engine.built.adapters is not None:
        engine.built.adapters.close()
    assert all(future.done() and future.exception() is None for future in loop.futures)
    return {"findings": sorted(engine.device.findings), **held(engine.device)}


SCENARIOS: dict[str, Callable[[Engine], None]] = {
    scenario.__name__: scenario
    for scenario in (
        plain, chunks, alone, prefixes, seeded, truncated, logprobs, penalties, many_penalties,
        biases, bad_words, masks, prompt_logprobs, embeddings, preempted, everything, cancelled,
        out_of_memory, failed_capture, asked_before_captured,
    )
}  # fmt: skip
