// States that are matrices, of a gated delta rule or a state space: see recurrent.py for what they
// mean, recurrent.c for the rest of such layers.
#include "recurrent.h"

#include <math.h>

// Unrolled early, or sums would go through memory before and behind the loops over them.
#define EACH(i, count) _Pragma("GCC unroll 8") for (int i = 0; i < (count); i++)

// The gated delta rule: with S before a token, p = kᵀS, r = qᵀS and g what is kept of it,
//
//     delta = beta (v - g p)      y = g r + (q·k) delta      S = g S + k deltaᵀ
//
// so that one pass over S updates it by a token and sums p and r of the next.
//
// A state space, of which B are the keys, C the queries, x the values and the time step is beta:
//
//     delta = beta v              S = g S + k deltaᵀ         y = qᵀS + skip v
//
// so that one pass updates S by a token and sums its y.
//
// Columns of S do not know of each other: a tile of them stays in the first-level cache for all
// tokens of a sequence. Whatever the tiles, the sums of a column are in the same order.

enum {
    RULE_OUT,
    RULE_IN,  // queries, keys, values; x, B, C
    RULE_IN_STRIDE,
    RULE_GATES,  // b, a; dt
    RULE_GATES_STRIDE,
    RULE_DECAY,      // [Hv] float32
    RULE_TIME_BIAS,  // [Hv] float32
    RULE_SCALES,     // [T, 3 * Hk + 2 * Hv] float32: see delta_scales_run; [T, 2 * H]: times_run
    RULE_STATES,
    RULE_SLOTS,
    RULE_KEY_HEADS,  // or groups
    RULE_HEADS,
    RULE_KEY_SIZE,
    RULE_VALUE_SIZE,
    RULE_SKIP,  // [H] float32; of a state space only
};
enum { MAX_KEY_SIZE = 256 };  // MAX_KEY_SIZE of recurrent.py
enum { TILE = 32 };           // columns

// Columns of a state that is read once: in whole rows where there are registers for their sums.
#ifdef __AVX512F__
enum { WIDE = 8 };
#else
enum { WIDE = 2 };
#endif

static int64_t delta_scales_stride(const int64_t *args) {
    return 3 * args[RULE_KEY_HEADS] + 2 * args[RULE_HEADS];
}

static int rule_begin(const ss_context *context, const int64_t *args) {
    return slots_begin(context->step, args[RULE_SLOTS]);
}

static int64_t delta_scales_units(const ss_context *context, const int64_t *args) {
    return ss_row_units(context->step->num_tokens,
                        2 * args[RULE_KEY_HEADS] * args[RULE_KEY_SIZE] + 16 * args[RULE_HEADS],
                        context->num_threads);
}

// log(1 + e^x), by the area tangent: log(1 + e) = 2 artanh(e / (2 + e)), here of 1/3 at most.
static inline __m512 softplus(__m512 x) {
    const __m512 zero = _mm512_setzero_ps(), two = _mm512_set1_ps(2.0f);
    const __m512 magnitude = _mm512_max_ps(_mm512_sub_ps(zero, x), x);
    const __m512 e = ss_exp(_mm512_sub_ps(zero, magnitude));
    const __m512 s = _mm512_div_ps(e, _mm512_add_ps(two, e)), square = _mm512_mul_ps(s, s);
    __m512 series = _mm512_set1_ps(1.0f / 15.0f);
    for (int n = 13; n > 0; n -= 2)
        series = _mm512_fmadd_ps(series, square, _mm512_set1_ps(1.0f / (float)n));
    return _mm512_fmadd_ps(_mm512_mul_ps(two, s), series, _mm512_max_ps(zero, x));
}

// The time steps of 16 heads from `at` on; what they keep of a state.
static inline __m512 time_step(const int64_t *args, const bf16 *rates, int64_t at,
                               __mmask16 mask) {
    const float *bias = (const float *)args[RULE_TIME_BIAS] + at;
    return softplus(
        _mm512_add_ps(ss_load_masked(rates + at, mask), _mm512_maskz_loadu_ps(mask, bias)));
}

static inline __m512 kept_share(const int64_t *args, __m512 time, int64_t at, __mmask16 mask) {
    const float *decay = (const float *)args[RULE_DECAY] + at;
    return ss_exp(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, decay), time));
}

// What a key head's query and key are scaled by, and the product of the scaled ones.
static void scale_head(float *query_scale, float *key_scale, float *dot, const bf16 *query,
                       const bf16 *key, int64_t size) {
    __m512 queries = _mm512_setzero_ps(), keys = queries, both = queries;
    for (int64_t d = 0; d < size; d += 16) {
        const __mmask16 mask = ss_mask(size - d);
        const __m512 q = ss_load_masked(query + d, mask), k = ss_load_masked(key + d, mask);
        queries = _mm512_fmadd_ps(q, q, queries);
        keys = _mm512_fmadd_ps(k, k, keys);
        both = _mm512_fmadd_ps(q, k, both);
    }
    *query_scale = 1.0f / sqrtf((_mm512_reduce_add_ps(queries) + 1e-6f) * (float)size);
    *key_scale = 1.0f / sqrtf(_mm512_reduce_add_ps(keys) + 1e-6f);
    *dot = _mm512_reduce_add_ps(both) * *query_scale * *key_scale;
}

// Of each row: the scales of queries, those of keys, the products of both; beta; what is kept.
static void delta_scales_run(const ss_context *context, const int64_t *args, int64_t unit,
                             int64_t num_units, int thread) {
    (void)thread;
    const int64_t key_heads = args[RULE_KEY_HEADS], heads = args[RULE_HEADS];
    const int64_t size = args[RULE_KEY_SIZE];
    SS_FOR_ROWS(row, rows_in_use(context->step)) {
        float *scales = (float *)args[RULE_SCALES] + row * delta_scales_stride(args);
        const bf16 *query = (const bf16 *)args[RULE_IN] + row * args[RULE_IN_STRIDE];
        const bf16 *key = query + key_heads * size;
        for (int64_t h = 0; h < key_heads; h++)
            scale_head(scales + h, scales + key_heads + h, scales + 2 * key_heads + h,
                       query + h * size, key + h * size, size);
        float *betas = scales + 3 * key_heads, *kept = betas + heads;
        const bf16 *gates = (const bf16 *)args[RULE_GATES] + row * args[RULE_GATES_STRIDE];
        for (int64_t h = 0; h < heads; h += 16) {
            const __mmask16 mask = ss_mask(heads - h);
            const __m512 beta = ss_rounded(sigmoid(ss_load_masked(gates + h, mask)));
            _mm512_mask_storeu_ps(betas + h, mask, beta);
            const __m512 time = time_step(args, gates + heads, h, mask);
            _mm512_mask_storeu_ps(kept + h, mask, kept_share(args, time, h, mask));
        }
    }
}

const ss_operation ss_delta_scales = {delta_scales_units, delta_scales_run, rule_begin};

static int64_t times_units(const ss_context *context, const int64_t *args) {
    return ss_row_units(context->step->num_tokens, 16 * args[RULE_HEADS], context->num_threads);
}

// Of each row: the time steps; what is kept.
static void times_run(const ss_context *context, const int64_t *args, int64_t unit,
                      int64_t num_units, int thread) {
    (void)thread;
    const int64_t heads = args[RULE_HEADS];
    SS_FOR_ROWS(row, rows_in_use(context->step)) {
        float *times = (float *)args[RULE_SCALES] + row * 2 * heads, *kept = times + heads;
        const bf16 *rates = (const bf16 *)args[RULE_GATES] + row * args[RULE_GATES_STRIDE];
        for (int64_t h = 0; h < heads; h += 16) {
            const __mmask16 mask = ss_mask(heads - h);
            const __m512 time = time_step(args, rates, h, mask);
            _mm512_mask_storeu_ps(times + h, mask, time);
            _mm512_mask_storeu_ps(kept + h, mask, kept_share(args, time, h, mask));
        }
    }
}

const ss_operation ss_state_space_times = {times_units, times_run, rule_begin};

// A row as one head sees it; a delta rule's query and key are scaled.
typedef struct {
    float query[MAX_KEY_SIZE], key[MAX_KEY_SIZE];
    float beta, kept, dot, skip;  // dot: of a delta rule, skip: of a state space
    const bf16 *value;
    bf16 *out;
} token;

static void read_of_space(token *to, const int64_t *args, int64_t row, int64_t head) {
    const int64_t groups = args[RULE_KEY_HEADS], heads = args[RULE_HEADS];
    const int64_t size = args[RULE_KEY_SIZE], value_size = args[RULE_VALUE_SIZE];
    const int64_t group = head / (heads / groups);
    const float *times = (const float *)args[RULE_SCALES] + row * 2 * heads;
    const bf16 *x = (const bf16 *)args[RULE_IN] + row * args[RULE_IN_STRIDE];
    const bf16 *key = x + heads * value_size + group * size;
    ss_widen_row(to->key, key, size);
    ss_widen_row(to->query, key + groups * size, size);
    to->beta = times[head];
    to->kept = times[heads + head];
    to->skip = ((const float *)args[RULE_SKIP])[head];
    to->value = x + head * value_size;
    to->out = (bf16 *)args[RULE_OUT] + (row * heads + head) * value_size;
}

static void read_of_delta(token *to, const int64_t *args, int64_t row, int64_t head) {
    const int64_t key_heads = args[RULE_KEY_HEADS], heads = args[RULE_HEADS];
    const int64_t size = args[RULE_KEY_SIZE], value_size = args[RULE_VALUE_SIZE];
    const int64_t key_head = head / (heads / key_heads);
    const float *scales = (const float *)args[RULE_SCALES] + row * delta_scales_stride(args);
    const bf16 *query = (const bf16 *)args[RULE_IN] + row * args[RULE_IN_STRIDE];
    const bf16 *key = query + key_heads * size;
    const __m512 query_scale = _mm512_set1_ps(scales[key_head]);
    const __m512 key_scale = _mm512_set1_ps(scales[key_heads + key_head]);
    for (int64_t d = 0; d < size; d += 16) {
        const __mmask16 mask = ss_mask(size - d);
        const int64_t at = key_head * size + d;
        _mm512_storeu_ps(to->query + d,
                         _mm512_mul_ps(ss_load_masked(query + at, mask), query_scale));
        _mm512_storeu_ps(to->key + d, _mm512_mul_ps(ss_load_masked(key + at, mask), key_scale));
    }
    to->dot = scales[2 * key_heads + key_head];
    to->beta = scales[3 * key_heads + head];
    to->kept = scales[3 * key_heads + heads + head];
    to->value = key + key_heads * size + head * value_size;
    to->out = (bf16 *)args[RULE_OUT] + (row * heads + head) * value_size;
}

// What the columns of a state have to do with the query and the key of a token.
typedef struct {
    __m512 by_query[WIDE], by_key[WIDE];
} sums;

// Updates `vectors` times 16 columns [size, stride] by `old` and `deltas`, and sums them by `next`;
// without one of these it does the other. Constant where it is inlined: which, and `vectors`; sums
// that are not looked at are not made. Without `masks` the vectors are whole.
SS_INLINE void pass(float *columns, int64_t stride, int64_t size, int vectors,
                    const __mmask16 *masks, const token *old, const __m512 *deltas,
                    const token *next, sums *found) {
    __m512 by_query[WIDE], by_key[WIDE];
    EACH(v, vectors) by_query[v] = by_key[v] = _mm512_setzero_ps();
    const __m512 kept = _mm512_set1_ps(old ? old->kept : 0.0f);
    for (int64_t d = 0; d < size; d++) {
        float *row = columns + d * stride;
        EACH(v, vectors) {
            __m512 state = masks ? _mm512_maskz_loadu_ps(masks[v], row + 16 * v)
                                 : _mm512_loadu_ps(row + 16 * v);
            if (old) {
                state = _mm512_fmadd_ps(_mm512_set1_ps(old->key[d]), deltas[v],
                                        _mm512_mul_ps(kept, state));
                if (masks)
                    _mm512_mask_storeu_ps(row + 16 * v, masks[v], state);
                else
                    _mm512_storeu_ps(row + 16 * v, state);
            }
            if (next) {
                by_key[v] = _mm512_fmadd_ps(_mm512_set1_ps(next->key[d]), state, by_key[v]);
                by_query[v] = _mm512_fmadd_ps(_mm512_set1_ps(next->query[d]), state, by_query[v]);
            }
        }
    }
    if (next) EACH(v, vectors) found->by_query[v] = by_query[v], found->by_key[v] = by_key[v];
}

// y of a token, from column `first` on, and what is to be added to the state.
SS_INLINE void settle(__m512 *deltas, const token *t, const sums *found, int64_t first,
                      int vectors, const __mmask16 *masks) {
    const __m512 kept = _mm512_set1_ps(t->kept), beta = _mm512_set1_ps(t->beta);
    EACH(v, vectors) {
        const __mmask16 mask = masks ? masks[v] : (__mmask16)0xffff;
        const int64_t at = first + 16 * v;
        const __m512 value = ss_load_masked(t->value + at, mask);
        deltas[v] = _mm512_mul_ps(beta, _mm512_fnmadd_ps(kept, found->by_key[v], value));
        const __m512 y = _mm512_fmadd_ps(_mm512_set1_ps(t->dot), deltas[v],
                                         _mm512_mul_ps(kept, found->by_query[v]));
        ss_store_masked(t->out + at, y, mask);
    }
}

// A token of a state space: the columns from `first` on, and their y. Those of a tile are whole.
SS_INLINE void step_of_space(float *columns, int64_t stride, int64_t size, const token *t,
                             int64_t first, int vectors, const __mmask16 *masks, int is_tile) {
    sums found;
    __m512 values[WIDE], deltas[WIDE];
    EACH(v, vectors) {
        const __mmask16 mask = masks ? masks[v] : (__mmask16)0xffff;
        values[v] = ss_load_masked(t->value + first + 16 * v, mask);
        deltas[v] = _mm512_mul_ps(_mm512_set1_ps(t->beta), values[v]);
    }
    pass(columns, stride, size, vectors, is_tile ? 0 : masks, t, deltas, t, &found);
    EACH(v, vectors) {
        const __mmask16 mask = masks ? masks[v] : (__mmask16)0xffff;
        const __m512 y = _mm512_fmadd_ps(_mm512_set1_ps(t->skip), values[v], found.by_query[v]);
        ss_store_masked(t->out + first + 16 * v, y, mask);
    }
}

SS_INLINE void step_columns(float *state, int64_t stride, int64_t size, const token *t,
                            int64_t first, int vectors, const __mmask16 *masks, int is_space) {
    sums found;
    __m512 deltas[WIDE];
    if (is_space) {
        step_of_space(state + first, stride, size, t, first, vectors, masks, 0);
        return;
    }
    pass(state + first, stride, size, vectors, masks, 0, 0, t, &found);
    settle(deltas, t, &found, first, vectors, masks);
    pass(state + first, stride, size, vectors, masks, t, deltas, 0, 0);
}

// One token, where the state lies: from memory in whole rows; of a delta rule once more from the
// caches. Constant where it is inlined: whether it is a state space.
SS_INLINE void step_in_place(float *state, int64_t stride, int64_t size, const token *t,
                             int64_t first, int64_t end, int is_space) {
    while (first < end) {
        if (WIDE > 2 && first + 16 * WIDE <= end) {
            step_columns(state, stride, size, t, first, WIDE, 0, is_space);
            first += 16 * WIDE;
        } else if (WIDE > 4 && first + 64 <= end) {
            step_columns(state, stride, size, t, first, 4, 0, is_space);
            first += 64;
        } else if (first + TILE <= end) {
            step_columns(state, stride, size, t, first, 2, 0, is_space);
            first += TILE;
        } else {
            const __mmask16 masks[2] = {ss_mask(end - first), ss_mask(end - first - 16)};
            step_columns(state, stride, size, t, first, 2, masks, is_space);
            first += TILE;
        }
    }
}

static void copy_columns(float *to, int64_t to_stride, const float *from, int64_t from_stride,
                         int64_t rows, int64_t columns) {
    for (int64_t d = 0; d < rows; d++)
        __builtin_memcpy(to + d * to_stride, from + d * from_stride,
                         sizeof(float) * (size_t)columns);
}

// All tokens of a sequence in a tile of columns that lies together.
SS_INLINE void run_tile(const ss_step *step, const int64_t *args, const sequence *s, float *states,
                        int64_t state_size, int64_t head, int64_t first, int64_t end,
                        int is_space) {
    const int64_t size = args[RULE_KEY_SIZE], stride = args[RULE_VALUE_SIZE];
    const int64_t columns = end - first;
    const __mmask16 masks[2] = {ss_mask(columns), ss_mask(columns - 16)};
    float tile[MAX_KEY_SIZE * TILE] __attribute__((aligned(64)));
    token tokens[2];
    sums found;
    __m512 deltas[2];
    if (s->starts || columns < TILE) __builtin_memset(tile, 0, sizeof(float) * size * TILE);
    if (!s->starts)
        copy_columns(tile, TILE, states + s->slot * state_size + first, stride, size, columns);
    if (!is_space) {
        read_of_delta(&tokens[s->begin % 2], args, s->begin, head);
        pass(tile, TILE, size, 2, 0, 0, 0, &tokens[s->begin % 2], &found);
    }
    for (int64_t row = s->begin; row < s->end; row++) {
        token *this = &tokens[row % 2], *next = &tokens[(row + 1) % 2];
        if (is_space) {
            read_of_space(this, args, row, head);
            step_of_space(tile, TILE, size, this, first, 2, masks, 1);
        } else {
            settle(deltas, this, &found, first, 2, masks);
            if (row + 1 < s->end) {
                read_of_delta(next, args, row + 1, head);
                pass(tile, TILE, size, 2, 0, this, deltas, next, &found);
            } else {
                pass(tile, TILE, size, 2, 0, this, deltas, 0, 0);
            }
        }
        const int64_t save = step->state_saves[row];
        if (save >= 0)
            copy_columns(states + save * state_size + first, stride, tile, TILE, size, columns);
    }
    if (s->slot >= 0)
        copy_columns(states + s->slot * state_size + first, stride, tile, TILE, size, columns);
}

// Pieces that a head's columns fall into: more than one only where heads are too few to share.
static int64_t head_pieces(const ss_context *context, const int64_t *args) {
    const int64_t heads = ss_max(context->step->num_requests * args[RULE_HEADS], 1);
    return ss_min(ss_ceil_div(args[RULE_VALUE_SIZE], TILE),
                  ss_ceil_div(2 * (int64_t)context->num_threads, heads));
}

// Pieces of each head of each sequence, and the rows behind them.
static int64_t rule_units(const ss_context *context, const int64_t *args) {
    return context->step->num_requests * args[RULE_HEADS] * head_pieces(context, args) +
           (rows_in_use(context->step) < context->step->num_tokens);
}

SS_INLINE void rule_run(const ss_context *context, const int64_t *args, int64_t unit,
                        int is_space) {
    const ss_step *step = context->step;
    const int64_t heads = args[RULE_HEADS], pieces = head_pieces(context, args);
    const int64_t size = args[RULE_KEY_SIZE], value_size = args[RULE_VALUE_SIZE];
    const int64_t head = unit / pieces % heads, r = unit / pieces / heads;
    if (r == step->num_requests) {
        const int64_t used = rows_in_use(step), width = heads * value_size;
        __builtin_memset((bf16 *)args[RULE_OUT] + used * width, 0,
                         2 * (size_t)((step->num_tokens - used) * width));
        return;
    }
    const sequence s = sequence_of(step, r);
    if (s.begin == s.end) return;
    const int64_t tiles = ss_ceil_div(value_size, TILE), piece = unit % pieces;
    const int64_t first = TILE * (tiles * piece / pieces);
    const int64_t end = ss_min(TILE * (tiles * (piece + 1) / pieces), value_size);
    const int64_t state_size = heads * size * value_size;
    float *states = (float *)args[RULE_STATES] + head * size * value_size;
    if (s.end > s.begin + 1 || s.starts) {
        for (int64_t c = first; c < end; c += TILE)
            run_tile(step, args, &s, states, state_size, head, c, ss_min(c + TILE, end), is_space);
        return;
    }
    float *own = states + s.slot * state_size;
    token t;
    if (is_space)
        read_of_space(&t, args, s.begin, head);
    else
        read_of_delta(&t, args, s.begin, head);
    step_in_place(own, value_size, size, &t, first, end, is_space);
    const int64_t save = step->state_saves[s.begin];
    if (save >= 0)
        copy_columns(states + save * state_size + first, value_size, own + first, value_size, size,
                     end - first);
}

static void delta_run(const ss_context *context, const int64_t *args, int64_t unit,
                      int64_t num_units, int thread) {
    (void)num_units, (void)thread;
    rule_run(context, args, unit, 0);
}

const ss_operation ss_delta_rule = {rule_units, delta_run, 0};

static void space_run(const ss_context *context, const int64_t *args, int64_t unit,
                      int64_t num_units, int thread) {
    (void)num_units, (void)thread;
    rule_run(context, args, unit, 1);
}

const ss_operation ss_state_space = {rule_units, space_run, 0};
