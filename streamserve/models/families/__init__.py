"""The families that work, found by the architecture that a config names."""

from __future__ import annotations

from streamserve.errors import UnsupportedModelError
from streamserve.models.families import (
    falcon,
    gemma,
    glm,
    gpt2,
    gpt_neox,
    gptj,
    llama,
    olmo2,
    phi,
    phi3,
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
    )
    for family in module.FAMILIES
}


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
    raise UnsupportedModelError(
        f"{config.source}: architecture {asked} is not supported; "
        f"these are: {', '.join(supported_architectures())}{own_code}"
    )
