"""GGUF files of models whose layers keep states: orders that are undone, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from streamserve.errors import ModelLoadError, UnsupportedModelError
from streamserve.models import load_config
from streamserve.models.gguf.kinds import KINDS, unpack_rows
from streamserve.models.gguf.orders import Order
from streamserve.models.parameters import decoder_modules
from streamserve_kernels.stored import FactoredNumbers
from tests.models.gguf_files import F32, Kind, settings_of, write_gguf
from tests.models.gguf_hybrids import DELTA_VALUES, HYBRID_CASES
from tests.models.gguf_parity import compare, sizes
from tests.models.native import DELTA


def _write(path: Any, case: str, build: Any, changed: dict[str, Any], **options: Any) -> Any:
    architecture, config, values, extra = HYBRID_CASES[case]
    model = build(config())
    values = {**sizes(settings_of(model)), **values, **changed}
    write_gguf(path, model, architecture, values, extra=extra(), **options)
    return model


# Two of its value heads share a block of 256 columns.
WIDE = {
    **DELTA,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "layer_types": DELTA["layer_types"][:2],
    "head_dim": 64,
    "linear_value_head_dim": 128,
}
WIDE_VALUES = {
    **DELTA_VALUES,
    "attention.key_length": 64,
    "attention.value_length": 64,
    "rope.dimension_count": 16,
    "ssm.inner_size": 512,
    "attention.recurrent_layers": [True, False],
}
MIXES = {
    "q8_0": {"": Kind.Q8_0},
    "q4_k_m": {"attn_qkv": Kind.Q6_K, "ssm_alpha": Kind.Q8_0, "": Kind.Q4_K},
    "q6_k": {"attn_gate": Kind.Q5_K, "ssm_beta": F32, "": Kind.Q6_K},
    "tables": {"attn_qkv": Kind.IQ4_NL, "": Kind.IQ4_XS},
}


@pytest.mark.parametrize("mix", MIXES)
def test_value_heads_are_put_in_order_packed(mix, tmp_path, build, kernels):
    model = build(transformers.Qwen3_5TextConfig(**WIDE))
    for norm in (p for n, p in model.named_parameters() if n.endswith("norm.weight")):
        norm.data.mul_(0.3)  # or logits of this width are too large to compare
    kinds = {"conv1d": F32, **MIXES[mix]}
    values = {**sizes(model.config), **WIDE_VALUES}
    write_gguf(
        tmp_path / "m.gguf",
        model,
        "qwen35",
        values,
        kind=lambda name: next(kind for part, kind in kinds.items() if part in name),
    )
    decoder = compare(tmp_path / "m.gguf", model, kernels, tolerance=1e-3)
    loaded = load_config(tmp_path / "m.gguf")
    assert decoder.nbytes <= loaded.weight_bytes(torch.float32)
    plain = {
        module.name
        for module in decoder_modules(loaded.spec)
        if module.columns is not None and loaded.stored_quantization.kinds(module) is None
    }
    assert plain == {"layers.delta.gates", "layers.delta.conv"}


@pytest.mark.parametrize("number", [n for n, kind in KINDS.items() if kind.unpack is not None])
def test_columns_of_any_kind_are_moved_by_heads(number):
    kind = KINDS[number]
    shape = (5, 768 // kind.block * kind.nbytes)
    data = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
    # The high byte of no float16 may be that of an infinity.
    weight = unpack_rows(kind, torch.from_numpy(data & 0xBB), 5)
    heads = [3, 0, 4, 1, 5, 2]
    moved = Order(torch.tensor(heads), run=128).packed(weight)
    columns = weight.dequantise().split(128, dim=1)
    expected = torch.cat([columns[head] for head in heads], dim=1)
    torch.testing.assert_close(moved.dequantise(), expected, rtol=0, atol=0, equal_nan=True)
    numbers = [moved.scales, getattr(moved, "minimums", None)]
    held = sum(
        n.codes.nbytes + n.units.nbytes if isinstance(n, FactoredNumbers) else n.nbytes
        for n in numbers
        if n is not None
    )
    assert held == 5 * 768 / kind.group * kind.in_runs(128).group_bytes


def test_products_that_stayed_one_are_read_too(tmp_path, build, kernels):
    model = _write(tmp_path / "m.gguf", "qwen3-next", build, {}, whole_qkvz=True)
    compare(tmp_path / "m.gguf", model, kernels)


def test_groups_across_heads_are_refused(tmp_path, build):
    path = tmp_path / "m.gguf"
    changed = {"linear_value_head_dim": 16}
    model = build(transformers.Qwen3_5TextConfig(**{**DELTA, **changed}))
    values = {**sizes(model.config), **DELTA_VALUES, "ssm.inner_size": 64}
    write_gguf(
        path,
        model,
        "qwen35",
        values,
        kind=lambda name: Kind.Q8_0 if "ssm_out" in name else F32,
    )
    refused = (
        f"{path}: tensor blk.0.ssm_out.weight is of kind Q8_0, whose groups of 32 do not fit value "
        "heads of 16: their order cannot be undone"
    )
    with pytest.raises(UnsupportedModelError, match=re.escape(refused)):
        load_config(path)


@pytest.mark.parametrize(
    ("case", "changed", "message"),
    [
        ("lfm2", {"attention.head_count_kv": [1, 2, 0]}, "differs among the layers that attend"),
        ("lfm2", {"attention.head_count_kv": 2}, "head_count_kv must be an array of numbers"),
        ("lfm2", {"attention.head_count_kv": [0, 2]}, "layer_types must list 3 layers"),
        ("lfm2", {"nextn_predict_layers": 1}, "nextn_predict_layers 1 is not supported"),
        ("qwen3.5", {"ssm.group_count": 3}, "4 value heads cannot share 3 key heads evenly"),
        ("qwen3.5", {"attention.recurrent_layers": [True]}, "layer_types must list 4 layers"),
        ("qwen3.5", {"ssm.time_step_rank": 0}, "time_step_rank must be at least 1, got 0"),
    ],
)
def test_metadata_that_does_not_fit_is_named(case, changed, message, tmp_path, build):
    _write(tmp_path / "m.gguf", case, build, changed)
    with pytest.raises((ModelLoadError, UnsupportedModelError), match=message):
        load_config(tmp_path / "m.gguf")
