"""OpenAI's own client, as its users use it."""

import openai
import pytest

from tests.api.harness import MODEL, TEXT, Api, BrokenRunner, server_thread

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def url():
    with server_thread(api_keys=("key",)) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0) as client:
        yield client


def test_chat(client):
    answer = client.chat.completions.create(model=MODEL, messages=HI, max_tokens=10)
    assert answer.choices[0].message.content == TEXT.decode()
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 10
    assert answer.usage.prompt_tokens_details.cached_tokens is not None
    assert answer.object == "chat.completion"


def test_streamed_chat(client):
    stream = client.chat.completions.create(
        model=MODEL,
        messages=HI,
        max_completion_tokens=10,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
        top_logprobs=1,
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].delta.role for c in chunks[1:-1]] == [None] * (len(chunks) - 2)
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == TEXT.decode()
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 10
    logprobs = [
        entry.token
        for c in chunks[:-1]
        if c.choices[0].logprobs
        for entry in c.choices[0].logprobs.content
    ]
    assert "".join(logprobs) == TEXT.decode()


def test_the_streaming_helper(client):
    with client.chat.completions.stream(model=MODEL, messages=HI, stop="f") as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    assert text == "abcde"
    assert final.choices[0].message.content == "abcde"


def test_completions(client):
    answer = client.completions.create(
        model=MODEL, prompt=["a", "b"], max_tokens=3, logprobs=1, echo=False
    )
    assert [c.text for c in answer.choices] == ["abc", "abc"]
    assert answer.choices[1].logprobs.text_offset == [0, 1, 2]
    ids = client.completions.create(model=MODEL, prompt=[1, 2, 3], max_tokens=3)
    assert ids.usage.prompt_tokens == 3


def test_streamed_completions(client):
    texts = ["", ""]
    for chunk in client.completions.create(
        model=MODEL, prompt=["a", "b"], max_tokens=6, stream=True
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == ["abcdef", "abcdef"]


def test_an_answer_goes_back_as_it_came(client):
    first = client.chat.completions.create(model=MODEL, messages=HI, max_tokens=2)
    messages = [*HI, first.choices[0].message, *HI]
    second = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=messages, max_tokens=2
    )
    assert second.status_code == 200
    assert "x-ignored-fields" not in second.headers


def test_vllms_extras(client):
    answer = client.chat.completions.create(
        model=MODEL,
        messages=HI,
        max_tokens=4,
        extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 2},
    )
    assert answer.choices[0].message.content == "abcd"


def test_models(client):
    assert [m.id for m in client.models.list()] == [MODEL, "alias"]
    assert client.models.retrieve("alias").id == "alias"


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"model": "gpt-9"}, openai.NotFoundError),
        ({"temperature": 9}, openai.BadRequestError),
        ({"n": 0}, openai.BadRequestError),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError),
    ],
)
def test_errors_are_the_clients_own(client, fields, error):
    with pytest.raises(error) as caught:
        client.chat.completions.create(**{"model": MODEL, "messages": HI, **fields})
    assert caught.value.param == next(iter(fields))
    assert caught.value.request_id.startswith("req-")


def test_a_wrong_key(url):
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


async def test_the_async_client():
    api = Api()
    async with (
        api.serving() as (host, port),
        openai.AsyncOpenAI(base_url=f"http://{host}:{port}/v1", api_key="x") as client,
    ):
        answer = await client.chat.completions.create(model=MODEL, messages=HI, max_tokens=3)
        assert answer.choices[0].message.content == "abc"
        text = ""
        stream = await client.chat.completions.create(
            model=MODEL, messages=HI, max_tokens=5, stream=True
        )
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
        assert text == "abcde"


async def test_a_failed_stream_raises_in_the_client():
    api = Api(runner=BrokenRunner(good_steps=2))
    async with (
        api.serving() as (host, port),
        openai.AsyncOpenAI(base_url=f"http://{host}:{port}/v1", api_key="x") as client,
    ):
        stream = await client.chat.completions.create(
            model=MODEL, messages=HI, max_tokens=9, stream=True
        )
        with pytest.raises(openai.APIError) as caught:
            async for _ in stream:
                pass
        assert caught.value.body["status"] == 500
