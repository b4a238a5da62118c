"""Typed reading of a ``quantization_config``; every error names the file, the key and the value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from streamserve.errors import ModelLoadError, UnsupportedModelError


class Options:
    """``where`` and the method's name begin each message."""

    def __init__(self, values: Mapping[str, Any], source: str, method: str) -> None:
        self.values = values
        self._where = f"{source}: {method}"

    def unsupported(self, name: str, value: Any, supported: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self._where}: {name} {value!r} is not supported; these are: {supported}"
        )

    def one_of(self, name: str, allowed: Sequence[int], *aliases: str) -> int:
        for key in (name, *aliases):
            value = self.values.get(key)
            if value is None:
                continue
            if value not in allowed or isinstance(value, bool):
                raise self.unsupported(key, value, ", ".join(map(str, allowed)))
            return int(value)
        raise ModelLoadError(f"{self._where}: {name} is missing")

    def group_size(self, *names: str) -> int:
        """Inputs to a group; -1 for all of them."""
        for name in names:
            value = self.values.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or (value < 1 and value != -1):
                raise ModelLoadError(
                    f"{self._where}: {name} must be -1 or an integer of at least 1, got {value!r}"
                )
            return value
        raise ModelLoadError(f"{self._where}: {names[0]} is missing")

    def text_or(self, default: str, *names: str) -> str:
        """In lower case."""
        for name in names:
            value = self.values.get(name)
            if value is not None:
                return str(value).lower()
        return default

    def flag(self, name: str) -> bool:
        return self.values.get(name) is True
