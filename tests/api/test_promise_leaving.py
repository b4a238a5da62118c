"""Promise: a reader who leaves frees everything by the next step, in every phase."""

import asyncio
import threading

import pytest

from tests.api.harness import Api, Exchange, chat_body, until
from tests.api.test_http import connected

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
LONG = "x" * 1200  # more than one step's budget of prompt tokens


async def assert_all_is_free(api, exchange, num_finished):
    """The client has left. No further step is launched, and nothing is held."""
    num_steps = api.runner.num_steps
    await exchange.finished()
    assert api.engine.stats().num_waiting == 0
    assert api.engine.stats().num_running == 0
    api.pace.let_go()
    await until(lambda: api.engine.is_idle)
    assert api.runner.num_steps == num_steps
    assert api.num_used_blocks == 0
    api.kv_cache.check_integrity()
    assert api.app.context.gate.num_inside == 0
    assert api.app.context.metrics.num_finished == {
        "stop": 0,
        "length": 0,
        "abort": num_finished,
        "error": 0,
    }


@pytest.mark.parametrize(
    ("choices", "is_streamed"),
    [
        ({}, True),
        ({}, False),
        ({"n": 3}, True),
        ({"n": 3}, False),
        ({"n": 1, "best_of": 3}, False),
        ({"n": 2, "use_beam_search": True}, False),
    ],
)
@pytest.mark.parametrize("num_steps", [0, 1, 2, 5], ids=["prefilling", "first", "second", "more"])
async def test_promise_leaving_a_running_request(num_steps, choices, is_streamed):
    async with Api(is_held=True, max_model_len=2048).running() as api:
        body = {"prompt": LONG, "stream": is_streamed, "max_tokens": 500, **choices}
        exchange = Exchange(api.app, "POST", COMPLETIONS, body)
        await until(lambda: bool(api.pace.waiting))
        for _ in range(num_steps):
            await api.pace.step()
        await until(lambda: bool(api.pace.waiting))
        assert api.num_used_blocks > 0
        exchange.leave()
        num_answers = choices.get("best_of", choices.get("n", 1))
        await assert_all_is_free(api, exchange, num_answers)


@pytest.mark.parametrize("is_streamed", [True, False])
async def test_promise_leaving_the_queue(is_streamed):
    async with Api(is_held=True).running() as api:
        runs = Exchange(api.app, "POST", CHAT, chat_body(stream=True, max_tokens=100))
        await until(lambda: bool(api.pace.waiting))
        exchange = Exchange(api.app, "POST", CHAT, chat_body(stream=is_streamed, n=2))
        await until(lambda: api.engine.stats().num_waiting == 2)
        exchange.leave()
        await exchange.finished()
        assert api.engine.stats().num_waiting == 0
        runs.leave()
        await assert_all_is_free(api, runs, 3)


@pytest.mark.parametrize("is_streamed", [True, False])
async def test_promise_leaving_between_body_and_headers(is_streamed):
    """While the prompt is tokenised in a thread: nothing comes to the engine any more."""
    may_encode = threading.Event()
    async with Api().running() as api:
        encode = api.tokenizer.encode

        def held(text, **options):
            may_encode.wait()
            return encode(text, **options)

        api.tokenizer.encode = held
        body = {"prompt": "x" * 10_000, "truncate_prompt_tokens": 9, "stream": is_streamed}
        exchange = Exchange(api.app, "POST", COMPLETIONS, body)
        await until(lambda: api.app.context.gate.num_inside == 1)
        for _ in range(9):
            await asyncio.sleep(0)
        exchange.leave()
        await exchange.finished()
        may_encode.set()
        await assert_all_is_free(api, exchange, 0)
        assert exchange.messages == []
        assert api.runner.num_steps == 0


@pytest.mark.parametrize("num_tasks_turns", range(12))
@pytest.mark.parametrize("is_streamed", [True, False])
async def test_promise_leaving_at_any_turn_of_the_event_loop(is_streamed, num_tasks_turns):
    async with Api(is_held=True).running() as api:
        exchange = Exchange(api.app, "POST", CHAT, chat_body(stream=is_streamed, n=2))
        for _ in range(num_tasks_turns):
            await asyncio.sleep(0)
        exchange.leave()
        await exchange.finished()
        api.pace.let_go()
        await until(lambda: api.engine.is_idle)
        assert api.num_used_blocks == 0
        assert api.app.context.gate.num_inside == 0


@pytest.mark.parametrize("num_answered", [0, 1])
@pytest.mark.parametrize("is_streamed", [True, False])
async def test_promise_leaving_with_another_request_behind(is_streamed, num_answered):
    """On the same connection: it is the one that runs which must end."""
    api = Api(is_held=True)
    async with api.serving() as address:
        async with connected(address) as client:
            body = {"prompt": "a", "stream": is_streamed, "max_tokens": 100}
            for max_tokens in [1] * num_answered + [100] * 2:
                await client.send("POST", COMPLETIONS, {**body, "max_tokens": max_tokens})
            for _ in range(num_answered + 2):
                await api.pace.step()
            await until(lambda: bool(api.pace.waiting))
        await until(lambda: api.app.context.gate.num_inside == 0)
        num_steps = api.runner.num_steps
        api.pace.let_go()
        await until(lambda: api.engine.is_idle)
        assert api.runner.num_steps == num_steps
        assert api.num_used_blocks == 0
        assert api.app.context.metrics.num_finished["abort"] == 1


async def test_promise_a_request_is_cancelled_from_elsewhere_by_the_same_key_only():
    keys = {name: {"authorization": f"Bearer {name}"} for name in ("mine", "other")}
    async with Api(is_held=True, api_keys=("mine", "other")).running() as api:
        exchange = Exchange(
            api.app,
            "POST",
            CHAT,
            chat_body(max_tokens=100, n=3),
            headers={"x-request-id": "turn-7", **keys["mine"]},
        )
        await api.pace.step()
        await until(lambda: bool(api.pace.waiting))
        path = f"{CHAT}/turn-7/cancel"
        [own_id] = api.app.context.running._answers
        assert (await api.call("POST", path)).status == 401
        for wrong in (
            await api.call("POST", path, headers=keys["other"]),
            await api.call("POST", f"{CHAT}/{own_id}/cancel", headers=keys["other"]),
            await api.call("POST", f"{CHAT}/turn-8/cancel", headers=keys["mine"]),
            await api.call("POST", f"{COMPLETIONS}/turn-7/cancel", headers=keys["mine"]),
        ):
            assert (wrong.status, wrong.error["code"]) == (404, "answer_not_found")
        assert api.num_used_blocks > 0
        namesake = Exchange(  # whoever else calls theirs the same is not in the way
            api.app,
            "POST",
            CHAT,
            chat_body(),
            headers={"x-request-id": "turn-7", **keys["other"]},
        )
        await until(lambda: len(api.app.context.running._answers) == 2)
        answer, again = await asyncio.gather(
            *[api.call("POST", path, headers=keys["mine"]) for _ in range(2)]
        )
        assert again.status == 404
        namesake.leave()
        await namesake.finished()
        assert answer.status == 200
        assert answer.json["usage"]["completion_tokens"] == 1
        await assert_all_is_free(api, exchange, 3 + 1)
        assert exchange.messages[0]["status"] == 499


async def test_promise_a_beam_search_is_cancelled_whole():
    async with Api(is_held=True).running() as api:
        body = {"prompt": "a", "n": 2, "use_beam_search": True, "max_tokens": 50}
        headers = {"x-request-id": "beams"}
        exchange = Exchange(api.app, "POST", COMPLETIONS, body, headers=headers)
        await api.pace.step()
        await until(lambda: bool(api.pace.waiting))
        answer = await api.call("POST", f"{COMPLETIONS}/beams/cancel")
        assert answer.json["status"] == "cancelled"
        await assert_all_is_free(api, exchange, 2)
        assert exchange.messages[0]["status"] == 499
