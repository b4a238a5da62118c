// What the products with weights have in common: their arguments, and where the results go.
#ifndef STREAMSERVE_OUTPUT_H
#define STREAMSERVE_OUTPUT_H

#include "streamserve.h"

// What all instructions of a weight begin with; what tells of the weight comes behind. Mirrored by
// product.py.
enum {
    Y,           // address of y [rows, N], bfloat16 or float32
    X,           // address of x [rows, K], bfloat16 or, where it is quantised, float32
    INPUTS,      // K
    Y_STRIDE,    // elements between rows of y
    X_STRIDE,    // elements between rows of x
    ROWS_KIND,   // see ss_rows
    Y_FLOAT32,   // whether y is float32
    X_FLOAT32,   // whether x is float32
    BEST,        // address of [threads][rows] ss_best for the arg-max, or 0
    SCALE,       // bits of a double: y is multiplied by it (float32 only)
    CAP,         // bits of a double: y = cap·tanh(y / cap), or 0 (float32 only)
    WORK,        // memory for what is made of all rows before the product
    OWN,         // address of [threads][OWN_ROWS]: the same of a thread's own, of the widest x
    OWN_STRIDE,  // bytes of one thread's
    DONE,        // address of [threads] int64 DONE_STRIDE apart: whether a thread has made its own;
                 // 0: no thread makes any
    PRODUCT_ARGS,
};
enum {
    OWN_ROWS = 4,  // most rows of which every thread makes it for itself: cheaper than to meet
    DONE_STRIDE = 8,
};

static inline int each_its_own(const int64_t *args, int64_t rows) {
    return args[DONE] && rows <= OWN_ROWS;
}

typedef struct {
    float value;
    int32_t index;
} ss_best;

typedef struct {
    void *y;                // [rows], bfloat16 or float32
    int64_t stride;         // elements between its rows
    const void *bias;       // for each output, or none
    int bias_float32, is_float32;
    int stores;             // whether float32 results are stored
    float scale, cap;       // y = cap·tanh(scale·y / cap); cap 0: none (float32 only)
    ss_best *best;          // [rows] for the arg-max, or none
} ss_output;

// The finished sums of one row and `columns` outputs from column `first` on; overwrites them.
void ss_put_row(const ss_output *out, int64_t row, int64_t first, int64_t columns, float *sums);

// Before a step: no thread has rows of its own, and nothing is the best of any row.
int ss_begin_product(const ss_context *context, const int64_t *args);

// What the arguments say of it.
ss_output ss_output_of(const ss_context *context, const int64_t *args, const void *bias,
                       int bias_float32, int thread);

#endif
