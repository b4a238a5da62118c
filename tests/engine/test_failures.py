"""Aborts, failing steps, a dead engine, shutting down: every stream ends once, blocks come back."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamserve.core.request import FinishReason
from streamserve.core.sampling_params import SamplingParams
from streamserve.core.scheduler import Scheduler
from streamserve.core.time_limits import TimeLimits
from streamserve.engine.async_engine import MAX_CONSECUTIVE_FAILED_STEPS
from streamserve.engine.byte_tokenizer import ByteTokenizer
from streamserve.engine.failures import is_out_of_memory
from streamserve.engine.null_runner import NullRunner
from streamserve.errors import DeviceDeadError, EngineDeadError, EngineError
from tests.engine.fakes import PROMPT, FakeRunner, collect, serving, turns

IN_FLIGHT = pytest.mark.parametrize("max_steps_in_flight", [1, 2])


# Aborts


async def test_abort_while_waiting():
    runner = FakeRunner(hold=True)
    async with serving(runner, max_num_seqs=1) as h:
        h.submit("runs")
        waits = h.submit("waits")
        await runner.launched()
        assert h.engine.abort("waits")
        output = await collect(waits)
        assert (output.finish_reason, output.text) == (FinishReason.ABORT, "")
        assert output.usage.completion_tokens == 0
        assert h.engine.stats().num_waiting == 0


@IN_FLIGHT
@pytest.mark.parametrize("num_steps", [0, 1, 5])
async def test_abort_while_a_step_is_in_flight(num_steps, max_steps_in_flight):
    runner = FakeRunner(hold=True)
    async with serving(runner, max_steps_in_flight=max_steps_in_flight) as h:
        stream = h.submit()
        await runner.release(num_steps)
        await runner.launched()
        assert h.engine.abort("r")
        output = await collect(stream)
        assert output.finish_reason is FinishReason.ABORT
        assert len(output.token_ids) == output.usage.completion_tokens <= num_steps
        assert not h.engine.abort("r")
        await runner.release(max_steps_in_flight)
        await turns()
        assert h.num_held_blocks == 0  # by the next step
        assert h.engine.is_idle


async def test_abort_shows_what_was_held_back():
    runner = FakeRunner(default="one EN", hold=True)
    async with serving(runner) as h:
        stream = h.submit(stop=("END",))
        await runner.release(6)
        assert h.engine.abort("r")
        assert (await collect(stream)).text == "one EN"


async def test_abort_of_what_is_not_there():
    async with serving(FakeRunner()) as h:
        assert not h.engine.abort("r")
        await h.answer()
        assert not h.engine.abort("r")


@pytest.mark.parametrize("num_steps", [0, 3])
async def test_a_reader_that_leaves_frees_the_blocks(num_steps):
    runner = FakeRunner(hold=True)
    async with serving(runner) as h:
        async with h.submit() as stream:
            await runner.release(num_steps)
            await runner.launched()
        stream.close()
        assert [output async for output in stream] == []
        await runner.release()
        await turns()
        assert h.num_held_blocks == 0


async def test_a_reader_task_that_is_cancelled_frees_the_blocks():
    runner = FakeRunner(hold=True)
    async with serving(runner) as h:
        stream = h.submit()

        async def read():
            async with stream:
                await collect(stream)

        task = asyncio.create_task(read())
        await runner.release(2)
        task.cancel()
        await asyncio.wait([task])
        await runner.release()
        assert h.num_held_blocks == 0


async def test_leaving_after_the_end_aborts_nothing():
    async with serving(FakeRunner()) as h:
        stream = h.submit()
        await collect(stream)
        h.submit("r")  # the id is free again
        stream.close()
        assert h.engine.stats().num_waiting + h.engine.stats().num_running == 1


# Failing steps


async def text_before_error(stream):
    text = ""
    try:
        async for output in stream:
            text += output.text
    except EngineError:
        return text
    pytest.fail("the request did not fail")


@IN_FLIGHT
@pytest.mark.parametrize("where", ["failing_launches", "failing_samples"])
async def test_after_a_failing_step_its_requests_go_on(where, max_steps_in_flight, caplog):
    runner = FakeRunner(hold=True)
    async with serving(runner, max_steps_in_flight=max_steps_in_flight) as h:
        streams = [h.submit("a"), h.submit("b", PROMPT[1:])]
        getattr(runner, where).add(3)
        assert (await runner.launched()).step_id < 3
        runner.release_all()
        for stream in streams:
            assert (await collect(stream)).text == "Hello, world!"
        stats = h.engine.stats()
        assert (stats.num_failed_steps, stats.num_rolled_back) == (1, 2)
        assert stats.num_preemptions == 0
    assert "step 3 failed" in caplog.text


@IN_FLIGHT
async def test_who_fails_alone_fails_and_no_others(max_steps_in_flight):
    runner = FakeRunner(spoilt={"bad"})
    async with serving(runner, max_steps_in_flight=max_steps_in_flight) as h:
        streams = [h.submit(request_id, PROMPT) for request_id in ("a", "bad", "b")]
        with pytest.raises(EngineError, match="step failed: SpoiltError") as caught:
            await collect(streams[1])
        assert not isinstance(caught.value, EngineDeadError)
        for stream in (streams[0], streams[2]):
            assert (await collect(stream)).text == "Hello, world!"
        assert (await h.answer("next")).text == "Hello, world!"
        assert not h.engine.is_dead


async def test_what_came_before_a_failure_is_delivered_first():
    runner = FakeRunner()
    runner.failing_samples.update((4, 5))
    async with serving(runner) as h:
        stream = h.submit()
        assert await text_before_error(stream) == "Hell"
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_requests_that_were_not_in_the_failing_step_go_on():
    runner = FakeRunner(hold=True)
    runner.failing_samples.update((0, 1))
    async with serving(runner, max_num_seqs=1) as h:
        first, second = h.submit("first"), h.submit("second")
        await runner.launched()
        runner.release_all()
        with pytest.raises(EngineError):
            await collect(first)
        assert (await collect(second)).text == "Hello, world!"


async def test_what_the_step_before_a_failing_launch_said_is_delivered():
    runner = FakeRunner(default="abc")
    runner.failing_launches.update((3, 4))
    async with serving(runner) as h:
        stream = h.submit("r")
        done = h.submit("done", PROMPT[1:], max_tokens=3)
        assert await text_before_error(stream) == "abc"
        assert (await collect(done)).text == "abc"


@pytest.mark.parametrize("where", ["launch", "sample"])
async def test_an_engine_whose_steps_keep_failing_is_dead_and_says_so(where):
    runner = FakeRunner()
    runner.fail_all = where == "launch"
    runner.failing_samples.update(range(100) if where == "sample" else ())
    async with serving(runner, max_num_seqs=1) as h:
        streams = [h.submit(f"r{n}") for n in range(MAX_CONSECUTIVE_FAILED_STEPS + 1)]
        errors = []
        for stream in streams:
            with pytest.raises(EngineError) as caught:
                await collect(stream)
            errors.append(type(caught.value))
        # The first fails in company and alone, the next once, then nothing but a token can.
        assert errors == [EngineError] + [EngineDeadError] * MAX_CONSECUTIVE_FAILED_STEPS
        assert h.engine.is_dead
        assert f"{MAX_CONSECUTIVE_FAILED_STEPS + 1} steps in a row" in h.engine.dead_reason
        with pytest.raises(EngineDeadError, match="in a row"):
            h.submit("late")
        assert not h.engine.abort("r3")


async def test_requests_that_fail_wherever_they_run_are_not_the_end_of_the_engine():
    bad = [f"bad{n}" for n in range(3 * MAX_CONSECUTIVE_FAILED_STEPS)]
    runner = FakeRunner(default="a", spoilt=set(bad))
    async with serving(runner, max_num_seqs=3, max_num_waiting=20) as h:
        streams = [h.submit(request_id) for request_id in bad]
        for stream in streams:
            with pytest.raises(EngineError, match="SpoiltError"):
                await collect(stream)
        assert (await h.answer("good")).text == "a"
        assert not h.engine.is_dead


async def test_steps_that_fail_now_and_then_are_no_reason_to_doubt_the_engine():
    runner = FakeRunner()
    runner.failing_samples.update({3, 6, 9})
    async with serving(runner) as h:
        assert (await h.answer("a")).text == "Hello, world!"
        assert h.engine.stats().num_failed_steps == 3
    assert {s.request_id for plan in runner.plans for s in plan.scheduled} == {"a"}, "no probe"


async def test_a_step_without_memory_is_made_again_with_a_smaller_chunk():
    runner = FakeRunner(max_tokens=5)
    async with serving(runner, max_num_batched_tokens=64) as h:
        assert (await h.answer()).text == "Hello, world!"
        assert max(plan.num_tokens for plan in runner.plans[-20:]) <= 5
        assert [plan.num_tokens for plan in runner.plans[:4]] == [26, 13, 6, 1]
        assert h.engine.stats().num_failed_steps == 3
    assert is_out_of_memory(MemoryError())


async def test_a_lost_device_is_death_for_all_at_once():
    runner = FakeRunner(hold=True)
    runner.error = DeviceDeadError("the device thread has died")
    runner.failing_samples.add(2)
    async with serving(runner, max_num_seqs=1) as h:
        streams = [h.submit("runs"), h.submit("waits")]
        await runner.launched()
        runner.release_all()
        for stream in streams:
            with pytest.raises(EngineDeadError, match="no step can run any more"):
                await collect(stream)
        assert len(runner.plans) == 3


def gone() -> DeviceDeadError:
    return DeviceDeadError("rank 1 has died")


@pytest.mark.parametrize("has_answered", [False, True])
async def test_a_runner_that_dies_while_nobody_asks_is_the_end_at_once(has_answered):
    runner = FakeRunner()
    async with serving(runner) as h:
        if has_answered:
            await h.answer()
            await turns(50)  # it has put the house in order
        await asyncio.to_thread(runner.death.tell, gone())
        await turns()
        assert h.engine.is_dead
        await h.engine.wait_dead()
        with pytest.raises(EngineDeadError, match="no step can run any more: DeviceDeadError"):
            h.submit("late")
        assert h.engine.stats().num_failed_steps == 0


@pytest.mark.parametrize("is_first", [False, True])
async def test_who_comes_while_the_runner_dies_is_told_as_under_load(is_first):
    runner = FakeRunner()
    async with serving(runner) as h:
        await turns()
        streams = [h.submit("before")] if is_first else []
        runner.death.tell(gone())
        streams.append(h.submit("behind"))
        for stream in streams:
            with pytest.raises(EngineDeadError, match="no step can run any more: DeviceDeadError"):
                await collect(stream)
            with pytest.raises(StopAsyncIteration):
                await anext(stream)


async def test_who_waits_for_a_reader_hears_that_the_runner_has_died():
    runner = FakeRunner()
    async with serving(runner) as h:
        stream = h.submit()
        h.engine.hold("r", is_full=True)
        await turns()
        assert runner.plans == []
        runner.death.tell(gone())
        await turns(2)
        assert h.engine.is_dead
        with pytest.raises(EngineDeadError, match="no step can run any more"):
            await collect(stream)


@IN_FLIGHT
async def test_what_a_runner_still_says_when_it_has_died_is_delivered(max_steps_in_flight):
    runner = FakeRunner(hold=True)
    async with serving(runner, max_steps_in_flight=max_steps_in_flight) as h:
        streams = [h.submit("long"), h.submit("short", PROMPT[1:], max_tokens=1)]
        await runner.launched()
        runner.death.tell(gone())
        await turns()
        assert not h.engine.is_dead
        runner.release_all()
        assert (await collect(streams[1])).text == "H"
        assert await text_before_error(streams[0]) == "H"
        assert h.engine.is_dead


async def test_an_engine_whose_runner_dies_before_it_starts_is_dead_when_it_has():
    runner = FakeRunner()
    runner.death.tell(gone())
    async with serving(runner) as h:
        await turns(2)
        assert h.engine.is_dead


@pytest.mark.parametrize("when", ["draining", "closing", "closed"])
async def test_a_runner_that_ends_because_the_engine_does_is_no_death(when):
    class Ending(FakeRunner):
        def close(self):
            if when == "closing":
                self.death.tell(gone())
            super().close()

    runner = Ending(hold=True)
    async with serving(runner) as h:
        stream = h.submit(max_tokens=1)
        await runner.launched()
        stopping = asyncio.create_task(h.engine.stop(drain_timeout_s=60))
        await turns()
        if when == "draining":  # the last step is on its way
            runner.death.tell(gone())
        runner.release_all()
        assert (await collect(stream)).text == "H"
        await stopping
        if when == "closed":
            runner.death.tell(gone())
        await turns()
        assert not h.engine.is_dead


def test_a_runner_may_outlive_the_loop_of_its_engine(caplog):
    runner = FakeRunner.__new__(FakeRunner)

    async def serve() -> None:
        runner.__init__()
        async with serving(runner):
            await turns()

    asyncio.run(serve())
    runner.death.tell(gone())
    assert caplog.text == ""


class BrokenScheduler(Scheduler):
    """Raises in the method named ``broken``: the accounting cannot be trusted from then on."""

    broken = ""

    def _check(self, method):
        if method == self.broken:
            raise AssertionError("an invariant does not hold")

    def add(self, request):
        self._check("add")
        super().add(request)

    def schedule(self):
        self._check("schedule")
        return super().schedule()

    def update(self, output):
        self._check("update")
        return super().update(output)

    def finish(self, *args, **kwargs):
        self._check("finish")
        return super().finish(*args, **kwargs)

    def check_integrity(self):
        self._check("check_integrity")
        super().check_integrity()


@pytest.mark.parametrize("method", ["schedule", "update"])
async def test_a_broken_scheduler_is_death(method):
    runner = FakeRunner(hold=True)
    async with serving(runner, scheduler_class=BrokenScheduler) as h:
        streams = [h.submit("a"), h.submit("b")]
        await runner.release(2)
        h.scheduler.broken = method
        runner.release_all()
        for stream in streams:
            with pytest.raises(EngineDeadError, match="AssertionError"):
                await collect(stream)
        with pytest.raises(EngineDeadError):
            h.submit("c")


async def test_a_scheduler_that_breaks_outside_the_loop_is_death_too():
    runner = FakeRunner(hold=True)
    async with serving(runner, scheduler_class=BrokenScheduler) as h:
        stream = h.submit("a")
        await runner.launched()
        h.scheduler.broken = "finish"
        h.engine.abort("a")
        with pytest.raises(EngineDeadError, match="finish"):
            await collect(stream)
    async with serving(FakeRunner(), scheduler_class=BrokenScheduler) as h:
        streams = [h.submit("a", stop=("w",)), h.submit("b")]
        h.scheduler.broken = "finish"
        for stream in streams:
            with pytest.raises(EngineDeadError, match="finish"):
                await collect(stream)
    async with serving(FakeRunner(), scheduler_class=BrokenScheduler) as h:
        h.scheduler.broken = "add"
        with pytest.raises(EngineDeadError, match="add"):
            h.submit("a")


async def test_books_that_do_not_balance_when_idle_are_death():
    async with serving(FakeRunner(), scheduler_class=BrokenScheduler) as h:
        h.scheduler.broken = "check_integrity"
        await h.answer()
        while not h.engine.is_dead:
            await asyncio.sleep(0)


async def test_a_token_that_cannot_be_decoded_fails_its_request_only():
    class Tokenizer(ByteTokenizer):
        def pieces(self, *, skip_special_tokens):
            return None

        def decode(self, ids, *, skip_special_tokens=True):
            if ord("!") in ids:
                raise KeyError("no such piece")
            return super().decode(ids, skip_special_tokens=skip_special_tokens)

    answers = {"good": "fine.", "bad": "oh no!..."}
    async with serving(FakeRunner(answers), tokenizer=Tokenizer()) as h:
        good, bad = h.submit("good"), h.submit("bad")
        assert (await collect(good)).text == "fine."
        with pytest.raises(EngineError, match="KeyError"):
            await collect(bad)
        await turns()
        assert h.num_held_blocks == 0


# Shutting down


async def test_stopping_lets_the_running_finish_and_refuses_new_ones():
    runner = FakeRunner(hold=True)
    async with serving(runner) as h:
        stream = h.submit()
        await runner.launched()
        stopping = asyncio.create_task(h.engine.stop(drain_timeout_s=60))
        await turns()
        with pytest.raises(EngineDeadError, match="shutting down"):
            h.submit("late")
        runner.release_all()
        assert (await collect(stream)).text == "Hello, world!"
        await stopping
        assert runner.is_closed
        assert not h.engine.is_dead
        await h.engine.stop()


async def test_stopping_aborts_what_does_not_finish_in_time():
    runner = FakeRunner(hold=True)
    async with serving(runner, max_num_seqs=1) as h:
        streams = [h.submit("runs"), h.submit("waits")]
        await runner.release(2)
        stopping = asyncio.create_task(h.engine.stop())
        await turns()
        for stream in streams:
            assert (await collect(stream)).finish_reason is FinishReason.ABORT
        runner.release_all()
        await stopping


async def test_a_second_stop_cuts_the_first_one_short():
    runner = FakeRunner(hold=True)
    async with serving(runner) as h:
        stream = h.submit()
        await runner.launched()
        patient = asyncio.create_task(h.engine.stop(drain_timeout_s=3600))
        await turns()
        hasty = asyncio.create_task(h.engine.stop())
        await turns()
        runner.release_all()
        await asyncio.gather(patient, hasty)
        assert (await collect(stream)).finish_reason is FinishReason.ABORT


async def test_a_step_that_hangs_does_not_hold_up_the_end(monkeypatch):
    monkeypatch.setattr("streamserve.engine.async_engine._STOP_GRACE_S", 0.0)
    runner = FakeRunner(hold=True)
    async with serving(runner) as h:
        stream = h.submit()
        await runner.launched()
        async with asyncio.timeout(60):
            await h.engine.stop()
        assert (await collect(stream)).finish_reason is FinishReason.ABORT
        assert not runner.is_closed, "a step has it"
        runner.release_all()


async def test_a_limit_passes_while_its_request_is_paused():
    runner = FakeRunner({"r": "x" * 400}, hold=True)
    async with serving(runner) as h:
        params = SamplingParams(max_tokens=400)
        limits = TimeLimits(total_s=0.2)
        stream = h.engine.submit(list(PROMPT), params, request_id="r", time_limits=limits)
        await runner.release()

        async def read():
            await stream.get()
            h.engine.hold("r", True)
            runner.release_all()
            await collect(stream)

        with pytest.raises(EngineError, match="deadline_ms"):
            await asyncio.wait_for(read(), 60)


async def test_who_is_paused_does_not_hold_up_the_end():
    runner = FakeRunner({"r": "x" * 400}, hold=True)
    async with serving(runner) as h:
        stream = h.submit(max_tokens=400)
        await runner.release()
        await stream.get()
        h.engine.hold("r", True)
        runner.release_all()
        while h.engine.has_work:
            await asyncio.sleep(0)
        await h.engine.stop(drain_timeout_s=0.01)
        assert runner.is_closed
        assert (await collect(stream)).finish_reason is FinishReason.ABORT


async def test_starting_twice_is_misuse():
    async with serving(FakeRunner()) as h:
        with pytest.raises(RuntimeError):
            await h.engine.start()


# Any order of events


events = st.lists(
    st.tuples(
        st.sampled_from(["submit", "submit", "abort", "close", "step", "step", "fail"]),
        st.integers(0, 30),
    ),
    max_size=40,
)


@IN_FLIGHT
@settings(deadline=None, max_examples=40)
@given(events=events)
async def test_every_request_ends_exactly_once(max_steps_in_flight, events):
    runner = FakeRunner(default="some words END and more", hold=True)
    config = {"max_steps_in_flight": max_steps_in_flight, "num_blocks": 12, "max_num_seqs": 3}
    async with serving(runner, max_num_batched_tokens=20, **config) as h:
        closed = set()
        num_failures = 0
        for event, n in events:
            stream = h.streams[n % len(h.streams)] if h.streams else None
            if event == "submit":
                stop = ("END",) if n % 2 else ()
                request_id = f"r{len(h.streams)}"
                h.submit(request_id, PROMPT[n % 20 :], max_tokens=1 + n, stop=stop)
            elif event == "abort" and stream is not None:
                h.engine.abort(stream.request_id)
            elif event == "close" and stream is not None:
                stream.close()
                closed.add(stream.request_id)
            elif event == "step" and not h.engine.is_idle:
                await runner.release()
            elif event == "fail" and num_failures < MAX_CONSECUTIVE_FAILED_STEPS - 1:
                num_failures += 1
                runner.failing_samples.add(len(runner.plans) - n % 2)
            await turns()
            h.scheduler.check_integrity()
        runner.release_all()
        for stream in h.streams:
            ends = 0
            try:
                async for output in stream:
                    ends += output.finish_reason is not None
            except EngineError:
                ends += 1
            assert ends == (stream.request_id not in closed) or stream.has_ended
            assert ends <= 1


async def test_the_null_runner_counts_what_a_runner_would_compute():
    runner = NullRunner([1, 2, 3], per_request=True)
    async with serving(runner) as h:
        first = await h.answer("a", max_tokens=9, ignore_eos=True)
        assert runner.num_computed_tokens == {"a": len(PROMPT) + 8}
        second = await h.answer("b", max_tokens=9, ignore_eos=True)
        assert sorted(set(first.token_ids)) == [1, 2, 3]
        assert first.token_ids != second.token_ids
        assert set(runner.num_computed_tokens) == {"b"}


async def test_a_pace_decides_when_the_null_runner_s_steps_end():
    waiting = []
    async with serving(NullRunner(list(b"ab"), pace=waiting.append)) as h:
        stream = h.submit(max_tokens=3)
        for expected in ["a", "b", "a"]:
            await turns()
            assert stream.is_drained
            waiting.pop()()
            assert (await stream.get()).text == expected
