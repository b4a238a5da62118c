"""A GGUF file's header: the metadata, and where each tensor lies.

    magic  version  tensors  values | key, type, value … | name, extents, kind, offset … | data …

Everything is little-endian; offsets count from the first multiple of ``general.alignment`` after
the header (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). A checkpoint may be split
over files named ``…-00001-of-0000N.gguf``, of which the first carries the metadata.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from streamserve.errors import ModelLoadError, UnsupportedModelError
from streamserve.models.gguf.metadata import Array, Metadata
from streamserve.models.tensor_files import MappedFile

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_MAX_EXTENTS = 4
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS[12] = "d"
_STRING, _ARRAY, _FLOAT32 = 8, 9, 6


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor of ``shape`` (rows first, as torch counts) and ``kind``, a number of ggml's."""

    name: str
    file: MappedFile
    kind: int
    shape: tuple[int, ...]
    start: int


class GgufFile:
    """A checkpoint's metadata and tensors, of one file or of all its parts."""

    def __init__(self, path: Path, metadata: Metadata, tensors: Mapping[str, TensorEntry]) -> None:
        self.path = path
        self.metadata = metadata
        self.tensors = tensors


def find_gguf(path: Path) -> Path | None:
    """The first part of a GGUF checkpoint: ``path`` itself, or the only one in that directory.

    None where there is none. Raises ModelLoadError where there are several to choose from.
    """
    if path.is_file():
        return first_part(path) if path.suffix == ".gguf" or _has_magic(path) else None
    found = sorted({first_part(file) for file in path.glob("*.gguf")})
    # What looks at pictures is a file of its own beside the model.
    found = [file for file in found if not file.name.startswith("mmproj")]
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ModelLoadError(f"{path} holds several GGUF checkpoints: name one of {names}")
    return found[0] if found else None


def _has_magic(path: Path) -> bool:
    """Whether a file of another name is GGUF, as those that Ollama keeps are."""
    with path.open("rb") as file:
        return file.read(4) == _MAGIC


def gguf_file(path: Path) -> Path | None:
    """The GGUF file, or its first part, that ``path`` stands for; None for other checkpoints."""
    return find_gguf(path) if path.is_file() or not (path / "config.json").exists() else None


def first_part(path: Path) -> Path:
    """The file that carries the metadata of the checkpoint that ``path`` is a part of."""
    split = _SPLIT.search(path.name)
    if split is None:
        return path
    return path.with_name(_SPLIT.sub(f"-00001-of-{split[2]}.gguf", path.name))


def open_gguf(path: Path) -> GgufFile:
    """Reads the header of ``path`` and of the parts that belong to it.

    Raises ModelLoadError, naming the file, for one that is missing or damaged.
    """
    try:
        modified = first_part(path).stat().st_mtime_ns
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error}") from error
    return _open(first_part(path).absolute(), modified)


@lru_cache(maxsize=1)
def _open(path: Path, modified: int) -> GgufFile:
    """A start asks for the same header several times: for the config, the text and the weights."""
    metadata, tensors = _read(path)
    count = metadata.integer_or(1, "split.count")
    split = _SPLIT.search(path.name)
    if count > 1 and (split is None or int(split[2]) != count):
        raise ModelLoadError(
            f"{path} is one of {count} parts, whose names must end in -00001-of-{count:05}.gguf"
        )
    for number in range(2, count + 1):
        part = path.with_name(_SPLIT.sub(f"-{number:05}-of-{count:05}.gguf", path.name))
        if not part.is_file():
            raise ModelLoadError(f"{path} is one of {count} parts, and {part.name} is not there")
        own, more = _read(part)
        if own.integer_or(-1, "split.no") != number - 1:
            raise ModelLoadError(f"{part} does not say that it is part {number} of {count}")
        for name in more.keys() & tensors.keys():
            raise ModelLoadError(f"tensor {name} is in {part.name} and in a part before it")
        tensors.update(more)
    expected = metadata.integer_or(len(tensors), "split.tensors.count")
    if expected != len(tensors):
        raise ModelLoadError(f"{path}: its parts hold {len(tensors)} tensors of {expected}")
    return GgufFile(path, metadata, tensors)


def _read(path: Path) -> tuple[Metadata, dict[str, TensorEntry]]:
    file = MappedFile(path)
    reader = _Reader(file)
    try:
        num_tensors, num_values = reader.head()
        values: dict[str, Any] = {}
        for _ in range(num_values):
            key = reader.string()
            values[key] = reader.value()
        metadata = Metadata(values, path)
        alignment = metadata.integer_or(_ALIGNMENT, "general.alignment")
        entries = [reader.tensor() for _ in range(num_tensors)]
    except (struct.error, IndexError, UnicodeDecodeError, OverflowError) as error:
        raise ModelLoadError(f"{path} has a damaged header: {error}") from error
    base = -(-reader.offset // alignment) * alignment
    tensors = {
        name: TensorEntry(name, file, kind, shape, base + offset)
        for name, kind, shape, offset in entries
    }
    if len(tensors) != num_tensors:
        raise ModelLoadError(f"{path} names a tensor twice")
    return metadata, tensors


class _Reader:
    def __init__(self, file: MappedFile) -> None:
        self._file = file
        self._map = file.map
        self._size = len(file.map)
        self.offset = 0

    def head(self) -> tuple[int, int]:
        """How many tensors and values there are."""
        path, magic = self._file.path, self._map[:4]
        if magic != _MAGIC:
            raise ModelLoadError(f"{path} is no GGUF file: it begins with {magic!r}")
        self.offset = 4
        version = self._scalar("I")
        if version not in _VERSIONS:
            other = int.from_bytes(version.to_bytes(4, "little"), "big")
            kind = "big-endian" if other in _VERSIONS else f"version {version}"
            raise UnsupportedModelError(
                f"{path} is a {kind} GGUF file, which is not supported; "
                "llama.cpp's convert_hf_to_gguf.py writes version 3"
            )
        num_tensors, num_values = self._scalar("Q"), self._scalar("Q")
        # A tensor takes at least 24 bytes of header, a value 13: no loop of billions.
        if num_tensors * 24 + num_values * 13 > self._size:
            raise ModelLoadError(
                f"{path} has a damaged header: {num_tensors} tensors and {num_values} values "
                f"in {self._size} bytes"
            )
        return num_tensors, num_values

    def _scalar(self, form: str) -> Any:
        size = struct.calcsize("<" + form)
        [value] = struct.unpack_from("<" + form, self._map, self.offset)
        self.offset += size
        return value

    def _skip(self, count: int) -> int:
        start = self.offset
        if count > self._size - start:
            raise IndexError(f"{count} bytes at {start} lie outside the file ({self._size} bytes)")
        self.offset += count
        return start

    def string(self) -> str:
        length = self._scalar("Q")
        start = self._skip(length)
        return self._map[start : start + length].decode()

    def value(self) -> Any:
        return self._typed(self._scalar("I"))

    def _typed(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise IndexError(f"a value of type {kind}, which is unknown")
        value = self._scalar(_SCALARS[kind])
        return _shortest(value) if kind == _FLOAT32 else value

    def _array(self) -> Array:
        kind, count = self._scalar("I"), self._scalar("Q")
        start = self.offset
        if kind == _STRING:
            unpack, at, size = struct.Struct("<Q").unpack_from, start, self._size
            for _ in range(count):
                at += 8 + unpack(self._map, at)[0]
                if at > size:
                    raise IndexError(f"a text at {at} lies outside the file ({size} bytes)")
            self.offset = at
            return Array(self._map, start, count, None)
        if kind not in _SCALARS:
            raise IndexError(f"an array of type {kind}, which is not supported")
        self._skip(count * struct.calcsize("<" + _SCALARS[kind]))
        return Array(self._map, start, count, _SCALARS[kind])

    def tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self.string()
        num_extents = self._scalar("I")
        if num_extents > _MAX_EXTENTS:
            raise ModelLoadError(
                f"{self._file.path}: tensor {name} has {num_extents} extents, the most are "
                f"{_MAX_EXTENTS}"
            )
        shape = tuple(reversed([self._scalar("Q") for _ in range(num_extents)]))
        kind, offset = self._scalar("I"), self._scalar("Q")
        return name, kind, shape, offset


def _shortest(value: float) -> float:
    """The shortest decimal that is this float32: 1e-05, which its author wrote, not 9.99999975e-06.

    Numbers that are not finite stay what they are.
    """
    packed = struct.pack("<f", value)
    for digits in range(6, 9):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == packed:
            return short
    return value
