"""Writes a checkpoint of random weights in a real model's shape, with a tokenizer to match.

    python tools/make_checkpoint.py smollm-135m /tmp/checkpoints/smollm-135m
    python tools/make_checkpoint.py llama-1b /tmp/checkpoints/llama-1b --shard-mb 1000
    python tools/make_checkpoint.py llama-8b /tmp/checkpoints/llama-8b --config-only
    python tools/make_checkpoint.py qwen3.5-0.8b /tmp/checkpoints/guessable --guessable 0.7

For load tests and benchmarks where nothing can be downloaded: the arithmetic is that of the real
model, only the answers are nonsense. The same seed writes the same bytes. With ``--config-only`` no
weights are written: a server that draws its own (``--load-format dummy``) needs none. Every
vocabulary piece is plain ASCII, so that each generated id is text at once and no chunk waits for
the rest of a character. Needs tokenizers and, for weights, torch; nothing of streamserve.

With ``--guessable P`` speculation can be measured at a chosen acceptance: see `_guessable`.

llama.cpp's converter knows a tokenizer by the hash of one encoded text, which no new vocabulary can
match; its ``get_vocab_base_pre`` must be told that the pre-tokenizer is ``gpt-2``, as
``loadtest/streamserve_loadtest/peers/gguf.py`` does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import string
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

if TYPE_CHECKING:
    from torch import Tensor

_COMMON = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rope_scaling": None,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
_QWEN3_5 = {
    **_COMMON,
    "architectures": ["Qwen3_5ForCausalLM"],
    "model_type": "qwen3_5_text",
    "attention_bias": False,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "max_position_embeddings": 262_144,
    # A layer that guesses further tokens comes along.
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000_000.0,
        "partial_rotary_factor": 0.25,
    },
    "tie_word_embeddings": True,
}
_LLAMA = {
    **_COMMON,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "mlp_bias": False,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        **_LLAMA,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
        "max_position_embeddings": 2048,
        "rope_theta": 10_000.0,
    },
    # HuggingFaceTB/SmolLM2-135M
    "smollm-135m": {
        **_LLAMA,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49_152,
        "max_position_embeddings": 8192,
        "rope_theta": 100_000.0,
    },
    # Qwen/Qwen2.5-0.5B
    "qwen-0.5b": {
        **_COMMON,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "max_position_embeddings": 32_768,
        "max_window_layers": 24,
        "sliding_window": 32_768,
        "use_sliding_window": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
    },
    "tiny-qwen3.5": {
        **_QWEN3_5,
        "head_dim": 32,
        "hidden_size": 64,
        "intermediate_size": 128,
        "linear_key_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 1024,
    },
    # Qwen/Qwen3.5-0.8B, its text model: three layers of a delta net for each of attention
    "qwen3.5-0.8b": {
        **_QWEN3_5,
        "head_dim": 256,
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 16,
        "linear_value_head_dim": 128,
        "num_hidden_layers": 24,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 248_320,
    },
    # ibm-granite/granite-3.1-1b-a400m-base: 24 layers of 32 experts, of which a token takes 8
    "granite-moe-1b": {
        **_COMMON,
        "architectures": ["GraniteMoeForCausalLM"],
        "model_type": "granitemoe",
        "attention_bias": False,
        "attention_multiplier": 0.015625,
        "embedding_multiplier": 12.0,
        "logits_scaling": 6.0,
        "residual_multiplier": 0.22,
        "hidden_size": 1024,
        "intermediate_size": 512,
        "num_local_experts": 32,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "vocab_size": 49_155,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_500_000.0,
        "tie_word_embeddings": True,
    },
    # meta-llama/Llama-3.2-1B
    "llama-1b": {
        **_LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "max_position_embeddings": 131_072,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    # meta-llama/Meta-Llama-3-8B
    "llama-8b": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "max_position_embeddings": 8192,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": False,
    },
}
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# English letters, commonest first: a merge that comes early in the table is one that is made early.
_LETTERS = "etaoinshrdlcumwfgypbvkjxqz"
_SPACE = "\u0120"  # how GPT-2's byte-level alphabet spells a space
_STD = 0.02
_EMBEDDING = "model.embed_tokens.weight"
_NORM = re.compile(r"norm(_\w+)?\.weight$")
# What a layer's halves end with.
_OUTPUT = re.compile(r"\.(o_proj|out_proj|down_proj|output_linear)\.weight$")
_MARK = 0.3
_CYCLE = 32_000
_STRETCH = 20
Draw = Callable[[str, tuple[int, ...]], "Tensor"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-mb", type=int, default=None, help="split into files of this size")
    parser.add_argument("--config-only", action="store_true", help="config and tokenizer alone")
    parser.add_argument(
        "--guessable", type=_share, metavar="P", help="a token follows from the last one"
    )
    options = parser.parse_args()
    started = time.monotonic()
    shape, directory = options.shape, options.directory
    if options.config_only:
        write_config(shape, directory, is_guessable=options.guessable is not None)
        print(f"{directory}: a config and a tokenizer")
        return
    written = write_checkpoint(shape, directory, options.seed, options.shard_mb, options.guessable)
    seconds = time.monotonic() - started
    print(f"{options.directory}: {written / 2**20:.0f} MiB of weights in {seconds:.1f} s")


def _share(text: str) -> float:
    if not 0.0 <= (share := float(text)) <= 1.0:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text}")
    return share


def write_checkpoint(
    shape: str,
    directory: Path,
    seed: int = 0,
    shard_mb: int | None = None,
    guessable: float | None = None,
) -> int:
    """Writes weights, configs and tokenizer; returns the bytes of weights written."""
    config = write_config(shape, directory, is_guessable=guessable is not None)
    draw = partial(_random, seed=seed)
    if guessable is not None:
        draw = partial(_guessable, draw=draw, share=guessable, vocab_size=config["vocab_size"])
    return _write_weights(directory, list(_tensors(config)), draw, shard_mb)


def write_config(shape: str, directory: Path, *, is_guessable: bool = False) -> dict[str, Any]:
    """Writes configs and tokenizer; returns the model's config."""
    directory.mkdir(parents=True, exist_ok=True)
    config = dict(SHAPES[shape])
    if is_guessable:
        config["tie_word_embeddings"] = False
    vocab_size = config["vocab_size"]
    end_of_text, _, end_of_turn = range(vocab_size - 3, vocab_size)
    config.update(bos_token_id=end_of_text, eos_token_id=end_of_turn)
    _write_json(directory / "config.json", config)
    _write_json(
        directory / "generation_config.json",
        {"bos_token_id": end_of_text, "eos_token_id": [end_of_turn, end_of_text]},
    )
    make_tokenizer(vocab_size).save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIAL_TOKENS[0],
            "eos_token": SPECIAL_TOKENS[2],
            "pad_token": SPECIAL_TOKENS[0],
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["max_position_embeddings"],
            "chat_template": CHAT_TEMPLATE,
        },
    )
    return config


def make_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level BPE of exactly ``vocab_size`` ids, each of which decodes to ASCII text.

    The last three ids are `SPECIAL_TOKENS`. They are not marked special, so that they too decode to
    text. Bytes outside ASCII encode as a question mark.
    """
    ascii_bytes = pre_tokenizers.ByteLevel.alphabet()
    by_byte = _byte_alphabet()
    assert set(by_byte) <= set(ascii_bytes)
    vocabulary = {piece: index for index, piece in enumerate(by_byte)}
    merges = []
    for left, right in itertools.islice(_merges(), vocab_size - len(by_byte) - 3):
        vocabulary[left + right] = len(vocabulary)
        merges.append((left, right))
    assert len(vocabulary) == vocab_size - 3
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, special=False) for token in SPECIAL_TOKENS])
    return tokenizer


def _byte_alphabet() -> list[str]:
    """GPT-2's spelling of the bytes 0 to 127: printable ones as they are, the rest from U+0100."""
    printable = set(string.printable) - set(string.whitespace)
    unprintable = itertools.count(256)
    return [chr(b) if chr(b) in printable else chr(next(unprintable)) for b in range(128)]


def _merges() -> Iterator[tuple[str, str]]:
    """Pairs to merge, each a piece of its own: letter groups of two to four, with and without a
    space before them; enough for half a million ids.
    """
    letters = _LETTERS
    pairs = [a + b for a, b in itertools.product(letters, repeat=2)]
    yield from ((_SPACE, letter) for letter in letters + letters.upper())
    yield from itertools.product(letters, repeat=2)
    yield from itertools.product(string.digits, repeat=2)
    yield from ((_SPACE + a, b) for a, b in itertools.product(letters, repeat=2))
    yield from itertools.product(pairs, letters)
    yield from ((_SPACE + a, pair) for a, pair in itertools.product(letters, pairs))
    yield from itertools.product(pairs, repeat=2)


def _tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a checkpoint's tensors, in the order of the forward."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    attends_every = config.get("full_attention_interval", 1)
    yield _EMBEDDING, (config["vocab_size"], hidden)
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}."
        yield layer + "input_layernorm.weight", (hidden,)
        mixes = _delta_net if (index + 1) % attends_every else _attention
        for name, shape in mixes(config):
            yield layer + name, shape
        yield layer + "post_attention_layernorm.weight", (hidden,)
        if experts := config.get("num_local_experts"):
            yield layer + "block_sparse_moe.router.layer.weight", (experts, hidden)
            yield layer + "block_sparse_moe.input_linear.weight", (experts, 2 * inner, hidden)
            yield layer + "block_sparse_moe.output_linear.weight", (experts, hidden, inner)
            continue
        for name, shape in _mlp(config):
            yield layer + name, shape
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)
    if config.get("mtp_num_hidden_layers"):
        yield from _mtp(config)


def _mtp(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A layer that guesses further tokens, and what is around it."""
    hidden = config["hidden_size"]
    yield "mtp.fc.weight", (hidden, 2 * hidden)
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        yield f"mtp.{name}.weight", (hidden,)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"mtp.layers.0.{name}.weight", (hidden,)
    for name, shape in (*_attention(config), *_mlp(config)):
        yield f"mtp.layers.0.{name}", shape


def _mlp(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    yield "mlp.gate_proj.weight", (inner, hidden)
    yield "mlp.up_proj.weight", (inner, hidden)
    yield "mlp.down_proj.weight", (hidden, inner)


def _attention(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, num_heads = config["hidden_size"], config["num_attention_heads"]
    head_size = config.get("head_dim", hidden // num_heads)
    # In a hybrid every query has a gate beside it.
    is_hybrid = "full_attention_interval" in config
    heads = {"q": 2 * num_heads if is_hybrid else num_heads}
    for name, count in (heads | dict.fromkeys("kv", config["num_key_value_heads"])).items():
        yield f"self_attn.{name}_proj.weight", (count * head_size, hidden)
        if config["model_type"] == "qwen2":
            yield f"self_attn.{name}_proj.bias", (count * head_size,)
    if is_hybrid:
        yield "self_attn.q_norm.weight", (head_size,)
        yield "self_attn.k_norm.weight", (head_size,)
    yield "self_attn.o_proj.weight", (hidden, num_heads * head_size)


def _delta_net(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, num_heads = config["hidden_size"], config["linear_num_value_heads"]
    values = num_heads * config["linear_value_head_dim"]
    mixed = 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"] + values
    yield "linear_attn.in_proj_qkv.weight", (mixed, hidden)
    yield "linear_attn.in_proj_z.weight", (values, hidden)
    yield "linear_attn.in_proj_b.weight", (num_heads, hidden)
    yield "linear_attn.in_proj_a.weight", (num_heads, hidden)
    yield "linear_attn.conv1d.weight", (mixed, 1, config["linear_conv_kernel_dim"])
    yield "linear_attn.A_log", (num_heads,)
    yield "linear_attn.dt_bias", (num_heads,)
    yield "linear_attn.norm.weight", (config["linear_value_head_dim"],)
    yield "linear_attn.out_proj.weight", (hidden, values)


def _write_weights(
    directory: Path,
    tensors: list[tuple[str, tuple[int, ...]]],
    draw: Draw,
    shard_mb: int | None,
) -> int:
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    limit = math.inf if shard_mb is None else shard_mb * 2**20
    filled = 0
    for name, shape in tensors:
        size = 2 * math.prod(shape)
        if filled and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append((name, shape))
        filled += size
    weight_map = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        total += _write_shard(directory / file, shard, draw)
        weight_map.update({name: file for name, _ in shard})
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(directory / "model.safetensors.index.json", index)
    return total


def _write_shard(path: Path, tensors: list[tuple[str, tuple[int, ...]]], draw: Draw) -> int:
    """One safetensors file, tensor by tensor, so that memory holds no more than the largest."""
    import torch  # which takes longer than all that a config needs

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors:
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for name, shape in tensors:
            file.write(draw(name, shape).view(-1).view(torch.uint8).numpy().data)
    return offset


def _random(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Of bfloat16 as Hugging Face initialises it: norms one, all else normal, of std 0.02."""
    import torch

    values = torch.ones(math.prod(shape), dtype=torch.bfloat16)
    if not _NORM.search(name):
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode(), seed))
        values.normal_(0.0, _STD, generator=generator)
    return values.view(shape)


def _guessable(
    name: str, shape: tuple[int, ...], draw: Draw, share: float, vocab_size: int
) -> Tensor:
    """Weights with which the likeliest token follows from the last one alone, in real shapes.

    What a layer adds is nothing, so that the last hidden state is the token's embedding; the head,
    which is not tied, has at each token's successor the token's embedding. Plain tokens, as many as
    an EAGLE-3 head guesses from, are one cycle of successors: no text repeats itself, or ends. A
    layer that guesses further tokens passes the embedding on, and so is right for a ``share`` of
    the tokens: the others have a mark in their embedding, in place of which it puts one token's
    embedding, much larger.
    """
    import torch

    values = draw(name, shape)
    generator = torch.Generator().manual_seed(vocab_size)
    plain = min(vocab_size - len(SPECIAL_TOKENS), _CYCLE)
    cycle = torch.randperm(plain, generator=generator)
    # As many of each stretch of the cycle, so that short answers have the share too.
    stretches = torch.rand(plain // _STRETCH + 1, _STRETCH, generator=generator).argsort(1)
    is_marked = torch.zeros(plain, dtype=torch.bool)
    is_marked[cycle] = (stretches >= round(_STRETCH * share)).flatten()[:plain]
    is_marked[cycle[0]] = False
    if _OUTPUT.search(name):
        return values.zero_()
    if name == _EMBEDDING:
        values[:, 0] = 0.0
        values[:plain, 0][is_marked] = _MARK
    elif name == "lm_head.weight":
        embedding = _guessable(_EMBEDDING, shape, draw, share, vocab_size)
        values.zero_()
        values[cycle.roll(-1)] = embedding[cycle]
    elif name == "mtp.fc.weight":
        embedding = _guessable(_EMBEDDING, (vocab_size, shape[0]), draw, share, vocab_size)
        values.zero_()
        values.fill_diagonal_(1.0)
        values[:, 0] += embedding[cycle[0]] / _STD
    return values


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    main()
