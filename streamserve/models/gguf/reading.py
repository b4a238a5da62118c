"""A GGUF file's metadata, read by names that leave the architecture out."""

from __future__ import annotations

import re
import struct

from streamserve.errors import ModelLoadError, UnsupportedModelError
from streamserve.models.gguf.container import GgufFile
from streamserve.models.gguf.kinds import kind_of

_LAYER = re.compile(r"blk\.(\d+)\.")


class Reading:
    """A file's values by their names behind the architecture's."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.name = file.metadata.text("general.architecture")

    def __contains__(self, key: str) -> bool:
        return f"{self.name}.{key}" in self.file.metadata

    def has_tensor(self, name: str) -> bool:
        return name in self.file.tensors

    def key(self, key: str) -> str:
        return f"{self.name}.{key}"

    def integer(self, key: str) -> int:
        return self.file.metadata.integer(self.key(key))

    def count(self, key: str) -> int:
        """Raises ModelLoadError for less than one."""
        value = self.integer(key)
        if value < 1:
            raise ModelLoadError(
                f"{self.file.path}: {self.key(key)} must be at least 1, got {value}"
            )
        return value

    def integer_or(self, default: int, key: str) -> int:
        return self.file.metadata.integer_or(default, self.key(key))

    def optional_integer(self, key: str) -> int | None:
        return self.file.metadata.optional_integer(self.key(key))

    def number_or(self, default: float, key: str) -> float:
        value = self.file.metadata.optional_number(self.key(key))
        return default if value is None else value

    def optional_number(self, key: str) -> float | None:
        return self.file.metadata.optional_number(self.key(key))

    def floats(self, name: str) -> list[float]:
        """A small float32 tensor's values."""
        entry = self.file.tensors.get(name)
        if entry is None or len(entry.shape) != 1 or kind_of(entry.kind).name != "F32":
            raise ModelLoadError(f"{self.file.path}: tensor {name} must be a row of F32")
        size = entry.shape[0] * 4
        if entry.start + size > len(entry.file.map):
            raise ModelLoadError(f"{entry.file.path}: tensor {name} lies outside the file")
        return list(struct.unpack_from(f"<{entry.shape[0]}f", entry.file.map, entry.start))

    @property
    def num_layers(self) -> int:
        """Those that the decoder has, without the last ones, which guess further tokens."""
        return self.integer("block_count") - self.integer_or(0, "nextn_predict_layers")

    def is_of_guess(self, name: str) -> bool:
        """Whether a tensor belongs to a layer that guesses further tokens."""
        layer = _LAYER.match(name)
        return layer is not None and self.num_layers <= int(layer[1]) < self.integer("block_count")

    @property
    def num_kv_heads(self) -> int | None:
        return self.optional_integer("attention.head_count_kv")

    @property
    def head_size(self) -> int:
        size = self.optional_integer("attention.key_length")
        if size is None:
            size = self.integer("embedding_length") // self.integer("attention.head_count")
        if self.integer_or(size, "attention.value_length") != size:
            raise UnsupportedModelError(
                f"{self.file.path}: {self.key('attention.value_length')} must be {size}, as keys "
                "are long; others are not supported for this architecture"
            )
        return size
