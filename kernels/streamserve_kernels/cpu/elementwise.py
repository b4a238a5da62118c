"""Compiled bodies for what surrounds the matrix products: norms, rotary + cache write, activation.

At a decode step these touch a few kilobytes, so what counts is the cost of a call: one compiled
pass with raw pointers instead of a chain of torch operators at 5-10 µs each.
"""

# Numba infers the types of these functions: annotations would only repeat its work.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# ruff: noqa: ANN001, ANN202

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from streamserve_kernels.cpu.jit import (
    at,
    call_int,
    compile_body,
    copy,
    exp,
    float_of,
    get,
    inline,
    pointer,
    put,
    rounded,
)

# out, new residual or 0, x, residual or 0, weight or 0, bias or 0; rows, features, stride of a row
# of x and of the residual; eps, weight offset
NORM_LAYOUT = "6q4q2d"
# query, key, value, positions, cos_sin, key_cache or 0, value_cache, slots; strides of a token of
# the three; T, Hq, Hkv, D, Dv, rot_dim, S
ROTARY_LAYOUT = "8q3q7q"
# out, x; rows, features of out, stride of a row of x; a, b
GATED_LAYOUT = "2q3q2d"
# cache addresses, bytes of a block of each, src, dst; caches, copies
COPY_LAYOUT = "4q2q"


@inline
def _share(args, rows):
    """This thread's piece [begin, end) of the rows."""
    if args[0] == 0:
        return 0, rows
    thread, num_threads = call_int(args[0]), call_int(args[1])
    return rows * thread // num_threads, rows * (thread + 1) // num_threads


@inline
def _add_residual(h, x, residual, features):
    for i in range(features):
        put(h, i, get(x, i) + get(residual, i))


@lru_cache(maxsize=8)
def rms_norm_body(bits: int) -> Any:
    """See `naive.rms_norm`."""

    def body(args):
        weight = pointer(args[7], bits)
        rows, features = args[9], args[10]
        eps, offset = float_of(args[13]), float_of(args[14])
        begin, end = _share(args, rows)
        for row in range(begin, end):
            out = at(pointer(args[3], bits), row * features)
            h = at(pointer(args[5], bits), row * args[11])
            if args[6] != 0:
                x = h
                h = at(pointer(args[4], bits), row * features)
                _add_residual(h, x, at(pointer(args[6], bits), row * args[12]), features)
            squares = np.float32(0.0)
            for i in range(features):
                squares += get(h, i) * get(h, i)
            factor = np.float32(1.0) / np.sqrt(squares / np.float32(features) + eps)
            if offset == np.float32(0.0):
                for i in range(features):
                    put(out, i, rounded(out, get(h, i) * factor) * get(weight, i))
            else:
                for i in range(features):
                    put(out, i, get(h, i) * factor * (offset + get(weight, i)))

    return compile_body(body)


@lru_cache(maxsize=8)
def layer_norm_body(bits: int) -> Any:
    """See `naive.layer_norm`."""

    def body(args):
        weight, bias = pointer(args[7], bits), pointer(args[8], bits)
        rows, features = args[9], args[10]
        eps = float_of(args[13])
        begin, end = _share(args, rows)
        for row in range(begin, end):
            out = at(pointer(args[3], bits), row * features)
            h = at(pointer(args[5], bits), row * args[11])
            if args[6] != 0:
                x = h
                h = at(pointer(args[4], bits), row * features)
                _add_residual(h, x, at(pointer(args[6], bits), row * args[12]), features)
            total = np.float32(0.0)
            for i in range(features):
                total += get(h, i)
            mean = total / np.float32(features)
            squares = np.float32(0.0)
            for i in range(features):
                squares += (get(h, i) - mean) * (get(h, i) - mean)
            factor = np.float32(1.0) / np.sqrt(squares / np.float32(features) + eps)
            if args[7] == 0:
                for i in range(features):
                    put(out, i, (get(h, i) - mean) * factor)
            elif args[8] == 0:
                for i in range(features):
                    put(out, i, (get(h, i) - mean) * factor * get(weight, i))
            else:
                for i in range(features):
                    put(out, i, (get(h, i) - mean) * factor * get(weight, i) + get(bias, i))

    return compile_body(body)


@inline
def _rotate_half(x, cos_sin, half):
    for i in range(half):
        a, b = get(x, i), get(x, i + half)
        cos, sin = cos_sin[i], cos_sin[i + half]
        put(x, i, a * cos - b * sin)
        put(x, i + half, b * cos + a * sin)


@inline
def _rotate_pairs(x, cos_sin, half):
    for i in range(half):
        a, b = get(x, 2 * i), get(x, 2 * i + 1)
        cos, sin = cos_sin[i], cos_sin[i + half]
        put(x, 2 * i, a * cos - b * sin)
        put(x, 2 * i + 1, b * cos + a * sin)


@lru_cache(maxsize=8)
def rotary_write_body(bits: int, interleaved: bool) -> Any:
    """`naive.rotary_write_kv`; rot_dim 0 leaves out the rotation, a cache at 0 the write."""
    rotate = int(interleaved)

    def body(args):
        positions, slots = pointer(args[6], 64), pointer(args[10], 64)
        tokens, num_heads, num_kv_heads = args[14], args[15], args[16]
        head_size, value_size, rot_dim, block_size = args[17], args[18], args[19], args[20]
        half = rot_dim // 2
        begin, end = _share(args, tokens)
        for t in range(begin, end):
            query = at(pointer(args[3], bits), t * args[11])
            key = at(pointer(args[4], bits), t * args[12])
            value = at(pointer(args[5], bits), t * args[13])
            if rot_dim > 0:
                cos_sin = at(pointer(args[7], 32), positions[t] * rot_dim)
                for h in range(num_heads + num_kv_heads):
                    x = at(query, h * head_size)
                    if h >= num_heads:
                        x = at(key, (h - num_heads) * head_size)
                    if rotate == 1:
                        _rotate_pairs(x, cos_sin, half)
                    else:
                        _rotate_half(x, cos_sin, half)
            if args[8] == 0 or slots[t] < 0:
                continue
            key_cache, value_cache = pointer(args[8], bits), pointer(args[9], bits)
            block, offset = slots[t] // block_size, slots[t] % block_size
            for h in range(num_kv_heads):
                place = (block * num_kv_heads + h) * block_size + offset
                copy(at(key_cache, place * head_size), at(key, h * head_size), head_size)
                copy(at(value_cache, place * value_size), at(value, h * value_size), value_size)

    return compile_body(body)


@lru_cache(maxsize=8)
def gated_body(bits: int) -> Any:
    """x·sigmoid(a·x + b·x³)·up: SiLU (1, 0) and GELU's tanh form (√(8/π), 0.044715·√(8/π))."""

    def body(args):
        rows, features = args[5], args[6]
        a, b = float_of(args[8]), float_of(args[9])
        one = np.float32(1.0)
        # the unit of work is a piece of a row, so that one row can use every thread
        piece = 512
        pieces = (features + piece - 1) // piece
        begin, end = _share(args, rows * pieces)
        for unit in range(begin, end):
            row, first = unit // pieces, unit % pieces * piece
            out = at(pointer(args[3], bits), row * features + first)
            gate = at(pointer(args[4], bits), row * args[7] + first)
            up = at(gate, features)
            for i in range(min(piece, features - first)):
                x = get(gate, i)
                # the bound keeps 0·x² from being 0·inf; the sigmoid is flat long before it
                square = min(x * x, np.float32(1e6))
                sigmoid = one / (one + exp(-(a + b * square) * x))
                put(out, i, x * sigmoid * get(up, i))

    return compile_body(body)


@lru_cache(maxsize=1)
def copy_blocks_body() -> Any:
    """See `naive.copy_blocks`; the unit of work is one block of one cache."""

    def body(args):
        caches, sizes = pointer(args[3], 64), pointer(args[4], 64)
        src, dst = pointer(args[5], 64), pointer(args[6], 64)
        copies = args[8]
        begin, end = _share(args, args[7] * copies)
        for unit in range(begin, end):
            cache, c = unit // copies, unit % copies
            base = pointer(caches[cache], 8)
            size = sizes[cache]
            copy(at(base, dst[c] * size), at(base, src[c] * size), size)

    return compile_body(body)
