// Who goes to which expert in a step of one layer: shared by the operations of experts.c.
#ifndef STREAMSERVE_EXPERTS_H
#define STREAMSERVE_EXPERTS_H

#include "streamserve.h"

#include <float.h>
#include <math.h>

// Mirrored by experts.py.
enum { MAX_EXPERTS = 1024 };
#define TAKEN -INFINITY   // of an expert that has been chosen
#define LEAST -FLT_MAX    // of one that is chosen where nothing else is left

// Mirrored by experts.py. R rows make P = R · top_k pairs.
typedef struct {
    int64_t num_experts, top_k;
    int64_t rows_kind;  // see ss_rows: the step's tokens, or the rows that need logits
    int32_t *chosen;  // [R, top_k]
    float *weights;   // [R, top_k]
    int32_t *starts;  // [E + 1]: where an expert's pairs begin
    int32_t *active;  // [1 + E]: how many experts have pairs, then which
    int32_t *rows;    // [P]: whose a pair is
    int32_t *pairs;   // [R, top_k]: the pair of a row and its j-th expert
} ss_routes;

#endif
