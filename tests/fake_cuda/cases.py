"""Checkpoints of every family and every kind of weights, tiny, in directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 320,
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip

EAGLE3 = {
    **LLAMA, "architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1,
    "draft_vocab_size": 160, "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1]},
}  # fmt: skip


class Case(NamedTuple):
    """``native``: a config of `tests.models.native`, or of `foreign` through transformers.

    ``packed``: a kind of `tests.models.packers`, or MXFP4.
    In the flags DIRECTORY is the checkpoint's; a plain one has an EAGLE-3 head in it.
    """

    native: str | None = None
    packed: str | None = None
    flags: tuple[str, ...] = ()


_DUMMY = ("--load-format", "dummy")
_WITH_LORA = ("--enable-lora", "--max-loras", "2", "--max-lora-rank", "8")
_FP8_CACHE = ("--kv-cache-dtype", "fp8", "--swap-space", "8MiB")
_LOOKUP = ("--speculative-config", '{"method": "ngram", "num_speculative_tokens": 3}')
_MTP = ("--speculative-config", '{"method": "mtp", "num_speculative_tokens": 2}')
_EAGLE3 = ("--speculative-config", '{"method": "eagle3", "model": "DIRECTORY/head"}')
_FOREIGN = ("--model-impl", "transformers")
_LARGE = (
    "--max-num-batched-tokens", "2048", "--max-num-seqs", "80", "--max-model-len", "128",
    "--kv-cache-memory", "32MiB",
)  # fmt: skip
NATIVES = (
    "llama3", "qwen2-windows", "qwen3", "gemma", "gemma2", "gemma3", "gpt2", "gpt-j", "gpt-neox",
    "falcon-7b", "falcon-rw", "bloom", "mixtral", "qwen2-moe", "qwen3-moe", "deepseek-moe",
    "gpt-oss", "granite-moe", "phi3", "baichuan1-13b", "chatglm2", "glm", "qwen1", "smollm3",
    "gemma4", "gemma4-per-layer", "gemma4-moe",
)  # fmt: skip
HYBRIDS = ("qwen3-next", "qwen3.5", "qwen3.5-last", "qwen3.5-moe", "lfm2", "lfm2-biases")
FOREIGNERS = (
    "llama", "cohere2", "deepseek-v2", "deepseek-v3", "glm4-moe", "olmo3", "olmoe", "nemotron",
    "granite", "granite-moe", "gemma3n",
)  # fmt: skip
PACKED = (
    "gptq-4-act-order", "gptq-3", "gptq-2-v2", "gptq-8", "awq", "squeezellm-4",
    "squeezellm-3", "ct-int4", "ct-int8", "fp8-block", "fp8-tensor", "bnb-nf4", "bnb-int8",
)  # fmt: skip
GGUF = ("Q4_0", "Q4_K", "Q6_K", "Q3_K", "Q5_1", "Q8_0", "IQ4_NL")
CASES: dict[str, Case] = {
    "llama": Case(flags=(*_DUMMY, *_WITH_LORA)),
    "llama-large": Case(flags=(*_DUMMY, *_LARGE)),
    "moe-large": Case("qwen2-moe", flags=_LARGE),
    "int4-large": Case(flags=(*_DUMMY, *_LARGE, "--quantization", "int4")),
    "llama-float32": Case(flags=(*_DUMMY, "--dtype", "float32")),
    "llama-float16": Case(flags=(*_DUMMY, "--dtype", "float16")),
    "llama-eager": Case(flags=(*_DUMMY, "--enforce-eager")),
    "llama-int8-fp8-cache": Case(flags=(*_DUMMY, *_FP8_CACHE, *_LOOKUP, "--quantization", "int8")),
    **{
        f"llama-{kind}": Case(flags=(*_DUMMY, "--quantization", kind))
        for kind in ("int8", "int4", "fp8")
    },
    **{
        f"moe-{kind}": Case("qwen2-moe", flags=("--quantization", kind))
        for kind in ("int8", "int4", "fp8")
    },
    **{name: Case(name) for name in NATIVES},
    **{name: Case(name) for name in HYBRIDS},
    "hybrid-drafts": Case("qwen3-next", flags=_LOOKUP),
    "qwen3.5-mtp": Case("qwen3.5", flags=(*_DUMMY, *_MTP)),
    "llama-eagle3": Case(flags=(*_DUMMY, *_EAGLE3)),
    "hybrid-large": Case("qwen3-next", flags=_LARGE),
    "hybrid-fp8-cache": Case("qwen3-next", flags=("--kv-cache-dtype", "fp8")),
    **{f"transformers-{name}": Case(f"transformers-{name}", flags=_FOREIGN) for name in FOREIGNERS},
    "transformers-olmoe-int8": Case(
        "transformers-olmoe", flags=(*_FOREIGN, "--quantization", "int8")
    ),
    **{kind: Case("stored", packed=kind) for kind in PACKED},
    "gpt-oss-mxfp4": Case("gpt-oss", packed="mxfp4"),
    **{kind: Case("gguf", packed=kind) for kind in GGUF},
}


def make(case: Case, directory: Path) -> Path:
    """Writes the checkpoint of a case; returns its path. Before the fake device is there."""
    if case.native is None:
        (directory / "config.json").write_text(json.dumps(LLAMA))
        (directory / "head").mkdir()
        (directory / "head" / "config.json").write_text(json.dumps(EAGLE3))
        return directory
    import transformers

    from tests.models.random_model import random_model

    if case.packed is not None:
        sizes = {**LLAMA, "num_hidden_layers": 1}
        sizes = {key: sizes[key] for key in sizes if key not in ("architectures", "model_type")}
        if case.native == "gpt-oss":
            return _gpt_oss(directory, sizes)
        model = random_model(transformers.LlamaConfig(**sizes))
        if case.native == "gguf":
            from tests.models.gguf_files import Kind, write_gguf
            from tests.models.test_gguf import EPS, _sizes

            values = {**_sizes(model.config), **EPS, "attention.head_count_kv": 2}
            kind = Kind[case.packed]
            write_gguf(directory / "m.gguf", model, "llama", values, kind=lambda name: kind)
            return directory / "m.gguf"
        from tests.models.test_stored_checkpoints import quantise

        model.save_pretrained(directory)
        quantise(directory, case.packed)
        return directory
    from tests.models.foreign import FOREIGN
    from tests.models.native import HYBRID, NATIVE

    name = case.native.removeprefix("transformers-")
    families = {**NATIVE, **HYBRID} if name == case.native else FOREIGN
    random_model(families[name]()).save_pretrained(directory)
    return directory


def _gpt_oss(directory: Path, sizes: dict[str, Any]) -> Path:
    """As it is published, with experts in MXFP4."""
    import transformers
    from safetensors.torch import load_file, save_file

    from tests.models.native import ENDS
    from tests.models.packers import edit_config, mxfp4_experts
    from tests.models.random_model import random_model

    config = transformers.GptOssConfig(
        **sizes, **ENDS, head_dim=64, num_local_experts=4, num_experts_per_tok=2
    )
    random_model(config).save_pretrained(directory)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    mxfp4_experts(tensors)
    save_file(tensors, file)
    edit_config(directory, quantization_config={"quant_method": "mxfp4"})
    return directory
