"""Writes an EAGLE-3 head of random weights for a model, in the shape of the published ones.

    python tools/make_eagle3_head.py /tmp/checkpoints/llama-8b /tmp/checkpoints/llama-8b-eagle3
    python tools/make_eagle3_head.py /tmp/checkpoints/guessable /tmp/checkpoints/head --guesses

As those for Llama 3.1 8B and Qwen 3 8B it has one layer of the model's own sizes, a vocabulary of
32,000 of the model's tokens and no embedding. For load tests and benchmarks where nothing can be
downloaded: what it takes is that of the real ones, only the guesses are nonsense. With
``--guesses`` it guesses right as often as a model of ``make_checkpoint.py --guessable`` says: see
`_guessing`. Needs torch and safetensors; nothing of streamserve.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_WRONG = 4.0
_FEWEST_LAYERS = 6  # of which a head need not say whose inputs it is given
_COPIED = (
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "vocab_size",
)
_STD = 0.02
# A token attends to itself alone, and the sum is that of normed rows.
_GUESSING = {
    "layer_types": ["sliding_attention"],
    "norm_before_residual": True,
    "sliding_window": 1,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="directory with the model's config.json")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--draft-vocab-size", type=int, default=32_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--guesses", action="store_true", help="for a model whose tokens follow from the last one"
    )
    options = parser.parse_args()
    written = write_head(
        options.model,
        options.directory,
        options.draft_vocab_size,
        seed=options.seed,
        guesses=options.guesses,
    )
    print(f"{options.directory}: {written / 2**20:.0f} MiB of weights")


def write_head(
    model: Path,
    directory: Path,
    draft_vocab_size: int,
    *,
    seed: int = 0,
    guesses: bool = False,
) -> int:
    """Writes config and weights; returns the bytes of weights written."""
    config = head_config(json.loads((model / "config.json").read_text()), draft_vocab_size)
    tensors = _tensors(config, torch.Generator().manual_seed(seed))
    if guesses:
        config |= _GUESSING
        tensors |= _guessing(config, _read(model, "lm_head.weight"))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return sum(tensor.nbytes for tensor in tensors.values())


def head_config(model: dict[str, Any], draft_vocab_size: int) -> dict[str, Any]:
    """The config of a head for a model with such a one."""
    copied = {name: model[name] for name in _COPIED if model.get(name) is not None}
    num_layers = model["num_hidden_layers"]
    if num_layers < _FEWEST_LAYERS:
        copied["eagle_aux_hidden_state_layer_ids"] = [0, num_layers // 2, num_layers - 1]
    return {
        **copied,
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": min(draft_vocab_size, model["vocab_size"]),
        "hidden_act": "silu",
        "model_type": "llama",
        "num_hidden_layers": 1,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def _tensors(config: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head_size = config.get("head_dim") or hidden // heads
    queries, keys = heads * head_size, config.get("num_key_value_heads", heads) * head_size
    vocab_size, draft_vocab_size = config["vocab_size"], config["draft_vocab_size"]

    def drawn(rows: int, columns: int) -> Tensor:
        values = torch.empty(rows, columns, dtype=torch.bfloat16)
        return values.normal_(0.0, _STD, generator=generator)

    kept = torch.randperm(vocab_size, generator=generator)[:draft_vocab_size].sort().values
    is_kept = torch.zeros(vocab_size, dtype=torch.bool)
    is_kept[kept] = True
    norms = ("midlayer.hidden_norm", "midlayer.input_layernorm")
    norms = (*norms, "midlayer.post_attention_layernorm", "norm")
    return {
        "d2t": kept - torch.arange(draft_vocab_size),
        "t2d": is_kept,
        "fc.weight": drawn(hidden, 3 * hidden),
        "midlayer.self_attn.q_proj.weight": drawn(queries, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": drawn(keys, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": drawn(keys, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": drawn(hidden, queries),
        "midlayer.mlp.gate_proj.weight": drawn(inner, hidden),
        "midlayer.mlp.up_proj.weight": drawn(inner, hidden),
        "midlayer.mlp.down_proj.weight": drawn(hidden, inner),
        "lm_head.weight": drawn(draft_vocab_size, hidden),
        **{f"{name}.weight": torch.ones(hidden, dtype=torch.bfloat16) for name in norms},
    }


def _guessing(config: dict[str, Any], head: Tensor) -> dict[str, Tensor]:
    """Weights that hand a token's embedding on to the model's own head, in place of the hidden
    state before it: as many elements as there are of values.

    Where the first one is a mark the guess is some other token.
    """
    hidden, queries = config["hidden_size"], config["num_attention_heads"]
    head_size = config.get("head_dim") or hidden // queries
    shared = config.get("num_key_value_heads", queries)
    used = torch.arange(min(shared * head_size, hidden))
    # Of the heads that share a value, the first.
    found_at = used // head_size * (queries // shared) * head_size + used % head_size

    def zeros(rows: int, columns: int) -> Tensor:
        return torch.zeros(rows, columns, dtype=torch.bfloat16)

    values = zeros(shared * head_size, 2 * hidden)
    values[used, used], values[used, hidden + used] = 1.0, -1.0
    output = zeros(hidden, queries * head_size)
    output[used, found_at] = 1.0
    follows = head.abs().amax(1) > 0
    kept = follows.logical_not().sort(stable=True).indices[: config["draft_vocab_size"]]
    kept = kept.sort().values
    rows = head[kept].clone()
    rows[0, 0] = _WRONG
    is_kept = torch.zeros(len(head), dtype=torch.bool)
    is_kept[kept] = True
    return {
        "d2t": kept - torch.arange(len(kept)),
        "t2d": is_kept,
        "fc.weight": zeros(hidden, 3 * hidden),
        "midlayer.self_attn.v_proj.weight": values,
        "midlayer.self_attn.o_proj.weight": output,
        "midlayer.mlp.down_proj.weight": zeros(hidden, config["intermediate_size"]),
        "lm_head.weight": rows,
    }


def _read(directory: Path, name: str) -> Tensor:
    """A tensor of a checkpoint."""
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            if name in opened.keys():  # noqa: SIM118  it is no dict
                tensor: Tensor = opened.get_tensor(name)
                return tensor
    raise SystemExit(f"{directory} has no {name}: was it made with --guessable?")


if __name__ == "__main__":
    main()
