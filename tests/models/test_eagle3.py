"""EAGLE-3 heads, judged by plain torch: both forms, what some do otherwise, what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import streamserve_kernels
from streamserve.errors import ModelLoadError, UnsupportedModelError
from streamserve.models import (
    Decoder,
    load_eagle3_config,
    load_eagle3_head,
    load_model,
)
from streamserve.models.eagle3 import Eagle3Head
from streamserve_kernels.native.library import why_not
from tests.models.eagle3_judge import LAYER, Eagle3Judge
from tests.models.guesses import check, check_recorded
from tests.models.native import GQA
from tests.models.paged import PagedHarness, Sequence
from tests.models.random_model import random_model

CPU = torch.device("cpu")
REDUCED = {"draft_vocab_size": 50}
SLIDING = {"layer_types": ["sliding_attention"], "sliding_window": 5}
# What the config says of its layers, and what else.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "first": ({}, REDUCED),
    "whole vocabulary, biases": ({"attention_bias": True, "mlp_bias": True}, {}),
    "red hat": ({"rms_norm_eps": 1e-6}, {**REDUCED, "norm_before_residual": True}),
    "gpt-oss": ({}, {**REDUCED, "norm_before_fc": True, "norm_before_residual": True}),
    "eagle 3.1": (SLIDING, {**REDUCED, "fc_norm": True, "norm_output": True}),
    "two layers": ({"num_hidden_layers": 2}, REDUCED),
    "qwen 3's layer": ({"model_type": "qwen3"}, {**REDUCED, "norm_before_residual": True}),
}


@pytest.fixture(scope="module")
def target_directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("target")
    config = transformers.LlamaConfig(**{**GQA, "num_hidden_layers": 5, "head_dim": 16})
    random_model(config).save_pretrained(directory)
    return directory


def load_target(directory: Path, backend: str = "naive", dtype=torch.float32) -> Decoder:
    kernels = streamserve_kernels.load(CPU, backend)
    target = load_model(directory, dtype=dtype, device=CPU, kernels=kernels)
    assert isinstance(target, Decoder)
    return target


@pytest.fixture(scope="module")
def target(target_directory) -> Decoder:
    return load_target(target_directory)


def judge_of(name: str, **options: Any) -> tuple[Eagle3Judge, dict[str, Any]]:
    changes, settings = CASES[name]
    config = {**LAYER, **changes}
    return Eagle3Judge(config, settings, **options), config


def load(directory: Path, target: Decoder, **options: Any) -> Eagle3Head:
    return load_eagle3_head(load_eagle3_config(directory), target, **options)


@pytest.mark.parametrize("name", CASES)
def test_states_and_guesses_are_the_judges(name, target, tmp_path):
    judge, config = judge_of(name)
    judge.save(tmp_path / "plain", config)
    judge.save_as_speculator(tmp_path / "speculator", config)
    for form, chunk in (("plain", 7), ("speculator", 64)):
        head = load(tmp_path / form, target)
        with torch.inference_mode():
            taken = head.take(judge.raw_states[:9])
        torch.testing.assert_close(taken, judge.take(judge.raw_states[:9]), rtol=1e-4, atol=1e-4)
        check(judge, head, chunk=chunk, tolerance=1e-4)


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.parametrize("name", ["first", "red hat", "eagle 3.1"])
def test_recorded_guesses_are_those_of_functions_one_by_one(name, target_directory, tmp_path):
    judge, config = judge_of(name)
    judge.save(tmp_path, config)
    check_recorded(judge, load(tmp_path, load_target(target_directory, "native", torch.bfloat16)))


def test_a_target_of_another_width_is_taken_too(target, tmp_path):
    """The head has an embedding of its own then."""
    judge = Eagle3Judge({**LAYER, "hidden_size": 48}, {**REDUCED, "target_hidden_size": 32})
    judge.save(tmp_path, {**LAYER, "hidden_size": 48})
    check(judge, load(tmp_path, target), chunk=8, tolerance=1e-4)


@pytest.mark.parametrize("form", ["absent", "equal"])
def test_the_embedding_is_the_targets(form, target, target_directory, tmp_path):
    judge, config = judge_of("first")
    tensors = load_file(target_directory / "model.safetensors")
    judge.embed_tokens.weight.data = tensors["model.embed_tokens.weight"]
    judge.save(tmp_path, config)
    if form == "absent":
        edit_tensors(tmp_path, lambda tensors: tensors.pop("embed_tokens.weight"))
    head = load(tmp_path, target)
    assert head._embedding is target._embedding
    held = sum(t.numel() for name, t in judge.tensors().items() if "2" not in name)
    assert head.nbytes == 4 * (held - 97 * 32)
    check(judge, head, chunk=8, tolerance=1e-4)


def test_the_models_head_is_taken_where_there_is_none(target, target_directory, tmp_path):
    judge, config = judge_of("whole vocabulary, biases")
    tensors = load_file(target_directory / "model.safetensors")
    judge.embed_tokens.weight.data = tensors["model.embed_tokens.weight"]
    judge.lm_head.weight.data = tensors["lm_head.weight"]
    judge.save(tmp_path, config)
    edit_tensors(
        tmp_path, lambda tensors: [tensors.pop(f"{n}.weight") for n in ("embed_tokens", "lm_head")]
    )
    check(judge, load(tmp_path, target), chunk=8, tolerance=1e-4)


def test_other_names_and_files_are_read(target, tmp_path):
    """Names that begin with `model.`, a pickled file, and further layers as SGLang calls them."""
    judge, config = judge_of("two layers")
    judge.save(tmp_path, config)
    tensors = {
        "model." + name.replace("layers.1.input_layernorm", "layers.1.hidden_norm"): tensor
        for name, tensor in judge.tensors().items()
    }
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    check(judge, load(tmp_path, target), chunk=8, tolerance=1e-4)


@pytest.mark.parametrize(
    ("values", "taps"),
    [
        ({}, (2, 2, 2)),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": []}}, (2, 2, 2)),
        ({"eagle_aux_hidden_state_layer_ids": [1, 3, 4]}, (1, 3, 4)),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 4]}}, (2, 4, 5)),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 3, 5]}}, (2, 3, 5)),
    ],
)
def test_taps_are_of_what_enters_a_layer(values, taps, target, tmp_path):
    judge, config = judge_of("first")
    judge.save(tmp_path, config, **values)
    assert load_eagle3_config(tmp_path).taps(5) == taps
    assert load(tmp_path, target).taps == taps


@pytest.mark.parametrize("backend", ["naive", "native"])
def test_it_goes_on_from_what_the_target_finds(backend, target_directory, tmp_path):
    """The states of a step of the model, recorded where that can be, are given to its head."""
    if backend == "native" and why_not() is not None:
        pytest.skip(str(why_not()))
    dtype = torch.float32 if backend == "naive" else torch.bfloat16
    target = load_target(target_directory, backend, dtype)
    judge, config = judge_of("first")
    judge.save(tmp_path, config, eagle_aux_hidden_state_layer_ids=[1, 3, 4])
    head = load(tmp_path, target)
    target.tap(head.taps)
    of_target, of_head = (PagedHarness(model, block_size=16) for model in (target, head))
    target.record(of_target.caches, max_tokens=32, max_logits=8)
    tokens = [5, 96, 3, 17, 40, 8, 22, 61, 9]
    with torch.inference_mode():
        batch = of_target.batch([(Sequence(tokens), 9)])
        logits, states = target.forward_with_all_states(batch, of_target.caches)
        sequence = Sequence([*tokens[1:], int(logits.argmax())])
        batch = replace(of_head.batch([(sequence, 9)]), hidden_states=head.take(states))
        guessed, found = head.guess(batch, of_head.caches)
        model = transformers.AutoModelForCausalLM.from_pretrained(target_directory)
        judged = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        taps = torch.cat([judged[tap][0] for tap in (1, 3, 4)], dim=1)
        expected = judge(sequence.tokens, judge.take(taps))[-1:]
    bound = 1e-4 if backend == "naive" else 0.03 * expected.abs().max()
    assert (found.float() - expected).abs().max() < bound
    assert guessed.tolist() == judge.likeliest(expected).tolist()


def test_a_step_that_asks_for_no_guess_feeds_it(target, tmp_path):
    judge, config = judge_of("first")
    judge.save(tmp_path, config)
    head = load(tmp_path, target)
    tokens = [4, 9, 33, 71, 5, 2]
    states = judge.states_of_target(tokens)
    harness = PagedHarness(head)
    sequence = Sequence(tokens)
    for start, end in ((0, 4), (4, 6)):
        batch = replace(
            harness.batch([(sequence, end - start)]), hidden_states=states[start:end].detach()
        )
        with torch.inference_mode():
            guessed, found = head.guess(batch, harness.caches)
        assert guessed.shape == (int(end == 6),)
        assert found.shape == (int(end == 6), 32)
        sequence.num_computed = end
    expected = judge(tokens, states)[-1:]
    assert guessed.tolist() == judge.likeliest(expected).tolist()


@pytest.mark.parametrize(("quantization", "bound"), [("int8", 0.03), ("int4", 0.35)])
def test_linears_are_quantised_as_they_come(quantization, bound, target, tmp_path):
    judge, config = judge_of("first")
    judge.save(tmp_path, config)
    config = load_eagle3_config(tmp_path)
    plain = load_eagle3_head(config, target)
    head = load_eagle3_head(config, target, quantization=quantization)
    assert head.nbytes < plain.nbytes
    assert head.nbytes <= config.weight_bytes(torch.float32, quantization)
    assert plain.nbytes == config.weight_bytes(torch.float32)
    tokens = [4, 9, 33, 71, 5, 2]
    with torch.inference_mode():
        states = head.take(judge.raw_states[torch.tensor(tokens)])
        harness = PagedHarness(head)
        batch = replace(harness.batch([(Sequence(tokens), 6)], all_rows=True), hidden_states=states)
        _, found = head.guess(batch, harness.caches)
        expected = judge(tokens, judge.states_of_target(tokens))
    assert 0 < (found - expected).abs().mean() / expected.abs().mean() < bound


def test_weights_are_drawn_without_tensors(target, tmp_path):
    config = {"architectures": ["LlamaForCausalLMEagle3"], **LAYER, **REDUCED}
    (tmp_path / "config.json").write_text(json.dumps(config))
    config = load_eagle3_config(tmp_path, "dummy")
    heads = [load_eagle3_head(config, target, seed=seed) for seed in (0, 0, 1)]
    first, again, other = (head._weights.outer.linears["head"].unpack() for head in heads)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert heads[0]._embedding is target._embedding


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"], "draft_vocab_size": 97}, None),
        ({"architectures": ["LlamaForCausalLM"]}, "architecture ['LlamaForCausalLM'] is no"),
        ({"architectures": ["MistralForCausalLM"]}, "architecture ['MistralForCausalLM'] is no"),
        ({"speculators_model_type": "dflash"}, "is no EAGLE-3 head that is supported"),
        ({"model_type": "kimi_k2"}, "model_type 'kimi_k2' is not supported for an EAGLE-3 head"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state false is not"),
        ({"eagle_config": 3}, "eagle_config must be an object, got 3"),
        ({"fc_norm": True, "norm_before_fc": True}, "fc_norm and norm_before_fc exclude"),
        ({"eagle_aux_hidden_state_layer_ids": [1, "2"]}, "must list numbers of layers, got [1, '2"),
        ({"speculators_model_type": "eagle3"}, "transformer_layer_config must be an object"),
    ],
)
def test_other_configs_are_refused(values, message, tmp_path):
    judge, config = judge_of("whole vocabulary, biases")
    judge.save(tmp_path, {**config, **values})
    if message is None:
        load_eagle3_config(tmp_path)
        return
    with pytest.raises((ModelLoadError, UnsupportedModelError), match=re.escape(message)):
        load_eagle3_config(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target_hidden_size": 40}, "for a model with hidden states of 40 elements, not 32"),
        ({"vocab_size": 98}, "for a model with a vocabulary of 98 tokens, not 97"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2, 6]}, "with layers [1, 2, 6], not 5 layers"),
    ],
)
def test_other_models_are_refused(values, message, target, tmp_path):
    judge, config = judge_of("first")
    judge.save(tmp_path, config, **values)
    with pytest.raises(UnsupportedModelError, match=re.escape(message)):
        load(tmp_path, target)


def test_a_head_of_another_width_needs_an_embedding(target, tmp_path):
    config = {**LAYER, "hidden_size": 48}
    Eagle3Judge(config, {**REDUCED, "target_hidden_size": 32}).save(tmp_path, config)
    edit_tensors(tmp_path, lambda tensors: tensors.pop("embed_tokens.weight"))
    with pytest.raises(UnsupportedModelError, match="an embedding of 48 elements, having none"):
        load(tmp_path, target)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop("d2t"), "lacks d2t, which tells 50 tokens' places among"),
        (lambda t: t.update(d2t=t["d2t"][1:]), "d2t has shape [49]; the config asks for [50]"),
        (lambda tensors: tensors["d2t"].add_(40), "d2t names tokens"),
        (lambda tensors: tensors.pop("fc.weight"), "it lacks 1 tensor: fc.weight"),
        (lambda tensors: tensors.pop("lm_head.weight"), "it lacks 1 tensor: lm_head.weight"),
    ],
)
def test_damaged_checkpoints_are_refused(edit, message, target, tmp_path):
    judge, config = judge_of("first")
    judge.save(tmp_path, config)
    edit_tensors(tmp_path, edit)
    with pytest.raises(ModelLoadError, match=re.escape(message)):
        load(tmp_path, target)


def test_an_embedding_without_a_head_is_refused(tmp_path):
    judge, config = judge_of("whole vocabulary, biases")
    judge.save(tmp_path, config)
    edit_tensors(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(UnsupportedModelError, match="and without lm_head is not supported"):
        load_eagle3_config(tmp_path)


def edit_tensors(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
