// Where the results of a product go: shared by the products of whole blocks of 64 outputs.
#ifndef STREAMSERVE_OUTPUT_H
#define STREAMSERVE_OUTPUT_H

#include "streamserve.h"

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

// Before a step: nothing is the best of any row and thread.
void ss_reset_best(ss_best *best, int64_t count);

#endif
