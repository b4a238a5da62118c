"""The models on the backend that a CPU really gets: its views and shapes, in both dtypes."""

from __future__ import annotations

import pytest
import torch
import transformers

import streamserve_kernels
from streamserve.models import load_model
from streamserve.models.spec import ExpertsSpec
from tests.models import references
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
    "llama": lambda: transformers.LlamaConfig(**GQA, head_dim=64, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**GQA, sliding_window=7),
    "qwen3": lambda: transformers.Qwen3Config(**GQA, head_dim=64),
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
    "qwen2-moe": lambda: transformers.Qwen2MoeConfig(
        **GQA,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        mlp_only_layers=[1],
    ),
    "deepseek-moe": lambda: references.Deepseek(
        **GQA,
        moe_intermediate_size=24,
        n_routed_experts=6,
        n_shared_experts=2,
        num_experts_per_tok=3,
        first_k_dense_replace=1,
        moe_layer_freq=1,
        norm_topk_prob=False,
    ),
    "gpt-oss": lambda: transformers.GptOssConfig(
        **{**GQA, "intermediate_size": 48},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
        head_dim=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=7,
    ),
}
ROUTERS = ("mlp.gate", "mlp.router")
TIE = 0.01


def judged(model: torch.nn.Module, tokens: list[int], top_k: int) -> tuple[torch.Tensor, ...]:
    """Logits [T, V], and how likely the last expert that is chosen leads the next [T].

    Of all layers the closest; 1 without experts.
    """
    found: list[torch.Tensor] = []

    def keep(module: object, args: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        logits = output if isinstance(output, torch.Tensor) else output[0]
        likely = logits.view(len(tokens), -1).float().softmax(-1).sort(descending=True).values
        found.append(likely[:, top_k - 1] - likely[:, top_k])

    hooks = [
        module.register_forward_hook(keep)
        for name, module in model.named_modules()
        if name.endswith(ROUTERS)
    ]
    with torch.inference_mode():
        logits = model(torch.tensor([tokens])).logits[0]
    for hook in hooks:
        hook.remove()
    return logits, torch.stack([torch.ones(len(tokens)), *found]).amin(0)


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
    experts = next((x.mlp for x in decoder.spec.layers if isinstance(x.mlp, ExpertsSpec)), None)
    tolerance = 1e-4 if dtype == torch.float32 else 0.06 if experts is None else 0.1
    certain = []
    for index, sequence in enumerate(sequences):
        logits, lead = judged(model, sequence.tokens, 1 if experts is None else experts.top_k)
        expected = logits[:-1]
        ours = torch.cat((prefilled[index], decoded[index, 1:]))
        errors = (ours - expected).abs().amax(1) / expected.abs().max()
        # Where two experts are as good as each other, bfloat16 may take the other one: an answer as
        # right, and another. Later tokens see little of it.
        is_certain = torch.ones(len(errors), dtype=torch.bool)
        if dtype == torch.bfloat16:
            is_certain = lead[:-1] > TIE
        assert errors[is_certain].max() < tolerance
        certain.append(is_certain)
    assert torch.cat(certain).float().mean() > 0.6
