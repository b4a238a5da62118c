// The 512-bit intrinsics of these sources on CPUs with AVX2, FMA and F16C, under Intel's names: a
// vector of 512 bits is two of 256, a mask the integer that it is.
//
// Results are those of the instructions, bit for bit but for what a NaN holds; tests/kernels/avx2.c
// compares them. Lanes that a mask leaves out are neither read nor written in memory.
#ifndef STREAMSERVE_AVX2_H
#define STREAMSERVE_AVX2_H

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "avx2_names.h"

typedef struct {
    __m256 low, high;
} avx2_floats;
typedef struct {
    __m256i low, high;
} avx2_integers;
#define __m512 avx2_floats
#define __m512i avx2_integers
#define __m512bh avx2_integers

// --- lane by lane -------------------------------------------------------------------------------

#define AVX2_OF_2(type, name)                                                                     \
    SS_INLINE type _mm512_##name(type a, type b) {                                                \
        return (type){_mm256_##name(a.low, b.low), _mm256_##name(a.high, b.high)};                \
    }
AVX2_OF_2(__m512, add_ps)
AVX2_OF_2(__m512, sub_ps)
AVX2_OF_2(__m512, mul_ps)
AVX2_OF_2(__m512, div_ps)
AVX2_OF_2(__m512, max_ps)
AVX2_OF_2(__m512, min_ps)
AVX2_OF_2(__m512i, add_epi32)
AVX2_OF_2(__m512i, sub_epi32)
AVX2_OF_2(__m512i, max_epi32)
AVX2_OF_2(__m512i, min_epi32)
AVX2_OF_2(__m512i, max_epu32)
#undef AVX2_OF_2

#define AVX2_OF_3(name)                                                                           \
    SS_INLINE __m512 _mm512_##name(__m512 a, __m512 b, __m512 c) {                                \
        return (__m512){_mm256_##name(a.low, b.low, c.low), _mm256_##name(a.high, b.high, c.high)}; \
    }
AVX2_OF_3(fmadd_ps)
AVX2_OF_3(fmsub_ps)
AVX2_OF_3(fnmadd_ps)
#undef AVX2_OF_3

#define AVX2_SHIFT(name)                                                                          \
    SS_INLINE __m512i _mm512_##name(__m512i a, unsigned count) {                                  \
        return (__m512i){_mm256_##name(a.low, (int)count), _mm256_##name(a.high, (int)count)};    \
    }
AVX2_SHIFT(slli_epi16)
AVX2_SHIFT(slli_epi32)
AVX2_SHIFT(srai_epi32)
AVX2_SHIFT(srli_epi16)
AVX2_SHIFT(srli_epi32)
AVX2_SHIFT(srli_epi64)
#undef AVX2_SHIFT

SS_INLINE __m512i _mm512_and_si512(__m512i a, __m512i b) {
    return (__m512i){_mm256_and_si256(a.low, b.low), _mm256_and_si256(a.high, b.high)};
}

SS_INLINE __m512i _mm512_or_si512(__m512i a, __m512i b) {
    return (__m512i){_mm256_or_si256(a.low, b.low), _mm256_or_si256(a.high, b.high)};
}

SS_INLINE __m256i avx2_select(__m256i a, __m256i b, __m256i c) {
    return _mm256_or_si256(_mm256_and_si256(a, b), _mm256_andnot_si256(a, c));
}

// The only table that there is: a ? b : c.
#define _mm512_ternarylogic_epi32(a, b, c, table)                                                 \
    __extension__({                                                                               \
        _Static_assert((table) == 0xca, "only a ? b : c");                                        \
        const __m512i a_ = (a), b_ = (b), c_ = (c);                                               \
        (__m512i){avx2_select(a_.low, b_.low, c_.low), avx2_select(a_.high, b_.high, c_.high)};   \
    })

// --- casts, constants, halves -------------------------------------------------------------------

SS_INLINE __m512 _mm512_castsi512_ps(__m512i a) {
    return (__m512){_mm256_castsi256_ps(a.low), _mm256_castsi256_ps(a.high)};
}

SS_INLINE __m512i _mm512_castps_si512(__m512 a) {
    return (__m512i){_mm256_castps_si256(a.low), _mm256_castps_si256(a.high)};
}

SS_INLINE __m512 _mm512_castps256_ps512(__m256 a) { return (__m512){a, _mm256_setzero_ps()}; }
SS_INLINE __m256i _mm512_castsi512_si256(__m512i a) { return a.low; }
SS_INLINE __m256i _mm512_extracti64x4_epi64(__m512i a, int i) { return i ? a.high : a.low; }
SS_INLINE __m512i _mm512_broadcast_i64x4(__m256i a) { return (__m512i){a, a}; }
SS_INLINE __m512i _mm512_broadcast_i32x4(__m128i a) {
    return _mm512_broadcast_i64x4(_mm256_broadcastsi128_si256(a));
}

SS_INLINE __m512 _mm512_setzero_ps(void) {
    return (__m512){_mm256_setzero_ps(), _mm256_setzero_ps()};
}

SS_INLINE __m512i _mm512_setzero_si512(void) {
    return _mm512_broadcast_i64x4(_mm256_setzero_si256());
}

SS_INLINE __m512 _mm512_set1_ps(float a) { return (__m512){_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
SS_INLINE __m512i _mm512_set1_epi8(char a) { return _mm512_broadcast_i64x4(_mm256_set1_epi8(a)); }
SS_INLINE __m512i _mm512_set1_epi16(short a) {
    return _mm512_broadcast_i64x4(_mm256_set1_epi16(a));
}
SS_INLINE __m512i _mm512_set1_epi32(int a) { return _mm512_broadcast_i64x4(_mm256_set1_epi32(a)); }

#define _mm512_setr_ps(a, b, c, d, e, f, g, h, ...)                                               \
    ((__m512){_mm256_setr_ps(a, b, c, d, e, f, g, h), _mm256_setr_ps(__VA_ARGS__)})
#define _mm512_setr_epi32(a, b, c, d, e, f, g, h, ...)                                            \
    ((__m512i){_mm256_setr_epi32(a, b, c, d, e, f, g, h), _mm256_setr_epi32(__VA_ARGS__)})

// --- masks --------------------------------------------------------------------------------------

// Lanes of 32 bits: all ones where the mask's bit is set.
SS_INLINE __m512i avx2_lanes(__mmask16 mask) {
    const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i low = _mm256_and_si256(_mm256_set1_epi32(mask), bits);
    const __m256i high = _mm256_and_si256(_mm256_set1_epi32(mask >> 8), bits);
    return (__m512i){_mm256_cmpeq_epi32(low, bits), _mm256_cmpeq_epi32(high, bits)};
}

SS_INLINE __m512 _mm512_mask_mov_ps(__m512 from, __mmask16 mask, __m512 a) {
    const __m512 lanes = _mm512_castsi512_ps(avx2_lanes(mask));
    return (__m512){_mm256_blendv_ps(from.low, a.low, lanes.low),
                    _mm256_blendv_ps(from.high, a.high, lanes.high)};
}

SS_INLINE __m512 _mm512_mask_max_ps(__m512 from, __mmask16 mask, __m512 a, __m512 b) {
    return _mm512_mask_mov_ps(from, mask, _mm512_max_ps(a, b));
}

SS_INLINE __m512 _mm512_maskz_sub_ps(__mmask16 mask, __m512 a, __m512 b) {
    return _mm512_mask_mov_ps(_mm512_setzero_ps(), mask, _mm512_sub_ps(a, b));
}

#define _mm512_cmp_ps_mask(a, b, how)                                                             \
    __extension__({                                                                               \
        const __m512 a_ = (a), b_ = (b);                                                          \
        (__mmask16)(_mm256_movemask_ps(_mm256_cmp_ps(a_.low, b_.low, how)) |                      \
                    _mm256_movemask_ps(_mm256_cmp_ps(a_.high, b_.high, how)) << 8);               \
    })
#define _mm512_mask_cmp_ps_mask(mask, a, b, how) ((__mmask16)((mask) & _mm512_cmp_ps_mask(a, b, how)))

// --- memory -------------------------------------------------------------------------------------

SS_INLINE __m512 _mm512_loadu_ps(const void *from) {
    return (__m512){_mm256_loadu_ps((const float *)from), _mm256_loadu_ps((const float *)from + 8)};
}

SS_INLINE __m512 _mm512_load_ps(const void *from) {
    return (__m512){_mm256_load_ps((const float *)from), _mm256_load_ps((const float *)from + 8)};
}

SS_INLINE __m512i _mm512_loadu_si512(const void *from) {
    const __m256i *halves = (const __m256i *)from;
    return (__m512i){_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}

SS_INLINE __m512i _mm512_load_si512(const void *from) {
    const __m256i *halves = (const __m256i *)from;
    return (__m512i){_mm256_load_si256(halves), _mm256_load_si256(halves + 1)};
}

SS_INLINE void _mm512_storeu_ps(void *to, __m512 a) {
    _mm256_storeu_ps((float *)to, a.low);
    _mm256_storeu_ps((float *)to + 8, a.high);
}

SS_INLINE void _mm512_store_ps(void *to, __m512 a) {
    _mm256_store_ps((float *)to, a.low);
    _mm256_store_ps((float *)to + 8, a.high);
}

SS_INLINE void _mm512_storeu_si512(void *to, __m512i a) {
    _mm256_storeu_si256((__m256i *)to, a.low);
    _mm256_storeu_si256((__m256i *)to + 1, a.high);
}

SS_INLINE void _mm512_store_si512(void *to, __m512i a) {
    _mm256_store_si256((__m256i *)to, a.low);
    _mm256_store_si256((__m256i *)to + 1, a.high);
}

SS_INLINE __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void *from) {
    if (mask == 0xffff) return _mm512_loadu_ps(from);
    const __m512i lanes = avx2_lanes(mask);
    return (__m512){_mm256_maskload_ps((const float *)from, lanes.low),
                    _mm256_maskload_ps((const float *)from + 8, lanes.high)};
}

SS_INLINE __m512 _mm512_mask_loadu_ps(__m512 other, __mmask16 mask, const void *from) {
    return _mm512_mask_mov_ps(other, mask, _mm512_maskz_loadu_ps(mask, from));
}

SS_INLINE void _mm512_mask_storeu_ps(void *to, __mmask16 mask, __m512 a) {
    if (mask == 0xffff) {
        _mm512_storeu_ps(to, a);
        return;
    }
    const __m512i lanes = avx2_lanes(mask);
    _mm256_maskstore_ps((float *)to, lanes.low, a.low);
    _mm256_maskstore_ps((float *)to + 8, lanes.high, a.high);
}

// There are masked moves of 32 bits, none of 16: what is left of a mask without its whole pairs goes
// one by one.
static __attribute__((noinline, unused)) __m256i avx2_load_words(__mmask16 mask, const void *from) {
    uint16_t words[16] __attribute__((aligned(32))) = {0};
    for (; mask; mask &= (__mmask16)(mask - 1)) {
        const int i = __builtin_ctz(mask);
        memcpy(words + i, (const uint16_t *)from + i, sizeof *words);
    }
    return _mm256_load_si256((const __m256i *)words);
}

static __attribute__((noinline, unused)) void avx2_store_words(void *to, __mmask16 mask, __m256i a) {
    uint16_t words[16] __attribute__((aligned(32)));
    _mm256_store_si256((__m256i *)words, a);
    for (; mask; mask &= (__mmask16)(mask - 1)) {
        const int i = __builtin_ctz(mask);
        memcpy((uint16_t *)to + i, words + i, sizeof *words);
    }
}

SS_INLINE __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void *from) {
    return mask == 0xffff ? _mm256_loadu_si256((const __m256i *)from)
                          : avx2_load_words(mask, from);
}

SS_INLINE void _mm256_mask_storeu_epi16(void *to, __mmask16 mask, __m256i a) {
    if (mask == 0xffff)
        _mm256_storeu_si256((__m256i *)to, a);
    else
        avx2_store_words(to, mask, a);
}

SS_INLINE __m512i _mm512_maskz_loadu_epi16(__mmask32 mask, const void *from) {
    return (__m512i){_mm256_maskz_loadu_epi16((__mmask16)mask, from),
                     _mm256_maskz_loadu_epi16((__mmask16)(mask >> 16), (const __m256i *)from + 1)};
}

#define _mm512_i32gather_epi32(at, from, scale)                                                   \
    __extension__({                                                                               \
        const __m512i at_ = (at);                                                                 \
        const int *const from_ = (const int *)(from);                                             \
        (__m512i){_mm256_i32gather_epi32(from_, at_.low, scale),                                  \
                  _mm256_i32gather_epi32(from_, at_.high, scale)};                                \
    })

SS_INLINE void _mm256_i32scatter_epi32(void *to, __m256i at, __m256i a, int scale) {
    int32_t places[8], lanes[8];
    _mm256_storeu_si256((__m256i *)places, at);
    _mm256_storeu_si256((__m256i *)lanes, a);
    for (int i = 0; i < 8; i++) memcpy((char *)to + (int64_t)scale * places[i], lanes + i, 4);
}

SS_INLINE void _mm512_i32scatter_epi32(void *to, __m512i at, __m512i a, int scale) {
    _mm256_i32scatter_epi32(to, at.low, a.low, scale);
    _mm256_i32scatter_epi32(to, at.high, a.high, scale);
}

// --- conversions --------------------------------------------------------------------------------

SS_INLINE __m512 _mm512_cvtepi32_ps(__m512i a) {
    return (__m512){_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)};
}

SS_INLINE __m512i _mm512_cvtps_epi32(__m512 a) {
    return (__m512i){_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high)};
}

SS_INLINE __m512i _mm512_cvtepi8_epi16(__m256i a) {
    return (__m512i){_mm256_cvtepi8_epi16(_mm256_castsi256_si128(a)),
                     _mm256_cvtepi8_epi16(_mm256_extracti128_si256(a, 1))};
}

SS_INLINE __m512i _mm512_cvtepi8_epi32(__m128i a) {
    return (__m512i){_mm256_cvtepi8_epi32(a), _mm256_cvtepi8_epi32(_mm_srli_si128(a, 8))};
}

SS_INLINE __m512i _mm512_cvtepu8_epi32(__m128i a) {
    return (__m512i){_mm256_cvtepu8_epi32(a), _mm256_cvtepu8_epi32(_mm_srli_si128(a, 8))};
}

SS_INLINE __m512i _mm512_cvtepu16_epi32(__m256i a) {
    return (__m512i){_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)),
                     _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1))};
}

SS_INLINE __m512 _mm512_cvtph_ps(__m256i a) {
    return (__m512){_mm256_cvtph_ps(_mm256_castsi256_si128(a)),
                    _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))};
}

// Two vectors packed lane by lane of 128 bits, in order again.
SS_INLINE __m256i avx2_in_order(__m256i packed) { return _mm256_permute4x64_epi64(packed, 0xd8); }

SS_INLINE __m128i _mm512_cvtsepi32_epi8(__m512i a) {
    const __m256i words = avx2_in_order(_mm256_packs_epi32(a.low, a.high));
    return _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

SS_INLINE __m128i _mm512_cvtepi32_epi8(__m512i a) {
    const __m512i bytes = _mm512_and_si512(a, _mm512_set1_epi32(0xff));
    const __m256i words = avx2_in_order(_mm256_packs_epi32(bytes.low, bytes.high));
    return _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

SS_INLINE __m256i _mm512_cvtepi64_epi32(__m512i a) {
    const __m256 even =
        _mm256_shuffle_ps(_mm256_castsi256_ps(a.low), _mm256_castsi256_ps(a.high), 0x88);
    return avx2_in_order(_mm256_castps_si256(even));
}

// VCVTNEPS2BF16 in the lower halves of 32 bits: to the nearest, ties to even; denormals stay.
SS_INLINE __m256i avx2_nearest_bf16(__m256 value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256 quiet =
        _mm256_castsi256_ps(_mm256_or_si256(bits, _mm256_set1_epi32(0x400000)));
    const __m256 nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
    return _mm256_srli_epi32(
        _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(up), quiet, nan)), 16);
}

SS_INLINE __m256i _mm512_cvtneps_pbh(__m512 a) {
    return avx2_in_order(
        _mm256_packus_epi32(avx2_nearest_bf16(a.low), avx2_nearest_bf16(a.high)));
}

SS_INLINE __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
    return (__m512bh){_mm512_cvtneps_pbh(low), _mm512_cvtneps_pbh(high)};
}

// --- whole numbers, powers of two ---------------------------------------------------------------

#define _mm512_roundscale_ps(a, how)                                                              \
    __extension__({                                                                               \
        _Static_assert((how) < 16, "whole numbers");                                              \
        const __m512 a_ = (a);                                                                    \
        (__m512){_mm256_round_ps(a_.low, how), _mm256_round_ps(a_.high, how)};                    \
    })

// 2**n for whole n of -126 to 127.
SS_INLINE __m256 avx2_power(__m256 n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}

// a · 2**floor(b) in three steps, of which only the last one can round: before it what is left of a
// denormal result is a normal number.
SS_INLINE __m256 avx2_scalef(__m256 a, __m256 b) {
    const __m256 least = _mm256_set1_ps(-126.0f), most = _mm256_set1_ps(127.0f);
    __m256 n = _mm256_floor_ps(b);
    n = _mm256_min_ps(_mm256_max_ps(n, _mm256_set1_ps(-278.0f)), _mm256_set1_ps(278.0f));
    const __m256 last = _mm256_min_ps(_mm256_max_ps(n, least), most);
    n = _mm256_sub_ps(n, last);
    const __m256 second = _mm256_min_ps(_mm256_max_ps(n, least), most);
    const __m256 first = _mm256_sub_ps(n, second);
    __m256 scaled = _mm256_mul_ps(a, avx2_power(first));
    scaled = _mm256_mul_ps(_mm256_mul_ps(scaled, avx2_power(second)), avx2_power(last));
    // By infinity, 0 for the negative one, and by NaN.
    const __m256 special = _mm256_mul_ps(a, _mm256_max_ps(_mm256_setzero_ps(), b));
    const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), b);
    const __m256 is_finite = _mm256_cmp_ps(magnitude, _mm256_set1_ps(INFINITY), _CMP_LT_OQ);
    return _mm256_blendv_ps(special, scaled, is_finite);
}

SS_INLINE __m512 _mm512_scalef_ps(__m512 a, __m512 b) {
    return (__m512){avx2_scalef(a.low, b.low), avx2_scalef(a.high, b.high)};
}

// --- all lanes in one ---------------------------------------------------------------------------

#define AVX2_HALVES(a, op)                                                                        \
    const __m256 both = _mm256_##op(a.high, a.low);                                               \
    const __m128 four = _mm_##op(_mm256_extractf128_ps(both, 1), _mm256_castps256_ps128(both));   \
    const __m128 two = _mm_##op(four, _mm_movehl_ps(four, four));                                 \
    return _mm_cvtss_f32(_mm_##op(two, _mm_movehdup_ps(two)));
SS_INLINE float _mm512_reduce_add_ps(__m512 a) { AVX2_HALVES(a, add_ps) }
SS_INLINE float _mm512_reduce_max_ps(__m512 a) { AVX2_HALVES(a, max_ps) }
SS_INLINE float _mm512_reduce_min_ps(__m512 a) { AVX2_HALVES(a, min_ps) }
#undef AVX2_HALVES

SS_INLINE float _mm512_mask_reduce_max_ps(__mmask16 mask, __m512 a) {
    return _mm512_reduce_max_ps(_mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), mask, a));
}

#define AVX2_HALVES(a, op)                                                                        \
    const __m256i both = _mm256_##op(a.high, a.low);                                              \
    const __m128i four =                                                                          \
        _mm_##op(_mm256_extracti128_si256(both, 1), _mm256_castsi256_si128(both));                \
    const __m128i two = _mm_##op(four, _mm_shuffle_epi32(four, 0x4e));                            \
    return _mm_cvtsi128_si32(_mm_##op(two, _mm_shuffle_epi32(two, 0xb1)));
SS_INLINE int _mm512_reduce_add_epi32(__m512i a) { AVX2_HALVES(a, add_epi32) }
SS_INLINE unsigned _mm512_reduce_max_epu32(__m512i a) { AVX2_HALVES(a, max_epu32) }
#undef AVX2_HALVES

// --- dot products -------------------------------------------------------------------------------

// VPMADDUBSW would saturate: even and odd bytes are multiplied apart, as words.
SS_INLINE __m256i avx2_dpbusd(__m256i sums, __m256i a, __m256i b) {
    const __m256i even =
        _mm256_madd_epi16(_mm256_and_si256(a, _mm256_set1_epi16(0xff)),
                          _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
    return _mm256_add_epi32(sums, _mm256_add_epi32(even, odd));
}

SS_INLINE __m512i _mm512_dpbusd_epi32(__m512i sums, __m512i a, __m512i b) {
    return (__m512i){avx2_dpbusd(sums.low, a.low, b.low), avx2_dpbusd(sums.high, a.high, b.high)};
}

// --- tables of words ----------------------------------------------------------------------------

// The lower and the upper bytes of 16 words, in each half.
typedef struct {
    __m256i low, high;
} avx2_table;

SS_INLINE avx2_table avx2_table_of(__m256i words) {
    const __m256i low = _mm256_and_si256(words, _mm256_set1_epi16(0xff));
    const __m256i bytes = _mm256_packus_epi16(low, _mm256_srli_epi16(words, 8));
    return (avx2_table){_mm256_permute4x64_epi64(bytes, 0x88),
                        _mm256_permute4x64_epi64(bytes, 0xdd)};
}

// The words that the lowest four bits of each word of `at` name.
SS_INLINE __m256i avx2_look_up(__m256i at, avx2_table table) {
    // VPSHUFB takes the lowest four bits of a byte, and 0 where its highest is set.
    const __m256i index = _mm256_and_si256(at, _mm256_set1_epi16(15));
    const __m256i even = _mm256_or_si256(index, _mm256_set1_epi16((short)0x8000));
    const __m256i odd = _mm256_or_si256(_mm256_slli_epi16(index, 8), _mm256_set1_epi16(0x80));
    return _mm256_or_si256(_mm256_shuffle_epi8(table.low, even),
                           _mm256_shuffle_epi8(table.high, odd));
}

#endif
