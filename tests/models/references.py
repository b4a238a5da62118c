"""Models that transformers does not carry, in plain torch, from their published architectures.

Each is written after the `modeling_*.py` that its repository ships, for one sequence at a time and
without a cache, and shares no code with the decoder that it judges:

    Qwen       https://huggingface.co/Qwen/Qwen-7B/blob/main/modeling_qwen.py
    Baichuan   https://huggingface.co/baichuan-inc/Baichuan2-7B-Base and Baichuan2-13B-Base
    ChatGlm    https://huggingface.co/THUDM/chatglm3-6b/blob/main/modeling_chatglm.py
    Deepseek   https://huggingface.co/deepseek-ai/deepseek-moe-16b-base/blob/main/modeling_deepseek.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import save_file
from torch import Tensor, nn


class Reference(nn.Module):
    """``forward`` takes ids [1, T], as transformers does, and gives ``logits`` [1, T, V]."""

    architecture: str
    model_type: str

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = config

    def values(self) -> dict[str, Any]:
        """What stands in its ``config.json``."""
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "auto_map": {"AutoModelForCausalLM": "modeling_it.ItForCausalLM"},
            **self.config,
        }

    def save_pretrained(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self.values()))
        save_file(self.state_dict(), directory / "model.safetensors")

    def forward(self, ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits(ids[0])[None])

    def logits(self, ids: Tensor) -> Tensor:
        raise NotImplementedError


class RmsNorm(nn.Module):
    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


def tree(**modules: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict(modules)


def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """[T, heads, D] of each, keys and values perhaps of fewer heads -> [T, heads * D]."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(query.shape[-1])
    if bias is not None:
        scores = scores + bias
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value).flatten(1)


def angles(num_tokens: int, dim: int, base: float) -> Tensor:
    """Radians [T, dim / 2]."""
    frequencies = torch.tensor([base ** (-2 * pair / dim) for pair in range(dim // 2)])
    return torch.arange(num_tokens)[:, None] * frequencies


def rotate_halves(x: Tensor, base: float) -> Tensor:
    """[T, heads, D]: element i turns with element i + D / 2."""
    theta = angles(x.shape[0], x.shape[-1], base)[:, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat(
        (first * theta.cos() - second * theta.sin(), second * theta.cos() + first * theta.sin()), -1
    )


def rotate_pairs(x: Tensor, base: float, dim: int) -> Tensor:
    """[T, heads, D]: of the first ``dim`` elements each even one turns with the next."""
    turned = torch.view_as_complex(x[..., :dim].reshape(*x.shape[:-1], dim // 2, 2).contiguous())
    theta = angles(x.shape[0], dim, base)[:, None]
    turned = turned * torch.polar(torch.ones_like(theta), theta)
    return torch.cat((torch.view_as_real(turned).flatten(-2), x[..., dim:]), -1)


class Qwen(Reference):
    """Qwen 1. ``served`` is the length that its stretched frequencies are for."""

    architecture, model_type = "QWenLMHeadModel", "qwen"

    def __init__(self, served: int = 0, **config: Any) -> None:
        super().__init__(**config)
        self.served = served
        hidden, inner = config["hidden_size"], config["intermediate_size"] // 2
        width = config["kv_channels"] * config["num_attention_heads"]

        def block() -> nn.ModuleDict:
            return tree(
                ln_1=RmsNorm(hidden),
                attn=tree(
                    c_attn=nn.Linear(hidden, 3 * width), c_proj=nn.Linear(width, hidden, bias=False)
                ),
                ln_2=RmsNorm(hidden),
                mlp=tree(
                    w1=nn.Linear(hidden, inner, bias=False),
                    w2=nn.Linear(hidden, inner, bias=False),
                    c_proj=nn.Linear(inner, hidden, bias=False),
                ),
            )

        self.transformer = tree(
            wte=nn.Embedding(config["vocab_size"], hidden),
            h=nn.ModuleList(block() for _ in range(config["num_hidden_layers"])),
            ln_f=RmsNorm(hidden),
        )
        self.lm_head = nn.Linear(hidden, config["vocab_size"], bias=False)

    def logits(self, ids: Tensor) -> Tensor:
        config, trained = self.config, self.config["seq_length"]
        heads, size = config["num_attention_heads"], config["kv_channels"]
        base = 10_000.0
        if config.get("use_dynamic_ntk") and self.served > trained:
            alpha = 2 ** math.ceil(math.log(self.served / trained, 2) + 1) - 1
            base *= alpha ** (size / (size - 2))
        x = self.transformer["wte"](ids)
        for block in self.transformer["h"]:
            query, key, value = block["attn"]["c_attn"](block["ln_1"](x)).chunk(3, dim=-1)
            query, key, value = (part.unflatten(-1, (heads, size)) for part in (query, key, value))
            query, key = rotate_halves(query, base), rotate_halves(key, base)
            if config.get("use_logn_attn"):
                counts = range(1, len(ids) + 1)
                log = [math.log(i, trained) if i > trained else 1.0 for i in counts]
                query = query * torch.tensor(log)[:, None, None]
            x = x + block["attn"]["c_proj"](attention(query, key, value))
            mlp, normed = block["mlp"], block["ln_2"](x)
            x = x + mlp["c_proj"](mlp["w1"](normed) * F.silu(mlp["w2"](normed)))
        return self.lm_head(self.transformer["ln_f"](x))


def llama_layer(hidden: int, projections: nn.ModuleDict, mlp: nn.Module) -> nn.ModuleDict:
    return tree(
        input_layernorm=RmsNorm(hidden),
        self_attn=projections,
        post_attention_layernorm=RmsNorm(hidden),
        mlp=mlp,
    )


class GatedMlp(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def interleaved_slopes(heads: int) -> list[float]:
    """ALiBi's, as `_get_interleave` of Baichuan 13B has them."""
    if math.log2(heads).is_integer():
        start = 2 ** (-(2 ** -(math.log2(heads) - 3)))
        return [start * start**i for i in range(heads)]
    closest = 2 ** math.floor(math.log2(heads))
    return interleaved_slopes(closest) + interleaved_slopes(2 * closest)[0::2][: heads - closest]


class Baichuan(Reference):
    """Without ``max_position_embeddings`` a 13B: ALiBi. With ``z_loss_weight`` a Baichuan 2."""

    architecture, model_type = "BaichuanForCausalLM", "baichuan"

    def __init__(self, architecture: str = "BaichuanForCausalLM", **config: Any) -> None:
        super().__init__(**config)
        self.architecture = architecture
        hidden = config["hidden_size"]

        def layer() -> nn.ModuleDict:
            projections = tree(
                W_pack=nn.Linear(hidden, 3 * hidden, bias=False),
                o_proj=nn.Linear(hidden, hidden, bias=False),
            )
            return llama_layer(hidden, projections, GatedMlp(hidden, config["intermediate_size"]))

        self.model = tree(
            embed_tokens=nn.Embedding(config["vocab_size"], hidden),
            layers=nn.ModuleList(layer() for _ in range(config["num_hidden_layers"])),
            norm=RmsNorm(hidden),
        )
        self.lm_head = nn.Linear(hidden, config["vocab_size"], bias=False)

    def logits(self, ids: Tensor) -> Tensor:
        heads = self.config["num_attention_heads"]
        turns = "max_position_embeddings" in self.config
        places = torch.arange(len(ids))
        slopes = torch.tensor(interleaved_slopes(heads))[:, None, None]
        bias = None if turns else slopes * (places - places[:, None])
        x = self.model["embed_tokens"](ids)
        for layer in self.model["layers"]:
            packed = layer["self_attn"]["W_pack"](layer["input_layernorm"](x))
            query, key, value = packed.unflatten(-1, (3, heads, -1)).unbind(1)
            if turns:
                query, key = rotate_halves(query, 10_000.0), rotate_halves(key, 10_000.0)
            x = x + layer["self_attn"]["o_proj"](attention(query, key, value, bias))
            x = x + layer["mlp"](layer["post_attention_layernorm"](x))
        head = self.lm_head.weight
        if "z_loss_weight" in self.config:
            head = head / head.norm(dim=1, keepdim=True)
        return F.linear(self.model["norm"](x), head)


class ChatGlm(Reference):
    """ChatGLM 2 and 3, and GLM 4."""

    architecture, model_type = "ChatGLMModel", "chatglm"

    def __init__(self, architecture: str = "ChatGLMModel", **config: Any) -> None:
        super().__init__(**config)
        self.architecture = architecture
        hidden, inner, size = (
            config[name] for name in ("hidden_size", "ffn_hidden_size", "kv_channels")
        )
        heads, bias = config["num_attention_heads"], config.get("add_bias_linear", False)
        groups = heads
        if config["multi_query_attention"]:
            groups = config["multi_query_group_num"]
        eps = config["layernorm_epsilon"]

        def norm() -> nn.Module:
            if config.get("rmsnorm", True):
                return RmsNorm(hidden, eps)
            return nn.LayerNorm(hidden, eps)

        def layer() -> nn.ModuleDict:
            return tree(
                input_layernorm=norm(),
                self_attention=tree(
                    query_key_value=nn.Linear(
                        hidden,
                        (heads + 2 * groups) * size,
                        bias=bias or config["add_qkv_bias"],
                    ),
                    dense=nn.Linear(heads * size, hidden, bias=bias),
                ),
                post_attention_layernorm=norm(),
                mlp=tree(
                    dense_h_to_4h=nn.Linear(hidden, 2 * inner, bias=bias),
                    dense_4h_to_h=nn.Linear(inner, hidden, bias=bias),
                ),
            )

        vocabulary = config["padded_vocab_size"]
        layers = nn.ModuleList(layer() for _ in range(config["num_layers"]))
        self.transformer = tree(
            embedding=tree(word_embeddings=nn.Embedding(vocabulary, hidden)),
            encoder=tree(layers=layers, final_layernorm=norm()),
            output_layer=nn.Linear(hidden, vocabulary, bias=False),
        )

    def split(self, mixed: Tensor) -> tuple[Tensor, ...]:
        config = self.config
        heads, size = config["num_attention_heads"], config["kv_channels"]
        if not config["multi_query_attention"]:
            return mixed.unflatten(-1, (heads, 3 * size)).chunk(3, dim=-1)
        groups = config["multi_query_group_num"]
        parts = mixed.split((heads * size, groups * size, groups * size), dim=-1)
        return tuple(part.unflatten(-1, (-1, size)) for part in parts)

    def logits(self, ids: Tensor) -> Tensor:
        size = self.config["kv_channels"]
        base = 10_000.0 * self.config.get("rope_ratio", 1)
        x = self.transformer["embedding"]["word_embeddings"](ids)
        for layer in self.transformer["encoder"]["layers"]:
            attended = layer["self_attention"]
            query, key, value = self.split(attended["query_key_value"](layer["input_layernorm"](x)))
            query, key = (rotate_pairs(part, base, size // 2) for part in (query, key))
            x = x + attended["dense"](attention(query, key, value))
            both = layer["mlp"]["dense_h_to_4h"](layer["post_attention_layernorm"](x))
            gate, up = both.chunk(2, dim=-1)
            x = x + layer["mlp"]["dense_4h_to_h"](F.silu(gate) * up)
        return self.transformer["output_layer"](self.transformer["encoder"]["final_layernorm"](x))


class DeepseekExperts(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
        self.top_k, self.renormalise = config["num_experts_per_tok"], config["norm_topk_prob"]
        self.gate = nn.Linear(hidden, config["n_routed_experts"], bias=False)
        self.experts = nn.ModuleList(
            GatedMlp(hidden, inner) for _ in range(config["n_routed_experts"])
        )
        self.shared_experts = GatedMlp(hidden, inner * config["n_shared_experts"])

    def forward(self, x: Tensor) -> Tensor:
        likely, chosen = self.gate(x).softmax(-1).topk(self.top_k, dim=-1)
        if self.renormalise:
            likely = likely / (likely.sum(-1, keepdim=True) + 1e-20)
        rows = [
            sum(p * self.experts[e](row) for p, e in zip(ps, es.tolist(), strict=True))
            for row, ps, es in zip(x, likely, chosen, strict=True)
        ]
        return torch.stack(rows) + self.shared_experts(x)


class Deepseek(Reference):
    """DeepSeek-MoE, the first generation."""

    architecture, model_type = "DeepseekForCausalLM", "deepseek"

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        size = hidden // heads
        self.sizes = (heads, config["num_key_value_heads"], size)

        def layer(index: int) -> nn.ModuleDict:
            projections = tree(
                q_proj=nn.Linear(hidden, heads * size, bias=False),
                k_proj=nn.Linear(hidden, self.sizes[1] * size, bias=False),
                v_proj=nn.Linear(hidden, self.sizes[1] * size, bias=False),
                o_proj=nn.Linear(hidden, hidden, bias=False),
            )
            is_dense = (
                index < config["first_k_dense_replace"] or index % config["moe_layer_freq"] != 0
            )
            dense = GatedMlp(hidden, config["intermediate_size"])
            return llama_layer(hidden, projections, dense if is_dense else DeepseekExperts(config))

        self.model = tree(
            embed_tokens=nn.Embedding(config["vocab_size"], hidden),
            layers=nn.ModuleList(layer(index) for index in range(config["num_hidden_layers"])),
            norm=RmsNorm(hidden),
        )
        self.lm_head = nn.Linear(hidden, config["vocab_size"], bias=False)

    def logits(self, ids: Tensor) -> Tensor:
        heads, kv_heads, size = self.sizes
        x = self.model["embed_tokens"](ids)
        for layer in self.model["layers"]:
            projections, normed = layer["self_attn"], layer["input_layernorm"](x)
            query = projections["q_proj"](normed).unflatten(-1, (heads, size))
            key = projections["k_proj"](normed).unflatten(-1, (kv_heads, size))
            value = projections["v_proj"](normed).unflatten(-1, (kv_heads, size))
            query, key = rotate_halves(query, 10_000.0), rotate_halves(key, 10_000.0)
            x = x + projections["o_proj"](attention(query, key, value))
            x = x + layer["mlp"](layer["post_attention_layernorm"](x))
        return self.lm_head(self.model["norm"](x))
