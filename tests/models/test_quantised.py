"""--quantization: families against transformers on the dequantised weights, and what is counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import streamserve_kernels
from streamserve.models import load_config, load_model
from streamserve.models.checkpoint import module_pieces
from streamserve.models.parameters import decoder_modules, module_quantization
from streamserve_kernels import QUANTIZATIONS
from streamserve_kernels.native.library import why_not
from streamserve_kernels.quantised import quantise
from tests.models.foreign import FOREIGN
from tests.models.native import NATIVE
from tests.models.paged import PagedHarness, Sequence
from tests.models.parity import prompts

CPU = torch.device("cpu")
FAMILIES = ("llama3", "llama-biases", "mistral", "qwen2", "qwen3", "gpt2", "gpt-neox", "phi")
# Root mean square of the logits' error over that of the logits, the median of all tokens, when
# activations are int8 too. The random weights are large, and a softmax among them makes much of
# little; a router that chooses another expert makes a token's logits others altogether.
ACTIVATION_ERROR = 0.04


def _dequantise(directory: Path, quantization: str) -> None:
    """Puts in place of each weight that is quantised the one that its codes stand for."""
    config = load_config(directory)
    names = config.family.weight_names(config.spec)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for module in decoder_modules(config.spec):
        held = module_quantization(module, config.spec, quantization)
        if held is None:
            continue
        for piece in module_pieces(names, module, "weight"):
            transposed = module.name in names.transposed
            weight = tensors[piece.name].t() if transposed else tensors[piece.name]
            # A row's codes do not depend on the rows beside it, so parts may be taken alone.
            weight = quantise(weight, held).dequantise()
            tensors[piece.name] = (weight.t() if transposed else weight).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture(scope="module", params=QUANTIZATIONS)
def quantization(request):
    return request.param


@pytest.fixture(scope="module", params=[*FAMILIES, "qwen2-moe"])
def saved(request, tmp_path_factory, build, quantization) -> tuple[Path, Callable[[], None]]:
    """A checkpoint, and transformers' model of its dequantised weights."""
    directory = tmp_path_factory.mktemp("checkpoint")
    build(NATIVE[request.param]()).save_pretrained(directory)
    twin = tmp_path_factory.mktemp("dequantised")
    for file in directory.iterdir():
        (twin / file.name).write_bytes(file.read_bytes())
    _dequantise(twin, quantization)
    model = transformers.AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32).eval()
    return directory, model


@pytest.mark.parametrize("backend", ["naive", "cpu"])
def test_logits_are_those_of_the_dequantised_model(saved, quantization, backend):
    directory, model = saved
    decoder = load_model(
        directory,
        dtype=torch.float32,
        device=CPU,
        kernels=streamserve_kernels.load(CPU, backend),
        quantization=quantization,
    )
    sequences = [Sequence(tokens) for tokens in prompts(shared=10)]
    errors = []
    for sequence, ours in zip(sequences, PagedHarness(decoder).prefill(sequences, 5), strict=True):
        with torch.inference_mode():
            expected = model(torch.tensor([sequence.tokens])).logits[0]
        if backend == "naive" or decoder.kernels.slow_quantisation() is not None:
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
        else:
            errors.append((ours - expected).norm(dim=-1) / expected.norm(dim=-1))
    if errors:
        assert torch.cat(errors).median() < ACTIVATION_ERROR


@pytest.mark.parametrize("backend", ["naive", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_plan_counts_what_is_held(saved, quantization, backend, dtype):
    directory, _ = saved
    kernels = streamserve_kernels.load(CPU, backend)
    config = load_config(directory)
    decoder = load_model(
        directory, dtype=dtype, device=CPU, kernels=kernels, quantization=quantization
    )
    planned = config.weight_bytes(dtype, quantization)
    assert decoder.nbytes <= planned
    # The naive twin does not pad outputs to whole tiles: up to 15 rows a weight.
    assert decoder.nbytes >= 0.75 * planned
    tokens = Sequence([1, 2, 3])
    assert PagedHarness(decoder, block_size=16).step([(tokens, 3)]).isfinite().all()


def test_router_norms_and_free_embeddings_stay_as_they_are(tiny_llama, checkpoint):
    spec = load_config(checkpoint(NATIVE["mixtral"]())[0]).spec
    held = {m.name: module_quantization(m, spec, "int4") for m in decoder_modules(spec)}
    assert held == {
        "embedding": None,
        "layers.attention_norm": None,
        "layers.qkv": "int4",
        "layers.output": "int4",
        "layers.mlp_norm": None,
        "layers.router": None,
        "layers.experts.gate_up": "int4",
        "layers.experts.down": "int4",
        "final_norm": None,
        "head": "int8",
    }


@pytest.mark.parametrize("make", [NATIVE["mixtral"], FOREIGN["olmoe"]], ids=["ours", "olmoe"])
def test_a_step_uses_the_experts_that_its_tokens_choose(checkpoint, make):
    """Of 4 experts a token uses 2 and leaves 2 alone, a second one half of these, and so on."""
    made = make()
    config = load_config(checkpoint(made)[0])
    whole = config.weight_bytes(torch.bfloat16)
    idle = [whole - config.weight_bytes(torch.bfloat16, None, count) for count in (1, 2, 3, 40)]
    weights = 3 * made.hidden_size * made.intermediate_size * made.num_hidden_layers
    assert idle == [2 * 2 * weights, 2 * weights, weights, 0]


def test_a_tied_embedding_is_held_once(checkpoint, tiny_llama):
    directory, _ = checkpoint(tiny_llama(tie_word_embeddings=True, vocab_size=2048))
    config = load_config(directory)
    decoder = load_model(
        directory,
        dtype=torch.bfloat16,
        device=CPU,
        kernels=streamserve_kernels.load(CPU),
        quantization="int4",
    )
    # 2,048 rows of 32 inputs, padded to 64: int8 with a scale each, and nothing beside it.
    assert decoder.nbytes < 1.6 * 2048 * (64 + 4)
    assert config.weight_bytes(torch.bfloat16, "int8") < config.weight_bytes(torch.bfloat16)


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.parametrize("model", ["plain", "tied", "experts"])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_recorded_step_computes_what_its_functions_do(
    checkpoint, tiny_llama, quantization, model, num_threads
):
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "tie_word_embeddings": model == "tied"}
    if model == "experts":
        config = NATIVE["mixtral"]()
        config.update(sizes | {"head_dim": 32})
    else:
        config = tiny_llama(**sizes)
    directory, _ = checkpoint(config)
    torch.set_num_threads(num_threads)
    decoder = load_model(
        directory,
        dtype=torch.bfloat16,
        device=CPU,
        kernels=streamserve_kernels.load(CPU, "native"),
        quantization=quantization,
    )
    harness = PagedHarness(decoder, block_size=16)
    generator = torch.Generator().manual_seed(5)
    batches = [
        harness.batch([(Sequence(tokens.tolist()), len(tokens))], all_rows=True)
        for tokens in torch.randint(0, 97, (47,), generator=generator).split([1, 4, 5, 37])
    ]
    with torch.inference_mode():
        by_functions = [decoder.forward(batch, harness.caches).clone() for batch in batches]
        assert decoder.record(harness.caches, max_tokens=64, max_logits=64) > 0
        for batch, expected in zip(batches, by_functions, strict=True):
            logits = decoder.forward(batch, harness.caches).clone()
            # The function by function logits were rounded to bfloat16.
            torch.testing.assert_close(logits, expected, rtol=2**-8, atol=1e-6)
            assert decoder.greedy(batch, harness.caches).equal(logits.argmax(-1))
