"""``--speculative-config``: vLLM's keys, of prompt lookup, draft models and draft heads."""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any, get_args

from streamserve.cli.quantization import QUANTIZATIONS, OnTheFly
from streamserve.config import DraftMethod, SpeculativeConfig
from streamserve.errors import ConfigError

_FLAG = "--speculative-config"
_SHORT = {
    "spec_method": "method",
    "spec_model": "model",
    "spec_tokens": "num_speculative_tokens",
}
_METHODS: dict[DraftMethod, str] = {
    "ngram": "drafts from the text itself",
    "draft_model": "by a small model",
    "mtp": "by layers of the model's own that guess further tokens",
    "eagle3": "by an EAGLE-3 head",
}
_ALIASES: dict[str, DraftMethod] = {
    **{method: method for method in get_args(DraftMethod)},
    "[ngram]": "ngram",
    "qwen3_next_mtp": "mtp",
    "qwen3_5_mtp": "mtp",
}
_LOOKUP_KEYS = ("prompt_lookup_min", "prompt_lookup_max")
_KEYS: dict[DraftMethod, tuple[str, ...]] = {
    "ngram": _LOOKUP_KEYS,
    "draft_model": ("model", "quantization"),
    "mtp": ("quantization",),
    "eagle3": ("model", "quantization"),
}
_ALL_KEYS = ("method", "num_speculative_tokens", *_LOOKUP_KEYS, "model", "quantization")
_DEFAULT_LOOKUP = 5  # vLLM's, where neither bound is given; where one is, it is both
_DEFAULT_TOKENS = 3  # of heads, where vLLM takes what they were trained on, one
_MAX_TOKENS = 32


def speculative_config(args: Namespace) -> SpeculativeConfig | None:
    """What the flags ask for: one with all of it, or a flag for a key.

    Raises ``ConfigError``, which names the key, the limit and the value.
    """
    text: str | None = args.speculative_config
    given = {} if text is None else _object(text)
    for name, key in _SHORT.items():
        value = getattr(args, name)
        if value is None:
            continue
        if key in given:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} must not be given beside {_FLAG} with {key}, got {value!r}")
        given[key] = value
    return None if text is None and not given else _parse(given)


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{_FLAG} must be JSON ({error}), got {text!r}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{_FLAG} must be a JSON object, got {text!r}")
    return {key: item for key, item in value.items() if item is not None}


def _parse(given: dict[str, Any]) -> SpeculativeConfig:
    for key in given:
        if key not in _ALL_KEYS:
            raise ConfigError(f"{_FLAG}: the keys are {', '.join(_ALL_KEYS)}, got {key!r}")
    method = _method(given)
    for key in (*_LOOKUP_KEYS, "model", "quantization"):
        if key in given and key not in _KEYS[method]:
            raise ConfigError(
                f"{_FLAG}: {key} must not be given with method {method!r}, got {given[key]!r}"
            )
    low, high = _lookup(given) if method == "ngram" else (1, 1)
    return SpeculativeConfig(
        num_speculative_tokens=_num_tokens(given, method),
        method=method,
        prompt_lookup_min=low,
        prompt_lookup_max=high,
        model=_model(given) if "model" in _KEYS[method] else None,
        quantization=_quantization(given),
    )


def _method(given: dict[str, Any]) -> DraftMethod:
    name = given.get("method", "draft_model" if "model" in given else None)
    if name not in _ALIASES:
        methods = [f"{method!r} ({what})" for method, what in _METHODS.items()]
        raise ConfigError(
            f"{_FLAG}: method must be {', '.join(methods[:-1])} or {methods[-1]}, got {name!r}"
        )
    return _ALIASES[name]


def _num_tokens(given: dict[str, Any], method: DraftMethod) -> int:
    if "num_speculative_tokens" in given:
        return _number(given, "num_speculative_tokens")
    if method in ("mtp", "eagle3"):
        return _DEFAULT_TOKENS
    raise ConfigError(f"{_FLAG}: num_speculative_tokens must be 1 to {_MAX_TOKENS}, got nothing")


def _lookup(given: dict[str, Any]) -> tuple[int, int]:
    low, high = (_number(given, key) if key in given else None for key in _LOOKUP_KEYS)
    low = low or high or _DEFAULT_LOOKUP
    high = high or low
    if low > high:
        raise ConfigError(
            f"{_FLAG}: prompt_lookup_min must be at most prompt_lookup_max {high}, got {low}"
        )
    return low, high


def _model(given: dict[str, Any]) -> str:
    name = given.get("model")
    if not isinstance(name, str) or not name:
        raise ConfigError(
            f"{_FLAG}: model must be a directory, a GGUF file or a hub id, got {name!r}"
        )
    return name


def _quantization(given: dict[str, Any]) -> OnTheFly | None:
    name: OnTheFly | None = given.get("quantization")
    if name is not None and name not in QUANTIZATIONS:
        raise ConfigError(
            f"{_FLAG}: quantization must be one of {', '.join(QUANTIZATIONS)}, got {name!r}"
        )
    return name


def _number(value: dict[str, Any], key: str) -> int:
    number = value[key]
    if type(number) is not int or not 1 <= number <= _MAX_TOKENS:
        raise ConfigError(f"{_FLAG}: {key} must be 1 to {_MAX_TOKENS}, got {number!r}")
    return number
