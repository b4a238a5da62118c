"""Loading keeps little beside what it has packed: bytes alive are counted, not the process's."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
import transformers
from torch.profiler import ProfilerActivity, profile

import streamserve_kernels
from streamserve.models import load_config, load_model
from streamserve.models.gguf import kinds
from streamserve.models.parameters import decoder_modules
from streamserve_kernels import fp8, quantised
from tests.models.gguf_files import Kind, write_gguf
from tests.models.packers import KINDS
from tests.models.test_stored_checkpoints import quantise

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
VALUES = {
    "context_length": 128,
    "embedding_length": 256,
    "block_count": 2,
    "feed_forward_length": 1024,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-6,
}


def most_alive(load) -> tuple[int, int]:
    """The most bytes of tensors that lived at one time, and those that live on."""
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as recorded:
        kept = load()
    events = recorded.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    del kept
    total = [*accumulate(change for _, change in sorted(changes))]
    return max(total), total[-1]


@pytest.fixture(scope="module")
def plain(build, tmp_path_factory):
    directory = tmp_path_factory.mktemp("plain")
    model = build(transformers.LlamaConfig(**SIZES)).to(torch.bfloat16)
    model.save_pretrained(directory)
    return directory, model.float()


CASES = ["plain", "int8", "int4", "fp8", "Q4_K", "Q6_K", "Q8_0", *KINDS]


@pytest.mark.parametrize("case", CASES)
def test_few_bytes_live_beside_the_packed_weights(case, plain, tmp_path, monkeypatch):
    for module in (kinds, fp8, quantised):
        monkeypatch.setattr(module, "_SLICE_ELEMENTS", 2**14)
    path, model = plain
    options = {"quantization": case} if case in ("int8", "int4", "fp8") else {}
    if case.startswith("Q"):
        path = tmp_path / "m.gguf"
        write_gguf(path, model, "llama", VALUES, kind=lambda name: Kind[case])
    elif case in KINDS:
        for file in ("config.json", "model.safetensors"):
            (tmp_path / file).write_bytes((path / file).read_bytes())
        quantise(tmp_path, case)
        path = tmp_path
    kernels = streamserve_kernels.load(CPU, "cpu")

    def load():
        return load_model(path, dtype=torch.bfloat16, device=CPU, kernels=kernels, **options)

    peak, after = most_alive(load)
    largest = max(module.numel for module in decoder_modules(load_config(path).spec))
    # The largest in bfloat16, or its codes, a byte each, and what they are made of and become: of
    # GGUF's some at a time. SqueezeLLM's rows of 3 bits are padded to 512 inputs, twice what these
    # have.
    most = 6 if case == "squeezellm-3" else 2 if case.startswith("Q") else 4
    assert peak - after <= most * largest
