"""Promise: every request ends exactly once, and says how."""

import asyncio

import pytest

from streamserve.engine.null_runner import NullRunner
from tests.api.harness import (
    TEXT,
    Api,
    BrokenRunner,
    Exchange,
    chat_body,
    events_of,
    text_of,
    until,
)
from tests.api.scripted import scripted

CHAT = "/v1/chat/completions"
USAGE = {"include_usage": True}
FINISH_REASONS = {"stop", "length", "tool_calls", "content_filter", "function_call"}


def ends_of(events):
    """What ends something: finish reasons, errors and ``[DONE]``, in order."""
    ends = []
    for event in events:
        if event == "[DONE]":
            ends.append("[DONE]")
        elif "error" in event:
            ends.append("error")
        else:
            ends += [c["finish_reason"] for c in event["choices"] if c["finish_reason"]]
    return ends


@pytest.mark.parametrize("n", [1, 3])
async def test_promise_success_is_one_finish_reason_for_each_choice_and_then_done(n):
    async with Api().running() as api:
        answer = await api.chat(stream=True, max_tokens=3, n=n, stream_options=USAGE)
    ends = ends_of(answer.events)
    assert ends == ["length"] * n + ["[DONE]"]
    assert set(ends[:-1]) <= FINISH_REASONS
    assert answer.events[-2]["usage"]["completion_tokens"] == 3 * n


@pytest.mark.parametrize("n", [1, 3])
async def test_promise_failure_is_one_error_event_after_the_usage_and_no_done(n):
    async with Api(runner=BrokenRunner(good_steps=3)).running() as api:
        answer = await api.chat(stream=True, max_tokens=50, n=n, stream_options=USAGE)
    *chunks, usage, error = answer.events
    assert ends_of(answer.events) == ["error"]
    assert error["error"]["code"] == "internal_error"
    assert error["error"]["message"]
    assert usage["choices"] == []
    num_tokens = sum(len(text_of(chunks, index)) for index in range(n))
    assert usage["usage"]["completion_tokens"] >= num_tokens > 0
    assert usage["usage"]["prompt_tokens"] == len("User: Hi\nAssistant:")


class SecondFails(NullRunner):
    """Fails every step with the third token of a request's second choice."""

    def launch(self, plan):
        if any(s.request_id.endswith("/1") and s.output_position == 2 for s in plan.scheduled):
            raise RuntimeError("the second choice has burnt")
        super().launch(plan)


async def test_promise_one_choice_that_fails_ends_the_answer_and_all_tokens_are_counted():
    async with Api(runner=SecondFails(TEXT)).running() as api:
        answer = await api.chat(stream=True, max_tokens=300, n=2, stream_options=USAGE)
        await until(lambda: api.engine.is_idle)
    *chunks, usage, _ = answer.events
    assert ends_of(answer.events) == ["error"]
    first, second = (len(text_of(chunks, index)) for index in range(2))
    assert first >= second == 2
    assert usage["usage"]["completion_tokens"] >= first + second


async def test_promise_a_failed_stream_that_asked_for_no_usage_has_none():
    async with Api(runner=BrokenRunner(good_steps=2)).running() as api:
        answer = await api.chat(stream=True, max_tokens=50)
    assert b"usage" not in answer.body


async def test_promise_a_failed_stream_closes_the_connection():
    api = Api(runner=BrokenRunner(good_steps=2))
    async with api.serving() as address:
        reader, writer = await asyncio.open_connection(*address)
        body = b'{"prompt": "a", "stream": true}'
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        async with asyncio.timeout(60):
            raw = await reader.read()  # to the end of the connection
        writer.close()
    assert raw.count(b'"error"') == 1
    assert b"[DONE]" not in raw


@pytest.mark.parametrize("is_queued", [True, False])
async def test_promise_a_cancelled_stream_reports_its_usage_and_ends_with_an_error(is_queued):
    async with Api(is_held=True).running() as api:
        first = Exchange(api.app, "POST", CHAT, chat_body(stream=True, max_tokens=50))
        await until(lambda: bool(api.pace.waiting))
        exchange = first
        if is_queued:
            body = chat_body(stream=True, max_tokens=50, stream_options=USAGE)
            headers = {"x-request-id": "mine"}
            exchange = Exchange(api.app, "POST", CHAT, body, headers=headers)
            await exchange.until(lambda e: bool(e.messages))
            answer = await api.call("POST", f"{CHAT}/mine/cancel")
            num_tokens = 0
        else:
            await api.pace.step()
            await api.pace.step()
            await exchange.until(lambda e: len(e.messages) > 2)
            identity = events_of(exchange.body)[0]["id"]
            answer = await api.call("POST", f"{CHAT}/{identity}/cancel")
            num_tokens = 2
        await exchange.finished()
        events = events_of(exchange.body)
        assert ends_of(events) == ["error"]
        assert events[-1]["error"]["code"] == "cancelled"
        assert events[-1]["error"]["status"] == 499
        assert answer.json["status"] == "cancelled"
        assert answer.json["usage"]["completion_tokens"] == num_tokens
        assert answer.json["usage"]["prompt_tokens"] == len("User: Hi\nAssistant:")
        if is_queued:
            assert events[-2]["usage"] == answer.json["usage"]
            first.leave()
            await first.finished()
        api.pace.let_go()
        await until(lambda: api.engine.is_idle)
        assert api.num_used_blocks == 0
        assert api.app.context.metrics.num_finished["error"] == 0


async def test_promise_thoughts_of_a_cut_answer_are_counted():
    async with scripted("<think>" + "x" * 500).running() as api:
        exchange = Exchange(
            api.app, "POST", CHAT, chat_body(stream=True, max_tokens=400, stream_options=USAGE)
        )
        await exchange.until(lambda e: b"reasoning" in e.body)
        identity = events_of(exchange.body)[0]["id"]
        await api.call("POST", f"{CHAT}/{identity}/cancel")
        await exchange.finished()
    usage = events_of(exchange.body)[-2]["usage"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] > 0
    assert usage["completion_tokens"] < 400
