"""``--speculative-config``: vLLM's keys, of which those of prompt lookup are honoured."""

from __future__ import annotations

import json
from typing import Any

from streamserve.config import SpeculativeConfig
from streamserve.errors import ConfigError

_METHODS = ("ngram", "[ngram]")
_KEYS = ("method", "num_speculative_tokens", "prompt_lookup_min", "prompt_lookup_max")
_DEFAULT_LOOKUP = 5  # vLLM's, where neither bound is given; where one is, it is both
_MAX_TOKENS = 32


def parse_speculative_config(text: str) -> SpeculativeConfig:
    """Raises ``ConfigError``, which names the key, the limit and the value."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--speculative-config must be JSON ({error}), got {text!r}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"--speculative-config must be a JSON object, got {text!r}")
    for key in value:
        if key not in _KEYS:
            raise ConfigError(
                f"--speculative-config: the keys are {', '.join(_KEYS)} (prompt lookup is the only "
                f"method so far), got {key!r}"
            )
    method = value.get("method")
    if method not in _METHODS:
        raise ConfigError(
            "--speculative-config: method must be 'ngram' (drafts from the text itself, no other "
            f"is built), got {method!r}"
        )
    given = {key: _number(value, key) for key in _KEYS[1:] if value.get(key) is not None}
    if "num_speculative_tokens" not in given:
        raise ConfigError(
            f"--speculative-config: num_speculative_tokens must be 1 to {_MAX_TOKENS}, got nothing"
        )
    low, high = given.get("prompt_lookup_min"), given.get("prompt_lookup_max")
    low = low or high or _DEFAULT_LOOKUP
    high = high or low
    if low > high:
        raise ConfigError(
            "--speculative-config: prompt_lookup_min must be at most prompt_lookup_max "
            f"{high}, got {low}"
        )
    return SpeculativeConfig(
        num_speculative_tokens=given["num_speculative_tokens"],
        prompt_lookup_min=low,
        prompt_lookup_max=high,
    )


def _number(value: dict[str, Any], key: str) -> int:
    number = value[key]
    if type(number) is not int or not 1 <= number <= _MAX_TOKENS:
        raise ConfigError(f"--speculative-config: {key} must be 1 to {_MAX_TOKENS}, got {number!r}")
    return number
