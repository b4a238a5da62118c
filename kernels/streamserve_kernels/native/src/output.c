// What is done with the sums of a product: bias, rounding, scale and cap, the best of each row.
#include "output.h"

#include <math.h>
#include <string.h>

static __m512 bias_of(const ss_output *out, int64_t column, __mmask16 mask) {
    if (!out->bias) return _mm512_setzero_ps();
    return out->bias_float32 ? _mm512_maskz_loadu_ps(mask, (const float *)out->bias + column)
                             : ss_load_masked((const bf16 *)out->bias + column, mask);
}

static void finish_float(const ss_output *out, float *sums, int64_t columns) {
    for (int64_t c = 0; c < columns; c++) {
        const float value = sums[c] * out->scale;
        sums[c] = out->cap != 0.0f ? out->cap * tanhf(value / out->cap) : value;
    }
}

// Keeps the first of the largest; a NaN is never larger.
static void keep_best(ss_best *best, const float *sums, int64_t columns, int64_t first) {
    __m512 most = _mm512_set1_ps(-INFINITY);
    for (int64_t c = 0; c < columns; c += 16)
        most = _mm512_max_ps(_mm512_mask_loadu_ps(most, ss_mask(columns - c), sums + c), most);
    const float largest = _mm512_reduce_max_ps(most);
    if (!(largest >= best->value)) return;
    for (int64_t c = 0; c < columns; c++) {
        if (sums[c] != largest) continue;
        if (largest > best->value || first + c < best->index)
            *best = (ss_best){largest, (int32_t)(first + c)};
        return;
    }
}

void ss_put_row(const ss_output *out, int64_t row, int64_t first, int64_t columns, float *sums) {
    const int64_t at = row * out->stride + first;
    for (int64_t c = 0; c < columns; c += 16) {
        const __mmask16 mask = ss_mask(columns - c);
        __m512 value = _mm512_loadu_ps(sums + c);
        if (out->bias) value = _mm512_add_ps(value, bias_of(out, first + c, mask));
        if (out->is_float32)
            _mm512_mask_storeu_ps(sums + c, mask, value);
        else
            ss_store_masked((bf16 *)out->y + at + c, value, mask);
    }
    if (!out->is_float32) return;
    if (out->scale != 1.0f || out->cap != 0.0f) finish_float(out, sums, columns);
    if (out->stores) memcpy((float *)out->y + at, sums, (size_t)columns * sizeof(float));
    if (out->best) keep_best(out->best + row, sums, columns, first);
}

int ss_begin_product(const ss_context *context, const int64_t *args) {
    for (int i = 0; args[DONE] && i < context->num_threads; i++)
        ((int64_t *)args[DONE])[DONE_STRIDE * i] = 0;
    if (!args[BEST]) return SS_OK;
    const int64_t count = context->num_threads * ss_rows(context, args[ROWS_KIND]);
    for (int64_t i = 0; i < count; i++) ((ss_best *)args[BEST])[i] = (ss_best){-INFINITY, 0};
    return SS_OK;
}

ss_output ss_output_of(const ss_context *context, const int64_t *args, const void *bias,
                       int bias_float32, int thread) {
    const int64_t rows = ss_rows(context, args[ROWS_KIND]);
    ss_best *best = args[BEST] ? (ss_best *)args[BEST] + thread * rows : 0;
    return (ss_output){
        .y = (void *)args[Y],
        .stride = args[Y_STRIDE],
        .bias = bias,
        .bias_float32 = bias_float32,
        .is_float32 = (int)args[Y_FLOAT32],
        .stores = !best || context->step->wants_logits,
        .scale = (float)ss_double(args[SCALE]),
        .cap = (float)ss_double(args[CAP]),
        .best = best,
    };
}
