from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch

from streamserve.core.plan import (
    PENDING_TOKEN,
    BlockCopy,
    ModelRunner,
    NewRequest,
    ScheduledRequest,
    SchedulerOutput,
)
from streamserve.core.sampling_params import SamplingParams
from streamserve.errors import DeviceDeadError
from streamserve.runner.cuda import build
from streamserve.runner.cuda.build import assemble
from streamserve.runner.cuda.input_batch import DeviceInputBatch
from streamserve.runner.cuda.model_runner import CudaModelRunner
from streamserve.runner.cuda.step_key import StepLadder
from streamserve.runner.model_runner import TorchModelRunner
from tests.runner.fake_model import BLOCK_SIZE, VOCAB, FakeModel, logits_after

GREEDY = SamplingParams(temperature=0.0)
PROMPT = [3, 1, 4, 1, 5, 9]
OPTIONS = {
    "vocab_size": VOCAB,
    "block_size": BLOCK_SIZE,
    "max_model_len": 64,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "padded_sizes": (1, 2, 4, 8, 16, 32, 40),
}


@pytest.fixture
def model() -> FakeModel:
    return FakeModel()


@pytest.fixture(params=["host", "device"])
def new_runner(request, model):
    """Makes runners for a host that computes, and for a device that is told (here the CPU too)."""

    def new_host_runner(num_blocks=32, model=model, **options) -> TorchModelRunner:
        return TorchModelRunner(model, model.caches(num_blocks), **{**OPTIONS, **options})

    def new_device_runner(num_blocks=32, model=model, **options) -> CudaModelRunner:
        given = {**OPTIONS, **options}
        del given["padded_sizes"]
        ladder = StepLadder(given.pop("max_num_batched_tokens"), given["max_num_seqs"])
        return assemble(model, model.caches(num_blocks), ladder, **given)[0]

    return new_host_runner if request.param == "host" else new_device_runner


@pytest.fixture
def runner(new_runner) -> Iterator[ModelRunner]:
    runner = new_runner()
    yield runner
    runner.close()


def new(request_id: str, token_ids=PROMPT, params=GREEDY, seed=0) -> NewRequest:
    return NewRequest(request_id, list(token_ids), len(token_ids), params, seed, 0)


def prompt_plan(step_id: int, request_id: str = "a", blocks=(7, 2), params=GREEDY, **more):
    return SchedulerOutput(
        step_id,
        new_requests=[new(request_id, params=params)],
        scheduled=[ScheduledRequest(request_id, 0, PROMPT, list(blocks), True, 0)],
        **more,
    )


def decode_plan(step_id: int, position: int, token: int, *, request_id: str = "a", blocks=()):
    scheduled = ScheduledRequest(
        request_id, position, [token], list(blocks), True, position - len(PROMPT) + 1
    )
    return SchedulerOutput(step_id, scheduled=[scheduled])


def result(runner: ModelRunner, plan: SchedulerOutput, masks=None):
    runner.launch(plan)
    return runner.sample(plan.step_id, masks).result(timeout=60)


def greedy_after(token_ids: list[int], count: int) -> list[int]:
    tokens = list(token_ids)
    for _ in range(count):
        tokens.append(int(logits_after(tokens).argmax()))
    return tokens[len(token_ids) :]


def test_a_prompt_and_its_decodes(runner, model):
    expected = greedy_after(PROMPT, 3)
    output = result(runner, prompt_plan(0))
    assert output.step_id == 0
    assert output.sampled_token_ids == [[expected[0]]]
    assert output.logprobs is None
    assert result(runner, decode_plan(1, 6, expected[0])).sampled_token_ids == [[expected[1]]]
    assert result(runner, decode_plan(2, 7, expected[1])).sampled_token_ids == [[expected[2]]]
    assert model.grad_modes == [True] * 3


def test_two_steps_in_flight_resolve_pending_tokens_on_the_device(runner):
    expected = greedy_after(PROMPT, 4)
    runner.launch(prompt_plan(0))
    futures = [runner.sample(0)]
    for step_id, position in ((1, 6), (2, 7), (3, 8)):
        runner.launch(
            decode_plan(
                step_id, position, PENDING_TOKEN, blocks=() if position % BLOCK_SIZE else (9,)
            )
        )
        futures.append(runner.sample(step_id))
    found = [future.result(timeout=60).sampled_token_ids for future in futures]
    assert found == [[[token]] for token in expected]


def test_a_launch_may_come_before_the_sample_of_the_step_before(runner):
    expected = greedy_after(PROMPT, 2)
    runner.launch(prompt_plan(0))
    runner.launch(decode_plan(1, 6, PENDING_TOKEN))
    first, second = runner.sample(0), runner.sample(1)
    assert first.result(timeout=60).sampled_token_ids == [[expected[0]]]
    assert second.result(timeout=60).sampled_token_ids == [[expected[1]]]


def test_an_entry_is_empty_where_no_sample_was_asked_for(runner):
    plan = SchedulerOutput(
        0,
        new_requests=[new("a"), new("b")],
        scheduled=[
            ScheduledRequest("a", 0, PROMPT[:3], [4], False, 0),
            ScheduledRequest("b", 0, PROMPT, [5, 6], True, 0),
        ],
    )
    assert result(runner, plan).sampled_token_ids == [[], greedy_after(PROMPT, 1)]
    rest = ScheduledRequest("a", 3, PROMPT[3:], [8], True, 0)
    output = result(runner, SchedulerOutput(1, scheduled=[rest]))
    assert output.sampled_token_ids == [greedy_after(PROMPT, 1)]


def test_a_model_may_find_the_likeliest_tokens_itself(model):
    model.finds_likeliest = True
    runner = TorchModelRunner(model, model.caches(32), **OPTIONS)
    prompts = {name: [*PROMPT, i] for i, name in enumerate("abc")}  # rows are padded to four
    plan = SchedulerOutput(
        0,
        new_requests=[new(name, prompt) for name, prompt in prompts.items()],
        scheduled=[
            ScheduledRequest(name, 0, prompt, [2 * i, 2 * i + 1], True, 0)
            for i, (name, prompt) in enumerate(prompts.items())
        ],
    )
    expected = [greedy_after(prompt, 2) for prompt in prompts.values()]
    assert result(runner, plan).sampled_token_ids == [first[:1] for first in expected]
    decodes = [ScheduledRequest(name, 7, [PENDING_TOKEN], [], True, 1) for name in prompts]
    output = result(runner, SchedulerOutput(1, scheduled=decodes))
    assert output.sampled_token_ids == [both[1:] for both in expected]
    runner.close()


def test_copies_run_before_the_writes_of_their_plan(runner):
    result(runner, prompt_plan(0, blocks=(7, 2)))
    # "b" shares the first block and gets a copy of the second, which it then writes into.
    plan = SchedulerOutput(
        1,
        new_requests=[new("b", [*PROMPT, 30])],
        scheduled=[ScheduledRequest("b", 6, [30], [7, 11], True, 0)],
        block_copies=[BlockCopy(2, 11)],
    )
    assert result(runner, plan).sampled_token_ids == [greedy_after([*PROMPT, 30], 1)]
    again = result(runner, decode_plan(2, 6, 41))
    assert again.sampled_token_ids == [greedy_after([*PROMPT, 41], 1)]


def test_a_plan_may_schedule_nothing(runner, model):
    result(runner, prompt_plan(0))
    output = result(runner, SchedulerOutput(1, released_ids=["a"]))
    assert output.sampled_token_ids == []
    assert model.num_forwards == 1


def test_a_failed_step_fails_alone(runner, model):
    expected = greedy_after(PROMPT, 3)
    result(runner, prompt_plan(0))
    model.fail_next = MemoryError("no room")
    runner.launch(decode_plan(1, 6, expected[0]))
    failed = runner.sample(1)
    with pytest.raises(MemoryError, match="no room"):
        failed.result(timeout=60)
    # The same tokens again, then on: blocks and requests are what the plans say.
    assert result(runner, decode_plan(2, 6, expected[0])).sampled_token_ids == [[expected[1]]]
    assert result(runner, decode_plan(3, 7, expected[1])).sampled_token_ids == [[expected[2]]]


def test_a_plan_is_booked_even_when_its_forward_fails(runner, model):
    model.fail_next = RuntimeError("once")
    runner.launch(prompt_plan(0, blocks=(7, 2)))
    with pytest.raises(RuntimeError, match="once"):
        runner.sample(0).result(timeout=60)
    # "a" entered and has its blocks; it is not announced again.
    retry = SchedulerOutput(1, scheduled=[ScheduledRequest("a", 0, PROMPT, [], True, 0)])
    assert result(runner, retry).sampled_token_ids == [greedy_after(PROMPT, 1)]
    result(runner, SchedulerOutput(2, released_ids=["a"]))
    assert result(runner, prompt_plan(3)).sampled_token_ids == [greedy_after(PROMPT, 1)]


def test_a_step_in_flight_behind_a_failed_one_serves_the_others(runner, model):
    result(runner, prompt_plan(0, "a", (7, 2)))
    expected = greedy_after(PROMPT, 2)
    model.fail_next = RuntimeError("once")
    runner.launch(prompt_plan(1, "b", (8, 3)))
    failed = runner.sample(1)
    both = SchedulerOutput(
        2,
        scheduled=[
            ScheduledRequest("b", 6, [PENDING_TOKEN], [], True, 1),
            ScheduledRequest("a", 6, [expected[0]], [], True, 1),
        ],
    )
    runner.launch(both)
    output = runner.sample(2).result(timeout=60)
    assert isinstance(failed.exception(), RuntimeError)
    assert output.sampled_token_ids[1] == [expected[1]]


def test_a_plan_that_cannot_be_right_is_its_own_failure(runner):
    runner.launch(SchedulerOutput(0, scheduled=[ScheduledRequest("who", 0, [1], [1], True, 0)]))
    with pytest.raises(KeyError, match="who"):
        runner.sample(0).result(timeout=60)
    assert result(runner, prompt_plan(1)).sampled_token_ids == [greedy_after(PROMPT, 1)]


def test_a_step_is_timed_without_its_waits_for_the_host(model):
    ticks = iter(range(100))
    runner = TorchModelRunner(
        model,
        model.caches(32),
        vocab_size=VOCAB,
        block_size=BLOCK_SIZE,
        max_model_len=64,
        max_num_seqs=4,
        max_num_batched_tokens=32,
        clock=lambda: float(next(ticks)),  # a second between two looks at it
    )
    runner.launch(prompt_plan(0))
    output = runner.sample(0).result()
    runner.close()
    assert output.duration_s == 2.0  # a forward and a sampling


def test_sampling_waits_for_its_call(runner, model):
    runner.launch(prompt_plan(0))
    done = threading.Event()
    mask = bytearray(VOCAB // 8)
    mask[2] = 0b1000  # token 19 alone
    future = runner.sample(0, {"a": bytes(mask)})
    future.add_done_callback(lambda _: done.set())
    assert done.wait(60)
    assert future.result().sampled_token_ids == [[19]]
    # The masked choice is what a pending token stands for.
    output = result(runner, decode_plan(1, 6, PENDING_TOKEN))
    assert output.sampled_token_ids == [greedy_after([*PROMPT, 19], 1)]


def test_steps_are_sampled_in_order(runner):
    with pytest.raises(RuntimeError, match="step 0 cannot be sampled"):
        runner.sample(0)
    runner.launch(prompt_plan(0))
    with pytest.raises(RuntimeError, match=r"\[0\]"):
        runner.sample(1)
    assert runner.sample(0).result(timeout=60).step_id == 0


def test_the_model_is_replaced_only_between_steps(model):
    other = FakeModel()
    runner = TorchModelRunner(model, model.caches(32), **OPTIONS)
    runner.launch(prompt_plan(0))
    with pytest.raises(RuntimeError, match=r"steps are in flight: \[0\]"):
        runner.replace_model(other)
    runner.sample(0).result(timeout=60)
    runner.replace_model(other)
    assert result(runner, decode_plan(1, 6, 1)).sampled_token_ids == [
        [greedy_after([*PROMPT, 1], 1)[0]]
    ]
    assert (model.num_forwards, other.num_forwards) == (1, 1)
    runner.close()


@pytest.mark.parametrize("error", [None, RuntimeError("nobody hears of it")])
def test_a_cancelled_future_does_not_stop_the_device(runner, model, error):
    begun, gate = threading.Event(), threading.Event()
    forward = model.forward

    def held(batch, caches, *logits):
        begun.set()
        gate.wait(60)
        model.fail_next = error
        return forward(batch, caches, *logits)

    model.forward = held
    runner.launch(prompt_plan(0))
    future = runner.sample(0)
    assert begun.wait(60)
    assert future.cancel()
    model.forward = forward
    gate.set()
    expected = greedy_after(PROMPT, 2)
    output = result(runner, decode_plan(1, 6, expected[0] if error else PENDING_TOKEN))
    assert output.sampled_token_ids == [[expected[1]]]


def test_close_finishes_what_was_asked_for(new_runner):
    before = set(threading.enumerate())
    runner = new_runner(8, max_model_len=16, max_num_seqs=2, max_num_batched_tokens=8)
    runner.launch(prompt_plan(0, blocks=(1, 2)))
    future = runner.sample(0)
    runner.launch(decode_plan(1, 6, PENDING_TOKEN))
    runner.close()
    runner.close()
    assert future.result(timeout=0).sampled_token_ids == [greedy_after(PROMPT, 1)]
    assert set(threading.enumerate()) <= before
    with pytest.raises(RuntimeError, match="closed"):
        runner.launch(prompt_plan(2))
    with pytest.raises(RuntimeError, match="closed"):
        runner.sample(1)


def test_logprobs_for_those_who_ask(runner):
    asks = SamplingParams(temperature=0.0, logprobs=2)
    plan = SchedulerOutput(
        0,
        new_requests=[new("a", params=asks), new("b"), new("c", params=asks)],
        scheduled=[
            ScheduledRequest("a", 0, PROMPT, [1, 2], True, 0),
            ScheduledRequest("b", 0, PROMPT, [3, 4], True, 0),
            ScheduledRequest("c", 0, PROMPT[:2], [5], False, 0),
        ],
    )
    output = result(runner, plan)
    (token,) = greedy_after(PROMPT, 1)
    assert output.sampled_token_ids == [[token], [token], []]
    assert [len(entry) for entry in output.logprobs] == [1, 0, 0]
    (logprobs,) = output.logprobs[0]
    expected = torch.log_softmax(logits_after(PROMPT), dim=0)
    assert logprobs.token_id == token
    assert logprobs.logprob == pytest.approx(expected[token].item(), abs=1e-5)
    assert logprobs.top[0] == (token, logprobs.logprob)


def run_alone(new_runner, params, seed: int, count: int, *, preempt_at=(), company=0):
    """The output of one request; it loses its seat before the positions ``preempt_at``."""
    runner = new_runner(
        64, FakeModel(), max_model_len=40, max_num_seqs=8, max_num_batched_tokens=64
    )
    try:
        tokens = list(PROMPT)
        known_to_runner = False
        for position in range(count):
            plan = SchedulerOutput(position)
            if position in preempt_at:
                plan.released_ids.append("a")
                known_to_runner = False
            start, blocks = len(tokens) - 1, []
            if not known_to_runner:
                request = NewRequest("a", list(tokens), len(PROMPT), params, seed, 0)
                plan.new_requests.append(request)
                start, blocks, known_to_runner = 0, list(range(20, 30)), True
            for i in range(company):
                plan.released_ids.append(f"other{i}")
                other = SamplingParams(temperature=1.0 + i / 10, top_p=0.9)
                plan.new_requests.append(new(f"other{i}", params=other, seed=i))
                plan.scheduled.append(
                    ScheduledRequest(f"other{i}", 0, PROMPT, [2 * i, 2 * i + 1], True, position)
                )
            plan.scheduled.insert(
                position % (company + 1),
                ScheduledRequest("a", start, tokens[start:], blocks, True, position),
            )
            output = result(runner, plan)
            tokens += output.sampled_token_ids[position % (company + 1)]
        return tokens[len(PROMPT) :]
    finally:
        runner.close()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=1.5, top_p=0.8, top_k=20),
        SamplingParams(temperature=1.0, repetition_penalty=1.5, frequency_penalty=0.5, min_p=0.01),
    ],
    ids=["plain", "truncated", "penalised"],
)
def test_a_seeded_request_is_the_same_alone_in_company_and_after_preemption(new_runner, params):
    expected = run_alone(new_runner, params, 11, 20)
    assert len(set(expected)) > 3
    assert run_alone(new_runner, params, 11, 20, company=5) == expected
    assert run_alone(new_runner, params, 11, 20, preempt_at=(4, 5, 13)) == expected
    assert run_alone(new_runner, params, 11, 20, preempt_at=(2, 17), company=2) == expected
    assert run_alone(new_runner, params, 12, 20) != expected


class Panic(BaseException):
    """What a library written in another language may raise."""


def test_a_device_thread_that_dies_leaves_nobody_waiting(runner, model, caplog):
    heard = Future()
    runner.on_death(heard.set_result)
    result(runner, prompt_plan(0))
    model.fail_next = Panic("gone")
    runner.launch(decode_plan(1, 6, 3))
    with contextlib.suppress(DeviceDeadError):  # raised at once where it has died by now
        runner.launch(decode_plan(2, 7, 3))
    futures = []
    for step_id in (1, 2):
        with contextlib.suppress(DeviceDeadError):
            futures.append(runner.sample(step_id))
    for future in futures:
        with pytest.raises(DeviceDeadError, match="Panic"):
            future.result(timeout=60)
    cause = heard.result(60)
    assert "Panic" in str(cause)
    with pytest.raises(DeviceDeadError) as caught:
        runner.launch(decode_plan(3, 8, 3))
    assert caught.value is cause
    assert "has died" in caplog.text


def test_a_device_thread_that_dies_while_it_samples_leaves_nobody_waiting(runner, monkeypatch):
    def panic(*_args):
        raise Panic("gone")

    for name in ("greedy", "fetch"):  # the host's, and the device's
        monkeypatch.setattr(runner._sampler, name, panic, raising=False)
    runner.launch(prompt_plan(0))
    with pytest.raises(DeviceDeadError, match="Panic"):
        runner.sample(0).result(timeout=60)


def test_a_closed_runner_holds_neither_weights_nor_cache():
    model = FakeModel()
    caches = model.caches(32)
    runner = TorchModelRunner(model, caches, **OPTIONS)
    result(runner, prompt_plan(0))
    held = [weakref.ref(model), weakref.ref(caches[0][0])]
    del model, caches
    assert None not in [ref() for ref in held]
    runner.close()
    assert [ref() for ref in held] == [None, None]
    assert runner.num_compilations >= 0
    runner.close()


def test_a_device_thread_that_dies_between_two_steps_is_heard_of(model, monkeypatch):
    ladder = StepLadder(32, 4)
    options = {"vocab_size": VOCAB, "block_size": BLOCK_SIZE, "max_model_len": 64}
    runner, executor = assemble(model, model.caches(32), ladder, max_num_seqs=4, **options)
    heard = Future()
    runner.on_death(heard.set_result)

    def capture_next() -> bool:
        raise Panic("gone")

    monkeypatch.setattr(executor, "capture_next", capture_next)
    runner.on_device_thread(lambda: executor.want_graphs(ladder.graphs()))
    assert "Panic" in str(heard.result(60))
    runner.close()


class CountedTime:
    """A timeline whose device takes what a test says."""

    def __init__(self) -> None:
        self.now = 0.0

    def mark(self):
        at = self.now
        return SimpleNamespace(
            at=at, wait=lambda: None, seconds_since=lambda earlier: at - earlier.at
        )


def test_a_step_whose_graph_is_wanted_has_it_captured_and_is_not_charged_for_it(model, monkeypatch):
    time = CountedTime()
    monkeypatch.setattr(build, "timeline_of", lambda device: time)
    ladder = StepLadder(32, 4)
    options = {"vocab_size": VOCAB, "block_size": BLOCK_SIZE, "max_model_len": 64}
    runner, executor = assemble(model, model.caches(32), ladder, max_num_seqs=4, **options)
    captured = []

    def capture(key):
        time.now += 100.0
        captured.append(key)
        if key.is_decode:
            raise RuntimeError("spoiled")
        found = executor.run_eagerly(key)

        def replay() -> None:
            time.now += 1.0
            found.token_ids.copy_(executor.run_eagerly(key).token_ids)

        executor._graphs[key] = SimpleNamespace(replay=replay), found

    monkeypatch.setattr(executor, "_capture", capture)
    monkeypatch.setattr(executor, "capture_next", lambda: threading.Event().wait(0.01))
    prompt, decode = ladder.key(6, 1), ladder.key(1, 1)
    runner.on_device_thread(lambda: executor.want_graphs([prompt, decode]))
    first, second = greedy_after(PROMPT, 2)
    outputs = [result(runner, prompt_plan(step, name)) for step, name in enumerate("ab")]
    assert [output.sampled_token_ids for output in outputs] == [[[first]]] * 2
    assert [output.duration_s for output in outputs] == [1.0, 1.0]
    assert executor.num_replays == 2
    for step in (2, 3):  # what cannot be captured is tried once
        output = result(runner, decode_plan(step, 6, first, request_id="b"))
        assert output.sampled_token_ids == [[second]]
    assert captured == [prompt, decode]
    assert executor.num_wanted == 0
    runner.close()


def test_what_the_host_takes_to_make_a_step_is_none_of_its_time(model, monkeypatch):
    time = CountedTime()
    monkeypatch.setattr(build, "timeline_of", lambda device: time)
    options = {"vocab_size": VOCAB, "block_size": BLOCK_SIZE, "max_model_len": 64}
    ladder = StepLadder(32, 4)
    runner, executor = assemble(model, model.caches(32), ladder, max_num_seqs=4, **options)
    write_tokens, run = DeviceInputBatch._write_tokens, executor.run

    def write_slowly(*args) -> None:
        time.now += 10.0
        write_tokens(*args)

    def run_in_a_second(key):
        time.now += 1.0
        return run(key)

    monkeypatch.setattr(DeviceInputBatch, "_write_tokens", write_slowly)
    monkeypatch.setattr(executor, "run", run_in_a_second)
    assert result(runner, prompt_plan(0)).duration_s == 1.0
    runner.close()


def test_the_graphs_of_so_many_decodes_are_captured_anew(model, monkeypatch):
    ladder = StepLadder(32, 4)
    options = {"vocab_size": VOCAB, "block_size": BLOCK_SIZE, "max_model_len": 64}
    runner, executor = assemble(model, model.caches(32), ladder, max_num_seqs=4, **options)
    captured = []

    def capture(key) -> None:
        captured.append(key)
        executor._graphs[key] = object(), None

    def spoiled(key) -> None:
        raise RuntimeError("spoiled")

    monkeypatch.setattr(executor, "_capture", capture)
    keys = [*ladder.decodes(), *ladder.mixed()]
    runner.on_device_thread(lambda: executor.want_graphs(keys))
    runner.capture_graphs()
    assert captured == keys
    of_three = executor.decode_graphs(3)
    assert of_three == [key for key in ladder.decodes() if key.num_seqs == 4]
    assert executor.decode_graphs(5) == []
    runner.on_device_thread(lambda: executor.capture_again(of_three))
    assert captured[len(keys) :] == of_three
    assert executor._graphs.keys() == set(keys)
    monkeypatch.setattr(executor, "_capture", spoiled)
    with pytest.raises(RuntimeError, match="spoiled"):
        runner.on_device_thread(lambda: executor.capture_again(of_three))
    runner.close()


def test_a_runner_that_is_closed_has_not_died(runner):
    heard = []
    runner.on_death(heard.append)
    result(runner, prompt_plan(0))
    runner.close()
    assert heard == []
