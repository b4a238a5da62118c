"""Triton's interpreter beside NumPy 2.4."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def loops_bounded_by_arguments() -> Iterator[None]:
    """Lets a kernel's argument bound a loop under the interpreter; elsewhere it does nothing.

    The interpreter holds a scalar as an array of one element, which NumPy no longer makes an int.
    """
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not is_interpreted or importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: object, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor
    try:
        yield
    finally:
        interpreter._patch_lang_tensor = patch
