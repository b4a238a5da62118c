// y = x @ weightᵀ + bias for weights with a table for each output (SqueezeLLM), x in bfloat16.
//
// Here the 32 lanes of a vector are inputs of one output, whose table lies in one register. A *line*
// is 32 words of 16 bits: bits j * width and up of word i are those of input 32·j + i. A *step* is
//
//     4 bits   128 inputs, one line
//     3 bits   512 inputs, two lines of two bits and one of one
//
// and a weight is [N][ceil(K / step)][lines]. An output is a sum in one order whatever the number of
// rows.
#include "output.h"
#include "stored.h"

#include <string.h>

// A tile of sums stays in registers.
#ifdef __AVX512F__
enum { ROW_TILE = 4, OUTPUTS = 4 };
#else
enum { ROW_TILE = 2, OUTPUTS = 2 };
#endif
enum { WIDTH = 32, GROUP_ROWS = 48, STREAM_AHEAD = 4096 };

// Mirrored by stored_table.py.
typedef struct {
    int64_t bits, outputs, inputs;
    const uint8_t *codes;
    const float *tables;   // [N][2**bits]
    const int32_t *starts; // [N + 1]: where an output's sparse values begin, or none
    const int32_t *columns;
    const float *values;
} table_weight;

SS_INLINE ss_table table_of(const table_weight *w, int64_t output, int bits) {
    if (bits == 4)
        return ss_table_of(
            _mm512_broadcast_i64x4(ss_round(_mm512_loadu_ps(w->tables + 16 * output))));
    const __m512 table = _mm512_castps256_ps512(_mm256_loadu_ps(w->tables + 8 * output));
    return ss_table_of(_mm512_broadcast_i32x4(_mm256_castsi256_si128(ss_round(table))));
}

// The weights of inputs 32·q and up of a step; tables are periodic.
SS_INLINE __m512bh weights_of(const uint8_t *at, int q, ss_table table, int bits) {
    if (bits == 4) {
        const __m512i code = _mm512_srli_epi16(_mm512_loadu_si512(at), (unsigned)(4 * q));
        return (__m512bh)ss_look_up(code, table);
    }
    const __m512i low = _mm512_srli_epi16(_mm512_loadu_si512(at + 64 * (q / 8)),
                                          (unsigned)(2 * (q % 8)));
    const __m512i line = _mm512_loadu_si512(at + 128);
    const __m512i high = q > 2 ? _mm512_srli_epi16(line, (unsigned)(q - 2))
                               : _mm512_slli_epi16(line, (unsigned)(2 - q));
    const __m512i code =
        _mm512_ternarylogic_epi32(_mm512_set1_epi16(3), low, high, 0xca);  // mask ? low : high
    return (__m512bh)ss_look_up(code, table);
}

SS_INLINE __mmask32 inputs_left(int64_t count) {
    return count >= WIDTH ? ~(__mmask32)0 : count <= 0 ? 0 : ((__mmask32)1 << count) - 1;
}

// a[r][c] += x[r] · a step of output c.
SS_INLINE void add_step(__m512 a[ROW_TILE][OUTPUTS], const bf16 *x, int64_t x_stride, int64_t left,
                        const uint8_t *codes, int64_t output_bytes, const ss_table *tables,
                        int bits, int is_whole, int R) {
    const int parts = bits == 4 ? 4 : 16, bytes = bits == 4 ? 64 : 192;
#pragma GCC unroll 4
    for (int c = 0; c < OUTPUTS; c++)
        for (int line = 0; line < bytes; line += 64)
            _mm_prefetch((const char *)(codes + c * output_bytes + line + STREAM_AHEAD / OUTPUTS),
                         _MM_HINT_NTA);
#pragma GCC unroll 16
    for (int q = 0; q < parts; q++) {
        __m512bh inputs[ROW_TILE];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const bf16 *from = x + r * x_stride + WIDTH * q;
            inputs[r] = is_whole
                            ? (__m512bh)_mm512_loadu_si512(from)
                            : (__m512bh)_mm512_maskz_loadu_epi16(inputs_left(left - WIDTH * q), from);
        }
#pragma GCC unroll 4
        for (int c = 0; c < OUTPUTS; c++) {
            const __m512bh weights = weights_of(codes + c * output_bytes, q, tables[c], bits);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) a[r][c] = _mm512_dpbf16_ps(a[r][c], inputs[r], weights);
        }
    }
}

// sums[r][c] = x[r] · output first + c.
SS_INLINE void multiply(float *sums, const bf16 *x, int64_t x_stride, const table_weight *w,
                        int64_t first, int bits, int R) {
    const int step = bits == 4 ? 128 : 512, bytes = bits == 4 ? 64 : 192;
    const int64_t output_bytes = ss_ceil_div(w->inputs, step) * bytes;
    const uint8_t *codes = w->codes + first * output_bytes;
    __m512 a[ROW_TILE][OUTPUTS];
    ss_table tables[OUTPUTS];
    for (int c = 0; c < OUTPUTS; c++) {
        tables[c] = table_of(w, first + c, bits);
        for (int r = 0; r < R; r++) a[r][c] = _mm512_setzero_ps();
    }
    int64_t k = 0;
    for (; k + step <= w->inputs; k += step, codes += bytes)
        add_step(a, x + k, x_stride, 0, codes, output_bytes, tables, bits, 1, R);
    if (k < w->inputs)
        add_step(a, x + k, x_stride, w->inputs - k, codes, output_bytes, tables, bits, 0, R);
    for (int r = 0; r < R; r++)
        for (int c = 0; c < OUTPUTS; c++)
            sums[r * STORED_BLOCK + c] = _mm512_reduce_add_ps(a[r][c]);
}

typedef void multiply_function(float *sums, const bf16 *x, int64_t x_stride, const table_weight *w,
                               int64_t first);
#define MULTIPLY(bits, R)                                                                         \
    static void multiply_##bits##_##R(float *sums, const bf16 *x, int64_t x_stride,               \
                                      const table_weight *w, int64_t first) {                     \
        if (R > ROW_TILE) __builtin_unreachable();                                                \
        multiply(sums, x, x_stride, w, first, bits, R);                                           \
    }
#define ALL_ROWS(bits) MULTIPLY(bits, 1) MULTIPLY(bits, 2) MULTIPLY(bits, 3) MULTIPLY(bits, 4)
ALL_ROWS(3)
ALL_ROWS(4)
static multiply_function *const MULTIPLY_OF[2][4] = {
    {multiply_3_1, multiply_3_2, multiply_3_3, multiply_3_4},
    {multiply_4_1, multiply_4_2, multiply_4_3, multiply_4_4},
};

// What an output has beside its table.
static float sparse_sum(const table_weight *w, int64_t output, const bf16 *x) {
    float sum = 0.0f;
    for (int32_t i = w->starts[output]; i < w->starts[output + 1]; i++)
        sum += w->values[i] * ss_widen(x[w->columns[i]]);
    return sum;
}

static int64_t units(const ss_context *context, const int64_t *args) {
    const table_weight *w = (const table_weight *)args[WEIGHT];
    return ss_rows(context, args[ROWS_KIND]) ? ss_ceil_div(w->outputs, STORED_BLOCK) : 0;
}

static void run(const ss_context *context, const int64_t *args, int64_t unit, int64_t num_units,
                int thread) {
    (void)num_units;
    const table_weight *w = (const table_weight *)args[WEIGHT];
    const int64_t rows = ss_rows(context, args[ROWS_KIND]), x_stride = args[X_STRIDE];
    const int64_t first = unit * STORED_BLOCK, columns = ss_min(STORED_BLOCK, w->outputs - first);
    const ss_output out = ss_output_of(context, args, (const void *)args[BIAS], 1, thread);
    const int64_t first_row = ss_first_row(context, args[ROWS_KIND]);
    const bf16 *x = (const bf16 *)args[X] + first_row * x_stride;
    multiply_function *const *of = MULTIPLY_OF[w->bits - 3];
    float sums[GROUP_ROWS * STORED_BLOCK] __attribute__((aligned(64)));
    for (int64_t m = 0; m < rows; m += GROUP_ROWS) {
        const int64_t count = ss_min(GROUP_ROWS, rows - m), tiles = ss_ceil_div(count, ROW_TILE);
        for (int64_t c = 0; c < columns; c += OUTPUTS)
            for (int64_t t = 0; t < tiles; t++) {
                const int64_t row = count * t / tiles, tile_rows = count * (t + 1) / tiles - row;
                of[tile_rows - 1](sums + row * STORED_BLOCK + c, x + (m + row) * x_stride, x_stride,
                                  w, first + c);
            }
        for (int64_t j = 0; j < count; j++) {
            float *of_row = sums + j * STORED_BLOCK;
            for (int64_t c = 0; w->starts && c < columns; c++)
                of_row[c] += sparse_sum(w, first + c, x + (m + j) * x_stride);
            ss_put_row(&out, first_row + m + j, first, columns, of_row);
        }
    }
}

const ss_operation ss_table_linear = {units, run, ss_begin_product};
