// Paged attention of ragged queries, decodes and prompt chunks alike: see attention_plan.c for how a
// step is cut into units.
//
// Inside a unit, tiles of 64 keys are multiplied with up to ROWS rows at a time (a row is one query
// head): scores and weighted values are VDPBF16PS products on the cache as it lies, see
// elementwise.c. The softmax between them works in powers of two, and what a row's exponents are
// taken from follows its maximum only when weights grow past MOST_SUM (as in FlashAttention-4).
// Nothing of a row depends on which rows it is multiplied with.
#include "attention.h"

#include <float.h>
#include <math.h>
#include <string.h>

#define LOG2E 1.44269504088896341f
#define MOST_SUM 256.0f
#define NO_REFERENCE (-FLT_MAX)  // finite: less it, what is not seen stays -infinity

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
    ATTEND_PLAN,      // which of the context's
};

// A window may cut a shared prefix, for each query at another place: then nothing is shared.
static const ss_attention_plan *plan_of(const ss_context *context, const int64_t *args) {
    const ss_plans *plans = context->plans + args[ATTEND_PLAN];
    return args[ATTEND_WINDOW] && context->longest > args[ATTEND_WINDOW] ? plans->without_groups
                                                                         : plans->plan;
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
    const int64_t size = args[ATTEND_BLOCK_SIZE], kv_heads = args[ATTEND_KV_HEADS];
    int64_t block = ss_small_div(start, size), offset = start - block * size;
    t->start = start;
    t->count = ss_min(TILE, end - start);
    for (int64_t v = 0; v < TILE / 16; v++) {
        const int64_t row = (table[block] * kv_heads + h) * size + offset;
        t->keys[v] = (const bf16 *)args[ATTEND_KEY_CACHE] + row * args[ATTEND_HEAD_SIZE];
        t->values[v] = (const bf16 *)args[ATTEND_VALUE_CACHE] + row * args[ATTEND_VALUE_SIZE];
        // In place of pieces that it does not have stands its last: asked for, never read.
        if (16 * (v + 1) >= t->count) continue;
        offset += 16;
        if (offset == size) {
            block++;
            offset = 0;
        }
    }
}

// The first key of an item that any of its queries sees, whole pieces of a block.
static int64_t first_key(const ss_attention_plan *plan, const int64_t *args, const item *work) {
    if (!args[ATTEND_WINDOW]) return work->key_begin;
    const int64_t first = plan->positions[plan->tokens[work->first]] - args[ATTEND_WINDOW] + 1;
    return ss_max(work->key_begin, ss_min(first, work->key_end) / 16 * 16);
}

// What a thread does next, most likely; returns whether there is something.
static int place_next_unit(tile *t, const ss_context *context, const int64_t *args, int64_t unit,
                           int64_t num_units) {
    if (unit + 1 >= num_units) return 0;
    const ss_attention_plan *plan = plan_of(context, args);
    const int64_t kv_heads = args[ATTEND_KV_HEADS];
    const item *work = plan->items + (unit + 1) / kv_heads;
    const int64_t begin = first_key(plan, args, work);
    if (begin >= work->key_end) return 0;
    place_tile(t, args, context->step->block_table + work->request * context->step->table_stride,
               (unit + 1) % kv_heads, begin, work->key_end);
    return 1;
}

// Unrolled early, or the sums would go through memory before and behind the loops over them.
#define EACH(i, count) _Pragma("GCC unroll 16") for (int i = 0; i < (count); i++)

// scores[m][v] = row m of the queries · keys of piece v. `num_rows` and `pieces` are constants where
// it is inlined, and so is `asks`: whether a line of each piece of `ahead` is asked for in each turn.
// (A loop for that costs as much as a row on CPUs that decode jumps across 32 bytes anew each time.)
static inline __attribute__((always_inline)) void score_rows(float *scores,
                                                             const ss_factor *const *rows,
                                                             const bf16 *const *tile_keys,
                                                             const bf16 *const *ahead, int asks,
                                                             int64_t pairs, int num_rows,
                                                             int pieces) {
    __m512 sums[ROWS][TILE / 16];
    EACH(m, num_rows) EACH(v, pieces) sums[m][v] = _mm512_setzero_ps();
    for (int64_t d = 0; d < pairs; d++) {
        if (asks)
            EACH(v, pieces) _mm_prefetch((const char *)(ahead[v] + 32 * d), _MM_HINT_T1);
        EACH(part, SS_PARTS) {
            ss_elements keys[TILE / 16];
            EACH(v, pieces)
                keys[v] = ss_pairs_part(_mm512_loadu_si512(tile_keys[v] + 32 * d), part);
            EACH(m, num_rows) {
                const ss_elements q = ss_factor_part(rows[m] + 2 * d, part);
                EACH(v, pieces) sums[m][v] = ss_multiply_add(q, keys[v], sums[m][v]);
            }
        }
    }
    EACH(m, num_rows) EACH(v, pieces) _mm512_store_ps(scores + m * TILE + 16 * v, sums[m][v]);
}

// acc[m] += weights[m] · values of the first keys, for `vectors` times 16 elements behind `first`.
// With `asks` as many lines of `ahead` are asked for in each turn, from the same place on.
static inline __attribute__((always_inline)) void weigh_rows(float *acc, const ss_factor *weights,
                                                             const bf16 *const *tile_values,
                                                             const bf16 *const *ahead, int asks,
                                                             int64_t pairs, int64_t value_size,
                                                             int num_rows, int vectors) {
    __m512 sums[ROWS][TILE / 16];
    EACH(m, num_rows) EACH(v, vectors)
        sums[m][v] = _mm512_load_ps(acc + m * value_size + 16 * v);
    for (int64_t s = 0; s < pairs; s++) {
        const int64_t at = (s % 8) * 2 * value_size;
        if (asks)
            EACH(v, vectors)
                _mm_prefetch((const char *)(ahead[s / 8] + at + 32 * v), _MM_HINT_T1);
        EACH(part, SS_PARTS) {
            ss_elements values[TILE / 16];
            EACH(v, vectors) {
                const __m512i pairs = _mm512_loadu_si512(tile_values[s / 8] + at + 32 * v);
                values[v] = ss_pairs_part(pairs, part);
            }
            EACH(m, num_rows) {
                const ss_elements p = ss_factor_part(weights + m * TILE + 2 * s, part);
                EACH(v, vectors) sums[m][v] = ss_multiply_add(p, values[v], sums[m][v]);
            }
        }
    }
    EACH(m, num_rows) EACH(v, vectors)
        _mm512_store_ps(acc + m * value_size + 16 * v, sums[m][v]);
}

// Those of more sums than there are registers for are empty.
#define KERNELS(M, V)                                                                              \
    static void score_##M##_##V(float *scores, const ss_factor *const *rows,                       \
                                const bf16 *const *keys, const bf16 *const *ahead, int asks,       \
                                int64_t pairs) {                                                   \
        if (M > ROWS || V > VECTORS(M)) __builtin_unreachable();                                   \
        if (asks) score_rows(scores, rows, keys, ahead, 1, pairs, M, V);                           \
        else score_rows(scores, rows, keys, ahead, 0, pairs, M, V);                                \
    }                                                                                              \
    static void weigh_##M##_##V(float *acc, const ss_factor *weights,                              \
                                const bf16 *const *tile_values, const bf16 *const *ahead,          \
                                int asks, int64_t pairs, int64_t value_size) {                     \
        if (M > ROWS || V > VECTORS(M)) __builtin_unreachable();                                   \
        if (asks) weigh_rows(acc, weights, tile_values, ahead, 1, pairs, value_size, M, V);        \
        else weigh_rows(acc, weights, tile_values, ahead, 0, pairs, value_size, M, V);             \
    }
#define ROW_KERNELS(M) KERNELS(M, 1) KERNELS(M, 2) KERNELS(M, 3) KERNELS(M, 4)
#define SCORES(M) {score_##M##_1, score_##M##_2, score_##M##_3, score_##M##_4},
#define WEIGHS(M) {weigh_##M##_1, weigh_##M##_2, weigh_##M##_3, weigh_##M##_4},
#define EACH_COUNT(OF)                                                                             \
    OF(1) OF(2) OF(3) OF(4) OF(5) OF(6) OF(7) OF(8) OF(9) OF(10) OF(11) OF(12)
EACH_COUNT(ROW_KERNELS)
static void (*const SCORE_OF[12][4])(float *, const ss_factor *const *, const bf16 *const *,
                                       const bf16 *const *, int, int64_t) = {EACH_COUNT(SCORES)};
static void (*const WEIGH_OF[12][4])(float *, const ss_factor *, const bf16 *const *,
                                       const bf16 *const *, int, int64_t,
                                       int64_t) = {EACH_COUNT(WEIGHS)};

// Row tiles take turns in asking for the next tile, a pass of each; the last asks for what is left.
typedef struct {
    const tile *next;
    int64_t turn, turns;
} asking;

static int asks(const asking *ask, int64_t pass) {
    return ask->turn == ss_min(pass, ask->turns - 1);
}

static void score(float *scores, const ss_factor *const *rows, const tile *t, const asking *ask,
                  int64_t keys, int64_t head_size, int64_t num_rows) {
    const int64_t pieces = ss_ceil_div(keys, 16);
    for (int64_t v = 0, pass = 0; v < pieces; v += VECTORS(num_rows), pass++) {
        const int64_t count = ss_min(VECTORS(num_rows), pieces - v);
        SCORE_OF[num_rows - 1][count - 1](scores + 16 * v, rows, t->keys + v, ask->next->keys + v,
                                          asks(ask, pass), head_size / 2);
    }
}

// The same of a key without a neighbour. What lies behind it belongs to nobody and may be anything,
// even NaN.
static void weigh_last(float *acc, const ss_factor *weights, const tile *t, int64_t key,
                       int64_t value_size, int64_t num_rows) {
    const bf16 *line = t->values[key / 16] + key % 16 * value_size;
    for (int64_t d = 0; d < value_size; d += 16) {
        const __m512i value =
            _mm512_and_si512(_mm512_loadu_si512(line + 2 * d), _mm512_set1_epi32(0xffff));
        for (int64_t m = 0; m < num_rows; m++) {
            float *to = acc + m * value_size + d;
            const ss_elements p = ss_factor_part(weights + m * TILE + key, 0);
            _mm512_store_ps(to, ss_multiply_add(p, ss_pairs_part(value, 0), _mm512_load_ps(to)));
        }
    }
}

static void weigh(float *acc, const ss_factor *weights, const tile *t, const asking *ask, int64_t keys,
                  int64_t value_size, int64_t num_rows) {
    const int64_t vectors = value_size / 16, passes = ss_ceil_div(vectors, VECTORS(num_rows));
    for (int64_t pass = 0; pass < passes; pass++) {
        const int64_t first = ss_small_div(vectors * pass, passes);
        const int64_t count = ss_small_div(vectors * (pass + 1), passes) - first;
        const bf16 *values[TILE / 16], *ahead[TILE / 16];
        for (int v = 0; v < TILE / 16; v++) {
            values[v] = t->values[v] + 32 * first;
            ahead[v] = ask->next->values[v] + 32 * first;
        }
        WEIGH_OF[num_rows - 1][count - 1](acc + 16 * first, weights, values, ahead,
                                          asks(ask, pass + 1), keys / 2, value_size);
    }
    if (keys % 2) weigh_last(acc, weights, t, keys - 1, value_size, num_rows);
}

// 2**x within 3 parts in a million; exactly 0 of -infinity, and a NaN stays.
static inline __m512 power_of_two(__m512 x) {
#ifdef __AVX512F__
    // VSCALEFPS takes the floor of x, the polynomial what is above it.
    const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
    // What is too small to be a normal number is 0, what is too large still far above MOST_SUM.
    x = _mm512_max_ps(_mm512_set1_ps(-127.0f), _mm512_min_ps(_mm512_set1_ps(127.0f), x));
    const __m512 floor = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(x, floor);
    const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(floor), _mm512_set1_epi32(127));
#endif
    __m512 p = _mm512_set1_ps(1.353416792e-2f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.201146061e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.414427569e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.930038345e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.000002593f));
#ifdef __AVX512F__
    return _mm512_scalef_ps(p, x);
#else
    return _mm512_mul_ps(p, _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23)));
#endif
}

// One query head of a unit.
typedef struct {
    const ss_factor *query;
    int64_t position;
    float slope;
} row;

// What a unit has in hand. Exponents of a row are scores times `scale`, less its reference.
typedef struct {
    const row *rows;
    float *scores;      // [ROWS, TILE]
    ss_factor *weights; // [ROWS, TILE]
    float *references;  // [rows] what is subtracted from a row's exponents
    float *sums;        // [rows, 16] of the weights, by lane
    float *acc;         // [rows, Dv]
    int64_t head_size, value_size, window;
    float scale, soft_cap;
    int reshapes;  // whether scores are more than products times the scale
} state;

// A unit's scores as exponents where a soft cap or ALiBi wants more than a factor.
static void reshape(const state *s, const tile *t, float *scores, const row *r) {
    const __m512 log2e = _mm512_set1_ps(LOG2E);
    const __m512 steps = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int v = 0; v < TILE / 16; v++) {
        __m512 x = _mm512_mul_ps(_mm512_load_ps(scores + 16 * v), _mm512_set1_ps(s->scale));
        if (s->soft_cap != 0.0f) {
            // cap·tanh(x / cap), by tanh(y) = 1 - 2 / (e^2y + 1)
            const __m512 cap = _mm512_set1_ps(s->soft_cap), one = _mm512_set1_ps(1.0f);
            const __m512 e = ss_exp(_mm512_div_ps(_mm512_add_ps(x, x), cap));
            x = _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(e, one)));
            x = _mm512_mul_ps(x, cap);
        }
        const float distance = (float)(t->start + 16 * v - r->position);
        x = _mm512_fmadd_ps(_mm512_set1_ps(r->slope),
                            _mm512_add_ps(steps, _mm512_set1_ps(distance)), x);
        _mm512_store_ps(scores + 16 * v, _mm512_mul_ps(x, log2e));
    }
}

// The reference of row `m` becomes its largest score so far, and what was summed up follows.
static __attribute__((noinline)) void raise_reference(const state *s, int64_t m,
                                                      const float *scores, float scale,
                                                      uint64_t seen) {
    __m512 most = _mm512_set1_ps(s->references[m]);
    for (int v = 0; v < TILE / 16; v++) {
        const __m512 x = _mm512_mul_ps(_mm512_load_ps(scores + 16 * v), _mm512_set1_ps(scale));
        // A NaN is what comes first, and does not count.
        most = _mm512_mask_max_ps(most, (__mmask16)(seen >> 16 * v), x, most);
    }
    const float old = s->references[m], reference = _mm512_reduce_max_ps(most);
    s->references[m] = reference;
    if (old == NO_REFERENCE) return;
    const __m512 factor = power_of_two(_mm512_set1_ps(old - reference));
    float *sums = s->sums + 16 * m, *acc = s->acc + m * s->value_size;
    _mm512_store_ps(sums, _mm512_mul_ps(_mm512_load_ps(sums), factor));
    for (int64_t d = 0; d < s->value_size; d += 16)
        _mm512_store_ps(acc + d, _mm512_mul_ps(_mm512_load_ps(acc + d), factor));
}

// Online softmax (Milakov & Gimelshein 2018) of row `m` over a tile: scores become bfloat16 weights.
// Keys that are not `seen` weigh exactly 0; `masked`, a constant where it is inlined, tells whether
// there are any.
static inline __attribute__((always_inline)) void soften(const state *s, int64_t m,
                                                         const float *scores, ss_factor *weights,
                                                         float scale, uint64_t seen, int masked) {
    if (s->references[m] == NO_REFERENCE) raise_reference(s, m, scores, scale, seen);
    __m512 sum;
    for (int raised = 0;; raised = 1) {
        const __m512 reference = _mm512_set1_ps(s->references[m]);
        __m512 p[TILE / 16];
        EACH(v, TILE / 16) {
            p[v] = _mm512_fmsub_ps(_mm512_load_ps(scores + 16 * v), _mm512_set1_ps(scale), reference);
            if (masked)
                p[v] = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), (__mmask16)(seen >> 16 * v),
                                          p[v]);
            p[v] = power_of_two(p[v]);
        }
        EACH(v, TILE / 32) ss_store_factors(weights + 32 * v, p[2 * v], p[2 * v + 1]);
        sum = _mm512_add_ps(_mm512_add_ps(p[0], p[1]), _mm512_add_ps(p[2], p[3]));
        if (raised || !_mm512_cmp_ps_mask(sum, _mm512_set1_ps(MOST_SUM), _CMP_GT_OQ)) break;
        raise_reference(s, m, scores, scale, seen);
    }
    float *sums = s->sums + 16 * m;
    _mm512_store_ps(sums, _mm512_add_ps(_mm512_load_ps(sums), sum));
}

static uint64_t lowest_bits(int64_t count) {
    return count >= 64 ? ~0ull : count <= 0 ? 0 : (1ull << count) - 1;
}

// Rows [first, first + count) of a unit take in a tile; 0 if they see nothing of it.
static int attend_tile(const state *s, const tile *t, const asking *ask, int64_t first,
                       int64_t count) {
    const row *rows = s->rows + first;
    int64_t least = rows[0].position, most = least;
    for (int64_t m = 0; m < count; m++) {
        least = ss_min(least, rows[m].position);
        most = ss_max(most, rows[m].position);
    }
    // Keys that come after all of these queries are left out, and those that lie too far back.
    const int64_t keys = ss_min(t->count, most + 1 - t->start);
    if (keys <= 0 || (s->window && t->start + t->count <= least - s->window + 1)) return 0;
    const ss_factor *queries[ROWS];
    for (int64_t m = 0; m < count; m++) queries[m] = rows[m].query;
    score(s->scores, queries, t, ask, keys, s->head_size, count);
    const int whole = t->start + TILE <= least + 1 && t->count == TILE &&
                      (!s->window || t->start > most - s->window);
    for (int64_t m = 0; m < count; m++) {
        float *scores = s->scores + m * TILE;
        ss_factor *weights = s->weights + m * TILE;
        if (s->reshapes) reshape(s, t, scores, rows + m);
        const float scale = s->reshapes ? 1.0f : s->scale;
        if (whole) {
            soften(s, first + m, scores, weights, scale, ~0ull, 0);
            continue;
        }
        uint64_t seen = lowest_bits(ss_min(t->count, rows[m].position + 1 - t->start));
        if (s->window) seen &= ~lowest_bits(rows[m].position - s->window + 1 - t->start);
        soften(s, first + m, scores, weights, scale, seen, 1);
    }
    weigh(s->acc + first * s->value_size, s->weights, t, ask, keys, s->value_size, count);
    return 1;
}

// The queries are widened into `wide`, [rows, D], where the CPU needs that.
static state begin_unit(const ss_context *context, const int64_t *args, const item *work, int64_t h,
                        row *rows, float *wide, int thread) {
    const ss_attention_plan *plan = plan_of(context, args);
    const int64_t head_size = args[ATTEND_HEAD_SIZE], value_size = args[ATTEND_VALUE_SIZE];
    const int64_t group = args[ATTEND_HEADS] / args[ATTEND_KV_HEADS];
    const int64_t num_rows = work->count * group, room = ss_item_rows(group);
    const float *slopes = (const float *)args[ATTEND_SLOPES];
    for (int64_t q = 0; q < work->count; q++) {
        const int64_t token = plan->tokens[work->first + q];
        const bf16 *query = (const bf16 *)args[ATTEND_QUERY] + token * args[ATTEND_QUERY_STRIDE];
        query += h * group * head_size;
        const ss_factor *factors =
            ss_factors_of(query, wide + q * group * head_size, group * head_size);
        for (int64_t j = 0; j < group; j++)
            rows[q * group + j] = (row){factors + j * head_size, plan->positions[token],
                                        slopes ? slopes[h * group + j] : 0.0f};
    }
    float *area = plan->scratch + plan->partial_floats + thread * plan->thread_floats;
    const int reshapes = slopes || ss_double(args[ATTEND_SOFT_CAP]) != 0.0;
    state s = {
        .rows = rows,
        .scores = area,
        .weights = (ss_factor *)(area + ROWS * TILE),
        .sums = area + 2 * ROWS * TILE,
        .acc = area + 2 * ROWS * TILE + 16 * room,
        .references = area + 2 * ROWS * TILE + (16 + value_size) * room,
        .head_size = head_size,
        .value_size = value_size,
        .window = args[ATTEND_WINDOW],
        .scale = (float)(ss_double(args[ATTEND_SCALE]) * (reshapes ? 1.0 : LOG2E)),
        .soft_cap = (float)ss_double(args[ATTEND_SOFT_CAP]),
        .reshapes = reshapes,
    };
    for (int64_t m = 0; m < num_rows; m++) s.references[m] = NO_REFERENCE;
    memset(s.sums, 0, (size_t)(num_rows * 16) * sizeof(float));
    memset(s.acc, 0, (size_t)(num_rows * value_size) * sizeof(float));
    return s;
}

// What a sink adds to the sum of weights whose exponents are taken from `reference`.
static float sink_weight(const int64_t *args, int64_t head, float reference) {
    const float *sinks = (const float *)args[ATTEND_SINKS];
    return sinks ? exp2f(sinks[head] * LOG2E - reference) : 0.0f;
}

static void finish_unit(const ss_context *context, const int64_t *args, const item *work, int64_t h,
                        const state *s) {
    const ss_attention_plan *plan = plan_of(context, args);
    const int64_t heads = args[ATTEND_HEADS], group = heads / args[ATTEND_KV_HEADS];
    const int64_t value_size = s->value_size, num_rows = work->count * group;
    for (int64_t m = 0; m < num_rows; m++) {
        const float *acc = s->acc + m * value_size;
        const float sum = _mm512_reduce_add_ps(_mm512_load_ps(s->sums + 16 * m));
        if (work->partial >= 0) {
            float *to = plan->scratch + work->partial + (h * num_rows + m) * (value_size + 2);
            memcpy(to, acc, (size_t)value_size * sizeof(float));
            to[value_size] = s->references[m];
            to[value_size + 1] = sum;
            continue;
        }
        const int64_t token = plan->tokens[work->first + m / group], head = h * group + m % group;
        const float total = sum + sink_weight(args, head, s->references[m]);
        const __m512 inverse = _mm512_set1_ps(1.0f / total);
        bf16 *to = (bf16 *)args[ATTEND_OUT] + (token * heads + head) * value_size;
        for (int64_t d = 0; d < value_size; d += 16)
            ss_store(to + d, _mm512_mul_ps(_mm512_load_ps(acc + d), inverse));
    }
}

static void attend_run(const ss_context *context, const int64_t *args, int64_t unit,
                       int64_t num_units, int thread) {
    const ss_attention_plan *plan = plan_of(context, args);
    const int64_t kv_heads = args[ATTEND_KV_HEADS], h = unit % kv_heads;
    const item *work = plan->items + unit / kv_heads;
    const int64_t num_rows = work->count * (args[ATTEND_HEADS] / kv_heads);
    const int64_t row_tiles = ss_ceil_div(num_rows, ROWS);
    const int32_t *table = context->step->block_table + work->request * context->step->table_stride;
    row rows[num_rows];
    float wide[SS_WIDENS ? num_rows * args[ATTEND_HEAD_SIZE] : 1];
    const state s = begin_unit(context, args, work, h, rows, wide, thread);
    const int64_t begin = first_key(plan, args, work);
    tile now, next;
    place_tile(&next, args, table, h, begin, work->key_end);
    for (int64_t at = begin; at < work->key_end; at += TILE) {
        asking ask = {&next, 0, row_tiles};
        now = next;
        if (at + TILE < work->key_end)
            place_tile(&next, args, table, h, at + TILE, work->key_end);
        else if (!place_next_unit(&next, context, args, unit, num_units))
            ask.turns = 0;
        for (int64_t i = 0; i < row_tiles; i++) {
            const int64_t first = ss_small_div(num_rows * i, row_tiles);
            const int64_t count = ss_small_div(num_rows * (i + 1), row_tiles) - first;
            ask.turn += attend_tile(&s, &now, &ask, first, count);
        }
    }
    finish_unit(context, args, work, h, &s);
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
    float reference = NO_REFERENCE, total = 0.0f;
    bf16 *to = (bf16 *)args[ATTEND_OUT] + (token * heads + head) * value_size;
#define PART_ROW(p)                                                                          \
    (plan->scratch + plan->items[parts[p].item].partial +                                    \
     ((head / group) * plan->items[parts[p].item].count * group + parts[p].row * group +     \
      head % group) *                                                                        \
         (value_size + 2))
    for (int64_t p = 0; p < num_parts; p++)
        if (PART_ROW(p)[value_size + 1] > 0.0f)
            reference = fmaxf(reference, PART_ROW(p)[value_size]);
    for (int64_t p = 0; p < num_parts; p++) {
        float *sum = PART_ROW(p) + value_size + 1, *factor = PART_ROW(p) + value_size;
        *factor = exp2f(*factor - reference);
        total += *sum * *factor;
    }
    total += sink_weight(args, head, reference);
    for (int64_t d = 0; d < value_size; d += 16) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t p = 0; p < num_parts; p++) {
            const __m512 share = _mm512_set1_ps(PART_ROW(p)[value_size] / total);
            sum = _mm512_fmadd_ps(share, _mm512_loadu_ps(PART_ROW(p) + d), sum);
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
