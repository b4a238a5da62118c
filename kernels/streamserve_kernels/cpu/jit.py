"""What the Numba kernels are written in: raw pointers, bfloat16, an exp that vectorises.

A kernel body is a C function `void body(int64 *args)`: addresses, sizes and the bits of float64
scalars, packed by the caller. The first three slots are filled by `pool`: the addresses of
`omp_get_thread_num`, `omp_get_num_threads` and `GOMP_barrier` (0 where there is no libgomp).
Bodies are made by factories whose closures hold plain ints and bools only, because those are what
Numba's disk cache can tell apart from one process to the next; function addresses travel in the
arguments for the same reason.

Numba knows no bfloat16: elements are read as uint16 and widened by a shift.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numba
from llvmlite import ir
from numba import extending, types
from numba.core import cgutils, errors

from streamserve_kernels.cpu.vector import bf16_to_f32, exp_f32, f32_to_bf16

I32 = ir.IntType(32)

# Sums may be reordered and fused (the vectoriser needs that); infinities and NaNs keep their
# meaning, since masks are built from them.
FASTMATH = {"reassoc", "contract", "nsz", "arcp"}

# Numba's decorators, as mypy may see them: what they return is called with other arguments.
intrinsic = cast(Callable[..., Any], extending.intrinsic)
inline = cast(Callable[..., Any], numba.njit(inline="always"))
literal_intrinsic = cast(Callable[..., Any], extending.intrinsic(prefer_literal=True))

pointer_to = cast(Callable[[Any], Any], types.CPointer)


@dataclass(slots=True)
class _Count:
    value: int = 0


_compiled = _Count()


def compilations() -> int:
    """Kernel bodies compiled, or read from the disk cache, by this process so far."""
    return _compiled.value


@lru_cache(maxsize=1)
def _toolkit_fingerprint() -> str:
    """Changes with the sources that bodies inline: Numba's cache follows only a body's own file."""
    folder = Path(__file__).parent
    sources = (folder / name for name in ("jit.py", "simd.py", "vector.py"))
    return f"{zlib.crc32(b''.join(source.read_bytes() for source in sources)):08x}"


@lru_cache(maxsize=1)
def _say_uncached() -> None:
    """Once: `warnings` forgets what it has shown whenever somebody changes its filters."""
    warnings.warn(
        "compiled kernels cannot be kept for the next start: neither their folder nor the user's "
        "cache may be written to (NUMBA_CACHE_DIR names another place)",
        stacklevel=3,
    )


def compile_body(body: Callable[..., None]) -> Any:
    """Compiles `body(args)` to a C function; its `.address` goes to `pool.run`."""
    _compiled.value += 1
    body.__qualname__ += f"_{_toolkit_fingerprint()}"
    signature = types.void(pointer_to(types.int64))
    options: dict[str, Any] = {"fastmath": FASTMATH, "error_model": "numpy"}
    try:
        return numba.cfunc(signature, cache=True, **options)(body)
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
        _say_uncached()
        return numba.cfunc(signature, **options)(body)


@literal_intrinsic
def pointer(_context: Any, address: Any, bits: Any) -> Any:
    """Address -> pointer: 8 bytes, 16 bfloat16 (as uint16), 32 float32, -32 int32, 64 int64."""
    kinds = {8: types.uint8, 16: types.uint16, 32: types.float32, -32: types.int32, 64: types.int64}
    if not isinstance(bits, types.IntegerLiteral):
        raise errors.RequireLiteralValue("pointer needs a literal element kind")
    kind = pointer_to(kinds[bits.literal_value])

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(kind))

    return kind(types.int64, bits), codegen


@intrinsic
def at(_context: Any, base: Any, _offset: Any) -> Any:
    """Pointer arithmetic: base + offset elements."""

    def codegen(_ctx: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.gep(args[0], [args[1]])

    return base(base, types.int64), codegen


@intrinsic
def call_int(_context: Any, _address: Any) -> Any:
    """Calls the C function `int f(void)` at an address."""

    def codegen(_ctx: Any, builder: Any, _signature: Any, args: Any) -> Any:
        function = ir.FunctionType(I32, [])
        result = builder.call(builder.inttoptr(args[0], function.as_pointer()), [])
        return builder.sext(result, ir.IntType(64))

    return types.int64(types.int64), codegen


@intrinsic
def call_void(_context: Any, _address: Any) -> Any:
    """Calls the C function `void f(void)` at an address."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        function = ir.FunctionType(ir.VoidType(), [])
        builder.call(builder.inttoptr(args[0], function.as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def float_of(_context: Any, _bits: Any) -> Any:
    """The float64 whose bits are in an argument slot, as float32."""

    def codegen(_ctx: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.fptrunc(builder.bitcast(args[0], ir.DoubleType()), ir.FloatType())

    return types.float32(types.int64), codegen


@intrinsic
def get(_context: Any, base: Any, _index: Any) -> Any:
    """base[index] as float32: bfloat16 (uint16) is widened by a shift."""

    def codegen(_ctx: Any, builder: Any, _signature: Any, args: Any) -> Any:
        value = builder.load(builder.gep(args[0], [args[1]]))
        return value if base.dtype == types.float32 else bf16_to_f32(builder, value)

    return types.float32(base, types.int64), codegen


@intrinsic
def put(_context: Any, base: Any, _index: Any, _value: Any) -> Any:
    """base[index] = value (float32), rounded to the nearest even bfloat16 where base is one."""

    def codegen(ctx: Any, builder: Any, _signature: Any, args: Any) -> Any:
        target, index, value = args
        narrow = value if base.dtype == types.float32 else f32_to_bf16(builder, value)
        builder.store(narrow, builder.gep(target, [index]))
        return ctx.get_dummy_value()

    return types.void(base, types.int64, types.float32), codegen


@intrinsic
def rounded(_context: Any, base: Any, _value: Any) -> Any:
    """The value (float32) as it would come back from being stored at base."""

    def codegen(_ctx: Any, builder: Any, _signature: Any, args: Any) -> Any:
        if base.dtype == types.float32:
            return args[1]
        return bf16_to_f32(builder, f32_to_bf16(builder, args[1]))

    return types.float32(base, types.float32), codegen


@intrinsic
def copy(_context: Any, target: Any, _source: Any, _count: Any) -> Any:
    """Copies count elements between ranges that do not overlap."""
    size = target.dtype.bitwidth // 8

    def codegen(ctx: Any, builder: Any, _signature: Any, args: Any) -> Any:
        count = builder.mul(args[2], ir.Constant(ir.IntType(64), size))
        cast(Any, cgutils).raw_memcpy(builder, args[0], args[1], count, 1)
        return ctx.get_dummy_value()

    return types.void(target, target, types.int64), codegen


@intrinsic
def exp(_context: Any, _value: Any) -> Any:
    """e**x in float32 within 2 ulp, branch-free so that loops over it vectorise; 0 below -87."""

    def codegen(_ctx: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return exp_f32(builder, args[0])

    return types.float32(types.float32), codegen
