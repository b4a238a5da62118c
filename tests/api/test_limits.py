"""Limits of time that a request sets itself, and limits of rate that its key has."""

from pathlib import Path

import orjson
import pytest

from streamserve.api.errors import retry_headers
from streamserve.api.rate_limits import RateLimiter
from streamserve.api.tenants import CHECK_INTERVAL_S, Tenant
from tests.api.harness import Api, Exchange, chat_body, events_of, until

CHAT = "/v1/chat/completions"


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


async def asked(api, **fields):
    exchange = Exchange(api.app, "POST", CHAT, chat_body(**fields))
    count = api.engine.stats()
    before = count.num_running + count.num_waiting
    await until(lambda: sum(_counts(api)) > before)
    return exchange


def _counts(api):
    stats = api.engine.stats()
    return stats.num_running, stats.num_waiting


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("field", "num_ahead", "status", "code"),
    [
        ("max_queue_ms", 2, 503, "queue_timeout"),
        ("ttft_ms", 2, 504, "deadline_exceeded"),
        ("deadline_ms", 2, 504, "deadline_exceeded"),
        ("deadline_ms", 0, 504, "deadline_exceeded"),  # while it is decoded
    ],
)
async def test_promise_refusal_a_limit_that_passes_ends_the_request(
    stream, field, num_ahead, status, code
):
    clock = Clock()
    async with Api(is_held=True, max_num_seqs=2, clock=clock).running() as api:
        ahead = [await asked(api, stream=True, max_tokens=20) for _ in range(num_ahead)]
        if ahead:
            await api.pace.step()
        late = await asked(api, stream=stream, max_tokens=20, **{field: 2000})
        for _ in range(3):
            await api.pace.step()
        clock.now += 1.9
        await api.pace.step()
        await api.pace.step()
        await until(lambda: bool(api.pace.waiting))
        assert sum(_counts(api)) == num_ahead + 1, "not yet"
        clock.now += 0.2
        await api.pace.step()
        await late.finished()
        assert _counts(api) == (num_ahead, 0)
        api.pace.let_go()
        for exchange in ahead:
            await exchange.finished()
        assert api.num_used_blocks == 0
    if stream:
        assert late.messages[0]["status"] == 200
        error = events_of(late.body)[-1]["error"]
        assert error["status"] == status
        assert b"[DONE]" not in late.body
        assert (b"content" in late.body) is (num_ahead == 0)
    else:
        assert late.messages[0]["status"] == status
        retry_ms = dict(late.messages[0]["headers"]).get(b"retry-after-ms")
        assert retry_ms in ((b"1110", b"1111") if status == 503 else (None,)), "by the queue's rate"
        error = orjson.loads(late.body)["error"]
    assert error["code"] == code
    assert f"{field} of 2000" in error["message"]
    for exchange in ahead:
        assert exchange.body.endswith(b"[DONE]\n\n")


async def test_limits_that_are_kept_change_nothing():
    async with Api().running() as api:
        limits = {"max_queue_ms": 1e6, "ttft_ms": 1e6, "deadline_ms": 86_400_000}
        with_limits = await api.chat(max_tokens=5, **limits)
        without = await api.chat(max_tokens=5)
    assert with_limits.status == 200
    assert with_limits.json["choices"] == without.json["choices"]


async def test_one_that_got_its_seat_in_time_may_take_longer():
    clock = Clock()
    async with Api(is_held=True, clock=clock).running() as api:
        exchange = await asked(api, max_tokens=3, max_queue_ms=10)
        await until(lambda: bool(api.pace.waiting))
        clock.now += 3600
        api.pace.let_go()
        await exchange.finished()
    assert exchange.messages[0]["status"] == 200


@pytest.mark.parametrize("max_tokens", [2, 20])
async def test_promise_refusal_the_tokens_of_a_step_come_before_a_limit_that_has_passed(max_tokens):
    clock = Clock()
    async with Api(is_held=True, clock=clock).running() as api:
        exchange = await asked(api, stream=True, max_tokens=max_tokens, deadline_ms=2000)
        await api.pace.step()
        await exchange.until(lambda e: b'"content":"a' in e.body)
        await until(lambda: bool(api.pace.waiting))
        clock.now += 3.0
        await api.pace.step()
        await exchange.finished()
        assert b'"content":"b' in exchange.body
        assert (b"[DONE]" in exchange.body) == (max_tokens == 2)
        assert (b"deadline_exceeded" in exchange.body) == (max_tokens > 2)
        assert not api.engine.is_dead


async def test_a_time_that_has_passed_at_the_door_is_refused_with_a_status():
    clock = Clock()
    async with Api(clock=clock).running() as api:
        prepare = api.app.context.preprocessor.chat

        async def slowly(*args, **kwargs):
            clock.now += 5.0
            return await prepare(*args, **kwargs)

        api.app.context.preprocessor.chat = slowly
        answer = await api.chat(stream=True, deadline_ms=4999)
        assert answer.status == 503
        assert (answer.error["code"], answer.error["param"]) == (
            "deadline_unreachable",
            "deadline_ms",
        )
        assert int(answer.headers["retry-after"]) == 1
        assert 0 < int(answer.headers["retry-after-ms"]) <= 1000
        assert (await api.chat(max_tokens=1, deadline_ms=5001)).status == 200


KEYS = """
[few]
keys = ["few"]
requests_per_minute = 2
[short]
keys = ["short"]
tokens_per_minute = 200
[free]
keys = ["free"]
"""


@pytest.fixture
def limited(tmp_path):
    file = tmp_path / "keys.toml"
    file.write_text(KEYS)
    clock = Clock()
    api = Api(api_key_file=str(file), clock=clock)
    return api, clock


async def call(api, key, text="Hi", **fields):
    body = chat_body(**({"max_tokens": 2} | fields))
    body["messages"][0]["content"] = text
    return await api.call("POST", CHAT, body, headers={"authorization": f"Bearer {key}"})


@pytest.mark.parametrize(
    ("seconds", "whole", "milliseconds"),
    [(0.0001, "1", "1"), (1.0, "1", "1000"), (1.2345, "2", "1235")],
)
def test_promise_refusal_the_time_to_come_back_is_rounded_up(seconds, whole, milliseconds):
    assert retry_headers(seconds) == {"Retry-After": whole, "retry-after-ms": milliseconds}


def test_promise_refusal_a_bucket_holds_a_minutes_worth():
    clock = Clock()
    limiter, tenant = RateLimiter(clock), Tenant(name="t", tokens_per_minute=60)
    first, second = (limiter.allowance(tenant) for _ in range(2))
    clock.now += 600.0
    first.take_tokens([50, 5])
    assert first.headers()[b"x-ratelimit-remaining-tokens"] == b"5"
    first.close()  # neither had a seat
    second.take_tokens([60])
    first.close()
    assert second.headers()[b"x-ratelimit-remaining-tokens"] == b"0"


async def test_promise_refusal_requests_per_minute(limited):
    api, clock = limited
    async with api.running():
        first, second, third = [await call(api, "few", stream=True) for _ in range(3)]
        assert [a.status for a in (first, second, third)] == [200, 200, 429]
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert second.headers["x-ratelimit-reset-requests"] == "1m0s"
        assert third.headers["x-ratelimit-remaining-requests"] == "0"
        assert third.headers["retry-after"] == "30"
        assert third.headers["retry-after-ms"] == "30000"
        assert third.error["code"] == "rate_limit_exceeded"
        assert third.error["type"] == "rate_limit_error"
        assert "x-ratelimit-limit-tokens" not in third.headers
        headers = {"authorization": "Bearer few"}
        for path, body in (("/tokenize", {"prompt": "Hi"}), ("/detokenize", {"tokens": [72]})):
            assert (await api.call("POST", path, body, headers=headers)).status == 429
        free = await call(api, "free")
        assert (free.status, [h for h in free.headers if "ratelimit" in h]) == (200, [])
        clock.now += 29.9
        assert (await call(api, "few")).status == 429
        clock.now += 0.2
        assert (await call(api, "few")).status == 200


def left(answer):
    return int(answer.headers["x-ratelimit-remaining-tokens"])


async def test_promise_refusal_what_the_cache_held_costs_no_tokens(limited):
    api, clock = limited
    async with api.running():
        first = await call(api, "short", "a" * 70)
        num_tokens = first.json["usage"]["prompt_tokens"]
        assert left(first) == 200 - num_tokens
        second = await call(api, "short", "a" * 70)
        num_cached = second.json["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert num_cached > 60
        assert left(second) == 200 - 2 * num_tokens + num_cached
        refused = await call(api, "short", "b" * 150)
        assert refused.status == 429
        assert "200 tokens per minute" in refused.error["message"]
        assert left(refused) == left(second), "nothing was taken"
        missing = refused.error["message"].rsplit(" were", 1)[0].rsplit(" ", 1)[1]
        clock.now += (int(missing) - left(second)) * 60 / 200 + 0.01
        assert (await call(api, "short", "b" * 150)).status == 200


async def test_promise_refusal_vectors_cost_tokens_as_answers_do(limited):
    api, _ = limited
    async with api.running():
        headers = {"authorization": "Bearer short"}
        body = {"input": ["a" * 50, "b" * 20], "model": "alias"}
        first, second = [
            await api.call("POST", "/v1/embeddings", body, headers=headers) for _ in range(2)
        ]
        assert first.status == 200
        assert 200 - 72 <= left(first) <= 200 - 70, "and what begins every text"
        assert left(first) - 24 <= left(second) < left(first), "most of it was cached"
        third = await api.call("POST", "/v1/embeddings", {"input": "c" * 150}, headers=headers)
        assert (third.status, third.error["code"]) == (429, "rate_limit_exceeded")


async def test_promise_refusal_a_changed_limit_forgets_nothing_that_was_taken(limited):
    api, clock = limited
    async with api.running():
        before = left(await call(api, "short", "a" * 70))
        assert before < 200 - 70
        file = Path(api.config.api_key_file)
        for limit, now in ((500, before + 300), (100, max(before - 100, 0))):
            file.write_text(KEYS.replace("_minute = 200", f"_minute = {limit}"))
            clock.now += CHECK_INTERVAL_S  # in which the bucket fills by less than ten
            answer = await api.call("GET", "/v1/models", headers={"authorization": "Bearer short"})
            assert answer.headers["x-ratelimit-limit-tokens"] == str(limit)
            assert now <= left(answer) <= now + 12


async def test_what_was_not_computed_costs_no_tokens(limited):
    api, _ = limited
    async with api.running():
        wrong = await call(api, "short", "a" * 100, max_tokens=10_000)
        assert (wrong.status, left(wrong)) == (400, 200)
        api.pace.is_held = True
        headers = {"authorization": "Bearer short"}
        body = chat_body(stream=True, max_tokens=2)
        for _ in range(9):  # the last one finds no seat
            exchange = Exchange(api.app, "POST", CHAT, body, headers=headers)
            await until(lambda exchange=exchange: bool(exchange.messages))
        num_left = left(await api.call("GET", "/v1/models", headers=headers))
        exchange.leave()
        await exchange.finished()
        more = left(await api.call("GET", "/v1/models", headers=headers)) - num_left
        assert more == len("user: Hi\nassistant:") or more > 2, "all of its prompt"


async def test_a_prompt_longer_than_a_minutes_worth_is_let_in_by_a_full_bucket(limited):
    api, clock = limited
    async with api.running():
        assert (await call(api, "short", "a" * 300)).status == 200
        refused = await call(api, "short")
        assert refused.status == 429
        assert "of which 0 are left" in refused.error["message"]
        assert left(refused) == 0
        clock.now += 60
        assert (await call(api, "short")).status == 200
