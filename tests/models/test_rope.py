"""Rotary frequencies against transformers' own, and what a config may say about them."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from streamserve.errors import ModelLoadError, UnsupportedModelError
from streamserve.models.hf_config import HfConfig
from streamserve.models.rope import alibi_slopes, cos_sin_table, inverse_frequencies
from streamserve.models.spec import RopeScaling, RopeSpec

CPU = torch.device("cpu")
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn-betas": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn-mscale": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.5},
    "yarn-attention-factor": {**YARN, "attention_factor": 1.25},
    "yarn-untruncated": {**YARN, "truncate": False},
}


def hf_llama(scaling: dict | None, theta: float = 500_000.0) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        hidden_size=512,
        num_attention_heads=4,
        max_position_embeddings=131_072,
        rope_parameters={"rope_theta": theta, **(scaling or {"rope_type": "default"})},
    )


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_equal_transformers(name):
    config = hf_llama(SCALINGS[name])
    expected, attention_factor = ROPE_INIT_FUNCTIONS[SCALINGS[name]["rope_type"]](config)
    rope = HfConfig(config.to_dict()).rope(128)
    torch.testing.assert_close(inverse_frequencies(rope, 1024), expected, rtol=1e-6, atol=0)
    assert rope.scaling.attention_factor == pytest.approx(attention_factor)
    table = cos_sin_table(rope, 50, CPU)
    angles = torch.arange(50)[:, None] * expected
    torch.testing.assert_close(table[:, :64], angles.cos() * attention_factor)
    torch.testing.assert_close(table[:, 64:], angles.sin() * attention_factor)


@pytest.mark.parametrize("max_length", [1024, 131_072, 200_000, 262_144])
def test_dynamic_scaling_is_fixed_for_the_longest_length_served(max_length):
    """Where transformers would end up after a sequence of that length; plain up to the trained."""
    config = hf_llama({"rope_type": "dynamic", "factor": 2.0}, theta=10_000.0)
    expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, seq_len=max_length)
    rope = HfConfig(config.to_dict()).rope(128)
    torch.testing.assert_close(inverse_frequencies(rope, max_length), expected, rtol=1e-6, atol=0)
    plain = inverse_frequencies(RopeSpec(10_000.0, 128), max_length)
    assert torch.equal(inverse_frequencies(rope, max_length), plain) == (max_length <= 131_072)


@pytest.mark.parametrize(("max_length", "seq_len"), [(4096, 4096), (4097, 5000)])
def test_longrope_takes_the_factors_of_the_longest_length_served(max_length, seq_len):
    scaling = {
        "short_factor": [1.0 + i / 100 for i in range(24)],
        "long_factor": [1.0 + i for i in range(24)],
    }
    config = transformers.Phi3Config(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=131_072,
        original_max_position_embeddings=4096,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.75,
            **scaling,
        },
    )
    expected, attention_factor = ROPE_INIT_FUNCTIONS["longrope"](config, seq_len=seq_len)
    old = {
        "max_position_embeddings": 131_072,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {"type": "su", **scaling},
    }
    for values in (config.to_dict(), old):
        rope = HfConfig(values).rope(64)
        torch.testing.assert_close(inverse_frequencies(rope, max_length), expected)
        assert rope.scaling.attention_factor == pytest.approx(attention_factor)


def test_layers_of_two_kinds_have_settings_of_their_own_in_either_generation():
    """As Gemma 3 writes them: the stretching is for the layers without a window."""
    new = {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        }
    }
    old = {
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    for values in (new, old):
        config = HfConfig({"max_position_embeddings": 131_072, **values})
        local = config.rope(
            64, layer_type="sliding_attention", theta_names=("rope_local_base_freq",)
        )
        assert local == RopeSpec(1e4, 64)
        everywhere = config.rope(64, layer_type="full_attention")
        assert everywhere.base == 1e6
        assert everywhere.scaling == RopeScaling("linear", 8.0, 131_072)


@pytest.mark.parametrize("scaling", [None, *SCALINGS.values()], ids=["default", *SCALINGS])
def test_both_generations_of_config_say_the_same(scaling):
    new = HfConfig(
        {
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_theta": 7e5, "partial_rotary_factor": 0.5, **(scaling or {})},
        }
    )
    old_scaling = None
    if scaling is not None:
        old_scaling = {key: value for key, value in scaling.items() if key != "rope_type"}
        old_scaling["type"] = scaling["rope_type"]
    old = HfConfig(
        {
            "max_position_embeddings": 4096,
            "rope_theta": 7e5,
            "partial_rotary_factor": 0.5,
            "rope_scaling": old_scaling,
        }
    )
    assert new.rope(64) == old.rope(64)
    assert new.rope(64).rotary_dim == 32


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"rope_scaling": {"type": "ntk"}}, UnsupportedModelError, "'ntk'.*yarn, longrope"),
        (
            {"rope_scaling": {"type": "su", "factor": 4, "short_factor": [1.0], "long_factor": 2}},
            ModelLoadError,
            r"short_factor must list 32 numbers, got \[1.0\]",
        ),
        ({"rope_scaling": {"type": "linear"}}, ModelLoadError, "needs factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, ModelLoadError, "positive, got 0"),
        ({"rope_theta": "big"}, ModelLoadError, "rope_theta must be a number, got 'big'"),
        ({"partial_rotary_factor": 0.01}, UnsupportedModelError, "0 rotated elements"),
        ({"partial_rotary_factor": 0.05}, UnsupportedModelError, "3 rotated elements"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
            UnsupportedModelError,
            "differs by layer type",
        ),
    ],
)
def test_unknown_rope_settings_are_refused_by_name(values, error, message):
    with pytest.raises(error, match=message):
        HfConfig(values).rope(64)


@pytest.mark.parametrize(
    ("values", "same"),
    [
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, {}),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 0, "beta_slow": 0}},
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 32, "beta_slow": 1}},
        ),
    ],
)
def test_settings_that_say_nothing(values, same):
    assert HfConfig(values).rope(64) == HfConfig(same).rope(64)


def test_alibi_slopes_equal_those_of_the_paper():
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    bloom = transformers.models.bloom.modeling_bloom.build_alibi_tensor(
        torch.ones(1, 2), 12, torch.float32
    )
    torch.testing.assert_close(torch.tensor(alibi_slopes(12)), bloom[:, 0, 1])
