"""Alone, in a crowd, or attending to one shared prefix together: the same greedy tokens."""

from __future__ import annotations

import pytest
import torch
import transformers

import streamserve_kernels
from streamserve.models import load_model
from tests.models.paged import PagedHarness, Sequence

CPU = torch.device("cpu")
GQA = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**GQA, head_dim=64),
    # A window that cuts the prefix, and one that ends up cutting it.
    "short window": lambda: transformers.MistralConfig(**GQA, sliding_window=14),
    "long window": lambda: transformers.MistralConfig(**GQA, sliding_window=108),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=97, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    ),
}
BLOCK_SIZE = 16
NUM_DECODED = 12


def prompts() -> list[list[int]]:
    """Three behind one system prompt, two of which share a turn, and one that shares nothing."""
    generator = torch.Generator().manual_seed(4)

    def random(length: int) -> list[int]:
        return torch.randint(0, 97, (length,), generator=generator).tolist()

    system, turn = random(54), random(28)
    return [
        system + turn + random(6),
        system + random(18),
        random(40),
        system + turn + random(42),
        system + random(2),
    ]


@pytest.mark.parametrize("backend", ["naive", None], ids=["naive", "default"])
@pytest.mark.parametrize("chunk", [None, 10], ids=["whole", "chunks"])
@pytest.mark.parametrize("family", CONFIGS)
def test_solo_is_crowd_is_shared_prefix(family, chunk, backend, checkpoint):
    directory, _ = checkpoint(CONFIGS[family]())
    kernels = streamserve_kernels.load(CPU, backend)
    decoder = load_model(directory, dtype=torch.float32, device=CPU, kernels=kernels)
    decoder.warm_up(BLOCK_SIZE)

    def run(harness: PagedHarness, sequences: list[Sequence], first: list[torch.Tensor]):
        rest = sequences[len(first) :]
        last = [logits[-1] for logits in first + harness.prefill(rest, chunk)]
        logits = harness.decode(sequences, torch.stack(last), NUM_DECODED)
        return [sequence.tokens for sequence in sequences], logits

    solo = [
        run(PagedHarness(decoder, block_size=BLOCK_SIZE), [Sequence(prompt)], [])
        for prompt in prompts()
    ]
    expected = [tokens[0] for tokens, _ in solo], torch.cat([logits for _, logits in solo])
    crowd = [Sequence(prompt) for prompt in prompts()]
    harness = PagedHarness(decoder, block_size=BLOCK_SIZE, cascade=True)
    assert_same(run(harness, crowd, []), expected)
    assert harness.num_members == 0

    crowd = [Sequence(prompt) for prompt in prompts()]
    harness = PagedHarness(decoder, block_size=BLOCK_SIZE, cascade=True)
    first = harness.prefill(crowd[:1], chunk)
    for sequence in crowd[1:]:
        harness.share_prefix(sequence, crowd[0])
    assert [len(sequence.block_table) for sequence in crowd[1:]] == [3, 0, 5, 3]
    assert_same(run(harness, crowd, first), expected)
    assert harness.num_members >= 4 * (NUM_DECODED - 1)


def assert_same(result, expected) -> None:
    assert result[0] == expected[0]
    torch.testing.assert_close(result[1], expected[1], atol=1e-4, rtol=1e-4)
