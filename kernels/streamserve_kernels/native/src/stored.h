// A weight that somebody else quantised, as the products of stored_linear.c read it.
//
// Outputs are in blocks of 64, four vectors of 16. A *line* is 64 bytes, 16-bit words [16][2]: word
// (n, i) holds, lowest bits first, the codes of inputs i, 2 + i, 4 + i … of output n, as many as
// go into it. A *step* is the inputs that whole lines of all of a code's planes share:
//
//     kind        bits   step   lines of a vector
//     codes 2     2      16     one of two bits
//     codes 3     2 + 1  32     two of two bits, one of one
//     codes 4     4      8      one
//     codes 5     4 + 1  32     four of four bits, one of one
//     codes 6     4 + 2  16     two of four bits, one of two
//     int8        8      4      one: bytes [2][16][2], two pairs of inputs
//     float8      8      4      the same
//
// and a weight is [N / 64][K / step][4][lines]. Scales, and zeros or minimums, are [N / 64][G][64].
#ifndef STREAMSERVE_STORED_H
#define STREAMSERVE_STORED_H

#include "output.h"

// What the products take.
enum {
    Y,          // address of y [rows], bfloat16 or float32
    X,          // address of x [rows, K], bfloat16
    X_STRIDE,   // elements between rows of x
    ROWS_KIND,  // see ss_rows
    WEIGHT,     // address of the weight's description
    BIAS,       // address of the bias [N], float32, or 0
    Y_FLOAT32,  // whether y is float32
    BEST,       // address of [threads][rows] ss_best for the arg-max, or 0
    SCALE,      // bits of a double: y is multiplied by it (float32 only)
    CAP,        // bits of a double: y = cap·tanh(y / cap), or 0 (float32 only)
    SUMS,       // address of [rows][G] float32: memory for the sums of groups, or 0
    OWN,        // address of [threads][OWN_ROWS][G] of the most groups there are
    OWN_STRIDE, // bytes of one thread's
    DONE,       // address of [threads] int64 64 bytes apart: whether a thread has its own sums
    Y_STRIDE,   // elements between rows of y
};

enum { STORED_BLOCK = 64, STORED_LANES = 16, STORED_VECTORS = 4, STORED_LINE = 64 };

enum {
    CODES_2,
    CODES_3,
    CODES_4,
    CODES_5,
    CODES_6,
    CODES_INT8,
    CODES_FLOAT8,
    NUM_KINDS,
    DENSE = NUM_KINDS,  // bfloat16 [K / 2][4][16][2]: what a piece is unpacked to for many rows
};

enum { NO_NUMBERS, HALF_NUMBERS, FLOAT_NUMBERS, FACTORED_HALF, FACTORED_FLOAT };

// One number for each output and group.
typedef struct {
    int64_t form;
    const void *values;  // float16 or float32; factored: int8
    const void *units;   // factored: [N / 64][ceil(G / 2**shift)][64], float16 or float32
    int64_t shift;
} stored_numbers;

// Mirrored by stored_linear.py.
typedef struct {
    int64_t kind, outputs, inputs;
    int64_t group;  // inputs that share a scale, whole steps
    const uint8_t *codes;
    const bf16 *table;    // [64]: what a code of up to 6 bits stands for, periodic
    const float *values;  // [256]: the same, exact, for every kind
    stored_numbers scales, offsets;
    int64_t offsets_are_zeros;  // subtracted from codes, else from weights
} stored_weight;

static inline int stored_step(int kind) {
    return kind == CODES_4 ? 8 : kind == CODES_3 || kind == CODES_5 ? 32
         : kind == CODES_2 || kind == CODES_6                       ? 16
         : kind == DENSE                                            ? 2
                                                                    : 4;
}

// Lines of 16 outputs in a step.
static inline int stored_lines(int kind) {
    return kind == CODES_5 ? 5 : kind == CODES_3 || kind == CODES_6 ? 3 : 1;
}

// The planes of a code, lowest bits first.
typedef struct {
    int bits, shift, lines, first_line;
} stored_plane;

static inline int stored_planes(int kind, stored_plane planes[2]) {
    const stored_plane none = {0, 0, 0, 0};
    planes[1] = none;
    switch (kind) {
        case CODES_2: planes[0] = (stored_plane){2, 0, 1, 0}; return 1;
        case CODES_3:
            planes[0] = (stored_plane){2, 0, 2, 0};
            planes[1] = (stored_plane){1, 2, 1, 2};
            return 2;
        case CODES_4: planes[0] = (stored_plane){4, 0, 1, 0}; return 1;
        case CODES_5:
            planes[0] = (stored_plane){4, 0, 4, 0};
            planes[1] = (stored_plane){1, 4, 1, 4};
            return 2;
        case CODES_6:
            planes[0] = (stored_plane){4, 0, 2, 0};
            planes[1] = (stored_plane){2, 4, 1, 2};
            return 2;
        default: planes[0] = (stored_plane){8, 0, 1, 0}; return 1;
    }
}

// Where output `n` (of 16) and input `k` of a step have their bits of a plane: the byte, and the
// bit in it.
static inline int64_t stored_byte(stored_plane plane, int64_t n, int64_t k, int *bit) {
    if (plane.bits == 8) {
        *bit = 0;
        return k / 2 * 32 + 2 * n + k % 2;
    }
    const int per_line = 32 / plane.bits;
    const int64_t in_line = k % per_line, at = in_line / 2 * plane.bits;
    *bit = (int)(at % 8);
    return (plane.first_line + k / per_line) * STORED_LINE + 4 * n + 2 * (in_line % 2) + at / 8;
}

// Where the results of a product go.
static inline ss_output stored_output(const ss_context *context, const int64_t *args, int thread) {
    const int64_t rows = ss_rows(context, args[ROWS_KIND]);
    ss_best *best = args[BEST] ? (ss_best *)args[BEST] + thread * rows : 0;
    return (ss_output){
        .y = (void *)args[Y],
        .stride = args[Y_STRIDE],
        .bias = (const void *)args[BIAS],
        .bias_float32 = 1,
        .is_float32 = (int)args[Y_FLOAT32],
        .stores = !best || context->step->wants_logits,
        .scale = (float)ss_double(args[SCALE]),
        .cap = (float)ss_double(args[CAP]),
        .best = best,
    };
}

static inline int64_t stored_groups(const stored_weight *w) {
    return ss_ceil_div(w->inputs, w->group);
}

#endif
