"""Checkpoints of random weights in a family's own layout, without a model that saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from streamserve.models import load_config
from streamserve.models.config import NativeConfig
from streamserve.models.parameters import decoder_modules
from streamserve.models.pieces import module_pieces, num_experts


def random_checkpoint(values: dict[str, Any], directory: Path) -> NativeConfig:
    """Writes ``config.json`` with these ``values`` and the tensors that it calls for."""
    (directory / "config.json").write_text(json.dumps(values))
    config = load_config(directory, model_impl="native")
    names = config.family.weight_names(config.spec)
    generator = torch.Generator().manual_seed(7)
    tensors: dict[str, torch.Tensor] = {}
    for module in decoder_modules(config.spec):
        for leaf in ("weight", "bias") if module.bias else ("weight",):
            for piece in module_pieces(names, module, leaf):
                shape = piece.shape
                if piece.expert is not None:
                    shape = (num_experts(config.spec, module), *shape)
                if piece.name in tensors:
                    continue
                is_factor = module.role == "norm" or module.name == "layers.scalar"
                tensor = torch.empty(shape).normal_(0.0, 0.15, generator=generator)
                tensors[piece.name] = 1.0 + 2 * tensor if is_factor and leaf == "weight" else tensor
    save_file(tensors, directory / "model.safetensors")
    return config
