"""Axes that no published model combines, each axis a family's, and what no kernel computes."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import replace

import pytest
import torch

from streamserve.errors import UnsupportedModelError
from streamserve.models import (
    Decoder,
    batch,
    block,
    decoder,
    layers,
    parameters,
    per_layer,
    pieces,
    recurrent,
    rope,
    shared_cache,
    side_by_side,
    spec,
    weights,
)
from streamserve.models.checkpoint import RandomSource
from streamserve.models.families import FAMILIES
from streamserve.models.spec import (
    AttentionSpec,
    DecoderSpec,
    ExpertsSpec,
    LayerSpec,
    MlpSpec,
    NormSpec,
    RopeSpec,
)
from streamserve.models.weights import build_weights
from tests.models.paged import PagedHarness, Sequence

CPU = torch.device("cpu")
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
        (ExpertsSpec(2, 1, 48, "quick_gelu"), "gated MLP with activation 'quick_gelu'"),
        (replace(MLP, activation="quick_gelu"), "gated MLP with activation 'quick_gelu'"),
    ],
)
def test_what_no_kernel_computes_is_refused(mlp, message, kernels):
    layer = replace(LAYER_SPEC, mlp=mlp)
    spec = DecoderSpec(vocab_size=97, hidden_size=32, layers=(layer,), final_norm=RMS)
    with pytest.raises(UnsupportedModelError, match=message):
        decoder_of(spec, RandomSource(), kernels)


# What a step, and what brings weights to it, is made of.
FORWARD = (
    batch,
    block,
    decoder,
    layers,
    parameters,
    per_layer,
    pieces,
    recurrent,
    rope,
    shared_cache,
    side_by_side,
    spec,
    weights,
)


@pytest.mark.parametrize("module", FORWARD, ids=lambda module: module.__name__.rpartition(".")[2])
def test_the_forward_knows_no_family(module):
    """A family is a row of data: only docstrings and comments may speak of one."""
    families = {word for f in FAMILIES.values() for word in (f.series, f.model_type)}
    words = {re.sub(r"[^a-z]", "", name.lower()) for name in families} - {"gpt"}
    tree = ast.parse(inspect.getsource(module))
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and isinstance(node.body[0], ast.Expr)
    }
    said = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            said += [] if id(node) in docstrings else [node.value]
        elif isinstance(node, ast.Name | ast.Attribute | ast.FunctionDef | ast.ClassDef):
            said.append(getattr(node, "id", None) or getattr(node, "attr", None) or node.name)
        elif isinstance(node, ast.ImportFrom):
            said.append(node.module)
    for name in set(said) - {
        "llama3",
        "_llama3",
    }:  # which is what configs call a stretch of frequencies
        assert not name.startswith("streamserve.models.families"), name
        parts = re.findall(r"[a-z]+", re.sub(r"([A-Z])", r" \1", name).lower())
        assert not words & set(parts), name
