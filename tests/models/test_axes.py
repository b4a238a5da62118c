"""Axes of a spec that no family on offer uses yet, each proven on a model of transformers.

The specs and names are written out by hand here: this is also what adding a family amounts to.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from streamserve.errors import UnsupportedModelError
from streamserve.models import Decoder
from streamserve.models.checkpoint import CheckpointSource, RandomSource
from streamserve.models.names import WeightNames
from streamserve.models.spec import (
    AttentionSpec,
    DecoderSpec,
    ExpertsSpec,
    LayerSpec,
    MlpSpec,
    NormSpec,
    RopeSpec,
)
from streamserve.models.tensor_files import open_tensor_files
from streamserve.models.weights import build_weights
from tests.models.paged import PagedHarness, Sequence

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LAYER = "model.layers.{layer}."
LLAMA_LIKE = {
    "embedding": ("model.embed_tokens",),
    "final_norm": ("model.norm",),
    "head": ("lm_head",),
    "layers.attention_norm": (LAYER + "input_layernorm",),
    "layers.mlp_norm": (LAYER + "post_attention_layernorm",),
    "layers.qkv": tuple(LAYER + f"self_attn.{name}_proj" for name in "qkv"),
    "layers.q_norm": (LAYER + "self_attn.q_norm",),
    "layers.k_norm": (LAYER + "self_attn.k_norm",),
    "layers.output": (LAYER + "self_attn.o_proj",),
    "layers.gate_up": (LAYER + "mlp.gate_proj", LAYER + "mlp.up_proj"),
    "layers.down": (LAYER + "mlp.down_proj",),
}
RMS = NormSpec("rms_norm", 1e-6)
ATTENTION = AttentionSpec(
    num_heads=4,
    num_kv_heads=2,
    query_key_head_size=8,
    value_head_size=8,
    scale=8**-0.5,
    rope=RopeSpec(10_000.0, 8),
)
MLP = MlpSpec(intermediate_size=48, activation="silu", gated=True)
LAYER_SPEC = LayerSpec(ATTENTION, MLP, attention_norm=RMS, mlp_norm=RMS)


def granite():
    """Scales on the embedding, on each residual and on the logits."""
    config = transformers.GraniteConfig(
        **SIZES,
        rms_norm_eps=1e-6,
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        attention_multiplier=0.3,
        logits_scaling=4.0,
    )
    layer = replace(LAYER_SPEC, attention=replace(ATTENTION, scale=0.3), residual_scale=0.4)
    spec = DecoderSpec(
        vocab_size=97,
        hidden_size=32,
        layers=(layer,) * 2,
        final_norm=RMS,
        embedding_scale=3.0,
        logit_scale=0.25,
    )
    return config, spec, WeightNames(LLAMA_LIKE)


def bloom():
    """ALiBi with a head count that is no power of two, and a norm of the embedding."""
    config = transformers.BloomConfig(
        vocab_size=97, hidden_size=48, n_layer=2, n_head=6, bos_token_id=1, eos_token_id=2
    )
    norm = NormSpec("layer_norm", 1e-5, bias=True)
    attention = AttentionSpec(6, 6, 8, 8, 8**-0.5, alibi=True, qkv_bias=True, output_bias=True)
    layer = LayerSpec(attention, MlpSpec(192, "gelu_tanh", gated=False, bias=True), norm, norm)
    spec = DecoderSpec(
        vocab_size=97,
        hidden_size=48,
        layers=(layer,) * 2,
        final_norm=norm,
        embedding_norm=norm,
        tied_head=True,
    )
    block = "transformer.h.{layer}."
    names = {
        "embedding": ("transformer.word_embeddings",),
        "embedding_norm": ("transformer.word_embeddings_layernorm",),
        "final_norm": ("transformer.ln_f",),
        "head": ("lm_head",),
        "layers.attention_norm": (block + "input_layernorm",),
        "layers.mlp_norm": (block + "post_attention_layernorm",),
        "layers.qkv": (block + "self_attention.query_key_value",),
        "layers.output": (block + "self_attention.dense",),
        "layers.up": (block + "mlp.dense_h_to_4h",),
        "layers.down": (block + "mlp.dense_4h_to_h",),
    }
    return config, spec, WeightNames(names, qkv_layout="grouped")


@pytest.mark.parametrize("family", [granite, bloom])
def test_an_axis_equals_transformers(family, checkpoint, kernels):
    config, spec, names = family()
    directory, model = checkpoint(config)
    decoder = decoder_of(
        spec, CheckpointSource(open_files(directory), names, spec, directory), kernels
    )
    tokens = torch.randint(0, 97, (29,), generator=torch.Generator().manual_seed(5)).tolist()
    logits = PagedHarness(decoder).prefill([Sequence(tokens), Sequence(tokens[:3])], 11)
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(logits[0], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[1], expected[:3], rtol=1e-4, atol=1e-4)


def open_files(directory: Path):
    return open_tensor_files(directory, "safetensors")


def decoder_of(spec: DecoderSpec, source, kernels) -> Decoder:
    weights = build_weights(spec, source, kernels, torch.float32, CPU)
    return Decoder(spec, weights, kernels, dtype=torch.float32, device=CPU, max_model_len=128)


def test_a_parallel_block_scales_what_both_halves_add(kernels):
    """No model of transformers has both: a scale of one half is half the step from the input."""
    spec = DecoderSpec(
        vocab_size=97,
        hidden_size=32,
        layers=(replace(LAYER_SPEC, residual="parallel"),),
        final_norm=None,
    )
    scaled = replace(spec, layers=(replace(spec.layers[0], residual_scale=0.5),))
    whole, half = (
        PagedHarness(decoder_of(s, RandomSource(3, std=0.3), kernels)).prefill(
            [Sequence([1, 2, 3])], None
        )[0]
        for s in (spec, scaled)
    )
    nothing = replace(spec, layers=(replace(spec.layers[0], residual_scale=1e-9),))
    start = PagedHarness(decoder_of(nothing, RandomSource(3, std=0.3), kernels)).prefill(
        [Sequence([1, 2, 3])], None
    )[0]
    torch.testing.assert_close(half - start, (whole - start) / 2, rtol=1e-3, atol=1e-3)


def test_values_may_have_a_head_size_of_their_own_and_sinks_take_their_share(kernels):
    """Values padded with zeros to the keys' size give the same answer; a huge sink silences."""
    narrow = replace(ATTENTION, value_head_size=4)
    layer = replace(LAYER_SPEC, attention=replace(narrow, sinks=True))
    spec = DecoderSpec(vocab_size=97, hidden_size=32, layers=(layer,), final_norm=RMS)

    class Source(RandomSource):
        sink = 0.0

        def fill(self, module, leaf, target):
            super().fill(module, leaf, target)
            if module.name == "layers.sinks":
                target.fill_(self.sink)

    class Loud(Source):
        sink = 1e4

    tokens = [4, 5, 6, 7]
    some, none = (
        PagedHarness(decoder_of(spec, source(1, std=0.3), kernels)).prefill(
            [Sequence(tokens)], None
        )[0]
        for source in (Source, Loud)
    )

    class Mute(Source):
        def fill(self, module, leaf, target):
            super().fill(module, leaf, target)
            if module.name == "layers.output":
                target.zero_()

    silent = PagedHarness(decoder_of(spec, Mute(1, std=0.3), kernels)).prefill(
        [Sequence(tokens)], None
    )[0]
    torch.testing.assert_close(none, silent)
    assert not torch.allclose(some, silent)


@pytest.mark.parametrize(
    ("mlp", "message"),
    [
        (ExpertsSpec(2, 1, 48, "silu", router="sigmoid"), "router kind 'sigmoid'"),
        (replace(MLP, activation="quick_gelu"), "gated MLP with activation 'quick_gelu'"),
    ],
)
def test_what_no_kernel_computes_is_refused(mlp, message, kernels):
    layer = replace(LAYER_SPEC, mlp=mlp)
    spec = DecoderSpec(vocab_size=97, hidden_size=32, layers=(layer,), final_norm=RMS)
    with pytest.raises(UnsupportedModelError, match=message):
        decoder_of(spec, RandomSource(), kernels)
