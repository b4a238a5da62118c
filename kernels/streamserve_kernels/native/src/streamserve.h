// The native CPU kernels: plain C on pointers and strides, no torch and no Python headers.
//
// A *program* is an array of instructions; `ss_run` executes it for one step. Every instruction is
// cut into units of work. A thread takes those of its own range first, one after the other in
// memory, and then what is left of the others'. An instruction is over when all its units are done,
// not when all threads have met: one that the system has taken off its core for a while holds up
// nobody who can do its share.
//
// Shape letters are those of interface.py: T tokens, L rows that need logits, R requests.
#ifndef STREAMSERVE_H
#define STREAMSERVE_H

#include "simd.h"
#include <stdint.h>

typedef uint16_t bf16;

enum { SS_MAX_ARGS = 24, SS_MAX_THREADS = 256, SS_MAX_PLANS = 4 };

// What changes from step to step. Mirrored by library.py.
typedef struct {
    int64_t num_tokens;    // T
    int64_t num_logits;    // L
    int64_t num_requests;  // R
    int64_t table_stride;  // elements between two rows of block_table
    const int64_t *input_ids;
    const int64_t *positions;
    const int64_t *slot_mapping;
    const int64_t *logits_indices;
    const int32_t *query_start_loc;
    const int32_t *seq_lens;
    const int32_t *block_table;
    int64_t num_groups;
    const int32_t *group_members;
    const int32_t *group_starts;
    const int32_t *group_blocks;
    int64_t wants_logits;  // 0: the arg-max of each row is all that is asked for
    const int32_t *state_slots;  // [R], or 0 where no layer keeps a state
    const int32_t *state_saves;  // [T]
} ss_step;

typedef struct {
    int64_t op;
    int64_t args[SS_MAX_ARGS];  // addresses, sizes, bits of doubles: see each operation
} ss_instruction;

// What `ss_run` returns. Mirrored by execute.py.
enum { SS_OK = 0, SS_NO_MEMORY = -1, SS_OUT_OF_RANGE = -2, SS_BAD_PLAN = -3 };

// One operation. `units` says into how many pieces a step's work falls, `run` does one of them;
// `begin`, where there is one, runs once before the step, on the calling thread. Unless it returns
// SS_OK, nothing is run.
typedef struct ss_context ss_context;
typedef struct {
    int64_t (*units)(const ss_context *context, const int64_t *args);
    void (*run)(const ss_context *context, const int64_t *args, int64_t unit, int64_t num_units,
                int thread);
    int (*begin)(const ss_context *context, const int64_t *args);
} ss_operation;

// Attention's work for one step: the same for all layers whose heads are alike. See attention.c.
typedef struct ss_attention_plan ss_attention_plan;
typedef struct {
    ss_attention_plan *plan;
    ss_attention_plan *without_groups;  // the same one if there are no groups
} ss_plans;

// Rows of a product with one expert: a slice of all pairs of a token and an expert.
typedef struct {
    int64_t first, count, all;
} ss_slice;

struct ss_context {
    const ss_step *step;
    int num_threads;
    ss_plans plans[SS_MAX_PLANS];  // one for each of the sizes that layers have
    int64_t longest;               // of the step's seq_lens
    ss_slice slice;                // of a product with one expert
};

extern const ss_operation ss_embedding, ss_gather_rows, ss_rms_norm, ss_layer_norm, ss_rotary_write,
    ss_gated, ss_activation, ss_add, ss_scale, ss_linear, ss_argmax, ss_attend, ss_attend_merge,
    ss_copy_blocks, ss_quantise, ss_linear_quant, ss_embedding_quant,
    ss_pack_quant, ss_stored_sums, ss_stored_linear, ss_stored_pack, ss_stored_rows,
    ss_gather_inputs, ss_table_linear, ss_adapt_down, ss_adapt_up, ss_route, ss_order_pairs,
    ss_gather_pairs, ss_experts, ss_combine_pairs, ss_add_shared,
    ss_draw, ss_top_logits,
    ss_causal_conv, ss_delta_scales, ss_delta_rule, ss_gated_norm, ss_sigmoid_gate,
    ss_state_space_times, ss_state_space, ss_norm_of_gated,
    ss_multiply, ss_by_head;

const ss_operation *ss_operation_of(const ss_instruction *instruction);

static inline double ss_double(int64_t bits) {
    union {
        int64_t i;
        double d;
    } value = {bits};
    return value.d;
}

static inline int64_t ss_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t ss_max(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ss_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// a / b of what fits 32 bits. A division of 64 takes up to 90 cycles before Ice Lake, too many for
// what is done once a tile or a vector.
static inline int64_t ss_small_div(int64_t a, int64_t b) { return (uint32_t)a / (uint32_t)b; }

// Rows of an instruction: 0 is the step's tokens, 1 the rows that need logits; 1 + k and -(1 + k)
// the pairs of these, or of those, and one of their k experts; SS_SLICE the pairs of one expert.
enum { SS_SLICE = -1 };

static inline int64_t ss_rows(const ss_context *context, int64_t kind) {
    const ss_step *step = context->step;
    if (kind == SS_SLICE) return context->slice.count;
    if (kind > 1) return (kind - 1) * step->num_tokens;
    if (kind < 0) return (-kind - 1) * step->num_logits;
    return kind ? step->num_logits : step->num_tokens;
}

// The first of them, in the memory of all.
static inline int64_t ss_first_row(const ss_context *context, int64_t kind) {
    return kind == SS_SLICE ? context->slice.first : 0;
}

// Rows of one unit: enough that taking it costs little.
static inline int64_t ss_row_units(int64_t rows, int64_t width, int num_threads) {
    if (rows * width < 4096) return rows ? 1 : 0;
    return ss_min(rows, 4 * (int64_t)num_threads);
}

// The same where one row of a wide layer is worth sharing: cut along the row.
static inline int64_t ss_vector_units(int64_t rows, int64_t width, int num_threads) {
    return rows ? ss_min(rows * ss_ceil_div(width, 16) / 32 + 1, 4 * (int64_t)num_threads) : 0;
}

#define SS_FOR_ROWS(row, rows)                                                            \
    for (int64_t row##_all = (rows), row = row##_all * unit / num_units,                  \
                 row##_end = row##_all * (unit + 1) / num_units; row < row##_end; row++)

static inline float ss_widen(bf16 value) {
    union {
        uint32_t i;
        float f;
    } wide = {(uint32_t)value << 16};
    return wide.f;
}

static inline __m512 ss_load(const bf16 *from) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16));
}

static inline __mmask16 ss_mask(int64_t count) {
    return count >= 16 ? (__mmask16)0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1);
}

static inline __m512 ss_load_masked(const bf16 *from, __mmask16 mask) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}

// to[i] = from[i], in float32; reads and writes no more than `count`.
static inline void ss_widen_row(float *to, const bf16 *from, int64_t count) {
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) _mm512_storeu_ps(to + i, ss_load(from + i));
    if (i < count) {
        const __mmask16 left = ss_mask(count - i);
        _mm512_mask_storeu_ps(to + i, left, ss_load_masked(from + i, left));
    }
}

// A row's elements as factors: in `room`, [count], if they must be widened, else where they lie.
static inline const ss_factor *ss_factors_of(const bf16 *row, float *room, int64_t count) {
#if SS_WIDENS
    ss_widen_row(room, row, count);
    return room;
#else
    (void)room, (void)count;
    return row;
#endif
}

static inline __m256i ss_round(__m512 value) { return (__m256i)_mm512_cvtneps_pbh(value); }

static inline void ss_store(bf16 *to, __m512 value) {
    _mm256_storeu_si256((__m256i *)to, ss_round(value));
}

static inline void ss_store_masked(bf16 *to, __m512 value, __mmask16 mask) {
    _mm256_mask_storeu_epi16(to, mask, ss_round(value));
}

// The value as it comes back from being stored.
static inline __m512 ss_rounded(__m512 value) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(ss_round(value)), 16));
}

// e**x within 2 ulp; 0 far below, infinity far above.
static inline __m512 ss_exp(__m512 x) {
    // Further out the remainder f is no longer small. (A NaN is what comes second, and stays.)
    x = _mm512_max_ps(_mm512_set1_ps(-150.0f), x);
    x = _mm512_min_ps(_mm512_set1_ps(150.0f), x);
    const __m512 log2e = _mm512_set1_ps(1.44269504088896341f);
    const __m512 high = _mm512_set1_ps(0.693145751953125f);
    const __m512 low = _mm512_set1_ps(1.42860682030941723212e-6f);
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, log2e), 8);
    __m512 f = _mm512_fnmadd_ps(n, high, x);
    f = _mm512_fnmadd_ps(n, low, f);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(f, f), _mm512_add_ps(f, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

// attention.c
ss_attention_plan *ss_plan_new(void);
void ss_plan_free(ss_attention_plan *plan);
// Lays out a step's attention, of sizes Hq, Hkv, Dv, S; returns 0, or -1 when memory ran out.
int ss_plan_build(ss_attention_plan *plan, const ss_step *step, int num_threads,
                  const int64_t *sizes);

#endif
