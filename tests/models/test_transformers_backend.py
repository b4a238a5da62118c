"""Models that only transformers has: kinds of weights and kernels, and refusals with a reason.

That each family is right is in tests/runner/test_families.py.
"""

from __future__ import annotations

import copy
import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import streamserve_kernels
from streamserve.errors import ModelLoadError, UnsupportedModelError
from streamserve.models import Decoder, LanguageModel, load_config, load_model
from streamserve.models.transformers_backend.modules import PackedExperts
from streamserve_kernels import Kernels
from tests.models.foreign import BASE, FOREIGN, GQA
from tests.models.paged import PagedHarness, Sequence
from tests.models.parity import assert_equals_judge, prompts

CPU = torch.device("cpu")


def load(directory: Path, kernels: Kernels, **options) -> LanguageModel:
    config = load_config(directory, model_impl="transformers")
    options = {"dtype": torch.float32, "device": CPU, "kernels": kernels, **options}
    return load_model(directory, config=config, **options)


@pytest.mark.parametrize("name", ["llama", "granite-moe", "exaone4"])
def test_native_and_transformers_agree(checkpoint, kernels, tiny_llama, name):
    """Through another backend of kernels too, which is the one that serves float32."""
    directory, _ = checkpoint(FOREIGN[name]())
    decoders = [load(directory, kernels), load(directory, streamserve_kernels.load(CPU, "cpu"))]
    native = load_model(directory, dtype=torch.float32, device=CPU, kernels=kernels)
    assert isinstance(native, Decoder)
    decoders.append(native)
    first, *others = (
        PagedHarness(decoder, block_size=16, cascade=True).prefill(
            [Sequence(tokens) for tokens in prompts(shared=10)], 7
        )
        for decoder in decoders
    )
    for other in others:
        for ours, theirs in zip(first, other, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["granite-swa", "granite-moe", "vaultgemma"])
def test_bfloat16_runs_on_the_kernels_that_a_server_would_choose(checkpoint, name):
    """About as far from float32 as transformers' own bfloat16 is."""
    config = FOREIGN[name]()
    config.head_dim = 16
    directory, model = checkpoint(config)
    spec = load_config(directory, model_impl="transformers").spec
    kernels = streamserve_kernels.load(CPU, dtype=torch.bfloat16, head_sizes=spec.head_sizes())
    decoder = load(directory, kernels, dtype=torch.bfloat16)
    sequences = [Sequence(tokens) for tokens in prompts(shared=10)]
    logits = PagedHarness(decoder, block_size=16).prefill(sequences, 7)
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    errors, usual = torch.zeros(()), torch.zeros(())
    for sequence, ours in zip(sequences, logits, strict=True):
        with torch.inference_mode():
            expected, theirs = (
                m(torch.tensor([sequence.tokens])).logits[0].float() for m in (model, narrow)
            )
        errors += (ours - expected).square().sum()
        usual += (theirs - expected).square().sum()
    assert errors < 2 * usual


EXPERTS = {
    "gated": lambda: _experts_of("olmoe", hidden_act="gelu"),
    # Transposed, with biases; gates and values of its own activation take turns.
    "gpt-oss": lambda: _experts_of("gpt_oss", num_local_experts=5),
    "not-gated": lambda: _experts_of(
        "nemotron_h", n_routed_experts=5, moe_intermediate_size=24, moe_latent_size=None
    ),
}


def _experts_of(model_type: str, **options) -> torch.nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_experts": 5}
    config = transformers.AutoConfig.for_model(model_type, **sizes, **options)
    config._experts_implementation = "eager"
    library = import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    (kind,) = (value for name, value in vars(library).items() if name.endswith("Experts"))
    experts = kind(config)
    random = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.data.normal_(std=0.3, generator=random)
    return experts.requires_grad_(False)


@pytest.mark.parametrize("backend", ["naive", "cpu", "triton"])
@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("tokens", [1, 30])
def test_experts_are_transformers(name, backend, tokens):
    if backend == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("the interpreter is not used beside a GPU")
    experts = EXPERTS[name]()
    random = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, 32, generator=random)
    weights, chosen = torch.rand(tokens, 5, generator=random).topk(3)
    expected = experts(x, chosen, weights)
    ours = PackedExperts(experts, streamserve_kernels.load(CPU, backend), None)
    torch.testing.assert_close(ours(x, chosen, weights), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "granite", "olmoe", "cohere", "stablelm"])
def test_quantised_weights_are_the_layers_own(checkpoint, kernels, name, quantization):
    """The same logits as transformers' model whose weights are what the codes stand for."""
    directory, model = checkpoint(FOREIGN[name]())
    decoder = load(directory, kernels, quantization=quantization)
    spec = decoder.spec
    for linear in spec.linears:
        held = spec.quantization_of(linear, quantization)
        if held is None:
            continue
        path, _, leaf = linear.path.rpartition(".")
        module = model.get_submodule(path if linear.copies > 1 else linear.path)
        weight = getattr(module, leaf) if linear.copies > 1 else module.weight
        rows = weight.data.view(-1, linear.inputs)
        for start in range(0, rows.shape[0], linear.outputs):
            part = rows[start : start + linear.outputs]
            part.copy_(kernels.prepare_quantised(part.clone(), None, held).unpack())
    assert decoder.nbytes <= spec.weight_bytes(torch.float32, quantization)
    assert_equals_judge(model, decoder, chunk=5, prefix_hit=True)


def test_random_weights_are_the_same_for_the_same_seed(checkpoint, kernels):
    directory, _ = checkpoint(FOREIGN["cohere2"]())
    (directory / "model.safetensors").unlink()

    def logits(seed: int) -> torch.Tensor:
        decoder = load(directory, kernels, load_format="dummy", seed=seed)
        return PagedHarness(decoder).prefill([Sequence([3, 4, 5])], None)[0]

    state = torch.get_rng_state()
    assert torch.equal(logits(1), logits(1))
    assert not torch.equal(logits(1), logits(2))
    assert torch.equal(state, torch.get_rng_state())


def test_frequencies_that_grow_with_a_text_are_fixed_for_the_longest(checkpoint, kernels):
    """A short text beside a long one reads as it does alone: as ``max_model_len`` has it."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0]}
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, **factors}
    directory, model = checkpoint(
        transformers.Phi3Config(**GQA, original_max_position_embeddings=32, rope_parameters=rope)
    )
    long = list(range(3, 43))
    expected = model(torch.tensor([long])).logits[0]
    decoder = load(directory, kernels)
    logits = PagedHarness(decoder).prefill([Sequence(long), Sequence(long[:9])], None)
    torch.testing.assert_close(logits[0], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[1], expected[:9], rtol=1e-4, atol=1e-4)
    short = load(directory, kernels, max_model_len=32)
    expected = model(torch.tensor([long[:9]])).logits[0]
    logits = PagedHarness(short).prefill([Sequence(long[:9])], None)
    torch.testing.assert_close(logits[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("missing", lambda t: t.pop("model.norm.weight"), "it lacks 1 tensor: model.norm.weight"),
        (
            "surplus",
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}),
            "no use for 1 tensor: model.layers.0.self_attn.q_proj.bias",
        ),
        (
            "shape",
            lambda t: t.update({"model.norm.weight": torch.zeros(33)}),
            "of another shape it has 1 tensor: model.norm.weight",
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_the_tensors_name(
    checkpoint, kernels, name, change, message
):
    directory, _ = checkpoint(FOREIGN["granite"]())
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=message):
        load(directory, kernels)


def test_no_weights_are_refused_by_what_was_looked_for(checkpoint, kernels):
    directory, _ = checkpoint(FOREIGN["granite"]())
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"looked for \*\.safetensors or"):
        load(directory, kernels)


MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "attn_layer_indices": [1]}
REFUSED = {
    "state-spaces": (lambda: transformers.BambaConfig(**GQA, **MAMBA), "keep a state"),
    "linear-attention": (
        lambda: transformers.Qwen3NextConfig(
            **{**GQA, "num_hidden_layers": 4}, head_dim=8, num_experts=4
        ),
        "keep a state",
    ),
    "convolutions": (
        lambda: transformers.Lfm2Config(**GQA, layer_types=["conv", "full_attention", "conv"]),
        "'conv' keep a state",
    ),
    "encoder-decoder": (transformers.BartConfig, "an encoder with a decoder"),
    "encoder": (lambda: transformers.BertConfig(**BASE), "neither causal nor a window"),
    "alibi": (lambda: transformers.BloomConfig(vocab_size=97), "attention interface"),
    "pictures": (transformers.Gemma3Config, r"more than text \(vision_config\)"),
    "two-attentions": (
        lambda: transformers.DiffLlamaConfig(**GQA, head_dim=8),
        "attends more than once",
    ),
    "chunked-attention": (
        lambda: transformers.Llama4TextConfig(**GQA, head_dim=8, attention_chunk_size=8),
        "other than through transformers' attention interface|neither causal nor a window",
    ),
    "its-own-mask": (lambda: transformers.DogeConfig(**GQA), "see earlier ones other than"),
    "no-language-model": (transformers.ViTConfig, "no causal language model"),
    "another-head": (
        lambda: transformers.GraniteConfig(
            **GQA, architectures=["GraniteForSequenceClassification"]
        ),
        "is not its causal language model",
    ),
    "quantised": (
        lambda: transformers.GraniteConfig(**GQA, quantization_config={"quant_method": "awq"}),
        "quantised",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused_with_the_reason(tmp_path, name):
    build, reason = REFUSED[name]
    config = build()
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=reason):
        load_config(tmp_path, model_impl="transformers")


def test_auto_prefers_our_own_families_and_says_why_neither_will_do(tmp_path):
    transformers.LlamaConfig(**GQA, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    assert hasattr(load_config(tmp_path), "family")
    foreign = transformers.PersimmonConfig(**BASE, architectures=["PersimmonForCausalLM"])
    foreign.save_pretrained(tmp_path)
    assert load_config(tmp_path).architecture == "PersimmonForCausalLM"
    with pytest.raises(UnsupportedModelError, match="PersimmonForCausalLM is not supported"):
        load_config(tmp_path, model_impl="native")
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": ["NobodyForCausalLM"], "model_type": "nobody"})
    )
    with pytest.raises(
        UnsupportedModelError, match=r"NobodyForCausalLM .*LlamaForCausalLM.*cannot"
    ):
        load_config(tmp_path)


OWN_CODE = '''
import torch
from transformers import LlamaForCausalLM


class {name}(LlamaForCausalLM):
    """Doubles its logits."""

    def forward(self, *args, **options):
        output = super().forward(*args, **options)
        output.logits = 2 * output.logits
        return output
'''


def test_code_of_the_checkpoint_runs_only_where_it_is_trusted(
    checkpoint, kernels, tiny_llama, tmp_path, monkeypatch
):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    directory, model = checkpoint(tiny_llama())
    values = json.loads((directory / "config.json").read_text())
    values |= {
        "architectures": ["DoubledForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_doubled.DoubledForCausalLM"},
    }
    (directory / "config.json").write_text(json.dumps(values))
    (directory / "modeling_doubled.py").write_text(OWN_CODE.format(name="DoubledForCausalLM"))
    with pytest.raises(UnsupportedModelError, match="DoubledForCausalLM"):
        load_config(directory)
    config = load_config(directory, trust_remote_code=True)
    decoder = load_model(directory, dtype=torch.float32, device=CPU, kernels=kernels, config=config)
    logits = PagedHarness(decoder).prefill([Sequence([3, 4, 5])], None)[0]
    with torch.inference_mode():
        expected = 2 * model(torch.tensor([[3, 4, 5]])).logits[0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
