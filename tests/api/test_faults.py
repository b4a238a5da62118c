"""The hook that lets things go wrong on purpose."""

import asyncio

import pytest

from streamserve.engine.text_source import byte_text
from tests.api.harness import Api, text_of

PATH = "/debug/inject_fault"


async def test_without_the_flag_the_path_does_not_exist():
    async with Api().running() as api:
        answer = await api.call("POST", PATH, {"kind": "noop"})
    assert answer.status == 404
    assert answer.error["code"] == "unknown_url"


async def test_with_keys_it_asks_for_one():
    async with Api(has_faults=True, api_keys=("k",)).running() as api:
        assert (await api.call("POST", PATH, {"kind": "noop"})).status == 401
        headers = {"authorization": "Bearer k"}
        answer = await api.call("POST", PATH, {"kind": "noop"}, headers=headers)
    assert (answer.status, answer.json) == (200, {"kind": "noop"})


async def test_a_step_fails_and_the_next_request_is_right():
    async with Api(has_faults=True).running() as api:
        await api.call("POST", PATH, {"kind": "step_exception"})
        await api.chat(max_tokens=3)  # the engine may run it again, or fail it
        answer = await api.chat(stream=True, max_tokens=3)
        assert text_of(answer.events) == "abc"
        assert api.engine.is_idle
        assert api.num_used_blocks == 0


async def test_what_was_asked_for_can_be_taken_back():
    async with Api(has_faults=True).running() as api:
        await api.call("POST", PATH, {"kind": "step_exception"})
        await api.call("POST", PATH, {"kind": "clear"})
        assert (await api.chat(max_tokens=3)).status == 200
        assert api.engine.stats().num_failed_steps == 0


async def test_a_device_that_dies_while_nobody_asks_is_the_end_of_the_server():
    async with Api(has_faults=True).running() as api:
        await api.call("POST", PATH, {"kind": "device_dead"})
        async with asyncio.timeout(60):
            await api.engine.wait_dead()
        assert (await api.call("GET", "/health")).json == {"status": "dead"}
        assert not api.engine.has_failed_requests
        assert (await api.chat()).status == 503
        assert api.engine.has_failed_requests


async def test_a_worker_that_dies_is_replaced():
    api = Api(has_faults=True, load_text=byte_text)
    async with api.serving():
        body = {"prompt": "x" * 20_000}
        assert (await api.call("POST", "/tokenize", body)).status == 200
        [pid] = api.app.context.prompt_workers.pids
        await api.call("POST", PATH, {"kind": "worker_death"})
        answers = [(await api.call("POST", "/tokenize", body)).status for _ in range(2)]
        assert answers in ([500, 200], [200, 200])
        assert pid not in api.app.context.prompt_workers.pids


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "kind"),
        ({"kind": "earthquake"}, "kind"),
        ({"kind": "request_exception"}, "kind"),
        ({"kind": "slow_step", "delay_s": 61}, "delay_s"),
        ({"kind": "step_exception", "num_steps": 0}, "num_steps"),
        ({"kind": "noop", "extra": 1}, "extra"),
    ],
)
async def test_what_cannot_be_is_refused_by_name(body, param):
    async with Api(has_faults=True).running() as api:
        answer = await api.call("POST", PATH, body)
    assert answer.status == 400
    assert answer.error["param"] == param
