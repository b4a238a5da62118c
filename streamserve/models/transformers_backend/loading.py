"""Weights into a model of transformers: by its own loader, then packed for our kernels."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from streamserve.errors import ModelLoadError
from streamserve.models.tensor_files import open_tensor_files
from streamserve.models.transformers_backend import attention, modules, rotary
from streamserve.models.transformers_backend.decoder import TransformersDecoder
from streamserve.models.transformers_backend.modules import (
    Packed,
    PackedExperts,
    QuantisedEmbedding,
)
from streamserve.models.transformers_backend.shape import LinearShape, TransformersSpec
from streamserve_kernels import Kernels, Quantization, QuantLinear

Progress = Callable[[int, int], None]

# Buffers that old checkpoints carry and that are computed today.
_NO_WEIGHTS = re.compile(r"(^|\.)(inv_freq|masked_bias|attn\.bias|attention\.bias|position_ids)$")
_NAMED_IN_AN_ERROR = 8


def load(
    path: Path,
    config: PreTrainedConfig,
    spec: TransformersSpec,
    *,
    dtype: torch.dtype,
    device: torch.device,
    kernels: Kernels,
    load_format: str,
    max_model_len: int,
    progress: Progress | None,
    seed: int,
    quantization: Quantization | None,
    trust_remote_code: bool,
) -> TransformersDecoder:
    """Raises ModelLoadError that names what is missing, left over or of another shape."""
    options: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": attention.PAGED,
        "experts_implementation": modules.EXPERTS,
        "trust_remote_code": trust_remote_code,
    }
    with _quiet():
        if load_format == "dummy":
            model = _random(config, device, seed, options)
        else:
            model = _from_files(path, config, device, load_format, options)
    rotary.freeze(model, max_model_len)
    _pack(model, spec, kernels, quantization, progress)
    return TransformersDecoder(
        spec,
        model,
        kernels,
        dtype=dtype,
        device=device,
        max_model_len=max_model_len,
    )


def _from_files(
    path: Path,
    config: PreTrainedConfig,
    device: torch.device,
    load_format: str,
    options: dict[str, Any],
) -> PreTrainedModel:
    open_tensor_files(path, load_format)  # type: ignore[arg-type]  # says what it looked for
    try:
        from_pretrained: Any = AutoModelForCausalLM.from_pretrained
        model, info = from_pretrained(
            path,
            config=config,
            device_map={"": device} if device.type != "cpu" else None,
            use_safetensors={"safetensors": True, "pt": False}.get(load_format),
            local_files_only=True,
            ignore_mismatched_sizes=True,  # they are named below
            output_loading_info=True,
            **options,
        )
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise ModelLoadError(f"transformers cannot load {path}: {error}") from error
    _check(info, path)
    loaded: PreTrainedModel = model.eval().requires_grad_(False)
    return loaded


def _check(info: dict[str, Any], path: Path) -> None:
    """Raises ModelLoadError for a checkpoint that is not this model's."""
    surplus = [name for name in info["unexpected_keys"] if not _NO_WEIGHTS.search(str(name))]
    problems = [
        f"{what} {len(found)} tensor{'s' if len(found) > 1 else ''}: {_listing(found)}"
        for what, found in (
            ("it lacks", info["missing_keys"]),
            ("it has no use for", surplus),
            ("of another shape it has", info.get("mismatched_keys") or ()),
            ("transformers could not convert", info.get("error_msgs") or ()),
        )
        if found
    ]
    if problems:
        raise ModelLoadError(
            f"{path}: the checkpoint does not fit the config: {'; '.join(problems)}"
        )


def _listing(found: Any) -> str:
    names = sorted(str(name[0] if isinstance(name, tuple) else name) for name in found)
    shown = ", ".join(names[:_NAMED_IN_AN_ERROR])
    more = len(names) - _NAMED_IN_AN_ERROR
    return f"{shown} and {more} more" if more > 0 else shown


def _random(
    config: PreTrainedConfig, device: torch.device, seed: int, options: dict[str, Any]
) -> PreTrainedModel:
    """As the model initialises itself, the same for the same seed."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), device:
        torch.manual_seed(seed)
        from_config: Any = AutoModelForCausalLM.from_config
        model: PreTrainedModel = from_config(config, **options).eval().requires_grad_(False)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without bars and warnings that speak of transformers' options, which are not ours."""
    log: Any = transformers_logging
    level, bars = (
        log.get_verbosity(),
        log.is_progress_bar_enabled(),
    )
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def _pack(
    model: PreTrainedModel,
    spec: TransformersSpec,
    kernels: Kernels,
    quantization: Quantization | None,
    progress: Progress | None,
) -> None:
    """Packs one weight after another, and lets each go that was packed."""
    total = sum(linear.numel for linear in spec.linears)
    done = 0
    experts: set[str] = set()
    for linear in spec.linears:
        held = spec.quantization_of(linear, quantization)
        if linear.copies > 1:
            path = linear.path.rpartition(".")[0]
            if path not in experts:
                experts.add(path)
                module = model.get_submodule(path)
                modules.bind_experts(module, PackedExperts(module, kernels, held))
        else:
            _pack_linear(model, spec, linear, kernels, held)
        done += linear.numel
        if progress is not None:
            progress(done, total)


def _pack_linear(
    model: PreTrainedModel,
    spec: TransformersSpec,
    linear: LinearShape,
    kernels: Kernels,
    quantization: Quantization | None,
) -> None:
    module = model.get_submodule(linear.path)
    assert isinstance(module, nn.Linear)
    if module.weight.dtype != model.dtype:
        return  # kept in float32 by its author
    packed = modules.pack(module.weight.detach(), _bias(module), kernels, quantization)
    model.set_submodule(linear.path, Packed(packed))
    if linear.path == spec.head and spec.embedding is not None and quantization is not None:
        assert isinstance(packed, QuantLinear)
        model.set_submodule(spec.embedding, QuantisedEmbedding(packed, kernels))


def _bias(module: nn.Linear) -> torch.Tensor | None:
    return None if module.bias is None else module.bias.detach()
