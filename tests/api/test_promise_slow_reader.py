"""Promise: a slow reader hurts nobody. Real sockets with small buffers, and readers that stall."""

import asyncio
import contextlib
import dataclasses
import json
import resource
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
from uvicorn.protocols.http.flow_control import FlowControl

from streamserve.api.protocol import ServeProtocol
from streamserve.api.server import bind_sockets
from streamserve.api.sse_response import SseResponse
from streamserve.config import StreamConfig
from tests.api.harness import TEXT, Api, Exchange, chat_body, events_of, text_of, until

NUM_READERS = 200
MAX_TOKENS = 4000
BUFFER = 8 * 2**10
RECEIVE_BUFFER = 4096  # the kernel doubles it
FRAME = 256  # bytes of a token's frame, at most


def rss_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@contextlib.asynccontextmanager
async def silent(address, asked):
    """A client that sends this and reads nothing yet."""
    loop = asyncio.get_running_loop()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        sock.setblocking(False)
        await loop.sock_connect(sock, address)
        await loop.sock_sendall(sock, asked)
        yield sock


def asking(address, *more, **fields):
    """A client that asks for a stream, and at once for ``more``."""
    asked = ""
    for each in (fields, *more):
        body = json.dumps({"prompt": "Hi", "stream": True, "max_tokens": MAX_TOKENS, **each})
        asked += (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}"
        )
    return silent(address, asked.encode())


async def body_of(sock):
    """The whole response, which has chunks."""
    loop = asyncio.get_running_loop()
    raw = b""
    async with asyncio.timeout(60):
        while not raw.endswith(b"0\r\n\r\n"):
            piece = await loop.sock_recv(sock, 65536)
            if not piece:
                break
            raw += piece
    body, rest = b"", raw.partition(b"\r\n\r\n")[2]
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body += rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]
    return body


async def read_to_end(sock):
    """The events of the whole response."""
    return events_of(await body_of(sock))


async def everything(sock):
    """What comes until the server closes the connection."""
    raw = b""
    async with asyncio.timeout(60):
        while piece := await asyncio.get_running_loop().sock_recv(sock, 65536):
            raw += piece
    return raw


async def standstill(api):
    """Wait until nothing is generated: the kernel may still move what its buffers have room for."""
    for _ in range(100):
        num_steps = api.runner.num_steps
        for _ in range(100):
            await asyncio.sleep(0)
        if api.runner.num_steps == num_steps:
            return
    pytest.fail("somebody generates for nobody")


def slow_api(**options):
    streams = StreamConfig(max_buffer_bytes=BUFFER, **options)
    return Api(
        streams=streams, max_model_len=2 * MAX_TOKENS, num_blocks=1024, max_num_waiting=NUM_READERS
    )


async def test_promise_memory_is_flat_with_readers_that_never_read():
    api = slow_api()
    async with api.serving() as address, contextlib.AsyncExitStack() as stack:
        before = rss_bytes()
        readers = [await stack.enter_async_context(asking(address)) for _ in range(NUM_READERS)]
        # There are 8 seats: whoever is paused gives his to the next.
        await until(lambda: api.engine.stats().num_paused == NUM_READERS)
        await standstill(api)
        stats = api.engine.stats()
        num_generated = stats.generation_tokens
        assert stats.num_running == stats.num_waiting == 0
        in_kernel = 2 * (BUFFER // 2 + RECEIVE_BUFFER)  # it takes small frames at their own size
        held = in_kernel + BUFFER // 4 + FRAME
        assert num_generated <= NUM_READERS * (held // 100 + BUFFER // 4 // 40 + 8)
        assert num_generated * 3 < NUM_READERS * MAX_TOKENS
        assert rss_bytes() - before < NUM_READERS * 2 * BUFFER + 16 * 2**20
        # A reader that reads is served as ever meanwhile, and one that reads again gets it all.
        for sock in (await stack.enter_async_context(asking(address)), readers[100]):
            events = await read_to_end(sock)
            assert events[-1] == "[DONE]"
            assert text_of(events).encode() == TEXT * (MAX_TOKENS // len(TEXT))
        assert len(events) < MAX_TOKENS, "what waited came in larger pieces"
        assert api.engine.stats().num_paused == NUM_READERS - 1
    assert api.engine.is_idle
    assert api.num_used_blocks == 0


async def test_promise_several_choices_are_paused_and_come_whole():
    api = slow_api()
    async with api.serving() as address, asking(address, n=3, max_tokens=1000) as sock:
        await until(lambda: api.engine.stats().num_paused == 3)
        events = await read_to_end(sock)
    assert events[-1] == "[DONE]"
    for index in range(3):
        assert text_of(events, index).encode() == TEXT * 100


async def test_promise_the_answers_of_one_stream_share_its_bound():
    async with Api(is_held=True).running() as api:
        body = chat_body(n=4, stream=True, max_tokens=9)
        exchange = Exchange(api.app, "POST", "/v1/chat/completions", body)
        await until(lambda: len(api.engine._live) == 4)
        bounds = [live.stream.max_unread_bytes for live in api.engine._live.values()]
        assert 0 < sum(bounds) <= api.config.streams.max_unread_bytes
        exchange.leave()
        await exchange.finished()


async def test_promise_a_reader_that_stalls_too_long_gets_an_error():
    api = slow_api(stall_timeout_s=0.2)
    async with (
        api.serving() as address,
        asking(address, stream_options={"include_usage": True}) as sock,
    ):
        await until(lambda: api.engine.stats().num_paused == 1)
        await until(lambda: api.app.context.gate.num_inside == 0)
        assert api.engine.is_idle
        assert api.num_used_blocks == 0
        *chunks, usage, error = await read_to_end(sock)
        assert error["error"]["code"] == "reader_stalled"
        assert error["error"]["status"] == 408
        text = text_of(chunks)
        assert text.encode() == (TEXT * MAX_TOKENS)[: len(text)]
        assert len(text) <= usage["usage"]["completion_tokens"] < MAX_TOKENS
        assert await asyncio.get_running_loop().sock_recv(sock, 1) == b"", "still open"
    assert api.app.context.metrics.num_finished["error"] == 1
    assert api.app.context.metrics.num_stalled == 1
    assert api.engine.stats().num_pauses >= 1  # the kernel may still have taken some


async def test_promise_the_kernels_part_of_the_bound_is_set_and_counted():
    api = slow_api()
    sizes = api.config.streams
    total = sizes.send_buffer_bytes + sizes.high_water_bytes + sizes.max_unread_bytes
    assert total == sizes.max_buffer_bytes == BUFFER
    for listener in bind_sockets(api.config):
        with listener, socket.socket() as client:
            listener.listen()
            client.connect(listener.getsockname())
            accepted, _ = listener.accept()
            with accepted:
                size = accepted.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
            assert sizes.send_buffer_bytes <= size <= 2 * max(sizes.send_buffer_bytes, 2304)


class Silence(SseResponse):
    """Sends nothing but pings."""

    def _failure(self, exc):
        raise exc

    async def _send_events(self):
        await asyncio.Event().wait()


async def test_promise_a_connection_that_is_full_gets_no_more_than_one_ping():
    room, sent = asyncio.Event(), []

    async def send(message):
        sent.append(message)
        if message["type"] == "http.response.body":
            await room.wait()

    response = Silence(
        "r",
        headers={},
        ping_interval_s=1e-6,
        raw_send=send,
        stall_timeout_s=60,
        on_stall=lambda: None,
    )
    answering = asyncio.create_task(response({"type": "http"}, asyncio.Event().wait, send))
    await until(lambda: len(sent) == 2)
    for _ in range(100):
        await asyncio.sleep(0)
    assert len(sent) == 2, "its start, and one that waits for room"
    room.set()
    await until(lambda: len(sent) == 5)
    answering.cancel()
    await asyncio.wait([answering])


class Connection(ServeProtocol):
    """One that has answered; ``num_unsent`` bytes wait for its client."""

    def __init__(self):
        self.num_unsent = 100
        self.num_cut = 0
        self.loop = asyncio.get_running_loop()
        self.transport = SimpleNamespace(
            get_write_buffer_size=lambda: self.num_unsent, abort=self._cut
        )
        self.flow = FlowControl(self.transport)
        self.cycle = SimpleNamespace(response_complete=True)
        self._watch_unsent()

    def _cut(self):
        self.num_cut += 1


@pytest.mark.parametrize(
    ("num_unsent", "is_answering", "is_full", "is_cut"),
    [
        (100, False, False, True),
        (99, False, False, False),
        (120, True, False, False),  # the next answer has added to it
        (120, True, True, True),
        (0, False, False, False),
    ],
)
async def test_promise_who_takes_some_of_what_waits_is_not_cut_off(
    num_unsent, is_answering, is_full, is_cut
):
    connection = Connection()
    connection.num_unsent = num_unsent
    connection.cycle.response_complete = not is_answering
    connection.flow.write_paused = is_full
    watch = connection._unsent_watch
    watch.cancel()
    connection._on_unsent()
    assert connection.num_cut == is_cut
    is_watched = connection._unsent_watch not in (None, watch)
    assert is_watched == (not is_cut and num_unsent > 0)
    if is_watched:
        connection._unsent_watch.cancel()


WHOLE = {"stream": False, "n": 8}  # more than all buffers


@pytest.mark.parametrize("more", [(), ({},), (WHOLE,)], ids=["alone", "stream", "whole"])
async def test_promise_who_never_reads_a_whole_answer_is_cut_off(more):
    """And what was asked for behind it is not made for nobody."""
    api = slow_api(stall_timeout_s=0.2)
    async with api.serving() as address, asking(address, *more, **WHOLE) as sock:
        await until(lambda: api.app.context.metrics.num_finished["length"] >= 8)
        await until(lambda: api.app.context.metrics.num_stalled == 1)
        await until(lambda: api.app.context.gate.num_inside == 0)
        assert len((await everything(sock)).partition(b"\r\n\r\n")[2]) < 8 * MAX_TOKENS
        await until(lambda: api.engine.is_idle)
        assert api.num_used_blocks == 0


async def test_promise_a_whole_answer_may_take_longer_than_a_connection_may_be_idle(monkeypatch):
    monkeypatch.setattr("streamserve.api.protocol._LINGER_S", 0.0)
    api = slow_api()
    api.config = dataclasses.replace(api.config, keep_alive_timeout_s=0.02)
    async with api.serving() as address, asking(address, **WHOLE) as sock:
        await until(lambda: api.app.context.metrics.num_finished["length"] == 8)
        await asyncio.sleep(0.1)
        raw = await everything(sock)
    choices = json.loads(raw.partition(b"\r\n\r\n")[2])["choices"]
    assert [choice["text"].encode() for choice in choices] == [TEXT * (MAX_TOKENS // len(TEXT))] * 8


async def test_promise_of_what_was_written_in_the_background_a_reader_holds_no_more():
    """There is all of it at once; the response is none the worse for a reader that stalls."""
    api = slow_api(stall_timeout_s=0.2)
    async with api.serving() as address:
        body = {"input": "Hi", "background": True, "max_output_tokens": MAX_TOKENS}
        made = await api.call("POST", "/v1/responses", body)
        path = f"/v1/responses/{made.json['id']}?stream=true"
        whole = await api.call("GET", path)
        async with silent(address, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()) as sock:
            await until(lambda: api.app.context.metrics.num_stalled == 1)
            *events, error, rest = (await body_of(sock)).split(b"\n\n")
        again = await api.call("GET", path)
    name, data = error.split(b"\n")
    assert name == b"event: error"
    failure = json.loads(data.removeprefix(b"data: "))
    assert (failure["type"], failure["code"]) == ("error", "reader_stalled")
    assert failure["sequence_number"] == len(events)
    assert rest == b""
    assert whole.body.split(b"\n\n")[: len(events)] == events
    assert sum(map(len, events)) * 4 < len(whole.body)
    assert again.body == whole.body
