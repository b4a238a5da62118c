"""API keys by name, from flags and from a file that changes; what one tenant has is its own."""

import hashlib
import os
import re
import signal

import pytest

from streamserve.api import generation, tokens
from streamserve.api.prompt_workers import PromptWorker
from streamserve.api.server import hangup_calls
from streamserve.api.tenants import CHECK_INTERVAL_S, KeyRing, Tenant, read_key_file
from streamserve.cli.args import parse_args, scheduling_policy
from streamserve.config import ApiConfig
from streamserve.engine.byte_tokenizer import ByteTokenizer
from streamserve.engine.chat_template import ChatTemplate
from streamserve.engine.parsers.answer_format import AnswerFormat
from streamserve.engine.preprocess import PromptEncoder
from streamserve.engine.system_prefix import system_prefix
from streamserve.engine.text_source import byte_text
from streamserve.engine.worker_pool import WorkerPool
from streamserve.errors import ConfigError
from tests.api.harness import HI, Api, Exchange, chat_body, message_body, until

CHAT = "/v1/chat/completions"
FILE = """
[alice]
keys = ["sk-alice", "sk-alice-old"]
weight = 3
requests_per_minute = 60
tokens_per_minute = 1000
priority = -2

["bob.b"]
# echo -n sk-bob | sha256sum
keys = ["sha256:7bbd74dcf70a3d9a01b7a08e2b3a4fa1d0bd5b9a7a5a3ef4f8aabf4b5a2ff0c8"]
"""


@pytest.fixture
def key_file(tmp_path):
    file = tmp_path / "keys.toml"
    digest = hashlib.sha256(b"sk-bob").hexdigest()
    file.write_text(re.sub("sha256:[0-9a-f]{64}", f"sha256:{digest}", FILE))
    return file


def bearer(key):
    return {"authorization": f"Bearer {key}"}


def test_a_file_names_tenants_with_their_keys_and_limits(key_file):
    ring = KeyRing(("sk-flag",), str(key_file))
    alice = ring.find(b"sk-alice")
    assert alice is ring.find(b"sk-alice-old")
    assert (alice.name, alice.weight, alice.priority) == ("alice", 3, -2)
    assert (alice.requests_per_minute, alice.tokens_per_minute) == (60, 1000)
    bob = ring.find(b"sk-bob")
    assert (bob.name, bob.weight, bob.requests_per_minute) == ("bob.b", 1.0, None)
    assert ring.find(b"sk-flag").name == "key-1"
    assert ring.find(b"sk-alic") is ring.find(b"") is None
    salts = {ring.find(key).salt for key in (b"sk-alice", b"sk-bob", b"sk-flag")}
    assert len(salts) == 3
    other = KeyRing((), str(key_file))
    assert not salts & {other.find(b"sk-alice").salt}, "not of this process"
    # What is compared nobody outside can compute, so its time says nothing of a key.
    assert ring._tenants.keys().isdisjoint(other._tenants)
    assert hashlib.sha256(b"sk-alice").digest() not in ring._tenants


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "at least one tenant"),
        ("secret = 1", "tables with names"),
        ('[a]\nkeys = "secret"', "array"),
        ("[a]\nkeys = []", "array"),
        ('[a]\nkeys = [""]', "none empty"),
        ('["a b"]\nkeys = ["secret"]', "letters"),
        ('[a]\nkeys = ["secret"]\nwieght = 2', "wieght"),
        ('[a]\nkeys = ["secret"]\nweight = 0', "between 0.001 and 1000, got 0"),
        ('[a]\nkeys = ["secret"]\nweight = nan', "got nan"),
        ('[a]\nkeys = ["secret"]\ntokens_per_minute = true', "at least 1, got True"),
        ('[a]\nkeys = ["secret"]\npriority = "secret"', "got str"),
        ('[a]\nkeys = ["secret"]\n[b]\nkeys = ["secret"]', "a and b have a key in common"),
        ('[key-1]\nkeys = ["other"]', "key-1"),
        ('[a]\nkeys = ["secret"', "not valid TOML (at"),
    ],
)
def test_a_wrong_file_is_refused_without_showing_a_key(tmp_path, content, words):
    file = tmp_path / "keys.toml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=re.escape(words)) as refused:
        KeyRing(("flag",), str(file))
    assert "secret" not in str(refused.value).replace(str(file), "")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_key_file(tmp_path / "none")


async def test_a_changed_file_is_read_again_and_a_broken_one_changes_nothing(key_file, caplog):
    now = 0.0
    ring = KeyRing((), str(key_file), clock=lambda: now)
    good = key_file.read_text()
    key_file.write_text(good.replace("sk-alice-old", "sk-alice-new"))
    await ring.refresh()
    assert ring.find(b"sk-alice-old"), "it looks once in a while"
    salt = ring.find(b"sk-alice").salt
    now += CHECK_INTERVAL_S
    await ring.refresh()
    assert ring.find(b"sk-alice-old") is None
    alice = ring.find(b"sk-alice-new")
    assert alice.salt == salt, "what she cached stays hers"
    now += CHECK_INTERVAL_S
    await ring.refresh()
    assert ring.find(b"sk-alice-new") is alice, "an unchanged file is not read"
    key_file.write_text(good)
    await ring.refresh()
    assert ring.find(b"sk-alice-new") is alice, "nor is it looked at before its time"
    for broken in (good + "[", "", 'x = "sk-alice"'):
        key_file.write_text(broken)
        now += CHECK_INTERVAL_S
        await ring.refresh()
        assert ring.find(b"sk-alice-new")
    os.unlink(key_file)
    await ring.reload()
    assert ring.find(b"sk-alice-new")
    assert len(caplog.records) == 4
    assert "sk-" not in caplog.text


async def test_promise_keys_open_their_tenants_door_only_and_are_never_shown(key_file, caplog):
    caplog.set_level("DEBUG")
    async with Api(api_key_file=str(key_file), log_requests=True).running() as api:
        seen = []
        for key in ("sk-alice", "sk-alice-old", "sk-bob"):
            exchange = Exchange(api.app, "POST", CHAT, chat_body(max_tokens=1), headers=bearer(key))
            await exchange.finished()
            seen += [str(exchange.messages)]
            assert exchange.messages[0]["status"] == 200
        refused = await api.call("POST", CHAT, chat_body(), headers=bearer("sk-mallory"))
        metrics = (await api.call("GET", "/metrics")).body.decode()
    assert refused.status == 401
    assert "sk-" not in "".join([caplog.text, metrics, refused.body.decode(), *seen])


async def test_sighup_reads_the_file_again(key_file):
    config = ApiConfig(served_model_names=("m",), api_key_file=str(key_file))
    ring = KeyRing((), str(key_file))
    key_file.write_text('[carol]\nkeys = ["sk-carol"]')
    with hangup_calls(ring.reload, config):
        signal.raise_signal(signal.SIGHUP)
        await until(lambda: ring.find(b"sk-carol") is not None)
    assert ring.find(b"sk-alice") is None


PROMPT = "The same question, long enough for a block or two of the cache."


async def cached_tokens(api, key=None, **fields):
    body = chat_body(max_tokens=2, **fields)
    body["messages"][0]["content"] = PROMPT
    answer = await api.call("POST", CHAT, body, headers=bearer(key) if key else {})
    assert answer.status == 200
    return answer.json["usage"]["prompt_tokens_details"]["cached_tokens"]


async def test_promise_private_what_a_tenant_cached_is_found_with_its_keys_only(key_file):
    async with Api(api_key_file=str(key_file)).running() as api:
        assert await cached_tokens(api, "sk-alice") == 0
        warm = await cached_tokens(api, "sk-alice-old")
        assert warm > 32
        assert await cached_tokens(api, "sk-bob") == 0
        assert await cached_tokens(api, "sk-bob") == warm
        assert await cached_tokens(api, "sk-alice", cache_salt="mine") == 0
        assert await cached_tokens(api, "sk-bob", cache_salt="mine") == 0
        # A tenant's salt is no secret that a client could give as its own.
        salt = api.app.context.keys.find(b"sk-alice").salt
        assert await cached_tokens(api, "sk-bob", cache_salt=salt) == 0
    async with Api().running() as api:
        assert await cached_tokens(api, user="a") == 0
        assert await cached_tokens(api, user="b") == warm, "without keys there is one tenant"


async def test_promise_private_tenants_share_a_declared_system_prompt_and_no_more(key_file):
    tokenizer = ByteTokenizer()
    template = ChatTemplate.builtin("plain", special_tokens=tokenizer.special_tokens)
    system = "You are kind, and you say so at length."
    prefix = system_prefix(PromptEncoder(tokenizer, template), system)
    num_public = len(prefix) // 16 * 16
    assert 0 < num_public < len(prefix)

    async def cached(api, key, **fields):
        body = chat_body(max_tokens=1, **fields)
        body["messages"].insert(0, {"role": "system", "content": system})
        answer = await api.call("POST", CHAT, body, headers=bearer(key))
        return answer.json["usage"]["prompt_tokens_details"]["cached_tokens"]

    async with Api(api_key_file=str(key_file), public_prefixes=[prefix]).running() as api:
        assert await cached(api, "sk-alice") == 0
        assert await cached(api, "sk-alice") > len(prefix)
        assert await cached(api, "sk-bob") == num_public
        assert await cached(api, "sk-bob", cache_salt="mine") == 0


EVERY_WAY_IN = {
    CHAT: chat_body(max_tokens=1),
    "/v1/completions": {"prompt": "Hi", "max_tokens": 1},
    "/v1/messages": message_body(max_tokens=1),
    "/v1/messages/count_tokens": {"messages": [HI]},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 1},
    "/v1/responses/input_tokens": {"input": "Hi"},
    "/v1/embeddings": {"input": "Hi"},
    "/tokenize": {"prompt": "Hi"},
}


@pytest.mark.parametrize("is_elsewhere", [False, True])
async def test_promise_private_no_tenant_tokenises_faster_for_what_another_sent(
    key_file, monkeypatch, is_elsewhere
):
    """Long texts are remembered by salt (tests/engine/test_token_memo.py), and each has its own."""
    salts = []
    own = ""

    def encode(tokenizer, text, *, add_special_tokens, salt=None):
        salts.append(salt)
        return list(text.encode())

    async def call(_pool, payload, *, timeout_s, owner):
        assert owner == own
        return PromptWorker(byte_text, {}, AnswerFormat(), 512)(payload)

    monkeypatch.setattr(WorkerPool, "call", call)
    if is_elsewhere:
        monkeypatch.setattr(generation, "LONG_BODY", 0)
        monkeypatch.setattr(tokens, "LONG_BODY", 0)
    api = Api(api_key_file=str(key_file), load_text=byte_text if is_elsewhere else None)
    async with api.running():
        monkeypatch.setattr(ByteTokenizer, "encode", encode)
        for path, body in EVERY_WAY_IN.items():
            for key in ("sk-alice", "sk-bob"):
                salts.clear()
                own = api.app.context.keys.find(key.encode()).salt
                answer = await api.call("POST", path, body, headers=bearer(key))
                assert answer.status == 200
                assert own in salts, path
                assert {*salts} <= {own, None}, path
        given = {**chat_body(max_tokens=1), "chat_template_kwargs": {"salt": "mine"}}
        salts.clear()
        assert (await api.call("POST", CHAT, given, headers=bearer("sk-bob"))).status == 200
        assert {*salts} <= {own, None}


async def test_promise_private_no_tenant_compiles_faster_for_what_another_sent(key_file):
    async with Api(api_key_file=str(key_file)).running() as api:
        grammars = api.engine._grammars
        for path, body in (
            (CHAT, chat_body(max_tokens=1, guided_regex="[ab]+")),
            ("/v1/completions", {"prompt": "Hi", "guided_regex": "[ab]+", "max_tokens": 1}),
            ("/v1/responses", {"input": "Hi", "guided_regex": "[ab]+", "max_output_tokens": 1}),
        ):
            for key in ("sk-alice", "sk-bob", "sk-alice-old"):
                answer = await api.call("POST", path, body, headers=bearer(key))
                assert answer.status == 200
        assert grammars.num_cached == 2


@pytest.mark.parametrize(
    ("key", "asked", "status"),
    [("sk-alice", -2, 200), ("sk-alice", -3, 400), ("sk-bob", -99, 200), ("sk-alice", None, 200)],
)
async def test_a_key_bounds_the_priority(key_file, key, asked, status):
    async with Api(api_key_file=str(key_file), honours_priority=True).running() as api:
        body = chat_body(max_tokens=1, priority=asked)
        answer = await api.call("POST", CHAT, body, headers=bearer(key))
    assert answer.status == status
    if status == 400:
        assert answer.error["param"] == "priority"
        assert "at least -2" in answer.error["message"]


async def test_the_scheduler_is_told_whose_a_request_is(key_file):
    """Its shares, weights and priorities hold for what it is told."""

    async def told(api, *keys):
        body = chat_body(user="u")
        exchanges = [Exchange(api.app, "POST", CHAT, body, headers=bearer(key)) for key in keys]
        await until(lambda: len(api.engine._live) == len(keys))
        requests = [live.request for live in api.engine._live.values()]
        for exchange in exchanges:
            exchange.leave()
            await exchange.finished()
        return {(r.tenant, r.weight, r.priority) for r in requests}

    key_file.write_text(key_file.read_text() + "priority = 5")
    file = str(key_file)
    async with Api(api_key_file=file, honours_priority=True, is_held=True).running() as api:
        assert await told(api, "sk-alice", "sk-bob") == {("alice", 3, 0), ("bob.b", 1, 5)}
    async with Api(api_key_file=file, is_held=True).running() as api:
        assert await told(api, "sk-bob") == {("bob.b", 1, 0)}, "no policy that looks at it"
    async with Api(is_held=True).running() as api:
        assert await told(api, "any") == {("u", 1, 0)}


def test_a_request_that_asks_for_nothing_is_as_urgent_as_it_may_be():
    assert Tenant(name="batch", priority=5).priority_of(None) == 5
    assert Tenant(name="prompt", priority=-5).priority_of(None) == 0


@pytest.mark.parametrize(
    ("flags", "policy"),
    [
        ([], "sjf"),
        (["--api-key", "a"], "sjf"),
        (["--api-key", "a", "b"], "fair"),
        (["--api-key-file", "keys.toml"], "fair"),
        (["--api-key", "a", "b", "--scheduling-policy", "fcfs"], "fcfs"),
    ],
)
def test_shares_are_kept_where_there_are_several_keys(flags, policy):
    assert scheduling_policy(parse_args(["serve", *flags])) == policy
    assert scheduling_policy(parse_args(["chat", "--api-key", "long"])) == "sjf"


@pytest.mark.parametrize("user", [5, "x" * 1025])
async def test_a_wrong_user_is_refused(user):
    async with Api().running() as api:
        answer = await api.call("POST", CHAT, chat_body(user=user))
    assert answer.status == 400
    assert answer.error["param"] == "user"
