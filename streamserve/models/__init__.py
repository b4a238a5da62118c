"""Models: one decoder, families as data, and the loader that brings a checkpoint to it.

    path = resolve_model("HuggingFaceTB/SmolLM2-135M-Instruct")
    config = load_config(path)                      # before any weight: plan memory from it
    dtype = resolve_dtype("auto", config, device)
    decoder = load_model(path, dtype=dtype, device=device, kernels=kernels)
    logits = decoder.forward(batch, kv_caches)

Where things are: `spec` says what a decoder is, `families` turn configs into specs, `decoder` and
`layers` run them, `names`, `checkpoint` and `tensor_files` find the weights, `weights` packs them;
`gguf` reads files of that format.
"""

from streamserve.models.adapters import AdapterTables, adapter_bytes
from streamserve.models.batch import (
    ForwardBatch,
    KVCache,
    allocate_kv_cache,
    kv_bytes_per_block,
    touch_kv_cache,
)
from streamserve.models.config import NativeConfig, read_sampling_defaults
from streamserve.models.decoder import Decoder
from streamserve.models.families import supported_architectures
from streamserve.models.gguf.vocabulary import read_text_files
from streamserve.models.loader import (
    LoadFormat,
    load_config,
    load_model,
    resolve_dtype,
    resolve_model,
)
from streamserve.models.model import LanguageModel
from streamserve.models.model_config import ModelConfig
from streamserve.models.sentence_files import read_embedding_config
from streamserve.models.spec import DecoderSpec
from streamserve.models.tokenizer_files import tokenizer_backend

__all__ = [
    "AdapterTables",
    "Decoder",
    "DecoderSpec",
    "ForwardBatch",
    "KVCache",
    "LanguageModel",
    "LoadFormat",
    "ModelConfig",
    "NativeConfig",
    "adapter_bytes",
    "allocate_kv_cache",
    "kv_bytes_per_block",
    "load_config",
    "load_model",
    "read_embedding_config",
    "read_sampling_defaults",
    "read_text_files",
    "resolve_dtype",
    "resolve_model",
    "supported_architectures",
    "tokenizer_backend",
    "touch_kv_cache",
]
