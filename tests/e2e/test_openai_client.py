"""The openai package against a real server process with a real model."""

import asyncio

import openai
import pytest

CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]


def test_sync_answer(box):
    with box.client() as client:
        reply = client.chat.completions.create(model="box", messages=CAPITAL, temperature=0)
    assert "Paris" in reply.choices[0].message.content
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens > 0
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_sync_stream_equals_the_plain_answer(box):
    with box.client() as client:
        plain = client.chat.completions.create(model="box", messages=CAPITAL, temperature=0)
        chunks = list(
            client.chat.completions.create(
                model="box",
                messages=CAPITAL,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == plain.choices[0].message.content
    finish = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert finish[-1] == "stop"
    assert set(finish[:-1]) == {None}
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == plain.usage.completion_tokens
    assert {(c.id, c.created, c.model) for c in chunks} == {
        (chunks[0].id, chunks[0].created, chunks[0].model)
    }


async def test_async_stream(box):
    async with box.async_client() as client:
        stream = await client.chat.completions.create(
            model="box", messages=CAPITAL, temperature=0, stream=True
        )
        text = "".join([c.choices[0].delta.content or "" async for c in stream])
    assert "Paris" in text


def test_completions_with_token_ids_and_batches(box):
    with box.client() as client:
        one = client.completions.create(
            model="box",
            prompt="Hello",
            max_tokens=8,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        two = client.completions.create(
            model="box",
            prompt=["Hello", "Hello"],
            max_tokens=8,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
    assert [c.text for c in two.choices] == [one.choices[0].text] * 2
    assert [c.index for c in two.choices] == [0, 1]
    assert one.usage.completion_tokens == 8


def test_multi_byte_text_streams_whole(box):
    """Emoji and Chinese arrive as whole characters, and equal the answer given at once."""
    messages = [{"role": "user", "content": "你好"}]
    with box.client() as client:
        plain = client.chat.completions.create(model="box", messages=messages, temperature=0)
        stream = client.chat.completions.create(
            model="box", messages=messages, temperature=0, stream=True
        )
        pieces = [c.choices[0].delta.content or "" for c in stream]
    assert "".join(pieces) == plain.choices[0].message.content
    assert any(ord(char) > 0x2E80 for char in plain.choices[0].message.content)
    assert all("\ufffd" not in piece for piece in pieces)


def test_seed_repeats_the_answer(box):
    def ask(seed):
        with box.client() as client:
            reply = client.chat.completions.create(
                model="box",
                messages=[{"role": "user", "content": "Tell me a story"}],
                temperature=1.0,
                seed=seed,
                max_tokens=40,
            )
        return reply.choices[0].message.content

    assert ask(1) == ask(1)
    assert len({ask(seed) for seed in range(4)}) > 1


def test_stop_string_ends_the_answer(box):
    with box.client() as client:
        whole = client.chat.completions.create(model="box", messages=CAPITAL, temperature=0)
        cut = client.chat.completions.create(
            model="box", messages=CAPITAL, temperature=0, stop=["Par"]
        )
    text = whole.choices[0].message.content
    assert cut.choices[0].message.content == text[: text.index("Par")]
    assert cut.choices[0].finish_reason == "stop"


def test_logprobs(box):
    with box.client() as client:
        reply = client.chat.completions.create(
            model="box", messages=CAPITAL, temperature=0, logprobs=True, top_logprobs=3
        )
    entries = reply.choices[0].logprobs.content
    assert "".join(e.token for e in entries) == reply.choices[0].message.content
    for entry in entries:
        assert entry.top_logprobs[0].logprob == entry.logprob
        assert len(entry.top_logprobs) == 3


def test_several_answers_with_logprobs(box):
    """Streamed and not, each is the answer that its index and the seed give."""
    story = [{"role": "user", "content": "Tell me a story"}]
    options = {"model": "box", "messages": story, "temperature": 1.0, "seed": 3, "max_tokens": 20}
    with box.client() as client:
        whole = client.chat.completions.create(**options, n=3, logprobs=True, top_logprobs=2)
        first = client.chat.completions.create(**options)
        stream = client.chat.completions.create(
            **options, n=3, logprobs=True, stream=True, stream_options={"include_usage": True}
        )
        texts, tokens = [""] * 3, [""] * 3
        for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                if choice.logprobs:
                    tokens[choice.index] += "".join(e.token for e in choice.logprobs.content)
    answers = [choice.message.content for choice in whole.choices]
    assert answers[0] == first.choices[0].message.content
    assert len(set(answers)) == 3
    assert texts == tokens == answers
    assert whole.usage.prompt_tokens == first.usage.prompt_tokens == chunk.usage.prompt_tokens
    assert whole.usage.completion_tokens == chunk.usage.completion_tokens
    for choice in whole.choices:
        assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)


def test_the_likelihood_of_a_text(box):
    """As evaluation harnesses ask for it: echo, logprobs, and vLLM's prompt_logprobs beside."""
    text = "The capital of France is Paris."
    with box.client() as client:
        reply = client.completions.create(
            model="box",
            prompt=text,
            echo=True,
            logprobs=1,
            max_tokens=1,
            temperature=0,
            extra_body={"prompt_logprobs": 1, "return_token_ids": True},
        )
    [choice] = reply.choices
    found = choice.logprobs
    assert choice.text.startswith(text)
    assert found.token_logprobs[0] is None
    assert all(logprob <= 0 for logprob in found.token_logprobs[1:])
    assert len(found.tokens) == reply.usage.prompt_tokens + 1
    for token, offset in zip(found.tokens[1:], found.text_offset[1:], strict=True):
        assert choice.text.startswith(token, offset)
    assert choice.prompt_logprobs[0] is None
    for token_id, entry, logprob in zip(
        choice.prompt_token_ids[1:],
        choice.prompt_logprobs[1:],
        found.token_logprobs[1:],
        strict=False,
    ):
        assert entry[str(token_id)]["logprob"] == logprob


def test_a_beam_search_is_at_least_as_likely_as_greedy(box):
    def ask(**fields):
        with box.client() as client:
            return client.completions.create(
                model="box", prompt="The capital of", max_tokens=12, logprobs=0, **fields
            )

    greedy = ask(temperature=0, extra_body={"ignore_eos": True})
    beams = ask(n=2, best_of=6, extra_body={"use_beam_search": True, "ignore_eos": True})
    scores = [sum(choice.logprobs.token_logprobs) for choice in beams.choices]
    assert scores[0] >= scores[1]
    assert scores[0] >= sum(greedy.choices[0].logprobs.token_logprobs) - 1e-3


def test_responses(box):
    """Created, streamed and gone on with, by the model in the box."""
    asked = "What is the capital of France?"
    with box.client() as client:
        chat = client.chat.completions.create(model="box", messages=CAPITAL, temperature=0)
        whole = client.responses.create(model="box", input=asked, temperature=0)
        with client.responses.stream(model="box", input=asked, temperature=0) as stream:
            text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
            final = stream.get_final_response()
        items = [{"role": "user", "content": asked}, *whole.output]
        by_items = client.responses.create(
            model="box", input=[*items, {"role": "user", "content": "And of Italy?"}], temperature=0
        )
        by_id = client.responses.create(
            model="box", input="And of Italy?", previous_response_id=whole.id, temperature=0
        )
        assert client.responses.retrieve(by_id.id) == by_id
    assert whole.output_text == text == final.output_text == chat.choices[0].message.content
    assert whole.usage.input_tokens == chat.usage.prompt_tokens
    assert by_id.output_text == by_items.output_text != ""
    assert by_id.usage.input_tokens == by_items.usage.input_tokens > whole.usage.input_tokens
    assert by_id.usage.input_tokens_details.cached_tokens > 0


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"model": "gpt-9"}, openai.NotFoundError, "model"),
        ({"temperature": 3}, openai.BadRequestError, "temperature"),
        ({"n": 0}, openai.BadRequestError, "n"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        (
            {"messages": [{"role": "user", "content": "long " * 20_000}]},
            openai.BadRequestError,
            "messages",
        ),
    ],
)
def test_bad_requests_name_the_field(box, fields, error, param):
    with box.client() as client, pytest.raises(error) as caught:
        client.chat.completions.create(**{"model": "box", "messages": CAPITAL, **fields})
    assert caught.value.param == param
    # Of a length the message tells the tokens of the prompt, which the template makes of a field.
    assert param in caught.value.message or caught.value.code == "context_length_exceeded"


async def test_a_reader_who_leaves_frees_everything(box):
    """Streams closed after a few chunks give back their seats and blocks; the server goes on."""
    async with box.async_client() as client:

        async def leave_early(index):
            stream = await client.chat.completions.create(
                model="box",
                messages=[{"role": "user", "content": f"Count to fifty. Take {index}."}],
                stream=True,
                max_tokens=1000,
                extra_body={"ignore_eos": True},
            )
            async for _ in stream:
                break
            await stream.close()

        await asyncio.gather(*(leave_early(index) for index in range(16)))
        reply = await client.chat.completions.create(model="box", messages=CAPITAL, temperature=0)
        assert "Paris" in reply.choices[0].message.content
        async with asyncio.timeout(60):
            while box.metrics()["streamserve:num_requests_running"] != 0:
                await client.models.list()
    assert box.metrics()["streamserve:kv_cache_usage_perc"] == 0
