"""Models in every quantised format against transformers on the dequantised weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import streamserve_kernels
from streamserve.errors import ModelLoadError
from streamserve.models import load_config, load_model
from streamserve.models.parameters import decoder_modules
from tests.models.native import ENDS
from tests.models.packers import KINDS, edit_config, pack_modules, words
from tests.models.paged import PagedHarness, Sequence

CPU = torch.device("cpu")
# Multiples of 32: a word of 3-bit codes has parts of its neighbours.
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GQA = {**SIZES, "num_key_value_heads": 2}
DELTA = {
    **GQA,
    **ENDS,
    "head_dim": 32,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
# Which packers leave as they are.
PLAIN = ("layers.router", "layers.delta.gates")
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**GQA),
    "qwen2": lambda: transformers.Qwen2Config(**GQA, tie_word_embeddings=True),
    "phi3": lambda: transformers.Phi3Config(**GQA, **ENDS),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_inner=96, n_positions=128, **ENDS
    ),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**SIZES),
    "mixtral": lambda: transformers.MixtralConfig(**GQA, num_local_experts=4),
    "qwen3.5-moe": lambda: transformers.Qwen3_5MoeTextConfig(**DELTA),
    "qwen3-next": lambda: transformers.Qwen3NextConfig(**DELTA, mlp_only_layers=[0]),
}
# Every format on one family, and every family on formats that are read in different ways.
CASES = [("llama", kind) for kind in KINDS] + [
    (family, kind)
    for family in CONFIGS
    if family != "llama"
    for kind in ("gptq-4-act-order", "squeezellm-4", "fp8-block", "bnb-nf4")
]
# Root mean square of the logits' error over that of the logits, the median of all tokens, where
# the products take activations, scales or tables in fewer bits. See docs/quantization.md.
BOUND = 0.04


def quantise(directory: Path, kind: str) -> dict[str, torch.Tensor]:
    """Makes a plain checkpoint one of this kind; returns what its tensors stand for."""
    config = load_config(directory)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    names = config.family.weight_names(config.spec).of_files(tensors)
    dense = {**tensors, **pack_modules(config.spec, names, KINDS[kind], tensors, PLAIN)}
    save_file(tensors, file, metadata={"format": "pt"})
    edit_config(directory, quantization_config=KINDS[kind].config)
    return dense


@pytest.fixture(scope="module")
def make(tmp_path_factory, build) -> Callable[..., tuple[Path, transformers.PreTrainedModel]]:
    """A family and a kind -> a quantised checkpoint, and transformers' model of its weights."""
    made = {}

    def make(family: str, kind: str):
        if (family, kind) not in made:
            directory = tmp_path_factory.mktemp("quantised")
            build(CONFIGS[family]()).save_pretrained(directory)
            twin = tmp_path_factory.mktemp("dequantised")
            (twin / "config.json").write_bytes((directory / "config.json").read_bytes())
            dense = quantise(directory, kind)
            save_file(dense, twin / "model.safetensors", metadata={"format": "pt"})
            model = transformers.AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32)
            made[family, kind] = directory, model.eval()
        return made[family, kind]

    return make


def load(directory: Path, backend: str = "naive", dtype: torch.dtype = torch.float32):
    kernels = streamserve_kernels.load(CPU, backend)
    return load_model(directory, dtype=dtype, device=CPU, kernels=kernels)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(0, 96, (n,), generator=generator).tolist() for n in (21, 1, 18)]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_logits_and_greedy_tokens_are_those_of_the_dequantised_model(make, family, kind):
    directory, model = make(family, kind)
    harness = PagedHarness(load(directory))
    sequences = [Sequence(tokens) for tokens in prompts()]
    prefilled = harness.prefill(sequences, 5)
    decoded = harness.decode(sequences, torch.stack([logits[-1] for logits in prefilled]), 8)
    for index, sequence in enumerate(sequences):
        with torch.inference_mode():
            expected = model(torch.tensor([sequence.tokens])).logits[0, :-1]
        ours = torch.cat((prefilled[index], decoded[index, 1:]))
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
        assert sequence.tokens[-8:] == expected[-8:].argmax(-1).tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_default_kernels_stay_within_their_bound(make, kind, dtype):
    directory, model = make("llama", kind)
    decoder = load(directory, "cpu", dtype)
    tokens = prompts()[0]
    ours = PagedHarness(decoder, block_size=16).prefill([Sequence(tokens)], None)[0]
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0]
    errors = (ours - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.median() < BOUND


@pytest.mark.parametrize("backend", ["naive", "cpu"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_stay_packed_and_their_bytes_are_planned(make, kind, backend):
    directory, _ = make("llama", kind)
    config = load_config(directory)
    planned = config.weight_bytes(torch.float32)
    held = load(directory, backend).nbytes
    plain = sum(module.numel * 4 for module in decoder_modules(config.spec))
    assert held <= planned
    if not kind.startswith("squeezellm"):  # whose compiled steps are longer than these rows
        assert planned < 0.75 * plain
        # The naive twin does not pad outputs to whole tiles.
        assert held >= 0.5 * planned


def edit_tensors(directory: Path, target: Path, edit) -> None:
    """A copy of a checkpoint whose tensors were changed."""
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    (target / "config.json").write_bytes((directory / "config.json").read_bytes())
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def logits_of(decoder) -> torch.Tensor:
    return PagedHarness(decoder).prefill([Sequence(prompts()[0])], None)[0]


def test_a_part_that_is_plain_among_quantised_ones_makes_the_matrix_plain(make, tmp_path):
    directory, model = make("llama", "awq")
    name = "model.layers.0.self_attn.k_proj"

    def unpack(tensors):
        for key in ("qweight", "qzeros", "scales"):
            del tensors[f"{name}.{key}"]
        tensors[name + ".weight"] = model.get_parameter(name + ".weight").detach().clone()

    edit_tensors(directory, tmp_path, unpack)
    assert logits_of(load(tmp_path)).allclose(logits_of(load(directory)), rtol=1e-4, atol=1e-4)
    assert load_config(tmp_path).weight_bytes(torch.float32) > load_config(directory).weight_bytes(
        torch.float32
    )


def test_a_bias_of_zeros_that_no_layer_has_is_passed_over(make, tmp_path):
    directory, _ = make("llama", "gptq-4-act-order")
    name = "model.layers.1.mlp.up_proj.bias"
    edit_tensors(directory, tmp_path, lambda t: t.update({name: torch.zeros(96)}))
    assert logits_of(load(tmp_path)).equal(logits_of(load(directory)))
    edit_tensors(directory, tmp_path, lambda t: t.update({name: torch.ones(96)}))
    with pytest.raises(ModelLoadError, match=f"tensor {re.escape(name)} is not all zeros"):
        load(tmp_path)


DAMAGES = {
    "missing": (lambda t, name: t.pop(name), "the checkpoint does not fit the config: it lacks 1"),
    "misshapen": (lambda t, name: t.update({name: t[name][1:].clone()}), "has shape"),
    "of a wrong type": (lambda t, name: t.update({name: t[name].double()}), "has dtype"),
}


@pytest.mark.parametrize(
    ("kind", "leaf"), [("gptq-4-act-order", "scales"), ("fp8-block", "weight_scale_inv")]
)
def test_a_damaged_tensor_is_named_with_its_file(make, tmp_path, kind, leaf):
    directory, _ = make("llama", kind)
    name = f"model.layers.0.self_attn.q_proj.{leaf}"
    file = tmp_path / "model.safetensors"
    for damage, (edit, message) in DAMAGES.items():
        edit_tensors(directory, tmp_path, lambda t, edit=edit: edit(t, name))
        load_config(tmp_path).weight_bytes(torch.float32)
        with pytest.raises(ModelLoadError) as error:
            load(tmp_path)
        said = str(error.value)
        assert name in said
        assert message in said
        assert said.startswith(f"{tmp_path if damage == 'missing' else file}: ")
    whole = (directory / "model.safetensors").read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ModelLoadError, match=rf"^{file}: tensor \S+ lies outside the file"):
        load(tmp_path)


def test_parts_of_one_matrix_may_have_orders_of_their_own(make, tmp_path):
    directory, model = make("llama", "gptq-4-act-order")
    name = "model.layers.0.self_attn.q_proj."

    def shuffle(tensors):
        # The last inputs of the weight first, with their groups and codes.
        tensors[name + "g_idx"] = tensors[name + "g_idx"].flip(0)
        codes = tensors[name + "qweight"].t().contiguous().view(torch.uint8)
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(1).flip(1)
        tensors[name + "qweight"] = words(codes.int(), 4).t().contiguous()

    edit_tensors(directory, tmp_path, shuffle)
    weight = model.get_parameter(name + "weight")
    before = weight.detach().clone()
    with torch.inference_mode():
        weight.copy_(before.flip(1))
        expected = model(torch.tensor([prompts()[0]])).logits[0]
        weight.copy_(before)
    decoder = load(tmp_path)
    torch.testing.assert_close(logits_of(decoder), expected, rtol=1e-4, atol=1e-4)
    assert decoder.nbytes <= load_config(tmp_path).weight_bytes(torch.float32)


def test_a_quantised_checkpoint_is_not_quantised_again(make):
    directory, _ = make("llama", "awq")
    kernels = streamserve_kernels.load(CPU, "naive")
    with pytest.raises(ModelLoadError, match="is quantised with awq, not on the fly"):
        load_model(directory, dtype=torch.float32, device=CPU, kernels=kernels, quantization="int8")


@pytest.mark.parametrize(
    ("file", "values", "kind"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 16}, "gptq-4-act-order"),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 16, "version": "GEMM"}, "awq"),
        ("quant_config.json", {"wbits": 3}, "squeezellm-3"),
    ],
)
def test_a_packers_own_file_says_what_an_old_config_does_not(make, tmp_path, file, values, kind):
    directory, _ = make("llama", kind)
    edit_tensors(directory, tmp_path, lambda tensors: None)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / file).write_text(json.dumps(values))
    assert logits_of(load(tmp_path)).equal(logits_of(load(directory)))


def test_dummy_weights_are_plain(make):
    directory, _ = make("llama", "awq")
    kernels = streamserve_kernels.load(CPU, "naive")
    with pytest.raises(ModelLoadError, match=r"dummy weights are plain, and .* says awq"):
        load_model(directory, dtype=torch.float32, device=CPU, kernels=kernels, load_format="dummy")
