"""What is particular to the checkpoints of mixtures of experts, and to what their configs say."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from streamserve.errors import ModelLoadError, UnsupportedModelError
from streamserve.models import load_model
from streamserve.models.families import find_family
from streamserve.models.hf_config import HfConfig
from streamserve.models.parameters import decoder_modules
from streamserve.models.spec import DecoderSpec, ExpertsSpec
from tests.models.native import NATIVE, config_values
from tests.models.test_loader import assert_equal_to, edit_weights

CPU = torch.device("cpu")


def spec_of(values: dict[str, Any]) -> DecoderSpec:
    config = HfConfig(values)
    return find_family(config).spec(config)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("glm4-moe", "model.layers.3.eh_proj.weight"),
        ("glm4-moe", "model.layers.3.mlp.gate.e_score_correction_bias"),
        ("ernie4.5-moe", "model.mtp_block.0.self_attn.q_proj.weight"),
        ("ernie4.5-moe", "model.mtp_emb_norm.0.weight"),
        ("k-exaone", "mtp.layers.0.self_attn.q_proj.weight"),
    ],
)
def test_layers_that_guess_further_tokens_are_left_out(name, more, checkpoint, kernels):
    directory, model = checkpoint(NATIVE[name]())
    edit_weights(directory, lambda tensors: tensors.update({more: torch.ones(3)}))
    options = {"dtype": torch.float32, "device": CPU, "kernels": kernels}
    assert_equal_to(load_model(directory, **options), model)


def test_other_layers_are_not_left_out(checkpoint, kernels):
    directory, _ = checkpoint(NATIVE["glm4-moe"]())
    more = "model.layers.4.eh_proj.weight"
    edit_weights(directory, lambda tensors: tensors.update({more: torch.ones(3)}))
    with pytest.raises(ModelLoadError, match=re.escape(f"it has no use for 1 tensor: {more}")):
        load_model(directory, dtype=torch.float32, device=CPU, kernels=kernels)


def test_a_correction_of_another_shape_is_named(checkpoint, kernels):
    directory, _ = checkpoint(NATIVE["ernie4.5-moe"]())
    name = "model.layers.1.mlp.moe_statics.e_score_correction_bias"
    edit_weights(directory, lambda tensors: tensors.update({name: torch.ones(2, 5)}))
    message = f"tensor {name} has shape [2, 5]; the config asks for [5]"
    with pytest.raises(ModelLoadError, match=re.escape(message)):
        load_model(directory, dtype=torch.float32, device=CPU, kernels=kernels)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv 8.0 is not supported for this architecture"),
        ("ernie4.5-moe", {"use_bias": True}, "use_bias is not supported for this architecture"),
        ("ernie4.5-moe", {"moe_norm_min": 0.1}, "moe_norm_min must be at most 1e-06"),
        ("glm4-moe", {"n_group": 3}, "n_group 3 and topk_group 1 must be groups of 8 experts"),
        ("glm4-moe", {"n_group": 8}, "n_group 8 and topk_group 1 must be groups of 8 experts"),
        ("glm4-moe", {"n_group": 4}, "hold the 3 that a token goes to"),
        ("glm4-moe", {"n_group": 4, "topk_group": 5}, "topk_group 5 must be groups of 8 experts"),
        ("k-exaone", {"mlp_layer_types": ["sparse"] * 3}, "mlp_layer_types other than 1 dense"),
        ("hunyuan-moe", {"moe_topk": [1, 2, 1]}, "moe_topk must be the same in all layers"),
        ("hunyuan-moe", {"moe_intermediate_size": 24}, "moe_intermediate_size 24 must be inter"),
        ("minimax-m2", {"scoring_func": "softmax"}, "scoring_func 'softmax' is not supported"),
        ("minimax-m2", {"qk_norm_type": "per_head"}, "qk_norm_type 'per_head' is not supported"),
    ],
)
def test_what_would_change_an_answer_is_refused(name, values, message):
    with pytest.raises((ModelLoadError, UnsupportedModelError), match=re.escape(message)):
        spec_of({**config_values(name), **values})


def test_experts_stand_in_the_layers_that_ernie_names():
    values = {**config_values("ernie4.5-moe"), "num_hidden_layers": 9}
    values |= {"moe_layer_end_index": -1, "moe_layer_start_index": 1, "moe_layer_interval": 1}

    def mixed(**more: int) -> list[int]:
        layers = spec_of({**values, **more}).layers
        return [i for i, layer in enumerate(layers) if isinstance(layer.mlp, ExpertsSpec)]

    assert mixed() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert mixed(moe_layer_start_index=2, moe_layer_interval=3) == [2, 5, 8]
    assert mixed(moe_layer_start_index=3, moe_layer_interval=3) == [5, 8]
    assert mixed(moe_layer_interval=2, moe_layer_end_index=6) == [1, 3, 5]


def test_letters_name_the_windows_that_exaone_lists_besides():
    values = config_values("k-exaone")
    spec = spec_of({**values, "sliding_window_pattern": "LG"})
    assert [attention.window for attention in spec.attentions()] == [6, None, 6]


def test_minimax_counts_the_elements_that_turn():
    values = config_values("minimax-m2")
    del values["rope_parameters"]
    rope = spec_of({**values, "rotary_dim": 4, "rope_theta": 5e6}).attentions()[0].rope
    assert (rope.rotary_dim, rope.base) == (4, 5e6)


# As published: what counts, and how many billions of weights there are.
PUBLISHED: dict[str, tuple[dict[str, Any], float]] = {
    "GLM 4.5": (
        {
            "architectures": ["Glm4MoeForCausalLM"],
            "hidden_size": 5120,
            "intermediate_size": 12_288,
            "moe_intermediate_size": 1536,
            "num_hidden_layers": 92,
            "num_attention_heads": 96,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "n_routed_experts": 160,
            "n_shared_experts": 1,
            "first_k_dense_replace": 3,
            "vocab_size": 151_552,
        },
        353,
    ),
    "GLM 4.5 Air": (
        {
            "architectures": ["Glm4MoeForCausalLM"],
            "hidden_size": 4096,
            "intermediate_size": 10_944,
            "num_hidden_layers": 46,
            "num_attention_heads": 96,
            "head_dim": 128,
            "vocab_size": 151_552,
        },
        107,
    ),
    "Ernie 4.5 21B-A3B": (
        {
            "architectures": ["Ernie4_5_MoeForCausalLM"],
            "hidden_size": 2560,
            "intermediate_size": 12_288,
            "num_hidden_layers": 28,
            "num_attention_heads": 20,
            "num_key_value_heads": 4,
            "vocab_size": 103_424,
        },
        21.8,
    ),
    "OLMoE": (
        {
            "architectures": ["OlmoeForCausalLM"],
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "vocab_size": 50_304,
        },
        6.9,
    ),
    "MiniMax M2": (
        {
            "architectures": ["MiniMaxM2ForCausalLM"],
            "hidden_size": 3072,
            "intermediate_size": 1536,
            "num_hidden_layers": 62,
            "num_attention_heads": 48,
            "vocab_size": 200_064,
        },
        229,
    ),
    "dots.llm1": (
        {
            "architectures": ["Dots1ForCausalLM"],
            "hidden_size": 4096,
            "intermediate_size": 10_944,
            "num_hidden_layers": 62,
            "num_attention_heads": 32,
            "n_routed_experts": 128,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "first_k_dense_replace": 1,
            "vocab_size": 152_064,
        },
        143,
    ),
    "LFM 2 8B-A1B": (
        {
            "architectures": ["Lfm2MoeForCausalLM"],
            "hidden_size": 2048,
            "intermediate_size": 7168,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "full_attn_idxs": [2, 6, 10, 14, 18, 21],
            "vocab_size": 65_536,
        },
        8.3,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_they_have_as_many_weights_as_is_published(name):
    values, billions = PUBLISHED[name]
    count = sum(module.numel for module in decoder_modules(spec_of(values)))
    assert count / 1e9 == pytest.approx(billions, rel=0.01)


def test_where_a_checkpoint_keeps_its_correction_is_known() -> None:
    """By the names of published checkpoints, which transformers changes as it reads them."""
    expected = {
        "glm4-moe": "model.layers.1.mlp.gate.e_score_correction_bias",
        "dots1": "model.layers.1.mlp.gate.e_score_correction_bias",
        "ernie4.5-moe": "model.layers.1.mlp.moe_statics.e_score_correction_bias",
        "k-exaone": "model.layers.1.mlp.e_score_correction_bias",
        "minimax-m2": "model.layers.1.block_sparse_moe.e_score_correction_bias",
        "lfm2-moe": "model.layers.1.feed_forward.expert_bias",
    }
    for name, full in expected.items():
        values = config_values(name)
        names = find_family(HfConfig(values)).weight_names(spec_of(values))
        [template] = names.modules["layers.router.correction"]
        assert template.format(layer=1) == full
