"""Programs written for vLLM's quick start: nothing but the import and the model's name is ours.

The names are those of real models; a hub cache on disk has tiny ones of the same architectures.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.servers import SMALL, SMALL_FLAGS, Server, environment, running_server
from tests.llm.conftest import CONFIGS

OFFLINE = """
from streamserve import LLM, SamplingParams

prompts = ["Hello, my name is", "The capital of France is", "The future of AI is"]
sampling_params = SamplingParams(temperature=0.8, top_p=0.95)
llm = LLM(model="openai-community/gpt2")
outputs = llm.generate(prompts, sampling_params)
for output in outputs:
    prompt = output.prompt
    generated_text = output.outputs[0].text
    print(f"Prompt: {prompt!r}, Generated text: {generated_text!r}")
"""

EVERY_PARAMETER = """
from streamserve import LLM, SamplingParams

llm = LLM(
    model="Qwen/Qwen2.5-1.5B-Instruct",
    tokenizer="Qwen/Qwen2.5-1.5B-Instruct",
    tokenizer_mode="auto",
    skip_tokenizer_init=False,
    trust_remote_code=True,
    tensor_parallel_size=1,
    dtype="float32",
    quantization=None,
    revision="main",
    tokenizer_revision="main",
    seed=0,
    gpu_memory_utilization=0.9,
    swap_space=4,
    cpu_offload_gb=0,
    enforce_eager=True,
    max_model_len=256,
    max_num_seqs=16,
    max_num_batched_tokens=128,
    download_dir=None,
    load_format="auto",
    disable_custom_all_reduce=False,
    generation_config="auto",
)
params = SamplingParams(
    n=1,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    repetition_penalty=1.1,
    temperature=0.7,
    top_p=0.9,
    top_k=50,
    min_p=0.01,
    seed=42,
    stop=["###"],
    stop_token_ids=[3],
    include_stop_str_in_output=False,
    ignore_eos=False,
    max_tokens=12,
    min_tokens=2,
    logprobs=1,
    detokenize=True,
    skip_special_tokens=True,
    spaces_between_special_tokens=True,
    logit_bias={5: -1.0},
)
prompts = [f"Question {i}: " for i in range(100)]
outputs = llm.generate(prompts, params)
assert [output.prompt for output in outputs] == prompts
assert all(2 <= len(output.outputs[0].token_ids) <= 12 for output in outputs)

tokenizer = llm.get_tokenizer()
messages_list = [[{"role": "user", "content": prompt}] for prompt in prompts[:3]]
texts = tokenizer.apply_chat_template(
    messages_list, tokenize=False, add_generation_prompt=True
)
greedy = SamplingParams(temperature=0.0, max_tokens=8)
by_text = llm.generate(texts, greedy)
by_chat = llm.chat(messages_list, greedy)
assert [o.prompt for o in by_text] == [o.prompt for o in by_chat] == texts
assert [o.outputs[0].text for o in by_text] == [o.outputs[0].text for o in by_chat]
print("Prompt", len(outputs))
"""

LANGCHAIN = """
import warnings

from langchain_core.prompts import PromptTemplate
from streamserve.langchain import VLLM

llm = VLLM(
    model="mistralai/Mistral-7B-v0.1",
    trust_remote_code=True,
    max_new_tokens=12,
    top_k=10,
    top_p=0.95,
    temperature=0.8,
)
print("Prompt", llm("What is the capital of France ?"))
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from langchain_classic.chains import LLMChain

    template = "Question: {question} Answer: Let's think step by step."
    prompt = PromptTemplate.from_template(template)
    llm_chain = LLMChain(prompt=prompt, llm=llm)
    print("Prompt", llm_chain.invoke("Who was the first on the moon?")["text"])
"""


def run(script: str, hub: Path, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**environment(), "HF_HUB_CACHE": str(hub)},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_offline_batch(hub):
    lines = run(OFFLINE, hub).splitlines()
    assert [line.startswith("Prompt: ") for line in lines] == [True] * 3


def test_every_constructor_and_sampling_parameter(hub):
    assert run(EVERY_PARAMETER, hub) == "Prompt 100\n"


def test_langchain_and_its_chain(hub):
    assert run(LANGCHAIN, hub).count("Prompt") == 2


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_local_path(hub, name):
    """In this process: every architecture, by the directory that the hub's cache has."""
    from streamserve import LLM, SamplingParams

    [path] = (hub / f"models--{name.replace('/', '--')}" / "snapshots").iterdir()
    with LLM(model=str(path), **SMALL, kv_cache_memory="16MiB") as llm:
        params = SamplingParams(max_tokens=5, ignore_eos=True)
        [output] = llm.generate("Hello", params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 5


def test_download_dir_and_revision_are_where_the_hub_is_looked_for(hub):
    from streamserve import LLM
    from streamserve.errors import ModelLoadError

    given = {**SMALL, "kv_cache_memory": "16MiB", "download_dir": str(hub)}
    with LLM("lmsys/vicuna-7b-v1.5", revision="main", **given) as llm:
        assert llm.generate("Hello", use_tqdm=False)[0].finished
    with pytest.raises(ModelLoadError, match="the hub did not give it"):
        LLM("lmsys/vicuna-7b-v1.5", revision="no-such-branch", **given)


@pytest.fixture(scope="module")
def server(hub: Path) -> Iterator[Server]:
    os.environ["HF_HUB_CACHE"] = str(hub)
    try:
        flags = (*SMALL_FLAGS, "--kv-cache-memory", "32MiB", "--enable-log-requests")
        with running_server("Qwen/Qwen2.5-1.5B-Instruct", *flags) as server:
            yield server
    finally:
        del os.environ["HF_HUB_CACHE"]


def test_the_openai_package(server):
    model = "Qwen/Qwen2.5-1.5B-Instruct"
    with server.client() as client:
        completion = client.completions.create(model=model, prompt="San Francisco is a")
        assert completion.usage.completion_tokens <= 16
        messages = [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "Tell me a joke."},
        ]
        answer = client.chat.completions.create(model=model, messages=messages, max_tokens=9)
        assert answer.choices[0].message.role == "assistant"
        stream = client.chat.completions.create(
            model=model, messages=messages, max_tokens=9, stream=True, stop=["###"]
        )
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] in ("stop", "length")


def test_curl(server):
    body = {
        "model": "Qwen/Qwen2.5-1.5B-Instruct",
        "prompt": "San Francisco is a",
        "max_tokens": 7,
        "temperature": 0,
    }
    reply = httpx.post(f"{server.url}/v1/completions", json=body).json()
    assert reply["usage"]["completion_tokens"] <= 7
    assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"] == body["model"]
    assert f"{reply['id']} ended: " in server.output
