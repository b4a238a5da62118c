// The work of a step's attention, as a list of *items*: some query tokens of one request over a range
// of its keys. An item and a kv head make a unit. An item is small enough that units balance over the
// threads (flash-decoding, Dao et al. 2023); one that covers only a part of a query's keys leaves
// (accumulator, maximum, sum) for each row, and `ss_attend_merge` joins the parts by log-sum-exp.
// Leading blocks that several requests share are one item for all of them (cascade attention, Ye
// et al. 2024), so their keys and values are read once.
#include "attention.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { LEAST_SPLIT = 128, UNITS_PER_THREAD = 4 };

ss_attention_plan *ss_plan_new(void) { return calloc(1, sizeof(ss_attention_plan)); }

void ss_plan_free(ss_attention_plan *plan) {
    if (!plan) return;
    free(plan->items);
    free(plan->tokens);
    free(plan->positions);
    free(plan->group_of);
    free(plan->part_start);
    free(plan->parts);
    free(plan->scratch);
    free(plan);
}

static int grow(void **memory, int64_t *capacity, int64_t wanted, size_t size) {
    if (wanted <= *capacity) return 0;
    const int64_t more = ss_max(wanted, 2 * *capacity);
    void *larger = realloc(*memory, (size_t)more * size);
    if (!larger) return -1;
    *memory = larger;
    *capacity = more;
    return 0;
}

#define GROW(memory, capacity, wanted) \
    grow((void **)&(memory), &(capacity), (wanted), sizeof(*(memory)))

typedef struct {
    ss_attention_plan *plan;
    int64_t group_size;   // query heads of a kv head
    int64_t kv_heads;
    int64_t row_floats;   // of one row's part
    int64_t num_threads;
    double unit_cost;     // above which an item is cut
    int failed;
} builder;

static double item_cost(int64_t keys, int64_t rows) { return (double)keys * (double)(rows + 4); }

// Pieces of one item are alike: as many for each thread, rather fewer where that leaves each some.
static int64_t even_splits(const builder *b, int64_t splits) {
    int64_t fewer = splits, more = splits;
    while (fewer * b->kv_heads % b->num_threads) fewer--;
    while (more * b->kv_heads % b->num_threads) more++;
    return fewer * b->kv_heads >= 2 * b->num_threads ? fewer : more;
}

// Adds the tokens plan->tokens[first:first + count] over [begin, end), cut into equal ranges.
static void add_items(builder *b, int64_t first, int64_t count, int64_t request, int64_t begin,
                      int64_t end, int is_part) {
    ss_attention_plan *plan = b->plan;
    const int64_t rows = count * b->group_size, keys = end - begin;
    int64_t splits = (int64_t)ceil(item_cost(keys, rows) / b->unit_cost);
    if (splits > 1) splits = even_splits(b, splits);
    splits = ss_max(1, ss_min(splits, keys / LEAST_SPLIT));
    if (GROW(plan->items, plan->max_items, plan->num_items + splits)) {
        b->failed = 1;
        return;
    }
    for (int64_t i = 0; i < splits; i++) {
        const int64_t low = begin + keys * i / splits / TILE * TILE;
        const int64_t high = i + 1 == splits ? end : begin + keys * (i + 1) / splits / TILE * TILE;
        if (low >= high) continue;
        item *added = plan->items + plan->num_items++;
        *added = (item){(int32_t)first, (int32_t)count, (int32_t)request, (int32_t)low,
                        (int32_t)high, -1};
        if (splits > 1 || is_part) {
            added->partial = plan->partial_floats;
            plan->partial_floats += b->kv_heads * rows * b->row_floats;
        }
    }
}

// Query tokens of one item: as many as fit the rows that a unit holds.
static int64_t tokens_per_item(const builder *b) {
    return ss_max(1, MAX_ITEM_ROWS / b->group_size);
}

static void add_request(builder *b, const ss_step *step, int64_t r, int64_t block_size) {
    ss_attention_plan *plan = b->plan;
    const int64_t start = step->query_start_loc[r], end = step->query_start_loc[r + 1];
    const int64_t shared =
        plan->group_of[r] < 0 ? 0 : step->group_blocks[plan->group_of[r]] * block_size;
    const int64_t num_items = ss_ceil_div(end - start, tokens_per_item(b));
    // The last tokens see the most keys: longest work first.
    for (int64_t i = num_items - 1; i >= 0; i--) {
        const int64_t low = start + (end - start) * i / num_items;
        const int64_t high = start + (end - start) * (i + 1) / num_items;
        const int64_t last = plan->positions[high - 1] + 1;
        for (int64_t t = low; t < high; t++) plan->tokens[plan->num_listed++] = (int32_t)t;
        add_items(b, plan->num_listed - (high - low), high - low, r, shared, last, shared > 0);
    }
}

static void add_group(builder *b, const ss_step *step, int64_t g, int64_t block_size) {
    ss_attention_plan *plan = b->plan;
    const int64_t most = tokens_per_item(b);
    const int64_t shared = step->group_blocks[g] * block_size;
    const int64_t request = step->group_members[step->group_starts[g]];
    int64_t first = plan->num_listed;
    for (int32_t m = step->group_starts[g]; m < step->group_starts[g + 1]; m++) {
        const int32_t r = step->group_members[m];
        for (int32_t t = step->query_start_loc[r]; t < step->query_start_loc[r + 1]; t++) {
            plan->tokens[plan->num_listed++] = t;
            if (plan->num_listed - first == most) {
                add_items(b, first, most, request, 0, shared, 1);
                first = plan->num_listed;
            }
        }
    }
    if (plan->num_listed > first)
        add_items(b, first, plan->num_listed - first, request, 0, shared, 1);
}

// Which parts each token has.
static int link_parts(ss_attention_plan *plan) {
    int64_t total = 0;
    memset(plan->part_start, 0, (size_t)(plan->num_tokens + 1) * sizeof(int32_t));
    for (int64_t i = 0; i < plan->num_items; i++) {
        if (plan->items[i].partial < 0) continue;
        total += plan->items[i].count;
        for (int32_t q = 0; q < plan->items[i].count; q++)
            plan->part_start[plan->tokens[plan->items[i].first + q] + 1]++;
    }
    for (int64_t t = 0; t < plan->num_tokens; t++) plan->part_start[t + 1] += plan->part_start[t];
    if (GROW(plan->parts, plan->max_parts, total + 1)) return -1;
    // Filled from behind, so that part_start[t + 1] ends up where t's parts start.
    for (int64_t i = plan->num_items - 1; i >= 0; i--) {
        if (plan->items[i].partial < 0) continue;
        for (int32_t q = plan->items[i].count - 1; q >= 0; q--)
            plan->parts[--plan->part_start[plan->tokens[plan->items[i].first + q] + 1]] =
                (part){(int32_t)i, q};
    }
    for (int64_t t = 0; t < plan->num_tokens; t++) plan->part_start[t] = plan->part_start[t + 1];
    plan->part_start[plan->num_tokens] = (int32_t)total;
    plan->num_parts = total;
    return 0;
}

// What the queries of a step are to the units' balance, all kv heads together.
static double total_cost(const builder *b, const ss_step *step, int64_t block_size) {
    double cost = 0;
    for (int64_t r = 0; r < step->num_requests; r++) {
        const int64_t queries = step->query_start_loc[r + 1] - step->query_start_loc[r];
        const int64_t g = b->plan->group_of[r];
        const int64_t shared = g < 0 ? 0 : step->group_blocks[g] * block_size;
        if (queries) cost += item_cost(step->seq_lens[r] - shared, queries * b->group_size);
    }
    for (int64_t g = 0; g < step->num_groups; g++) {
        int64_t queries = 0;
        for (int32_t m = step->group_starts[g]; m < step->group_starts[g + 1]; m++) {
            const int32_t r = step->group_members[m];
            queries += step->query_start_loc[r + 1] - step->query_start_loc[r];
        }
        cost += item_cost(step->group_blocks[g] * block_size, queries * b->group_size);
    }
    return cost * (double)b->kv_heads;
}

int ss_plan_build(ss_attention_plan *plan, const ss_step *step, int num_threads,
                  const int64_t *sizes) {
    const int64_t tokens = step->num_tokens, requests = step->num_requests;
    const int64_t num_kv_heads = sizes[1], value_size = sizes[2], block_size = sizes[3];
    builder b = {plan, sizes[0] / num_kv_heads, num_kv_heads, value_size + 2, num_threads, INFINITY, 0};
    int64_t capacity = plan->max_tokens;  // of both of these
    if (GROW(plan->positions, capacity, tokens + 1)) return -1;
    if (GROW(plan->part_start, plan->max_tokens, tokens + 1)) return -1;
    if (GROW(plan->tokens, plan->max_listed, 2 * tokens + 2)) return -1;
    if (GROW(plan->group_of, plan->max_requests, requests + 1)) return -1;
    plan->num_items = plan->num_listed = plan->partial_floats = 0;
    plan->num_tokens = tokens;
    for (int64_t r = 0; r < requests; r++) {
        plan->group_of[r] = -1;
        const int32_t start = step->query_start_loc[r], end = step->query_start_loc[r + 1];
        for (int32_t t = start; t < end; t++) plan->positions[t] = step->seq_lens[r] - end + t;
    }
    for (int64_t g = 0; g < step->num_groups; g++)
        for (int32_t m = step->group_starts[g]; m < step->group_starts[g + 1]; m++)
            plan->group_of[step->group_members[m]] = (int32_t)g;
    const double cost = num_threads == 1 ? 0 : total_cost(&b, step, block_size);
    if (cost > 0) b.unit_cost = cost / (UNITS_PER_THREAD * num_threads);
    for (int64_t g = 0; g < step->num_groups; g++) add_group(&b, step, g, block_size);
    // Chunks before decodes, whose small units fill up what the large ones leave.
    for (int decodes = 0; decodes < 2; decodes++)
        for (int64_t r = 0; r < requests; r++)
            if ((step->query_start_loc[r + 1] - step->query_start_loc[r] <= 1) == decodes)
                add_request(&b, step, r, block_size);
    if (b.failed || link_parts(plan)) return -1;
    plan->thread_floats = ss_thread_floats(b.group_size, value_size);
    plan->partial_floats = ss_ceil_div(plan->partial_floats, 16) * 16;
    const int64_t floats = plan->partial_floats + num_threads * plan->thread_floats;
    if (floats > plan->max_floats) {
        free(plan->scratch);
        plan->max_floats = 0;
        plan->scratch = aligned_alloc(64, (size_t)(2 * floats) * sizeof(float));
        if (!plan->scratch) return -1;
        plan->max_floats = 2 * floats;
    }
    return 0;
}
