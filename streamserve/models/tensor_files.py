"""The two file formats that checkpoints come in, behind one small interface.

Safetensors files are mapped, not read: a tensor is a view of the page cache until it is copied, and
its pages are given back right after. Old ``pytorch_model.bin`` files go through torch's
``weights_only`` unpickler, which builds tensors and runs nothing.
"""

from __future__ import annotations

import json
import mmap
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from streamserve.errors import ModelLoadError
from streamserve_kernels import huge_pages

FileFormat = Literal["safetensors", "pt"]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Linux's flag, which Python 3.11 does not name: a private mapping is never written to here, so no
# swap space need be set aside for it, and files larger than the memory can be mapped.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_MAX_HEADER_BYTES = 100 * 2**20
_POINTER = b"version https://git-lfs"


class TensorFiles(Protocol):
    """A checkpoint's tensors by name, from one file or from many."""

    def names(self) -> Iterator[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype | None:
        """None for one that has no name here."""
        ...

    def file(self, name: str) -> Path:
        """Where the tensor is: what an error names."""
        ...

    def read(self, name: str) -> Tensor:
        """The tensor, perhaps a view of a mapped file: copy it before `release`."""
        ...

    def read_rows(self, name: str, rows: slice) -> Tensor:
        """``read(name)[rows]``, for which no more than that is read."""
        ...

    def release(self, name: str) -> None:
        """Gives back the memory behind `read(name)`; it can be read again."""
        ...


def open_tensor_files(path: Path, file_format: FileFormat | Literal["auto"]) -> TensorFiles:
    """Opens the checkpoint in directory ``path``; ``auto`` prefers safetensors.

    Raises ModelLoadError that names what was looked for.
    """
    if file_format in ("auto", "safetensors"):
        files = _shards(path, "model.safetensors", "*.safetensors")
        if files:
            return SafetensorsFiles(files)
    if file_format in ("auto", "pt"):
        files = _shards(path, "pytorch_model.bin", "pytorch_model*.bin")
        if files:
            return PickledFiles(files)
    looked_for = {"safetensors": "*.safetensors", "pt": "pytorch_model*.bin"}
    wanted = looked_for.get(file_format, " or ".join(looked_for.values()))
    raise ModelLoadError(f"{path} holds no weights: looked for {wanted}")


def _shards(path: Path, single: str, pattern: str) -> list[Path]:
    """The files of a checkpoint: those its index names, else the single file, else all."""
    index = path / f"{single}.index.json"
    if index.is_file():
        try:
            weight_map: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
            shards = [path / Path(name).name for name in sorted(set(weight_map.values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelLoadError(f"{index} is no weight index: {error!r}") from error
        for shard in shards:
            if not shard.is_file():
                raise ModelLoadError(
                    f"{index} names {shard.name}, which is not there: download it, too"
                )
        return shards
    if (path / single).is_file():
        return [path / single]
    # Mistral's repositories keep the same weights a second time in a format of their own.
    return sorted(file for file in path.glob(pattern) if not file.name.startswith("consolidated"))


@dataclass(frozen=True, slots=True)
class _Entry:
    file: MappedFile
    dtype: torch.dtype | None
    dtype_name: str
    shape: tuple[int, ...]
    start: int
    end: int


class MappedFile:
    """One file mapped privately; reading touches pages, `release` drops them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            try:
                self.map = mmap.mmap(
                    file.fileno(),
                    0,
                    flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
                    prot=mmap.PROT_READ | mmap.PROT_WRITE,
                )
            except (OSError, ValueError) as error:
                raise ModelLoadError(f"{path} cannot be mapped: {error}") from error
        if self.map[: len(_POINTER)] == _POINTER:
            raise ModelLoadError(
                f"{path} only says where the weights are (git-lfs): `git lfs pull` in its "
                "directory brings them"
            )

    def advise(self, start: int, end: int, advice: int) -> None:
        first = start - start % mmap.PAGESIZE
        if end > first:
            self.map.madvise(advice, first, end - first)


class SafetensorsFiles:
    """Tensors of safetensors files (https://github.com/huggingface/safetensors), mapped.

    A file is an 8-byte little-endian header length, a JSON header, then the tensors' bytes. Raises
    ModelLoadError for a header that is damaged or points outside the file.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._entries: dict[str, _Entry] = {}
        for path in files:
            for name, entry in _read_header(path):
                if name in self._entries:
                    other = self._entries[name].file.path.name
                    raise ModelLoadError(f"tensor {name} is in both {other} and {path.name}")
                self._entries[name] = entry

    def names(self) -> Iterator[str]:
        return iter(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype | None:
        return self._entries[name].dtype

    def file(self, name: str) -> Path:
        return self._entries[name].file.path

    def read(self, name: str) -> Tensor:
        entry = self._entries[name]
        return self._map(name, entry.start, entry.end, entry.shape)

    def read_rows(self, name: str, rows: slice) -> Tensor:
        entry = self._entries[name]
        first, last, _ = rows.indices(entry.shape[0])
        row_bytes = (entry.end - entry.start) // max(1, entry.shape[0])
        start = entry.start + first * row_bytes
        shape = (last - first, *entry.shape[1:])
        return self._map(name, start, entry.start + last * row_bytes, shape)

    def _map(self, name: str, start: int, end: int, shape: tuple[int, ...]) -> Tensor:
        entry = self._entries[name]
        if entry.dtype is None:
            raise ModelLoadError(
                f"{entry.file.path}: tensor {name} has dtype {entry.dtype_name}, which is unknown"
            )
        if start == end:
            return torch.empty(shape, dtype=entry.dtype)
        entry.file.advise(start, end, mmap.MADV_WILLNEED)
        count = (end - start) // entry.dtype.itemsize
        flat = torch.frombuffer(entry.file.map, dtype=entry.dtype, count=count, offset=start)
        return flat.view(shape)

    def release(self, name: str) -> None:
        entry = self._entries[name]
        entry.file.advise(entry.start, entry.end, mmap.MADV_DONTNEED)


def _read_header(path: Path) -> Iterator[tuple[str, _Entry]]:
    file = MappedFile(path)
    size = len(file.map)
    length = int.from_bytes(file.map[:8], "little")
    if length > min(size - 8, _MAX_HEADER_BYTES):
        raise ModelLoadError(
            f"{path} is no safetensors file: a header of {length} of {size} bytes; if it should be "
            "one, download it again"
        )
    base = 8 + length
    try:
        header: dict[str, Any] = json.loads(file.map[8:base])
        for name, fields in header.items():
            if name == "__metadata__":
                continue
            shape = tuple(int(extent) for extent in fields["shape"])
            start, end = (base + int(offset) for offset in fields["data_offsets"])
            dtype = _DTYPES.get(fields["dtype"])
            if not base <= start <= end <= size or any(extent < 0 for extent in shape):
                raise ModelLoadError(
                    f"{path}: tensor {name} lies outside the file ({size} bytes), which is cut "
                    "short: download it again"
                )
            if dtype is not None:
                expected = dtype.itemsize
                for extent in shape:
                    expected *= extent
                if end - start != expected:
                    raise ModelLoadError(
                        f"{path}: tensor {name} has {end - start} bytes, "
                        f"shape {list(shape)} in {fields['dtype']} needs {expected}"
                    )
            yield name, _Entry(file, dtype, str(fields["dtype"]), shape, start, end)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"{path} has a damaged header: {error!r}") from error


class PickledFiles:
    """Tensors of ``pytorch_model.bin`` files, mapped where the file is new enough to allow it."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._files: dict[str, Path] = {}
        self._mapped: set[Path] = set()
        for path in files:
            tensors, is_mapped = _unpickle(path)
            if is_mapped:
                self._mapped.add(path)
            for name, tensor in tensors.items():
                if not isinstance(tensor, Tensor):
                    raise ModelLoadError(f"{path}: {name} is no tensor but {type(tensor)}")
                if name in self._tensors:
                    raise ModelLoadError(f"tensor {name} is in more than one file, also {path}")
                self._tensors[name] = tensor
                self._files[name] = path

    def names(self) -> Iterator[str]:
        return iter(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype | None:
        return self._tensors[name].dtype

    def file(self, name: str) -> Path:
        return self._files[name]

    def read(self, name: str) -> Tensor:
        return self._tensors[name]

    def read_rows(self, name: str, rows: slice) -> Tensor:
        return self._tensors[name][rows]

    def release(self, name: str) -> None:
        tensor = self._tensors[name]
        if self._files[name] in self._mapped and tensor.is_contiguous() and tensor.nbytes:
            # Nobody writes to a tensor that was read: what is dropped comes from the file again.
            huge_pages.drop(tensor)


def _unpickle(path: Path) -> tuple[dict[str, Any], bool]:
    """What the file holds, and whether it is mapped."""
    is_mapped = True
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        try:
            loaded = torch.load(path, mmap=True, **options)
        except RuntimeError:
            # Files written before torch 1.6 are no zip archives and cannot be mapped.
            is_mapped = False
            loaded = torch.load(path, **options)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError) as error:
        raise ModelLoadError(f"{path} cannot be loaded as plain tensors: {error}") from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict):
        raise ModelLoadError(f"{path} holds no dictionary of tensors but {type(loaded)}")
    return loaded, is_mapped
