"""Models whose layers keep a state of constant size, judged by transformers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import streamserve_kernels
from streamserve.errors import ModelLoadError, UnsupportedModelError
from streamserve.models import (
    Decoder,
    allocate_kv_cache,
    block_caches,
    kv_bytes_per_block,
    load_config,
    load_model,
    state_bytes,
    state_caches,
)
from streamserve.models.families import FAMILIES
from streamserve.models.hf_config import HfConfig
from streamserve_kernels import QuantLinear
from streamserve_kernels.native.library import why_not
from tests.models.native import HYBRID
from tests.models.packers import edit_config
from tests.models.paged import PagedHarness, Sequence
from tests.models.parity import (
    STATES_TOLERANCE,
    assert_equals_judge,
    assert_unasked_rows_change_nothing,
    prompts,
)
from tests.models.random_model import random_model

CPU = torch.device("cpu")


def load(directory: Path, backend: str = "naive", dtype=torch.float32, **options) -> Decoder:
    kernels = streamserve_kernels.load(CPU, backend)
    return load_model(directory, dtype=dtype, device=CPU, kernels=kernels, **options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[[str], tuple[transformers.PreTrainedModel, Path]]:
    """A case's name -> the judge, and the directory that it saved."""
    made = {}

    def saved(name: str):
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            made[name] = random_model(HYBRID[name]()), directory
            made[name][0].save_pretrained(directory)
        return made[name]

    return saved


@pytest.mark.parametrize("backend", ["naive", "cpu"])
@pytest.mark.parametrize("name", HYBRID)
def test_logits_and_greedy_tokens_are_the_judges(name, backend, saved):
    """In chunks, beside others, and from states that were kept where prompts part."""
    judge, directory = saved(name)
    decoder = load(directory, backend)
    assert_equals_judge(judge, decoder, chunk=5, prefix_hit=True, tolerance=STATES_TOLERANCE)


@pytest.mark.parametrize("name", HYBRID)
def test_rows_that_nobody_asked_for_change_nothing(name, saved):
    assert_unasked_rows_change_nothing(load(saved(name)[1]))


def test_a_thin_copy_writes_only_its_own_layers_states(saved):
    decoder = load(saved("qwen3.5")[1])
    thin, harness = decoder.one_of_each_layer(), PagedHarness(decoder)
    before = [[cache.clone() for cache in pair] for pair in harness.caches]
    with torch.inference_mode():
        thin.forward(harness.batch([(Sequence([5, 6, 7]), 3)]), harness.caches)
    written = [
        [not torch.equal(*both) for both in zip(*pairs, strict=True)]
        for pairs in zip(harness.caches, before, strict=True)
    ]
    # Layers of a delta net alone; the last attends.
    assert written == [[True, True], [False, False], [False, False], [True, True]]


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_a_crowd_in_bfloat16_stays_near_each_alone(saved):
    decoder = load(saved("qwen3.5")[1], "native", torch.bfloat16)
    sequences = [Sequence(tokens) for tokens in prompts(shared=0)]
    crowd = PagedHarness(decoder, block_size=16).prefill(sequences, 7)
    alone = [
        PagedHarness(decoder, block_size=16).prefill([Sequence(s.tokens)], None)[0]
        for s in sequences
    ]
    # Logits reach 7.
    assert max((one - other).abs().max() for one, other in zip(alone, crowd, strict=True)) < 0.5


def test_states_are_held_and_planned_by_layer(saved):
    spec = load_config(saved("qwen3.5")[1]).spec
    naive = streamserve_kernels.load(CPU, "naive")
    caches = allocate_kv_cache(
        spec, 6, 4, torch.float8_e4m3fn, CPU, naive, num_state_slots=5, state_dtype=torch.bfloat16
    )
    conv, matrices = state_caches(spec, caches)[:2]
    # 3 key and 3 value heads; a convolution over 3 tokens.
    assert (conv.shape, conv.dtype) == ((5, 2, 2 * 3 * 8 + 3 * 12), torch.bfloat16)
    assert (matrices.shape, matrices.dtype) == ((5, 3, 8, 12), torch.float32)
    assert [c.dtype for c in block_caches(caches, state_caches(spec, caches))] == [
        torch.float8_e4m3fn
    ] * 2
    assert sum(cache.nbytes for cache in state_caches(spec, caches)) == 5 * state_bytes(
        spec, torch.bfloat16
    )
    blocks = sum(cache.nbytes for cache in block_caches(caches, state_caches(spec, caches)))
    assert blocks == 6 * kv_bytes_per_block(spec, 4, torch.float8_e4m3fn)
    attention = replace(spec, layers=spec.layers[-1:])
    assert state_bytes(attention, torch.bfloat16) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_weights_are_counted_before_they_are_there(saved, dtype, quantization):
    directory = saved("qwen3-next")[1]
    planned = load_config(directory).weight_bytes(dtype, quantization)
    assert 0.75 * planned <= load(directory, dtype=dtype, quantization=quantization).nbytes
    assert load(directory, dtype=dtype, quantization=quantization).nbytes <= planned


def test_gates_are_not_quantised_and_what_weighs_memory_is_in_float32(saved):
    decoder = load(saved("qwen3.5")[1], dtype=torch.bfloat16, quantization="int8")
    layer = decoder._weights.layers[0]
    held = {name for name, linear in layer.linears.items() if isinstance(linear, QuantLinear)}
    assert held == layer.linears.keys() - {"layers.delta.gates"}
    assert held >= {"layers.delta.qkvz", "layers.delta.output"}
    stored = load_file(saved("qwen3.5")[1] / "model.safetensors")
    expected = -stored["model.layers.0.linear_attn.A_log"].exp()
    torch.testing.assert_close(layer.tensors["layers.delta.decay"], expected)
    bias = layer.tensors["layers.delta.time_bias"]
    assert torch.equal(bias, stored["model.layers.0.linear_attn.dt_bias"])


def test_dummy_weights_run(saved):
    decoder = load(saved("qwen3.5-moe")[1], load_format="dummy")
    logits = PagedHarness(decoder).prefill([Sequence([3, 1, 4, 1])], 2)[0]
    assert logits.isfinite().all()
    assert logits.std() > 0


def test_other_parts_of_a_whole_checkpoint_are_left_out(saved, tmp_path):
    judge, directory = saved("qwen3.5")
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    tensors = {
        name.replace("model.", "model.language_model.", 1): tensor  # as in a whole checkpoint
        for name, tensor in load_file(directory / "model.safetensors").items()
    }
    more = {"mtp.fc.weight": torch.ones(3, 3), "mtp.layers.0.input_layernorm.weight": torch.ones(3)}
    more["model.visual.merger.norm.weight"] = torch.ones(3)
    save_file({**tensors, **more}, tmp_path / "model.safetensors")
    logits = PagedHarness(load(tmp_path)).prefill([Sequence([5, 6, 7])], None)[0]
    with torch.inference_mode():
        expected = judge(torch.tensor([[5, 6, 7]])).logits[0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "tensor", "shape", "wanted"),
    [
        ("qwen3.5", "linear_attn.conv1d.weight", (84, 3), "[84, 1, 3]"),
        ("qwen3.5", "linear_attn.in_proj_qkv.weight", (80, 32), "[84, 32]"),
        ("qwen3-next", "linear_attn.in_proj_qkvz.weight", (84, 32), "[128, 32]"),
        ("qwen3-next", "linear_attn.A_log", (3,), "[4]"),
    ],
)
def test_a_tensor_of_another_shape_is_named(name, tensor, shape, wanted, saved, tmp_path):
    directory = saved(name)[1]
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    tensors = load_file(directory / "model.safetensors")
    full = f"model.layers.0.{tensor}"
    save_file({**tensors, full: torch.zeros(shape)}, tmp_path / "model.safetensors")
    asked = f"tensor {full} has shape {[*shape]}; the config asks for {wanted}"
    with pytest.raises(ModelLoadError, match=re.escape(asked)):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("qwen3.5", {"linear_num_value_heads": 5}, "5 value heads cannot share 3 key heads evenly"),
        ("qwen3.5", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported for this archi"),
        ("qwen3.5", {"layer_types": ["mamba"] * 4}, "layer type 'mamba' is not supported; these"),
        ("qwen3.5", {"layer_types": ["linear_attention"] * 4}, "no layer attends is not supported"),
        ("qwen3.5", {"layer_types": ["full_attention"]}, "layer_types must list 4 layers"),
        ("qwen3.5", {"linear_conv_kernel_dim": 1}, "kernel_dim must be an integer of at least 2"),
        ("granite-4", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported for this archi"),
        ("granite-4", {"layer_types": None}, "no layer attends is not supported"),
        ("granite-4", {"mamba_n_groups": 3}, "4 heads of a state space cannot share 3 groups"),
        ("granite-4", {"time_step_limit": [0.0, 1.0]}, "time_step_limit must be [0, infinity]"),
        ("granite-4", {"position_embedding_type": "alibi"}, "these are: rope, nope"),
        ("nemotron-h-moe", {"moe_latent_size": 8}, "moe_latent_size 8 is not supported"),
        ("nemotron-h", {"mlp_hidden_act": "tanh"}, "mlp_hidden_act 'tanh' is not supported"),
        ("falcon-h1", {"mamba_proj_bias": True}, "mamba_proj_bias true is not supported"),
        ("falcon-h1", {"mamba_rms_norm": True}, "norm_before_gate true is not supported"),
        ("falcon-h1", {"attention_bias": True}, "attention_in_multiplier 0.8 is not supported"),
        ("falcon-h1", {"ssm_multipliers": [1.0]}, "ssm_multipliers must list 5 numbers"),
    ],
)
def test_configs_that_do_not_fit_are_refused(name, values, message, saved, tmp_path):
    (tmp_path / "config.json").write_bytes((saved(name)[1] / "config.json").read_bytes())
    edit_config(tmp_path, **values)
    with pytest.raises((ModelLoadError, UnsupportedModelError), match=re.escape(message)):
        load_config(tmp_path)


# hidden size, layers, heads, kv heads, intermediate size, value heads of a delta net
PUBLISHED = {
    "2B": (2048, 24, 8, 2, 6144, 16),
    "4B": (2560, 32, 16, 4, 9216, 32),
    "27B": (5120, 64, 24, 4, 17_408, 48),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_as_they_are_published(name):
    hidden, layers, heads, kv_heads, inner, value_heads = PUBLISHED[name]
    values = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "linear_num_value_heads": value_heads,
        "vocab_size": 248_320,
    }
    spec = FAMILIES["Qwen3_5ForCausalLM"].spec(HfConfig(values))
    assert len(spec.attentions()) == layers // 4
    assert spec.caches()[3] == spec.attentions()[0]
    assert spec.attentions()[0].rope.rotary_dim == 64
    matrices = value_heads * 128 * 128 * 4
    conv = 3 * (2 * 2048 + value_heads * 128) * 2
    assert state_bytes(spec, torch.bfloat16) == layers * 3 // 4 * (matrices + conv)
