"""The families that work, found by the architecture that a config names."""

from __future__ import annotations

from streamserve.errors import UnsupportedModelError
from streamserve.models.families import (
    arcee,
    baichuan,
    bloom,
    chatglm,
    cohere,
    deepseek,
    deepseek_latent,
    dots,
    ernie,
    exaone4,
    falcon,
    falcon_h1,
    gemma,
    gemma4,
    glm,
    glm_moe,
    gpt2,
    gpt_bigcode,
    gpt_neox,
    gpt_oss,
    gptj,
    granite,
    granite_hybrid,
    helium,
    hunyuan,
    latent,
    lfm2,
    lfm3,
    llama,
    minimax,
    nemotron,
    nemotron_h,
    olmo,
    olmoe,
    opt,
    phi,
    phi3,
    qwen,
    qwen_hybrid,
    qwen_moe,
    seed_oss,
    smollm3,
    stablelm,
    starcoder2,
)
from streamserve.models.families.family import Family
from streamserve.models.hf_config import HfConfig

__all__ = [
    "FAMILIES",
    "Family",
    "find_family",
    "has_family",
    "supported_architectures",
    "unknown_family",
]

FAMILIES: dict[str, Family] = {
    family.architecture: family
    for module in (
        llama,
        qwen,
        qwen_moe,
        qwen_hybrid,
        smollm3,
        gpt2,
        gptj,
        gpt_neox,
        phi,
        phi3,
        falcon,
        falcon_h1,
        starcoder2,
        olmo,
        olmoe,
        gemma,
        gemma4,
        glm,
        glm_moe,
        chatglm,
        cohere,
        baichuan,
        deepseek,
        deepseek_latent,
        gpt_oss,
        granite,
        granite_hybrid,
        bloom,
        lfm2,
        ernie,
        minimax,
        dots,
        latent,
        lfm3,
        exaone4,
        seed_oss,
        hunyuan,
        arcee,
        nemotron,
        nemotron_h,
        stablelm,
        gpt_bigcode,
        opt,
        helium,
    )
    for family in module.FAMILIES
}


def supported_architectures() -> tuple[str, ...]:
    return tuple(sorted(FAMILIES))


def find_family(config: HfConfig) -> Family:
    """The family of ``architectures``, or of ``model_type`` when a config names no architecture.

    Raises UnsupportedModelError, which names what was asked for and what works.
    """
    family = _find_family(config)
    if family is None:
        raise unknown_family(config)
    return family


def has_family(config: HfConfig) -> bool:
    """Whether `find_family` finds one."""
    return _find_family(config) is not None


def _find_family(config: HfConfig) -> Family | None:
    named = config.values.get("architectures")
    if isinstance(named, list) and named:
        return next((FAMILIES[name] for name in named if name in FAMILIES), None)
    model_type = config.values.get("model_type")
    return next((f for f in FAMILIES.values() if f.model_type == model_type), None)


def unknown_family(config: HfConfig, also: str = "") -> UnsupportedModelError:
    """Says what was asked for and what there is; ``also``: what else was tried."""
    named = config.values.get("architectures")
    if isinstance(named, list) and named:
        asked = ", ".join(map(str, named))
    else:
        asked = f"(none named; model_type {config.values.get('model_type')!r})"
    return UnsupportedModelError(
        f"{config.source}: architecture {asked} is not supported; "
        f"these are: {', '.join(supported_architectures())}" + (f". {also}" if also else "")
    )
