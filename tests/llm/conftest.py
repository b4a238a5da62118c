"""The model in the box in this process, and a hub that has tiny models under real names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from streamserve import LLM
from tools.make_checkpoint import CHAT_TEMPLATE, SPECIAL_TOKENS, make_tokenizer

VOCAB_SIZE = 1024
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
CONFIGS = {
    "Qwen/Qwen2.5-1.5B-Instruct": lambda: transformers.Qwen2Config(**SIZES),
    "meta-llama/Llama-2-7b-chat-hf": lambda: transformers.LlamaConfig(**SIZES),
    "lmsys/vicuna-7b-v1.5": lambda: transformers.LlamaConfig(**SIZES),
    "mistralai/Mistral-7B-v0.1": lambda: transformers.MistralConfig(**SIZES),
    "openai-community/gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB_SIZE, n_embd=64, n_layer=2, n_head=4, n_positions=512
    ),
    "microsoft/phi-2": lambda: transformers.PhiConfig(**{**SIZES, "num_key_value_heads": 4}),
}


@pytest.fixture(scope="session")
def llm() -> Iterator[LLM]:
    """The model in the box in float32, where equal tokens can be asked for."""
    # Its warm-up takes half as long with shorter steps.
    with LLM(dtype="float32", max_num_batched_tokens=128, max_num_waiting=8) as llm:
        yield llm


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub cache as a download leaves it: tiny random models of the architectures named."""
    cache = tmp_path_factory.mktemp("hub")
    for name, config in CONFIGS.items():
        folder = cache / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(COMMIT)
        _write_model(folder / "snapshots" / COMMIT, config())
    return cache


def _write_model(directory: Path, config: transformers.PretrainedConfig) -> None:
    config.eos_token_id = config.bos_token_id = VOCAB_SIZE - 1
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(directory)
    make_tokenizer(VOCAB_SIZE).save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[2],
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
