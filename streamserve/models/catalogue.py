"""What can be served, family by family, told by what the loader itself reads. Imports no torch.

A family is code that turns a config into a spec. So its capabilities are found by giving it
configs: a tiny one, and the same with each switch on that some family has. What the specs then have
is what the family can have; a switch that it does not look at changes nothing, and one that it
refuses is refused here too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from streamserve.errors import ModelLoadError, UnsupportedModelError
from streamserve.models.families import FAMILIES
from streamserve.models.families.family import Family
from streamserve.models.families.text_parts import TEXT_MODELS, TEXT_PARTS
from streamserve.models.gguf.architectures import ARCHITECTURES
from streamserve.models.hf_config import HfConfig
from streamserve.models.parameters import layer_modules, takes_adapter
from streamserve.models.spec import (
    AttentionSpec,
    DecoderSpec,
    DeltaNetSpec,
    ExpertsSpec,
    RopeScalingKind,
    ShortConvSpec,
    StateSpaceSpec,
)

Values = Mapping[str, Any]

# Sizes by all of the names that one family or the other looks for.
_TINY: Values = {
    **dict.fromkeys(("vocab_size", "padded_vocab_size"), 64),
    **dict.fromkeys(("hidden_size", "n_embd"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer"), 8),
    **dict.fromkeys(("num_attention_heads", "n_head"), 2),
    **dict.fromkeys(
        ("intermediate_size", "ffn_hidden_size", "moe_intermediate_size", "ffn_dim"), 32
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    **dict.fromkeys(("n_group", "topk_group"), 1),
    "rotary_dim": 8,
}
_CONTEXT: Values = {"max_position_embeddings": 64, "seq_length": 32}
_SWITCHES: tuple[Values, ...] = (
    _CONTEXT,
    {**_CONTEXT, "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
    {**_CONTEXT, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 1.0},
    {**_CONTEXT, "qk_layernorm": True, "use_qk_norm": True},
    {**_CONTEXT, "use_dynamic_ntk": True, "use_logn_attn": True},
    {**_CONTEXT, "alibi": True},
    {**_CONTEXT, "first_k_dense_replace": 1, "mlp_only_layers": [0]},
    {**_CONTEXT, "full_attn_idxs": [1]},
    {},  # Baichuan's larger ones state no context, and have ALiBi
)
_STRETCH: Values = {
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def _of_layers(has: Callable[[AttentionSpec], object]) -> Callable[[DecoderSpec], bool]:
    return lambda spec: any(map(has, spec.attentions()))


def _of_kind(kind: type) -> Callable[[DecoderSpec], bool]:
    return lambda spec: any(isinstance(held, kind) for held in spec.caches())


def _experts(spec: DecoderSpec) -> Iterator[ExpertsSpec]:
    return (layer.mlp for layer in spec.layers if isinstance(layer.mlp, ExpertsSpec))


FEATURES: Mapping[str, Callable[[DecoderSpec], bool]] = {
    "sliding windows": _of_layers(lambda attention: attention.window),
    "experts": lambda spec: any(True for _ in _experts(spec)),
    "shared experts": lambda spec: any(experts.shared for experts in _experts(spec)),
    "attention sinks": _of_layers(lambda attention: attention.sinks),
    "soft caps": lambda spec: (
        spec.logit_soft_cap is not None
        or any(attention.soft_cap is not None for attention in spec.attentions())
    ),
    "query and key norms": _of_layers(lambda attention: attention.qk_norm),
    "log-scaled queries": _of_layers(lambda attention: attention.query_scale),
    "delta nets": _of_kind(DeltaNetSpec),
    "state spaces": _of_kind(StateSpaceSpec),
    "short convolutions": _of_kind(ShortConvSpec),
    "latent attention": _of_layers(lambda attention: attention.latent),
    "output gates": _of_layers(lambda attention: attention.output_gate or attention.head_gate),
    "rotary positions": _of_layers(lambda attention: attention.rope),
    "learned positions": lambda spec: spec.learned_positions is not None,
    "ALiBi": _of_layers(lambda attention: attention.alibi),
}
"""What a decoder may have that others do not, and how its spec tells."""
GUESSES = "multi-token prediction"
"""What its checkpoints may have besides: a draft head."""

THROUGH_TRANSFORMERS: Mapping[str, str] = {
    "apertus": "Apertus",
    "codegen": "CodeGen",
    "gemma3n_text": "Gemma 3n (text)",
    "granite_swa": "Granite with sinks",
    "persimmon": "Persimmon",
    "vaultgemma": "VaultGemma",
}
"""What has been checked of that which transformers builds, by its ``model_type``."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One architecture.

    ``text_of`` are architectures with parts for pictures or sound beside it, whose texts it serves.
    ``rope_scaling`` are the ways to stretch its rotary positions, ``gguf`` the architectures of
    GGUF files that hold it, ``lora`` the checkpoint's modules of a layer that adapters may change,
    as PEFT's ``target_modules`` name them.
    """

    architecture: str
    model_type: str
    series: str
    title: str
    features: tuple[str, ...]
    rope_scaling: tuple[str, ...]
    gguf: tuple[str, ...]
    lora: tuple[str, ...]
    text_of: tuple[str, ...]


def native_entries() -> list[Entry]:
    """Every architecture that our decoder runs, those of a series together."""
    order = list(dict.fromkeys(family.series for family in FAMILIES.values()))
    families = sorted(FAMILIES.values(), key=lambda family: order.index(family.series))
    return [_entry(family) for family in families]


def usual_rope_scaling(entries: Iterable[Entry]) -> tuple[str, ...]:
    """The ways to stretch rotary positions that most of them have."""
    [(usual, _)] = Counter(entry.rope_scaling for entry in entries).most_common(1)
    return usual


def peculiarities(entry: Entry, usual: tuple[str, ...]) -> list[str]:
    """What an entry has that not all have; ``usual`` is what most have of `rope_scaling`."""
    found = [name for name in entry.features if name != "rotary positions"]
    if len(entry.features) == len(found) or entry.rope_scaling == usual:
        return found
    more = [kind for kind in entry.rope_scaling if kind not in usual]
    return [*found, f"rope scaling {', '.join(more)} too" if more else "no rope scaling"]


def features_of(specs: Iterable[DecoderSpec]) -> tuple[str, ...]:
    """The `FEATURES` that any of them has."""
    known = list(specs)
    return tuple(name for name, has in FEATURES.items() if any(map(has, known)))


def _entry(family: Family) -> Entry:
    specs = list(possible_specs(family))
    modules = (
        name.rpartition(".")[2]
        for spec in specs
        for index in range(len(spec.layers))
        for module in layer_modules(spec, index)
        if takes_adapter(module)
        for name in family.weight_names(spec).modules[module.name]
    )
    kinds = {
        attention.rope.scaling.kind
        for spec in specs
        for attention in spec.attentions()
        if attention.rope is not None and attention.rope.scaling is not None
    }
    return Entry(
        architecture=family.architecture,
        model_type=family.model_type,
        series=family.series,
        title=family.title,
        features=(*features_of(specs), *([] if family.mtp is None else [GUESSES])),
        rope_scaling=tuple(kind for kind in get_args(RopeScalingKind) if kind in kinds),
        gguf=tuple(
            name
            for name, held in ARCHITECTURES.items()
            if family.architecture in (held.family, *held.also)
        ),
        lora=tuple(dict.fromkeys(modules)),
        text_of=tuple(
            name
            for name, part in TEXT_PARTS.items()
            if TEXT_MODELS[part.model_type].family is family
        ),
    )


def possible_specs(family: Family) -> Iterator[DecoderSpec]:
    """What a family makes of tiny configs, one for each switch that any family has."""
    first = family.spec(HfConfig({**_TINY, **_CONTEXT}, family.architecture))
    ropes = (attention.rope for attention in first.attentions())
    num_pairs = next((rope.rotary_dim // 2 for rope in ropes if rope is not None), 0)
    factors = dict.fromkeys(("short_factor", "long_factor"), [1.0] * num_pairs)
    stretches: list[Values] = [
        {"rope_type": kind, **_STRETCH, **(factors if kind == "longrope" else {})}
        for kind in get_args(RopeScalingKind)
    ]
    stretched = ({**_CONTEXT, "rope_scaling": stretch} for stretch in stretches)
    for values in (*_SWITCHES, *stretched):
        try:
            yield family.spec(HfConfig({**_TINY, **values}, family.architecture))
        except (ModelLoadError, UnsupportedModelError):
            continue
