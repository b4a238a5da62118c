"""What a GGUF file must give: the logits and tokens of the model that it was written of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from streamserve.models import load_model
from tests.models.paged import PagedHarness, Sequence
from tests.models.parity import prompts

CPU = torch.device("cpu")


def sizes(config: Any) -> dict[str, Any]:
    """What llama.cpp's converter writes for every model."""
    inner = getattr(config, "intermediate_size", None) or getattr(config, "ffn_hidden_size", None)
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": inner or 4 * config.hidden_size,
        "attention.head_count": config.num_attention_heads,
    }


def compare(
    path: Path, model: Any, kernels: Any, *, tolerance: float = 1e-4, num_greedy: int = 8
) -> Any:
    """Logits of prompts in chunks, and of greedy tokens after them, by transformers' own."""
    decoder = load_model(path, dtype=torch.float32, device=CPU, kernels=kernels)
    harness = PagedHarness(decoder)
    sequences = [Sequence(tokens) for tokens in prompts(shared=10)]
    lengths = [len(sequence.tokens) for sequence in sequences]
    logits = harness.prefill(sequences, 5)
    harness.decode(sequences, torch.stack([rows[-1] for rows in logits]), num_greedy)
    for sequence, ours, length in zip(sequences, logits, lengths, strict=True):
        with torch.inference_mode():
            expected = model(torch.tensor([sequence.tokens])).logits[0]
        rows = expected[:length]
        torch.testing.assert_close(ours, rows, rtol=tolerance, atol=tolerance)
        assert sequence.tokens[length:] == expected[length - 1 : -1].argmax(-1).tolist()
    return decoder
