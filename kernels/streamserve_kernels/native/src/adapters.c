// Low-rank adapters of single rows: y += (x · aᵀ) · bᵀ, each row with the matrices of its own slot.
//
// Two instructions: ADAPT_DOWN writes h = x · aᵀ, rounded to bfloat16, ADAPT_UP adds h · bᵀ to y.
// In a program both stand behind the product with the layer's own weight. A row's result does not
// depend on the rows beside it.
//
//     a  [R][K padded to 32], rows of the matrix, zeros behind
//     b  [R / 2][N padded to 16][2]: two neighbours in R of one output side by side; R is even
#include "streamserve.h"

enum { TILE = 4, RANKS = 16, COLUMNS = 256, WIDE = 32 };

typedef struct {
    const bf16 *a, *b;  // 0: this slot's adapter leaves the layer alone
    int64_t rank;
} entry;

enum {
    TABLE,      // address of an entry for each slot
    SLOTS,      // address of the rows' slots, int32; below 0: none
    X,          // address of x [rows, K]
    X_STRIDE,   // elements between rows of x
    INPUTS,     // K
    H,          // address of h [rows, H_STRIDE]
    H_STRIDE,   // no rank is larger
    Y,          // address of y [rows, N]
    OUTPUTS,    // N
    ROWS_KIND,  // see ss_rows
};

static int64_t num_tiles(const ss_context *context, const int64_t *args) {
    return ss_ceil_div(ss_rows(context, args[ROWS_KIND]), TILE);
}

// The adapter of row `row`, and in `end` where the rows of a tile that share it end.
static const entry *find(const int64_t *args, int64_t row, int64_t last, int64_t *end) {
    const int32_t *slots = (const int32_t *)args[SLOTS];
    const int32_t slot = slots[row];
    *end = row + 1;
    while (*end < last && slots[*end] == slot) ++*end;
    if (slot < 0) return 0;
    const entry *found = (const entry *)args[TABLE] + slot;
    return found->a ? found : 0;
}

static int64_t down_units(const ss_context *context, const int64_t *args) {
    return num_tiles(context, args) * ss_ceil_div(args[H_STRIDE], RANKS);
}

static inline __attribute__((always_inline)) void down(const entry *from, const bf16 *x,
                                                       int64_t x_stride, int64_t inputs, int64_t r,
                                                       bf16 *h, int64_t h_stride, int rows) {
    const bf16 *a = from->a + r * WIDE * ss_ceil_div(inputs, WIDE);
    __m512 sums[TILE];
    for (int m = 0; m < rows; m++) sums[m] = _mm512_setzero_ps();
    for (int64_t k = 0; k < inputs; k += WIDE) {
        const __mmask32 mask =
            inputs - k >= WIDE ? (__mmask32)-1 : (__mmask32)((1u << (inputs - k)) - 1);
        const __m512bh weight = (__m512bh)_mm512_loadu_si512(a + k);
        for (int m = 0; m < rows; m++)
            sums[m] = _mm512_dpbf16_ps(
                sums[m], (__m512bh)_mm512_maskz_loadu_epi16(mask, x + m * x_stride + k), weight);
    }
    for (int m = 0; m < rows; m++) {
        const __m512 sum = _mm512_set1_ps(_mm512_reduce_add_ps(sums[m]));
        h[m * h_stride + r] = (bf16)_mm256_extract_epi16(ss_round(sum), 0);
    }
}

static void down_run(const ss_context *context, const int64_t *args, int64_t unit,
                     int64_t num_units, int thread) {
    (void)num_units, (void)thread;
    const int64_t pieces = ss_ceil_div(args[H_STRIDE], RANKS), first = unit % pieces * RANKS;
    const int64_t start = unit / pieces * TILE;
    const int64_t last = ss_min(start + TILE, ss_rows(context, args[ROWS_KIND]));
    for (int64_t row = start, end; row < last; row = end) {
        const entry *from = find(args, row, last, &end);
        if (!from) continue;
        const bf16 *x = (const bf16 *)args[X] + row * args[X_STRIDE];
        bf16 *h = (bf16 *)args[H] + row * args[H_STRIDE];
        for (int64_t r = first; r < ss_min(first + RANKS, from->rank); r++) switch (end - row) {
                case 1: down(from, x, args[X_STRIDE], args[INPUTS], r, h, args[H_STRIDE], 1); break;
                case 2: down(from, x, args[X_STRIDE], args[INPUTS], r, h, args[H_STRIDE], 2); break;
                case 3: down(from, x, args[X_STRIDE], args[INPUTS], r, h, args[H_STRIDE], 3); break;
                default: down(from, x, args[X_STRIDE], args[INPUTS], r, h, args[H_STRIDE], 4);
            }
    }
}

const ss_operation ss_adapt_down = {down_units, down_run, 0};

static int64_t up_units(const ss_context *context, const int64_t *args) {
    return num_tiles(context, args) * ss_ceil_div(args[OUTPUTS], COLUMNS);
}

static inline __attribute__((always_inline)) void up(const entry *from, const bf16 *h,
                                                     int64_t h_stride, bf16 *y, int64_t outputs,
                                                     int64_t first, int64_t end, int rows) {
    const int64_t padded = 16 * ss_ceil_div(outputs, 16);
    for (int64_t c = first; c < end; c += 16) {
        const __mmask16 mask = ss_mask(end - c);
        __m512 sums[TILE];
        for (int m = 0; m < rows; m++) sums[m] = ss_load_masked(y + m * outputs + c, mask);
        for (int64_t r = 0; r < from->rank; r += 2) {
            const __m512bh weight = (__m512bh)_mm512_loadu_si512(from->b + r * padded + 2 * c);
            for (int m = 0; m < rows; m++)
                sums[m] = _mm512_dpbf16_ps(
                    sums[m],
                    (__m512bh)_mm512_set1_epi32(*(const ss_pair *)(h + m * h_stride + r)), weight);
        }
        for (int m = 0; m < rows; m++) ss_store_masked(y + m * outputs + c, sums[m], mask);
    }
}

static void up_run(const ss_context *context, const int64_t *args, int64_t unit,
                   int64_t num_units, int thread) {
    (void)num_units, (void)thread;
    const int64_t outputs = args[OUTPUTS], pieces = ss_ceil_div(outputs, COLUMNS);
    const int64_t c = unit % pieces * COLUMNS, stop = ss_min(c + COLUMNS, outputs);
    const int64_t start = unit / pieces * TILE;
    const int64_t last = ss_min(start + TILE, ss_rows(context, args[ROWS_KIND]));
    for (int64_t row = start, end; row < last; row = end) {
        const entry *from = find(args, row, last, &end);
        if (!from) continue;
        const bf16 *h = (const bf16 *)args[H] + row * args[H_STRIDE];
        bf16 *y = (bf16 *)args[Y] + row * outputs;
        switch (end - row) {
            case 1: up(from, h, args[H_STRIDE], y, outputs, c, stop, 1); break;
            case 2: up(from, h, args[H_STRIDE], y, outputs, c, stop, 2); break;
            case 3: up(from, h, args[H_STRIDE], y, outputs, c, stop, 3); break;
            default: up(from, h, args[H_STRIDE], y, outputs, c, stop, 4);
        }
    }
}

const ss_operation ss_adapt_up = {up_units, up_run, 0};
