// y = x @ weightᵀ + bias for int8 and int4 weights on AVX512-VNNI or AVX2, for any number of rows.
//
// Activations are quantised to int8 with one scale per row and 64 inputs; VPDPBUSD multiplies
// unsigned by signed bytes, so weights are stored with their zero at 128 (int8) or 8 (int4), and
// minus that zero times the sum of the activations is added to a sum, which makes it exact.
//
// A tile is 16 outputs x 64 inputs, and a weight is tiles [N / 16][K / 64], padded with zeros:
//
//     int8   [16][16][4] bytes: four neighbours in k of one output make a 32-bit lane
//     int4   [8][16][4] bytes, then float16 [2][16]: the low nibbles of byte (j, n, i) are input
//            8·j + i, the high nibbles input 8·j + 4 + i; a scale for each output and 32 inputs
//
// so that a pass over 16 outputs reads one stream of whole cache lines. An output is a sum in one
// order whatever the number of rows: a row's result does not depend on its batch.
#include "output.h"

#include <math.h>
#include <string.h>

enum {
    GROUP = 64,  // inputs of a tile, and of one scale of an activation
    LANES = 16,  // outputs of a tile
    INT8_TILE = 1024,
    INT4_TILE = 576,
    ROW_TILE = 4,         // 4 rows x 4 tiles of columns run at 85% of the VNNI rate, 6 x 4 at 60%
    STREAM_ROWS = 4,      // most rows at which the weights' way from memory is what takes the time
};

// How a stream of weights is asked for, and how many bytes ahead. Zen 4 reads faster past the second
// level; Cascade Lake has too few buffers before the first one for that.
#ifdef __AVX512BF16__
#define STREAM_HINT _MM_HINT_NTA
enum { STREAM_AHEAD = 4096 };
#else
#define STREAM_HINT _MM_HINT_T1
enum { STREAM_AHEAD = 8192 };
#endif

// A weight as the products read it.
typedef struct {
    const uint8_t *tiles;
    const float *scales;  // int8: one per output, padded to whole tiles; int4: none
    int64_t outputs, groups;
    int bits;
} quant_weight;

// Rows of activations as the products read them.
typedef struct {
    int8_t *values;  // [rows][groups][GROUP], zeros past K
    float *scales;   // [rows][groups]
    int32_t *sums;   // [rows][groups][2]: of the values of each half of a group
} quant_rows;

// --- activations --------------------------------------------------------------------------------

SS_INLINE __m512 load_activations(const void *x, int is_float32, int64_t at, __mmask16 mask) {
    return is_float32 ? _mm512_maskz_loadu_ps(mask, (const float *)x + at)
                      : ss_load_masked((const bf16 *)x + at, mask);
}

// A NaN among the inputs makes the scale NaN, and so the whole row of the product.
SS_INLINE void quantise_group(const void *x, int is_float32, int64_t at, int64_t count,
                              int8_t *values, float *scale, int32_t *sums) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512 v[4];
    __m512i most = _mm512_setzero_si512();
    for (int i = 0; i < 4; i++) {
        int64_t left = count - LANES * i;
        v[i] = load_activations(x, is_float32, at + LANES * i, ss_mask(left));
        // Magnitudes of floats are ordered like their bits, NaN above all.
        most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_castps_si512(v[i]), magnitude));
    }
    uint32_t bits = _mm512_reduce_max_epu32(most);
    float largest;
    memcpy(&largest, &bits, sizeof largest);
    const int is_zero = largest < 1e-30f; // whose inverse would overflow
    __m512 inverse = _mm512_set1_ps(is_zero ? 0.0f : 127.0f / largest);
    __m512i q[4];
    for (int i = 0; i < 4; i++) {
        q[i] = _mm512_cvtps_epi32(_mm512_mul_ps(v[i], inverse));
        _mm_storeu_si128((__m128i *)(values + LANES * i), _mm512_cvtsepi32_epi8(q[i]));
    }
    *scale = is_zero ? 0.0f : largest / 127.0f;
    sums[0] = _mm512_reduce_add_epi32(_mm512_add_epi32(q[0], q[1]));
    sums[1] = _mm512_reduce_add_epi32(_mm512_add_epi32(q[2], q[3]));
}

static void quantise_rows(const quant_rows *out, const void *x, int is_float32, int64_t x_stride,
                          int64_t inputs, int64_t first, int64_t end) {
    const int64_t groups = ss_ceil_div(inputs, GROUP);
    for (int64_t r = first; r < end; r++)
        for (int64_t g = 0; g < groups; g++) {
            const int64_t at = r * groups + g, k = g * GROUP;
            quantise_group(x, is_float32, r * x_stride + k, inputs - k, out->values + at * GROUP,
                           out->scales + at, out->sums + 2 * at);
        }
}

// A thread's memory for `rows` quantised rows: 64 bytes of values a group, 4 of scale, 8 of sums.
static quant_rows rows_in(void *work, int64_t rows, int64_t groups) {
    int8_t *values = work;
    float *scales = (float *)(values + rows * groups * GROUP);
    return (quant_rows){values, scales, (int32_t *)(scales + rows * groups)};
}

// --- results ------------------------------------------------------------------------------------

// Keeps the first of the largest; a NaN is never larger.
SS_INLINE void keep_best(ss_best *best, __m512 value, __mmask16 mask, int64_t column) {
    const __m512 most = _mm512_set1_ps(best->value);
    if (!_mm512_mask_cmp_ps_mask(mask, value, most, _CMP_GE_OQ)) return;
    const float largest = _mm512_mask_reduce_max_ps(
        _mm512_mask_cmp_ps_mask(mask, value, value, _CMP_ORD_Q), value);
    const __mmask16 there =
        _mm512_mask_cmp_ps_mask(mask, value, _mm512_set1_ps(largest), _CMP_EQ_OQ);
    const int32_t index = (int32_t)(column + __builtin_ctz(there));
    if (largest > best->value || index < best->index) *best = (ss_best){largest, index};
}

static __m512 scaled_and_capped(__m512 value, float scale, float cap) {
    float lanes[LANES];
    _mm512_storeu_ps(lanes, value);
    for (int i = 0; i < LANES; i++) {
        lanes[i] *= scale;
        if (cap != 0.0f) lanes[i] = cap * tanhf(lanes[i] / cap);
    }
    return _mm512_loadu_ps(lanes);
}

SS_INLINE void put(const ss_output *out, int64_t row, int64_t column, __mmask16 mask,
                   __m512 value) {
    const int64_t at = row * out->stride + column;
    if (!out->is_float32) {
        ss_store_masked((bf16 *)out->y + at, value, mask);
        return;
    }
    if (out->scale != 1.0f || out->cap != 0.0f)
        value = scaled_and_capped(value, out->scale, out->cap);
    if (out->stores) _mm512_mask_storeu_ps((float *)out->y + at, mask, value);
    if (out->best) keep_best(out->best + row, value, mask, column);
}

typedef struct {
    const quant_weight *w;
    const quant_rows *x;
    const ss_output *out;
} job;

// At few rows every line asks for the one `ahead` bytes on; at more, where every tile of rows reads
// a block again, each pass asks for the lines [first, last) of the next block's tiles.
typedef struct {
    int64_t ahead;
    int first, last;
} prefetch_lines;

SS_INLINE void finish(const job *job, int64_t first_row, int64_t first_tile, const float *total,
                      int R, int C) {
    const quant_weight *w = job->w;
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) {
        const int64_t column = (first_tile + c) * LANES;
        const __mmask16 mask = ss_mask(w->outputs - column);
        const float *of = job->out->bias;
        const __m512 bias = of ? _mm512_maskz_loadu_ps(mask, of + column) : _mm512_setzero_ps();
        const __m512 scale = w->scales ? _mm512_loadu_ps(w->scales + column) : _mm512_set1_ps(1.0f);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const __m512 sum = _mm512_load_ps(total + (r * C + c) * LANES);
            put(job->out, first_row + r, column, mask, _mm512_fmadd_ps(sum, scale, bias));
        }
    }
}

// --- sums of products of bytes ------------------------------------------------------------------

SS_INLINE __m512i broadcast(const int8_t *x) {
    int32_t four;
    memcpy(&four, x, sizeof four);
    return _mm512_set1_epi32(four);
}

// WIDE: tiles of columns at once where there are more than STREAM_ROWS rows. A group's sum is
// `begin_sum`, then `add_8` or `add_4` for each line, then `end_8` or `end_4`.
#ifdef __AVX512F__
enum { WIDE = 4 };

// Sets of sums, taken in turn by neighbouring lines, so that at least four chains of sums run.
#define CHAINS(R, C) ((R) * (C) == 1 ? 4 : (R) * (C) < 4 ? 2 : 1)

SS_INLINE __m512i begin_sum(int32_t start) { return _mm512_set1_epi32(start); }
SS_INLINE __m512i add_8(__m512i sum, __m512i w, __m512i x) {
    return _mm512_dpbusd_epi32(sum, w, x);
}
SS_INLINE __m512i add_4(__m512i sum, __m512i w, __m512i x) {
    return _mm512_dpbusd_epi32(sum, w, x);
}
SS_INLINE __m512i end_8(__m512i sum, int32_t start) { return (void)start, sum; }
SS_INLINE __m512i end_4(__m512i sum, int32_t start) { return (void)start, sum; }
#else
// VPMADDUBSW adds two products as words and must not saturate. Codes of int4 cannot make it, not
// even with eight lines in the same words: 16 · 15 · 127 < 2**15. Those of int8 lose their zero and
// give their sign to x, which is never -128: 2 · 128 · 127 < 2**15.
enum { WIDE = 1 };

#define CHAINS(R, C) 1

SS_INLINE __m256i words_8(__m256i w, __m256i x) {
    const __m256i code = _mm256_xor_si256(w, _mm256_set1_epi8((char)128));
    return _mm256_maddubs_epi16(_mm256_abs_epi8(code), _mm256_sign_epi8(x, code));
}

SS_INLINE __m256i two_words(__m256i words, __m256i sum) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(words, _mm256_set1_epi16(1)));
}

SS_INLINE __m256i words_4(__m256i sum, __m256i w, __m256i x) {
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x));
}

SS_INLINE __m512i begin_sum(int32_t start) { return (void)start, _mm512_setzero_si512(); }
SS_INLINE __m512i add_8(__m512i sum, __m512i w, __m512i x) {
    return (__m512i){two_words(words_8(w.low, x.low), sum.low),
                     two_words(words_8(w.high, x.high), sum.high)};
}
SS_INLINE __m512i add_4(__m512i sum, __m512i w, __m512i x) {
    return (__m512i){words_4(sum.low, w.low, x.low), words_4(sum.high, w.high, x.high)};
}
SS_INLINE __m512i end_8(__m512i sum, int32_t start) { return (void)start, sum; }
SS_INLINE __m512i end_4(__m512i sum, int32_t start) {
    const __m256i from = _mm256_set1_epi32(start);
    return (__m512i){two_words(sum.low, from), two_words(sum.high, from)};
}
#endif

// --- R rows x C tiles of columns: constants wherever these are inlined --------------------------

// Adds scale * (a[r][c] summed over the chains) to total[r][c].
SS_INLINE void add_group(float *total, const __m512i *a, const int32_t *starts,
                         const __m512 *scales, int bits, int R, int C) {
    const int U = CHAINS(R, C);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) {
            __m512i sum = a[r * C + c];
#pragma GCC unroll 4
            for (int u = 1; u < U; u++)
                sum = _mm512_add_epi32(sum, a[(u * R + r) * C + c]);
            sum = bits == 8 ? end_8(sum, starts[r]) : end_4(sum, starts[r]);
            float *t = total + (r * C + c) * LANES;
            __m512 product = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scales[r * C + c],
                                             _mm512_load_ps(t));
            _mm512_store_ps(t, product);
        }
}

SS_INLINE void fetch(const uint8_t *from, int64_t tile_stride, prefetch_lines prefetch, int C) {
    for (int j = prefetch.first; j < prefetch.last; j++)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++)
            _mm_prefetch((const char *)(from + c * tile_stride + 64 * j), _MM_HINT_T1);
}

SS_INLINE void start_sums(__m512i *a, const int32_t *starts, int R, int C) {
    const int count = CHAINS(R, C) * R * C;
#pragma GCC unroll 32
    for (int i = 0; i < count; i++)
        a[i] = i < R * C ? begin_sum(starts[i / C]) : _mm512_setzero_si512();
}

SS_INLINE void int8_block(const job *job, int64_t first_row, int64_t first_tile,
                          prefetch_lines prefetch, int streams, int R, int C) {
    const int64_t groups = job->w->groups, tile_stride = groups * INT8_TILE;
    const int64_t x_stride = groups * GROUP;
    const int U = CHAINS(R, C);
    float total[ROW_TILE * WIDE * LANES] __attribute__((aligned(64)));
#pragma GCC unroll 32
    for (int i = 0; i < R * C; i++)
        _mm512_store_ps(total + i * LANES, _mm512_setzero_ps());
    for (int64_t g = 0; g < groups; g++) {
        const uint8_t *tile = job->w->tiles + first_tile * tile_stride + g * INT8_TILE;
        const int8_t *x = job->x->values + first_row * x_stride + g * GROUP;
        __m512i a[ROW_TILE * WIDE];
        __m512 scales[ROW_TILE * WIDE];
        int32_t starts[ROW_TILE];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            int64_t at = (first_row + r) * groups + g;
            starts[r] = -128 * (job->x->sums[2 * at] + job->x->sums[2 * at + 1]);
        }
        if (!streams)
            fetch(tile + prefetch.ahead, tile_stride, prefetch, C);
        start_sums(a, starts, R, C);
#pragma GCC unroll 4
        for (int j = 0; j < 16; j++) {
            __m512i w[WIDE];
#pragma GCC unroll 8
            for (int c = 0; c < C; c++)
                w[c] = _mm512_loadu_si512(tile + c * tile_stride + 64 * j);
            if (streams)
                _mm_prefetch((const char *)(tile + prefetch.ahead + 64 * j), STREAM_HINT);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                __m512i four = broadcast(x + r * x_stride + 4 * j);
#pragma GCC unroll 8
                for (int c = 0; c < C; c++) {
                    __m512i *sum = a + (j % U * R + r) * C + c;
                    *sum = add_8(*sum, w[c], four);
                }
            }
        }
#pragma GCC unroll 32
        for (int i = 0; i < R * C; i++)
            scales[i] = _mm512_set1_ps(job->x->scales[(first_row + i / C) * groups + g]);
        add_group(total, a, starts, scales, 8, R, C);
    }
    finish(job, first_row, first_tile, total, R, C);
}

SS_INLINE void int4_block(const job *job, int64_t first_row, int64_t first_tile,
                          prefetch_lines prefetch, int streams, int R, int C) {
    const int64_t groups = job->w->groups, tile_stride = groups * INT4_TILE;
    const int64_t x_stride = groups * GROUP;
    const int U = CHAINS(R, C);
    const __m512i nibble = _mm512_set1_epi8(15);
    float total[ROW_TILE * WIDE * LANES] __attribute__((aligned(64)));
#pragma GCC unroll 32
    for (int i = 0; i < R * C; i++)
        _mm512_store_ps(total + i * LANES, _mm512_setzero_ps());
    for (int64_t g = 0; g < groups; g++) {
        const uint8_t *tile = job->w->tiles + first_tile * tile_stride + g * INT4_TILE;
        const int8_t *x = job->x->values + first_row * x_stride + g * GROUP;
        if (!streams)
            fetch(tile + prefetch.ahead, tile_stride, prefetch, C);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            if (streams && half)
                _mm_prefetch((const char *)(tile + prefetch.ahead + 512), STREAM_HINT);
            __m512i a[ROW_TILE * WIDE];
            __m512 scales[ROW_TILE * WIDE];
            int32_t starts[ROW_TILE];
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
                starts[r] = -8 * job->x->sums[2 * ((first_row + r) * groups + g) + half];
            start_sums(a, starts, R, C);
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++) {
                __m512i w[WIDE];
#pragma GCC unroll 8
                for (int c = 0; c < C; c++) {
                    const uint8_t *line = tile + c * tile_stride + 64 * (4 * half + j / 2);
                    __m512i both = _mm512_loadu_si512(line);
                    if (streams && j % 2 == 0)
                        _mm_prefetch((const char *)(line + prefetch.ahead), STREAM_HINT);
                    w[c] = _mm512_and_si512(j % 2 ? _mm512_srli_epi16(both, 4) : both, nibble);
                }
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) {
                    __m512i four = broadcast(x + r * x_stride + 32 * half + 4 * j);
#pragma GCC unroll 8
                    for (int c = 0; c < C; c++) {
                        __m512i *sum = a + (j % U * R + r) * C + c;
                        *sum = add_4(*sum, w[c], four);
                    }
                }
            }
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) {
                const uint8_t *at = tile + c * tile_stride + 512 + 32 * half;
                __m512 w_scale = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at));
#pragma GCC unroll 8
                for (int r = 0; r < R; r++)
                    scales[r * C + c] = _mm512_mul_ps(
                        w_scale, _mm512_set1_ps(job->x->scales[(first_row + r) * groups + g]));
            }
            add_group(total, a, starts, scales, 4, R, C);
        }
    }
    finish(job, first_row, first_tile, total, R, C);
}

// --- all rows x a range of columns --------------------------------------------------------------

typedef void block_function(const job *, int64_t first_row, int64_t first_tile,
                            prefetch_lines);

#define BLOCK(format, name, streams, R, C)                                                         \
    static void format##_##name##_##R(const job *job, int64_t first_row, int64_t first_tile,       \
                                      prefetch_lines prefetch) {                                   \
        format##_block(job, first_row, first_tile, prefetch, streams, R, C);                       \
    }
#define BLOCKS(format)                                                                             \
    BLOCK(format, narrow, 1, 1, 1)                                                                 \
    BLOCK(format, narrow, 1, 2, 1)                                                                 \
    BLOCK(format, narrow, 1, 3, 1)                                                                 \
    BLOCK(format, narrow, 1, 4, 1)                                                                 \
    BLOCK(format, wide, 0, 1, WIDE)                                                                \
    BLOCK(format, wide, 0, 2, WIDE)                                                                \
    BLOCK(format, wide, 0, 3, WIDE)                                                                \
    BLOCK(format, wide, 0, 4, WIDE)                                                                \
    static block_function *const format##_narrow[] = {format##_narrow_1, format##_narrow_2,        \
                                                      format##_narrow_3, format##_narrow_4};       \
    static block_function *const format##_wide[] = {format##_wide_1, format##_wide_2,              \
                                                    format##_wide_3, format##_wide_4};

BLOCKS(int8)
BLOCKS(int4)

static void columns(const job *job, int64_t rows, int64_t first_column, int64_t end_column) {
    const quant_weight *w = job->w;
    const int64_t tile_bytes = w->bits == 8 ? INT8_TILE : INT4_TILE;
    block_function *const *narrow = w->bits == 8 ? int8_narrow : int4_narrow;
    block_function *const *wide = w->bits == 8 ? int8_wide : int4_wide;
    const int64_t end = ss_ceil_div(end_column, LANES), last_tile = ss_ceil_div(w->outputs, LANES);
    const int lines = (int)(tile_bytes / 64);
    // Equal tiles of rows: 9 are 3 + 3 + 3.
    const int64_t row_tiles = ss_ceil_div(rows, ROW_TILE);
    int64_t step;
    for (int64_t tile = first_column / LANES; tile < end; tile += step) {
        const int is_wide = rows > STREAM_ROWS && end - tile >= WIDE;
        step = is_wide ? WIDE : 1;
        for (int64_t t = 0; t < row_tiles; t++) {
            const int64_t first = rows * t / row_tiles, count = rows * (t + 1) / row_tiles - first;
            prefetch_lines prefetch = {STREAM_AHEAD, 0, 0};
            if (rows > STREAM_ROWS) {
                prefetch.ahead = step * w->groups * tile_bytes;
                if (tile + 2 * step <= last_tile) {
                    prefetch.first = (int)(lines * t / row_tiles);
                    prefetch.last = (int)(lines * (t + 1) / row_tiles);
                }
            }
            (is_wide ? wide : narrow)[count - 1](job, first, tile, prefetch);
        }
    }
}

// --- operations ---------------------------------------------------------------------------------

// Behind what all products begin with.
enum {
    TILES = PRODUCT_ARGS,  // address of the packed weight
    SCALES,                // address of the scales [N], float32, or 0
    BIAS,                  // address of the bias [N], float32, or 0
    OUTPUTS,               // N
    BITS,                  // 8 or 4
};
enum { BLOCK = 4 * LANES, MOST_UNITS = 16 };

static int64_t quantise_units(const ss_context *context, const int64_t *args) {
    const int64_t rows = ss_rows(context, args[ROWS_KIND]);
    return each_its_own(args, rows) ? 0 : ss_min(rows, 4 * context->num_threads);
}

static void quantise_run(const ss_context *context, const int64_t *args, int64_t unit,
                         int64_t num_units, int thread) {
    (void)thread;
    const int64_t rows = ss_rows(context, args[ROWS_KIND]);
    const quant_rows out = rows_in((void *)args[WORK], rows, ss_ceil_div(args[INPUTS], GROUP));
    quantise_rows(&out, (const void *)args[X], (int)args[X_FLOAT32], args[X_STRIDE], args[INPUTS],
                  rows * unit / num_units, rows * (unit + 1) / num_units);
}

const ss_operation ss_quantise = {quantise_units, quantise_run, 0};

// A thread's range of columns falls into whole blocks of one width, few where rows are few.
static int64_t unit_width(const int64_t *args, int num_threads, int64_t rows) {
    const int64_t share = ss_ceil_div(ss_ceil_div(args[OUTPUTS], LANES), num_threads) * LANES;
    const int64_t blocks = rows > STREAM_ROWS ? 1 : ss_ceil_div(share, BLOCK * MOST_UNITS);
    return BLOCK * blocks;
}

static int64_t units_per_thread(const int64_t *args, int num_threads, int64_t rows) {
    const int64_t share = ss_ceil_div(ss_ceil_div(args[OUTPUTS], LANES), num_threads) * LANES;
    return ss_ceil_div(share, unit_width(args, num_threads, rows));
}

static int64_t linear_units(const ss_context *context, const int64_t *args) {
    const int64_t rows = ss_rows(context, args[ROWS_KIND]);
    return rows ? context->num_threads * units_per_thread(args, context->num_threads, rows) : 0;
}

static quant_rows quantised(const ss_context *context, const int64_t *args, int thread) {
    const int64_t rows = ss_rows(context, args[ROWS_KIND]);
    const int64_t groups = ss_ceil_div(args[INPUTS], GROUP);
    if (args[ROWS_KIND] == SS_SLICE) {
        const quant_rows all = rows_in((void *)args[WORK], context->slice.all, groups);
        const int64_t first = context->slice.first * groups;
        return (quant_rows){all.values + first * GROUP, all.scales + first, all.sums + 2 * first};
    }
    if (!each_its_own(args, rows)) return rows_in((void *)args[WORK], rows, groups);
    const quant_rows own =
        rows_in((char *)args[OWN] + thread * args[OWN_STRIDE], rows, groups);
    int64_t *done = (int64_t *)args[DONE] + DONE_STRIDE * thread;
    if (!*done) {
        quantise_rows(&own, (const void *)args[X], (int)args[X_FLOAT32], args[X_STRIDE],
                      args[INPUTS], 0, rows);
        *done = 1;
    }
    return own;
}

static void linear_run(const ss_context *context, const int64_t *args, int64_t unit,
                       int64_t num_units, int thread) {
    (void)num_units;
    const int64_t rows = ss_rows(context, args[ROWS_KIND]);
    const int threads = context->num_threads;
    const int64_t each = units_per_thread(args, threads, rows), owner = unit / each;
    const int64_t tiles = ss_ceil_div(args[OUTPUTS], LANES);
    const int64_t low = LANES * (tiles * owner / threads);
    const int64_t high = LANES * (tiles * (owner + 1) / threads);
    const int64_t width = unit_width(args, threads, rows);
    const int64_t first = low + unit % each * width, end = ss_min(high, first + width);
    if (first >= end) return;
    const quant_weight w = {
        (const uint8_t *)args[TILES], (const float *)args[SCALES], args[OUTPUTS],
        ss_ceil_div(args[INPUTS], GROUP), (int)args[BITS],
    };
    ss_output out = ss_output_of(context, args, (const void *)args[BIAS], 1, thread);
    out.y = (char *)out.y +
            ss_first_row(context, args[ROWS_KIND]) * out.stride * (out.is_float32 ? 4 : 2);
    const quant_rows x = quantised(context, args, thread);
    const job job = {&w, &x, &out};
    columns(&job, rows, first, end);
}

const ss_operation ss_linear_quant = {linear_units, linear_run, ss_begin_product};

// Rows of an int8 weight: a tied embedding.
enum { EMBED_OUT, EMBED_TILES, EMBED_SCALES, EMBED_WIDTH, EMBED_FLOAT32, EMBED_TABLE_ROWS };

static int embedding_begin(const ss_context *context, const int64_t *args) {
    for (int64_t row = 0; row < context->step->num_tokens; row++) {
        const int64_t id = context->step->input_ids[row];
        if (id < 0 || id >= args[EMBED_TABLE_ROWS]) return SS_OUT_OF_RANGE;
    }
    return SS_OK;
}

static int64_t embedding_units(const ss_context *context, const int64_t *args) {
    (void)args;
    return context->step->num_tokens;
}

static void embedding_run(const ss_context *context, const int64_t *args, int64_t unit,
                          int64_t num_units, int thread) {
    (void)num_units, (void)thread;
    const int64_t width = args[EMBED_WIDTH], groups = ss_ceil_div(width, GROUP);
    const int64_t id = context->step->input_ids[unit];
    const uint8_t *lane =
        (const uint8_t *)args[EMBED_TILES] + id / LANES * groups * INT8_TILE + id % LANES * 4;
    const __m512 scale = _mm512_set1_ps(((const float *)args[EMBED_SCALES])[id]);
    const __m512i lines = _mm512_slli_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 6);
    for (int64_t k = 0; k < width; k += GROUP) {
        uint8_t codes[GROUP];
        const uint8_t *tile = lane + k / GROUP * INT8_TILE;
        _mm512_storeu_si512(codes, _mm512_i32gather_epi32(lines, tile, 1));
        for (int64_t i = 0; i < GROUP && k + i < width; i += LANES) {
            __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + i)));
            wide = _mm512_sub_epi32(wide, _mm512_set1_epi32(128));
            const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(wide), scale);
            const __mmask16 mask = ss_mask(width - k - i);
            const int64_t at = unit * width + k + i;
            if (args[EMBED_FLOAT32])
                _mm512_mask_storeu_ps((float *)args[EMBED_OUT] + at, mask, value);
            else
                ss_store_masked((bf16 *)args[EMBED_OUT] + at, value, mask);
        }
    }
}

const ss_operation ss_embedding_quant = {embedding_units, embedding_run, embedding_begin};
