"""`--quantization` against what a checkpoint is."""

from __future__ import annotations

import pytest

from streamserve.cli.quantization import (
    QUANTIZATIONS,
    STORED_METHODS,
    agreed_quantization,
    check_quantization,
)
from streamserve.errors import ConfigError
from streamserve.models.quantised.stored import READERS


def test_every_format_that_is_read_has_a_name_for_the_flag():
    assert set(READERS) | {"gguf"} == set(STORED_METHODS)


@pytest.mark.parametrize(
    ("requested", "stored", "agreed"),
    [
        (None, None, None),
        (None, "gptq", None),
        ("gptq_marlin", "gptq", None),
        ("awq_marlin", "awq", None),
        ("compressed_tensors", "compressed-tensors", None),
        ("fp8", "fp8", None),
        ("fp8", None, "fp8"),
        ("int4", None, "int4"),
    ],
)
def test_what_agrees(requested, stored, agreed):
    check_quantization(requested)
    assert agreed_quantization(requested, stored) == agreed


@pytest.mark.parametrize(
    ("requested", "stored", "message"),
    [
        ("int8", "gptq", "--quantization int8: the checkpoint is quantised already, with gptq;"),
        ("awq", "gptq", "the checkpoint is quantised already, with gptq; leave the flag out"),
        ("fp8", "compressed-tensors", "quantised already, with compressed-tensors"),
        ("gptq", None, f"the checkpoint is not quantised.*{', '.join(QUANTIZATIONS)}"),
    ],
)
def test_what_does_not_is_refused_with_what_the_checkpoint_is(requested, stored, message):
    with pytest.raises(ConfigError, match=message):
        agreed_quantization(requested, stored)


def test_a_name_that_nobody_knows():
    with pytest.raises(ConfigError, match=r"or what the checkpoint is .* got 'int3'"):
        check_quantization("int3")
