"""The mailbox: never blocks, merges what is not read, ends once."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamserve.core.plan import TokenLogprobs
from streamserve.core.request import FinishReason
from streamserve.engine.outputs import RequestOutput, Usage, merge_outputs
from streamserve.engine.stream import RequestStream
from streamserve.errors import EngineError

LAST = FinishReason.STOP


def make_stream(closed=None):
    on_close = (lambda request_id: None) if closed is None else closed.append
    return RequestStream("r", 3, arrival_time=0.0, on_close=on_close)


def out(n, text="", finish_reason=None):
    return RequestOutput(text, [n], Usage(3, n), finish_reason=finish_reason)


outputs = st.builds(
    RequestOutput,
    text=st.text(max_size=3),
    token_ids=st.lists(st.integers(0, 9), max_size=3),
    usage=st.builds(Usage, st.just(3), st.integers(0, 9)),
    logprobs=st.lists(
        st.builds(TokenLogprobs, st.integers(0, 9), st.just(-1.0), st.just(())), max_size=2
    ),
    finish_reason=st.sampled_from([None, LAST]),
    stop_reason=st.sampled_from([None, "x", 7]),
)


@given(outputs, outputs, outputs)
def test_merging_is_associative(a, b, c):
    left, right = merge_outputs([a, b]), merge_outputs([b, c])
    assert merge_outputs([left, c]) == merge_outputs([a, right]) == merge_outputs([a, b, c])


@given(outputs)
def test_merging_one_is_itself(a):
    assert merge_outputs([a]) == a


async def test_each_output_that_is_read_in_time_comes_alone():
    stream = make_stream()
    for n in range(3):
        stream.put(out(n, "ab"))
        assert (await stream.get()).token_ids == [n]
    assert stream.get_nowait() is None


async def test_promise_a_mailbox_that_is_full_says_so_and_when_there_is_room_again():
    calls = []
    stream = RequestStream(
        "r",
        3,
        arrival_time=0.0,
        on_close=lambda request_id: None,
        on_full=lambda _, is_full: calls.append(is_full),
    )
    stream.max_unread_bytes = 1000

    def num_taken(**more):
        """Outputs that it takes behind the first before it is full."""
        del calls[:]
        stream.put(out(0, "ab"))
        count = 0
        while not calls:
            stream.put(RequestOutput("ab", [1], Usage(3, 1), **more))
            count += 1
        assert stream.get_nowait() is not None
        assert calls == [True, False]
        return count

    count = num_taken()
    assert 10 < count < 100
    assert num_taken() == count, "what was read is forgotten"
    assert num_taken(logprobs=[TokenLogprobs(1, -1.0, ())]) < count / 2
    del calls[:]
    for _ in range(2):
        stream.put(out(1))
        stream.get_nowait()
    stream.max_unread_bytes = 10**9
    for n in range(1000):
        stream.put(out(n, "ab"))
    assert len(stream._unread) < 100, "they are merged meanwhile"
    stream.max_unread_bytes = 0
    stream.put(out(1, "the last", LAST))
    assert calls == [], "nor is it full for who reads in time, nor when nothing more comes"


@pytest.mark.parametrize("count", [2, 63, 64, 65, 1000])
async def test_unread_outputs_are_one(count):
    stream = make_stream()
    for n in range(count):
        stream.put(out(n, str(n)))
    assert not stream.is_drained
    merged = await stream.get()
    assert merged.token_ids == list(range(count))
    assert merged.text == "".join(map(str, range(count)))
    assert merged.num_merged == count
    assert stream.is_drained


async def test_putting_does_not_touch_what_was_put():
    stream = make_stream()
    ids = [1]
    stream.put(RequestOutput("a", ids, Usage(3)))
    stream.put(out(2))
    await stream.get()
    assert ids == [1]


async def test_iteration_ends_behind_the_last_output():
    stream = make_stream()
    stream.put(out(1))
    stream.put(out(2, finish_reason=LAST))
    assert [output.token_ids async for output in stream] == [[1, 2]]
    assert stream.has_ended
    with pytest.raises(RuntimeError, match="past its end"):
        await stream.get()


async def test_a_waiting_reader_is_woken():
    stream = make_stream()
    reader = asyncio.create_task(stream.get())
    await asyncio.sleep(0)
    stream.put(out(1))
    assert (await reader).token_ids == [1]


async def test_a_cancelled_read_loses_nothing():
    stream = make_stream()
    reader = asyncio.create_task(stream.get())
    await asyncio.sleep(0)
    stream.put(out(1))
    reader.cancel()
    await asyncio.wait([reader])
    assert (await stream.get()).token_ids == [1]


async def test_a_failure_comes_after_what_was_put():
    stream = make_stream()
    stream.put(out(1))
    stream.fail(EngineError("broken"))
    assert (await stream.get()).token_ids == [1]
    with pytest.raises(EngineError, match="broken"):
        await stream.get()
    assert [output async for output in stream] == []


async def test_a_failure_wakes_the_reader():
    stream = make_stream()
    reader = asyncio.create_task(stream.get())
    await asyncio.sleep(0)
    stream.fail(EngineError("broken"))
    with pytest.raises(EngineError):
        await reader


async def test_closing_tells_the_engine_once():
    closed = []
    stream = make_stream(closed)
    stream.close()
    await stream.aclose()
    assert closed == ["r"]
    stream.put(out(1, finish_reason=LAST))
    assert [output async for output in stream] == []


async def test_closing_after_the_end_tells_nobody():
    closed = []
    async with make_stream(closed) as stream:
        stream.put(out(1, finish_reason=LAST))
    assert closed == []


@pytest.mark.parametrize("again", ["put", "fail"])
async def test_nothing_comes_after_the_end(again):
    stream = make_stream()
    stream.put(out(1, finish_reason=LAST))
    with pytest.raises(AssertionError):
        stream.put(out(2)) if again == "put" else stream.fail(EngineError("late"))
