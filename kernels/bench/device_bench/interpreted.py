"""Triton's interpreter: beside NumPy 2.4, and without work that nobody sees."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def mended_interpreter() -> Iterator[None]:
    """Kernels run under the interpreter as they should, in half the time; elsewhere nothing.

    A kernel's argument may bound a loop: the interpreter holds a scalar as an array of one element,
    which NumPy no longer makes an int. What a called function would put into `triton.language` is
    put there once for a launch: its caller has done so already. And no sum of integers is made a
    second time to see whether it fits, of which without `debug` nobody is told.
    """
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not is_interpreted or importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    patch_tensor, patch_lang = interpreter._patch_lang_tensor, interpreter._patch_lang
    builder = interpreter.interpreter_builder
    options = builder.options

    def patch_lang_tensor(tensor: object, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor
    interpreter._patch_lang = _once_for_a_launch(patch_lang)
    builder.options = dataclasses.replace(options, sanitize_overflow=options.debug)
    try:
        yield
    finally:
        interpreter._patch_lang_tensor, interpreter._patch_lang = patch_tensor, patch_lang
        builder.options = options


def _once_for_a_launch(patch_lang: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """For a kernel, whose scope is restored at its end, and for functions, whose scope is not."""
    from triton import language

    modules = (language, language.core)
    patched: list[object] = []  # of the launch that runs

    def patch(function: Any) -> Any:
        used = [m for m in modules if any(m is value for value in function.__globals__.values())]
        if patched and all(module in patched for module in used):
            return None
        is_kernel = not patched
        patched.extend(used)
        scope = patch_lang(function)
        if is_kernel:
            restore = scope.restore

            def end() -> None:
                patched.clear()
                restore()

            scope.restore = end
        return scope

    return patch
