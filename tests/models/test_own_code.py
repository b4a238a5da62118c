"""What is particular about the families whose repositories ship code, and about gpt-oss."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from streamserve.errors import ModelLoadError, UnsupportedModelError
from streamserve.models import load_config, load_model
from streamserve.models.quantised import mxfp4
from tests.models import references
from tests.models.native import BASE, CHATGLM, DEEPSEEK, ENDS, GQA, QWEN
from tests.models.packers import edit_config, mxfp4_experts
from tests.models.paged import PagedHarness, Sequence

CPU = torch.device("cpu")
TOKENS = [5, 17, 3, 88, 41]


def write_config(directory, architecture: str, **values) -> None:
    values = {"architectures": [architecture], **values}
    (directory / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("architecture", "values", "message"),
    [
        ("QWenLMHeadModel", {**QWEN, "visual": {"layers": 48}}, "Qwen-VL's pictures"),
        ("ChatGLMModel", {**CHATGLM, "position_encoding_2d": True}, "the first ChatGLM"),
        ("ChatGLMModel", {**CHATGLM, "pre_seq_len": 128}, "trained prefixes"),
        ("ChatGLMModel", {**CHATGLM, "vision_config": {"layers": 63}}, "pictures"),
        ("DeepseekForCausalLM", {**DEEPSEEK, "scoring_func": "sigmoid"}, "'sigmoid' is not"),
        (
            "GptOssForCausalLM",
            {**GQA, "num_local_experts": 4, "swiglu_limit": 5.0},
            "swiglu_limit 5.0 is not supported; it must be 7.0",
        ),
    ],
)
def test_what_is_not_built_is_refused_by_name(tmp_path, architecture, values, message):
    write_config(tmp_path, architecture, **values)
    with pytest.raises(UnsupportedModelError, match=message):
        load_config(tmp_path)


@pytest.mark.parametrize(("stretches", "longest"), [(True, 128), (False, 32)])
def test_qwen_serves_its_trained_length_unless_asked_for_more(tmp_path, stretches, longest):
    write_config(
        tmp_path, "QWenLMHeadModel", **{**QWEN, "seq_length": 32}, use_dynamic_ntk=stretches
    )
    config = load_config(tmp_path)
    assert config.max_position_embeddings == longest
    assert config.resolve_max_model_len(None) == 32
    assert config.resolve_max_model_len(longest) == longest
    with pytest.raises(ModelLoadError, match=f"must be between 1 and {longest}"):
        config.resolve_max_model_len(longest + 1)


@pytest.mark.parametrize(
    ("architecture", "values", "alibi", "is_second"),
    [
        ("BaiChuanForCausalLM", {**BASE, "vocab_size": 64_000}, False, False),
        ("BaichuanForCausalLM", {**BASE, "hidden_size": 4096}, False, False),
        (
            "BaichuanForCausalLM",
            {**BASE, "hidden_size": 5120, "num_attention_heads": 40},
            True,
            False,
        ),
        ("BaichuanForCausalLM", {**BASE, "vocab_size": 125_696}, False, True),
    ],
)
def test_which_baichuan_it_is(tmp_path, architecture, values, alibi, is_second):
    """Whatever was added to the configs that were published: 13B is known by its size."""
    write_config(tmp_path, architecture, **values)
    spec = load_config(tmp_path).spec
    assert [layer.attention.alibi for layer in spec.layers] == [alibi] * 3
    assert [layer.attention.rope is None for layer in spec.layers] == [alibi] * 3
    assert spec.normalised_head == is_second


def test_every_other_layer_of_gpt_oss_has_a_window_beginning_with_the_first(tmp_path):
    values = {**GQA, "num_local_experts": 4, "sliding_window": 128}
    write_config(tmp_path, "GptOssForCausalLM", **values)
    windows = [layer.attention.window for layer in load_config(tmp_path).spec.layers]
    assert windows == [128, None, 128]


def test_a_head_that_is_quantised_is_normalised_first(tmp_path, build, kernels):
    """int8 keeps a scale for each row, so that the codes alone would not tell."""
    model = build(references.Baichuan(**BASE, z_loss_weight=0))
    model.save_pretrained(tmp_path)
    decoder = load_model(
        tmp_path, dtype=torch.float32, device=CPU, kernels=kernels, quantization="int8"
    )
    *_, head = decoder.linears()
    lengths = head.unpack().norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0.01, atol=0)


def test_mxfp4_experts_equal_transformers(tmp_path, build, kernels):
    """The same checkpoint in both forms, the second by transformers' dequantisation: equal logits.

    Gates and ups are read row by row, experts slice by slice.
    """
    config = transformers.GptOssConfig(
        **{**GQA, "hidden_size": 64, "intermediate_size": 96},
        **ENDS,
        head_dim=16,
        num_local_experts=3,
        num_experts_per_tok=2,
    )
    for name in ("plain", "packed"):
        build(config).save_pretrained(tmp_path / name)
    plain, packed = (
        load_file(tmp_path / name / "model.safetensors") for name in ("plain", "packed")
    )
    for name, (blocks, scales) in mxfp4_experts(packed).items():
        plain[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    for name, tensors in (("plain", plain), ("packed", packed)):
        save_file(tensors, tmp_path / name / "model.safetensors")
    edit_config(tmp_path / "packed", quantization_config={"quant_method": "mxfp4"})

    def logits(name: str) -> torch.Tensor:
        decoder = load_model(tmp_path / name, dtype=torch.float32, device=CPU, kernels=kernels)
        return PagedHarness(decoder).prefill([Sequence(TOKENS)], None)[0]

    expected = logits("plain")
    assert expected.abs().max() > 0.1
    assert logits("packed").equal(expected)
    scales = packed["model.layers.1.mlp.experts.down_proj_scales"]
    packed["model.layers.1.mlp.experts.down_proj_scales"] = scales[:, :, :1].contiguous()
    save_file(packed, tmp_path / "packed" / "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"layers\.1.*down_proj_scales has shape \[3, 64, 1\]"):
        logits("packed")


def test_the_values_of_mxfp4():
    packed = torch.arange(16, dtype=torch.uint8).view(1, 1, 16)
    scales = torch.tensor([[128]], dtype=torch.uint8)
    weight = mxfp4.table_weight(packed, scales).dequantise()
    assert weight[0, 0::2].tolist() == [0, 1, 2, 3, 4, 6, 8, 12, -0.0, -1, -2, -3, -4, -6, -8, -12]
    assert not weight[0, 1::2].any()
