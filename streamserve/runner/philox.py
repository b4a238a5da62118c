"""A counter-based generator: the uniform of a token is a function of where the token stands.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
There is no state to keep, so neither preemption nor the company in a batch can change a draw.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Int64Array: TypeAlias = NDArray[np.int64]
UInt64Array: TypeAlias = NDArray[np.uint64]
Float64Array: TypeAlias = NDArray[np.float64]

_ROUNDS = 10
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)
_ROUND_NUMBERS = np.arange(_ROUNDS, dtype=np.uint64)[:, None, None]
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox4x32(counter: UInt64Array, key: UInt64Array) -> UInt64Array:
    """Ten rounds over counters ``[4, N]`` with keys ``[2, N]`` -> ``[4, N]``.

    Every entry is one 32-bit word held in a uint64.
    """
    round_keys = (key + _ROUND_NUMBERS * _WEYL) & _LOW  # [rounds, 2, N]
    even, odd = counter[0::2], counter[1::2]
    for round_key in round_keys:
        product = even * _MULTIPLIERS
        even = (product >> _HALF)[::-1] ^ odd ^ round_key
        odd = (product & _LOW)[::-1]
    words = np.empty_like(counter)
    words[0::2] = even
    words[1::2] = odd
    return words


def uniforms(
    seeds: Int64Array, choice_indices: Int64Array, output_positions: Int64Array
) -> Float64Array:
    """One draw from [0, 1) with 53 random bits per token; every argument is ``[N]`` int64.

    The seed is the key (any 64-bit value), position and choice index (both below 2³²) the counter.
    """
    seed_bits = seeds.view(np.uint64)
    key = np.stack((seed_bits & _LOW, seed_bits >> _HALF))
    counter = np.zeros((4, len(seeds)), dtype=np.uint64)
    counter[0] = output_positions
    counter[1] = choice_indices
    words = philox4x32(counter, key)
    # 27 and 26 high bits make one 53-bit fraction, as in Matsumoto and Nishimura's genrand_res53.
    high, low = words[0] >> np.uint64(5), words[1] >> np.uint64(6)
    fractions: Float64Array = (high * 67108864.0 + low) * (1.0 / 9007199254740992.0)
    return fractions
