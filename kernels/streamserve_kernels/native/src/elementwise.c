// Embedding, norms, rotary positions with the cache write, activations: one pass each, sums in
// float32, rounded where the naive twin rounds.
#include "streamserve.h"

#include <math.h>

// --- embedding, gather -------------------------------------------------------------------------

enum {
    EMBED_OUT,
    EMBED_TABLE,        // [EMBED_TABLE_ROWS, EMBED_WIDTH]
    EMBED_WIDTH,
    EMBED_BY_POSITION,  // whether rows are chosen by position, not by id
    EMBED_OFFSET,       // added to it
    EMBED_TABLE_ROWS,
};

static const int64_t *embedding_ids(const ss_context *context, const int64_t *args) {
    return args[EMBED_BY_POSITION] ? context->step->positions : context->step->input_ids;
}

static int embedding_begin(const ss_context *context, const int64_t *args) {
    const int64_t *ids = embedding_ids(context, args);
    for (int64_t row = 0; row < context->step->num_tokens; row++) {
        const int64_t id = ids[row] + args[EMBED_OFFSET];
        if (id < 0 || id >= args[EMBED_TABLE_ROWS]) return SS_OUT_OF_RANGE;
    }
    return SS_OK;
}

static int64_t embedding_units(const ss_context *context, const int64_t *args) {
    return ss_row_units(context->step->num_tokens, args[EMBED_WIDTH], context->num_threads);
}

static void embedding_run(const ss_context *context, const int64_t *args, int64_t unit,
                          int64_t num_units, int thread) {
    (void)thread;
    const int64_t *ids = embedding_ids(context, args);
    const int64_t width = args[EMBED_WIDTH];
    SS_FOR_ROWS(row, context->step->num_tokens)
    __builtin_memcpy((bf16 *)args[EMBED_OUT] + row * width,
                     (const bf16 *)args[EMBED_TABLE] + (ids[row] + args[EMBED_OFFSET]) * width,
                     2 * (size_t)width);
}

const ss_operation ss_embedding = {embedding_units, embedding_run, embedding_begin};

enum { GATHER_OUT, GATHER_IN, GATHER_WIDTH, GATHER_STRIDE };

static int64_t gather_units(const ss_context *context, const int64_t *args) {
    return ss_row_units(context->step->num_logits, args[GATHER_WIDTH], context->num_threads);
}

static void gather_run(const ss_context *context, const int64_t *args, int64_t unit,
                       int64_t num_units, int thread) {
    (void)thread;
    const int64_t width = args[GATHER_WIDTH];
    SS_FOR_ROWS(row, context->step->num_logits)
    __builtin_memcpy(
        (bf16 *)args[GATHER_OUT] + row * width,
        (const bf16 *)args[GATHER_IN] + context->step->logits_indices[row] * args[GATHER_STRIDE],
        2 * (size_t)width);
}

const ss_operation ss_gather_rows = {gather_units, gather_run, 0};

// --- copies of whole blocks --------------------------------------------------------------------

// Here T is the number of caches.
enum { COPY_CACHES, COPY_BYTES, COPY_SRC, COPY_DST, COPY_COUNT };

static int64_t copy_units(const ss_context *context, const int64_t *args) {
    return context->step->num_tokens * args[COPY_COUNT];
}

static void copy_run(const ss_context *context, const int64_t *args, int64_t unit,
                     int64_t num_units, int thread) {
    (void)context, (void)num_units, (void)thread;
    const int64_t cache = unit / args[COPY_COUNT], i = unit % args[COPY_COUNT];
    const int64_t size = ((const int64_t *)args[COPY_BYTES])[cache];
    char *base = (char *)((const int64_t *)args[COPY_CACHES])[cache];
    __builtin_memcpy(base + ((const int64_t *)args[COPY_DST])[i] * size,
                     base + ((const int64_t *)args[COPY_SRC])[i] * size, (size_t)size);
}

const ss_operation ss_copy_blocks = {copy_units, copy_run, 0};

// --- norms -------------------------------------------------------------------------------------

enum {
    NORM_OUT,
    NORM_SUM,       // x + residual is written here, or 0
    NORM_IN,
    NORM_RESIDUAL,  // or 0
    NORM_WEIGHT,    // or 0
    NORM_BIAS,      // or 0
    NORM_WIDTH,
    NORM_EPS,
    NORM_OFFSET,    // added to the weight (RMS norm only)
    NORM_ROWS_KIND,
    NORM_GROUP,       // norms per row: heads of a query or key, else 1
    NORM_IN_STRIDE,   // elements between rows of x
    NORM_OUT_STRIDE,  // elements between rows of the result
    NORM_WEIGHT_STRIDE,  // elements between the weights of a row's norms; 0: they share one
};

static int64_t norm_units(const ss_context *context, const int64_t *args) {
    return ss_row_units(ss_rows(context, args[NORM_ROWS_KIND]),
                        args[NORM_GROUP] * args[NORM_WIDTH], context->num_threads);
}

// The row x (+ residual), rounded as it is stored; returns its lanes' sums and sums of squares.
static inline __m512 norm_input(const bf16 *x, const bf16 *residual, bf16 *sum, int64_t c,
                                __mmask16 mask) {
    __m512 value = ss_load_masked(x + c, mask);
    if (residual) value = ss_rounded(_mm512_add_ps(value, ss_load_masked(residual + c, mask)));
    if (sum) ss_store_masked(sum + c, value, mask);
    return value;
}

static void rms_norm_row(bf16 *out, bf16 *sum, const bf16 *x, const bf16 *residual,
                         const bf16 *weight, int64_t width, float eps, float offset) {
    __m512 squares = _mm512_setzero_ps();
    for (int64_t c = 0; c < width; c += 16) {
        const __m512 value = norm_input(x, residual, sum, c, ss_mask(width - c));
        squares = _mm512_fmadd_ps(value, value, squares);
    }
    const float mean = _mm512_reduce_add_ps(squares) / (float)width;
    const __m512 factor = _mm512_set1_ps(1.0f / sqrtf(mean + eps));
    for (int64_t c = 0; c < width; c += 16) {
        const __mmask16 mask = ss_mask(width - c);
        const bf16 *from = sum ? sum : x;
        __m512 value = ss_load_masked(from + c, mask);
        if (!sum && residual) value = norm_input(x, residual, 0, c, mask);
        value = _mm512_mul_ps(value, factor);
        const __m512 w = ss_load_masked(weight + c, mask);
        if (offset == 0.0f)
            value = _mm512_mul_ps(ss_rounded(value), w);
        else
            value = _mm512_mul_ps(value, _mm512_add_ps(w, _mm512_set1_ps(offset)));
        ss_store_masked(out + c, value, mask);
    }
}

static void layer_norm_row(bf16 *out, bf16 *sum, const bf16 *x, const bf16 *residual,
                           const bf16 *weight, const bf16 *bias, int64_t width, float eps) {
    __m512 total = _mm512_setzero_ps();
    for (int64_t c = 0; c < width; c += 16)
        total = _mm512_add_ps(total, norm_input(x, residual, sum, c, ss_mask(width - c)));
    const float mean = _mm512_reduce_add_ps(total) / (float)width;
    const __m512 means = _mm512_set1_ps(mean);
    __m512 squares = _mm512_setzero_ps();
    for (int64_t c = 0; c < width; c += 16) {
        const __mmask16 mask = ss_mask(width - c);
        const __m512 apart =
            _mm512_maskz_sub_ps(mask, norm_input(x, residual, 0, c, mask), means);
        squares = _mm512_fmadd_ps(apart, apart, squares);
    }
    const float variance = _mm512_reduce_add_ps(squares) / (float)width;
    const __m512 factor = _mm512_set1_ps(1.0f / sqrtf(variance + eps));
    for (int64_t c = 0; c < width; c += 16) {
        const __mmask16 mask = ss_mask(width - c);
        __m512 value = _mm512_sub_ps(norm_input(x, residual, 0, c, mask), means);
        value = _mm512_mul_ps(value, factor);
        if (weight) value = _mm512_mul_ps(value, ss_load_masked(weight + c, mask));
        if (bias) value = _mm512_add_ps(value, ss_load_masked(bias + c, mask));
        ss_store_masked(out + c, value, mask);
    }
}

static inline void norm_run(const ss_context *context, const int64_t *args, int64_t unit,
                            int64_t num_units, int is_layer_norm) {
    const int64_t width = args[NORM_WIDTH], group = args[NORM_GROUP];
    const float eps = (float)ss_double(args[NORM_EPS]);
    const float offset = (float)ss_double(args[NORM_OFFSET]);
    SS_FOR_ROWS(row, ss_rows(context, args[NORM_ROWS_KIND]))
    for (int64_t g = 0; g < group; g++) {
        const int64_t from = row * args[NORM_IN_STRIDE] + g * width;
        const int64_t to = row * args[NORM_OUT_STRIDE] + g * width;
        bf16 *out = (bf16 *)args[NORM_OUT] + to;
        bf16 *sum = args[NORM_SUM] ? (bf16 *)args[NORM_SUM] + to : 0;
        const bf16 *x = (const bf16 *)args[NORM_IN] + from;
        // The residual lies as the result does: rows one after the other.
        const bf16 *residual = args[NORM_RESIDUAL] ? (const bf16 *)args[NORM_RESIDUAL] + to : 0;
        const bf16 *weight = (const bf16 *)args[NORM_WEIGHT] + g * args[NORM_WEIGHT_STRIDE];
        if (is_layer_norm)
            layer_norm_row(out, sum, x, residual, weight, (const bf16 *)args[NORM_BIAS], width, eps);
        else
            rms_norm_row(out, sum, x, residual, weight, width, eps, offset);
    }
}

static void rms_norm_run(const ss_context *context, const int64_t *args, int64_t unit,
                         int64_t num_units, int thread) {
    (void)thread;
    norm_run(context, args, unit, num_units, 0);
}

static void layer_norm_run(const ss_context *context, const int64_t *args, int64_t unit,
                           int64_t num_units, int thread) {
    (void)thread;
    norm_run(context, args, unit, num_units, 1);
}

const ss_operation ss_rms_norm = {norm_units, rms_norm_run, 0};
const ss_operation ss_layer_norm = {norm_units, layer_norm_run, 0};

// --- rotary positions and the cache write ------------------------------------------------------
//
// Blocks of S tokens (a multiple of 16), per kv head:
//
//     keys     [S / 16][D / 2][16][2]   a load holds two neighbours in d of 16 keys
//     values   [S / 2][Dv][2]           a load holds one element of 16 in d of two tokens

enum {
    ROTARY_QUERY,  // or 0
    ROTARY_KEY,
    ROTARY_VALUE,
    ROTARY_COS_SIN,  // [P, rot_dim] float32, or 0: nothing turns
    ROTARY_KEY_CACHE,    // or 0: nothing is written
    ROTARY_VALUE_CACHE,
    ROTARY_QUERY_STRIDE,
    ROTARY_KEY_STRIDE,
    ROTARY_VALUE_STRIDE,
    ROTARY_HEADS,
    ROTARY_KV_HEADS,
    ROTARY_HEAD_SIZE,
    ROTARY_VALUE_SIZE,
    ROTARY_DIM,
    ROTARY_BLOCK_SIZE,
    ROTARY_INTERLEAVED,
};

static int64_t rotary_units(const ss_context *context, const int64_t *args) {
    const int64_t heads = args[ROTARY_HEADS] + 2 * args[ROTARY_KV_HEADS];
    return ss_row_units(context->step->num_tokens, heads * args[ROTARY_HEAD_SIZE],
                        context->num_threads);
}

static void rotate(bf16 *x, const float *cos_sin, int64_t half, int interleaved) {
    if (interleaved) {
        for (int64_t i = 0; i < half; i++) {
            const float a = ss_widen(x[2 * i]), b = ss_widen(x[2 * i + 1]);
            const float c = cos_sin[i], s = cos_sin[half + i];
            // One vector of two: rounds to nearest even like every other store.
            const __m512 both = _mm512_setr_ps(a * c - b * s, b * c + a * s, 0, 0, 0, 0, 0, 0, 0, 0,
                                               0, 0, 0, 0, 0, 0);
            ss_store_masked(x + 2 * i, both, 3);
        }
        return;
    }
    for (int64_t i = 0; i < half; i += 16) {
        const __mmask16 mask = ss_mask(half - i);
        const __m512 a = ss_load_masked(x + i, mask), b = ss_load_masked(x + half + i, mask);
        const __m512 c = _mm512_maskz_loadu_ps(mask, cos_sin + i);
        const __m512 s = _mm512_maskz_loadu_ps(mask, cos_sin + half + i);
        ss_store_masked(x + i, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)), mask);
        ss_store_masked(x + half + i, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)), mask);
    }
}

static void write_key(bf16 *block, const bf16 *key, int64_t head_size, int64_t offset) {
    ss_pair *to = (ss_pair *)(block + (offset / 16) * 16 * head_size) + offset % 16;
    for (int64_t d = 0; d < head_size / 2; d++) to[16 * d] = ((const ss_pair *)key)[d];
}

static void write_value(bf16 *block, const bf16 *value, int64_t value_size, int64_t offset) {
    bf16 *to = block + (offset / 2) * 2 * value_size + offset % 2;
    for (int64_t d = 0; d < value_size; d++) to[2 * d] = value[d];
}

static void rotary_run(const ss_context *context, const int64_t *args, int64_t unit,
                       int64_t num_units, int thread) {
    (void)thread;
    const ss_step *step = context->step;
    const int64_t head_size = args[ROTARY_HEAD_SIZE], value_size = args[ROTARY_VALUE_SIZE];
    const int64_t kv_heads = args[ROTARY_KV_HEADS], size = args[ROTARY_BLOCK_SIZE];
    const int64_t rot_dim = args[ROTARY_DIM];
    const int interleaved = (int)args[ROTARY_INTERLEAVED];
    SS_FOR_ROWS(row, step->num_tokens) {
        bf16 *query = (bf16 *)args[ROTARY_QUERY] + row * args[ROTARY_QUERY_STRIDE];
        bf16 *key = (bf16 *)args[ROTARY_KEY] + row * args[ROTARY_KEY_STRIDE];
        const bf16 *value = (const bf16 *)args[ROTARY_VALUE] + row * args[ROTARY_VALUE_STRIDE];
        if (args[ROTARY_COS_SIN]) {
            const float *cos_sin =
                (const float *)args[ROTARY_COS_SIN] + step->positions[row] * rot_dim;
            for (int64_t h = 0; h < args[ROTARY_HEADS]; h++)
                rotate(query + h * head_size, cos_sin, rot_dim / 2, interleaved);
            for (int64_t h = 0; h < kv_heads; h++)
                rotate(key + h * head_size, cos_sin, rot_dim / 2, interleaved);
        }
        const int64_t slot = args[ROTARY_KEY_CACHE] ? step->slot_mapping[row] : -1;
        if (slot < 0) continue;
        const int64_t block = slot / size, offset = slot % size;
        for (int64_t h = 0; h < kv_heads; h++) {
            const int64_t at = (block * kv_heads + h) * size;
            write_key((bf16 *)args[ROTARY_KEY_CACHE] + at * head_size, key + h * head_size,
                      head_size, offset);
            write_value((bf16 *)args[ROTARY_VALUE_CACHE] + at * value_size, value + h * value_size,
                        value_size, offset);
        }
    }
}

const ss_operation ss_rotary_write = {rotary_units, rotary_run, 0};

// --- activations -------------------------------------------------------------------------------

enum {
    KIND_SILU, KIND_GELU, KIND_GELU_TANH, KIND_QUICK_GELU, KIND_RELU, KIND_RELU2,
    KIND_CLAMPED_SWIGLU  // of gated activations only
};
enum { ACT_OUT, ACT_IN, ACT_WIDTH, ACT_KIND, ACT_ROWS_KIND, ACT_IN_STRIDE };

static inline __m512 sigmoid_form(__m512 x, __m512 inner) {
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 e = ss_exp(_mm512_sub_ps(_mm512_setzero_ps(), inner));
    return _mm512_div_ps(x, _mm512_add_ps(one, e));
}

static inline __m512 erf_gelu(__m512 x) {
    float lanes[16] __attribute__((aligned(64)));
    _mm512_store_ps(lanes, x);
    for (int i = 0; i < 16; i++) lanes[i] = 0.5f * lanes[i] * (1.0f + erff(lanes[i] * 0.70710678f));
    return _mm512_load_ps(lanes);
}

static inline __m512 activate(__m512 x, int64_t kind) {
    const __m512 zero = _mm512_setzero_ps();
    switch (kind) {
        case KIND_SILU:
            return sigmoid_form(x, x);
        case KIND_GELU:
            return erf_gelu(x);
        case KIND_GELU_TANH: {
            // 0.5·x·(1 + tanh(√(2/π)(x + 0.044715x³))) is x·sigmoid(2·inner)
            const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
            const __m512 inner = _mm512_fmadd_ps(_mm512_set1_ps(0.07135481282604f), cube,
                                                 _mm512_mul_ps(_mm512_set1_ps(1.5957691216057f), x));
            return sigmoid_form(x, inner);
        }
        case KIND_QUICK_GELU:
            return sigmoid_form(x, _mm512_mul_ps(_mm512_set1_ps(1.702f), x));
        case KIND_RELU:
            return _mm512_max_ps(zero, x);  // a NaN is what comes second, and stays
        default: {
            const __m512 positive = _mm512_max_ps(zero, x);
            return _mm512_mul_ps(positive, positive);
        }
    }
}

static inline __m512 gated(__m512 gate, __m512 up, int64_t kind) {
    if (kind == KIND_CLAMPED_SWIGLU) {
        // A NaN is what comes second, and stays.
        const __m512 limit = _mm512_set1_ps(7.0f), one = _mm512_set1_ps(1.0f);
        gate = _mm512_min_ps(limit, gate);
        up = _mm512_max_ps(_mm512_set1_ps(-7.0f), _mm512_min_ps(limit, up));
        return _mm512_mul_ps(activate(gate, KIND_QUICK_GELU), _mm512_add_ps(up, one));
    }
    return _mm512_mul_ps(activate(gate, kind), up);
}

static int64_t act_units(const ss_context *context, const int64_t *args) {
    // An exponential is worth about four copies.
    return ss_row_units(ss_rows(context, args[ACT_ROWS_KIND]), 4 * args[ACT_WIDTH],
                        context->num_threads);
}

static int64_t gated_units(const ss_context *context, const int64_t *args) {
    return ss_vector_units(ss_rows(context, args[ACT_ROWS_KIND]), args[ACT_WIDTH],
                           context->num_threads);
}

static void gated_run(const ss_context *context, const int64_t *args, int64_t unit,
                      int64_t num_units, int thread) {
    (void)thread;
    const int64_t width = args[ACT_WIDTH], vectors = ss_ceil_div(width, 16);
    SS_FOR_ROWS(i, ss_rows(context, args[ACT_ROWS_KIND]) * vectors) {
        const int64_t row = ss_small_div(i, vectors), c = (i - row * vectors) * 16;
        const bf16 *gate = (const bf16 *)args[ACT_IN] + row * args[ACT_IN_STRIDE] + c;
        const __mmask16 mask = ss_mask(width - c);
        const __m512 value = gated(ss_load_masked(gate, mask), ss_load_masked(gate + width, mask),
                                   args[ACT_KIND]);
        ss_store_masked((bf16 *)args[ACT_OUT] + row * width + c, value, mask);
    }
}

const ss_operation ss_gated = {gated_units, gated_run, 0};

static void act_run(const ss_context *context, const int64_t *args, int64_t unit,
                    int64_t num_units, int thread) {
    (void)thread;
    const int64_t width = args[ACT_WIDTH];
    SS_FOR_ROWS(row, ss_rows(context, args[ACT_ROWS_KIND]))
    for (int64_t c = 0; c < width; c += 16) {
        const __mmask16 mask = ss_mask(width - c);
        const bf16 *x = (const bf16 *)args[ACT_IN] + row * args[ACT_IN_STRIDE] + c;
        ss_store_masked((bf16 *)args[ACT_OUT] + row * width + c,
                        activate(ss_load_masked(x, mask), args[ACT_KIND]), mask);
    }
}

const ss_operation ss_activation = {act_units, act_run, 0};

// --- sums and products that no other operation takes in ----------------------------------------

enum { ADD_OUT, ADD_A, ADD_B, ADD_WIDTH, ADD_ROWS_KIND };

static int64_t add_units(const ss_context *context, const int64_t *args) {
    return ss_row_units(ss_rows(context, args[ADD_ROWS_KIND]), args[ADD_WIDTH],
                        context->num_threads);
}

static void add_run(const ss_context *context, const int64_t *args, int64_t unit,
                    int64_t num_units, int thread) {
    (void)thread;
    const int64_t width = args[ADD_WIDTH];
    SS_FOR_ROWS(row, ss_rows(context, args[ADD_ROWS_KIND]))
    for (int64_t c = 0; c < width; c += 16) {
        const __mmask16 mask = ss_mask(width - c);
        const int64_t at = row * width + c;
        ss_store_masked((bf16 *)args[ADD_OUT] + at,
                        _mm512_add_ps(ss_load_masked((const bf16 *)args[ADD_A] + at, mask),
                                      ss_load_masked((const bf16 *)args[ADD_B] + at, mask)),
                        mask);
    }
}

enum { SCALE_OUT, SCALE_IN, SCALE_IN_STRIDE, SCALE_WIDTH, SCALE_ROWS_KIND, SCALE_FACTOR,
       SCALE_OUT_STRIDE, SCALE_LIMIT };  // of the size of what comes out; 0: none
_Static_assert((int)SCALE_WIDTH == ADD_WIDTH && (int)SCALE_ROWS_KIND == ADD_ROWS_KIND, "add_units");

static void scale_run(const ss_context *context, const int64_t *args, int64_t unit,
                      int64_t num_units, int thread) {
    (void)thread;
    const int64_t width = args[SCALE_WIDTH];
    const __m512 factor = _mm512_set1_ps((float)ss_double(args[SCALE_FACTOR]));
    const float limit = (float)ss_double(args[SCALE_LIMIT]);
    const __m512 high = _mm512_set1_ps(limit), low = _mm512_set1_ps(-limit);
    SS_FOR_ROWS(row, ss_rows(context, args[SCALE_ROWS_KIND]))
    for (int64_t c = 0; c < width; c += 16) {
        const __mmask16 mask = ss_mask(width - c);
        const bf16 *x = (const bf16 *)args[SCALE_IN] + row * args[SCALE_IN_STRIDE] + c;
        bf16 *out = (bf16 *)args[SCALE_OUT] + row * args[SCALE_OUT_STRIDE] + c;
        __m512 value = _mm512_mul_ps(ss_load_masked(x, mask), factor);
        // A NaN is what comes second, and stays.
        if (limit > 0.0f) value = _mm512_max_ps(low, _mm512_min_ps(high, value));
        ss_store_masked(out, value, mask);
    }
}

enum { MUL_OUT, MUL_A, MUL_A_STRIDE, MUL_WIDTH, MUL_ROWS_KIND, MUL_B, MUL_B_STRIDE,
       MUL_RUN };  // elements of a that one of b multiplies
_Static_assert((int)MUL_WIDTH == ADD_WIDTH && (int)MUL_ROWS_KIND == ADD_ROWS_KIND, "add_units");

static void multiply_run(const ss_context *context, const int64_t *args, int64_t unit,
                         int64_t num_units, int thread) {
    (void)thread;
    const int64_t width = args[MUL_WIDTH], run = args[MUL_RUN], size = run > 1 ? run : width;
    SS_FOR_ROWS(row, ss_rows(context, args[MUL_ROWS_KIND]))
    for (int64_t i = 0, first = 0; first < width; i++, first += size) {
        const bf16 *a = (const bf16 *)args[MUL_A] + row * args[MUL_A_STRIDE] + first;
        const bf16 *b = (const bf16 *)args[MUL_B] + row * args[MUL_B_STRIDE] + i;
        bf16 *out = (bf16 *)args[MUL_OUT] + row * width + first;
        const __m512 of_run = _mm512_set1_ps(ss_widen(*b));
        for (int64_t c = 0; c < size; c += 16) {
            const __mmask16 mask = ss_mask(size - c);
            const __m512 factor = run > 1 ? of_run : ss_load_masked(b + c, mask);
            ss_store_masked(out + c, _mm512_mul_ps(ss_load_masked(a + c, mask), factor), mask);
        }
    }
}

const ss_operation ss_add = {add_units, add_run, 0};
const ss_operation ss_multiply = {add_units, multiply_run, 0};
const ss_operation ss_scale = {add_units, scale_run, 0};
