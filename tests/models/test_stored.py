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
from streamserve_kernels.native.library import why_not
from streamserve_kernels.stored import StoredFormat, StoredWeight, concatenate
from tests.kernels.stored_cases import CASES
from tests.models.native import NATIVE
from tests.models.paged import PagedHarness, Sequence

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
    directory, _ = checkpoint(made or NATIVE[request.param]())
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
    # The compiled products round activations to bfloat16: half a part in 256 for each of them.
    exact = backend == "naive" or why_not() is not None
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.median() < (1e-5 if exact else 0.03)


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


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.parametrize(
    "kind", ["gptq4", "act-order", "q4_k", "nf4", "fp8-blocks", "squeezed3", "mixed"]
)
@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("model", ["plain", "tied", "experts"])
def test_a_recorded_step_computes_what_its_functions_do(
    checkpoint, tiny_llama, kind, num_threads, model
):
    """With an embedding that is held quantised, and is the head's too where they are tied."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    if model == "experts":
        config = NATIVE["mixtral"]()
        config.update(sizes | {"head_dim": 32})
    else:
        config = tiny_llama(**sizes, tie_word_embeddings=model == "tied")
    directory, _ = checkpoint(config)
    torch.set_num_threads(num_threads)
    spec = load_config(directory).spec

    class Source(RandomSource):
        def stored(self, module: Module) -> StoredWeight | None:
            if module.columns is None or module.name == "layers.router":
                return None
            if kind == "mixed" and len(module.rows) > 1:
                kinds = ("q4_k", "squeezed4", "act-order")
                return concatenate(
                    [CASES[k](n, module.columns) for k, n in zip(kinds, module.rows, strict=False)]
                )
            name = "q6_k" if module.name in HEADS or kind == "mixed" else kind
            return CASES[name](module.num_rows, module.columns)

    kernels = streamserve_kernels.load(CPU, "native")
    weights = build_weights(spec, Source(), kernels, torch.bfloat16, CPU)
    decoder = Decoder(spec, weights, kernels, dtype=torch.bfloat16, device=CPU, max_model_len=128)
    harness = PagedHarness(decoder, block_size=16)
    generator = torch.Generator().manual_seed(5)
    batches = [
        harness.batch([(Sequence(tokens.tolist()), len(tokens))], all_rows=True)
        for tokens in torch.randint(0, 97, (46,), generator=generator).split([1, 5, 37, 3])
    ]
    with torch.inference_mode():
        by_functions = [decoder.forward(batch, harness.caches).clone() for batch in batches]
    assert decoder.record(harness.caches, max_tokens=64, max_logits=64) > 0
    for batch, expected in zip(batches, by_functions, strict=True):
        with torch.inference_mode():
            logits = decoder.forward(batch, harness.caches).clone()
            token_ids = decoder.greedy(batch, harness.caches)
        # The function by function logits were rounded to bfloat16.
        torch.testing.assert_close(logits, expected, rtol=2**-8, atol=1e-6)
        assert token_ids is not None
        assert token_ids.equal(logits.argmax(-1))
