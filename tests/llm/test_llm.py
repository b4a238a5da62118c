"""``LLM``: results in order, ends of every kind, and a thread that nobody has to think of."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import signal
import threading
import weakref

import pytest

from streamserve import LLM, SamplingParams
from streamserve.core.plan import TokenLogprobs
from streamserve.engine.stream import RequestStream
from streamserve.errors import (
    ConfigError,
    ContextLengthError,
    EngineError,
    InvalidParameterError,
)
from streamserve.llm.answers import ChatOptions
from streamserve.llm.outputs import logprobs_by_id
from streamserve.llm.prompts import Job
from tests.e2e.servers import SMALL
from tests.interpreter import run_python

CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = SamplingParams(temperature=0, max_tokens=12)


def loop_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "streamserve-llm"]


def wait_until_idle(llm: LLM) -> None:
    engine = llm._service.engine

    async def wait() -> None:
        async with asyncio.timeout(60):
            while not engine.is_idle:
                await asyncio.sleep(0)

    llm._loop.run(wait())


FORKS = """
import os, sys
from streamserve import LLM
llm = LLM(max_num_seqs=1, max_num_batched_tokens=64)
if (child := os.fork()) == 0:
    try:
        llm.generate("Hi", use_tqdm=False)
    except Exception as error:
        print(error, flush=True)
    sys.exit(3)
print(os.getpid(), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_fork_is_told_that_it_has_no_engine_and_may_end():
    message, parent = run_python("-c", FORKS, timeout_s=200).stdout.splitlines()
    process_id, exit_code = parent.split()
    assert f"runs in process {process_id}, of which this one is a fork" in message
    assert exit_code == "3"


def test_results_come_in_the_order_of_the_prompts(llm):
    prompts = ["Hello", [5, 6, 7], {"prompt": "What is"}, {"prompt_token_ids": [9]}]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [output.prompt for output in outputs] == ["Hello", None, "What is", None]
    assert outputs[1].prompt_token_ids == [5, 6, 7]
    assert len({output.request_id for output in outputs}) == 4
    for prompt, output in zip(prompts, outputs, strict=True):
        [answer] = output.outputs
        assert output.finished
        assert answer.index == 0
        assert len(answer.token_ids) == 12
        assert (answer.finish_reason, answer.stop_reason) == ("length", None)
        assert answer.logprobs is None
        [alone] = llm.generate(prompt, GREEDY, use_tqdm=False)
        assert alone.outputs[0].text == answer.text
        metrics = output.metrics
        assert metrics.arrival_time <= metrics.first_token_time <= metrics.finished_time
        assert metrics.time_in_queue == metrics.first_scheduled_time - metrics.arrival_time


def test_each_prompt_has_its_priority(llm, monkeypatch):
    found = {}
    add = llm._service.engine._scheduler.add

    def record(request) -> None:
        found[request.token_ids[0]] = request.priority
        add(request)

    monkeypatch.setattr(llm._service.engine._scheduler, "add", record)
    llm.generate([[5], [6]], GREEDY, priority=[3, -1], use_tqdm=False)
    llm.embed([[7]], priority=2, use_tqdm=False)
    assert found == {5: 3, 6: -1, 7: 2}


def test_more_prompts_than_may_wait(llm):
    params = [SamplingParams(max_tokens=1 + n % 5, ignore_eos=True) for n in range(100)]
    outputs = llm.generate([f"Number {n}" for n in range(100)], params, use_tqdm=False)
    assert [output.prompt for output in outputs] == [f"Number {n}" for n in range(100)]
    counts = [len(output.outputs[0].token_ids) for output in outputs]
    assert counts == [1, 2, 3, 4, 5] * 20
    assert llm.generate([], use_tqdm=False) == []


def test_chat_one_conversation_or_several(llm):
    [one] = llm.chat(CAPITAL, SamplingParams(temperature=0, max_tokens=30), use_tqdm=False)
    assert "Paris" in one.outputs[0].text
    assert one.outputs[0].finish_reason == "stop"
    assert CAPITAL[0]["content"] in one.prompt
    japan = [{"role": "user", "content": "What is the capital of Japan?"}]
    both = llm.chat([CAPITAL, japan], SamplingParams(temperature=0, max_tokens=30), use_tqdm=False)
    assert both[0].outputs[0].text == one.outputs[0].text
    assert "Tokyo" in both[1].outputs[0].text


def test_what_has_an_argument_of_its_own_is_no_variable_of_the_template(llm):
    with pytest.raises(InvalidParameterError, match=r"chat_template_kwargs must not hold 'tools'"):
        llm.chat([{"role": "user", "content": "Hi."}], chat_template_kwargs={"tools": []})


def test_chat_options_reach_the_template(llm):
    template = (
        "{{ word }}{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}"
        "{{ tools[0].function.name }}"
    )
    messages = [{"role": "developer", "content": "a"}, {"role": "user", "content": "b"}]
    [output] = llm.chat(
        messages,
        SamplingParams(max_tokens=1),
        chat_template=template,
        chat_template_kwargs={"word": "W"},
        tools=[{"type": "function", "function": {"name": "f"}}],
        use_tqdm=False,
    )
    assert output.prompt == "Wsystem:auser:bf"
    spoken = [*CAPITAL, {"role": "assistant", "content": "The capital is"}]
    [output] = llm.chat(
        spoken, GREEDY, add_generation_prompt=False, continue_final_message=True, use_tqdm=False
    )
    assert output.prompt.endswith("The capital is")


def test_logprobs_are_dicts_by_id(llm):
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=2)
    [output] = llm.generate(["Hello"], params, use_tqdm=False)
    [answer] = output.outputs
    sampled = [
        position[token_id]
        for position, token_id in zip(answer.logprobs, answer.token_ids, strict=True)
    ]
    assert all(len(position) == 2 for position in answer.logprobs)
    assert [entry.rank for entry in sampled] == [1] * 6
    assert "".join(entry.decoded_token for entry in sampled) == answer.text
    assert answer.cumulative_logprob == pytest.approx(sum(entry.logprob for entry in sampled))


def test_several_answers_to_a_prompt(llm):
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=12)
    outputs = llm.generate(["Once upon", "Tell me"] * 4, params, use_tqdm=False)
    assert [[a.index for a in output.outputs] for output in outputs] == [[0, 1, 2]] * 8
    texts = [answer.text for answer in outputs[0].outputs]
    assert len(set(texts)) == 3
    assert [answer.text for answer in outputs[2].outputs] == texts
    alone = llm.generate(["Once upon"], dataclasses.replace(params, n=1), use_tqdm=False)[0]
    assert alone.outputs[0].text == texts[0]


def test_more_answers_than_may_wait(llm):
    """Those of one prompt come in together, however many: here 8 may wait."""
    params = [
        SamplingParams(n=20 if i == 5 else 4, seed=i, max_tokens=1 + i % 3, ignore_eos=True)
        for i in range(60)
    ]
    outputs = llm.generate([f"Number {i}" for i in range(60)], params, use_tqdm=False)
    for i, output in enumerate(outputs):
        assert [answer.index for answer in output.outputs] == list(range(params[i].n))
        assert {len(answer.token_ids) for answer in output.outputs} == {1 + i % 3}


def test_the_likeliest_of_several(llm):
    params = SamplingParams(n=6, temperature=1.0, seed=5, max_tokens=12, logprobs=0)
    every = llm.generate("Once upon", params, use_tqdm=False)[0].outputs
    ranked = sorted(every, key=lambda answer: -answer.cumulative_logprob)
    params = SamplingParams(n=2, best_of=6, temperature=1.0, seed=5, max_tokens=12)
    best = llm.generate("Once upon", params, use_tqdm=False)[0].outputs
    assert [answer.text for answer in best] == [answer.text for answer in ranked[:2]]
    assert [(answer.index, answer.logprobs) for answer in best] == [(0, None), (1, None)]
    params = dataclasses.replace(params, logprobs=2)
    for answer in llm.generate("Once upon", params, use_tqdm=False)[0].outputs:
        assert {len(position) for position in answer.logprobs} <= {2, 3}
    with pytest.raises(InvalidParameterError, match="must be 1 for a stream"):
        next(llm.stream("a", SamplingParams(n=2)))


def test_the_answers_of_a_beam_search(llm):
    params = SamplingParams(n=2, best_of=4, use_beam_search=True, max_tokens=8, logprobs=1)
    [output, again] = llm.generate(["Once upon"] * 2, params, use_tqdm=False)
    first, second = output.outputs
    assert (first.index, second.index, output.finished) == (0, 1, True)
    assert first.token_ids != second.token_ids
    assert first.cumulative_logprob >= second.cumulative_logprob
    assert [answer.token_ids for answer in again.outputs] == [first.token_ids, second.token_ids]
    params = dataclasses.replace(params, best_of=8, stop_token_ids=list(range(15)))
    steps = llm._service.engine.stats().num_steps
    with pytest.raises(InvalidParameterError, match="best_of must be at most"):
        llm.generate("Once upon", params, use_tqdm=False)
    assert llm._service.engine.stats().num_steps == steps


def test_a_token_outside_the_likeliest_comes_first_and_has_no_rank(llm):
    entries = [TokenLogprobs(5, -3.0, ((7, -1.0), (6, -2.0))), TokenLogprobs(6, -2.0, ((6, -2.0),))]
    outside, inside = logprobs_by_id(entries, llm._service.tokenizer)
    assert [(i, found.logprob, found.rank) for i, found in outside.items()] == [
        (5, -3.0, None),
        (7, -1.0, 1),
        (6, -2.0, 2),
    ]
    assert inside[6].rank == 1


@pytest.mark.parametrize(
    "asked",
    [{}, {"n": 2, "temperature": 1.0}, {"best_of": 2}, {"best_of": 2, "use_beam_search": True}],
)
def test_prompt_logprobs_begin_with_none(llm, asked):
    params = SamplingParams(max_tokens=2, prompt_logprobs=1, **asked)
    [output] = llm.generate([[5, 6, 7]], params, use_tqdm=False)
    none, second, third = output.prompt_logprobs
    assert none is None
    assert second[6].logprob < 0
    assert second[6].rank >= 1
    assert third[7].decoded_token == llm._service.tokenizer.token_text(7)
    assert llm.generate([[5]], GREEDY, use_tqdm=False)[0].prompt_logprobs is None


def test_a_prompt_may_be_scored_without_an_answer(llm):
    whole, scored = (
        llm.generate([[5, 6, 7]], SamplingParams(max_tokens=n, prompt_logprobs=1), use_tqdm=False)
        for n in (1, 0)
    )
    assert scored[0].prompt_logprobs == whole[0].prompt_logprobs
    [answer] = scored[0].outputs
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("", [], "length")


def test_words_and_ids_that_do_not_come(llm):
    usual = llm.chat(CAPITAL, GREEDY, use_tqdm=False)[0].outputs[0]
    params = dataclasses.replace(GREEDY, bad_words=("The",))
    assert "The" not in llm.chat(CAPITAL, params, use_tqdm=False)[0].outputs[0].text
    params = SamplingParams(temperature=0, max_tokens=4, allowed_token_ids=[9])
    [output] = llm.chat(CAPITAL, params, use_tqdm=False)
    assert set(output.outputs[0].token_ids) == {9}
    assert "The" in usual.text


def test_stop_strings_and_ids(llm):
    whole = llm.chat(CAPITAL, GREEDY, use_tqdm=False)[0].outputs[0]
    params = SamplingParams(temperature=0, max_tokens=12, stop=["Par"])
    cut = llm.chat(CAPITAL, params, use_tqdm=False)[0].outputs[0]
    assert cut.text == whole.text[: whole.text.index("Par")]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", "Par")
    stop_id = whole.token_ids[2]
    params = SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[stop_id])
    cut = llm.chat(CAPITAL, params, use_tqdm=False)[0].outputs[0]
    assert cut.stop_reason == stop_id


def test_without_parameters_the_models_own_count(llm):
    params = llm.get_default_sampling_params()
    for name, value in llm._service.sampling_defaults.items():
        assert getattr(params, name) == value
    assert len(llm.generate("Hello", use_tqdm=False)[0].outputs[0].token_ids) <= 16


def test_a_prompt_that_cannot_fit_is_refused_before_any_is_computed(llm):
    steps = llm._service.engine.stats().num_steps
    with pytest.raises(ContextLengthError, match=r"^prompt 1: .*maximum context length"):
        llm.generate(["Hello", [5] * 5000], GREEDY, use_tqdm=False)
    assert llm._service.engine.stats().num_steps == steps


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda llm: llm.generate("a", [GREEDY, GREEDY]), InvalidParameterError, "sampling_params"),
        (lambda llm: llm.generate("a", lora_request=object()), InvalidParameterError, "lora_"),
        (lambda llm: llm.generate("a", frobnicate=1), TypeError, "frobnicate"),
        (lambda llm: llm.generate(""), InvalidParameterError, "at least one token"),
        (lambda llm: list(llm.stream("")), InvalidParameterError, "at least one token"),
        (lambda llm: llm.stream([]), InvalidParameterError, "must be a string, token ids"),
        (
            lambda llm: llm.chat(CAPITAL, chat_template_content_format="openai"),
            InvalidParameterError,
            "chat_template_content_format",
        ),
        (lambda llm: llm.chat([]), InvalidParameterError, "messages"),
        (lambda llm: llm.classify("a"), NotImplementedError, "classify"),
        (lambda llm: llm.score("a", "b"), NotImplementedError, "score"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(llm, call, error, message):
    if "at least one token" in message and llm._service.tokenizer.encode(
        "", add_special_tokens=True
    ):
        pytest.skip("this tokenizer begins every text")
    with pytest.raises(error, match=message):
        call(llm)


def test_pieces_of_a_stream_are_the_answer(llm):
    pieces = list(llm.stream(CAPITAL, GREEDY))
    assert len(pieces) > 1
    assert "".join(pieces) == llm.chat(CAPITAL, GREEDY, use_tqdm=False)[0].outputs[0].text
    assert "".join(llm.stream("Hello", GREEDY)) == llm.generate("Hello", GREEDY)[0].outputs[0].text


def test_leaving_a_stream_early_frees_its_request(llm, monkeypatch):
    params, closed = SamplingParams(max_tokens=400, ignore_eos=True), []

    def close(stream: RequestStream) -> None:
        closed.append(stream)

    monkeypatch.setattr(RequestStream, "close", close)
    for _ in llm.stream("Hello", params):
        break
    monkeypatch.undo()
    [stream] = closed
    llm._service.engine.abort(stream.request_id)
    wait_until_idle(llm)
    assert llm._service.engine.stats().kv_usage == 0


def test_a_stream_that_is_cut_off_says_so(llm):
    engine = llm._service.engine
    pieces = llm.stream("Hello", SamplingParams(max_tokens=400, ignore_eos=True))
    next(pieces)

    async def abort() -> None:
        [request_id] = engine._live
        engine.abort(request_id)

    llm._loop.run(abort())
    with pytest.raises(EngineError, match="cut off"):
        list(pieces)


class InterruptingBar:
    """A progress bar in whose making somebody presses Ctrl-C."""

    def __init__(self, **_options: object) -> None:
        main = threading.main_thread().ident
        threading.Thread(target=lambda: signal.pthread_kill(main, signal.SIGINT)).start()

    def set_postfix_str(self, *_args: object, **_options: object) -> None:
        pass

    def update(self, _n: int) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture
def ctrl_c_interrupts():
    """Python's own handler, whatever a test before has left."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_who_gives_up_waiting_for_a_seat_gives_back_none(llm):
    answers = llm._answers

    async def give_up() -> int:
        [prepared] = await answers.prepare([Job(0, "", [5], GREEDY)], ChatOptions())
        async with answers._line:
            waiting = asyncio.create_task(answers._seated(prepared).__aenter__())
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait([waiting])
        return answers._seats._value

    assert llm._loop.run(give_up()) == 8


@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_ctrl_c_ends_the_requests_and_the_object_stays_usable(llm):
    params = SamplingParams(max_tokens=400, ignore_eos=True)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["Hello"] * 200, params, use_tqdm=InterruptingBar)
    wait_until_idle(llm)
    assert "Paris" in llm.chat(CAPITAL, GREEDY, use_tqdm=False)[0].outputs[0].text


def test_the_bar_counts_prompts(llm, capsys):
    llm.generate(["a", "b", "c"], GREEDY)
    error = capsys.readouterr().err
    assert "Processed prompts" in error
    assert "3/3" in error


async def test_inside_a_running_loop(llm):
    assert llm.generate("Hello", GREEDY, use_tqdm=False)[0].finished


def test_from_several_threads(llm):
    expected = llm.generate("Hello", GREEDY, use_tqdm=False)[0].outputs[0].text
    texts: list[str] = []

    def ask() -> None:
        outputs = llm.generate(["Hello"] * 10, GREEDY, use_tqdm=False)
        texts.extend(output.outputs[0].text for output in outputs)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [expected] * 40


def test_the_tokenizer_is_transformers(llm):
    tokenizer = llm.get_tokenizer()
    text = tokenizer.apply_chat_template(CAPITAL, tokenize=False, add_generation_prompt=True)
    assert llm.chat(CAPITAL, GREEDY, use_tqdm=False)[0].prompt == text


def test_closing_ends_the_threads_and_a_seed_repeats_the_answers():
    before = len(loop_threads())
    sampled = SamplingParams(temperature=1.0, max_tokens=20)
    texts = []
    for _ in range(2):
        with LLM(**SMALL, seed=7) as llm:
            outputs = llm.generate(["Once", "Twice"], sampled, use_tqdm=False)
            texts.append([output.outputs[0].text for output in outputs])
        llm.close()
        with pytest.raises(ConfigError, match="this LLM is closed"):
            llm.generate("Hello")
    assert texts[0] == texts[1]
    assert len(loop_threads()) == before


def test_an_object_that_nobody_holds_is_closed():
    before = len(loop_threads())
    llm = LLM(**SMALL)
    assert len(loop_threads()) == before + 1
    gone = weakref.ref(llm)
    del llm
    gc.collect()
    assert gone() is None
    assert len(loop_threads()) == before


def test_a_closed_object_holds_neither_weights_nor_cache_nor_adapters():
    gc.disable()  # nothing waits for it
    try:
        llm = LLM(**SMALL, enable_lora=True, max_loras=2)
        runner, bank = llm._service.engine._runner, llm._service.adapters._bank
        held = [weakref.ref(runner._model), weakref.ref(runner._kv_caches[0][0])]
        held.append(weakref.ref(bank._tables[0, "layers.qkv"]))
        del runner, bank
        assert None not in [ref() for ref in held]
        llm.close()
        assert [ref() for ref in held] == [None] * 3
    finally:
        gc.enable()
