"""Row operations for Numba bodies, unrolled over a head: each is one intrinsic of vector IR.

Left to the auto-vectoriser these short loops spend their time in alias checks and remainders;
written out, a head of 64 is four vector operations. Pointers are float32 or bfloat16 (uint16).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import errors

from streamserve_kernels.cpu.jit import literal_intrinsic
from streamserve_kernels.cpu.vector import (
    I32,
    LANES,
    add_lanes,
    add_lanes_of,
    call_math,
    chunks,
    declare,
    load_f32,
    splat,
    store_f32,
)


def _literal(kind: Any) -> int:
    if not isinstance(kind, types.IntegerLiteral):
        raise errors.RequireLiteralValue("a row operation needs a literal size")
    return int(kind.literal_value)


@literal_intrinsic
def dot(_context: Any, a: Any, b: Any, size: Any) -> Any:
    """Sum of a[i]·b[i] over `size` elements, in float32, in lanes: the order never varies."""
    pieces = chunks(_literal(size))

    def codegen(_ctx: Any, builder: Any, _signature: Any, args: Any) -> Any:
        sums: dict[tuple[int, int], Any] = {}
        for index, (offset, lanes) in enumerate(pieces):
            x = load_f32(builder, args[0], offset, lanes)
            y = load_f32(builder, args[1], offset, lanes)
            # two chains hide the latency of fma behind each other
            chain = (lanes, index % 2)
            if chain in sums:
                sums[chain] = call_math(builder, "fma", x, y, sums[chain])
            else:
                sums[chain] = builder.fmul(x, y)
        wide = [value for (lanes, _), value in sums.items() if lanes == pieces[0][1]]
        total = add_lanes(builder, wide[0] if len(wide) == 1 else builder.fadd(*wide))
        for (lanes, _), value in sums.items():
            if lanes != pieces[0][1]:
                total = builder.fadd(total, add_lanes(builder, value))
        return total

    return types.float32(a, b, size), codegen


@literal_intrinsic
def dots16(_context: Any, out: Any, a: Any, rows: Any, size: Any) -> Any:
    """Does out[s] = a · rows[s] for 16 rows of float32, `size` (a multiple of 16) apart."""
    length = _literal(size)

    def codegen(ctx: Any, builder: Any, _signature: Any, args: Any) -> Any:
        out, a, rows, _ = args
        products: list[Any] = [None] * LANES
        for offset in range(0, length, LANES):
            x = load_f32(builder, a, offset)
            for s in range(LANES):
                y = load_f32(builder, rows, s * length + offset)
                if products[s] is None:
                    products[s] = builder.fmul(x, y)
                else:
                    products[s] = call_math(builder, "fma", x, y, products[s])
        store_f32(builder, add_lanes_of(builder, products), out, 0)
        return ctx.get_dummy_value()

    return types.void(out, a, rows, size), codegen


@literal_intrinsic
def add_scaled16(_context: Any, target: Any, rows: Any, weights: Any, size: Any) -> Any:
    """Does target += weights[:16] @ rows[:16]; rows are `size` apart."""
    length = _literal(size)

    def codegen(ctx: Any, builder: Any, _signature: Any, args: Any) -> Any:
        target, rows, weights, _ = args
        index = [ir.Constant(ir.IntType(64), s) for s in range(LANES)]
        scalars = [builder.load(builder.gep(weights, [i])) for i in index]
        for offset, lanes in chunks(length):
            # two chains hide the latency of fma
            totals = [load_f32(builder, target, offset, lanes), None]
            for s, scalar in enumerate(scalars):
                value = load_f32(builder, rows, s * length + offset, lanes)
                weight = splat(builder, scalar, lanes)
                before = totals[s % 2]
                totals[s % 2] = (
                    builder.fmul(weight, value)
                    if before is None
                    else call_math(builder, "fma", weight, value, before)
                )
            store_f32(builder, builder.fadd(*totals), target, offset)
        return ctx.get_dummy_value()

    return types.void(target, rows, weights, size), codegen


@literal_intrinsic
def prefetch(_context: Any, base: Any, nbytes: Any) -> Any:
    """Asks for `nbytes` from base on to be brought into the second-level cache."""
    length = _literal(nbytes)

    def codegen(ctx: Any, builder: Any, _signature: Any, args: Any) -> Any:
        bytes_pointer = ir.IntType(8).as_pointer()
        function = declare(
            builder, "llvm.prefetch.p0", ir.VoidType(), [bytes_pointer, I32, I32, I32]
        )
        start = builder.bitcast(args[0], bytes_pointer)
        for offset in range(0, length, 64):
            line = builder.gep(start, [ir.Constant(ir.IntType(64), offset)])
            builder.call(function, [line, *(ir.Constant(I32, n) for n in (0, 2, 1))])
        return ctx.get_dummy_value()

    return types.void(base, nbytes), codegen


@literal_intrinsic
def add_scaled4(
    _context: Any,
    target: Any,
    rows: Any,
    _p0: Any,
    _p1: Any,
    _p2: Any,
    _p3: Any,
    size: Any,
) -> Any:
    """Does target += p0·rows[0] + p1·rows[1] + p2·rows[2] + p3·rows[3]; rows are `size` apart."""
    length = _literal(size)

    def codegen(ctx: Any, builder: Any, _signature: Any, args: Any) -> Any:
        weights = {
            lanes: [splat(builder, p, lanes) for p in args[2:6]] for _, lanes in chunks(length)
        }
        for offset, lanes in chunks(length):
            total = load_f32(builder, args[0], offset, lanes)
            for row, weight in enumerate(weights[lanes]):
                value = load_f32(builder, args[1], row * length + offset, lanes)
                total = call_math(builder, "fma", weight, value, total)
            store_f32(builder, total, args[0], offset)
        return ctx.get_dummy_value()

    f32 = types.float32
    return types.void(target, rows, f32, f32, f32, f32, size), codegen


@literal_intrinsic
def add_scaled(_context: Any, target: Any, row: Any, _p: Any, size: Any) -> Any:
    """Does target += p·row."""
    length = _literal(size)

    def codegen(ctx: Any, builder: Any, _signature: Any, args: Any) -> Any:
        for offset, lanes in chunks(length):
            total = load_f32(builder, args[0], offset, lanes)
            value = load_f32(builder, args[1], offset, lanes)
            total = call_math(builder, "fma", splat(builder, args[2], lanes), value, total)
            store_f32(builder, total, args[0], offset)
        return ctx.get_dummy_value()

    return types.void(target, row, types.float32, size), codegen


@literal_intrinsic
def scale_into(_context: Any, target: Any, source: Any, _factor: Any, size: Any) -> Any:
    """Does target = factor·source: also how a row is widened, narrowed or cleared."""
    length = _literal(size)

    def codegen(ctx: Any, builder: Any, _signature: Any, args: Any) -> Any:
        for offset, lanes in chunks(length):
            value = load_f32(builder, args[1], offset, lanes)
            value = builder.fmul(value, splat(builder, args[2], lanes))
            store_f32(builder, value, args[0], offset)
        return ctx.get_dummy_value()

    return types.void(target, source, types.float32, size), codegen


@literal_intrinsic
def fill(_context: Any, target: Any, _value: Any, size: Any) -> Any:
    """target[:size] = value."""
    length = _literal(size)

    def codegen(ctx: Any, builder: Any, _signature: Any, args: Any) -> Any:
        for offset, lanes in chunks(length):
            store_f32(builder, splat(builder, args[1], lanes), args[0], offset)
        return ctx.get_dummy_value()

    return types.void(target, types.float32, size), codegen
