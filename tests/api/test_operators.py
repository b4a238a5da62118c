"""Health, liveness and readiness; the operators' port; what can be closed."""

import asyncio

import httpx
import pytest

from streamserve.api.server import ApiServer, bind_admin_sockets, bind_sockets
from streamserve.config import ApiConfig
from streamserve.core.sampling_params import SamplingParams
from streamserve.engine.hang_watch import HangWatch
from streamserve.errors import ConfigError
from tests.api.harness import Api, BrokenRunner, Exchange, chat_body, until

CHAT = "/v1/chat/completions"
HEALTH = ("/health", "/ready", "/live")


async def states(api):
    answers = [await api.call("GET", path) for path in HEALTH]
    return [(answer.status, answer.json["status"]) for answer in answers]


async def test_a_server_that_drains_is_alive_and_not_ready():
    async with Api().running() as api:
        assert await states(api) == [(200, "ok")] * 3
        api.app.context.gate.close()
        assert await states(api) == [(503, "draining"), (503, "draining"), (200, "ok")]


async def test_a_dead_engine_is_neither_alive_nor_ready():
    async with Api(runner=BrokenRunner(0)).running() as api:
        while not api.engine.is_dead:
            await api.chat(max_tokens=1)
        assert await states(api) == [(503, "dead")] * 3


class Engine:
    """What a watch looks at."""

    num_steps = 0
    has_work = False


async def test_a_hung_engine_is_told_from_a_busy_and_from_an_idle_one(caplog):
    engine, now = Engine(), [0.0]
    watch = HangWatch(engine, lambda: now[0], 60.0)

    def look_after(seconds):
        now[0] += seconds
        return watch.is_hung

    assert not look_after(1000)  # nothing to do
    assert not look_after(1000)
    engine.has_work = True
    assert not look_after(59)
    engine.num_steps += 1  # a step of a minute
    assert not look_after(59)
    assert not look_after(59.9)
    assert look_after(0.1)
    assert look_after(1000)
    engine.num_steps += 1  # it goes on after all
    assert not look_after(10)
    assert look_after(1000)
    reports = [record.getMessage() for record in caplog.records]
    assert len(reports) == 2  # with every thread's stack, once each time
    assert reports[0].startswith("no step has ended for 60 s\nthread MainThread:\n")


async def test_who_waits_for_a_seat_is_work():
    api = Api()
    assert not api.engine.has_work
    stream = api.engine.submit([1], SamplingParams(max_tokens=1), request_id="r")
    assert api.engine.has_work, "and no step is in flight"
    stream.close()
    assert not api.engine.has_work


async def test_a_step_that_never_ends_makes_the_server_hung(caplog):
    api = Api(is_held=True, hang_timeout_s=0.05)
    async with api.serving():
        exchange = Exchange(api.app, "POST", CHAT, chat_body(max_tokens=2))
        await until(lambda: bool(api.pace.waiting))
        await until(lambda: "no step has ended" in caplog.text)  # nobody has asked
        assert await states(api) == [(503, "hung")] * 3
        assert "thread MainThread" in caplog.text
        await api.pace.step()
        api.pace.let_go()
        await exchange.finished()
        assert await states(api) == [(200, "ok")] * 3


async def test_live_is_answered_within_a_few_steps_of_a_saturated_engine():
    # Steps end at once: the loop does nothing but step and write for eight seats.
    api = Api(max_model_len=4096, num_blocks=4096)
    async with api.serving() as (host, port):
        readers = [
            Exchange(api.app, "POST", CHAT, chat_body(stream=True, max_tokens=3000))
            for _ in range(12)
        ]
        await until(lambda: api.engine.num_steps > 5)
        reader, writer = await asyncio.open_connection(host, port)
        for _ in range(5):
            before = api.engine.num_steps
            writer.write(b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            assert await reader.readexactly(len(b'{"status":"ok"}')) == b'{"status":"ok"}'
            assert api.engine.num_steps - before < 200
        assert not api.engine.is_idle
        writer.close()
        for exchange in readers:
            exchange.leave()
            await exchange.finished()


async def test_operators_have_a_port_of_their_own():
    api = Api(admin_port=0, api_keys=("k",), has_faults=True)
    sockets, admin_sockets = bind_sockets(api.config), bind_admin_sockets(api.config)
    ready = asyncio.Event()
    server = ApiServer(
        api.app,
        api.config,
        sockets=sockets,
        admin_sockets=admin_sockets,
        on_ready=lambda _: ready.set(),
    )
    running = asyncio.create_task(server.run())
    await ready.wait()
    main, admin = (f"http://127.0.0.1:{s[0].getsockname()[1]}" for s in (sockets, admin_sockets))
    async with httpx.AsyncClient() as client:
        found = {
            path: tuple([(await client.get(base + path)).status_code for base in (main, admin)])
            for path in ("/metrics", "/version", *HEALTH, "/v1/models", "/nothing")
        }
        fault = f"{admin}/debug/inject_fault"
        faults = [
            (await client.post(fault, json={"kind": "noop"}, headers=headers)).status_code
            for headers in ({}, {"authorization": "Bearer k"})
        ]
    server.request_shutdown()
    await running
    assert found == {
        "/metrics": (404, 200),
        "/version": (404, 200),
        **dict.fromkeys(HEALTH, (200, 200)),
        "/v1/models": (401, 401),
        "/nothing": (404, 404),
    }
    assert faults == [401, 200], "whoever reaches the port may look, and no more"


@pytest.mark.parametrize(
    ("config", "closed", "open_"),
    [
        ({"has_metrics": False}, {"/metrics"}, {"/docs", "/openapi.json", "/", "/version"}),
        ({"has_docs": False}, {"/docs", "/openapi.json"}, {"/", "/metrics"}),
        ({"has_pages": False}, {"/docs", "/"}, {"/openapi.json", "/metrics"}),
    ],
)
async def test_metrics_docs_and_pages_can_be_closed(config, closed, open_):
    async with Api(**config).running() as api:
        for path in closed:
            assert (await api.call("GET", path)).status == 404
        for path in open_:
            assert (await api.call("GET", path)).status == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("admin_port", 70_000),
        ("hang_timeout_s", 0.0),
        ("receive_timeout_s", float("nan")),
        ("keep_alive_timeout_s", -1.0),
        ("max_connections", 0),
    ],
)
def test_limits_that_cannot_be_are_refused(field, value):
    with pytest.raises(ConfigError, match=field):
        ApiConfig(served_model_names=("m",), **{field: value})


def test_keys_are_not_in_the_config_as_logs_show_it():
    assert "secret" not in repr(ApiConfig(served_model_names=("m",), api_keys=("secret",)))
