"""GGUF files of models with latent attention, in the words of our families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from streamserve.models.gguf.architecture import Architecture, Values
from streamserve.models.gguf.mixtures import GROUPED, SIGMOID, grouped_experts
from streamserve.models.gguf.rope_scaling import rope_scaling

if TYPE_CHECKING:
    from streamserve.models.gguf.reading import Reading

_SOFTMAX = 1
# Layers and tokens by which llama.cpp tells GLM 4.7 Flash, whose first files lack the scoring.
_GLM_FLASH = (47, 154_880)


def _latent(reading: Reading) -> Values:
    """Newer files have the sizes of attention's heads, those of the model's beside them."""
    rope_size = reading.integer("rope.dimension_count")
    key_size = reading.optional_integer("attention.key_length_mla")
    if key_size is None:
        key_size = reading.integer("attention.key_length")
    return {
        "q_lora_rank": reading.optional_integer("attention.q_lora_rank"),
        "kv_lora_rank": reading.integer("attention.kv_lora_rank"),
        "qk_rope_head_dim": rope_size,
        "qk_nope_head_dim": key_size - rope_size,
    }


def _deepseek2(reading: Reading) -> Values:
    value_size = reading.optional_integer("attention.value_length_mla")
    if value_size is None:
        value_size = reading.integer("attention.value_length")
    scaling = rope_scaling(reading)
    weight = reading.number_or(0.0, "rope.scaling.yarn_log_multiplier") / 0.1
    if scaling is not None and weight:
        scaling |= {"mscale": weight, "mscale_all_dim": weight}
    values = {**_latent(reading), "v_head_dim": value_size, "rope_scaling": scaling}
    if not reading.integer_or(0, "expert_count"):
        return {"architectures": ["YoutuForCausalLM"], **values}
    values |= grouped_experts(reading)
    embedding = reading.file.tensors.get("token_embd.weight")
    is_flash = (reading.num_layers, embedding and embedding.shape[0]) == _GLM_FLASH
    scoring = reading.integer_or(SIGMOID if is_flash else _SOFTMAX, "expert_gating_func")
    if scoring == SIGMOID:
        family = "Glm4MoeLiteForCausalLM" if is_flash else "DeepseekV3ForCausalLM"
        return {"architectures": [family], **values}
    limited = "group_limited_greedy" if values["n_group"] > 1 else "greedy"
    return {"architectures": ["DeepseekV2ForCausalLM"], **values, "topk_method": limited}


def _minicpm3(reading: Reading) -> Values:
    """What it scales by is in no file: the published model's is taken."""
    heads = reading.integer("attention.head_count")
    return {**_latent(reading), "v_head_dim": reading.integer("embedding_length") // heads}


LATENT: Mapping[str, Architecture] = {
    "deepseek2": Architecture(
        "DeepseekV3ForCausalLM",
        _deepseek2,
        also=("DeepseekV2ForCausalLM", "Glm4MoeLiteForCausalLM", "YoutuForCausalLM"),
        head_size=lambda reading: None,
        read=(*GROUPED, "nextn_predict_layers", "rope.scaling.yarn_log_multiplier"),
    ),
    "minicpm3": Architecture("MiniCPM3ForCausalLM", _minicpm3, head_size=lambda reading: None),
}
