"""vLLM's other ways to write a flag: ``--max_model_len``, ``--hf-overrides.rope_theta 5e5``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from streamserve.errors import ConfigError


def usual_spelling(argv: Sequence[str]) -> list[str]:
    """``argv`` with dashes in the flags' names, and one JSON object for what was set by dots.

    A key without a value is true. What is no JSON is a string. Raises ``ConfigError`` for a key of
    what has a value.
    """
    objects: dict[str, dict[str, Any]] = {}
    usual: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        flag, *keys = name.split(".")
        flag = flag.replace("_", "-")
        if not word.startswith("--") or not all(keys):
            usual.append(word)
        elif not keys:
            usual.append(flag + equals + value)
        else:
            if not equals:
                value = "true" if not words or words[0].startswith("--") else words.pop(0)
            place = objects.setdefault(flag, {})
            for key in keys[:-1]:
                place = place.setdefault(key, {})
                if not isinstance(place, dict):
                    raise ConfigError(f"{name}: {key} has a value already, got a key of it")
            place[keys[-1]] = _parsed(value)
    return usual + [f"{flag}={json.dumps(value)}" for flag, value in objects.items()]


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
