"""``LLM.embed`` and ``LLM.encode``: the model in the box beside transformers."""

from __future__ import annotations

import asyncio

import pytest
import torch
import transformers

from streamserve import LLM, AsyncLLM, PoolingParams, SamplingParams
from streamserve.cli.model_source import box_path
from streamserve.errors import ContextLengthError, InvalidParameterError
from tests.e2e.servers import SMALL

TEXTS = ["What is the capital of France?", "Tell me a story about a cat.", "Hi"]


@pytest.fixture(scope="module")
def theirs():
    return transformers.AutoModelForCausalLM.from_pretrained(box_path(), dtype=torch.float32).eval()


def states(theirs, token_ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        found = theirs(torch.tensor([token_ids]), output_hidden_states=True)
    return found.hidden_states[-1][0]


def unit(vector: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(vector, dim=0)


def test_vectors_are_the_last_tokens_of_transformers(llm, theirs):
    outputs = llm.embed(TEXTS, use_tqdm=False)
    for text, output in zip(TEXTS, outputs, strict=True):
        assert output.prompt_token_ids == llm._service.tokenizer.encode(
            text, add_special_tokens=True
        )
        found = torch.tensor(output.outputs.embedding)
        assert output.outputs.hidden_size == len(found)
        expected = unit(states(theirs, output.prompt_token_ids)[-1])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    [alone] = llm.embed(TEXTS[0], use_tqdm=False)
    assert alone.outputs.embedding == pytest.approx(outputs[0].outputs.embedding, abs=1e-5)
    assert alone.num_cached_tokens > 0
    assert alone.finished


def test_encode_gives_tensors_as_they_are(llm, theirs):
    raw = PoolingParams(use_activation=False)
    [one, two] = llm.encode([[5, 6, 7], {"prompt": "Hi"}], [raw, PoolingParams()], use_tqdm=False)
    torch.testing.assert_close(
        one.outputs.data, states(theirs, [5, 6, 7])[-1], atol=1e-4, rtol=1e-4
    )
    assert float(two.outputs.data.norm()) == pytest.approx(1.0)


def test_more_vectors_than_may_wait_beside_answers(llm):
    outputs = llm.embed([[5 + n % 90, 7] for n in range(50)], use_tqdm=False)
    assert [output.prompt_token_ids[0] for output in outputs] == [5 + n % 90 for n in range(50)]
    assert outputs[0].outputs.embedding != outputs[1].outputs.embedding
    assert llm.embed([], use_tqdm=False) == []


def test_long_prompts_are_cut_or_refused(llm):
    limit = llm._service.max_model_len
    [whole] = llm.embed([[5] * limit], use_tqdm=False)
    [cut] = llm.embed([[9, *[5] * limit]], truncate_prompt_tokens=-1, use_tqdm=False)
    assert cut.outputs.embedding == pytest.approx(whole.outputs.embedding, abs=1e-5)
    with pytest.raises(ContextLengthError, match=f"prompt 1: .*{limit} tokens.*{limit + 1} tokens"):
        llm.embed([[5], [5] * (limit + 1)], use_tqdm=False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm: llm.embed("a", pooling_params=PoolingParams(dimensions=8)), "dimensions"),
        (lambda llm: llm.encode("a", pooling_task="classify"), "pooling_task must be embed"),
        (lambda llm: llm.embed(["a"], pooling_params=[]), "pooling_params|as many as prompts"),
        (lambda llm: llm.embed([[10**6]]), "token ids from 0"),
        (lambda llm: llm.embed("a", truncate_prompt_tokens=10**6), "truncate_prompt_tokens"),
        (lambda llm: llm.embed("a", lora_request=object()), "must be a LoRARequest"),
    ],
)
def test_what_cannot_be_is_named(llm, call, message):
    with pytest.raises(InvalidParameterError, match=message):
        call(llm)


def test_means_dimensions_and_a_loop_of_ones_own(theirs):
    llm = AsyncLLM(**SMALL | {"max_num_seqs": 13}, pooling="mean", max_num_waiting=4)

    async def run():
        async with llm:
            vectors = [llm.embed([5, 6, n], PoolingParams()) for n in range(7, 20)]
            answer = [o async for o in llm.generate("Hi", SamplingParams(max_tokens=4))][-1]
            return await asyncio.gather(*vectors), answer

    outputs, answer = asyncio.run(run())
    assert answer.finished
    for n, output in enumerate(outputs, start=7):
        expected = unit(states(theirs, [5, 6, n]).mean(0))
        torch.testing.assert_close(
            torch.tensor(output.outputs.embedding), expected, atol=1e-5, rtol=1e-4
        )


def test_an_architecture_of_the_hub_embeds(hub):
    name = "Qwen/Qwen2.5-1.5B-Instruct"
    with LLM(name, download_dir=str(hub), **SMALL, runner="pooling") as llm:
        [output] = llm.embed([[5, 6, 7]], use_tqdm=False)
    assert len(output.outputs.embedding) == 64
