"""Parts of weights that a checkpoint holds packed: whole groups of inputs, any outputs."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from streamserve.errors import ConfigError
from streamserve.models.parameters import Module
from streamserve.models.quantised.modules import select_rows
from streamserve.models.tensor_parallel.share import Part
from streamserve_kernels.stored import (
    FactoredNumbers,
    Float8Weight,
    GroupedWeight,
    Numbers,
    OneWeight,
    StackedWeight,
    StoredWeight,
    TableWeight,
)


def cut(weight: StoredWeight, part: Part, module: Module, size: int) -> StoredWeight:
    """The ``part`` of a module's weight for one of ``size`` ranks.

    Raises ConfigError where a rank's columns are no whole groups.
    """
    if part.rows is not None:
        weight = _rows(weight, part.rows)
    if part.columns is not None:
        if isinstance(weight, StackedWeight):
            columns = part.columns
            parts = tuple(_columns(one, columns, module, size) for one in weight.parts)
            return StackedWeight(parts)
        weight = _columns(weight, part.columns, module, size)
    return weight


def _rows(weight: StoredWeight, rows: Tensor) -> StoredWeight:
    if not isinstance(weight, StackedWeight):
        return select_rows(weight, rows)
    parts: list[OneWeight] = []
    start = 0
    for one in weight.parts:
        here = rows[(rows >= start) & (rows < start + one.shape[0])]
        if len(here):
            parts.append(select_rows(one, here - start))
        start += one.shape[0]
    return parts[0] if len(parts) == 1 else StackedWeight(tuple(parts))


def _columns(weight: OneWeight, columns: slice, module: Module, size: int) -> OneWeight:
    if isinstance(weight, GroupedWeight):
        if weight.inputs is not None:
            raise _refusal(module, size, "in act-order: the inputs of a group lie apart")
        groups = _groups(weight.group, columns, module, size)
        zeros = weight.zeros
        minimums = weight.minimums
        return replace(
            weight,
            codes=weight.codes[:, columns].contiguous(),
            scales=_of_groups(weight.scales, groups, module, size),
            zeros=zeros[:, groups].contiguous() if isinstance(zeros, Tensor) else zeros,
            minimums=None if minimums is None else _of_groups(minimums, groups, module, size),
            group=min(weight.group, columns.stop - columns.start),
        )
    if isinstance(weight, TableWeight):
        scales, group, sparse = weight.scales, weight.group, weight.sparse
        if scales is not None:
            scales = _of_groups(scales, _groups(group, columns, module, size), module, size)
            group = min(group, columns.stop - columns.start)
        if sparse is not None:
            inside = (sparse[1] >= columns.start) & (sparse[1] < columns.stop)
            rows, places, values = (part[inside] for part in sparse)
            sparse = (rows, places - columns.start, values)
        codes = weight.codes[:, columns].contiguous()
        return replace(weight, codes=codes, scales=scales, group=group, sparse=sparse)
    values = weight.values[:, columns].contiguous()
    if weight.block is None:
        return Float8Weight(values, weight.scales)
    groups = _groups(weight.block[1], columns, module, size)
    return Float8Weight(values, weight.scales[:, groups].contiguous(), weight.block)


def _groups(group: int, columns: slice, module: Module, size: int) -> slice:
    """The groups that the columns are: one group of all columns is every part's."""
    if group >= (module.columns or 0):
        return slice(0, 1)
    if columns.start % group or columns.stop % group:
        raise _refusal(module, size, f"in groups of {group} inputs")
    return slice(columns.start // group, columns.stop // group)


def _of_groups(numbers: Numbers, groups: slice, module: Module, size: int) -> Numbers:
    if not isinstance(numbers, FactoredNumbers):
        return numbers[:, groups].contiguous()
    if groups.start % numbers.per or (
        groups.stop % numbers.per and groups.stop < numbers.codes.shape[1]
    ):
        raise _refusal(module, size, f"in {numbers.per} groups of inputs with one unit")
    units = slice(groups.start // numbers.per, -(-groups.stop // numbers.per))
    return FactoredNumbers(
        numbers.codes[:, groups].contiguous(), numbers.units[:, units].contiguous(), numbers.per
    )


def _refusal(module: Module, size: int, how: str) -> ConfigError:
    return ConfigError(
        f"--tensor-parallel-size must leave whole groups of {module.columns} inputs to each rank, "
        f"got {size}: {module.name} of layer {module.layer} is quantised {how}"
    )
