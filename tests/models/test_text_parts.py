"""Text models of checkpoints that have a vision or an audio part, judged by the whole model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from streamserve.errors import ModelLoadError, UnsupportedModelError
from streamserve.models import LanguageModel, load_config, load_model
from streamserve.models.families.text_parts import TEXT_MODELS, TEXT_PARTS
from streamserve.models.hf_config import HfConfig
from streamserve_kernels import Kernels
from tests.models.native import DELTA, DELTA_EXPERTS, GEMMA4, LFM2, LFM3, MINISTRAL_ROPE, ROUTED
from tests.models.paged import PagedHarness, Sequence
from tests.models.parity import STATES_TOLERANCE, assert_equals_judge, prompts
from tests.models.random_model import random_model

CPU = torch.device("cpu")
TEXT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
GEMMA = {
    **TEXT,
    "head_dim": 16,
    "query_pre_attn_scalar": 12,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
# 8 pairs turn, two of them by the time, three each by the height and the width.
MROPE = {"type": "mrope", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
QWEN_VL = {**TEXT, "hidden_size": 64, "rope_parameters": MROPE}
QWEN3_VL = {
    **TEXT,
    "head_dim": 16,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5e5,
        "mrope_section": [2, 3, 3],
        "mrope_interleaved": True,
    },
}
MIXTURE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "patch_size": 4,
}
QWEN3_VISION = {
    **QWEN_VISION,
    "out_hidden_size": 32,
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 16,
}


QWEN3_5_VISION = {**QWEN_VISION, "out_hidden_size": 32, "num_position_embeddings": 16}
QWEN3_5 = {name: value for name, value in DELTA.items() if name != "layer_types"}


def of(text, vision, **values):
    """Arguments of a config: its two parts, and images that no prompt holds."""
    return {"text_config": text, "vision_config": vision, "image_token_id": 97, **values}


def named(model_type, values):
    return {"model_type": model_type, **values}


# Of which the whole models of transformers forget the scale of the logits.
COHERE = {**TEXT, "logit_scale": 1.0}
CONFIGS = {
    "AyaVision": lambda: transformers.AyaVisionConfig(
        **of(named("cohere", COHERE), named("siglip_vision_model", VISION))
    ),
    "Cohere2Vision": lambda: transformers.Cohere2VisionConfig(
        **of(
            named("cohere2", {**COHERE, "num_hidden_layers": 4, "sliding_window": 6}),
            named("siglip_vision_model", VISION),
            alignment_intermediate_size=16,
        )
    ),
    "Gemma3": lambda: transformers.Gemma3Config(**of(GEMMA, VISION)),
    "Gemma4": lambda: transformers.Gemma4Config(
        text_config={
            **GEMMA4,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": 97,
            "hidden_size_per_layer_input": 8,
            "pad_token_id": 0,
        },
        vision_config={**VISION, "head_dim": 8, "num_key_value_heads": 2},
        image_token_id=97,
        video_token_id=98,
        audio_token_id=99,
    ),
    "Gemma4Unified": lambda: transformers.Gemma4UnifiedConfig(
        text_config={**GEMMA4, "pad_token_id": 0, "tie_word_embeddings": False},
        image_token_id=97,
        video_token_id=98,
        audio_token_id=99,
        tie_word_embeddings=False,
    ),
    "Mistral3": lambda: transformers.Mistral3Config(
        **of(
            named("mistral", {**TEXT, "head_dim": 16, "sliding_window": None}),
            named("pixtral", VISION),
            tie_word_embeddings=False,
        )
    ),
    "Mistral3-ministral3": lambda: transformers.Mistral3Config(
        **of(
            named(
                "ministral3",
                {**TEXT, "head_dim": 16, "rope_parameters": MINISTRAL_ROPE},
            ),
            named("pixtral", VISION),
            tie_word_embeddings=False,
        )
    ),
    "Llava": lambda: transformers.LlavaConfig(
        **of(named("llama", TEXT), named("clip_vision_model", VISION))
    ),
    "LlavaNext": lambda: transformers.LlavaNextConfig(
        **of(named("mistral", {**TEXT, "sliding_window": 7}), named("clip_vision_model", VISION))
    ),
    "LlavaOnevision": lambda: transformers.LlavaOnevisionConfig(
        **of(
            named("qwen2", {**TEXT, "tie_word_embeddings": True}),
            named("siglip_vision_model", VISION),
        )
    ),
    "Qwen2VL": lambda: transformers.Qwen2VLConfig(
        **of(QWEN_VL, {**QWEN_VISION, "embed_dim": 16}, tie_word_embeddings=True)
    ),
    "Qwen2_5_VL": lambda: transformers.Qwen2_5_VLConfig(
        **of(QWEN_VL, {**QWEN_VISION, "out_hidden_size": 64})
    ),
    "Qwen3VL": lambda: transformers.Qwen3VLConfig(**of(QWEN3_VL, QWEN3_VISION)),
    "Qwen3VLMoe": lambda: transformers.Qwen3VLMoeConfig(
        **of({**QWEN3_VL, **MIXTURE}, QWEN3_VISION)
    ),
    "Qwen3_5": lambda: transformers.Qwen3_5Config(
        **of(named("qwen3_5_text", QWEN3_5), QWEN3_5_VISION, tie_word_embeddings=False)
    ),
    "Qwen3_5Moe": lambda: transformers.Qwen3_5MoeConfig(
        **of(
            named("qwen3_5_moe_text", {**QWEN3_5, **DELTA_EXPERTS}),
            QWEN3_5_VISION,
            tie_word_embeddings=False,
        )
    ),
    "Glm4vMoe": lambda: transformers.Glm4vMoeConfig(
        **of(
            {
                **ROUTED,
                "head_dim": 16,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 0.5,
                    "mrope_section": [1, 1, 2],
                },
            },
            {
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": 32,
                "image_size": 16,
                "patch_size": 8,
            },
            tie_word_embeddings=False,
        )
    ),
    "Lfm2Vl": lambda: transformers.Lfm2VlConfig(
        **of(
            named("lfm2", {**LFM2, "full_attn_idxs": [1]}),
            {**VISION, "num_patches": 4, "vision_use_head": False},
            projector_hidden_size=16,
            tie_word_embeddings=True,
        )
    ),
    "Lfm3Vl": lambda: transformers.Lfm3VlConfig(
        **of(
            named("lfm3", {**LFM3, "layer_types": ["conv", "full_attention", "sliding_attention"]}),
            {**VISION, "num_key_value_heads": 1},
            projector_hidden_size=16,
        )
    ),
    "InternVL": lambda: transformers.InternVLConfig(
        **of(
            named("qwen3", {**TEXT, "head_dim": 16}),
            {**VISION, "image_size": [16, 16], "patch_size": [8, 8]},
            tie_word_embeddings=False,
        )
    ),
    "Idefics3": lambda: transformers.Idefics3Config(**of(named("llama", TEXT), VISION)),
    "SmolVLM": lambda: transformers.SmolVLMConfig(**of(named("llama", TEXT), VISION)),
    "Qwen2Audio": lambda: transformers.Qwen2AudioConfig(
        text_config=named("qwen2", TEXT),
        audio_config={
            "d_model": 16,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
        },
        audio_token_index=97,
    ),
}


def architecture_of(name: str) -> str:
    return name.partition("-")[0] + "ForConditionalGeneration"


def build(name: str) -> transformers.PreTrainedModel:
    architecture = getattr(transformers, architecture_of(name))
    return random_model(architecture._from_config(CONFIGS[name]()))


def load(directory: Path, kernels: Kernels) -> LanguageModel:
    return load_model(directory, dtype=torch.float32, device=CPU, kernels=kernels)


def publish_experts(file: Path) -> None:
    """Inputs by outputs, as Qwen has them; transformers reads both, and writes what it holds."""
    tensors = load_file(file)
    for name in [name for name in tensors if ".experts." in name]:
        tensors[name] = tensors[name].mT.contiguous()
    save_file(tensors, file)


@pytest.mark.parametrize("name", CONFIGS)
def test_texts_are_continued_as_by_the_whole_model(name, tmp_path, kernels):
    """From names as they are published, and as transformers has them now."""
    model = build(name)
    model.save_pretrained(tmp_path)
    if name == "Qwen3VLMoe":
        publish_experts(tmp_path / "model.safetensors")
    decoder = load(tmp_path, kernels)
    tolerance = STATES_TOLERANCE if name.startswith("Qwen3_5") else 1e-4
    assert_equals_judge(model, decoder, chunk=5, prefix_hit=True, tolerance=tolerance)

    names = {n: t.contiguous() for n, t in model.state_dict().items()}
    if model._tied_weights_keys and model.lm_head.weight is model.get_input_embeddings().weight:
        del names["lm_head.weight"]
    published = load_file(tmp_path / "model.safetensors").keys()
    if not published <= names.keys():
        save_file(names, tmp_path / "model.safetensors", metadata={"format": "pt"})
        of_names = [
            PagedHarness(decoder).prefill([Sequence(prompts(shared=0)[0])], None)[0]
            for decoder in (decoder, load(tmp_path, kernels))
        ]
        assert torch.equal(*of_names)


def test_every_part_is_judged():
    assert set(map(architecture_of, CONFIGS)) == set(TEXT_PARTS)


@pytest.mark.parametrize("model_type", TEXT_MODELS)
def test_what_a_config_leaves_out_is_what_transformers_takes(model_type):
    given = {}
    if "moe" in model_type:
        given = {"num_experts": 8, "head_dim": 128, "tie_word_embeddings": False}
    family = TEXT_MODELS[model_type].family
    whole = transformers.CONFIG_MAPPING[model_type](**given).to_dict()
    if "moe" in model_type:
        whole["norm_topk_prob"] = True  # says nothing of what it does
    left_out = HfConfig({**TEXT_MODELS[model_type].left_out, **given})
    assert family.spec(left_out) == family.spec(HfConfig(whole))
    assert family.max_positions(left_out) == family.max_positions(HfConfig(whole))


def write_config(directory: Path, architecture: str, **values) -> None:
    values["architectures"] = [architecture]
    (directory / "config.json").write_text(json.dumps(values))


def test_gemma_3_as_it_is_published(tmp_path):
    write_config(
        tmp_path,
        "Gemma3ForConditionalGeneration",
        eos_token_id=[1, 106],
        torch_dtype="bfloat16",
        vision_config={"model_type": "siglip_vision_model"},
        text_config={
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
    )
    config = load_config(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["text_config"] |= {name: values.pop(name) for name in ("eos_token_id", "torch_dtype")}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert load_config(tmp_path) == config, "or in the text's own config"
    assert (config.eos_token_ids, config.dtype) == ((1, 106), torch.bfloat16)
    assert (config.unserved, config.max_position_embeddings) == ("images", 131_072)
    spec = config.spec
    assert (spec.vocab_size, len(spec.layers), spec.tied_head) == (262_208, 34, True)
    local, whole = spec.layers[0].attention, spec.layers[5].attention
    assert (local.window, local.rope.base, local.rope.scaling) == (1024, 1e4, None)
    assert (whole.window, whole.rope.base, whole.rope.scaling.factor) == (None, 1e6, 8.0)
    assert (whole.num_heads, whole.num_kv_heads, whole.query_key_head_size) == (8, 4, 256)


def test_where_a_config_says_two_things_of_the_head_the_weights_decide(tmp_path, kernels):
    """transformers 5 writes ``true`` beside Mistral Small's own head."""
    model = build("Mistral3")
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    assert values["text_config"]["tie_word_embeddings"] is False
    file.write_text(json.dumps({**values, "tie_word_embeddings": True}))
    assert not load_config(tmp_path).spec.tied_head
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    assert load_config(tmp_path).spec.tied_head


def test_only_declared_parts_are_left_out(tmp_path, kernels):
    build("Gemma3").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert any(name.startswith("vision_tower.") for name in tensors)
    tensors["sound_tower.weight"] = torch.zeros(3)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"no use for 1 tensor: sound_tower\.weight$"):
        load(tmp_path, kernels)


@pytest.mark.parametrize(
    ("architecture", "values", "message"),
    [
        (
            "Mistral3ForConditionalGeneration",
            {"text_config": {"model_type": "mistral4"}},
            "'mistral4' is not supported as the text model of Mistral3",
        ),
        ("Gemma3ForConditionalGeneration", {"text_config": [1]}, "text_config must be an object"),
        (
            "Gemma3nForConditionalGeneration",
            {"model_type": "gemma3n"},
            r"Gemma3nForCond.*more than text \(vision_config, audio_config\), and the text part is "
            "served of these: Gemma3ForConditionalGeneration",
        ),
        ("Llama4ForConditionalGeneration", {"model_type": "llama4"}, "more than text"),
        ("BambaForCausalLM", {"model_type": "bamba"}, "'linear_attention' keep a state"),
        ("Llama4ForCausalLM", {"model_type": "llama4_text"}, "earlier ones other than through"),
    ],
)
def test_what_is_not_served_is_refused_with_a_sentence(tmp_path, architecture, values, message):
    write_config(tmp_path, architecture, **values)
    with pytest.raises((ModelLoadError, UnsupportedModelError), match=message):
        load_config(tmp_path)
