// y = x @ weightᵀ + bias for bfloat16 weights in oneDNN's blocked layout, for any number of rows.
//
// The layout, for N in blocks of 64 outputs and K padded to Kp:
//
//     [ceil(N / 64)][Kp / 2][64][2]
//
// so that one 64-byte load holds two neighbours in k of 16 outputs, as the dot-product instruction
// VDPBF16PS wants. An output is the sum over k in one order whatever the number of rows: a row's
// result does not depend on its batch.
#include "output.h"

#include <string.h>

// The sums of a tile of rows live in registers, SUMS vectors of them at most: all 64 outputs of a
// block at once where the rows are few, else half or a quarter of them. More rows take turns on a
// piece of the weight that stays in the second-level cache, and meanwhile ask for the next piece: that
// way the loads of one pass over the weight hide behind the products of all rows.
enum { BLOCK = 64, LANES = 16, GROUP_ROWS = 48, PIECE_PAIRS = 256, AHEAD = 8192, NEAR = 16 };
#ifdef __AVX512F__
enum { ROW_TILE = SS_ROWS, SUMS = 24 };
#else
enum { ROW_TILE = SS_ROWS, SUMS = 6 };
#endif

// Behind what all products begin with; K is even.
enum {
    WEIGHT = PRODUCT_ARGS,  // address of the packed weight
    BIAS,                   // address of the bias [N], bfloat16, or 0
    OUTPUTS,                // N
    PADDED,                 // Kp
};

// A thread's range of columns is cut at the blocks' ends: units for one thread.
static int64_t units_per_thread(int64_t outputs, int num_threads) {
    const int64_t vectors = ss_ceil_div(outputs, LANES);
    return ss_ceil_div(ss_ceil_div(vectors, num_threads), BLOCK / LANES) + 1;
}

static int64_t units(const ss_context *context, const int64_t *args) {
    if (!ss_rows(context, args[ROWS_KIND])) return 0;
    return context->num_threads * units_per_thread(args[OUTPUTS], context->num_threads);
}

// Columns [first, end) of a unit; maybe none.
static void unit_columns(int64_t outputs, int num_threads, int64_t unit, int64_t *first,
                         int64_t *end) {
    const int64_t vectors = ss_ceil_div(outputs, LANES);
    const int64_t each = units_per_thread(outputs, num_threads);
    const int64_t owner = unit / each;
    const int64_t low = LANES * (vectors * owner / num_threads);
    const int64_t high = ss_min(outputs, LANES * (vectors * (owner + 1) / num_threads));
    const int64_t block = BLOCK * (low / BLOCK + unit % each);
    *first = ss_max(low, block);
    *end = ss_min(high, block + BLOCK);
}

// sums[m][v] += x[m] · weight columns. `rows`, `vectors` and `lines`, the cache lines asked for in
// each turn, are constants where it is inlined.
static inline __attribute__((always_inline)) void product(
    float *tile, const ss_factor *x, int64_t x_stride, const bf16 *weight, int64_t pairs,
    const char *ahead, int rows, int vectors, int lines) {
    __m512 sums[ROW_TILE][4];
    for (int m = 0; m < rows; m++)
        for (int v = 0; v < vectors; v++) sums[m][v] = _mm512_load_ps(tile + m * BLOCK + LANES * v);
    for (int64_t k = 0; k < pairs; k++) {
        const bf16 *line = weight + k * 2 * BLOCK;
        for (int i = 0; i < lines; i++)
            _mm_prefetch(ahead + k * 4 * BLOCK + 64 * i, _MM_HINT_T1);
#ifndef __AVX512F__
        // A quarter of each line of the block: the first-level cache is told where it goes on.
        if (vectors == 1) _mm_prefetch((const char *)(line + NEAR * 2 * BLOCK), _MM_HINT_T0);
#endif
        for (int part = 0; part < SS_PARTS; part++) {
            ss_elements w[4];
            for (int v = 0; v < vectors; v++)
                w[v] = ss_pairs_part(_mm512_load_si512(line + 32 * v), part);
            for (int m = 0; m < rows; m++) {
                const ss_elements factor = ss_factor_part(x + m * x_stride + 2 * k, part);
                for (int v = 0; v < vectors; v++)
                    sums[m][v] = ss_multiply_add(factor, w[v], sums[m][v]);
            }
        }
    }
    for (int m = 0; m < rows; m++)
        for (int v = 0; v < vectors; v++) _mm512_store_ps(tile + m * BLOCK + LANES * v, sums[m][v]);
}

// Those of more sums than there are registers for are empty.
#define PRODUCT(R, V)                                                                             \
    static void product_##R##_##V(float *tile, const ss_factor *x, int64_t x_stride,              \
                                  const bf16 *weight, int64_t pairs, const char *ahead,           \
                                  int lines) {                                                    \
        if (R > ROW_TILE || R * V > SUMS) __builtin_unreachable();                                \
        if (lines == 0) product(tile, x, x_stride, weight, pairs, ahead, R, V, 0);                \
        else if (lines == 1) product(tile, x, x_stride, weight, pairs, ahead, R, V, 1);           \
        else if (lines == 2) product(tile, x, x_stride, weight, pairs, ahead, R, V, 2);           \
        else product(tile, x, x_stride, weight, pairs, ahead, R, V, 4);                           \
    }
#define PRODUCTS(R) PRODUCT(R, 1) PRODUCT(R, 2) PRODUCT(R, 3) PRODUCT(R, 4)
PRODUCTS(1)
PRODUCTS(2)
PRODUCTS(3)
PRODUCTS(4)
PRODUCTS(5)
PRODUCTS(6)
PRODUCTS(7)
PRODUCTS(8)
PRODUCTS(9)
PRODUCTS(10)
PRODUCTS(11)
PRODUCTS(12)
typedef void (*product_function)(float *, const ss_factor *, int64_t, const bf16 *, int64_t,
                                 const char *, int);
#define ROW(R) {product_##R##_1, product_##R##_2, product_##R##_3, product_##R##_4}
static const product_function PRODUCT_OF[12][4] = {
    ROW(1), ROW(2), ROW(3), ROW(4),  ROW(5),  ROW(6),
    ROW(7), ROW(8), ROW(9), ROW(10), ROW(11), ROW(12),
};

// A tile of rows by all `vectors` of a block; the lines are asked for in its first pass.
static void multiply_tile(float *sums, const ss_factor *x, int64_t x_stride, const bf16 *weight,
                          int64_t pairs, int64_t rows, int64_t vectors, const char *ahead,
                          int lines) {
    int64_t most = BLOCK / LANES;
    while (rows * most > SUMS) most /= 2;
    for (int64_t v = 0; v < vectors; v += most)
        PRODUCT_OF[rows - 1][ss_min(most, vectors - v) - 1](
            sums + LANES * v, x, x_stride, weight + 2 * LANES * v, pairs, ahead, v ? 0 : lines);
}

// sums [rows, BLOCK] = x [rows, K] · the weight's columns; few enough rows for their sums to stay in
// the cache.
static void multiply_group(float *sums, const bf16 *x, int64_t x_stride, const bf16 *weight,
                           int64_t pairs, int64_t rows, int64_t vectors, int asks) {
    const int64_t tiles = ss_ceil_div(rows, ROW_TILE);
    const int64_t piece = tiles == 1 && !SS_WIDENS ? pairs : PIECE_PAIRS;
    const int64_t ahead = tiles == 1 ? AHEAD : 4 * BLOCK * piece;
    memset(sums, 0, (size_t)(rows * BLOCK) * sizeof(float));
    for (int64_t k = 0; k < pairs; k += piece) {
        const int64_t count = ss_min(piece, pairs - k);
        const bf16 *from = weight + k * 2 * BLOCK;
        int64_t line = 0;
        for (int64_t i = 0; i < tiles; i++) {
            const int64_t m = rows * i / tiles, tile_rows = rows * (i + 1) / tiles - m;
            // The lines of the next piece are shared out among the tiles.
            int lines = 0;
            if (asks && line < vectors)
                lines = tiles == 1 ? 4 : tiles == 2 || (tiles == 3 && i == 0) ? 2 : 1;
            const bf16 *tile_x = x + m * x_stride + 2 * k;
#if SS_WIDENS
            float factors[ROW_TILE * 2 * PIECE_PAIRS] __attribute__((aligned(64)));
            const int64_t stride = 2 * PIECE_PAIRS;
            for (int64_t j = 0; j < tile_rows; j++)
                ss_widen_row(factors + j * stride, tile_x + j * x_stride, 2 * count);
#else
            const ss_factor *factors = tile_x;
            const int64_t stride = x_stride;
#endif
            multiply_tile(sums + m * BLOCK, factors, stride, from, count, tile_rows, vectors,
                          (const char *)from + ahead + 64 * line, lines);
            line += lines;
        }
    }
}

static void run(const ss_context *context, const int64_t *args, int64_t unit, int64_t num_units,
                int thread) {
    (void)num_units;
    int64_t first, end;
    unit_columns(args[OUTPUTS], context->num_threads, unit, &first, &end);
    if (first >= end) return;
    const int64_t rows = ss_rows(context, args[ROWS_KIND]), columns = end - first;
    const int64_t first_row = ss_first_row(context, args[ROWS_KIND]);
    const int64_t x_stride = args[X_STRIDE], vectors = ss_ceil_div(columns, LANES);
    const bf16 *weight = (const bf16 *)args[WEIGHT] + (first / BLOCK) * BLOCK * args[PADDED] +
                         2 * (first % BLOCK);
    const ss_output out = ss_output_of(context, args, (const void *)args[BIAS], 0, thread);
    const int64_t groups = ss_ceil_div(rows, GROUP_ROWS);
    float sums[GROUP_ROWS * BLOCK] __attribute__((aligned(64)));
    for (int64_t i = 0; i < groups; i++) {
        const int64_t m = first_row + rows * i / groups;
        const int64_t count = first_row + rows * (i + 1) / groups - m;
        multiply_group(sums, (const bf16 *)args[X] + m * x_stride, x_stride, weight,
                       args[INPUTS] / 2, count, vectors, i == 0);
        for (int64_t j = 0; j < count; j++)
            ss_put_row(&out, m + j, first, columns, sums + j * BLOCK);
    }
}

const ss_operation ss_linear = {units, run, ss_begin_product};

// y[t, h] = [x[t, h, K:], x[t, h, :K] @ weight[h]ᵀ]: a weight in the layout above for each head, and
// behind what it multiplies elements that are passed on.
enum {
    HEADS_Y,        // address of y [T, H, C + N]
    HEADS_X,        // address of x [T, H, K + C]
    HEADS_X_STRIDE, // elements between the tokens of x
    HEADS_COUNT,    // H
    HEADS_INPUTS,   // K, even
    HEADS_PASSED,   // C, even
    HEADS_OUTPUTS,  // N
    HEADS_WEIGHT,   // address of the packed weights, one behind the other
};

static int64_t by_head_units(const ss_context *context, const int64_t *args) {
    if (!context->step->num_tokens) return 0;
    return args[HEADS_COUNT] * ss_ceil_div(args[HEADS_OUTPUTS], BLOCK);
}

static void by_head_run(const ss_context *context, const int64_t *args, int64_t unit,
                        int64_t num_units, int thread) {
    (void)num_units, (void)thread;
    const int64_t inputs = args[HEADS_INPUTS], passed = args[HEADS_PASSED];
    const int64_t outputs = args[HEADS_OUTPUTS], blocks = ss_ceil_div(outputs, BLOCK);
    const int64_t head = unit / blocks, block = unit % blocks, rows = context->step->num_tokens;
    const int64_t columns = ss_min(BLOCK, outputs - block * BLOCK);
    const bf16 *weight = (const bf16 *)args[HEADS_WEIGHT] + unit * BLOCK * inputs;
    const bf16 *x = (const bf16 *)args[HEADS_X] + head * (inputs + passed);
    bf16 *y = (bf16 *)args[HEADS_Y] + head * (passed + outputs);
    const int64_t x_stride = args[HEADS_X_STRIDE], y_stride = args[HEADS_COUNT] * (passed + outputs);
    for (int64_t m = 0; m < rows && block == 0 && passed; m++)
        memcpy(y + m * y_stride, x + m * x_stride + inputs, (size_t)passed * sizeof(bf16));
    const ss_output out = {.y = y + passed, .stride = y_stride};
    const int64_t groups = ss_ceil_div(rows, GROUP_ROWS);
    float sums[GROUP_ROWS * BLOCK] __attribute__((aligned(64)));
    for (int64_t i = 0; i < groups; i++) {
        const int64_t m = rows * i / groups, count = rows * (i + 1) / groups - m;
        multiply_group(sums, x + m * x_stride, x_stride, weight, inputs / 2, count,
                       ss_ceil_div(columns, LANES), i == 0);
        for (int64_t j = 0; j < count; j++)
            ss_put_row(&out, m + j, block * BLOCK, columns, sums + j * BLOCK);
    }
}

const ss_operation ss_by_head = {by_head_units, by_head_run, 0};

// ids[row] = the first index of the largest of a row, from what each thread kept of the head.
enum { ARGMAX_IDS, ARGMAX_BEST };

static int64_t argmax_units(const ss_context *context, const int64_t *args) {
    (void)args;
    return context->step->num_logits ? 1 : 0;
}

static void argmax_run(const ss_context *context, const int64_t *args, int64_t unit,
                       int64_t num_units, int thread) {
    (void)unit, (void)num_units, (void)thread;
    const int64_t rows = context->step->num_logits;
    const ss_best *best = (const ss_best *)args[ARGMAX_BEST];
    for (int64_t m = 0; m < rows; m++) {
        ss_best found = best[m];
        for (int64_t p = 1; p < context->num_threads; p++) {
            const ss_best other = best[p * rows + m];
            if (other.value > found.value ||
                (other.value == found.value && other.index < found.index))
                found = other;
        }
        ((int64_t *)args[ARGMAX_IDS])[m] = found.index;
    }
}

const ss_operation ss_argmax = {argmax_units, argmax_run, 0};
