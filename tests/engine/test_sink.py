"""A reader's sink: the step loop writes while the reader waits, and wakes it for all else."""

import asyncio

import pytest

from streamserve.core.request import FinishReason
from streamserve.engine.outputs import RequestOutput, Usage
from streamserve.errors import EngineError
from tests.engine.fakes import FakeRunner, serving, turns


class ListSink:
    """Room for ``room`` texts."""

    def __init__(self, room: int = 1000) -> None:
        self.texts: list[str] = []
        self.room = room

    def __call__(self, text: str) -> bool:
        if not self.room:
            return False
        self.room -= 1
        self.texts.append(text)
        return True


async def read(stream, sink, outputs: list[RequestOutput]) -> None:
    """As the API does: the first output wakes, then the sink is set."""
    while True:
        output = await stream.get()
        outputs.append(output)
        sink.texts.append(output.text)
        stream.sink = sink
        if output.finish_reason is not None:
            return


async def test_the_reader_is_woken_for_the_first_text_and_the_end_only():
    sink, outputs = ListSink(), []
    async with serving(FakeRunner(default="Hello")) as h:
        await read(h.submit(), sink, outputs)
        stats = h.engine.stats()
    assert sink.texts == ["H", "e", "l", "l", "o", ""]
    assert [output.text for output in outputs] == ["H", ""]
    assert outputs[-1].usage.completion_tokens == 6
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert stats.generation_tokens == 6


@pytest.mark.parametrize("params", [{"stop": ("lo",)}, {"max_tokens": 5}])
@pytest.mark.parametrize("room", [0, 1, 2, 1000])
async def test_whatever_the_room_the_text_is_whole_and_in_order(room, params):
    sink, outputs = ListSink(room), []
    async with serving(FakeRunner(default="Hello")) as h:
        await read(h.submit(**params), sink, outputs)
    assert "".join(sink.texts) == ("Hel" if "stop" in params else "Hello")
    assert outputs[-1].usage.completion_tokens == 5


async def test_nothing_overtakes_what_lies_in_the_mailbox():
    """A full sink has room again before the reader, woken, has had its turn."""
    runner, sink = FakeRunner(default="abcdef", hold=True), ListSink()
    async with serving(runner) as h:
        stream = h.submit()
        stream.sink = sink
        reader = asyncio.create_task(stream.get())
        await runner.release(2)
        assert sink.texts == ["a", "b"]
        sink.room = 0
        stream.put(RequestOutput("X", [], Usage(stream.num_prompt_tokens)))
        sink.room = 9
        assert stream.ready_sink is None
        assert (await reader).text == "X"
        await runner.release(1)
        assert sink.texts == ["a", "b"]
        assert stream.get_nowait().text == "c"
        stream.close()
        runner.release_all()
        await turns()


async def test_half_a_character_does_not_reach_the_sink():
    sink, outputs = ListSink(), []
    async with serving(FakeRunner(default="aé!")) as h:
        await read(h.submit(), sink, outputs)
    assert sink.texts == ["a", "é", "!", ""]


async def test_a_sink_that_fails_ends_its_own_request_only():
    def broken(text: str) -> bool:
        raise OSError(text)

    runner = FakeRunner()
    async with serving(runner) as h:
        bad, good = h.submit("bad"), h.submit("good")
        bad.sink = broken
        with pytest.raises(EngineError):
            await bad.get()
        outputs: list[RequestOutput] = []
        sink = ListSink()
        await read(good, sink, outputs)
        assert "".join(sink.texts) == runner.default


async def test_after_the_reader_has_left_nothing_is_written():
    runner, sink = FakeRunner(hold=True), ListSink()
    async with serving(runner) as h:
        stream = h.submit()
        stream.sink = sink
        reader = asyncio.create_task(stream.get())
        await runner.release(1)
        reader.cancel()
        stream.close()
        await runner.release(1)
        await turns()
        assert sink.texts == ["H"]
        assert h.num_held_blocks == 0  # by the next step
