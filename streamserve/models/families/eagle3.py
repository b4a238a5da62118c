"""EAGLE-3 heads (Li et al. 2025) for other models: what a config says, and what tensors are called.

They are published in two forms that differ in names only: one config of a Llama (the authors',
SpecForge's, NVIDIA's), and a config that has such a one inside (Speculators, Red Hat's). Both say
what later heads do otherwise: EAGLE 3.1 norms what it is given and goes on from normed states.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from streamserve.errors import ModelLoadError, UnsupportedModelError
from streamserve.models.families.llama import gated_mlp, rotary_decoder
from streamserve.models.hf_config import HfConfig
from streamserve.models.names import WeightNames
from streamserve.models.spec import DecoderSpec, FusionSpec, TapNorm

ARCHITECTURES = (
    "LlamaForCausalLMEagle3",
    "Eagle3LlamaForCausalLM",
    "Eagle3Qwen3ForCausalLM",
    "Eagle3Speculator",
    "Eagle3DraftModel",
    "LlamaForCausalLM",  # the authors' first ones; what else they name tells
)
_MODEL_TYPES = ("llama", "qwen3")
_IDS = "eagle_aux_hidden_state_layer_ids"
_LAYER = "layers.{layer}."
_EMBEDDING = "embed_tokens.weight"
_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Eagle3Layers:
    """What a config says of a head.

    ``taps`` are the target's layers whose inputs it is given; None: as `default_taps`.
    """

    spec: DecoderSpec
    taps: tuple[int, ...] | None


def default_taps(num_layers: int) -> tuple[int, ...]:
    """What heads are given that name no layers, of a target with so many."""
    return (2, num_layers // 2, num_layers - 3)


def read_eagle3(config: HfConfig, held: Collection[str]) -> Eagle3Layers:
    """Of a checkpoint that holds tensors so named: see `full_name`.

    Raises UnsupportedModelError for one that is no such head, or not built; ModelLoadError for a
    config that is damaged.
    """
    _check_architecture(config)
    named = config.values.get("eagle_config") or {}
    if not isinstance(named, dict):
        raise ModelLoadError(f"{config.source}: eagle_config must be an object, got {named!r}")
    settings = HfConfig({**config.values, **named}, config.source)
    layer = _layer_config(config)
    if not settings.flag_or(True, "use_aux_hidden_state"):
        raise UnsupportedModelError(
            f"{config.source}: use_aux_hidden_state false is not supported: a head that is given "
            "what the model's own head is"
        )
    taps = _taps(config, named)
    decoder = _decoder(layer)
    norm = decoder.final_norm
    assert norm is not None
    join = FusionSpec(
        norm=norm,
        target_size=settings.integer_or(decoder.hidden_size, "target_hidden_size"),
        num_taps=3 if taps is None else len(taps),
        vocab_size=decoder.vocab_size,
        tap_norm=_tap_norm(settings),
        norms_residual=settings.flag_or(_is_speculator(config), "norm_before_residual"),
        feeds_normed=settings.flag_or(False, "norm_output"),
        own_embedding=_EMBEDDING in held,
    )
    draft_vocab_size = settings.integer_or(decoder.vocab_size, "draft_vocab_size")
    tied_head = draft_vocab_size == decoder.vocab_size and _HEAD not in held
    if tied_head and join.own_embedding:
        raise UnsupportedModelError(
            f"{config.source}: a head with an embedding of its own (embed_tokens) and without "
            "lm_head is not supported"
        )
    first, *others = decoder.layers
    spec = replace(
        decoder,
        vocab_size=draft_vocab_size,
        layers=(replace(first, attention_norm=None), *others),
        tied_head=tied_head,
        join=join,
    )
    return Eagle3Layers(spec, taps)


def _check_architecture(config: HfConfig) -> None:
    values = config.values
    named = values.get("architectures") or []
    is_named = isinstance(named, list) and any(name in ARCHITECTURES for name in named)
    if _is_speculator(config):
        is_named = values["speculators_model_type"] == "eagle3"
    elif named == ["LlamaForCausalLM"]:
        is_named = "draft_vocab_size" in values or "eagle_config" in values
    if not is_named:
        raise UnsupportedModelError(
            f"{config.source}: architecture {named!r} is no EAGLE-3 head that is supported; these "
            f"are: {', '.join(ARCHITECTURES)} (the last with draft_vocab_size)"
        )


def _is_speculator(config: HfConfig) -> bool:
    return "speculators_model_type" in config.values


def _layer_config(config: HfConfig) -> HfConfig:
    """What is said of the head's layers, as of a Llama's or Qwen 3's."""
    layer = config
    if _is_speculator(config):
        inner = config.values.get("transformer_layer_config")
        source = f"{config.source}: transformer_layer_config"
        if not isinstance(inner, dict):
            raise ModelLoadError(f"{source} must be an object, got {inner!r}")
        layer = HfConfig(inner, source)
    model_type = layer.values.get("model_type", "llama")
    if model_type not in _MODEL_TYPES:
        raise UnsupportedModelError(
            f"{layer.source}: model_type {model_type!r} is not supported for an EAGLE-3 head; "
            f"these are: {', '.join(_MODEL_TYPES)}"
        )
    return layer


def _decoder(config: HfConfig) -> DecoderSpec:
    num_layers = config.integer_or(1, "num_hidden_layers")
    windows: tuple[int | None, ...] = (None,) * num_layers
    if config.values.get("layer_types") is not None:
        windows = config.layer_windows(num_layers, config.optional_integer("sliding_window"))
    bias = config.flag_or(False, "attention_bias")
    return rotary_decoder(
        config,
        windows=windows,
        mlp=gated_mlp(config, bias=config.flag_or(False, "mlp_bias")),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=config.values.get("model_type") == "qwen3",
    )


def _tap_norm(settings: HfConfig) -> TapNorm | None:
    each, together = settings.flag_or(False, "fc_norm"), settings.flag_or(False, "norm_before_fc")
    if each and together:
        raise ModelLoadError(f"{settings.source}: fc_norm and norm_before_fc exclude each other")
    if each:
        return "each"
    return "all" if together else None


def _taps(config: HfConfig, named: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Layers whose inputs are asked for.

    That is what the ids are where they stand alone, as vLLM and Speculators have them. Those of an
    ``eagle_config`` that begin with layer 1 are of outputs, as SpecForge and ModelOpt count; others
    there are of inputs (SGLang tells them apart so).
    """
    ids = config.values.get(_IDS)
    offset = 0
    if ids is None:
        ids = named.get(_IDS)
        offset = 1 if isinstance(ids, list) and ids[:1] == [1] else 0
    if ids is None or ids == []:
        return None
    if not isinstance(ids, list) or not all(type(layer) is int and layer >= 0 for layer in ids):
        raise ModelLoadError(f"{config.source}: {_IDS} must list numbers of layers, got {ids!r}")
    return tuple(layer + offset for layer in ids)


def full_name(stored: str) -> str:
    """A tensor's name as it stands in `eagle3_names`."""
    return _RENAMED.full(stored)


_RENAMED = WeightNames(
    {},
    renamed=(("model.midlayer.", "layers.0."), ("midlayer.", "layers.0."), ("model.", "")),
)


def eagle3_names(held: Collection[str]) -> WeightNames:
    """The tensors of a head, of a checkpoint that holds some so named."""
    modules = {
        "embedding": ("embed_tokens",),
        "join.taps_norm": ("input_norm",),
        **{f"join.tap_norms.{tap}": (f"fc_norm.{tap}",) for tap in range(_num_tap_norms(held))},
        "join.product": ("fc",),
        "join.embedding_norm": ("layers.0.input_layernorm",),
        "join.hidden_norm": ("layers.0.hidden_norm",),
        "final_norm": ("norm",),
        "head": ("lm_head",),
        # SGLang's further layers have the name of the first one's second norm.
        "layers.attention_norm": (
            (_LAYER + "hidden_norm",)
            if "layers.1.hidden_norm.weight" in held
            else (_LAYER + "input_layernorm",)
        ),
        "layers.mlp_norm": (_LAYER + "post_attention_layernorm",),
        "layers.qkv": tuple(_LAYER + f"self_attn.{name}_proj" for name in "qkv"),
        "layers.q_norm": (_LAYER + "self_attn.q_norm",),
        "layers.k_norm": (_LAYER + "self_attn.k_norm",),
        "layers.output": (_LAYER + "self_attn.o_proj",),
        "layers.gate_up": (_LAYER + "mlp.gate_proj", _LAYER + "mlp.up_proj"),
        "layers.down": (_LAYER + "mlp.down_proj",),
    }
    return replace(
        _RENAMED, modules=modules, ignored=(r"rotary_emb\.inv_freq", "d2t", "t2d", r"verifier_.*")
    )


def _num_tap_norms(held: Collection[str]) -> int:
    return sum(name.startswith("fc_norm.") for name in held)
