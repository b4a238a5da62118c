"""Signals and draining, in real processes; what a server without a model imports."""

import asyncio
import contextlib
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import time
from urllib.parse import urlsplit

import pytest
from sse_starlette.sse import AppStatus

from streamserve.api.server import ApiServer, signals_call
from streamserve.config import StreamConfig
from tests.api.harness import Api, Exchange, chat_body, events_of, text_of, until
from tests.interpreter import run_python

CHAT = "/v1/chat/completions"
PROMPTLY_S = 30.0  # half of the drain that it does not wait for; it is 0.3 s on an idle machine


@contextlib.contextmanager
def server_process(*flags):
    """``loadtest.null_server`` as a process; yields it and its host and port."""
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "loadtest.null_server", "--port", "0", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        url = urlsplit(process.stdout.readline().strip())
        yield process, (url.hostname, url.port)
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def streaming(address, max_tokens):
    """A stream whose first bytes have come; yields the response."""
    connection = http.client.HTTPConnection(*address, timeout=60)
    connection.sock = socket.socket()
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # soon full
    connection.sock.settimeout(60)
    connection.sock.connect(address)
    body = chat_body(stream=True, max_tokens=max_tokens, model="null", ignore_eos=True)
    headers = {"content-type": "application/json"}
    connection.request("POST", CHAT, json.dumps(body), headers)
    response = connection.getresponse()
    assert response.status == 200
    response.read1(1)
    try:
        yield response
    finally:
        connection.close()


def wait_until_stalled(address):
    """Until the one stream there is has filled its socket: no further token is generated."""
    counts = [-1, -2]
    while len(counts) < 5 or len(set(counts[-5:])) > 1:
        connection = http.client.HTTPConnection(*address, timeout=60)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        counts.append(float(re.search(r"generation_tokens_total\{.*\} (.*)", text)[1]))


def wait_until_draining(address):
    """Until newcomers are refused; returns the refusal."""
    deadline = time.monotonic() + 60
    while True:
        connection = http.client.HTTPConnection(*address, timeout=60)
        connection.request("GET", "/health")
        response = connection.getresponse()
        content = json.loads(response.read())
        connection.close()
        if response.status == 503:
            assert response.headers["retry-after"]
            return content
        assert time.monotonic() < deadline


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_an_idle_server_ends_at_once_with_0(sig):
    with server_process("--drain-timeout", "60") as (process, _):
        started = time.monotonic()
        process.send_signal(sig)
        _, errors = process.communicate(timeout=60)
        assert time.monotonic() - started < PROMPTLY_S
        assert process.returncode == 0
        assert errors == ""


def test_an_idle_connection_does_not_hold_the_server_up():
    with server_process("--drain-timeout", "60") as (process, address):
        connection = http.client.HTTPConnection(*address, timeout=60)
        connection.request("GET", "/health")
        connection.getresponse().read()
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert time.monotonic() - started < PROMPTLY_S
        assert process.returncode == 0
        connection.close()


def test_a_stream_is_drained_and_newcomers_are_refused():
    # The answer is more than all buffers hold: it cannot end before it is read.
    with (
        server_process("--drain-timeout", "60") as (process, address),
        streaming(address, max_tokens=4000) as response,
    ):
        process.send_signal(signal.SIGTERM)
        assert wait_until_draining(address) == {"status": "draining"}
        body = b"d"
        for num_frames in (0, 50):  # the listener stays open
            while body.count(b"data: ") < num_frames:
                body += response.read1()
            newcomer = http.client.HTTPConnection(*address, timeout=60)
            headers = {"content-type": "application/json"}
            newcomer.request("POST", CHAT, json.dumps(chat_body(model="null")), headers)
            refusal = newcomer.getresponse()
            assert refusal.status == 503
            assert refusal.headers["retry-after"] == "60"
            assert json.loads(refusal.read())["error"]["code"] == "shutting_down"
            newcomer.close()
        events = events_of(body + response.read())
        assert len(text_of(events)) == 4000
        assert events[-1] == "[DONE]"
        process.communicate(timeout=60)
        assert process.returncode == 0


def test_a_body_that_is_half_sent_is_refused_when_the_drain_begins():
    with server_process("--drain-timeout", "60") as (process, address):
        newcomer = http.client.HTTPConnection(*address, timeout=60)
        newcomer.putrequest("POST", CHAT)
        newcomer.putheader("content-type", "application/json")
        newcomer.putheader("content-length", "100")
        newcomer.endheaders(b'{"messages": [')
        # Whoever is answered on a connection made later was heard later.
        health = http.client.HTTPConnection(*address, timeout=60)
        health.request("GET", "/health")
        assert health.getresponse().status == 200
        health.close()
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        refusal = newcomer.getresponse()
        assert (refusal.status, refusal.headers["retry-after"]) == (503, "60")
        assert json.loads(refusal.read())["error"]["code"] == "shutting_down"
        _, errors = process.communicate(timeout=60)
        assert time.monotonic() - started < PROMPTLY_S
        assert (process.returncode, errors) == (0, "")
        newcomer.close()


def test_a_whole_answer_that_is_cut_is_a_503_that_says_when_to_retry():
    with server_process("--drain-timeout", "0.2", "--step-ms", "5") as (process, address):
        connection = http.client.HTTPConnection(*address, timeout=60)
        body = chat_body(max_tokens=100_000, model="null", ignore_eos=True)
        connection.request("POST", CHAT, json.dumps(body), {"content-type": "application/json"})
        health = http.client.HTTPConnection(*address, timeout=60)
        health.request("GET", "/health")
        health.getresponse().read()
        process.send_signal(signal.SIGTERM)
        refusal = connection.getresponse()
        assert (refusal.status, refusal.headers["retry-after"]) == (503, "1")
        refusal.read()
        process.communicate(timeout=60)
        assert process.returncode == 0
        connection.close()
        health.close()


@pytest.mark.parametrize("flags", [("--drain-timeout", "0.2"), ("--drain-timeout", "60")])
def test_a_stream_that_is_cut_says_so(flags):
    with (
        server_process(*flags, "--step-ms", "5") as (process, address),
        streaming(address, max_tokens=100_000) as response,
    ):
        process.send_signal(signal.SIGINT)
        if flags[1] == "60":
            wait_until_draining(address)
            process.send_signal(signal.SIGINT)  # the second ends it now
        body = b"d" + response.read()
        events = events_of(body)
        assert events[-1]["error"]["status"] == 503
        assert b"[DONE]" not in body
        process.communicate(timeout=60)
        assert process.returncode == 0


def test_a_reader_who_does_not_read_does_not_hold_the_server_up():
    with (
        server_process("--drain-timeout", "60") as (process, address),
        streaming(address, max_tokens=1_000_000),
    ):
        wait_until_stalled(address)
        process.send_signal(signal.SIGINT)
        wait_until_draining(address)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0
        assert errors == ""


async def test_the_gate_lets_those_inside_finish():
    api = Api(is_held=True, drain_timeout_s=60.0)
    drained = []
    ready = asyncio.Event()
    server = ApiServer(
        api.app, api.config, on_ready=lambda _: ready.set(), on_draining=drained.append
    )
    running = asyncio.create_task(server.run())
    await ready.wait()
    inside, longer = (
        Exchange(api.app, "POST", CHAT, chat_body(stream=True, max_tokens=n)) for n in (3, 6)
    )
    for exchange in (inside, longer):
        await exchange.until(lambda e: bool(e.messages))
    server.request_shutdown()
    await until(lambda: not api.app.context.gate.is_open)
    assert drained == [2]
    assert (await api.chat()).status == 503
    while not inside.task.done():
        await api.pace.step()
        await until(lambda: bool(api.pace.waiting))
    assert text_of(events_of(inside.body)) == "abc"
    for _ in range(20):
        await asyncio.sleep(0)
    api.pace.let_go()
    await longer.finished()
    await running
    assert text_of(events_of(longer.body)) == "abcdef", "the last is waited for, too"
    assert api.runner.is_closed


class Draining:
    """A server on this event loop that has been told to end."""

    def __init__(self, **config):
        self.api = Api(is_held=True, **config)
        ready = asyncio.Event()
        self._server = ApiServer(self.api.app, self.api.config, on_ready=lambda _: ready.set())
        self._running = asyncio.create_task(self._server.run())
        self._ready = ready

    async def begun_and_left(self, path, body, headers):
        """What somebody has asked for and left behind; its first token is there."""
        await self._ready.wait()
        exchange = Exchange(self.api.app, "POST", path, body, headers=headers)
        await self.api.pace.step()
        await until(lambda: bool(self.api.pace.waiting))
        exchange.leave()
        await exchange.finished()
        return exchange

    async def begin(self):
        self._server.request_shutdown()
        await until(lambda: not self.api.app.context.gate.is_open)

    @property
    def has_ended(self):
        return self._running.done()

    async def end(self):
        async with asyncio.timeout(60):
            await self._running
        assert self.api.app.context.gate.num_inside == 0
        assert self.api.num_used_blocks == 0


STREAM = chat_body(stream=True, max_tokens=5)
WHOLE = chat_body(max_tokens=3)
RESUME = {"x-stream-resume": "1"}
KEY = {"idempotency-key": "order-66"}


async def test_who_comes_back_to_an_answer_is_waited_for_and_let_in():
    server = Draining(drain_timeout_s=60.0)
    api = server.api
    left = await server.begun_and_left(CHAT, STREAM, RESUME)
    stream_id = dict(left.messages[0]["headers"])[b"x-stream-id"].decode()
    await server.begun_and_left(CHAT, WHOLE, KEY)
    background = {"input": "Hi", "max_output_tokens": 40, "background": True}
    response_id = (await api.call("POST", "/v1/responses", background)).json["id"]
    await server.begin()
    for headers in ({}, RESUME, {"idempotency-key": "another"}, {"last-event-id": "nobody.1"}):
        assert (await api.call("POST", CHAT, STREAM, headers=headers)).status == 503
    at = {"last-event-id": f"{stream_id}.1"}
    log = Exchange(api.app, "GET", f"/v1/responses/{response_id}?stream=true")
    api.pace.let_go()
    await log.finished()
    await until(lambda: api.engine.is_idle)
    assert not server.has_ended, "two have not been read"
    again = await api.call("POST", CHAT, WHOLE, headers=KEY)
    assert again.json["choices"][0]["message"]["content"] == "abc"
    assert not server.has_ended
    for answer, expected in (
        (await api.call("POST", CHAT, STREAM, headers=at), "bcde"),
        (await api.call("GET", f"/v1/streams/{stream_id}"), "abcde"),
    ):
        assert answer.body.endswith(b"data: [DONE]\n\n")
        assert re.sub(rb'.*?"content":"(\w*)"|.+', rb"\1", answer.body, flags=re.DOTALL) == (
            expected.encode()
        )
    await server.end()


@pytest.mark.parametrize("limits", [(0.05, 60.0), (60.0, 0.05)])
async def test_who_does_not_come_back_is_waited_for_no_longer_than_is_said(limits):
    grace_s, drain_s = limits
    server = Draining(drain_timeout_s=drain_s, streams=StreamConfig(resume_timeout_s=grace_s))
    await server.begun_and_left(CHAT, STREAM, RESUME)
    await server.begin()
    server.api.pace.let_go()
    await server.end()


async def test_the_third_signal_finds_nobody_who_could_hold_it_up():
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(sig) for sig in signals]
    calls = []
    try:
        with signals_call(lambda: calls.append(1)):
            for sig, num_calls in zip(reversed(signals), (1, 2), strict=True):
                assert signal.getsignal(sig) is not signal.SIG_DFL
                signal.raise_signal(sig)
                await until(lambda num_calls=num_calls: len(calls) == num_calls)
            assert [signal.getsignal(sig) for sig in signals] == [signal.SIG_DFL] * 2
    finally:
        for sig, handler in zip(signals, before, strict=True):
            signal.signal(sig, handler)


async def test_a_shutdown_wanted_during_the_start_is_not_lost():
    api = Api()
    ready, drained = [], []
    server = ApiServer(api.app, api.config, on_ready=ready.append, on_draining=drained.append)
    server.request_shutdown()
    async with asyncio.timeout(60):
        await server.run()
    assert ready == drained == []


async def test_a_port_that_is_taken_meanwhile_is_a_clear_error():
    api = Api()
    async with api.serving() as (_, port):
        other = Api(port=port)
        with pytest.raises(Exception, match="Address already in use"):
            await ApiServer(other.app, other.config).run()


async def test_sse_starlettes_own_shutdown_does_not_reach_our_streams(monkeypatch):
    monkeypatch.setattr(AppStatus, "should_exit", True)
    async with Api().running() as api:
        answer = await api.chat(stream=True, max_tokens=3)
    assert text_of(answer.events) == "abc"


def test_a_server_without_a_model_imports_no_torch():
    code = (
        "import sys\n"
        "from loadtest.null_server import build_app\n"
        "from streamserve.config import ApiConfig\n"
        "build_app(ApiConfig(served_model_names=('null',)), max_num_seqs=4)\n"
        "import streamserve.api.server\n"
        "heavy = {'torch', 'transformers', 'streamserve.runner', 'streamserve.models'}\n"
        "found = sorted(heavy & set(sys.modules))\n"
        "sys.exit(f'imported: {found}' if found else 0)\n"
    )
    run_python("-c", code)


def test_the_frame_benchmark_counts_no_merged_frame():
    command = ("-m", "loadtest.frames", "--streams", "8", "--tokens", "50", "--repeats", "1")
    done = run_python(*command, timeout_s=240)
    assert "8 streams, 400 tokens, 432 frames" in done.stdout
    assert "no frame merged" in done.stdout
