"""Heads that draft from hidden states: the same answers, or a refusal that says why."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from streamserve import LLM
from streamserve.errors import ConfigError, ModelLoadError, UnsupportedModelError
from tests.llm.conftest import SIZES, VOCAB_SIZE
from tests.llm.test_hybrid import CONFIG, GREEDY, PROMPT, SMALL
from tools.make_checkpoint import make_tokenizer

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES}
EAGLE = {
    **LLAMA,
    "architectures": ["LlamaForCausalLMEagle3"],
    "num_hidden_layers": 1,
    "draft_vocab_size": 512,
    "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1]},
}
PROMPTS = [PROMPT, "Spain Spain", PROMPT + " or Rome's"]
PARAMS = replace(GREEDY, max_tokens=24)
DUMMY = {**SMALL, "load_format": "dummy"}


def write_config(directory: Path, config: dict) -> str:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    make_tokenizer(VOCAB_SIZE).save(str(directory / "tokenizer.json"))
    return str(directory)


def answers(directory: str, **flags) -> tuple[list[list[int]], int]:
    """And how many tokens were drafted: all that may be."""
    with LLM(directory, **DUMMY, **flags) as llm:
        speculator = llm._service.engine._scheduler._speculator
        if speculator is not None:
            speculator._model = None
        outputs = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS)]
        return outputs, llm._service.engine.stats().speculation.num_draft_tokens


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_answers_with_the_checkpoints_own_head_are_those_without_it(tmp_path, quantization):
    directory = write_config(tmp_path, CONFIG)
    expected, _ = answers(directory)
    given = {"method": "mtp", "quantization": quantization}
    found, num_drafted = answers(directory, speculative_config=given)
    assert found == expected
    assert num_drafted > 24


def test_answers_with_an_eagle_head_are_those_without_it(tmp_path):
    directory = write_config(tmp_path / "target", LLAMA)
    expected, _ = answers(directory)
    given = {"method": "eagle3", "model": write_config(tmp_path / "head", EAGLE)}
    found, num_drafted = answers(directory, speculative_config=given)
    assert found == expected
    assert num_drafted > 24


@pytest.mark.parametrize(
    ("config", "given", "flags", "error", "message"),
    [
        (
            LLAMA,
            {"method": "mtp"},
            {},
            UnsupportedModelError,
            "LlamaForCausalLM has no layers",
        ),
        (
            {**CONFIG, "mtp_num_hidden_layers": 0},
            {"method": "mtp"},
            {},
            ModelLoadError,
            "the checkpoint has no layers that guess",
        ),
        (
            CONFIG,
            {"method": "mtp"},
            {"tensor_parallel_size": 2},
            ConfigError,
            "tensor_parallel_size must not",
        ),
        (
            LLAMA,
            {"method": "eagle3", "model": EAGLE},
            {"tensor_parallel_size": 2},
            ConfigError,
            "'eagle3' is for one device, got tensor_parallel_size 2",
        ),
        (
            LLAMA,
            {"method": "eagle3", "model": {**EAGLE, "hidden_size": 32, "head_dim": 16}},
            {},
            UnsupportedModelError,
            "this head is for a model with hidden states of 32 elements, not 64",
        ),
        (
            LLAMA,
            {"method": "eagle3", "model": LLAMA},
            {},
            UnsupportedModelError,
            "LlamaForCausalLM",
        ),
        (LLAMA, {"model": EAGLE, "num_speculative_tokens": 2}, {}, ConfigError, "must be 'eagle3'"),
    ],
)
def test_heads_that_cannot_draft_are_refused(config, given, flags, error, message, tmp_path):
    if "model" in given:
        given = {**given, "model": write_config(tmp_path / "head", given["model"])}
    with pytest.raises(error, match=message):
        LLM(
            write_config(tmp_path / "target", config),
            **DUMMY,
            **flags,
            speculative_config=given,
        )
