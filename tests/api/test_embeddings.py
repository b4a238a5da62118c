"""``POST /v1/embeddings``: what it takes, what it refuses, and what it leaves."""

import base64
import math
import re
from array import array

import openai
import pytest
import tiktoken
from langchain_openai import OpenAIEmbeddings

from streamserve.config import EmbeddingConfig
from tests.api.harness import CREATED, MODEL, Api, BrokenRunner, Exchange, server_thread, until

PATH = "/v1/embeddings"


def vector_of(text: str, num_special: int = 1) -> list[float]:
    """What a ``NullRunner`` makes of a text of bytes, to which the tokenizer adds its own."""
    values = [float(num_special + len(text)), float(text.encode()[-1]), 1.0, 0.0]
    return [value / math.hypot(*values) for value in values]


async def embed(api, text="Hi", **fields):
    return await api.call("POST", PATH, {"input": text, **fields})


def vectors(answer) -> list[list[float]]:
    assert answer.status == 200, answer.json
    data = answer.json["data"]
    assert [item["index"] for item in data] == list(range(len(data)))
    assert {item["object"] for item in data} == {"embedding"}
    return [item["embedding"] for item in data]


async def test_a_text_has_a_vector():
    async with Api().running() as api:
        answer = await embed(api, model=MODEL, user="me")
    assert vectors(answer) == [pytest.approx(vector_of("Hi"))]
    content = answer.json
    assert content["id"].startswith("embd-")
    assert (content["object"], content["model"], content["created"]) == ("list", MODEL, CREATED)
    assert content["usage"] == {"prompt_tokens": 3, "total_tokens": 3}


async def test_the_tokenizer_adds_nothing_if_it_shall_not():
    async with Api().running() as api:
        answer = await embed(api, add_special_tokens=False)
    assert vectors(answer) == [pytest.approx(vector_of("Hi", 0))]


@pytest.mark.parametrize(
    "given", [["Hi", "there"], [[72, 105], [116, 104, 101, 114, 101]]], ids=["texts", "ids"]
)
async def test_several_inputs_in_their_order(given):
    async with Api().running() as api:
        answer = await embed(api, given)
        one = await embed(api, [72, 105])
    num_special = 1 if isinstance(given[0], str) else 0
    expected = [pytest.approx(vector_of(text, num_special)) for text in ("Hi", "there")]
    assert vectors(answer) == expected
    assert answer.json["usage"]["prompt_tokens"] == 7 + 2 * num_special
    assert num_special or vectors(one) == vectors(answer)[:1]


async def test_base64_holds_the_same_numbers():
    async with Api().running() as api:
        [numbers] = vectors(await embed(api))
        [text] = vectors(await embed(api, encoding_format="base64"))
    assert array("f", base64.b64decode(text)).tolist() == numbers


async def test_raw_and_cut_vectors():
    config = EmbeddingConfig(size=4, matryoshka=(2, 3))
    async with Api(embedding=config).running() as api:
        assert vectors(await embed(api, normalize=False)) == [[3.0, 105.0, 1.0, 0.0]]
        assert vectors(await embed(api, normalize=False, dimensions=2)) == [[3.0, 105.0]]
        assert len(vectors(await embed(api, dimensions=4))[0]) == 4
        refused = await embed(api, dimensions=1)
    assert refused.status == 400
    assert refused.error["message"] == "dimensions must be one of 2, 3, got 1"


async def test_an_input_is_cut_where_it_is_asked_for():
    text = "abcdefgh"
    async with Api(max_model_len=6).running() as api:
        for fields, kept in (
            ({"truncate_prompt_tokens": 3}, "fgh"),
            ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, "abc"),
            ({"truncate_prompt_tokens": -1}, "cdefgh"),
        ):
            answer = await embed(api, text, add_special_tokens=False, **fields)
            assert vectors(answer) == [pytest.approx(vector_of(kept, 0))]
            assert answer.json["usage"]["prompt_tokens"] == len(kept)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "input is required"),
        ({"input": []}, "input must be a non-empty array"),
        ({"input": "", "add_special_tokens": False}, "input must hold at least one token"),
        (
            {"input": ["a", ""], "add_special_tokens": False},
            "input[1] must hold at least one token",
        ),
        ({"input": [[1], []]}, "input[1] must be a non-empty array of token ids"),
        ({"input": ["x"] * 2049}, "input must be at most 2048 inputs, got an array of 2049"),
        ({"input": "x" * 20}, "input: This model's maximum context length is 12 tokens"),
        ({"input": ["x", "x" * 13]}, "input[1]: This model's maximum context length is 12 tokens"),
        ({"input": [1, 999]}, "input must hold token ids from 0 to"),
        ({"input": [[1], [2, 999]]}, "input[1] must hold token ids from 0 to"),
        ({"input": [1, -1]}, "input[1] must be between 0 and"),
        ({"input": {"a": 1}}, "input must be a string"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format must be one of float, base64"),
        ({"input": "a", "dimensions": 2}, "dimensions is not supported"),
        ({"input": "a", "dimensions": 0}, "dimensions must be between 1 and"),
        ({"input": "a", "truncate_prompt_tokens": 13}, "truncate_prompt_tokens must be at most 12"),
        ({"input": "a", "messages": []}, "messages is not supported here: send input"),
        ({"input": "a", "priority": 1}, "priority must be 0"),
    ],
)
async def test_what_is_refused_is_named(fields, message):
    async with Api(max_model_len=12).running() as api:
        answer = await api.call("POST", PATH, fields)
        assert answer.status == 400, answer.json
        assert message in answer.error["message"]
        assert answer.error["param"].startswith(re.match("[a-z_]+", message)[0])
        assert (await embed(api, model="other")).status == 404
        assert api.engine.is_idle


async def test_more_inputs_than_may_wait():
    async with Api(max_num_waiting=4).running() as api:
        texts = [f"number {n}" for n in range(300)]
        answer = await embed(api, texts)
    assert vectors(answer) == [pytest.approx(vector_of(text)) for text in texts]


async def test_a_full_queue_is_429_before_anything_else():
    async with Api(max_num_waiting=1, is_held=True).running() as api:
        running = Exchange(api.app, "POST", PATH, {"input": "a"})
        await until(lambda: bool(api.pace.waiting))
        waiting = Exchange(api.app, "POST", PATH, {"input": "b"})
        await until(lambda: api.engine.stats().num_waiting == 1)
        answer = await embed(api, ["a", "b"])
        assert answer.status == 429
        assert int(answer.headers["retry-after"]) >= 1
        api.pace.let_go()
        await running.finished()
        await waiting.finished()


async def test_a_client_that_leaves_ends_its_inputs():
    async with Api(is_held=True).running() as api:
        exchange = Exchange(api.app, "POST", PATH, {"input": ["a"] * 100})
        await until(lambda: bool(api.pace.waiting))
        exchange.leave()
        await exchange.finished()
        assert exchange.messages == []
        api.pace.let_go()
        await until(lambda: api.engine.is_idle)
        assert api.num_used_blocks == 0
        metrics = (await api.call("GET", "/metrics")).body.decode()
    assert 'finished_reason="abort"' in metrics


async def test_a_failed_step_is_an_error():
    async with Api(runner=BrokenRunner(0)).running() as api:
        answer = await embed(api, ["a", "b"])
    assert answer.status == 500
    assert answer.error["message"].startswith("the model step failed")


@pytest.fixture(scope="module")
def url():
    with server_thread() as url:
        yield url


def test_the_openai_client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0) as client:
        default = client.embeddings.create(model=MODEL, input=["Hi", "there"])
        floats = client.embeddings.create(model=MODEL, input="Hi", encoding_format="float")
        with pytest.raises(openai.BadRequestError) as error:
            client.embeddings.create(model=MODEL, input="Hi", dimensions=3)
    assert default.data[0].embedding == pytest.approx(vector_of("Hi"))
    assert default.data[1].embedding == pytest.approx(vector_of("there"))
    assert floats.data[0].embedding == pytest.approx(default.data[0].embedding)
    assert default.usage.total_tokens == 9
    assert error.value.param == "dimensions"


def test_langchain_sends_text_when_told_to(url):
    embeddings = OpenAIEmbeddings(
        model=MODEL, base_url=f"{url}/v1", api_key="key", check_embedding_ctx_length=False
    )
    found = embeddings.embed_documents(["Hi", "there"])
    assert found == [pytest.approx(vector_of(text)) for text in ("Hi", "there")]
    assert embeddings.embed_query("Hi") == pytest.approx(vector_of("Hi"))


def test_langchain_sends_another_vocabularys_ids_unless_told(url, monkeypatch):
    """Those of tiktoken: refused where this model has no such token, and wrong where it has."""
    foreign = tiktoken.Encoding(
        "foreign",
        pat_str="[^x]|x",
        mergeable_ranks={bytes([i]): i + 1000 * (i > 126) for i in range(256)},
        special_tokens={},
    )
    monkeypatch.setattr(tiktoken, "encoding_for_model", lambda _model: foreign)
    embeddings = OpenAIEmbeddings(model=MODEL, base_url=f"{url}/v1", api_key="key", max_retries=0)
    assert embeddings.embed_query("Hi") == pytest.approx(vector_of("Hi", 0))  # bytes are alike
    with pytest.raises(openai.BadRequestError, match="input must hold token ids") as error:
        embeddings.embed_query("\x7f")
    assert error.value.param == "input"
