"""The models on the backend that a CPU really gets: its views and shapes, in both dtypes."""

from __future__ import annotations

import pytest
import torch
import transformers

import streamserve_kernels
from streamserve.models import load_model
from tests.models.paged import PagedHarness, Sequence

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GQA = {**SIZES, "num_key_value_heads": 2}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**GQA, head_dim=32, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**GQA, sliding_window=7),
    "qwen3": lambda: transformers.Qwen3Config(**GQA, head_dim=32),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=97, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    ),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**SIZES),
    "phi": lambda: transformers.PhiConfig(**SIZES),
    "falcon-rw": lambda: transformers.FalconConfig(
        **SIZES, alibi=True, multi_query=False, parallel_attn=False, bias=True
    ),
    "gemma2": lambda: transformers.Gemma2Config(
        **GQA, head_dim=16, sliding_window=7, attn_implementation="eager"
    ),
    "mixtral": lambda: transformers.MixtralConfig(**GQA, num_local_experts=4),
}


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_prefill_and_decode_equal_transformers(family, dtype, checkpoint):
    directory, model = checkpoint(CONFIGS[family]())
    kernels = streamserve_kernels.load(CPU)
    decoder = load_model(directory, dtype=dtype, device=CPU, kernels=kernels)
    decoder.warm_up()
    harness = PagedHarness(decoder, block_size=16)
    generator = torch.Generator().manual_seed(2)
    sequences = [
        Sequence(torch.randint(0, 97, (length,), generator=generator).tolist())
        for length in (37, 1, 18)
    ]
    prefilled = harness.prefill(sequences, 13)
    decoded = harness.decode(sequences, torch.stack([logits[-1] for logits in prefilled]), 8)
    tolerance = 1e-4 if dtype == torch.float32 else 0.06
    for index, sequence in enumerate(sequences):
        with torch.inference_mode():
            expected = model(torch.tensor([sequence.tokens])).logits[0, :-1]
        ours = torch.cat((prefilled[index], decoded[index, 1:]))
        error = (ours - expected).abs().max() / expected.abs().max()
        assert error < tolerance
