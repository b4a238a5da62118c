"""``LLM`` on quantised checkpoints: greedy answers through the engine, and what is refused."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import save_file

from streamserve import LLM, SamplingParams
from streamserve.errors import ConfigError
from tests.llm.conftest import SIZES, _write_model
from tests.models.test_stored_checkpoints import quantise

PROMPTS = [[5, 17, 300, 88, 41], list(range(40, 75)), [*range(40, 70), 3, 9]]
GREEDY = SamplingParams(temperature=0, max_tokens=12)
# Of the spread of the logits: products may round their inputs, and near ties fall either way.
NEAR = 0.1


@pytest.mark.parametrize("kind", ["gptq-4-act-order", "awq", "bnb-nf4"])
def test_greedy_answers_are_those_of_the_dequantised_weights(tmp_path, kind):
    directory, twin = tmp_path / "model", tmp_path / "twin"
    for path in (directory, twin):
        _write_model(path, transformers.LlamaConfig(**SIZES, initializer_range=0.2))
    save_file(quantise(directory, kind), twin / "model.safetensors", metadata={"format": "pt"})
    model = transformers.AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32).eval()
    method = kind.partition("-")[0].replace("bnb", "bitsandbytes")
    options = {"dtype": "float32", "kv_cache_memory": "64MiB", "max_num_batched_tokens": 16}
    with LLM(str(directory), quantization=method, **options) as llm:
        inputs = [{"prompt_token_ids": ids} for ids in PROMPTS]
        answers = llm.generate(inputs, GREEDY, use_tqdm=False)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = answer.outputs[0].token_ids
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        drawn = logits.gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert ((logits.amax(1) - drawn) / logits.std(1) < NEAR).all()
    with pytest.raises(ConfigError, match=f"quantised already, with {method}; leave the flag out"):
        LLM(str(directory), quantization="int8", **options)
