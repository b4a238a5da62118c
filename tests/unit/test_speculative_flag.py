"""``--speculative-config`` is honoured, or refused by key, limit and value."""

import json

import pytest

from streamserve.cli.args import check_flags, parse_args
from streamserve.cli.speculative import speculative_config
from streamserve.config import SpeculativeConfig
from streamserve.errors import ConfigError


def parsed(text: str) -> SpeculativeConfig | None:
    return speculative_config(parse_args(["serve", "--speculative-config", text]))


PLAIN = {"method": "ngram", "num_speculative_tokens": 5}
BY_MODEL = {"method": "draft_model", "model": "small", "num_speculative_tokens": 4}


@pytest.mark.parametrize(
    ("bounds", "low", "high"),
    [
        ({"prompt_lookup_min": 2, "prompt_lookup_max": 4}, 2, 4),
        ({"prompt_lookup_min": 3}, 3, 3),
        ({"prompt_lookup_max": 4}, 4, 4),
        ({}, 5, 5),
        ({"prompt_lookup_max": None}, 5, 5),
    ],
)
@pytest.mark.parametrize("method", ["ngram", "[ngram]"])
def test_vllms_keys_and_defaults(bounds, low, high, method):
    text = json.dumps({**PLAIN, **bounds, "method": method})
    assert parsed(text) == SpeculativeConfig(
        num_speculative_tokens=5, prompt_lookup_min=low, prompt_lookup_max=high
    )


@pytest.mark.parametrize("leave_out", [None, "method"])
def test_a_draft_model(leave_out):
    """As in vLLM, a model says the method."""
    given = {key: value for key, value in BY_MODEL.items() if key != leave_out}
    assert parsed(json.dumps(given)) == SpeculativeConfig(
        num_speculative_tokens=4, method="draft_model", model="small"
    )


@pytest.mark.parametrize("method", ["mtp", "qwen3_next_mtp", "qwen3_5_mtp"])
def test_layers_that_guess(method):
    text = json.dumps({"method": method, "num_speculative_tokens": 2, "quantization": "int4"})
    assert parsed(text) == SpeculativeConfig(
        num_speculative_tokens=2, method="mtp", quantization="int4"
    )
    assert parsed(json.dumps({"method": method})).num_speculative_tokens == 3


def test_a_flag_for_a_key():
    flags = ["--spec-method", "mtp", "--spec-tokens", "2"]
    given = parse_args(["serve", *flags, "--speculative-config", '{"quantization": "int8"}'])
    assert speculative_config(given) == SpeculativeConfig(
        num_speculative_tokens=2, method="mtp", quantization="int8"
    )
    flags = ["--spec-model", "small", "--spec-tokens", "4"]
    assert speculative_config(parse_args(["serve", *flags])) == parsed(json.dumps(BY_MODEL))
    assert speculative_config(parse_args(["serve"])) is None


def test_a_key_is_given_once():
    flags = ["--spec-tokens", "2", "--speculative-config", json.dumps(PLAIN)]
    with pytest.raises(ConfigError, match=r"--spec-tokens must not .* with num_.*, got 2"):
        check_flags(parse_args(["serve", *flags]))


def test_a_draft_head():
    given = {**BY_MODEL, "method": "eagle3", "quantization": "int8"}
    assert parsed(json.dumps(given)) == SpeculativeConfig(
        num_speculative_tokens=4, method="eagle3", model="small", quantization="int8"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON"),
        ("[1]", r"must be a JSON object, got '\[1\]'"),
        (json.dumps({**PLAIN, "method": "eagle"}), "must be 'ngram'.* 'draft_model'.*got 'eagle'"),
        (json.dumps({**PLAIN, "draft_tensor_parallel_size": 1}), "the keys are .*, got 'draft_t"),
        (json.dumps({**BY_MODEL, "model": ""}), "model must be a directory.* got ''"),
        (json.dumps({**BY_MODEL, "model": None}), "model must be a directory.* got None"),
        (json.dumps({**BY_MODEL, "num_speculative_tokens": 0}), "must be 1 to 32, got 0"),
        (json.dumps({**BY_MODEL, "prompt_lookup_max": 3}), "prompt_lookup_max must not .* got 3"),
        (json.dumps({"num_speculative_tokens": 5}), "method must be 'ngram'.*got None"),
        (json.dumps({"method": "ngram"}), "num_speculative_tokens must be 1 to 32, got nothing"),
        (json.dumps({**PLAIN, "num_speculative_tokens": 0}), "must be 1 to 32, got 0"),
        (json.dumps({**PLAIN, "num_speculative_tokens": 33}), "must be 1 to 32, got 33"),
        (json.dumps({**PLAIN, "num_speculative_tokens": True}), "must be 1 to 32, got True"),
        (json.dumps({**PLAIN, "prompt_lookup_min": "2"}), "prompt_lookup_min .* got '2'"),
        (
            json.dumps({**PLAIN, "prompt_lookup_min": 4, "prompt_lookup_max": 2}),
            "prompt_lookup_min must be at most prompt_lookup_max 2, got 4",
        ),
        (json.dumps({**PLAIN, "model": "small"}), "model must not be given .*, got 'small'"),
        (json.dumps({**PLAIN, "quantization": "int4"}), "quantization must not .*, got 'int4'"),
        (json.dumps({"method": "mtp", "model": "small"}), "model must not .* 'mtp', got 'small'"),
        (json.dumps({"method": "eagle3"}), "model must be a directory.* got None"),
        (json.dumps({"method": "mtp", "quantization": "int2"}), "int8, int4, fp8, got 'int2'"),
    ],
)
def test_everything_else_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parsed(text)
    with pytest.raises(ConfigError, match=message):
        check_flags(parse_args(["serve", "--speculative-config", text]))
