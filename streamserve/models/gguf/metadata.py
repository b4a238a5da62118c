"""A GGUF file's values by key, read with their types; every error names the file and the key."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamserve.errors import ModelLoadError


@dataclass(frozen=True, slots=True)
class Array:
    """``count`` values at ``start``, of a struct form or texts (None), decoded when asked for."""

    map: mmap.mmap
    start: int
    count: int
    form: str | None

    def values(self) -> list[Any]:
        if self.form is not None:
            return list(struct.unpack_from(f"<{self.count}{self.form}", self.map, self.start))
        texts, at, unpack = [], self.start, struct.Struct("<Q").unpack_from
        for _ in range(self.count):
            length = unpack(self.map, at)[0]
            texts.append(self.map[at + 8 : at + 8 + length].decode())
            at += 8 + length
        return texts


class Metadata:
    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        self.path = path
        self._values = values

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def keys_under(self, prefix: str) -> list[str]:
        return [key for key in self._values if key.startswith(prefix)]

    def value(self, key: str) -> Any:
        """As the file has it; an array is an `Array`."""
        return self._values[key]

    def integer(self, key: str) -> int:
        """Raises ModelLoadError where it is missing."""
        value = self.optional_integer(key)
        if value is None:
            raise ModelLoadError(f"{self.path} lacks {key}, an integer")
        return value

    def integer_or(self, default: int, key: str) -> int:
        value = self.optional_integer(key)
        return default if value is None else value

    def optional_integer(self, key: str) -> int | None:
        """An integer, or the one that an array with a value for each layer repeats."""
        value = self._values.get(key)
        if isinstance(value, Array):
            different = sorted(set(value.values()))
            if len(different) != 1:
                raise ModelLoadError(
                    f"{self.path}: {key} differs from layer to layer ({different}), "
                    "which is not supported"
                )
            value = different[0]
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(key, "an integer", value)
        return value

    def optional_number(self, key: str) -> float | None:
        value = self._values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, "a number", value)
        return value

    def optional_flag(self, key: str) -> bool | None:
        value = self._values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(key, "true or false", value)
        return value

    def optional_text(self, key: str) -> str | None:
        value = self._values.get(key)
        if value is not None and not isinstance(value, str):
            raise self._wrong(key, "a text", value)
        return value

    def text(self, key: str) -> str:
        value = self.optional_text(key)
        if value is None:
            raise ModelLoadError(f"{self.path} lacks {key}, a text")
        return value

    def is_array(self, key: str) -> bool:
        return isinstance(self._values.get(key), Array)

    def texts(self, key: str) -> list[str]:
        """Empty where it is missing."""
        return self._array(key, "an array of texts", lambda form: form is None)

    def numbers(self, key: str) -> list[Any]:
        """Empty where it is missing."""
        return self._array(key, "an array of numbers", lambda form: form is not None)

    def _array(self, key: str, what: str, fits: Any) -> list[Any]:
        value = self._values.get(key)
        if value is None:
            return []
        if not isinstance(value, Array) or (value.count and not fits(value.form)):
            raise self._wrong(key, what, value)
        try:
            return value.values()
        except UnicodeDecodeError as error:
            raise ModelLoadError(f"{self.path}: {key} is no UTF-8: {error}") from error

    def _wrong(self, key: str, what: str, value: Any) -> ModelLoadError:
        shown = "an array" if isinstance(value, Array) else repr(value)
        return ModelLoadError(f"{self.path}: {key} must be {what}, got {shown}")
