"""Every field is honoured, refused by name, or reported; no bad input passes."""

import logging

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamserve.api.chat_request import CHAT_FIELDS, CHAT_REFUSED, parse_chat_request
from streamserve.api.completion_request import (
    COMPLETION_FIELDS,
    COMPLETION_REFUSED,
    parse_completion_request,
)
from streamserve.api.sampling import ANNOTATIONS, sampling_defaults
from streamserve.errors import ConfigError, InvalidParameterError
from tests.api.harness import MODEL, Api, chat_body

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HI = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "f"}}

# (fields over a valid chat body, param of the error, a part of its message)
BAD_CHAT = [
    ({"messages": None}, "messages", "required"),
    ({"messages": "Hi"}, "messages", "array of messages, got a string"),
    ({"messages": {}}, "messages", "got an object"),
    ({"messages": []}, "messages", "1 to 4096"),
    ({"messages": [HI] * 4097}, "messages", "array of 4097"),
    ({"messages": ["Hi"]}, "messages[0]", "an object"),
    ({"messages": [{}]}, "messages[0]", "role is required"),
    ({"messages": [{"role": "user"}]}, "messages[0]", "content is required"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0]", "content is required"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "integer: 5"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "at least one"),
    ({"messages": [{"role": "user", "content": ["a"]}]}, "messages[0].content[0]", "an object"),
    ({"messages": [{"role": "user", "content": [{}]}]}, "messages[0].content[0]", "type"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content[0]",
        "text is required",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].type",
        "'image_url' is not supported",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        "messages[0].content[0].type",
        "'input_audio' is not supported",
    ),
    ({"messages": [{"role": "king", "content": "a"}]}, "messages[0].role", "one of system"),
    ({"messages": [{"role": 1, "content": "a"}]}, "messages[0].role", "a string"),
    ({"messages": [{"role": "function", "content": "a"}]}, "messages[0].role", "not supported"),
    ({"messages": [{**HI, "name": 7}]}, "messages[0].name", "a string"),
    ({"temperature": "hot"}, "temperature", "a number, got a string: 'hot'"),
    ({"temperature": True}, "temperature", "a number, got a boolean"),
    ({"temperature": -0.1}, "temperature", "between 0.0 and 2.0, got -0.1"),
    ({"temperature": 2.5}, "temperature", "got 2.5"),
    ({"temperature": [1]}, "temperature", "a number, got an array"),
    ({"top_p": 0}, "top_p", "above 0"),
    ({"top_p": 1.01}, "top_p", "at most 1"),
    ({"top_p": {}}, "top_p", "got an object"),
    ({"top_k": -2}, "top_k", "got -2"),
    ({"top_k": 1.5}, "top_k", "an integer, got a number: 1.5"),
    ({"top_k": 2**40}, "top_k", "between"),
    ({"min_p": 1.5}, "min_p", "between 0.0 and 1.0"),
    ({"presence_penalty": 3}, "presence_penalty", "between -2.0 and 2.0"),
    ({"frequency_penalty": -3}, "frequency_penalty", "between -2.0 and 2.0"),
    ({"repetition_penalty": 0}, "repetition_penalty", "between 0.01 and 100"),
    ({"max_tokens": 0}, "max_tokens", "between 1 and"),
    ({"max_tokens": -5}, "max_tokens", "got -5"),
    ({"max_tokens": "10"}, "max_tokens", "an integer, got a string"),
    ({"max_tokens": True}, "max_tokens", "got a boolean"),
    ({"max_tokens": 1.5}, "max_tokens", "got a number: 1.5"),
    ({"max_tokens": 10**30}, "max_tokens", "between 1 and"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "between 1 and"),
    ({"max_completion_tokens": 3, "max_tokens": 4}, "max_tokens", "different things"),
    ({"max_tokens": 5, "min_tokens": 6}, "min_tokens", "max_tokens (5), got 6"),
    ({"min_tokens": -1}, "min_tokens", "between 0"),
    ({"max_tokens": 4000}, "max_tokens", "maximum context length is 512"),
    ({"max_completion_tokens": 4000}, "max_completion_tokens", "maximum context length is 512"),
    (
        {"max_completion_tokens": 3, "min_tokens": 4},
        "min_tokens",
        "between 0 and max_completion_tokens (3)",
    ),
    ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages", "maximum context length"),
    ({"stop": 5}, "stop", "a string or an array of strings"),
    ({"stop": ["a"] * 17}, "stop", "at most 16"),
    ({"stop": ["a", 5]}, "stop[1]", "a string, got an integer: 5"),
    ({"stop": [""]}, "stop", "non-empty"),
    ({"stop_token_ids": 5}, "stop_token_ids", "an array of token ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "got -1"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids[0]", "an integer"),
    ({"stop_token_ids": [9999]}, "stop_token_ids", "got 9999"),
    ({"stop_token_ids": [1] * 2000}, "stop_token_ids", "at most 1024"),
    ({"logit_bias": [1]}, "logit_bias", "an object"),
    ({"logit_bias": {"a": 1}}, "logit_bias", "keyed by token ids, got 'a'"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "got '-1'"),
    ({"logit_bias": {"１": 1}}, "logit_bias", "keyed by token ids"),
    ({"logit_bias": {"9999999999": 1}}, "logit_bias key", "between 0"),
    ({"logit_bias": {"1": "a"}}, "logit_bias[1]", "a number"),
    ({"logit_bias": {"1": 200}}, "logit_bias[1]", "between -100.0 and 100.0"),
    ({"logit_bias": {"9999": 1}}, "logit_bias", "got 9999"),
    ({"seed": "x"}, "seed", "an integer"),
    ({"seed": 2**63}, "seed", "between"),
    ({"seed": -(2**63) - 1}, "seed", "between"),
    ({"seed": 1e30}, "seed", "between"),
    ({"stream": 1}, "stream", "a boolean, got an integer"),
    ({"stream": "true"}, "stream", "a boolean, got a string"),
    ({"stream_options": {}}, "stream_options", "only with stream: true"),
    ({"stream": True, "stream_options": True}, "stream_options", "an object"),
    (
        {"stream": True, "stream_options": {"include_usage": 1}},
        "stream_options.include_usage",
        "a boolean",
    ),
    (
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        "stream_options.include_obfuscation",
        "not supported",
    ),
    ({"logprobs": 5}, "logprobs", "a boolean"),
    ({"top_logprobs": 2}, "top_logprobs", "only with logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "between 0 and 20"),
    ({"logprobs": True, "top_logprobs": "2"}, "top_logprobs", "an integer"),
    ({"ignore_eos": 1}, "ignore_eos", "a boolean"),
    ({"include_stop_str_in_output": 1}, "include_stop_str_in_output", "a boolean"),
    ({"skip_special_tokens": "no"}, "skip_special_tokens", "a boolean"),
    ({"priority": "high"}, "priority", "an integer"),
    ({"cache_salt": ""}, "cache_salt", "1 to 1024"),
    ({"priority": 1}, "priority", "must be 0 unless requests are scheduled by it, got 1"),
    ({"cache_salt": 5}, "cache_salt", "a string"),
    ({"model": 5}, "model", "a string"),
    ({"add_generation_prompt": 1}, "add_generation_prompt", "a boolean"),
    (
        {"add_generation_prompt": True, "continue_final_message": True},
        "continue_final_message",
        "both be true",
    ),
    ({"chat_template_kwargs": "x"}, "chat_template_kwargs", "an object"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "'messages'"),
    # Known fields whose feature is not built.
    ({"tools": [TOOL]}, "tools", "not supported"),
    ({"functions": [{}]}, "functions", "not supported"),
    ({"function_call": {"name": "f"}}, "function_call", "not supported"),
    ({"n": 0}, "n", "between 1 and 128, got 0"),
    ({"n": True}, "n", "an integer, got a boolean"),
    ({"n": "2"}, "n", "an integer"),
    ({"n": 129}, "n", "between 1 and 128"),
    ({"best_of": 0}, "best_of", "between 1 and 128"),
    ({"best_of": 1.5}, "best_of", "an integer"),
    ({"n": 3, "best_of": 2}, "best_of", "at least n (3), got 2"),
    ({"n": 2, "best_of": 3, "stream": True}, "best_of", "only without stream"),
    ({"use_beam_search": 1}, "use_beam_search", "a boolean"),
    ({"use_beam_search": True, "stream": True}, "use_beam_search", "only without stream"),
    ({"use_beam_search": True, "n": 20}, "best_of", "at most 19 with use_beam_search"),
    ({"use_beam_search": True, "temperature": 0.5}, "temperature", "may not be given"),
    ({"use_beam_search": True, "stop": ["a"]}, "stop", "may not be given"),
    ({"use_beam_search": True, "logit_bias": {"1": 1}}, "logit_bias", "may not be given"),
    ({"use_beam_search": True, "allowed_token_ids": [1]}, "allowed_token_ids", "may not be given"),
    ({"use_beam_search": True, "bad_words": ["a"]}, "bad_words", "may not be given"),
    ({"use_beam_search": True, "presence_penalty": 1}, "presence_penalty", "may not be given"),
    (
        {"use_beam_search": True, "response_format": {"type": "json_object"}},
        "response_format",
        "may not be given",
    ),
    ({"use_beam_search": True, "length_penalty": 11}, "length_penalty", "between -10.0 and 10.0"),
    ({"use_beam_search": True, "length_penalty": "1"}, "length_penalty", "a number"),
    ({"use_beam_search": True, "early_stopping": "no"}, "early_stopping", '"never", got'),
    ({"use_beam_search": True, "early_stopping": 1}, "early_stopping", "a boolean"),
    ({"length_penalty": 2}, "length_penalty", "only with use_beam_search"),
    ({"early_stopping": True}, "early_stopping", "only with use_beam_search"),
    ({"prompt_logprobs": 21}, "prompt_logprobs", "between 0 and 20"),
    ({"prompt_logprobs": True}, "prompt_logprobs", "an integer, got a boolean"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "only without stream"),
    ({"allowed_token_ids": 5}, "allowed_token_ids", "an array of token ids"),
    ({"allowed_token_ids": []}, "allowed_token_ids", "at least one"),
    ({"allowed_token_ids": [-1]}, "allowed_token_ids[0]", "got -1"),
    ({"allowed_token_ids": ["a"]}, "allowed_token_ids[0]", "an integer"),
    ({"allowed_token_ids": [9999]}, "allowed_token_ids", "got 9999"),
    ({"bad_words": "a"}, "bad_words", "an array of strings"),
    ({"bad_words": [5]}, "bad_words[0]", "a string"),
    ({"bad_words": ["a", " "]}, "bad_words", "not blank"),
    ({"bad_words": ["a"] * 257}, "bad_words", "at most 256"),
    ({"bad_words": ["a" * 257]}, "bad_words", "at most 256 characters"),
    ({"spaces_between_special_tokens": 0}, "spaces_between_special_tokens", "a boolean"),
    ({"return_token_ids": "yes"}, "return_token_ids", "a boolean"),
    ({"return_tokens_as_token_ids": 1}, "return_tokens_as_token_ids", "a boolean"),
    ({"audio": {"voice": "alloy"}}, "audio", "not supported"),
    ({"modalities": ["audio"]}, "modalities", "only text"),
    ({"prediction": {}}, "prediction", "not supported"),
    ({"reasoning_effort": "high"}, "reasoning_effort", "not supported"),
    ({"logits_processors": ["x"]}, "logits_processors", "not supported"),
    ({"web_search_options": {}}, "web_search_options", "not supported"),
    ({"verbosity": "high"}, "verbosity", "not supported"),
    ({"documents": [{}]}, "documents", "not supported"),
    ({"chat_template": "x"}, "chat_template", "not supported"),
    ({"echo": True}, "echo", "not supported"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "at least 1, or -1"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "got -2"),
    ({"truncate_prompt_tokens": "5"}, "truncate_prompt_tokens", "an integer"),
    ({"truncate_prompt_tokens": 600}, "truncate_prompt_tokens", "at most 512, got 600"),
    ({"truncate_prompt_tokens": 5, "truncation_side": "up"}, "truncation_side", "left, right"),
    ({"truncate_prompt_tokens": 5, "truncation_side": 1}, "truncation_side", "a string"),
    ({"truncation_side": "left"}, "truncation_side", "only with truncate_prompt_tokens"),
    ({"request_id": "x"}, "request_id", "X-Request-Id"),
]

BAD_COMPLETIONS = [
    ({"prompt": None}, "prompt", "required"),
    ({"prompt": 5}, "prompt", "a string, an array"),
    ({"prompt": {}}, "prompt", "got an object"),
    ({"prompt": []}, "prompt", "non-empty"),
    ({"prompt": [[]]}, "prompt[0]", "non-empty"),
    ({"prompt": [[1], "a"]}, "prompt[1]", "an array of token ids"),
    ({"prompt": ["a", [1]]}, "prompt[1]", "a string"),
    ({"prompt": [True]}, "prompt[0]", "got a boolean"),
    ({"prompt": [1, "a"]}, "prompt[1]", "an integer"),
    ({"prompt": [1.5]}, "prompt[0]", "an integer"),
    ({"prompt": [-1]}, "prompt[0]", "got -1"),
    ({"prompt": [99999]}, "prompt", "got 99999"),
    ({"prompt": ["a"] * 257}, "prompt", "at most 256"),
    ({"prompt": "x" * 600}, "prompt", "maximum context length"),
    ({"prompt": "", "add_special_tokens": False}, "prompt", "at least one token"),
    ({"max_tokens": -1}, "max_tokens", "between 0"),
    ({"logprobs": True}, "logprobs", "an integer"),
    ({"logprobs": 21}, "logprobs", "between 0 and 20"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "only without stream"),
    ({"echo": "yes"}, "echo", "a boolean"),
    ({"suffix": "end"}, "suffix", "not supported"),
    ({"prompt": ["a"] * 100, "n": 3}, "n", "at most 256, got 300"),
    ({"prompt": ["a"] * 100, "best_of": 3}, "best_of", "at most 256, got 300"),
]

NEUTRAL_CHAT = [
    {"n": 1},
    {"tools": []},
    {"tools": None},
    {"tool_choice": "none"},
    {"tool_choice": "auto"},
    {"functions": []},
    {"parallel_tool_calls": True},
    {"response_format": {"type": "text"}},
    {"best_of": 1},
    {"use_beam_search": False},
    {"modalities": ["text"]},
    {"logits_processors": []},
    {"length_penalty": 1.0},
    {"detokenize": True},
    {"temperature": None, "stop": None, "seed": None, "max_tokens": None},
    {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"},
    {"prompt_cache_key": "x", "safety_identifier": "y"},
    {"top_k": -1},
    {"top_k": 3.0},
    {"seed": -(2**63)},
    {"stop": []},
    {"logprobs": False, "top_logprobs": 0},
    {"max_tokens": 3, "max_completion_tokens": 3},
    {"logit_bias": {"97": -100, "98": 1.5}},
    {"stream": True, "stream_options": {"include_obfuscation": False}},
    {"stream_options": None},
    {"priority": 0, "cache_salt": "tenant"},
    {"bad_words": [], "return_token_ids": False, "spaces_between_special_tokens": True},
    {"messages": [HI, {"role": "assistant", "content": None}, HI]},
    {
        "messages": [
            HI,
            {
                "role": "assistant",
                "content": "Hello",
                "refusal": None,
                "annotations": [],
                "audio": None,
                "function_call": None,
                "tool_calls": None,
            },
            {**HI, "name": "ann"},
        ]
    },
]


@pytest.mark.parametrize(("fields", "param", "message"), BAD_CHAT)
async def test_a_bad_chat_is_refused_by_name(fields, param, message):
    async with Api().running() as api:
        answer = await api.chat(**fields)
        assert api.engine.is_idle
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"
    assert answer.error["param"] == param
    assert message in answer.error["message"]


@pytest.mark.parametrize(("fields", "param", "message"), BAD_COMPLETIONS)
async def test_a_bad_completion_is_refused_by_name(fields, param, message):
    async with Api().running() as api:
        answer = await api.complete(**fields)
        assert api.engine.is_idle
    assert answer.status == 400
    assert answer.error["param"] == param
    assert message in answer.error["message"]


@pytest.mark.parametrize("fields", NEUTRAL_CHAT)
async def test_what_asks_for_nothing_is_accepted(fields):
    async with Api().running() as api:
        answer = await api.chat(**{"max_tokens": 2, **fields})
    assert answer.status == 200
    assert "x-ignored-fields" not in answer.headers


BAD_BODIES = [
    (b"", "invalid_json"),
    (b"{", "invalid_json"),
    (b"[]", "invalid_json"),
    (b'"x"', "invalid_json"),
    (b"null", "invalid_json"),
    (b"\xff\xfe", "invalid_json"),
    (b'{"messages": "\\ud800"}', "invalid_json"),  # a lone surrogate
    (b'{"temperature": NaN}', "invalid_json"),
    (b'{"temperature": Infinity}', "invalid_json"),
    (b'{"temperature": 1e999}', "invalid_json"),
    (b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}", "invalid_json"),
    (b'{"a": 1', "invalid_json"),
    (b"\xef\xbb\xbf{}", "invalid_json"),
]


@pytest.mark.parametrize(("body", "code"), BAD_BODIES)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_what_is_not_a_json_object_is_refused(body, code, path):
    async with Api().running() as api:
        answer = await api.call("POST", path, body)
    assert answer.status == 400
    assert answer.error["code"] == code


async def test_nesting_that_parses_is_refused_by_type():
    body = b'{"messages": ' + b"[" * 900 + b"]" * 900 + b"}"
    async with Api().running() as api:
        answer = await api.call("POST", CHAT, body)
    assert answer.status == 400
    assert answer.error["param"] == "messages[0]"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-encoding": "gzip"}, 415),
        ({"content-type": "application/json; charset=utf-8"}, 200),
        ({"content-type": "application/vnd.x+json"}, 200),
    ],
)
async def test_content_types(headers, status):
    async with Api().running() as api:
        answer = await api.call("POST", CHAT, chat_body(max_tokens=1), headers=headers)
    assert answer.status == status


@pytest.mark.parametrize("is_declared", [True, False])
async def test_a_body_over_the_limit_is_refused(is_declared):
    body = orjson.dumps(chat_body(user="x" * 2000))
    headers = {"content-length": str(len(body))} if is_declared else {}
    async with Api(max_body_bytes=1024).running() as api:
        answer = await api.call("POST", CHAT, body, headers=headers)
    assert answer.status == 413
    assert "1024" in answer.error["message"]


@pytest.mark.parametrize(("length", "status"), [("9" * 30, 413), ("-5", 200), ("²", 200)])
async def test_a_strange_content_length_breaks_nothing(length, status):
    headers = {"content-length": length}
    async with Api().running() as api:
        answer = await api.call("POST", CHAT, chat_body(max_tokens=1), headers=headers)
    assert answer.status == status


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_an_unknown_model_is_404(path):
    async with Api().running() as api:
        fields = {"prompt": "Hi"} if path == COMPLETIONS else {"messages": [HI]}
        answer = await api.call("POST", path, {"model": "gpt-9", **fields})
    assert answer.status == 404
    assert answer.error["code"] == "model_not_found"
    assert answer.error["param"] == "model"
    assert "'gpt-9'" in answer.error["message"]
    assert MODEL in answer.error["message"]


async def test_unknown_fields_are_named_and_logged_once(caplog):
    fields = {"foo": 1, "bär\r\nx": 2, "stream_options": {"x": 1}, "stream": True}
    messages = [{**HI, "mood": "good"}]
    caplog.set_level(logging.WARNING, "streamserve.api.context")
    async with Api().running() as api:
        for _ in range(2):
            answer = await api.chat(messages=messages, max_tokens=1, **fields)
            assert answer.status == 200
            assert answer.headers["x-ignored-fields"] == (
                "messages[0].mood, foo, b%C3%A4r%0D%0Ax, stream_options.x"
            )
    assert len(caplog.records) == 4
    assert "\r" not in caplog.text


async def test_unknown_fields_of_a_text_part_are_named_and_what_marks_it_for_caches_is_not():
    marks = {"cache_control": {"type": "ephemeral"}}
    parts = [{"type": "text", "text": "one", **marks}, {"type": "text", "text": "two", "x": 1}]
    async with Api().running() as api:
        answer = await api.chat(messages=[{"role": "user", "content": parts}], max_tokens=1)
    assert answer.status == 200
    assert answer.headers["x-ignored-fields"] == "messages[0].content[1].x"


async def test_huge_field_names_are_neither_logged_nor_kept_whole(caplog):
    async with Api().running() as api:
        await api.chat(max_tokens=1, **{"x" * 100_000: 1})
    assert len(caplog.text) < 500


async def test_so_many_unknown_fields_fit_into_a_header():
    fields = {f"field{i}{'x' * 500}": 1 for i in range(1000)}
    async with Api().running() as api:
        answer = await api.chat(max_tokens=1, **fields)
    assert answer.status == 200
    assert len(answer.headers["x-ignored-fields"]) < 4096
    assert answer.headers["x-ignored-fields"].endswith("and 968 more")


async def test_strict_fields_refuses_unknown_ones():
    async with Api(strict_fields=True).running() as api:
        refused = await api.chat(max_tokens=1, foo=1)
        annotated = await api.chat(max_tokens=1, user="me")
    assert refused.status == 400
    assert refused.error["param"] == "foo"
    assert refused.error["code"] == "unknown_parameter"
    assert annotated.status == 200


async def test_a_template_that_refuses_is_a_400():
    async with Api(template="mistral").running() as api:
        answer = await api.chat(messages=[{"role": "assistant", "content": "Yes?"}, HI])
    assert answer.status == 400
    assert "alternate" in answer.error["message"]


async def test_a_full_queue_is_429_with_retry_after():
    async with Api(is_held=True, max_num_waiting=1, num_blocks=32).running() as api:
        answer = await api.complete(prompt=["a"] * 40)
        assert answer.status == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.error["type"] == "rate_limit_error"
        assert answer.error["code"] == "queue_full"


async def test_priority_is_honoured_where_the_policy_looks_at_it():
    async with Api(honours_priority=True).running() as api:
        assert (await api.chat(priority=-3, max_tokens=1)).status == 200


def test_tables_do_not_contradict_each_other():
    for honoured, refused in ((CHAT_FIELDS, CHAT_REFUSED), (COMPLETION_FIELDS, COMPLETION_REFUSED)):
        assert not set(honoured) & set(refused)
        assert not (set(honoured) | set(refused)) & ANNOTATIONS


def test_every_field_of_openais_client_is_known():
    from openai.types import completion_create_params as completion
    from openai.types.chat import completion_create_params as chat

    for params, honoured, refused in (
        (chat.CompletionCreateParamsBase, CHAT_FIELDS, CHAT_REFUSED),
        (completion.CompletionCreateParamsBase, COMPLETION_FIELDS, COMPLETION_REFUSED),
    ):
        names = set(params.__annotations__) | {"stream"}
        assert names <= set(honoured) | set(refused) | ANNOTATIONS


async def test_the_models_own_sampling_defaults_stand_in():
    config = {"temperature": 0.25, "top_k": 7, "do_sample": True, "max_new_tokens": 5}
    defaults = sampling_defaults(config)
    params = parse_chat_request(chat_body(top_k=3), defaults).params
    assert (params.temperature, params.top_k, params.top_p) == (0.25, 3, 1.0)
    assert params.max_tokens is None


def test_a_bad_generation_config_is_known_at_start_up():
    with pytest.raises(ConfigError, match="temperature"):
        sampling_defaults({"temperature": -1})


def test_every_sampling_field_reaches_the_params():
    given = {
        "temperature": 0.5,
        "top_p": 0.5,
        "top_k": 5,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.5,
        "logit_bias": {"3": 4},
        "seed": 9,
        "stop": "x",
        "stop_token_ids": [4],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "min_tokens": 2,
        "max_tokens": 6,
        "skip_special_tokens": False,
        "logprobs": True,
        "top_logprobs": 3,
    }
    params = parse_chat_request(chat_body(**given), {}).params
    assert params.logit_bias == {3: 4.0}
    assert params.stop == ("x",)
    assert params.stop_token_ids == (4,)
    assert params.logprobs == 3
    for name in set(given) - {"logit_bias", "stop", "stop_token_ids", "logprobs", "top_logprobs"}:
        assert getattr(params, name) == given[name]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5) | st.sampled_from(["role", "content", "type"]), inner)
    ),
    max_leaves=8,
)
field_names = st.sampled_from(
    sorted({*CHAT_FIELDS, *CHAT_REFUSED, *COMPLETION_FIELDS, *COMPLETION_REFUSED, *ANNOTATIONS})
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(body=st.dictionaries(field_names | st.text(max_size=5), json_values, max_size=6))
@pytest.mark.parametrize("parse", [parse_chat_request, parse_completion_request])
def test_whatever_the_body_it_parses_or_is_refused(parse, body):
    valid = {"messages": [HI]} if parse is parse_chat_request else {"prompt": "Hi"}
    error = None
    try:
        parse({**valid, **body}, {})
    except InvalidParameterError as refusal:
        error = refusal
    if error is not None:
        orjson.dumps([error.message, error.param, error.code])
        assert len(error.message) < 1000
