// The intrinsics of these sources on every CPU that they are built for: what a CPU lacks is made of
// what came before it, under Intel's names.
#ifndef STREAMSERVE_SIMD_H
#define STREAMSERVE_SIMD_H

#include <immintrin.h>
#include <stdint.h>

#define SS_INLINE static inline __attribute__((always_inline))

#ifndef __AVX512F__
#include "avx2.h"
#endif

#ifdef __AVX512BF16__

// What a product takes of a row: pairs as they are.
typedef uint16_t ss_factor;

#else

// What a product takes of a row: it is widened once for many multiply-adds.
typedef float ss_factor;

// A pair's second element is the upper half of its 32 bits, and so a float but for the lower half.
SS_INLINE __m512 ss_first_of_pairs(__m512bh pairs) {
    return _mm512_castsi512_ps(_mm512_slli_epi32((__m512i)pairs, 16));
}

SS_INLINE __m512 ss_second_of_pairs(__m512bh pairs) {
    return _mm512_castsi512_ps(
        _mm512_and_si512((__m512i)pairs, _mm512_set1_epi32((int)0xffff0000u)));
}

#endif

#if defined(__AVX512F__) && !defined(__AVX512BF16__)

// VDPBF16PS, which adds the second products first; here they are fused, and denormals count.
SS_INLINE __m512 ss_dpbf16(__m512 sums, __m512bh a, __m512bh b) {
    sums = _mm512_fmadd_ps(ss_second_of_pairs(a), ss_second_of_pairs(b), sums);
    return _mm512_fmadd_ps(ss_first_of_pairs(a), ss_first_of_pairs(b), sums);
}

// VCVTNEPS2BF16 in the lower halves of 32 bits: to the nearest, ties to even; denormals stay.
SS_INLINE __m512i ss_nearest_bf16(__m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_srli_epi32(_mm512_mask_mov_epi32(up, nan, quiet), 16);
}

SS_INLINE __m256i ss_cvtneps(__m512 value) {
    return _mm512_cvtepi32_epi16(ss_nearest_bf16(value));
}

// Like VCVTNE2PS2BF16: `low` comes first in memory.
SS_INLINE __m512bh ss_cvtne2ps(__m512 high, __m512 low) {
    const __m512i first = _mm512_castsi256_si512(ss_cvtneps(low));
    return (__m512bh)_mm512_inserti64x4(first, ss_cvtneps(high), 1);
}

#define _mm512_dpbf16_ps ss_dpbf16
#define _mm512_cvtneps_pbh ss_cvtneps
#define _mm512_cvtne2ps_pbh ss_cvtne2ps

#endif

#endif
