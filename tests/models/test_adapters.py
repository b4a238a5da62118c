"""Adapters that PEFT saved, against what PEFT makes of the model when it merges them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import streamserve_kernels
from streamserve.config import AdapterConfig
from streamserve.errors import AdapterError
from streamserve.models import Decoder, load_model
from streamserve.models.adapters import adapter_bytes
from streamserve_kernels.adapters import AdapterRows, StepAdapters
from streamserve_kernels.native.library import why_not
from tests.models.native import (
    BASE,
    DELTA,
    DELTA_EXPERTS,
    ENDS,
    GEMMA4,
    GPT2,
    GQA,
    LFM2,
    NATIVE,
    PHI3,
)
from tests.models.paged import PagedHarness, Sequence

CPU = torch.device("cpu")
CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "q, k, v apart": lambda: transformers.LlamaConfig(**GQA),
    "biases": lambda: transformers.Qwen2Config(**GQA),
    "q, k, v stacked": lambda: transformers.Phi3Config(**PHI3),
    "q, k, v by group": lambda: transformers.GPTNeoXConfig(**BASE),
    "transposed": lambda: transformers.GPT2Config(**GPT2, **ENDS),
    "q, k, v, z apart": lambda: transformers.Qwen3_5TextConfig(**DELTA),
    "short convolutions": lambda: transformers.Lfm2Config(**LFM2, full_attn_idxs=[1]),
    "values that are keys": lambda: transformers.Gemma4TextConfig(
        **GEMMA4, attention_k_eq_v=True, hidden_size_per_layer_input=0
    ),
    "a plain MLP": lambda: transformers.PhiConfig(**BASE),
}
TOKENS = [5, 11, 3, 42, 7, 19, 23]


def save_adapter(model, directory: Path, **settings) -> None:
    """PEFT's own directory of an adapter with random matrices."""
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", init_lora_weights=False, **{"r": 4, "lora_alpha": 6, **settings}
    )
    torch.manual_seed(settings.get("r", 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of GPT-2's layers; and what transformers gives up
        adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(directory)
    adapted.unload()


def merged_model(model, directory: Path) -> transformers.PreTrainedModel:
    """A copy of the model with the adapter merged into its weights by PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks what transformers gives up
        return peft.PeftModel.from_pretrained(deepcopy(model), directory).merge_and_unload()


def merged_logits(model, directory: Path, token_ids: list[int]) -> torch.Tensor:
    """[T, V]"""
    with torch.no_grad():
        return merged_model(model, directory)(torch.tensor([token_ids])).logits[0]


def load(directory: Path, kernels, dtype=torch.float32, **places) -> Decoder:
    adapters = AdapterConfig(**{"num_adapters": 3, "max_rank": 8, **places})
    return load_model(directory, dtype=dtype, device=CPU, kernels=kernels, adapters=adapters)


def with_adapters(batch, slots: list[int]):
    """A batch whose tokens have these slots."""
    tokens = np.array(slots, dtype=np.int32)
    logits = tokens[batch.logits_indices.numpy()]
    return replace(
        batch, adapters=StepAdapters(*(AdapterRows.of(s, CPU) for s in (tokens, logits)))
    )


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_are_those_of_the_merged_model(kind, checkpoint, kernels, tmp_path):
    directory, model = checkpoint(CONFIGS[kind]())
    save_adapter(model, tmp_path / "adapter", target_modules="all-linear")
    decoder = load(directory, kernels)
    assert decoder.adapters is not None
    decoder.adapters.load(1, tmp_path / "adapter")
    harness = PagedHarness(decoder)
    batch = harness.batch([(Sequence(TOKENS), len(TOKENS))], all_rows=True)
    plain = decoder.forward(batch, harness.caches)
    adapted = decoder.forward(with_adapters(batch, [1] * len(TOKENS)), harness.caches)
    expected = merged_logits(model, tmp_path / "adapter", TOKENS)
    torch.testing.assert_close(adapted, expected, rtol=1e-4, atol=1e-4)
    assert (plain - expected).abs().max() > 0.1
    decoder.adapters.clear(1)
    empty = decoder.forward(with_adapters(batch, [1] * len(TOKENS)), harness.caches)
    assert torch.equal(empty, plain)


def test_queries_alone_have_adapters_and_gates_of_parts(checkpoint, kernels, tmp_path):
    directory, model = checkpoint(NATIVE["gemma4-per-layer"]())
    targets = ["q_proj", "down_proj", "per_layer_input_gate"]
    save_adapter(model, tmp_path / "adapter", target_modules=targets)
    decoder = load(directory, kernels)
    decoder.adapters.load(0, tmp_path / "adapter")
    harness = PagedHarness(decoder)
    batch = harness.batch([(Sequence(TOKENS), len(TOKENS))], all_rows=True)
    adapted = decoder.forward(with_adapters(batch, [0] * len(TOKENS)), harness.caches)
    expected = merged_logits(model, tmp_path / "adapter", TOKENS)
    torch.testing.assert_close(adapted, expected, rtol=1e-4, atol=1e-4)


def test_rows_by_key_head_are_put_in_order(checkpoint, kernels, tmp_path):
    config = transformers.Qwen3NextConfig(**DELTA, **DELTA_EXPERTS)
    directory, model = checkpoint(config)
    save_adapter(
        model,
        tmp_path / "adapter",
        target_modules=["in_proj_qkvz", "in_proj_ba", "out_proj", "q_proj"],
    )
    decoder = load(directory, kernels)
    decoder.adapters.load(0, tmp_path / "adapter")
    harness = PagedHarness(decoder)
    batch = harness.batch([(Sequence(TOKENS), len(TOKENS))], all_rows=True)
    adapted = decoder.forward(with_adapters(batch, [0] * len(TOKENS)), harness.caches)
    expected = merged_logits(model, tmp_path / "adapter", TOKENS)
    torch.testing.assert_close(adapted, expected, rtol=1e-4, atol=1e-4)


def test_ranks_and_scales_follow_their_patterns(checkpoint, kernels, tmp_path):
    directory, model = checkpoint(CONFIGS["q, k, v apart"]())
    save_adapter(
        model,
        tmp_path / "adapter",
        target_modules=["q_proj", "v_proj", "down_proj"],
        use_rslora=True,
        rank_pattern={"v_proj|model.layers.1": 7, r"layers\.1\.mlp\.down_proj": 2},
        alpha_pattern={"layers.0.self_attn.q_proj": 32},
    )
    decoder = load(directory, kernels)
    decoder.adapters.load(0, tmp_path / "adapter")
    harness = PagedHarness(decoder)
    batch = harness.batch([(Sequence(TOKENS), len(TOKENS))], all_rows=True)
    adapted = decoder.forward(with_adapters(batch, [0] * len(TOKENS)), harness.caches)
    expected = merged_logits(model, tmp_path / "adapter", TOKENS)
    torch.testing.assert_close(adapted, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_a_recorded_step_has_adapters_too(tiny_llama, checkpoint, tmp_path):
    config = tiny_llama(hidden_size=64, num_attention_heads=4)
    directory, model = checkpoint(config)
    for slot, rank in enumerate((4, 3)):
        save_adapter(model, tmp_path / str(slot), target_modules="all-linear", r=rank)
    decoders = []
    for _ in range(2):
        decoder = load(directory, streamserve_kernels.load("cpu", "native"), torch.bfloat16)
        for slot in range(2):
            decoder.adapters.load(slot, tmp_path / str(slot))
        decoders.append(decoder)
    recorded, plain = (PagedHarness(decoder, block_size=16) for decoder in decoders)
    assert decoders[0].record(recorded.caches, max_tokens=32, max_logits=8) == 32
    lengths = {-1: 9, 0: 5, 1: 6}
    sequences = [
        {slot: Sequence([(7 * i + slot) % 97 for i in range(n)]) for slot, n in lengths.items()}
        for _ in range(2)
    ]
    # Nobody is done; all are but one; a decode.
    for counts in ({0: 2, 1: 3}, {-1: 9, 0: 3, 1: 2}, {1: 1}):
        slots = [slot for slot, n in counts.items() for _ in range(n)]
        outputs = []
        for harness, mine in zip((recorded, plain), sequences, strict=True):
            work = [(mine[slot], n) for slot, n in counts.items()]
            batch = with_adapters(harness.batch(work), slots)
            # A recorded head does not round its logits.
            outputs.append(harness.decoder.forward(batch, harness.caches).bfloat16())
            for sequence, n in work:
                sequence.num_computed += n
        assert torch.equal(*outputs)


BROKEN = {
    "no LoRA": ({"peft_type": "IA3"}, {}, "peft_type 'IA3'"),
    "DoRA": ({"use_dora": True}, {}, "use_dora True is not supported"),
    "biases": ({"bias": "all"}, {}, "bias 'all' is not supported"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save"),
    "another rank": ({"r": 5}, {}, "has rank 4, not 5"),
    "no rank": ({"r": "many"}, {}, "r 'many'"),
    "half a pair": ({}, {"layers.0.self_attn.q_proj.lora_A": None}, "lacks its lora_A"),
    "another shape": ({}, {"layers.1.mlp.up_proj.lora_A": (4, 7)}, r"shape \[4, 7\]"),
    "a head": ({}, {"lm_head.lora_A": (4, 32), "lm_head.lora_B": (97, 4)}, "the head do not"),
    "no pair at all": ({}, {"model.embed_tokens.lora_embedding_A": (4, 97)}, "lora_embedding_A"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_does_not_fit_is_refused_by_name(what, tiny_llama, checkpoint, kernels, tmp_path):
    settings, tensors, message = BROKEN[what]
    directory, model = checkpoint(tiny_llama())
    adapter = tmp_path / "adapter"
    save_adapter(model, adapter, target_modules=["q_proj", "up_proj"])
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    weights = load_file(adapter / "adapter_model.safetensors")
    for end, shape in tensors.items():
        prefix = "" if end.startswith(("model.", "lm_head")) else "model."
        name = f"base_model.model.{prefix}{end}.weight"
        weights.pop(name, None)
        if shape is not None:
            weights[name] = torch.zeros(shape)
    save_file(weights, adapter / "adapter_model.safetensors")
    decoder = load(directory, kernels)
    with pytest.raises(AdapterError, match=message):
        decoder.adapters.load(0, adapter)
    tables = decoder.adapters._tables.values()
    assert not any(entry for table in tables for entry in table.entries)


@pytest.mark.parametrize("way", ["without the prefix of names", "as torch pickles them"])
def test_an_adapter_may_be_written_in_other_ways(way, checkpoint, kernels, tmp_path):
    directory, model = checkpoint(CONFIGS["transposed"]())
    save_adapter(model, tmp_path, target_modules=["c_attn"])
    decoder = load(directory, kernels)
    decoder.adapters.load(0, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors = {name.replace(".lora_A.", ".lora_A.default."): t for name, t in tensors.items()}
    if way == "as torch pickles them":
        (tmp_path / "adapter_model.safetensors").unlink()
        torch.save(tensors, tmp_path / "adapter_model.bin")
    else:
        short = {name.replace(".transformer.", "."): tensor for name, tensor in tensors.items()}
        save_file(short, tmp_path / "adapter_model.safetensors")
    decoder.adapters.load(1, tmp_path)
    for (_, name), table in decoder.adapters._tables.items():
        first, second = table.entries[:2]
        assert (first is not None) is (name == "layers.qkv")
        assert first is None or all(map(torch.equal, first, second))
    tables = decoder.adapters._tables.values()
    num_elements = sum(t.max_rank * (t.in_features + t.out_features) for t in tables)
    assert adapter_bytes(decoder.spec, torch.float32, 3, 8) == 3 * 4 * num_elements


def test_ranks_have_a_limit_and_directories_must_hold_one(
    tiny_llama, checkpoint, kernels, tmp_path
):
    directory, model = checkpoint(tiny_llama())
    save_adapter(model, tmp_path / "adapter", target_modules=["q_proj"], r=5)
    decoder = load(directory, kernels, max_rank=4)
    with pytest.raises(AdapterError, match="rank 5 is above --max-lora-rank 4"):
        decoder.adapters.load(0, tmp_path / "adapter")
    load(directory, kernels, max_rank=5).adapters.load(0, tmp_path / "adapter")
    with pytest.raises(AdapterError, match="holds no adapter"):
        decoder.adapters.load(0, tmp_path)
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match="looked for adapter_model"):
        decoder.adapters.load(0, tmp_path / "adapter")
