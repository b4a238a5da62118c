"""Promise: reconnect and lose nothing. Streams that ask for it may be left and gone on with."""

import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamserve.api.replay_log import ReplayLog
from streamserve.config import StreamConfig
from streamserve.engine.parsers.events import Content
from tests.api.harness import Api, BrokenRunner, Exchange, chat_body, message_body, until
from tests.api.scripted import scripted_parts

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESUME = {"x-stream-resume": "1"}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "%s"}}\n</tool_call>'
ANSWERS = {
    "plain": ("The capital of France is Paris.", {}),
    "characters": ("Grüße, 世界! 👩‍👩‍👧 naïve — ✓", {}),
    "stop": ("one two three END four", {"stop": ["END", "two thick"]}),
    "thoughts": ("<think>Hm, 世界…</think>Hello there, 世界.", {}),
    "calls": (f"Wait.{CALL % 'Köln'}{CALL % 'Paris'}", {"tools": [TOOL]}),
    "long call": (CALL % ("x" * 280), {"tools": [TOOL]}),
    "broken call": ('See <tool_call>\n{"name": "wea', {"tools": [TOOL]}),
}


class Client:
    """What a client of server-sent events knows: its messages so far, and the last id."""

    def __init__(self):
        self.last_id = None
        self.content = self.reasoning = ""
        self.calls = {}
        self.finish_reason = self.error = None
        self.is_done = False
        self.ids = []

    def feed(self, body):
        """Take a response, or as much of it as came: half an event is none."""
        for block in body.split(b"\n\n")[:-1]:
            for line in block.split(b"\n"):
                name, _, value = line.partition(b": ")
                if name == b"id":
                    self.last_id = value.decode()
                    self.ids.append(int(value.rpartition(b".")[2]))
                elif name == b"data":
                    self._take(value)
        return self

    def _take(self, data):
        if data == b"[DONE]":
            self.is_done = True
            return
        event = json.loads(data)
        self.error = event.get("error", self.error)
        for choice in event.get("choices", ()):
            self.finish_reason = choice["finish_reason"] or self.finish_reason
            delta = choice.get("delta", choice)
            self.content += delta.get("content") or delta.get("text") or ""
            self.reasoning += delta.get("reasoning_content") or ""
            for call in delta.get("tool_calls", ()):
                known = self.calls.setdefault(call["index"], ["", ""])
                known[0] += call["function"].get("name", "")
                known[1] += call["function"]["arguments"]

    @property
    def said(self):
        return self.content, self.reasoning, self.calls, self.finish_reason, self.is_done


def body_of(name, **fields):
    return chat_body(stream=True, max_tokens=900, **ANSWERS[name][1], **fields)


def scripted_api(name):
    return Api(**scripted_parts(ANSWERS[name][0]), max_model_len=2048)


async def uninterrupted(name):
    async with scripted_api(name).running() as api:
        answer = await api.call("POST", CHAT, body_of(name))
        assert b"\nid: " not in b"\n" + answer.body, "nobody asked for ids"
        said = Client().feed(answer.body).said
        assert said[-1], "[DONE] is missing"
        return said


@pytest.mark.parametrize("name", ANSWERS)
async def test_promise_cut_at_any_byte_and_reconnected_the_answer_is_the_same(name):
    expected = await uninterrupted(name)
    async with scripted_api(name).running() as api:
        whole = await api.call("POST", CHAT, body_of(name), headers=RESUME)
        client = Client().feed(whole.body)
        assert client.said == expected
        assert client.ids == sorted(client.ids)
        assert client.last_id.rpartition(".")[0] == whole.headers["x-stream-id"]
        seen = set()
        # What a client knows changes where an event ends.
        for cut in [0, *(found.end() for found in re.finditer(b"\n\n", whole.body))]:
            client = Client().feed(whole.body[:cut])
            if (state := (client.last_id, len(client.ids), client.is_done)) in seen:
                continue
            seen.add(state)
            if client.last_id is None:
                rest = await api.call("GET", f"/v1/streams/{whole.headers['x-stream-id']}")
            else:
                headers = {**RESUME, "last-event-id": client.last_id}
                rest = await api.call("POST", CHAT, body_of(name), headers=headers)
            assert client.feed(rest.body).said == expected
        assert len(seen) > 3
        assert api.app.context.metrics.num_finished["stop"] == 1, "it was made once"


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    name=st.sampled_from(sorted(ANSWERS)),
    visits=st.lists(st.tuples(st.integers(0, 25), st.floats(0, 1)), max_size=5),
)
async def test_promise_left_while_it_is_made_and_reconnected_the_answer_is_the_same(name, visits):
    expected = await uninterrupted(name)
    client = Client()
    api = scripted_api(name)
    api.runner._pace = api.pace
    api.pace.is_held = True
    async with api.running():
        headers = RESUME
        for steps, share in visits:
            exchange = Exchange(api.app, "POST", CHAT, body_of(name), headers=headers)
            await exchange.until(lambda e: bool(e.messages))
            for _ in range(steps):
                await until(lambda: bool(api.pace.waiting) or api.engine.is_idle)
                if not api.engine.is_idle:
                    await api.pace.step()
            exchange.leave()
            await exchange.finished()
            client.feed(exchange.body[: int(share * len(exchange.body))])
            if client.last_id is None:
                stream_id = dict(exchange.messages[0]["headers"])[b"x-stream-id"].decode()
                client.last_id = f"{stream_id}.0"
            headers = {**RESUME, "last-event-id": client.last_id}
        api.pace.let_go()
        rest = await api.call("POST", CHAT, body_of(name), headers=headers)
        assert client.feed(rest.body).said == expected
        assert sum(api.app.context.metrics.num_finished.values()) == 1
        await until(lambda: api.engine.is_idle)
        assert api.num_used_blocks == 0


async def test_promise_ids_count_the_tokens_whose_text_is_out():
    async with Api(is_held=True).running() as api:
        body = {"prompt": "Hi", "stream": True, "max_tokens": 4}
        exchange = Exchange(api.app, "POST", COMPLETIONS, body, headers=RESUME)
        for n in range(1, 5):
            await api.pace.step()
            await exchange.until(lambda e, n=n: b".%d\n" % n in e.body)
        await exchange.finished()
    client = Client().feed(exchange.body)
    assert client.content == "abcd"
    assert client.ids == [1, 2, 3, 4, 4]  # the last with the finish_reason


async def test_promise_a_stream_is_found_by_the_key_that_owns_it_only():
    mine, other = ({"authorization": f"Bearer {key}"} for key in ("mine", "other"))
    async with Api(api_keys=("mine", "other")).running() as api:
        body = chat_body(stream=True, max_tokens=5)
        first = await api.call("POST", CHAT, body, headers={**RESUME, **mine})
        stream_id = first.headers["x-stream-id"]
        at = {"last-event-id": f"{stream_id}.2"}
        path = f"/v1/streams/{stream_id}"
        assert (await api.call("GET", path)).status == 401
        for wrong in (
            await api.call("GET", path, headers=other),
            await api.call("POST", CHAT, body, headers={**at, **other}),
            await api.call("GET", "/v1/streams/nobody", headers=mine),
        ):
            assert (wrong.status, wrong.error["code"]) == (404, "stream_not_found")
        rest = await api.call("GET", path, headers={**at, **mine})
        assert Client().feed(rest.body).content == "cde"
        again = await api.call("POST", CHAT, chat_body(stream=True), headers={**at, **mine})
        assert (again.status, again.error["code"]) == (422, "body_differs")
        beyond = await api.call("GET", path, headers={"last-event-id": f"{stream_id}.9", **mine})
        assert (beyond.status, beyond.error["param"]) == (400, "Last-Event-ID")
        metrics = api.app.context.metrics
        assert (metrics.num_resumed, metrics.num_joined) == (1, 0)  # who was refused is not counted


async def test_promise_generation_goes_on_until_the_last_readers_grace_ends():
    async with Api(is_held=True, streams=StreamConfig(resume_timeout_s=60.0)).running() as api:
        body = chat_body(stream=True, max_tokens=100)
        exchange = Exchange(api.app, "POST", CHAT, body, headers=RESUME)
        await api.pace.step()
        await exchange.until(lambda e: b'"content":"a' in e.body)
        exchange.leave()
        await exchange.finished()
        await api.pace.step()
        await api.pace.step()  # it goes on
        assert api.num_used_blocks > 0
        stream_id = Client().feed(exchange.body).last_id.rpartition(".")[0]
        path = f"/v1/streams/{stream_id}"
        second = Exchange(api.app, "GET", path)
        await second.until(lambda e: Client().feed(e.body).content == "abc")
        [kept] = api.app.context.kept._by_id.values()
        kept._timeout_s = 0.05
        second.leave()
        await second.finished()
        await until(lambda: len(api.app.context.kept) == 0)  # the grace has ended
        api.pace.let_go()
        await until(lambda: api.engine.is_idle)
        assert api.num_used_blocks == 0
        assert (await api.call("GET", path)).status == 404
        assert api.app.context.metrics.num_finished["abort"] == 1


async def test_promise_the_log_is_bounded_and_what_is_not_read_waits():
    streams = StreamConfig(max_buffer_bytes=8192, max_replay_bytes=4096)
    async with Api(streams=streams, max_model_len=2048).running() as api:
        body = chat_body(stream=True, max_tokens=1000)
        exchange = Exchange(api.app, "POST", CHAT, body, headers=RESUME)
        await exchange.until(lambda e: b'"content":"a' in e.body)
        exchange.leave()
        await exchange.finished()
        await until(lambda: api.engine.stats().num_paused == 1)
        [kept] = api.app.context.kept._by_id.values()
        assert kept.num_bytes < 4096 + 2048
        client = Client().feed(exchange.body)
        at = {"last-event-id": client.last_id}
        client.feed((await api.call("POST", CHAT, body, headers=at)).body)
        assert client.content == "abcdefghij" * 100
        assert client.is_done
        gone = await api.call("POST", CHAT, body, headers={"last-event-id": f"{kept.id}.1"})
        assert (gone.status, gone.error["code"]) == (410, "stream_position_gone")


async def test_promise_what_the_last_reader_has_makes_room_for_more():
    streams = StreamConfig(max_buffer_bytes=8192, max_replay_bytes=4096)  # 21 tokens
    async with Api(is_held=True, streams=streams, max_model_len=2048).running() as api:
        body = chat_body(stream=True, max_tokens=1000)
        exchange = Exchange(api.app, "POST", CHAT, body, headers=RESUME)
        for n in range(1, 19):
            await api.pace.step()
            await exchange.until(lambda e, n=n: b".%d\n" % n in e.body)
        exchange.leave()
        await exchange.finished()
        api.pace.let_go()
        await until(lambda: api.engine.stats().num_paused == 1)
        [kept] = api.app.context.kept._by_id.values()
        assert kept.log.last >= 18 + 4096 // 200
        path, client = f"/v1/streams/{kept.id}", Client().feed(exchange.body)
        client.feed((await api.call("GET", path, headers={"last-event-id": client.last_id})).body)
        assert client.content == "abcdefghij" * 100


async def held_up_by_a_slow_reader(api):
    """Two readers of one answer, which is paused since the second has stalled."""
    body = chat_body(stream=True, max_tokens=1000)
    fast = Exchange(api.app, "POST", CHAT, body, headers=RESUME)
    await fast.until(lambda e: bool(e.messages))
    [kept] = api.app.context.kept._by_id.values()
    slow = Exchange(api.app, "GET", f"/v1/streams/{kept.id}")
    await slow.until(lambda e: len(e.messages) > 2)
    slow.stall()
    await until(lambda: api.engine.stats().num_paused == 1)
    return fast, slow


async def test_promise_a_slow_reader_misses_nothing_of_what_another_has():
    streams = StreamConfig(max_buffer_bytes=8192, max_replay_bytes=4096)
    async with Api(streams=streams, max_model_len=2048).running() as api:
        fast, slow = await held_up_by_a_slow_reader(api)
        slow.read_on()
        for reader in (fast, slow):
            await reader.finished()
            assert Client().feed(reader.body).content == "abcdefghij" * 100


async def test_promise_who_comes_back_with_more_than_was_known_to_be_sent_makes_room():
    streams = StreamConfig(max_buffer_bytes=8192, max_replay_bytes=4096)
    async with Api(streams=streams, max_model_len=2048).running() as api:
        body = chat_body(stream=True, max_tokens=1000)
        exchange = Exchange(api.app, "POST", CHAT, body, headers=RESUME)
        await exchange.until(lambda e: b'"content":"a' in e.body)
        exchange.leave()
        await exchange.finished()
        await until(lambda: api.engine.stats().num_paused == 1)
        [kept] = api.app.context.kept._by_id.values()
        num_known = kept.log.last
        at = {"last-event-id": f"{kept.id}.{num_known}"}
        rest = Client().feed((await api.call("POST", CHAT, body, headers=at)).body)
        assert rest.content == ("abcdefghij" * 100)[num_known:]
        assert rest.is_done


async def test_promise_a_slow_reader_that_leaves_holds_nobody_up():
    streams = StreamConfig(max_buffer_bytes=8192, max_replay_bytes=4096)
    async with Api(streams=streams, max_model_len=2048).running() as api:
        fast, slow = await held_up_by_a_slow_reader(api)
        slow.leave()
        for reader in (slow, fast):
            await reader.finished()
        assert Client().feed(fast.body).content == "abcdefghij" * 100


async def test_promise_a_reader_that_was_given_up_may_come_back_though_the_server_ends():
    streams = StreamConfig(stall_timeout_s=0.1)
    async with Api(streams=streams).running() as api:
        body = chat_body(stream=True, max_tokens=20)
        exchange = Exchange(api.app, "POST", CHAT, body, headers=RESUME)
        await exchange.until(lambda e: bool(e.messages))
        exchange.stall()
        await exchange.finished()
        [kept] = api.app.context.kept._by_id.values()
        assert kept.is_over
        assert api.app.context.gate.num_inside == 1, "nobody has all of it"
        rest = Client().feed((await api.call("GET", f"/v1/streams/{kept.id}")).body)
        assert rest.content == "abcdefghij" * 2
        assert api.app.context.gate.num_inside == 0


async def test_promise_of_what_has_ended_the_oldest_that_nobody_reads_is_forgotten_first():
    streams = StreamConfig(max_kept_bytes=5000)  # 10 tokens take 2,010
    async with Api(streams=streams).running() as api:
        body, kept = chat_body(stream=True, max_tokens=10), api.app.context.kept
        long = chat_body(stream=True, max_tokens=400)
        first = Exchange(api.app, "POST", CHAT, long, headers=RESUME)  # is being made
        await first.until(lambda e: len(e.messages) > 1)
        ids = [(await api.call("POST", CHAT, body, headers=RESUME)).headers["x-stream-id"]]
        reader = Exchange(api.app, "GET", f"/v1/streams/{ids[0]}")
        reader.stall()  # and reads for as long as it takes
        await until(lambda: kept._by_id[ids[0]].is_read)
        for _ in range(5):
            answer = await api.call("POST", CHAT, body, headers=RESUME)
            ids.append(answer.headers["x-stream-id"])
        assert [name in kept._by_id for name in ids] == [True, *[False] * 3, True, True]
        reader.read_on()
        for exchange, count in ((first, 40), (reader, 1)):
            await exchange.finished()
            assert Client().feed(exchange.body).content == "abcdefghij" * count


def test_promise_a_log_gives_no_more_than_was_asked_for_and_keeps_what_it_can():
    log = ReplayLog(max_bytes=1000)
    for n in range(1, 6):
        log.add(n, [Content("x" * 100)])
    assert log.is_full
    assert [len(events) for events, _ in [log.after(0, 1), log.after(0, 150)]] == [1, 2]
    assert log.after(1, 10**6)[1] == 5
    log.drop(4)
    assert (log.first, log.last, log.is_full) == (2, 5, False)


async def test_promise_a_failure_reaches_whoever_comes_back():
    async with Api(runner=BrokenRunner(good_steps=3)).running() as api:
        body = chat_body(stream=True, max_tokens=9, stream_options={"include_usage": True})
        first = await api.call("POST", CHAT, body, headers=RESUME)
        client = Client().feed(first.body)
        assert client.error["code"] == "internal_error"
        again = await api.call("GET", f"/v1/streams/{first.headers['x-stream-id']}")
        late = Client().feed(again.body)
        assert (late.content, late.error) == (client.content, client.error)
        assert not late.is_done


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"return_token_ids": True}, "return_token_ids"),
        ({"stream_options": {"include_timing": True}}, "include_timing"),
        ({"stream_options": {"include_progress": True}}, "stream_options.include_progress"),
        (
            {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
        ),
        ({"stream": False}, "stream"),
    ],
)
async def test_promise_what_cannot_be_resumed_is_refused_by_name(fields, param):
    async with Api().running() as api:
        body = chat_body(**{"stream": True, **fields})
        answer = await api.call("POST", CHAT, body, headers=RESUME)
        assert (answer.status, answer.error["param"]) == (400, param)
        assert "X-Stream-Resume" in answer.error["message"]
        assert api.engine.is_idle


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X-Stream-Resume", "maybe"),
        ("Last-Event-ID", "nonsense"),
        ("Last-Event-ID", "chatcmpl-1.-3"),
        ("Idempotency-Key", "x" * 300),
        ("Idempotency-Key", ""),
    ],
)
async def test_promise_a_wrong_header_is_refused_by_name(name, value):
    async with Api().running() as api:
        answer = await api.call("POST", CHAT, chat_body(), headers={name: value})
        assert (answer.status, answer.error["param"]) == (400, name)


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        ("/v1/messages", "X-Stream-Resume", "1"),
        ("/v1/messages", "Last-Event-ID", "msg_1.2"),
        ("/v1/responses", "X-Stream-Resume", "1"),
        ("/v1/responses", "Last-Event-ID", "resp_1.2"),
        ("/v1/responses", "Idempotency-Key", "order-66"),
    ],
)
async def test_promise_who_cannot_resume_says_so(path, name, value):
    body = message_body(stream=True) if path == "/v1/messages" else {"input": "Hi", "stream": True}
    async with Api().running() as api:
        answer = await api.call("POST", path, body, headers={name: value})
        assert answer.status == 400
        assert f"{name} is not supported for {path}" in answer.error["message"]
        assert api.engine.is_idle


async def test_promise_a_stream_that_need_not_be_resumed_is_not_kept():
    async with Api().running() as api:
        answer = await api.call("POST", CHAT, chat_body(n=2), headers={"X-Stream-Resume": "0"})
        assert answer.status == 200
        assert len(api.app.context.kept) == 0
