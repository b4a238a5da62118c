"""Bad input cannot hurt: every field, with every kind of value that broke a server once."""

import asyncio
import json

import pytest

from streamserve.api.chat_request import CHAT_TABLE
from streamserve.api.completion_request import COMPLETION_TABLE
from streamserve.api.embedding_request import EMBEDDING_TABLE
from streamserve.api.message_request import COUNT_TABLE, MESSAGES_TABLE
from streamserve.api.prompt_workers import PromptWorker, payload_of
from streamserve.api.responses.references import find_references
from streamserve.api.responses.request import RESPONSES_TABLE
from streamserve.api.token_requests import DETOKENIZE_TABLE, TOKENIZE_TABLE
from streamserve.engine.parsers.answer_format import AnswerFormat
from streamserve.engine.text_source import byte_text
from streamserve.errors import ContextLengthError, InvalidParameterError
from tests.api.harness import HI, Api, chat_body, message_body

PATHS = {
    "/v1/chat/completions": (CHAT_TABLE, chat_body(max_tokens=1)),
    "/v1/completions": (COMPLETION_TABLE, {"prompt": "Hi", "max_tokens": 1}),
    "/v1/responses": (RESPONSES_TABLE, {"input": "Hi", "max_output_tokens": 1}),
    "/v1/messages": (MESSAGES_TABLE, message_body(max_tokens=1)),
    "/v1/messages/count_tokens": (COUNT_TABLE, {"messages": [HI]}),
    "/v1/embeddings": (EMBEDDING_TABLE, {"input": "Hi"}),
    "/tokenize": (TOKENIZE_TABLE, {"prompt": "Hi"}),
    "/detokenize": (DETOKENIZE_TABLE, {"tokens": [72]}),
}
NOT_JSON = {
    "half a surrogate": r'"\ud800"',
    "the other half": r'["\udc00x"]',
    "half a key": r'{"\ud800": 1}',
    "NaN": "NaN",
    "NaN inside": '{"1": NaN}',
    "beyond double": "1e999",
    "beneath double": "[-1e999]",
    "four hundred digits": "1" + "0" * 400,
    "too deep": "[" * 2000 + "]" * 2000,
}
WRONG_ANYWHERE = {
    "beyond 64 bits": "99999999999999999999",
    "beneath 64 bits": "-99999999999999999999",
    "deep array": "[" * 900 + "]" * 900,
    "deep object": '{"a":' * 900 + "1" + "}" * 900,
    "a far token": "[99999999]",
    "a far token's bias": '{"99999999": 1}',
    "zero byte": r'"\u0000"',
}
ALLOWED = {
    "cache_salt",
    "chat_template_kwargs",  # the template's business
    "guided_json",  # a schema may hold what it likes
    "guided_regex",
    "input",
    "instructions",
    "metadata",
    "model",
    "prompt",
    "stop",
    "system",
    "user",
}


def with_field(body, name, raw):
    """The body as JSON, with a field as it was written."""
    text = json.dumps({key: value for key, value in body.items() if key != name})
    return f'{text[:-1]}{", " if len(text) > 2 else ""}"{name}": {raw}}}'.encode()


@pytest.mark.parametrize("path", PATHS)
async def test_what_is_no_json_is_a_400_in_every_field(path):
    table, body = PATHS[path]
    async with Api().running() as api:
        for name in [*table.honoured, *table.refused, *table.annotations, "nobody_knows"]:
            for raw in NOT_JSON.values():
                answer = await api.call("POST", path, with_field(body, name, raw))
                assert answer.status == 400, (name, raw)
                assert "not valid JSON" in answer.error["message"]


@pytest.mark.parametrize("path", PATHS)
async def test_strange_values_are_honoured_or_refused_by_name(path):
    table, body = PATHS[path]
    wrong = []
    async with Api().running() as api:
        for name in [*table.honoured, *table.refused]:
            for kind, raw in WRONG_ANYWHERE.items():
                answer = await api.call("POST", path, with_field(body, name, raw))
                if answer.status == 400:
                    is_fine = name in answer.error["message"] or "template" in name
                else:
                    is_ignored = f"{name}." in answer.headers.get("x-ignored-fields", "")
                    is_fine = (name in ALLOWED or is_ignored) and answer.status in (200, 404)
                if not is_fine:
                    wrong.append((name, kind, answer.status, answer.body[:200]))
        assert api.engine.is_idle
    assert not wrong


@pytest.mark.parametrize(
    "raw",
    [
        b'{"messages":[{"role":"user","content":"\xff\xfe"}]}',
        b'{"messages":[{"role":"user","content":"\xc0\x80"}]}',
        b'{"messages":[{"role":"user","content":"\xed\xa0\x80"}]}',
        b"\xef\xbb\xbf{}",
        '{"messages": []}'.encode("utf-16"),
    ],
)
async def test_what_is_no_utf8_is_a_400(raw):
    async with Api().running() as api:
        answer = await api.call("POST", "/v1/chat/completions", raw)
    assert answer.status == 400
    assert answer.error["code"] == "invalid_json"


DEEP_TOOL = (
    '{"messages":[{"role":"user","content":"x"}],"tool_choice":"required","tools":[{"type":'
    '"function","function":{"name":"f","parameters":' + '{"a":' * 900 + "1" + "}" * 900 + "}}]}"
).encode()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (chat_body(stop="x" * 1025), "stop must be made of strings of at most 1024 characters"),
        (chat_body(stop=["x"] * 17), "stop must be an array of at most 16 strings, got an array"),
        (chat_body(n=129), "n must be between 1 and 128, got 129"),
        (chat_body(logprobs=True, top_logprobs=21), "top_logprobs must be between 0 and 20"),
        (chat_body(logit_bias=dict.fromkeys(range(4097), 1)), "logit_bias must be an object of at"),
        (chat_body(logit_bias={258: 1}), "logit_bias must hold token ids from 0 to 257, got 258"),
        (chat_body(allowed_token_ids=[258]), "allowed_token_ids must hold token ids from 0 to 257"),
        (chat_body(stop_token_ids=[258]), "stop_token_ids must hold token ids from 0 to 257"),
        (chat_body(guided_regex="a" * 2**19), "guided_regex must be at most 262144 characters"),
        (chat_body(messages=chat_body()["messages"] * 4097), "an array of 1 to 4096 messages"),
        (DEEP_TOOL, "tools cannot be written as JSON"),
    ],
)
async def test_limits_are_named(body, message):
    async with Api().running() as api:
        answer = await api.call("POST", "/v1/chat/completions", body)
    assert answer.status == 400
    assert message in answer.error["message"]


def call_of(number):
    function = {"name": "f", "arguments": "{}"}
    return {"id": f"call_{number}", "type": "function", "function": function}


TURN = {"role": "user", "content": "x"}
PART = {"type": "input_text", "text": "x"}
TOOL = {"type": "function", "function": {"name": "f"}}
ANY_TEXT = {"type": "any_text"}


def tag_of(content):
    tag = {"type": "structural_tag", "format": content}
    return {"prompt": "a", "structured_outputs": {"structural_tag": tag}}


def nested(num_levels):
    content = ANY_TEXT
    for _ in range(num_levels - 1):
        content = {"type": "sequence", "elements": [content]}
    return content


TOO_MANY = {
    "messages": ("/v1/messages", message_body(messages=[TURN] * 4097), 4096),
    "tools": ("/v1/chat/completions", chat_body(tools=[TOOL] * 513), 512),
    "tool calls": (
        "/v1/chat/completions",
        chat_body(messages=[{"role": "assistant", "tool_calls": [*map(call_of, range(1025))]}]),
        1024,
    ),
    "prompts": ("/v1/completions", {"prompt": ["a"] * 257}, 256),
    "answers": ("/v1/completions", {"prompt": ["a"] * 3, "n": 128}, 256),
    "inputs": ("/v1/embeddings", {"input": ["a"] * 2049}, 2048),
    "items": ("/v1/responses", {"input": [TURN] * 4097}, 4096),
    "parts": ("/v1/responses", {"input": [{"role": "user", "content": [PART] * 1025}]}, 1024),
    "stop ids": ("/v1/completions", {"prompt": "a", "stop_token_ids": [72] * 1025}, 1024),
    "salt": ("/v1/completions", {"prompt": "a", "cache_salt": "x" * 1025}, 1024),
    "user": ("/v1/completions", {"prompt": "a", "user": "x" * 1025}, 1024),
    "levels": ("/v1/completions", tag_of(nested(18)), 16),
    "elements": (
        "/v1/completions",
        tag_of({"type": "or", "elements": [{"type": "const_string", "value": "a"}] * 257}),
        256,
    ),
    "allowed ids": (
        "/v1/completions",
        {"prompt": "a", "allowed_token_ids": [72] * (2**20 + 1)},
        2**20,
    ),
}


@pytest.mark.parametrize("what", TOO_MANY)
async def test_one_more_than_a_limit_is_a_400_that_says_it(what):
    path, body, limit = TOO_MANY[what]
    async with Api().running() as api:
        answer = await api.call("POST", path, body)
        assert api.engine.is_idle
    assert answer.status == 400
    assert str(limit) in answer.error["message"]


async def test_names_that_nobody_knows_are_told_of_only_so_far():
    """A million of them would hold up the streams."""
    unknown = {f"unknown-{i}-{'x' * 100}": 1 for i in range(5000)}
    worker = PromptWorker(byte_text, {}, AnswerFormat(), 512)
    bodies = {"chat": chat_body(), "completion": {"prompt": "Hi"}, "embedding": {"input": "Hi"}}
    for endpoint, body in bodies.items():
        assert len(worker(payload_of(endpoint, json.dumps({**body, **unknown}).encode()))) < 200_000
    async with Api().running() as api:
        for path, (_, body) in PATHS.items():
            answer = await api.call("POST", path, {**body, **unknown})
            assert answer.status == 200
            assert answer.headers["x-ignored-fields"].endswith(", and 992 more")


@pytest.mark.parametrize(
    ("endpoint", "body", "param"),
    [
        ("chat", chat_body(messages=[{"role": "user", "content": "x" * 512}]), "messages"),
        ("messages", message_body(messages=[{"role": "user", "content": "x" * 512}]), "messages"),
        ("completion", {"prompt": ["Hi", "x" * 512]}, "prompt"),
        ("completion", {"prompt": [[1] * 512]}, "prompt"),
    ],
)
def test_what_is_too_long_stays_with_the_worker(endpoint, body, param):
    worker = PromptWorker(byte_text, {}, AnswerFormat(), 512)
    with pytest.raises(ContextLengthError, match="maximum context length is 512") as refused:
        worker(payload_of(endpoint, json.dumps(body).encode()))
    assert refused.value.param == param
    if endpoint != "messages":
        raw = json.dumps({**body, "truncate_prompt_tokens": 9}).encode()
        assert worker(payload_of(endpoint, raw))


KEY = "0123456789abcdef" * 2


async def found_in(raw):
    """The items that a body refers to, and how often others had a turn meanwhile."""
    turns = 0

    async def count():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    item = {"id": f"msg_{KEY}_7"}
    packed = await find_references(raw, lambda _: None, lambda _: False, lambda _: [item])
    counting.cancel()
    return item["id"].encode() in packed, turns


async def test_a_long_body_is_searched_without_holding_up_the_streams():
    reference = f'"id" : "msg_{KEY}_7"'.encode()
    for before in range(2**16 - len(reference) - 40, 2**16 + 40):
        raw = b"item_reference" + b" " * before + reference
        assert (await found_in(raw))[0], before
    assert await found_in(b"item_reference" + b'{"id" :1}' * 2**20) == (False, 144)


async def test_a_body_refers_to_no_more_than_it_can_use():
    """One that named each stored response was answered with all of them put together."""
    ids = ",".join(f'{{"previous_response_id":"resp_{i:032x}"}}' for i in range(5))
    with pytest.raises(InvalidParameterError, match=r"at most 4 ids .* previous_response_id"):
        await found_in(ids.encode())
    ids = ",".join(f'{{"id":"msg_{KEY}_{i}"}}' for i in range(4097))
    with pytest.raises(InvalidParameterError, match=r"at most 4096 ids .* item_reference"):
        await found_in(b'["item_reference",' + ids.encode() + b"]")
