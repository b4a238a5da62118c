"""A ``config.json`` need not say everything: what it leaves out is what transformers takes."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import transformers

from streamserve.errors import ModelLoadError
from streamserve.models.families import FAMILIES, Family
from streamserve.models.hf_config import HfConfig

THEIRS = {
    name: transformers.CONFIG_MAPPING[family.model_type]
    for name, family in FAMILIES.items()
    if family.model_type in transformers.CONFIG_MAPPING
}
# What transformers takes is the stretch of the published models, which say it themselves.
NOT_TAKEN = {("GptOssForCausalLM", "rope_parameters")}


def read(family: Family, values: dict[str, Any]) -> tuple[Any, int]:
    config = HfConfig(values, "config.json")
    return family.spec(config), family.max_positions(config)


@pytest.mark.parametrize("name", THEIRS)
def test_each_value_may_be_left_out(name):
    family, whole = FAMILIES[name], THEIRS[name]().to_dict()
    expected = read(family, whole)
    num_taken = 0
    for left_out in whole:
        rest = {key: value for key, value in whole.items() if key != left_out}
        with suppress(ModelLoadError):  # it is asked for
            assert read(family, rest) == expected or (name, left_out) in NOT_TAKEN, left_out
            num_taken += 1
    assert num_taken > 5
