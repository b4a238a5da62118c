"""What happens to a stream: silence, slow and leaving readers, failures."""

import asyncio
import contextlib

import pytest

from streamserve.api.server import ApiServer
from streamserve.core.death import Death
from streamserve.engine.fault_injection import FaultKind
from streamserve.engine.null_runner import NullRunner
from streamserve.errors import DeviceDeadError, EngineDeadError, StreamServeError
from tests.api.harness import Api, BrokenRunner, Exchange, chat_body, events_of, text_of, until

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def is_started(exchange):
    return bool(exchange.messages)


async def test_headers_leave_at_admission_before_any_token():
    async with Api(is_held=True).running() as api:
        exchange = Exchange(api.app, "POST", CHAT, chat_body(stream=True, max_tokens=1))
        await exchange.until(is_started)
        assert exchange.messages[0]["status"] == 200
        assert len(exchange.messages) == 1
        await api.pace.step()
        await exchange.finished()


async def test_a_silent_stream_is_pinged_with_comments():
    async with Api(is_held=True, ping_interval_s=0.01).running() as api:
        exchange = Exchange(api.app, "POST", CHAT, chat_body(stream=True, max_tokens=2))
        await exchange.until(lambda e: len(e.messages) == 3)
        await api.pace.step()
        await exchange.until(lambda e: b"content" in e.body)
        await exchange.until(lambda e: e.body.endswith(b": ping\n\n"))
        await api.pace.step()
        await exchange.finished()
    events = events_of(exchange.body)
    assert events[:2] == [": ping", ": ping"]
    assert text_of(events) == "ab"
    assert events[-1] == "[DONE]"
    assert {m["body"] for m in exchange.messages[1:3]} == {b": ping\n\n"}


@pytest.mark.parametrize("body", [{"prompt": "Hi"}, {"prompt": ["a", "b", "c"]}])
@pytest.mark.parametrize("is_streamed", [True, False])
async def test_a_reader_who_leaves_frees_the_blocks(body, is_streamed):
    async with Api(is_held=True).running() as api:
        exchange = Exchange(
            api.app, "POST", COMPLETIONS, {**body, "stream": is_streamed, "max_tokens": 100}
        )
        await api.pace.step()
        await until(lambda: len(api.pace.waiting) == 1)
        assert api.num_used_blocks > 0
        exchange.leave()
        await exchange.finished()
        api.pace.let_go()
        await until(lambda: api.engine.is_idle)
        assert api.num_used_blocks == 0
        api.kv_cache.check_integrity()
        assert api.app.context.gate.num_inside == 0
        finished = api.app.context.metrics.num_finished
        num_choices = 1 if body["prompt"] == "Hi" else 3
        assert finished == {"stop": 0, "length": 0, "abort": num_choices, "error": 0}


@pytest.mark.parametrize("is_streamed", [True, False])
async def test_a_cancelled_request_frees_the_blocks(is_streamed):
    async with Api(is_held=True).running() as api:
        exchange = Exchange(api.app, "POST", CHAT, chat_body(stream=is_streamed, max_tokens=100))
        await api.pace.step()
        await until(lambda: len(api.pace.waiting) == 1)
        exchange.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await exchange.task
        api.pace.let_go()
        await until(lambda: api.engine.is_idle)
        assert api.num_used_blocks == 0


async def test_a_reader_who_leaves_while_its_socket_is_full_frees_the_blocks():
    async with Api(is_held=True).running() as api:
        exchange = Exchange(api.app, "POST", CHAT, chat_body(stream=True, max_tokens=100))
        await exchange.until(is_started)
        exchange.stall()
        await api.pace.step()
        await api.pace.step()
        exchange.leave()
        await exchange.finished()
        api.pace.let_go()
        await until(lambda: api.engine.is_idle)
        assert api.num_used_blocks == 0


async def test_a_reader_who_leaves_before_the_body_is_complete():
    async with Api().running() as api:
        exchange = Exchange(api.app, "POST", CHAT, chat_body())
        exchange._body = [{"type": "http.request", "body": b"{", "more_body": True}]
        exchange.leave()
        await exchange.finished()
        assert exchange.messages == []
        assert api.app.context.gate.num_inside == 0


async def test_a_slow_reader_gets_larger_chunks_and_the_same_text():
    async with Api(is_held=True).running() as api:
        exchange = Exchange(api.app, "POST", CHAT, chat_body(stream=True, max_tokens=20))
        await exchange.until(is_started)
        exchange.stall()
        for _ in range(10):
            await api.pace.step()
        exchange.read_on()
        api.pace.let_go()
        await exchange.finished()
    events = events_of(exchange.body)
    assert text_of(events) == "abcdefghij" * 2
    assert len(events) < 20


@pytest.mark.parametrize("prompt", ["Hi", ["a", "b"]])
async def test_a_failed_stream_ends_with_an_error_and_no_done(prompt):
    async with Api(runner=BrokenRunner(good_steps=2)).running() as api:
        answer = await api.complete(prompt=prompt, stream=True, max_tokens=10)
        assert answer.status == 200
        *chunks, error = answer.events
        assert text_of(chunks) == "ab"[: len(text_of(chunks))]
        assert set(error) == {"error"}
        assert error["error"]["status"] == 500
        assert error["error"]["type"] == "server_error"
        assert set(error["error"]) == {"message", "type", "param", "code", "status"}
        assert b"[DONE]" not in answer.body
        assert not any(c["choices"][0]["finish_reason"] for c in chunks if c["choices"])
        await until(lambda: api.engine.is_idle)
        assert api.num_used_blocks == 0
        finished = api.app.context.metrics.num_finished
        assert finished["error"] + finished["abort"] == (1 if prompt == "Hi" else 2)
        assert finished["error"] >= 1


async def test_a_failure_that_is_not_streamed_is_a_500():
    async with Api(runner=BrokenRunner(good_steps=2)).running() as api:
        answer = await api.chat(max_tokens=10)
    assert answer.status == 500
    assert answer.error["type"] == "server_error"
    assert "burnt" not in answer.error["message"]


async def test_a_failure_in_rendering_ends_the_stream_with_an_error(caplog):
    async with Api().running() as api:

        def explode(_token_id):
            raise ZeroDivisionError("a secret path")

        api.tokenizer.token_text = explode
        answer = await api.chat(stream=True, logprobs=True, max_tokens=3)
    assert answer.events[-1]["error"]["status"] == 500
    assert b"secret" not in answer.body
    assert b"[DONE]" not in answer.body
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("is_streamed", [True, False])
async def test_a_request_that_the_server_cuts_is_not_a_success(is_streamed):
    async with Api(is_held=True).running() as api:
        exchange = Exchange(api.app, "POST", CHAT, chat_body(stream=is_streamed, max_tokens=100))
        await api.pace.step()
        await until(lambda: len(api.pace.waiting) == 1)
        stopping = asyncio.create_task(api.engine.stop())
        await asyncio.sleep(0)
        api.pace.let_go()
        await exchange.finished()
        await stopping
    if is_streamed:
        assert events_of(exchange.body)[-1]["error"]["status"] == 503
        assert b"[DONE]" not in exchange.body
        assert b'"finish_reason":"' not in exchange.body
    else:
        assert exchange.messages[0]["status"] == 503


async def test_a_dead_engine_is_503_and_unhealthy():
    async with Api(runner=BrokenRunner(good_steps=0)).running() as api:
        statuses = [(await api.chat()).status for _ in range(4)]
        health = await api.call("GET", "/health")
        with pytest.raises(EngineDeadError):
            api.engine.submit([1], None, request_id="x")
    assert statuses[-1] == 503
    assert (health.status, health.json) == (503, {"status": "dead"})


@pytest.mark.parametrize("is_idle", [False, True])
async def test_a_server_whose_device_has_died_ends_and_says_so(is_idle):
    death = Death()

    class DeadRunner(NullRunner):
        def launch(self, plan):
            raise DeviceDeadError("the device thread has died: Panic()")

        def on_death(self, hear):
            death.on_death(hear)

    api = Api(runner=DeadRunner())

    ready = asyncio.Event()
    server = ApiServer(api.app, api.config, on_ready=lambda _url: ready.set())
    running = asyncio.create_task(server.run())
    await ready.wait()
    assert (await api.call("GET", "/health")).status == 200
    if is_idle:
        await asyncio.to_thread(death.tell, DeviceDeadError("rank 1 has died"))
        await until(lambda: api.engine.is_dead)
    else:
        assert (await api.chat()).status in {500, 503}
    for path in ("/health", "/ready", "/live"):
        answer = await api.call("GET", path)
        assert (answer.status, answer.json) == (503, {"status": "dead"})
    with pytest.raises(EngineDeadError, match="no step can run any more") as died:
        async with asyncio.timeout(60):
            await running  # nobody tells it to end
    assert isinstance(died.value, StreamServeError), "the exit code is 1"


@pytest.mark.parametrize("is_cut", [False, True])
async def test_a_death_while_it_drains_is_a_failure_where_it_cuts_a_stream(is_cut):
    api = Api(has_faults=True, is_held=is_cut)
    ready = asyncio.Event()
    server = ApiServer(api.app, api.config, on_ready=lambda _url: ready.set())
    running = asyncio.create_task(server.run())
    await ready.wait()
    with api.app.context.gate.enter():  # somebody still reads
        answers = [asyncio.create_task(api.chat())] if is_cut else []
        if is_cut:
            await until(lambda: api.engine.num_steps > 0)
        server.request_shutdown()
        await until(lambda: not api.app.context.gate.is_open)
        api.engine._runner.inject(FaultKind.DEVICE_DEAD)
        api.pace.let_go()
        await api.engine.wait_dead()
        assert [(await answer).status for answer in answers] == [503] * is_cut
    error = pytest.raises(EngineDeadError) if is_cut else contextlib.nullcontext()
    async with asyncio.timeout(60):
        with error:
            await running


async def test_a_batch_is_admitted_whole_or_not_at_all():
    async with Api(is_held=True, max_num_waiting=4).running() as api:
        answer = await api.complete(prompt=["a"] * 30)
        assert answer.status == 429
        api.pace.let_go()
        await until(lambda: api.engine.is_idle)
        assert api.num_used_blocks == 0


async def test_logprobs_of_a_chat():
    async with Api().running() as api:
        whole = await api.chat(logprobs=True, top_logprobs=2, max_tokens=2)
        streamed = await api.chat(logprobs=True, top_logprobs=2, max_tokens=2, stream=True)
        bare = await api.chat(logprobs=True, max_tokens=1)
    first = {
        "token": "a",
        "logprob": 0.0,
        "bytes": [97],
    }
    logprobs = whole.json["choices"][0]["logprobs"]
    top, other = logprobs["content"][0]["top_logprobs"]
    assert logprobs["content"][0] == {**first, "top_logprobs": [top, other]}
    assert top == first
    assert other["logprob"] < 0
    assert other["token"].encode() == bytes(other["bytes"])
    assert logprobs["refusal"] is None
    entries = [
        entry
        for event in streamed.events[:-1]
        if (found := event["choices"][0]["logprobs"]) is not None
        for entry in found["content"]
    ]
    assert entries == logprobs["content"]
    assert bare.json["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


async def test_logprobs_wait_for_their_text():
    async with Api(token_ids="é".encode()).running() as api:
        answer = await api.chat(logprobs=True, max_tokens=3, stream=True)
    frames = [e["choices"][0] for e in answer.events[1:-1]]
    counts = [
        (f["delta"].get("content"), f["logprobs"] and len(f["logprobs"]["content"])) for f in frames
    ]
    assert counts == [("é", 2), ("\ufffd", 1), (None, None)]


async def test_logprobs_of_a_completion():
    async with Api().running() as api:
        whole = await api.complete(prompt=["a", "b"], logprobs=1, max_tokens=2)
        streamed = await api.complete(logprobs=1, max_tokens=2, stream=True)
    expected = {
        "tokens": ["a", "b"],
        "token_logprobs": [0.0, 0.0],
        "text_offset": [0, 1],
        "top_logprobs": [{"a": 0.0}, {"b": 0.0}],
    }
    assert [c["logprobs"] for c in whole.json["choices"]] == [expected, expected]
    chunks = [e["choices"][0]["logprobs"] for e in streamed.events[:-1]]
    assert [c["text_offset"] for c in chunks if c] == [[0], [1]]
