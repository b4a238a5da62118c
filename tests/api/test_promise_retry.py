"""Promise: a retried request joins the answer that is being made, instead of paying twice."""

import pytest

from tests.api.harness import (
    Api,
    BrokenRunner,
    Exchange,
    chat_body,
    events_of,
    message_body,
    text_of,
    until,
)

CHAT = "/v1/chat/completions"
KEY = {"idempotency-key": "order-66"}


@pytest.mark.parametrize("fields", [{}, {"n": 2}, {"stream": True}])
async def test_promise_a_retry_joins_the_running_answer(fields):
    async with Api(is_held=True).running() as api:
        body = chat_body(max_tokens=5, **fields)
        first = Exchange(api.app, "POST", CHAT, body, headers=KEY)
        await api.pace.step()
        await api.pace.step()
        first.leave()  # the connection breaks; the answer goes on
        await first.finished()
        second = Exchange(api.app, "POST", CHAT, body, headers=KEY)
        api.pace.let_go()
        await second.finished()
        third = await api.call("POST", CHAT, body, headers=KEY)
        metrics = api.app.context.metrics
        assert metrics.num_finished["length"] == fields.get("n", 1)
        assert (metrics.num_joined, metrics.num_resumed) == (2, 0)
    assert second.body == third.body or fields.get("stream")
    if fields.get("stream"):
        assert b"id: " not in second.body
        assert text_of(events_of(second.body)) == text_of(third.events) == "abcde"
    else:
        assert [c["message"]["content"] for c in third.json["choices"]] == ["abcde"] * fields.get(
            "n", 1
        )


async def test_promise_two_at_once_are_one():
    async with Api().running() as api:
        body = chat_body(max_tokens=5, messages=[{"role": "user", "content": "x" * 300}])
        both = [Exchange(api.app, "POST", CHAT, body, headers=KEY) for _ in range(2)]
        for exchange in both:
            await exchange.finished()
        assert both[0].body == both[1].body
        assert api.app.context.metrics.num_finished["length"] == 1


async def test_promise_another_body_under_the_same_key_is_refused():
    async with Api().running() as api:
        assert (await api.call("POST", CHAT, chat_body(max_tokens=2), headers=KEY)).status == 200
        for path, body in (
            (CHAT, chat_body(max_tokens=3)),
            ("/v1/completions", {"prompt": "a"}),
        ):
            answer = await api.call("POST", path, body, headers=KEY)
            assert (answer.status, answer.error["code"]) == (422, "body_differs")
            assert answer.error["param"] == "Idempotency-Key"


async def test_promise_keys_of_different_tenants_are_different():
    async with Api(api_keys=("a", "b")).running() as api:
        for key in ("a", "b"):
            headers = {**KEY, "authorization": f"Bearer {key}"}
            answer = await api.call("POST", CHAT, chat_body(max_tokens=2), headers=headers)
            assert answer.status == 200
        assert api.app.context.metrics.num_finished["length"] == 2


@pytest.mark.parametrize("is_streamed", [True, False])
async def test_promise_a_failed_answer_is_tried_again(is_streamed):
    runner = BrokenRunner(good_steps=2)
    async with Api(runner=runner).running() as api:
        body = chat_body(max_tokens=4, stream=is_streamed)
        failed = await api.call("POST", CHAT, body, headers=KEY)
        assert b'"error"' in failed.body
        runner._num_left = 100
        again = await api.call("POST", CHAT, body, headers=KEY)
        assert b'"error"' not in again.body
        assert b"length" in again.body
        await until(lambda: api.engine.is_idle)
        assert api.num_used_blocks == 0


async def test_promise_a_kept_answer_can_be_cancelled():
    async with Api(is_held=True).running() as api:
        body = chat_body(max_tokens=50, stream=True)
        exchange = Exchange(api.app, "POST", CHAT, body, headers={**KEY, "x-stream-resume": "1"})
        await api.pace.step()
        await exchange.until(lambda e: b'"content":"a' in e.body)
        stream_id = dict(exchange.messages[0]["headers"])[b"x-stream-id"].decode()
        answer = await api.call("POST", f"{CHAT}/{stream_id}/cancel")
        assert answer.json["usage"]["completion_tokens"] == 1
        await exchange.finished()
        assert b'"cancelled"' in exchange.body
        assert b"[DONE]" not in exchange.body
        api.pace.let_go()
        await until(lambda: api.engine.is_idle)
        assert api.num_used_blocks == 0


async def test_promise_a_message_is_retried_and_paid_once():
    async with Api().running() as api:
        first, second = [
            await api.call("POST", "/v1/messages", message_body(max_tokens=3), headers=KEY)
            for _ in range(2)
        ]
        assert first.status == 200
        assert first.body == second.body
        assert api.app.context.metrics.num_joined == 1
        streamed = await api.call("POST", "/v1/messages", message_body(stream=True))
        assert streamed.status == 200
        refused = await api.call(
            "POST", "/v1/messages", message_body(stream=True), headers={"idempotency-key": "other"}
        )
        assert refused.status == 400
        assert "stream must be false with Idempotency-Key" in refused.error["message"]
