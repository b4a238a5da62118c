"""A GGUF file's values in the words of ``config.json``, where files of different ages differ."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from streamserve.errors import UnsupportedModelError
from streamserve.models.gguf.architecture import rotary_factor
from streamserve.models.gguf.architectures import _chatglm, _gemma3, _gemma_scale, _gptneox
from streamserve.models.gguf.container import GgufFile
from streamserve.models.gguf.metadata import Metadata
from streamserve.models.gguf.mixtures import (
    _deepseek,
    _glm4_moe,
    _gpt_oss,
    experts,
    require_sigmoid,
    weights_scale,
)
from streamserve.models.gguf.reading import Reading
from streamserve.models.gguf.rope_scaling import rope_scaling

PATH = Path("m.gguf")


def reading(*tensors: str, **values) -> Reading:
    """Of a file that holds these tensors and values."""
    named = {f"llama.{name.replace('__', '.')}": value for name, value in values.items()}
    metadata = Metadata({"general.architecture": "llama", **named}, PATH)
    return Reading(GgufFile(PATH, metadata, {name: SimpleNamespace() for name in tensors}))


MOE = {"block_count": 3, "expert_count": 8, "expert_used_count": 2}


@pytest.mark.parametrize(
    ("tensors", "values", "name", "expected"),
    [
        ((), {"expert_feed_forward_length": 24}, "moe_intermediate_size", 24),
        ((), {"feed_forward_length": 48}, "moe_intermediate_size", 24),  # of all that are used
        ((), {"feed_forward_length": 48}, "norm_topk_prob", True),
        ((), {"feed_forward_length": 48, "expert_weights_norm": False}, "norm_topk_prob", False),
        (("blk.0.ffn_up.weight",), {"feed_forward_length": 48}, "mlp_only_layers", [0]),
    ],
)
def testexperts(tensors, values, name, expected):
    found = experts(reading(*tensors, **MOE, **values), renormalise=True)
    assert found[name] == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, None),
        ({"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, None),
        ({"rope__scaling__type": "linear", "rope__scaling__factor": 1.0}, None),
        ({"rope__scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"rope__scaling__type": "linear", "rope__scaling__factor": 2.0},
            {"rope_type": "linear", "factor": 2.0},
        ),
    ],
)
def testrope_scaling(values, expected):
    assert rope_scaling(reading(context_length=64, **values)) == expected


def test_a_share_of_a_head_counts_the_elements_that_it_stands_for():
    sizes = [(turned, size) for size in range(2, 257, 2) for turned in range(2, size + 1, 2)]
    assert any(int(size * (turned / size)) != turned for turned, size in sizes)
    assert all(int(size * rotary_factor(turned, size)) == turned for turned, size in sizes)


@pytest.mark.parametrize(("num_layers", "scale"), [(26, 16), (46, 8)])
def test_the_largest_gemma_counts_a_head_as_its_share_of_the_hidden_size(num_layers, scale):
    values = {"block_count": num_layers, "embedding_length": 32, "attention__key_length": 16}
    assert _gemma_scale(reading(**values, attention__head_count=4), 46) == scale


@pytest.mark.parametrize(
    ("values", "expected"), [({}, True), ({"use_parallel_residual": False}, False)]
)
def test_gpt_neox_adds_both_halves_at_once_unless_it_says_otherwise(values, expected):
    assert _gptneox(reading(**values)) == {"use_parallel_residual": expected}


GEMMA = {
    "block_count": 2,
    "context_length": 64,
    "embedding_length": 32,
    "attention__head_count": 4,
}


@pytest.mark.parametrize(
    ("window", "base", "kinds"),
    [(16, 5e3, None), (0, 1e4, ["full_attention"] * 2)],
)
def test_gemma_3_has_another_base_where_it_has_a_window(window, base, kinds):
    values = {
        "attention__sliding_window": window,
        **({"rope__freq_base_swa": 5e3} if window else {}),
    }
    found = _gemma3(reading(**GEMMA, **values))
    assert found["rope_scaling"]["sliding_attention"]["rope_theta"] == base
    assert found["layer_types"] == kinds


def test_gpt_oss_is_stretched_from_fractions_of_pairs_on():
    scaling = {"rope__scaling__type": "yarn", "rope__scaling__factor": 32.0}
    values = {**MOE, "expert_feed_forward_length": 24, "attention__sliding_window": 16}
    found = _gpt_oss(reading(context_length=64, **values, **scaling))
    assert (found["rope_scaling"]["truncate"], found["rope_scaling"]["factor"]) == (False, 32.0)


@pytest.mark.parametrize(("values", "expected"), [({}, 4), ({"rope__dimension_count": 6}, 6)])
def test_half_of_a_head_turns_in_chatglm_unless_it_says_otherwise(values, expected):
    sizes = {"feed_forward_length": 48, "context_length": 64, "attention__head_count_kv": 2}
    assert _chatglm(reading(**GEMMA | sizes, **values))["rotary_dim"] == expected


@pytest.mark.parametrize("normalised", [True, False])
def test_deepseek_normalises_the_chosen_ones_if_it_says_so(normalised):
    values = {**MOE, "expert_feed_forward_length": 24}
    said = {"expert_weights_norm": True} if normalised else {}
    assert _deepseek(reading(**values, **said))["norm_topk_prob"] is normalised


@pytest.mark.parametrize("stated", [{}, {"expert_gating_func": 0}, {"expert_gating_func": 2}])
def test_experts_that_are_scored_by_sigmoid_may_not_say_so(stated):
    require_sigmoid(reading(**stated))
    with pytest.raises(UnsupportedModelError, match=r"llama\.expert_gating_func 3 is not"):
        require_sigmoid(reading(expert_gating_func=3))


@pytest.mark.parametrize(
    ("values", "scale"),
    [({}, 1.0), ({"expert_weights_scale": 0.0}, 1.0), ({"expert_weights_scale": 2.5}, 2.5)],
)
def test_no_scale_is_one(values, scale):
    assert weights_scale(reading(**values)) == scale


@pytest.mark.parametrize(("values", "share"), [({}, 1.0), ({"rope__dimension_count": 4}, 0.5)])
def test_all_of_a_head_turns_in_glm_4_5_unless_a_file_says_otherwise(values, share):
    moe = {**MOE, "expert_feed_forward_length": 24}
    assert _glm4_moe(reading(**GEMMA | moe, **values))["partial_rotary_factor"] == share
