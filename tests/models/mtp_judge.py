"""Multi-token prediction in plain torch, around a layer of transformers, which leaves it out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.models.packers import edit_config
from tests.models.random_model import random_model


class MtpJudge(nn.Module):
    """The head of ``model``, with random weights; its parameters are named as checkpoints do."""

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        super().__init__()
        config, norm = model.config, type(model.model.norm)
        size, eps = config.hidden_size, config.rms_norm_eps
        # The last of each that is tested has experts, where some have.
        index = [i for i, layer in enumerate(model.model.layers) if hasattr(layer, "self_attn")][-1]
        self.fc = nn.Linear(2 * size, size, bias=False)
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden = norm(size, eps), norm(size, eps)
        self.layers = nn.ModuleList([type(model.model.layers[index])(config, index)])
        self.norm = norm(size, eps)
        random_model(self)
        self._targets = [model]  # not a module of this one

    @property
    def target(self) -> transformers.PreTrainedModel:
        return self._targets[0]

    def forward(self, tokens: list[int], hidden_states: Tensor) -> Tensor:
        """The tokens behind each position and the states [T, H] there -> what is found [T, H]."""
        model = self.target.model
        embedding = self.pre_fc_norm_embedding(model.embed_tokens(torch.tensor([tokens])))
        joined = torch.cat((embedding, self.pre_fc_norm_hidden(hidden_states[None])), dim=-1)
        x = self.fc(joined)
        turned = model.rotary_emb(x, torch.arange(len(tokens))[None])
        return self.norm(self.layers[0](x, position_embeddings=turned))[0]

    def likeliest(self, found: Tensor) -> Tensor:
        return self.target.lm_head(found).argmax(-1)

    def states_of_target(self, tokens: list[int]) -> Tensor:
        """[T, H], as they are given to its head."""
        return self.target.model(torch.tensor([tokens])).last_hidden_state[0]

    def tensors(self, *, apart: bool) -> dict[str, Tensor]:
        """As a checkpoint has them; with ``apart`` each expert by itself."""
        tensors: dict[str, Tensor] = {}
        for name, tensor in self.state_dict().items():
            base, _, leaf = name.rpartition(".")
            if apart and leaf in ("gate_up_proj", "down_proj") and tensor.dim() == 3:
                parts = leaf.replace("gate_up", "gate up").split(" ")
                names = ["gate_proj", "up_proj"] if len(parts) == 2 else ["down_proj"]
                for expert, weight in enumerate(tensor):
                    for part, rows in zip(names, weight.chunk(len(names)), strict=True):
                        tensors[f"mtp.{base}.{expert}.{part}.weight"] = rows.contiguous()
            else:
                tensors[f"mtp.{name}"] = tensor
        return tensors


def save_with_head(
    config: transformers.PretrainedConfig, directory: Path, *, apart: bool = False, **changes: Any
) -> MtpJudge:
    """Writes a checkpoint of a model and its head, whose judge is returned."""
    model = random_model(config)
    model.save_pretrained(directory)
    judge = MtpJudge(model)
    file = directory / "model.safetensors"
    save_file({**load_file(file), **judge.tensors(apart=apart)}, file)
    edit_config(directory, **changes)
    return judge
