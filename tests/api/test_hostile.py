"""Bad input cannot hurt: every field, with every kind of value that broke a server once."""

import json

import pytest

from streamserve.api.chat_request import CHAT_TABLE
from streamserve.api.completion_request import COMPLETION_TABLE
from streamserve.api.token_requests import DETOKENIZE_TABLE, TOKENIZE_TABLE
from tests.api.harness import Api, chat_body

PATHS = {
    "/v1/chat/completions": (CHAT_TABLE, chat_body(max_tokens=1)),
    "/v1/completions": (COMPLETION_TABLE, {"prompt": "Hi", "max_tokens": 1}),
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
    "metadata",
    "model",
    "prompt",
    "stop",
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
                assert answer.error["code"] == "invalid_json"


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
                    is_fine = name in ALLOWED and answer.status in (200, 404)
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
