"""SmolLM 3: Llama, with every fourth layer told no order."""

from __future__ import annotations

from dataclasses import replace

from streamserve.errors import ModelLoadError
from streamserve.models.families.family import Family
from streamserve.models.families.llama import LLAMA_NAMES, gated_mlp, rotary_decoder
from streamserve.models.hf_config import HfConfig
from streamserve.models.spec import DecoderSpec, replace_attention


def _turning(config: HfConfig, num_layers: int) -> list[bool]:
    """Whether each layer's heads turn. (The config's own list says the opposite of its name.)"""
    turns = config.values.get("no_rope_layers")
    if turns is None:
        interval = config.integer_or(4, "no_rope_layer_interval")
        return [(layer + 1) % interval != 0 for layer in range(num_layers)]
    if not isinstance(turns, list) or len(turns) != num_layers:
        raise ModelLoadError(
            f"{config.source}: no_rope_layers must list {num_layers} layers, got {turns!r}"
        )
    return [bool(turn) for turn in turns]


def _spec(config: HfConfig) -> DecoderSpec:
    num_layers = config.integer("num_hidden_layers")
    turning = _turning(config, num_layers)
    windows: tuple[int | None, ...] = (None,) * num_layers
    if config.flag_or(False, "use_sliding_window"):
        window = config.optional_integer("sliding_window")
        windows = tuple(None if turns else window for turns in turning)
        if config.values.get("layer_types") is not None:
            windows = config.layer_windows(num_layers, window)
    bias = config.flag_or(False, "attention_bias")
    spec = rotary_decoder(
        config,
        windows=windows,
        mlp=gated_mlp(config, bias=config.flag_or(False, "mlp_bias")),
        default_kv_heads=4,
        default_context=32_768,
        default_theta=2e6,
        qkv_bias=bias,
        output_bias=bias,
    )
    layers = tuple(
        layer if turns else replace_attention(layer, rope=None)
        for layer, turns in zip(spec.layers, turning, strict=True)
    )
    return replace(spec, layers=layers, tied_head=config.flag_or(True, "tie_word_embeddings"))


FAMILIES = (
    Family(
        architecture="SmolLM3ForCausalLM",
        model_type="smollm3",
        series="SmolLM",
        title="SmolLM 3",
        spec=_spec,
        max_positions=lambda config: config.integer_or(32_768, "max_position_embeddings"),
        names=LLAMA_NAMES,
    ),
)
