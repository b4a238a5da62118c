"""What a request sees: text, ends, counts, and who is told what when something goes wrong."""

import asyncio

import pytest

from streamserve.core.request import FinishReason
from streamserve.engine.null_runner import NullRunner
from streamserve.errors import ContextLengthError, InvalidParameterError, QueueFullError
from tests.engine.fakes import EOS, PROMPT, FakeRunner, collect, serving, turns

IN_FLIGHT = pytest.mark.parametrize("max_steps_in_flight", [1, 2])


@IN_FLIGHT
async def test_an_answer_ends_with_end_of_sequence(max_steps_in_flight):
    async with serving(FakeRunner(), max_steps_in_flight=max_steps_in_flight) as h:
        output = await h.answer()
        assert output.text == "Hello, world!"
        assert output.token_ids == [*b"Hello, world!", EOS]
        assert (output.finish_reason, output.stop_reason) == (FinishReason.STOP, None)
        assert output.usage.prompt_tokens == len(PROMPT)
        assert output.usage.completion_tokens == len(b"Hello, world!") + 1
        stats = h.engine.stats()
        assert (stats.prompt_tokens, stats.generation_tokens) == (len(PROMPT), 14)


async def test_many_answers_at_once_each_get_their_own():
    answers = {f"r{n}": f"answer {n} " * n for n in range(1, 20)}
    async with serving(FakeRunner(answers), max_num_batched_tokens=16) as h:
        streams = [h.submit(r, PROMPT[: 5 + n], max_tokens=250) for n, r in enumerate(answers)]
        outputs = await asyncio.gather(*map(collect, streams))
        assert [output.text for output in outputs] == list(answers.values())


async def test_steps_that_end_on_another_thread():
    async with serving(FakeRunner(threaded=True)) as h:
        assert (await h.answer()).text == "Hello, world!"


async def test_max_tokens_and_ignore_eos():
    async with serving(FakeRunner(default="ab")) as h:
        output = await h.answer(max_tokens=1)
        assert (output.text, output.finish_reason) == ("a", FinishReason.LENGTH)
        output = await h.answer("s", max_tokens=4, ignore_eos=True, skip_special_tokens=False)
        assert (output.text, output.finish_reason) == ("ab</s></s>", FinishReason.LENGTH)
        output = await h.answer("t", max_tokens=None, ignore_eos=True)
        assert output.usage.completion_tokens == 512 - len(PROMPT)


async def test_the_context_is_what_the_kv_cache_holds_if_that_is_less():
    async with serving(FakeRunner(), num_blocks=4) as h:
        output = await h.answer(max_tokens=None, ignore_eos=True)
        assert output.usage.completion_tokens == h.scheduler.max_model_len - len(PROMPT)


async def test_stop_ids_end_the_answer_and_show_their_text_only_on_request():
    async with serving(FakeRunner(default="one;two")) as h:
        output = await h.answer(stop_token_ids=(ord(";"),))
        assert (output.text, output.stop_reason) == ("one", ord(";"))
        assert output.token_ids == list(b"one;")
        output = await h.answer("s", stop_token_ids=(ord(";"),), include_stop_str_in_output=True)
        assert output.text == "one;"


async def test_min_tokens_goes_for_end_ids_and_strings():
    async with serving(FakeRunner(default="a;b;c;d")) as h:
        output = await h.answer(stop_token_ids=(ord(";"),), min_tokens=3)
        assert output.text == "a;b"
        output = await h.answer("s", stop=(";",), min_tokens=3)
        assert output.text == "a;b"
        output = await h.answer("t", stop=("b;",), min_tokens=4)
        assert output.text == "a;b;c;d"


async def test_an_incomplete_character_comes_out_at_the_end():
    async with serving(FakeRunner({"r": "né".encode()[:-1]})) as h:
        assert (await h.answer()).text == "n\ufffd"


@IN_FLIGHT
@pytest.mark.parametrize("include", [False, True])
async def test_a_stop_string_ends_the_answer_and_what_came_behind_it_never_was(
    include, max_steps_in_flight
):
    runner = FakeRunner(default="one END two")
    async with serving(runner, max_steps_in_flight=max_steps_in_flight) as h:
        output = await h.answer(stop=("END",), include_stop_str_in_output=include, logprobs=1)
        assert output.text == ("one END" if include else "one ")
        assert (output.finish_reason, output.stop_reason) == (FinishReason.STOP, "END")
        assert output.token_ids == list(b"one END")
        assert [entry.token_id for entry in output.logprobs] == output.token_ids
        assert output.usage.completion_tokens == 7
        assert h.engine.stats().generation_tokens == 7
        await turns()
        assert h.num_held_blocks == 0
        # The device has computed the stop's last token, but nothing behind it may be found.
        again = [*PROMPT, *output.token_ids, *b" two"]
        cached = (await h.answer("again", again)).usage.cached_tokens
        assert cached <= len(PROMPT) + 7


async def test_only_a_live_beginning_of_a_stop_string_is_held_back():
    runner = FakeRunner(default="ab abc", hold=True)
    async with serving(runner) as h:
        stream = h.submit(stop=("abx",))
        seen = []
        for _ in range(6):
            await runner.release()
            output = stream.get_nowait()
            seen.append(None if output is None else output.text)
        # Text follows its token by one step: it is made while the next one runs.
        assert seen == ["", "", "ab ", "", "", "abc"]
        runner.release_all()
        assert (await collect(stream)).text == ""


async def test_a_stop_string_in_the_last_token_wins_over_length():
    async with serving(FakeRunner(default="xEND")) as h:
        output = await h.answer(stop=("END",), max_tokens=4)
        assert (output.text, output.stop_reason) == ("x", "END")
        assert output.finish_reason is FinishReason.STOP


async def test_what_is_held_back_comes_out_when_the_answer_ends():
    async with serving(FakeRunner(default="one EN")) as h:
        assert (await h.answer(stop=("END",))).text == "one EN"


async def test_logprobs_come_with_their_tokens():
    async with serving(FakeRunner()) as h:
        output = await h.answer(logprobs=1)
        assert output.token_ids[-1] == EOS  # which has no text, and so no entry
        assert [entry.token_id for entry in output.logprobs] == output.token_ids[:-1]
        assert (await h.answer("s")).logprobs == []


async def test_a_slow_reader_gets_fewer_larger_outputs():
    async with serving(FakeRunner(default="word " * 30)) as h:
        slow, fast = h.submit("slow", max_tokens=200), h.submit("fast", max_tokens=200)
        assert (await collect(fast)).text == "word " * 30
        first = slow.get_nowait()
        assert first.text == "word " * 30
        assert first.num_merged == len(first.token_ids) == 151
        assert first.finish_reason is FinishReason.STOP


async def test_readers_and_others_get_their_turn_in_every_step():
    async with serving(NullRunner(list(b"abc"))) as h:
        stream = h.submit(max_tokens=100)
        num_turns = 0

        async def other():
            nonlocal num_turns
            while not stream.has_ended:
                num_turns += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(other())
        outputs = [output async for output in stream]
        await task
        assert len(outputs) == 100
        assert num_turns >= 100


async def test_timings_are_in_order():
    async with serving(FakeRunner()) as h:
        stream = h.submit()
        assert stream.timings.first_token is None
        await collect(stream)
        t = stream.timings
        assert t.arrival <= t.first_scheduled <= t.first_token < t.last_token <= t.finished


@pytest.mark.parametrize(
    ("prompt", "params", "error", "param"),
    [
        ([], {}, InvalidParameterError, "prompt"),
        ([258], {}, InvalidParameterError, "prompt"),
        ([-1], {}, InvalidParameterError, "prompt"),
        ([1], {"stop_token_ids": (1000,)}, InvalidParameterError, "stop_token_ids"),
        ([1], {"logit_bias": {1000: 1.0}}, InvalidParameterError, "logit_bias"),
        ([1] * 512, {"max_tokens": None}, ContextLengthError, "messages"),
        ([1] * 500, {"max_tokens": 513}, ContextLengthError, "max_tokens"),
        ([1] * 500, {"max_tokens": 13, "min_tokens": 13}, ContextLengthError, "min_tokens"),
        ([1] * 500, {"max_tokens": None, "min_tokens": 13}, ContextLengthError, "min_tokens"),
    ],
)
async def test_what_cannot_be_served_is_refused_at_the_door(prompt, params, error, param):
    async with serving(FakeRunner()) as h:
        with pytest.raises(error) as caught:
            h.submit(prompt=prompt, **params)
        assert caught.value.param == param
        assert h.engine.is_idle
        assert not h.scheduler.has_unfinished


async def test_the_refusal_of_a_long_prompt_has_the_numbers():
    async with serving(FakeRunner()) as h:
        with pytest.raises(ContextLengthError, match=r"512 tokens.*1013.*500.*513"):
            h.submit(prompt=[1] * 500, max_tokens=513)


async def test_a_longest_answer_is_at_most_what_the_context_has_left():
    async with serving(FakeRunner()) as h:
        outputs = [o async for o in h.submit(prompt=[1] * 500, max_tokens=512, ignore_eos=True)]
        assert sum(len(output.token_ids) for output in outputs) == 12
        assert outputs[-1].finish_reason is FinishReason.LENGTH


async def test_a_full_queue_refuses():
    async with serving(FakeRunner(hold=True), max_num_waiting=2) as h:
        h.submit("a")
        h.submit("b")
        with pytest.raises(QueueFullError):
            h.submit("c")
        assert h.engine.stats().num_waiting == 2


async def test_an_id_in_use_is_refused_also_while_its_last_step_runs():
    runner = FakeRunner(hold=True)
    async with serving(runner) as h:
        h.submit("r")
        await runner.launched()
        with pytest.raises(InvalidParameterError, match="'r'"):
            h.submit("r")
        h.engine.abort("r")
        with pytest.raises(InvalidParameterError, match="'r'"):
            h.submit("r")
        assert not h.engine.is_dead


async def test_a_second_turn_finds_the_first_in_the_cache():
    async with serving(FakeRunner()) as h:
        first = await h.answer()
        second = await h.answer("s", [*PROMPT, *first.token_ids, *b" more"])
        # All but the last token, which was never an input.
        assert second.usage.cached_tokens == len(PROMPT) + len(first.token_ids) - 1


async def test_an_idle_engine_checks_its_books_and_waits():
    async with serving(FakeRunner()) as h:
        await h.answer()
        await turns(50)
        assert h.engine.is_idle
        num_steps = h.engine.stats().num_steps
        await turns(50)
        assert h.engine.stats().num_steps == num_steps
        assert (await h.answer("s")).text == "Hello, world!"


async def test_a_request_that_comes_back_was_first_scheduled_before():
    runner = FakeRunner({"a": "x" * 200, "b": "y" * 200}, hold=True)
    async with serving(runner, num_blocks=8) as h:
        found = []
        streams = [h.submit(name, max_tokens=90) for name in "ab"]
        for stream in streams:
            stream.on_scheduled = found.append
        await runner.release()
        times = [stream.timings.first_scheduled for stream in streams]
        runner.release_all()
        for stream in streams:
            await collect(stream)
        assert h.engine.stats().num_preemptions > 0
        assert [stream.timings.first_scheduled for stream in streams] == times
        assert len(found) == 2


async def test_preemption_does_not_show():
    async with serving(FakeRunner(default="x" * 90), num_blocks=10, max_num_seqs=4) as h:
        streams = [h.submit(f"r{n}", PROMPT[n:], max_tokens=100) for n in range(4)]
        outputs = await asyncio.gather(*map(collect, streams))
        assert [output.text for output in outputs] == ["x" * 90] * 4
        assert h.engine.stats().num_preemptions > 0
