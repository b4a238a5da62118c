"""``/tokenize`` and ``/detokenize``, with vLLM's bodies and answers."""

import pytest

from streamserve.engine.chat_template import ChatTemplate
from tests.api.harness import MAX_MODEL_LEN, MODEL, Api
from tests.api.scripted import scripted

HI = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "add"}}


async def tokenize(api, **body):
    return await api.call("POST", "/tokenize", body)


async def test_a_text_to_ids_and_back():
    async with Api().running() as api:
        answer = await tokenize(api, model=MODEL, prompt="Hé", return_token_strs=True)
        assert answer.json == {
            "count": 4,
            "max_model_len": MAX_MODEL_LEN,
            "tokens": [256, *"Hé".encode()],
            "token_strs": ["<s>", "H", "\ufffd", "\ufffd"],
        }
        back = await api.call("POST", "/detokenize", {"tokens": answer.json["tokens"]})
    assert back.json == {"prompt": "<s>Hé"}


async def test_without_special_tokens_and_without_strings():
    async with Api().running() as api:
        answer = await tokenize(api, prompt="Hi", add_special_tokens=False)
    assert answer.json["tokens"] == [72, 105]
    assert answer.json["token_strs"] is None


async def test_messages_are_rendered_as_for_an_answer():
    async with Api().running() as api:
        asked = (await tokenize(api, messages=[HI])).json
        answer = await api.chat(messages=[HI], max_tokens=1)
        shorter = (await tokenize(api, messages=[HI], add_generation_prompt=False)).json
        special = (await tokenize(api, messages=[HI], add_special_tokens=True)).json
        open_end = (await tokenize(api, messages=[HI], continue_final_message=True)).json
    assert asked["count"] == answer.json["usage"]["prompt_tokens"]
    assert asked["tokens"][: shorter["count"]] == shorter["tokens"]
    assert shorter["count"] < asked["count"]
    assert special["tokens"] == [256, *asked["tokens"]]
    assert bytes(open_end["tokens"]).endswith(b"Hi")


async def test_a_trusted_request_brings_its_own_template():
    template = ChatTemplate("{{ messages[0].content }}", source="a test", trusts_requests=True)
    own = "{% for m in messages %}[{{ m.content }}]{{ closing }}{% endfor %}"
    fields = {"messages": [HI], "chat_template": own, "chat_template_kwargs": {"closing": "."}}
    async with Api(template=template).running() as api:
        asked = (await tokenize(api, **fields)).json
        answer = await api.chat(**fields, max_tokens=1)
        del fields["messages"]
        response = await api.call("POST", "/v1/responses", {"input": "Hi", **fields})
        broken = await api.chat(messages=[HI], chat_template="{% if %}")
    assert bytes(asked["tokens"]) == b"[Hi]."
    assert answer.json["usage"]["prompt_tokens"] == 5
    assert response.json["usage"]["input_tokens"] == 5
    assert (broken.status, broken.error["param"]) == (400, "chat_template")


async def test_tools_and_calls_are_rendered_as_for_an_answer():
    call = {"id": "call-123456789", "type": "function", "function": {"name": "add"}}
    call["function"]["arguments"] = "{}"
    messages = [
        HI,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "call-123456789"},
    ]
    tools = [{**TOOL, "foo": 1}]
    for parser in ("hermes", "mistral"):
        async with scripted("ok", tool_parser=parser).running() as api:
            asked = await tokenize(api, messages=messages, tools=tools)
            await api.chat(messages=messages, tools=tools)
            without = await tokenize(api, messages=messages, tools=[])
        text = bytes(asked.json["tokens"]).decode()
        assert text == api.runner.prompts[0]
        assert ("call-" in text) == (parser == "hermes")
        assert "<tools>" in text
        assert "<tools>" not in bytes(without.json["tokens"]).decode()
        assert asked.headers["x-ignored-fields"] == "tools[0].foo"


async def test_long_texts_leave_the_event_loop():
    text = "word " * 20_000
    async with Api().running() as api:
        answer = await tokenize(api, prompt=text, add_special_tokens=False)
        back = await api.call("POST", "/detokenize", {"tokens": answer.json["tokens"]})
        assert api.app.context.preprocessor._pool is not None
        api.app.context.preprocessor.close()
    assert back.json == {"prompt": text}


async def test_ids_that_the_vocabulary_lacks_are_refused():
    async with Api().running() as api:
        answer = await api.call("POST", "/detokenize", {"tokens": [72, 258, 105]})
        empty = await api.call("POST", "/detokenize", {"tokens": []})
    assert answer.status == 400
    assert answer.error["message"] == "tokens must hold token ids from 0 to 257, got 258"
    assert empty.json == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("/tokenize", {}, "prompt", "either prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": [HI]}, "prompt", "not both"),
        ("/tokenize", {"prompt": ["a"]}, "prompt", "a string"),
        ("/tokenize", {"prompt": "a", "return_token_strs": 1}, "return_token_strs", "a boolean"),
        ("/tokenize", {"prompt": "a", "tools": [TOOL]}, "tools", "only with messages"),
        ("/tokenize", {"messages": [HI], "tools": [{}]}, "tools[0]", "type is required"),
        ("/tokenize", {"messages": [HI], "chat_template": "x"}, "chat_template", "--trust-req"),
        (
            "/tokenize",
            {"messages": [HI], "add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message",
            "both be true",
        ),
        ("/detokenize", {}, "tokens", "required"),
        ("/detokenize", {"tokens": "a"}, "tokens", "an array of token ids"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]", "got -1"),
        ("/detokenize", {"tokens": [1, True]}, "tokens[1]", "a boolean"),
    ],
)
async def test_a_bad_body_is_refused_by_name(path, body, param, message):
    async with Api().running() as api:
        answer = await api.call("POST", path, body)
    assert answer.status == 400
    assert answer.error["param"] == param
    assert message in answer.error["message"]


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
async def test_models_keys_and_unknown_fields_as_everywhere(path):
    body = {"prompt": "Hi"} if path == "/tokenize" else {"tokens": [72]}
    async with Api(api_keys=("secret",)).running() as api:
        without = await api.call("POST", path, body)
        key = {"authorization": "Bearer secret"}
        other = await api.call("POST", path, {**body, "model": "x"}, headers=key)
        unknown = await api.call("POST", path, {**body, "foo": 1}, headers=key)
    assert without.status == 401
    assert other.status == 404
    assert unknown.status == 200
    assert unknown.headers["x-ignored-fields"] == "foo"
