"""``--speculative-config``: vLLM's keys, those of prompt lookup and of a draft model."""

from __future__ import annotations

import json
from typing import Any

from streamserve.config import SpeculativeConfig
from streamserve.errors import ConfigError

_METHODS = ("ngram", "[ngram]", "draft_model")
_LOOKUP_KEYS = ("prompt_lookup_min", "prompt_lookup_max")
_KEYS = ("method", "num_speculative_tokens", *_LOOKUP_KEYS, "model")
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
    given = {key: item for key, item in value.items() if item is not None}
    for key in given:
        if key not in _KEYS:
            raise ConfigError(f"--speculative-config: the keys are {', '.join(_KEYS)}, got {key!r}")
    method = given.get("method", "draft_model" if "model" in given else None)
    if method not in _METHODS:
        raise ConfigError(
            "--speculative-config: method must be 'ngram' (drafts from the text itself) or "
            f"'draft_model' (by a small model), got {method!r}"
        )
    if "num_speculative_tokens" not in given:
        raise ConfigError(
            f"--speculative-config: num_speculative_tokens must be 1 to {_MAX_TOKENS}, got nothing"
        )
    num_tokens = _number(given, "num_speculative_tokens")
    if method == "draft_model":
        return SpeculativeConfig(
            num_speculative_tokens=num_tokens, method="draft_model", model=_model(given)
        )
    if "model" in given:
        raise ConfigError(
            "--speculative-config: model must not be given with method 'ngram', got "
            f"{given['model']!r}"
        )
    low, high = (_number(given, key) if key in given else None for key in _LOOKUP_KEYS)
    low = low or high or _DEFAULT_LOOKUP
    high = high or low
    if low > high:
        raise ConfigError(
            "--speculative-config: prompt_lookup_min must be at most prompt_lookup_max "
            f"{high}, got {low}"
        )
    return SpeculativeConfig(
        num_speculative_tokens=num_tokens, prompt_lookup_min=low, prompt_lookup_max=high
    )


def _model(given: dict[str, Any]) -> str:
    for key in _LOOKUP_KEYS:
        if key in given:
            raise ConfigError(
                f"--speculative-config: {key} must not be given with method 'draft_model', got "
                f"{given[key]!r}"
            )
    name = given.get("model")
    if not isinstance(name, str) or not name:
        raise ConfigError(
            "--speculative-config: model must be a directory, a GGUF file or a hub id, got "
            f"{name!r}"
        )
    return name


def _number(value: dict[str, Any], key: str) -> int:
    number = value[key]
    if type(number) is not int or not 1 <= number <= _MAX_TOKENS:
        raise ConfigError(f"--speculative-config: {key} must be 1 to {_MAX_TOKENS}, got {number!r}")
    return number
