// The intrinsics of these sources on every CPU that they are built for: what a CPU lacks is made of
// what came before it, under Intel's names.
#ifndef STREAMSERVE_SIMD_H
#define STREAMSERVE_SIMD_H

#include <immintrin.h>
#include <stdint.h>

#define SS_INLINE static inline __attribute__((always_inline))

// Two neighbours, wherever a row of them starts.
typedef int32_t ss_pair __attribute__((may_alias, aligned(2)));

// Vectors of 16 sums for each of up to 6 rows that stay in registers.
#ifdef __AVX512F__
#define SS_VECTORS(rows) 4
#else
#include "avx2.h"
#define SS_VECTORS(rows) ((rows) <= 2 ? 2 : 1)
#endif

// A product of bfloat16 pairs, (a0, a1) of a row by (b0, b1) of each lane, in SS_PARTS parts: one
// instruction where the CPU has it, else a multiply-add for each of the two, whose row is widened to
// float32 beforehand.
#ifdef __AVX512BF16__

#define SS_WIDENS 0
enum { SS_PARTS = 1 };
typedef uint16_t ss_factor;
typedef __m512bh ss_elements;

SS_INLINE ss_elements ss_factor_part(const ss_factor *pair, int part) {
    (void)part;
    return (__m512bh)_mm512_set1_epi32(*(const ss_pair *)pair);
}

SS_INLINE ss_elements ss_pairs_part(__m512i pairs, int part) {
    (void)part;
    return (__m512bh)pairs;
}

SS_INLINE __m512 ss_multiply_add(ss_elements factor, ss_elements pairs, __m512 sums) {
    return _mm512_dpbf16_ps(sums, factor, pairs);
}

// to[32] = what two vectors of float32 are as factors; `to` is aligned to 64 bytes.
SS_INLINE void ss_store_factors(ss_factor *to, __m512 first, __m512 second) {
    _mm512_store_si512(to, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

#else

#define SS_WIDENS 1
enum { SS_PARTS = 2 };
typedef float ss_factor;
typedef __m512 ss_elements;

SS_INLINE ss_elements ss_factor_part(const ss_factor *pair, int part) {
    return _mm512_set1_ps(pair[part]);
}

// The second of a pair is the upper half of its 32 bits, and so a float but for the lower half.
SS_INLINE ss_elements ss_pairs_part(__m512i pairs, int part) {
    return _mm512_castsi512_ps(part ? _mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000u))
                                    : _mm512_slli_epi32(pairs, 16));
}

SS_INLINE __m512 ss_multiply_add(ss_elements factor, ss_elements parts, __m512 sums) {
    return _mm512_fmadd_ps(factor, parts, sums);
}

SS_INLINE void ss_store_factors(ss_factor *to, __m512 first, __m512 second) {
    _mm512_store_ps(to, first);
    _mm512_store_ps(to + 16, second);
}

// VDPBF16PS, which adds the second products first; here they are fused, and denormals count.
SS_INLINE __m512 ss_dpbf16(__m512 sums, __m512bh a, __m512bh b) {
    for (int part = 1; part >= 0; part--)
        sums = _mm512_fmadd_ps(ss_pairs_part((__m512i)a, part), ss_pairs_part((__m512i)b, part),
                               sums);
    return sums;
}

#define _mm512_dpbf16_ps ss_dpbf16

#endif

// Most rows at once: what must be widened is widened for as many as there are registers for.
#if SS_WIDENS && defined(__AVX512F__)
enum { SS_ROWS = 12 };
#else
enum { SS_ROWS = 6 };
#endif

// A table of 16 words twice, looked up by the lowest four bits of each word of `at`.
#ifdef __AVX512F__
typedef __m512i ss_table;

SS_INLINE ss_table ss_table_of(__m512i words) { return words; }

SS_INLINE __m512i ss_look_up(__m512i at, ss_table table) {
    return _mm512_permutexvar_epi16(at, table);
}
#else
typedef avx2_table ss_table;

SS_INLINE ss_table ss_table_of(__m512i words) { return avx2_table_of(words.low); }

SS_INLINE __m512i ss_look_up(__m512i at, ss_table table) {
    return (__m512i){avx2_look_up(at.low, table), avx2_look_up(at.high, table)};
}
#endif

#if defined(__AVX512F__) && !defined(__AVX512BF16__)

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

#define _mm512_cvtneps_pbh ss_cvtneps
#define _mm512_cvtne2ps_pbh ss_cvtne2ps

#endif

#endif
