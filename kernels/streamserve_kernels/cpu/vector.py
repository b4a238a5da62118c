"""LLVM building blocks on scalars and vectors alike: bfloat16 both ways, exp, dot products.

Generic vector IR, no machine intrinsics: LLVM lowers 16 lanes of float32 to one AVX-512 register,
two AVX2 ones or four NEON ones.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

F32 = ir.FloatType()
I16 = ir.IntType(16)
I32 = ir.IntType(32)
LANES = 16


def constant_like(value: Any, scalar: ir.Type, number: float) -> ir.Constant:
    """A number of type `scalar`, in as many lanes as `value` has."""
    if isinstance(value.type, ir.VectorType):
        return ir.Constant(ir.VectorType(scalar, value.type.count), [number] * value.type.count)
    return ir.Constant(scalar, number)


def _type_like(value: Any, scalar: ir.Type) -> ir.Type:
    if isinstance(value.type, ir.VectorType):
        return ir.VectorType(scalar, value.type.count)
    return scalar


def bf16_to_f32(builder: ir.IRBuilder, value: Any) -> Any:
    """A bfloat16 is the upper half of a float32."""
    bits = builder.zext(value, _type_like(value, I32))
    bits = builder.shl(bits, constant_like(bits, I32, 16))
    return builder.bitcast(bits, _type_like(value, F32))


def f32_to_bf16(builder: ir.IRBuilder, value: Any) -> Any:
    """Rounds to nearest even; a NaN keeps its upper half with the quiet bit set."""
    bits = builder.bitcast(value, _type_like(value, I32))

    def number(n: int) -> ir.Constant:
        return constant_like(bits, I32, n)

    upper = builder.lshr(bits, number(16))
    odd = builder.and_(upper, number(1))
    rounded = builder.lshr(builder.add(builder.add(bits, number(0x7FFF)), odd), number(16))
    quiet = builder.or_(upper, number(0x40))
    chosen = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
    return builder.trunc(chosen, _type_like(value, I16))


def call_math(builder: ir.IRBuilder, name: str, *args: Any) -> Any:
    """One of LLVM's own functions (`fma`, `maxnum`, …) on scalars or vectors."""
    kind = args[0].type
    suffix = f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"
    function = declare(builder, f"llvm.{name}.{suffix}", kind, [kind] * len(args))
    return builder.call(function, args)


def declare(builder: ir.IRBuilder, name: str, result: Any, args: list[Any]) -> Any:
    """The declaration of an LLVM function, once per module."""
    module = builder.module
    existing = module.globals.get(name)
    return existing or ir.Function(module, ir.FunctionType(result, args), name)


def exp_f32(builder: ir.IRBuilder, x: Any) -> Any:
    """e**x = 2**n * e**r with |r| <= ln(2)/2; a degree-6 polynomial (Cephes expf)."""

    def number(n: float) -> ir.Constant:
        return constant_like(x, F32, n)

    x = call_math(builder, "maxnum", x, number(-87.0))
    x = call_math(builder, "minnum", x, number(88.0))
    n = call_math(builder, "rint", builder.fmul(x, number(1.4426950408889634)))
    r = call_math(builder, "fma", n, number(-0.693359375), x)
    r = call_math(builder, "fma", n, number(2.12194440e-4), r)
    poly = number(1.9875691500e-4)
    for coefficient in (
        1.3981999507e-3,
        8.3334519073e-3,
        4.1665795894e-2,
        1.6666665459e-1,
        5.0000001201e-1,
    ):
        poly = call_math(builder, "fma", poly, r, number(coefficient))
    square = builder.fmul(r, r)
    poly = call_math(builder, "fma", poly, square, builder.fadd(r, number(1.0)))
    exponent = builder.fptosi(n, _type_like(x, I32))
    exponent = builder.add(exponent, constant_like(exponent, I32, 127))
    power = builder.shl(exponent, constant_like(exponent, I32, 23))
    return builder.fmul(poly, builder.bitcast(power, _type_like(x, F32)))


def load_f32(builder: ir.IRBuilder, base: Any, offset: int, lanes: int = LANES) -> Any:
    """Elements [offset, offset + lanes) of a float32 or bfloat16 (i16) pointer as float32 lanes."""
    element = base.type.pointee
    place = builder.gep(base, [ir.Constant(ir.IntType(64), offset)])
    place = builder.bitcast(place, ir.VectorType(element, lanes).as_pointer())
    value = builder.load(place, align=element_bytes(element))
    return value if element == F32 else bf16_to_f32(builder, value)


def store_f32(builder: ir.IRBuilder, value: Any, base: Any, offset: int) -> None:
    """Stores float32 lanes at base[offset:], rounded where base is bfloat16."""
    element = base.type.pointee
    narrow = value if element == F32 else f32_to_bf16(builder, value)
    place = builder.gep(base, [ir.Constant(ir.IntType(64), offset)])
    place = builder.bitcast(place, narrow.type.as_pointer())
    builder.store(narrow, place, align=element_bytes(element))


def element_bytes(element: ir.Type) -> int:
    return 4 if element == F32 else 2


def splat(builder: ir.IRBuilder, scalar: Any, lanes: int = LANES) -> Any:
    """One scalar in every lane."""
    kind = ir.VectorType(scalar.type, lanes)
    single = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(I32, 0))
    mask = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
    return builder.shuffle_vector(single, ir.Constant(kind, ir.Undefined), mask)


def add_lanes(builder: ir.IRBuilder, value: Any) -> Any:
    """The sum over lanes, as a tree."""
    lanes = value.type.count
    while lanes > 1:
        lanes //= 2
        kind = ir.VectorType(I32, lanes)
        low = ir.Constant(kind, list(range(lanes)))
        high = ir.Constant(kind, list(range(lanes, 2 * lanes)))
        value = builder.fadd(
            builder.shuffle_vector(value, value, low), builder.shuffle_vector(value, value, high)
        )
    return builder.extract_element(value, ir.Constant(I32, 0))


def add_lanes_of(builder: ir.IRBuilder, rows: list[Any]) -> Any:
    """One vector of the lane sums of 16 vectors, in order: 4 levels of pairwise adds.

    A level adds the two halves of every run of lanes: 45 operations in place of 16 trees of 8.
    """
    run = LANES
    while len(rows) > 1:
        low = [i for start in range(0, 2 * LANES, run) for i in range(start, start + run // 2)]
        masks = [
            ir.Constant(ir.VectorType(I32, LANES), [i + shift for i in low])
            for shift in (0, run // 2)
        ]
        rows = [
            builder.fadd(*(builder.shuffle_vector(a, b, mask) for mask in masks))
            for a, b in zip(rows[0::2], rows[1::2], strict=True)
        ]
        run //= 2
    return rows[0]


def chunks(size: int) -> list[tuple[int, int]]:
    """(offset, lanes) pieces of a row: 16 lanes each, then 8, 4, 2, 1 for what is left."""
    pieces, offset = [], 0
    while offset < size:
        lanes = LANES
        while lanes > size - offset:
            lanes //= 2
        pieces.append((offset, lanes))
        offset += lanes
    return pieces
