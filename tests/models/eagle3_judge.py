"""EAGLE-3 in plain torch around parts of transformers, and its checkpoints of random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3MLP

from tests.models.native import LLAMA3_ROPE
from tests.models.random_model import random_model

LAYER = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": LLAMA3_ROPE,
}


class _Layer(nn.Module):
    """A Llama's, or Qwen 3's; the first attends by an embedding and a hidden state."""

    def __init__(self, config: Any, index: int, *, norms_residual: bool) -> None:
        super().__init__()
        is_qwen = config.model_type == "qwen3"
        self.self_attn = (Qwen3Attention if is_qwen else LlamaAttention)(config, index)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = (Qwen3MLP if is_qwen else LlamaMLP)(config)
        self._norms_residual = norms_residual
        self._is_first = index == 0
        if index == 0:
            self.hidden_norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
            for name in ("q_proj", "k_proj", "v_proj"):
                old = getattr(self.self_attn, name)
                size, bias = 2 * config.hidden_size, old.bias is not None
                setattr(self.self_attn, name, nn.Linear(size, old.out_features, bias=bias))

    def forward(self, embedding: Tensor, h: Tensor, turned: Any, mask: Tensor) -> Tensor:
        """[1, T, H] each -> [1, T, H]."""
        if self._is_first:
            normed = self.hidden_norm(h)
            x = torch.cat((self.input_layernorm(embedding), normed), dim=-1)
            h = normed if self._norms_residual else h
        else:
            x = self.input_layernorm(h)
        h = h + self.self_attn(x, position_embeddings=turned, attention_mask=mask)[0]
        return h + self.mlp(self.post_attention_layernorm(h))


class Eagle3Judge(nn.Module):
    """A head of a model with hidden states of ``target_size``; parameters as checkpoints name them.

    ``config`` is of its layers, ``settings`` what the other form of a config says beside these.
    """

    def __init__(
        self,
        config: dict[str, Any],
        settings: dict[str, Any],
        target_size: int = 32,
        num_taps: int = 3,
        *,
        own_embedding: bool = True,
        own_head: bool = True,
    ) -> None:
        super().__init__()
        kinds = {"llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config}
        self.config = made = kinds[config["model_type"]](**config, attn_implementation="eager")
        size, eps = made.hidden_size, made.rms_norm_eps
        self.settings, self.num_taps = settings, num_taps
        self.fc = nn.Linear(num_taps * target_size, size, bias=False)
        if settings.get("norm_before_fc"):
            self.input_norm = LlamaRMSNorm(num_taps * target_size, eps)
        if settings.get("fc_norm"):
            self.fc_norm = nn.ModuleList(LlamaRMSNorm(target_size, eps) for _ in range(num_taps))
        if own_embedding:
            self.embed_tokens = nn.Embedding(made.vocab_size, size)
        self.layers = nn.ModuleList(
            _Layer(made, i, norms_residual=settings.get("norm_before_residual", False))
            for i in range(made.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(size, eps)
        self.draft_vocab_size = settings.get("draft_vocab_size", made.vocab_size)
        if own_head:
            self.lm_head = nn.Linear(size, self.draft_vocab_size, bias=False)
        random_model(self)
        self.rotary = LlamaRotaryEmbedding(made)
        generator = torch.Generator().manual_seed(9)
        size = num_taps * target_size
        self.raw_states = torch.randn(made.vocab_size, size, generator=generator)
        kept = torch.randperm(made.vocab_size, generator=generator)[: self.draft_vocab_size]
        self.target_ids = kept.sort().values

    def take(self, states: Tensor) -> Tensor:
        """[T, taps * target size] -> [T, H]."""
        if self.settings.get("norm_before_fc"):
            states = self.input_norm(states)
        if self.settings.get("fc_norm"):
            parts = states.chunk(self.num_taps, dim=-1)
            states = torch.cat([norm(x) for norm, x in zip(self.fc_norm, parts, strict=True)], -1)
        return self.fc(states)

    def forward(self, tokens: list[int], hidden_states: Tensor) -> Tensor:
        """The tokens behind each position and h [T, H] there -> what is found [T, H]."""
        count = len(tokens)
        window = self.config.sliding_window if self._is_windowed() else count
        embedding, h = self.embed_tokens(torch.tensor([tokens])), hidden_states[None]
        turned = self.rotary(h, torch.arange(count)[None])
        places = torch.arange(count)
        behind = places[:, None] - places
        hidden = (behind < 0) | (behind >= window)
        mask = torch.zeros(1, 1, count, count).masked_fill(hidden, float("-inf"))
        for layer in self.layers:
            h = layer(embedding, h, turned, mask)
        return (self.norm(h) if self.settings.get("norm_output") else h)[0]

    def likeliest(self, found: Tensor) -> Tensor:
        normed = found if self.settings.get("norm_output") else self.norm(found)
        return self.target_ids[self.lm_head(normed).argmax(-1)]

    def states_of_target(self, tokens: list[int]) -> Tensor:
        """[T, H], of a target that finds the same at each token, wherever it is."""
        return self.take(self.raw_states[torch.tensor(tokens)])

    def _is_windowed(self) -> bool:
        kinds = getattr(self.config, "layer_types", None) or []
        return "sliding_attention" in kinds

    def tensors(self) -> dict[str, Tensor]:
        tensors = {
            name: tensor.clone()
            for name, tensor in self.state_dict().items()
            if not name.startswith("rotary.")
        }
        if self.draft_vocab_size < self.config.vocab_size:
            tensors["d2t"] = self.target_ids - torch.arange(self.draft_vocab_size)
            tensors["t2d"] = torch.zeros(self.config.vocab_size, dtype=torch.bool)
            tensors["t2d"][self.target_ids] = True
        return tensors

    def save(self, directory: Path, config: dict[str, Any], **more: Any) -> None:
        """In the authors' form."""
        values = {"architectures": ["LlamaForCausalLMEagle3"], **config, **self.settings, **more}
        tensors = {
            name.replace("layers.0.", "midlayer.") if len(self.layers) == 1 else name: tensor
            for name, tensor in self.tensors().items()
        }
        save(directory, values, tensors)

    def save_as_speculator(self, directory: Path, config: dict[str, Any], **more: Any) -> None:
        values = {
            "architectures": ["Eagle3Speculator"],
            "speculators_model_type": "eagle3",
            "transformer_layer_config": config,
            "norm_before_residual": False,
            "target_hidden_size": None,
            **self.settings,
            **more,
        }
        save(directory, values, self.tensors())


def save(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        directory / "model.safetensors",
    )
