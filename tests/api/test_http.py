"""The server on a real socket: bytes, connections, limits."""

import asyncio
import contextlib
import json
import socket

import pytest

from streamserve.api.server import bind_sockets
from streamserve.config import ApiConfig
from streamserve.engine.stream import RequestStream
from streamserve.errors import ConfigError
from tests.api.harness import Api, BrokenRunner, chat_body, events_of, text_of, until


class Client:
    """One raw connection."""

    def __init__(self, reader, writer):
        self.reader = reader
        self.writer = writer

    async def send(self, method, path, body=None, *, headers=(), expect=False):
        raw = b"" if body is None else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1", "Host: test", f"Content-Length: {len(raw)}"]
        lines += ["Content-Type: application/json", *headers]
        self.writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + raw)
        await self.writer.drain()

    async def head(self):
        async with asyncio.timeout(60):
            raw = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        status, *lines = raw.removesuffix("\r\n\r\n").split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        return int(status.split()[1]), headers

    async def chunk(self):
        """One chunk of a chunked body; empty at its end."""
        async with asyncio.timeout(60):
            size = int(await self.reader.readuntil(b"\r\n"), 16)
            data = await self.reader.readexactly(size)
            assert await self.reader.readexactly(2) == b"\r\n"
        return data

    async def chunks(self):
        found = []
        while data := await self.chunk():
            found.append(data)
        return found

    async def whole(self):
        status, headers = await self.head()
        async with asyncio.timeout(60):
            body = await self.reader.readexactly(int(headers["content-length"]))
        return status, headers, body

    async def is_closed_by_server(self):
        async with asyncio.timeout(60):
            return await self.reader.read() == b""


def connected(address):
    return talking(asyncio.open_connection(*address))


@contextlib.asynccontextmanager
async def talking(opening):
    """A client of a connection that is being opened, until the block ends."""
    reader, writer = await opening
    try:
        yield Client(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


CHAT = "/v1/chat/completions"


async def test_the_reader_sleeps_between_the_first_token_and_the_end(monkeypatch):
    """The step loop writes what comes between, each token in a chunk of its own."""
    get, gets = RequestStream.get, []

    async def counted(stream):
        gets.append(stream)
        return await get(stream)

    monkeypatch.setattr(RequestStream, "get", counted)
    api = Api(is_held=True)
    async with api.serving() as address, connected(address) as client:
        await client.send("POST", CHAT, chat_body(stream=True, max_tokens=8))
        await client.head()
        chunks = []
        for _ in range(8):
            await api.pace.step()
            chunks.append(await client.chunk())
        assert await client.chunk() == b""
    assert [text_of(events_of(chunk)) for chunk in chunks] == list("abcdefgh")
    assert len(gets) == 2


async def test_a_stream_byte_for_byte():
    api = Api()
    async with api.serving() as address, connected(address) as client:
        await client.send("POST", CHAT, chat_body(stream=True, max_tokens=3))
        status, headers = await client.head()
        chunks = await client.chunks()
    assert status == 200
    assert headers["transfer-encoding"] == "chunked"
    assert headers["cache-control"] == "no-cache"
    assert headers["x-accel-buffering"] == "no"
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert "content-length" not in headers
    assert "server" not in headers
    body = b"".join(chunks)
    assert text_of(events_of(body)) == "abc"
    assert body.endswith(b"data: [DONE]\n\n")
    assert b"\r" not in body


async def test_every_frame_is_a_chunk_of_its_own_and_headers_come_before_the_first():
    api = Api(is_held=True)
    async with api.serving() as address, connected(address) as client:
        await client.send("POST", CHAT, chat_body(stream=True, max_tokens=3))
        status, _ = await client.head()  # no step has ended yet
        assert status == 200
        assert api.engine.stats().generation_tokens == 0
        texts = []
        for _ in range(3):
            await api.pace.step()
            texts.append(text_of(events_of(await client.chunk())))
        assert texts == ["a", "b", "c"]
        assert await client.chunk() == b""


async def test_a_stream_says_once_what_becomes_of_its_connection():
    async with Api().serving() as address, connected(address) as client:
        await client.send("POST", CHAT, chat_body(stream=True), headers=["Connection: close"])
        raw = (await client.reader.readuntil(b"\r\n\r\n")).lower()
        assert raw.count(b"\r\nconnection:") == 1
        assert b"\r\nconnection: close\r\n" in raw


async def test_pings_arrive_while_the_model_is_silent():
    api = Api(is_held=True, ping_interval_s=0.01)
    async with api.serving() as address, connected(address) as client:
        await client.send("POST", CHAT, chat_body(stream=True, max_tokens=1))
        await client.head()
        assert await client.chunk() == b": ping\n\n"
        assert await client.chunk() == b": ping\n\n"
        api.pace.let_go()
        assert text_of(events_of(b"".join(await client.chunks()))) == "a"


async def test_a_connection_serves_one_request_after_another():
    async with Api().serving() as address, connected(address) as client:
        for _ in range(3):
            await client.send("POST", CHAT, chat_body(stream=True, max_tokens=2))
            await client.head()
            await client.chunks()
            await client.send("POST", CHAT, chat_body(max_tokens=2))
            status, _, _ = await client.whole()
            assert status == 200
            await client.send("POST", CHAT, {"messages": 5})
            status, _, body = await client.whole()
            assert status == 400
            assert json.loads(body)["error"]["param"] == "messages"


async def test_pipelined_requests_are_answered_in_order():
    async with Api().serving() as address, connected(address) as client:
        for i in range(3):
            header = f"X-Request-Id: r{i}"
            await client.send("POST", CHAT, chat_body(max_tokens=i + 1), headers=[header])
        for i in range(3):
            _, headers, body = await client.whole()
            assert headers["x-request-id"] == f"r{i}"
            assert json.loads(body)["usage"]["completion_tokens"] == i + 1


async def test_a_failed_stream_ends_its_connection():
    api = Api(runner=BrokenRunner(good_steps=2))
    async with api.serving() as address, connected(address) as client:
        await client.send("POST", CHAT, chat_body(stream=True, max_tokens=9))
        await client.head()
        events = events_of(b"".join(await client.chunks()))
        assert events[-1]["error"]["status"] == 500
        assert await client.is_closed_by_server()


@pytest.mark.parametrize("is_streamed", [True, False])
async def test_a_closed_socket_frees_the_blocks(is_streamed):
    api = Api(is_held=True)
    async with api.serving() as address:
        async with connected(address) as client:
            await client.send("POST", CHAT, chat_body(stream=is_streamed, max_tokens=100))
            await api.pace.step()
            await until(lambda: len(api.pace.waiting) == 1)
            assert api.num_used_blocks > 0
        await until(lambda: api.app.context.gate.num_inside == 0)
        api.pace.let_go()
        await until(lambda: api.engine.is_idle)
        assert api.num_used_blocks == 0


async def test_a_reader_who_stalls_keeps_nobody_else_waiting():
    api = Api(token_ids=b"x" * 50)
    async with api.serving() as address, connected(address) as slow, connected(address) as fast:
        slow.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        await slow.send("POST", CHAT, chat_body(stream=True, max_tokens=400))
        await fast.send("POST", CHAT, chat_body(stream=True, max_tokens=400))
        await fast.head()
        assert text_of(events_of(b"".join(await fast.chunks()))) == "x" * 400
        await slow.head()
        assert text_of(events_of(b"".join(await slow.chunks()))) == "x" * 400


async def test_a_body_over_the_limit_is_refused_and_the_connection_stays():
    async with Api(max_body_bytes=1024).serving() as address, connected(address) as client:
        await client.send("POST", CHAT, chat_body(user="x" * 100_000))
        status, _, body = await client.whole()
        assert status == 413
        assert json.loads(body)["error"]["code"] == "request_too_large"
        await client.send("POST", CHAT, chat_body(max_tokens=1))
        assert (await client.whole())[0] == 200


async def test_a_body_that_does_not_say_how_long_it_is_has_the_same_limit():
    async with Api(max_body_bytes=1024).serving() as address, connected(address) as client:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        client.writer.write(head.encode() + b"400\r\n" + b" " * 1024 + b"\r\n1\r\n \r\n")
        status, _, body = await client.whole()
        assert status == 413
        assert json.loads(body)["error"]["code"] == "request_too_large"


async def test_a_client_that_asks_first_is_told_before_it_sends():
    async with Api(max_body_bytes=1024).serving() as address, connected(address) as client:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n"
        client.writer.write(f"{head}Expect: 100-continue\r\n\r\n".encode())
        status, _, _ = await client.whole()
        assert status == 413


async def test_a_client_that_asks_first_may_continue():
    body = json.dumps(chat_body(max_tokens=1)).encode()
    async with Api().serving() as address, connected(address) as client:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        client.writer.write(f"{head}Expect: 100-continue\r\n\r\n".encode())
        assert (await client.head())[0] == 100
        client.writer.write(body)
        assert (await client.whole())[0] == 200


BODY = json.dumps(chat_body(max_tokens=1)).encode()


@pytest.mark.parametrize("num_pieces", [1, 2, 400])
@pytest.mark.parametrize(
    ("header", "body"),
    [
        (b"Content-Length: %d" % len(BODY), BODY),
        (b"Transfer-Encoding: chunked", b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)),
    ],
)
async def test_an_offer_to_speak_http_2_is_declined_and_the_body_is_read(header, body, num_pieces):
    """Java's clients make it in each request."""
    request = (
        f"POST {CHAT} HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nHost: x\r\n"
        "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\nUpgrade: h2c\r\n"
        "Content-Type: application/json\r\n"
    ).encode() + b"%b\r\n\r\n%b" % (header, body)
    size = -(-len(request) // num_pieces)
    async with Api().serving() as address, connected(address) as client:
        for _ in range(2):
            for start in range(0, len(request), size):
                client.writer.write(request[start : start + size])
                await asyncio.sleep(0)
            status, headers, _ = await client.whole()
            assert status == 200
            assert "connection" not in headers
        client.writer.write(request.replace(b"Upgrade, H", b"Upgrade, close, H"))
        assert (await client.whole())[1]["connection"] == "close"


async def test_a_pipelined_request_follows_one_that_offers_websockets():
    upgrade = (
        b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    )
    async with Api().serving() as address, connected(address) as client:
        client.writer.write(upgrade + b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"ok" in (await client.whole())[2]
        assert b"version" in (await client.whole())[2]


@pytest.mark.parametrize("connection", ["keep-alive", "Upgrade\r\nUpgrade: h2c"])
@pytest.mark.parametrize("stream", [False, True])
async def test_http_1_0_knows_no_chunks(stream, connection):
    body = json.dumps(chat_body(max_tokens=2, stream=stream)).encode()
    head = (
        f"POST {CHAT} HTTP/1.0\r\nConnection: {connection}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    async with Api().serving() as address, connected(address) as client:
        client.writer.write(head.encode() + body)
        status, headers = await client.head()
        assert (status, headers.get("connection")) == (200, "close")
        assert "transfer-encoding" not in headers
        async with asyncio.timeout(60):
            answer = await client.reader.read()
    if stream:
        events = events_of(answer)
        assert (text_of(events), events[-1]) == ("ab", "[DONE]")
    else:
        assert len(answer) == int(headers["content-length"])


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\nHost: x\r\nX-Big: " + b"x" * 5000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(900)) + b"\r\n",
        b"GET /" + b"x" * 5000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nX-Endless: " + b"x" * 5000,
        b"GET /" + b"x" * 5000,
    ],
)
async def test_headers_over_the_limit_are_refused(head):
    async with Api(max_header_bytes=4096).serving() as address, connected(address) as client:
        client.writer.write(head)
        status, headers, body = await client.whole()
        assert status == 431
        assert headers["connection"] == "close"
        assert json.loads(body)["error"]["code"] == "headers_too_large"
        assert await client.is_closed_by_server()


async def test_an_endless_header_in_pieces_is_refused():
    async with Api(max_header_bytes=4096).serving() as address, connected(address) as client:
        client.writer.write(b"GET /health HTTP/1.1\r\nX-Endless: ")
        for _ in range(5):
            client.writer.write(b"x" * 1000)
            await client.writer.drain()
            await asyncio.sleep(0)
        assert (await client.whole())[0] == 431


CHUNKED = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{{}}\r\n0\r\n"


async def test_an_endless_trailer_is_refused():
    async with Api(max_header_bytes=4096).serving() as address, connected(address) as client:
        client.writer.write(CHUNKED.encode() + b"X-Endless: ")
        answer = asyncio.create_task(client.whole())
        await until(lambda: client.writer.transport.get_write_buffer_size() == 0)
        while not answer.done():
            client.writer.write(b"x" * 1000)
            await asyncio.sleep(0)
        status, _, body = await answer
        assert status == 431
        assert json.loads(body)["error"]["code"] == "headers_too_large"


async def test_a_trailer_is_no_header():
    async with Api(api_keys=("k",)).serving() as address, connected(address) as client:
        client.writer.write(CHUNKED.encode() + b"Authorization: Bearer k\r\n\r\n")
        assert (await client.whole())[0] == 401


@pytest.mark.parametrize("body", ["", '{"messages"'])
async def test_a_body_that_never_ends_is_refused(body):
    api = Api(receive_timeout_s=0.05)
    async with api.serving() as address, connected(address) as client:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
        client.writer.write(f"{head}{body}".encode())
        status, _, answer = await client.whole()
        assert status == 408
        assert json.loads(answer)["error"]["code"] == "receive_timeout"
        assert await client.is_closed_by_server()
        await until(lambda: api.app.context.gate.num_inside == 0)
    assert api.app.context.metrics.num_connections_refused == {"receive_timeout": 1}


async def test_a_body_in_small_pieces_has_no_more_time_than_another():
    async with Api(receive_timeout_s=0.1).serving() as address, connected(address) as client:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
        client.writer.write(head.encode())
        answer = asyncio.create_task(client.whole())
        while not answer.done():
            client.writer.write(b" ")
            await asyncio.sleep(0.01)
        assert (await answer)[0] == 408


async def test_a_refused_body_that_goes_on_for_ever_loses_its_connection():
    api = Api(receive_timeout_s=0.1, max_body_bytes=2000)
    async with api.serving() as address, connected(address) as client:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"
        client.writer.write(head.encode())
        assert (await client.whole())[0] == 413
        assert await client.is_closed_by_server()


async def test_beyond_the_bound_newcomers_are_told():
    api = Api(max_connections=2, is_held=True)
    async with api.serving() as address, contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connected(address)) for _ in range(2)]
        for client in clients:
            await client.send("POST", CHAT, chat_body(max_tokens=1))
        await until(lambda: api.app.context.gate.num_inside == 2)
        third = await stack.enter_async_context(connected(address))
        status, headers, body = await third.whole()
        assert (status, headers["retry-after"]) == (503, "1")
        assert json.loads(body)["error"]["code"] == "too_many_connections"
        assert await third.is_closed_by_server()
        api.pace.let_go()
        for client in clients:
            assert (await client.whole())[0] == 200
        # They are idle now, and one makes room.
        fourth = await stack.enter_async_context(connected(address))
        await fourth.send("GET", "/health")
        assert (await fourth.whole())[0] == 200
        await until(lambda: any(client.reader.at_eof() for client in clients))
        assert not all(client.reader.at_eof() for client in clients)


async def test_an_idle_connection_is_closed():
    api = Api(keep_alive_timeout_s=0.05)
    async with api.serving() as address, connected(address) as client:
        await client.send("GET", "/health")
        assert (await client.whole())[0] == 200
        assert await client.is_closed_by_server()


async def test_a_pipeline_has_a_bound():
    api = Api(is_held=True)
    async with api.serving() as address, connected(address) as client:
        await client.send("POST", CHAT, chat_body(stream=True, max_tokens=2))
        client.writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 1000)
        await until(lambda: api.app.context.metrics.num_connections_refused == {"invalid_http": 1})
        await until(lambda: api.engine.is_idle)


@pytest.mark.parametrize("begun", [b"", b"GET /health HTT", b"GET /health HTTP/1.1\r\nHost: x\r\n"])
async def test_headers_that_never_end_are_refused(begun):
    async with Api(receive_timeout_s=0.05).serving() as address, connected(address) as client:
        client.writer.write(begun)
        status, _, body = await client.whole()
        assert status == 408
        assert json.loads(body)["error"]["code"] == "receive_timeout"
        assert await client.is_closed_by_server()


async def test_a_second_request_has_its_own_time_and_an_answer_may_take_longer():
    api = Api(is_held=True, receive_timeout_s=0.5, ping_interval_s=0.6)
    async with api.serving() as address, connected(address) as client:
        await client.send("POST", CHAT, chat_body(stream=True, max_tokens=1))
        await client.head()
        assert await client.chunk() == b": ping\n\n"
        api.pace.let_go()
        await client.chunks()
        client.writer.write(b"GET /health HTTP/1.1\r\n")
        assert (await client.whole())[0] == 408


async def test_half_a_pipelined_request_does_not_disturb_the_answer_before_it():
    api = Api(is_held=True, receive_timeout_s=0.5, ping_interval_s=0.6)
    async with api.serving() as address, connected(address) as client:
        await client.send("POST", CHAT, chat_body(stream=True, max_tokens=2))
        client.writer.write(b"GET /health HTTP/1.1\r\n")
        await client.head()
        assert await client.chunk() == b": ping\n\n"
        api.pace.let_go()
        assert text_of(events_of(b"".join(await client.chunks()))) == "ab"
        assert (await client.whole())[0] == 408


async def test_headers_of_many_requests_do_not_add_up():
    async with Api(max_header_bytes=4096).serving() as address, connected(address) as client:
        for _ in range(5):
            await client.send("GET", "/health", headers=[f"X-Big: {'x' * 3000}"])
            assert (await client.whole())[0] == 200


@pytest.mark.parametrize(
    "raw", [b"nonsense\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02"]
)
async def test_what_is_not_http_is_a_400_in_openais_shape(raw):
    async with Api().serving() as address, connected(address) as client:
        client.writer.write(raw)
        status, _, body = await client.whole()
        assert status == 400
        assert json.loads(body)["error"]["type"] == "invalid_request_error"
        assert await client.is_closed_by_server()


TARGETS = (
    "/v1/models",
    "/v1/models?x=/health",
    "/v1/models#/health",
    "/v1/./models",
    "/v1/../v1/models",
    "/v1%2fmodels",
    "/v1;x/models",
    "/%76%31/models",
    "/V1/models",
    "//v1/models",
    "/x/../v1/models",
    "/health/../v1/models",
    "http://evil/v1/models",
    "http://evil:99999999/v1/models",
    "/tokenize?",
    "/detokenize/",
    "/tokenize%0a",
    "/detokenize%0A?x",
)


@pytest.mark.parametrize("host", ["x", "evil/health?", "[::1", "a:b@c/../health", ""])
async def test_no_way_of_writing_a_path_or_a_host_gets_past_the_key(host):
    async with Api(api_keys=("k",)).serving() as address:
        for target in TARGETS:
            async with connected(address) as client:
                client.writer.write(f"GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
                assert (await client.whole())[0] in (400, 401, 404), target


def test_a_port_in_use_is_a_clear_error():
    taken = bind_sockets(ApiConfig(served_model_names=("m",), port=0))
    try:
        taken[0].listen()
        port = taken[0].getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}: Address already in use"):
            bind_sockets(ApiConfig(served_model_names=("m",), port=port))
    finally:
        taken[0].close()


def test_an_unknown_host_is_a_clear_error():
    with pytest.raises(ConfigError, match=r"cannot listen on no\.such\.host\.invalid:80"):
        bind_sockets(ApiConfig(served_model_names=("m",), host="no.such.host.invalid", port=80))


def test_localhost_has_one_port_on_all_its_addresses():
    sockets = bind_sockets(ApiConfig(served_model_names=("m",), host="localhost", port=0))
    try:
        assert len({sock.getsockname()[1] for sock in sockets}) == 1
    finally:
        for sock in sockets:
            sock.close()
