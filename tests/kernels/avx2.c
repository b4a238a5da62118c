// Prints what every intrinsic of avx2.h makes of the same inputs, whatever it is compiled for: a line
// with the name, the kind of a result (f: float32, i: bits) and the number of bytes, then the bytes.
#include "simd.h"

#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

enum { PAGE = 4096, RANDOM = 1500, VALUES = 52, VECTORS = VALUES * VALUES / 16 + RANDOM };

static uint32_t words[3][VECTORS * 16];
static uint16_t masks[VECTORS];
static uint64_t seed = 88172645463325252u;

static uint32_t draw(void) {
    seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
    return (uint32_t)(seed >> 16);
}

static uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

// Signs aside: zero, denormals, ties of bfloat16 and of whole numbers, limits of int32 and of
// exponents, infinity, NaNs.
static const uint32_t SPECIAL[VALUES / 2] = {
    0x00000000, 0x00000001, 0x007fffff, 0x00400001, 0x00800000, 0x00808000, 0x3f800000,
    0x3f808000, 0x3f818000, 0x3f808001, 0x3f7fffff, 0x3f000000, 0x3fc00000, 0x40200000,
    0x42fe0000, 0x43000000, 0x43164000, 0x438a8000, 0x4e9a5f9c, 0x4effffff, 0x4f000000,
    0x7f7fffff, 0x7f7f8000, 0x7f800000, 0x7fc00000, 0x7f800001,
};

static void draw_inputs(void) {
    int n = 0;
    for (int i = 0; i < VALUES; i++)
        for (int j = 0; j < VALUES; j++, n++) {
            words[0][n] = SPECIAL[i / 2] | (uint32_t)(i % 2) << 31;
            words[1][n] = SPECIAL[j / 2] | (uint32_t)(j % 2) << 31;
            words[2][n] = SPECIAL[draw() % (VALUES / 2)] | draw() << 31;
        }
    // Any bits, then numbers of a size at which sums, powers and whole numbers matter.
    for (; n < VECTORS * 16; n++)
        for (int k = 0; k < 3; k++) {
            const float near = (float)((int32_t)draw() % 5000) / (draw() % 2 ? 16.0f : 999.0f);
            words[k][n] = n % 32 < 16 ? draw() : bits_of(near);
        }
    for (int i = 0; i < VECTORS; i++)
        masks[i] = (uint16_t)(i < 17 ? (1u << i) - 1 : i % 3 ? draw() : 0xffff);
}

static void begin(const char *name, char kind, size_t size) {
    printf("%s %c %zu\n", name, kind, size * VECTORS);
}

static void put(const void *result, size_t size) { fwrite(result, 1, size, stdout); }

#define CASE(kind, name, type, ...)                                                               \
    begin(#name, kind, sizeof(type));                                                             \
    for (int i = 0; i < VECTORS; i++) {                                                           \
        const __m512i x = _mm512_loadu_si512(words[0] + 16 * i);                                  \
        const __m512i y = _mm512_loadu_si512(words[1] + 16 * i);                                  \
        const __m512i z = _mm512_loadu_si512(words[2] + 16 * i);                                  \
        const __m512 a = _mm512_castsi512_ps(x), b = _mm512_castsi512_ps(y);                      \
        const __m512 c = _mm512_castsi512_ps(z);                                                  \
        const __mmask16 m = masks[i];                                                             \
        const type result = __VA_ARGS__;                                                          \
        (void)a, (void)b, (void)c, (void)m;                                                              \
        put(&result, sizeof result);                                                              \
    }
#define FLOATS(name, ...) CASE('f', name, __m512, _mm512_##name(__VA_ARGS__))
#define BITS(name, ...) CASE('i', name, __m512i, _mm512_##name(__VA_ARGS__))
#define HALF(name, ...) CASE('i', name, __m256i, _mm512_##name(__VA_ARGS__))
#define QUARTER(name, ...) CASE('i', name, __m128i, _mm512_##name(__VA_ARGS__))
#define FLOAT(name, ...) CASE('f', name, float, _mm512_##name(__VA_ARGS__))
#define NUMBER(name, ...) CASE('i', name, uint32_t, (uint32_t)_mm512_##name(__VA_ARGS__))

static void arithmetic(void) {
    FLOATS(add_ps, a, b)
    FLOATS(sub_ps, a, b)
    FLOATS(mul_ps, a, b)
    FLOATS(div_ps, a, b)
    CASE('i', max_ps, __m512, _mm512_max_ps(a, b))
    CASE('i', min_ps, __m512, _mm512_min_ps(a, b))
    FLOATS(fmadd_ps, a, b, c)
    FLOATS(fmsub_ps, a, b, c)
    FLOATS(fnmadd_ps, a, b, c)
    FLOATS(maskz_sub_ps, m, a, b)
    CASE('i', mask_max_ps, __m512, _mm512_mask_max_ps(c, m, a, b))
    CASE('i', mask_mov_ps, __m512, _mm512_mask_mov_ps(a, m, b))
    FLOATS(roundscale_ps, a, 8)
    CASE('f', floor, __m512, _mm512_roundscale_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC))
    // Of NaN and infinity, avx2.h makes NaN where VSCALEFPS makes infinity.
    FLOATS(scalef_ps, _mm512_mask_mov_ps(b, _mm512_cmp_ps_mask(a, a, _CMP_ORD_Q), a), b)
    FLOATS(dpbf16_ps, a, (__m512bh)y, (__m512bh)z)
    BITS(add_epi32, x, y)
    BITS(sub_epi32, x, y)
    BITS(max_epi32, x, y)
    BITS(min_epi32, x, y)
    BITS(max_epu32, x, y)
    BITS(and_si512, x, y)
    BITS(or_si512, x, y)
    BITS(ternarylogic_epi32, x, y, z, 0xca)
    BITS(slli_epi16, x, 7)
    BITS(slli_epi32, x, 16)
    BITS(srai_epi32, x, 24)
    BITS(srli_epi16, x, 4)
    BITS(srli_epi32, x, 16)
    BITS(srli_epi64, x, 28)
    BITS(dpbusd_epi32, x, y, z)
}

static void across_lanes(void) {
    FLOAT(reduce_add_ps, a)
    CASE('i', reduce_max_ps, float, _mm512_reduce_max_ps(a))
    CASE('i', reduce_min_ps, float, _mm512_reduce_min_ps(a))
    CASE('i', mask_reduce_max_ps, float, _mm512_mask_reduce_max_ps(m, a))
    NUMBER(reduce_add_epi32, x)
    NUMBER(reduce_max_epu32, x)
    NUMBER(cmp_ps_mask, a, b, _CMP_GT_OQ)
    CASE('i', cmp_unordered, uint32_t, _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q))
    NUMBER(mask_cmp_ps_mask, m, a, b, _CMP_GE_OQ)
}

static void conversions(void) {
    FLOATS(cvtepi32_ps, x)
    BITS(cvtps_epi32, a)
    BITS(cvtepi8_epi16, _mm512_castsi512_si256(x))
    BITS(cvtepi8_epi32, _mm256_castsi256_si128(_mm512_castsi512_si256(x)))
    BITS(cvtepu8_epi32, _mm256_castsi256_si128(_mm512_castsi512_si256(x)))
    BITS(cvtepu16_epi32, _mm512_castsi512_si256(x))
    FLOATS(cvtph_ps, _mm512_castsi512_si256(x))
    QUARTER(cvtsepi32_epi8, x)
    QUARTER(cvtepi32_epi8, x)
    HALF(cvtepi64_epi32, x)
    CASE('i', cvtneps_pbh, __m256i, (__m256i)_mm512_cvtneps_pbh(a))
    CASE('i', cvtne2ps_pbh, __m512i, (__m512i)_mm512_cvtne2ps_pbh(a, b))
}

static void moves(void) {
    const int32_t first = 3;
    BITS(castps_si512, a)
    CASE('i', castsi512_ps, __m512, _mm512_castsi512_ps(y))
    HALF(castsi512_si256, x)
    HALF(extracti64x4_epi64, x, 1)
    BITS(broadcast_i64x4, _mm512_castsi512_si256(x))
    BITS(broadcast_i32x4, _mm256_castsi256_si128(_mm512_castsi512_si256(x)))
    CASE('i', castps256_ps512, __m256i,
         _mm512_castsi512_si256(_mm512_castps_si512(
             _mm512_castps256_ps512(_mm256_castsi256_ps(_mm512_extracti64x4_epi64(x, 1))))))
    BITS(set1_epi8, (char)words[0][i])
    BITS(set1_epi16, (short)words[0][i])
    BITS(set1_epi32, (int)words[0][i])
    CASE('i', set1_ps, __m512, _mm512_set1_ps((float)i))
    BITS(setzero_si512)
    CASE('i', setzero_ps, __m512, _mm512_setzero_ps())
    BITS(setr_epi32, i, 1, 2, first, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
    CASE('i', setr_ps, __m512,
         _mm512_setr_ps((float)i, 1, 2, first, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15))
}

// Masked moves where the first lane that is used begins a page, and where the last one ends it: what
// lies beyond may not be touched.
static char *page;

static char *place(__mmask32 mask, int lane_bytes, int at_end) {
    if (!mask) return page + (at_end ? PAGE : 0);
    return at_end ? page + PAGE - lane_bytes * (32 - __builtin_clz(mask))
                  : page - lane_bytes * __builtin_ctz(mask);
}

static void fill_page(int i) {
    for (int k = 0; k < PAGE; k++) page[k] = (char)(31 * k + 7 * i);
}

#define MASKED_LOAD(name, type, lane_bytes, mask, ...)                                            \
    begin(#name, 'i', 2 * sizeof(type));                                                          \
    for (int i = 0; i < VECTORS; i++)                                                             \
        for (int at_end = 0; at_end < 2; at_end++) {                                              \
            const __m512 other = _mm512_set1_ps((float)i);                                        \
            const char *from = place(mask, lane_bytes, at_end);                                   \
            const type result = __VA_ARGS__;                                                      \
            (void)other;                                                                          \
            put(&result, sizeof result);                                                          \
        }
#define MASKED_STORE(name, lane_bytes, ...)                                                       \
    begin(#name, 'i', 2 * PAGE);                                                                  \
    for (int i = 0; i < VECTORS; i++)                                                             \
        for (int at_end = 0; at_end < 2; at_end++) {                                              \
            const __m512i x = _mm512_loadu_si512(words[0] + 16 * i);                              \
            char *to = place(masks[i], lane_bytes, at_end);                                       \
            fill_page(i);                                                                         \
            __VA_ARGS__;                                                                          \
            put(page, PAGE);                                                                      \
        }

static void memory(void) {
    char *area = mmap(0, 3 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    page = area + PAGE;
    mprotect(page, PAGE, PROT_READ | PROT_WRITE);
    fill_page(1);
#define WIDE_MASK ((uint32_t)masks[i] | (uint32_t)masks[VECTORS - 1 - i] << 16)
    MASKED_LOAD(maskz_loadu_ps, __m512, 4, masks[i], _mm512_maskz_loadu_ps(masks[i], from))
    MASKED_LOAD(mask_loadu_ps, __m512, 4, masks[i], _mm512_mask_loadu_ps(other, masks[i], from))
    MASKED_LOAD(maskz_loadu_epi16_256, __m256i, 2, masks[i],
                _mm256_maskz_loadu_epi16(masks[i], from))
    MASKED_LOAD(maskz_loadu_epi16, __m512i, 2, WIDE_MASK,
                _mm512_maskz_loadu_epi16(WIDE_MASK, from))
    MASKED_STORE(mask_storeu_ps, 4, _mm512_mask_storeu_ps(to, masks[i], _mm512_castsi512_ps(x)))
    MASKED_STORE(mask_storeu_epi16, 2,
                 _mm256_mask_storeu_epi16(to, masks[i], _mm512_castsi512_si256(x)))
}

// Loads and stores of everything, gathers and scatters.
static void whole_moves(void) {
    float to[64] __attribute__((aligned(64))) = {0};
    const __m256i places = _mm256_setr_epi32(0, 7, 5, 4, 11, -2, 9, 1);
    const __m512i more = _mm512_setr_epi32(0, 7, 5, 4, 11, -2, 9, 1, 3, 2, 15, -1, 20, -7, 30, 8);
    BITS(loadu_si512, (const char *)(words[0] + 16 * (i / 2)) + 3)
    CASE('i', loadu_ps, __m512, _mm512_loadu_ps(words[1] + 16 * i / 2))
    begin("stores", 'i', 64 * 4);
    for (int i = 0; i < VECTORS; i++) {
        memcpy(to, words[0] + 16 * i, 64);
        _mm512_store_ps(to + 16, _mm512_load_ps(to));
        _mm512_store_si512(to + 32, _mm512_load_si512(to + 16));
        _mm512_storeu_si512(to + 47, _mm512_loadu_si512(to + 16));
        _mm512_storeu_ps(to + 5, _mm512_loadu_ps(to + 31));
        put(to, 64 * 4);
    }
    BITS(i32gather_epi32, more, words[0] + 16 + i, 4)
    begin("scatter", 'i', 2 * 64 * 4);
    for (int i = 0; i < VECTORS; i++) {
        memset(to, 0, sizeof to);
        _mm512_i32scatter_epi32(to + 16, more, _mm512_loadu_si512(words[0] + 16 * i), 4);
        put(to, sizeof to);
        _mm256_i32scatter_epi32(to + 3, places, _mm256_loadu_si256((void *)(words[1] + 16 * i)), 8);
        put(to, sizeof to);
    }
}

int main(void) {
    draw_inputs();
    arithmetic();
    across_lanes();
    conversions();
    moves();
    memory();
    whole_moves();
    return 0;
}
