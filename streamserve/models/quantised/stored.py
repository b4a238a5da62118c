"""What a checkpoint says of its quantisation."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from streamserve.errors import ModelLoadError, UnsupportedModelError
from streamserve.models.names import WeightNames
from streamserve.models.parameters import Module
from streamserve.models.pieces import full_names
from streamserve.models.quantised.awq import AwqReader
from streamserve.models.quantised.bitsandbytes import BitsAndBytesReader
from streamserve.models.quantised.compressed_tensors import CompressedTensorsReader
from streamserve.models.quantised.fp8 import Fp8Reader
from streamserve.models.quantised.gptq import GptqReader
from streamserve.models.quantised.modules import StoredModules
from streamserve.models.quantised.mxfp4 import Mxfp4Reader
from streamserve.models.quantised.reader import FormatReader, Tensors
from streamserve.models.quantised.squeezellm import SqueezeLlmReader
from streamserve.models.spec import DecoderSpec
from streamserve.models.tensor_files import open_tensor_files
from streamserve_kernels.stored import StoredFormat

READERS: dict[str, Callable[[Mapping[str, Any], str], FormatReader]] = {
    "awq": AwqReader.from_config,
    "bitsandbytes": BitsAndBytesReader.from_config,
    "compressed-tensors": CompressedTensorsReader.from_config,
    "fp8": Fp8Reader.from_config,
    "gptq": GptqReader.from_config,
    "mxfp4": Mxfp4Reader.from_config,
    "squeezellm": SqueezeLlmReader.from_config,
}
# Files of their own that older packers wrote, and what tells whose they are.
_OWN_FILES = (
    ("quantize_config.json", "bits", "gptq"),
    ("quant_config.json", "wbits", "squeezellm"),
    ("quant_config.json", "w_bit", "awq"),
)


class CheckpointQuantization:
    """How the files of a directory are quantised; their headers are read when somebody asks."""

    def __init__(
        self,
        name: str,
        reader: FormatReader,
        directory: Path,
        names: WeightNames,
        spec: DecoderSpec,
    ) -> None:
        self.name = name
        self.reader = reader
        self._directory = directory
        self._names = names
        self._spec = spec

    def of(self, names: WeightNames, spec: DecoderSpec) -> CheckpointQuantization:
        """The same of another part of the checkpoint."""
        return CheckpointQuantization(self.name, self.reader, self._directory, names, spec)

    @cached_property
    def _modules(self) -> StoredModules:
        files = open_tensor_files(self._directory, "auto")
        names = self._names.of_files(files.names())
        tensors = Tensors(files, full_names(files, names))
        return StoredModules(self.reader, tensors, names, self._spec)

    def format(self, module: Module) -> StoredFormat | None:
        return self._modules.format(module)


def stored_quantization(
    config: Mapping[str, Any], directory: Path, names: WeightNames, spec: DecoderSpec
) -> CheckpointQuantization | None:
    """What ``quantization_config``, or a packer's own file, says; None where nothing does.

    Raises UnsupportedModelError for a method or a setting that is not read.
    """
    source = str(directory / "config.json")
    values = config.get("quantization_config")
    method = None
    if not values:
        found = _own_file(directory)
        if found is None:
            return None
        source, method, values = found
    if not isinstance(values, dict):
        raise ModelLoadError(f"{source}: quantization_config must be an object, got {values!r}")
    name = method or str(values.get("quant_method", "")).lower().replace("_", "-")
    if name not in READERS:
        raise UnsupportedModelError(
            f"{source}: quantization_config (quant_method {values.get('quant_method')!r}) is not "
            f"supported; these are: {', '.join(READERS)}"
        )
    return CheckpointQuantization(name, READERS[name](values, source), directory, names, spec)


def _own_file(directory: Path) -> tuple[str, str, dict[str, Any]] | None:
    for name, key, method in _OWN_FILES:
        path = directory / name
        if not path.is_file():
            continue
        try:
            values = json.loads(path.read_bytes())
        except ValueError as error:
            raise ModelLoadError(f"{path} is no JSON: {error}") from error
        if isinstance(values, dict) and key in values:
            return str(path), method, values
    return None
