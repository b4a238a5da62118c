"""Models whose checkpoint is quantised: built module by module, their bytes known before."""

from __future__ import annotations

from dataclasses import dataclass, replace
from zlib import crc32

import pytest
import torch

import streamserve_kernels
from streamserve.errors import ModelLoadError
from streamserve.models import load_config
from streamserve.models.checkpoint import RandomSource
from streamserve.models.decoder import Decoder
from streamserve.models.parameters import Module
from streamserve.models.weights import build_weights
from streamserve_kernels.stored import StoredFormat, StoredWeight
from tests.kernels.stored_cases import CASES
from tests.models.paged import PagedHarness, Sequence
from tests.models.test_families import CONFIGS

CPU = torch.device("cpu")
HEADS = ("head", "embedding")


@dataclass(frozen=True, slots=True)
class Kept:
    """Linear layers as Q4_K, heads and tables as Q6_K: what GGUF's mixtures look like."""

    name: str = "gguf"

    def format(self, module: Module) -> StoredFormat | None:
        if module.name in HEADS:
            return StoredFormat(6, 16, 1.125)
        if module.role != "linear" or module.name == "layers.router":
            return None
        return StoredFormat(4, 32, 2.5)


class Quantised(RandomSource):
    """Draws what `Kept` says, or the same weights dequantised."""

    def __init__(self, *, dense: bool) -> None:
        super().__init__(seed=3, std=0.15)
        self._dense = dense

    def _draw(self, module: Module) -> StoredWeight | None:
        kept = Kept().format(module)
        if kept is None or module.columns is None:
            return None
        torch.manual_seed(crc32(f"{module.name} {module.layer} {module.expert}".encode()))
        return CASES["q6_k" if kept.bits == 6 else "q4_k"](module.num_rows, module.columns)

    def stored(self, module: Module) -> StoredWeight | None:
        return None if self._dense else self._draw(module)

    def fill(self, module, leaf, target):
        drawn = self._draw(module) if leaf == "weight" else None
        if drawn is None:
            super().fill(module, leaf, target)
        else:
            target.copy_(drawn.dequantise())


@pytest.fixture(params=["llama3", "qwen2-moe", "tied", "gpt2"])
def config(request, checkpoint, tiny_llama):
    made = tiny_llama(tie_word_embeddings=True) if request.param == "tied" else None
    directory, _ = checkpoint(made or CONFIGS[request.param]())
    return replace(load_config(directory), stored_quantization=Kept())


def _decoder(config, backend: str, dtype: torch.dtype, *, dense: bool = False) -> Decoder:
    kernels = streamserve_kernels.load(CPU, backend)
    weights = build_weights(config.spec, Quantised(dense=dense), kernels, dtype, CPU)
    return Decoder(config.spec, weights, kernels, dtype=dtype, device=CPU, max_model_len=64)


@pytest.mark.parametrize("backend", ["naive", "cpu"])
def test_logits_are_those_of_the_dequantised_model(config, backend):
    tokens = [5, 9, 60, 3, 8, 12, 44, 1, 7]
    found, expected = (
        PagedHarness(_decoder(config, name, torch.float32, dense=dense)).step(
            [(Sequence(tokens), 9)]
        )
        for name, dense in ((backend, False), ("naive", True))
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["naive", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_plan_counts_what_is_held(config, backend, dtype):
    decoder = _decoder(config, backend, dtype)
    planned = config.weight_bytes(dtype)
    assert decoder.nbytes <= planned
    assert planned < 0.9 * replace(config, stored_quantization=None).weight_bytes(torch.bfloat16)


def test_a_weight_of_another_shape_is_refused_by_name(config):
    source = Quantised(dense=False)
    source.stored = lambda module: CASES["q4_0"](3, 64) if module.role == "linear" else None
    with pytest.raises(ModelLoadError, match=r"layers.qkv of layer 0 .*\[3, 64\]; the config asks"):
        build_weights(config.spec, source, streamserve_kernels.load(CPU), torch.float32, CPU)
