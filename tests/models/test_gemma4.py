"""Gemma 4: what is refused of its configs and files, and caches that its last layers lack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import streamserve_kernels
from streamserve.errors import ModelLoadError, UnsupportedModelError
from streamserve.models import (
    allocate_kv_cache,
    kv_bytes_per_block,
    load_config,
    load_model,
    read_text_files,
)
from streamserve.models.block import Block
from streamserve.models.families import FAMILIES
from streamserve.models.hf_config import HfConfig
from tests.models.gguf_files import write_gguf
from tests.models.gguf_gemma4 import GEMMA4_CASES
from tests.models.gguf_parity import sizes
from tests.models.native import NATIVE, config_values
from tests.models.paged import PagedHarness, Sequence
from tests.models.random_model import random_model

CPU = torch.device("cpu")
SHARING = "gemma4-per-layer"


def spec_of(name: str, **changes: Any):
    return FAMILIES["Gemma4ForCausalLM"].spec(HfConfig({**config_values(name), **changes}))


def test_layers_that_share_have_no_cache_that_is_counted_or_allocated():
    """Of six layers the last three attend to what the second and the third left."""
    spec = spec_of(SHARING)
    assert [place.start for place in spec.cache_places()] == [0, 1, 2, 1, 2, 1]
    kernels = streamserve_kernels.load(CPU, "naive")
    caches = allocate_kv_cache(spec, 5, 4, torch.float32, CPU, kernels)
    assert [keys.shape[3] for keys, _ in caches] == [16, 32, 16]
    held = sum(cache[0].nbytes for pair in caches for cache in pair)
    assert held == kv_bytes_per_block(spec, 4, torch.float32) == 2 * 4 * 4 * (16 + 32 + 16)


def test_layers_without_a_cache_wait_for_somebody_who_asks(tmp_path, monkeypatch):
    random_model(NATIVE[SHARING]()).save_pretrained(tmp_path)
    kernels = streamserve_kernels.load(CPU, "naive")
    decoder = load_model(tmp_path, dtype=torch.float32, device=CPU, kernels=kernels)
    harness, sequence = PagedHarness(decoder), Sequence([1, 2, 3, 4, 5])
    expected = PagedHarness(decoder).prefill([Sequence(sequence.tokens)], None)[0][-1:]
    num_run = []
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda *args: num_run.append(1) or forward(*args))
    assert harness.step([(sequence, 4)]).shape[0] == 0
    assert len(num_run) == 3  # of six
    torch.testing.assert_close(harness.step([(sequence, 1)]), expected, rtol=1e-5, atol=1e-5)
    assert len(num_run) == 3 + 6


def test_keys_and_values_of_layers_that_use_anothers_may_be_there(tmp_path):
    random_model(NATIVE[SHARING]()).save_pretrained(tmp_path)
    kernels = streamserve_kernels.load(CPU, "naive")

    def logits() -> torch.Tensor:
        decoder = load_model(tmp_path, dtype=torch.float32, device=CPU, kernels=kernels)
        return PagedHarness(decoder).prefill([Sequence([1, 2, 3])], None)[0]

    expected = logits()
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.4.self_attn.k_proj.weight"] = torch.ones(16, 32)
    save_file(tensors, file, metadata={"format": "pt"})
    assert torch.equal(logits(), expected)
    tensors["model.layers.2.self_attn.z_proj.weight"] = torch.ones(16, 32)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match="z_proj"):
        logits()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"use_bidirectional_attention": "all"}, UnsupportedModelError, "'all' is not supported"),
        ({"vocab_size_per_layer_input": 98}, UnsupportedModelError, "98 .* must be vocab_size, 97"),
        ({"num_kv_shared_layers": 5}, ModelLoadError, "layer 1 shares .* full_attention"),
        ({"per_layer_config": {"1": {"eps": 1}}}, UnsupportedModelError, "eps that differs"),
        ({"per_layer_config": {"first": {}}}, ModelLoadError, "an object for each of some layers"),
    ],
)
def test_what_is_not_built_is_refused(changes, error, message):
    assert spec_of(SHARING, use_bidirectional_attention="vision") == spec_of(SHARING)
    with pytest.raises(error, match=message):
        spec_of(SHARING, **changes)


def write(path: Path, values: dict[str, Any], factors: list[float], **options: Any) -> None:
    architecture, config, given, _ = GEMMA4_CASES[SHARING]
    model = random_model(config())
    extra = {"rope_freqs.weight": np.array(factors, dtype=np.float32)}
    values = {**sizes(model.config), **given, **values}
    write_gguf(path, model, architecture, values, extra=extra, **options)


@pytest.mark.parametrize(
    ("values", "factors", "message"),
    [
        ({"feed_forward_length": [48] * 4 + [96] * 2}, [1.0] * 16, "twice that in the last 3"),
        ({"attention.head_count_kv": [1] * 5 + [2]}, [1.0] * 16, "as many each"),
        ({}, [1.0] * 8 + [4.0] * 8, "ones, then numbers"),
    ],
)
def test_files_of_other_shapes_are_refused(values, factors, message, tmp_path):
    write(tmp_path / "m.gguf", values, factors)
    with pytest.raises(UnsupportedModelError, match=message):
        load_config(tmp_path / "m.gguf")


def test_a_vocabulary_of_pieces_has_a_table_of_merges(tmp_path):
    """Its ranks are the table's, whatever the scores."""
    tokens = ["<unk>", "<bos>", "<turn|>", *(f"<0x{n:02X}>" for n in range(256))]
    kinds = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
    pieces = ["a", "b", "▁", "ab", "▁a", "▁ab"]

    def text(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gemma4")
        writer.add_token_list([*tokens, *pieces])
        writer.add_token_types([*kinds, *[gguf.TokenType.NORMAL] * len(pieces)])
        writer.add_token_merges(["▁ a", "a b", "▁a b"])
        writer.add_bos_token_id(1)
        writer.add_add_bos_token(True)

    write(tmp_path / "m.gguf", {}, [1.0] * 8 + [1e30] * 8, text=text)
    tokenizer = Tokenizer.from_str(read_text_files(tmp_path / "m.gguf").tokenizer)
    encoding = tokenizer.encode("ab ab\n<turn|>")
    assert encoding.tokens == ["<bos>", "ab", "▁ab", "<0x0A>", "<turn|>"]
    assert tokenizer.decode(encoding.ids, skip_special_tokens=True) == "ab ab\n"
    assert load_config(tmp_path / "m.gguf").eos_token_ids == (2,)
