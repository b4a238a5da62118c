"""Norms, activations, linear layers and experts: naive against transformers, CPU against naive."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from streamserve_kernels import Kernels, PackedLinear
from streamserve_kernels.routing import Routing

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
TIGHT = {torch.float32: {"atol": 5e-6, "rtol": 2e-6}, torch.bfloat16: {"atol": 4e-6, "rtol": 8e-3}}


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@DTYPES
def test_naive_rms_norm_rounds_as_transformers(naive: Kernels, dtype: torch.dtype) -> None:
    x, weight = normal(1, 5, 576, dtype=dtype), normal(2, 576, dtype=dtype)
    llama, gemma = LlamaRMSNorm(576, 1e-6).to(dtype), GemmaRMSNorm(576, 1e-6).to(dtype)
    with torch.no_grad():
        llama.weight.copy_(weight)
        gemma.weight.copy_(weight)
        assert torch.equal(naive.rms_norm(x, weight, 1e-6), llama(x))
        assert torch.equal(naive.rms_norm(x, weight, 1e-6, weight_offset=1.0), gemma(x))


def both(result: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("with_residual", [False, True])
@DTYPES
def test_norms_are_naive(
    naive: Kernels, cpu: Kernels, rows: int, with_residual: bool, dtype: torch.dtype
) -> None:
    wide = normal(3, rows, 600, dtype=dtype)
    x = wide[:, :579]  # rows at a stride, and a tail after whole vectors
    weight, bias = normal(4, 579, dtype=dtype), normal(5, 579, dtype=dtype)
    residual = normal(6, rows, 579, dtype=dtype) if with_residual else None
    calls = [
        lambda k: k.rms_norm(x, weight, 1e-6, residual),
        lambda k: k.rms_norm(x, weight, 1e-6, residual, weight_offset=1.0),
        lambda k: k.layer_norm(x, weight, bias, 1e-5, residual),
        lambda k: k.layer_norm(x, weight, None, 1e-5, residual),
        lambda k: k.layer_norm(x, None, None, 1e-5, residual),
    ]
    for call in calls:
        expected, got = both(call(naive)), both(call(cpu))
        assert len(got) == len(expected)
        torch.testing.assert_close(got[0], expected[0], **TIGHT[dtype])
        if with_residual:
            assert torch.equal(got[1], expected[1])
    assert torch.equal(wide, normal(3, rows, 600, dtype=dtype)), "inputs are left alone"


@DTYPES
def test_layer_norm_is_torchs(naive: Kernels, dtype: torch.dtype) -> None:
    x, w, b = (normal(i, *s, dtype=dtype) for i, s in enumerate([(4, 100), (100,), (100,)]))
    expected = torch.nn.functional.layer_norm(x, (100,), w, b, 1e-5)
    torch.testing.assert_close(naive.layer_norm(x, w, b, 1e-5), expected, **TIGHT[dtype])


@pytest.mark.parametrize(
    ("kind", "theirs"),
    [
        ("silu", "silu"),
        ("gelu", "gelu"),
        ("gelu_tanh", "gelu_pytorch_tanh"),
        ("gelu_new", "gelu_new"),
        ("gelu_fast", "gelu_fast"),
        ("quick_gelu", "quick_gelu"),
        ("relu", "relu"),
        ("relu2", "relu2"),
    ],
)
@DTYPES
def test_activation(
    naive: Kernels, cpu: Kernels, kind: str, theirs: str, dtype: torch.dtype
) -> None:
    x = normal(9, 7, 333, dtype=dtype) * 4
    expected = naive.activation(x, kind)
    torch.testing.assert_close(expected.float(), ACT2FN[theirs](x.float()), atol=2e-6, rtol=8e-3)
    torch.testing.assert_close(cpu.activation(x, kind), expected, **TIGHT[dtype])


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("rows", [1, 4, 50])
@DTYPES
def test_gated_activation(
    naive: Kernels, cpu: Kernels, kind: str, rows: int, dtype: torch.dtype
) -> None:
    x = normal(10, rows, 2 * 1537, dtype=dtype) * 5
    gate, up = x.float().chunk(2, dim=-1)
    theirs = {"gelu_tanh": "gelu_pytorch_tanh"}.get(kind, kind)
    expected = naive.gated_activation(x, kind)
    torch.testing.assert_close(expected.float(), ACT2FN[theirs](gate) * up, atol=1e-5, rtol=8e-3)
    torch.testing.assert_close(cpu.gated_activation(x, kind), expected, **TIGHT[dtype])


@DTYPES
def test_a_clamped_gate(naive: Kernels, cpu: Kernels, dtype: torch.dtype) -> None:
    """As transformers' `GptOssExperts` has it: gates up to 7, ups within 7, plus one."""
    x = normal(10, 50, 2 * 65, dtype=dtype) * 5
    gate, up = x.float().chunk(2, dim=-1)
    assert (gate > 7).any()
    assert (up < -7).any()
    gate, up = gate.clamp(max=7.0), up.clamp(min=-7.0, max=7.0)
    expected = naive.gated_activation(x, "clamped_swiglu")
    theirs = (up + 1) * gate * torch.sigmoid(gate * 1.702)
    torch.testing.assert_close(expected.float(), theirs, atol=1e-5, rtol=8e-3)
    torch.testing.assert_close(cpu.gated_activation(x, "clamped_swiglu"), expected, **TIGHT[dtype])


def test_activations_of_extreme_values_are_finite(cpu: Kernels) -> None:
    x = torch.tensor([[-1e30, -200.0, -90.0, -0.0, 0.0, 90.0, 200.0, 1e30]])
    for kind in ("silu", "gelu_tanh"):
        out = cpu.gated_activation(torch.cat([x, torch.ones_like(x)], dim=1), kind)
        expected = x.clamp(min=0.0)
        torch.testing.assert_close(out, expected, atol=1e-7, rtol=1e-6)


def test_unknown_activation_is_refused(naive: Kernels, cpu: Kernels) -> None:
    for kernels in (naive, cpu):
        with pytest.raises(ValueError, match="'swish'"):
            kernels.activation(torch.zeros(2, 2), "swish")
        with pytest.raises(ValueError, match="'swish'"):
            kernels.gated_activation(torch.zeros(2, 2), "swish")


@pytest.mark.parametrize("rows", [0, 1, 2, 4, 5, 8, 9, 16, 33, 100])
@pytest.mark.parametrize(
    ("out_features", "in_features"), [(960, 576), (100, 72), (37, 31), (576, 1536), (16, 20)]
)
@pytest.mark.parametrize("with_bias", [False, True])
@DTYPES
def test_linear(
    naive: Kernels,
    cpu: Kernels,
    rows: int,
    out_features: int,
    in_features: int,
    with_bias: bool,
    dtype: torch.dtype,
) -> None:
    weight = normal(11, out_features, in_features, dtype=dtype)
    bias = normal(12, out_features, dtype=dtype) if with_bias else None
    x = normal(13, rows, in_features + 9, dtype=dtype)[:, :in_features]
    packed = cpu.prepare_linear(weight.clone(), bias)
    expected = torch.nn.functional.linear(
        x.double(), weight.double(), None if bias is None else bias.double()
    ).to(dtype)
    tolerance = (
        {"atol": 2e-4, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 8e-3}
    )
    for kernels, prepared in ((naive, naive.prepare_linear(weight, bias)), (cpu, packed)):
        out = kernels.linear(x, prepared)
        assert out.dtype == dtype
        torch.testing.assert_close(out, expected, **tolerance)
    assert isinstance(packed, PackedLinear)
    assert torch.equal(packed.unpack(), weight)
    assert (packed.out_features, packed.in_features) == (out_features, in_features)
    assert packed.nbytes >= weight.nbytes
    stacked = cpu.linear(x[None], packed)
    torch.testing.assert_close(stacked[0], packed(x), **tolerance)


@DTYPES
def test_embedding(cpu: Kernels, dtype: torch.dtype) -> None:
    weight = normal(14, 50, 12, dtype=dtype)
    ids = torch.tensor([3, 3, 49, 0])
    assert torch.equal(cpu.embedding(ids, weight), weight[ids])


@pytest.mark.parametrize("tokens", [1, 6, 40])
@pytest.mark.parametrize("renormalise", [True, False])
@DTYPES
def test_moe(
    naive: Kernels, cpu: Kernels, tokens: int, renormalise: bool, dtype: torch.dtype
) -> None:
    experts, hidden, inner = 8, 64, 96
    # In float32: of equally likely experts a backend may choose any.
    x, logits = normal(15, tokens, hidden, dtype=dtype), normal(16, tokens, experts)
    gate_up = normal(17, experts, 2 * inner, hidden, dtype=dtype) / 8
    down = normal(18, experts, hidden, inner, dtype=dtype) / 8
    results = [
        k.moe(
            x,
            logits,
            [k.prepare_linear(w) for w in gate_up],
            [k.prepare_linear(w) for w in down],
            Routing(2, renormalise),
            "silu",
        )
        for k in (naive, cpu)
    ]
    tolerance = (
        {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 3e-2, "rtol": 2e-2}
    )
    torch.testing.assert_close(results[1], results[0], **tolerance)


def test_naive_moe_is_mixtrals(naive: Kernels) -> None:
    config = MixtralConfig(
        hidden_size=32, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2
    )
    torch.manual_seed(0)
    block = MixtralSparseMoeBlock(config).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.2)
        x = normal(19, 10, 32)
        expected = block(x[None])
        expected = expected[0] if isinstance(expected, tuple) else expected
        out = naive.moe(
            x,
            x @ block.gate.weight.T,
            [naive.prepare_linear(w) for w in block.experts.gate_up_proj],
            [naive.prepare_linear(w) for w in block.experts.down_proj],
            Routing(2, True),
            "silu",
        )
    torch.testing.assert_close(out, expected[0], atol=1e-5, rtol=1e-5)
