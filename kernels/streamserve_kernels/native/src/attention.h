// What attention_plan.c lays out and attention.c does.
#ifndef STREAMSERVE_ATTENTION_H
#define STREAMSERVE_ATTENTION_H

#include "streamserve.h"

// Keys of a tile, rows of a tile (a row is one query head), most rows of an item whose tokens have
// fewer heads than that.
enum { TILE = 64, ROWS = SS_ROWS, MAX_ITEM_ROWS = 96 };

// For how many times 16 keys, or elements, the sums of so many rows stay in registers.
#define VECTORS(rows) ((rows) <= 6 ? SS_VECTORS(rows) : 2)

typedef struct {
    int32_t first;     // where its tokens stand in plan->tokens
    int32_t count;     // how many
    int32_t request;   // whose row of the block table
    int32_t key_begin; // keys [key_begin, key_end); begin is a multiple of 16
    int32_t key_end;
    int64_t partial;   // where its parts lie in the scratch, in floats, or -1: it is all there is
} item;

typedef struct {
    int32_t item;
    int32_t row;  // the token's place in the item
} part;

struct ss_attention_plan {
    int64_t num_items, num_parts, num_tokens, num_listed;
    int64_t max_items, max_parts, max_tokens, max_listed, max_floats;
    item *items;
    int32_t *tokens;      // [listed] tokens of the items
    int32_t *positions;   // [T]
    int32_t *group_of;    // [R] the group that a request is in, or -1
    int32_t *part_start;  // [T + 1] where a token's parts start
    part *parts;
    float *scratch;
    int64_t partial_floats, thread_floats;
    int64_t max_requests;
};

// Rows that a unit has room for, and floats that a thread needs for it: of each row the accumulator,
// sums by lane and the reference of its exponents; of one tile scores and weights.
static inline int64_t ss_item_rows(int64_t group_size) { return ss_max(MAX_ITEM_ROWS, group_size); }

static inline int64_t ss_thread_floats(int64_t group_size, int64_t value_size) {
    const int64_t floats = ss_item_rows(group_size) * (value_size + 17) + 2 * ROWS * TILE;
    return ss_ceil_div(floats, 16) * 16;
}

#endif
