"""The wire format, byte for byte."""

import pytest

from tests.api.harness import CREATED, MODEL, Api, Exchange, chat_body, events_of, text_of

CHAT = "/v1/chat/completions"


def chunk(identity, choices, **rest):
    return {
        "id": identity,
        "object": "chat.completion.chunk",
        "created": CREATED,
        "model": MODEL,
        "choices": choices,
        **rest,
    }


def delta(delta, finish_reason=None, index=0):
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


async def test_a_streamed_chat_is_exactly_openais():
    async with Api().running() as api:
        answer = await api.chat(stream=True, max_tokens=3)
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    identity = answer.events[0]["id"]
    assert identity.startswith("chatcmpl-")
    head = (
        f'data: {{"id":"{identity}","object":"chat.completion.chunk","created":{CREATED},'
        f'"model":"{MODEL}","choices":[{{"index":0,"delta":'
    )
    tail = ',"logprobs":null,"finish_reason":null}]}\n\n'
    assert answer.body.decode() == (
        f'{head}{{"role":"assistant","content":""}}{tail}'
        f'{head}{{"content":"a"}}{tail}'
        f'{head}{{"content":"b"}}{tail}'
        f'{head}{{"content":"c"}}{tail}'
        f'{head}{{}},"logprobs":null,"finish_reason":"length"}}]}}\n\n'
        "data: [DONE]\n\n"
    )


async def test_a_token_is_one_write_and_the_ends_travel_with_text():
    async with Api(is_held=True).running() as api:
        exchange = Exchange(api.app, "POST", CHAT, chat_body(stream=True, max_tokens=3))
        for num_messages in (2, 3, 4):
            await api.pace.step()
            await exchange.until(lambda e, n=num_messages: len(e.messages) == n)
        await exchange.finished()
    writes = [events_of(m["body"]) for m in exchange.messages[1:]]
    assert [len(w) for w in writes] == [2, 1, 3]  # role + a, b, c + finish + [DONE]


async def test_usage_comes_last_without_choices_and_is_null_before():
    async with Api().running() as api:
        answer = await api.chat(stream=True, max_tokens=2, stream_options={"include_usage": True})
    *chunks, usage, done = answer.events
    assert done == "[DONE]"
    assert [c["usage"] for c in chunks] == [None] * len(chunks)
    assert usage["choices"] == []
    num_prompt_tokens = len("User: Hi\nAssistant:")
    assert usage["usage"] == {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": 2,
        "total_tokens": num_prompt_tokens + 2,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert {(c["id"], c["created"], c["model"]) for c in [*chunks, usage]} == {
        (usage["id"], CREATED, MODEL)
    }


async def test_without_include_usage_no_chunk_has_a_usage():
    async with Api().running() as api:
        answer = await api.chat(stream=True, max_tokens=2, stream_options={"include_usage": False})
    assert not any("usage" in event for event in answer.events[:-1])


async def test_continuous_usage_counts_up():
    options = {"include_usage": True, "continuous_usage_stats": True}
    async with Api(is_held=True).running() as api:
        exchange = Exchange(
            api.app, "POST", CHAT, chat_body(stream=True, max_tokens=2, stream_options=options)
        )
        await api.pace.step()
        await exchange.until(lambda e: len(e.messages) == 2)
        await api.pace.step()
        await exchange.finished()
    counts = [e["usage"]["completion_tokens"] for e in events_of(exchange.body)[:-1]]
    assert counts == [0, 1, 2, 2, 2]


async def test_a_chat_that_is_not_streamed():
    async with Api().running() as api:
        answer = await api.chat(max_completion_tokens=4)
    identity = answer.json["id"]
    assert identity.startswith("chatcmpl-")
    assert answer.headers["content-type"] == "application/json"
    assert answer.json == {
        "id": identity,
        "object": "chat.completion",
        "created": CREATED,
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "abcd", "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
            }
        ],
        "usage": {
            "prompt_tokens": 19,
            "completion_tokens": 4,
            "total_tokens": 23,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


async def test_cached_prompt_tokens_are_reported():
    prompt = "x" * 64
    async with Api().running() as api:
        first = await api.complete(prompt=prompt, max_tokens=2)
        second = await api.complete(prompt=prompt, max_tokens=2)
    assert first.json["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert second.json["usage"]["prompt_tokens_details"]["cached_tokens"] >= 48


async def test_a_streamed_completion():
    async with Api().running() as api:
        answer = await api.complete(stream=True, max_tokens=2)
    identity = answer.events[0]["id"]
    assert identity.startswith("cmpl-")
    head = (
        f'data: {{"id":"{identity}","object":"text_completion","created":{CREATED},'
        f'"model":"{MODEL}","choices":[{{"index":0,"text":'
    )
    assert answer.body.decode() == (
        f'{head}"a","logprobs":null,"finish_reason":null}}]}}\n\n'
        f'{head}"b","logprobs":null,"finish_reason":null}}]}}\n\n'
        f'{head}"","logprobs":null,"finish_reason":"length"}}]}}\n\n'
        "data: [DONE]\n\n"
    )


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("Hi", ["abc"]),
        (["Hi", "Ho"], ["abc", "abc"]),
        ([72, 105], ["abc"]),
        ([[72, 105], [72], [1]], ["abc", "abc", "abc"]),
    ],
)
@pytest.mark.parametrize("is_streamed", [False, True])
async def test_prompts_of_every_kind(prompt, texts, is_streamed):
    async with Api().running() as api:
        answer = await api.complete(prompt=prompt, max_tokens=3, stream=is_streamed)
    if is_streamed:
        assert [text_of(answer.events, i) for i in range(len(texts))] == texts
        finished = [
            (c["index"], c["finish_reason"])
            for event in answer.events[:-1]
            for c in event["choices"]
            if c["finish_reason"] is not None
        ]
        assert sorted(finished) == [(i, "length") for i in range(len(texts))]
        assert answer.body.count(b"[DONE]") == 1
    else:
        choices = answer.json["choices"]
        assert [c["text"] for c in choices] == texts
        assert [c["index"] for c in choices] == list(range(len(texts)))


async def test_the_usage_of_a_batch_is_its_sum():
    async with Api().running() as api:
        whole = await api.complete(prompt=["a", "bcd"], max_tokens=3, add_special_tokens=False)
        streamed = await api.complete(
            prompt=["e", "fgh"],
            max_tokens=3,
            add_special_tokens=False,
            stream=True,
            stream_options={"include_usage": True},
        )
    expected = {
        "prompt_tokens": 4,
        "completion_tokens": 6,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert whole.json["usage"] == expected
    assert streamed.events[-2]["usage"] == expected
    assert streamed.events[-2]["choices"] == []


@pytest.mark.parametrize("prompt", ["Hello", list(b"Hello")])
async def test_echo_repeats_the_prompt(prompt):
    async with Api().running() as api:
        whole = await api.complete(prompt=prompt, echo=True, max_tokens=2)
        streamed = await api.complete(prompt=prompt, echo=True, max_tokens=2, stream=True)
    assert whole.json["choices"][0]["text"] == "Helloab"
    assert text_of(streamed.events) == "Helloab"
    assert streamed.events[0]["choices"][0]["text"] == "Hello"


async def test_add_special_tokens_is_honoured():
    async with Api().running() as api:
        with_start = await api.complete(max_tokens=1)
        without = await api.complete(max_tokens=1, add_special_tokens=False)
    assert with_start.json["usage"]["prompt_tokens"] == 3
    assert without.json["usage"]["prompt_tokens"] == 2


async def test_half_a_character_makes_no_frame():
    async with Api(token_ids="é€".encode()).running() as api:
        answer = await api.chat(stream=True, max_tokens=5)
    contents = [e["choices"][0]["delta"].get("content") for e in answer.events[:-1]]
    assert contents == ["", "é", "€", None]


async def test_text_is_escaped_as_json():
    async with Api(token_ids=b'"\\\n\x01').running() as api:
        answer = await api.chat(stream=True, max_tokens=4)
    assert text_of(answer.events) == '"\\\n\x01'


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_stop_string_ends_with_stop(is_streamed):
    async with Api().running() as api:
        answer = await api.chat(stop=["de"], max_tokens=50, stream=is_streamed)
    if is_streamed:
        assert text_of(answer.events) == "abc"
        assert answer.events[-2]["choices"][0]["finish_reason"] == "stop"
    else:
        choice = answer.json["choices"][0]
        assert choice["message"]["content"] == "abc"
        assert choice["finish_reason"] == "stop"


async def test_an_answer_without_text_still_has_a_role_and_an_end():
    async with Api().running() as api:
        answer = await api.chat(stop=["a"], stream=True)
    deltas = [e["choices"][0] for e in answer.events[:-1]]
    assert deltas == [
        delta({"role": "assistant", "content": ""}),
        delta({}, "stop"),
    ]


async def test_end_of_sequence_ends_with_stop_unless_ignored():
    tokens = (97, 257, 98)
    async with Api(token_ids=tokens).running() as api:
        stopped = await api.chat(max_tokens=3)
        ignored = await api.chat(max_tokens=3, ignore_eos=True)
        shown = await api.chat(max_tokens=3, ignore_eos=True, skip_special_tokens=False)
    assert stopped.json["choices"][0]["finish_reason"] == "stop"
    assert stopped.json["choices"][0]["message"]["content"] == "a"
    assert ignored.json["choices"][0]["message"]["content"] == "ab"
    assert shown.json["choices"][0]["message"]["content"] == "a</s>b"


async def test_a_message_continues():
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "We"}]
    async with Api().running() as api:
        answer = await api.chat(messages=messages, continue_final_message=True, max_tokens=1)
    assert answer.json["usage"]["prompt_tokens"] == len("User: Hi\nAssistant: We")


async def test_developer_speaks_as_system_and_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "Be"}, {"role": "user", "content": parts}]
    async with Api().running() as api:
        answer = await api.chat(messages=messages, max_tokens=1)
    assert answer.json["usage"]["prompt_tokens"] == len("Be\n\nUser: a\nb\nAssistant:")


async def test_template_kwargs_reach_the_template():
    async with Api().running() as api:
        answer = await api.chat(chat_template_kwargs={"enable_thinking": False}, max_tokens=1)
    assert answer.status == 200


async def test_the_alias_is_served_under_its_own_name():
    async with Api().running() as api:
        alias = await api.chat(model="alias", max_tokens=1)
        unnamed = await api.call(
            "POST", CHAT, {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
        )
    assert alias.json["model"] == "alias"
    assert unnamed.json["model"] == MODEL
