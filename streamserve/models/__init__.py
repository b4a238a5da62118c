"""Models: one decoder, families as data, and the loader that brings a checkpoint to it.

    path = resolve_model("HuggingFaceTB/SmolLM2-135M-Instruct")
    config = load_config(path)                      # before any weight: plan memory from it
    dtype = resolve_dtype("auto", config, device)
    decoder = load_model(path, dtype=dtype, device=device, kernels=kernels)
    logits = decoder.forward(batch, kv_caches)

Where things are: `spec` says what a decoder is, `families` turn configs into specs, `decoder` and
`layers` run them, `names`, `checkpoint` and `tensor_files` find the weights, `weights` packs them;
`gguf` reads files of that format, `catalogue` lists
what there is.
"""

from importlib import import_module
from typing import Any

# Looked up when asked for: what says which families there are, imports no torch, and others do.
# Types are in ``__init__.pyi``.
_HOMES = {
    "AdapterTables": "adapters",
    "Decoder": "decoder",
    "DecoderSpec": "spec",
    "DraftHead": "draft_head",
    "Eagle3Config": "eagle3",
    "ForwardBatch": "batch",
    "KVCache": "batch",
    "LanguageModel": "model",
    "LoadFormat": "hub",
    "MtpConfig": "mtp",
    "ModelConfig": "model_config",
    "NativeConfig": "config",
    "adapter_bytes": "adapters",
    "allocate_kv_cache": "batch",
    "block_caches": "batch",
    "find_mtp": "mtp",
    "kv_bytes_per_block": "batch",
    "load_config": "loader",
    "load_eagle3_config": "eagle3",
    "load_eagle3_head": "eagle3",
    "load_model": "loader",
    "load_mtp_head": "mtp",
    "read_embedding_config": "sentence_files",
    "read_sampling_defaults": "config",
    "read_text_files": "gguf.vocabulary",
    "resolve_dtype": "loader",
    "resolve_model": "hub",
    "state_bytes": "batch",
    "state_caches": "batch",
    "supported_architectures": "families",
    "tokenizer_backend": "tokenizer_files",
    "touch_kv_cache": "batch",
}

__all__ = [*_HOMES]  # noqa: PLE0604  strings all


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'streamserve.models' has no attribute {name!r}")
    return getattr(import_module(f"streamserve.models.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
