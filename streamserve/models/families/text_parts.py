"""Checkpoints of several parts (a vision or an audio tower beside a text model): the text part.

Such a config holds that of its text model in ``text_config``, and such a checkpoint the weights of
it under a prefix, of which there are two generations. What is left is a model of a family that is
here already. Texts alone reach it: pictures and sound are refused where they are sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from streamserve.errors import ModelLoadError, UnsupportedModelError
from streamserve.models.families import (
    cohere,
    gemma,
    gemma4,
    glm_moe,
    lfm2,
    lfm3,
    llama,
    qwen_hybrid,
    qwen_moe,
    routed,
)
from streamserve.models.families.family import Family
from streamserve.models.hf_config import HfConfig
from streamserve.models.names import WeightNames
from streamserve.models.spec import DecoderSpec

# Prefixes as stored, and as the families' tables have them. The first that fits counts.
_RENAMED = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.text_model.", "model."),
)


@dataclass(frozen=True, slots=True)
class TextModel:
    """A ``model_type`` of ``text_config``: its family, and what configs of it leave out.

    ``left_out`` is what transformers takes instead, where the family does not take the same.
    """

    family: Family
    left_out: Mapping[str, Any] = field(default_factory=dict)
    names: WeightNames | None = None


@dataclass(frozen=True, slots=True)
class TextPart:
    """``model_type`` is the text model's where ``text_config`` names none.

    ``unserved`` is what nobody may send, and ``skipped`` are the prefixes of the weights for it,
    which may have ``model.`` before them.
    """

    architecture: str
    model_type: str
    skipped: tuple[str, ...]
    unserved: str = "images"

    def config(self, whole: HfConfig, has_head: Callable[[], bool]) -> HfConfig:
        """The text model's config, whole.

        ``has_head`` says whether the checkpoint holds a head: asked where its config says both that
        the embedding is it and that it is not. Raises ModelLoadError, UnsupportedModelError.
        """
        # The first Qwen2-VL and Qwen2.5-VL keep all in one.
        flat = {**whole.values, "model_type": self.model_type}
        given = whole.values.get("text_config", flat)
        if not isinstance(given, dict):
            raise ModelLoadError(f"{whole.source}: text_config must be an object, got {given!r}")
        model_type = given.get("model_type") or self.model_type
        if model_type not in TEXT_MODELS:
            raise UnsupportedModelError(
                f"{whole.source}: text_config: model_type {model_type!r} is not supported as the "
                f"text model of {self.architecture}; these are: {', '.join(TEXT_MODELS)}"
            )
        values = {**TEXT_MODELS[model_type].left_out, **given, "model_type": model_type}
        values["tie_word_embeddings"] = _is_tied(
            given.get("tie_word_embeddings"), whole.values.get("tie_word_embeddings"), has_head
        )
        return HfConfig(values, f"{whole.source}: text_config")

    def family(self, text: HfConfig) -> Family:
        """The family of a config that `config` made, with names as this checkpoint has them."""
        model = TEXT_MODELS[text.values["model_type"]]
        held = model.names or model.family.names
        names: WeightNames | Callable[[DecoderSpec], WeightNames]
        if isinstance(held, WeightNames):
            names = self._as_stored(held)
        else:
            names_of = held  # no longer one of two kinds
            names = lambda spec: self._as_stored(names_of(spec))  # noqa: E731
        return replace(model.family, architecture=self.architecture, names=names)

    def _as_stored(self, names: WeightNames) -> WeightNames:
        skipped = tuple(before + name for name in self.skipped for before in ("", "model."))
        return replace(names, renamed=_RENAMED, skipped=(*names.skipped, *skipped))


def _is_tied(text: Any, whole: Any, has_head: Callable[[], bool]) -> bool | None:
    """Of what two places say, one counted and then the other, so that both may be wrong."""
    if isinstance(text, bool) and isinstance(whole, bool) and text != whole:
        return not has_head()
    return text if isinstance(text, bool) else whole


def find_text_part(config: HfConfig) -> TextPart | None:
    """The part to serve of a checkpoint that has several; None for all others."""
    named = config.values.get("architectures")
    if not isinstance(named, list):
        return None
    return next((TEXT_PARTS[name] for name in named if name in TEXT_PARTS), None)


def _sizes(vocabulary: int, hidden: int, inside: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inside,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


_BY_MODEL_TYPE = {
    family.model_type: family
    for module in (llama, cohere, gemma, gemma4, qwen_moe, qwen_hybrid, lfm2, lfm3, glm_moe)
    for family in module.FAMILIES
}
_QWEN2_VL = TextModel(
    _BY_MODEL_TYPE["qwen2"],
    {
        **_sizes(152_064, 8192, 29_568, 80, 64),
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "max_window_layers": 80,
    },
)
_QWEN3_VL = {
    "num_key_value_heads": 32,
    "rope_theta": 5e5,
    "max_position_embeddings": 128_000,
}
TEXT_MODELS: dict[str, TextModel] = {
    **{
        name: TextModel(_BY_MODEL_TYPE[name], _sizes(256_000, 8192, 22_528, 40, 64))
        for name in ("cohere", "cohere2")
    },
    "gemma3_text": TextModel(_BY_MODEL_TYPE["gemma3_text"], _sizes(262_208, 2304, 9216, 26, 8)),
    "gemma4_text": TextModel(_BY_MODEL_TYPE["gemma4_text"], _sizes(262_144, 2304, 9216, 30, 8)),
    "gemma4_unified_text": TextModel(
        _BY_MODEL_TYPE["gemma4_unified_text"], _sizes(262_144, 2304, 9216, 30, 8)
    ),
    "glm4v_moe_text": TextModel(
        _BY_MODEL_TYPE["glm4_moe"],
        {
            **_sizes(151_424, 4096, 10_944, 46, 96),
            "attention_bias": True,
            "max_position_embeddings": 65_536,
        },
        # Its last layer, where it has one more, guesses a further token.
        replace(routed.ONE_TENSOR_NAMES, skipped=("model.language_model.layers.46.",)),
    ),
    "lfm2": TextModel(
        _BY_MODEL_TYPE["lfm2"],
        {**_sizes(65_536, 2560, 12_288, 32, 32), "num_key_value_heads": 8},
    ),
    "lfm3": TextModel(_BY_MODEL_TYPE["lfm3"], _sizes(128_000, 2048, 7680, 24, 16)),
    "llama": TextModel(_BY_MODEL_TYPE["llama"], _sizes(32_000, 4096, 11_008, 32, 32)),
    "ministral3": TextModel(
        _BY_MODEL_TYPE["ministral3"],
        {**_sizes(131_072, 4096, 14_336, 34, 32), "num_key_value_heads": 8},
    ),
    "mistral": TextModel(
        _BY_MODEL_TYPE["mistral"],
        {**_sizes(32_000, 4096, 14_336, 32, 32), "sliding_window": 4096},
    ),
    "qwen2": TextModel(
        _BY_MODEL_TYPE["qwen2"],
        {**_sizes(151_936, 4096, 22_016, 32, 32), "num_key_value_heads": 32},
    ),
    "qwen2_vl_text": _QWEN2_VL,
    "qwen2_5_vl_text": _QWEN2_VL,
    "qwen3": TextModel(
        _BY_MODEL_TYPE["qwen3"],
        {**_sizes(151_936, 4096, 22_016, 32, 32), "num_key_value_heads": 32},
    ),
    "qwen3_5_text": TextModel(
        _BY_MODEL_TYPE["qwen3_5_text"],
        {**_sizes(248_320, 4096, 12_288, 32, 16), "num_key_value_heads": 4},
    ),
    "qwen3_5_moe_text": TextModel(
        _BY_MODEL_TYPE["qwen3_5_moe_text"],
        {
            **_sizes(248_320, 2048, 512, 40, 16),
            "num_experts": 256,
            "moe_intermediate_size": 512,
        },
    ),
    "qwen3_vl_text": TextModel(
        _BY_MODEL_TYPE["qwen3"], {**_sizes(151_936, 4096, 22_016, 32, 32), **_QWEN3_VL}
    ),
    "qwen3_vl_moe_text": TextModel(
        _BY_MODEL_TYPE["qwen3_moe"],
        {
            **_sizes(151_936, 2048, 5632, 24, 16),
            **_QWEN3_VL,
            "num_key_value_heads": 16,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "norm_topk_prob": True,  # always done
        },
        qwen_moe.ONE_TENSOR_NAMES,
    ),
}

_TOWER = ("vision_tower.", "multi_modal_projector.")
_LLAVA = (*_TOWER, "image_newline")
_GEMMA4 = ("vision_tower.", "audio_tower.", "embed_vision.", "embed_audio.")
_AUDIO = ("audio_tower.", "multi_modal_projector.")
_PARTS = (
    TextPart("Gemma3ForConditionalGeneration", "gemma3_text", _TOWER),
    TextPart("Gemma4ForConditionalGeneration", "gemma4_text", _GEMMA4, "images and sound"),
    TextPart(
        "Gemma4UnifiedForConditionalGeneration",
        "gemma4_unified_text",
        ("vision_embedder.", *_GEMMA4),
        "images and sound",
    ),
    TextPart("AyaVisionForConditionalGeneration", "cohere2", _TOWER),
    TextPart("Cohere2VisionForConditionalGeneration", "cohere2", _TOWER),
    TextPart("Mistral3ForConditionalGeneration", "mistral", _TOWER),
    TextPart("LlavaForConditionalGeneration", "llama", _TOWER),
    TextPart("LlavaNextForConditionalGeneration", "llama", _LLAVA),
    TextPart("LlavaOnevisionForConditionalGeneration", "qwen2", _LLAVA),
    TextPart("Qwen2VLForConditionalGeneration", "qwen2_vl_text", ("visual.",)),
    TextPart("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl_text", ("visual.",)),
    TextPart("Qwen3VLForConditionalGeneration", "qwen3_vl_text", ("visual.",)),
    TextPart("Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe_text", ("visual.",)),
    TextPart("Qwen3_5ForConditionalGeneration", "qwen3_5_text", ("visual.",)),
    TextPart("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe_text", ("visual.",)),
    TextPart("Glm4vMoeForConditionalGeneration", "glm4v_moe_text", ("visual.",)),
    TextPart("InternVLForConditionalGeneration", "qwen2", _TOWER),
    TextPart("Lfm2VlForConditionalGeneration", "lfm2", _TOWER),
    TextPart("Lfm3VlForConditionalGeneration", "lfm3", _TOWER),
    TextPart("Idefics3ForConditionalGeneration", "llama", ("vision_model.", "connector.")),
    TextPart("SmolVLMForConditionalGeneration", "llama", ("vision_model.", "connector.")),
    TextPart("Qwen2AudioForConditionalGeneration", "qwen2", _AUDIO, "sound"),
)
TEXT_PARTS: dict[str, TextPart] = {part.architecture: part for part in _PARTS}
