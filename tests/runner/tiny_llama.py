"""A tiny Llama with random weights, and a memory plan for it."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import streamserve_kernels
from streamserve.models import Decoder, kv_bytes_per_block, load_config
from streamserve.models.checkpoint import RandomSource
from streamserve.models.weights import build_weights
from streamserve.runner.memory import AvailableMemory, MemoryPlan, plan_memory

CPU = torch.device("cpu")
VOCAB = 211
MAX_LEN = 128
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LEN,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def tiny_llama(
    directory: Path,
    *,
    backend: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    **changes,
) -> Decoder:
    """Weights wide enough that two float32 orders of summation agree on the arg-max."""
    (directory / "config.json").write_text(json.dumps({**SHAPE, **changes}))
    config = load_config(directory)
    kernels = streamserve_kernels.load(device, backend)
    source = RandomSource(seed=5, std=0.2)
    weights = build_weights(config.spec, source, kernels, dtype, device, None)
    return Decoder(
        config.spec,
        weights,
        kernels,
        dtype=dtype,
        device=device,
        max_model_len=config.max_position_embeddings,
    )


def memory_for(
    model: Decoder,
    *,
    num_blocks: int,
    block_size: int = 4,
    max_model_len: int = MAX_LEN,
    max_num_seqs: int = 8,
) -> MemoryPlan:
    per_block = kv_bytes_per_block(model.spec, block_size, model.dtype)
    return plan_memory(
        available=AvailableMemory(2**40, "a test"),
        weight_bytes=model.nbytes,
        step_buffer_bytes=0,
        kv_bytes_per_block=per_block,
        block_size=block_size,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        kv_cache_memory=num_blocks * per_block,
    )
