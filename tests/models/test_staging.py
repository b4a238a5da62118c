"""Weights go into tensors that are there already, on any device, piece by piece."""

from __future__ import annotations

import pytest
import torch
import transformers

import streamserve_kernels
from streamserve.models import load_config, load_model
from streamserve.models.checkpoint import CheckpointSource, RandomSource, module_pieces
from streamserve.models.parameters import decoder_modules
from streamserve.models.staging import Staging
from streamserve.models.tensor_files import open_tensor_files
from tests.models.paged import PagedHarness, Sequence

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
TOKENS = [5, 17, 3, 88, 41]
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, num_key_value_heads=2),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**SIZES),  # q, k and v head by head
    "gpt2": lambda: transformers.GPT2Config(  # transposed
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    ),
}
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 7, 16, 17, 32, 100])
def test_pieces_make_the_whole(dtype, count):
    staging = Staging(CPU, buffer_bytes=32)
    for seed in range(2):  # the second starts with whichever buffer is next
        source = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)).to(dtype)
        target = torch.full_like(source, float("nan"))
        staging.copy(target, source)
        assert torch.equal(target, source)


@pytest.fixture(params=CONFIGS)
def source_of(request, checkpoint):
    directory, _ = checkpoint(CONFIGS[request.param]())
    config = load_config(directory)
    files = open_tensor_files(directory, "auto")
    names = config.family.weight_names(config.spec)
    return config, files, CheckpointSource(files, names, config.spec, directory)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_module_fills_its_rows_and_no_others(source_of, dtype):
    config, files, source = source_of
    for module in decoder_modules(config.spec):
        around = torch.full((module.num_rows + 2, *module.shape[1:]), -7.0, dtype=dtype)
        source.fill(module, "weight", around[1:-1])
        assert (around[0] == -7.0).all()
        assert (around[-1] == -7.0).all()
        stored = [files.read(p.name) for p in module_pieces(config.family.names, module, "weight")]
        expected = torch.cat([tensor.flatten() for tensor in stored]).to(dtype)
        assert torch.equal(around[1:-1].flatten().sort().values, expected.sort().values)


def test_a_target_without_memory_is_filled_too(source_of):
    """Every part has the shape of its place: what is checked before a device is asked for room."""
    config, _, source = source_of
    for module in decoder_modules(config.spec):
        source.fill(module, "weight", torch.empty(module.shape, device="meta"))


def test_random_weights_are_the_generators_first(checkpoint, tiny_llama):
    """A load test repeats: the same seed gives the same weights as ever."""
    directory, _ = checkpoint(tiny_llama())
    embedding = next(decoder_modules(load_config(directory).spec))
    drawn = torch.empty(embedding.shape)
    RandomSource(seed=3).fill(embedding, "weight", drawn)
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(drawn, torch.empty(embedding.shape).normal_(0.0, 0.02, generator=generator))


def logits_on(device: torch.device, directory, **options) -> torch.Tensor:
    kernels = streamserve_kernels.load(device, "naive")
    options = {"dtype": torch.float32, "device": device, "kernels": kernels, **options}
    return PagedHarness(load_model(directory, **options)).prefill([Sequence(TOKENS)], None)[0]


@pytest.mark.gpu
@pytest.mark.parametrize("family", CONFIGS)
def test_a_checkpoint_on_the_gpu_is_the_one_on_the_cpu(family, checkpoint):
    directory, _ = checkpoint(CONFIGS[family]())
    on_cpu, on_gpu = logits_on(CPU, directory), logits_on(CUDA, directory)
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-4, atol=1e-4)
    halves = [logits_on(device, directory, dtype=torch.bfloat16) for device in (CPU, CUDA)]
    assert (halves[1] - halves[0]).abs().max() < 0.06 * on_cpu.abs().max()


@pytest.mark.gpu
def test_staged_pieces_arrive(checkpoint):
    staging = Staging(CUDA, buffer_bytes=2**16)
    source = torch.randn(1000, 333)
    target = torch.full(source.shape, float("nan"), device=CUDA)
    staging.copy(target, source)
    assert torch.equal(target.cpu(), source)


@pytest.mark.gpu
def test_random_weights_are_drawn_on_the_gpu(checkpoint, tiny_llama):
    directory, _ = checkpoint(tiny_llama())
    first, again, other = (
        logits_on(CUDA, directory, load_format="dummy", seed=seed) for seed in (1, 1, 2)
    )
    assert first.isfinite().all()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
