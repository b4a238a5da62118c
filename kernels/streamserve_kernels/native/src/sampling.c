// From logits to token ids, and to the likeliest ones: a row is one unit. What is drawn is told by
// streamserve/runner/sampler.py. Nothing is sorted: what top-k and top-p keep is found by
// bisection, since counting, or adding up, the weights above a threshold takes microseconds.
//
// A row falls into blocks of 256 logits, and the largest of each is found first. Of the k largest
// weights none is below the k-th largest of these: for top-k only a few blocks are looked into.
//
// A NaN counts as -infinity. A row without a finite maximum is left to the caller.
#include "streamserve.h"

#include <math.h>

enum { BLOCK = 256 };

#define NOTHING (-INFINITY)
#define LEAST_WEIGHT 1.401298e-45f  // the least float above 0

enum {
    DRAW_ROWS,   // [L] addresses of rows [V] of float32
    DRAW_MASKS,  // [L] addresses of a bit per token, whole words of 16, or 0: all are allowed
    DRAW_SIZE,   // V
    DRAW_TEMPERATURE,  // [L] float32, 0: greedy
    DRAW_MIN_P,        // [L] float32
    DRAW_TOP_K,        // [L] int64, 0: no limit
    DRAW_TOP_P,        // [L] float64
    DRAW_UNIFORMS,     // [L] float64
    DRAW_IDS,          // [L] int64; -1: no finite maximum
    DRAW_SCRATCH,      // [threads, bytes]
    DRAW_SCRATCH_BYTES,
};

enum {
    TOP_ROWS,
    TOP_SIZE,
    TOP_COUNTS,       // [L] int64, at most K; -1: the row is left out
    TOP_WIDTH,        // K
    TOP_IDS,          // [L, K] int64: by falling logit, then by rising id
    TOP_NORMALISERS,  // [L] float64: log of the sum of all exp(logit); NaN: no finite maximum
    TOP_SCRATCH,
    TOP_SCRATCH_BYTES,
};

// What a thread has in hand, in this order in its scratch: see `work_bytes` of sampling.py.
typedef struct {
    double *sums;   // [blocks] of a block's weights
    float *maxima;  // [blocks] logits
    float *peaks;   // [blocks] their weights
    float *values;  // [V] weights: exp((logit - largest) / temperature), 0 of what is cut off
    int32_t *ids;   // [V] whose they are, where only some were collected
    float *room;    // [V]
} scratch;

typedef struct {
    const float *logits;
    const uint16_t *mask;
    int64_t size, blocks;
    float largest, inverse_temperature;
    scratch s;
} row;

static int64_t whole_vectors(int64_t count) { return ss_ceil_div(count, 16) * 16; }

static row begin_row(int64_t address, int64_t mask, int64_t size, int64_t memory) {
    row r = {.logits = (const float *)address, .mask = (const uint16_t *)mask, .size = size};
    r.blocks = ss_ceil_div(size, BLOCK);
    r.s.sums = (double *)memory;
    r.s.maxima = (float *)(r.s.sums + whole_vectors(r.blocks));
    r.s.peaks = r.s.maxima + whole_vectors(r.blocks);
    r.s.values = r.s.peaks + whole_vectors(r.blocks);
    r.s.ids = (int32_t *)(r.s.values + whole_vectors(size));
    r.s.room = (float *)(r.s.ids + whole_vectors(size));
    return r;
}

static inline __m512 logits_at(const row *r, int64_t at) {
    __mmask16 present = ss_mask(r->size - at);
    if (r->mask && present) present &= r->mask[at / 16];
    const __m512 nothing = _mm512_set1_ps(NOTHING);
    const __m512 logits = present == 0xffff
                              ? _mm512_loadu_ps(r->logits + at)
                              : _mm512_mask_loadu_ps(nothing, present, r->logits + at);
    return _mm512_max_ps(logits, nothing);  // a NaN is what comes first, and does not count
}

static inline __m512 weights_of(const row *r, __m512 logits) {
    const __m512 less = _mm512_sub_ps(logits, _mm512_set1_ps(r->largest));
    return ss_exp(_mm512_mul_ps(less, _mm512_set1_ps(r->inverse_temperature)));
}

static int64_t end_of(int64_t size, int64_t block) { return ss_min(size, (block + 1) * BLOCK); }

static void find_maxima(row *r) {
    __m512 largest = _mm512_set1_ps(NOTHING);
    for (int64_t b = 0; b < r->blocks; b++) {
        __m512 most = _mm512_set1_ps(NOTHING);
        for (int64_t at = b * BLOCK; at < end_of(r->size, b); at += 16)
            most = _mm512_max_ps(most, logits_at(r, at));
        r->s.maxima[b] = _mm512_reduce_max_ps(most);
        largest = _mm512_max_ps(largest, most);
    }
    r->largest = _mm512_reduce_max_ps(largest);
}

// The lowest id of the largest logit.
static int64_t first_of_largest(const row *r) {
    int64_t at = 0;
    while (r->s.maxima[at] != r->largest) at++;
    for (at *= BLOCK;; at += 16) {
        const __mmask16 equal =
            _mm512_cmp_ps_mask(logits_at(r, at), _mm512_set1_ps(r->largest), _CMP_EQ_OQ);
        if (equal) return at + __builtin_ctz(equal);
    }
}

// What lies behind the last of `count` weights, to the end of its vector, weighs nothing.
static inline __m512 weights_at(const float *values, int64_t count, int64_t at) {
    return count - at >= 16 ? _mm512_loadu_ps(values + at)
                            : _mm512_maskz_loadu_ps(ss_mask(count - at), values + at);
}

// All weights of at least `least`.
static void fill_weights(row *r, float least) {
    const __m512 zero = _mm512_setzero_ps();
    for (int64_t at = 0; at < r->size; at += 16) {
        const __m512 w = weights_of(r, logits_at(r, at));
        const __mmask16 kept = _mm512_cmp_ps_mask(w, _mm512_set1_ps(least), _CMP_GE_OQ);
        _mm512_mask_storeu_ps(r->s.values + at, ss_mask(r->size - at),
                              _mm512_mask_mov_ps(zero, kept, w));
    }
}

static inline __attribute__((always_inline)) __m512 measure_block(const float *values,
                                                                  int64_t count, __m512 bound,
                                                                  int by_mass) {
    const __m512 zero = _mm512_setzero_ps(), one = _mm512_set1_ps(1.0f);
    __m512 sums[] = {zero, zero, zero, zero};
    for (int64_t at = 0; at < BLOCK; at += 64) {
        for (int i = 0; i < 4; i++) {
            const __m512 w = weights_at(values, count, at + 16 * i);
            const __mmask16 kept = _mm512_cmp_ps_mask(w, bound, _CMP_GE_OQ);
            sums[i] = _mm512_add_ps(sums[i], _mm512_mask_mov_ps(zero, kept, by_mass ? w : one));
        }
    }
    return _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]));
}

// How many of the weights, or with `by_mass` how much, are at least `least`, which is above 0.
static double measure(const float *values, int64_t count, float least, int by_mass) {
    const __m512 bound = _mm512_set1_ps(least);
    double total = 0.0;
    int64_t start = 0;
    for (; start + BLOCK <= count; start += BLOCK)
        total += _mm512_reduce_add_ps(by_mass ? measure_block(values + start, BLOCK, bound, 1)
                                              : measure_block(values + start, BLOCK, bound, 0));
    if (start < count)
        total += _mm512_reduce_add_ps(
            measure_block(values + start, count - start, bound, by_mass));
    return total;
}

static float float_of(uint32_t bits) {
    union {
        uint32_t bits;
        float value;
    } u = {bits};
    return u.value;
}

// Those of the weights that lie in [low, high); how many.
static int64_t between(const float *values, int64_t count, float low, float high, float *found) {
    int64_t size = 0;
    for (int64_t at = 0; at < count; at += 16) {
        const __m512 w = weights_at(values, count, at);
        unsigned inside = _mm512_cmp_ps_mask(w, _mm512_set1_ps(low), _CMP_GE_OQ) &
                          _mm512_cmp_ps_mask(w, _mm512_set1_ps(high), _CMP_LT_OQ);
        for (; inside; inside &= inside - 1) found[size++] = values[at + __builtin_ctz(inside)];
    }
    return size;
}

// The largest bound with which `measure` reaches `target`, or LEAST_WEIGHT; what lies above it is
// `above`. Floats from 0 on rise as their bits do. `room` is for as many weights.
static float bound_of(const float *values, int64_t count, double target, int by_mass, float *room,
                      double *above) {
    uint32_t low = 1, high = 0x3f800001;  // of LEAST_WEIGHT, and of what is above 1
    double base = 0.0;                    // of those that are no longer looked at
    *above = 0.0;
    for (int turn = 0; high - low > 1; turn++) {
        if (turn == 8) {
            count = between(values, count, float_of(low), float_of(high), room);
            values = room;
            base = *above;
        }
        const uint32_t middle = low + (high - low) / 2;
        const double reached = base + measure(values, count, float_of(middle), by_mass);
        if (reached >= target) {
            low = middle;
        } else {
            high = middle;
            *above = reached;
        }
    }
    return float_of(low);
}

// Cuts off what is below `bound`, and of what is equal to it all but the first `ties`.
static void cut(float *values, int64_t count, float bound, double ties) {
    const __m512 zero = _mm512_setzero_ps(), least = _mm512_set1_ps(bound);
    for (int64_t at = 0; at < count; at += 16) {
        const __m512 w = weights_at(values, count, at);
        __mmask16 kept = _mm512_cmp_ps_mask(w, least, _CMP_GE_OQ);
        for (unsigned equal = _mm512_cmp_ps_mask(w, least, _CMP_EQ_OQ); equal; equal &= equal - 1)
            if (ties-- < 1.0) kept &= (__mmask16) ~(1u << __builtin_ctz(equal));
        _mm512_mask_storeu_ps(values + at, ss_mask(count - at), _mm512_mask_mov_ps(zero, kept, w));
    }
}

// Which of the weights an inverse CDF finds: only one block is looked into. Rounding may keep the
// block's own sum below the target; its last that weighs anything then has it.
static int64_t draw_from(const scratch *s, int64_t count, double uniform) {
    const int64_t blocks = ss_ceil_div(count, BLOCK);
    double total = 0.0, sum = 0.0, before = 0.0;
    int64_t block = 0, last = 0;
    for (int64_t b = 0; b < blocks; b++)
        total += s->sums[b] = measure(s->values + b * BLOCK, end_of(count, b) - b * BLOCK,
                                      LEAST_WEIGHT, 1);
    const double target = uniform * total;
    for (int64_t b = 0; b < blocks && sum <= target; b++) {
        block = b;
        before = sum;
        sum += s->sums[b];
    }
    sum = before;
    for (int64_t i = block * BLOCK; i < end_of(count, block) && sum <= target; i++) {
        if (s->values[i] == 0.0f) continue;
        last = i;
        sum += s->values[i];
    }
    return last;
}

// The weights of at least `least`, and whose they are; how many.
static int64_t collect(const row *r, float least) {
    int64_t count = 0;
    for (int64_t b = 0; b < r->blocks; b++) {
        if (r->s.peaks[b] * 1.00001f < least) continue;  // with room for rounding
        for (int64_t at = b * BLOCK; at < end_of(r->size, b); at += 16) {
            const __m512 w = weights_of(r, logits_at(r, at));
            unsigned found = _mm512_cmp_ps_mask(w, _mm512_set1_ps(least), _CMP_GE_OQ);
            found &= ss_mask(r->size - at);
            if (!found) continue;
            float weights[16] __attribute__((aligned(64)));
            _mm512_store_ps(weights, w);
            for (; found; found &= found - 1) {
                const int lane = __builtin_ctz(found);
                r->s.values[count] = weights[lane];
                r->s.ids[count++] = (int32_t)(at + lane);
            }
        }
    }
    return count;
}

// A weight that the k largest of a row reach: the k-th largest peak.
static float least_of_top(const row *r, int64_t k) {
    for (int64_t b = 0; b < r->blocks; b += 16)
        _mm512_mask_storeu_ps(
            r->s.peaks + b, ss_mask(r->blocks - b),
            weights_of(r, _mm512_maskz_loadu_ps(ss_mask(r->blocks - b), r->s.maxima + b)));
    double above;
    return bound_of(r->s.peaks, r->blocks, (double)k, 0, r->s.room, &above);
}

static int64_t draw(row *r, float min_p, int64_t top_k, double top_p, double uniform) {
    float *values = r->s.values;
    const float least = fmaxf(min_p, LEAST_WEIGHT);
    int64_t count = r->size;
    double above;
    if (top_k > 0) {
        count = collect(r, fmaxf(least_of_top(r, top_k), least));
        if (count > top_k) {
            const float bound = bound_of(values, count, (double)top_k, 0, r->s.room, &above);
            cut(values, count, bound, INFINITY);  // those that tie with the k-th stay
        }
    } else {
        fill_weights(r, least);
    }
    if (top_p < 1.0) {
        const double mass = top_p * measure(values, count, LEAST_WEIGHT, 1);
        const float bound = bound_of(values, count, mass, 1, r->s.room, &above);
        cut(values, count, bound, ceil((mass - above) / bound));
    }
    const int64_t found = draw_from(&r->s, count, uniform);
    return top_k > 0 ? r->s.ids[found] : found;
}

static int64_t row_units(const ss_context *context, const int64_t *args) {
    (void)args;
    return context->step->num_tokens;
}

static void draw_run(const ss_context *context, const int64_t *args, int64_t unit,
                     int64_t num_units, int thread) {
    (void)context, (void)num_units;
    const float temperature = ((const float *)args[DRAW_TEMPERATURE])[unit];
    row r = begin_row(((const int64_t *)args[DRAW_ROWS])[unit],
                      ((const int64_t *)args[DRAW_MASKS])[unit], args[DRAW_SIZE],
                      args[DRAW_SCRATCH] + thread * args[DRAW_SCRATCH_BYTES]);
    int64_t *id = (int64_t *)args[DRAW_IDS] + unit;
    find_maxima(&r);
    if (!isfinite(r.largest)) {
        *id = -1;
    } else if (temperature == 0.0f) {
        *id = first_of_largest(&r);
    } else {
        r.inverse_temperature = 1.0f / temperature;
        *id = draw(&r, ((const float *)args[DRAW_MIN_P])[unit],
                   ((const int64_t *)args[DRAW_TOP_K])[unit],
                   ((const double *)args[DRAW_TOP_P])[unit],
                   ((const double *)args[DRAW_UNIFORMS])[unit]);
    }
}

const ss_operation ss_draw = {row_units, draw_run, 0};

static float logit_of(const row *r, int64_t id) { return fmaxf(r->logits[id], NOTHING); }

// The first of the candidates by falling logit, then by rising id.
static void rank(const row *r, int64_t candidates, int64_t wanted, int64_t *ids) {
    int64_t count = 0;
    for (int64_t i = 0; i < candidates; i++) {
        const float logit = logit_of(r, r->s.ids[i]);
        if (count == wanted && logit <= logit_of(r, ids[count - 1])) continue;
        int64_t at = count < wanted ? count++ : wanted - 1;
        for (; at > 0 && logit > logit_of(r, ids[at - 1]); at--) ids[at] = ids[at - 1];
        ids[at] = r->s.ids[i];
    }
}

static void top_run(const ss_context *context, const int64_t *args, int64_t unit, int64_t num_units,
                    int thread) {
    (void)context, (void)num_units;
    row r = begin_row(((const int64_t *)args[TOP_ROWS])[unit], 0, args[TOP_SIZE],
                      args[TOP_SCRATCH] + thread * args[TOP_SCRATCH_BYTES]);
    double *normaliser = (double *)args[TOP_NORMALISERS] + unit;
    const int64_t wanted = ((const int64_t *)args[TOP_COUNTS])[unit];
    *normaliser = NAN;
    if (wanted < 0) return;
    find_maxima(&r);
    if (!isfinite(r.largest)) return;
    r.inverse_temperature = 1.0f;
    fill_weights(&r, 0.0f);
    *normaliser = r.largest + log(measure(r.s.values, r.size, LEAST_WEIGHT, 1));
    if (wanted == 0) return;
    // Logits rank them, and weights that are too small do not tell them apart.
    const float least = 0.99999f * least_of_top(&r, wanted);
    const int64_t candidates = collect(&r, least < 1e-30f ? 0.0f : least);
    rank(&r, candidates, wanted, (int64_t *)args[TOP_IDS] + unit * args[TOP_WIDTH]);
}

const ss_operation ss_top_logits = {row_units, top_run, 0};
