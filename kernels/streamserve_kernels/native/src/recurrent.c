// What layers remember of a sequence in a slot of constant size: see recurrent.py for what each
// operation means. A step's slots lie in its `state_slots` and `state_saves`.
#include "streamserve.h"

#include <math.h>

// Unrolled early, or sums would go through memory before and behind the loops over them.
#define EACH(i, count) _Pragma("GCC unroll 8") for (int i = 0; i < (count); i++)

// A sequence of the step: its rows, and where its state is.
typedef struct {
    int64_t begin, end;
    int64_t slot;  // -1: nothing is kept
    int starts;    // from zeros
} sequence;

static sequence sequence_of(const ss_step *step, int64_t r) {
    const int64_t begin = step->query_start_loc[r], end = step->query_start_loc[r + 1];
    const int64_t slot = step->state_slots[r];
    return (sequence){begin, end, slot, slot < 0 || step->seq_lens[r] == end - begin};
}

// The first row behind all sequences.
static int64_t rows_in_use(const ss_step *step) {
    return step->num_requests ? step->query_start_loc[step->num_requests] : 0;
}

// Whether a step's rows and slots are there: the operations follow them without looking.
static int slots_begin(const ss_step *step, int64_t num_slots) {
    if (step->num_requests && !step->state_slots) return SS_BAD_PLAN;
    if (step->num_tokens && !step->state_saves) return SS_BAD_PLAN;
    const int32_t *starts = step->query_start_loc;
    int64_t bad = step->num_requests && starts[0] != 0;
    for (int64_t r = 0; r < step->num_requests; r++) {
        const int64_t length = starts[r + 1] - (int64_t)starts[r];
        bad |= (length < 0) | (step->seq_lens[r] < length);
        bad |= (step->state_slots[r] < -1) | (step->state_slots[r] >= num_slots);
    }
    for (int64_t t = 0; t < step->num_tokens; t++)
        bad |= (step->state_saves[t] < -1) | (step->state_saves[t] >= num_slots);
    return bad || rows_in_use(step) > step->num_tokens ? SS_BAD_PLAN : SS_OK;
}

static inline __m512 sigmoid(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 e = ss_exp(_mm512_sub_ps(_mm512_setzero_ps(), x));
    return _mm512_div_ps(one, _mm512_add_ps(one, e));
}

static inline __m512 silu(__m512 x) {
    const __m512 e = ss_exp(_mm512_sub_ps(_mm512_setzero_ps(), x));
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), e));
}

// --- a convolution of each channel -------------------------------------------------------------

enum {
    CONV_OUT,
    CONV_IN,
    CONV_IN_STRIDE,
    CONV_TAPS,  // [W, C]
    CONV_BIAS,  // [C], or 0
    CONV_STATES,
    CONV_SLOTS,
    CONV_CHANNELS,
    CONV_WIDTH,
    CONV_SILU,
};
enum { MAX_WIDTH = 16 };  // MAX_WIDTH of recurrent.py

static int conv_begin(const ss_context *context, const int64_t *args) {
    return slots_begin(context->step, args[CONV_SLOTS]);
}

// By channels: a slot is written while other rows of its sequence may still be to come.
static int64_t conv_units(const ss_context *context, const int64_t *args) {
    const int64_t vectors = ss_ceil_div(args[CONV_CHANNELS], 16);
    return ss_min(vectors, ss_vector_units(context->step->num_tokens, args[CONV_CHANNELS],
                                           context->num_threads));
}

static void conv_row(bf16 *out, const bf16 *const *inputs, const int64_t *args, int64_t first,
                     int64_t end) {
    const int64_t channels = args[CONV_CHANNELS], width = args[CONV_WIDTH];
    const bf16 *taps = (const bf16 *)args[CONV_TAPS], *bias = (const bf16 *)args[CONV_BIAS];
    for (int64_t c = first; c < end; c += 16) {
        const __mmask16 mask = ss_mask(end - c);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t w = 0; w < width; w++)
            if (inputs[w])
                sum = _mm512_fmadd_ps(ss_load_masked(taps + w * channels + c, mask),
                                      ss_load_masked(inputs[w] + c, mask), sum);
        if (bias) sum = _mm512_add_ps(sum, ss_load_masked(bias + c, mask));
        ss_store_masked(out + c, args[CONV_SILU] ? silu(sum) : sum, mask);
    }
}

// The inputs behind the oldest become a slot's. They may lie there, each one place further on.
static void conv_keep(bf16 *slot, const bf16 *const *inputs, const int64_t *args, int64_t first,
                      int64_t end) {
    const size_t size = 2 * (size_t)(end - first);
    for (int64_t w = 1; w < args[CONV_WIDTH]; w++) {
        bf16 *to = slot + (w - 1) * args[CONV_CHANNELS] + first;
        if (inputs[w])
            __builtin_memcpy(to, inputs[w] + first, size);
        else
            __builtin_memset(to, 0, size);
    }
}

static void conv_sequence(const ss_step *step, const int64_t *args, const sequence *s,
                          int64_t first, int64_t end) {
    const int64_t channels = args[CONV_CHANNELS], width = args[CONV_WIDTH];
    const int64_t slot_size = (width - 1) * channels;
    bf16 *states = (bf16 *)args[CONV_STATES], *own = states + s->slot * slot_size;
    for (int64_t row = s->begin; row < s->end; row++) {
        const bf16 *inputs[MAX_WIDTH];  // 0: zeros
        for (int64_t w = 0; w < width; w++) {
            const int64_t at = row - (width - 1) + w;
            if (at >= s->begin)
                inputs[w] = (const bf16 *)args[CONV_IN] + at * args[CONV_IN_STRIDE];
            else
                inputs[w] = s->starts ? 0 : own + (at - s->begin + width - 1) * channels;
        }
        conv_row((bf16 *)args[CONV_OUT] + row * channels, inputs, args, first, end);
        const int64_t save = step->state_saves[row];
        if (save >= 0) conv_keep(states + save * slot_size, inputs, args, first, end);
        if (row == s->end - 1 && s->slot >= 0) conv_keep(own, inputs, args, first, end);
    }
}

static void conv_run(const ss_context *context, const int64_t *args, int64_t unit,
                     int64_t num_units, int thread) {
    (void)thread;
    const ss_step *step = context->step;
    const int64_t channels = args[CONV_CHANNELS], vectors = ss_ceil_div(channels, 16);
    const int64_t first = 16 * (vectors * unit / num_units);
    const int64_t end = ss_min(16 * (vectors * (unit + 1) / num_units), channels);
    for (int64_t r = 0; r < step->num_requests; r++) {
        const sequence s = sequence_of(step, r);
        conv_sequence(step, args, &s, first, end);
    }
    for (int64_t row = rows_in_use(step); row < step->num_tokens; row++)
        __builtin_memset((bf16 *)args[CONV_OUT] + row * channels + first, 0,
                         2 * (size_t)(end - first));
}

const ss_operation ss_causal_conv = {conv_units, conv_run, conv_begin};

// --- the gated delta rule ----------------------------------------------------------------------
//
// With S before a token, p = kᵀS, r = qᵀS and g what is kept of it:
//
//     delta = beta (v - g p)      y = g r + (q·k) delta      S = g S + k deltaᵀ
//
// so that one pass over S updates it by a token and sums p and r of the next. Columns of S do not
// know of each other: a tile of them stays in the first-level cache for all tokens of a sequence.
// Whatever the tiles, the sums of a column are in the same order.

enum {
    DELTA_OUT,
    DELTA_QKV,
    DELTA_QKV_STRIDE,
    DELTA_GATES,
    DELTA_GATES_STRIDE,
    DELTA_DECAY,      // [Hv] float32
    DELTA_TIME_BIAS,  // [Hv] float32
    DELTA_SCALES,     // [T, 3 * Hk + 2 * Hv] float32: see scales_run
    DELTA_STATES,
    DELTA_SLOTS,
    DELTA_KEY_HEADS,
    DELTA_HEADS,
    DELTA_KEY_SIZE,
    DELTA_VALUE_SIZE,
};
enum { MAX_KEY_SIZE = 256 };  // MAX_KEY_SIZE of recurrent.py
enum { TILE = 32 };           // columns

// Columns of a state that is read once: in whole rows where there are registers for their sums.
#ifdef __AVX512F__
enum { WIDE = 8 };
#else
enum { WIDE = 2 };
#endif

static int64_t scales_stride(const int64_t *args) {
    return 3 * args[DELTA_KEY_HEADS] + 2 * args[DELTA_HEADS];
}

static int scales_begin(const ss_context *context, const int64_t *args) {
    return slots_begin(context->step, args[DELTA_SLOTS]);
}

static int64_t scales_units(const ss_context *context, const int64_t *args) {
    return ss_row_units(context->step->num_tokens,
                        2 * args[DELTA_KEY_HEADS] * args[DELTA_KEY_SIZE] + 16 * args[DELTA_HEADS],
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
static void scales_run(const ss_context *context, const int64_t *args, int64_t unit,
                       int64_t num_units, int thread) {
    (void)thread;
    const int64_t key_heads = args[DELTA_KEY_HEADS], heads = args[DELTA_HEADS];
    const int64_t size = args[DELTA_KEY_SIZE];
    SS_FOR_ROWS(row, rows_in_use(context->step)) {
        float *scales = (float *)args[DELTA_SCALES] + row * scales_stride(args);
        const bf16 *query = (const bf16 *)args[DELTA_QKV] + row * args[DELTA_QKV_STRIDE];
        const bf16 *key = query + key_heads * size;
        for (int64_t h = 0; h < key_heads; h++)
            scale_head(scales + h, scales + key_heads + h, scales + 2 * key_heads + h,
                       query + h * size, key + h * size, size);
        float *betas = scales + 3 * key_heads, *kept = betas + heads;
        const bf16 *gates = (const bf16 *)args[DELTA_GATES] + row * args[DELTA_GATES_STRIDE];
        for (int64_t h = 0; h < heads; h += 16) {
            const __mmask16 mask = ss_mask(heads - h);
            const __m512 beta = ss_rounded(sigmoid(ss_load_masked(gates + h, mask)));
            _mm512_mask_storeu_ps(betas + h, mask, beta);
            const __m512 bias =
                _mm512_maskz_loadu_ps(mask, (const float *)args[DELTA_TIME_BIAS] + h);
            const __m512 time =
                softplus(_mm512_add_ps(ss_load_masked(gates + heads + h, mask), bias));
            const __m512 decay =
                _mm512_maskz_loadu_ps(mask, (const float *)args[DELTA_DECAY] + h);
            _mm512_mask_storeu_ps(kept + h, mask, ss_exp(_mm512_mul_ps(decay, time)));
        }
    }
}

const ss_operation ss_delta_scales = {scales_units, scales_run, scales_begin};

// A row of qkv as one value head sees it; query and key are scaled.
typedef struct {
    float query[MAX_KEY_SIZE], key[MAX_KEY_SIZE];
    float beta, kept, dot;
    const bf16 *value;
    bf16 *out;
} token;

static void read_token(token *to, const int64_t *args, int64_t row, int64_t head) {
    const int64_t key_heads = args[DELTA_KEY_HEADS], heads = args[DELTA_HEADS];
    const int64_t size = args[DELTA_KEY_SIZE], value_size = args[DELTA_VALUE_SIZE];
    const int64_t key_head = head / (heads / key_heads);
    const float *scales = (const float *)args[DELTA_SCALES] + row * scales_stride(args);
    const bf16 *query = (const bf16 *)args[DELTA_QKV] + row * args[DELTA_QKV_STRIDE];
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
    to->out = (bf16 *)args[DELTA_OUT] + (row * heads + head) * value_size;
}

// What the columns of a state have to do with the query and the key of a token.
typedef struct {
    __m512 by_query[WIDE], by_key[WIDE];
} sums;

// Updates `vectors` times 16 columns [size, stride] by `old` and `deltas`, and sums them by `next`;
// without one of these it does the other. Constant where it is inlined: which, and `vectors`.
// Without `masks` the vectors are whole.
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

SS_INLINE void step_columns(float *state, int64_t stride, int64_t size, const token *t,
                            int64_t first, int vectors, const __mmask16 *masks) {
    sums found;
    __m512 deltas[WIDE];
    pass(state + first, stride, size, vectors, masks, 0, 0, t, &found);
    settle(deltas, t, &found, first, vectors, masks);
    pass(state + first, stride, size, vectors, masks, t, deltas, 0, 0);
}

// One token, where the state lies: from memory in whole rows, then once more from the caches.
static void step_in_place(float *state, int64_t stride, int64_t size, const token *t,
                          int64_t first, int64_t end) {
    while (first < end) {
        if (WIDE > 2 && first + 16 * WIDE <= end) {
            step_columns(state, stride, size, t, first, WIDE, 0);
            first += 16 * WIDE;
        } else if (first + TILE <= end) {
            step_columns(state, stride, size, t, first, 2, 0);
            first += TILE;
        } else {
            const __mmask16 masks[2] = {ss_mask(end - first), ss_mask(end - first - 16)};
            step_columns(state, stride, size, t, first, 2, masks);
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
static void run_tile(const ss_step *step, const int64_t *args, const sequence *s, float *states,
                     int64_t state_size, int64_t head, int64_t first, int64_t end) {
    const int64_t size = args[DELTA_KEY_SIZE], stride = args[DELTA_VALUE_SIZE];
    const int64_t columns = end - first;
    const __mmask16 masks[2] = {ss_mask(columns), ss_mask(columns - 16)};
    float tile[MAX_KEY_SIZE * TILE] __attribute__((aligned(64)));
    token tokens[2];
    sums found;
    __m512 deltas[2];
    if (s->starts || columns < TILE) __builtin_memset(tile, 0, sizeof(float) * size * TILE);
    if (!s->starts)
        copy_columns(tile, TILE, states + s->slot * state_size + first, stride, size, columns);
    read_token(&tokens[s->begin % 2], args, s->begin, head);
    pass(tile, TILE, size, 2, 0, 0, 0, &tokens[s->begin % 2], &found);
    for (int64_t row = s->begin; row < s->end; row++) {
        const token *this = &tokens[row % 2], *next = &tokens[(row + 1) % 2];
        settle(deltas, this, &found, first, 2, masks);
        if (row + 1 < s->end) {
            read_token(&tokens[(row + 1) % 2], args, row + 1, head);
            pass(tile, TILE, size, 2, 0, this, deltas, next, &found);
        } else {
            pass(tile, TILE, size, 2, 0, this, deltas, 0, 0);
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
    const int64_t heads = ss_max(context->step->num_requests * args[DELTA_HEADS], 1);
    return ss_min(ss_ceil_div(args[DELTA_VALUE_SIZE], TILE),
                  ss_ceil_div(2 * (int64_t)context->num_threads, heads));
}

// Pieces of each head of each sequence, and the rows behind them.
static int64_t delta_units(const ss_context *context, const int64_t *args) {
    return context->step->num_requests * args[DELTA_HEADS] * head_pieces(context, args) +
           (rows_in_use(context->step) < context->step->num_tokens);
}

static void delta_run(const ss_context *context, const int64_t *args, int64_t unit,
                      int64_t num_units, int thread) {
    (void)num_units, (void)thread;
    const ss_step *step = context->step;
    const int64_t heads = args[DELTA_HEADS], pieces = head_pieces(context, args);
    const int64_t size = args[DELTA_KEY_SIZE], value_size = args[DELTA_VALUE_SIZE];
    const int64_t head = unit / pieces % heads, r = unit / pieces / heads;
    if (r == step->num_requests) {
        const int64_t used = rows_in_use(step), width = heads * value_size;
        __builtin_memset((bf16 *)args[DELTA_OUT] + used * width, 0,
                         2 * (size_t)((step->num_tokens - used) * width));
        return;
    }
    const sequence s = sequence_of(step, r);
    if (s.begin == s.end) return;
    const int64_t tiles = ss_ceil_div(value_size, TILE), piece = unit % pieces;
    const int64_t first = TILE * (tiles * piece / pieces);
    const int64_t end = ss_min(TILE * (tiles * (piece + 1) / pieces), value_size);
    const int64_t state_size = heads * size * value_size;
    float *states = (float *)args[DELTA_STATES] + head * size * value_size;
    if (s.end > s.begin + 1 || s.starts) {
        for (int64_t c = first; c < end; c += TILE)
            run_tile(step, args, &s, states, state_size, head, c, ss_min(c + TILE, end));
        return;
    }
    float *own = states + s.slot * state_size;
    token t;
    read_token(&t, args, s.begin, head);
    step_in_place(own, value_size, size, &t, first, end);
    const int64_t save = step->state_saves[s.begin];
    if (save >= 0)
        copy_columns(states + save * state_size + first, value_size, own + first, value_size, size,
                     end - first);
}

const ss_operation ss_delta_rule = {delta_units, delta_run, 0};

// --- gates of what a layer has made ------------------------------------------------------------

enum {
    GATE_OUT,
    GATE_IN,
    GATE_IN_STRIDE,
    GATE_GATE,
    GATE_STRIDE,
    GATE_WIDTH,
    GATE_ROWS_KIND,
    GATE_WEIGHT,  // [GATE_HEAD_SIZE]; of the norm only, like what follows
    GATE_HEAD_SIZE,
    GATE_EPS,
};

static int64_t gate_units(const ss_context *context, const int64_t *args) {
    return ss_row_units(ss_rows(context, args[GATE_ROWS_KIND]), 4 * args[GATE_WIDTH],
                        context->num_threads);
}

static void gated_norm_run(const ss_context *context, const int64_t *args, int64_t unit,
                           int64_t num_units, int thread) {
    (void)thread;
    const int64_t width = args[GATE_WIDTH], size = args[GATE_HEAD_SIZE];
    const bf16 *weight = (const bf16 *)args[GATE_WEIGHT];
    const float eps = (float)ss_double(args[GATE_EPS]);
    SS_FOR_ROWS(row, ss_rows(context, args[GATE_ROWS_KIND]))
    for (int64_t first = 0; first < width; first += size) {
        const bf16 *x = (const bf16 *)args[GATE_IN] + row * args[GATE_IN_STRIDE] + first;
        const bf16 *gate = (const bf16 *)args[GATE_GATE] + row * args[GATE_STRIDE] + first;
        bf16 *out = (bf16 *)args[GATE_OUT] + row * width + first;
        __m512 squares = _mm512_setzero_ps();
        for (int64_t c = 0; c < size; c += 16) {
            const __m512 value = ss_load_masked(x + c, ss_mask(size - c));
            squares = _mm512_fmadd_ps(value, value, squares);
        }
        const float mean = _mm512_reduce_add_ps(squares) / (float)size;
        const __m512 factor = _mm512_set1_ps(1.0f / sqrtf(mean + eps));
        for (int64_t c = 0; c < size; c += 16) {
            const __mmask16 mask = ss_mask(size - c);
            __m512 value = ss_rounded(_mm512_mul_ps(ss_load_masked(x + c, mask), factor));
            value = ss_rounded(_mm512_mul_ps(value, ss_load_masked(weight + c, mask)));
            value = _mm512_mul_ps(value, silu(ss_load_masked(gate + c, mask)));
            ss_store_masked(out + c, value, mask);
        }
    }
}

const ss_operation ss_gated_norm = {gate_units, gated_norm_run, 0};

static void sigmoid_gate_run(const ss_context *context, const int64_t *args, int64_t unit,
                             int64_t num_units, int thread) {
    (void)thread;
    const int64_t width = args[GATE_WIDTH];
    SS_FOR_ROWS(row, ss_rows(context, args[GATE_ROWS_KIND]))
    for (int64_t c = 0; c < width; c += 16) {
        const __mmask16 mask = ss_mask(width - c);
        const bf16 *x = (const bf16 *)args[GATE_IN] + row * args[GATE_IN_STRIDE] + c;
        const bf16 *gate = (const bf16 *)args[GATE_GATE] + row * args[GATE_STRIDE] + c;
        ss_store_masked((bf16 *)args[GATE_OUT] + row * width + c,
                        _mm512_mul_ps(ss_load_masked(x, mask), sigmoid(ss_load_masked(gate, mask))),
                        mask);
    }
}

const ss_operation ss_sigmoid_gate = {gate_units, sigmoid_gate_run, 0};
