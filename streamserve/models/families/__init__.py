"""The families that work, found by the architecture that a config names."""

from __future__ import annotations

from streamserve.errors import UnsupportedModelError
from streamserve.models.families import (
    baichuan,
    chatglm,
    deepseek,
    falcon,
    gemma,
    glm,
    gpt2,
    gpt_neox,
    gpt_oss,
    gptj,
    llama,
    olmo2,
    phi,
    phi3,
    qwen,
    qwen_moe,
    smollm3,
    starcoder2,
)
from streamserve.models.families.family import Family
from streamserve.models.hf_config import HfConfig

__all__ = ["FAMILIES", "Family", "find_family", "supported_architectures"]

FAMILIES: dict[str, Family] = {
    family.architecture: family
    for module in (
        llama,
        qwen,
        qwen_moe,
        smollm3,
        gpt2,
        gptj,
        gpt_neox,
        phi,
        phi3,
        falcon,
        starcoder2,
        olmo2,
        gemma,
        glm,
        chatglm,
        baichuan,
        deepseek,
        gpt_oss,
    )
    for family in module.FAMILIES
}


_LATENTS = "its attention keeps latents in place of keys and values (MLA), which is not built"
NOT_BUILT = {
    "DeepseekV2ForCausalLM": _LATENTS,
    "DeepseekV3ForCausalLM": _LATENTS,
    "DeepseekV32ForCausalLM": _LATENTS,
    "MiniCPM3ForCausalLM": _LATENTS,
}
"""Why some architectures that people ask for are refused."""


def supported_architectures() -> tuple[str, ...]:
    return tuple(sorted(FAMILIES))


def find_family(config: HfConfig) -> Family:
    """The family of ``architectures``, or of ``model_type`` when a config names no architecture.

    Raises UnsupportedModelError, which names what was asked for and what works.
    """
    named = config.values.get("architectures")
    if isinstance(named, list) and named:
        for architecture in named:
            if architecture in FAMILIES:
                return FAMILIES[architecture]
        asked = ", ".join(map(str, named))
    else:
        model_type = config.values.get("model_type")
        for family in FAMILIES.values():
            if family.model_type == model_type:
                return family
        asked = f"(none named; model_type {model_type!r})"
    own_code = ""
    if config.values.get("auto_map"):
        own_code = " (its own model code is not run, with --trust-remote-code neither)"
    reason = f": {NOT_BUILT[asked]}" if asked in NOT_BUILT else ""
    raise UnsupportedModelError(
        f"{config.source}: architecture {asked} is not supported{reason}; "
        f"these are: {', '.join(supported_architectures())}{own_code}"
    )
