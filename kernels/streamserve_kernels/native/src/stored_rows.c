// Codes into the layout of stored.h and back: packing, rows of a weight, inputs in another order.
//
// What a weight is, is computed here step by step as stored.py does it, so products must not be
// contracted with sums.
#pragma GCC optimize("fp-contract=off")
#include "stored.h"

#include <string.h>

// --- packing ------------------------------------------------------------------------------------

enum {
    PACK_CODES,   // address of the codes [N, K], uint8; what is not there is 0
    PACK_STRIDE,  // bytes between its rows
    PACK_WEIGHT,  // address of a stored_weight, its codes all 0
};

static int64_t pack_units(const ss_context *context, const int64_t *args) {
    (void)context;
    return ss_ceil_div(((const stored_weight *)args[PACK_WEIGHT])->outputs, STORED_BLOCK);
}

// Where the step of an output begins: [N / 64][K / step][4][lines].
static int64_t step_offset(const stored_weight *w, int64_t row, int64_t step) {
    const int64_t steps = w->inputs / stored_step((int)w->kind), lane = row % STORED_BLOCK;
    const int64_t vector = (row / STORED_BLOCK * steps + step) * STORED_VECTORS + lane / STORED_LANES;
    return vector * STORED_LINE * stored_lines((int)w->kind);
}

static void pack_run(const ss_context *context, const int64_t *args, int64_t unit,
                     int64_t num_units, int thread) {
    (void)context, (void)num_units, (void)thread;
    const stored_weight *w = (const stored_weight *)args[PACK_WEIGHT];
    const int step = stored_step((int)w->kind), flip = w->kind == CODES_INT8 ? 128 : 0;
    const int64_t first = unit * STORED_BLOCK, end = ss_min(w->outputs, first + STORED_BLOCK);
    for (int64_t row = first; row < end; row++) {
        const uint8_t *codes = (const uint8_t *)args[PACK_CODES] + row * args[PACK_STRIDE];
        for (int64_t s = 0; s < w->inputs / step; s++) {
            uint8_t *to = (uint8_t *)w->codes + step_offset(w, row, s);
            for (int k = 0; k < step; k++)
                stored_put((int)w->kind, to, row % STORED_LANES, k, codes[s * step + k] ^ flip);
        }
    }
}

const ss_operation ss_stored_pack = {pack_units, pack_run, 0};

// --- rows ---------------------------------------------------------------------------------------

enum {
    ROWS_OUT,      // address of the rows [T, K], bfloat16 or float32
    ROWS_WEIGHT,   // address of a stored_weight
    ROWS_FLOAT32,  // whether they are float32
    ROWS_INPUTS,   // address of [K] int32: the place of column j among the inputs, or 0
};

static int rows_begin(const ss_context *context, const int64_t *args) {
    for (int64_t row = 0; row < context->step->num_tokens; row++) {
        const int64_t id = context->step->input_ids[row];
        if (id < 0 || id >= ((const stored_weight *)args[ROWS_WEIGHT])->outputs)
            return SS_OUT_OF_RANGE;
    }
    return SS_OK;
}

static int64_t rows_units(const ss_context *context, const int64_t *args) {
    (void)args;
    return context->step->num_tokens;
}

static float number_at(const stored_numbers *numbers, int64_t groups, int64_t row, int64_t g) {
    const int64_t block = row / STORED_BLOCK, lane = row % STORED_BLOCK;
    const int64_t at = (block * groups + g) * STORED_BLOCK + lane;
    const int64_t units = ((groups - 1) >> numbers->shift) + 1;
    const int64_t unit = (block * units + (g >> numbers->shift)) * STORED_BLOCK + lane;
    switch (numbers->form) {
        case HALF_NUMBERS: return _cvtsh_ss(((const uint16_t *)numbers->values)[at]);
        case FLOAT_NUMBERS: return ((const float *)numbers->values)[at];
        case FACTORED_HALF:
            return _cvtsh_ss(((const uint16_t *)numbers->units)[unit]) *
                   (float)((const int8_t *)numbers->values)[at];
        case FACTORED_FLOAT:
            return ((const float *)numbers->units)[unit] *
                   (float)((const int8_t *)numbers->values)[at];
        default: return 1.0f;
    }
}

static void rows_run(const ss_context *context, const int64_t *args, int64_t unit,
                     int64_t num_units, int thread) {
    (void)num_units, (void)thread;
    const stored_weight *w = (const stored_weight *)args[ROWS_WEIGHT];
    const int64_t row = context->step->input_ids[unit], groups = stored_groups(w);
    const int32_t *inputs = (const int32_t *)args[ROWS_INPUTS];
    const int step = stored_step((int)w->kind), flip = w->kind == CODES_INT8 ? 128 : 0;
    const int has_offsets = w->offsets.form != NO_NUMBERS, zeros = (int)w->offsets_are_zeros;
    float scale = 1.0f, offset = 0.0f;
    for (int64_t k = 0; k < w->inputs; k++) {
        if (k % w->group == 0) {
            scale = number_at(&w->scales, groups, row, k / w->group);
            if (has_offsets) offset = number_at(&w->offsets, groups, row, k / w->group);
        }
        const uint8_t *at = w->codes + step_offset(w, row, k / step);
        const int code = stored_get((int)w->kind, at, row % STORED_LANES, k % step);
        float value = w->values[code ^ flip];
        if (has_offsets && zeros) value -= offset;
        if (w->scales.form != NO_NUMBERS) value *= scale;
        if (has_offsets && !zeros) value -= offset;
        const int64_t to = unit * w->inputs + (inputs ? inputs[k] : k);
        if (args[ROWS_FLOAT32])
            ((float *)args[ROWS_OUT])[to] = value;
        else
            ((bf16 *)args[ROWS_OUT])[to] =
                (bf16)_mm256_extract_epi16(ss_round(_mm512_set1_ps(value)), 0);
    }
}

const ss_operation ss_stored_rows = {rows_units, rows_run, rows_begin};

// --- inputs in another order --------------------------------------------------------------------

// Behind what all instructions of a weight begin with; y is [rows, K], bfloat16.
enum { GATHER_INPUTS = PRODUCT_ARGS };  // address of [K] int32
enum { GATHER_PIECE = 1024 };

static int64_t gather_units(const ss_context *context, const int64_t *args) {
    return ss_rows(context, args[ROWS_KIND]) * ss_ceil_div(args[INPUTS], GATHER_PIECE);
}

static void gather_run(const ss_context *context, const int64_t *args, int64_t unit,
                       int64_t num_units, int thread) {
    (void)num_units, (void)thread;
    const int64_t width = args[INPUTS], pieces = ss_ceil_div(width, GATHER_PIECE);
    const int64_t row = ss_first_row(context, args[ROWS_KIND]) + unit / pieces;
    const int64_t first = unit % pieces * GATHER_PIECE, end = ss_min(width, first + GATHER_PIECE);
    const bf16 *x = (const bf16 *)args[X] + row * args[X_STRIDE];
    bf16 *y = (bf16 *)args[Y] + row * args[Y_STRIDE];
    const int32_t *inputs = (const int32_t *)args[GATHER_INPUTS];
    for (int64_t j = first; j < end; j++) y[j] = x[inputs[j]];
}

const ss_operation ss_gather_inputs = {gather_units, gather_run, 0};
