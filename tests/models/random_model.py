"""Models of transformers with random weights."""

from __future__ import annotations

import torch
import transformers


def random_model(
    config: transformers.PretrainedConfig | torch.nn.Module,
) -> transformers.PreTrainedModel:
    """A config -> a model in float32 whose every weight matters to its logits, always the same.

    A model that is there already gets such weights.
    """
    generator = torch.Generator().manual_seed(7)
    model = config
    if not isinstance(config, torch.nn.Module):
        model = transformers.AutoModelForCausalLM.from_config(config)
    model = model.eval().to(torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = parameter.dim() == 1 and name.endswith(("weight", "scale"))
            mean, std = (1.0, 0.3) if is_norm else (0.0, 0.15)
            parameter.normal_(mean, std, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith(("correction_bias", "expert_bias")):
                buffer.normal_(0.0, 0.15, generator=generator)
            if name.endswith("layer_scalar"):
                buffer.uniform_(0.5, 1.5, generator=generator)
    return model
