"""LangChain: a model in this process, chains of both ages, and its chat model over HTTP."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from langchain_classic.chains import LLMChain
from langchain_core._api import LangChainDeprecationWarning
from langchain_core.prompts import PromptTemplate
from langchain_openai import ChatOpenAI

from streamserve.langchain import VLLM
from streamserve.llm.llm import LLM
from tests.e2e.servers import SMALL_FLAGS, running_server

TEMPLATE = "What is the capital of {country}?"


@pytest.fixture(scope="module")
def chat() -> Iterator[ChatOpenAI]:
    with running_server(*SMALL_FLAGS) as server:
        yield ChatOpenAI(base_url=f"{server.url}/v1", api_key="none", model="box", temperature=0)


@pytest.fixture
def vllm(llm: LLM) -> VLLM:
    return VLLM(client=llm, max_new_tokens=40, temperature=0)


def test_fields_are_those_of_langchain_community():
    assert {
        "model", "tensor_parallel_size", "trust_remote_code", "n", "best_of", "presence_penalty",
        "frequency_penalty", "temperature", "top_p", "top_k", "use_beam_search", "stop",
        "ignore_eos", "max_new_tokens", "logprobs", "dtype", "download_dir", "vllm_kwargs",
    } <= set(VLLM.model_fields)  # fmt: skip


def test_it_loads_a_model_of_its_own_and_passes_every_field_on():
    vllm = VLLM(
        trust_remote_code=True,
        max_new_tokens=5,
        top_k=10,
        top_p=0.95,
        temperature=0.8,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        stop=["\n"],
        ignore_eos=True,
        logprobs=1,
        dtype="float32",
        vllm_kwargs={"max_model_len": 64, "seed": 3},
    )
    try:
        assert vllm.client._service.max_model_len == 64
        [[generation]] = vllm.generate(["Hello"], stop=["zzz"]).generations
        assert generation.generation_info["finish_reason"] == "length"
        assert len(generation.generation_info["logprobs"]) == 5
    finally:
        vllm.client.close()


def test_every_way_to_ask_gives_the_same(vllm):
    prompt = TEMPLATE.format(country="France")
    answer = vllm.invoke(prompt)
    assert vllm(prompt) == answer
    assert vllm.batch([prompt, prompt]) == [answer, answer]
    pieces = list(vllm.stream(prompt))
    assert len(pieces) > 1
    assert "".join(pieces) == answer
    cut = vllm.invoke(prompt, stop=[answer[5:8]])
    assert cut == answer[: answer.index(answer[5:8])]
    usage = vllm.generate([prompt]).llm_output["token_usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


async def test_asked_from_an_event_loop(vllm):
    prompt = TEMPLATE.format(country="France")
    answer = await vllm.ainvoke(prompt)
    assert "".join([piece async for piece in vllm.astream(prompt)]) == answer


def test_a_chain_of_either_age(vllm):
    prompt = PromptTemplate(template=TEMPLATE, input_variables=["country"])
    answer = (prompt | vllm).invoke({"country": "France"})
    assert "".join((prompt | vllm).stream({"country": "France"})) == answer
    with pytest.warns(LangChainDeprecationWarning, match="LLMChain"):
        chain = LLMChain(prompt=prompt, llm=vllm)
    assert chain.invoke({"country": "France"})["text"] == answer
    with pytest.warns(LangChainDeprecationWarning, match="run"):
        assert chain.run("France") == answer


def test_langchains_chat_model_against_a_server(chat):
    messages = [("user", "What is the capital of France?")]
    answer = chat.invoke(messages)
    assert "Paris" in answer.content
    assert answer.usage_metadata["output_tokens"] > 0
    pieces = [chunk.content for chunk in chat.stream(messages)]
    assert len([piece for piece in pieces if piece]) > 1
    assert "".join(pieces) == answer.content


def test_several_answers(vllm):
    many = vllm.bind(n=2, best_of=3, temperature=1.0, seed=1, max_new_tokens=8)
    [generations] = vllm.generate(["Hello"], **many.kwargs).generations
    assert len(generations) == 2
