"""Draft heads that come with a checkpoint (multi-token prediction), judged by plain torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import streamserve_kernels
from streamserve.errors import ModelLoadError, UnsupportedModelError
from streamserve.models import Decoder, MtpConfig, find_mtp, load_config, load_model, load_mtp_head
from streamserve.models.mtp import MtpHead
from streamserve_kernels import QuantLinear
from streamserve_kernels.native.library import why_not
from tests.models.guesses import Guesses, check, check_recorded, judge_states
from tests.models.mtp_judge import MtpJudge, save_with_head
from tests.models.native import DELTA, HYBRID
from tests.models.packers import KINDS, edit_config, pack_modules
from tests.models.paged import PagedHarness, Sequence

CPU = torch.device("cpu")
# A case of HYBRID, whether its head keeps each expert by itself, and what its config says.
CASES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "qwen3.5": ("qwen3.5", False, {"mtp_num_hidden_layers": 1}),
    "qwen3.5-moe": ("qwen3.5-moe", False, {"mtp_num_hidden_layers": 1}),
    "qwen3.5-moe-apart": ("qwen3.5-moe", True, {"mtp_num_hidden_layers": 1}),
    "qwen3-next": ("qwen3-next", True, {}),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A case's name -> the judge, and the directory of the checkpoint."""
    made: dict[str, tuple[MtpJudge, Path]] = {}

    def saved(name: str) -> tuple[MtpJudge, Path]:
        if name not in made:
            case, apart, changes = CASES[name]
            directory = tmp_path_factory.mktemp(name)
            config = HYBRID[case]()
            made[name] = save_with_head(config, directory, apart=apart, **changes), directory
        return made[name]

    return saved


def load(
    directory: Path,
    backend: str = "naive",
    dtype: torch.dtype = torch.float32,
    load_format: Any = "auto",
    target_quantization: Any = None,
    **options: Any,
) -> tuple[MtpConfig, Decoder, MtpHead]:
    kernels, config = streamserve_kernels.load(CPU, backend), load_config(directory)
    mtp = find_mtp(directory, config, load_format)
    target = load_model(
        directory,
        dtype=dtype,
        device=CPU,
        kernels=kernels,
        config=config,
        load_format=load_format,
        quantization=target_quantization,
    )
    return mtp, target, load_mtp_head(mtp, target, **options)


@pytest.mark.parametrize("backend", ["naive", "cpu"])
@pytest.mark.parametrize("name", CASES)
def test_states_and_guesses_are_the_judges(name, backend, saved):
    judge, directory = saved(name)
    _, _, head = load(directory, backend)
    check(judge, head, chunk=7, tolerance=1e-4)


def test_the_head_of_a_checkpoint_with_other_parts_is_found(saved, tmp_path):
    judge, directory = saved("qwen3.5")
    text = json.loads((directory / "config.json").read_bytes())
    whole = {"architectures": ["Qwen3_5ForConditionalGeneration"], "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    tensors = {
        name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in load_file(directory / "model.safetensors").items()
    }
    tensors["model.visual.merger.norm.weight"] = torch.ones(3)
    save_file(tensors, tmp_path / "model.safetensors")
    check(judge, load(tmp_path)[2], chunk=40, tolerance=1e-4)


def test_the_embedding_and_the_head_are_the_targets(saved):
    for name in ("qwen3.5", "qwen3-next"):  # the first one's are tied
        mtp, target, head = load(saved(name)[1])
        assert head._embedding is target._embedding
        assert head._head is target._head
        assert head.nbytes == mtp.weight_bytes(torch.float32)
        assert head.nbytes < target.nbytes


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.parametrize("name", ["qwen3.5", "qwen3-next"])
def test_recorded_guesses_are_those_of_functions_one_by_one(name, saved):
    judge, directory = saved(name)
    _, _, head = load(directory, "native", torch.bfloat16)
    check_recorded(judge, head)


@pytest.mark.parametrize(("quantization", "bound"), [("int8", 0.02), ("int4", 0.2)])
def test_layers_and_a_copy_of_the_head_are_quantised(quantization, bound, saved):
    judge, directory = saved("qwen3.5-moe")
    mtp, target, head = load(directory, quantization=quantization)
    planned = mtp.weight_bytes(torch.float32, quantization)
    assert 0.9 * planned < head.nbytes <= planned
    assert head._head.quantization == quantization
    assert not isinstance(target._head, QuantLinear)
    sequences, states = judge_states(judge)
    guesses = Guesses(head)
    guesses.feed(sequences, states, 9)
    errors = []
    for sequence, given in zip(sequences, states, strict=True):
        found = torch.stack(guesses.found[id(sequence)])
        with torch.inference_mode():
            expected = judge(sequence.tokens, given)
        errors.append((found - expected).norm(dim=1) / expected.norm(dim=1))
    assert 0 < torch.cat(errors).median() < bound


@pytest.mark.parametrize("name", ["qwen3.5", "qwen3-next"])
def test_a_quantised_head_is_copied_where_the_copy_takes_less(name, saved):
    directory = saved(name)[1]
    for quantization, copied in (("int8", False), ("int4", True)):
        options = {"target_quantization": "int8", "quantization": quantization}
        mtp, target, head = load(directory, **options)
        assert (head._head is target._head) is not copied
        assert head._head.quantization == quantization
        planned = mtp.weight_bytes(torch.float32, quantization, "int8")
        assert 0.9 * planned < head.nbytes <= planned
        rows = target._head.unpack()
        step = rows.abs().max() / 7  # of a code, at most
        assert (head._head.unpack() - rows).abs().max() < step


def test_what_the_last_layer_leaves_is_normed_as_the_target_does(saved):
    _, target, head = load(saved("qwen3.5")[1])
    assert head.taps == (len(target.spec.layers),)
    target.tap(head.taps)
    harness = PagedHarness(target)
    batch = harness.batch([(Sequence([3, 1, 4, 1, 5]), 5)])
    with torch.inference_mode():
        normed, left = target.all_states(batch, harness.caches)
    assert not torch.allclose(left, normed, atol=0.1)
    torch.testing.assert_close(head.take(left), normed)


def test_a_copy_may_be_quantised_alone(saved):
    mtp, _, head = load(saved("qwen3.5")[1], copy="int4")
    assert head._head.quantization == "int4"
    assert not isinstance(head._product, QuantLinear)
    planned = mtp.weight_bytes(torch.float32, copy="int4")
    assert mtp.weight_bytes(torch.float32) < head.nbytes <= planned


WIDE = {**DELTA, "hidden_size": 64, "head_dim": 32, "linear_value_head_dim": 24}


@pytest.mark.parametrize("is_plain", [False, True], ids=["packed", "plain"])
@pytest.mark.parametrize("kind", ["gptq-8", "ct-int4"])
def test_heads_of_quantised_checkpoints_are_packed_or_left_out(kind, is_plain, tmp_path):
    judge = save_with_head(
        transformers.Qwen3_5TextConfig(**WIDE), tmp_path, mtp_num_hidden_layers=1
    )
    config, file = load_config(tmp_path), tmp_path / "model.safetensors"
    tensors = load_file(file)
    mtp = find_mtp(tmp_path, config)
    names = config.family.weight_names(config.spec)
    pack_modules(config.spec, names, KINDS[kind], tensors, ("layers.delta.gates",))
    if not is_plain:
        dense = pack_modules(mtp.spec, mtp.names, KINDS[kind], tensors)
        held = {name.removeprefix("mtp."): weight for name, weight in dense.items()}
        judge.load_state_dict({**judge.state_dict(), **held})
    save_file(tensors, file)
    edit_config(tmp_path, quantization_config=KINDS[kind].config)
    mtp, _, head = load(tmp_path)
    assert isinstance(head._product, QuantLinear) is not is_plain
    assert head.nbytes <= mtp.weight_bytes(torch.float32)
    check(judge, head, chunk=9, tolerance=1e-4)
    # The target's head is plain: a copy may be made of it.
    mtp, _, head = load(tmp_path, quantization="int8")
    assert isinstance(head._product, QuantLinear)
    assert head._head.quantization == "int8"
    assert head.nbytes <= mtp.weight_bytes(torch.float32, "int8")


@pytest.mark.parametrize("name", CASES)
def test_dummy_weights_need_a_config_alone(name, saved, tmp_path):
    (tmp_path / "config.json").write_bytes((saved(name)[1] / "config.json").read_bytes())
    mtp, _, head = load(tmp_path, load_format="dummy")
    assert 0.9 * mtp.weight_bytes(torch.float32) < head.nbytes <= mtp.weight_bytes(torch.float32)
    sequences, states = judge_states(saved(name)[0])
    guesses = Guesses(head)
    guesses.feed(sequences, states, 9)
    found = torch.stack([state for s in sequences for state in guesses.found[id(s)]])
    assert found.isfinite().all()
    assert found.std(0).min() > 0


def test_a_model_without_such_layers_is_refused(checkpoint, tiny_llama):
    directory, _ = checkpoint(tiny_llama())
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM has no layers that guess"):
        find_mtp(directory, load_config(directory))


def test_a_checkpoint_that_was_saved_again_has_none(saved, tmp_path):
    _, directory = saved("qwen3.5")
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    tensors = load_file(directory / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("mtp.")}
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"has no layers that guess further tokens \(mtp\);"):
        find_mtp(tmp_path, load_config(tmp_path))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mtp_use_dedicated_embeddings": True}, "mtp_use_dedicated_embeddings is not supported"),
        ({"mtp_num_hidden_layers": 0}, "has no layers that guess further tokens (mtp)"),
    ],
)
def test_configs_of_other_heads_are_refused(values, message, saved, tmp_path):
    for file in saved("qwen3.5")[1].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edit_config(tmp_path, **values)
    with pytest.raises((ModelLoadError, UnsupportedModelError), match=re.escape(message)):
        find_mtp(tmp_path, load_config(tmp_path))


def test_more_than_one_layer_is_refused(saved, tmp_path):
    file = saved("qwen3-next")[1] / "model.safetensors"
    (tmp_path / "config.json").write_bytes((file.parent / "config.json").read_bytes())
    tensors = load_file(file)
    tensors["mtp.layers.1.input_layernorm.weight"] = torch.ones(32)
    save_file(tensors, tmp_path / file.name)
    with pytest.raises(UnsupportedModelError, match=r"2 layers that guess .* are not supported; 1"):
        find_mtp(tmp_path, load_config(tmp_path))


def test_a_tensor_that_is_missing_is_named(saved, tmp_path):
    file = saved("qwen3.5")[1] / "model.safetensors"
    (tmp_path / "config.json").write_bytes((file.parent / "config.json").read_bytes())
    tensors = load_file(file)
    del tensors["mtp.pre_fc_norm_hidden.weight"]
    save_file(tensors, tmp_path / file.name)
    with pytest.raises(ModelLoadError, match=r"it lacks 1 tensor: mtp\.pre_fc_norm_hidden\.weight"):
        load(tmp_path)
