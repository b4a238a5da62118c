"""LoRA adapters (Hu et al. 2021) beside a decoder's linear layers, read from PEFT's directories.

Every linear layer of the blocks gets a table of slots, one for each adapter that may be loaded.
What an adapter has for the checkpoint modules that a layer of ours stacks (q, k, v; gate, up)
becomes one pair of matrices: their a's stacked, their b's on a diagonal of blocks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamserve.errors import AdapterError
from streamserve.models.names import WeightNames
from streamserve.models.parameters import Module, layer_modules, takes_adapter
from streamserve.models.pieces import module_pieces, row_groups
from streamserve.models.spec import DecoderSpec
from streamserve.models.tensor_files import PickledFiles, SafetensorsFiles, TensorFiles
from streamserve.models.weights import Weights
from streamserve_kernels import Kernels, PackedLinear
from streamserve_kernels.adapters import AdapterRows, AdapterTable, StepAdapters

_PREFIX = "base_model.model."
_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])(\.default)?\.weight")
# Settings of PEFT's that make another function of it, and what they are when they do not.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
}
_NAMED_IN_AN_ERROR = 4


class CurrentStep:
    """Whose rows the step has that runs now; None while none of them has an adapter."""

    __slots__ = ("adapters",)

    def __init__(self) -> None:
        self.adapters: StepAdapters | None = None


class AdaptedLinear:
    """A layer's product, and what the rows' own adapters add to it."""

    __slots__ = ("_base", "_current", "_kernels", "_table")

    def __init__(
        self, base: PackedLinear, table: AdapterTable, current: CurrentStep, kernels: Kernels
    ) -> None:
        self._base, self._table = base, table
        self._current, self._kernels = current, kernels

    def __call__(self, x: Tensor) -> Tensor:
        step = self._current.adapters
        rows: AdapterRows | None = None if step is None else step.of(x.shape[0])
        return self._kernels.add_adapters(self._base(x), x, self._table, rows)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


class AdapterTables:
    """The adapters of one decoder: ``num_slots`` of them, of rank ``max_rank`` at most.

    Reading and placing may happen on any thread, but for one thing: no step that uses a slot may
    run while it is cleared.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        names: WeightNames,
        kernels: Kernels,
        *,
        dtype: torch.dtype,
        device: torch.device,
        num_slots: int,
        max_rank: int,
    ) -> None:
        self.num_slots, self.max_rank = num_slots, max_rank
        self.current = CurrentStep()
        self._spec, self._names = spec, names
        self._modules: dict[tuple[int, str], Module] = {}
        self._tables: dict[tuple[int, str], AdapterTable] = {}
        for index in range(len(spec.layers)):
            for module in layer_modules(spec, index):
                if not takes_adapter(module):
                    continue
                assert module.columns is not None
                self._modules[index, module.name] = module
                self._tables[index, module.name] = kernels.AdapterTable(
                    num_slots,
                    module.num_rows,
                    module.columns,
                    dtype,
                    device,
                    max_rank * len(module.rows),
                )

    def adapted(self, layers: list[Weights], kernels: Kernels) -> list[Weights]:
        """The layers' weights, each product of which minds the rows' adapters."""
        adapted = []
        for layer, weights in enumerate(layers):
            linears: dict[str, PackedLinear] = dict(weights.linears)
            for name, linear in weights.linears.items():
                table = self._tables.get((layer, name))
                if table is not None:
                    linears[name] = AdaptedLinear(linear, table, self.current, kernels)
            adapted.append(replace(weights, linears=linears))
        return adapted

    def load(self, slot: int, path: Path) -> None:
        """Read PEFT's directory ``path`` into a free slot.

        Raises AdapterError that names the setting or the tensor which does not fit; the slot is
        free then.
        """
        config = _AdapterConfig.read(path)
        files = _open(path)
        found = _Matrices(files, config, self.max_rank)
        try:
            for (layer, name), module in self._modules.items():
                pair = self._of_module(found, module, layer)
                if pair is not None:
                    self._tables[layer, name].set(slot, *pair)
            found.check_all_used()
        except BaseException:
            self.clear(slot)
            raise

    def clear(self, slot: int) -> None:
        """Take a slot's matrices away."""
        for table in self._tables.values():
            table.clear(slot)

    def close(self) -> None:
        """Let go of the memory, once no step runs any more. Nothing can be loaded then."""
        self._tables.clear()
        self.current.adapters = None

    def _of_module(self, found: _Matrices, module: Module, layer: int) -> _Pair | None:
        pieces = module_pieces(self._names, module, "weight")
        assert module.columns is not None
        pairs = [
            found.take(piece.name.removesuffix(".weight"), self._names, piece.rows, module.columns)
            for piece in pieces
        ]
        held = [pair for pair in pairs if pair is not None]
        if not held:
            return None
        b = torch.zeros(module.num_rows, sum(pair[0].shape[0] for pair in held))
        column = 0
        for piece, pair in zip(pieces, pairs, strict=True):
            if pair is None:
                continue
            rank = pair[0].shape[0]
            rows = b[piece.start : piece.start + piece.rows, column : column + rank]
            groups = row_groups(self._names, module, piece, self._spec)
            rows.copy_(pair[1] if groups is None else pair[1][groups.order()])
            column += rank
        return torch.cat([pair[0] for pair in held]), b


def adapter_bytes(spec: DecoderSpec, dtype: torch.dtype, num_slots: int, max_rank: int) -> int:
    """Bytes that ``num_slots`` adapters of rank ``max_rank`` take beside every layer."""
    elements = sum(
        len(module.rows) * (module.num_rows + (module.columns or 0))
        for index in range(len(spec.layers))
        for module in layer_modules(spec, index)
        if takes_adapter(module)
    )
    return num_slots * max_rank * elements * dtype.itemsize


_Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class _AdapterConfig:
    """``adapter_config.json``, as far as it says what the matrices mean."""

    source: str
    rank: int
    alpha: float
    is_rank_stabilised: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    @classmethod
    def read(cls, path: Path) -> _AdapterConfig:
        source = path / "adapter_config.json"
        try:
            values = json.loads(source.read_bytes())
        except OSError as error:
            raise AdapterError(f"{path} holds no adapter: {source.name}: {error}") from error
        except ValueError as error:
            raise AdapterError(f"{source} is no JSON: {error}") from error
        if not isinstance(values, dict):
            raise AdapterError(f"{source} must hold an object")
        if values.get("peft_type") != "LORA":
            raise AdapterError(f"{source}: peft_type {values.get('peft_type')!r} is not 'LORA'")
        for name, plain in _PLAIN.items():
            if values.get(name) not in plain:
                raise AdapterError(f"{source}: {name} {values[name]!r} is not supported")
        rank, alpha = values.get("r"), values.get("lora_alpha", values.get("r"))
        if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
            raise AdapterError(f"{source}: r {rank!r} and lora_alpha {alpha!r} must be numbers")
        return cls(
            str(source),
            rank,
            float(alpha),
            bool(values.get("use_rslora")),
            values.get("rank_pattern") or {},
            values.get("alpha_pattern") or {},
        )

    def scale(self, module: str, rank: int) -> float:
        """What b · a is multiplied by in a module. Raises AdapterError if its rank is another."""
        expected = _by_pattern(self.rank_pattern, module, self.rank)
        if rank != expected:
            raise AdapterError(f"{self.source}: {module} has rank {rank}, not {expected}")
        alpha = float(_by_pattern(self.alpha_pattern, module, self.alpha))
        return alpha / (rank**0.5 if self.is_rank_stabilised else rank)


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """A pattern is a regular expression for the end of a module's name, as PEFT reads it."""
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


class _Matrices:
    """An adapter's tensors by the module they belong to."""

    def __init__(self, files: TensorFiles, config: _AdapterConfig, max_rank: int) -> None:
        self._files, self._config, self._max_rank = files, config, max_rank
        self._names: dict[str, dict[str, str]] = {}
        for name in files.names():
            found = _TENSOR.fullmatch(name.removeprefix(_PREFIX))
            if found is None:
                raise AdapterError(
                    f"{config.source}: tensor {name} is not supported: only the lora_A and lora_B "
                    "of linear layers are"
                )
            self._names.setdefault(found["module"], {})[found["part"]] = name

    def take(self, module: str, names: WeightNames, rows: int, columns: int) -> _Pair | None:
        """The pair of a checkpoint's module, the scale in b, or None if it has none."""
        parts = self._names.pop(module, None)
        if parts is None and names.optional_prefix:
            parts = self._names.pop(module.removeprefix(names.optional_prefix), None)
        if parts is None:
            return None
        if len(parts) != 2:
            raise AdapterError(f"{self._config.source}: {module} lacks its lora_A or lora_B")
        a, b = (self._files.read(parts[part]).float() for part in "AB")
        for part, tensor, shape in (("A", a, (a.shape[0], columns)), ("B", b, (rows, a.shape[0]))):
            if tensor.shape != shape:
                raise AdapterError(
                    f"{self._config.source}: tensor {parts[part]} has shape {list(tensor.shape)}; "
                    f"the model asks for {list(shape)}"
                )
        rank = a.shape[0]
        if rank > self._max_rank:
            raise AdapterError(
                f"{self._config.source}: rank {rank} is above --max-lora-rank {self._max_rank}"
            )
        return a, b * self._config.scale(module, rank)

    def check_all_used(self) -> None:
        """Raise AdapterError for modules that the model does not have, or cannot adapt."""
        if self._names:
            named = ", ".join(sorted(self._names)[:_NAMED_IN_AN_ERROR])
            raise AdapterError(
                f"{self._config.source}: {len(self._names)} modules have no adapted counterpart "
                f"here (linear layers of the blocks have, experts and the head do not): {named}"
            )


def _open(path: Path) -> TensorFiles:
    if (file := path / "adapter_model.safetensors").is_file():
        return SafetensorsFiles([file])
    if (file := path / "adapter_model.bin").is_file():
        return PickledFiles([file])
    raise AdapterError(
        f"{path} holds no adapter: looked for adapter_model.safetensors or adapter_model.bin"
    )
