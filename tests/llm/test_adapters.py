"""``lora_request``: a batch of prompts, each with the adapter that it asks for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import streamserve
from streamserve import LLM, AsyncLLM, LoRARequest, SamplingParams
from streamserve.errors import AdapterError, ConfigError, InvalidParameterError
from tests.e2e.servers import SMALL
from tests.models.test_adapters import merged_model, save_adapter

BOX = Path(streamserve.__file__).parent / "assets" / "box"
PROMPTS = ["The capital of France is", "Once upon a time", "Two and two"]
PARAMS = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("adapters")
    model = transformers.AutoModelForCausalLM.from_pretrained(BOX, dtype=torch.float32)
    for rank, name in enumerate("abc", start=2):
        save_adapter(model, directory / name, target_modules="all-linear", r=rank)
    return {name: directory / name for name in "abc"}


@pytest.fixture(scope="module")
def llm():
    with LLM(**SMALL, enable_lora=True, max_loras=2, kv_cache_memory="16MiB") as llm:
        yield llm


def token_ids(outputs) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def test_each_prompt_has_the_adapter_it_asks_for(llm, paths):
    a, b = (LoRARequest(name, 1, str(paths[name])) for name in "ab")
    found = token_ids(llm.generate(PROMPTS, PARAMS, lora_request=[a, None, b], use_tqdm=False))
    model = transformers.AutoModelForCausalLM.from_pretrained(BOX, dtype=torch.float32)
    models = [merged_model(model, paths["a"]), model, merged_model(model, paths["b"])]
    for prompt, judge, ids in zip(PROMPTS, models, found, strict=True):
        inputs = torch.tensor([llm.generate(prompt, PARAMS, use_tqdm=False)[0].prompt_token_ids])
        for _ in ids:
            with torch.no_grad():
                likeliest = judge(inputs).logits[0, -1].argmax()
            inputs = torch.cat((inputs, likeliest.view(1, 1)), dim=1)
        assert inputs[0, -len(ids) :].tolist() == ids
    c = LoRARequest("c", 3, str(paths["c"]))
    with_c = token_ids(llm.generate(PROMPTS[:1], PARAMS, lora_request=c, use_tqdm=False))
    assert with_c[0] != found[0], "there was room for two: the oldest made way"
    again = llm.generate(PROMPTS, PARAMS, lora_request=[a, None, None], use_tqdm=False)
    assert token_ids(again)[0] == found[0]
    one = SamplingParams(max_tokens=1)
    outputs = [
        llm.generate([[5] * 40], one, lora_request=asked, use_tqdm=False)[0]
        for asked in (None, a, c, None, a)
    ]
    cached = [output.num_cached_tokens for output in outputs]
    assert cached[:3] == [0, 0, 0], "what others left is not theirs"
    assert min(cached[3:]) > 0


def test_more_adapters_in_a_batch_than_there_is_room_for(llm, paths):
    """Those that are too many wait until one has no request any more."""
    asked = [LoRARequest(name, 1, str(paths[name])) for name in "abcba"]
    prompts = [PROMPTS[0]] * len(asked)
    found = token_ids(llm.generate(prompts, PARAMS, lora_request=asked, use_tqdm=False))
    for request, ids in zip(asked, found, strict=True):
        alone = llm.generate(PROMPTS[:1], PARAMS, lora_request=request, use_tqdm=False)
        assert token_ids(alone) == [ids]
    assert len(set(map(tuple, found))) == 3


def test_what_cannot_be_is_said(llm, paths, tmp_path):
    def ask(request):
        return llm.generate(PROMPTS[:1], PARAMS, lora_request=request, use_tqdm=False)

    with pytest.raises(AdapterError, match="holds no adapter"):
        ask(LoRARequest("d", 1, str(tmp_path)))
    ask(LoRARequest("a", 1, str(paths["a"])))
    with pytest.raises(AdapterError, match=r"'a' is loaded already, from .*/a$"):
        ask(LoRARequest("a", 1, str(paths["b"])))
    with pytest.raises(InvalidParameterError, match="must be a LoRARequest, got str"):
        ask("a")
    with pytest.raises(ConfigError, match="lora_modules is for `streamserve serve`"):
        LLM(lora_modules=["a=b"])


async def test_async(paths):
    async with AsyncLLM(**SMALL, kv_cache_memory="16MiB") as llm:
        request = LoRARequest("a", 1, str(paths["a"]))
        with pytest.raises(InvalidParameterError, match="enable_lora=True"):
            async for _ in llm.generate(PROMPTS[0], PARAMS, lora_request=request):
                pass
