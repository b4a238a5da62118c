// Paged attention of ragged queries, decodes and prompt chunks alike.
//
// The work of a step is a list of *items*: some query tokens of one request over a range of its
// keys. An item and a kv head make a unit. An item is small enough that units balance over the
// threads (flash-decoding, Dao et al. 2023); one that covers only a part of a query's keys leaves
// (accumulator, maximum, sum) for each row, and `ss_attend_merge` joins the parts by log-sum-exp.
// Leading blocks that several requests share are one item for all of them (cascade attention, Ye
// et al. 2024), so their keys and values are read once.
//
// Inside a unit, tiles of 64 keys are multiplied with 4 rows at a time (a row is one query head):
// scores and weighted values are VDPBF16PS products on the cache as it lies, see elementwise.c.
#include "streamserve.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { TILE = 64, ROWS = 4, MAX_ITEM_ROWS = 64, LEAST_SPLIT = 128, UNITS_PER_THREAD = 4 };

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
    double unit_cost;     // above which an item is cut
    int failed;
} builder;

static double item_cost(int64_t keys, int64_t rows) { return (double)keys * (double)(rows + 4); }

// Adds the tokens plan->tokens[first:first + count] over [begin, end), cut into equal ranges.
static void add_items(builder *b, int64_t first, int64_t count, int64_t request, int64_t begin,
                      int64_t end, int is_part) {
    ss_attention_plan *plan = b->plan;
    const int64_t rows = count * b->group_size, keys = end - begin;
    int64_t splits = (int64_t)ceil(item_cost(keys, rows) / b->unit_cost);
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
    const int64_t most = tokens_per_item(b);
    // The last tile sees the most keys: longest work first.
    for (int64_t high = end; high > start; high -= most) {
        const int64_t low = ss_max(start, high - most);
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
    builder b = {plan, sizes[0] / num_kv_heads, num_kv_heads, value_size + 2, INFINITY, 0};
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
    for (int64_t r = 0; r < requests; r++) add_request(&b, step, r, block_size);
    if (b.failed || link_parts(plan)) return -1;
    const int64_t rows = ss_max(MAX_ITEM_ROWS, b.group_size);
    plan->thread_floats = ss_ceil_div(rows * (value_size + 2) + 2 * ROWS * TILE, 16) * 16;
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

enum {
    ATTEND_OUT,  // [T, Hq, Dv]
    ATTEND_QUERY,
    ATTEND_QUERY_STRIDE,
    ATTEND_KEY_CACHE,
    ATTEND_VALUE_CACHE,
    ATTEND_HEADS,
    ATTEND_KV_HEADS,
    ATTEND_HEAD_SIZE,
    ATTEND_VALUE_SIZE,
    ATTEND_BLOCK_SIZE,
    ATTEND_SCALE,
    ATTEND_WINDOW,    // 0: none
    ATTEND_SLOPES,    // [Hq] float32, or 0
    ATTEND_SOFT_CAP,  // 0: none
    ATTEND_SINKS,     // [Hq] float32, or 0
};

// A window may cut a shared prefix, for each query at another place: then nothing is shared.
static const ss_attention_plan *plan_of(const ss_context *context, const int64_t *args) {
    return args[ATTEND_WINDOW] && context->longest > args[ATTEND_WINDOW]
               ? context->plan_without_groups
               : context->plan;
}

static int64_t attend_units(const ss_context *context, const int64_t *args) {
    return plan_of(context, args)->num_items * args[ATTEND_KV_HEADS];
}

// One tile: where its keys and values lie, 16 tokens to a piece. Blocks lie anywhere, so the
// hardware cannot guess the next one: while a tile is used, that of the next is asked for.
typedef struct {
    const bf16 *keys[TILE / 16];
    const bf16 *values[TILE / 16];
    int64_t start;  // position of the first key
    int64_t count;  // keys of the item that are in it
} tile;

static void place_tile(tile *t, const int64_t *args, const int32_t *table, int64_t h, int64_t start,
                       int64_t end) {
    const int64_t size = args[ATTEND_BLOCK_SIZE];
    t->start = start;
    t->count = ss_min(TILE, end - start);
    for (int64_t v = 0; 16 * v < t->count; v++) {
        const int64_t key = start + 16 * v;
        const int64_t row = (table[key / size] * args[ATTEND_KV_HEADS] + h) * size + key % size;
        t->keys[v] = (const bf16 *)args[ATTEND_KEY_CACHE] + row * args[ATTEND_HEAD_SIZE];
        t->values[v] = (const bf16 *)args[ATTEND_VALUE_CACHE] + row * args[ATTEND_VALUE_SIZE];
    }
}

// Asks for line `line` of each piece.
static inline __attribute__((always_inline)) void ask(const bf16 *const *pieces, int64_t line) {
    for (int v = 0; v < TILE / 16; v++)
        _mm_prefetch((const char *)(pieces[v] + 32 * line), _MM_HINT_T1);
}

// scores[m][v] = row m of the queries · keys of piece v.
static inline __attribute__((always_inline)) void score_rows(float *scores, const bf16 *const *rows,
                                                             const tile *t, const tile *next,
                                                             int64_t pairs, int num_rows,
                                                             int pieces) {
    __m512 sums[ROWS][TILE / 16];
    for (int m = 0; m < num_rows; m++)
        for (int v = 0; v < pieces; v++) sums[m][v] = _mm512_setzero_ps();
    for (int64_t d = 0; d < pairs; d++) {
        if (next) ask(next->keys, d);
        __m512bh keys[TILE / 16];
        for (int v = 0; v < pieces; v++)
            keys[v] = (__m512bh)_mm512_loadu_si512(t->keys[v] + 32 * d);
        for (int m = 0; m < num_rows; m++) {
            const __m512bh q = (__m512bh)_mm512_set1_epi32(((const ss_pair *)rows[m])[d]);
            for (int v = 0; v < pieces; v++) sums[m][v] = _mm512_dpbf16_ps(sums[m][v], q, keys[v]);
        }
    }
    for (int m = 0; m < num_rows; m++)
        for (int v = 0; v < pieces; v++)
            _mm512_store_ps(scores + m * TILE + 16 * v, sums[m][v]);
}

// acc[m] = factor[m]·acc[m] + weights[m] · values, for `vectors` times 16 elements.
static inline __attribute__((always_inline)) void weigh_rows(float *acc, int64_t acc_stride,
                                                             const float *factors,
                                                             const bf16 *weights, const tile *t,
                                                             const tile *next, int64_t value_size,
                                                             int64_t first, int num_rows,
                                                             int vectors) {
    __m512 sums[ROWS][4];
    for (int m = 0; m < num_rows; m++)
        for (int v = 0; v < vectors; v++)
            sums[m][v] = _mm512_mul_ps(_mm512_load_ps(acc + m * acc_stride + first + 16 * v),
                                       _mm512_set1_ps(factors[m]));
    const int64_t pairs = t->count / 2;
    for (int64_t s = 0; s < pairs; s++) {
        const int64_t at = (s % 8) * 2 * value_size + 2 * first;
        const bf16 *line = t->values[s / 8] + at;
        if (next)
            for (int v = 0; v < vectors; v++)
                _mm_prefetch((const char *)(next->values[s / 8] + at + 32 * v), _MM_HINT_T1);
        __m512bh values[4];
        for (int v = 0; v < vectors; v++) values[v] = (__m512bh)_mm512_loadu_si512(line + 32 * v);
        for (int m = 0; m < num_rows; m++) {
            const __m512bh p =
                (__m512bh)_mm512_set1_epi32(((const ss_pair *)(weights + m * TILE))[s]);
            for (int v = 0; v < vectors; v++)
                sums[m][v] = _mm512_dpbf16_ps(sums[m][v], p, values[v]);
        }
    }
    if (t->count % 2) {
        // What lies behind the last key belongs to nobody and may be anything, even NaN.
        const bf16 *line = t->values[pairs / 8] + (pairs % 8) * 2 * value_size + 2 * first;
        const __m512i low = _mm512_set1_epi32(0xffff);
        for (int v = 0; v < vectors; v++) {
            const __m512bh value =
                (__m512bh)_mm512_and_si512(_mm512_loadu_si512(line + 32 * v), low);
            for (int m = 0; m < num_rows; m++) {
                const __m512bh p =
                    (__m512bh)_mm512_set1_epi32(((const ss_pair *)(weights + m * TILE))[pairs]);
                sums[m][v] = _mm512_dpbf16_ps(sums[m][v], p, value);
            }
        }
    }
    for (int m = 0; m < num_rows; m++)
        for (int v = 0; v < vectors; v++)
            _mm512_store_ps(acc + m * acc_stride + first + 16 * v, sums[m][v]);
}

#define SCORE(M, V) case 4 * M + V - 5: score_rows(scores, rows, t, next, pairs, M, V); break;
#define SCORES(M) SCORE(M, 1) SCORE(M, 2) SCORE(M, 3) SCORE(M, 4)

static void score(float *scores, const bf16 *const *rows, const tile *t, const tile *next,
                  int64_t pairs, int64_t num_rows, int64_t pieces) {
    switch (4 * num_rows + pieces - 5) { SCORES(1) SCORES(2) SCORES(3) SCORES(4) }
}

#define WEIGH(M, V)                                                                         \
    case 4 * M + V - 5:                                                                     \
        weigh_rows(acc, acc_stride, factors, weights, t, next, value_size, first, M, V);    \
        break;
#define WEIGHS(M) WEIGH(M, 1) WEIGH(M, 2) WEIGH(M, 3) WEIGH(M, 4)

static void weigh(float *acc, int64_t acc_stride, const float *factors, const bf16 *weights,
                  const tile *t, const tile *next, int64_t value_size, int64_t num_rows) {
    for (int64_t first = 0; first < value_size; first += 64) {
        const int64_t vectors = ss_min(4, (value_size - first) / 16);
        switch (4 * num_rows + vectors - 5) { WEIGHS(1) WEIGHS(2) WEIGHS(3) WEIGHS(4) }
    }
}

typedef struct {
    float scale, soft_cap, slope;
    int64_t position;  // of the query
    int64_t low, high; // keys that it sees
} row_view;

// Online softmax (Milakov & Gimelshein 2018) of one row over a tile. Scores become bfloat16
// weights; returns the factor for what was accumulated before.
static float soften(float *scores, bf16 *weights, const tile *t, const row_view *view,
                    float *maximum, float *sum) {
    const int64_t low = ss_max(0, view->low - t->start);
    const int64_t high = ss_min(t->count, view->high - t->start);
    const __m512 lowest = _mm512_set1_ps(-INFINITY);
    __m512 pieces[TILE / 16], most = lowest;
    const int64_t num_pieces = ss_ceil_div(t->count, 16);
    for (int64_t v = 0; v < num_pieces; v++) {
        __m512 x = _mm512_mul_ps(_mm512_load_ps(scores + 16 * v), _mm512_set1_ps(view->scale));
        if (view->soft_cap != 0.0f) {
            // cap·tanh(x / cap), by tanh(y) = 1 - 2 / (e^2y + 1)
            const __m512 cap = _mm512_set1_ps(view->soft_cap), one = _mm512_set1_ps(1.0f);
            const __m512 e = ss_exp(_mm512_div_ps(_mm512_add_ps(x, x), cap));
            x = _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(e, one)));
            x = _mm512_mul_ps(x, cap);
        }
        if (view->slope != 0.0f) {
            const __m512 steps = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            const float distance = (float)(t->start + 16 * v - view->position);
            x = _mm512_fmadd_ps(_mm512_set1_ps(view->slope),
                                _mm512_add_ps(steps, _mm512_set1_ps(distance)), x);
        }
        const __mmask16 seen = ss_mask(high - 16 * v) & (__mmask16)~ss_mask(low - 16 * v);
        pieces[v] = _mm512_mask_mov_ps(lowest, seen, x);
        most = _mm512_max_ps(pieces[v], most);
    }
    const float old = *maximum, new = fmaxf(old, _mm512_reduce_max_ps(most));
    if (new == -INFINITY) {
        memset(weights, 0, TILE * sizeof(bf16));
        return 1.0f;
    }
    __m512 total = _mm512_setzero_ps();
    for (int64_t v = 0; v < num_pieces; v++) {
        // What is not seen weighs exactly 0.
        const __m512 p = ss_exp(_mm512_sub_ps(pieces[v], _mm512_set1_ps(new)));
        const __mmask16 seen = _mm512_cmp_ps_mask(pieces[v], lowest, _CMP_NEQ_UQ);
        const __m512 kept = _mm512_maskz_mov_ps(seen, p);
        total = _mm512_add_ps(total, kept);
        ss_store(weights + 16 * v, kept);
    }
    const float factor = old == -INFINITY ? 0.0f : expf(old - new);
    *maximum = new;
    *sum = *sum * factor + _mm512_reduce_add_ps(total);
    return factor;
}

static void attend_run(const ss_context *context, const int64_t *args, int64_t unit,
                       int64_t num_units, int thread) {
    const ss_attention_plan *plan = plan_of(context, args);
    const ss_step *step = context->step;
    const int64_t kv_heads = args[ATTEND_KV_HEADS], h = unit % kv_heads;
    const item *work = plan->items + unit / kv_heads;
    const int64_t heads = args[ATTEND_HEADS], group = heads / kv_heads;
    const int64_t head_size = args[ATTEND_HEAD_SIZE], value_size = args[ATTEND_VALUE_SIZE];
    const int64_t window = args[ATTEND_WINDOW];
    const int64_t num_rows = work->count * group;
    const int32_t *table = step->block_table + work->request * step->table_stride;
    float *area = plan->scratch + plan->partial_floats + thread * plan->thread_floats;
    float *scores = area;                                  // [ROWS, TILE]
    bf16 *weights = (bf16 *)(area + ROWS * TILE);          // [ROWS, TILE]
    float *maxima = area + 2 * ROWS * TILE;                // [rows]
    float *sums = maxima + ss_max(MAX_ITEM_ROWS, group);   // [rows]
    float *acc = area + ss_ceil_div(sums + ss_max(MAX_ITEM_ROWS, group) - area, 16) * 16;
    (void)num_units;
    for (int64_t m = 0; m < num_rows; m++) maxima[m] = -INFINITY, sums[m] = 0.0f;
    memset(acc, 0, (size_t)(num_rows * value_size) * sizeof(float));

    int64_t begin = work->key_begin;
    if (window) {
        const int64_t first = plan->positions[plan->tokens[work->first]] - window + 1;
        begin = ss_max(begin, ss_min(first, work->key_end) / 16 * 16);
    }
    tile now, next;
    place_tile(&next, args, table, h, begin, work->key_end);
    for (int64_t at = begin; at < work->key_end; at += TILE) {
        now = next;
        // A whole tile is worth asking for; what is left at the end comes by itself.
        const int more = at + 2 * TILE <= work->key_end;
        if (at + TILE < work->key_end)
            place_tile(&next, args, table, h, at + TILE, work->key_end);
        const tile *t = &now;
        const int64_t pieces = ss_ceil_div(t->count, 16);
        for (int64_t first = 0; first < num_rows; first += ROWS) {
            const int64_t count = ss_min(ROWS, num_rows - first);
            const bf16 *rows[ROWS];
            float factors[ROWS];
            row_view views[ROWS];
            int64_t most_seen = 0;
            for (int64_t m = 0; m < count; m++) {
                const int64_t token = plan->tokens[work->first + (first + m) / group];
                const int64_t head = h * group + (first + m) % group;
                const int64_t position = plan->positions[token];
                rows[m] = (const bf16 *)args[ATTEND_QUERY] + token * args[ATTEND_QUERY_STRIDE] +
                          head * head_size;
                views[m] = (row_view){
                    .scale = (float)ss_double(args[ATTEND_SCALE]),
                    .soft_cap = (float)ss_double(args[ATTEND_SOFT_CAP]),
                    .slope = args[ATTEND_SLOPES] ? ((const float *)args[ATTEND_SLOPES])[head] : 0,
                    .position = position,
                    .low = window ? position - window + 1 : 0,
                    .high = position + 1,
                };
                most_seen = ss_max(most_seen, position + 1 - at);
            }
            if (most_seen <= 0) continue;  // a tile that these queries come before
            const tile *ahead = more && first == 0 ? &next : 0;
            score(scores, rows, t, ahead, head_size / 2, count, pieces);
            for (int64_t m = 0; m < count; m++)
                factors[m] = soften(scores + m * TILE, weights + m * TILE, t, views + m,
                                    maxima + first + m, sums + first + m);
            weigh(acc + first * value_size, value_size, factors, weights, t, ahead, value_size,
                  count);
        }
    }
    for (int64_t m = 0; m < num_rows; m++) {
        const float *row = acc + m * value_size;
        if (work->partial >= 0) {
            float *to = plan->scratch + work->partial + (h * num_rows + m) * (value_size + 2);
            memcpy(to, row, (size_t)value_size * sizeof(float));
            to[value_size] = maxima[m];
            to[value_size + 1] = sums[m];
            continue;
        }
        const int64_t token = plan->tokens[work->first + m / group], head = h * group + m % group;
        float total = sums[m];
        if (args[ATTEND_SINKS]) total += expf(((const float *)args[ATTEND_SINKS])[head] - maxima[m]);
        const __m512 inverse = _mm512_set1_ps(1.0f / total);
        bf16 *to = (bf16 *)args[ATTEND_OUT] + (token * heads + head) * value_size;
        for (int64_t d = 0; d < value_size; d += 16)
            ss_store(to + d, _mm512_mul_ps(_mm512_load_ps(row + d), inverse));
    }
}

const ss_operation ss_attend = {attend_units, attend_run, 0};

static int64_t merge_units(const ss_context *context, const int64_t *args) {
    const ss_step *step = context->step;
    const int64_t padding = step->num_tokens - step->query_start_loc[step->num_requests];
    if (!plan_of(context, args)->num_parts && !padding) return 0;
    return ss_min(step->num_tokens, 4 * (int64_t)context->num_threads);
}

static void merge_head(const ss_attention_plan *plan, const int64_t *args, int64_t token,
                       int64_t head) {
    const int64_t value_size = args[ATTEND_VALUE_SIZE], heads = args[ATTEND_HEADS];
    const int64_t group = heads / args[ATTEND_KV_HEADS];
    const part *parts = plan->parts + plan->part_start[token];
    const int64_t num_parts = plan->part_start[token + 1] - plan->part_start[token];
    const float *row;
    float maximum = -INFINITY, total = 0.0f;
    bf16 *to = (bf16 *)args[ATTEND_OUT] + (token * heads + head) * value_size;
#define PART_ROW(p)                                                                          \
    (plan->scratch + plan->items[parts[p].item].partial +                                    \
     ((head / group) * plan->items[parts[p].item].count * group + parts[p].row * group +     \
      head % group) *                                                                        \
         (value_size + 2))
    for (int64_t p = 0; p < num_parts; p++) maximum = fmaxf(maximum, PART_ROW(p)[value_size]);
    for (int64_t p = 0; p < num_parts; p++) {
        row = PART_ROW(p);
        if (row[value_size + 1] > 0.0f) total += row[value_size + 1] * expf(row[value_size] - maximum);
    }
    if (args[ATTEND_SINKS]) total += expf(((const float *)args[ATTEND_SINKS])[head] - maximum);
    for (int64_t d = 0; d < value_size; d += 16) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t p = 0; p < num_parts; p++) {
            row = PART_ROW(p);
            if (!(row[value_size + 1] > 0.0f)) continue;
            const __m512 share = _mm512_set1_ps(expf(row[value_size] - maximum) / total);
            sum = _mm512_fmadd_ps(share, _mm512_loadu_ps(row + d), sum);
        }
        ss_store(to + d, sum);
    }
#undef PART_ROW
}

static void merge_run(const ss_context *context, const int64_t *args, int64_t unit,
                      int64_t num_units, int thread) {
    const ss_attention_plan *plan = plan_of(context, args);
    const ss_step *step = context->step;
    const int64_t heads = args[ATTEND_HEADS], used = step->query_start_loc[step->num_requests];
    (void)thread;
    for (int64_t token = step->num_tokens * unit / num_units;
         token < step->num_tokens * (unit + 1) / num_units; token++) {
        if (token >= used) {
            memset((bf16 *)args[ATTEND_OUT] + token * heads * args[ATTEND_VALUE_SIZE], 0,
                   (size_t)(heads * args[ATTEND_VALUE_SIZE]) * sizeof(bf16));
        } else if (plan->part_start[token + 1] > plan->part_start[token]) {
            for (int64_t head = 0; head < heads; head++) merge_head(plan, args, token, head);
        }
    }
}

const ss_operation ss_attend_merge = {merge_units, merge_run, 0};
