"""What stands before and beside the endpoints: ids, keys, CORS, the small routes."""

import asyncio
import json
import re

import pytest

from streamserve import __version__
from tests.api.harness import CREATED, MAX_MODEL_LEN, MODEL, Answer, Api, Exchange, chat_body

CHAT = "/v1/chat/completions"
ORIGIN = {"origin": "https://chat.example"}


@pytest.mark.parametrize("request_id", ["abc", "A-1_b.c:d", "x" * 128])
async def test_a_sane_request_id_is_echoed(request_id):
    async with Api().running() as api:
        for method, path, body in (
            ("POST", CHAT, chat_body(max_tokens=1)),
            ("POST", CHAT, chat_body(max_tokens=1, stream=True)),
            ("POST", CHAT, b"{"),
            ("GET", "/nowhere", None),
            ("GET", "/health", None),
        ):
            answer = await api.call(method, path, body, headers={"x-request-id": request_id})
            assert answer.headers["x-request-id"] == request_id


@pytest.mark.parametrize("request_id", ["", "a b", "x" * 129, "a\tb", "é", "<script>", "a\n"])
async def test_another_request_id_is_replaced(request_id):
    async with Api().running() as api:
        first = await api.call("GET", "/health", headers={"x-request-id": request_id})
        second = await api.call("GET", "/health", headers={"x-request-id": request_id})
    assert re.fullmatch(r"req-[0-9a-f]{24}", first.headers["x-request-id"])
    assert first.headers["x-request-id"] != second.headers["x-request-id"]


async def test_two_requests_with_one_client_id_do_not_collide():
    async with Api(is_held=True).running() as api:
        headers = {"x-request-id": "same"}
        calls = [
            asyncio.create_task(api.call("POST", CHAT, chat_body(max_tokens=1), headers=headers))
            for _ in range(2)
        ]
        await api.pace.step()
        api.pace.let_go()
        answers = await asyncio.gather(*calls)
    assert [a.status for a in answers] == [200, 200]
    assert answers[0].json["id"] != answers[1].json["id"]


KEYS = {"api_keys": ("secret-1", "geheim-ü")}


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "secret-1",
        "Basic secret-1",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        "Bearer secret-",
        "Bearer secret-11",
        "Bearer é",
    ],
)
async def test_without_the_key_nothing_under_v1_is_served(authorization):
    headers = {} if authorization is None else {"authorization": authorization}
    async with Api(**KEYS).running() as api:
        for method, path in (
            ("POST", CHAT),
            ("POST", "/v1/completions"),
            ("GET", "/v1/models"),
            ("GET", f"/v1/models/{MODEL}"),
            ("GET", "/v1/nowhere"),
        ):
            answer = await api.call(method, path, chat_body(), headers=headers)
            assert answer.status == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.error["code"] == "invalid_api_key"
            assert "secret" not in answer.error["message"]


@pytest.mark.parametrize("key", ["secret-1", "geheim-ü"])
async def test_with_a_key_everything_is_served(key):
    raw = f"Bearer {key}".encode().decode("latin-1")
    async with Api(**KEYS).running() as api:
        for authorization in (raw, raw.replace("Bearer", "bearer")):
            headers = {"authorization": authorization}
            answer = await api.call("POST", CHAT, chat_body(max_tokens=1), headers=headers)
            assert answer.status == 200


@pytest.mark.parametrize("path", ["/health", "/version", "/metrics"])
async def test_the_operators_routes_need_no_key(path):
    async with Api(**KEYS).running() as api:
        assert (await api.call("GET", path)).status == 200


async def test_any_origin_may_read_by_default():
    async with Api().running() as api:
        answer = await api.call("POST", CHAT, chat_body(max_tokens=1, stream=True), headers=ORIGIN)
        exposed = answer.headers["access-control-expose-headers"]
        assert answer.headers["access-control-allow-origin"] == "*"
        assert {"X-Request-Id", "X-Ignored-Fields", "Retry-After"} <= set(exposed.split(", "))


async def test_a_preflight_is_answered_without_a_key():
    headers = {
        **ORIGIN,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    async with Api(**KEYS).running() as api:
        answer = await api.call("OPTIONS", CHAT, headers=headers)
        assert answer.status == 200
        assert answer.headers["access-control-allow-headers"] == "authorization,content-type"
        refused = await api.call("POST", CHAT, chat_body(), headers=ORIGIN)
        assert refused.status == 401
        assert refused.headers["access-control-allow-origin"] == "*"


async def test_a_browser_may_use_every_route_with_every_header_that_means_something():
    asked = "x-api-key,anthropic-version,last-event-id,idempotency-key,x-stream-resume,x-request-id"
    async with Api(**KEYS).running() as api:
        for route in api.app.routes:
            for method in sorted(route.methods or ()):
                headers = {
                    **ORIGIN,
                    "access-control-request-method": method,
                    "access-control-request-headers": asked,
                }
                answer = await api.call("OPTIONS", route.path, headers=headers)
                # HEAD comes with GET by itself, and a browser sends it without asking.
                assert method == "HEAD" or answer.status == 200, (method, route.path)
                assert answer.headers["access-control-allow-headers"] == asked


async def test_a_browser_may_read_every_header_that_the_api_sends():
    resumable = {**ORIGIN, "x-stream-resume": "1"}
    message = {"max_tokens": 1, "messages": [{"role": "user", "content": "hi"}]}
    async with Api().running() as api:
        answers = [
            await api.call("POST", CHAT, chat_body(unknown=1, stream=True), headers=resumable),
            await api.call("POST", "/v1/messages", json.dumps(message).encode(), headers=ORIGIN),
        ]
        api.app.context.gate.close()
        answers.append(await api.call("POST", CHAT, chat_body(), headers=ORIGIN))
    ordinary = {"cache-control", "content-type", "content-length", "vary", "connection"}
    sent = {name for answer in answers for name in answer.headers} - ordinary
    exposed = answers[0].headers["access-control-expose-headers"].lower().split(", ")
    assert {"x-stream-id", "x-ignored-fields", "request-id", "retry-after-ms"} <= sent
    assert {n for n in sent if not n.startswith(("access-control-", "x-accel-"))} <= set(exposed)


async def test_only_the_named_origins_may_read():
    async with Api(allowed_origins=("https://chat.example",)).running() as api:
        ours = await api.call("GET", "/v1/models", headers=ORIGIN)
        other = await api.call("GET", "/v1/models", headers={"origin": "https://evil.example"})
    assert ours.headers["access-control-allow-origin"] == "https://chat.example"
    assert "access-control-allow-origin" not in other.headers


async def test_the_models_are_listed():
    async with Api().running() as api:
        models = await api.call("GET", "/v1/models")
        one = await api.call("GET", f"/v1/models/{MODEL}")
        unknown = await api.call("GET", "/v1/models/gpt-9")
    card = {
        "id": MODEL,
        "object": "model",
        "created": CREATED,
        "owned_by": "streamserve",
        "root": MODEL,
        "parent": None,
        "max_model_len": MAX_MODEL_LEN,
    }
    cards = models.json["data"]
    assert models.json == {"object": "list", "data": cards}
    assert one.json == cards[0]
    for entry, name in zip(cards, (MODEL, "alias"), strict=True):
        [permission] = entry.pop("permission")
        assert entry == {**card, "id": name}
        assert permission["object"] == "model_permission"
        assert permission["allow_sampling"] is True
    assert unknown.status == 404
    assert unknown.error["code"] == "model_not_found"


async def test_version_and_health():
    async with Api().running() as api:
        version = await api.call("GET", "/version")
        healthy = await api.call("GET", "/health")
        api.app.context.gate.close()
        draining = await api.call("GET", "/health")
    assert version.json == {"version": __version__}
    assert (healthy.status, healthy.json) == (200, {"status": "ok"})
    assert (draining.status, draining.json) == (503, {"status": "draining"})


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v1", 404),
        ("POST", "/v1/chat/completions/", 404),
        ("POST", "/v1/audio/speech", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/completions", 405),
        ("POST", "/v1/models", 405),
        ("PUT", "/health", 405),
    ],
)
async def test_unknown_routes_and_methods_have_openais_shape(method, path, status):
    async with Api().running() as api:
        answer = await api.call(method, path)
    assert answer.status == status
    assert answer.error["type"] == "invalid_request_error"
    assert path in answer.error["message"]
    if status == 405:
        assert answer.headers["allow"]


async def test_a_client_of_another_server_is_told_where_the_same_is_here():
    async with Api().running() as api:
        ollama = await api.call("POST", "/api/chat", chat_body())
        base = await api.call("GET", "/v1")
    assert (ollama.status, base.status) == (404, 404)
    assert ollama.error["message"] == f"Unknown URL: POST /api/chat (did you mean {CHAT}?)"
    assert base.error["message"] == "Unknown URL: GET /v1 (did you mean /v1/models?)"


@pytest.mark.parametrize(
    "path", ["/chat/completions", "/v1/v1/chat/completions", "/v1/chat/completions/"]
)
async def test_who_has_the_base_url_wrong_is_told_what_was_meant(path):
    async with Api().running() as api:
        answer = await api.call("POST", path, chat_body())
        unknown = await api.call("POST", "/v1/nothing", chat_body())
    assert answer.status == 404
    assert answer.error["message"] == f"Unknown URL: POST {path} (did you mean {CHAT}?)"
    assert "did you mean" not in unknown.error["message"]


@pytest.mark.parametrize("host", ["[::1", "a b", "", "x:99999999"])
async def test_a_strange_host_header_breaks_nothing(host):
    async with Api().running() as api:
        assert (await api.call("GET", "/nowhere", headers={"host": host})).status == 404


async def test_a_bug_is_a_500_that_says_nothing_of_itself():
    async with Api().running() as api:

        def explode(*_args, **_kwargs):
            raise ZeroDivisionError("a secret path")

        api.engine.submit = explode
        with pytest.raises(ZeroDivisionError):  # the server above logs it
            await api.chat()
        exchange = Exchange(api.app, "POST", CHAT, chat_body())
        with pytest.raises(ZeroDivisionError):
            await exchange.finished()
    answer = Answer(exchange.messages)
    assert answer.status == 500
    assert answer.headers["x-request-id"].startswith("req-")
    assert answer.error["type"] == "server_error"
    assert "secret" not in answer.error["message"]
