"""From a checkpoint's files to a decoder that runs: read the config, pick the dtype, load."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch

from streamserve.config import AdapterConfig
from streamserve.errors import ModelLoadError, UnsupportedModelError
from streamserve.models.adapters import AdapterTables
from streamserve.models.checkpoint import CheckpointSource, RandomSource
from streamserve.models.config import ModelImpl, NativeConfig, load_hf_config
from streamserve.models.decoder import Decoder
from streamserve.models.gguf.config import gguf_source, load_gguf_config
from streamserve.models.gguf.container import gguf_file
from streamserve.models.hub import LoadFormat
from streamserve.models.model import LanguageModel
from streamserve.models.model_config import ModelConfig
from streamserve.models.names import WeightNames
from streamserve.models.parameters import StoredQuantization
from streamserve.models.quantised.stored import CheckpointQuantization
from streamserve.models.spec import DecoderSpec
from streamserve.models.tensor_files import TensorFiles, open_tensor_files
from streamserve.models.tensor_parallel.config import ShareConfig
from streamserve.models.tensor_parallel.decoder import ShareDecoder
from streamserve.models.tensor_parallel.ranks import Ranks
from streamserve.models.tensor_parallel.source import PartSource, ShareSource
from streamserve.models.weights import Progress, build_weights
from streamserve_kernels import Kernels, Quantization, bfloat16_pays

DTYPES = {
    "float32": torch.float32,
    "float": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "half": torch.float16,
}


def load_config(
    path: Path | str,
    *,
    model_impl: ModelImpl = "auto",
    trust_remote_code: bool = False,
    hf_overrides: Mapping[str, Any] = MappingProxyType({}),
) -> ModelConfig:
    """A checkpoint's config, of a directory or of a GGUF file; no weight is read.

    ``auto`` takes our decoder where it has the family, else transformers' model, whose code may be
    the checkpoint's own with ``trust_remote_code``. ``hf_overrides`` take the place of values in
    ``config.json``, for our decoder only. Raises UnsupportedModelError, naming the value
    and what is supported, for an architecture or a setting that is not built; ModelLoadError for a
    config that is missing or damaged.
    """
    file = gguf_file(Path(path))
    if file is None:
        return load_hf_config(
            path,
            model_impl=model_impl,
            trust_remote_code=trust_remote_code,
            hf_overrides=hf_overrides,
        )
    if model_impl == "transformers":
        raise UnsupportedModelError(f"{file}: a GGUF file is read by the native decoder only")
    if hf_overrides:
        raise UnsupportedModelError(f"{file}: --hf-overrides is for a config.json, not for GGUF")
    return load_gguf_config(file)


def resolve_dtype(name: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    """The dtype that weights and activations take.

    ``auto`` on a CPU is bfloat16 where that is the faster one, which is wherever the compiled
    kernels run or the CPU multiplies it natively, and float32 elsewhere; on another device it is
    the checkpoint's own, with float32 halved to bfloat16. Raises ModelLoadError for a name that is
    unknown.
    """
    if name != "auto":
        if name not in DTYPES:
            raise ModelLoadError(f"dtype {name!r} is unknown; these are: auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.type == "cpu":
        pays = cpu_multiplies_bfloat16() or bfloat16_pays(config.spec.head_sizes())
        return torch.bfloat16 if pays else torch.float32
    return torch.float16 if config.dtype == torch.float16 else torch.bfloat16


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has matrix or dot-product instructions for bfloat16 (AMX, AVX512_BF16)."""
    try:
        features = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", features, re.MULTILINE)
    # `bf16` is how Arm's dot products are listed.
    return found is not None and not {"amx_bf16", "avx512_bf16", "bf16"}.isdisjoint(
        found[1].split()
    )


def load_model(
    path: Path | str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    kernels: Kernels,
    config: ModelConfig | None = None,
    load_format: LoadFormat = "auto",
    max_model_len: int | None = None,
    progress: Progress | None = None,
    seed: int = 0,
    quantization: Quantization | None = None,
    adapters: AdapterConfig | None = None,
    ranks: Ranks | None = None,
) -> LanguageModel:
    """Loads a checkpoint's directory or GGUF file; ``dummy`` draws weights from ``seed`` instead.

    ``config`` is what `load_config` made of it, and says whose model it is.
    ``quantization`` quantises the linear layers as they come: see `parameters.module_quantization`.
    A checkpoint that is quantised already stays as it is.
    Holds the resident weights and, at any time, one more matrix on ``device``; a host that is not
    the device holds a few dozen megabytes of the files at a time. ``max_model_len`` is the longest
    sequence to serve, the model's own by default. With ``adapters``, there is room for as many
    beside it. A share's config needs the ``ranks`` that have the others. Raises ModelLoadError or
    UnsupportedModelError.
    """
    if load_format not in get_args(LoadFormat):
        raise ModelLoadError(
            f"load format {load_format!r} is unknown; these are: {', '.join(get_args(LoadFormat))}"
        )
    config = load_config(path) if config is None else config
    stored = config.stored_quantization
    if stored is not None and quantization is not None:
        raise ModelLoadError(f"{path} is quantised with {stored.name}, not on the fly")
    if stored is not None and load_format == "dummy":
        raise ModelLoadError(f"dummy weights are plain, and {path} says {stored.name}")
    max_model_len = config.resolve_max_model_len(max_model_len)
    if not isinstance(config, NativeConfig):
        # Imported, with seconds of transformers, when its config was read.
        from streamserve.models.transformers_backend import TransformersConfig

        assert isinstance(config, TransformersConfig)
        return config.load(
            Path(path),
            dtype=dtype,
            device=device,
            kernels=kernels,
            load_format=load_format,
            max_model_len=max_model_len,
            progress=progress,
            seed=seed,
            quantization=quantization,
        )
    share = config.share if isinstance(config, ShareConfig) else None
    whole = config.spec if share is None else share.whole
    names = config.family.weight_names(whole)
    source = weight_source(Path(path), whole, names, stored, load_format, seed)
    if share is not None:
        assert ranks is not None, "a share is one of several ranks'"
        held = ShareSource(source, share)
        weights = build_weights(share.held, held, kernels, dtype, device, progress, quantization)
        return ShareDecoder(
            share, ranks, weights, kernels, dtype=dtype, device=device, max_model_len=max_model_len
        )
    weights = build_weights(whole, source, kernels, dtype, device, progress, quantization)
    beside = None
    if adapters is not None:
        beside = AdapterTables(
            whole,
            names,
            kernels,
            dtype=dtype,
            device=device,
            num_slots=adapters.num_adapters,
            max_rank=adapters.max_rank,
        )
    return Decoder(
        whole,
        weights,
        kernels,
        dtype=dtype,
        device=device,
        max_model_len=max_model_len,
        adapters=beside,
    )


def weight_source(
    path: Path,
    spec: DecoderSpec,
    names: WeightNames,
    stored: StoredQuantization | None,
    load_format: LoadFormat,
    seed: int,
) -> PartSource:
    """Where the weights of an undivided model come from, or of its head. Raises ModelLoadError.

    ``names`` and ``stored`` are of a directory; a GGUF file has its own.
    """
    if load_format == "dummy":
        return RandomSource(seed)
    file = gguf_file(path)
    if file is not None:
        return gguf_source(file, spec)
    files = directory_files(path, load_format)
    reader = stored.reader if isinstance(stored, CheckpointQuantization) else None
    return CheckpointSource(files, names, spec, path, reader)


def directory_files(
    path: Path, load_format: Literal["auto", "safetensors", "pt", "gguf"]
) -> TensorFiles:
    """The tensors of a checkpoint's directory. Raises ModelLoadError."""
    if load_format == "gguf":
        raise ModelLoadError(f"{path} is no GGUF file")
    return open_tensor_files(path, load_format)
