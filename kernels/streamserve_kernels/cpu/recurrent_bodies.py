"""Compiled bodies for layers with a state: convolutions, gated delta rules, state spaces."""

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
    get,
    inline,
    pointer,
    put,
)

# Channels that a thread takes at once, and their sums in its scratch.
CONV_PIECE = 128
# out, x, taps [W, C], bias or 0, states; slots, saves, query_start_loc, seq_lens; scratch; stride
# of a row of x; T, R, C, W, whether SiLU follows
CONV_LAYOUT = "10q6q"
# out, query, key, value, beta, share that is kept, states; slots, saves, query_start_loc, seq_lens;
# scratch, floats of it for each thread; stride of a row of values; R, Hk, Hv, D, Dv
DELTA_LAYOUT = "11q2q6q"
# out, x, B, C, time steps, share that is kept, skip, states; slots, saves, query_start_loc,
# seq_lens; scratch, floats of it for each thread; stride of a row of x, B and C; R, G, H, N, P
SPACE_LAYOUT = "12q2q6q"


@inline
def _share(args, units):
    """This thread's number, and its piece [begin, end) of the units."""
    if args[0] == 0:
        return 0, 0, units
    thread, num_threads = call_int(args[0]), call_int(args[1])
    return thread, units * thread // num_threads, units * (thread + 1) // num_threads


@inline
def _clear(target, count):
    for i in range(count):
        put(target, i, np.float32(0.0))


@inline
def _add_products(sums, a, b, count):
    for i in range(count):
        sums[i] += get(a, i) * get(b, i)


@inline
def _start(sums, bias, has_none, first, count):
    if has_none:
        _clear(sums, count)
    else:
        copy(sums, at(bias, first), count)


@inline
def _finish(y, sums, is_plain, count):
    one = np.float32(1.0)
    if is_plain:
        for i in range(count):
            put(y, i, sums[i])
    else:
        for i in range(count):
            put(y, i, sums[i] / (one + exp(-sums[i])))


@inline
def _keep_inputs(states, target, slot, x, stride, row, begin, is_new, width, channels, count):
    """The inputs behind the oldest become those of slot `target`."""
    for w in range(1, width):
        to = at(states, (target * (width - 1) + w - 1) * channels)
        token = row - (width - 1) + w
        if token >= begin:
            copy(to, at(x, token * stride), count)
        elif is_new:
            _clear(to, count)
        else:
            kept = slot * (width - 1) + token - begin + width - 1
            copy(to, at(states, kept * channels), count)


@lru_cache(maxsize=4)
def conv_body(bits: int) -> Any:
    """See `recurrent.causal_conv`. By channels: a slot is written while its rows are read."""
    piece = CONV_PIECE

    def body(args):
        out, x, states = pointer(args[3], bits), pointer(args[4], bits), pointer(args[7], bits)
        taps, bias = pointer(args[5], 32), pointer(args[6], 32)
        slots, saves = pointer(args[8], -32), pointer(args[9], -32)
        starts, lengths = pointer(args[10], -32), pointer(args[11], -32)
        stride, tokens, requests = args[13], args[14], args[15]
        channels, width = args[16], args[17]
        thread, begin_unit, end_unit = _share(args, (channels + piece - 1) // piece)
        sums = at(pointer(args[12], 32), thread * piece)
        for unit in range(begin_unit, end_unit):
            first = unit * piece
            count = min(piece, channels - first)
            for r in range(requests):
                begin, end, slot = starts[r], starts[r + 1], slots[r]
                is_new = slot < 0 or lengths[r] == end - begin
                for row in range(begin, end):
                    _start(sums, bias, args[6] == 0, first, count)
                    for w in range(width):
                        token = row - (width - 1) + w
                        tap = at(taps, w * channels + first)
                        if token >= begin:
                            _add_products(sums, tap, at(x, token * stride + first), count)
                        elif not is_new:
                            kept = slot * (width - 1) + token - begin + width - 1
                            place = at(states, kept * channels + first)
                            _add_products(sums, tap, place, count)
                    y = at(out, row * channels + first)
                    _finish(y, sums, args[18] == 0, count)
                    for last in range(2):
                        target = slot if last == 1 else saves[row]
                        if target >= 0 and (last == 0 or row == end - 1):
                            _keep_inputs(
                                at(states, first),
                                target,
                                slot,
                                at(x, first),
                                stride,
                                row,
                                begin,
                                is_new,
                                width,
                                channels,
                                count,
                            )
            for row in range(starts[requests], tokens):
                _clear(at(out, row * channels + first), count)

    return compile_body(body)


def rule_scratch(key_size: int, value_size: int) -> int:
    """Float32 elements for each thread: three rows of columns, and a state that nothing keeps."""
    return (3 + key_size) * value_size


@inline
def _add_row(sums, factor, row, count):
    for i in range(count):
        sums[i] += factor * row[i]


@inline
def _add_four_rows(sums, factors, rows, count):
    """Sums += factors[:4] @ rows[:4]."""
    a, b, c, d = factors[0], factors[1], factors[2], factors[3]
    for i in range(count):
        sums[i] += (a * rows[i] + b * rows[count + i]) + (
            c * rows[2 * count + i] + d * rows[3 * count + i]
        )


@inline
def _add_rows(sums, factors, rows, size, count):
    """Sums += factors @ rows [size, count]."""
    whole = size // 4 * 4
    for d in range(0, whole, 4):
        _add_four_rows(sums, at(factors, d), at(rows, d * count), count)
    for d in range(whole, size):
        _add_row(sums, factors[d], at(rows, d * count), count)


@inline
def _update(state, kept, key, delta, size, count):
    """State [size, count] = kept * state + key deltaᵀ."""
    for d in range(size):
        line, factor = at(state, d * count), key[d]
        for i in range(count):
            line[i] = kept * line[i] + factor * delta[i]


@lru_cache(maxsize=1)
def delta_body() -> Any:
    """`recurrent.gated_delta_rule` of what `delta_rule_inputs` gives, all float32.

    With p = kᵀS and r = qᵀS of the state before a token, y is g r + (q·k) delta. The unit of work
    is one head of one sequence; those of a head belong to one thread, or to two.
    """

    def body(args):
        beta, kept_share = pointer(args[7], 32), pointer(args[8], 32)
        slots, saves = pointer(args[10], -32), pointer(args[11], -32)
        starts, lengths = pointer(args[12], -32), pointer(args[13], -32)
        requests, key_heads, heads = args[17], args[18], args[19]
        size, columns = args[20], args[21]
        zero = np.float32(0.0)
        thread, begin_unit, end_unit = _share(args, heads * requests)
        by_key = at(pointer(args[14], 32), thread * args[15])
        by_query, delta, own = at(by_key, columns), at(by_key, 2 * columns), at(by_key, 3 * columns)
        for unit in range(begin_unit, end_unit):
            head, r = unit // requests, unit % requests
            key_head = head // (heads // key_heads)
            begin, end, slot = starts[r], starts[r + 1], slots[r]
            if begin == end:
                continue
            states = pointer(args[9], 32)
            state = own
            if slot >= 0:
                state = at(states, (slot * heads + head) * size * columns)
            if slot < 0 or lengths[r] == end - begin:
                _clear(state, size * columns)
            for row in range(begin, end):
                query = at(pointer(args[4], 32), (row * key_heads + key_head) * size)
                key = at(pointer(args[5], 32), (row * key_heads + key_head) * size)
                value = at(pointer(args[6], 32), row * args[16] + head * columns)
                out = at(pointer(args[3], 32), (row * heads + head) * columns)
                kept = kept_share[row * heads + head]
                written = beta[row * heads + head]
                _clear(by_key, columns)
                _clear(by_query, columns)
                _add_rows(by_key, key, state, size, columns)
                _add_rows(by_query, query, state, size, columns)
                both = zero
                for d in range(size):
                    both += query[d] * key[d]
                for i in range(columns):
                    delta[i] = written * (value[i] - kept * by_key[i])
                for i in range(columns):
                    out[i] = kept * by_query[i] + both * delta[i]
                _update(state, kept, key, delta, size, columns)
                if saves[row] >= 0:
                    place = (saves[row] * heads + head) * size * columns
                    copy(at(states, place), state, size * columns)

    return compile_body(body)


@lru_cache(maxsize=1)
def space_body() -> Any:
    """`recurrent.state_space_scan`, all float32; units as in `delta_body`."""

    def body(args):
        times, kept_share = pointer(args[7], 32), pointer(args[8], 32)
        slots, saves = pointer(args[11], -32), pointer(args[12], -32)
        starts, lengths = pointer(args[13], -32), pointer(args[14], -32)
        stride, requests, groups, heads = args[17], args[18], args[19], args[20]
        size, columns = args[21], args[22]
        thread, begin_unit, end_unit = _share(args, heads * requests)
        delta = at(pointer(args[15], 32), thread * args[16])
        own = at(delta, columns)
        for unit in range(begin_unit, end_unit):
            head, r = unit // requests, unit % requests
            group = head // (heads // groups)
            begin, end, slot = starts[r], starts[r + 1], slots[r]
            if begin == end:
                continue
            skip = pointer(args[9], 32)[head]
            states = pointer(args[10], 32)
            state = own
            if slot >= 0:
                state = at(states, (slot * heads + head) * size * columns)
            if slot < 0 or lengths[r] == end - begin:
                _clear(state, size * columns)
            for row in range(begin, end):
                x = at(pointer(args[4], 32), row * stride + head * columns)
                b = at(pointer(args[5], 32), row * stride + group * size)
                c = at(pointer(args[6], 32), row * stride + group * size)
                out = at(pointer(args[3], 32), (row * heads + head) * columns)
                time = times[row * heads + head]
                for i in range(columns):
                    delta[i] = time * x[i]
                    out[i] = skip * x[i]
                _update(state, kept_share[row * heads + head], b, delta, size, columns)
                _add_rows(out, c, state, size, columns)
                if saves[row] >= 0:
                    place = (saves[row] * heads + head) * size * columns
                    copy(at(states, place), state, size * columns)

    return compile_body(body)
