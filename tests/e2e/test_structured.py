"""Structured answers of the model in the box, asked for as the openai package's users do."""

import json
import re
import threading
from typing import Annotated, Literal

import openai
import pytest
from pydantic import BaseModel, Field

CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]


class Place(BaseModel):
    """Bounded everywhere: the model in the box has never seen JSON, nor where it ends."""

    city: Annotated[str, Field(max_length=20)]
    kind: Literal["capital", "village"]
    population: Annotated[int, Field(ge=0, le=99_999)] | None
    tags: Annotated[list[Literal["old", "new"]], Field(max_length=3)]


def test_parse_with_a_pydantic_model(box):
    with box.client() as client:
        reply = client.chat.completions.parse(
            model="box", messages=CAPITAL, response_format=Place, temperature=0, max_tokens=300
        )
    message = reply.choices[0].message
    assert reply.choices[0].finish_reason == "stop"
    assert isinstance(message.parsed, Place)
    assert Place.model_validate_json(message.content) == message.parsed


def test_stream_with_a_pydantic_model(box):
    with (
        box.client() as client,
        client.chat.completions.stream(
            model="box",
            messages=CAPITAL,
            response_format=Place,
            seed=7,
            max_tokens=300,
            logprobs=True,
        ) as stream,
    ):
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == Place.model_validate_json(text)
    # They are the model's own: what the grammar forbids had its share.
    logprobs = [entry.logprob for entry in final.choices[0].logprobs.content]
    assert min(logprobs) < -1.0


async def test_parse_async(box):
    async with box.async_client() as client:
        reply = await client.chat.completions.parse(
            model="box", messages=CAPITAL, response_format=Place, temperature=0, max_tokens=300
        )
    assert reply.choices[0].message.parsed is not None


def test_the_fields_of_vllm(box):
    with box.client() as client:

        def ask(**extra_body):
            reply = client.chat.completions.create(
                model="box", messages=CAPITAL, max_tokens=200, seed=3, extra_body=extra_body
            )
            assert reply.choices[0].finish_reason == "stop"
            return reply.choices[0].message.content

        assert ask(structured_outputs={"choice": ["Berlin", "Paris"]}) in ("Berlin", "Paris")
        assert re.fullmatch(r"[A-Z][a-z]{3,8}!", ask(guided_regex=r"[A-Z][a-z]{3,8}!"))
        assert ask(guided_grammar='root ::= "Par" ("is" | "ty")') in ("Paris", "Party")
        tag = {"begin": "<a>", "content": {"type": "regex", "pattern": "[xy]"}, "end": "</a>"}
        tree = {"type": "triggered_tags", "triggers": ["<a"], "tags": [tag], "at_least_one": True}
        tree |= {"stop_after_first": True}
        tagged = ask(response_format={"type": "structural_tag", "format": tree})
        assert tagged in ("<a>x</a>", "<a>y</a>")
        number = json.loads(ask(guided_json={"type": "integer", "minimum": 10, "maximum": 99}))
        assert 10 <= number <= 99
        assert isinstance(json.loads(ask(response_format={"type": "json_object"})), dict)


def test_a_completion_in_german(box):
    with box.client() as client:
        reply = client.completions.create(
            model="box",
            prompt="Wie heißt du?",
            temperature=0,
            max_tokens=60,
            extra_body={"guided_choice": ["Größe", "名前 😀"]},
        )
    assert reply.choices[0].text in ("Größe", "名前 😀")


def test_a_hostile_schema_is_refused_and_others_go_on(box):
    hostile = {"type": "integer", "multipleOf": 99_999_989}
    chunks = []

    def stream():
        with box.client() as client:
            answer = client.chat.completions.create(
                model="box",
                messages=CAPITAL,
                max_tokens=200,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            chunks.extend(answer)

    thread = threading.Thread(target=stream)
    thread.start()
    with box.client() as client, pytest.raises(openai.BadRequestError, match="too complex") as bad:
        client.chat.completions.create(
            model="box", messages=CAPITAL, extra_body={"guided_json": hostile}
        )
    thread.join()
    assert bad.value.param == "guided_json"
    assert chunks[-1].choices[0].finish_reason == "length"
