"""A ``config.json`` need not say everything: what it leaves out is what transformers takes."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import transformers

from streamserve.errors import ModelLoadError, UnsupportedModelError
from streamserve.models.families import FAMILIES, Family
from streamserve.models.hf_config import HfConfig

THEIRS = {
    name: transformers.CONFIG_MAPPING[family.model_type]
    for name, family in FAMILIES.items()
    if family.model_type in transformers.CONFIG_MAPPING
}
# What transformers takes is the stretch of the published models, which say it themselves.
NOT_TAKEN = {("GptOssForCausalLM", "rope_parameters")}

# Without these their defaults are no model that could be.
STATED = {
    "Glm4MoeForCausalLM": {"head_dim": 128},
    "DeepseekV2ForCausalLM": {"num_experts_per_tok": 6},
    "Dots1ForCausalLM": {"n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 2},
}


def read(family: Family, values: dict[str, Any]) -> tuple[Any, int]:
    config = HfConfig(values, "config.json")
    return family.spec(config), family.max_positions(config)


@pytest.mark.parametrize("name", THEIRS)
def test_each_value_may_be_left_out(name):
    family, whole = FAMILIES[name], THEIRS[name](**STATED.get(name, {})).to_dict()
    expected = read(family, whole)
    num_taken = 0
    for left_out in whole:
        rest = {key: value for key, value in whole.items() if key != left_out}
        with suppress(ModelLoadError):  # it is asked for
            assert read(family, rest) == expected or (name, left_out) in NOT_TAKEN, left_out
            num_taken += 1
    assert num_taken > 5


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Qwen2ForCausalLM", {"use_sliding_window": True, "max_window_layers": 2}),
        ("Qwen2ForCausalLM", {"use_sliding_window": False, "max_window_layers": 2}),
        ("Qwen3ForCausalLM", {"use_sliding_window": True, "max_window_layers": 0}),
        ("SmolLM3ForCausalLM", {"use_sliding_window": True}),
        ("Gemma2ForCausalLM", {}),
        ("Gemma3ForCausalLM", {"sliding_window_pattern": 3}),
        ("GptOssForCausalLM", {}),
        ("Cohere2ForCausalLM", {}),
        ("Cohere2ForCausalLM", {"sliding_window_pattern": 3}),
        ("Exaone4ForCausalLM", {"sliding_window_pattern": 3}),
        ("Olmo3ForCausalLM", {}),
    ],
)
def test_layers_that_no_config_lists_have_the_windows_of_transformers(name, settings):
    config = THEIRS[name](num_hidden_layers=6, sliding_window=16, **settings)
    values = {**config.to_dict(), **settings, "sliding_window": 16}  # as older ones have it
    kinds = values.pop("layer_types")
    spec, _ = read(FAMILIES[name], values)
    windows = [layer.attention.window for layer in spec.layers]
    assert windows == [16 if kind == "sliding_attention" else None for kind in kinds]
    assert spec.layers == read(FAMILIES[name], {**values, "layer_types": kinds})[0].layers


def test_the_heads_of_qwen_3_have_a_size_of_their_own():
    values = THEIRS["Qwen3ForCausalLM"](hidden_size=64, num_attention_heads=4).to_dict()
    assert values.pop("head_dim") == 128
    spec, _ = read(FAMILIES["Qwen3ForCausalLM"], values)
    assert spec.layers[0].attention.query_key_head_size == 128


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_layer_norm_before": False}, "do_layer_norm_before false"),
        ({"word_embed_proj_dim": 512}, "word_embed_proj_dim 512 must be hidden_size 768"),
    ],
)
def test_what_opt_350m_has_is_refused_by_name(settings, message):
    values = {**THEIRS["OPTForCausalLM"]().to_dict(), **settings}
    with pytest.raises(UnsupportedModelError, match=message):
        read(FAMILIES["OPTForCausalLM"], values)


def test_what_hunyuan_calls_dynamic_is_a_larger_base():
    values = THEIRS["HunYuanDenseV1ForCausalLM"](head_dim=128).to_dict()
    values.pop("rope_parameters")
    scaling = {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}
    spec, _ = read(FAMILIES["HunYuanDenseV1ForCausalLM"], {**values, "rope_scaling": scaling})
    rope = spec.layers[0].attention.rope
    assert rope.scaling is None
    assert rope.base == pytest.approx(11_158_839.925)  # as llama.cpp's converter has it
