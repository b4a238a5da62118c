"""Shares of a model, on ranks that are threads, find what the whole model finds."""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"

import transformers

import streamserve_kernels
from streamserve.errors import ConfigError
from streamserve.models import load_config, load_model
from streamserve.models.parameters import decoder_modules
from streamserve.models.tensor_files import MappedFile
from streamserve.models.tensor_parallel.config import share_config
from tests.models.checkpoints import random_checkpoint
from tests.models.gguf_files import Kind, write_gguf
from tests.models.native import GQA, LONGER, NATIVE, config_values
from tests.models.packers import KINDS
from tests.models.paged import PagedHarness, Sequence
from tests.models.parity import prompts
from tests.models.random_model import random_model
from tests.models.test_load_bytes import most_alive
from tests.models.test_stored_checkpoints import quantise
from tests.models.thread_ranks import load_shares, on_every_rank, thread_ranks

CPU = torch.device("cpu")
CHUNK = 13
NUM_GREEDY = 6
# Of two key and value heads each of four ranks holds one; of one all do.
REPLICATED = (
    "llama3",
    "llama-mqa",
    "olmo2",
    "falcon-11b",
    "chatglm2",
    "gpt-oss",
    "qwen3-moe",
    "gemma2",
)
CASES = [*((name, 2) for name in NATIVE), *((name, 4) for name in REPLICATED)]


def options() -> dict[str, Any]:
    kernels = streamserve_kernels.load(CPU, "naive")
    return {"dtype": torch.float32, "device": CPU, "kernels": kernels}


def logits_of(decoder) -> torch.Tensor:
    """Of prompts in chunks and what is drawn after them, and the last rows alone."""
    harness = PagedHarness(decoder)
    sequences = [Sequence(tokens) for tokens in prompts(shared=10)]
    harness.prefill(sequences[:1], None)
    harness.share_prefix(sequences[1], sequences[0])
    prefilled = harness.prefill(sequences[1:], CHUNK)
    last = torch.stack([rows[-1] for rows in prefilled])
    decoded = harness.decode(sequences[1:], last, NUM_GREEDY)
    return torch.cat((*prefilled, decoded.flatten(0, 1)))


@pytest.mark.parametrize(("name", "size"), CASES)
def test_shares_find_what_the_whole_finds(name: str, size: int, tmp_path: Path) -> None:
    config = random_checkpoint(config_values(name), tmp_path)
    longest = {"max_model_len": LONGER.get(name)}
    whole = load_model(tmp_path, config=config, **options(), **longest)
    shares = load_shares(tmp_path, config, size, **options(), **longest)
    expected = logits_of(whole)
    for found in on_every_rank(shares, logits_of):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert sum(share.nbytes for share in shares) < whole.nbytes * (1 + 0.4 * (size - 1))


# Rows of 128 and 256: halves of them are whole groups in every format.
WIDE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    **GQA,
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
}
ACT_ORDER = "gptq-4-act-order"


def assert_equal_logits(directory: Path, size: int = 2, **given: Any) -> None:
    config = load_config(directory)
    whole = load_model(directory, config=config, **options(), **given)
    expected = logits_of(whole)
    for found in on_every_rank(load_shares(directory, config, size, **options()), logits_of):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != ACT_ORDER])
def test_packed_weights_are_cut_between_their_groups(kind: str, tmp_path: Path) -> None:
    random_checkpoint(WIDE, tmp_path)
    quantise(tmp_path, kind)
    assert_equal_logits(tmp_path)


def test_packed_weights_of_experts_fused_and_transposed_matrices(tmp_path: Path) -> None:
    for name, changes in (
        ("mixtral", {"hidden_size": 128, "intermediate_size": 256}),
        ("phi3", {"hidden_size": 128, "intermediate_size": 256}),
        ("gpt-neox", {"hidden_size": 128, "intermediate_size": 256}),
        ("gpt2", {"n_embd": 128}),
    ):
        directory = tmp_path / name
        directory.mkdir()
        values = config_values(name)
        random_checkpoint({**values, **changes, "vocab_size": 96}, directory)
        quantise(directory, "fp8-block")
        assert_equal_logits(directory)


def test_kinds_of_a_gguf_file_are_cut_too(tmp_path: Path) -> None:
    """Of blocks of 256, with units that 8 or 16 groups share; v is of another kind than q."""
    sizes = {**GQA, "hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 1}
    model = random_model(transformers.LlamaConfig(**sizes))
    values = {
        "context_length": 128,
        "embedding_length": 512,
        "block_count": 1,
        "feed_forward_length": 512,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-6,
    }
    mix = {"attn_v": Kind.Q6_K, "ffn_down": Kind.Q6_K, "attn_output": Kind.Q4_0, "": Kind.Q4_K}

    def kind(name: str) -> Kind:
        return next(found for part, found in mix.items() if part in name)

    write_gguf(tmp_path / "m.gguf", model, "llama", values, kind=kind)
    assert_equal_logits(tmp_path / "m.gguf")


def test_what_cannot_be_cut_is_refused_by_name(tmp_path: Path) -> None:
    config = random_checkpoint(WIDE, tmp_path)
    quantise(tmp_path, ACT_ORDER)
    with pytest.raises(ConfigError, match=r"--tensor-parallel-size .* got 2: .* act-order"):
        load_shares(tmp_path, load_config(tmp_path), 2, **options())
    random_checkpoint({**WIDE, "intermediate_size": 96}, tmp_path)
    quantise(tmp_path, "fp8-block")
    with pytest.raises(ConfigError, match=r"layers\.down of layer 0 is quantised in groups of 32"):
        load_shares(tmp_path, load_config(tmp_path), 2, **options())
    made = random_checkpoint(config_values("qwen3.5"), tmp_path)
    with pytest.raises(ConfigError, match=r"must be 1 .* layers that keep a state .* got 2"):
        share_config(made, 0, 2)
    for size, what in ((3, "4 .attention heads"), (5, "4 .attention heads")):
        with pytest.raises(ConfigError, match=f"must divide the model's {what}.*got {size}"):
            share_config(config, 0, size)
    wide = {"num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 8}
    config = random_checkpoint({**WIDE, **wide, "intermediate_size": 240}, tmp_path)
    with pytest.raises(ConfigError, match=r"6 key and value heads.*got 4"):
        share_config(config, 0, 4)
    config = random_checkpoint({**WIDE, "intermediate_size": 250}, tmp_path)
    with pytest.raises(ConfigError, match=r"250 .intermediate size., got 4"):
        share_config(config, 0, 4)


@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
def test_weights_that_are_quantised_while_they_load(quantization: str, tmp_path: Path) -> None:
    """Each rank scales its own columns: not the same numbers, and no worse."""
    config = random_checkpoint(WIDE, tmp_path)
    plain = logits_of(load_model(tmp_path, config=config, **options()))
    given = {**options(), "quantization": quantization}
    rows = slice(0, 20)  # of prompts: what is drawn after them may differ

    def error(found: torch.Tensor) -> float:
        return float((found - plain)[rows].norm() / plain[rows].norm())

    of_the_whole = error(logits_of(load_model(tmp_path, config=config, **given)))
    assert 0 < of_the_whole < 0.6
    for found in on_every_rank(load_shares(tmp_path, config, 2, **given), logits_of):
        assert error(found) < 1.3 * of_the_whole


def test_dummy_weights_are_those_of_the_whole(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(WIDE))
    config, given = load_config(tmp_path), {**options(), "load_format": "dummy"}
    whole = load_model(tmp_path, config=config, **given)
    share = load_shares(tmp_path, config, 2, **given)[1]
    ours, all_of_it = ([*weights._weights.layers[1].linears.values()] for weights in (share, whole))
    torch.testing.assert_close(ours[-1].weight, all_of_it[-1].weight[:, 128:])  # down


@pytest.mark.parametrize("name", ["llama2", "gpt-neox", "phi3"])
def test_a_rank_reads_and_holds_its_part_only(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of matrices that are divided by columns the file has each row in one piece."""
    read: list[int] = []
    advise = MappedFile.advise

    def counted(file: MappedFile, start: int, end: int, advice: int) -> None:
        read.append(end - start if advice == mmap.MADV_WILLNEED else 0)
        advise(file, start, end, advice)

    monkeypatch.setattr(MappedFile, "advise", counted)
    values = {**config_values(name), "hidden_size": 256, "intermediate_size": 512}
    values |= {"num_key_value_heads": 2}
    config = random_checkpoint({**values, "vocab_size": 1024}, tmp_path)
    ranks = thread_ranks(2)[1]
    share = share_config(config, 1, 2)
    peak, kept = most_alive(lambda: load_model(tmp_path, config=share, ranks=ranks, **options()))
    modules = list(decoder_modules(config.spec))
    total = 4 * sum(module.numel for module in modules)
    by_columns = 4 * sum(m.numel for m in modules if m.name in ("layers.output", "layers.down"))
    assert sum(read) < 1.03 * (total + by_columns) / 2
    assert kept < 1.03 * total / 2
    largest = 4 * max(module.numel for module in modules)
    assert peak < kept + largest
