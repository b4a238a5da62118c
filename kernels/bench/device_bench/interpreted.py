"""Triton's interpreter: beside NumPy 2.4, with a GPU's rounding, and without work nobody sees."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import torch


@contextmanager
def mended_interpreter() -> Iterator[None]:
    """Kernels run under the interpreter as they should, in a quarter of the time; else nothing.

    - A kernel's argument may bound a loop: the interpreter holds a scalar as an array of one
      element, which NumPy no longer makes an int.
    - Numbers become bfloat16 and float8 by rounding to the nearest, as on a GPU, and are multiplied
      as what they are; of float32 a product in tf32 takes 11 bits.
    - A float32 product that is added, or subtracted, enters the sum unrounded, as a GPU's fused
      multiply-add has it; reduced, selected or cast it is rounded.
    - What a called function would put into `triton.language` is put there once for a launch: its
      caller has done so already.
    - No sum of integers is made a second time to see whether it fits, of which without `debug`
      nobody is told; types, shapes and constants are made once, and what two operands are cast to
      is found once for their types; memory is not copied onto itself.
    """
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not is_interpreted or importlib.util.find_spec("triton") is None:
        yield
        return
    from triton import language
    from triton.runtime import interpreter

    builder, semantic = interpreter.interpreter_builder, type(interpreter.interpreter_semantic)
    options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
    with ExitStack() as stack:
        for of, name, better in (
            (interpreter, "_patch_lang_tensor", _with_index(interpreter._patch_lang_tensor)),
            (interpreter, "_patch_lang", _once_for_a_launch(interpreter._patch_lang)),
            (interpreter, "_patch_attr", _calling(interpreter)),
            (interpreter, "_convert_float", _rounding(interpreter._convert_float)),
            (interpreter, "_get_np_dtype", _remembering(interpreter._get_np_dtype)),
            (interpreter.InterpreterBuilder, "create_dot", _multiplying(interpreter)),
            *_contracting(interpreter),
            (interpreter.GridExecutor, "_restore_args_dev", _leave_in_place),
            (interpreter.TensorHandle, "__init__", _handle),
            (semantic, "broadcast_impl_value", _broadcasting(semantic.broadcast_impl_value)),
            (semantic, "scalar_constant", _constant(semantic.scalar_constant)),
            (semantic, "binary_op_type_checking_impl", _checking(semantic, language.core)),
            (language.core, "_unwrap_if_constexpr", _unwrapping(language.core)),
            (language.core.dtype, "__eq__", _equal(language.core.dtype.__eq__)),
            (language.core.block_type, "__init__", _block_type(language.core)),
            (language.core.block_type, "with_element_ty", _with_element(language.core)),
            (language.core.block_type, "to_ir", lambda self, builder: self),
            (language.core.tensor, "__init__", _tensor(language.core)),
            (builder, "options", options),
        ):
            stack.enter_context(patch.object(of, name, better))
        yield


def _with_index(patch_tensor: Callable[..., None]) -> Callable[..., None]:
    def patch_lang_tensor(tensor: object, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    return patch_lang_tensor


def _once_for_a_launch(patch_lang: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """For a kernel, whose scope is restored at its end, and for functions, whose scope is not."""
    from triton import language

    modules = (language, language.core)
    patched: set[object] = set()  # of the launch that runs
    used_by: dict[Any, set[object]] = {}

    def patch_once(function: Any) -> Any:
        if (used := used_by.get(function)) is None:
            known = {id(value) for value in function.__globals__.values()}
            used = used_by[function] = {module for module in modules if id(module) in known}
        if patched and used <= patched:
            return None
        is_kernel = not patched
        patched.update(used)
        scope = patch_lang(function)
        if is_kernel:
            restore = scope.restore

            def end() -> None:
                patched.clear()
                restore()

            scope.restore = end
        return scope

    return patch_once


_TORCH = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp8e4nv": torch.float8_e4m3fn,
}
_BITS = {8: torch.uint8, 16: torch.int16, 32: torch.int32}


def _rounding(convert: Callable[..., Any]) -> Callable[..., Any]:
    """Torch's conversions; the interpreter cuts bfloat16 off, and rounds float8 without a carry."""

    def rounded(values: Any, source: Any, target: Any, mode: Any) -> Any:
        of, to = _TORCH.get(source.name), _TORCH.get(target.name)
        if of is None or to is None:
            return convert(values, source, target, mode)
        bits = torch.from_numpy(np.array(values).view(f"i{of.itemsize}"))
        made = bits.view(of).to(to).view(_BITS[8 * to.itemsize]).numpy()
        return made.view(f"u{to.itemsize}").reshape(values.shape)

    return rounded


def _multiplying(interpreter: Any) -> Callable[..., Any]:
    """The interpreter multiplies the bits of bfloat16 as integers, and tf32 as float32."""
    from triton import language

    create_dot = interpreter.InterpreterBuilder.create_dot

    def dot(builder: Any, a: Any, b: Any, d: Any, *how: Any) -> Any:
        if a.dtype == language.bfloat16:
            a, b = (builder.cast_impl(x, language.float32) for x in (a, b))
        elif a.dtype == language.float32 and how[0].name == "TF32":
            a, b = (interpreter.TensorHandle(_cut(x.data), x.dtype) for x in (a, b))
        return create_dot(builder, a, b, d, *how)

    return dot


def _cut(values: Any) -> Any:
    """What a GPU's matrix units take of float32: 11 bits of mantissa, the others are left out."""
    return (np.ascontiguousarray(values).view(np.int32) & -0x2000).view(np.float32)


class _Fusion:
    """Whether the kernel that runs was launched with fused products."""

    def __init__(self, executor_class: Any) -> None:
        self.is_on = True
        launch = executor_class.__call__

        def launched(executor: Any, *args: Any, **options: Any) -> Any:
            self.is_on = options.get("enable_fp_fusion", True)
            try:
                return launch(executor, *args, **options)
            finally:
                self.is_on = True

        self.launched = launched


def _contracting(interpreter: Any) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """A product remembers its factors, for a sum that takes it as it is, negated or broadcast.

    But not in a kernel that is launched with ``enable_fp_fusion=False``.

    In float64 products of float32 are exact, and a sum is rounded once more: hardly ever is it
    another number than that of a fused multiply-add.
    """
    builder_class, fusion = interpreter.InterpreterBuilder, _Fusion(interpreter.GridExecutor)

    def keeping(name: str, factors_of: Callable[..., Any]) -> tuple[Any, str, Callable[..., Any]]:
        plain = getattr(builder_class, name)

        def kept(builder: Any, *args: Any) -> Any:
            made = plain(builder, *args)
            if (factors := factors_of(made.data, *args)) is not None:
                made.attr["factors"] = factors
            return made

        return builder_class, name, kept

    def contracted(name: str, add: Any) -> tuple[Any, str, Callable[..., Any]]:
        plain = getattr(builder_class, name)

        def summed(builder: Any, a: Any, b: Any) -> Any:
            if "factors" in a.attr:
                total = add(np.multiply(*a.attr["factors"], dtype=np.float64), b.data)
            elif "factors" in b.attr:
                total = add(a.data, np.multiply(*b.attr["factors"], dtype=np.float64))
            else:
                return plain(builder, a, b)
            return type(a)(total.astype(np.float32), a.dtype.scalar)

        return builder_class, name, summed

    def of_product(made: Any, a: Any, b: Any) -> Any:
        return (a.data, b.data) if fusion.is_on and made.dtype == np.float32 else None

    def negated(_: Any, arg: Any) -> Any:
        factors = arg.attr.get("factors")
        return factors and (np.negative(factors[0]), factors[1])

    def broadcast(made: Any, arg: Any, *_: Any) -> Any:
        factors = arg.attr.get("factors")
        return factors and [np.broadcast_to(x, made.shape) for x in factors]

    def splat(made: Any, _: Any, arg: Any) -> Any:
        return broadcast(made, arg)

    def expanded(_: Any, arg: Any, axis: int) -> Any:
        factors = arg.attr.get("factors")
        return factors and [
            np.expand_dims(np.broadcast_to(x, arg.data.shape), axis) for x in factors
        ]

    yield interpreter.GridExecutor, "__call__", fusion.launched
    yield contracted("create_fadd", np.add)
    yield contracted("create_fsub", np.subtract)
    yield keeping("create_fmul", of_product)
    yield keeping("create_splat", splat)
    yield keeping("create_broadcast", broadcast)
    yield keeping("create_expand_dims", expanded)
    # Triton 3.6 negates by a subtraction from zero, which rounds.
    if hasattr(builder_class, "create_fneg"):
        yield keeping("create_fneg", negated)


def _remembering(np_dtype: Callable[[Any], Any]) -> Callable[[Any], Any]:
    of_scalar = cache(np_dtype)
    pointers = np.dtype(np.uint64)

    def remembered(dtype: Any) -> Any:
        scalar = dtype.scalar
        return pointers if scalar.is_ptr() else of_scalar(scalar)

    return remembered


def _block_type(core: Any) -> Callable[..., None]:
    init = core.block_type.__init__
    made: dict[tuple[int, ...], Any] = {}

    def __init__(self: Any, element_ty: Any, shape: Any) -> None:  # noqa: N807
        sizes = tuple([getattr(size, "value", size) for size in shape])
        if sizes not in made:
            init(self, element_ty, shape)
            made[sizes] = self.shape, self.numel
        self.element_ty = element_ty
        self.shape, self.numel = made[sizes]
        self.name = f"<{sizes}, {element_ty}>"

    return __init__


def _tensor(core: Any) -> Callable[..., None]:
    init = core.tensor.__init__
    shapes: dict[tuple[int, ...], Any] = {}

    def __init__(self: Any, handle: Any, type: Any) -> None:  # noqa: A002, N807
        if "of_tensors" not in type.__dict__:
            init(self, handle, type)
            sizes = tuple(type.shape) if type.is_block() else ()
            type.of_tensors = type.scalar, *shapes.setdefault(sizes, (self.shape, self.numel))
        self.handle, self.type = handle, type
        self.dtype, self.shape, self.numel = type.of_tensors

    return __init__


def _calling(interpreter: Any) -> Callable[..., None]:
    """Every call of a builtin is given the semantics, without its options being copied."""
    semantic = interpreter.interpreter_semantic

    @cache
    def calling(member: Any) -> Any:
        function = inspect.unwrap(member)  # not asked for the semantics at every call

        def called(*args: Any, **options: Any) -> Any:
            options["_semantic"] = semantic
            return function(*args, **options)

        return called

    def patch_attr(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        scope.set_attr(obj, name, calling(member))

    return patch_attr


def _broadcasting(broadcast: Callable[..., Any]) -> Callable[..., Any]:
    def to_one_shape(semantic: Any, lhs: Any, rhs: Any) -> Any:
        # Shapes are made once: equal ones are one object.
        return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(semantic, lhs, rhs)

    return to_one_shape


def _checking(semantic_class: Any, core: Any) -> Callable[..., Any]:
    """What two operands are cast to is found once for their types, and for a number once.

    They have one shape by their types; NumPy broadcasts what they hold.
    """
    check = semantic_class.binary_op_type_checking_impl
    tensor = core.tensor
    dtypes: dict[tuple[Any, ...], Any] = {}
    constants: dict[tuple[Any, ...], Any] = {}
    types: dict[tuple[Any, ...], Any] = {}

    def in_one_shape(semantic: Any, lhs: Any, rhs: Any) -> Any:
        if lhs.shape is rhs.shape:
            return lhs, rhs
        key = getattr(lhs.type, "shape", ()), getattr(rhs.type, "shape", ())
        if key not in types:
            types[key] = semantic.broadcast_impl_value(lhs, rhs)[0].type
        with_element = types[key].with_element_ty
        return (
            tensor(lhs.handle, with_element(lhs.dtype)),
            tensor(rhs.handle, with_element(rhs.dtype)),
        )

    def beside(semantic: Any, number: Any, other: Any, is_first: bool, how: Any) -> Any:
        key = type(number), repr(number), other.dtype.name, is_first, how  # not 0.0 for -0.0
        if key not in constants:
            made = check(semantic, *((number, other) if is_first else (other, number)), *how)
            constant, cast = made if is_first else made[::-1]
            constants[key] = semantic.scalar_constant(number, constant.dtype), cast.dtype
        constant, dtype = constants[key]
        return constant, other if other.dtype is dtype else semantic.cast(other, dtype)

    def checked(semantic: Any, lhs: Any, rhs: Any, *how: Any) -> Any:
        if type(lhs) is tensor and type(rhs) is tensor:
            key = lhs.dtype.name, rhs.dtype.name, how
            if key not in dtypes:
                dtypes[key] = [cast.dtype for cast in check(semantic, lhs, rhs, *how)]
            of_lhs, of_rhs = dtypes[key]
            if lhs.dtype is not of_lhs:
                lhs = semantic.cast(lhs, of_lhs)
            if rhs.dtype is not of_rhs:
                rhs = semantic.cast(rhs, of_rhs)
        elif type(lhs) is tensor and type(rhs) in (bool, int, float):
            rhs, lhs = beside(semantic, rhs, lhs, False, how)
        elif type(rhs) is tensor and type(lhs) in (bool, int, float):
            lhs, rhs = beside(semantic, lhs, rhs, True, how)
        else:
            return check(semantic, lhs, rhs, *how)
        return in_one_shape(semantic, lhs, rhs)

    return checked


def _unwrapping(core: Any) -> Callable[[Any], Any]:
    unwrap = core._unwrap_if_constexpr
    bare = {core.tensor, core.dtype, core.block_type, core.pointer_type, int, float, bool, str}

    def unwrapped(value: Any) -> Any:
        return value if type(value) in bare else unwrap(value)

    return unwrapped


def _equal(equal: Callable[..., bool]) -> Callable[..., bool]:
    return lambda self, other: self is other or equal(self, other)


def _with_element(core: Any) -> Callable[..., Any]:
    made: dict[tuple[Any, ...], Any] = {}

    def with_element_ty(self: Any, scalar_ty: Any) -> Any:
        key = scalar_ty.name, getattr(scalar_ty, "address_space", None), self.shape
        if key not in made:
            made[key] = core.block_type(scalar_ty, self.shape)
        return made[key]

    return with_element_ty


def _constant(scalar_constant: Callable[..., Any]) -> Callable[..., Any]:
    made: dict[tuple[Any, ...], Any] = {}

    def constant(semantic: Any, value: Any, dtype: Any) -> Any:
        # Not 0.0 for -0.0, nor 1 for True.
        key = type(value), repr(value), dtype.name
        if key not in made:
            made[key] = scalar_constant(semantic, value, dtype)
        return made[key]

    return constant


def _handle(self: Any, data: Any, dtype: Any, attr: dict[str, Any] | None = None) -> None:
    """Not asked whether its type has room for NumPy's, which `_get_np_dtype` has chosen."""
    self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr


def _leave_in_place(*_: Any) -> None:
    """Tensors lie on the CPU: what a kernel has written is there."""
