"""Nothing is read or written outside a launch's tensors: what a memory checker asks on a card."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
from torch import Tensor

# They follow addresses that they have read.
_UNBOUNDED = {"_copy_kernel", "_rows_kernel", "grouped_product_kernel"}


@contextmanager
def within_bounds() -> Iterator[None]:
    """A pointer of a kernel under the interpreter that leaves the launch's tensors raises."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    launch = interpreter.GridExecutor.__call__
    load, store = builder.create_masked_load, builder.create_masked_store
    atomic = builder.create_atomic_rmw
    starts: list[int] = []
    ends: list[int] = []

    def bounded_launch(executor: Any, *args: Any, **kwargs: Any) -> None:
        places = sorted(_places((*args, *kwargs.values())))
        if executor.fn.__name__ in _UNBOUNDED:
            places = [(0, 2**64)]
        starts[:], ends[:] = (list(column) for column in zip(*places, strict=True))
        launch(executor, *args, **kwargs)

    def is_inside(first: int, last: int, size: int) -> bool:
        place = bisect(starts, first)
        return place > 0 and last + size <= ends[place - 1]

    def check(pointers: Any, mask: Any) -> None:
        at = pointers.data
        if not mask.data.all():
            at = at[np.broadcast_to(mask.data.astype(bool), at.shape)]
        if at.size:
            size = pointers.dtype.scalar.element_ty.primitive_bitwidth // 8 or 1
            # Most are all in one tensor; the others are looked up one by one.
            if not is_inside(int(at.min()), int(at.max()), size) and not all(
                is_inside(int(one), int(one), size) for one in at.flat
            ):
                raise IndexError("a pointer leaves the tensors of its launch")

    def bounded_load(self: Any, pointers: Any, mask: Any, *others: Any) -> Any:
        check(pointers, mask)
        return load(self, pointers, mask, *others)

    def bounded_store(self: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
        check(pointers, mask)
        return store(self, pointers, value, mask, *others)

    def bounded_atomic(
        self: Any, kind: Any, pointers: Any, value: Any, mask: Any, *rest: Any
    ) -> Any:
        check(pointers, mask)
        return atomic(self, kind, pointers, value, mask, *rest)

    with ExitStack() as stack:
        for of, name, bounded in (
            (interpreter.GridExecutor, "__call__", bounded_launch),
            (builder, "create_masked_load", bounded_load),
            (builder, "create_masked_store", bounded_store),
            (builder, "create_atomic_rmw", bounded_atomic),
        ):
            stack.enter_context(patch.object(of, name, bounded))
        yield


def _places(values: tuple[Any, ...]) -> Iterator[tuple[int, int]]:
    """Where the tensors among the arguments lie, in tuples too."""
    for value in values:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            yield storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        elif isinstance(value, tuple):
            yield from _places(value)
