"""A tiny Llama with random weights, and a memory plan for it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch

import streamserve_kernels
from streamserve.core.plan import ModelRunner
from streamserve.models import AdapterTables, Decoder, kv_bytes_per_block, load_config
from streamserve.models.checkpoint import RandomSource
from streamserve.models.weights import build_weights
from streamserve.runner.build import build_runner, new_kv_cache
from streamserve.runner.cuda.build import build_cuda_runner
from streamserve.runner.cuda.step_key import StepLadder
from streamserve.runner.kv_transfer import KVTransfer
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
    num_adapters: int = 0,
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
        adapters=random_adapters(config, kernels, dtype, device, num_adapters),
    )


def random_adapters(config, kernels, dtype, device, num_adapters: int) -> AdapterTables | None:
    """Beside every linear layer, the same whatever the backend and the device."""
    if not num_adapters:
        return None
    names = config.family.weight_names(config.spec)
    sizes = {"num_slots": num_adapters, "max_rank": 3}
    adapters = AdapterTables(config.spec, names, kernels, dtype=dtype, device=device, **sizes)
    random = torch.Generator().manual_seed(6)
    for table in adapters._tables.values():
        for slot in range(num_adapters):
            a = torch.randn(3, table.in_features, generator=random)
            table.set(slot, a / 8, torch.randn(table.out_features, 3, generator=random) / 4)
    return adapters


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


def runner_of(
    model: Decoder,
    memory: MemoryPlan,
    max_num_batched_tokens: int,
    num_host_blocks: int,
    *,
    on_device: bool,
    num_drafts: int = 0,
) -> ModelRunner:
    """A runner with a host tier: as on the host, or as for a device."""
    caches = new_kv_cache(model.spec, memory, model.dtype, model.device, model.kernels)
    row_bytes = sum(cache[0].nbytes for pair in caches for cache in pair)
    max_num_sampled = memory.max_num_seqs * (1 + num_drafts)
    builder = partial(build_runner, max_num_sampled=max_num_sampled)
    if on_device:
        ladder = StepLadder(
            max_num_batched_tokens,
            memory.max_num_seqs,
            num_drafts=num_drafts,
            max_num_sampled=max_num_sampled,
        )
        builder = partial(build_cuda_runner, ladder=ladder)
    return builder(
        model,
        memory,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_caches=caches,
        transfer=KVTransfer(caches, num_host_blocks, staging_bytes=4 * row_bytes),
    )[0]
