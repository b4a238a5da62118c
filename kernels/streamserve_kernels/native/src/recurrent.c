// Convolutions and gates of layers that remember in a slot of constant size: see recurrent.py for
// what each operation means. A step's slots lie in its `state_slots` and `state_saves`.
#include "recurrent.h"

#include <math.h>

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

// --- gates of what a layer has made ------------------------------------------------------------

enum {
    GATE_OUT,
    GATE_IN,
    GATE_IN_STRIDE,
    GATE_GATE,
    GATE_STRIDE,
    GATE_WIDTH,
    GATE_ROWS_KIND,
    GATE_WEIGHT,  // of norms only; [GATE_GROUP], or [GATE_WIDTH] behind the gate
    GATE_GROUP,   // elements that are normed together, or that one gate is for
    GATE_EPS,     // of norms only
};

static int64_t gate_units(const ss_context *context, const int64_t *args) {
    return ss_row_units(ss_rows(context, args[GATE_ROWS_KIND]), 4 * args[GATE_WIDTH],
                        context->num_threads);
}

static inline __m512 gated(const bf16 *x, const bf16 *gate, __mmask16 mask) {
    return _mm512_mul_ps(ss_load_masked(x, mask), silu(ss_load_masked(gate, mask)));
}

static void gated_norm_run(const ss_context *context, const int64_t *args, int64_t unit,
                           int64_t num_units, int thread) {
    (void)thread;
    const int64_t width = args[GATE_WIDTH], size = args[GATE_GROUP];
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

// x * silu(gate) is made twice: it has no place to lie in float32.
static void norm_of_gated_run(const ss_context *context, const int64_t *args, int64_t unit,
                              int64_t num_units, int thread) {
    (void)thread;
    const int64_t width = args[GATE_WIDTH], size = args[GATE_GROUP];
    const float eps = (float)ss_double(args[GATE_EPS]);
    SS_FOR_ROWS(row, ss_rows(context, args[GATE_ROWS_KIND]))
    for (int64_t first = 0; first < width; first += size) {
        const bf16 *x = (const bf16 *)args[GATE_IN] + row * args[GATE_IN_STRIDE] + first;
        const bf16 *gate = (const bf16 *)args[GATE_GATE] + row * args[GATE_STRIDE] + first;
        const bf16 *weight = (const bf16 *)args[GATE_WEIGHT] + first;
        bf16 *out = (bf16 *)args[GATE_OUT] + row * width + first;
        __m512 squares = _mm512_setzero_ps();
        for (int64_t c = 0; c < size; c += 16) {
            const __m512 value = gated(x + c, gate + c, ss_mask(size - c));
            squares = _mm512_fmadd_ps(value, value, squares);
        }
        const float mean = _mm512_reduce_add_ps(squares) / (float)size;
        const __m512 factor = _mm512_set1_ps(1.0f / sqrtf(mean + eps));
        for (int64_t c = 0; c < size; c += 16) {
            const __mmask16 mask = ss_mask(size - c);
            const __m512 value = ss_rounded(_mm512_mul_ps(gated(x + c, gate + c, mask), factor));
            ss_store_masked(out + c, _mm512_mul_ps(value, ss_load_masked(weight + c, mask)), mask);
        }
    }
}

const ss_operation ss_norm_of_gated = {gate_units, norm_of_gated_run, 0};

static void sigmoid_gate_run(const ss_context *context, const int64_t *args, int64_t unit,
                             int64_t num_units, int thread) {
    (void)thread;
    const int64_t width = args[GATE_WIDTH], run = args[GATE_GROUP], size = run > 1 ? run : width;
    SS_FOR_ROWS(row, ss_rows(context, args[GATE_ROWS_KIND]))
    for (int64_t i = 0, first = 0; first < width; i++, first += size) {
        const bf16 *x = (const bf16 *)args[GATE_IN] + row * args[GATE_IN_STRIDE] + first;
        const bf16 *gate = (const bf16 *)args[GATE_GATE] + row * args[GATE_STRIDE] + i;
        bf16 *out = (bf16 *)args[GATE_OUT] + row * width + first;
        const __m512 of_run = sigmoid(_mm512_set1_ps(ss_widen(*gate)));
        for (int64_t c = 0; c < size; c += 16) {
            const __mmask16 mask = ss_mask(size - c);
            const __m512 open = run > 1 ? of_run : sigmoid(ss_load_masked(gate + c, mask));
            ss_store_masked(out + c, _mm512_mul_ps(ss_load_masked(x + c, mask), open), mask);
        }
    }
}

const ss_operation ss_sigmoid_gate = {gate_units, sigmoid_gate_run, 0};
