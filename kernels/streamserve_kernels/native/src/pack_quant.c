// Quantises weights into the tiles of linear_quant.c, bit for bit as quantised.py says.
#include "streamserve.h"

#include <math.h>
#include <string.h>

enum { GROUP = 64, INT4_GROUP = 32, LANES = 16, INT8_TILE = 1024, INT4_TILE = 576 };

enum {
    WEIGHT,   // address of the weight [N, K], bfloat16 or float32
    STRIDE,   // elements between its rows
    FLOAT32,  // whether it is float32
    OUTPUTS,  // N
    INPUTS,   // K
    BITS,     // 8 or 4
    TILES,    // address of the packed weight
    SCALES,   // int8: address of the scales [N padded to tiles], float32
};

static int64_t units(const ss_context *context, const int64_t *args) {
    (void)context;
    return ss_ceil_div(args[OUTPUTS], LANES);
}

static __m512 load(const int64_t *args, int64_t row, int64_t k, int64_t end) {
    const int64_t at = row * args[STRIDE] + k;
    const __mmask16 mask = ss_mask(end - k);
    return args[FLOAT32] ? _mm512_maskz_loadu_ps(mask, (const float *)args[WEIGHT] + at)
                         : ss_load_masked((const bf16 *)args[WEIGHT] + at, mask);
}

// The smallest scale with which inputs [first, end) of a row lie within half a step of a code.
static float smallest_scale(const int64_t *args, int64_t row, int64_t first, int64_t end) {
    __m512 low = _mm512_setzero_ps(), high = low;
    for (int64_t k = first; k < end; k += LANES) {
        const __m512 value = load(args, row, k, end);
        low = _mm512_min_ps(low, value);
        high = _mm512_max_ps(high, value);
    }
    const float below = -_mm512_reduce_min_ps(low), above = _mm512_reduce_max_ps(high);
    const float half = args[BITS] == 8 ? 128.0f : 8.0f;
    float step = fmaxf(fmaxf(below, above) / (half + 0.5f), fminf(below, above) / (half - 0.5f));
    if (args[BITS] == 4) {
        uint16_t bits = _cvtss_sh(step, _MM_FROUND_TO_NEAREST_INT);
        bits += _cvtsh_ss(bits) < step;  // rounded up: the next float16 is the next integer
        step = _cvtsh_ss(bits);
    }
    return above > below ? -step : step;
}

// Codes of 64 inputs, those past the end 0, as bytes with their zero at half the range.
static __m512i group_codes(const int64_t *args, int64_t row, int64_t k, const float *scales) {
    const int zero = args[BITS] == 8 ? 128 : 8;
    uint8_t codes[GROUP];
    for (int i = 0; i < GROUP; i += LANES) {
        const float scale = args[BITS] == 8 ? scales[0] : scales[i / INT4_GROUP];
        const __m512 inverse = _mm512_set1_ps(scale == 0.0f ? 0.0f : 1.0f / scale);
        __m512i code =
            _mm512_cvtps_epi32(_mm512_mul_ps(load(args, row, k + i, args[INPUTS]), inverse));
        code = _mm512_max_epi32(code, _mm512_set1_epi32(-zero));
        code = _mm512_min_epi32(code, _mm512_set1_epi32(zero - 1));
        code = _mm512_add_epi32(code, _mm512_set1_epi32(zero));
        _mm_storeu_si128((__m128i *)(codes + i), _mm512_cvtepi32_epi8(code));
    }
    return _mm512_loadu_si512(codes);
}

static void pack_int8(const int64_t *args, int64_t unit, int lane) {
    const int64_t row = LANES * unit + lane, inputs = args[INPUTS];
    const int64_t groups = ss_ceil_div(inputs, GROUP);
    const __m512i lines = _mm512_slli_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 6);
    uint8_t *tile = (uint8_t *)args[TILES] + unit * groups * INT8_TILE + 4 * lane;
    const int is_there = row < args[OUTPUTS];
    const float scale = is_there ? smallest_scale(args, row, 0, inputs) : 0.0f;
    ((float *)args[SCALES])[row] = scale;
    for (int64_t g = 0; g < groups; g++, tile += INT8_TILE) {
        const __m512i codes = is_there ? group_codes(args, row, g * GROUP, &scale)
                                       : _mm512_set1_epi8((char)128);
        _mm512_i32scatter_epi32(tile, lines, codes, 1);
    }
}

static void pack_int4(const int64_t *args, int64_t unit, int lane) {
    const int64_t row = LANES * unit + lane, inputs = args[INPUTS];
    const int64_t groups = ss_ceil_div(inputs, GROUP);
    const __m256i lines = _mm256_slli_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), 6);
    uint8_t *tile = (uint8_t *)args[TILES] + unit * groups * INT4_TILE;
    for (int64_t g = 0; g < groups; g++, tile += INT4_TILE) {
        float scales[2] = {0.0f, 0.0f};
        __m512i codes = _mm512_set1_epi8(8);
        if (row < args[OUTPUTS]) {
            for (int i = 0; i < 2; i++) {
                const int64_t k = g * GROUP + i * INT4_GROUP;
                if (k < inputs)
                    scales[i] = smallest_scale(args, row, k, ss_min(inputs, k + INT4_GROUP));
            }
            codes = group_codes(args, row, g * GROUP, scales);
        }
        // In each eight bytes: four inputs, and above them in the same bytes the four after them.
        const __m512i both = _mm512_or_si512(codes, _mm512_srli_epi64(codes, 28));
        _mm256_i32scatter_epi32((int *)(tile + 4 * lane), lines, _mm512_cvtepi64_epi32(both), 1);
        for (int i = 0; i < 2; i++) {
            const uint16_t bits = _cvtss_sh(scales[i], _MM_FROUND_TO_NEAREST_INT);
            memcpy(tile + 512 + 32 * i + 2 * lane, &bits, sizeof bits);
        }
    }
}

static void run(const ss_context *context, const int64_t *args, int64_t unit, int64_t num_units,
                int thread) {
    (void)context, (void)num_units, (void)thread;
    for (int lane = 0; lane < LANES; lane++)
        (args[BITS] == 8 ? pack_int8 : pack_int4)(args, unit, lane);
}

const ss_operation ss_pack_quant = {units, run, 0};
