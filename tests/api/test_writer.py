"""uvicorn's way without its message: chunks, and when they must wait."""

import asyncio

from uvicorn.protocols.http.flow_control import FlowControl

from streamserve.api.frames import PING
from streamserve.api.sse_response import SseResponse
from streamserve.api.writer import UvicornWriter
from tests.api.harness import until


class Transport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.ended: list[str] = []

    def close(self) -> None:
        self.ended.append("closed")

    def abort(self) -> None:
        self.ended.append("aborted")

    def write(self, data) -> None:
        self.written += data

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


class Cycle:
    """What the writer needs of uvicorn's ``RequestResponseCycle``."""

    def __init__(self) -> None:
        self.transport = Transport()
        self.flow = FlowControl(self.transport)
        self.disconnected = False


async def test_a_part_is_one_chunk_whoever_writes_it():
    cycle = Cycle()
    writer = UvicornWriter(cycle)
    assert writer.write(b"0123456789") is None
    assert writer.write_now(b"ab")
    assert cycle.transport.written == b"a\r\n0123456789\r\n2\r\nab\r\n"


async def test_nothing_is_written_now_while_the_buffer_is_full():
    cycle = Cycle()
    writer = UvicornWriter(cycle)
    cycle.flow.pause_writing()
    assert not writer.write_now(b"ab")
    assert cycle.transport.written == b""
    waiting = asyncio.ensure_future(writer.write(b"cd"))
    await asyncio.sleep(0)
    assert not waiting.done()
    cycle.flow.resume_writing()
    await waiting
    assert writer.write_now(b"ef")
    assert cycle.transport.written == b"2\r\ncd\r\n2\r\nef\r\n"


async def test_a_text_sink_writes_what_write_now_would():
    cycle = Cycle()
    writer = UvicornWriter(cycle)
    sent = []
    sink = writer.text_sink(b'data: {"text":', b"}\n\n", lambda: sent.append(writer.num_written))
    assert sink('a "b"')
    assert cycle.transport.written == b'1a\r\ndata: {"text":"a \\"b\\""}\n\n\r\n'
    cycle.flow.pause_writing()
    assert not sink("full")
    cycle.flow.resume_writing()
    cycle.disconnected = True
    assert sink("gone")
    assert len(cycle.transport.written) == 0x1A + 6
    assert sent == [1, 2]


async def test_nothing_is_written_to_a_client_that_has_left():
    cycle = Cycle()
    writer = UvicornWriter(cycle)
    cycle.disconnected = True
    assert writer.write_now(b"ab")
    assert writer.write(b"ab") is None
    assert cycle.transport.written == b""


async def test_a_reader_that_does_not_read_is_not_waited_for_behind_an_error(monkeypatch):
    monkeypatch.setattr("streamserve.api.writer.LINGER_S", 0.0)
    cycle = Cycle()
    UvicornWriter(cycle).close_connection()
    assert cycle.transport.ended == ["closed"]
    await until(lambda: cycle.transport.ended == ["closed", "aborted"])


class Silent(SseResponse):
    """Sends nothing by itself; ``sent`` are the parts that have found room."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.has_room = asyncio.Event()
        self.has_room.set()
        super().__init__(
            "silent",
            headers={},
            ping_interval_s=3600.0,
            raw_send=self._take,
            stall_timeout_s=60.0,
            on_stall=lambda: None,
        )

    async def _take(self, message) -> None:
        await self.has_room.wait()
        self.sent.append(message["body"])

    async def _send_events(self) -> None:
        """Nothing."""

    def _failure(self, exc: Exception) -> bytes:
        return b""

    async def ring(self) -> None:
        """The timer of the pings rings."""
        self._stop_comments()
        self._on_timer()
        await turns()


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_each_turn_of_the_timer_in_which_nothing_was_written_brings_a_ping():
    response = Silent()
    await response.ring()
    await response.ring()
    assert response.sent == [PING] * 2
    await response._send(b"frame")
    await response.ring()
    assert response.sent == [PING, PING, b"frame"]
    await response.ring()
    assert response.sent[3:] == [PING]
    response._stop_comments()


async def test_no_ping_waits_behind_one_that_waits():
    response = Silent()
    response.has_room.clear()
    for _ in range(3):
        response._on_timer()
        await turns()
    response.has_room.set()
    await turns()
    assert response.sent == [PING]
    response._stop_comments()


async def test_no_ping_follows_the_end():
    response = Silent()
    response._on_timer()
    response._end()
    await turns()
    await response.ring()
    assert response.sent == []
    response._stop_comments()
